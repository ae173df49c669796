"""What GraphQL and REST share of HTTP: guarding headers, cached headers, the way to /graphql."""

from __future__ import annotations

from contextlib import suppress

import pytest
from starlette.types import Message, Receive, Scope, Send

from job_registry_api.application import ShortWay
from job_registry_api.http_messages import (
    CACHED_LENGTH,
    BodyTooLarge,
    ClientGone,
    GuardedResponses,
    body_of,
    cached_if_short,
    read_body,
)


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


@pytest.mark.parametrize(
    ("path", "root_path", "is_short"),
    [
        ("/graphql", "", True),
        ("/jobs/graphql", "/jobs", True),
        ("/graphql", "/jobs", False),
        ("/graphql/", "", False),
        ("/jobs", "", False),
    ],
)
async def test_the_short_way_is_for_one_path_alone(
    path: str, root_path: str, is_short: bool
) -> None:
    taken: list[str] = []

    async def router(_scope: Scope, _receive: Receive, _send: Send) -> None:
        taken.append("router")

    async def endpoint(_scope: Scope, _receive: Receive, _send: Send) -> None:
        taken.append("endpoint")

    async def ignored(_message: Message) -> None:
        pass

    short_way = ShortWay(router, path="/graphql", endpoint=endpoint)
    for kind in ("http", "websocket"):
        scope = {"type": kind, "path": path, "root_path": root_path}
        await short_way(scope, nothing, ignored)
    assert taken == ["endpoint" if is_short else "router", "router"]


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("parts", [1, 2, 5])
async def test_a_body_is_read_up_to_the_limit_in_however_many_parts_it_comes(
    size: int, parts: int
) -> None:
    body = b"12345"[:size]
    steps = [body[n * size // parts : (n + 1) * size // parts] for n in range(parts)]

    async def receive() -> Message:
        return {"type": "http.request", "body": steps.pop(0), "more_body": len(steps) > 0}

    if size == 4:
        assert await read_body({"headers": []}, receive, 4) == body
    else:
        with pytest.raises(BodyTooLarge):
            await read_body({"headers": []}, receive, 4)


@pytest.mark.parametrize(("length", "reads"), [(b"4", True), (b"5", False)])
async def test_a_body_that_is_declared_as_too_large_is_not_read(length: bytes, reads: bool) -> None:
    was_read = False

    async def receive() -> Message:
        nonlocal was_read
        was_read = True
        return {"type": "http.request", "body": b""}

    with suppress(BodyTooLarge):
        await read_body({"headers": [(b"content-length", length)]}, receive, 4)
    assert was_read is reads


async def test_a_body_that_does_not_end_is_read_no_further_than_the_limit() -> None:
    received = 0

    async def receive() -> Message:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"12", "more_body": received < 100}

    with pytest.raises(BodyTooLarge):
        await read_body({"headers": []}, receive, 4)
    assert received == 3


@pytest.mark.parametrize("parts", [0, 1])
async def test_half_a_body_is_none(parts: int) -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"1", "more_body": True}] * parts

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        await read_body({"headers": []}, receive, 4)
    messages += [{"type": "http.request", "body": b"1", "more_body": True}] * parts
    with pytest.raises(ClientGone):
        _ = [part async for part in body_of(receive)]
