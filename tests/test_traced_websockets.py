"""Spans of operations over WebSockets."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import SpanKind, StatusCode
from pydantic_core import from_json, to_json

from tests.http_client import application_of
from tests.test_tracing import (
    ENQUEUE,
    HOSTILE,
    SECRET,
    SPAN,
    TRACE,
    TRACEPARENT,
    Traced,
    attributes,
    ids,
    parent,
    traced,
    written,
)

__all__ = ["traced"]

OTHER = "4bf92f3577b34da6a3ce929d0e0e4736"
THIRD = "11111111111111111111111111111111"
SUBSCRIPTION = "subscription { jobEvents { name job { id } } }"


class Connection:
    """A WebSocket to the application of a test, without a socket."""

    def __init__(self, traced: Traced, headers: dict[str, str]) -> None:
        self._traced = traced
        self._said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said.put_nowait({"type": "websocket.connect"})
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        given = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        self._scope = {
            "type": "websocket",
            "scheme": "ws",
            "path": "/graphql",
            "headers": [(b"host", b"127.0.0.1"), *given],
            "query_string": b"",
            "subprotocols": ["graphql-transport-ws"],
        }

    async def run(self) -> None:
        await application_of(self._traced.client)(self._scope, self._said.get, self._hear)

    async def _hear(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "websocket.send":
            self._answers.put_nowait(from_json(message["text"]))

    def say(self, **message: Any) -> None:
        text = to_json(message).decode()
        self._said.put_nowait({"type": "websocket.receive", "text": text})

    def hang_up(self) -> None:
        self._said.put_nowait({"type": "websocket.disconnect", "code": 1001})

    async def answer(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            return await self._answers.get()

    def begin(
        self, query: str, variables: Any = None, extensions: Any = None, id: str = "1"
    ) -> None:
        payload = {"query": query, "variables": variables, "extensions": extensions}
        given = {name: value for name, value in payload.items() if value is not None}
        self.say(type="subscribe", id=id, payload=given)

    async def execute(self, query: str, variables: Any = None, extensions: Any = None) -> Any:
        """Run a query or a mutation to its end."""
        self.begin(query, variables, extensions)
        answered = await self.answer()
        assert answered["type"] == "next", answered
        assert (await self.answer())["type"] == "complete"
        return answered["payload"]

    async def enqueue(self, extensions: Any = None) -> uuid.UUID:
        job = {"type": "traced.plain", "payload": {"note": SECRET}}
        answered = await self.execute(ENQUEUE, {"input": job}, extensions)
        return uuid.UUID(answered["data"]["enqueueJob"]["job"]["id"])


@asynccontextmanager
async def connected(
    traced: Traced, headers: dict[str, str] | None = None, init: Any = None
) -> AsyncIterator[Connection]:
    connection = Connection(traced, headers or {})
    serving = asyncio.create_task(connection.run())
    connection.say(type="connection_init", payload=init or {})
    assert (await connection.answer())["type"] == "connection_ack"
    try:
        yield connection
    finally:
        connection.hang_up()
        async with asyncio.timeout(10):
            await serving


def of_operations(traced: Traced) -> list[ReadableSpan]:
    return [span for span in traced.spans if span.kind is SpanKind.SERVER]


async def test_a_job_that_is_enqueued_over_a_websocket_joins_the_trace_of_its_message(
    traced: Traced,
) -> None:
    async with connected(traced) as connection:
        job_id = await connection.enqueue({"traceparent": TRACEPARENT})
    sent, operation = traced.one("send traced.plain"), traced.one("mutation")
    assert parent(operation) == (TRACE, SPAN)
    assert parent(sent) == ids(operation)
    assert attributes(sent)["messaging.message.id"] == str(job_id)
    assert await traced.traceparents() == [written(sent)]
    assert operation.kind is SpanKind.SERVER
    assert operation.status.status_code is StatusCode.UNSET
    assert attributes(operation) == {
        "graphql.operation.type": "mutation",
        "network.protocol.name": "websocket",
        "url.path": "/graphql",
    }
    assert SECRET not in operation.to_json()


async def test_operations_of_one_connection_are_traces_of_their_own(traced: Traced) -> None:
    async with connected(traced) as connection:
        for _ in range(2):
            await connection.execute("{ __typename }")
    first, second = traced.named("query")
    assert parent(first) is parent(second) is None
    assert ids(first)[0] != ids(second)[0]


async def test_the_nearest_traceparent_counts(traced: Traced) -> None:
    """That of the message, then that of `connection_init`, then that of the handshake."""
    of_handshake = {"traceparent": f"00-{THIRD}-{SPAN}-01"}
    of_connection = {"traceparent": f"00-{OTHER}-{SPAN}-01"}
    async with connected(traced, of_handshake, of_connection) as connection:
        await connection.execute("{ __typename }", extensions={"traceparent": TRACEPARENT})
        await connection.execute("{ __typename }", extensions={"traceparent": "not one"})
    async with connected(traced, of_handshake) as connection:
        await connection.execute("{ __typename }")
    assert [ids(span)[0] for span in traced.named("query")] == [TRACE, OTHER, THIRD]


@pytest.mark.cases(4)
@pytest.mark.parametrize("value", [*HOSTILE, None, 1, ["00"], {"a": 1}])
async def test_a_traceparent_that_is_not_valid_is_ignored(traced: Traced, value: Any) -> None:
    given = {"traceparent": value}
    async with connected(traced, init=given) as connection:
        await connection.enqueue(given)
    assert parent(traced.one("mutation")) is None


async def test_a_subscription_has_one_span_until_its_client_ends_it(traced: Traced) -> None:
    async with connected(traced) as connection:
        connection.begin(SUBSCRIPTION, extensions={"traceparent": TRACEPARENT}, id="events")
        await asyncio.sleep(0.1)
        connection.begin(ENQUEUE, {"input": {"type": "traced.plain", "payload": {}}})
        answers = [await connection.answer() for _ in range(3)]
        assert {each["id"] for each in answers if each["type"] == "next"} == {"events", "1"}
        assert traced.named("subscription") == []
        connection.say(type="complete", id="events")
        await connection.execute("{ __typename }")
        subscription = traced.one("subscription")
    assert parent(subscription) == (TRACE, SPAN)
    assert subscription.status.status_code is StatusCode.UNSET
    assert "error.type" not in attributes(subscription)
    # The events of other requests do not belong to the subscriber's trace.
    assert ids(traced.one("send traced.plain"))[0] != TRACE


async def test_a_connection_that_ends_ends_its_spans(traced: Traced) -> None:
    async with connected(traced) as connection:
        connection.begin(SUBSCRIPTION)
        await asyncio.sleep(0.1)
    assert traced.one("subscription").status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("query", ["{ nothing }", "{", "query A { __typename } query B { id }"])
async def test_an_operation_that_is_not_executed_has_a_span(traced: Traced, query: str) -> None:
    async with connected(traced) as connection:
        connection.begin(query)
        assert (await connection.answer())["type"] == "error"
    (span,) = of_operations(traced)
    assert span.name == "GraphQL Operation"
    assert "graphql.operation.type" not in attributes(span)


async def test_operations_belong_to_the_span_of_a_host_s_connection(traced: Traced) -> None:
    with TracerProvider().get_tracer("host").start_as_current_span("connection") as theirs:
        headers = {"traceparent": f"00-{THIRD}-{SPAN}-01"}
        async with connected(traced, headers) as connection:
            await connection.execute("{ __typename }")
            await connection.execute("{ __typename }", extensions={"traceparent": TRACEPARENT})
    hosts = f"{theirs.get_span_context().trace_id:032x}"
    assert [ids(span)[0] for span in traced.named("query")] == [hosts, TRACE]


async def test_operations_at_once_do_not_mix_their_traces(traced: Traced) -> None:
    async with connected(traced) as connection:
        for number in range(1, 11):
            job = {"type": "traced.plain", "payload": {"note": str(number)}}
            named = {"traceparent": f"00-{number:032x}-{SPAN}-01"}
            connection.begin(ENQUEUE, {"input": job}, named, str(number))
        found: dict[str, int] = {}
        while len(found) < 10:
            answer = await connection.answer()
            if answer["type"] == "next":
                found[answer["payload"]["data"]["enqueueJob"]["job"]["id"]] = int(answer["id"])
    sent = traced.named("send traced.plain")
    assert {
        attributes(span)["messaging.message.id"]: int(ids(span)[0], 16) for span in sent
    } == found
