"""The connections of `job-registry serve`, bounded in number, time and size.

uvicorn's protocols parse HTTP and WebSockets; these subclasses add the bounds that it lacks.
Nothing here knows callers: the application says when a WebSocket is admitted.
"""

from __future__ import annotations

import asyncio
import resource
from array import array
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, Final, Protocol, cast

import structlog
import uvicorn
from httptools import HttpParserUpgrade, HttpRequestParser
from pydantic_core import to_json
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import State

from job_registry_api.http_messages import (
    GUARDING_HEADERS,
    HEALTH_PATHS,
    MAX_UNADMITTED_MESSAGE,
    TRY_AGAIN_LATER,
    WEBSOCKET_ADMISSION,
    WEBSOCKET_FRAMES,
    error_content,
    respond_json,
)
from job_registry_api.settings import Settings

log = structlog.get_logger("job_registry.connections")

RESERVE: Final = 16
"""Connections above the limit, on which only the health paths are served."""

MAX_HEAD_BYTES: Final = 65_536
MAX_HEADERS: Final = 100
MAX_PIPELINED: Final = 16
"""The largest head of a request, and the most requests that wait for the response to another."""

MAX_UNADMITTED_BYTES: Final = 65_536
"""What a WebSocket may send in total before it is admitted."""

MAX_CONTROL_FRAMES: Final = 100
"""Pings and pongs per second and WebSocket. Clients send one every few seconds."""

MAX_FRAGMENTS: Final = 1_000
"""Fragments per WebSocket message: empty ones are free of the limit of its size."""

PIECE: Final = 16_384
"""How many bytes of a request are parsed before its size is checked, and of WebSocket frames before
other connections are served."""

MIN_READ: Final = 262_144
"""Bytes of an answer that a client has to read within the time limit, or all that is left."""

YIELD_SECONDS: Final = 3.0
"""How long an answer may be unread before its connection may be ended for a new one."""

SWEEP_SECONDS: Final = 0.25
LINGER_SECONDS: Final = 1.0
LINGER_BYTES: Final = 8_388_608
"""How long, and how many bytes, a connection that exceeded a limit is still read and ignored.

If it were closed while its client still sends, it would be reset, and the client would lose the
answer (RFC 9112, section 9.6).
"""

CLOSE_SECONDS: Final = 5.0
"""How long a WebSocket that is being closed may take to read what it was sent."""

