"""`TestQueue`: enqueueing as in production, assertions, the clock, and sessions of the caller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from job_registry import (
    DefinitionError,
    EnqueueRequest,
    JobType,
    JobTypeNotFound,
    Payload,
    PayloadInvalid,
)
from job_registry.testing import DrainFailed, JobStatus, TestQueue
from job_registry_api import (
    IdempotencyConflict,
    InputInvalid,
    JobFailed,
    JobQueue,
    Worker,
    create_app,
    load_settings,
)
from job_registry_api.queue.reading import NoWorkerSeen, ScheduledFor
from tests.testing.kit_jobs import REGISTRY, Count, Do, MailSend, do_async, mail_send

ADA = MailSend(to="ada@example.com")
BOB = MailSend(to="bob@example.com")


# Enqueueing


async def test_it_is_a_queue(job_queue: TestQueue) -> None:
    queue: JobQueue = job_queue
    stored = (await queue.enqueue(ADA, priority=90, created_by="eve")).job
    assert await queue.get(stored.id) == stored
    assert (stored.priority, stored.created_by, stored.max_attempts) == (90, "eve", 3)
    assert [job.id for job in (await queue.list()).jobs] == [stored.id]
    assert (await queue.cancel(stored.id)).status is JobStatus.CANCELLED
    assert (await queue.retry(stored.id)).status is JobStatus.QUEUED


async def test_invalid_jobs_are_refused_as_in_production(job_queue: TestQueue) -> None:
    with pytest.raises(PayloadInvalid, match="/too"):
        await job_queue.enqueue(EnqueueRequest("mail.send", {"too": "ada"}))
    with pytest.raises(JobTypeNotFound, match="Did you mean mail.send"):
        await job_queue.enqueue(EnqueueRequest("mail.sent", {}))
    with pytest.raises(InputInvalid, match="/priority"):
        await job_queue.enqueue(ADA, priority=101)
    assert job_queue.jobs() == []


async def test_an_idempotency_key_gives_back_the_first_job(job_queue: TestQueue) -> None:
    first = await job_queue.enqueue(ADA, idempotency_key="k")
    again = await job_queue.enqueue(ADA, idempotency_key="k")
    assert (again.deduplicated, again.job.id) == (True, first.job.id)
    with pytest.raises(IdempotencyConflict):
        await job_queue.enqueue(BOB, idempotency_key="k")
    assert len(job_queue.jobs()) == 1


async def test_queues_share_no_jobs_and_leave_no_files() -> None:
    with TestQueue(REGISTRY) as one, TestQueue(REGISTRY) as other:
        await one.enqueue(ADA)
        one.sync.enqueue(BOB)
        assert (len(one.jobs()), len(other.jobs())) == (2, 0)
        folders = [Path(queue.assets).parent for queue in (one, other)]
        assert all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() for folder in folders)


async def test_opening_and_closing_in_the_tested_code_has_no_effect(job_queue: TestQueue) -> None:
    async with job_queue as opened:
        await opened.enqueue(ADA)
    await job_queue.close()
    job_queue.sync.close()
    async with job_queue:
        await job_queue.enqueue(BOB)
    assert len(job_queue.jobs()) == 2


async def test_an_application_is_mounted_on_it(job_queue: TestQueue) -> None:
    app = create_app(load_settings({}), queue=job_queue)
    transport = httpx.ASGITransport(app)
    async with (
        job_queue,
        app.running(),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        job = {"type": "mail.send", "payload": {"to": "ada@example.com"}}
        assert (await client.post("/jobs", json=job)).status_code == 201
    job_queue.assert_enqueued(ADA)


async def test_opening_twice_is_allowed_because_fixtures_and_the_tested_code_do(
    job_queue: TestQueue,
) -> None:
    await job_queue.open()
    await job_queue.open()
    await job_queue.enqueue(ADA)


def test_sync_serves_tests_without_an_event_loop(job_queue: TestQueue) -> None:
    stored = job_queue.sync.enqueue(ADA).job
    assert job_queue.sync.get(stored.id) == stored
    job_queue.assert_enqueued(MailSend, to="ada@example.com")
    (drained,) = job_queue.sync.drain()
    assert drained.job.result == {"sent": "ada@example.com"}
    assert job_queue.sync.result(stored.id) == {"sent": "ada@example.com"}


async def test_code_in_threads_and_on_the_loop_can_use_it_at_the_same_time(
    job_queue: TestQueue,
) -> None:
    """Each may wait for the writer while the other has it."""

    def enqueue_in_thread() -> None:
        for _ in range(20):
            job_queue.sync.enqueue(ADA)

    async def enqueue_on_loop() -> None:
        for _ in range(20):
            await job_queue.enqueue(BOB)

    async with asyncio.timeout(20):
        await asyncio.gather(
            *(asyncio.to_thread(enqueue_in_thread) for _ in range(3)),
            *(enqueue_on_loop() for _ in range(3)),
        )
    assert len(job_queue.jobs(MailSend, to="ada@example.com")) == 60
    assert len(job_queue.jobs(MailSend, to="bob@example.com")) == 60


def test_code_on_several_event_loops_can_use_it_in_turn(job_queue: TestQueue) -> None:
    """A web framework's test client may start an event loop for each request."""

    async def enqueue() -> None:
        await asyncio.gather(*(job_queue.enqueue(ADA) for _ in range(3)))
        await job_queue.list()

    for _ in range(3):
        asyncio.run(enqueue())
    assert len(job_queue.sync.drain()) == 9


