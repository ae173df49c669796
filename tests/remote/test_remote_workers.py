"""The protocol of remote workers, over HTTP. `test_reference_workers` runs whole workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.http_client import serving


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a `job-registry serve` of its own."""
    async with (
        serving(database_url) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=40) as client,
    ):
        yield client


async def enqueue(server: httpx.AsyncClient, *batches: str) -> list[str]:
    jobs = []
    for batch in batches:
        payload = {"batchId": batch, "escrowId": "e"}
        response = await server.post("/jobs", json={"type": "payout.execute", "payload": payload})
        jobs.append(response.json()["jobId"])
    return jobs


async def read(server: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = (await server.get(f"/jobs/{job_id}")).json()
    return job


async def graphql(server: httpx.AsyncClient, query: str, **variables: Any) -> dict[str, Any]:
    response = await server.post("/graphql", json={"query": query, "variables": variables})
    content = response.json()
    assert "errors" not in content, content
    (result,) = content["data"].values()
    return dict(result)


LEASE = """mutation ($types: [String!]!, $limit: Int!, $wait: Int!) {
  leaseJobs(input: {jobTypes: $types, workerId: "python", limit: $limit, waitSeconds: $wait}) {
    __typename
    ... on LeaseJobsSuccess { leases { leaseToken job { id payload } } }
    ... on InputInvalid { violations { path } } } }"""
END = """mutation ($token: String!) {{ {0}
  {{ __typename ... on JobChanged {{ job {{ status attempt nextRunAt }} }} }} }}"""


async def test_a_worker_uses_every_end_that_an_attempt_can_have(
    server: httpx.AsyncClient,
) -> None:
    jobs = await enqueue(server, *(f"b-{n}" for n in range(7)))
    leased = await graphql(server, LEASE, types=["payout.execute"], limit=10, wait=0)
    # The limit of payout.execute is 5, over all workers.
    tokens = {each["job"]["id"]: each["leaseToken"] for each in leased["leases"]}
    assert list(tokens) == jobs[:5]
    assert (await graphql(server, LEASE, types=["payout.execute"], limit=1, wait=0))["leases"] == []

    ends = {
        "completeJob(leaseToken: $token, result: {ok: true})": "SUCCEEDED",
        'failJob(leaseToken: $token, error: {message: "no"}, retryable: false)': "FAILED",
        'failJob(leaseToken: $token, error: {message: "no"}, retryAfterSeconds: 60)': "QUEUED",
        "releaseJob(leaseToken: $token)": "QUEUED",
        "snoozeJob(leaseToken: $token, seconds: 60)": "QUEUED",
    }
    for (job_id, token), (call, status) in zip(tokens.items(), ends.items(), strict=True):
        ended = await graphql(server, END.format(call), token=token)
        assert ended["job"]["status"] == status
        assert (await read(server, job_id))["status"] == status.lower()
        again = await graphql(server, END.format(call), token=token)
        expected = "JobChanged" if status == "SUCCEEDED" else "LeaseLost"
        assert again["__typename"] == expected


async def test_a_long_poll_is_answered_when_a_job_comes(server: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(
        graphql(server, LEASE, types=["payout.execute"], limit=1, wait=20)
    )
    await asyncio.sleep(0.5)
    assert not waiting.done()
    (job_id,) = await enqueue(server, "late")
    leased = await asyncio.wait_for(waiting, 3)
    assert [each["job"]["id"] for each in leased["leases"]] == [job_id]
    assert json.dumps(leased["leases"][0]["job"]["payload"], sort_keys=True) == (
        '{"batchId": "late", "escrowId": "e"}'
    )


async def test_a_worker_with_a_wrong_request_gets_its_faults(server: httpx.AsyncClient) -> None:
    refused = await graphql(server, LEASE, types=["nope"], limit=101, wait=31)
    assert refused["__typename"] == "InputInvalid"
    assert {violation["path"] for violation in refused["violations"]} == {
        "/jobTypes/0",
        "/limit",
        "/waitSeconds",
    }


TIMES = """mutation ($types: [String!]!) {
  leaseJobs(input: {jobTypes: $types, workerId: "python"}) {
    ... on LeaseJobsSuccess {
      leases { leaseToken leaseSeconds secondsToExpiry secondsLeft } } } }"""
BEAT = """mutation ($token: String!) { heartbeatJob(leaseToken: $token) {
  ... on HeartbeatJobSuccess { secondsToExpiry secondsLeft } } }"""


@pytest.mark.parametrize(("lease_seconds", "expected"), [("12", 12.0), ("90", 60.0)])
async def test_a_worker_needs_no_clock(
    database_url: str, lease_seconds: str, expected: float
) -> None:
    async with (
        serving(database_url, lease_seconds=lease_seconds) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=40) as server,
    ):
        await enqueue(server, "b-1")
        (lease,) = (await graphql(server, TIMES, types=["payout.execute"]))["leases"]
        # payout.execute times out after 60 seconds, and no lease lasts longer than its attempt.
        assert lease["leaseSeconds"] == float(lease_seconds)
        assert lease["secondsToExpiry"] == expected
        assert lease["secondsLeft"] == 60.0
        beat = await graphql(server, BEAT, token=lease["leaseToken"])
        assert beat["secondsLeft"] == pytest.approx(60, abs=5)
        assert beat["secondsToExpiry"] == pytest.approx(expected, abs=5)


WAITED = """mutation ($wait: Int!) {
  leaseJobs(input: {jobTypes: ["payout.execute"], workerId: "python", waitSeconds: $wait}) {
    ... on LeaseJobsSuccess { waitedSeconds leases { secondsToExpiry } } } }"""


async def test_a_worker_knows_when_its_leases_began(server: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(graphql(server, WAITED, wait=20))
    await asyncio.sleep(1.5)
    await enqueue(server, "b-1")
    leased = await waiting
    assert len(leased["leases"]) == 1
    assert 1 <= leased["waitedSeconds"] < 3
    await enqueue(server, "b-2")
    leased = await graphql(server, WAITED, wait=20)
    assert len(leased["leases"]) == 1
    assert leased["waitedSeconds"] < 1


STOP = """mutation ($worker: String!) { stopWaiting(workerId: $worker) {
  ... on StopWaitingSuccess { workerId } ... on InputInvalid { violations { path } } } }"""


async def test_a_worker_that_stops_waiting_gets_the_answer_of_its_long_poll(
    server: httpx.AsyncClient, database_url: str
) -> None:
    lease = LEASE.replace('"python"', "$worker").replace("($types", "($worker: String!, $types")
    of_types = {"types": ["payout.execute"], "limit": 1, "wait": 20}
    async with (
        serving(database_url) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=40) as another,
    ):
        going, gone, staying = (
            asyncio.create_task(graphql(each, lease, worker=worker, **of_types))
            for each, worker in ((server, "going"), (server, "gone"), (another, "staying"))
        )
        await asyncio.sleep(1)
        stopped = await graphql(server, STOP, worker="going")
        assert stopped == {"workerId": "going"}
        assert (await asyncio.wait_for(going, 2))["leases"] == []
        # Also when the request comes to another process than the one in which the worker waits.
        await graphql(another, STOP, worker="gone")
        assert (await asyncio.wait_for(gone, 2))["leases"] == []
        assert not staying.done()
        (job_id,) = await enqueue(server, "for the one that stays")
        leased = await asyncio.wait_for(staying, 3)
        assert [each["job"]["id"] for each in leased["leases"]] == [job_id]
    refused = await graphql(server, STOP, worker="")
    assert refused == {"violations": [{"path": "/workerId"}]}