_DESCRIPTORS: Final = 128
_DESCRIPTORS_PER_DATABASE_CONNECTION: Final = 4
"""File descriptors for everything but connections. SQLite opens three per connection."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of connections. Each has a setting, whose description explains it."""

    connections: int
    header_seconds: float
    body_seconds: float
    idle_seconds: float
    unread_seconds: float
    body_bytes: int
    upload_bytes: int


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration with bounded connections."""

    def __init__(self, app: ASGIApp, bounds: Bounds, **options: Any) -> None:
        self.open = OpenConnections(bounds)
        super().__init__(
            cast(Any, app),
            http=HTTPConnection,
            ws=WebSocketConnection,
            # A few bytes on the wire may be many in memory, and nobody has been admitted yet.
            ws_per_message_deflate=False,
            ws_max_size=bounds.body_bytes,
            # A client that is gone is noticed after 40 s at most.
            ws_ping_interval=20.0,
            ws_ping_timeout=20.0,
            timeout_keep_alive=max(1, round(bounds.idle_seconds)),
            **options,
        )


def bounds_of(settings: Settings) -> Bounds:
    """Return the bounds of this process. Its limit of file descriptors is raised for them."""
    return Bounds(
        connections=_within_descriptors(settings.max_connections, settings.database_pool_size),
        header_seconds=settings.header_timeout_seconds,
        body_seconds=settings.body_timeout_seconds,
        idle_seconds=settings.idle_timeout_seconds,
        unread_seconds=settings.unread_timeout_seconds,
        body_bytes=settings.max_body_bytes,
        upload_bytes=settings.max_upload_bytes,
    )


def _within_descriptors(wanted: int, database_connections: int) -> int:
    """Return how many connections this process can have, `wanted` at most.

    The limit of file descriptors is raised as far as the process may: a server without one left
    can neither accept a connection nor open its database.
    """
    others = _DESCRIPTORS + _DESCRIPTORS_PER_DATABASE_CONNECTION * database_connections + RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + others
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        if raised < needed:
            possible = max(RESERVE, raised - others)
            log.warning("connections.limited", wanted=wanted, possible=possible, descriptors=raised)
            return possible
    return wanted


class _Bounded(Protocol):
    def check(self, now: float) -> None:
        """End the connection if it is late."""

    def end(self) -> None:
        """End the connection at once, and forget what it was sent."""


class OpenConnections:
    """The open connections, and which of them may be ended for the sake of a new one."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._open: set[_Bounded] = set()
        self._waiting: dict[_Bounded, None] = {}
        """Those that serve no request, the oldest first."""
        self._sweep: asyncio.TimerHandle | None = None

    def add(self, connection: _Bounded) -> Place:
        """Add a connection. Once there are too many, the oldest that waits is ended for it."""
        place = Place.SERVED
        if len(self._open) >= self.bounds.connections:
            if self._waiting:
                oldest = next(iter(self._waiting))
                self.remove(oldest)
                oldest.end()
            if len(self._open) >= self.bounds.connections + RESERVE:
                return Place.REFUSED
            if len(self._open) >= self.bounds.connections:
                place = Place.RESERVE
        self._open.add(connection)
        self._waiting[connection] = None
        if self._sweep is None:
            self._sweep_later()
        return place

    def remove(self, connection: _Bounded) -> None:
        """Remove a connection that has ended."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def is_busy(self, connection: _Bounded) -> None:
        """Note that a connection serves a request, or is admitted."""
        self._waiting.pop(connection, None)

    def waits(self, connection: _Bounded) -> None:
        """Note that a connection waits for its next request."""
        if connection in self._open:
            self._waiting[connection] = None

    def _sweep_later(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._check_all)

    def _check_all(self) -> None:
        self._sweep = None
        now = asyncio.get_running_loop().time()
        for connection in list(self._open):
            connection.check(now)
        if self._open:
            self._sweep_later()


class Place(Enum):
    """What is served on a new connection: everything, only the health paths, or nothing."""

    SERVED = auto()
    RESERVE = auto()
    REFUSED = auto()


class _Phase(Enum):
    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    RESPONSE = auto()


class _RequestTooLarge(Exception):
    """Raised in a callback of the parser, to stop it."""


class HTTPConnection(HttpToolsProtocol):
    """An HTTP connection whose client has limited time for each part of a request.

    The time of a response is not limited as long as the client reads it: long polls and event
    streams last.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ServerConfig)
        self._application = cast(ASGIApp, self.app)
        self.app = cast(Any, self._serve)
        self._open = config.open
        self._bounds = config.open.bounds
        self._place = Place.SERVED
        self._phase = _Phase.HEAD
        self._deadline: float | None = None
        self._unread = _Unread()
        self.parser = _RequestParser(self)
        self._wire_bytes = 0
        self._body_bytes = 0
        self.headers = []
        self._refusal: HTTPStatus | None = None
        self._is_ending = False
        self._ignored_bytes = 0
        self._unanswered: deque[RequestResponseCycle] = deque()
        """The request that is served, and those that wait for its answer."""

    # As narrow as in uvicorn.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, unless there are too many."""
        super().connection_made(transport)
        self._deadline = self.loop.time() + self._bounds.header_seconds
        self._place = self._open.add(self)
        if self._place is Place.RESERVE:
            self._application = _only_health(self._application)
        elif self._place is Place.REFUSED:
            self.end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._open.remove(self)
        self._disconnect_requests()
        self._free()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what the client sent, as far as it is within the bounds."""
        if self._is_ending:
            self._ignored_bytes += len(data)
            if self._ignored_bytes > LINGER_BYTES:
                self.transport.close()
            return
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self._wire_bytes += len(piece)
            super().data_received(piece)
            if self.has_ended or self.transport.get_protocol() is not self or self._refuses_size():
                return

    def _refuses_size(self) -> bool:
        """Refuse the request if it is too large, and return whether it is."""
        # What comes after a body of chunks are headers, too.
        if len(self.headers) > MAX_HEADERS or (
            self._phase is _Phase.HEAD and self._wire_bytes > MAX_HEAD_BYTES
        ):
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        # Chunks have their own overhead, and a body is read to its end after its response. What
        # takes the body bounds it more tightly.
        elif self._phase is _Phase.BODY and (
            self._body_bytes > max(self._bounds.body_bytes, self._bounds.upload_bytes)
            or self._wire_bytes - self._body_bytes > self._bounds.body_bytes + MAX_HEAD_BYTES
        ):
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            return False
        return True

    def on_message_begin(self) -> None:
        """Begin to count the head of a request."""
        super().on_message_begin()
        self._phase = _Phase.HEAD
        self._deadline = self.loop.time() + self._bounds.header_seconds
        self._wire_bytes = self._body_bytes = 0

    def on_headers_complete(self) -> None:
        """Serve the request; its body may still come."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(HTTPStatus.TOO_MANY_REQUESTS)
        if len(self.headers) > MAX_HEADERS or self._head_is_too_large():
            self._stop(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if self.ignores_upgrade:
            return  # The parser begins again, with the same head.
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:  # Not of a WebSocket.
            # A response to HEAD has no body to wait for. After "100 Continue" the client sends its
            # body, so that must not wait either.
            head_waits = self.scope["method"] != "HEAD" and not self.expect_100_continue
            response = _ResponseTransport(self, head_waits=head_waits)
            self.cycle.transport = cast(asyncio.Transport, response)
            self._unanswered.append(self.cycle)
            if 1 < len(self._unanswered) < MAX_PIPELINED:
                # uvicorn reads on for an application that waits for the end of the connection, but
                # not past this request. The application then waits again.
                self._unanswered[0].message_event.set()
        self._phase = _Phase.BODY
        self._deadline = self.loop.time() + self._bounds.body_seconds
        self._open.is_busy(self)

    def on_body(self, body: bytes) -> None:
        """Count a piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock: the client has sent its request."""
        if self.ignores_upgrade:
            return
        super().on_message_complete()
        self._phase = _Phase.RESPONSE
        self._deadline = None
        self._wait_if_done()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        if self._unanswered:
            self._unanswered.popleft()
        if self._is_ending:
            return
        super().on_response_complete()
        self._wait_if_done()
        if self._phase is _Phase.BODY and self.cycle.response_complete:
            self._open.waits(self)  # For the rest of a body that nobody reads.

    @property
    def ignores_upgrade(self) -> bool:
        """Whether the request is to change to another protocol than WebSocket, as Java's client
        requests with "Upgrade: h2c". It is then served as any other (RFC 9110, 7.8)."""
        if not self.parser.should_upgrade() or self.parser.get_method() == b"CONNECT":
            return False
        last = dict(self.headers)  # As in uvicorn, the last header of a name counts.
        tokens = [each.strip() for each in last.get(b"connection", b"").lower().split(b",")]
        return b"upgrade" not in tokens or last.get(b"upgrade", b"").lower() != b"websocket"

    def head_without_upgrade(self) -> bytes:
        """Return the head of the request without "Upgrade"."""
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def handle_websocket_upgrade(self) -> None:
        """Become a WebSocket, which counts as one connection with its handshake."""
        if self._place is not Place.SERVED:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.end()  # The answer to an earlier request would be sent over the WebSocket.
            return
        self._open.remove(self)
        super().handle_websocket_upgrade()
        self._free()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that does not parse, or that the parser was stopped at."""
        self._refuse(self._refusal or HTTPStatus.BAD_REQUEST)

    def resume_writing(self) -> None:
        """Go on writing: the client has read."""
        self._unread.forget()
        if self._phase is _Phase.RESPONSE and not self.cycle.response_complete:
            self._open.is_busy(self)
        super().resume_writing()

    def check(self, now: float) -> None:
        """End the connection if the client is late."""
        if self.transport.is_closing() or self.flow.write_paused:
            size = self.transport.get_write_buffer_size()
            if self._unread.is_stalled(now, size, self._bounds.unread_seconds):
                self.end()
            elif self._unread.is_stalled(now, size, YIELD_SECONDS):
                self._open.waits(self)
        elif self.flow.read_paused:
            # The application does not read: the client is not late.
            if self._phase is _Phase.BODY:
                self._deadline = now + self._bounds.body_seconds
        elif self._deadline is not None and now > self._deadline:
            has_begun = self._phase is not _Phase.HEAD or self._wire_bytes
            if self._is_ending or self._phase is _Phase.IDLE or not has_begun:
                self.transport.close()
            else:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def end(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def close(self) -> None:
        """Close the connection after its last answer.

        What the client still sends of its request is ignored for a moment, so that it reads the
        answer before it notices the end.
        """
        if self.has_ended:
            return
        if self._phase not in (_Phase.HEAD, _Phase.BODY):
            self.transport.close()
            return
        self._is_ending = True
        self._deadline = self.loop.time() + LINGER_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._open.waits(self)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is read from the client, or written to it."""
        return self._is_ending or self.transport.is_closing()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. One that has not ended when the server does is refused."""
        try:
            await self._application(scope, receive, send)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise  # Not by uvicorn, which cancels what runs on once its time is over.
            if self.cycle.response_complete:
                self.close()
            else:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, _STOPPING)

    def _wait_if_done(self) -> None:
        # The last request that was parsed; pipelined ones come before it.
        if (
            self._phase is _Phase.RESPONSE
            and self.cycle is not None
            and self.cycle.response_complete
        ):
            self._phase = _Phase.IDLE
            self._deadline = self.loop.time() + self._bounds.idle_seconds
            self._open.waits(self)

    def _head_is_too_large(self) -> bool:
        # The piece that a head begins in is not among the bytes on the wire.
        if self._wire_bytes <= MAX_HEAD_BYTES - PIECE:
            return False
        sizes = [len(name) + len(value) for name, value in self.headers]
        return len(self.url) + sum(sizes) > MAX_HEAD_BYTES

    def _stop(self, status: HTTPStatus) -> None:
        """Stop the parser, which then refuses the request."""
        self._refusal = status
        raise _RequestTooLarge

    def _free(self) -> None:
        """Leave no cycle of references, so that the memory is free at once."""
        self.app = cast(Any, self._application)
        self.parser = cast(Any, None)
        if self.cycle is not None:
            self.cycle.transport = self.transport
        for cycle in self._unanswered:
            cycle.transport = self.transport
        self._unanswered.clear()

    def _disconnect_requests(self) -> None:
        """End the requests without an answer. uvicorn ends only the last one that it has parsed."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

    def _refuse(self, status: HTTPStatus, reason: tuple[str, str] | None = None) -> None:
        """Answer the request that is being read, or served, and close the connection."""
        cycle = self.cycle
        if self.has_ended:
            return
        if cycle is not None and not cycle.response_complete:
            # The application gets a disconnect instead of the rest of the body.
            self._disconnect_requests()
            if cycle.response_started or self._phase is _Phase.HEAD or self.pipeline:
                self.end()  # The response of an earlier request is not complete.
                return
        elif cycle is not None and self._phase is _Phase.BODY:
            self.close()  # It has been answered.
            return
        self.transport.write(_refusal(status, reason))
        self.close()


class _RequestParser(HttpRequestParser):
    """The parser of a connection. It parses the body of a request whose upgrade is ignored.

    By itself it leaves what follows the head to the other protocol, and would then parse the body
    as the next request.
    """

    def __init__(self, connection: HTTPConnection) -> None:
        super().__init__(connection)
        # As in uvicorn, data after a request with "Connection: close" is not an error.
        self.set_dangerous_leniencies(lenient_data_after_close=True)
        self._connection = connection

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        """Parse a piece of what the client has sent."""
        try:
            super().feed_data(data)
        except HttpParserUpgrade as upgrade:
            connection = self._connection
            if not connection.ignores_upgrade:
                raise
            (offset,) = upgrade.args
            again = connection.head_without_upgrade() + bytes(data)[offset:]
            # Another parser: after "Connection: close" this one has ended.
            connection.parser = _RequestParser(connection)
            connection.parser.feed_data(again)


class _ResponseTransport:
    """What uvicorn writes a response to. It closes a connection as `HTTPConnection.close` does.

    If `head_waits`, the head waits for the first part of the body until the end of this turn of the
    event loop, and shares its write: a write to a socket takes longer than most of what makes a
    response.
    """

    def __init__(self, connection: HTTPConnection, *, head_waits: bool) -> None:
        self._connection = connection
        self._head = b""
        self._has_begun = not head_waits

    def write(self, data: bytes) -> None:
        if self._has_begun:
            head, self._head = self._head, b""
            self._write(head + data)
        else:
            self._has_begun = True
            self._head = data
            self._connection.loop.call_soon(self._flush)

    def is_closing(self) -> bool:
        return self._connection.has_ended

    def close(self) -> None:
        self._flush()
        self._connection.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._write(head)

    def _write(self, data: bytes) -> None:
        # Between the end of a connection and `connection_lost`, uvloop raises an error.
        if not self._connection.transport.is_closing():
            self._connection.transport.write(data)


def _refusal(status: HTTPStatus, reason: tuple[str, str] | None = None) -> bytes:
    """Return the response that refuses a request which no application answers.

    `reason` is the code and the message, unless they are those of the status.
    """
    body = to_json(error_content(*(reason or _REFUSALS[status])))
    headers = {"content-type": "application/json", **GUARDING_HEADERS, **_RETRY.get(status, {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode() + body


_RETRY: Final = {
    HTTPStatus.SERVICE_UNAVAILABLE: {"retry-after": "5"},
    HTTPStatus.TOO_MANY_REQUESTS: {"retry-after": "1"},
}

_STOPPING: Final = ("stopping", "The server stopped before it had answered the request.")

_REFUSALS: Final = {
    HTTPStatus.BAD_REQUEST: ("bad_request", "The request is not valid HTTP."),
    HTTPStatus.REQUEST_TIMEOUT: ("request_timeout", "The request did not arrive in time."),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("too_large", "The body is too large."),
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        "headers_too_large",
        f"Expected at most {MAX_HEADERS} headers, and {MAX_HEAD_BYTES:,} bytes with the path.",
    ),
    HTTPStatus.TOO_MANY_REQUESTS: (
        "rate_limited",
        f"Expected at most {MAX_PIPELINED} requests that wait for a response on one connection.",
    ),
    HTTPStatus.SERVICE_UNAVAILABLE: (
        "too_many_connections",
        "The server has as many connections as it may have; try again.",
    ),
}


def _only_health(app: ASGIApp) -> ASGIApp:
    """Return an application that serves the health paths of `app`, and refuses everything else."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith(HEALTH_PATHS):  # A proxy may not have stripped its prefix.
            await app(scope, receive, send)
            return
        content = error_content(*_REFUSALS[HTTPStatus.SERVICE_UNAVAILABLE])
        more = {**GUARDING_HEADERS, **_RETRY[HTTPStatus.SERVICE_UNAVAILABLE], "connection": "close"}
        headers = tuple((name.encode(), value.encode()) for name, value in more.items())
        await respond_json(send, 503, content, headers=headers)

    return serve


class WebSocketConnection(WebSocketsSansIOProtocol):
    """A WebSocket that may send little until the application admits it.

    The application admits it through the ASGI extension `WEBSOCKET_ADMISSION` of the scope.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ServerConfig)
        self._open = config.open
        self._bounds = config.open.bounds
        # Checked when a frame's header arrives, before its payload is read.
        self.conn.max_message_size = MAX_UNADMITTED_MESSAGE
        self._is_admitted = False
        self._received = 0
        self._held = b""
        self._has_failed = False
        self._control_frames = 0
        self._control_frames_since = 0.0
        self._incomplete_bytes = 0
        self._incomplete_since = 0.0
        self._unread = _Unread()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the place of the handshake's connection."""
        super().connection_made(transport)
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._open.remove(self)
        self._held = b""
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close a connection that is still open with 1001, going away. uvicorn sends 1012."""
        if self.close_sent or not self.handshake_complete:
            super().shutdown()
            return
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1001})
        self.conn.send_close(1001)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()

    def admit(self) -> None:
        """Let the client send messages of the full size."""
        self._is_admitted = True
        self.conn.max_message_size = self._bounds.body_bytes
        self._open.is_busy(self)

    def handle_connect(self, event: Request) -> None:
        """Serve the handshake, and let the application admit the client."""
        super().handle_connect(event)
        self._incomplete_bytes = 0
        if not self.close_sent:
            self.scope["extensions"] = {
                **(self.scope.get("extensions") or {}),
                WEBSOCKET_ADMISSION: {"admit": self.admit},
                WEBSOCKET_FRAMES: {"send": self.send_frames},
            }

    def data_received(self, data: bytes) -> None:
        """Parse frames, a few at a time: as many as the application has room for."""
        if self._has_failed:
            return
        if not self._is_admitted:
            self._received += len(data)
            if self._received > MAX_UNADMITTED_BYTES:
                self._fail(1008, "Too much before the connection is initialised")
                return
        self._held += data
        self._parse()

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment of a message."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self._fail(1008, f"A message has at most {MAX_FRAGMENTS} fragments")
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answer a ping, unless the client does not read."""
        self._count_control_frame()
        if self.writable.is_set() and not self.close_sent:
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def handle_pong(self, event: Frame) -> None:
        """Take the answer to a ping."""
        self._count_control_frame()
        super().handle_pong(event)

    def keepalive_timeout(self) -> None:
        """Close the connection of a client that has not answered a ping.

        A laptop that slept reads the code later. After uvicorn's own code, 1011, clients of
        graphql-ws do not connect again.
        """
        self.pong_timer = None
        self.pending_ping_payload = None
        self._fail(TRY_AGAIN_LATER, "A ping was not answered")

    def send_receive_event_to_app(self) -> None:
        """Pass a complete message to the application."""
        self._incomplete_bytes = 0
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Send the code of the failure, and close the connection soon.

        Closed at once, a connection whose client still sends is reset, and the code is lost.
        """
        closing = self.conn.close_sent
        assert closing is not None
        self.queue.put_nowait(
            {"type": "websocket.disconnect", "code": closing.code, "reason": closing.reason}
        )
        self.transport.write(b"".join(self.conn.data_to_send()))
        self._held, self._has_failed, self.close_sent = b"", True, True
        self._close_soon()

    async def receive(self) -> Any:
        """Return the next message, and parse more once there is none."""
        message = await super().receive()
        if self._held and not self.read_paused:
            # What has been read comes before what may be read.
            self.transport.pause_reading()
            await asyncio.sleep(0)  # Other connections take their turn.
            self._parse()
            if not self.read_paused:
                self.transport.resume_reading()
        return message

    async def send(self, message: Any) -> None:
        """Send a message of the application."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            # The handshake was refused. For uvicorn it is not complete, which would be an error.
            self.handshake_complete = True
        if self.close_sent:
            self._parse()  # The answer to the close frame.

    async def send_frames(self, frames: bytes) -> None:
        """Send text messages, which are frames already, with one write.

        Nothing is compressed here, so many connections share most of the bytes of their frames.

        Raises:
            WebSocketDisconnect: the client hung up.
        """
        await self.writable.wait()
        if self.disconnected or self.close_sent or self.conn.state is not State.OPEN:
            raise WebSocketDisconnect(1006)
        self.transport.write(frames)

    def resume_writing(self) -> None:
        """Go on writing: the client has read."""
        self._unread.forget()
        super().resume_writing()

    def check(self, now: float) -> None:
        """Close the connection if the client does not read, or does not complete a message."""
        size = self.transport.get_write_buffer_size()
        if self.transport.is_closing():
            if self._unread.is_stalled(now, size, CLOSE_SECONDS):
                self.end()
        elif not self.writable.is_set():
            if self._unread.is_stalled(now, size, self._bounds.unread_seconds):
                self._unread.forget()
                self._fail(TRY_AGAIN_LATER, "The client does not read its messages")
        elif not self._incomplete_bytes or self.read_paused:
            self._incomplete_since = now
        elif now - self._incomplete_since > self._bounds.body_seconds:
            self._fail(TRY_AGAIN_LATER, "A message did not arrive in time")

    def end(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def _parse(self) -> None:
        held, position = self._held, 0
        self._held = b""
        while position < len(held) and not self.read_paused and not self._has_failed:
            piece = held[position : position + PIECE]
            position += len(piece)
            if not self._incomplete_bytes:
                self._incomplete_since = self.loop.time()
            self._incomplete_bytes += len(piece)
            super().data_received(piece)
            if self.conn.handshake_exc is not None and not self.transport.is_closing():
                # The handshake does not parse, and no application will ever see it.
                self._has_failed = True
                self.transport.write(_refusal(HTTPStatus.BAD_REQUEST))
                self._close_soon()
        self._held = b"" if self._has_failed else held[position:]

    def _close_soon(self) -> None:
        """Close the connection when the client has had time to read its last answer."""
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _count_control_frame(self) -> None:
        if not self.frames:
            self._incomplete_bytes = 0
        now = self.loop.time()
        if now - self._control_frames_since > 1:
            self._control_frames_since, self._control_frames = now, 0
        self._control_frames += 1
        if self._control_frames > MAX_CONTROL_FRAMES:
            self._fail(1008, "Too many pings")

    def _fail(self, code: int, reason: str) -> None:
        if self.close_sent or self.transport.is_closing():
            self._held, self._has_failed = b"", True
            return
        if not self.handshake_complete:
            self.end()
            return
        self.conn.fail(code, reason)
        self.handle_parser_exception()


class _Unread:
    """How long a client has not read enough of what it was sent."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._size = 0

    def forget(self) -> None:
        """Begin again: the client has read."""
        self._since = None

    def is_stalled(self, now: float, size: int, seconds: float) -> bool:
        """Return whether the client has read less than `MIN_READ` of this backlog in this time."""
        if self._since is None or size <= self._size - MIN_READ:
            self._since, self._size = now, size
        return now - self._since > seconds
