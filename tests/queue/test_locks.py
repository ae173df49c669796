"""What others hold locked in PostgreSQL delays what needs it, and nothing else.

SQLite has one writer at a time and one lock for all, so these are about PostgreSQL alone.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.queue.claiming import BusyWorker, Lease
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.models import JobError, JobRecord, JobStatus
from job_registry_api.queue.postgresql_database import PostgreSQLDatabase
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import Renewed
from tests.conftest import advance, async_url, run_sql
from tests.queue.race_jobs import ONLY, queues
from tests.queue.test_races import complete_all, fill, locked

PROMPT_SECONDS = 1.5
"""What nothing holds up takes some milliseconds; the machine of the tests does other work too."""

BROKEN = JobError("broken", "It broke.")


def locked_job(url: str, job: JobRecord) -> AbstractAsyncContextManager[None]:
    """Another transaction that holds the job's row."""
    return locked(url, f"SELECT id FROM job WHERE id = '{job.id}' FOR UPDATE")


@asynccontextmanager
async def two_queues_and_a_session(
    url: str,
) -> AsyncIterator[tuple[JobQueue, JobQueue, AsyncSession]]:
    """The caller's queue with its session, and another queue. The session is closed at the end."""
    engine = create_async_engine(async_url(url))
    async with queues(url, 2) as (caller, other), AsyncSession(engine) as session:
        yield caller, other, session
    await engine.dispose()


async def test_a_callers_open_transaction_that_holds_a_key_stops_no_other_enqueue(
    fresh_postgresql_url: str,
) -> None:
    held = EnqueueRequest("race.free", {}, idempotency_key="held")
    async with two_queues_and_a_session(fresh_postgresql_url) as (caller, other, session):
        first = await caller.enqueue(held, session=session)
        # This one has to wait for the caller's decision. Those behind it need not.
        same_key = asyncio.create_task(other.enqueue(held))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        async with asyncio.timeout(20):
            stored = await asyncio.gather(
                *(
                    other.enqueue(
                        EnqueueRequest("race.free", {}, idempotency_key=f"k{n}" if n % 2 else None)
                    )
                    for n in range(20)
                )
            )
        assert time.monotonic() - started < PROMPT_SECONDS
        assert len({each.job.id for each in stored}) == 20
        assert not same_key.done()
        await session.commit()
        async with asyncio.timeout(10):
            answered = await same_key
        assert (answered.deduplicated, answered.job.id) == (True, first.job.id)


async def test_a_bulk_that_waits_for_a_key_stops_no_other_enqueue(
    fresh_postgresql_url: str,
) -> None:
    held = EnqueueRequest("race.free", {}, idempotency_key="held")
    async with two_queues_and_a_session(fresh_postgresql_url) as (caller, other, session):
        await caller.enqueue(held, session=session)
        bulk = asyncio.create_task(other.enqueue_many([held, EnqueueRequest("race.free", {})]))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        async with asyncio.timeout(20):
            await asyncio.gather(
                *(other.enqueue(EnqueueRequest("race.free", {})) for _ in range(20))
            )
        assert time.monotonic() - started < PROMPT_SECONDS
        await session.rollback()
        async with asyncio.timeout(10):
            results = await bulk
        # The caller's job never was: the bulk's own has the key.
        assert [isinstance(each, Enqueued) and each.deduplicated for each in results] == [
            False, False,
        ]  # fmt: skip