async def test_a_worker_can_run_on_it(job_queue: TestQueue) -> None:
    async with Worker(job_queue, types=["mail.send"], concurrency=1).running():
        stored = (await job_queue.enqueue(ADA)).job
        with job_queue.events.subscribe(job_id=stored.id) as events:
            async with asyncio.timeout(10):
                while (await job_queue.get(stored.id)).status is not JobStatus.SUCCEEDED:
                    await anext(events)


# Results


async def test_result_runs_the_due_jobs(job_queue: TestQueue) -> None:
    stored = (await job_queue.enqueue(ADA)).job
    assert await job_queue.result(stored.id) == {"sent": "ada@example.com"}


async def test_result_of_a_failed_job_raises_as_in_production(job_queue: TestQueue) -> None:
    stored = (await job_queue.enqueue(Do(what="fail"), job_type="do.async")).job
    with pytest.raises(JobFailed):
        await job_queue.result(stored.id)


async def test_result_does_not_wait_for_what_cannot_come(job_queue: TestQueue) -> None:
    later = (await job_queue.enqueue(ADA, schedule_at=job_queue.now + timedelta(hours=1))).job
    with pytest.raises(DrainFailed, match="it is queued for "):
        await job_queue.result(later.id)
    with pytest.raises(TimeoutError):
        await job_queue.result(later.id, timeout=5)


# Asserting


async def test_assert_enqueued_returns_the_job_whose_fields_are_equal(job_queue: TestQueue) -> None:
    await job_queue.enqueue(BOB)
    stored = (await job_queue.enqueue(MailSend(to="ada", sent_on=date(2030, 1, 31)))).job
    assert job_queue.assert_enqueued(MailSend, to="ada").id == stored.id
    assert job_queue.assert_enqueued(MailSend, sent_on=date(2030, 1, 31)).id == stored.id
    assert job_queue.assert_enqueued("mail.send", to="ada", reply_to=None).id == stored.id
    assert job_queue.assert_enqueued(mail_send, to="ada").id == stored.id
    assert job_queue.assert_enqueued(BOB).payload == {
        "to": "bob@example.com",
        "replyTo": None,
        "sentOn": None,
    }


class MailSendV1(Payload):
    address: str


class MailSendV2(Payload):
    to: list[str]


