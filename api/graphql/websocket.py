"""GraphQL over WebSockets, as an ASGI application: the graphql-transport-ws protocol.

https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import to_json
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from job_registry_api.auth import REFUSALS, Authenticator, Caller, TooManyRequests
from job_registry_api.budget import BudgetExceeded, parse_request_json
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.execution import DocumentRefused, Executor, request_faults
from job_registry_api.graphql.request_errors import format_exception, token_fault
from job_registry_api.graphql.shared_events import Answers, answers_of
from job_registry_api.http_messages import (
    MAX_UNADMITTED_MESSAGE,
    TRY_AGAIN_LATER,
    WEBSOCKET_ADMISSION,
    WEBSOCKET_FRAMES,
    SendFrames,
    deny,
    text_frame_head,
)
from job_registry_api.logs import log_unexpected
from job_registry_api.signing_keys import AuthenticationUnavailable

if TYPE_CHECKING:
    from job_registry_api.tracing import OpenSpan, Tracing

PROTOCOL: Final = "graphql-transport-ws"
INIT_SECONDS: Final = 10.0
"""A client whose `connection_init` has not been acknowledged by then is disconnected."""

END_SECONDS: Final = 2.0
"""How long the queries and mutations of a connection may run on when the server stops, or when the
token of the connection is not valid any more."""

MAX_UNREAD_BYTES: Final = 16_777_216
"""Results that wait for one client to read. A client with more of them is disconnected."""

MAX_ID_LENGTH: Final = 255
"""The longest id of an operation, which every message about it repeats."""


class GraphQLOverWebSocket:
    """Serves the schema over WebSockets.

    One connection runs up to `max_operations` at once. The bearer token is that of the handshake's
    Authorization header or, as a browser cannot send one there, `Authorization` in the payload of
    `connection_init`. A page in a browser may connect from this origin and from `allowed_origins`.
    With `tracing`, each operation has a span.
    """

    def __init__(
        self,
        executor: Executor,
        authenticator: Authenticator,
        *,
        allowed_origins: Sequence[str],
        max_operations: int,
        tracing: Tracing | None = None,
    ) -> None:
        self._executor = executor
        self._authenticator = authenticator
        self._max_operations = max_operations
        self._tracing = tracing
        self._allowed_origins = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(WebSocketDisconnect):
            await self._serve(WebSocket(scope, receive, send))

    async def _serve(self, socket: WebSocket) -> None:
        if not self._is_origin_allowed(socket):
            await socket.close()  # Before it is accepted: the handshake is answered with 403.
            return
        try:
            self._authenticator.check_stranger(socket.scope)
        except TooManyRequests as refused:
            await deny(socket, _too_many(refused))
            return
        if PROTOCOL not in socket.scope["subprotocols"]:
            self._authenticator.count_stranger(socket.scope)
            await socket.accept()
            await socket.close(4406, "Subprotocol not acceptable")
            return
        await socket.accept(PROTOCOL)
        try:
            await _Connection(
                socket, self._executor, self._authenticator, self._max_operations, self._tracing
            ).serve()
        except _ProtocolViolation as violation:
            # A close frame holds 123 bytes of reason (RFC 6455, section 5.5).
            reason = violation.reason.encode()[:123].decode(errors="ignore")
            await socket.close(violation.code, reason)
        except WebSocketDisconnect:
            raise
        except Exception as error:
            log_unexpected("websocket", error)
            await socket.close(1011)

    def _is_origin_allowed(self, socket: WebSocket) -> bool:
        origin = socket.headers.get("origin", "").lower()
        return (
            not origin  # Not a browser.
            or socket.headers.get("sec-fetch-site") == "same-origin"
            or origin.partition("://")[1:] == ("://", socket.headers.get("host", "").lower())
            or origin in self._allowed_origins
        )


class _ProtocolViolation(Exception):
    """Raised when the server has to close the connection, with the protocol's code."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(reason)