async def test_a_bulk_that_cannot_get_a_key_stores_no_job_that_would_be_stored_again(
    fresh_postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, free = (EnqueueRequest("race.free", {}, idempotency_key=key) for key in ("held", "free"))
    bulk = [EnqueueRequest("race.free", {}), held, free]

    async def busy(*_arguments: object) -> None:
        raise QueueUnavailable("another transaction holds the idempotency key", "busy")

    async with two_queues_and_a_session(fresh_postgresql_url) as (caller, other, session):
        await caller.enqueue(held, session=session)
        with monkeypatch.context() as impatient:
            impatient.setattr(other._database, "patiently_in", busy)
            with pytest.raises(QueueUnavailable):
                await other.enqueue_many(bulk)
        await session.rollback()
        results = await other.enqueue_many(bulk)
        assert [isinstance(each, Enqueued) and each.deduplicated for each in results] == [
            False, False, True,
        ]  # fmt: skip
        assert len((await other.list()).jobs) == 3


async def test_a_bulk_that_waits_for_its_first_key_holds_none_of_the_others(
    fresh_postgresql_url: str,
) -> None:
    first, second, third = [
        EnqueueRequest("race.free", {}, idempotency_key=key) for key in ("a", "b", "c")
    ]
    async with two_queues_and_a_session(fresh_postgresql_url) as (caller, other, session):
        await caller.enqueue(first, session=session)
        bulk = asyncio.create_task(other.enqueue_many([third, second, first], atomic=True))
        await asyncio.sleep(0.2)
        async with asyncio.timeout(PROMPT_SECONDS):
            for request in (second, third):
                assert not (await caller.enqueue(request)).deduplicated
        assert not bulk.done()
        await session.rollback()
        async with asyncio.timeout(10):
            results = await bulk
        assert [isinstance(each, Enqueued) and each.deduplicated for each in results] == [
            True, True, False,
        ]  # fmt: skip


async def test_who_needs_a_key_of_a_bulk_that_waits_for_another_stops_nobody_else(
    fresh_postgresql_url: str,
) -> None:
    first, second, free = [
        EnqueueRequest("race.free", {}, idempotency_key=key) for key in ("a", "b", "free")
    ]
    async with two_queues_and_a_session(fresh_postgresql_url) as (caller, other, session):
        await caller.enqueue(second, session=session)
        bulk = asyncio.create_task(other.enqueue_many([first, second], atomic=True))
        await asyncio.sleep(0.2)
        # Together, so that they are stored in one group.
        waiting, prompt = [asyncio.create_task(caller.enqueue(each)) for each in (first, free)]
        async with asyncio.timeout(PROMPT_SECONDS):
            await prompt
        assert not waiting.done()
        await session.rollback()
        async with asyncio.timeout(10):
            assert (await waiting).deduplicated
            await bulk


@pytest.mark.cases(2)
@pytest.mark.parametrize("how", ["complete", "succeed", "fail", "release", "snooze", "park"])
async def test_a_locked_running_job_stops_nobody_elses_report(
    fresh_postgresql_url: str, how: str
) -> None:
    async def report(queue: JobQueue, token: str) -> object:
        match how:
            case "complete":
                return await queue.complete(token)
            case "succeed":
                await queue.succeed(token)
                return None
            case "park":
                return await queue.park(token, "1" * 64, BROKEN)
            case "fail":
                return await queue.fail(token, BROKEN)
            case "release":
                return await queue.release(token)
        return await queue.snooze(token, 1)

    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 10)
        leases = await queue.lease(["race.free"], "w", limit=10)
        held, rest = leases[4], leases[:4] + leases[5:]
        async with locked_job(fresh_postgresql_url, held.job):
            started = time.monotonic()
            # All at once, so that they come together in one group.
            reports = [asyncio.create_task(report(queue, each.token)) for each in leases]
            waiting = reports.pop(4)
            async with asyncio.timeout(20):
                await asyncio.gather(*reports)
            assert time.monotonic() - started < PROMPT_SECONDS
            assert not waiting.done()
            started = time.monotonic()
            await fill(queue, "race.free", 1)
            (late,) = await queue.lease(["race.free"], "w")
            await report(queue, late.token)
            assert time.monotonic() - started < PROMPT_SECONDS
        async with asyncio.timeout(10):
            await waiting
        for lease in rest:
            assert (await queue.get(lease.job.id)).status is not JobStatus.RUNNING


async def test_a_locked_running_job_stops_nobody_elses_heartbeat_or_cancellation(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 3)
        held, beating, cancelled = await queue.lease(["race.free"], "w", limit=3)
        async with locked_job(fresh_postgresql_url, held.job):
            waiting = asyncio.create_task(queue.heartbeat(held.token))
            await asyncio.sleep(0.1)
            async with asyncio.timeout(PROMPT_SECONDS):
                await queue.heartbeat(beating.token, {"at": 1})
                await queue.cancel(cancelled.job.id)
        async with asyncio.timeout(10):
            assert (await waiting).job.id == held.job.id


