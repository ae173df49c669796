"""Spans of requests, enqueues and attempts, as a program gets them in its own provider."""

from __future__ import annotations

import asyncio
import io
import json
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api import JobQueue, JobStatus, Tracing, Worker, create_app, load_settings
from job_registry_api.logs import configure_logs
from job_registry_api.queue.errors import IdempotencyConflict
from job_registry_api.queue.models import JobRecord
from tests import traced_jobs
from tests.conftest import advance, async_url, run_sql
from tests.http_client import ApplicationClient
from tests.traced_jobs import Plain

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
SECRET = "not for a span"

ENQUEUE = """mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) {
  ... on EnqueueJobSuccess { job { id } } ... on Error { code } } }"""
LEASE = """mutation { leaseJobs(input: { jobTypes: ["traced.plain"], workerId: "w" }) {
  ... on LeaseJobsSuccess { leases { traceparent job { id } } } } }"""


@dataclass
class Traced:
    """A queue that is traced, an application of it, and its spans."""

    queue: JobQueue
    client: httpx.AsyncClient
    exporter: InMemorySpanExporter
    url: str

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    async def graphql(self, query: str, headers: Any = None, **variables: Any) -> Any:
        body = {"query": query, "variables": variables}
        answer = await self.client.post("/graphql", json=body, headers=headers)
        assert "errors" not in answer.json(), answer.text
        return answer.json()["data"]

    async def enqueue(self, kind: str, act: str = "", headers: Any = None) -> uuid.UUID:
        """Enqueue a job over GraphQL."""
        given = {"type": kind, "payload": {"act": act, "note": SECRET}}
        data = await self.graphql(ENQUEUE, headers, input=given)
        return uuid.UUID(data["enqueueJob"]["job"]["id"])

    async def work(self, job_id: uuid.UUID, *statuses: JobStatus) -> JobRecord:
        """Run a worker until the job has one of these statuses."""
        async with Worker(self.queue, concurrency=2).running(), asyncio.timeout(40):
            while (job := await self.queue.get(job_id)).status not in statuses:
                await asyncio.sleep(0.02)
        return job

    async def traceparents(self) -> list[str | None]:
        """What is stored with each job, in the order of their ids."""
        query = "SELECT traceparent FROM job ORDER BY id"
        return [row[0] for row in await asyncio.to_thread(run_sql, self.url, query)]


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def written(span: ReadableSpan) -> str:
    """A span as it is stored, and as it is in a header."""
    assert span.context is not None
    return "00-{}-{}-{:02x}".format(*ids(span), span.context.trace_flags)


def parent(span: ReadableSpan) -> tuple[str, str] | None:
    above = span.parent
    return None if above is None else (f"{above.trace_id:032x}", f"{above.span_id:016x}")


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@asynccontextmanager
async def tracing_to(url: str, provider: TracerProvider) -> AsyncIterator[Traced]:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    queue = JobQueue.from_url(url, JobRegistry(traced_jobs.ALL), tracing=tracing)
    app = create_app(load_settings({}), queue=queue)
    async with queue, app.running(), ApplicationClient(app) as client:
        yield Traced(queue, client, exporter, url)


kinds = pytest.mark.parametrize(
    "kind",
    ["traced.loop", "traced.thread", pytest.param("traced.process", marks=pytest.mark.slow)],
)


@pytest.fixture
async def traced(database_url: str) -> AsyncIterator[Traced]:
    async with tracing_to(database_url, TracerProvider()) as traced:
        yield traced


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", ["traced.loop", "traced.thread", "traced.process"])
async def test_a_request_an_enqueue_and_each_attempt_are_one_trace(
    traced: Traced, kind: str
) -> None:
    job_id = await traced.enqueue(kind, "fail once", {"traceparent": TRACEPARENT})
    job = await traced.work(job_id, JobStatus.SUCCEEDED, JobStatus.FAILED)

    request = traced.one("POST /graphql")
    sent = traced.one(f"send {kind}")
    first, second = sorted(traced.named(f"process {kind}"), key=lambda span: span.start_time or 0)
    assert (job.status, job.result) == (JobStatus.SUCCEEDED, TRACE)
    assert {ids(span)[0] for span in traced.spans} == {TRACE}
    assert parent(request) == (TRACE, SPAN)
    assert parent(sent) == ids(request)
    assert parent(first) == parent(second) == ids(sent)
    assert [span.kind for span in (request, sent, first)] == [
        SpanKind.SERVER,
        SpanKind.PRODUCER,
        SpanKind.CONSUMER,
    ]
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/graphql",
        "http.response.status_code": 200,
        "url.path": "/graphql",
        "url.scheme": "http",
    }
    of_message = {
        "messaging.system": "job_registry",
        "messaging.destination.name": kind,
        "messaging.message.id": str(job_id),
    }
    assert attributes(sent) == {
        **of_message,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
    }
    of_attempt = {
        **of_message,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.client.id": job.worker_id,
    }
    assert attributes(first) == {
        **of_attempt,
        "job_registry.attempt": 1,
        "job_registry.outcome": "failed",
        "error.type": "handler_failed",
    }
    assert attributes(second) == {
        **of_attempt,
        "job_registry.attempt": 2,
        "job_registry.outcome": "succeeded",
    }
    assert first.status.status_code is StatusCode.ERROR
    assert second.status.status_code is StatusCode.UNSET


