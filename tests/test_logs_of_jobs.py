"""Who reads what handlers have logged, over GraphQL and REST, and within which bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from job_registry_api import JobQueue
from tests.http_client import Visit
from tests.test_own_jobs import AUTH, NOWHERE, ask, bearer, enqueue

ADA = bearer("ada")
READER = bearer("reader", "jobs:read")
WORKER = bearer("worker", "jobs:work")
LEASE = """mutation { leaseJobs(input: {jobTypes: ["test.ping"], workerId: "w"}) {
  ... on LeaseJobsSuccess { leases { leaseToken job { id } } } } }"""
BEAT = """mutation ($t: String!, $logs: [JobLogLineInput!]) {
  heartbeatJob(leaseToken: $t, logs: $logs) { __typename
    ... on InputInvalid { violations { path code } } } }"""
LOGS = """query ($id: ID!, $last: Int! = 100) { job(id: $id) { ... on Job {
  attempts { attempt startedAt logs(last: $last) { loggedAt level message data } } } } }"""
LINES = [
    {"message": "began", "seconds": 0.25, "data": {"pages": 3, "of": None}},
    {"message": "slow", "seconds": 1.5, "level": "WARNING"},
    {"message": "stuck", "seconds": 2.0, "level": "ERROR"},
]


@pytest.fixture
async def client(visit: Visit) -> AsyncIterator[httpx.AsyncClient]:
    async with visit(**AUTH) as client:
        yield client


async def logged(client: httpx.AsyncClient, lines: list[Any]) -> tuple[str, str]:
    """A running job of Ada's with these lines: its id and the token of its lease."""
    job_id = await enqueue(client, ADA)
    ((lease),) = (await ask(client, WORKER, LEASE))["leaseJobs"]["leases"]
    beat = await ask(client, WORKER, BEAT, t=lease["leaseToken"], logs=lines)
    assert beat["heartbeatJob"]["__typename"] == "HeartbeatJobSuccess"
    return job_id, lease["leaseToken"]


async def test_readers_see_the_lines_of_each_attempt(client: httpx.AsyncClient) -> None:
    job_id, token = await logged(client, LINES)
    ((attempt),) = (await ask(client, READER, LOGS, id=job_id))["job"]["attempts"]
    assert [(line["level"], line["message"], line["data"]) for line in attempt["logs"]] == [
        ("INFO", "began", {"pages": 3, "of": None}),
        ("WARNING", "slow", {}),
        ("ERROR", "stuck", {}),
    ]
    times = [line["loggedAt"] for line in attempt["logs"]]
    assert times == sorted(times)
    assert times[0] > attempt["startedAt"]
    # The worker sees those of its job.
    beat = """mutation ($t: String!) { heartbeatJob(leaseToken: $t) {
      ... on HeartbeatJobSuccess { job { attempts { logs(last: 1) { message } } } } } }"""
    seen = (await ask(client, WORKER, beat, t=token))["heartbeatJob"]["job"]["attempts"]
    assert seen == [{"logs": [{"message": "stuck"}]}]
    answer = await client.get(f"/jobs/{job_id}/logs", headers=READER)
    assert answer.json()["allLines"] is True
    assert [
        (line["attempt"], line["level"], line["message"], line["data"])
        for line in answer.json()["lines"]
    ] == [
        (1, "info", "began", {"pages": 3, "of": None}),
        (1, "warning", "slow", {}),
        (1, "error", "stuck", {}),
    ]


async def test_the_last_lines_are_read_alone(client: httpx.AsyncClient) -> None:
    job_id, _ = await logged(client, LINES)
    for last, expected in ((0, []), (1, ["stuck"]), (2, ["slow", "stuck"])):
        ((attempt),) = (await ask(client, READER, LOGS, id=job_id, last=last))["job"]["attempts"]
        assert [line["message"] for line in attempt["logs"]] == expected
    for last in (-1, 1_001):
        answer = await client.post(
            "/graphql",
            json={"query": LOGS, "variables": {"id": job_id, "last": last}},
            headers=READER,
        )
        (error,) = answer.json()["errors"]
        assert error["extensions"]["code"] == "validation_error"
        assert error["path"] == ["job", "attempts", 0, "logs"]


async def test_who_may_only_see_ones_own_jobs_sees_no_lines(client: httpx.AsyncClient) -> None:
    """Lines are written for operators. The rest of the job is answered all the same."""
    job_id, _ = await logged(client, LINES)
    content = {"query": LOGS, "variables": {"id": job_id}}
    answer = (await client.post("/graphql", json=content, headers=ADA)).json()
    ((attempt),) = answer["data"]["job"]["attempts"]
    assert (attempt["attempt"], attempt["logs"]) == (1, None)
    assert [each["extensions"]["code"] for each in answer["errors"]] == ["forbidden"]
    refused = await client.get(f"/jobs/{job_id}/logs", headers=ADA)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")


