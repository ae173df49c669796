"""An attempt that has timed out and still runs holds its place in its type's concurrency limit."""

from __future__ import annotations

import secrets

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import LeaseLost
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import ConcurrencyLimitReached
from tests.conftest import advance

LIMITED = EnqueueRequest("test.limited", {})  # Two at once, for 60 seconds each.


async def lease(queue: JobQueue, limit: int = 10) -> list[Lease]:
    return await queue.lease(["test.limited"], "w", limit=limit)


@pytest.fixture
async def overrun(queue: JobQueue, database_url: str) -> Lease:
    """One of two running jobs whose attempt has timed out and whose handler has not stopped."""
    for _ in range(4):
        await queue.enqueue(LIMITED)
    first, second = await lease(queue)
    await queue.time_out(first.token, still_running=True)
    await queue.complete(second.token)
    return first


async def test_its_place_is_taken_until_its_handler_ends(queue: JobQueue, overrun: Lease) -> None:
    (other,) = await lease(queue)
    assert await lease(queue) == []

    await queue.settle([overrun.token])
    assert len(await lease(queue)) == 1
    assert (await queue.complete(other.token)).status is JobStatus.SUCCEEDED


async def test_its_worker_holds_the_place_for_as_long_as_it_renews(
    queue: JobQueue, overrun: Lease, database_url: str
) -> None:
    for _ in range(3):
        await advance(database_url, 25)
        (answer,) = await queue.renew([Renewal(overrun.token)])
        assert isinstance(answer, LeaseLost)
        leased = await lease(queue)
        assert len(leased) <= 1
        for each in leased:
            await queue.complete(each.token)
    # A worker that has died renews nothing.
    await queue.enqueue(LIMITED)
    await queue.enqueue(LIMITED)
    await advance(database_url, 31)
    assert len(await lease(queue)) == 2


@pytest.mark.parametrize("renewed", [False, True])
async def test_its_place_is_taken_for_the_length_of_its_own_lease(
    queue: JobQueue, database_url: str, registry: JobRegistry, renewed: bool
) -> None:
    database = open_database(database_url)
    longer = JobQueue(registry, database, lease_seconds=50)
    await queue.enqueue_many([LIMITED] * 4)
    (first,) = await lease(queue if renewed else longer, 1)
    if renewed:
        await longer.renew([Renewal(first.token)])
    await longer.time_out(first.token, still_running=True)
    await advance(database_url, 40)
    assert len(await lease(queue)) == 1
    await advance(database_url, 11)
    assert len(await lease(queue)) == 1
    await database.close()


async def test_a_renewal_takes_no_place_once_the_handler_has_ended(
    queue: JobQueue, overrun: Lease, database_url: str
) -> None:
    (completed,) = await lease(queue)
    await queue.complete(completed.token)
    await queue.settle([overrun.token])
    await queue.enqueue(LIMITED)
    answers = await queue.renew([Renewal(overrun.token), Renewal(completed.token)])
    assert all(isinstance(answer, LeaseLost) for answer in answers)
    assert len(await lease(queue)) == 2


async def test_a_token_with_another_secret_neither_frees_nor_keeps_its_place(
    queue: JobQueue, overrun: Lease, database_url: str
) -> None:
    forged = overrun.token[:32] + secrets.token_hex(16)
    await queue.settle([forged])
    (other,) = await lease(queue)
    assert await lease(queue) == []
    await queue.complete(other.token)

    await queue.enqueue(LIMITED)
    await advance(database_url, 20)
    await queue.renew([Renewal(forged)])
    await advance(database_url, 11)
    assert len(await lease(queue)) == 2


async def test_it_takes_no_place_of_another_type(queue: JobQueue) -> None:
    await queue.enqueue(EnqueueRequest("test.ping", {}))
    (other,) = await queue.lease(["test.ping"], "w")
    await queue.time_out(other.token, still_running=True)
    jobs = [(await queue.enqueue(LIMITED)).job for _ in range(3)]
    assert len(await lease(queue)) == 2
    assert await queue.waiting_reason(jobs[2]) == ConcurrencyLimitReached(limit=2, running=2)