@kinds
async def test_no_span_has_a_payload_or_the_message_of_an_exception(
    traced: Traced, kind: str
) -> None:
    for act in ("fail once", "fail"):
        await traced.work(await traced.enqueue(kind, act), JobStatus.SUCCEEDED, JobStatus.FAILED)
    assert len(traced.named(f"process {kind}")) == 3
    assert not [span.name for span in traced.spans if SECRET in span.to_json()]
    assert not [span.name for span in traced.spans if span.events]


@kinds
async def test_a_job_that_a_handler_enqueues_belongs_to_its_trace(
    traced: Traced, kind: str
) -> None:
    await traced.work(await traced.enqueue(kind, "follow"), JobStatus.SUCCEEDED)
    (follow_up,) = [job for job in (await traced.queue.list()).jobs if job.type == "traced.plain"]
    await traced.work(follow_up.id, JobStatus.SUCCEEDED)

    created, processed = traced.one("create traced.plain"), traced.one("process traced.plain")
    assert parent(created) == ids(traced.one(f"process {kind}"))
    assert parent(processed) == ids(created)
    assert created.kind is SpanKind.PRODUCER
    assert attributes(created)["messaging.message.id"] == str(follow_up.id)
    assert attributes(created)["messaging.operation.type"] == "create"


@pytest.mark.parametrize(
    ("act", "status", "outcome", "code"),
    [
        ("fail", JobStatus.FAILED, "failed", "failed"),
        ("cancel", JobStatus.CANCELLED, "cancelled", None),
        ("snooze", JobStatus.QUEUED, "snoozed", None),
    ],
)
async def test_a_span_has_the_outcome_of_its_attempt(
    traced: Traced, act: str, status: JobStatus, outcome: str, code: str | None
) -> None:
    job_id = await traced.enqueue("traced.loop", act)
    async with Worker(traced.queue).running(), asyncio.timeout(20):
        while not traced.named("process traced.loop"):
            await asyncio.sleep(0.02)
    assert (await traced.queue.get(job_id)).status is status
    span = traced.one("process traced.loop")
    assert attributes(span)["job_registry.outcome"] == outcome
    assert attributes(span).get("error.type") == code
    assert (span.status.status_code is StatusCode.ERROR) == (code is not None)


async def test_an_attempt_that_times_out_is_an_error(traced: Traced) -> None:
    enqueued = await traced.queue.enqueue(EnqueueRequest("traced.short", {}))
    await traced.work(enqueued.job.id, JobStatus.FAILED)
    span = traced.one("process traced.short")
    assert attributes(span)["job_registry.outcome"] == attributes(span)["error.type"] == "timed_out"
    assert span.status.status_code is StatusCode.ERROR


async def test_an_attempt_whose_payload_cannot_be_read_is_parked(traced: Traced) -> None:
    sent = await traced.queue.enqueue(EnqueueRequest("traced.plain", {}))
    change = f"UPDATE job SET payload = '{{\"other\": 1}}' WHERE id = '{sent.job.id.hex}'"
    await asyncio.to_thread(run_sql, traced.url, change)
    async with Worker(traced.queue).running(), asyncio.timeout(20):
        while not traced.named("process traced.plain"):
            await asyncio.sleep(0.02)
    span = traced.one("process traced.plain")
    assert attributes(span)["job_registry.outcome"] == "parked"
    assert attributes(span)["error.type"] == "payload_invalid"


