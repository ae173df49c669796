"""GraphQL over HTTP, as an ASGI application: POST, and GET for queries.

https://graphql.github.io/graphql-over-http/draft/
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, NamedTuple

from pydantic_core import to_json
from starlette.types import ASGIApp, Receive, Scope, Send

from job_registry.json_values import NotJson
from job_registry_api import auth
from job_registry_api.answer_text import json_in_pieces
from job_registry_api.auth import Authenticator
from job_registry_api.budget import BudgetExceeded, RequestSize, parse_request_json
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.execution import (
    DocumentRefused,
    Executor,
    Prepared,
    request_faults,
)
from job_registry_api.graphql.request_errors import (
    BAD_REQUEST,
    coded,
    format_error,
    format_exception,
    format_result,
)
from job_registry_api.graphql.sse import EVENT_STREAM, send_events
from job_registry_api.http_messages import (
    BodyTooLarge,
    ClientGone,
    UnsupportedMediaType,
    cached_if_short,
    check_media,
    header,
    query_parameters,
    read_body,
    respond,
    respond_json,
)

GRAPHQL_RESPONSE: Final = b"application/graphql-response+json"
JSON: Final = b"application/json"
MAX_PARAMETERS: Final = 20


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


class GraphQLOverHTTP:
    """Serves the schema at one path. HEAD is answered as GET.

    `page` is the response to a browser's GET, if any. POST needs a JSON Content-Type, so that a
    form on a foreign page cannot execute a mutation: a browser sends a preflight request (CORS).
    """

    def __init__(
        self,
        executor: Executor,
        authenticator: Authenticator,
        *,
        get_queries: bool,
        page: ASGIApp | None,
    ) -> None:
        self._executor = executor
        self._authenticator = authenticator
        self._limits = executor.request_limits
        self._get_queries = get_queries
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accept = header(scope, b"accept")
        if self._page is not None and _wants_page(scope, accept):
            await self._page(scope, receive, send)
            return
        media_type = _negotiated(accept)
        if media_type is None:
            message = (
                "The response is application/graphql-response+json, application/json or"
                " text/event-stream; the Accept header allows none of them."
            )
            refusal = format_error(coded("not_acceptable", message))
            await respond_json(send, 406, {"errors": [refusal]})
            return
        headers: tuple[tuple[bytes, bytes], ...] = ()
        is_large = False
        try:
            request = await self._read(scope, receive)
            is_subscription = request.prepared.is_subscription
            # Some clients list every type they can read with every request.
            as_events = media_type == EVENT_STREAM or (is_subscription and EVENT_STREAM in accept)
            if is_subscription and not as_events:
                message = (
                    "A subscription is served to Accept: text/event-stream, or over a WebSocket."
                )
                raise DocumentRefused([coded("not_acceptable", message)])
            if not as_events:
                content = format_result(await self._executor.execute(*request))
                # Without data nothing was executed: the variables do not fit.
                status = 200 if "data" in content or media_type == JSON else 400
                is_large = request.context.budget.is_large
        except ClientGone:
            return
        except RequestRefused as refused:
            content, status, headers = {"errors": refused.errors}, refused.status, refused.headers
        except DocumentRefused as refused:
            # A client that reads application/json alone cannot distinguish our 400 from a proxy's.
            content = {"errors": [error.formatted for error in refused.errors]}
            status = 200 if media_type == JSON else 400
        except Exception as error:
            # Not from a field: an exception of a field is an error in the result.
            content, status = {"errors": [format_exception(error)]}, 500
        else:
            if as_events:
                ended = scope["app"].state.queue.events.ended
                after = header(scope, b"last-event-id").decode("latin-1") or None
                results = self._executor.results(*request, after)
                await send_events(receive, send, results, ended)
                return
        if media_type == EVENT_STREAM:
            media_type = JSON
        body = await json_in_pieces(content) if is_large else to_json(content)
        await respond(
            send, status, body, content_type=media_type + b"; charset=utf-8", headers=headers
        )

    async def _read(self, scope: Scope, receive: Receive) -> _Request:
        """Authenticate the caller, read the request, and prepare its operation.

        Raises:
            RequestRefused: the request is not well formed, or its caller is not authenticated.
            DocumentRefused: its document cannot be executed.
        """
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in ("GET", "POST") or (method == "GET" and not self._get_queries):
            allowed = "GET, HEAD and POST" if self._get_queries else "POST"
            message = f"GraphQL takes {allowed}."
            if method in ("PUT", "DELETE"):
                message += (
                    " GraphQL over SSE is served in the distinct connections mode, not the single"
                    " connection mode: leave out the option singleConnection of graphql-sse."
                )
            raise _not_allowed(message, allow=allowed.replace(" and", ",").encode())
        try:
            caller = await self._authenticator.authenticate(scope)
        except auth.REFUSALS as error:
            status, headers = auth.STATUSES[type(error)], auth.headers_of(error)
            raise RequestRefused(status, [format_exception(error)], headers=headers) from None
        if method == "GET":
            content = _checked(self._of_query_string(scope["query_string"]))
            size = None
        else:
            parsed, size = await self._read_json(scope, receive)
            content = _checked(parsed)
        prepared = self._executor.prepare(content, caller)
        if method == "GET" and prepared.is_mutation:
            raise _not_allowed("A mutation is sent with POST.", allow=b"POST")
        if scope["method"] == "HEAD" and prepared.is_subscription:
            raise _not_allowed("A subscription is sent with GET or POST.", allow=b"GET, POST")
        context = Context(
            scope["app"].state.queue,
            caller,
            receive=receive,
            verify_again=partial(self._authenticator.verify_again, scope),
            size=size,
        )
        return _Request(prepared, content.get("variables"), context)

    async def _read_json(
        self, scope: Scope, receive: Receive
    ) -> tuple[dict[str, Any], RequestSize]:
        """Return the body of a request, and its size."""
        try:
            check_media(scope)
        except UnsupportedMediaType as error:
            raise RequestRefused(415, [format_exception(error)], headers=error.headers) from None
        try:
            body = await read_body(scope, receive, self._limits.body_bytes)
        except BodyTooLarge as error:
            raise RequestRefused(413, [format_exception(error)]) from None
        try:
            content, size = parse_request_json(body, self._limits)
        except BudgetExceeded as error:
            raise RequestRefused(413, [format_exception(error)]) from None
        except NotJson as error:
            raise RequestRefused(400, [format_exception(error)]) from None
        if not isinstance(content, dict):
            raise _refused("The body has to be one object with a query; there are no batches.")
        return content, size

    def _of_query_string(self, query_string: bytes) -> dict[str, Any]:
        try:
            content: dict[str, Any] = dict(query_parameters(query_string, MAX_PARAMETERS))
            for name in ("variables", "extensions"):
                if text := content.pop(name, None):
                    content[name], _ = parse_request_json(text.encode(), self._limits, name)
        except BudgetExceeded as error:
            raise RequestRefused(413, [format_exception(error)]) from None
        except ValueError as error:
            raise _refused(str(error)) from None
        if not content.get("operationName"):
            content.pop("operationName", None)
        return content


def _refused(message: str) -> RequestRefused:
    return RequestRefused(400, [format_error(coded(BAD_REQUEST, message))])


def _not_allowed(message: str, *, allow: bytes) -> RequestRefused:
    error = format_error(coded("method_not_allowed", message))
    return RequestRefused(405, [error], headers=((b"allow", allow),))


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    faults = request_faults(content)
    if faults:
        raise RequestRefused(400, faults)
    return content


@cached_if_short
def _negotiated(accept: bytes) -> bytes | None:
    """Return the media type of the response: the one that the client prefers; None for none."""
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
