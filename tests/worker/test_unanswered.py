"""Leases that a worker does not know of, because the answer to its claim did not come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

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


class Long(Payload):
    """A payload that is read by a statement of its own."""

    text: str


def once() -> JobType[Nothing]:
    """A job type whose jobs may be attempted once."""
    return JobType(name="once", payload=Nothing, policy=JobPolicy(max_attempts=1))


@asynccontextmanager
async def opened(
    url: str,
    job_type: JobType[Any],
    *,
    lease_seconds: float = 30.0,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> AsyncIterator[JobQueue]:
    async with JobQueue.from_url(
        url,
        JobRegistry([job_type]),
        timeout_seconds=timeout_seconds,
        prepare=False,
        lease_seconds=lease_seconds,
    ) as queue:
        yield queue


async def until(queue: JobQueue, job: JobRecord, status: JobStatus, *, seconds: float) -> JobRecord:
    """Wait until a job has a status."""
    async with asyncio.timeout(seconds):
        while (found := await queue.get(job.id)).status is not status:
            await asyncio.sleep(0.05)
    return found


@pytest.mark.slow
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


async def frozen_while_a_claim_is_answered(proxied: Proxy, seconds: float) -> None:
    """Freeze this process between a claim that another task makes now, and its answer."""
    proxied.stall()
    await asyncio.sleep(0.1)
    proxied.resume()  # The proxy has a thread of its own.
    time.sleep(seconds)  # noqa: ASYNC251


async def test_an_answer_that_a_frozen_process_has_not_read_yet_keeps_its_lease(
    fresh_postgresql_url: str, proxied: Proxy
) -> None:
    job_type = JobType(name="once", payload=Long)
    async with (
        opened(fresh_postgresql_url, job_type) as direct,
        opened(proxied.url, job_type) as queue,
    ):
        assert not await queue.lease(["once"], "w")  # The statement is prepared now.
        proxied.stall()
        with pytest.raises(QueueUnavailable):
            await queue.lease(["once"], "w")
        proxied.resume()
        assert not await queue.lease(["once"], "w")
        await direct.enqueue(EnqueueRequest("once", {"text": "x" * 250_000}))
        leased: list[UUID] = []

        async def lease() -> None:
            leased.extend(each.job.id for each in await queue.lease(["once"], "w"))

        async def freeze() -> None:
            await frozen_while_a_claim_is_answered(proxied, LONGEST_SECONDS + 0.3)
            await queue.release_unanswered("w", lambda job_id: job_id in leased)

        await asyncio.gather(lease(), freeze(), return_exceptions=True)
    released = "SELECT id FROM job_attempt WHERE outcome = 'released'"
    assert not await asyncio.to_thread(run_sql, fresh_postgresql_url, released)


async def test_a_lease_that_is_over_when_its_process_thaws_is_not_given_out(
    proxied: Proxy,
) -> None:
    async with opened(proxied.url, once(), lease_seconds=1.5) as queue:
        assert not await queue.lease(["once"], "w")
        await queue.enqueue(EnqueueRequest("once", {}))
        answer = asyncio.create_task(queue.lease(["once"], "w"))
        await frozen_while_a_claim_is_answered(proxied, 1.7)
        with suppress(QueueUnavailable):
            for lease in await answer:
                await queue.heartbeat(lease.token)


async def test_a_lease_that_may_be_over_when_its_process_thaws_is_released(
    proxied: Proxy,
) -> None:
    """The answer is read two seconds after the claim, while the lease is half as old."""
    async with opened(proxied.url, once(), lease_seconds=2.0, timeout_seconds=5.0) as queue:
        assert not await queue.lease(["once"], "w")
        job = (await queue.enqueue(EnqueueRequest("once", {}))).job
        proxied.stall()
        answer = asyncio.create_task(queue.lease(["once"], "w"))
        await asyncio.sleep(1.1)
        proxied.resume()
        time.sleep(1.1)  # noqa: ASYNC251
        assert await answer == []
        found = await until(queue, job, JobStatus.QUEUED, seconds=5)
        assert found.attempt == 0


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
