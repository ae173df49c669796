"""The GraphQL types in the Strawberry schema of a host, whose context and types are its own."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pytest
import strawberry
from strawberry.schema.config import StrawberryConfig
from strawberry.tools import merge_types

from job_registry import EnqueueRequest, JobRegistry, JobType, Payload
from job_registry.discovery import load_registry
from job_registry_api import Caller, GraphQLTypes, JobQueue, RequestLimits, graphql_types
from job_registry_api.graphql import context as graphql_context
from job_registry_api.graphql.schema import SDL_FILE, sdl
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.store import Store

ALL = frozenset({"jobs:enqueue", "jobs:read", "jobs:work", "jobs:admin"})
PAYOUT = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
ENQUEUE = """mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) { __typename
  ... on EnqueueJobSuccess { job { id type createdBy payload result status } }
  ... on PayloadInvalid { violations { path code } }
  ... on Error { code message } } }"""


@strawberry.type
class HostQuery:
    @strawberry.field
    def now(self) -> datetime:
        return datetime(2030, 1, 31, 12, tzinfo=UTC)

    @strawberry.field
    def later(self, than: datetime) -> bool:
        return isinstance(than, datetime)


@strawberry.type
class HostMutation:
    @strawberry.mutation
    def rename(self, name: str) -> str:
        return name.upper()


def host_schema(jobs: GraphQLTypes, query: type = HostQuery, **options: Any) -> strawberry.Schema:
    return strawberry.Schema(
        query=merge_types("Query", (query, jobs.query)),
        mutation=merge_types("Mutation", (HostMutation, jobs.mutation)),
        subscription=jobs.subscription,
        extensions=[*jobs.extensions],
        exception_handlers=[*jobs.exception_handlers],
        config=StrawberryConfig(scalar_map=jobs.scalars, name_converter=jobs.name_converter),
        **options,
    )


@dataclass(frozen=True)
class HostContext:
    """A host's own context: frozen, so that nothing can be put into it."""

    user: str | None = None
    scopes: frozenset[str] = ALL
    job_types: frozenset[str] | None = None
    expires_at: float | None = None


def caller_of(context: HostContext) -> Caller | None:
    if context.user is None:
        return None
    return Caller(context.user, context.scopes, context.job_types, context.expires_at)


ADA = HostContext("ada")


async def run(
    schema: strawberry.Schema, document: str, context: object = ADA, **variables: object
) -> tuple[Any, list[Mapping[str, Any]]]:
    """The data and the errors of an operation."""
    result = await schema.execute(document, variables, context_value=context)
    return result.data, [dict(error.formatted) for error in result.errors or ()]


