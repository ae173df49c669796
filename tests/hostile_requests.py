"""Sends hostile requests to a measured server, and tells what exceeds the bounds."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Subprotocol

from job_registry_api.queue import migrations
from tests.hostile import BODY_LIMIT, JOB_ID, LEASE_TOKEN, HttpRequest, Request, SocketMessages
from tests.measured_server import Cost, MeasuredServer, measured_server

MAX_BYTES_BESIDE: Final = 64 * 2**20
"""What a request may hold beside its own text and what it stores."""
CPU_SECONDS_PER_STORED_JOB: Final = 0.000_5
CPU_SECONDS_PER_MESSAGE: Final = 0.015
"""What each further message of a WebSocket may take: it is a request of its own."""
BYTES_PER_STORED_JOB: Final = 20_000

MAX_ANSWER: Final = 8_388_608 + 2_000_000
"""JOBS_MAX_ANSWER_BYTES, and the names and small values beside the large ones."""

DOCUMENTED_CLOSES: Final = frozenset({1000, 1008, 1009, 4400, 4401, 4403, 4408, 4409, 4429})

_ANSWER_SECONDS: Final = 60
_SUBSCRIPTION_SECONDS: Final = 0.3
"""How long messages that start no operation with an end may keep the server busy."""
_RESULTS: Final = 24
_RESULT_BYTES: Final = 250_000
_SMALL_JOBS: Final = 100
"""So many small jobs are on the newest page, before the large ones."""
_ATTEMPTS: Final = 3
"""How often each of them was attempted."""

_COUNTS: Final = "{ jobTypes { counts { queued running succeeded failed cancelled } } }"
_ENQUEUE: Final = "mutation($i: [EnqueueJobInput!]!) { enqueueJobs(inputs: $i) { __typename } }"
_LEASE: Final = (
    "mutation($n: Int!) { leaseJobs(input: {"
    'jobTypes: ["thumbnail.create"], workerId: "w", limit: $n}) {'
    " ... on LeaseJobsSuccess { leases { leaseToken job { id } } } } }"
)
_COMPLETE: Final = (
    "mutation($t: String!, $r: JSON) { completeJob(leaseToken: $t, result: $r) { __typename } }"
)
_RELEASE: Final = "mutation($t: String!) { releaseJob(leaseToken: $t) { __typename } }"


@dataclass(frozen=True)
class Outcome:
    """What a request cost, and what is wrong with that or with the answers."""

    kind: str
    shape: str
    size: int
    cost: Cost
    answer_bytes: int
    stored: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Answers:
    bytes: int
    faults: tuple[str, ...]


@asynccontextmanager
async def hostile_server(folder: Path) -> AsyncIterator[MeasuredServer]:
    """Start a server with the default limits on SQLite.

    Its newest jobs are small, and were attempted a few times; the results of the others fill an
    answer.
    """
    url = f"sqlite:///{folder}/jobs.db"
    await asyncio.to_thread(migrations.upgrade, url)
    async with measured_server(url, lease_seconds="3600", assets=str(folder)) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            results: list[Any] = ["x" * _RESULT_BYTES, [{"a": 0}] * (_RESULT_BYTES // 9)]
            leases = await _lease(client, _RESULTS)
            await asyncio.gather(
                *(
                    _query(client, _COMPLETE, t=token, r=results[number % 2])
                    for number, (token, _) in enumerate(leases)
                )
            )
            leases = await _lease(client, _SMALL_JOBS)
            for attempt in range(_ATTEMPTS):
                await asyncio.gather(*(_query(client, _RELEASE, t=token) for token, _ in leases))
                if attempt + 1 < _ATTEMPTS:
                    leases = await _lease(client, _SMALL_JOBS, stored=True)
        yield server


async def measure(
    server: MeasuredServer, request: Request, *, cpu_seconds: float, silence_seconds: float
) -> Outcome:
    """Send a request once, and compare what it costs with the bounds."""
    async with httpx.AsyncClient(base_url=server.url, timeout=_ANSWER_SECONDS) as client:
        ready = await _ready(client, request)
        before = await _stored(client)
        async with server.measuring() as cost:
            if isinstance(ready, HttpRequest):
                answers = await _send(client, ready)
            else:
                answers = await _converse(server, ready)
        stored = await _stored(client) - before
    further = len(request.messages) - 1 if isinstance(request, SocketMessages) else 0
    exceeded = cost.within(
        cpu_seconds=cpu_seconds
        + stored * CPU_SECONDS_PER_STORED_JOB
        + further * CPU_SECONDS_PER_MESSAGE,
        peak_bytes=MAX_BYTES_BESIDE + request.size + stored * BYTES_PER_STORED_JOB,
        silence_seconds=silence_seconds,
    )
    faults = answers.faults
    if answers.bytes > MAX_ANSWER:
        faults += (f"{answers.bytes:,} bytes are answered",)
    if exceeded:
        faults += (exceeded,)
    return Outcome(request.kind, request.shape, request.size, cost, answers.bytes, stored, faults)


async def _send(client: httpx.AsyncClient, request: HttpRequest) -> _Answers:
    try:
        response = await client.request(
            request.method, request.path, headers=list(request.headers), content=request.body
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return _Answers(0, (f"no answer: {type(error).__name__} {error}",))
    faults = _faults_of(response.content)
    if response.status_code >= 500 and response.status_code != 501:
        faults += (f"HTTP {response.status_code}: {response.text[:200]}",)
    return _Answers(len(response.content), faults)


async def _converse(server: MeasuredServer, request: SocketMessages) -> _Answers:
    """Send messages over one WebSocket, and read until every operation has ended."""
    received: list[bytes] = []
    try:
        async with (
            asyncio.timeout(_ANSWER_SECONDS),
            connect(
                f"ws://{server.address}/graphql",
                subprotocols=[Subprotocol("graphql-transport-ws")],
                compression=None,
                max_size=None,
            ) as socket,
        ):
            with suppress(ConnectionClosed):
                if request.is_initialised:
                    await socket.send('{"type": "connection_init"}')
                reading = asyncio.create_task(_read(socket, request.operations, received))
                try:
                    for message in request.messages:
                        await socket.send(message)
                    await socket.send('{"type": "ping"}')
                finally:
                    await reading
    except (OSError, InvalidHandshake) as error:
        return _Answers(0, (f"no answer: {type(error).__name__} {error}",))
    faults = _faults_of(b"".join(received))
    if socket.close_code not in DOCUMENTED_CLOSES:
        faults += (f"the WebSocket was closed with {socket.close_code}",)
    return _Answers(max(map(len, received), default=0), faults)


async def _read(socket: ClientConnection, operations: int, received: list[bytes]) -> None:
    """Read until so many operations have ended and a ping is answered, or the server closes."""
    kinds: Counter[str] = Counter()
    with suppress(ConnectionClosed):
        while kinds["complete"] + kinds["error"] < operations or not kinds["pong"]:
            received.append(await socket.recv(decode=False))
            kinds[json.loads(received[-1])["type"]] += 1
        if not operations:
            # A client that does not read its messages does not see the end of the connection.
            with suppress(TimeoutError):
                async with asyncio.timeout(_SUBSCRIPTION_SECONDS):
                    while True:
                        received.append(await socket.recv(decode=False))


def _faults_of(content: bytes) -> tuple[str, ...]:
    place = content.find(b"internal_error")
    if place < 0:
        return ()
    return (f"internal_error: {content[max(0, place - 200) : place + 200]!r}",)


async def _query(client: httpx.AsyncClient, query: str, **variables: object) -> Any:
    response = await client.post("/graphql", json={"query": query, "variables": variables})
    return response.json()["data"]


async def _stored(client: httpx.AsyncClient) -> int:
    """Return how many jobs there are."""
    types = (await _query(client, _COUNTS))["jobTypes"]
    return sum(sum(each["counts"].values()) for each in types)


async def _lease(
    client: httpx.AsyncClient, jobs: int, *, stored: bool = False
) -> list[tuple[str, str]]:
    """Store jobs, unless they are stored, and lease them.

    Return the token of each lease and the id of its job.
    """
    job = {
        "type": "thumbnail.create",
        "priority": 100,
        "payload": {"assetId": "a", "versionNumber": 1},
    }
    if not stored:
        await _query(client, _ENQUEUE, i=[job] * jobs)
    leases = (await _query(client, _LEASE, n=jobs))["leaseJobs"]["leases"]
    return [(lease["leaseToken"], lease["job"]["id"]) for lease in leases]


async def _ready(client: httpx.AsyncClient, request: Request) -> Request:
    """Replace what stands for a job and its lease."""
    if not request.needs_a_job:
        return request
    ((token, job_id),) = await _lease(client, 1)

    def filled(text: str) -> str:
        return text.replace(LEASE_TOKEN, token).replace(JOB_ID, job_id)

    if isinstance(request, HttpRequest):
        body = request.body.replace(LEASE_TOKEN.encode(), token.encode())
        body = body.replace(JOB_ID.encode(), job_id.encode())
        return replace(request, path=filled(request.path), body=body[:BODY_LIMIT])
    messages = (filled(text) if isinstance(text, str) else text for text in request.messages)
    return replace(request, messages=tuple(messages))