async def test_a_renewal_of_several_leaves_out_a_locked_job_and_says_so(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 2)
        held, beating = await queue.lease(["race.free"], "w", limit=2)
        for cancelled in (False, True):
            if cancelled:
                await queue.cancel(held.job.id)
            async with locked_job(fresh_postgresql_url, held.job):
                async with asyncio.timeout(PROMPT_SECONDS):
                    answers = await queue.renew([Renewal(held.token), Renewal(beating.token)])
            busy, renewed = answers
            assert isinstance(busy, Renewed)
            assert isinstance(renewed, Renewed)
            assert (busy.renewed, renewed.renewed) == (False, True)
            assert (busy.cancel_requested, renewed.cancel_requested) == (cancelled, False)
            assert busy.expires_at == held.expires_at
            assert 30 < busy.seconds_left <= 60


@pytest.mark.parametrize("how", ["heartbeat", "renew"])
async def test_progress_that_a_lock_kept_from_being_stored_hides_no_later_progress(
    fresh_postgresql_url: str, how: str
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 1)
        (lease,) = await queue.lease(["race.free"], "w")
        async with locked_job(fresh_postgresql_url, lease.job):
            if how == "heartbeat":
                await queue.heartbeat(lease.token, {"at": 1})
            else:
                await queue.renew([Renewal(lease.token, b'{"at": 1}')])
        with queue.events.subscribe(job_id=lease.job.id) as events:
            await queue.heartbeat(lease.token, {"at": 2})
            async with asyncio.timeout(10):
                assert (await anext(events)).name == "job.progressed"
        assert (await queue.get(lease.job.id)).progress == {"at": 2}


async def test_leases_from_the_future_are_restarted_past_one_that_another_holds_locked(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 3)
        held, *rest = await queue.lease(["race.free"], "w", limit=3)
        await advance(fresh_postgresql_url, -3_600)
        async with locked_job(fresh_postgresql_url, held.job):
            async with asyncio.timeout(PROMPT_SECONDS):
                await queue.recover()
        await advance(fresh_postgresql_url, 31)
        recovered = await queue.recover()
        assert {job.id for job in recovered} == {lease.job.id for lease in rest}


@pytest.mark.cases(2)
@pytest.mark.parametrize("table", ["job", "job_parked"])
@pytest.mark.parametrize("how", ["lease", "unpark", "fail"])
async def test_parked_jobs_are_taken_past_one_that_another_holds_locked(
    fresh_postgresql_url: str, how: str, table: str
) -> None:
    async def take(queue: JobQueue) -> int:
        match how:
            case "lease":
                return len(await queue.lease(["race.free"], "w", limit=9))
            case "unpark":
                return await queue.unpark(["race.free"])
        return await queue.fail_parked(parked_days=7, jobs=9)

    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 3)
        leases = await queue.lease(["race.free"], "w", limit=3)
        for lease in leases:
            await queue.park(lease.token, "1" * 64, BROKEN)
        await advance(fresh_postgresql_url, 8 * 86_400)
        column = "id" if table == "job" else "job_id"
        lock = f"SELECT 1 FROM {table} WHERE {column} = '{leases[1].job.id}' FOR UPDATE"
        async with locked(fresh_postgresql_url, lock), asyncio.timeout(PROMPT_SECONDS):
            assert await take(queue) == 2
        assert await take(queue) == 1


async def test_recovery_passes_over_a_lost_job_that_another_holds_locked(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 3)
        held, *rest = await queue.lease(["race.free"], "w", limit=3)
        await advance(fresh_postgresql_url, 31)
        async with locked_job(fresh_postgresql_url, held.job):
            async with asyncio.timeout(PROMPT_SECONDS):
                recovered = await queue.recover()
            assert {job.id for job in recovered} == {lease.job.id for lease in rest}
            # Nor does it stop claims, which recover first.
            await fill(queue, "race.other", 1)
            async with asyncio.timeout(PROMPT_SECONDS):
                assert len(await queue.lease(["race.other"], "w")) == 1
        assert {job.id for job in await queue.recover()} == {held.job.id}