class _Connection:
    """An accepted connection: its caller, and its operations by the client's ids."""

    def __init__(
        self,
        socket: WebSocket,
        executor: Executor,
        authenticator: Authenticator,
        max_operations: int,
        tracing: Tracing | None,
    ) -> None:
        self._socket = socket
        self._executor = executor
        self._authenticator = authenticator
        self._max_operations = max_operations
        self._tracing = tracing
        self._traceparent: Any = None
        """The `traceparent` of `connection_init`, unchecked."""
        self._caller: Caller | None = None
        self._authorization: str | None = None
        self._was_counted = False
        self._operations: dict[str, asyncio.Task[None]] = {}
        self._unread_bytes = 0
        self._too_much_unread = asyncio.Event()
        self._token_fault: asyncio.Future[str] = asyncio.Future()
        """Why the token is not valid any more."""
        self._ended: asyncio.Event = socket.app.state.queue.events.ended
        self._send_frames: SendFrames | None = None
        extension = socket.scope.get("extensions", {}).get(WEBSOCKET_FRAMES)
        if extension is not None:
            self._send_frames = extension["send"]

    async def serve(self) -> None:
        """Answer messages until the client hangs up.

        Raises:
            WebSocketDisconnect: the client hung up.
            _ProtocolViolation: the connection is to be closed.
        """
        try:
            try:
                async with asyncio.timeout(INIT_SECONDS):
                    while self._caller is None:
                        await self._answer(await self._message())
            except TimeoutError:
                raise _ProtocolViolation(4408, "Connection initialisation timeout") from None
            finally:
                if not self._was_counted:
                    self._authenticator.count_stranger(self._socket.scope)
            _admit(self._socket.scope)
            await self._answer_all()
        finally:
            tasks = list(self._operations.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer_all(self) -> None:
        """Answer messages until the client hangs up or leaves too much unread, the token is not
        valid any more, or the server stops.

        The codes 1001 and 4403 let clients connect again, with the token that they have then, and
        subscribe again, by themselves.
        """
        messages = asyncio.create_task(self._answer_each())
        too_much = asyncio.create_task(self._too_much_unread.wait())
        ended = asyncio.create_task(self._ended.wait())
        tasks = (messages, too_much, ended, self._token_fault)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if too_much.done():
                raise _ProtocolViolation(TRY_AGAIN_LATER, "The client does not read its messages")
            if ended.done() or self._token_fault.done():
                if self._operations:
                    await asyncio.wait(self._operations.values(), timeout=END_SECONDS)
                if ended.done():
                    raise _ProtocolViolation(1001, "The server stops")
                raise _ProtocolViolation(4403, self._token_fault.result())
            messages.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer_each(self) -> None:
        while True:
            await self._answer(await self._message())

    async def _message(self) -> dict[str, Any]:
        received = await self._socket.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1005))
        text: str = received.get("text") or ""
        # A server that does not know the bound before admission has read the message already.
        if self._caller is None and len(text) > MAX_UNADMITTED_MESSAGE:
            raise _ProtocolViolation(1009, "The message is too large")
        try:
            message: Any
            message, _ = parse_request_json(text.encode(), self._executor.request_limits)
        except BudgetExceeded:
            reason = "The message has more JSON values than JOBS_MAX_REQUEST_VALUES"
            raise _ProtocolViolation(1009, reason) from None
        except ValueError:
            raise _ProtocolViolation(4400, "The message is not JSON") from None
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("type"), str)
            or not isinstance(message.get("id", ""), str)
            or len(message.get("id", "")) > MAX_ID_LENGTH
            or not isinstance(message.get("payload"), dict | None)
        ):
            raise _ProtocolViolation(4400, "The message is not valid")
        return message

    async def _answer(self, message: dict[str, Any]) -> None:
        payload = message.get("payload")
        match message["type"], message.get("id"):
            case "connection_init", _:
                await self._initialise(payload or {})
            case "ping", _:
                await self._send("pong")
            case "pong", _:
                pass
            case "subscribe", str() as operation_id if payload is not None:
                if self._caller is None:
                    raise _ProtocolViolation(4401, "Unauthorized")
                if operation_id in self._operations:
                    raise _ProtocolViolation(4409, f"Subscriber for {operation_id} already exists")
                if len(self._operations) >= self._max_operations:
                    limit = f"{self._max_operations:,} operations per connection"
                    refused = TooManyRequests(limit, 1)
                    await self._send("error", operation_id, [format_exception(refused)])
                    return
                running = self._run(operation_id, payload, self._caller)
                self._operations[operation_id] = asyncio.create_task(running)
            case "complete", str() as operation_id:
                if operation_id in self._operations:
                    self._operations.pop(operation_id).cancel()
            case kind, _:
                raise _ProtocolViolation(4400, f"The message of type {kind} is not valid")

    async def _initialise(self, payload: dict[str, Any]) -> None:
        if self._caller is not None:
            raise _ProtocolViolation(4429, "Too many initialisation requests")
        given = payload.get("Authorization", payload.get("authorization"))
        self._authorization = given if isinstance(given, str) else None
        self._traceparent = payload.get("traceparent")
        self._was_counted = True
        try:
            self._caller = await self._authenticator.authenticate(
                self._socket.scope, self._authorization
            )
        except (TooManyRequests, AuthenticationUnavailable) as refused:
            raise _ProtocolViolation(TRY_AGAIN_LATER, str(refused)) from None
        except REFUSALS as refused:
            raise _ProtocolViolation(4403, str(refused)) from None
        await self._send("connection_ack")

    async def _run(self, operation_id: str, payload: dict[str, Any], caller: Caller) -> None:
        """Execute an operation, and send its results."""
        # `serve` ends for the same reason.
        with suppress(WebSocketDisconnect), self._span_of(payload) as span:
            await self._run_within(span, operation_id, payload, caller)

    def _span_of(self, payload: dict[str, Any]) -> AbstractContextManager[OpenSpan | None]:
        if self._tracing is None:
            return nullcontext()
        scope, extensions = self._socket.scope, payload.get("extensions")
        named = [extensions] if isinstance(extensions, dict) else []
        named.append({"traceparent": self._traceparent})
        return self._tracing.operating(scope["path"], named, scope["headers"])

    async def _run_within(
        self, span: OpenSpan | None, operation_id: str, payload: dict[str, Any], caller: Caller
    ) -> None:
        id_text = to_json(operation_id)
        async with aclosing(self._results(span, payload, caller)) as results:
            async for answers in results:
                errors = answers.each[-1].errors
                if errors is None:
                    await self._send_results(id_text, answers)
                else:
                    # Nothing was executed, or the events end: no message follows.
                    self._operations.pop(operation_id, None)
                    # If the connection is closed next, the operation has not failed: its client
                    # sends it again, elsewhere or with another token.
                    if (fault := token_fault(errors)) is not None:
                        if not self._token_fault.done():
                            self._token_fault.set_result(fault)
                    elif not self._ended.is_set():
                        await self._send("error", operation_id, errors)
                    return
        self._operations.pop(operation_id, None)
        await self._send("complete", operation_id)

    async def _results(
        self, span: OpenSpan | None, payload: dict[str, Any], caller: Caller
    ) -> AsyncGenerator[Answers]:
        faults = request_faults(payload)
        if faults:
            yield await answers_of({"errors": faults})
            return
        try:
            await self._authenticator.authenticate_again(self._socket.scope, self._authorization)
            prepared = self._executor.prepare(payload, caller)
        except DocumentRefused as refused:
            yield await answers_of({"errors": [error.formatted for error in refused.errors]})
            return
        except Exception as error:
            yield await answers_of({"errors": [format_exception(error)]})
            return
        if span is not None:
            span.executes(prepared.operation.operation.value)
        verify_again = partial(
            self._authenticator.verify_again, self._socket.scope, self._authorization
        )
        context = Context(self._socket.app.state.queue, caller, verify_again=verify_again)
        async with aclosing(
            self._executor.results(prepared, payload.get("variables"), context)
        ) as results:
            async for answers in results:
                yield answers

    async def _send(self, kind: str, operation_id: str | None = None, payload: Any = None) -> None:
        message: dict[str, Any] = {"type": kind}
        if operation_id is not None:
            message["id"] = operation_id
        if payload is not None:
            message["payload"] = payload
        text = to_json(message)
        with self._unread(len(text)):
            if self._send_frames is not None:
                await self._send_frames(text_frame_head(len(text)) + text)
            else:
                await self._socket.send_text(text.decode())

    async def _send_results(self, operation_id: bytes, answers: Answers) -> None:
        """Send results of an operation, with one write if the server can."""
        if self._send_frames is not None:
            frames = answers.as_frames(operation_id)
            with self._unread(len(frames)):
                await self._send_frames(frames)
            return
        texts = answers.as_messages(operation_id)
        with self._unread(sum(map(len, texts))):
            for text in texts:
                await self._socket.send_text(text.decode())

    @contextmanager
    def _unread(self, size: int) -> Iterator[None]:
        """Count bytes while they wait for the client to read."""
        self._unread_bytes += size
        # One answer alone may be as large as it is.
        if self._unread_bytes > max(MAX_UNREAD_BYTES, size):
            self._too_much_unread.set()
        try:
            yield
        finally:
            self._unread_bytes -= size


def _too_many(refused: TooManyRequests) -> JSONResponse:
    content = {"errors": [format_exception(refused)]}
    return JSONResponse(content, 429, {"retry-after": str(refused.retry_after)})


def _admit(scope: Scope) -> None:
    """Tell the server that the client may now send messages of the full size."""
    extension = scope.get("extensions", {}).get(WEBSOCKET_ADMISSION)
    if extension is not None:
        extension["admit"]()
