"""An attempt that has timed out and still runs holds its place in its type's concurrency limit."""

from __future__ import annotations

import pytest

from job_registry_api.queue.errors import LeaseLost
from job_registry_api.queue.leasing import Lease
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.requests import EnqueueRequest
from job_registry_api.queue.service import ConcurrencyLimitReached, JobService, Renewal
from tests.conftest import advance

LIMITED = EnqueueRequest("test.limited", {})  # Two at once, for 60 seconds each.


async def lease(service: JobService, limit: int = 10) -> list[Lease]:
    return await service.lease(["test.limited"], "w", limit=limit)


@pytest.fixture
async def overrun(service: JobService, database_url: str) -> Lease:
    """One of two running jobs whose attempt has timed out and whose handler has not stopped."""
    for _ in range(4):
        await service.enqueue(LIMITED)
    first, second = await lease(service)
    await service.time_out(first.token, still_running=True)
    await service.complete(second.token)
    return first


async def test_its_place_is_taken_until_its_handler_ends(
    service: JobService, overrun: Lease
) -> None:
    (other,) = await lease(service)
    assert await lease(service) == []

    await service.settle([overrun.token])
    assert len(await lease(service)) == 1
    assert (await service.complete(other.token)).status is JobStatus.SUCCEEDED


async def test_its_worker_holds_the_place_for_as_long_as_it_renews(
    service: JobService, overrun: Lease, database_url: str
) -> None:
    for _ in range(3):
        await advance(database_url, 25)
        (answer,) = await service.renew([Renewal(overrun.token, ended=True)])
        assert isinstance(answer, LeaseLost)
        leased = await lease(service)
        assert len(leased) <= 1
        for each in leased:
            await service.complete(each.token)
    # A worker that has died renews nothing.
    await service.enqueue(LIMITED)
    await service.enqueue(LIMITED)
    await advance(database_url, 31)
    assert len(await lease(service)) == 2


async def test_it_is_seen(service: JobService, overrun: Lease) -> None:
    (attempt,) = (await service.attempts([overrun.job.id]))[overrun.job.id]
    assert (attempt.outcome, attempt.still_running) == ("timed_out", True)
    await lease(service)
    reasons = await service.waiting_reasons([await service.get(overrun.job.id)])
    waiting = [
        (await service.waiting_reason(job))
        for job in (await service.list_jobs()).jobs
        if job.status is JobStatus.QUEUED and job.attempt == 0
    ]
    assert waiting == [ConcurrencyLimitReached(limit=2, running=2)]
    assert len(reasons) == 1

    await service.settle([overrun.token])
    (attempt,) = (await service.attempts([overrun.job.id]))[overrun.job.id]
    assert not attempt.still_running


async def test_one_that_the_queue_itself_timed_out_keeps_the_place_of_a_worker_that_is_alive(
    service: JobService, database_url: str
) -> None:
    # Given two attempts whose leases are renewed until shortly before their timeout
    for _ in range(4):
        await service.enqueue(LIMITED)
    running = await lease(service)
    for _ in range(2):
        await advance(database_url, 28)
        await service.renew([Renewal(each.token) for each in running])

    # When the timeout passes and somebody claims, though no worker has said anything
    await advance(database_url, 5)
    leased = await lease(service)

    # I expect both attempts ended and both places taken, until the leases would have run out
    assert leased == []
    assert [job.status for job in (await service.list_jobs()).jobs].count(JobStatus.QUEUED) == 4
    await advance(database_url, 28)
    assert len(await lease(service)) == 2


async def test_a_dead_workers_attempts_hold_no_place(
    service: JobService, database_url: str
) -> None:
    for _ in range(4):
        await service.enqueue(LIMITED)
    await lease(service)
    await advance(database_url, 31)
    assert len(await lease(service)) == 2


async def test_a_waiting_poll_is_woken_when_the_handler_ends(
    service: JobService, overrun: Lease
) -> None:
    import asyncio

    await lease(service)
    waiting = asyncio.create_task(service.lease(["test.limited"], "w", wait_seconds=30))
    await asyncio.sleep(0.3)
    started = asyncio.get_running_loop().time()
    await service.settle([overrun.token])
    assert len(await waiting) == 1
    assert asyncio.get_running_loop().time() - started < 2.0


async def test_a_timeout_is_accepted_after_the_deadline_if_the_queue_has_not_ended_it(
    service: JobService, database_url: str
) -> None:
    job = (await service.enqueue(EnqueueRequest("test.ping", {}))).job
    (lease_,) = await service.lease(["test.ping"], "w")
    await advance(database_url, 61)
    timed_out = await service.time_out(lease_.token)
    assert (timed_out.id, timed_out.status) == (job.id, JobStatus.QUEUED)
    with pytest.raises(LeaseLost):
        await service.time_out(lease_.token)


async def test_a_timeout_is_refused_once_the_lease_is_lost_and_before_the_deadline(
    service: JobService, database_url: str
) -> None:
    await service.enqueue(EnqueueRequest("test.ping", {}))
    (lease_,) = await service.lease(["test.ping"], "w")
    await advance(database_url, 31)
    with pytest.raises(LeaseLost):
        await service.time_out(lease_.token)