async def test_pruning_passes_over_a_job_that_another_holds_locked(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 10)
        leases = await queue.lease(["race.free"], "w", limit=10)
        await complete_all(queue, leases)
        async with locked_job(fresh_postgresql_url, leases[0].job):
            async with asyncio.timeout(PROMPT_SECONDS):
                pruned = await queue.prune(JobStatus.SUCCEEDED, keep_seconds=0, jobs=100)
            assert pruned == 9
            async with asyncio.timeout(PROMPT_SECONDS):
                await queue.tidy()
        assert await queue.prune(JobStatus.SUCCEEDED, keep_seconds=0, jobs=100) == 1


async def test_counts_are_folded_past_rows_that_another_is_folding(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        for _ in range(5):
            await fill(queue, "race.free", 2)
        lock = "SELECT id FROM job_count ORDER BY id LIMIT 2 FOR UPDATE"
        async with locked(fresh_postgresql_url, lock), asyncio.timeout(PROMPT_SECONDS):
            await queue.tidy()
        assert (await queue.counts())["race.free"].queued == 10
        rows = await asyncio.to_thread(
            run_sql, fresh_postgresql_url, "SELECT jobs FROM job_count ORDER BY jobs"
        )
        # The two that were locked, and the sum of the others.
        assert rows == [(2,), (2,), (6,)]


async def test_events_are_deleted_past_those_that_another_is_deleting(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        for _ in range(3):
            # The events of a large bulk do not fit in a notification, so they are stored.
            await fill(queue, "race.free", 500)
        old = "UPDATE job_event_batch SET created_at = created_at - interval '1 hour'"
        await asyncio.to_thread(run_sql, fresh_postgresql_url, old)
        lock = "SELECT id FROM job_event_batch ORDER BY id LIMIT 1 FOR UPDATE"
        async with locked(fresh_postgresql_url, lock), asyncio.timeout(PROMPT_SECONDS):
            await queue.tidy()
        rows = await asyncio.to_thread(
            run_sql, fresh_postgresql_url, "SELECT count(*) FROM job_event_batch"
        )
        assert rows == [(1,)]


async def test_a_limited_type_whose_row_is_locked_stops_no_claim_of_other_types(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await queue.lease(["race.free", "race.only_0"], "w")
        await fill(queue, "race.free", 1)
        await fill(queue, "race.only_0", 1)
        lock = "SELECT type FROM job_type_state WHERE type = 'race.only_0' FOR UPDATE"
        async with locked(fresh_postgresql_url, lock):
            # Its own jobs have to wait; how long a claim waits for it is bounded.
            async with asyncio.timeout(5):
                leases = await queue.lease(["race.free", "race.only_0"], "w", limit=2)
            leased = {lease.job.type for lease in leases}
            assert "race.free" in leased
        if "race.only_0" not in leased:
            (lease,) = await queue.lease(["race.only_0"], "w", wait_seconds=5)
            assert lease.job.type == "race.only_0"


async def test_a_claim_that_waits_for_a_limited_type_holds_up_none_that_comes_later(
    fresh_postgresql_url: str,
) -> None:
    first, *later = [job_type.name for job_type in ONLY]
    async with queues(fresh_postgresql_url, 2) as (queue, other):
        for name in (first, *later):
            await fill(queue, name, 1)
        claim = (
            f"""SELECT * FROM job_claim('[{{"type": "{first}", "limit": 1}}]',"""
            " 1, 'x', 30, 'p', false, NULL, NULL, NULL)"
        )
        async with locked(fresh_postgresql_url, claim):
            # Whatever the order in which it names them
            waiting = asyncio.create_task(queue.lease([*reversed(later), first], "w", limit=9))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            for name in later:
                async with asyncio.timeout(PROMPT_SECONDS):
                    assert len(await other.lease([name], "w")) == 1
        # The other claim was undone.
        async with asyncio.timeout(10):
            assert [lease.job.type for lease in await waiting] == [first]


@pytest.mark.parametrize("table", ["job_type_state", "job_type_version"])
async def test_workers_are_recorded_in_one_order_so_that_they_cannot_deadlock(
    fresh_postgresql_url: str, table: str
) -> None:
    names = ["race.other", "race.only_0", "race.free"]
    versions = [(name, "1" * 64) for name in names]
    async with queues(fresh_postgresql_url, 2) as (queue, other):
        await queue._store.see_worker(names, versions)
        lock = f"SELECT 1 FROM {table} WHERE type = 'race.free' FOR UPDATE"
        async with locked(fresh_postgresql_url, lock):
            waiting = asyncio.create_task(queue._store.see_worker(names, versions))
            await asyncio.sleep(0.2)
            async with asyncio.timeout(PROMPT_SECONDS):
                await other._store.see_worker(
                    *((names[:2], []) if table == "job_type_state" else ([], versions[:2]))
                )
            assert not waiting.done()
        async with asyncio.timeout(10):
            await waiting


async def test_reports_do_not_wait_for_a_claim_of_a_limited_type_that_hangs(
    fresh_postgresql_url: str,
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        # Given a full worker of a limited type and of another, and due jobs of each
        types = ("race.free", "race.only_0")
        await fill(queue, "race.free", 4)
        await fill(queue, "race.only_0", 2)
        leases = await queue.lease(types, "w", limit=3)
        taken: list[Lease] = []
        full = BusyWorker(types, "w", len, taken.extend)
        # And a process that hangs in its claim of the limited type
        claim = (
            """SELECT * FROM job_claim('[{"type": "race.only_0", "limit": 1}]',"""
            " 1, 'x', 30, 'p', false, NULL, NULL, NULL)"
        )
        async with locked(fresh_postgresql_url, claim):
            with queue.leasing_with_reports(full):
                # When the worker reports one job after the other
                for lease in leases:
                    started = time.monotonic()
                    await queue.succeed(lease.token)
                    # I expect no report to wait, and no job to be leased before those of the
                    # limited type, which may have a higher priority
                    assert time.monotonic() - started < PROMPT_SECONDS
        assert taken == []
        # The worker, which has free slots now, claims for itself.
        assert len(await queue.lease(types, "w", limit=5)) == 3


async def test_no_lock_is_held_while_a_large_document_is_sent_however_small_it_is_stored(
    fresh_postgresql_url: str,
) -> None:
    """A client that has frozen would stop the answer, and with it the statement that holds."""
    payload = {"text": "a" * 200_000}
    database = PostgreSQLDatabase(fresh_postgresql_url)
    queue = JobQueue(JobRegistry([JobType(name="race.text", payload=Text)]), database)
    await queue.enqueue(EnqueueRequest("race.text", payload))
    claimed = await database.execute_at_once(
        """SELECT payload FROM job_claim('[{"type": "race.text"}]', 1, 'w', 30, 'p', false, NULL,"""
        " NULL, NULL)",
        {},
    )
    assert [row["payload"] for row in claimed] == [None]
    await queue.enqueue(EnqueueRequest("race.text", payload))
    (lease,) = await queue.lease(["race.text"], "w")
    assert lease.job.payload == payload
    await database.close()


async def test_a_client_that_does_not_read_the_answer_to_its_claim_holds_no_lock(
    fresh_postgresql_url: str,
) -> None:
    """Each document is small, and together they do not fit into the socket."""
    limited = JobType(name="race.text", payload=Text, policy=JobPolicy(concurrency_limit=1_000))
    payloads = [{"text": secrets.token_urlsafe(6_000)} for _ in range(105)]
    async with queues(fresh_postgresql_url, 2, JobRegistry([limited])) as (frozen, other):
        assert not await frozen.lease(["race.text"], "w", limit=100)  # The statement is prepared.
        await other.enqueue_many([EnqueueRequest("race.text", each) for each in payloads])
        assert isinstance(frozen._database, PostgreSQLDatabase)
        (pooled,) = frozen._database._spare
        connection: Any = pooled.driver_connection
        connection._socket_transport.pause_reading()
        claiming = asyncio.create_task(frozen.lease(["race.text"], "w", limit=100))
        await asyncio.sleep(0.3)
        async with asyncio.timeout(PROMPT_SECONDS):
            assert len(await other.lease(["race.text"], "x", limit=100)) == 5
        connection._socket_transport.resume_reading()
        leases = await claiming
        read = sorted(json.dumps(lease.job.payload) for lease in leases)
        assert len(set(read) & set(map(json.dumps, payloads))) == 100


@pytest.mark.parametrize("how", ["cancel", "retry"])
async def test_a_client_that_does_not_read_the_answer_to_its_change_holds_no_lock(
    fresh_postgresql_url: str, how: str
) -> None:
    async def change(queue: JobQueue, job: JobRecord) -> JobRecord:
        return await (queue.cancel(job.id) if how == "cancel" else queue.retry(job.id))

    registry = JobRegistry([JobType(name="race.text", payload=Text)], max_payload_bytes=1_000_000)
    # Stored compressed, and not; more than the buffers of a connection have room for
    for text in ("a" * 900_000, secrets.token_urlsafe(600_000)):
        async with queues(fresh_postgresql_url, 2, registry) as (frozen, other):
            small, large = [
                (await other.enqueue(EnqueueRequest("race.text", {"text": each}))).job
                for each in ("a", text)
            ]
            if how == "retry":
                await other.cancel(small.id)
                await other.cancel(large.id)
            await change(frozen, small)  # The statement is prepared.
            assert isinstance(frozen._database, PostgreSQLDatabase)
            (pooled,) = frozen._database._spare
            connection: Any = pooled.driver_connection
            connection._socket_transport.pause_reading()
            with frozen.events.subscribe(job_id=large.id) as events:
                changing = asyncio.create_task(change(frozen, large))
                await asyncio.sleep(0.3)
                lock = f"SELECT id FROM job WHERE id = '{large.id}' FOR UPDATE NOWAIT"
                await asyncio.to_thread(run_sql, fresh_postgresql_url, lock)
                connection._socket_transport.resume_reading()
                changed = await changing
                is_same = changed == await other.get(large.id)
                assert is_same
                assert (await anext(events)).job_id == large.id


@pytest.mark.parametrize("column", ["payload", "progress", "result", "error"])
async def test_statements_that_hold_locks_leave_out_documents_over_8_kb(
    fresh_postgresql_url: str, column: str
) -> None:
    database = open_database(fresh_postgresql_url)
    queue = JobQueue(JobRegistry([JobType(name="race.text", payload=Text)]), database)
    await queue.enqueue(EnqueueRequest("race.text", {"text": "a"}))
    await database.close()
    # So that a queued job may have each of them.
    unchecked = """DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT conname FROM pg_constraint
            WHERE conrelid = 'job'::regclass AND contype = 'c' LOOP
            EXECUTE format('ALTER TABLE job DROP CONSTRAINT %I', name);
        END LOOP; END $$"""
    small = "SELECT payload IS NULL FROM job_small((SELECT job FROM job))"
    # Stored compressed, and not.
    for text, is_left_out in (
        ("a" * 9_000, True), (secrets.token_urlsafe(6_600), True), ("a" * 7_000, False),
        (secrets.token_urlsafe(5_000), False),
    ):  # fmt: skip
        change = f"UPDATE job SET {column} = to_jsonb('{text}'::text)"
        rows = await asyncio.to_thread(run_sql, fresh_postgresql_url, unchecked, change, small)
        assert [tuple(row) for row in rows] == [(is_left_out,)]


@pytest.mark.parametrize("column", ["payload", "result", "error"])
async def test_a_claim_leaves_out_documents_over_8_kb(
    fresh_postgresql_url: str, column: str
) -> None:
    async with queues(fresh_postgresql_url, 1) as (queue,):
        for text, is_left_out in (
            ("a" * 9_000, True), (secrets.token_urlsafe(6_600), True), ("a" * 7_000, False),
            (secrets.token_urlsafe(5_000), False),
        ):  # fmt: skip
            await fill(queue, "race.free", 1)
            change = f"UPDATE job SET {column} = to_jsonb('{text}'::text) WHERE status = 'queued'"
            claim = (
                """SELECT payload IS NULL FROM job_claim('[{"type": "race.free"}]', 1, 'w', 30,"""
                " 'p', false, NULL, NULL, NULL)"
            )
            rows = await asyncio.to_thread(run_sql, fresh_postgresql_url, change, claim)
            assert [tuple(row) for row in rows] == [(is_left_out,)], len(text)


class Text(Payload):
    """A job of any size."""

    text: str
