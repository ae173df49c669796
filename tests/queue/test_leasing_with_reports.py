"""A busy worker leases its next jobs together with the reports of those that have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue.claiming import BusyWorker, Lease
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import LeaseLost, QueueUnavailable
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue

PING = EnqueueRequest("test.ping", {})
LIMITED = EnqueueRequest("test.limited", {})


class Full:
    """A worker whose slots are all in use. It keeps the leases that it gets."""

    def __init__(self, *types: str, slots: int = 1) -> None:
        self.leases: list[Lease] = []
        self.worker = BusyWorker(
            types, "full", lambda reported: min(len(reported), slots), self.take
        )

    def take(self, leases: Sequence[Lease]) -> None:
        self.leases += leases


async def leased(queue: JobQueue, job_type: str, limit: int = 1) -> list[Lease]:
    return await queue.lease([job_type], "first", limit=limit)


async def test_a_report_brings_the_next_job(queue: JobQueue) -> None:
    for _ in range(3):
        await queue.enqueue(PING)
    (first,) = await leased(queue, "test.ping")
    full = Full("test.ping")

    with queue.leasing_with_reports(full.worker):
        await queue.succeed(first.token, {"done": 1})

    (second,) = full.leases
    assert (await queue.get(first.job.id)).status is JobStatus.SUCCEEDED
    assert (await queue.get(first.job.id)).result == {"done": 1}
    now = await queue.get(second.job.id)
    assert (now.status, now.attempt, now.worker_id) == (JobStatus.RUNNING, 1, "full")
    # The lease is one like any other.
    await queue.succeed(second.token)
    assert (await queue.get(second.job.id)).status is JobStatus.SUCCEEDED


async def test_no_more_jobs_are_leased_than_are_wanted(queue: JobQueue) -> None:
    for _ in range(8):
        await queue.enqueue(PING)
    ended = await leased(queue, "test.ping", 4)
    full = Full("test.ping", slots=2)
    with queue.leasing_with_reports(full.worker):
        await asyncio.gather(*(queue.succeed(lease.token) for lease in ended))
    assert len(full.leases) == 2


async def test_a_worker_that_has_left_gets_no_leases(queue: JobQueue) -> None:
    await queue.enqueue_many([PING, PING])
    (first,) = await leased(queue, "test.ping")
    full = Full("test.ping")
    with queue.leasing_with_reports(full.worker):
        pass
    await queue.succeed(first.token)
    assert full.leases == []


async def test_a_late_report_is_refused_though_it_brings_a_job(queue: JobQueue) -> None:
    await queue.enqueue_many([PING, PING])
    (first,) = await leased(queue, "test.ping")
    await queue.release(first.token)
    full = Full("test.ping")
    with queue.leasing_with_reports(full.worker), pytest.raises(LeaseLost):
        await queue.succeed(first.token)
    assert len(full.leases) == 1


async def test_the_place_that_a_report_frees_goes_to_the_next_job_of_the_type(
    queue: JobQueue,
) -> None:
    await queue.enqueue_many([LIMITED] * 5)
    running = await leased(queue, "test.limited", 5)
    assert len(running) == 2
    full = Full("test.limited", slots=5)
    with queue.leasing_with_reports(full.worker):
        await queue.succeed(running[0].token)
    assert len(full.leases) == 1
    assert await leased(queue, "test.limited", 5) == []


async def test_workers_that_lease_with_their_reports_never_exceed_a_limit(
    queue: JobQueue, database_url: str, registry: JobRegistry
) -> None:
    # Given two processes with four workers each, for a type of which two may run at once
    database = open_database(database_url)
    other = JobQueue(registry, database)
    jobs = [(await queue.enqueue(LIMITED)).job for _ in range(60)]

    async def work(queue: JobQueue) -> None:
        full = Full("test.limited")
        with ExitStack() as stack:
            stack.enter_context(queue.leasing_with_reports(full.worker))
            async with asyncio.timeout(60):
                while (await queue.counts())["test.limited"].succeeded < len(jobs):
                    full.leases += await leased(queue, "test.limited")
                    while full.leases:
                        await queue.succeed(full.leases.pop().token)

    # When they run all jobs
    await asyncio.gather(*(work(each) for each in (queue, other) for _ in range(4)))
    await database.close()

    # I expect each to have run once, and never three at once
    attempts = await queue.attempts([job.id for job in jobs])
    changes = []
    for job in jobs:
        (attempt,) = attempts[job.id]
        assert attempt.finished_at is not None
        changes += [(attempt.finished_at, -1), (attempt.started_at, 1)]
    running = 0
    for _, change in sorted(changes):
        running += change
        assert running <= 2


async def test_a_claim_that_fails_does_not_delay_a_report(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise QueueUnavailable("the type is locked", "busy")

    monkeypatch.setattr(queue._store, "succeed_and_claim", fail)
    await queue.enqueue_many([PING, PING])
    (first,) = await leased(queue, "test.ping")
    full = Full("test.ping")
    with queue.leasing_with_reports(full.worker):
        await queue.succeed(first.token)
    assert (await queue.get(first.job.id)).status is JobStatus.SUCCEEDED
    assert full.leases == []
