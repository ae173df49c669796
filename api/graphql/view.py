"""GraphQL over HTTP, as an ASGI application: https://graphql.github.io/graphql-over-http/draft/."""

from __future__ import annotations

from collections import OrderedDict
from inspect import isawaitable, iscoroutine
from typing import Any, Final
from urllib.parse import parse_qs

from graphql import (
    DocumentNode,
    ExecutionResult,
    Executor,
    GraphQLError,
    GraphQLSchema,
    OperationDefinitionNode,
    OperationType,
    parse,
    validate,
)
from pydantic_core import from_json
from starlette.types import ASGIApp, Receive, Scope, Send

from api.graphql.context import Context
from api.graphql.told import told
from api.http_messages import (
    BodyTooLarge,
    ClientGone,
    header,
    is_json,
    read_body,
    respond_json,
)

GRAPHQL_RESPONSE: Final = b"application/graphql-response+json"
JSON: Final = b"application/json"
MAX_CACHED_DOCUMENTS: Final = 500
MAX_CACHED_LENGTH: Final = 20_000
"""A longer document is not cached, so that the cache holds 10 MB of text at most."""

MAX_TOKENS: Final = 20_000


class RequestRefused(Exception):
    """Raised when a request is refused before anything is executed, with its HTTP status.

    `document` says that the request was well formed and its GraphQL document was not.
    """

    def __init__(
        self,
        status: int,
        errors: list[GraphQLError],
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        document: bool = False,
    ) -> None:
        self.status = status
        self.errors = errors
        self.headers = headers
        self.document = document
        super().__init__(str(errors[0]))


class Documents:
    """Parsed and validated documents by their text, the least recently used dropped first.

    A generated client sends the same few documents over and over; parsing and validating one
    takes longer than executing it.
    """

    def __init__(self, schema: GraphQLSchema) -> None:
        self._schema = schema
        self._known: OrderedDict[str, DocumentNode] = OrderedDict()

    def get(self, text: str) -> DocumentNode:
        """The document of a text.

        Raises:
            GraphQLError: it does not parse.
            RequestRefused: it is not valid against the schema.
        """
        document = self._known.get(text)
        if document is not None:
            self._known.move_to_end(text)
            return document
        document = parse(text, max_tokens=MAX_TOKENS)
        errors = validate(self._schema, document, max_errors=20)
        if errors:
            raise RequestRefused(400, errors, document=True)
        if len(text) <= MAX_CACHED_LENGTH:
            self._known[text] = document
            if len(self._known) > MAX_CACHED_DOCUMENTS:
                self._known.popitem(last=False)
        return document