def test_jobs_of_an_older_payload_are_found_by_its_class() -> None:
    mail = JobType(name="mail.send", payload=MailSendV2, accepts=[MailSendV1])

    @mail.upgrade(MailSendV1)
    def from_v1(older: MailSendV1) -> MailSendV2:
        return MailSendV2(to=[older.address])

    with TestQueue([mail]) as queue:
        older = queue.sync.enqueue(MailSendV1(address="ada@example.com")).job
        newer = queue.sync.enqueue(MailSendV2(to=["eve@example.com"])).job
        assert queue.assert_enqueued(MailSendV1) == older
        assert queue.assert_enqueued(MailSendV1, address="ada@example.com") == older
        assert queue.assert_enqueued(MailSendV1(address="ada@example.com")) == older
        queue.assert_not_enqueued(MailSendV1, address="eve@example.com")
        # By the class of today, every job is one of today.
        assert queue.jobs(MailSendV2) == [older, newer]
        assert queue.assert_enqueued(MailSendV2, to=["ada@example.com"]) == older
        with pytest.raises(AssertionError) as failed:
            queue.assert_enqueued(MailSendV1, address="eve@example.com")
    lines = str(failed.value).splitlines()
    assert lines[1].endswith('address is "ada@example.com", expected "eve@example.com"')
    assert lines[2].endswith("the payload does not fit MailSendV1")


async def test_a_job_counts_as_enqueued_after_it_has_run(job_queue: TestQueue) -> None:
    await job_queue.enqueue(ADA)
    await job_queue.drain()
    assert job_queue.assert_enqueued(MailSend).status is JobStatus.SUCCEEDED
    with pytest.raises(AssertionError, match="Expected no job mail.send; found 1:"):
        job_queue.assert_not_enqueued(MailSend)


async def test_a_failed_assertion_says_per_job_what_differs(job_queue: TestQueue) -> None:
    bob = (await job_queue.enqueue(MailSend(to="bob", reply_to="eve"))).job
    await job_queue.enqueue(Count(number=1))
    with pytest.raises(AssertionError) as failed:
        job_queue.assert_enqueued(MailSend, to="ada", reply_to=None)
    assert str(failed.value) == (
        'Expected one job mail.send with to "ada", reply_to null; found none.\n'
        f'  mail.send {bob.id}, queued for {bob.next_run_at:%Y-%m-%d %H:%M:%S}: to is "bob",'
        ' expected "ada"; reply_to is "eve", expected null\n'
        "  Other jobs: count (1)"
    )


async def test_a_failed_assertion_on_an_empty_queue_says_so(job_queue: TestQueue) -> None:
    with pytest.raises(AssertionError, match="found none. No job was enqueued."):
        job_queue.assert_enqueued(MailSend)


async def test_several_jobs_are_not_one(job_queue: TestQueue) -> None:
    await job_queue.enqueue_many([ADA, ADA])
    with pytest.raises(AssertionError, match="found 2. `jobs` returns them all:\n  mail.send "):
        job_queue.assert_enqueued(MailSend, to="ada@example.com")
    assert len(job_queue.jobs(MailSend, to="ada@example.com")) == 2


async def test_jobs_are_in_the_order_of_enqueueing(job_queue: TestQueue) -> None:
    for payload in (ADA, BOB, ADA):
        await job_queue.enqueue(payload)
    names = [cast(Any, job.payload)["to"][:3] for job in job_queue.jobs(MailSend)]
    assert names == ["ada", "bob", "ada"]


