"""The graphql-transport-ws protocol: what opens, answers and closes a connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from job_registry_api.graphql import websocket
from tests.http_client import serving

pytestmark = pytest.mark.any_database

PROTOCOL = Subprotocol("graphql-transport-ws")
INIT = {"type": "connection_init"}
EVENTS = {
    "id": "1",
    "type": "subscribe",
    "payload": {"query": "subscription { jobEvents { name } }"},
}


@pytest.fixture
async def socket(database_url: str) -> AsyncIterator[ClientConnection]:
    """A connection that is open and has not sent a message."""
    async with (
        serving(database_url, "--no-worker") as (address, _),
        connect(f"ws://{address}/graphql", subprotocols=[PROTOCOL]) as socket,
    ):
        yield socket


async def answers(socket: ClientConnection, *messages: dict[str, Any]) -> list[Any]:
    """The type of each answer to these messages; the last is the code of a closed connection."""
    types: list[Any] = []
    try:
        for message in messages:
            await socket.send(json.dumps(message))
        while len(types) < len(messages):
            types.append(json.loads(await socket.recv())["type"])
    except ConnectionClosed as closed:
        types.append(closed.rcvd.code if closed.rcvd else 0)
    return types


async def test_an_operation_needs_an_initialised_connection(socket: ClientConnection) -> None:
    assert await answers(socket, EVENTS) == [4401]


async def test_a_ping_is_answered_at_any_time(socket: ClientConnection) -> None:
    ping = {"type": "ping"}
    assert await answers(socket, ping, INIT, ping) == ["pong", "connection_ack", "pong"]


async def test_two_operations_of_one_id_close_the_connection(socket: ClientConnection) -> None:
    assert await answers(socket, INIT, EVENTS, EVENTS) == ["connection_ack", 4409]


async def test_an_id_is_free_once_its_operation_is_complete(socket: ClientConnection) -> None:
    query = EVENTS | {"payload": {"query": "{ __typename }"}}
    complete = {"id": "1", "type": "complete"}
    await answers(socket, INIT)
    for message in (EVENTS, complete, complete, query):
        await socket.send(json.dumps(message))
    seen = [json.loads(await socket.recv()) for _ in range(2)]
    assert seen == [
        {"type": "next", "id": "1", "payload": {"data": {"__typename": "Query"}}},
        {"type": "complete", "id": "1"},
    ]
    assert await answers(socket, query) == ["next"]


async def test_a_connection_runs_a_bounded_number_of_operations(socket: ClientConnection) -> None:
    await answers(socket, INIT)
    for number in range(websocket.MAX_OPERATIONS + 1):
        await socket.send(json.dumps(EVENTS | {"id": str(number)}))
    refused = json.loads(await asyncio.wait_for(socket.recv(), 5))
    assert (refused["type"], refused["id"]) == ("error", str(websocket.MAX_OPERATIONS))
    assert refused["payload"][0]["extensions"]["code"] == "rate_limited"
    await socket.send(json.dumps({"id": "0", "type": "complete"}))
    query = EVENTS | {"id": "query", "payload": {"query": "{ __typename }"}}
    assert await answers(socket, query) == ["next"]


async def test_another_protocol_is_not_served(database_url: str) -> None:
    async with (
        serving(database_url, "--no-worker") as (address, _),
        connect(f"ws://{address}/graphql", subprotocols=[Subprotocol("graphql-ws")]) as socket,
    ):
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4406


async def test_a_client_that_says_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "INIT_SECONDS", 0.01)
    sent: list[dict[str, Any]] = []
    messages = [{"type": "websocket.connect"}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))

    scope = {"type": "websocket", "headers": [], "subprotocols": [PROTOCOL]}
    served = websocket.GraphQLOverWebSocket(None, None, allowed_origins=())  # type: ignore[arg-type]
    await served(scope, receive, send)
    assert sent[-1]["code"] == 4408