class GraphQLView:
    """Serves the schema at one path: POST with JSON, and GET for queries.

    Executes with graphql-core itself: `strawberry.Schema.execute` costs four times as much.
    """

    def __init__(
        self, schema: GraphQLSchema, stream: ASGIApp, *, max_body_bytes: int, page: str
    ) -> None:
        self._schema = schema
        self._stream = stream
        self._documents = Documents(schema)
        self._max_body_bytes = max_body_bytes
        self._page = page.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request."""
        accept = header(scope, b"accept")
        if b"text/event-stream" in accept:
            await self._stream(scope, receive, send)
            return
        if scope["method"] == "GET" and _wants_page(scope, accept):
            await self._respond_page(send)
            return
        media_type = _negotiated(accept)
        if media_type is None:
            error = GraphQLError(
                "The response is application/graphql-response+json or application/json; the Accept"
                " header takes neither."
            )
            await respond_json(send, 406, {"errors": [error.formatted]})
            return
        headers: tuple[tuple[bytes, bytes], ...] = ()
        try:
            request = await self._read(scope, receive)
            content, status = await self._execute(request, scope, media_type)
        except RequestRefused as refused:
            content = {"errors": [error.formatted for error in refused.errors]}
            status, headers = refused.status, refused.headers
            # A client that takes application/json alone is told of its document's faults with
            # 200: it cannot tell a 400 of ours from one of a proxy's.
            if status == 400 and media_type == JSON and refused.document:
                status = 200
        except ClientGone:
            return
        await respond_json(
            send, status, content, content_type=media_type + b"; charset=utf-8", headers=headers
        )

    async def _read(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The parameters of a request: query, variables, operationName, extensions."""
        if scope["method"] == "GET":
            return _checked(_of_query_string(scope["query_string"]))
        if scope["method"] != "POST":
            raise RequestRefused(
                405,
                [GraphQLError("GraphQL takes GET and POST.")],
                headers=((b"allow", b"GET, POST"),),
            )
        if not is_json(header(scope, b"content-type")):
            raise RequestRefused(
                415, [GraphQLError("The Content-Type has to be application/json.")]
            )
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
        except BodyTooLarge:
            message = f"A request is at most {self._max_body_bytes:,} bytes long."
            raise RequestRefused(413, [GraphQLError(message)]) from None
        try:
            content = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            message = f"The body is no JSON: {str(error)[:200]}"
            raise RequestRefused(400, [GraphQLError(message)]) from None
        if not isinstance(content, dict):
            raise RequestRefused(
                400,
                [GraphQLError("The body has to be one object with a query; there are no batches.")],
            )
        return _checked(content)

    async def _execute(
        self, request: dict[str, Any], scope: Scope, media_type: bytes
    ) -> tuple[dict[str, Any], int]:
        name = request.get("operationName")
        try:
            document = self._documents.get(request["query"])
            operation = _operation(document, name)
        except GraphQLError as error:
            raise RequestRefused(400, [error], document=True) from None
        if operation.operation is OperationType.SUBSCRIPTION:
            message = "A subscription is served to Accept: text/event-stream, or over a WebSocket."
            refused = GraphQLError(message)
            raise RequestRefused(400, [refused], document=True)
        if scope["method"] == "GET" and operation.operation is not OperationType.QUERY:
            raise RequestRefused(
                405, [GraphQLError("A mutation is sent with POST.")], headers=((b"allow", b"POST"),)
            )
        # Not `execute`, which prepares for @defer and @stream. All that our resolvers give to wait
        # for is coroutines, which can be told at a glance.
        executor = Executor.build(
            self._schema,
            document,
            context_value=Context(scope["app"].state.service),
            raw_variable_values=request.get("variables"),
            operation_name=name,
            is_awaitable=iscoroutine,  # type: ignore[arg-type]
        )
        if isinstance(executor, list):
            return _formatted(ExecutionResult(None, executor), media_type)
        result = executor.execute_operation()
        if isawaitable(result):
            result = await result
        assert isinstance(result, ExecutionResult)
        return _formatted(result, media_type)

    async def _respond_page(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/html; charset=utf-8"),
                    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'"),
                    (b"content-length", str(len(self._page)).encode()),
                ],
            }
        )
        await send({"type": "http.response.body", "body": self._page})


def _formatted(result: ExecutionResult, media_type: bytes) -> tuple[dict[str, Any], int]:
    """The response of a result, and its status."""
    if not result.errors:
        return {"data": result.data}, 200
    errors = [told(error) for error in result.errors]
    if result.data is None and all(error.path is None for error in result.errors):
        # The variables do not fit: nothing was executed, so there is no data, not even null.
        return {"errors": errors}, 200 if media_type == JSON else 400
    return {"errors": errors, "data": result.data}, 200


def _operation(document: DocumentNode, name: str | None) -> OperationDefinitionNode:
    operations = [
        node for node in document.definitions if isinstance(node, OperationDefinitionNode)
    ]
    if name is None and len(operations) == 1:
        return operations[0]
    for operation in operations:
        if name is not None and operation.name is not None and operation.name.value == name:
            return operation
    if name is None:
        raise GraphQLError("The document has several operations; operationName has to name one.")
    raise GraphQLError(f"The document has no operation named {name[:100]!r}.")


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
        raise RequestRefused(400, [GraphQLError(message)]) from None
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
        raise RequestRefused(400, [GraphQLError(fault) for fault in faults])
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
            b"application/*": GRAPHQL_RESPONSE,
            b"*/*": JSON,
        }.get(media_type)
        if offered is not None and quality > 0 and (best is None or quality > best[0]):
            best = (quality, offered)
    return best[1] if best else None


def _wants_page(scope: Scope, accept: bytes) -> bool:
    return b"text/html" in accept and b"query=" not in scope["query_string"]
