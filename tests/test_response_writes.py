"""A small response is one write to the socket. A streamed one begins before its body is there."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from job_registry_api.connections import Bounds, HTTPConnection, ServerConfig
from job_registry_api.http_messages import respond

REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
CLOSING = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


class Recorded(asyncio.Transport):
    """A transport that records what is written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closed
        self.writes.append(bytes(data))

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
