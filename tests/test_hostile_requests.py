"""What a hostile request costs a server in production settings, measured from outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
from pydantic import JsonValue

from job_registry import EnqueueRequest, JobRegistry, JobType, Payload
from job_registry_api.queue import migrations
from job_registry_api.queue.job_logs import LogLevel, LogLine
from job_registry_api.queue.models import JobError
from job_registry_api.queue.queue import JobQueue
from tests.measured_server import MeasuredServer, measured_server

# One process fills the servers with large jobs.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("hostile requests")]

CPU_SECONDS: Final = 0.5
"""What a request may cost on a machine that does nothing else."""

SILENCE_SECONDS: Final = 5.0
"""Five times what `/healthz` may take, because the tests share the machine."""

MEGABYTES: Final = 64
"""What a request may hold beside its own text."""

GRAPHQL: Final = "/graphql"
REST: Final = "/jobs"

ENQUEUE: Final = (
    "mutation($i: EnqueueJobInput!) { enqueueJob(input: $i) {"
    " __typename ... on PayloadInvalid { violations { path code message } } } }"
)
ENQUEUE_MANY: Final = (
    "mutation($i: [EnqueueJobInput!]!) { enqueueJobs(inputs: $i) {"
    " __typename ... on PayloadInvalid { violations { path code message } }"
    " ... on IdempotencyConflict { differingPaths } } }"
)
THUMBNAIL: Final = "thumbnail.create"


def graphql(query: str, **variables: object) -> bytes:
    return json.dumps({"query": query, "variables": variables}).encode()


def enqueue(payload: object) -> bytes:
    return graphql(ENQUEUE, i={"type": THUMBNAIL, "payload": payload})


def aliases(operation: str, field: str) -> str:
    """Return an operation with a field 30 times."""
    return f"{operation} {{ {' '.join(f'a{n}: {field}' for n in range(30))} }}"


def lease(names: int) -> bytes:
    query = (
        'mutation($t: [String!]!) { leaseJobs(input: {jobTypes: $t, workerId: "w"}) {'
        " __typename ... on InputInvalid { violations { path code message } } } }"
    )
    return graphql(query, t=[f"thumbnail.creat{number}" for number in range(names)])


HOSTILE: Final[dict[str, tuple[str, Callable[[], bytes]]]] = {
    "a name of 200,000 letters above 100,000 items": (
        GRAPHQL,
        lambda: enqueue({"x": "\0", "y" * 200_000: [0] * 100_000}),
    ),
    "a faulty item for every third byte": (GRAPHQL, lambda: enqueue({"sizes": [{}] * 80_000})),
    "20,000 unknown fields": (
        GRAPHQL,
        lambda: enqueue({f"assetIx{number}": 0 for number in range(20_000)}),
    ),
    "1,000 jobs with 150 faults each": (
        GRAPHQL,
        lambda: graphql(
            ENQUEUE_MANY,
            i=[{"type": THUMBNAIL, "payload": {f"a{n}": 0 for n in range(150)}}] * 1_000,
        ),
    ),
    "1,000 jobs of unknown types": (
        GRAPHQL,
        lambda: graphql(
            ENQUEUE_MANY, i=[{"type": f"thumbnail.{n}", "payload": 0} for n in range(1_000)]
        ),
    ),
    "190,000 jobs": (
        GRAPHQL,
        lambda: graphql(ENQUEUE_MANY, i=[{"type": "x", "payload": 1}] * 190_000),
    ),
    "30 fields that share a payload with 20,000 unknown fields": (
        GRAPHQL,
        lambda: graphql(
            aliases("mutation($i: EnqueueJobInput!)", "enqueueJob(input: $i) { __typename }"),
            i={"type": THUMBNAIL, "payload": {f"assetIx{n}": 0 for n in range(20_000)}},
        ),
    ),
    "30 fields that share a payload of 8 MB": (
        GRAPHQL,
        lambda: graphql(
            aliases("mutation($i: EnqueueJobInput!)", "enqueueJob(input: $i) { __typename }"),
            i={"type": THUMBNAIL, "payload": {"assetId": "x" * 8_000_000}},
        ),
    ),
    "30 dry runs that share a payload with 6,000 faults": (
        GRAPHQL,
        lambda: graphql(
            aliases(
                "query($i: EnqueueJobInput!)",
                "validateJob(input: $i)"
                " { ... on PayloadInvalid { violations { path code message } } }",
            ),
            i={"type": THUMBNAIL, "payload": {f"assetIx{n}": 0 for n in range(6_000)}},
        ),
    ),
    "one object 400 times in a list of the document": (
        GRAPHQL,
        lambda: graphql(
            "mutation($i: EnqueueJobInput!) { enqueueJobs(inputs: ["
            + "$i, " * 400
            + "]) { __typename } }",
            i={"type": THUMBNAIL, "payload": {f"assetIx{n}": 0 for n in range(10_000)}},
        ),
    ),
    "30 fields that share an input with 6,000 unknown fields": (
        GRAPHQL,
        lambda: graphql(
            aliases("mutation($i: EnqueueJobInput!)", "enqueueJob(input: $i) { __typename }"),
            i={"type": THUMBNAIL, "payload": {}} | {f"payloax{n}": 0 for n in range(6_000)},
        ),
    ),
    "100,000 sizes through the typed input": (
        GRAPHQL,
        lambda: graphql(
            "mutation($s: [Int!]!) { enqueue(job: {thumbnailCreate:"
            ' {assetId: "a", versionNumber: 1, sizes: $s}}) { __typename } }',
            s=[128] * 100_000,
        ),
    ),
    "100,000 names to lease": (GRAPHQL, lambda: lease(100_000)),
    "15,000 names to lease": (GRAPHQL, lambda: lease(15_000)),
    "100,000 statuses to filter by": (
        GRAPHQL,
        lambda: graphql(
            "query($s: [JobStatus!]) { jobs(filter: {statuses: $s}) { nodes { id } } }",
            s=["QUEUED"] * 100_000,
        ),
    ),
    "100,000 types to filter by": (
        GRAPHQL,
        lambda: graphql(
            "query($t: [String!]) { jobs(filter: {types: $t}) { nodes { id } } }",
            t=[f"thumbnail.creat{n}" for n in range(100_000)],
        ),
    ),
    "8 MB of spaces in a document": (GRAPHQL, lambda: graphql(" " * 8_000_000 + "{ a }")),
    "20 field names of 9,000 letters": (
        GRAPHQL,
        lambda: graphql("{" + " ".join("a" * 9_000 + str(n) for n in range(20)) + "}"),
    ),
    "8 MB of objects": (REST, lambda: b"[" + b"{}," * 2_700_000 + b"0]"),
    "8 MB of names": (
        REST,
        lambda: json.dumps({f"f{number}": 0 for number in range(500_000)}).encode(),
    ),
    "8 MB of short strings": (REST, lambda: b"[" + b'"",' * 2_700_000 + b"0]"),
    "8 MB of escapes": (REST, lambda: b'["' + b"\\n," * 2_700_000 + b'",0]'),
    "a payload of 6 MB with 1.5 million faults": (
        REST,
        lambda: json.dumps({"type": THUMBNAIL, "payload": {"sizes": [{}] * 1_500_000}}).encode(),
    ),
    "8 MB of brackets": (REST, lambda: b"[" * 8_000_000),
    "an integer of 8 million digits": (REST, lambda: b"1" * 8_000_000),
    "8 MB of text with one character outside the BMP": (
        REST,
        lambda: json.dumps(
            {"type": THUMBNAIL, "payload": {"assetId": "x" * 8_000_000 + "\U0001f600"}},
            ensure_ascii=False,
        ).encode(),
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MeasuredServer]:
    """A server with the default settings, on SQLite."""
    url = f"sqlite:///{tmp_path_factory.mktemp('hostile')}/jobs.db"
    await asyncio.to_thread(migrations.upgrade, url)
    async with measured_server(url) as measured:
        yield measured


JSON: Final = {"content-type": "application/json"}


async def measured(server: MeasuredServer, path: str, body: bytes) -> tuple[httpx.Response, str]:
    """Send a request. Return the response, and what exceeds the bounds."""
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=100) as client,
        server.measuring() as cost,
    ):
        response = await client.post(path, content=body, headers=JSON)
    exceeded = cost.within(
        cpu_seconds=CPU_SECONDS,
        peak_bytes=MEGABYTES * 2**20 + len(body),
        silence_seconds=SILENCE_SECONDS,
    )
    return response, exceeded


@pytest.mark.cases(13)
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_request_is_answered_within_the_bounds(
    server: MeasuredServer, name: str
) -> None:
    path, body = HOSTILE[name]
    response, exceeded = await measured(server, path, body())
    assert not exceeded
    assert response.status_code < 500
    assert len(response.content) < 3_000_000


async def test_a_bulk_lists_its_first_faults_and_counts_those_of_each_further_job(
    server: MeasuredServer,
) -> None:
    bulk = [{"type": THUMBNAIL, "payload": {f"a{n}": {} for n in range(200)}}] * 50
    response, _ = await measured(server, GRAPHQL, graphql(ENQUEUE_MANY, i=bulk))
    results: list[dict[str, Any]] = response.json()["data"]["enqueueJobs"]
    listed = [len(result["violations"]) for result in results]
    assert listed[0] == 101
    assert 900 <= sum(each for each in listed if each > 1) <= 1_100
    assert results[-1]["violations"] == [
        {
            "path": "",
            "code": "more",
            "message": "The payload has 202 faults. They are not listed, because the whole request"
            " has too many.",
        }
    ]


# Answers


class Anything(Payload):
    """Any JSON."""

    value: JsonValue


anything = JobType(name="test.anything", payload=Anything, example={"value": 1})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def full_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MeasuredServer]:
    """A server with 60 jobs of 250 KB each, in turn 28,000 objects and one text, below a small job.

    A page that has the small job may stop at a large one, which was read in vain.
    """
    url = f"sqlite:///{tmp_path_factory.mktemp('full')}/jobs.db"
    await asyncio.to_thread(migrations.upgrade, url)
    registry = JobRegistry([anything])
    values: list[JsonValue] = [[{"a": 0}] * 28_000, "x" * 250_000]
    async with JobQueue.from_url(url, registry, lease_seconds=30) as queue:
        for _ in range(3):
            jobs = [EnqueueRequest("test.anything", {"value": value}) for value in values * 10]
            await queue.enqueue_many(jobs)
        await queue.enqueue(EnqueueRequest("test.anything", {"value": 0}))
    async with measured_server(url, catalog=__name__) as measured:
        yield measured


LARGE_ANSWERS: Final = {
    "every payload": "{ jobs(first: 200) { nodes { id payload } pageInfo { stoppedEarly } } }",
    "every payload 28 times": "{ jobs(first: 200) { nodes { id "
    + " ".join(f"p{n}: payload" for n in range(28))
    + " } } }",
    "every payload in 28 fields": "{ "
    + " ".join(f"j{n}: jobs(first: 200) {{ nodes {{ payload }} }}" for n in range(28))
    + " }",
    "30 pages with every field": "query { "
    + " ".join(
        f"j{n}: jobs(first: 200) {{ nodes {{ ...f }} edges {{ node {{ ...f }} }} }}"
        for n in range(30)
    )
    + " } fragment f on Job { id type status priority attempt maxAttempts timeoutSeconds nextRunAt"
    " createdAt startedAt finishedAt createdBy workerId policy { type maxAttempts } attempts {"
    " attempt } }",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_ANSWERS)
async def test_a_large_answer_stays_within_the_bounds(
    full_server: MeasuredServer, name: str
) -> None:
    response, exceeded = await measured(full_server, GRAPHQL, graphql(LARGE_ANSWERS[name]))
    assert not exceeded
    assert len(response.content) < 10_000_000


@pytest.mark.slow
async def test_pages_of_many_small_jobs_stay_within_the_bounds(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    await asyncio.to_thread(migrations.upgrade, url)
    async with JobQueue.from_url(url, JobRegistry([anything]), lease_seconds=30) as queue:
        for _ in range(3):
            await queue.enqueue_many([EnqueueRequest("test.anything", {"value": 0})] * 1_000)
    fields = (
        "id type status priority attempt maxAttempts createdAt nextRunAt payload result progress"
        " error { code message } waitingReason { __typename } attempts { attempt outcome }"
    )
    pages = aliases("query", f"jobs(first: 200) {{ nodes {{ {fields} }} }}")
    # Of each job, what it selects must not be looked up anew.
    attempts = "".join(f"a{number}: attempts {{ attempt }} " for number in range(29))
    async with measured_server(url, catalog=__name__) as server:
        # The second time, the document has been compiled.
        for document in (pages, pages, f"{{ jobs(first: 200) {{ nodes {{ {attempts} }} }} }}"):
            response, exceeded = await measured(server, GRAPHQL, graphql(document))
            assert not exceeded
            if document == pages:
                (first, *_) = response.json()["errors"]
                assert first["extensions"]["setting"] == "JOBS_MAX_ANSWER_FIELDS"
                assert len(response.json()["data"]["a0"]["nodes"]) == 200
            else:
                assert len(response.json()["data"]["jobs"]["nodes"]) == 200


@pytest.mark.slow
async def test_log_lines_stay_within_the_bounds(tmp_path: Path) -> None:
    """Those of many jobs, of many attempts of a job, and those that a worker sends."""
    url = f"sqlite:///{tmp_path}/jobs.db"
    await asyncio.to_thread(migrations.upgrade, url)
    data: JsonValue = {str(number): number for number in range(20)}
    dense = [LogLine(LogLevel.INFO, "x", 0.0, data)] * 300
    short = [LogLine(LogLevel.INFO, "x", 0.0)] * 1_000
    async with JobQueue.from_url(url, JobRegistry([anything]), lease_seconds=300) as queue:
        request = EnqueueRequest("test.anything", {"value": 0}, max_attempts=200)
        await queue.enqueue_many([request] * 60)
        retried = (await queue.enqueue(request._replace(priority=100))).job
        for turn in range(100):
            (lease,) = await queue.lease(["test.anything"], "w")
            await queue.heartbeat(lease.token, logs=short if turn % 2 else dense)
            if turn < 75:
                await queue.fail(lease.token, JobError("bad", "It failed."), retry_after_seconds=0)
    lines = "logs(last: 1000) { loggedAt level message data }"
    some = "logs(last: 10) { level }"
    aliased = " ".join(f"l{number}: {lines}" for number in range(28))
    one = f'{{ job(id: "{retried.id}") {{ ... on Job {{ attempts {{ %s }} }} }} }}'
    documents = [
        f"{{ jobs(first: 200) {{ nodes {{ attempts {{ {lines} }} }} }} }}",
        f"{{ jobs(first: 200) {{ nodes {{ attempts {{ {some} }} }} }} }}",
        f"{{ jobs(first: 200) {{ nodes {{ attempts {{ {aliased} }} }} }} }}",
        one % lines,
        one % aliased,
    ]
    beat = 'mutation($l: [JobLogLineInput!]) { heartbeatJob(leaseToken: "%s", logs: $l) {' + (
        " __typename ... on InputInvalid { violations { path message } } } }"
    )
    wrong = [{"message": "", "seconds": -1, "data": [[]] * 5}] * 20_000
    async with measured_server(url, catalog=__name__) as server:
        # The second time, the document has been compiled.
        for document in [documents[0], *documents]:
            response, exceeded = await measured(server, GRAPHQL, graphql(document))
            assert not exceeded, document[:80]
            assert len(response.content) < 10_000_000
        for sent in (wrong, wrong[:1_000]):
            _, exceeded = await measured(server, GRAPHQL, graphql(beat % lease.token, l=sent))
            assert not exceeded
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=100) as client,
            server.measuring() as cost,
        ):
            answer = await client.get(f"/jobs/{retried.id}/logs")
        assert answer.json()["allLines"] is False
        assert not cost.within(
            cpu_seconds=CPU_SECONDS,
            peak_bytes=MEGABYTES * 2**20,
            silence_seconds=SILENCE_SECONDS,
        )


async def test_a_page_that_stops_early_says_so_and_its_cursor_goes_on(
    full_server: MeasuredServer,
) -> None:
    query = (
        "query($a: String) { jobs(first: 200, after: $a) { nodes { id payload }"
        " pageInfo { stoppedEarly hasNextPage endCursor } } }"
    )
    seen: list[str] = []
    after, pages = None, 0
    while True:
        response, _ = await measured(full_server, GRAPHQL, graphql(query, a=after))
        jobs = response.json()["data"]["jobs"]
        seen += [job["id"] for job in jobs["nodes"]]
        pages += 1
        assert jobs["pageInfo"]["stoppedEarly"] == jobs["pageInfo"]["hasNextPage"]
        if not jobs["pageInfo"]["hasNextPage"]:
            break
        after = jobs["pageInfo"]["endCursor"]
    assert len(seen) == len(set(seen)) == 61
    assert 3 < pages < 40


async def test_a_lease_of_large_jobs_stays_within_the_bounds(full_server: MeasuredServer) -> None:
    query = (
        'mutation { leaseJobs(input: {jobTypes: ["test.anything"], workerId: "w", limit: 100}) {'
        " ... on LeaseJobsSuccess { leases { job { id attempt } } } } }"
    )
    response, exceeded = await measured(full_server, GRAPHQL, graphql(query))
    assert not exceeded
    assert 2 <= len(response.json()["data"]["leaseJobs"]["leases"]) <= 6


# Existing jobs of a bulk


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MeasuredServer]:
    """A server with 200 jobs of 250 KB each, of 28,000 objects, with the keys k0 to k199.

    40 of them have failed, with as large details. A small one has failed 30 times with such.
    """
    url = f"sqlite:///{tmp_path_factory.mktemp('keyed')}/jobs.db"
    await asyncio.to_thread(migrations.upgrade, url)
    registry = JobRegistry([anything])
    async with JobQueue.from_url(url, registry, lease_seconds=30) as queue:
        for start in range(0, 200, 20):
            await queue.enqueue_many(
                [
                    EnqueueRequest(
                        "test.anything", {"value": [{"a": 0}] * 28_000}, idempotency_key=f"k{n}"
                    )
                    for n in range(start, start + 20)
                ]
            )
        for _ in range(40):
            (lease,) = await queue.lease(["test.anything"], "w")
            error = JobError("bad", "It failed.", [{"a": 0}] * 28_000)
            await queue.fail(lease.token, error, retryable=False)
        await queue.enqueue(
            EnqueueRequest(
                "test.anything",
                {"value": 0},
                priority=100,
                max_attempts=31,
                idempotency_key="retried",
            )
        )
        for _ in range(30):
            (lease,) = await queue.lease(["test.anything"], "w")
            await queue.fail(lease.token, error, retry_after_seconds=0)
    async with measured_server(url, catalog=__name__) as measured:
        yield measured


def other_payloads(selection: str, atomic: bool = False) -> bytes:
    """Return a bulk with other payloads for the existing keys, and one with a new key."""
    keys = [f"k{n}" for n in range(200)] + ["new"]
    jobs = [{"type": "test.anything", "payload": {"value": 0}, "idempotencyKey": k} for k in keys]
    query = (
        "mutation($i: [EnqueueJobInput!]!, $a: Boolean!) {"
        f" enqueueJobs(inputs: $i, atomic: $a) {{ {selection} }} }}"
    )
    return graphql(query, i=jobs, a=atomic)


@pytest.mark.slow
@pytest.mark.parametrize("atomic", [False, True])
async def test_a_bulk_whose_keys_have_large_jobs_stays_within_the_bounds(
    keyed_server: MeasuredServer, atomic: bool
) -> None:
    selection = "__typename ... on IdempotencyConflict { differingPaths existingJob { id } }"
    response, exceeded = await measured(keyed_server, GRAPHQL, other_payloads(selection, atomic))
    assert not exceeded
    results = response.json()["data"]["enqueueJobs"]
    assert {result["__typename"] for result in results[:200]} == {"IdempotencyConflict"}
    assert results[0]["differingPaths"] == ["/value"]
    assert results[199]["differingPaths"] == [""]
    assert results[200]["__typename"] == ("InputInvalid" if atomic else "EnqueueJobSuccess")


@pytest.mark.slow
async def test_a_bulk_whose_answer_would_have_too_large_jobs_is_refused_before_it_is_stored(
    keyed_server: MeasuredServer,
) -> None:
    selection = (
        "... on EnqueueJobSuccess { deduplicated }"
        " ... on IdempotencyConflict { existingJob { payload } }"
    )
    body = other_payloads(selection).replace(b'"new"', b'"newer"')
    response, exceeded = await measured(keyed_server, GRAPHQL, body)
    assert not exceeded
    assert response.json()["errors"][0]["extensions"]["code"] == "budget_exceeded"
    job = {"type": "test.anything", "payload": {"value": 0}, "idempotencyKey": "newer"}
    query = (
        "query($i: EnqueueJobInput!) {"
        " validateJob(input: $i) { ... on JobValid { duplicateOf { id } } } }"
    )
    response, _ = await measured(keyed_server, GRAPHQL, graphql(query, i=job))
    assert response.json()["data"]["validateJob"] == {"duplicateOf": None}


@pytest.mark.slow
async def test_a_page_of_jobs_with_large_errors_stays_within_the_bounds(
    keyed_server: MeasuredServer,
) -> None:
    query = (
        "{ jobs(first: 200, filter: {statuses: [FAILED]}) {"
        " nodes { error { code } } pageInfo { stoppedEarly } } }"
    )
    response, exceeded = await measured(keyed_server, GRAPHQL, graphql(query))
    assert not exceeded
    assert response.json()["data"]["jobs"]["nodes"][0] == {"error": {"code": "bad"}}


def thirty(operation: str, field: str, selection: str) -> str:
    """Return an operation with a field for each of the keys k50 to k79."""
    job = '{type: "test.anything", payload: {value: 0}, idempotencyKey: "k§"}'
    fields = (
        f"a{n}: {field} {{ {selection} }}".replace("JOB", job).replace("§", str(n + 50))
        for n in range(30)
    )
    return f"{operation} {{ {' '.join(fields)} }}"


CONFLICT: Final = "... on IdempotencyConflict { existingJob { id } }"
LEASES: Final = "... on LeaseJobsSuccess { leases { job { id } } }"
ONE_BY_ONE: Final = {
    "keys": thirty("mutation", "enqueueJob(input: JOB)", CONFLICT),
    "payloads": thirty(
        "mutation", "enqueueJob(input: JOB)", CONFLICT.replace("{ id }", "{ payload }")
    ),
    "dry runs": thirty("query", "validateJob(input: JOB)", CONFLICT),
    "leases": thirty(
        "mutation",
        'leaseJobs(input: {jobTypes: ["test.anything"], workerId: "w", limit: 4})',
        LEASES,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_BY_ONE)
async def test_fields_that_each_read_a_large_job_stay_within_the_bounds(
    keyed_server: MeasuredServer, name: str
) -> None:
    response, exceeded = await measured(keyed_server, GRAPHQL, graphql(ONE_BY_ONE[name]))
    assert not exceeded
    if name == "payloads":
        # The jobs that were read are large enough for an answer.
        assert response.json()["errors"][0]["extensions"]["code"] == "budget_exceeded"
    else:
        assert len(response.json()["data"]) == 30


@pytest.mark.slow
async def test_the_attempts_of_a_job_with_large_errors_stay_within_the_bounds(
    keyed_server: MeasuredServer,
) -> None:
    query = (
        'query { validateJob(input: {type: "test.anything", payload: {value: 0},'
        ' idempotencyKey: "retried"}) {'
        " ... on JobValid { duplicateOf { attempts { error { code } } } } } }"
    )
    response, exceeded = await measured(keyed_server, GRAPHQL, graphql(query))
    assert not exceeded
    assert response.json()["errors"][0]["extensions"]["code"] == "budget_exceeded"


@pytest.mark.slow
async def test_documents_do_not_fill_the_memory(server: MeasuredServer) -> None:
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=100) as client,
        server.measuring() as cost,
    ):
        for number in range(120):
            names = " ".join(f"f{number}x{n}" for n in range(400))
            query = f"query($a: [String!] = [{names}]) {{ __typename }}"
            await client.post(GRAPHQL, content=graphql(query), headers=JSON)
    assert not cost.within(cpu_seconds=60, peak_bytes=MEGABYTES * 2**20, silence_seconds=10)
