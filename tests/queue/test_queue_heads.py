"""What a claim on PostgreSQL skips while a long transaction keeps dead entries alive."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.postgresql import SLOW_LOOKS, PostgreSQLStore, QueueHeads
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import Claim

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
