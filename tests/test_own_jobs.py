"""What a token with the scope `jobs:own` reaches, at every door: its bearer's jobs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import jwt
import pytest

from job_registry import EnqueueRequest
from job_registry_api import Caller, JobFilter, JobQueue, graphql_types
from job_registry_api.queue import filters
from job_registry_api.queue.errors import JobNotFound
from job_registry_api.queue.models import JobError, JobStatus, Owner
from tests.embedding.test_merged_graphql import HostContext, caller_of, host_schema, run
from tests.http_client import Visit

SECRET = "a secret of more than thirty-two bytes"
AUTH = {"auth_hs256_secret": SECRET, "auth_issuer": "https://i.example", "auth_audience": "jobs"}
PING = {"type": "test.ping", "payload": {"text": "mine"}}
NOWHERE = "01a20b59-007a-7000-8000-000000000000"


def bearer(subject: str, *scopes: str) -> dict[str, str]:
    claims = {
        "iss": "https://i.example",
        "aud": "jobs",
        "sub": subject,
        # Longer than a slow run of all tests takes: the headers below are made at its start.
        "exp": int(time.time()) + 86_400,
        "scope": " ".join(scopes or ("jobs:own",)),
    }
    return {"authorization": f"Bearer {jwt.encode(claims, SECRET, 'HS256')}"}


ADA, BOB = bearer("ada"), bearer("bob")


async def ask(
    client: httpx.AsyncClient, headers: dict[str, str], document: str, **variables: Any
) -> Any:
    content = {"query": document, "variables": variables}
    answer = (await client.post("/graphql", json=content, headers=headers)).json()
    assert "errors" not in answer, answer
    return answer["data"]


async def enqueue(client: httpx.AsyncClient, headers: dict[str, str], **fields: Any) -> str:
    response = await client.post("/jobs", json=PING | fields, headers=headers)
    assert response.status_code == 201, response.text
    job_id: str = response.json()["jobId"]
    return job_id


@pytest.fixture
async def client(visit: Visit) -> AsyncIterator[httpx.AsyncClient]:
    async with visit(**AUTH) as client:
        yield client


JOB = """query ($id: ID!) {
  job(id: $id) { __typename ... on Job { createdBy result progress workerId error { code }
    attempts { attempt } payload } ... on JobNotFound { code message jobId } }
  awaitJob(id: $id, timeoutSeconds: 0) { __typename ... on Job { id } ... on Error { code } } }"""
CHANGE = """mutation ($id: ID!) { %s(id: $id) { __typename
  ... on JobChanged { job { status } } ... on Error { code } ... on JobNotFound { message } } }"""


async def test_one_reads_cancels_and_retries_ones_own_job(client: httpx.AsyncClient) -> None:
    job_id = await enqueue(client, ADA)
    data = await ask(client, ADA, JOB, id=job_id)
    assert data["job"] == {
        "__typename": "Job",
        "createdBy": "ada",
        "result": None,
        "progress": None,
        "workerId": None,
        "error": None,
        "attempts": [],
        "payload": PING["payload"],
    }
    assert data["awaitJob"] == {"__typename": "Job", "id": job_id}
    assert (await client.get(f"/jobs/{job_id}", headers=ADA)).json()["createdBy"] == "ada"
    for change, status in (("cancelJob", "CANCELLED"), ("retryJob", "QUEUED")):
        answer = (await ask(client, ADA, CHANGE % change, id=job_id))[change]
        assert answer == {"__typename": "JobChanged", "job": {"status": status}}


async def test_the_job_of_another_is_answered_like_one_that_does_not_exist(
    client: httpx.AsyncClient,
) -> None:
    theirs = await enqueue(client, ADA)
    for scopes in (("jobs:own",), ("jobs:own", "jobs:enqueue")):
        bob = bearer("bob", *scopes)
        for document in (JOB, CHANGE % "cancelJob", CHANGE % "retryJob"):
            answers = [await ask(client, bob, document, id=each) for each in (theirs, NOWHERE)]
            assert str(answers[0]).replace(theirs, "") == str(answers[1]).replace(NOWHERE, "")
            assert "job_not_found" in str(answers[0])
        rest = [await client.get(f"/jobs/{each}", headers=bob) for each in (theirs, NOWHERE)]
        assert [each.status_code for each in rest] == [404, 404]
    # One who may read all jobs may still change none but his own.
    reader = bearer("bob", "jobs:own", "jobs:read")
    assert (await ask(client, reader, JOB, id=theirs))["job"]["createdBy"] == "ada"
    answer = await ask(client, reader, CHANGE % "cancelJob", id=theirs)
    assert answer["cancelJob"]["code"] == "job_not_found"
    assert (await ask(client, ADA, JOB, id=theirs))["job"]["__typename"] == "Job"


async def test_lists_have_only_ones_own_jobs_whatever_the_filter(client: httpx.AsyncClient) -> None:
    theirs = [await enqueue(client, ADA, idempotencyKey=f"k{n}") for n in range(3)]
    own = [await enqueue(client, BOB) for _ in range(3)]
    document = """query ($filter: JobFilter, $after: String) {
      jobs(filter: $filter, first: 2, after: $after) {
        nodes { id } pageInfo { endCursor hasNextPage } } }"""
    first = (await ask(client, BOB, document))["jobs"]
    rest = (await ask(client, BOB, document, after=first["pageInfo"]["endCursor"]))["jobs"]
    assert [each["id"] for each in first["nodes"] + rest["nodes"]] == own[::-1]
    assert rest["pageInfo"]["hasNextPage"] is False
    for wanted in (
        {"createdBy": "ada"},
        {"search": theirs[0]},
        {"search": "k0"},
        {"idempotencyKey": "k0"},
        {"createdBy": "ada", "types": ["test.ping"], "statuses": ["QUEUED"]},
    ):
        found = (await ask(client, BOB, document, filter=wanted))["jobs"]
        assert found == {"nodes": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}, wanted
    simple: list[dict[str, Any]] = [
        {},
        {"types": ["test.ping", "test.pong"]},
        {"statuses": ["QUEUED", "RUNNING"]},
    ]
    for each_filter in simple:
        found = (await ask(client, BOB, document, filter=each_filter))["jobs"]
        assert [each["id"] for each in found["nodes"]] == own[:0:-1], each_filter


async def test_rest_lists_and_changes_only_ones_own_jobs(client: httpx.AsyncClient) -> None:
    theirs, own = await enqueue(client, ADA), await enqueue(client, BOB)
    listed = (await client.get("/jobs", headers=BOB)).json()["jobs"]
    assert [each["jobId"] for each in listed] == [own]
    for change in ("cancel", "retry"):
        refused = await client.post(f"/jobs/{theirs}/{change}", json={}, headers=BOB)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "job_not_found")
        assert (await client.post(f"/jobs/{own}/{change}", json={}, headers=BOB)).status_code == 200
    assert (await client.get(f"/jobs/{theirs}", headers=ADA)).json()["status"] == "queued"
    keyed = PING | {"idempotencyKey": "k"}
    await enqueue(client, ADA, idempotencyKey="k")
    bulk = {"jobs": [PING, keyed], "atomic": True}
    answer = (await client.post("/jobs/bulk", json=bulk, headers=BOB)).json()
    assert [each["status"] for each in answer["results"]] == [422, 409]
    assert len((await client.get("/jobs", headers=BOB)).json()["jobs"]) == 1


async def test_the_numbers_of_everybodys_jobs_are_not_told(client: httpx.AsyncClient) -> None:
    await enqueue(client, ADA)
    content = {"query": "{ jobTypes { name counts { queued } versions { queued } } }"}
    answer = (await client.post("/graphql", json=content, headers=BOB)).json()
    for each in answer["data"]["jobTypes"]:
        assert (each["counts"], each["versions"]) == (None, None)
    assert {each["extensions"]["code"] for each in answer["errors"]} == {"forbidden"}
    assert (await client.get("/metrics", headers=BOB)).status_code == 403


KEYED = """mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) { __typename
  ... on EnqueueJobSuccess { deduplicated job { id } }
  ... on InputInvalid { violations { path code } }
  ... on IdempotencyConflict { existingJob { id } } } }"""
BULK = """mutation ($inputs: [EnqueueJobInput!]!, $atomic: Boolean!) {
  enqueueJobs(inputs: $inputs, atomic: $atomic) { __typename
    ... on EnqueueJobSuccess { job { id } } ... on InputInvalid { violations { path code } } } }"""
TYPED = """mutation ($key: String!, $text: String!) {
  enqueue(job: {testPing: {text: $text}}, options: {idempotencyKey: $key}) { __typename
    ... on EnqueueJobSuccess { job { id } } ... on InputInvalid { violations { path code } } } }"""
DRY = """query ($input: EnqueueJobInput!) { validateJob(input: $input) { __typename
  ... on JobValid { duplicateOf { id } } ... on InputInvalid { violations { path code } } } }"""
TAKEN = {
    "__typename": "InputInvalid",
    "violations": [{"path": "/idempotencyKey", "code": "idempotency_conflict"}],
}


async def test_a_key_of_another_tells_nothing_but_that_it_is_taken(
    client: httpx.AsyncClient,
) -> None:
    await enqueue(client, ADA, idempotencyKey="k")
    for text in ("mine", "yours"):
        sent = PING | {"payload": {"text": text}, "idempotencyKey": "k"}
        assert await ask(client, BOB, KEYED, input=sent) == {"enqueueJob": TAKEN}
        assert await ask(client, BOB, DRY, input=sent) == {"validateJob": TAKEN}
        assert await ask(client, BOB, TYPED, key="k", text=text) == {"enqueue": TAKEN}
        rest = await client.post("/jobs", json=sent, headers=BOB)
        assert (rest.status_code, rest.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert rest.json()["error"]["details"] == []
        bulk = await ask(client, BOB, BULK, inputs=[PING, sent], atomic=False)
        assert [each["__typename"] for each in bulk["enqueueJobs"]] == [
            "EnqueueJobSuccess",
            "InputInvalid",
        ]
        # Atomic: nothing is stored, because one job is refused.
        whole = await ask(client, BOB, BULK, inputs=[PING, sent], atomic=True)
        assert whole["enqueueJobs"][0]["violations"][0]["code"] == "not_stored"
        assert whole["enqueueJobs"][1] == TAKEN
    document = "{ jobs { nodes { id } } }"
    assert len((await ask(client, BOB, document))["jobs"]["nodes"]) == 2
    # One's own key still returns one's own job.
    again = await ask(client, ADA, KEYED, input=PING | {"idempotencyKey": "k"})
    assert again["enqueueJob"]["deduplicated"] is True


async def test_a_subscriber_gets_the_events_of_its_own_jobs_only(client: httpx.AsyncClient) -> None:
    queue: JobQueue = cast(Any, client).application.state.queue
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    bob = HostContext("bob", frozenset({"jobs:own"}))
    document = "subscription { jobEvents { name jobId job { createdBy } } }"
    stream: Any = await schema.subscribe(document, context_value=bob)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.3)
    theirs = await enqueue(client, ADA)
    await ask(client, ADA, CHANGE % "cancelJob", id=theirs)
    own = await enqueue(client, BOB)
    await ask(client, BOB, CHANGE % "cancelJob", id=own)
    events = [await asyncio.wait_for(first, 10), await asyncio.wait_for(anext(stream), 10)]
    await stream.aclose()
    assert [each.data["jobEvents"] for each in events] == [
        {"name": name, "jobId": own, "job": {"createdBy": "bob"}}
        for name in ("job.created", "job.cancelled")
    ]


async def test_the_events_of_anothers_job_are_not_found(client: httpx.AsyncClient) -> None:
    theirs = await enqueue(client, ADA)
    answers = []
    for job_id in (theirs, NOWHERE):
        document = 'subscription { jobEvents(jobId: "%s") { name } }' % job_id  # noqa: UP031
        headers = BOB | {"accept": "text/event-stream"}
        response = await client.post("/graphql", json={"query": document}, headers=headers)
        answers.append(response.text.replace(job_id, ""))
    assert "job_not_found" in answers[0]
    assert answers[0] == answers[1]


async def test_a_hosts_caller_without_a_subject_owns_no_jobs(queue: JobQueue) -> None:
    await queue.enqueue(EnqueueRequest("test.ping", {}))
    schema = host_schema(graphql_types(queue, authenticate=lambda _: Caller(None, OWN)))
    (job,) = (await queue.list()).jobs
    assert job.created_by is None
    data, errors = await run(schema, "{ jobs { nodes { id } } }")
    assert (data, errors) == ({"jobs": {"nodes": []}}, [])
    for document in (
        "query ($id: ID!) { it: job(id: $id) { ... on Error { code } } }",
        "query ($id: ID!) { it: awaitJob(id: $id) { ... on Error { code } } }",
        "mutation ($id: ID!) { it: cancelJob(id: $id) { ... on Error { code } } }",
    ):
        data, errors = await run(schema, document, id=str(job.id))
        assert (data["it"], errors) == ({"code": "job_not_found"}, []), document
    # And a job that it enqueues with a key is nobody's.
    sent = {"type": "test.ping", "payload": {}, "idempotencyKey": "k"}
    for answered in ("EnqueueJobSuccess", "InputInvalid"):
        data, _ = await run(schema, KEYED, input=sent)
        assert data["enqueueJob"]["__typename"] == answered


@pytest.mark.parametrize("is_wide", [False, True])
async def test_no_filter_lists_the_jobs_of_others_to_a_caller_without_a_subject(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, is_wide: bool
) -> None:
    if is_wide:
        monkeypatch.setattr(filters, "WIDE_RANGE", 0)
    await queue.enqueue(EnqueueRequest("test.ping", {}, idempotency_key="k"), created_by="ada")
    (lease,) = await queue.lease(["test.ping"], "w")
    job = await queue.fail(lease.token, JobError("broken", "It broke."), retryable=False)
    for wanted in (
        JobFilter(error_code="broken"),
        JobFilter(finished_after=job.finished_at),
        JobFilter(created_after=job.created_at),
        JobFilter(created_by="ada"),
        JobFilter(idempotency_key="k"),
        JobFilter(search="broke"),
        JobFilter(search=str(job.id)),
        JobFilter(types=("test.ping",), statuses=(JobStatus.FAILED,)),
    ):
        assert [each.id for each in (await queue.list(wanted)).jobs] == [job.id], wanted
        assert (await queue.list(wanted, owner=Owner(None))).jobs == [], wanted


OWN = frozenset({"jobs:own"})


async def test_the_statement_itself_leaves_the_jobs_of_others_alone(queue: JobQueue) -> None:
    """Below all doors: reading and changing happen in one statement with the owner in it."""
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}), created_by="ada")).job
    for owner in (Owner("bob"), Owner(None), Owner("")):
        assert await queue._store.cancel(job.id, owner) is None
        assert await queue._store.retry(job.id, owner) is None
        for change in (queue.cancel, queue.retry, queue.get):
            with pytest.raises(JobNotFound):
                await change(job.id, owner=owner)
        with pytest.raises(JobNotFound):
            await queue.wait(job.id, seconds=0, owner=owner)
        assert (await queue.list(owner=owner)).jobs == []
    assert (await queue.get(job.id)).status is JobStatus.QUEUED
    assert (await queue.cancel(job.id, owner=Owner("ada"))).status is JobStatus.CANCELLED
    assert (await queue.retry(job.id, owner=Owner("ada"))).status is JobStatus.QUEUED
    with pytest.raises(JobNotFound):
        await queue.get(uuid.UUID(NOWHERE), owner=Owner("ada"))
