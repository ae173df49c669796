"""A type that was renamed: its stored jobs, the clients that use the old name, and its limit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    IdempotencyKeyTaken,
    InputInvalid,
    LeaseLost,
)
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import ConcurrencyLimitReached
from tests.conftest import async_url


class Note(Payload):
    text: str


LIMITED = JobPolicy(concurrency_limit=2)
BEFORE = JobRegistry([JobType(name="memo", payload=Note, policy=LIMITED)])
AFTER = JobRegistry([JobType(name="note", payload=Note, policy=LIMITED, former_names=["memo"])])


@pytest.fixture
async def queues(database_url: str) -> AsyncIterator[tuple[JobQueue, JobQueue]]:
    """A queue of the deploy before the type was renamed, and one of the deploy after."""
    async with AsyncExitStack() as stack:
        opened = []
        for registry in (BEFORE, AFTER):
            database = open_database(database_url)
            stack.push_async_callback(database.close)
            opened.append(JobQueue(registry, database))
        yield opened[0], opened[1]


def job(name: str, text: str = "hello", key: str | None = None) -> EnqueueRequest:
    return EnqueueRequest(name, {"text": text}, idempotency_key=key)


async def test_a_job_under_the_former_name_has_the_name_of_today_everywhere(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    stored = (await before.enqueue(job("memo"))).job
    assert (await after.get(stored.id)).type == "note"
    for name in ("memo", "note"):
        page = await after.list(JobFilter(types=(name,)))
        assert [(each.id, each.type) for each in page.jobs] == [(stored.id, "note")]
    counts = await after.counts()
    assert (list(counts), counts["note"].queued) == (["note"], 1)
    (leased,) = await after.lease(["note"], "w")
    assert leased.job.type == "note"
    assert (await after.complete(leased.token)).type == "note"


async def test_a_client_that_sends_the_former_name_stores_under_the_new_one(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    enqueued = await after.enqueue(job("memo"))
    assert enqueued.job.type == "note"
    assert list(await before.unregistered_types()) == ["note"]
    assert len(await after.lease(["memo"], "w")) == 1


async def test_the_limit_holds_over_both_names(queues: tuple[JobQueue, JobQueue]) -> None:
    before, after = queues
    for _ in range(2):
        await before.enqueue(job("memo"))
        await after.enqueue(job("note"))
    assert len(await after.lease(["note"], "w", limit=10)) == 2
    assert await after.lease(["note"], "w", limit=10) == []
    page = await after.list(JobFilter(types=("note",)))
    waiting = [each for each in page.jobs if each.next_run_at is not None]
    reasons = (await after.waiting_reasons(waiting)).values()
    assert [*reasons] == [ConcurrencyLimitReached(2, 2)] * 2


async def test_a_place_that_is_held_under_the_former_name_is_a_reason_to_wait(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    await before.enqueue(job("memo"))
    (overrun,) = await after.lease(["note"], "w")
    await after.time_out(overrun.token, still_running=True)
    waiting = [(await after.enqueue(job("note"))).job for _ in range(2)]
    assert len(await after.lease(["note"], "w", limit=10)) == 1
    assert await after.waiting_reason(waiting[1]) == ConcurrencyLimitReached(2, 2)


async def test_an_idempotency_key_holds_over_both_names(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    stored = (await before.enqueue(job("memo", key="k"))).job
    again = await after.enqueue(job("note", key="k"))
    assert (again.job.id, again.deduplicated) == (stored.id, True)
    with pytest.raises(IdempotencyConflict):
        await after.enqueue(job("note", "other", key="k"))
    for atomic in (False, True):
        first, second = await after.enqueue_many(
            [job("note", key="k"), job("note", key=f"new {atomic}")], atomic=atomic
        )
        assert not isinstance(first, Exception)
        assert not isinstance(second, Exception)
        assert (first.job.id, second.deduplicated) == (stored.id, False)
    refused = await after.enqueue_many(
        [job("note", "other", key="k"), job("note", key="never")], atomic=True
    )
    assert all(isinstance(each, Exception) for each in refused)
    assert (await after.validate(job("note", key="k"))).duplicate_of is not None


async def test_an_atomic_bulk_is_refused_for_a_hidden_job_under_the_former_name(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    stored = (await before.enqueue(job("memo", key="k"), created_by="ann")).job
    refused = await after.enqueue_many(
        [job("note", key="k"), job("note")], atomic=True, created_by="bob", others="hidden"
    )
    assert [type(each) for each in refused] == [IdempotencyKeyTaken, InputInvalid]
    assert [each.id for each in (await after.list()).jobs] == [stored.id]


async def test_an_idempotency_key_of_a_follow_up_holds_over_both_names(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    stored = (await before.enqueue(job("memo", key="k"))).job
    await after.enqueue(job("note"))
    leases = {lease.job.id: lease for lease in await after.lease(["note"], "w", limit=2)}
    del leases[stored.id]
    (lease,) = leases.values()
    with pytest.raises(IdempotencyConflict) as refused:
        await after.complete(lease.token, follow_ups=[after.admit(job("note", "other", key="k"))])
    assert refused.value.existing_job.id == stored.id
    new = [after.admit(job("note", key="k")), after.admit(job("note", key="new"))]
    await after.complete(lease.token, follow_ups=new)
    listed = {each.id for each in (await after.list()).jobs}
    assert listed == {stored.id, lease.job.id, new[1].id}
    with pytest.raises(LeaseLost):
        await after.complete(lease.token[:32] + "0" * 32, follow_ups=new)


async def test_a_cancelled_or_retried_job_keeps_its_name_of_today(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    stored = (await before.enqueue(job("memo"))).job
    assert (await after.cancel(stored.id)).type == "note"
    assert (await after.retry(stored.id)).type == "note"


async def test_a_job_under_the_former_name_is_not_behind_later_ones(
    queues: tuple[JobQueue, JobQueue],
) -> None:
    before, after = queues
    stored = (await before.enqueue(job("memo"))).job
    for _ in range(3):
        await after.enqueue(job("note"))
    (first,) = await after.lease(["note"], "w", limit=1)
    assert first.job.id == stored.id


async def test_a_key_twice_in_one_transaction_holds_over_both_names(
    queues: tuple[JobQueue, JobQueue], database_url: str
) -> None:
    before, after = queues
    stored = (await before.enqueue(job("memo", key="k"))).job
    engine = create_async_engine(async_url(database_url))
    async with AsyncSession(engine) as session, session.begin():
        outcomes = await after.enqueue_many([job("note", key="k")] * 2, session=session)
    await engine.dispose()
    for each in outcomes:
        assert not isinstance(each, Exception)
        assert (each.job.id, each.deduplicated) == (stored.id, True)