async def test_both_schemas_are_served_in_one_operation(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    data, errors = await run(
        schema,
        """query ($than: DateTime!) { now later(than: $than)
          jobTypes { name } jobPolicy(jobType: "payout.execute") { ... on JobPolicy { type } } }""",
        than="2031-01-01T00:00:00Z",
    )
    assert errors == []
    assert data["now"] == "2030-01-31T12:00:00+00:00"
    assert data["later"] is True
    assert "payout.execute" in [each["name"] for each in data["jobTypes"]]
    assert data["jobPolicy"] == {"type": "payout.execute"}


async def test_a_job_is_stored_for_the_hosts_user_and_faults_are_data(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    data, errors = await run(schema, ENQUEUE, input=PAYOUT)
    assert errors == []
    job = data["enqueueJob"]["job"]
    assert (job["createdBy"], job["payload"]) == ("ada", PAYOUT["payload"])
    assert (await queue.get(job["id"])).created_by == "ada"
    data, errors = await run(schema, ENQUEUE, input={"type": "payout.execute", "payload": {}})
    assert errors == []
    assert [each["path"] for each in data["enqueueJob"]["violations"]] == ["/batchId", "/escrowId"]
    data, errors = await run(schema, ENQUEUE, input={"type": "payout.exec", "payload": {}})
    assert data["enqueueJob"]["code"] == "job_type_not_found"


async def test_the_typed_door_is_there(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    document = """mutation ($job: TypedJobInput!, $options: EnqueueOptions) {
      enqueue(job: $job, options: $options) { ... on EnqueueJobSuccess { job { type nextRunAt } }
        ... on Error { message } } }"""
    data, errors = await run(
        schema,
        document,
        job={"payoutExecute": PAYOUT["payload"]},
        options={"scheduleAt": "2040-01-31T13:00:00+01:00"},
    )
    assert errors == []
    assert data["enqueue"]["job"]["type"] == "payout.execute"
    assert datetime.fromisoformat(data["enqueue"]["job"]["nextRunAt"]) == datetime(
        2040, 1, 31, 12, tzinfo=UTC
    )


async def test_without_a_function_or_a_caller_nobody_has_access(queue: JobQueue) -> None:
    document = '{ now job(id: "1") { __typename } jobTypes { name } }'
    for jobs, context in (
        (graphql_types(queue), ADA),
        (graphql_types(queue, authenticate=caller_of), HostContext(None)),
    ):
        data, errors = await run(host_schema(jobs), "{ now }", context)
        assert (data["now"] is not None, errors) == (True, [])
        data, errors = await run(host_schema(jobs), document, context)
        assert data == {"now": "2030-01-31T12:00:00+00:00", "job": None, "jobTypes": None}
        assert {error["extensions"]["code"] for error in errors} == {"unauthenticated"}


async def test_the_scopes_and_job_types_of_the_hosts_caller_are_enforced(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    enqueuer = HostContext("bob", frozenset({"jobs:enqueue"}), frozenset({"payout.execute"}))
    data, errors = await run(schema, ENQUEUE.replace("result ", ""), enqueuer, input=PAYOUT)
    assert errors == []
    job_id = data["enqueueJob"]["job"]["id"]
    for document, context in (
        ("{ jobTypes { name } }", enqueuer),
        ("mutation ($id: ID!) { cancelJob(id: $id) { __typename } }", enqueuer),
        ("query ($id: ID!) { job(id: $id) { __typename } }", enqueuer),
        ('{ jobs(filter: {types: ["test.ping"]}) { nodes { id } } }', reader("payout.execute")),
    ):
        data, errors = await run(schema, document, context, id=job_id)
        assert list(data.values()) == [None], document
        assert [error["extensions"]["code"] for error in errors] == ["forbidden"], document
    # A field of the job that needs more than the mutation does.
    data, errors = await run(schema, ENQUEUE, enqueuer, input=PAYOUT)
    assert data["enqueueJob"]["job"]["result"] is None
    assert [error["path"][-1] for error in errors] == ["result"]
    other = {"type": "test.ping", "payload": {}}
    data, errors = await run(schema, ENQUEUE, enqueuer, input=other)
    assert [error["extensions"]["code"] for error in errors] == ["forbidden"]
    data, errors = await run(schema, "{ jobTypes { name } }", reader("payout.execute"))
    assert data == {"jobTypes": [{"name": "payout.execute"}]}
    data, errors = await run(
        schema, "query ($id: ID!) { job(id: $id) { ... on Error { code } } }", reader(), id=job_id
    )
    assert data == {"job": {"code": "job_not_found"}}


def reader(*job_types: str) -> HostContext:
    return HostContext("eve", frozenset({"jobs:read"}), frozenset(job_types))


async def test_a_refused_field_does_not_hide_what_another_has_stored(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    enqueuer = HostContext("bob", frozenset({"jobs:enqueue"}))
    document = """mutation ($input: EnqueueJobInput!) {
      stored: enqueueJob(input: $input) {
        ... on EnqueueJobSuccess { job { id attempts { attempt } } } }
      cancelJob(id: "1") { __typename }
      rename(name: "a") }"""
    data, errors = await run(schema, document, enqueuer, input=PAYOUT)
    (job,) = (await queue.list()).jobs
    assert data == {
        "stored": {"job": {"id": str(job.id), "attempts": None}},
        "cancelJob": None,
        "rename": "A",
    }
    paths = sorted(error["path"] for error in errors)
    assert paths == [["cancelJob"], ["stored", "job", "attempts"]]


async def test_any_context_of_the_host_will_do_and_its_function_may_be_async(
    queue: JobQueue,
) -> None:
    calls: list[object] = []

    async def authenticate(context: object) -> Caller:
        calls.append(context)
        await asyncio.sleep(0.01)
        return Caller("ada", ALL)

    schema = host_schema(graphql_types(queue, authenticate=authenticate))
    document = "{ a: jobTypes { name counts { queued } } b: jobTypes { name } now }"
    for context in ({"request": 1}, None, ADA, (1, 2)):
        data, errors = await run(schema, document, context)
        assert errors == []
        assert len(data["a"]) == len(data["b"])
    assert calls == [{"request": 1}, None, ADA, (1, 2)]
    await run(schema, "{ now }")
    assert len(calls) == 4


async def test_operations_that_run_at_once_have_their_own_callers(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    answers = await asyncio.gather(
        *(run(schema, ENQUEUE, HostContext(f"user-{n}"), input=PAYOUT) for n in range(20))
    )
    stored = [data["enqueueJob"]["job"]["createdBy"] for data, _ in answers]
    assert stored == [f"user-{n}" for n in range(20)]


async def test_the_budget_and_the_limits_of_arguments_hold_for_the_whole_operation(
    queue: JobQueue,
) -> None:
    limits = RequestLimits(bulk_size=3, answer_fields=100)
    schema = host_schema(graphql_types(queue, authenticate=caller_of, limits=limits))
    document = """mutation ($inputs: [EnqueueJobInput!]!) {
      enqueueJobs(inputs: $inputs) { ... on EnqueueJobSuccess { job { id } } } }"""
    data, errors = await run(schema, document, inputs=[PAYOUT] * 4)
    assert data is None
    assert errors[0]["extensions"]["code"] == "budget_exceeded"
    assert "4 jobs" in errors[0]["message"]
    assert not (await queue.list()).jobs
    types = "{ " + " ".join(f"t{n}: jobTypes {{ name description }}" for n in range(20)) + " }"
    _, errors = await run(schema, types)
    assert "budget_exceeded" in {error["extensions"]["code"] for error in errors}


async def events_of(
    schema: strawberry.Schema, document: str, context: object = ADA
) -> AsyncGenerator[Any]:
    stream = await schema.subscribe(document, context_value=context)
    async with aclosing(stream) as results:
        while True:
            # `wait_for` requests each event in a task of its own.
            try:
                yield await asyncio.wait_for(anext(results), 10)
            except StopAsyncIteration:
                return


async def test_subscriptions_get_events_whose_fields_resolve(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    document = "subscription { jobEvents { name job { id createdBy attempts { attempt } } } }"

    async def first_two() -> list[Any]:
        found = []
        async with aclosing(events_of(schema, document)) as events:
            async for result in events:
                assert result.errors is None
                found.append(result.data["jobEvents"])
                if len(found) == 2:
                    break
        return found

    waiting = asyncio.create_task(first_two())
    while queue.events.subscribers == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for _ in range(2):
        await run(schema, ENQUEUE, input=PAYOUT)
    found = await waiting
    assert [each["name"] for each in found] == ["job.created", "job.created"]
    assert {each["job"]["createdBy"] for each in found} == {"ada"}
    assert found[0]["job"]["attempts"] == []


async def test_a_subscription_reads_the_jobs_of_a_burst_together_and_not_long_before_they_are_sent(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphql_context, "JOBS_SECONDS", 0.2)
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    statements = 0
    for name in ("get", "list_many"):
        read = getattr(Store, name)

        async def counted(*arguments: Any, read: Any = read) -> Any:
            nonlocal statements
            statements += 1
            return await read(*arguments)

        monkeypatch.setattr(Store, name, counted)
    document = "subscription { jobEvents { job { id status } } }"
    async with aclosing(events_of(schema, document)) as events:
        first = asyncio.ensure_future(anext(events))
        while queue.events.subscribers == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        payload = {"batchId": "b-1", "escrowId": "e-1"}
        stored = await queue.enqueue_many([EnqueueRequest("payout.execute", payload)] * 100)
        ids = [each.job.id for each in stored if isinstance(each, Enqueued)]
        found = [await first]
        for _ in range(49):
            found.append(await anext(events))
        assert statements < 10
        await queue.cancel(ids[50])
        await asyncio.sleep(0.3)
        found += [await anext(events) for _ in range(50)]
    jobs = [each.data["jobEvents"]["job"] for each in found]
    assert [each["id"] for each in jobs] == [str(each) for each in ids]
    assert [each["status"] for each in jobs].index("CANCELLED") == 50


async def test_subscriptions_need_their_scope_and_end_with_the_callers_token(
    queue: JobQueue,
) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    document = "subscription { jobEvents { name } }"
    enqueuer = HostContext("bob", frozenset({"jobs:enqueue"}))
    expiring = HostContext("ada", expires_at=datetime.now(UTC).timestamp() + 0.5)
    for context, code in ((enqueuer, "forbidden"), (expiring, "unauthenticated")):
        results = [each async for each in events_of(schema, document, context)]
        (error,) = results[0].errors
        assert error.extensions["code"] == code


async def test_the_hosts_own_operations_may_be_executed_synchronously(queue: JobQueue) -> None:
    schema = host_schema(graphql_types(queue, authenticate=caller_of))
    result = schema.execute_sync("{ now }", context_value=ADA)
    assert (result.errors, result.data is not None) == (None, True)


# Names


@strawberry.type(name="Job")
class HostJob:
    """A job that the host has found for someone."""

    title: str


@strawberry.type(name="Error")
class HostError:
    reason: str


@strawberry.type
class Careers:
    @strawberry.field
    def openings(self) -> list[HostJob]:
        return [HostJob(title="cook")]

    @strawberry.field
    def fault(self) -> HostError:
        return HostError(reason="none")


async def test_a_host_with_types_of_the_same_names_learns_it_at_its_start(queue: JobQueue) -> None:
    with pytest.raises(Exception, match=r"(Job|Error) is defined multiple times in the schema"):
        host_schema(graphql_types(queue, authenticate=caller_of), Careers)


async def test_a_prefix_keeps_the_names_of_both_apart(queue: JobQueue) -> None:
    jobs = graphql_types(queue, authenticate=caller_of, prefix="Queue")
    schema = host_schema(jobs, Careers)
    text = schema.as_str()
    for expected in (
        "type Job {",
        "type QueueJob implements QueueNode {",
        "type Error {",
        "interface QueueError {",
        "union QueueEnqueueJobResult =",
        "input QueueTypedJobInput",
        "input QueuePayoutExecuteInput",
        "enum QueueJobStatus",
        "scalar DateTime",
        "type Query {",
    ):
        assert expected in text, expected
    document = ENQUEUE
    for name in ("EnqueueJobInput", "EnqueueJobSuccess", "PayloadInvalid", "Error "):
        document = document.replace(name, f"Queue{name}")
    data, errors = await run(schema, "{ openings { title } fault { reason } }")
    assert (data["openings"], errors) == ([{"title": "cook"}], [])
    data, errors = await run(schema, document, input=PAYOUT)
    assert errors == []
    assert data["enqueueJob"]["__typename"] == "QueueEnqueueJobSuccess"
    invalid = {"type": "payout.execute", "payload": {}}
    data, errors = await run(schema, document, input=invalid)
    assert data["enqueueJob"]["code"] == "payload_invalid"


class Shift(Payload):
    """Every text that GraphQL has a scalar for."""

    starts: datetime
    day: date
    at: time
    pay: Decimal
    person: uuid.UUID


async def test_the_hosts_scalars_are_shared_and_payloads_are_stored_as_json(
    database_url: str,
) -> None:
    """A schema has one `DateTime`, one `UUID` and so on."""

    @strawberry.type
    class Rota:
        @strawberry.field
        def person(self, id: uuid.UUID, day: date, pay: Decimal) -> list[str]:
            return [type(id).__name__, type(day).__name__, type(pay).__name__]

    registry = JobRegistry([JobType(name="shift.plan", payload=Shift)])
    sent = {
        "starts": "2030-01-31T12:00:00Z",
        "day": "2030-01-31",
        "at": "08:30:00Z",
        "pay": "10.50",
        "person": "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    }
    async with JobQueue.from_url(database_url, registry) as queue:
        schema = host_schema(graphql_types(queue, authenticate=caller_of), Rota)
        data, errors = await run(
            schema,
            """query ($id: UUID!, $day: Date!, $pay: Decimal!) {
              person(id: $id, day: $day, pay: $pay) }""",
            id=sent["person"],
            day=sent["day"],
            pay=sent["pay"],
        )
        assert (data, errors) == ({"person": ["UUID", "date", "Decimal"]}, [])
        data, errors = await run(
            schema,
            """mutation ($job: TypedJobInput!) { enqueue(job: $job) {
              ... on EnqueueJobSuccess { job { payload } } ... on Error { message } } }""",
            job={"shiftPlan": sent},
        )
    assert errors == []
    assert data["enqueue"]["job"]["payload"] == sent


async def test_without_the_extensions_the_error_says_what_is_missing(queue: JobQueue) -> None:
    jobs = graphql_types(queue, authenticate=caller_of)
    schema = strawberry.Schema(query=jobs.query, config=StrawberryConfig(scalar_map=jobs.scalars))
    _, errors = await run(schema, "{ jobTypes { name } }")
    assert "extensions=[*jobs.extensions]" in errors[0]["message"]


async def test_the_schema_of_the_application_stays_as_it_is(queue: JobQueue) -> None:
    """Strawberry's fields are shared by all schemas that have them."""
    catalog = load_registry(["job_registry.catalog"])
    host_schema(graphql_types(queue, authenticate=caller_of, prefix="Queue"), Careers)
    assert sdl(catalog) == SDL_FILE.read_text("utf-8")


@pytest.mark.parametrize("inner", ["{ jobTypes { name } }", "{ now }"])
async def test_an_operation_inside_another_leaves_it_its_caller(
    queue: JobQueue, inner: str
) -> None:
    @strawberry.type
    class Auditing:
        @strawberry.mutation
        async def audit(self) -> str:
            result = await schema.execute(inner, context_value=HostContext("system"))
            return str(result.errors)

    jobs = graphql_types(queue, authenticate=caller_of)
    schema = strawberry.Schema(
        query=merge_types("Query", (HostQuery, jobs.query)),
        mutation=merge_types("Mutation", (Auditing, jobs.mutation)),
        extensions=[*jobs.extensions],
        exception_handlers=[*jobs.exception_handlers],
        config=StrawberryConfig(scalar_map=jobs.scalars, name_converter=jobs.name_converter),
    )
    # The root fields of a mutation run one after another, in one task.
    document = """mutation ($input: EnqueueJobInput!) { audit
      enqueueJob(input: $input) { ... on EnqueueJobSuccess { job { createdBy } } } }"""
    data, errors = await run(schema, document, ADA, input=PAYOUT)
    assert (data["audit"], errors) == ("None", [])
    assert data["enqueueJob"]["job"]["createdBy"] == "ada"
    data, errors = await run(schema, document, HostContext(), input=PAYOUT)
    assert [each["extensions"]["code"] for each in errors] == ["unauthenticated"]


async def test_a_schema_without_the_extensions_does_not_take_the_caller_of_an_event(
    queue: JobQueue,
) -> None:
    jobs = graphql_types(queue, authenticate=caller_of)
    bare = strawberry.Schema(
        query=jobs.query,
        mutation=jobs.mutation,
        config=StrawberryConfig(scalar_map=jobs.scalars, name_converter=jobs.name_converter),
    )
    stream: Any = await host_schema(jobs).subscribe(
        "subscription { jobEvents { job { id } } }", context_value=ADA
    )

    async def enqueue() -> None:
        await asyncio.sleep(0.2)
        await queue.enqueue(EnqueueRequest("payout.execute", {"batchId": "b", "escrowId": "e"}))

    async with aclosing(stream) as events, asyncio.TaskGroup() as tasks:
        tasks.create_task(enqueue())
        assert (await anext(events)).errors is None
        _, errors = await run(bare, ENQUEUE, HostContext(), input=PAYOUT)
    assert ["extensions=[*jobs.extensions]" in each["message"] for each in errors] == [True]
