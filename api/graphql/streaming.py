"""Operations over WebSockets: the graphql-transport-ws protocol, by Strawberry's own view.

https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from graphql import ExecutionResult, GraphQLError, OperationType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket
from strawberry.asgi import ASGIWebSocketAdapter, GraphQL
from strawberry.exceptions import ConnectionRejectionError
from strawberry.http.exceptions import NonJsonMessageReceived
from strawberry.schema import BaseSchema
from strawberry.subscriptions import GRAPHQL_TRANSPORT_WS_PROTOCOL
from strawberry.types.execution import ExecutionResult as Result
from strawberry.types.execution import PreExecutionError

from job_registry_api.auth import (
    AuthenticationUnavailable,
    Caller,
    Entrance,
    Forbidden,
    TooManyRequests,
    Unauthenticated,
)
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.operations import DocumentRefused, Operations, Prepared
from job_registry_api.graphql.told import told
from job_registry_api.graphql.view import results_until_expiry
from job_registry_api.logs import log_unexpected
from job_registry_api.queue.queue import JobQueue


@dataclass
class Connection:
    """What is known of a WebSocket. `caller` is known once the client has introduced itself."""

    queue: JobQueue
    scope: Scope
    connection_params: dict[str, Any] | None = None
    caller: Caller | None = None


class _Messages(ASGIWebSocketAdapter):
    """The messages of a connection, each of the protocol's shape; others end it with 4400."""

    async def iter_json(self, *, ignore_parsing_errors: bool = False) -> AsyncGenerator[object]:
        """The messages that come in.

        Raises:
            NonJsonMessageReceived: one is none.
        """
        try:
            async for message in super().iter_json(ignore_parsing_errors=ignore_parsing_errors):
                if not _is_message(message):
                    raise NonJsonMessageReceived
                yield message
        except RecursionError:
            raise NonJsonMessageReceived from None

    async def close(self, code: int, reason: str) -> None:
        """Closes with as much of the reason as a frame can hold (RFC 6455, section 5.5)."""
        await super().close(code, reason.encode()[:123].decode(errors="ignore"))


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("type"), str)
        and isinstance(message.get("id", ""), str)
        and (message["type"] != "subscribe" or isinstance(message.get("payload"), dict))
    )


class StreamingView(GraphQL[Connection, None]):
    """Serves WebSockets.

    The bearer token is the one of the handshake's Authorization header or, as a browser cannot
    send one there, `Authorization` in the payload of `connection_init`. A browser's page may
    connect from this origin and from `allowed_origins`.
    """

    websocket_adapter_class = _Messages

    def __init__(
        self, operations: Operations, entrance: Entrance, *, allowed_origins: Sequence[str]
    ) -> None:
        super().__init__(
            cast(BaseSchema, _Streams(operations, entrance)),
            graphql_ide=None,
            subscription_protocols=(GRAPHQL_TRANSPORT_WS_PROTOCOL,),
            connection_init_wait_timeout=timedelta(seconds=10),
            allowed_origins=allowed_origins,
        )
        self._entrance = entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        try:
            await super().__call__(scope, receive, send)
        except Exception as error:
            log_unexpected("websocket", error)
            await send({"type": "websocket.close", "code": 1011})

    async def get_context(
        self, request: Request | WebSocket, response: Response | WebSocket
    ) -> Connection:
        """What is known before the first message."""
        return Connection(request.app.state.queue, request.scope)

    async def on_ws_connect(self, context: Connection) -> None:
        """Admits the client; otherwise the connection is closed with the code 4403."""
        params = context.connection_params or {}
        given = params.get("Authorization", params.get("authorization"))
        try:
            context.caller = await self._entrance.admit(
                context.scope, given if isinstance(given, str) else None
            )
        except (Unauthenticated, Forbidden, TooManyRequests, AuthenticationUnavailable):
            raise ConnectionRejectionError from None
        return await super().on_ws_connect(context)  # type: ignore[return-value]


class _Streams:
    """What Strawberry's view asks of a schema: the results of an operation, of any kind."""

    def __init__(self, operations: Operations, entrance: Entrance) -> None:
        self._operations = operations
        self._entrance = entrance

    async def stream(
        self,
        query: object,
        variable_values: object,
        context_value: Connection,
        root_value: None,
        operation_name: object,
    ) -> AsyncIterator[Result]:
        return self._results(query, variable_values, context_value, operation_name)

    async def _results(
        self, query: object, variables: object, connection: Connection, name: object
    ) -> AsyncIterator[Result]:
        if (
            not isinstance(query, str)
            or not isinstance(variables, dict | None)
            or not isinstance(name, str | None)
        ):
            message = "query has to be a string, variables an object, operationName a string."
            yield PreExecutionError(data=None, errors=[GraphQLError(message)])
            return
        assert connection.caller is not None
        context = Context(connection.queue, connection.caller)
        try:
            self._entrance.admit_again(connection.scope, connection.caller)
            prepared = self._operations.prepare(query, name)
        except DocumentRefused as refused:
            # Without their class: Strawberry closes the connection on a syntax error.
            errors = [_plain(error) for error in refused.errors]
            yield PreExecutionError(data=None, errors=errors)
            return
        except (TooManyRequests, Unauthenticated) as error:
            wrapped = GraphQLError("", original_error=error)
            yield PreExecutionError(data=None, errors=[_told(wrapped)])
            return
        follows = prepared.operation.operation is OperationType.SUBSCRIPTION
        results = (
            results_until_expiry(self._operations, prepared, variables, context)
            if follows
            else self._result_of(prepared, variables, context)
        )
        try:
            async for result in results:
                yield _result(result)
        except Exception as error:
            wrapped = GraphQLError("", original_error=error)
            yield PreExecutionError(data=None, errors=[_told(wrapped)])
        finally:
            await results.aclose()  # type: ignore[attr-defined]

    async def _result_of(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> AsyncIterator[ExecutionResult]:
        yield await self._operations.execute(prepared, variables, context)


def _result(result: ExecutionResult) -> Result:
    if not result.errors:
        return Result(data=result.data, errors=None)
    errors = [_told(error) for error in result.errors]
    if result.data is None and all(error.path is None for error in result.errors):
        return PreExecutionError(data=None, errors=errors)
    return Result(data=result.data, errors=errors)


def _told(error: GraphQLError) -> GraphQLError:
    content = told(error)
    return _plain(error, content["message"], content.get("extensions"))


def _plain(
    error: GraphQLError, message: str | None = None, extensions: dict[str, Any] | None = None
) -> GraphQLError:
    return GraphQLError(
        message or error.message,
        nodes=error.nodes,
        source=error.source,
        positions=error.positions,
        path=error.path,
        extensions=extensions or error.extensions,
    )
