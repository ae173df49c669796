"""Behind a proxy: a path prefix, forwarded addresses, compression, media types and CORS."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from job_registry_api.compression import Compression, preferred_encoding
from job_registry_api.http_messages import respond_json
from tests import ROOT
from tests.docs.pages import blocks_of
from tests.http_client import Visit, serving
from tests.postgresql_server import free_port
from tests.test_auth import AUTH

PAYOUT = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
TYPES = {"query": "{ jobTypes { name description payloadSchema } }"}
ORIGIN = "https://app.example.com"


@pytest.mark.parametrize("sent", ["/work/queue", ""], ids=["as it came", "stripped"])
async def test_a_prefix_may_be_stripped_or_not(visit: Visit, sent: str) -> None:
    async with visit(root_path="/work/queue") as client:
        created = await client.post(f"{sent}/jobs", json=PAYOUT)
        job = await client.get(f"{sent}/jobs/{created.json()['jobId']}")
        root = await client.get(f"{sent}/")
        unknown = await client.get(f"{sent}/nothing")
        graphql = await client.post(f"{sent}/graphql", json=TYPES)
    assert created.headers["location"] == f"/work/queue/jobs/{created.json()['jobId']}"
    assert (job.status_code, graphql.status_code) == (200, 200)
    assert root.headers["location"] == "graphql"
    assert "/work/queue/graphql" in unknown.json()["error"]["message"]


async def test_a_redirect_stays_inside_the_prefix(visit: Visit) -> None:
    async with visit(root_path="/queue") as client:
        redirected = await client.get("/queue", follow_redirects=False)
    assert redirected.status_code == 307
    assert redirected.headers["location"].endswith("/queue/")


async def test_addresses_are_forwarded_by_the_proxies_that_are_named_only(
    database_url: str,
) -> None:
    async def second_status(**settings: str) -> int:
        async with (
            serving(database_url, "--no-worker", rate_limit="1/minute", **settings) as (at, _),
            httpx.AsyncClient(base_url=f"http://{at}") as client,
        ):
            for number in (1, 2):
                forwarded = {"x-forwarded-for": f"127.0.0.{number}0"}
                answer = await client.post("/graphql", json=TYPES, headers=forwarded)
            return answer.status_code

    assert await second_status() == 429  # Both come from the same address.
    assert await second_status(proxies="192.0.2.0/24") == 429
    assert await second_status(proxies="127.0.0.1/32") == 200


async def test_a_proxy_is_known_by_its_ipv4_address_on_a_server_of_both_protocols(
    database_url: str,
) -> None:
    named = {"proxies": "192.0.2.0/24,127.0.0.0/8", "rate_limit": "1/minute"}
    async with serving(database_url, "--no-worker", "--host", "::", **named, **AUTH) as (at, _):
        url = f"http://127.0.0.1:{at.rpartition(':')[2]}"
        async with httpx.AsyncClient(base_url=url) as client:
            answers = [
                await client.get("/jobs", headers={"x-forwarded-for": address})
                for address in ("203.0.113.1", "203.0.113.2", "203.0.113.1")
            ]
    assert [answer.status_code for answer in answers] == [401, 401, 429]


async def test_a_forwarded_address_is_no_way_around_the_check_of_machines(
    database_url: str,
) -> None:
    async with (
        serving(database_url, "--no-worker", proxies="127.0.0.1") as (at, _),
        httpx.AsyncClient(base_url=f"http://{at}") as client,
    ):
        foreign = {"x-forwarded-for": "203.0.113.9"}
        refused = await client.post("/jobs", json=PAYOUT, headers=foreign)
        own = await client.post("/jobs", json=PAYOUT, headers={"x-forwarded-for": "127.0.0.1"})
    assert (refused.status_code, own.status_code) == (403, 201)


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip, deflate, br, zstd", "br"),
        ("gzip, deflate", "gzip"),
        ("x-gzip", "gzip"),
        ("GZIP;q=1.0, br;q=0.5", "gzip"),
        ("br ; q=0.5, gzip;q=0.5", "br"),
        ("*", "br"),
        ("br;q=0, *;q=0.1", "gzip"),
        ("gzip;q=0", None),
        ("identity, gzip;q=0.5", None),
        ("identity;q=0.5, gzip;q=0.6, br;q=nothing", "gzip"),
        ("*;q=0", None),
        ("zstd", None),
        ("", None),
    ],
)
def test_an_answer_is_encoded_as_the_client_prefers(accepted: str, encoding: str | None) -> None:
    assert preferred_encoding(accepted.lower()) == encoding


@pytest.mark.parametrize("encoding", ["br", "gzip"])
async def test_large_answers_are_compressed_if_that_is_set(visit: Visit, encoding: str) -> None:
    async with visit(compress_bytes="500") as client:
        client.headers["accept-encoding"] = encoding
        large = await client.post("/graphql", json=TYPES)
        small = await client.post("/graphql", json={"query": "{ __typename }"})
        plain = await client.post("/graphql", json=TYPES, headers={"accept-encoding": "identity"})
    async with visit() as client:
        unset = await client.post("/graphql", json=TYPES)
    assert large.headers["content-encoding"] == encoding
    assert int(large.headers["content-length"]) < len(plain.content)
    assert large.json() == plain.json()
    for answer in (large, small, plain):
        assert "accept-encoding" in answer.headers["vary"].lower()
    for answer in (small, plain, unset):
        assert "content-encoding" not in answer.headers


@pytest.mark.parametrize("encoding", ["br", "gzip"])
async def test_an_answer_in_many_pieces_is_compressed_outside_of_the_event_loop(
    encoding: str,
) -> None:
    content = [{"id": number, "name": f"job {number}"} for number in range(30_000)]
    threads = {threading.current_thread()}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond_json(send, 200, content)
        threads.update(threading.enumerate())

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(Compression(app, min_bytes=500)), base_url="http://jobs"
    ) as client:
        answer = await client.get("/", headers={"accept-encoding": encoding})
    assert answer.headers["content-encoding"] == encoding
    assert answer.json() == content
    assert "content-length" not in answer.headers
    assert any(thread.name.startswith("compression") for thread in threads)


@pytest.mark.parametrize(
    ("headers", "encoding"),
    [
        ({"content-type": "application/graphql-response+json; charset=utf-8"}, "gzip"),
        ({"content-type": "text/html", "etag": '"1"'}, "gzip"),
        ({"content-type": "image/png"}, None),
        ({"content-type": "text/event-stream"}, None),
        ({"content-type": "application/json", "content-encoding": "zstd"}, "zstd"),
    ],
)
async def test_only_text_that_is_not_compressed_yet_is_compressed(
    headers: dict[str, str], encoding: str | None
) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(
            Compression(Response("x" * 1_000, headers=headers), min_bytes=500)
        ),
        base_url="http://jobs",
    ) as client:
        client.headers["accept-encoding"] = "gzip"
        async with client.stream("GET", "/") as answer:
            assert answer.headers.get("content-encoding") == encoding
            assert answer.headers.get("etag") == ('W/"1"' if "etag" in headers else None)


async def test_events_are_not_held_back_by_compression(database_url: str) -> None:
    async with (
        serving(database_url, compress_bytes="500") as (at, _),
        httpx.AsyncClient(base_url=f"http://{at}", timeout=10) as client,
        client.stream(
            "POST",
            "/graphql",
            json={"query": "subscription { jobEvents { name } }"},
            headers={"accept": "text/event-stream"},
        ) as events,
    ):
        assert "content-encoding" not in events.headers
        async with httpx.AsyncClient(base_url=f"http://{at}") as other:
            await other.post("/jobs", json=PAYOUT)
        async for line in events.aiter_lines():
            if line.startswith("data:"):
                assert "job." in line
                break


@pytest.mark.cases(6)
@pytest.mark.parametrize("path", ["/graphql", "/jobs"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": 'application/json;charset="utf-8";odata=verbose'}, 200),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
        ({"content-type": "application/json; charset=latin1"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/jsonp"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json", "content-encoding": "br"}, 415),
    ],
)
async def test_bodies_are_json_that_is_not_compressed(
    visit: Visit, path: str, headers: dict[str, str], status: int
) -> None:
    content: Any = json.dumps(TYPES if path == "/graphql" else PAYOUT).encode()
    if headers.get("content-encoding") == "gzip":
        content = gzip.compress(content)
    async with visit() as client:
        answer = await client.post(path, content=content, headers=headers)
    assert answer.status_code == (201 if status == 200 and path == "/jobs" else status)
    if "content-encoding" in headers and status == 415:
        assert answer.headers["accept-encoding"] == "identity"
        assert "Content-Encoding" in answer.text


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/graphql/x/y", "/healthz/x", "/graphql%0A", "/jobs%0A", "/healthz%0A", "/%0A"],
)
async def test_unknown_paths_are_answered_with_json(visit: Visit, path: str) -> None:
    async with visit() as client:
        answer = await client.get(path, headers={"accept": "text/html"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    assert answer.headers["cache-control"] == "no-store"
    assert "etag" not in answer.headers


async def preflight(client: httpx.AsyncClient, *headers: str) -> httpx.Response:
    return await client.options(
        "/graphql",
        headers={
            "origin": ORIGIN,
            "access-control-request-method": "POST",
            "access-control-request-headers": ", ".join(headers),
        },
    )


@pytest.mark.parametrize(
    "headers",
    [
        ("content-type", "authorization", "apollographql-client-name", "apollo-require-preflight"),
        ("content-type", "accept", "x-requested-with"),
        ("traceparent", "tracestate", "baggage"),
        ("b3", "x-b3-traceid", "x-b3-spanid", "x-b3-sampled"),
    ],
    ids=["Apollo", "urql", "OpenTelemetry", "B3"],
)
async def test_pages_may_send_what_real_clients_send(
    visit: Visit, headers: tuple[str, ...]
) -> None:
    async with visit(cors_origins=ORIGIN) as client:
        assert (await preflight(client, *headers)).status_code == 200
        assert (await preflight(client, "x-of-our-own")).status_code == 400
    async with visit(cors_origins=ORIGIN, cors_headers="X-Of-Our-Own, content-type") as client:
        assert (await preflight(client, "x-of-our-own", "content-type")).status_code == 200
        assert (await preflight(client, "traceparent")).status_code == 400


NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")


@contextmanager
def nginx(folder: Path, locations: str) -> Iterator[int]:
    """The port of an nginx with these locations."""
    assert NGINX is not None
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"""daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
  server {{ listen 127.0.0.1:{port}; {locations} }}
}}"""
    )
    process = subprocess.Popen([NGINX, "-c", str(configuration), "-p", str(folder)])
    try:
        for _ in range(100):
            if (folder / "nginx.pid").exists():
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@asynccontextmanager
async def published(database_url: str, folder: Path, *, strip: bool) -> AsyncIterator[str]:
    """The URL under which nginx publishes a server at /queue, as docs/operating.md configures it.

    With a path behind its host, even "/", `proxy_pass` replaces the path of the location.
    """
    (block,) = [
        block for block in blocks_of(ROOT / "docs" / "operating.md") if block.kind == "nginx"
    ]
    settings = {"root_path": "/queue", "proxies": "127.0.0.1"}
    async with serving(database_url, **settings) as (address, _):
        to = f"http://{address}{'/' if strip else ''}"
        with nginx(folder, block.text.replace("http://127.0.0.1:8000", to)) as port:
            yield f"127.0.0.1:{port}/queue"


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize("strip", [True, False], ids=["strips", "does not strip"])
async def test_all_doors_work_behind_nginx(database_url: str, tmp_path: Path, strip: bool) -> None:
    async with (
        published(database_url, tmp_path, strip=strip) as at,
        httpx.AsyncClient(timeout=10) as client,
        connect(f"ws://{at}/graphql", subprotocols=[Subprotocol("graphql-transport-ws")]) as socket,
    ):
        await socket.send('{"type": "connection_init"}')
        assert json.loads(await socket.recv())["type"] == "connection_ack"
        subscription = {"query": "subscription { jobEvents { name } }"}
        await socket.send(json.dumps({"type": "subscribe", "id": "1", "payload": subscription}))
        created = await client.post(f"http://{at}/jobs", json=PAYOUT)
        place = created.headers["location"]
        job = await client.get(f"http://{at.partition('/')[0]}{place}")
        assert job.json()["jobId"] == created.json()["jobId"]
        page = await client.get(f"http://{at}/", follow_redirects=True)
        assert page.url.path == "/queue/graphql"
        assert json.loads(await socket.recv())["payload"]["data"]["jobEvents"]["name"] == (
            "job.created"
        )
