"""Connections are bounded in number, time and size, whoever opens them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from tests.http_client import serving
from tests.test_auth import AUTH, bearer

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /graphql HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
JOB = {"type": "thumbnail.create", "payload": {"assetId": "a", "versionNumber": 1}}


@asynccontextmanager
async def opened(address: str) -> AsyncIterator[Stream]:
    """A connection to a server, which is reset at the end."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer_to(address: str, *parts: bytes, pause: float = 0.0, wait: float = 8.0) -> str:
    """All that the server answers to these bytes until it closes or resets the connection."""
    async with opened(address) as (reader, writer):
        receiving = asyncio.create_task(all_of(reader))
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
        async with asyncio.timeout(wait):
            return (await receiving).decode(errors="replace")


async def all_of(reader: asyncio.StreamReader) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(65_536):
            received += more
    return received


async def is_alive(address: str, below: bytes = b"") -> bool:
    """Whether `/healthz` answers on a new connection, below this path."""
    try:
        async with opened(address) as (reader, writer), asyncio.timeout(1):
            writer.write(HEALTH.replace(b"/", below + b"/", 1))
            return b"200" in await reader.readline()
    except (ConnectionError, TimeoutError):
        return False


@pytest.fixture
async def address(database_url: str) -> AsyncIterator[str]:
    """A server with short times."""
    async with serving(
        database_url,
        "--no-worker",
        header_timeout_seconds="1",
        body_timeout_seconds="1",
        idle_timeout_seconds="1",
        unread_timeout_seconds="1",
        max_body_bytes="100000",
    ) as (address, _):
        yield address


async def test_a_connection_that_sends_nothing_is_closed(address: str) -> None:
    assert await answer_to(address) == ""


async def test_headers_have_to_arrive_in_time(address: str) -> None:
    slow = [bytes([letter]) for letter in HEALTH]
    answer = await answer_to(address, *slow, pause=0.06)
    assert answer.startswith("HTTP/1.1 408 ")
    assert '"code":"request_timeout"' in answer


async def test_a_body_has_to_arrive_in_time(address: str) -> None:
    slow = [b" "] * 25
    answer = await answer_to(address, POST + b"content-length: 100\r\n\r\n", *slow, pause=0.06)
    assert answer.startswith("HTTP/1.1 408 ")


async def test_a_body_that_follows_its_answer_has_to_arrive_in_time(address: str) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = await answer_to(address, head, *([b"1\r\nx\r\n"] * 40), pause=0.06)
    assert answer.count("HTTP/1.1") == 1
    assert answer.startswith("HTTP/1.1 404 ")


async def test_an_idle_connection_is_closed(address: str) -> None:
    answer = await answer_to(address, HEALTH, *([b"\r\n"] * 25), pause=0.06)
    assert answer.count("HTTP/1.1") == 1


async def test_a_connection_serves_one_request_after_the_other(address: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        for pause in (0.0, 0.5, 0.5, 0.0):
            await asyncio.sleep(pause)
            response = await client.post("/graphql", json={"query": "{ __typename }"})
            assert response.status_code == 200


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\na: " + b"x" * 200_000 + b"\r\n\r\n", 431),
        (b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 1_000 + b"\r\n", 431),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400),
        (POST + b"content-length: -5\r\n\r\n", 400),
        (POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n" + HEALTH, 400),
        (b"\x16\x03\x01" + b"\x00" * 50, 400),
    ],
)
async def test_a_request_that_is_not_within_the_bounds_is_refused(
    address: str, head: bytes, status: int
) -> None:
    answer = await answer_to(address, head)
    assert answer.startswith(f"HTTP/1.1 {status} "), answer[:200]
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"]


BODY = b'{"query":"{ __typename }"}'


@pytest.mark.parametrize(("size", "status"), [(65_536, 200), (65_537, 431)])
async def test_the_size_of_a_head_is_exact_with_its_body_in_the_same_write(
    address: str, size: int, status: int
) -> None:
    headers = {b"host": b"localhost", b"content-type": b"application/json"}
    headers[b"content-length"] = b"%d" % len(BODY)
    counted = len(b"/graphql" + b"filler") + sum(map(len, [*headers, *headers.values()]))
    headers[b"filler"] = b"x" * (size - counted)
    head = b"".join(b"%s: %s\r\n" % pair for pair in headers.items())
    answer = await answer_to(address, b"POST /graphql HTTP/1.1\r\n" + head + b"\r\n" + BODY)
    assert answer.startswith(f"HTTP/1.1 {status} "), answer[:200]