async def test_a_released_attempt_and_the_next_one_have_a_span_each(traced: Traced) -> None:
    job_id = await traced.enqueue("traced.process", "sleep")
    async with Worker(traced.queue, shutdown_seconds=0).running(), asyncio.timeout(20):
        while (await traced.queue.get(job_id)).status is not JobStatus.RUNNING:
            await asyncio.sleep(0.02)
    assert attributes(traced.one("process traced.process"))["job_registry.outcome"] == "released"


@pytest.mark.parametrize("by", ["recover", "claim"])
async def test_an_attempt_whose_worker_dies_is_in_the_trace_of_its_job(
    traced: Traced, by: str
) -> None:
    job_id = await traced.enqueue("traced.plain", headers={"traceparent": TRACEPARENT})
    await traced.queue.lease(["traced.plain"], "dies")
    await advance(traced.url, 31)
    if by == "recover":
        await traced.queue.recover()
    else:
        await traced.queue.lease(["traced.plain"], "next")
    settled = traced.one("settle traced.plain")
    assert parent(settled) == ids(traced.one("send traced.plain"))
    assert settled.status.status_code is StatusCode.ERROR
    assert attributes(settled) == {
        "messaging.system": "job_registry",
        "messaging.operation.name": "settle",
        "messaging.operation.type": "settle",
        "messaging.destination.name": "traced.plain",
        "messaging.message.id": str(job_id),
        "job_registry.attempt": 1,
        "job_registry.outcome": "lost",
        "error.type": "lost",
    }


async def test_a_bulk_has_one_span_and_all_its_jobs_belong_to_it(traced: Traced) -> None:
    jobs = [EnqueueRequest("traced.plain", {"note": str(number)}) for number in range(3)]
    await traced.queue.enqueue_many(jobs)
    await traced.queue.enqueue_many([*jobs, EnqueueRequest("traced.loop", {})], atomic=True)

    same, mixed = traced.one("send traced.plain"), traced.one("send")
    assert attributes(same)["messaging.batch.message_count"] == 3
    assert attributes(same)["messaging.destination.name"] == "traced.plain"
    assert attributes(mixed)["messaging.batch.message_count"] == 4
    assert "messaging.destination.name" not in attributes(mixed)
    of_same, of_mixed = (written(span) for span in (same, mixed))
    assert await traced.traceparents() == [of_same] * 3 + [of_mixed] * 4


async def test_what_is_refused_has_no_span_of_an_enqueue(traced: Traced) -> None:
    wrong = EnqueueRequest("traced.plain", {"other": 1})
    await traced.queue.enqueue_many([wrong, EnqueueRequest("traced.plain", {})], atomic=True)
    await traced.graphql(ENQUEUE, input={"type": "traced.plain", "payload": {"other": 1}})
    assert [span.name for span in traced.spans] == ["POST /graphql"]


async def test_the_same_key_keeps_the_span_of_the_first_enqueue(traced: Traced) -> None:
    keyed = EnqueueRequest("traced.plain", {"note": "1"}, idempotency_key="k")
    first = await traced.queue.enqueue(keyed)
    await traced.queue.enqueue(keyed)
    with pytest.raises(IdempotencyConflict):
        await traced.queue.enqueue(keyed._replace(payload={"note": "2"}))
    await traced.queue.enqueue_many([keyed, keyed._replace(idempotency_key="other")])

    stored, again, conflict, bulk = traced.named("send traced.plain")
    assert attributes(stored)["messaging.message.id"] == str(first.job.id)
    assert attributes(again)["messaging.message.id"] == str(first.job.id)
    assert "messaging.message.id" not in attributes(conflict)
    assert attributes(conflict)["error.type"] == "idempotency_conflict"
    assert [span.status.status_code for span in (again, conflict)] == [
        StatusCode.UNSET,
        StatusCode.ERROR,
    ]
    expected = [written(span) for span in (stored, bulk)]
    assert await traced.traceparents() == expected