def test_a_wrong_question_is_an_error_and_no_failed_assertion(job_queue: TestQueue) -> None:
    with pytest.raises(TypeError, match="MailSend has no field too. Did you mean to?"):
        job_queue.assert_not_enqueued(MailSend, too="ada")
    with pytest.raises(JobTypeNotFound, match="Did you mean mail.send"):
        job_queue.assert_not_enqueued("mail.sent")
    with (
        TestQueue([do_async]) as other,
        pytest.raises(DefinitionError, match="add its job type to the registry"),
    ):
        other.assert_not_enqueued(MailSend)
    with pytest.raises(TypeError, match="got 7"):
        job_queue.assert_enqueued(cast(Any, 7))
    with pytest.raises(TypeError, match="a payload has its own fields"):
        job_queue.assert_enqueued(ADA, to="bob")
    with pytest.raises(TypeError, match="fields need a job type"):
        job_queue.jobs(to="ada")


# The clock


async def test_a_scheduled_job_is_due_when_the_clock_is_advanced(job_queue: TestQueue) -> None:
    later = job_queue.now + timedelta(minutes=5)
    stored = (await job_queue.enqueue(ADA, schedule_at=later)).job
    assert await job_queue.drain() == []
    assert isinstance(await job_queue.waiting_reason(stored), ScheduledFor)
    job_queue.advance(minutes=4)
    assert await job_queue.drain() == []
    job_queue.advance(minutes=1)
    assert isinstance(await job_queue.waiting_reason(stored), NoWorkerSeen)
    assert len(await job_queue.drain()) == 1


async def test_the_clock_can_be_advanced_to_a_time(job_queue: TestQueue) -> None:
    later = datetime.now(UTC) + timedelta(days=400)
    await job_queue.enqueue(ADA, schedule_at=later)
    job_queue.advance_to(later)
    assert len(await job_queue.drain()) == 1
    job_queue.advance_to(later - timedelta(days=1))
    assert job_queue.now >= later


async def test_all_times_of_jobs_are_of_the_advanced_clock(job_queue: TestQueue) -> None:
    job_queue.advance(days=10)
    job = (await job_queue.enqueue(ADA)).job
    in_thread = job_queue.sync.enqueue(ADA).job
    await job_queue.drain()
    ran = await job_queue.get(job.id)
    for time in (job.created_at, in_thread.created_at, ran.started_at, ran.finished_at):
        assert time is not None
        assert timedelta(days=9) < time - datetime.now(UTC) < timedelta(days=11)


async def test_a_lease_expires_when_the_clock_is_advanced(job_queue: TestQueue) -> None:
    await job_queue.enqueue(ADA)
    await job_queue.lease(["mail.send"], "remote worker")
    assert await job_queue.drain() == []
    job_queue.advance(seconds=31)
    assert await job_queue.drain() == []
    assert job_queue.assert_enqueued(MailSend).error is not None
    assert [each.job.attempt for each in await job_queue.drain(skip_time=True)] == [2]


def test_the_clock_does_not_go_back(job_queue: TestQueue) -> None:
    with pytest.raises(ValueError, match="expected a time of zero or more; got -60 seconds"):
        job_queue.advance(minutes=-1)
    with pytest.raises(ValueError, match="expected a time with an offset from UTC"):
        job_queue.advance_to(datetime(2030, 1, 1))


# Sessions of the caller, on a database that has no table of the queue


@pytest.fixture
async def host() -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(
        "sqlite+aiosqlite://", poolclass=StaticPool, connect_args={"isolation_level": None}
    )
    # Savepoints of SQLite need an explicit BEGIN.
    event.listen(engine.sync_engine, "begin", lambda c: c.exec_driver_sql("BEGIN"))
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE shop_order (id INTEGER)"))
    yield engine
    await engine.dispose()


async def test_a_job_appears_when_the_session_commits(
    job_queue: TestQueue, host: AsyncEngine
) -> None:
    async with AsyncSession(host) as session:
        await session.execute(text("INSERT INTO shop_order VALUES (1)"))
        stored = (await job_queue.enqueue(ADA, session=session)).job
        job_queue.assert_not_enqueued(MailSend)
        with pytest.raises(AssertionError, match="a session that has not committed: 1"):
            job_queue.assert_enqueued(MailSend)
        await session.commit()
    assert job_queue.assert_enqueued(MailSend).id == stored.id
    assert len(await job_queue.drain()) == 1


