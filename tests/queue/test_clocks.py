"""A clock that steps back hides no dead worker and no job that is due."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import postgresql, sqlite
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.queue import JobQueue
from tests.conftest import advance

HOUR = 3_600


async def test_a_dead_worker_is_noticed_in_a_lease_after_the_clock_has_stepped_back(
    queue: JobQueue, database_url: str
) -> None:
    await queue.enqueue(EnqueueRequest("test.ping", {}))
    (lease,) = await queue.lease(["test.ping"], "dead")
    # Every stored time is an hour ahead of the clock now.
    await advance(database_url, -HOUR)

    assert await queue.recover() == []
    await advance(database_url, 31)
    (recovered,) = await queue.recover()
    assert (recovered.id, recovered.error and recovered.error.code) == (lease.job.id, "lost")


async def test_a_worker_that_is_alive_keeps_its_lease_when_the_clock_steps_back(
    queue: JobQueue, database_url: str
) -> None:
    await queue.enqueue(EnqueueRequest("test.ping", {}))
    (lease,) = await queue.lease(["test.ping"], "alive")
    await advance(database_url, -HOUR)
    await queue.recover()
    await queue.heartbeat(lease.token)
    await advance(database_url, 20)
    await queue.heartbeat(lease.token)
    assert (await queue.complete(lease.token)).status is JobStatus.SUCCEEDED


async def test_whoever_claims_notices_that_the_clock_has_stepped_back(
    queue: JobQueue, database_url: str
) -> None:
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
    await queue.lease(["test.ping"], "dead")
    await advance(database_url, -HOUR)
    assert await queue.lease(["test.pong"], "w") == []
    await advance(database_url, 31)
    assert await queue.lease(["test.pong"], "w") == []
    assert (await queue.get(job.id)).status is JobStatus.QUEUED


async def test_jobs_that_were_due_at_once_are_due_when_the_clock_of_sqlite_has_stepped_back(
    tmp_path: Path, sqlite_template: Path, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "RECOVERY_BATCH", 1)
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    # Given a clock that is an hour ahead, by which the ids of jobs are made as well
    ahead, numbers = [float(HOUR)], itertools.count()
    database = open_database(f"sqlite:///{tmp_path / 'jobs.db'}", ahead=lambda: ahead[0])

    def new_id() -> uuid.UUID:
        milliseconds = int((time.time() + HOUR) * 1_000)
        return uuid.UUID(f"{milliseconds:012x}70008000{next(numbers):012x}")

    queue = JobQueue(registry, database, new_id=new_id)
    ping = EnqueueRequest("test.ping", {})

    async def enqueue(**options: Any) -> uuid.UUID:
        return (await queue.enqueue(ping._replace(**options))).job.id

    await enqueue()
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.park(lease.token, "1" * 64, JobError("payload_invalid", "It does not fit."))
    due = [await enqueue(), await enqueue()]
    await enqueue(schedule_at=datetime.now(UTC) + timedelta(hours=3))

    # When the clock steps back, and a client whose own clock is ahead stores a job
    ahead[0] = 0.0
    new = await queue.get(await enqueue())

    # I expect those that were due taken, some with each claim, and the time of no other changed
    taken = [
        {each.job.id for each in await queue.lease(["test.ping"], "w", limit=9, readable={})}
        for _ in range(4)
    ]
    assert [len(each) for each in taken] == [2, 1, 0, 0]
    assert taken[0] | taken[1] == {*due, new.id}
    await queue.recover()
    last = await queue.get(await enqueue(priority=1))
    await queue.recover()
    assert (await queue.get(last.id)).next_run_at == last.created_at
    await database.close()


async def test_jobs_that_were_due_at_once_are_due_when_the_clock_of_postgresql_has_stepped_back(
    fresh_postgresql_url: str, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "DUE_BATCH", 2)
    ping = EnqueueRequest("test.ping", {})
    async with JobQueue.from_url(fresh_postgresql_url, registry) as queue:
        await queue.recover()
        due = {(await queue.enqueue(ping)).job.id for _ in range(5)}
        later = datetime.now(UTC) + timedelta(hours=3)
        await queue.enqueue(ping._replace(schedule_at=later))

        # When the clock of the database, and of no other machine, steps back
        await advance(fresh_postgresql_url, -HOUR)
        assert isinstance(queue._store, postgresql.PostgreSQLStore)
        queue._store._clock.note(0.0, 0.0, datetime.now(UTC) + timedelta(hours=1))
        assert await queue.lease(["test.ping"], "w", limit=9) == []
        await queue.recover()

        # I expect those that were due taken, and no other
        assert {each.job.id for each in await queue.lease(["test.ping"], "w", limit=9)} == due


def test_a_clock_has_stepped_back_if_it_is_behind_by_more_than_an_answer_takes() -> None:
    noon = datetime(2030, 1, 1, 12, tzinfo=UTC)
    watch = postgresql.ClockWatch()
    for asked, answered, seconds in ((100, 100, 0), (110, 118, 10.5), (128, 128, 27)):
        watch.note(asked, answered, noon + timedelta(seconds=seconds))
        assert not watch.has_stepped_back
    watch.note(138, 138, noon + timedelta(seconds=35))
    assert watch.has_stepped_back


async def test_an_attempt_times_out_in_its_time_after_the_clock_has_stepped_back(
    queue: JobQueue, database_url: str
) -> None:
    await queue.enqueue(EnqueueRequest("test.ping", {}))
    (lease,) = await queue.lease(["test.ping"], "w")
    await advance(database_url, -HOUR)
    await queue.recover()
    for _ in range(2):
        await advance(database_url, 25)
        await queue.heartbeat(lease.token)
    await advance(database_url, 15)
    (recovered,) = await queue.recover()
    assert recovered.error is not None
    assert recovered.error.code == "timed_out"


async def test_a_process_with_shorter_leases_leaves_longer_ones_as_they_are(
    queue: JobQueue, database_url: str
) -> None:
    await queue.enqueue(EnqueueRequest("test.ping", {}))
    (lease,) = await queue.lease(["test.ping"], "w")
    async with JobQueue.from_url(database_url, queue.registry, lease_seconds=2) as other:
        await asyncio.sleep(0.6)
        assert await other.recover() == []
        # A lease that ends too late by the clock would have been started again.
        await advance(database_url, 29.6)
        (recovered,) = await other.recover()
    assert recovered.id == lease.job.id