async def test_an_enqueue_in_the_caller_s_transaction_belongs_to_the_caller_s_span(
    traced: Traced,
) -> None:
    tracer = TracerProvider().get_tracer("shop")
    engine = create_async_engine(async_url(traced.url))
    with tracer.start_as_current_span("order") as order:
        async with AsyncSession(engine) as session, session.begin():
            await traced.queue.enqueue(Plain(note="one"), session=session)
            many = [traced.queue.request(Plain(note=note)) for note in ("two", "three")]
            await traced.queue.enqueue_many(many, session=session)
        await asyncio.to_thread(traced.queue.sync.enqueue, Plain(note="four"))
    await engine.dispose()

    spans = traced.named("send traced.plain")
    assert {parent(span) for span in spans} == {
        (f"{order.get_span_context().trace_id:032x}", f"{order.get_span_context().span_id:016x}")
    }
    one, bulk, four = (written(span) for span in spans)
    assert await traced.traceparents() == [one, bulk, bulk, four]


async def test_a_retried_job_keeps_its_trace(traced: Traced) -> None:
    job_id = await traced.enqueue("traced.loop", "fail")
    await traced.work(job_id, JobStatus.FAILED)
    await traced.queue.retry(job_id)
    await traced.work(job_id, JobStatus.FAILED)
    first, second = traced.named("process traced.loop")
    assert parent(first) == parent(second) == ids(traced.one("send traced.loop"))


async def test_a_remote_worker_gets_the_span_that_enqueued_the_job(traced: Traced) -> None:
    job_id = await traced.enqueue("traced.plain", headers={"traceparent": TRACEPARENT})
    (lease,) = (await traced.graphql(LEASE))["leaseJobs"]["leases"]
    assert lease["job"]["id"] == str(job_id)
    assert lease["traceparent"] == written(traced.one("send traced.plain"))
    assert lease["traceparent"].startswith(f"00-{TRACE}-")


async def test_a_job_without_a_span_gives_a_remote_worker_none(database_url: str) -> None:
    async with JobQueue.from_url(database_url, JobRegistry(traced_jobs.ALL)) as queue:
        await queue.enqueue(Plain())
        (lease,) = await queue.lease(["traced.plain"], "w")
        assert lease.traceparent is None


async def test_a_job_that_was_enqueued_untraced_has_a_trace_per_attempt(traced: Traced) -> None:
    async with JobQueue.from_url(traced.url, JobRegistry(traced_jobs.ALL)) as untraced:
        job = (await untraced.enqueue(Plain())).job
    await traced.work(job.id, JobStatus.SUCCEEDED)
    assert parent(traced.one("process traced.plain")) is None


async def test_a_trace_that_is_not_sampled_is_kept_and_not_exported(database_url: str) -> None:
    provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF))
    async with tracing_to(database_url, provider) as traced:
        unsampled = f"00-{TRACE}-{SPAN}-00"
        job_id = await traced.enqueue("traced.loop", headers={"traceparent": unsampled})
        job = await traced.work(job_id, JobStatus.SUCCEEDED)
        (stored,) = await traced.traceparents()
    assert traced.spans == []
    assert stored is not None
    assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-00", stored)
    assert job.result == TRACE


HOSTILE = [
    "",
    "00",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-zz",
    f"00-{TRACE[:-1]}g-{SPAN}-01",
    "00-" + "9" * 5_000 + "-01",
    "\xff\xfe",
    "'; DROP TABLE job; --",
]


@pytest.mark.cases(4)
@pytest.mark.parametrize("value", HOSTILE)
async def test_a_traceparent_that_is_not_valid_is_ignored(traced: Traced, value: str) -> None:
    headers = [("traceparent", value.encode("latin-1"))]
    await traced.enqueue("traced.plain", headers=headers)
    request = traced.one("POST /graphql")
    assert parent(request) is None
    (stored,) = await traced.traceparents()
    assert stored is not None
    assert stored.startswith(f"00-{ids(request)[0]}-")
    assert len(stored) == 55


