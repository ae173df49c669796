"""Waiting over GraphQL: for leases whose client hangs up, and why the jobs of a page wait."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from job_registry import EnqueueRequest
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import Store
from tests.http_client import Execute, application_of, queue_of, serving

LEASE = """mutation { leaseJobs(input: {
    jobTypes: ["payout.execute"], workerId: "gone", waitSeconds: 30
}) { __typename ... on LeaseJobsSuccess { leases { leaseToken } } } }"""


async def test_a_long_poll_whose_client_has_hung_up_is_given_no_job(
    queue: JobQueue, database_url: str
) -> None:
    async with serving(database_url, "--no-worker") as (address, _):
        # Given ten clients that wait for a lease, and hang up, some with requests that they have
        # sent in advance
        host, port = address.split(":")
        body = json.dumps({"query": LEASE}).encode()
        request = (
            b"POST /graphql HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (address.encode(), len(body), body)
        )
        for number in range(10):
            _, writer = await asyncio.open_connection(host, int(port))
            for _ in range(number % 4 + 1):
                writer.write(request)
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.close()
        await asyncio.sleep(0.3)

        # When a job comes
        payload = {"batchId": "b", "escrowId": "e"}
        async with httpx.AsyncClient() as client:
            job = await client.post(
                f"http://{address}/jobs", json={"type": "payout.execute", "payload": payload}
            )
        await asyncio.sleep(1.0)

    # I expect it queued, with no attempt
    found = await queue.get(job.json()["jobId"])
    assert (found.status, found.attempt) == (JobStatus.QUEUED, 0)
    assert await queue.attempts([found.id]) == {found.id: []}


async def test_a_field_that_waits_longer_than_another_ends_when_its_client_hangs_up(
    http: httpx.AsyncClient,
) -> None:
    queue = queue_of(http)
    jobs = [(await queue.enqueue(EnqueueRequest("test.ping", {}))).job for _ in range(2)]
    await queue.cancel(str(jobs[0].id))
    first, second = (f'awaitJob(id: "{job.id}") {{ __typename }}' for job in jobs)
    body = json.dumps({"query": f"{{ first: {first} second: {second} }}"}).encode()
    messages = [{"type": "http.request", "body": body}]
    hung_up = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None: ...

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/graphql",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    answering = asyncio.create_task(application_of(http)(scope, receive, send))
    await asyncio.sleep(0.3)
    assert not answering.done()
    hung_up.set()
    await asyncio.wait_for(answering, 5)


async def test_why_the_jobs_of_a_page_wait_is_one_query(
    execute: Execute, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(http)
    await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 30)
    asked: list[int] = []
    waiting = Store.waiting

    async def noting(self: Store, job_ids: Any) -> object:
        asked.append(len(job_ids))
        return await waiting(self, job_ids)

    monkeypatch.setattr(Store, "waiting", noting)
    data = await execute(
        "query { jobs(first: 30) { nodes { waitingReason { __typename"
        " ... on NoWorkerSeen { lastSeenSecondsAgo } } } } }"
    )
    assert asked == [30]
    reasons = [node["waitingReason"] for node in data["jobs"]["nodes"]]
    assert reasons == [{"__typename": "NoWorkerSeen", "lastSeenSecondsAgo": None}] * 30
