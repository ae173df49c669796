"""Bounded request bodies and JSON responses, shared by GraphQL and REST."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote

from pydantic_core import to_json
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from job_registry import CodedError
from job_registry_api.answer_text import PIECE_BYTES
from job_registry_api.logs import log_unexpected

JSON_TYPE: Final = b"application/json"

GUARDING_HEADERS: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "vary": "Accept",
}
"""The headers of each response that sets no others: see `GuardedResponses`."""

HEALTH_PATHS: Final = ("/healthz", "/readyz", "/metrics")
"""The paths that are served even when there are too many connections."""

WEBSOCKET_ADMISSION: Final = "jobs.websocket.admission"
"""The ASGI extension whose function `admit` lifts the bound of messages before admission."""

WEBSOCKET_FRAMES: Final = "jobs.websocket.frames"
"""The ASGI extension whose function `send` sends several text messages with one write."""

SendFrames = Callable[[bytes], Awaitable[None]]
"""Sends messages, each as a frame: the result of `text_frame_head`, and a text in UTF-8."""

TRY_AGAIN_LATER: Final = 1013
"""The code of a WebSocket that is closed for a reason that may pass. Clients of graphql-ws connect
again after it, and give up after 1008, 1009 and 1011."""

MAX_UNADMITTED_MESSAGE: Final = 16_384
"""The largest WebSocket message before admission, in bytes: it has to hold a bearer token."""

CACHED_HEADERS: Final = 1_000
CACHED_LENGTH: Final = 256
"""The bounds of a cache of what headers mean: how many, and how long each is at most."""

Text = TypeVar("Text", str, bytes)
Meaning = TypeVar("Meaning")


class BodyTooLarge(CodedError):
    """Raised when a request body exceeds the limit, as soon as that is known."""

    code = "too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"Expected a body of at most {max_bytes:,} bytes.")


class MethodNotAllowed(CodedError):
    """Raised when a path does not take the method. `allowed` are the methods that it takes."""

    code = "method_not_allowed"

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed
        *first, last = allowed
        listed = f"{', '.join(first)} and {last}" if first else last
        super().__init__(f"This path accepts only {listed}.")


class UnsupportedMediaType(CodedError):
    """Raised when a request's body is not declared as JSON, or is compressed.

    `headers` are those of the answer.
    """

    code = "unsupported_media_type"

    def __init__(
        self,
        message: str = "The Content-Type must be application/json.",
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.headers = headers
        super().__init__(message)


class ClientGone(Exception):
    """Raised when the client disconnected before it sent its whole request."""


def cached_if_short(meaning_of: Callable[[Text], Meaning]) -> Callable[[Text], Meaning]:
    """Cache what the function returns for the latest short texts.

    Clients send the same few headers with every request. Long ones are computed each time, so that
    the memory of the cache is bounded.
    """
    cached = lru_cache(maxsize=CACHED_HEADERS)(meaning_of)

    def look_up(text: Text) -> Meaning:
        return cached(text) if len(text) <= CACHED_LENGTH else meaning_of(text)

    return look_up


class GuardedResponses:
    """Middleware that keeps responses out of caches, and browsers from guessing what they are.

    A response that sets one of these headers keeps its own: the page and its assets may be cached.
    `vary` are the request headers that responses depend on.

    An exception that no endpoint has answered is logged, and answered here with the id of its log
    line: Starlette's own answer to it would pass by this middleware.
    """

    def __init__(self, app: ASGIApp, *, vary: Sequence[str] = ()) -> None:
        self._app = app
        self._vary = vary
        whole = MutableHeaders(GUARDING_HEADERS)
        self._add_vary(whole)
        self._guarding = whole.raw

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        has_started = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = message["headers"] = list(message.get("headers", ()))
                present = {name for name, _ in headers}
                headers += [pair for pair in self._guarding if pair[0] not in present]
                if b"vary" in present:
                    self._add_vary(MutableHeaders(raw=headers))
            await send(message)

        try:
            await self._app(scope, receive, send_guarded)
        except Exception as error:
            if has_started:
                raise  # The server ends the connection: the client sees that the rest is missing.
            await respond_unexpected(send_guarded, "http", error)

    def _add_vary(self, headers: MutableHeaders) -> None:
        present = headers.get("vary", "").lower()
        for name in self._vary:
            if name.lower() not in present:
                headers.add_vary_header(name)


class PublishedUnder:
    """Middleware for an application that a proxy publishes under a path, the `prefix`.

    Some proxies strip the path from requests, some do not; both are taken. An application that is
    mounted knows its path from its host.
    """

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not scope.get("root_path"):
            path: str = scope["path"]
            if path != self._prefix and not path.startswith(f"{self._prefix}/"):
                path = self._prefix + path
            scope = {**scope, "root_path": self._prefix, "path": path}
        await self._app(scope, receive, send)


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """Read the body of a request.

    Raises:
        BodyTooLarge: the Content-Length or the received body exceeds `max_bytes`.
        ClientGone: the client disconnected.
    """
    declared = header(scope, b"content-length")
    if declared.isdigit() and int(declared) > max_bytes:
        raise BodyTooLarge(max_bytes)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body", False):
        if len(body) > max_bytes:
            raise BodyTooLarge(max_bytes)
        return body
    parts, size = [body], len(body)
    while message["type"] == "http.request" and message.get("more_body", False):
        if size > max_bytes:
            raise BodyTooLarge(max_bytes)
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if message["type"] != "http.request":
        raise ClientGone
    if size > max_bytes:
        raise BodyTooLarge(max_bytes)
    return b"".join(parts)


async def body_of(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the body of a request in the pieces that it comes in.

    Raises:
        ClientGone: the client disconnected before its end.
    """
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        more = message.get("more_body", False)
        yield message.get("body", b"")