@pytest.mark.parametrize(("headers", "status"), [(100, 200), (101, 431)])
async def test_the_number_of_headers_is_exact(address: str, headers: int, status: int) -> None:
    more = b"a: b\r\n" * (headers - 1)
    answer = await answer_to(
        address, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + more, b"\r\n"
    )
    assert answer.startswith(f"HTTP/1.1 {status} "), answer[:200]


async def test_headers_after_a_body_of_chunks_are_counted_too(address: str) -> None:
    chunked = POST + b"transfer-encoding: chunked\r\n\r\n0\r\n"
    answer = await answer_to(address, chunked, *[b"a: b\r\n" * 50] * 4, b"\r\n", pause=0.02)
    assert answer.startswith("HTTP/1.1 431 "), answer[:200]


H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAI\r\n"
"""What Java's client sends with the first request of a connection."""

UPGRADES = {
    "h2c": H2C,
    "websocket in the first of two headers": b"connection: upgrade\r\nupgrade: websocket\r\n"
    b"connection: keep-alive\r\n",
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["at once", "later"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunks"])
async def test_a_request_for_another_protocol_is_served_with_its_body(
    address: str, upgrade: bytes, pause: float, is_chunked: bool
) -> None:
    body, size = BODY, b"content-length: %d\r\n\r\n" % len(BODY)
    if is_chunked:
        body, size = (
            b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
            b"transfer-encoding: chunked\r\n\r\n",
        )
    requests = [POST + upgrade + size, body] * 2 + [HEALTH, HEALTH]
    if not pause:
        requests = [b"".join(requests)]
    answer = await answer_to(address, *requests, pause=pause)
    assert answer.count("HTTP/1.1 ") == answer.count("HTTP/1.1 200 ") == 4, answer
    assert answer.count('{"data":{"__typename":"Query"}}') == 2


async def test_a_request_for_another_protocol_may_be_the_last_of_its_connection(
    address: str,
) -> None:
    head = POST + H2C + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    answer = await answer_to(address, head + BODY, wait=0.8)
    assert answer.startswith("HTTP/1.1 200 ")
    assert answer.endswith('{"data":{"__typename":"Query"}}')


async def test_the_body_of_a_request_for_another_protocol_is_not_read_as_a_request(
    address: str,
) -> None:
    head = POST + H2C + b"content-length: %d\r\n\r\n" % len(HEALTH)
    answer = await answer_to(address, head, HEALTH, pause=0.1)
    assert answer.count("HTTP/1.1") == 1
    assert answer.startswith("HTTP/1.1 400 "), answer


TOO_LARGE = b"x" * 1_000_000
HANDSHAKE = (
    b"GET /graphql HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
CLOSING = POST + b"connection: close\r\n"


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\na: " + TOO_LARGE + b"\r\n\r\n", 431),
        (b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 160_000 + b"\r\n", 431),
        (POST + b"content-length: -5\r\n\r\n" + TOO_LARGE, 400),
        (POST + b"content-length: 1000000\r\n\r\n" + TOO_LARGE, 413),
        (CLOSING + b"content-length: 1000000\r\n\r\n" + TOO_LARGE, 413),
        (POST + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 160_000, 413),
        (HANDSHAKE + b"x: " + b"y" * 20_000 + b"\r\n\r\n" + TOO_LARGE, 400),
    ],
    ids=["header", "headers", "malformed", "declared body", "closing", "chunks", "handshake"],
)
async def test_a_client_that_sends_its_whole_request_first_reads_why_it_is_refused(
    address: str, request_: bytes, status: int
) -> None:
    host, _, port = address.rpartition(":")

    def sent_first() -> tuple[int, bytes]:
        # Blocking: no part of the answer is read before the whole request has been sent.
        with socket.create_connection((host, int(port)), timeout=8) as client:
            client.sendall(request_)
            time.sleep(0.2)
            answer = b""
            while more := client.recv(65_536):
                answer += more
        return int(answer.split()[1]), answer

    answered, answer = await asyncio.to_thread(sent_first)
    assert answered == status
    head = answer.lower().partition(b"\r\n\r\n")[0]
    assert b"\r\ncache-control: no-store" in head
    assert b"\r\nx-content-type-options: nosniff" in head
    assert b"\r\nvary: accept" in head


async def test_a_refused_client_that_never_ends_is_disconnected(address: str) -> None:
    async with opened(address) as (_, writer):
        began = time.monotonic()
        writer.write(b"GET /healthz HTTP/1.1\r\na: " + TOO_LARGE)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 5:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        assert time.monotonic() - began < 3


async def test_a_body_in_tiny_chunks_is_bounded_by_its_bytes_on_the_wire(address: str) -> None:
    head = POST + b"transfer-encoding: chunked\r\n\r\n"
    answer = await answer_to(address, head, b"1\r\n \r\n" * 80_000)
    assert answer.startswith("HTTP/1.1 413 ")


async def test_a_header_without_end_is_read_no_further_than_its_bound(address: str) -> None:
    async with opened(address) as (_, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\na: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for sent in range(500):  # noqa: B007
                writer.write(b"x" * 65_536)
                await writer.drain()
        assert sent < 400


async def test_trailers_are_bounded(address: str) -> None:
    head = POST + b"transfer-encoding: chunked\r\n\r\n0\r\n"
    answer = await answer_to(address, head, b"a: b\r\n" * 10_000)
    assert answer == "" or answer.startswith("HTTP/1.1 4")


async def test_a_client_that_expects_100_gets_it_before_it_sends_the_body(address: str) -> None:
    body = b'{"query": "{ __typename }"}'
    head = POST + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with opened(address) as (reader, writer):
        writer.write(head)
        assert b"100 Continue" in await reader.readline()
        writer.write(body)
        assert b'"Query"' in await reader.readuntil(b"}}")


async def test_a_few_requests_in_advance_are_served_and_many_are_not(address: str) -> None:
    async with opened(address) as (reader, writer):
        writer.write(HEALTH * 5)
        for _ in range(5):
            await reader.readuntil(b'{"status":"ok"}')
    assert (await answer_to(address, HEALTH * 1_000)).count("HTTP/1.1") < 20


async def test_a_long_poll_and_a_subscription_outlast_the_times(address: str) -> None:
    lease = 'leaseJobs(input: {jobTypes: ["payout.execute"], workerId: "w", waitSeconds: 3})'
    events = {"id": "1", "type": "subscribe", "payload": {"query": SUBSCRIPTION}}
    async with (
        httpx.AsyncClient(base_url=f"http://{address}", timeout=10) as client,
        connect(
            f"ws://{address}/graphql", subprotocols=[Subprotocol("graphql-transport-ws")]
        ) as socket,
        client.stream(
            "POST",
            "/graphql",
            json={"query": SUBSCRIPTION},
            headers={"accept": "text/event-stream"},
        ) as stream,
    ):
        await socket.send('{"type": "connection_init"}')
        await socket.recv()
        await socket.send(json.dumps(events))
        query = f"mutation {{ {lease} {{ __typename }} }}"
        assert (await client.post("/graphql", json={"query": query})).status_code == 200
        await client.post("/jobs", json=JOB)
        assert json.loads(await asyncio.wait_for(socket.recv(), 3))["type"] == "next"
        assert "next" in await asyncio.wait_for(anext(stream.aiter_lines()), 3)


SUBSCRIPTION = "subscription { jobEvents { name } }"


async def test_half_open_requests_do_not_shut_others_out(database_url: str) -> None:
    async with (
        serving(database_url, "--no-worker", max_connections="50") as (address, _),
        AsyncExitStack() as stack,
    ):
        for _ in range(150):
            _, writer = await stack.enter_async_context(opened(address))
            writer.write(HEALTH[:30])
        assert await is_alive(address)
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            assert (await client.post("/jobs", json=JOB)).status_code == 201


async def test_bodies_that_nobody_reads_do_not_shut_others_out(database_url: str) -> None:
    async with (
        serving(database_url, "--no-worker", **AUTH, max_connections="16") as (address, _),
        AsyncExitStack() as stack,
    ):
        for _ in range(40):
            reader, writer = await stack.enter_async_context(opened(address))
            writer.write(POST + b"content-length: 1000\r\n\r\n")
            assert b"401" in await reader.readline()
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            stored = await client.post("/jobs", json=JOB, headers=bearer("jobs:enqueue"))
            assert stored.status_code == 201


async def test_when_every_connection_is_busy_only_health_is_served(database_url: str) -> None:
    lease = 'leaseJobs(input: {jobTypes: ["payout.execute"], workerId: "w", waitSeconds: 20})'
    poll = json.dumps({"query": f"mutation {{ {lease} {{ __typename }} }}"}).encode()
    async with (
        serving(database_url, "--no-worker", max_connections="16", root_path="/queue") as (
            address,
            _,
        ),
        AsyncExitStack() as stack,
    ):
        for _ in range(16):
            _, writer = await stack.enter_async_context(opened(address))
            writer.write(POST + b"content-length: %d\r\n\r\n" % len(poll) + poll)
        await asyncio.sleep(0.3)
        for _ in range(20):
            await stack.enter_async_context(opened(address))
        assert await is_alive(address)
        assert await is_alive(address, below=b"/queue")
        answer = await answer_to(address, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert answer.startswith("HTTP/1.1 503 ")
        assert "retry-after: 5" in answer
        with pytest.raises(Exception, match="503"):
            await stack.enter_async_context(connect(f"ws://{address}/graphql"))


async def test_a_websocket_does_not_begin_before_the_answers_to_earlier_requests(
    address: str,
) -> None:
    lease = 'leaseJobs(input: {jobTypes: ["payout.execute"], workerId: "w", waitSeconds: 1})'
    poll = json.dumps({"query": f"mutation {{ {lease} {{ __typename }} }}"}).encode()
    upgrade = (
        b"GET /graphql HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"sec-websocket-protocol: graphql-transport-ws\r\n\r\n"
    )
    request = POST + b"content-length: %d\r\n\r\n" % len(poll) + poll
    assert "101 " not in await answer_to(address, request + upgrade)
    assert "101 " not in await answer_to(address, request, upgrade, pause=0.2)
    async with opened(address) as (reader, writer), asyncio.timeout(8):
        writer.write(HEALTH)
        await reader.readuntil(b'{"status":"ok"}')
        writer.write(upgrade)
        assert b" 101 " in await reader.readline()


@pytest.mark.slow
async def test_a_client_that_does_not_read_its_answer_is_disconnected(address: str) -> None:
    query = json.dumps({"query": "{ __schema { types { " + "description " * 1_500 + "} } }"})
    head = POST + b"content-length: %d\r\n\r\n" % len(query)
    async with opened(address) as (_, writer):
        cast(asyncio.ReadTransport, writer.transport).pause_reading()
        with contextlib.suppress(ConnectionError):
            for _ in range(3_000):
                writer.write(head + query.encode())
                await asyncio.wait_for(writer.drain(), 3)
        await asyncio.sleep(3)
        assert not await is_open(writer)


async def is_open(writer: asyncio.StreamWriter) -> bool:
    """Whether the server has not reset the connection."""
    try:
        writer.write(HEALTH)
        await asyncio.sleep(0.1)
        writer.write(HEALTH)
        await asyncio.wait_for(writer.drain(), 1)
    except (ConnectionError, TimeoutError):
        return False
    return True


@pytest.mark.slow
async def test_a_server_out_of_file_descriptors_waits_and_recovers(database_url: str) -> None:
    async with serving(database_url, "--no-worker") as (address, pid):
        assert await is_alive(address)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64))
        async with AsyncExitStack() as stack:
            for _ in range(100):
                await stack.enter_async_context(opened(address))
            spent = cpu_seconds(pid)
            await asyncio.sleep(2)
            assert cpu_seconds(pid) - spent < 0.5
        deadline = time.monotonic() + 5
        while not await is_alive(address):
            assert time.monotonic() < deadline


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
