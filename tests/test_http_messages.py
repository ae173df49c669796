"""What GraphQL and REST share of HTTP: guarding headers, cached headers, the way to /graphql."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from job_registry_api.app import create_app
from job_registry_api.http_messages import CACHED_LENGTH, GuardedResponses, cached_if_short
from job_registry_api.settings import load_settings


async def nothing() -> Message:
    return {"type": "http.request"}


async def headers_after(given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    sent: list[Message] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": tuple(given)})

    async def keep(message: Message) -> None:
        sent.append(message)

    await GuardedResponses(app, vary=["Accept", "Origin"])({"type": "http"}, nothing, keep)
    return list(sent[0]["headers"])


CACHE, SNIFF = (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], [CACHE, SNIFF, (b"vary", b"Accept, Origin")]),
        (
            [(b"cache-control", b"max-age=7")],
            [(b"cache-control", b"max-age=7"), SNIFF, (b"vary", b"Accept, Origin")],
        ),
        ([(b"vary", b"origin")], [(b"vary", b"origin, Accept"), CACHE, SNIFF]),
        ([(b"vary", b"Accept, Origin")], [(b"vary", b"Accept, Origin"), CACHE, SNIFF]),
    ],
)
async def test_a_response_keeps_its_headers_and_gets_those_that_guard(
    given: list[tuple[bytes, bytes]], expected: list[tuple[bytes, bytes]]
) -> None:
    assert await headers_after(given) == expected


def test_the_meaning_of_a_short_header_is_computed_once_and_that_of_a_long_one_each_time() -> None:
    computed: list[str] = []

    def length(text: str) -> int:
        computed.append(text)
        return len(text)

    cached = cached_if_short(length)
    short, long = "a" * CACHED_LENGTH, "a" * (CACHED_LENGTH + 1)
    assert [cached(short), cached(short), cached(long), cached(long)] == [256, 256, 257, 257]
    assert computed == [short, long, long]


async def test_a_middleware_that_is_added_to_the_application_sees_requests_to_graphql(
    tmp_path: Path,
) -> None:
    seen: list[str] = []

    class Added:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["path"])
            await self._app(scope, receive, send)

    async def ignore(_message: Any) -> None:
        pass

    settings = load_settings({"JOBS_DATABASE_URL": f"sqlite:///{tmp_path / 'jobs.db'}"})
    for added, expected in ((False, []), (True, ["/graphql"])):
        app = create_app(settings)
        if added:
            app.add_middleware(Added)
        scope = {
            "type": "http",
            "method": "DELETE",
            "path": "/graphql",
            "query_string": b"",
            "headers": [],
        }
        async with app.running():
            await app(scope, nothing, ignore)
        assert seen == expected
