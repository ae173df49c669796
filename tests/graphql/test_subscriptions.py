"""Following jobs: server-sent events and graphql-transport-ws, against a real server."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from job_registry import EnqueueRequest
from job_registry_api import JobQueue
from tests.http_client import Visit, application_of, serving

TRANSPORT = Subprotocol("graphql-transport-ws")
SUBSCRIPTION = """
subscription ($types: [String!]) {
  jobEvents(jobTypes: $types) { name jobId type status attempt job { id status } } }"""
JOB = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}


@pytest.fixture
async def address(database_url: str) -> AsyncIterator[str]:
    """The host and port of a `job-registry serve` of its own."""
    async with serving(database_url, "--no-worker") as (address, _):
        yield address


async def enqueue(address: str, job: dict[str, Any] = JOB) -> str:
    async with httpx.AsyncClient() as client:
        response = await client.post(f"http://{address}/jobs", json=job)
    return str(response.json()["jobId"])


async def test_events_come_over_a_websocket(address: str) -> None:
    async with (
        connect(f"ws://{address}/graphql", subprotocols=[TRANSPORT]) as socket,
        asyncio.timeout(10),
    ):
        await socket.send(json.dumps({"type": "connection_init"}))
        assert json.loads(await socket.recv())["type"] == "connection_ack"
        payload = {"query": SUBSCRIPTION, "variables": {"types": ["payout.execute"]}}
        await socket.send(json.dumps({"id": "1", "type": "subscribe", "payload": payload}))
        await asyncio.sleep(0.3)
        await enqueue(
            address, {"type": "thumbnail.create", "payload": {"assetId": "a", "versionNumber": 1}}
        )
        job_id = await enqueue(address)
        message = json.loads(await socket.recv())
    assert message["type"] == "next"
    assert message["payload"]["data"]["jobEvents"] == {
        "name": "job.created",
        "jobId": job_id,
        "type": "payout.execute",
        "status": "QUEUED",
        "attempt": 0,
        "job": {"id": job_id, "status": "QUEUED"},
    }


async def test_events_come_as_server_sent_events(address: str) -> None:
    async with (
        httpx.AsyncClient() as client,
        asyncio.timeout(10),
        client.stream(
            "POST",
            f"http://{address}/graphql",
            json={"query": SUBSCRIPTION},
            headers={"accept": "text/event-stream"},
        ) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        jobs = asyncio.create_task(_enqueue_soon(address, 3))
        seen = []
        async for line in response.aiter_lines():
            if line.startswith("data: ") and "jobEvents" in line:
                seen.append(json.loads(line.removeprefix("data: "))["data"]["jobEvents"]["jobId"])
            if len(seen) == 3:
                break
        assert seen == await jobs


async def _enqueue_soon(address: str, count: int) -> list[str]:
    await asyncio.sleep(0.3)
    return [await enqueue(address) for _ in range(count)]


async def follow(application: Any, hung_up: asyncio.Event, received: list[bytes]) -> None:
    """Subscribe as an HTTP client that hangs up, without the client's buffers."""
    body = json.dumps({"query": "subscription { jobEvents { name } }"}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        received.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/graphql",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")],
    }
    await application(scope, receive, send)


async def test_who_hangs_up_gets_nothing_more_and_costs_nothing_more(visit: Visit) -> None:
    hung_up = asyncio.Event()
    received: list[bytes] = []
    async with visit() as client, asyncio.timeout(10):
        application = application_of(client)
        following = asyncio.create_task(follow(application, hung_up, received))
        await asyncio.sleep(0.3)
        await client.post("/jobs", json={"type": "test.ping", "payload": {}})
        while not any(b"job.created" in text for text in received):
            await asyncio.sleep(0.02)
        hung_up.set()
        await following
        before = len(received)
        await client.post("/jobs", json={"type": "test.ping", "payload": {}})
        assert application.state.queue.events.subscribers == 0
    assert len(received) == before


async def test_a_thousand_clients_that_hang_up_leave_nothing_behind(visit: Visit) -> None:
    async with visit() as client, asyncio.timeout(60):
        application = application_of(client)
        events = application.state.queue.events
        await client.post("/jobs", json={"type": "test.ping", "payload": {}})
        before = len(asyncio.all_tasks())
        for _ in range(10):
            hang_up = asyncio.Event()
            following = [asyncio.create_task(follow(application, hang_up, [])) for _ in range(100)]
            while events.subscribers < 100:
                await asyncio.sleep(0.01)
            await client.post("/jobs", json={"type": "test.ping", "payload": {}})
            hang_up.set()
            await asyncio.gather(*following)
            assert events.subscribers == 0
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)


CANCELLATION = """
mutation ($id: ID!) {
  leaseJobs(input: {jobTypes: ["payout.execute"], workerId: "w"}) { __typename }
  cancelJob(id: $id) { __typename } }"""


async def test_a_requested_cancellation_is_an_event_of_a_running_job(address: str) -> None:
    async with (
        connect(f"ws://{address}/graphql", subprotocols=[TRANSPORT]) as socket,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
        asyncio.timeout(10),
    ):
        await socket.send(json.dumps({"type": "connection_init"}))
        assert json.loads(await socket.recv())["type"] == "connection_ack"
        await socket.send(
            json.dumps({"id": "1", "type": "subscribe", "payload": {"query": SUBSCRIPTION}})
        )
        await asyncio.sleep(0.3)
        job_id = await enqueue(address)
        query = {"query": CANCELLATION, "variables": {"id": job_id}}
        assert "errors" not in (await client.post("/graphql", json=query)).json()
        events = [json.loads(await socket.recv())["payload"]["data"]["jobEvents"] for _ in range(3)]
    assert [(event["name"], event["status"]) for event in events] == [
        ("job.created", "QUEUED"),
        ("job.started", "RUNNING"),
        ("job.cancel_requested", "RUNNING"),
    ]
    assert {event["jobId"] for event in events} == {job_id}


