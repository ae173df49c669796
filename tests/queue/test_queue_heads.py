"""What a claim on PostgreSQL skips while a long transaction keeps dead entries alive."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import cast

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.postgresql import SLOW_LOOKS, PostgreSQLStore, QueueHeads
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import Claim
from tests.conftest import advance, run_sql

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def slow_looks(heads: QueueHeads, at: float, count: int = SLOW_LOOKS, took: float = 0.1) -> float:
    for _ in range(count):
        heads.record_full_claim(at, at + took, rows=1)
        at += took
    return at


def test_a_claim_looks_at_everything_while_that_is_fast() -> None:
    heads = QueueHeads()
    heads.record_taken("mail", 50, NOON)
    for n in range(10):
        heads.record_full_claim(n, n + 0.01, rows=1)
    assert heads.known(10.0) == (None, None)


def test_a_single_slow_look_changes_nothing() -> None:
    heads = QueueHeads()
    end = slow_looks(heads, 0.0, SLOW_LOOKS - 1)
    heads.record_full_claim(end, end + 0.01, rows=1)
    end = slow_looks(heads, end, SLOW_LOOKS - 1)
    assert heads.known(end) == (None, None)


def test_a_claim_of_many_jobs_is_not_taken_for_a_slow_look() -> None:
    heads = QueueHeads()
    for n in range(10):
        heads.record_full_claim(n, n + 0.2, rows=99)
    assert heads.known(10.2) == (None, None)


def test_after_slow_looks_claims_begin_where_the_last_jobs_were_taken() -> None:
    heads = QueueHeads()
    heads.record_taken("mail", 50, NOON)
    heads.record_taken("mail", 50, NOON + timedelta(seconds=2))
    heads.record_taken("mail", 90, NOON)
    end = slow_looks(heads, 100.0)
    known, look_back = heads.known(end)
    assert known == {
        "mail": [(50, (NOON + timedelta(seconds=2)).isoformat()), (90, NOON.isoformat())]
    }
    # Leases are looked for from before the last full look on.
    assert look_back is not None
    assert look_back > end - (end - 0.1)


def test_everything_is_looked_at_again_for_a_twentieth_of_the_time_and_within_two_seconds() -> None:
    heads = QueueHeads()
    end = slow_looks(heads, 0.0, took=0.06)
    assert heads.known(end + 1.1)[0] is not None
    assert heads.known(end + 1.3)[0] is None
    end = slow_looks(heads, 100.0, took=5.0)
    assert heads.known(end + 1.9)[0] is not None
    assert heads.known(end + 2.1)[0] is None


async def test_a_level_is_that_of_a_due_job_of_the_type_from_its_head_on(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    async with JobQueue.from_url(fresh_postgresql_url, registry, lease_seconds=30) as queue:
        ping = EnqueueRequest("test.ping", {})
        for priority, at in ((90, NOON + timedelta(hours=1)), (50, NOON), (20, NOON)):
            await queue.enqueue(ping._replace(priority=priority, schedule_at=at))
        await queue.enqueue(ping._replace(type="test.pong", priority=70, schedule_at=NOON))
        # A job that runs is of no level.
        await queue.enqueue(ping._replace(priority=80))
        assert len(await queue.lease(["test.ping"], "w")) == 1

    async def level(below: int, due: datetime, heads: str = "NULL") -> int | None:
        """The level of an instant, and from heads on, each [priority, time]."""
        query = f"SELECT job_next_level('test.ping', {below}::smallint, '{due}', {heads})"
        ((found,),) = await asyncio.to_thread(run_sql, fresh_postgresql_url, query)
        return cast("int | None", found)

    soon, early = NOON + timedelta(seconds=1), NOON - timedelta(seconds=1)
    times = [f'[{priority}, "{NOON.isoformat()}"]' for priority in (90, 80, 70, 50, 20)]
    later = [each.replace("12:00:00", "12:00:01") for each in times]
    for heads in ("NULL", f"'[{', '.join(times)}]'"):
        assert await level(101, NOON, heads) == 50
        assert await level(101, NOON + timedelta(hours=1), heads) == 90
        assert await level(50, soon, heads) == 20
        assert await level(20, soon, heads) is None
        assert await level(101, early, heads) is None
    assert await level(101, soon, f"'[{', '.join(later)}]'") is None


async def test_leases_are_looked_for_as_far_back_as_the_last_full_claim(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    async with JobQueue.from_url(fresh_postgresql_url, registry, lease_seconds=30) as queue:
        await queue.enqueue(EnqueueRequest("test.ping", {}))
        await queue.lease(["test.ping"], "w")
        await advance(fresh_postgresql_url, 50)
    for look_back, found in ((10, 0), (600, 1)):
        recover = f"SELECT id FROM job_recover('p', false, 9, {look_back}, 30, NULL, NULL)"
        rows = await asyncio.to_thread(run_sql, fresh_postgresql_url, recover)
        assert len(rows) == found


async def test_a_claim_in_between_starts_at_the_last_taken_job_of_each_priority(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    database = open_database(fresh_postgresql_url)
    queue = JobQueue(registry, database)
    store = queue._store
    assert isinstance(store, PostgreSQLStore)
    # Given two jobs per priority that are due at the same time, of which one was taken
    ping = EnqueueRequest("test.ping", {})
    for priority in (50, 90):
        await queue.enqueue_many([ping._replace(priority=priority)] * 2)
        assert len(await queue.lease(["test.ping"], "w")) == 1
    # And two that the full claim has not seen: of another priority, and older
    await queue.enqueue(ping._replace(priority=70))
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    await queue.enqueue(ping._replace(priority=50, schedule_at=long_ago))
    # For a minute from now on, claims are those in between.
    slow_looks(store._heads, time.monotonic() + 60)

    claim = Claim(("test.ping",), {}, "w", 10, 30.0, thorough=False)
    claimed = await store.claim(claim)
    assert [each.job.priority for each in claimed.leased] == [90, 50]
    assert not claimed.everything
    # A claim that finds nothing there looks at everything, if its caller does not wait.
    assert not (await store.claim(claim)).leased
    last = (await store.claim(replace(claim, thorough=True))).leased
    assert [each.job.priority for each in last] == [70, 50]
    await database.close()


async def test_a_claim_that_looks_twice_returns_what_it_recovered_the_first_time(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    async with JobQueue.from_url(fresh_postgresql_url, registry, prepare=False) as queue:
        store = queue._store
        assert isinstance(store, PostgreSQLStore)
        lost = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
        await queue.lease(["test.ping"], "w")
        # For a minute from now on, claims do not look at everything.
        slow_looks(store._heads, time.monotonic() + 60)
        store._heads._looked_at = time.monotonic() - 600
        await advance(fresh_postgresql_url, 50)
        with queue.events.subscribe(job_id=lost.id) as events:
            assert await queue.lease(["test.ping"], "w") == []
            assert (await anext(events)).name == "job.retrying"
        ended = 'job_registry_attempts_total{outcome="lost",type="test.ping"} 1.0'
        assert ended in queue.metrics.text().decode()
