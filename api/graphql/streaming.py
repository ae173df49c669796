"""Subscriptions over graphql-transport-ws and server-sent events, by Strawberry's own view."""

from __future__ import annotations

import strawberry
from graphql import GraphQLError
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket
from strawberry.asgi import GraphQL
from strawberry.extensions import MaskErrors
from strawberry.subscriptions import GRAPHQL_SSE_PROTOCOL, GRAPHQL_TRANSPORT_WS_PROTOCOL

from api.graphql.context import Context
from api.graphql.told import told


class TellErrors(MaskErrors):
    """Errors of a stream as every door tells them: what nobody foresaw by its id alone."""

    def anonymise_error(self, error: GraphQLError) -> GraphQLError:
        """The error that the client sees."""
        content = told(error)
        return GraphQLError(
            content["message"],
            nodes=error.nodes,
            source=error.source,
            positions=error.positions,
            path=error.path,
            extensions=content.get("extensions"),
        )


class StreamingView(GraphQL[Context, None]):
    """Serves WebSockets, and requests that accept `text/event-stream`."""

    def __init__(self, schema: strawberry.Schema) -> None:
        super().__init__(
            schema,
            graphql_ide=None,
            subscription_protocols=(GRAPHQL_TRANSPORT_WS_PROTOCOL, GRAPHQL_SSE_PROTOCOL),
            # A proxy ends a connection on which nothing moves.
            keep_alive=True,
            keep_alive_interval=15,
        )

    async def get_context(
        self, request: Request | WebSocket, response: Response | WebSocket
    ) -> Context:
        """What the resolvers are given."""
        return Context(request.app.state.service)
