"""Random operations of our own schema, on a queue with jobs, compiled and by graphql-core."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from graphql import GraphQLSchema, OperationType

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.auth import ANYONE, Caller
from job_registry_api.graphql.admission import Admission
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.document_limits import Limits
from job_registry_api.graphql.execution import DocumentRefused, Executor
from job_registry_api.graphql.request_errors import format_result
from job_registry_api.queue.models import JobError
from job_registry_api.queue.queue import JobQueue
from tests.graphql.random_operations import RandomOperation
from tests.verified import Verified

PAYOUT = {"batchId": "b-1", "escrowId": "e-1"}
CALLERS = [
    ANYONE,
    Caller("ada", frozenset({"jobs:own"})),
    Caller("ada", frozenset({"jobs:own", "jobs:read"}), frozenset({"payout.execute"})),
    Caller("worker", frozenset({"jobs:work"})),
]


@asynccontextmanager
async def queue_with_jobs(
    template: Path, folder: Path, registry: JobRegistry
) -> AsyncIterator[Any]:
    """A queue on SQLite, and the values that arguments may have."""
    shutil.copy(template, folder / "jobs.db")
    async with JobQueue.from_url(f"sqlite:///{folder / 'jobs.db'}", registry) as queue:
        jobs = []
        for number in range(8):
            kind, payload = (
                ("test.ping", {"text": "x"}) if number % 2 else ("payout.execute", PAYOUT)
            )
            key = f"key-{number}" if number < 4 else None
            request = EnqueueRequest(type=kind, payload=payload, idempotency_key=key)
            jobs.append((await queue.enqueue(request, created_by="ada")).job)
        leases = await queue.lease(["test.ping", "payout.execute"], "worker", limit=3)
        await queue.complete(leases[0].token, {"done": [1, None]})
        await queue.fail(leases[1].token, JobError("broken", "It broke.", {"a": 1}))
        yield queue, values_of([str(job.id) for job in jobs], leases[2].token)


def values_of(ids: list[str], token: str) -> dict[str, list[Any]]:
    types = ["test.ping", "test.ping", "payout.execute", "thumbnail.create", "none"]
    return {
        "Int": [0, 1, 5],
        "Float": [0.5, 3],
        "String": ["", "text", "a-1"],
        "ID": [*ids, "unknown"],
        "Boolean": [True, False],
        "JSON": [PAYOUT, {"text": "x"}, {}, [1, "a", None], "text", 7],
        "DateTime": ["2030-01-31T12:00:00Z", "2001-01-01T00:00:00+02:00", "yesterday"],
        "type": types,
        "types": types,
        "jobType": types,
        "jobTypes": types,
        "leaseToken": [token, "unknown"],
        "timeoutSeconds": [0],
        "waitSeconds": [0],
        "idempotencyKey": ["key-1", "key-2", "key-9", ""],
        "createdBy": ["ada", "worker"],
        "after": ["unknown"],
        "first": [1, 3, 50],
        "workerId": ["worker"],
        "search": ["key-1", "broke"],
    }


async def execute_random(
    schema: GraphQLSchema, executor: Executor, queue: JobQueue, values: Any, seed: int
) -> bool:
    """Execute one random operation; return whether it was executed at all."""
    random = Random(seed)
    root = schema.get_root_type(random.choice([OperationType.QUERY, OperationType.MUTATION]))
    assert root is not None
    operation = RandomOperation(schema, root, random, values, always=frozenset({"timeoutSeconds"}))
    caller = random.choice(CALLERS)
    try:
        prepared = executor.prepare({"query": operation.text}, caller)
    except DocumentRefused:
        return False
    await executor.execute(prepared, operation.variables, Context(queue, caller))
    return True


@pytest.fixture
def run(sqlite_template: Path, tmp_path: Path, registry: JobRegistry, verified: Verified) -> Any:
    """Executes so many random operations, and returns how many were compiled to the end."""

    async def random_operations(count: int) -> int:
        admission = Admission(registry)
        schema = admission.view_of(ANYONE).schema
        executor = Executor(admission, Limits())
        async with queue_with_jobs(sqlite_template, tmp_path, registry) as (queue, values):
            done = seed = 0
            while done < count:
                done += await execute_random(schema, executor, queue, values, seed)
                seed += 1
        return verified.compiled

    return lambda count: asyncio.run(random_operations(count))


def test_random_operations_are_answered_as_by_graphql_core(run: Any) -> None:
    assert run(60) > 10


@pytest.mark.slow
def test_many_random_operations_are_answered_as_by_graphql_core(run: Any) -> None:
    assert run(2_000) > 800


@pytest.mark.parametrize(
    ("document", "caller", "data", "codes"),
    [
        (
            'query ($t: Int = 0) { a: jobType(jobType: "none") { __typename }'
            ' b: awaitJob(id: "x", timeoutSeconds: $t) { __typename } }',
            ANYONE,
            {"a": {"__typename": "JobTypeNotFound"}, "b": None},
            {("b",): "bad_user_input"},
        ),
        (
            'mutation { a: enqueueJob(input: {type: "test.ping", payload: {}}) {'
            " ... on EnqueueJobSuccess { job { attempts { attempt } progress } } } }",
            Caller("bob", frozenset({"jobs:enqueue"})),
            {"a": {"job": {"attempts": None, "progress": None}}},
            {("a", "job", "attempts"): "forbidden", ("a", "job", "progress"): "forbidden"},
        ),
    ],
)
async def test_a_resolver_that_has_not_begun_when_the_next_one_fails_is_called_once(
    document: str,
    caller: Caller,
    data: Any,
    codes: Any,
    sqlite_template: Path,
    tmp_path: Path,
    registry: JobRegistry,
) -> None:
    async with queue_with_jobs(sqlite_template, tmp_path, registry) as (queue, _):
        executor = Executor(Admission(registry), Limits())
        prepared = executor.prepare({"query": document}, caller)
        result = await executor.execute(prepared, {"t": None}, Context(queue, caller))
    assert result.data == data
    errors = format_result(result)["errors"]
    assert {tuple(each["path"]): each["extensions"]["code"] for each in errors} == codes