async def test_a_job_that_is_not_there_has_no_logs(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/jobs/{NOWHERE}/logs", headers=READER)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


async def test_a_line_that_cannot_be_kept_is_named(client: httpx.AsyncClient) -> None:
    job_id, token = await logged(client, LINES)
    wrong = [*LINES, {"message": "deep", "seconds": 1.0, "data": {"a": [1]}}]
    beat = await ask(client, WORKER, BEAT, t=token, logs=wrong)
    assert beat["heartbeatJob"] == {
        "__typename": "InputInvalid",
        "violations": [{"path": "/logs/3/data", "code": "wrong_type"}],
    }
    ((attempt),) = (await ask(client, READER, LOGS, id=job_id))["job"]["attempts"]
    assert len(attempt["logs"]) == 3


async def test_the_limit_of_jobs_per_request_is_not_one_of_log_lines(visit: Visit) -> None:
    async with visit(**AUTH, max_bulk_size="2") as client:
        _, token = await logged(client, LINES)
        line = '{message: "x", seconds: 1}'
        beat = 'mutation { heartbeatJob(leaseToken: "%s", logs: [%s]) { __typename } }'
        beat %= (token, 3 * line)
        assert await ask(client, WORKER, beat) == {
            "heartbeatJob": {"__typename": "HeartbeatJobSuccess"}
        }


async def test_the_lines_of_a_page_are_read_within_the_bounds_of_an_answer(visit: Visit) -> None:
    async with visit(**AUTH, max_answer_bytes=65_536, max_answer_fields=1_000) as client:
        many = [{"message": "x" * 600, "seconds": 1.0}] * 20
        for _ in range(3):
            await logged(client, many)
        document = "{ jobs { nodes { attempts { logs { message } } } } }"
        answer = await client.post("/graphql", json={"query": document}, headers=READER)
        errors = answer.json()["errors"]
        assert {each["extensions"]["code"] for each in errors} == {"budget_exceeded"}
        assert errors[0]["extensions"]["setting"] == "JOBS_MAX_ANSWER_BYTES"
        # Those of one job fit.
        job_id, _ = await logged(client, many)
        ((attempt),) = (await ask(client, READER, LOGS, id=job_id))["job"]["attempts"]
        assert len(attempt["logs"]) == 20
        job_id, _ = await logged(client, [{"message": "x", "seconds": 1.0}] * 400)
        content = {"query": LOGS, "variables": {"id": job_id, "last": 400}}
        answer = await client.post("/graphql", json=content, headers=READER)
        (error,) = answer.json()["errors"]
        assert error["extensions"]["setting"] == "JOBS_MAX_ANSWER_FIELDS"


async def test_rest_tells_when_not_all_lines_fit(visit: Visit) -> None:
    async with visit(**AUTH, max_answer_bytes=65_536) as client:
        job_id = await enqueue(client, ADA)
        for number in range(3):
            ((lease),) = (await ask(client, WORKER, LEASE))["leaseJobs"]["leases"]
            lines = [{"message": f"{number}" * 900, "seconds": 1.0}] * 10
            await ask(client, WORKER, BEAT, t=lease["leaseToken"], logs=lines)
            fail = """mutation ($t: String!) { failJob(leaseToken: $t, error: {message: "x"},
              retryAfterSeconds: 0) { __typename } }"""
            await ask(client, WORKER, fail, t=lease["leaseToken"])
        answer = (await client.get(f"/jobs/{job_id}/logs", headers=READER)).json()
        assert answer["allLines"] is False
        assert {line["attempt"] for line in answer["lines"]} == {3}


async def test_who_follows_a_job_gets_its_lines_with_its_events(queue: JobQueue) -> None:
    from job_registry_api.queue.job_logs import LogLevel, LogLine
    from tests.embedding.test_merged_graphql import ADA as ADMIN
    from tests.embedding.test_merged_graphql import host_schema
    from tests.graphql.test_following import PING, types_of

    job = (await queue.enqueue(PING)).job
    follow = """subscription ($id: ID) { jobEvents(jobId: $id) {
      name job { attempts { logs(last: 1) { message } } } } }"""
    stream: Any = await host_schema(types_of(queue)).subscribe(
        follow, {"id": str(job.id)}, context_value=ADMIN
    )
    assert (await anext(stream)).data["jobEvents"]["name"] == "job.current"
    (lease,) = await queue.lease(["test.ping"], "w")
    for message in ("one", "two"):
        await queue.heartbeat(lease.token, logs=[LogLine(LogLevel.INFO, message, 1.0)])
        event: Any = None
        while event is None or event["name"] != "job.progressed":
            event = (await asyncio.wait_for(anext(stream), 10)).data["jobEvents"]
        assert event["job"]["attempts"][-1]["logs"] == [{"message": message}]
    await stream.aclose()
