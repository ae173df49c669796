"""Following one job: from its state as it is, and waiting for its end."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from job_registry import EnqueueRequest
from job_registry_api import GraphQLTypes, JobQueue, graphql_types
from job_registry_api.queue.models import JobRecord
from tests.embedding.test_merged_graphql import ADA, HostContext, caller_of, host_schema, run
from tests.http_client import serving

PING = EnqueueRequest("test.ping", {})
FOLLOW = "subscription ($id: ID) { jobEvents(jobId: $id) { name status attempt job { id } } }"
AWAIT = """query ($id: ID!, $seconds: Int! = 30) {
  awaitJob(id: $id, timeoutSeconds: $seconds) { __typename ... on Job { status result finishedAt }
    ... on Error { code } ... on InputInvalid { violations { path } } } }"""


def types_of(queue: JobQueue) -> GraphQLTypes:
    return graphql_types(queue, authenticate=caller_of)


async def finish(queue: JobQueue, after: float = 0.0) -> None:
    await asyncio.sleep(after)
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.complete(lease.token, {"pong": 1})


async def follow(queue: JobQueue, job: JobRecord, count: int, change: Any) -> list[Any]:
    stream: Any = await host_schema(types_of(queue)).subscribe(
        FOLLOW, {"id": str(job.id)}, context_value=ADA
    )
    events = [(await asyncio.wait_for(anext(stream), 10)).data["jobEvents"]]
    await change
    while len(events) < count:
        events.append((await asyncio.wait_for(anext(stream), 10)).data["jobEvents"])
    await stream.aclose()
    assert {each["job"]["id"] for each in events} == {str(job.id)}
    return [(each["name"], each["status"], each["attempt"]) for each in events]


async def test_the_first_event_of_a_job_is_its_state_and_each_later_change_follows(
    queue: JobQueue,
) -> None:
    job = (await queue.enqueue(PING)).job
    assert await follow(queue, job, 3, finish(queue)) == [
        ("job.current", "QUEUED", 0),
        ("job.started", "RUNNING", 1),
        ("job.succeeded", "SUCCEEDED", 1),
    ]
    # Of a job that has ended, too.
    assert await follow(queue, job, 1, asyncio.sleep(0)) == [("job.current", "SUCCEEDED", 1)]


async def test_no_change_is_missed_between_the_state_and_the_events(queue: JobQueue) -> None:
    """Given a job that ends at any moment of its subscription, I expect its end or `SUCCEEDED`."""
    for step in range(12):
        job = (await queue.enqueue(PING)).job
        stream: Any = await host_schema(types_of(queue)).subscribe(
            FOLLOW, {"id": str(job.id)}, context_value=ADA
        )
        ending = asyncio.create_task(finish(queue, step * 0.001))
        status = ""
        while status != "SUCCEEDED":
            event = await asyncio.wait_for(anext(stream), 10)
            status = event.data["jobEvents"]["status"]
        await ending
        await stream.aclose()


async def test_a_job_is_awaited_until_it_ends(queue: JobQueue) -> None:
    schema = host_schema(types_of(queue))
    job = (await queue.enqueue(PING)).job
    ending = asyncio.create_task(finish(queue, 0.3))
    begun = time.monotonic()
    data, errors = await run(schema, AWAIT, id=str(job.id))
    await ending
    assert errors == []
    assert data["awaitJob"]["status"] == "SUCCEEDED"
    assert data["awaitJob"]["result"] == {"pong": 1}
    assert time.monotonic() - begun < 5


async def test_a_job_that_does_not_end_in_time_is_answered_as_it_is(queue: JobQueue) -> None:
    schema = host_schema(types_of(queue))
    job = (await queue.enqueue(PING)).job
    begun = time.monotonic()
    data, _ = await run(schema, AWAIT, id=str(job.id), seconds=1)
    assert 0.9 < time.monotonic() - begun < 5
    assert (data["awaitJob"]["status"], data["awaitJob"]["finishedAt"]) == ("QUEUED", None)
    data, _ = await run(schema, AWAIT, id=str(job.id), seconds=31)
    assert data["awaitJob"]["violations"] == [{"path": "/timeoutSeconds"}]
    data, _ = await run(schema, AWAIT, id="1")
    assert data["awaitJob"]["code"] == "job_not_found"
    other = HostContext("eve", frozenset({"jobs:read"}), frozenset({"test.pong"}))
    data, _ = await run(schema, AWAIT, other, id=str(job.id))
    assert data["awaitJob"]["code"] == "job_not_found"


async def test_the_end_of_the_server_ends_the_wait_with_an_answer(database_url: str) -> None:
    job = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
    async with httpx.AsyncClient(timeout=20) as client:
        async with serving(database_url, "--no-worker") as (address, _):
            job_id = (await client.post(f"http://{address}/jobs", json=job)).json()["jobId"]
            sent = {"query": AWAIT, "variables": {"id": job_id}}
            waiting = asyncio.create_task(client.post(f"http://{address}/graphql", json=sent))
            await asyncio.sleep(1)
            begun = time.monotonic()
        answer = (await waiting).json()
    assert time.monotonic() - begun < 10
    assert answer["data"]["awaitJob"]["status"] == "QUEUED"
