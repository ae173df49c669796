"""Leases that a worker does not know of, because the answer to its claim did not come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from job_registry import EnqueueRequest, JobContext, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api import Worker
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from tests.conftest import run_sql
from tests.proxy import Proxy

TIMEOUT_SECONDS = 0.8
LONGEST_SECONDS = 2.6
"""Twice the timeout, and a second: so long may a lease be on its way."""


class Nothing(Payload):
    """No fields."""


def once() -> JobType[Nothing]:
    """A job type whose jobs may be attempted once."""
    return JobType(name="once", payload=Nothing, policy=JobPolicy(max_attempts=1))


@asynccontextmanager
async def opened(url: str, job_type: JobType[Nothing]) -> AsyncIterator[JobQueue]:
    async with JobQueue.from_url(
        url, JobRegistry([job_type]), timeout_seconds=TIMEOUT_SECONDS, prepare=False
    ) as queue:
        yield queue


async def until(queue: JobQueue, job: JobRecord, status: JobStatus, *, seconds: float) -> JobRecord:
    """Wait until a job has a status."""
    async with asyncio.timeout(seconds):
        while (found := await queue.get(job.id)).status is not status:
            await asyncio.sleep(0.05)
    return found


async def test_a_job_whose_claim_arrives_after_an_outage_runs_with_its_only_attempt(
    fresh_postgresql_url: str, proxied: Proxy
) -> None:
    job_type, began = once(), asyncio.Event()

    @job_type.handler
    async def run(job: JobContext, payload: Nothing) -> None:
        began.set()
        await asyncio.sleep(0.02)

    async with (
        opened(fresh_postgresql_url, job_type) as direct,
        opened(proxied.url, job_type) as queue,
        Worker(queue, concurrency=1).running(),
    ):
        jobs = await direct.enqueue_many([EnqueueRequest("once", {})] * 50)
        await began.wait()
        # The worker leases each next job together with the report of the one before.
        await asyncio.sleep(0.3)
        proxied.stall()
        await asyncio.sleep(2 * TIMEOUT_SECONDS)
        proxied.resume()
        for each in jobs:
            assert isinstance(each, Enqueued)
            await until(direct, each.job, JobStatus.SUCCEEDED, seconds=20)


async def test_a_lease_is_released_once_its_answer_can_no_longer_come(
    fresh_postgresql_url: str, proxied: Proxy
) -> None:
    async with (
        opened(fresh_postgresql_url, once()) as direct,
        opened(proxied.url, once()) as queue,
    ):
        assert not await queue.lease(["once"], "w")  # The statement is prepared now.
        job = (await direct.enqueue(EnqueueRequest("once", {}))).job
        proxied.stall()
        with pytest.raises(QueueUnavailable):
            await queue.lease(["once"], "w")
        proxied.resume()
        await until(direct, job, JobStatus.RUNNING, seconds=5)
        begun = time.monotonic()
        await queue.release_unanswered("w", lambda _: False)
        assert (await direct.get(job.id)).status is JobStatus.RUNNING
        await asyncio.sleep(LONGEST_SECONDS)
        await queue.release_unanswered("another", lambda _: False)
        await queue.release_unanswered("w", lambda job_id: job_id == job.id)
        assert (await direct.get(job.id)).status is JobStatus.RUNNING
        await queue.release_unanswered("w", lambda _: False)
        found = await direct.get(job.id)
        assert time.monotonic() - begun < 10
    assert (found.status, found.attempt) == (JobStatus.QUEUED, 0)
    outcomes = "SELECT outcome FROM job_attempt"
    assert await asyncio.to_thread(run_sql, fresh_postgresql_url, outcomes) == [("released",)]


async def test_on_sqlite_a_lease_is_released_after_a_claim_has_failed(
    tmp_path: Path, sqlite_template: Path
) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(sqlite_template.read_bytes())
    async with opened(f"sqlite:///{path}", once()) as queue:
        await queue.enqueue(EnqueueRequest("once", {}))
        (lease,) = await queue.lease(["once"], "w")
        await asyncio.sleep(LONGEST_SECONDS)
        await queue.release_unanswered("w", lambda _: False)
        assert (await queue.get(lease.job.id)).status is JobStatus.RUNNING  # No claim has failed.
        path.rename(tmp_path / "away")
        with pytest.raises(QueueUnavailable):
            await queue.lease(["once"], "w")
        (tmp_path / "away").rename(path)
        await queue.release_unanswered("w", lambda _: False)
        assert (await queue.get(lease.job.id)).status is JobStatus.QUEUED
