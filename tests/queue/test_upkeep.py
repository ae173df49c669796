"""Upkeep: finished jobs are deleted in time, queued ones never; lost leases end by themselves."""

from __future__ import annotations

import asyncio

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import upkeep
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.upkeep import maintain, prune_in_batches
from tests.conftest import advance, run_sql

DAY = 86_400
PING = EnqueueRequest("test.ping", {})


async def finish(queue: JobQueue, count: int, *, failed: bool = False) -> None:
    await queue.enqueue_many([PING] * count)
    while leases := await queue.lease(["test.ping"], "w", limit=100):
        error = JobError("broken", "It broke.")
        await asyncio.gather(
            *(
                queue.fail(lease.token, error, retryable=False)
                if failed
                else queue.complete(lease.token)
                for lease in leases
            )
        )


async def test_finished_jobs_are_deleted_in_batches_and_others_never(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "PRUNE_BATCH", 20)
    await finish(queue, 50)
    await advance(database_url, 8 * DAY)
    await finish(queue, 5)
    waiting = (await queue.enqueue(PING)).job

    assert await prune_in_batches(queue, JobStatus.SUCCEEDED, keep_days=7) == 50
    counts = (await queue.counts())["test.ping"]
    assert (counts.succeeded, counts.queued) == (5, 1)
    # Their attempts went with them.
    rows = await asyncio.to_thread(run_sql, database_url, "SELECT count(*) FROM job_attempt")
    assert rows == [(5,)]

    await advance(database_url, 1_000 * DAY)
    for status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
        await prune_in_batches(queue, status, keep_days=0)
    assert (await queue.get(waiting.id)).status is JobStatus.QUEUED


async def test_upkeep_prunes_by_each_setting_and_ends_lost_leases(
    queue: JobQueue, database_url: str
) -> None:
    await finish(queue, 3)
    await finish(queue, 2, failed=True)
    lost = (await queue.enqueue(PING)).job
    await queue.lease(["test.ping"], "w")
    await advance(database_url, 8 * DAY)

    stop = asyncio.Event()
    running = asyncio.create_task(
        maintain(queue, stop, keep_succeeded_days=7, keep_failed_days=90, every_seconds=0.05)
    )
    async with asyncio.timeout(10):
        while (await queue.counts())["test.ping"].succeeded:
            await asyncio.sleep(0.02)
        while (await queue.get(lost.id)).status is not JobStatus.QUEUED:
            await asyncio.sleep(0.02)
    stop.set()
    await running
    assert (await queue.counts())["test.ping"].failed == 2
    (attempt,) = (await queue.attempts([lost.id]))[lost.id]
    # A week is past its timeout as well.
    assert attempt.outcome == "timed_out"


async def test_a_pruned_jobs_idempotency_key_is_free_again(
    queue: JobQueue, database_url: str
) -> None:
    keyed = EnqueueRequest("test.ping", {}, idempotency_key="k")
    first = await queue.enqueue(keyed)
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.complete(lease.token)
    await advance(database_url, DAY)
    assert await prune_in_batches(queue, JobStatus.SUCCEEDED, keep_days=0.5) == 1
    again = await queue.enqueue(keyed)
    assert (again.deduplicated, again.job.id == first.job.id) == (False, False)


async def test_upkeep_deletes_old_events_however_many_there_are(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given more stored batches than one transaction deletes
    monkeypatch.setattr("job_registry_api.queue.upkeep.EVENT_BATCHES_PRUNED", 10)
    monkeypatch.setattr("job_registry_api.queue.sqlite.EVENT_BATCHES_PRUNED", 10)
    monkeypatch.setattr("job_registry_api.queue.postgresql.EVENT_BATCHES_PRUNED", 10)
    batch = "INSERT INTO job_event_batch (message, created_at) VALUES ('{}', '2026-01-01')"
    await asyncio.to_thread(run_sql, database_url, *[batch] * 35)

    await upkeep.tidy_in_batches(queue, asyncio.Event())

    rows = await asyncio.to_thread(run_sql, database_url, "SELECT count(*) FROM job_event_batch")
    assert rows == [(0,)]


async def test_upkeep_merges_the_counts_however_many_there_are(
    fresh_postgresql_url: str, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given more rows of counts than one transaction merges
    monkeypatch.setattr("job_registry_api.queue.upkeep.COUNTS_FOLDED", 10)
    monkeypatch.setattr("job_registry_api.queue.postgresql.COUNTS_FOLDED", 10)
    count = "INSERT INTO job_count (type, status, jobs) VALUES ('test.ping', 'queued', 1)"
    await asyncio.to_thread(run_sql, fresh_postgresql_url, *[count] * 35)

    async with JobQueue.from_url(fresh_postgresql_url, registry, prepare=False) as queue:
        await upkeep.tidy_in_batches(queue, asyncio.Event())
        assert (await queue.counts())["test.ping"].queued == 35

    rows = await asyncio.to_thread(run_sql, fresh_postgresql_url, "SELECT jobs FROM job_count")
    assert rows == [(35,)]


async def test_versions_are_forgotten_a_month_after_their_workers_were_last_seen(
    queue: JobQueue, database_url: str
) -> None:
    await queue.show_worker(["test.ping", "test.pong"])
    await advance(database_url, 29 * DAY)
    await queue.tidy()
    assert len(await queue.versions("test.ping")) == 1
    fingerprint = queue.registry["test.ping"].fingerprint
    await queue._store.see_worker([], [("test.ping", fingerprint)])
    await advance(database_url, 2 * DAY)
    await queue.tidy()
    assert len(await queue.versions("test.ping")) == 1
    assert await queue.versions("test.pong") == []


async def test_pruning_ends_with_the_transaction_that_is_under_way_when_the_process_stops(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "PRUNE_BATCH", 5)
    await finish(queue, 30)
    stop = asyncio.Event()
    stop.set()
    assert await prune_in_batches(queue, JobStatus.SUCCEEDED, keep_days=0, stop=stop) == 5