async def test_a_client_that_takes_everything_gets_what_fits_the_operation(address: str) -> None:
    takes = "application/graphql-response+json, application/json, text/event-stream"
    async with httpx.AsyncClient(base_url=f"http://{address}") as client, asyncio.timeout(10):
        query = {"query": "{ __typename }"}
        answer = await client.post("/graphql", json=query, headers={"accept": takes})
        async with client.stream(
            "POST", "/graphql", json={"query": SUBSCRIPTION}, headers={"accept": takes}
        ) as events:
            streamed = events.headers["content-type"]
    assert answer.headers["content-type"].startswith("application/graphql-response+json")
    assert streamed.startswith("text/event-stream")


async def test_a_wrong_subscription_is_a_clear_error(address: str) -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(10):
        response = await client.post(
            f"http://{address}/graphql",
            json={"query": SUBSCRIPTION, "variables": {"types": ["nope"]}},
            headers={"accept": "text/event-stream"},
        )
        plain = await client.post(f"http://{address}/graphql", json={"query": SUBSCRIPTION})
        of_no_job = [
            await client.post(
                f"http://{address}/graphql",
                json={"query": f'subscription {{ jobEvents(jobId: "{job_id}") {{ name }} }}'},
                headers={"accept": "text/event-stream"},
            )
            for job_id in ("x", uuid.UUID(int=0))
        ]
    assert ["job_not_found" in each.text for each in of_no_job] == [True, True]
    assert ["validation_error" in each.text for each in of_no_job] == [False, False]
    assert "validation_error" in response.text
    assert "/jobTypes/0" in response.text
    assert "text/event-stream" in plain.json()["errors"][0]["message"]


async def test_a_server_that_stops_ends_event_streams_without_complete(database_url: str) -> None:
    """A client of graphql-sse then connects again; after `complete` or an error it would not."""
    headers = {"accept": "text/event-stream"}
    async with httpx.AsyncClient(timeout=20) as client:
        async with serving(database_url, "--no-worker") as (address, _):
            url = f"http://{address}/graphql"
            sent = client.build_request("POST", url, json={"query": SUBSCRIPTION}, headers=headers)
            response = await client.send(sent, stream=True)
            await asyncio.sleep(1)
            await enqueue(address)
            await asyncio.sleep(1)
        text = (await response.aread()).decode()
    assert text.count("event: next") == 1
    assert "job.created" in text
    assert "complete" not in text
    assert "events_missed" not in text


async def test_a_server_that_stops_closes_websockets_with_1001(database_url: str) -> None:
    async with serving(database_url, "--no-worker") as (address, _):
        socket = await connect(f"ws://{address}/graphql", subprotocols=[TRANSPORT])
        # A payload may be null.
        await socket.send(json.dumps({"type": "connection_init", "payload": None}))
        assert json.loads(await socket.recv())["type"] == "connection_ack"
        payload = {"query": SUBSCRIPTION}
        await socket.send(json.dumps({"id": "1", "type": "subscribe", "payload": payload}))
        await asyncio.sleep(0.5)
    with pytest.raises(ConnectionClosed):
        await socket.recv()
    assert socket.close_code == 1001


async def test_the_single_connection_mode_is_refused(address: str) -> None:
    async with httpx.AsyncClient() as client:
        response = await client.put(f"http://{address}/graphql")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD, POST")
    assert "distinct connections mode" in response.json()["errors"][0]["message"]


async def test_whoever_follows_one_job_misses_nothing_over_a_restart(
    queue: JobQueue, database_url: str
) -> None:
    """Given a job that ends while no server runs, I expect a client that continues to learn of it:
    by the event where the database keeps it, otherwise by the state of the job."""
    request = EnqueueRequest("payout.execute", {"batchId": "b", "escrowId": "e"})
    job = (await queue.enqueue(request)).job
    query = "subscription ($id: ID) { jobEvents(jobId: $id) { name status } }"
    body = {"query": query, "variables": {"id": str(job.id)}}
    headers = {"accept": "text/event-stream"}

    async def read(address: str, count: int, *, leasing: bool) -> tuple[list[Any], str]:
        """Return so many events, and the last id that came with one."""
        found: list[Any] = []
        event_id = ""
        url = f"http://{address}/graphql"
        async with (
            asyncio.timeout(20),
            httpx.AsyncClient() as client,
            client.stream("POST", url, json=body, headers=headers) as response,
        ):
            async for line in response.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    found.append(json.loads(value)["data"]["jobEvents"])
                    if len(found) == 1 and leasing:
                        (lease,) = await queue.lease(["payout.execute"], "w")
                        leases.append(lease.token)
                    if len(found) == count:
                        break
        return found, event_id

    leases: list[str] = []
    async with serving(database_url, "--no-worker") as (address, _):
        seen, event_id = await read(address, 2, leasing=True)
    assert [each["name"] for each in seen] == ["job.current", "job.started"]
    await queue.complete(leases[0])
    headers["last-event-id"] = event_id
    async with serving(database_url, "--no-worker") as (address, _):
        seen, _ = await read(address, 1, leasing=False)
    is_kept = database_url.startswith("sqlite")
    name = "job.succeeded" if is_kept else "job.current"
    assert seen == [{"name": name, "status": "SUCCEEDED"}]
