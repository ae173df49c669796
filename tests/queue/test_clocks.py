"""A clock that steps back hides no dead worker and no job that is due."""

from __future__ import annotations

import asyncio

from job_registry import EnqueueRequest
from job_registry_api.queue.models import JobStatus
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
