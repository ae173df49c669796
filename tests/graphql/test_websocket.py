"""The graphql-transport-ws protocol: what opens, answers and closes a connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, MutableMapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.typing import Subprotocol

from job_registry_api.auth import Authenticator
from job_registry_api.connections import Bounds, ServerConfig
from job_registry_api.graphql import websocket
from tests.http_client import serving
from tests.measured_server import measured_server

PROTOCOL = Subprotocol("graphql-transport-ws")
INIT = {"type": "connection_init"}
EVENTS = {
    "id": "1",
    "type": "subscribe",
    "payload": {"query": "subscription { jobEvents { name } }"},
}


OPERATIONS = 5


@pytest.fixture
async def address(database_url: str) -> AsyncIterator[str]:
    """A server of this test's own."""
    async with serving(database_url, "--no-worker", max_websocket_operations=str(OPERATIONS)) as (
        address,
        _,
    ):
        yield address


@pytest.fixture
async def socket(address: str) -> AsyncIterator[ClientConnection]:
    """A connection that is open and has not sent a message."""
    async with connect(f"ws://{address}/graphql", subprotocols=[PROTOCOL]) as socket:
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
    for number in range(OPERATIONS + 1):
        await socket.send(json.dumps(EVENTS | {"id": str(number)}))
    refused = json.loads(await asyncio.wait_for(socket.recv(), 5))
    assert (refused["type"], refused["id"]) == ("error", str(OPERATIONS))
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

    events = SimpleNamespace(ended=asyncio.Event())
    state = SimpleNamespace(queue=SimpleNamespace(events=events))
    app = SimpleNamespace(state=state)
    scope = {"type": "websocket", "headers": [], "subprotocols": [PROTOCOL], "app": app}
    served = websocket.GraphQLOverWebSocket(
        cast(Any, None),
        Authenticator(None),
        allowed_origins=(),
        max_operations=1,
    )
    await served(scope, receive, send)
    assert sent[-1]["code"] == 4408