async def test_several_traceparents_are_ignored(traced: Traced) -> None:
    headers = [("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)]
    await traced.enqueue("traced.plain", headers=headers)
    assert parent(traced.one("POST /graphql")) is None


async def test_a_newer_version_of_the_header_is_read(traced: Traced) -> None:
    newer = {"traceparent": f"01-{TRACE}-{SPAN}-01-more"}
    await traced.enqueue("traced.plain", headers=newer)
    assert parent(traced.one("POST /graphql")) == (TRACE, SPAN)


async def test_requests_of_rest_are_named_by_their_routes(traced: Traced) -> None:
    client = traced.client
    created = await client.post("/jobs", json={"type": "traced.plain", "payload": {}})
    await client.get(f"/jobs/{created.json()['jobId']}")
    await client.get("/jobs/nothing")
    await client.get("/jobs?first=1")
    await client.post("/jobs/bulk", json={"jobs": []})
    await client.request("BREW", "/jobs")
    requests = [span for span in traced.spans if span.kind is SpanKind.SERVER]
    assert [
        (span.name, attributes(span)["http.response.status_code"], span.status.status_code.name)
        for span in requests
    ] == [
        ("POST /jobs", 201, "UNSET"),
        ("GET /jobs/{id}", 200, "UNSET"),
        ("GET /jobs/{id}", 404, "UNSET"),
        ("GET /jobs", 200, "UNSET"),
        ("POST /jobs/bulk", 200, "UNSET"),
        ("HTTP /jobs", 405, "UNSET"),
    ]
    assert attributes(requests[-1])["http.request.method"] == "_OTHER"
    assert not [span for span in requests if "first=1" in span.to_json()]


async def test_health_and_metrics_have_no_spans(traced: Traced) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/nothing"):
        await traced.client.get(path)
    assert traced.spans == []


async def test_a_request_that_fails_is_an_error(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(traced.queue, "enqueue", fail)
    answer = await traced.client.post("/jobs", json={"type": "traced.plain", "payload": {}})
    assert answer.status_code == 500
    request = traced.one("POST /jobs")
    assert request.status.status_code is StatusCode.ERROR
    assert attributes(request)["error.type"] == "500"
    assert SECRET not in request.to_json()


async def test_a_request_that_the_host_traces_has_no_second_span(traced: Traced) -> None:
    with TracerProvider().get_tracer("host").start_as_current_span("theirs") as theirs:
        await traced.enqueue("traced.plain")
    assert [span.name for span in traced.spans] == ["send traced.plain"]
    assert ids(traced.spans[0])[0] == f"{theirs.get_span_context().trace_id:032x}"


async def test_requests_at_once_do_not_mix_their_traces(traced: Traced) -> None:
    async def send(number: int) -> tuple[str, str]:
        trace_id = f"{number:032x}"
        job_id = await traced.enqueue(
            "traced.loop", headers={"traceparent": f"00-{trace_id}-{SPAN}-01"}
        )
        return str(job_id), trace_id

    sent = dict(await asyncio.gather(*(send(number) for number in range(1, 41))))
    async with Worker(traced.queue, concurrency=8).running(), asyncio.timeout(40):
        while len(traced.named("process traced.loop")) < 40:
            await asyncio.sleep(0.02)
    for name in ("send traced.loop", "process traced.loop"):
        spans = traced.named(name)
        assert {attributes(e)["messaging.message.id"]: ids(e)[0] for e in spans} == sent
    for job_id, trace_id in sent.items():
        assert (await traced.queue.get(job_id)).result == trace_id
    assert not trace.get_current_span(context.get_current()).get_span_context().is_valid


@pytest.mark.parametrize("kind", ["traced.loop", "traced.thread"])
async def test_log_lines_name_the_span_of_their_job(traced: Traced, kind: str) -> None:
    written = io.BytesIO()
    configure_logs("info", "json", io.TextIOWrapper(written, write_through=True))
    jobs = {}
    for number in range(1, 4):
        header = {"traceparent": f"00-{number:032x}-{SPAN}-01"}
        jobs[str(await traced.enqueue(kind, headers=header))] = f"{number:032x}"
    async with Worker(traced.queue).running(), asyncio.timeout(40):
        while len(traced.named(f"process {kind}")) < 3:
            await asyncio.sleep(0.02)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    found = {
        event: {
            e["job_id"]: e["trace_id"] for e in lines if e["event"] == event and "trace_id" in e
        }
        for event in ("job.created", "job.started", "acting", "job.succeeded")
    }
    assert found == dict.fromkeys(found, jobs)
    spans = {attributes(e)["messaging.message.id"]: ids(e)[1] for e in traced.named(f"send {kind}")}
    created = {e["job_id"]: e["span_id"] for e in lines if e["event"] == "job.created"}
    assert created == spans
    # The attempt has no span yet.
    assert {e["job_id"]: e["span_id"] for e in lines if e["event"] == "job.started"} == spans
    assert not [e for e in lines if e["event"] == "worker.started" and "trace_id" in e]
