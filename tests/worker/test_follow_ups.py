"""Jobs that a handler enqueues: stored in the transaction that completes its job, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from job_registry import (
    Backoff,
    DefinitionError,
    EnqueueRequest,
    Fail,
    JobContext,
    JobPolicy,
    JobRegistry,
    JobType,
    Payload,
    PayloadInvalid,
    Retry,
    Snooze,
)
from job_registry.payload import document_of
from job_registry_api import JobError, JobQueue, JobStatus
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import InputInvalid, LeaseLost
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.models import JobRecord
from job_registry_api.worker.child import address_of_class
from job_registry_api.worker.follow_ups import FollowUps
from tests.conftest import async_url
from tests.worker import house as houses
from tests.worker.house import House


class Start(Payload):
    act: str = ""


class Next(Payload):
    step: int
    note: str = ""


class Shared(Payload):
    pass


start_in_process = JobType(name="in_process", payload=Start, run_in="process")


@start_in_process.handler
def enqueue_in_process(job: JobContext, payload: Start) -> str | None:
    if payload.act.startswith("late "):
        enqueue_late(job, Path(payload.act.removeprefix("late ")))
        return None
    job_id = job.enqueue(Next(step=1), priority=80, schedule_at=datetime(2040, 1, 31, tzinfo=UTC))
    if payload.act == "fail":
        raise Fail("no")
    if payload.act == "stranger":
        job.enqueue(Stranger(step=1))
    if payload.act == "priority":
        job.enqueue(Next(step=2), priority=101)
    return job_id


def enqueue_late(job: JobContext, file: Path) -> None:
    """Start a thread that goes on enqueueing after the handler, and writes the error."""

    def go_on() -> None:
        try:
            while True:
                job.enqueue(Next(step=1))
                time.sleep(0.001)
        except Exception as error:
            file.with_suffix(".part").write_text(f"{type(error).__name__}: {error}")
            file.with_suffix(".part").rename(file)

    threading.Thread(target=go_on, daemon=True).start()
    time.sleep(0.02)


class Stranger(Payload):
    step: int


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[House]:
    """A queue whose type `work` enqueues jobs of `next`."""
    policy = JobPolicy(max_attempts=2, timeout_seconds=30, backoff=Backoff(0.05, 0.1))
    types: list[JobType[Any]] = [
        JobType(name="work", payload=houses.Text, policy=policy),
        JobType(name="next", payload=Next),
        JobType(name="shared.one", payload=Shared),
        JobType(name="shared.two", payload=Shared),
        start_in_process,
    ]
    database = open_database(database_url)
    queue = JobQueue(JobRegistry(types), database)
    async with queue.events.listening():
        yield House(queue, database_url, types[0])
    await database.close()


async def followers(house: House) -> list[JobRecord]:
    """The jobs that handlers have enqueued, oldest first."""
    jobs = (await house.queue.list(first=200)).jobs
    return [job for job in reversed(jobs) if job.type not in ("work", "in_process")]


async def test_a_job_that_a_handler_enqueues_is_stored_when_its_own_job_succeeds(
    house: House,
) -> None:
    seen: list[int] = []

    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        job.enqueue(Next(step=1), priority=80, idempotency_key="one")
        job.enqueue(Next(step=2, note="later"), schedule_at=datetime.now(UTC) + timedelta(days=1))
        seen.append(len(await followers(house)))

    done = await house.run()
    assert (done.status, seen) == (JobStatus.SUCCEEDED, [0])
    first, second = await followers(house)
    assert (first.payload, first.priority, first.idempotency_key) == (
        {"step": 1, "note": ""},
        80,
        "one",
    )
    assert second.payload == {"step": 2, "note": "later"}
    assert second.next_run_at is not None
    assert second.next_run_at > datetime.now(UTC) + timedelta(hours=23)


async def test_the_new_job_has_the_creator_of_the_job_that_enqueued_it(house: House) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: houses.Text) -> None:
        job.enqueue(Next(step=1))

    async with house.working():
        request = EnqueueRequest("work", {})
        job = (await house.queue.enqueue(request, created_by="ada")).job
        await house.until(job, JobStatus.SUCCEEDED)
    (follower,) = await followers(house)
    assert follower.created_by == "ada"


@pytest.mark.cases(2)
@pytest.mark.parametrize("error", [Fail("no"), Retry(after=100), Snooze(100), KeyError("x")])
async def test_nothing_is_stored_when_the_attempt_ends_in_another_way(
    house: House, error: Exception
) -> None:
    ran: list[int] = []

    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        job.enqueue(Next(step=job.attempt))
        ran.append(job.attempt)
        raise error

    async with house.working():
        job = await house.enqueue()
        await house.until(job, JobStatus.QUEUED, JobStatus.FAILED)
        while not ran or (await house.queue.get(job.id)).status is JobStatus.RUNNING:
            await house.until(job, JobStatus.QUEUED, JobStatus.FAILED)
    assert await followers(house) == []


async def test_a_repeated_attempt_enqueues_once(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        job.enqueue(Next(step=job.attempt))
        if job.attempt == 1:
            raise RuntimeError("after the enqueue")

    done = await house.run()
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 2)
    assert [job.payload for job in await followers(house)] == [{"step": 2, "note": ""}]


async def test_a_completion_that_is_repeated_stores_its_jobs_once(house: House) -> None:
    queue = house.queue
    job = await house.enqueue()
    (lease,) = await queue.lease(["work"], "w")
    new = [queue.admit(queue.request(Next(step=1)))]
    assert (await queue.complete(lease.token, follow_ups=new)).status is JobStatus.SUCCEEDED
    again = [queue.admit(queue.request(Next(step=1)))]
    assert (await queue.complete(lease.token, follow_ups=again)).id == job.id
    assert len(await followers(house)) == 1


async def test_a_lease_is_renewed_while_another_transaction_holds_the_key_of_a_new_job(
    house: House, database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer: a transaction of a caller holds up every other")
    queue, engine = house.queue, create_async_engine(async_url(database_url))
    await house.enqueue()
    (lease,) = await queue.lease(["work"], "w")
    new = [queue.admit(queue.request(Next(step=1), idempotency_key="k"))]
    async with AsyncSession(engine) as session:
        first = await queue.enqueue(Next(step=1), idempotency_key="k", session=session)
        completing = asyncio.create_task(queue.complete(lease.token, follow_ups=new))
        await asyncio.sleep(0.2)
        renewed = []
        for _ in range(5):
            (renewal,) = await queue.renew([Renewal(lease.token)])
            renewed.append(not isinstance(renewal, LeaseLost) and renewal.renewed)
            await asyncio.sleep(0.05)
        assert True in renewed
        assert not completing.done()
        await session.commit()
    await engine.dispose()
    assert (await completing).status is JobStatus.SUCCEEDED
    assert [job.id for job in await followers(house)] == [first.job.id]


@pytest.mark.any_database
async def test_a_job_that_is_enqueued_after_the_handler_has_ended_is_refused(house: House) -> None:
    contexts: list[JobContext] = []

    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        contexts.append(job)

    await house.run()
    with pytest.raises(RuntimeError, match="has ended"):
        contexts[0].enqueue(Next(step=1))


@pytest.mark.any_database
@pytest.mark.parametrize("runs_in", ["thread", pytest.param("process", marks=pytest.mark.slow)])
async def test_a_thread_that_outlives_its_handler_is_told_that_its_job_is_refused(
    house: House, tmp_path: Path, runs_in: str
) -> None:
    file = tmp_path / "error"

    @house.job_type.handler
    def work(job: JobContext, payload: houses.Text) -> None:
        enqueue_late(job, file)

    async with house.working():
        job = (
            (await house.queue.enqueue(Start(act=f"late {file}"))).job
            if runs_in == "process"
            else await house.enqueue()
        )
        assert (await house.until(job, JobStatus.SUCCEEDED)).status is JobStatus.SUCCEEDED
        async with asyncio.timeout(5):
            while not file.exists():
                await asyncio.sleep(0.01)
    assert file.read_text().startswith("RuntimeError: the handler of this job has ended")
    assert len(await followers(house)) >= 1


@pytest.mark.any_database
async def test_a_handler_is_told_the_id_of_the_job_that_it_enqueues(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> list[str]:
        return [job.enqueue(Next(step=step)) for step in (1, 2)]

    done = await house.run()
    assert done.result == [str(job.id) for job in await followers(house)]


async def test_a_lost_lease_stores_nothing(house: House) -> None:
    queue = house.queue
    await house.enqueue()
    (lease,) = await queue.lease(["work"], "w")
    await queue.fail(lease.token, JobError("x", "x"))
    with pytest.raises(LeaseLost):
        await queue.complete(lease.token, follow_ups=[queue.admit(queue.request(Next(step=1)))])
    assert await followers(house) == []


@pytest.mark.any_database
async def test_a_handler_gets_the_error_of_a_job_that_is_invalid(house: House) -> None:
    errors: list[Exception] = []
    wrong: Any = "one"

    @house.job_type.handler
    def work(job: JobContext, payload: houses.Text) -> None:
        refused: list[tuple[Any, dict[str, Any]]] = [
            (Next.model_construct(step=wrong), {}),
            (Next(step=1), {"priority": 101}),
            (Stranger(step=1), {}),
            (Shared(), {}),
            ({"step": 1}, {}),
        ]
        for follow_up, options in refused:
            try:
                job.enqueue(follow_up, **options)
            except Exception as error:
                errors.append(error)
        job.enqueue(Shared(), job_type="shared.two")

    assert (await house.run()).status is JobStatus.SUCCEEDED
    assert [type(error) for error in errors] == [
        PayloadInvalid,
        InputInvalid,
        DefinitionError,
        DefinitionError,
        TypeError,
    ]
    assert "shared.one, shared.two have the payload Shared" in str(errors[3])
    assert [job.type for job in await followers(house)] == ["shared.two"]


async def test_a_key_of_another_payload_fails_the_job_and_stores_nothing(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        job.enqueue(Next(step=1))
        job.enqueue(Next(step=2), idempotency_key="taken")

    await house.queue.enqueue(Next(step=9), idempotency_key="taken")
    done = await house.run()
    assert (done.status, done.attempt) == (JobStatus.FAILED, 1)
    assert done.error is not None
    assert done.error.code == "follow_up_refused"
    assert "whose payload differs at /step" in done.error.message
    assert [job.payload for job in await followers(house)] == [{"step": 9, "note": ""}]


async def test_a_key_of_the_same_payload_is_the_job_that_exists(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        job.enqueue(Next(step=1), idempotency_key="same")

    assert (await house.run()).status is JobStatus.SUCCEEDED
    assert (await house.run()).status is JobStatus.SUCCEEDED
    assert len(await followers(house)) == 1


async def test_another_process_hears_of_the_new_job_and_of_the_completed_one(
    house: House, database_url: str
) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        job.enqueue(Next(step=1))

    async with JobQueue.from_url(database_url, house.queue.registry) as other:
        with other.events.subscribe() as events:
            await house.run()
            names = [(await anext(events)).name for _ in range(4)]
    assert sorted(names) == ["job.created", "job.created", "job.started", "job.succeeded"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "status", "message"),
    [
        ("", JobStatus.SUCCEEDED, None),
        ("fail", JobStatus.FAILED, "no"),
        ("stranger", JobStatus.FAILED, "no job type of this registry has the payload"),
        ("priority", JobStatus.FAILED, "Expected a whole number from 0 to 100; got 101"),
    ],
)
async def test_a_handler_in_a_process_enqueues_too(
    house: House, act: str, status: JobStatus, message: str | None
) -> None:
    async with house.working():
        job = (await house.queue.enqueue(Start(act=act))).job
        done = await house.until(job, JobStatus.SUCCEEDED, JobStatus.FAILED)
    assert done.status is status
    if message is not None:
        assert done.error is not None
        assert message in done.error.message
        assert await followers(house) == []
    else:
        (follower,) = await followers(house)
        assert done.result == str(follower.id)
        assert (follower.priority, follower.next_run_at) == (80, datetime(2040, 1, 31, tzinfo=UTC))


async def test_a_job_of_a_handler_in_a_process_is_found_by_its_payload(house: House) -> None:
    def message(payload: Payload, **options: Any) -> dict[str, Any]:
        return {
            "id": str(uuid.uuid4()),
            "class": address_of_class(type(payload)),
            "payload": document_of(payload),
            "options": {"schedule_at": None, "job_type": None, **options},
        }

    # Given jobs of two types, one of them by its name
    follow_ups = FollowUps(house.queue, "creator")
    sent = [
        message(Next(step=1), schedule_at="2040-01-31T00:00:00+00:00", priority=80),
        message(Shared(), job_type="shared.two"),
    ]
    for each in sent:
        follow_ups.add_from_process(each)

    # I expect them with the ids of which their handler knows
    assert follow_ups.refusal is None
    assert [str(job.id) for job in follow_ups.jobs] == [each["id"] for each in sent]
    assert [job.type for job in follow_ups.jobs] == ["next", "shared.two"]
    assert [job.created_by for job in follow_ups.jobs] == ["creator"] * 2
    first = follow_ups.jobs[0]
    assert (first.priority, first.next_run_at) == (80, datetime(2040, 1, 31, tzinfo=UTC))

    # And the first refusal to be kept, whatever comes after it
    for payload in (Stranger(step=1), Shared()):
        follow_ups.add_from_process(message(payload))
    assert follow_ups.refusal is not None
    assert follow_ups.refusal.startswith("no job type of this registry has the payload")
    assert len(follow_ups.jobs) == 2


def test_a_context_outside_a_worker_says_where_to_get_one() -> None:
    job = JobContext("1", "work", 1, 3, 30)
    with pytest.raises(RuntimeError, match=r"job_registry\.testing"):
        job.enqueue(Next(step=1))


@pytest.mark.slow
async def test_a_worker_beside_another_one_stays_within_its_slots(house: House) -> None:
    # Given a type whose jobs enqueue others, and so are reported by themselves
    running = most = 0

    @house.job_type.handler
    async def work(job: JobContext, payload: houses.Text) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        job.enqueue(Next(step=1), schedule_at=datetime(2040, 1, 31, tzinfo=UTC))
        await asyncio.sleep(0.005)
        running -= 1

    # And another one, whose jobs are reported in groups
    @house.queue.registry.get_type("shared.one").handler
    async def share(job: JobContext, payload: Shared) -> None:
        await asyncio.sleep(0.002)

    # When each has a worker in one process
    await house.queue.enqueue_many([EnqueueRequest("shared.one", {})] * 400)
    jobs = [await house.enqueue() for _ in range(60)]
    async with (
        house.working(types=["work"], concurrency=1),
        house.working(types=["shared.one"], concurrency=4),
    ):
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED)

    # I expect the reports of one to bring no job to the other, whose slot is taken in the meantime
    assert most == 1