async def test_a_job_never_appears_when_the_session_rolls_back(
    job_queue: TestQueue, host: AsyncEngine
) -> None:
    async with AsyncSession(host) as session:
        await job_queue.enqueue(ADA, session=session)
        await session.rollback()
        await session.execute(text("INSERT INTO shop_order VALUES (1)"))
        await session.commit()
    async with AsyncSession(host) as session:
        await job_queue.enqueue(BOB, session=session)
    job_queue.assert_not_enqueued(MailSend)


async def test_a_job_of_a_savepoint_shares_its_fate(
    job_queue: TestQueue, host: AsyncEngine
) -> None:
    async with AsyncSession(host) as session:
        undone = await session.begin_nested()
        await job_queue.enqueue(ADA, session=session)
        await undone.rollback()
        async with session.begin_nested():
            await job_queue.enqueue(BOB, session=session)
        job_queue.assert_not_enqueued(MailSend)
        await session.commit()
    job_queue.assert_enqueued(BOB)
    job_queue.assert_not_enqueued(ADA)


async def test_a_test_that_rolls_back_what_the_tested_code_commits_sees_its_jobs(
    job_queue: TestQueue, host: AsyncEngine
) -> None:
    async with host.connect() as connection:
        outer = await connection.begin()
        session = AsyncSession(connection, join_transaction_mode="create_savepoint")
        await job_queue.enqueue(ADA, session=session)
        await session.commit()
        job_queue.assert_enqueued(ADA)
        await session.close()
        await outer.rollback()


async def test_keys_count_within_a_session_and_before_it(
    job_queue: TestQueue, host: AsyncEngine
) -> None:
    before = (await job_queue.enqueue(BOB, idempotency_key="before")).job
    async with AsyncSession(host) as session:
        known = await job_queue.enqueue(BOB, idempotency_key="before", session=session)
        first = await job_queue.enqueue(ADA, idempotency_key="k", session=session)
        again = await job_queue.enqueue(ADA, idempotency_key="k", session=session)
        with pytest.raises(IdempotencyConflict):
            await job_queue.enqueue(BOB, idempotency_key="k", session=session)
        await session.commit()
    assert (known.deduplicated, known.job.id) == (True, before.id)
    assert (again.deduplicated, again.job.id) == (True, first.job.id)
    assert [job.id for job in job_queue.jobs()] == [before.id, first.job.id]


async def test_an_atomic_bulk_of_a_session_is_stored_whole_or_not_at_all(
    job_queue: TestQueue, host: AsyncEngine
) -> None:
    keyed = [job_queue.request(each, idempotency_key="k") for each in (ADA, BOB)]
    async with AsyncSession(host) as session:
        await job_queue.enqueue_many(keyed, atomic=True, session=session)
        await session.commit()
        assert job_queue.jobs() == []
        await job_queue.enqueue_many([ADA, BOB], atomic=True, session=session)
        await session.commit()
    assert len(job_queue.jobs()) == 2


def test_sync_takes_a_session_without_asyncio(job_queue: TestQueue) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with Session(engine) as session:
        job_queue.sync.enqueue(ADA, session=session)
        with pytest.raises(AssertionError, match="a session that has not committed: 1"):
            job_queue.assert_enqueued(ADA)
        session.commit()
        job_queue.sync.enqueue(BOB, session=session)
        session.rollback()
    engine.dispose()
    job_queue.assert_enqueued(ADA)
    job_queue.assert_not_enqueued(BOB)


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())

    async def use(queue: TestQueue) -> None:
        await queue.enqueue(ADA)
        await queue.drain()
        await queue.list()

    with TestQueue(REGISTRY) as queue:
        asyncio.run(use(queue))
        queue.sync.enqueue(ADA)
        queue.sync.drain()
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= before
