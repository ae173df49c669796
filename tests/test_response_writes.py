"""A small response is one write to the socket. A streamed one begins before its body is there."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import cast

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from job_registry_api.connections import Bounds, HTTPConnection, ServerConfig
from job_registry_api.http_messages import respond

REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
CLOSING = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


UPGRADE = (
    b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Recorded(asyncio.Transport):
    """A transport that records what is written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_closed = False
        self.has_written_eof = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closed
        assert not self.has_written_eof
        self.writes.append(bytes(data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_written_eof = True

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol


def connected(app: ASGIApp) -> tuple[HTTPConnection, Recorded]:
    bounds = Bounds(10, 60.0, 60.0, 60.0, 60.0, 100_000, 0)
    config = ServerConfig(app, bounds, log_config=None, access_log=False, lifespan="off")
    config.load()
    connection = HTTPConnection(config, ServerState(), {})
    transport = Recorded()
    transport.set_protocol(connection)
    connection.connection_made(transport)
    return connection, transport


async def turns() -> None:
    """Let the event loop do all that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


async def answered(app: ASGIApp, request: bytes) -> Recorded:
    """Send a request, and return the transport when its response is complete."""
    connection, transport = connected(app)
    connection.data_received(request)
    await turns()
    assert connection.cycle.response_complete
    closed = transport.is_closed
    connection.connection_lost(None)
    transport.is_closed = closed  # uvicorn closes it here as well.
    return transport


async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
    await respond(send, 200, b"hello", content_type=b"text/plain")


@pytest.mark.parametrize("request_bytes", [REQUEST, CLOSING])
async def test_the_head_and_the_body_of_a_response_are_written_at_once(
    request_bytes: bytes,
) -> None:
    transport = await answered(answer, request_bytes)
    (whole,) = transport.writes
    head, body = whole.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b"hello"
    assert transport.is_closed is (request_bytes == CLOSING)


async def test_a_connection_that_is_lost_is_freed_at_once() -> None:
    """Garbage is collected rarely: see `job_registry_api.cli`."""
    connection, transport = connected(answer)
    connection.data_received(REQUEST)
    await turns()
    gc.collect()
    gc.disable()
    try:
        connection.connection_lost(None)
        await turns()
        lost = weakref.ref(connection)
        del connection, transport.protocol, transport
        assert lost() is None
    finally:
        gc.enable()


async def test_a_connection_that_becomes_a_websocket_is_freed_at_once() -> None:
    async def accept(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()

    connection, transport = connected(cast(ASGIApp, accept))
    gc.collect()
    gc.disable()
    try:
        connection.data_received(UPGRADE)
        await turns()
        assert transport.writes[0].startswith(b"HTTP/1.1 101")
        became = weakref.ref(connection)
        del connection
        assert became() is None
        transport.get_protocol().connection_lost(None)
        await turns()
    finally:
        gc.enable()


async def test_pipelined_responses_come_in_order() -> None:
    transport = await answered(answer, REQUEST * 2)
    assert [each.endswith(b"hello") for each in transport.writes] == [True, True]


async def test_the_head_of_a_stream_does_not_wait_for_its_first_event() -> None:
    begun = asyncio.Event()

    async def stream(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await begun.wait()
        await send({"type": "http.response.body", "body": b"event", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    connection, transport = connected(cast(ASGIApp, stream))
    connection.data_received(REQUEST)
    await turns()
    assert transport.writes[0].endswith(b"\r\n\r\n")
    begun.set()
    await turns()
    assert transport.writes[1:] == [b"5\r\nevent\r\n", b"0\r\n\r\n"]
    connection.connection_lost(None)


@pytest.mark.parametrize("ending", ["garbage", "shutdown", "limit"])
async def test_a_response_without_a_body_is_written_before_the_connection_ends(ending: str) -> None:
    """A HEAD request is answered completely when its head is sent. What the same turn of the event
    loop brings next must not be written before it, nor instead of it."""

    async def answer_and_go_on(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        if ending == "garbage":
            connection.data_received(b"\0\r\n\r\n")
        elif ending == "shutdown":
            connection.shutdown()
        else:
            connection.end()  # As the oldest connection that waits, for a new one.

    connection, transport = connected(cast(ASGIApp, answer_and_go_on))
    connection.data_received(b"HEAD / HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await turns()
    heads = [each.split(b"\r\n")[0] for each in transport.writes]
    assert heads == [b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Bad Request"][: 1 + (ending == "garbage")]
    connection.connection_lost(None)


async def test_a_client_that_is_to_continue_is_told_so_before_it_is_refused() -> None:
    async def read(_scope: Scope, receive: Receive, _send: Send) -> None:
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        connection.data_received(b"no size of a chunk\r\n")
        await waiting

    connection, transport = connected(cast(ASGIApp, read))
    connection.data_received(
        b"POST / HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    await turns()
    heads = [each.split(b"\r\n")[0] for each in transport.writes]
    assert heads == [b"HTTP/1.1 100 Continue", b"HTTP/1.1 400 Bad Request"]
    connection.connection_lost(None)


async def test_the_head_of_an_answer_whose_connection_was_lost_is_not_written() -> None:
    async def begin(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        transport.abort()
        await asyncio.Event().wait()

    connection, transport = connected(cast(ASGIApp, begin))
    connection.data_received(REQUEST)
    await turns()
    assert transport.is_closed
    assert transport.writes == []
    connection.connection_lost(None)


@pytest.mark.parametrize("requests", [1, 2])
async def test_a_request_hears_that_its_connection_was_lost_though_others_wait_for_its_answer(
    requests: int,
) -> None:
    served = []

    async def wait_and_answer(_scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request":
            pass
        served.append(message["type"])
        await respond(send, 200, b"too late", content_type=b"text/plain")

    connection, transport = connected(cast(ASGIApp, wait_and_answer))
    connection.data_received(REQUEST * requests)
    await turns()
    transport.abort()
    connection.connection_lost(None)
    await turns()
    assert served == ["http.disconnect"]
    assert transport.writes == []


@pytest.mark.parametrize("requests", [1, 2])
async def test_requests_of_one_connection_that_the_server_ends_are_not_an_error_in_the_log(
    caplog: pytest.LogCaptureFixture, requests: int
) -> None:
    async def wait(_scope: Scope, _receive: Receive, _send: Send) -> None:
        await asyncio.Event().wait()

    connection, transport = connected(cast(ASGIApp, wait))
    connection.data_received(REQUEST * requests)
    await turns()
    for task in list(connection.tasks):
        task.cancel()  # As uvicorn does with requests that outlast its shutdown.
    await turns()
    assert transport.is_closed
    assert not caplog.records
    connection.connection_lost(None)


async def test_a_stream_writes_nothing_to_a_connection_that_is_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def stream(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        connection.end()  # The connection is lost in the next turn of the event loop.
        await send({"type": "http.response.body", "body": b"second"})

    connection, transport = connected(cast(ASGIApp, stream))
    connection.data_received(REQUEST)
    await turns()
    assert b"second" not in b"".join(transport.writes)
    assert not caplog.records
    connection.connection_lost(None)


async def test_a_refused_handshake_of_a_websocket_is_not_an_error_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refuse(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 429, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"later"})

    connection, transport = connected(cast(ASGIApp, refuse))
    connection.data_received(
        b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await turns()
    assert transport.writes[0].startswith(b"HTTP/1.1 429")
    assert transport.writes[0].endswith(b"later")
    assert not caplog.records
    transport.protocol.connection_lost(None)
