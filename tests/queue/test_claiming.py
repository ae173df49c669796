"""Waiting for a lease: as many claims as there are jobs, and nothing for callers that have gone."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import claiming
from job_registry_api.queue.claiming import Lease, _WaitingLine
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import Claim, Claimed
from tests.conftest import advance, run_sql

PING = EnqueueRequest("test.ping", {})


class Claims:
    """Counts the claims of a queue, and may hold one up."""

    def __init__(self, queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self._claim = queue._store.claim
        monkeypatch.setattr(queue._store, "claim", self.claim)

    async def claim(self, claim: Claim) -> Claimed:
        self.made += 1
        claimed = await self._claim(claim)
        self.entered.set()
        await self.go_on.wait()
        return claimed


@pytest.fixture
def claims(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> Claims:
    return Claims(queue, monkeypatch)


async def polls(queue: JobQueue, count: int, **options: Any) -> list[asyncio.Task[Any]]:
    waiting = [
        asyncio.create_task(
            queue.lease(["test.ping"], f"w{n}", **{"wait_seconds": 30.0, **options})
        )
        for n in range(count)
    ]
    await asyncio.sleep(0.2)
    return waiting


async def end(waiting: list[asyncio.Task[Any]]) -> None:
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_two_hundred_waiting_polls_make_a_claim_per_job_and_not_one_each(
    queue: JobQueue, claims: Claims
) -> None:
    waiting = await polls(queue, 200)
    idle = claims.made
    assert idle <= 5

    for _ in range(10):
        await queue.enqueue(PING)
    async with asyncio.timeout(5):
        while len([task for task in waiting if task.done()]) < 10:
            await asyncio.sleep(0.01)

    # A claim for each job, and at most one more after each that finds nothing left.
    assert claims.made - idle <= 25
    leased = [task.result()[0].job.id for task in waiting if task.done()]
    assert len(set(leased)) == 10
    await end([task for task in waiting if not task.done()])


async def test_those_who_wait_longest_are_served_first(queue: JobQueue) -> None:
    first = await polls(queue, 1)
    second = await polls(queue, 1)
    await queue.enqueue(PING)
    assert (await asyncio.wait_for(first[0], 5))[0].job.status is JobStatus.RUNNING
    assert not second[0].done()
    await end(second)


async def test_a_poll_that_waits_takes_a_job_without_a_noticeable_delay(
    queue: JobQueue,
) -> None:
    (waiting,) = await polls(queue, 1)
    started = asyncio.get_running_loop().time()
    await queue.enqueue(PING)
    await waiting
    assert asyncio.get_running_loop().time() - started < 1.0


async def test_a_job_leased_for_a_caller_that_was_cancelled_goes_to_the_next_at_once(
    queue: JobQueue, claims: Claims
) -> None:
    # Given a claim that has just leased a job for a caller
    job = (await queue.enqueue(PING)).job
    claims.go_on.clear()
    (waiting,) = await polls(queue, 1)
    await claims.entered.wait()

    # When the caller is cancelled before it gets the leases
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    claims.go_on.set()

    # I expect the job with another caller, and no attempt spent
    (lease,) = await queue.lease(["test.ping"], "other", wait_seconds=5)
    assert (lease.job.id, lease.job.attempt) == (job.id, 1)


async def test_a_wait_that_ends_during_a_claim_still_gets_what_was_leased_for_it(
    queue: JobQueue, claims: Claims
) -> None:
    await queue.enqueue(PING)
    claims.go_on.clear()
    stop = asyncio.Event()
    (waiting,) = await polls(queue, 1, stop=stop)
    await claims.entered.wait()
    stop.set()
    await asyncio.sleep(0.1)
    claims.go_on.set()
    assert len(await asyncio.wait_for(waiting, 5)) == 1


async def test_a_wait_that_ends_during_a_claim_that_finds_nothing_ends_with_nothing(
    queue: JobQueue, claims: Claims
) -> None:
    claims.go_on.clear()
    (waiting,) = await polls(queue, 1, wait_seconds=0.3)
    await claims.entered.wait()
    await asyncio.sleep(0.4)
    claims.go_on.set()
    assert await asyncio.wait_for(waiting, 5) == []


async def test_cancelled_waits_leave_no_task_behind(queue: JobQueue) -> None:
    before = asyncio.all_tasks()
    for _ in range(20):
        await end(await polls_at_once(queue, 10))
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.05)


async def test_no_memory_is_kept_of_claims_that_have_ended(queue: JobQueue, claims: Claims) -> None:
    ids = set()
    for _ in range(5):
        # A lease without a wait, and one whose caller is cancelled during its claim.
        await queue.enqueue(PING)
        (lease,) = await queue.lease(["test.ping"], "w")
        ids.add(lease.job.id)
        await queue.complete(lease.token)
        await queue.enqueue(PING)
        claims.go_on.clear()
        claims.entered.clear()
        cancelled = asyncio.create_task(queue.lease(["test.ping"], "w"))
        await claims.entered.wait()
        await end([cancelled])
        claims.go_on.set()
        (lease,) = await queue.lease(["test.ping"], "w", wait_seconds=5)
        ids.add(lease.job.id)
        await queue.complete(lease.token)
    del lease, cancelled
    loop = asyncio.get_running_loop()

    def kept() -> list[object]:
        # Only those of this test are counted, because pytest keeps what a failed test has left.
        gc.collect()
        return [
            each
            for each in gc.get_objects()
            if (isinstance(each, asyncio.Task) and each.get_loop() is loop and each.done())
            or (isinstance(each, Lease) and each.job.id in ids)
            or (isinstance(each, _WaitingLine) and each._claiming is queue._claiming)
        ]

    async with asyncio.timeout(5):
        while kept():  # The event loop refers to a task that has just ended for another turn.
            await asyncio.sleep(0.01)


async def test_that_a_worker_runs_a_type_is_stored_at_most_every_ten_seconds(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[Sequence[str]] = []
    see_worker = queue._store.see_worker

    async def counted(types: Sequence[str], versions: Sequence[tuple[str, str]]) -> None:
        stored.append(types)
        await see_worker(types, versions)

    monkeypatch.setattr(queue._store, "see_worker", counted)
    for types in (["test.ping"], ["test.ping"], ["test.ping", "test.pong"], ["test.pong"]):
        await queue.lease(types, "w")
    assert stored == [["test.ping"], ["test.pong"]]
    monkeypatch.setattr(claiming, "WORKER_SEEN_SECONDS", 0.0)
    await queue.lease(["test.ping"], "w")
    assert stored[2:] == [["test.ping"]]


async def polls_at_once(queue: JobQueue, count: int) -> list[asyncio.Task[Any]]:
    stop = asyncio.Event()
    waiting = [
        asyncio.create_task(queue.lease(["test.ping"], "w", wait_seconds=30, stop=stop))
        for _ in range(count)
    ]
    await asyncio.sleep(0)
    return waiting


async def test_everyone_in_line_gets_the_error_of_an_outage(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = await polls(queue, 3)

    async def away(_claim: Claim) -> Claimed:
        raise QueueUnavailable("it is away")

    with monkeypatch.context() as broken:
        broken.setattr(queue._store, "claim", away)
        await queue.enqueue(PING)
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
    assert [type(result) for result in results] == [QueueUnavailable] * 3
    # And a line formed anew works.
    assert len(await queue.lease(["test.ping"], "w", wait_seconds=5)) == 1


async def test_the_end_of_the_process_sends_those_who_wait_away(queue: JobQueue) -> None:
    waiting = await polls(queue, 3)
    queue.end_waits()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [[], [], []]
    assert await queue.lease(["test.ping"], "w", wait_seconds=30) == []


async def test_a_claim_whose_caller_is_cancelled_without_waiting_leaves_no_lease_behind(
    queue: JobQueue, claims: Claims
) -> None:
    job = (await queue.enqueue(PING)).job
    claims.go_on.clear()
    (claiming,) = await polls(queue, 1, wait_seconds=0.0)
    await claims.entered.wait()
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    claims.go_on.set()
    (lease,) = await queue.lease(["test.ping"], "other", wait_seconds=5)
    assert (lease.job.id, lease.job.attempt) == (job.id, 1)


async def test_jobs_whose_documents_cannot_be_read_after_the_claim_are_released(
    fresh_postgresql_url: str, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a job that is too large to be in the answer of a claim
    database = open_database(fresh_postgresql_url)
    queue = JobQueue(registry, database)
    large = EnqueueRequest("test.ping", {"text": "".join(map(str, range(20_000)))})
    job = (await queue.enqueue(large)).job

    async def away(_ids: object) -> dict[object, object]:
        raise QueueUnavailable("it is away")

    with monkeypatch.context() as broken:
        broken.setattr(queue._store, "get_many", away)
        with pytest.raises(QueueUnavailable):
            await queue.lease(["test.ping"], "w")
    (lease,) = await queue.lease(["test.ping"], "w")
    assert (lease.job.id, lease.job.attempt) == (job.id, 1)
    await database.close()


async def test_the_end_of_the_process_ends_a_wait_whose_claim_is_under_way(
    queue: JobQueue, claims: Claims
) -> None:
    claims.go_on.clear()
    (waiting,) = await polls(queue, 1)
    async with asyncio.timeout(5):
        await claims.entered.wait()
    queue.end_waits()
    claims.go_on.set()
    async with asyncio.timeout(5):
        assert await waiting == []


async def test_a_worker_that_stops_waiting_ends_its_own_wait_alone_even_during_a_claim(
    queue: JobQueue, claims: Claims
) -> None:
    claims.go_on.clear()
    stopping, waiting = await polls(queue, 2)
    async with asyncio.timeout(5):
        await claims.entered.wait()
        await queue.stop_waiting("w0")
    claims.go_on.set()
    async with asyncio.timeout(5):
        assert await stopping == []
    await queue.enqueue(PING)
    async with asyncio.timeout(5):
        assert len(await waiting) == 1


async def test_a_wait_that_has_ended_takes_no_job_from_the_next_in_line(queue: JobQueue) -> None:
    (short,) = await polls(queue, 1, wait_seconds=0.3)
    (waiting,) = await polls(queue, 1)
    assert await short == []
    await queue.enqueue(PING)
    async with asyncio.timeout(5):
        assert len(await waiting) == 1


async def test_what_a_claim_under_way_leases_at_the_end_is_given_back(
    registry: JobRegistry, database_url: str
) -> None:
    running = "SELECT count(*) FROM job WHERE status = 'running'"
    for wait_seconds in (0.0, 1.0, 0.0, 1.0):
        async with JobQueue.from_url(database_url, registry, lease_seconds=30) as queue:
            await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 20)
            claims = [
                asyncio.create_task(
                    queue.lease(["test.ping"], f"w{n}", limit=2, wait_seconds=wait_seconds)
                )
                for n in range(20)
            ]
            await asyncio.sleep(0.003)
            for claim in claims:
                claim.cancel()
            ended = await asyncio.gather(*claims, return_exceptions=True)
            taken = sum(len(leases) for leases in ended if isinstance(leases, list))
        assert await asyncio.to_thread(run_sql, database_url, running) == [(taken,)]
        await asyncio.to_thread(run_sql, database_url, "DELETE FROM job")


async def test_the_next_claim_is_for_the_soonest_job_of_the_wanted_types(
    queue: JobQueue, database_url: str
) -> None:
    async def seconds(*types: str) -> float | None:
        return await queue._store.next_due(types, {"test.limited": 2})

    now = await queue._store.now()
    later = [now + timedelta(seconds=seconds) for seconds in (100, 200)]
    # Another type counts neither when it is due nor when it is scheduled.
    await queue.enqueue(PING._replace(type="test.pong"))
    assert await seconds("test.ping") is None
    # The soonest counts, whatever its priority.
    await queue.enqueue(PING._replace(schedule_at=later[1], priority=90))
    assert await seconds("test.ping") == pytest.approx(200, abs=20)
    await queue.enqueue(PING._replace(schedule_at=later[0], priority=10))
    assert await seconds("test.ping") == pytest.approx(100, abs=20)
    assert (await seconds("test.ping", "test.pong") or 1) <= 0
    # Jobs that are not queued do not count.
    for job in (await queue.list()).jobs:
        await queue.cancel(job.id)
    assert await seconds("test.ping", "test.pong") is None


async def test_the_next_claim_for_a_type_at_its_limit_is_when_a_lease_or_a_place_ends(
    queue: JobQueue, database_url: str
) -> None:
    async def seconds() -> float | None:
        return await queue._store.next_due(["test.limited"], {"test.limited": 2})

    for _ in range(4):
        await queue.enqueue(PING._replace(type="test.limited"))
    (first,) = await queue.lease(["test.limited"], "w")
    # There is room.
    assert (await seconds() or 1) <= 0
    await advance(database_url, 10)
    (second,) = await queue.lease(["test.limited"], "w")
    assert await seconds() == pytest.approx(20, abs=4)
    await queue.time_out(second.token, still_running=True)
    assert await seconds() == pytest.approx(20, abs=4)
    await queue.complete(first.token)
    (third,) = await queue.lease(["test.limited"], "w")
    await advance(database_url, 10)
    await queue.heartbeat(third.token)
    # The place of the attempt that has timed out ends before the lease.
    assert await seconds() == pytest.approx(20, abs=4)
    await queue.settle([second.token])
    assert (await seconds() or 1) <= 0
    # A place that has run out, because its worker has died, is not waited for.
    (last,) = await queue.lease(["test.limited"], "w")
    await queue.time_out(last.token, still_running=True)
    await queue.complete(third.token)
    for job in (await queue.list()).jobs:
        if job.status is JobStatus.QUEUED:
            await queue.cancel(job.id)
    assert await seconds() == pytest.approx(30, abs=4)
    await advance(database_url, 31)
    assert await seconds() is None
