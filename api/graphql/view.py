"""GraphQL over HTTP, as an ASGI application: https://graphql.github.io/graphql-over-http/draft/.

Subscriptions as server-sent events, in the "distinct connections mode" of the GraphQL over SSE
protocol: https://github.com/enisdenjo/graphql-sse/blob/master/PROTOCOL.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

from graphql import ExecutionResult, GraphQLError, OperationType
from pydantic_core import from_json, to_json
from starlette.types import ASGIApp, Receive, Scope, Send

from job_registry_api.auth import (
    AuthenticationUnavailable,
    Entrance,
    Forbidden,
    TooManyRequests,
    Unauthenticated,
)
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.operations import DocumentRefused, Operations, Prepared
from job_registry_api.graphql.told import told_of, told_result
from job_registry_api.http_messages import (
    BodyTooLarge,
    ClientGone,
    header,
    is_json,
    read_body,
    respond_json,
)

GRAPHQL_RESPONSE: Final = b"application/graphql-response+json"
JSON: Final = b"application/json"
EVENT_STREAM: Final = b"text/event-stream"
KEEP_ALIVE_SECONDS: Final = 15.0
"""A proxy ends a connection on which nothing moves."""


A_YEAR: Final = 31_536_000.0
"""An event loop cannot wait for just any time."""


class RequestRefused(Exception):
    """Raised when a request is refused before anything is executed, with its HTTP status."""

    def __init__(
        self,
        status: int,
        errors: list[dict[str, Any]],
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.status = status
        self.errors = errors
        self.headers = headers
        super().__init__(errors[0]["message"])


class _Request(NamedTuple):
    prepared: Prepared
    variables: dict[str, Any] | None
    context: Context


class GraphQLView:
    """Serves the schema at one path: POST with JSON, and GET for queries.

    `page` is what a browser is shown by GET, if anything. A simple request of a browser, such as a
    form of a foreign page can send, never executes anything but a query: POST needs a JSON
    Content-Type, which makes a browser ask first (CORS).
    """

    def __init__(
        self,
        operations: Operations,
        entrance: Entrance,
        *,
        max_body_bytes: int,
        get_queries: bool,
        page: ASGIApp | None,
    ) -> None:
        self._operations = operations
        self._entrance = entrance
        self._max_body_bytes = max_body_bytes
        self._get_queries = get_queries
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request."""
        accept = header(scope, b"accept")
        if self._page is not None and _wants_page(scope, accept):
            await self._page(scope, receive, send)
            return
        media_type = _negotiated(accept)
        if media_type is None:
            message = (
                "The response is application/graphql-response+json, application/json or"
                " text/event-stream; the Accept header takes none of them."
            )
            await respond_json(send, 406, {"errors": [{"message": message}]})
            return
        headers: tuple[tuple[bytes, bytes], ...] = ()
        try:
            request = await self._read(scope, receive)
            follows = request.prepared.operation.operation is OperationType.SUBSCRIPTION
            # Some clients list all that they take with every request.
            streams = media_type == EVENT_STREAM or (follows and EVENT_STREAM in accept)
            if follows and not streams:
                message = (
                    "A subscription is served to Accept: text/event-stream, or over a WebSocket."
                )
                raise DocumentRefused([GraphQLError(message)])
            if not streams:
                content = told_result(await self._operations.execute(*request))
                # Without data nothing was executed: the variables do not fit.
                status = 200 if "data" in content or media_type == JSON else 400
        except ClientGone:
            return
        except RequestRefused as refused:
            content, status, headers = {"errors": refused.errors}, refused.status, refused.headers
        except DocumentRefused as refused:
            # A client that takes application/json alone is told of its document's faults with
            # 200: it cannot tell a 400 of ours from one of a proxy's.
            content = {"errors": [error.formatted for error in refused.errors]}
            status = 200 if media_type == JSON else 400
        except Exception as error:
            # No field of the operation: one that fails is an error of the result.
            content, status = {"errors": [told_of(error)]}, 500
        else:
            if streams:
                await _respond_events(send, receive, self._events(request))
                return
        if media_type == EVENT_STREAM:
            media_type = JSON
        await respond_json(
            send, status, content, content_type=media_type + b"; charset=utf-8", headers=headers
        )

    async def _read(self, scope: Scope, receive: Receive) -> _Request:
        """What is asked for, by someone who may ask.

        Raises:
            RequestRefused: the request is not well formed, or its caller is not admitted.
            DocumentRefused: its document cannot be executed.
        """
        method = scope["method"]
        if method not in ("GET", "POST") or (method == "GET" and not self._get_queries):
            allowed = "GET and POST" if self._get_queries else "POST"
            raise _refused(
                405, f"GraphQL takes {allowed}.", allow=allowed.replace(" and", ",").encode()
            )
        try:
            caller = await self._entrance.admit(scope)
        except Unauthenticated as error:
            challenge = (b"www-authenticate", error.challenge.encode())
            raise RequestRefused(401, [told_of(error)], headers=(challenge,)) from None
        except Forbidden as error:
            raise RequestRefused(403, [told_of(error)]) from None
        except TooManyRequests as error:
            retry = (b"retry-after", str(error.retry_after).encode())
            raise RequestRefused(429, [told_of(error)], headers=(retry,)) from None
        except AuthenticationUnavailable as error:
            retry = (b"retry-after", b"5")
            raise RequestRefused(503, [told_of(error)], headers=(retry,)) from None
        if method == "GET":
            content = _checked(_of_query_string(scope["query_string"]))
        else:
            content = _checked(await self._read_json(scope, receive))
        prepared = self._operations.prepare(content["query"], content.get("operationName"))
        if method == "GET" and prepared.operation.operation is OperationType.MUTATION:
            raise _refused(405, "A mutation is sent with POST.", allow=b"POST")
        context = Context(scope["app"].state.queue, caller, receive)
        return _Request(prepared, content.get("variables"), context)

    async def _read_json(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        if not is_json(header(scope, b"content-type")):
            raise _refused(415, "The Content-Type has to be application/json.")
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
        except BodyTooLarge:
            raise _refused(
                413, f"A request is at most {self._max_body_bytes:,} bytes long."
            ) from None
        try:
            content = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise _refused(400, f"The body is not valid JSON: {str(error)[:200]}") from None
        if not isinstance(content, dict):
            raise _refused(400, "The body has to be one object with a query; there are no batches.")
        return content

    async def _events(self, request: _Request) -> AsyncIterator[dict[str, Any]]:
        """The results of an operation, one for each event of a subscription."""
        if request.prepared.operation.operation is not OperationType.SUBSCRIPTION:
            yield told_result(await self._operations.execute(*request))
            return
        async for result in results_until_expiry(self._operations, *request):
            yield told_result(result)


async def results_until_expiry(
    operations: Operations,
    prepared: Prepared,
    variables: dict[str, Any] | None,
    context: Context,
) -> AsyncIterator[ExecutionResult]:
    """The results of a subscription. When it ends for a reason of its own, such as the caller's
    token having expired, the last one is that error."""
    results = await operations.subscribe(prepared, variables, context)
    if isinstance(results, ExecutionResult):
        yield results
        return
    expires_at = context.caller.expires_at
    try:
        while True:
            left = None if expires_at is None else min(expires_at - time.time(), A_YEAR)
            try:
                async with asyncio.timeout(left):
                    result = await anext(results)
            except StopAsyncIteration:
                return
            yield result
    except TimeoutError:
        expired = Unauthenticated("The token has expired.")
        yield ExecutionResult(None, [GraphQLError("", original_error=expired)])
    except Exception as error:
        yield ExecutionResult(None, [GraphQLError("", original_error=error)])
    finally:
        await results.aclose()  # type: ignore[attr-defined]


async def _respond_events(
    send: Send, receive: Receive, results: AsyncIterator[dict[str, Any]]
) -> None:
    """Sends results as server-sent events until they end or the client hangs up."""
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    gone = asyncio.ensure_future(_gone(receive))
    following: asyncio.Future[dict[str, Any]] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(results))
            await asyncio.wait(
                (following, gone),
                timeout=KEEP_ALIVE_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if gone.done():
                return
            if not following.done():
                await _send_text(send, b":\n\n")
                continue
            try:
                result = following.result()
            except StopAsyncIteration:
                break
            except Exception as error:
                result = {"errors": [told_of(error)]}
            following = None
            await _send_text(send, b"event: next\ndata: " + to_json(result) + b"\n\n")
        await _send_text(send, b"event: complete\ndata:\n\n")
        await send({"type": "http.response.body", "body": b""})
    finally:
        gone.cancel()
        if following is not None:
            following.cancel()
            await asyncio.wait([following])
        await results.aclose()  # type: ignore[attr-defined]


async def _send_text(send: Send, text: bytes) -> None:
    await send({"type": "http.response.body", "body": text, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _refused(status: int, message: str, *, allow: bytes | None = None) -> RequestRefused:
    headers = ((b"allow", allow),) if allow else ()
    return RequestRefused(status, [{"message": message}], headers=headers)


def _of_query_string(query_string: bytes) -> dict[str, Any]:
    try:
        given = parse_qs(query_string.decode("ascii"), keep_blank_values=True, max_num_fields=20)
        content: dict[str, Any] = {name: values[-1] for name, values in given.items()}
        for name in ("variables", "extensions"):
            if content.get(name):
                content[name] = from_json(content[name], allow_inf_nan=False)
            else:
                content.pop(name, None)
    except ValueError:
        message = "variables and extensions have to be JSON in the query string."
        raise _refused(400, message) from None
    if not content.get("operationName"):
        content.pop("operationName", None)
    return content


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    faults = []
    if not isinstance(content.get("query"), str) or not content["query"].strip():
        faults.append("query has to be a string with a GraphQL document.")
    for name, kind, expected in (
        ("variables", dict, "an object"),
        ("extensions", dict, "an object"),
        ("operationName", str, "a string"),
    ):
        if content.get(name) is not None and not isinstance(content[name], kind):
            faults.append(f"{name} has to be {expected} or null.")
    if faults:
        raise RequestRefused(400, [{"message": fault} for fault in faults])
    return content


def _negotiated(accept: bytes) -> bytes | None:
    """The media type of the response: the first that the client takes, by its own order."""
    if accept in (b"", b"*/*"):
        return JSON
    best: tuple[float, bytes] | None = None
    for part in accept.lower().split(b","):
        media_type, *parameters = (piece.strip() for piece in part.split(b";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith(b"q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        offered = {
            GRAPHQL_RESPONSE: GRAPHQL_RESPONSE,
            JSON: JSON,
            EVENT_STREAM: EVENT_STREAM,
            b"application/*": GRAPHQL_RESPONSE,
            b"*/*": JSON,
        }.get(media_type)
        if offered is not None and quality > 0 and (best is None or quality > best[0]):
            best = (quality, offered)
    return best[1] if best else None


def _wants_page(scope: Scope, accept: bytes) -> bool:
    return (
        scope["method"] in ("GET", "HEAD")
        and b"text/html" in accept
        and b"query=" not in scope["query_string"]
    )