async def test_it_is_seen(queue: JobQueue, overrun: Lease) -> None:
    (attempt,) = (await queue.attempts([overrun.job.id]))[overrun.job.id]
    assert (attempt.outcome, attempt.still_running) == ("timed_out", True)
    await lease(queue)
    reasons = await queue.waiting_reasons([await queue.get(overrun.job.id)])
    waiting = [
        (await queue.waiting_reason(job))
        for job in (await queue.list()).jobs
        if job.status is JobStatus.QUEUED and job.attempt == 0
    ]
    assert waiting == [ConcurrencyLimitReached(limit=2, running=2)]
    assert len(reasons) == 1

    await queue.settle([overrun.token])
    (attempt,) = (await queue.attempts([overrun.job.id]))[overrun.job.id]
    assert not attempt.still_running


async def test_it_is_not_seen_any_more_when_its_worker_has_died(
    queue: JobQueue, overrun: Lease, database_url: str
) -> None:
    await advance(database_url, 31)
    (attempt,) = (await queue.attempts([overrun.job.id]))[overrun.job.id]
    assert not attempt.still_running
    waiting = [job for job in (await queue.list()).jobs if job.attempt == 0]
    for job in waiting:
        assert not isinstance(await queue.waiting_reason(job), ConcurrencyLimitReached)


async def test_one_that_the_queue_itself_timed_out_keeps_the_place_of_a_worker_that_is_alive(
    queue: JobQueue, database_url: str
) -> None:
    # Given two attempts whose leases are renewed until shortly before their timeout
    for _ in range(4):
        await queue.enqueue(LIMITED)
    running = await lease(queue)
    for _ in range(2):
        await advance(database_url, 28)
        await queue.renew([Renewal(each.token) for each in running])

    # When the timeout passes and somebody claims, though no worker has said anything
    await advance(database_url, 5)
    leased = await lease(queue)

    # I expect both attempts ended and both places taken, until the leases would have run out
    assert leased == []
    assert [job.status for job in (await queue.list()).jobs].count(JobStatus.QUEUED) == 4
    await advance(database_url, 28)
    assert len(await lease(queue)) == 2


async def test_a_dead_workers_attempts_hold_no_place(queue: JobQueue, database_url: str) -> None:
    for _ in range(4):
        await queue.enqueue(LIMITED)
    await lease(queue)
    await advance(database_url, 31)
    assert len(await lease(queue)) == 2


async def test_a_waiting_poll_is_woken_when_the_handler_ends(
    queue: JobQueue, overrun: Lease
) -> None:
    import asyncio

    await lease(queue)
    waiting = asyncio.create_task(queue.lease(["test.limited"], "w", wait_seconds=30))
    await asyncio.sleep(0.3)
    started = asyncio.get_running_loop().time()
    await queue.settle([overrun.token])
    assert len(await waiting) == 1
    assert asyncio.get_running_loop().time() - started < 2.0


async def test_a_timeout_is_accepted_after_the_deadline_if_the_queue_has_not_ended_it(
    queue: JobQueue, database_url: str
) -> None:
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
    (lease_,) = await queue.lease(["test.ping"], "w")
    await advance(database_url, 61)
    timed_out = await queue.time_out(lease_.token, timeout_seconds=60)
    assert (timed_out.id, timed_out.status) == (job.id, JobStatus.QUEUED)
    assert timed_out.error is not None
    assert timed_out.error.message == "The attempt exceeded its timeoutSeconds of 60."
    with pytest.raises(LeaseLost):
        await queue.time_out(lease_.token)


async def test_a_timeout_is_refused_once_the_lease_is_lost_and_before_the_deadline(
    queue: JobQueue, database_url: str
) -> None:
    await queue.enqueue(EnqueueRequest("test.ping", {}))
    (lease_,) = await queue.lease(["test.ping"], "w")
    await advance(database_url, 31)
    with pytest.raises(LeaseLost):
        await queue.time_out(lease_.token)
