"""What comes first, and how many at once: each statement says it, whatever index it reads.

The indexes that have the order are dropped, so that a statement without an order of its own gives
the jobs in another one.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import postgresql, sqlite, store
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import LeaseLost
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import BehindInQueue
from tests.conftest import advance, run_sql

PING = EnqueueRequest("test.ping", {})
PONG = EnqueueRequest("test.pong", {})
BROKEN = JobError("broken", "It broke.")
REFUSED = JobError("payload_invalid", "It does not fit.")
ONE, TWO = "1" * 64, "2" * 64

DROP_INDEXES = """
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT indexname FROM pg_indexes
            WHERE schemaname = 'job_registry' AND indexdef NOT LIKE 'CREATE UNIQUE%' LOOP
            EXECUTE format('DROP INDEX job_registry.%I', name);
        END LOOP; END $$"""

NAMED_INDEXES = (
    "CREATE INDEX job_by_status ON job (status, payload)",
    "CREATE INDEX job_by_type_and_status ON job (type, status, payload)",
)
"""On SQLite, statements name these. Here they have another order."""


async def sql(url: str, *statements: str) -> list[Any]:
    return await asyncio.to_thread(run_sql, url, *statements)


@pytest.fixture
async def unordered(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> JobQueue:
    """A queue whose tables have only unique indexes."""
    # On a busy machine claims would be taken for slow ones, and not look at everything.
    monkeypatch.setattr(postgresql, "SLOW_LOOK_SECONDS", 1_000.0)
    if database_url.startswith("sqlite"):
        named = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE 'CREATE INDEX%'"
        await sql(
            database_url,
            *(f"DROP INDEX {name}" for (name,) in await sql(database_url, named)),
            *NAMED_INDEXES,
        )
    else:
        await sql(database_url, DROP_INDEXES)
    return queue


@pytest.fixture
async def other(database_url: str, registry: JobRegistry) -> AsyncIterator[JobQueue]:
    """The queue of another process."""
    async with AsyncExitStack() as stack:
        database = open_database(database_url)
        stack.push_async_callback(database.close)
        yield JobQueue(registry, database)


async def stored(
    queue: JobQueue, request: EnqueueRequest, ago: float = 0, **options: Any
) -> uuid.UUID:
    """Store a job that has been due for `ago` seconds, and return its id."""
    due = datetime.now(UTC) - timedelta(seconds=ago) if ago else None
    return (await queue.enqueue(request._replace(schedule_at=due, **options))).job.id


async def leased(queue: JobQueue, *types: str, **options: Any) -> list[uuid.UUID]:
    return [lease.job.id for lease in await queue.lease(types or ["test.ping"], "w", **options)]


async def park(queue: JobQueue, job_id: uuid.UUID, fingerprint: str) -> uuid.UUID:
    """Lease the only due job and park it, as a worker with this fingerprint does."""
    (lease,) = await queue.lease(["test.ping", "test.pong"], "w", readable={})
    assert lease.job.id == job_id
    await queue.park(lease.token, fingerprint, REFUSED)
    return job_id


@pytest.mark.parametrize("remote", [False, True], ids=["own", "remote"])
async def test_due_jobs_go_by_priority_and_then_by_when_they_were_due(
    unordered: JobQueue, database_url: str, registry: JobRegistry, remote: bool
) -> None:
    queue = unordered
    mine = registry["test.ping"].fingerprint
    options: dict[str, Any] = {"readable": {"test.ping": [mine, ONE]}} if remote else {}
    # Given jobs that were stored in another order, and others that are not to be taken
    jobs = [
        await stored(queue, PING, ago, priority=priority)
        for priority, ago in ((50, 20), (50, 40), (10, 90), (90, 10), (50, 30), (90, 20), (50, 10))
    ]
    await stored(queue, PONG, 100, priority=90)
    await stored(queue, PING, -100, priority=100)
    if remote:
        unreadable = await stored(queue, PING, 100, priority=90)
        await sql(database_url, *with_fingerprint(database_url, unreadable, TWO))

    # When they are taken one by one, two at once, and the rest
    taken = [await leased(queue, limit=limit, **options) for limit in (1, 1, 1, 2, 9)]

    # I expect those of the highest priority first, and of one priority the oldest
    in_order = [jobs[index] for index in (5, 3, 1, 4, 0, 6, 2)]
    assert [each for some in taken for each in some] == in_order
    assert [len(some) for some in taken] == [1, 1, 1, 2, 2]


def with_fingerprint(url: str, job_id: uuid.UUID, fingerprint: str) -> list[str]:
    """Statements after which a job was admitted under another fingerprint."""
    stored_id = job_id.hex if url.startswith("sqlite") else str(job_id)
    return [
        f"UPDATE {table} SET fingerprint = '{fingerprint}' WHERE {column} = '{stored_id}'"
        for table, column in (("job", "id"), ("job_parked", "job_id"))
    ]


@pytest.mark.parametrize("remote", [False, True], ids=["own", "remote"])
async def test_parked_and_due_jobs_go_by_priority_and_then_by_age_whoever_refused_them(
    unordered: JobQueue, database_url: str, registry: JobRegistry, remote: bool
) -> None:
    queue = unordered
    mine = registry["test.ping"].fingerprint
    options: dict[str, Any] = {"readable": {"test.ping": [mine]}} if remote else {}
    # Given a job that was parked once, is not any more, and runs again later
    former = await park(queue, await stored(queue, PING, priority=50), ONE)
    await queue.cancel(former)
    await queue.retry(former)
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.fail(lease.token, BROKEN, retry_after_seconds=1_000)
    # And parked jobs of two priorities, each refused by one of two workers, in turns
    parked = []
    for fingerprint, priority in ((TWO, 50), (ONE, 50), (TWO, 90), (ONE, 90), (TWO, 50)):
        parked.append(await park(queue, await stored(queue, PING, priority=priority), fingerprint))
    # And parked jobs that are not to be taken: of another type, refused by this worker, or of a
    # payload that a remote worker cannot read
    await park(queue, await stored(queue, PONG, priority=90), ONE)
    if remote:
        unreadable = await park(queue, await stored(queue, PING, priority=90), TWO)
        await sql(database_url, *with_fingerprint(database_url, unreadable, ONE))
    else:
        await park(queue, await stored(queue, PING, priority=90), f"{mine},{ONE}")
    # And due jobs, one older than those and one younger
    younger = await stored(queue, PING, priority=50)
    older = await stored(queue, PING, 1_000, priority=50)

    # When they are taken one by one
    taken = []
    while found := await leased(queue, limit=1, **options):
        taken += found
    assert taken == [parked[2], parked[3], older, parked[0], parked[1], parked[4], younger]


async def test_types_take_turns_also_if_one_of_them_has_parked_jobs(unordered: JobQueue) -> None:
    queue = unordered
    parked = [await park(queue, await stored(queue, PING), ONE) for _ in range(2)]
    for request in (PING, PONG, PING, PONG):
        await stored(queue, request)
    both = await queue.lease(["test.ping", "test.pong"], "w", limit=2)
    taken = {lease.job.type: lease.job.id for lease in both}
    assert set(taken) == {"test.ping", "test.pong"}
    assert taken["test.ping"] == parked[0]


async def test_no_more_parked_jobs_are_taken_than_are_wanted_and_the_oldest_of_them(
    unordered: JobQueue,
) -> None:
    queue = unordered
    jobs = [await park(queue, await stored(queue, PING), ONE) for _ in range(5)]
    assert await leased(queue, limit=2) == jobs[:2]
    assert await leased(queue, limit=2, readable={"test.ping": []}) == []
    # Nor if another type has taken some of them.
    others = [await stored(queue, PONG) for _ in range(2)]
    mixed = await leased(queue, "test.pong", "test.ping", limit=3)
    assert mixed == [*others, jobs[2]]
    assert set(await leased(queue, limit=9)) == set(jobs[3:])


async def test_the_refusals_of_one_job_are_not_those_of_another(queue: JobQueue) -> None:
    mine = queue.registry["test.ping"].fingerprint
    await park(queue, await stored(queue, PING), ONE)
    await park(queue, await stored(queue, PONG), TWO)
    # A second refusal is added to those of its job.
    (lease,) = await queue.lease(["test.pong"], "w")
    await queue.park(lease.token, mine, REFUSED)
    assert await leased(queue, "test.pong") == []
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.park(lease.token, TWO, REFUSED)
    refusals = {
        name: {each.fingerprint for each in await queue.versions(name) if each.refused}
        for name in ("test.ping", "test.pong")
    }
    assert refusals == {"test.ping": {ONE, TWO}, "test.pong": {TWO, mine}}


async def test_lost_leases_are_ended_in_batches_those_first_that_ended_first(
    unordered: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = unordered
    for module in (sqlite, postgresql):
        monkeypatch.setattr(module, "RECOVERY_BATCH", 2)
    await queue.enqueue_many([PING] * 3)
    leases = await queue.lease(["test.ping"], "w", limit=3)
    for lease in leases[1::-1]:
        await advance(database_url, 5)
        await queue.heartbeat(lease.token)
    await advance(database_url, 31)
    ended = [{job.id for job in await queue.recover()} for _ in range(3)]
    assert ended == [{leases[2].job.id, leases[1].job.id}, {leases[0].job.id}, set()]


async def test_a_lease_in_force_is_left_as_it_is_however_often_leases_are_looked_at(
    queue: JobQueue, database_url: str
) -> None:
    await queue.enqueue_many([PING, PING])
    await queue.lease(["test.ping"], "w")
    times = "SELECT lease_expires_at, held_until, deadline_at, lease_seconds FROM job"
    before = await sql(database_url, times)
    async with JobQueue.from_url(database_url, queue.registry, lease_seconds=2) as short:
        for each in (queue, short):
            await each.recover()
            assert await each.lease(["test.pong"], "w") == []
    assert await sql(database_url, times) == before


async def test_leases_from_the_future_are_restarted_in_batches(
    unordered: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = unordered
    for module in (sqlite, postgresql):
        monkeypatch.setattr(module, "RECOVERY_BATCH", 1)
    await queue.enqueue_many([PING] * 2)
    _, second = await queue.lease(["test.ping"], "w", limit=2)
    # The clock steps back by an hour, after one of them was renewed.
    await advance(database_url, 5)
    await queue.heartbeat(second.token)
    await advance(database_url, -3_600)
    ends = "SELECT lease_expires_at FROM job ORDER BY lease_expires_at"
    for changed in (1, 2):
        before = {str(each) for (each,) in await sql(database_url, ends)}
        await queue.recover()
        after = {str(each) for (each,) in await sql(database_url, ends)}
        assert len(after - before) == 1, changed
        if not database_url.startswith("sqlite"):
            # The furthest first: that end of the index is read.
            assert before - after == {max(before)}
    await queue.recover()
    assert {str(each) for (each,) in await sql(database_url, ends)} == after


async def test_the_next_claim_is_known_without_an_index(
    unordered: JobQueue, database_url: str
) -> None:
    queue = unordered

    async def seconds(*types: str, limit: int = 9) -> float | None:
        return await queue._store.next_due(types, {"test.limited": limit})

    # The soonest due job counts, of the highest priority and of a lower one.
    for priority, ago in ((10, -900), (90, -700), (90, -600), (90, -800)):
        await stored(queue, PING, ago, priority=priority)
    assert await seconds("test.ping") == pytest.approx(600, abs=20)
    await stored(queue, PING, -500, priority=10)
    assert await seconds("test.ping") == pytest.approx(500, abs=20)
    # A lease may end earlier: the first to end counts, not the first that was made.
    await queue.enqueue_many([PONG._replace(type="test.limited")] * 2)
    first, second = await queue.lease(["test.limited"], "w", limit=2)
    await advance(database_url, 10)
    await queue.heartbeat(first.token)
    assert await seconds("test.ping") == pytest.approx(20, abs=8)
    # So may the place of an attempt that has timed out; again the first to end.
    await queue.time_out(first.token, still_running=True)
    await queue.time_out(second.token, still_running=True)
    await advance(database_url, 10)
    assert await seconds("test.limited", limit=2) == pytest.approx(20, abs=8)
    with pytest.raises(LeaseLost):
        await queue.heartbeat(first.token)
    assert await seconds("test.limited", limit=2) == pytest.approx(20, abs=8)


async def test_jobs_ahead_are_those_of_the_same_type_that_go_first(unordered: JobQueue) -> None:
    queue = unordered
    jobs = [await stored(queue, PING, ago, priority=50) for ago in (10, 30, 20)]
    high = [await stored(queue, PING, priority=priority) for priority in (60, 90, 60, 70)]
    for priority in (50, 60, 90):
        await stored(queue, PONG, 100, priority=priority)
    for priority in (70, 80):
        await stored(queue, PING, -100, priority=priority)
    await queue.show_worker(["test.ping", "test.pong"])
    reasons = await queue.waiting_reasons([await queue.get(job_id) for job_id in (*jobs, high[2])])
    assert list(reasons.values()) == [BehindInQueue(n) for n in (6, 4, 5, 3)]
    # Those that were asked for, and of those only the ones that still wait.
    before = await queue.get(high[1])
    assert await leased(queue) == [high[1]]
    assert set(await queue._store.waiting([high[1], jobs[0]])) == {jobs[0]}
    assert await queue.waiting_reason(before) is None


async def test_jobs_ahead_are_counted_up_to_a_bound(queue: JobQueue, database_url: str) -> None:
    for priority in (50, 90):
        await queue.enqueue_many([PING._replace(priority=priority)] * 3)
    first, *_, last = [(await stored(queue, PING, priority=10)) for _ in range(4)]
    found = await queue._store._read("waiting", {"ids": store.ids_text([first, last]), "most": 2})
    # SQLite reads up to the bound of each priority.
    bounds = (4, 6) if database_url.startswith("sqlite") else (2, 2)
    assert {row["id"]: row["ahead"] for row in found} == {first: bounds[0], last: bounds[1]}


async def test_ended_jobs_are_deleted_in_batches_those_first_that_ended_first(
    unordered: JobQueue, database_url: str
) -> None:
    queue = unordered
    await queue.enqueue_many([PING] * 4)
    leases = await queue.lease(["test.ping"], "w", limit=4)
    for index, lease in enumerate((leases[2], leases[0], leases[1])):
        await queue.complete(lease.token, index)
        await advance(database_url, 5)
    failed = await queue.fail(leases[3].token, BROKEN, retryable=False)
    for lease in (leases[2], leases[0], leases[1]):
        assert await queue.prune(JobStatus.SUCCEEDED, keep_seconds=0, jobs=1) == 1
        assert lease.job.id not in {job.id for job in (await queue.list()).jobs}
    assert [job.id for job in (await queue.list()).jobs] == [failed.id]


async def test_stored_events_are_read_and_deleted_in_batches_the_oldest_first(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sqlite, postgresql):
        monkeypatch.setattr(module, "EVENT_BATCHES_PRUNED", 1)
    for number, time in (
        (1, "2026-01-01"),
        (2, "2026-01-01"),
        (3, "2026-01-01"),
        (4, "2999-01-01"),
    ):
        await sql(
            database_url,
            "INSERT INTO job_event_batch (id, message, created_at)"
            f" VALUES ({number}, 'm{number}', '{time}')",
        )
    # On PostgreSQL the first is the last in the table now.
    await sql(database_url, "UPDATE job_event_batch SET message = message WHERE id = 1")
    kept = queue._store
    assert list((await kept.events_after(0, 2)).items()) == [(1, "m1"), (2, "m2")]
    assert list(await kept.events_after(2, 9)) == [3, 4]
    assert await kept.last_event() == 4
    for left in ([2, 3, 4], [3, 4], [4], [4]):
        await queue.tidy()
        assert list(await kept.events_after(0, 9)) == left
    assert await kept.last_event() == 4


async def test_pages_of_several_types_go_both_ways(unordered: JobQueue) -> None:
    queue = unordered
    names = ("test.ping", "test.limited", "test.pong", "test.ping", "test.limited")
    ids = [(await queue.enqueue(PING._replace(type=name))).job.id for name in names]
    ids += [(await queue.enqueue(PING)).job.id for _ in range(3)]
    await queue.cancel(ids[3])
    # On PostgreSQL the oldest is the last in the table now.
    await queue.cancel(ids[0])
    await queue.retry(ids[0])
    both = JobFilter(("test.ping", "test.limited"))
    queued = JobFilter(("test.ping", "test.limited"), (JobStatus.QUEUED,))
    for wanted, part, found in (
        (both, {"first": 2}, [7, 6]),
        (both, {"first": 2, "after": ids[4]}, [3, 1]),
        (both, {"last": 1}, [0]),
        (both, {"last": 2}, [1, 0]),
        (both, {"last": 2, "before": ids[1]}, [4, 3]),
        (both, {"last": 1, "before": ids[0]}, [1]),
        (queued, {"first": 3}, [7, 6, 5]),
        (queued, {"last": 3}, [4, 1, 0]),
    ):
        options: dict[str, Any] = part
        page = await queue.list(wanted, **options)
        assert [job.id for job in page.jobs] == [ids[index] for index in found], part


async def test_versions_count_a_bounded_number_of_jobs_those_that_run_first(
    unordered: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = unordered

    async def counted(fingerprint: str, most: int = 10_000) -> tuple[int, int, int, int] | None:
        monkeypatch.setattr(store, "COUNTED_JOBS", most)
        for each in await queue.versions("test.ping"):
            if each.fingerprint == fingerprint:
                return each.queued, each.running, each.parked, each.refused
        return None

    # Given jobs of each kind that were admitted under one fingerprint, and of another type
    for request in (PING, PONG):
        for _ in range(3):
            await park(queue, await stored(queue, request), ONE)
        await stored(queue, request, 10, priority=99)
        await stored(queue, request, 10, priority=99)
        assert len(await leased(queue, request.type, limit=2, readable={})) == 2
        await stored(queue, request, 10, priority=10)
        await stored(queue, request, priority=10)
        await stored(queue, request, -100, priority=5)
    mine = queue.registry["test.ping"].fingerprint
    assert await counted(mine) == (3, 2, 3, 0)
    assert await counted(ONE) == (0, 0, 0, 3)
    assert await counted(mine, 1) == (1, 1, 1, 0)
    assert await counted(ONE, 1) == (0, 0, 0, 1)
    # Of those that wait, the one that runs first is counted.
    for ago, priority, index in ((5, 10, 1), (20, 10, 0), (-50, 90, 0), (0, 4, 1)):
        last = await stored(queue, PING, ago, priority=priority)
        await sql(database_url, *with_fingerprint(database_url, last, TWO))
        found = await counted(TWO, 1)
        assert (found is None) == (index == 1), (ago, priority)
        await queue.cancel(last)
    # A job that is not parked any more is not counted as such, nor who refused it.
    assert len(await leased(queue, limit=9)) == 5
    assert await counted(mine) == (1, 7, 0, 0)
    assert await counted(ONE) is None


async def test_parked_jobs_are_made_due_in_batches_up_to_a_time(
    queue: JobQueue, database_url: str
) -> None:
    jobs = [
        await park(queue, await stored(queue, request), ONE)
        for request in (PING, PING, PONG, PONG, PING)
    ]
    waiting = await stored(queue, PING, -100)
    parked = await queue._store.parked(jobs)
    assert set(parked) == set(jobs)
    times = "SELECT parked_at FROM job_parked ORDER BY parked_at"
    at = [
        datetime.fromisoformat(f"{time}").replace(tzinfo=UTC)
        for (time,) in await sql(database_url, times)
    ]
    types = ["test.ping", "test.pong"]

    async def unparked(until: int, most: int) -> list[uuid.UUID]:
        found = await queue._store.unpark(types, parked_until=at[until], jobs=most)
        return sorted(job.id for job in found)

    # That time included; one type after the other.
    assert await unparked(0, 9) == [jobs[0]]
    assert await unparked(2, 9) == [jobs[1], jobs[2]]
    assert set(await queue._store.parked(jobs)) == {jobs[3], jobs[4]}
    assert len(await unparked(4, 1)) == 1
    assert len(await unparked(4, 9)) == 1
    assert await unparked(4, 9) == []
    due = await leased(queue, *types, limit=9, readable={"test.ping": []})
    assert set(due) == {jobs[2], jobs[3]}
    assert set(await leased(queue, limit=9, readable={})) == {jobs[0], jobs[1], jobs[4]}
    assert (await queue.get(waiting)).status is JobStatus.QUEUED


async def test_jobs_parked_for_too_long_fail_in_batches_those_first_that_were_parked_first(
    unordered: JobQueue, other: JobQueue, database_url: str
) -> None:
    queue = unordered
    first, second, third = [(await stored(queue, PING)) for _ in range(3)]
    leases = {lease.job.id: lease.token for lease in await queue.lease(["test.ping"], "w", limit=3)}
    for job_id in (second, third, first):
        await queue.park(leases[job_id], ONE, REFUSED)
        await advance(database_url, 5)
    # In a table of PostgreSQL, the row that was written last is the last one.
    first_parked = "(SELECT min(parked_at) FROM job_parked)"
    await sql(database_url, f"UPDATE job_parked SET type = type WHERE parked_at = {first_parked}")
    waiting = await stored(queue, PING)
    await advance(database_url, 86_400)
    late = await park(queue, waiting, ONE)
    kept = await stored(queue, PING)
    with queue.events.subscribe() as heard:
        for job_id in (second, third, first):
            assert await other.fail_parked(parked_days=1, jobs=1) == 1
            failed = await queue.get(job_id)
            assert (failed.status, failed.error) == (JobStatus.FAILED, REFUSED)
            async with asyncio.timeout(5):
                assert (await anext(heard))[:2] == ("job.failed", job_id)
    assert await other.fail_parked(parked_days=1, jobs=9) == 0
    assert {(await queue.get(job_id)).status for job_id in (late, kept)} == {JobStatus.QUEUED}