def query_parameters(query_string: bytes, most: int) -> list[tuple[str, str]]:
    """Return the names and values of a query string.

    Raises:
        ValueError: it is not ASCII, or has more than `most` of them. The message is for clients.
    """
    try:
        text = query_string.decode("ascii")
        return parse_qsl(text, keep_blank_values=True, max_num_fields=most)
    except ValueError:
        message = f"Expected a percent-encoded query string of up to {most} parameters."
        raise ValueError(message) from None


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client hangs up. The body of the request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def header(scope: Scope, name: bytes) -> bytes:
    """Return the value of a header, b"" if it is missing. `name` is in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def prefix_of(scope: Scope) -> str:
    """Return the path that the application is mounted under, as it stands in a URL."""
    return quote(scope.get("root_path", ""), safe="/:@!$&'()*+,;=~")


def check_media(scope: Scope) -> None:
    """Check that the body of a request is declared as JSON in UTF-8, and not compressed.

    Raises:
        UnsupportedMediaType: it is not.
    """
    if not _is_json(header(scope, b"content-type")):
        raise UnsupportedMediaType
    check_not_compressed(scope)


def check_not_compressed(scope: Scope) -> None:
    """Check that the body of a request is not compressed.

    A few bytes of a compressed body may be many in memory.

    Raises:
        UnsupportedMediaType: it is compressed.
    """
    encoding = header(scope, b"content-encoding").strip().lower()
    if encoding not in (b"", b"identity"):
        # RFC 9110, section 15.5.16: the header tells this 415 from that of the Content-Type.
        raise UnsupportedMediaType(
            "The body must not be compressed: send it without Content-Encoding.",
            headers=((b"accept-encoding", b"identity"),),
        )


@cached_if_short
def _is_json(content_type: bytes) -> bool:
    """Return whether a Content-Type is application/json in UTF-8. Other parameters are ignored."""
    media_type, *parameters = content_type.lower().replace(b" ", b"").split(b";")
    charsets = [each for each in parameters if each.startswith(b"charset=")]
    return media_type == JSON_TYPE and all(
        each.removeprefix(b"charset=").strip(b'"') == b"utf-8" for each in charsets
    )


def text_frame_head(length: int) -> bytes:
    """Return what comes before a text of this many bytes in its WebSocket frame.

    RFC 6455, section 5.2: the only frame of its message, from a server, so it is not masked.
    """
    if length < 126:
        return bytes((0x81, length))
    if length < 65_536:
        return b"\x81\x7e" + length.to_bytes(2, "big")
    return b"\x81\x7f" + length.to_bytes(8, "big")


def error_content(code: str, message: str, details: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the JSON of an error outside of GraphQL."""
    return {"error": {"code": code, "message": message, "details": list(details)}}


async def respond_unexpected(send: Send, where: str, error: Exception) -> None:
    """Log an unexpected exception, and answer with the id of its log line and nothing else."""
    error_id = log_unexpected(where, error)
    message = f"Something went wrong here. It is logged as {error_id}."
    await respond_json(send, 500, error_content("internal_error", message, [{"errorId": error_id}]))


async def deny(socket: WebSocket, response: Response) -> None:
    """Answer a WebSocket's handshake with a response, or with 403 where the server can send no
    other."""
    if "websocket.http.response" in socket.scope.get("extensions", {}):
        await socket.send_denial_response(response)
    else:
        await socket.close()


async def answer_method_not_allowed(_request: Request, error: Exception) -> Response:
    """Answer a request whose method its path does not take."""
    assert isinstance(error, HTTPException)
    allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
    refused = MethodNotAllowed(*allowed)
    headers = {"allow": ", ".join(allowed)}
    return JSONResponse(error_content(refused.code, refused.summary), 405, headers)


async def respond_json(
    send: Send,
    status: int,
    content: Any,
    *,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    await respond(send, status, to_json(content), content_type=JSON_TYPE, headers=headers)


async def respond(
    send: Send,
    status: int,
    body: bytes,
    *,
    content_type: bytes,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """Send a response. A large one is sent in pieces, between which other requests take their
    turn: a middleware may compress each.
    """
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    while len(body) > PIECE_BYTES:
        await send({"type": "http.response.body", "body": body[:PIECE_BYTES], "more_body": True})
        body = body[PIECE_BYTES:]
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": body})