async def closed_with(socket: ClientConnection, seconds: float = 5) -> int:
    """The code that the server closes a connection with."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                await socket.recv()
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else 0


async def test_messages_are_not_compressed(address: str) -> None:
    async with connect(
        f"ws://{address}/graphql", subprotocols=[PROTOCOL], compression="deflate"
    ) as socket:
        assert socket.response is not None
        assert "Sec-WebSocket-Extensions" not in socket.response.headers


async def test_before_the_acknowledgement_a_message_is_a_few_kilobytes(
    socket: ClientConnection,
) -> None:
    fits = {**INIT, "payload": {"a": "x" * 10_000}}
    assert await answers(socket, fits) == ["connection_ack"]


@pytest.mark.parametrize("parts", [1, 4])
async def test_a_large_message_before_the_acknowledgement_closes_the_connection(
    socket: ClientConnection, parts: int
) -> None:
    text = json.dumps({**INIT, "payload": {"a": "x" * 50_000}})
    size = -(-len(text) // parts)
    await socket.send([text[at : at + size] for at in range(0, len(text), size)])
    assert await closed_with(socket) == 1009


async def test_after_the_acknowledgement_a_message_is_as_large_as_a_request(
    socket: ClientConnection,
) -> None:
    await answers(socket, INIT)
    large = {"query": "{ __typename }", "extensions": {"a": "x" * 4_000_000}}
    query = EVENTS | {"payload": large}
    assert await answers(socket, query) == ["next"]


async def test_little_is_read_before_the_acknowledgement(socket: ClientConnection) -> None:
    sent = 0
    with contextlib.suppress(ConnectionClosed):
        for sent in range(400_000):  # noqa: B007
            await socket.send('{"type": "ping"}')
    assert await closed_with(socket) in (1008, 0)
    assert sent < 200_000  # What the buffers of both sides hold.


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b'{"type": "connection_init"}', 4400),
        ("", 4400),
        ("not JSON", 4400),
        ("[" * 10_000, 4400),
        ("[]", 4400),
        ('{"type": "ping", "id": "\\ud800"}', 4400),
        ('{"type": "\\u0000"}', 4400),
        ('{"type": ["ping"]}', 4400),
        ('{"type": "connection_init", "payload": [1]}', 4400),
        (json.dumps({"type": "complete", "id": "x" * 300}), 4400),
    ],
)
async def test_a_message_that_is_not_of_the_protocol_closes_the_connection(
    socket: ClientConnection, message: str | bytes, code: int
) -> None:
    await socket.send(message)
    assert await closed_with(socket) == code


async def test_a_connection_is_initialised_once(socket: ClientConnection) -> None:
    assert await answers(socket, INIT, INIT) == ["connection_ack", 4429]


async def test_a_connection_above_the_rate_limit_is_to_be_tried_again(database_url: str) -> None:
    """After 4403, a client takes its token for a wrong one."""
    async with serving(database_url, "--no-worker", rate_limit="2/hour") as (address, _):
        url = f"ws://{address}/graphql"
        sockets = [await connect(url, subprotocols=[PROTOCOL]) for _ in range(3)]
        answered = [await answers(socket, INIT) for socket in sockets]
        assert answered == [["connection_ack"], ["connection_ack"], [1013]]
        reason = sockets[2].close_reason
        assert reason is not None
        assert "2 requests per hour" in reason
        for socket in sockets:
            await socket.close()


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@contextlib.asynccontextmanager
async def deaf_application(**options: Any) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server, and its port, of an application that accepts a WebSocket and never closes it."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()

    bounds = Bounds(100, 5, 5, 5, 5, 1_000, 1_000)
    config = ServerConfig(cast(Any, application), bounds, port=0, lifespan="off", log_level="error")
    for name, value in options.items():
        setattr(config, name, value)
    server = uvicorn.Server(config)
    serving_task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield server, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving_task


async def test_a_client_that_answers_no_ping_is_to_try_again() -> None:
    """A laptop that slept. After 1011, which uvicorn sends, clients of graphql-ws give up."""
    async with deaf_application(ws_ping_interval=0.05, ws_ping_timeout=0.05) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HANDSHAKE)
        async with asyncio.timeout(10):
            received = await reader.read()
        writer.close()
    assert b"\x03\xf5A ping was not answered" in received


async def test_what_the_application_has_not_closed_when_the_server_stops_is_closed_with_1001() -> (
    None
):
    async with deaf_application() as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HANDSHAKE)
        async with asyncio.timeout(10):
            await reader.readuntil(b"\r\n\r\n")
            server.should_exit = True
            assert await reader.read() == b"\x88\x02\x03\xe9"
        writer.close()


async def test_a_flood_of_pings_closes_the_connection(socket: ClientConnection) -> None:
    await answers(socket, INIT)
    with contextlib.suppress(ConnectionClosed):
        for _ in range(1_000):
            await socket.ping()
    assert await closed_with(socket) == 1008


async def test_a_message_of_countless_empty_fragments_closes_the_connection(
    socket: ClientConnection,
) -> None:
    await answers(socket, INIT)
    with contextlib.suppress(ConnectionClosed):
        await socket.send("" for _ in range(5_000))
    assert await closed_with(socket) == 1008


@pytest.mark.skipif(sys.platform != "linux", reason="measured in /proc")
async def test_connections_that_are_not_acknowledged_hold_little(database_url: str) -> None:
    bomb = json.dumps({**INIT, "payload": {"a": "x" * 7_000_000}})
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(measured_server(database_url))
        cost = await stack.enter_async_context(server.measuring())
        for _ in range(20):
            socket = await stack.enter_async_context(
                connect(f"ws://{server.address}/graphql", subprotocols=[PROTOCOL])
            )
            with contextlib.suppress(ConnectionClosed):
                await socket.send(bomb)
    assert cost.within(cpu_seconds=0.5, peak_bytes=32_000_000) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="measured in /proc")
async def test_a_flood_of_small_messages_waits_in_the_client(database_url: str) -> None:
    text = b'{"type": "pong"}'
    masked = bytes([0x81, 0x80 | len(text)]) + bytes(4) + text
    async with (
        measured_server(database_url) as server,
        connect(f"ws://{server.address}/graphql", subprotocols=[PROTOCOL]) as socket,
    ):
        await answers(socket, INIT)
        async with server.measuring() as cost:
            socket.transport.write(masked * 2_000_000)
            await asyncio.sleep(1)
        socket.transport.abort()
    assert cost.peak_bytes < 8_000_000


async def test_a_handshake_that_is_not_valid_is_closed(address: str) -> None:
    with pytest.raises((InvalidMessage, InvalidStatus, EOFError)):
        await connect(f"ws://{address}/graphql", additional_headers={"x": "y" * 20_000})
    async with connect(f"ws://{address}/graphql", subprotocols=[PROTOCOL]) as socket:
        assert await answers(socket, INIT) == ["connection_ack"]


@pytest.mark.slow
async def test_a_client_that_does_not_read_is_closed_with_a_code(database_url: str) -> None:
    job = {"type": "thumbnail.create", "payload": {"assetId": "a", "versionNumber": 1}}
    lease = (
        'mutation { leaseJobs(input: {jobTypes: ["thumbnail.create"], workerId: "w"}) {'
        " ... on LeaseJobsSuccess { leases { leaseToken } } } }"
    )
    report = (
        "mutation ($t: String!, $p: JSON) {"
        " heartbeatJob(leaseToken: $t, progress: $p) { __typename } }"
    )
    read = "{" + "".join(f" a{n}: jobs {{ nodes {{ progress }} }}" for n in range(20)) + " }"
    async with (
        serving(database_url, "--no-worker", unread_timeout_seconds="1") as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        await client.post("/jobs", json=job)
        leased = (await client.post("/graphql", json={"query": lease})).json()
        token = leased["data"]["leaseJobs"]["leases"][0]["leaseToken"]
        variables = {"t": token, "p": "x" * 250_000}
        await client.post("/graphql", json={"query": report, "variables": variables})

        async def code_after(seconds: float) -> int:
            """The code for a client that asks for 100 MB, and reads nothing for so long."""
            async with connect(
                f"ws://{address}/graphql", subprotocols=[PROTOCOL], max_queue=1, max_size=None
            ) as socket:
                await answers(socket, INIT)
                for number in range(20):
                    message = EVENTS | {"id": str(number), "payload": {"query": read}}
                    await socket.send(json.dumps(message))
                await asyncio.sleep(seconds)
                with suppress(TimeoutError):
                    return await closed_with(socket, 5)
                return 0

        # How long the server reads from the database before its answers are left unread depends on
        # the machine. Five seconds after the close frame it ends the connection: the code is lost.
        codes = [await code_after(seconds) for seconds in (3, 6, 9, 12)]
        assert 1013 in codes


@pytest.mark.slow
async def test_a_message_has_to_arrive_in_time_and_an_idle_connection_stays(
    database_url: str,
) -> None:
    async with (
        serving(database_url, "--no-worker", body_timeout_seconds="1") as (address, _),
        connect(f"ws://{address}/graphql", subprotocols=[PROTOCOL]) as socket,
    ):
        await asyncio.sleep(2)
        await answers(socket, INIT)
        await socket.ping()
        await asyncio.sleep(2)
        assert await answers(socket, {"type": "ping"}) == ["pong"]
        await asyncio.sleep(2)

        async def slow() -> AsyncIterator[str]:
            for _ in range(30):
                yield " " * 10_000
                await asyncio.sleep(0.1)

        with contextlib.suppress(ConnectionClosed):
            await socket.send(slow())
        assert await closed_with(socket) == 1013
