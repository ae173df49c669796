"""The state machine: leases, ends of attempts, retries, cancellation, limits, order."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import JsonValue
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from job_registry import EnqueueRequest, JobRegistry
from job_registry.errors import MAX_DELAY_SECONDS
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.errors import InputInvalid, JobNotFound, JobStateConflict, LeaseLost
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import AttemptOutcome, JobError, JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import (
    BehindInQueue,
    ConcurrencyLimitReached,
    NoWorkerSeen,
    ScheduledFor,
)
from job_registry_api.queue.store import Store
from tests.conftest import advance, async_url

BROKEN = JobError("broken", "It broke.")
CONTROLS = [chr(code) for code in (*range(1, 8), 11, *range(14, 32))]


async def enqueue(queue: JobQueue, job_type: str = "test.ping", **options: Any) -> JobRecord:
    request = EnqueueRequest(job_type, {}, **options)
    return (await queue.enqueue(request)).job


async def lease_one(queue: JobQueue, job_type: str = "test.ping") -> Lease:
    (lease,) = await queue.lease([job_type], "worker-1")
    return lease


async def outcomes(queue: JobQueue, job: JobRecord) -> list[str | None]:
    return [attempt.outcome for attempt in (await queue.attempts([job.id]))[job.id]]


async def test_a_leased_job_runs_and_a_completed_one_succeeded(queue: JobQueue) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    assert (lease.job.id, lease.job.status, lease.job.attempt) == (job.id, JobStatus.RUNNING, 1)
    assert lease.job.worker_id == "worker-1"
    assert lease.job.started_at is not None
    assert lease.job.next_run_at is None
    assert (lease.deadline_at - lease.job.started_at).total_seconds() == 60

    done = await queue.complete(lease.token, {"ok": True})
    assert (done.status, done.result, done.error) == (JobStatus.SUCCEEDED, {"ok": True}, None)
    assert done.finished_at is not None
    assert await outcomes(queue, job) == ["succeeded"]


async def test_the_same_completion_sent_twice_succeeds_twice_and_writes_once(
    queue: JobQueue,
) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    first = await queue.complete(lease.token, 1)
    second = await queue.complete(lease.token, 2)
    both = await asyncio.gather(*(queue.complete(lease.token, 3) for _ in range(3)))
    assert {done.result for done in (first, second, *both)} == {1}
    assert await outcomes(queue, job) == ["succeeded"]


async def test_a_success_of_a_worker_is_stored_as_a_completion_is(queue: JobQueue) -> None:
    """A worker does not read the job that it reports."""
    completed, succeeded = await enqueue(queue), await enqueue(queue)
    leases = {each.job.id: each for each in await queue.lease(["test.ping"], "worker-1", limit=2)}
    result: JsonValue = {"text": '\u00e9"\\', "number": 1e300}
    await queue.complete(leases[completed.id].token, result)
    for _ in range(2):
        await queue.succeed(leases[succeeded.id].token, result)
    first, second = await queue.get(completed.id), await queue.get(succeeded.id)
    assert second.result == first.result == result
    assert (second.status, second.attempt, second.error) == (JobStatus.SUCCEEDED, 1, None)
    assert second.finished_at is not None
    assert await outcomes(queue, succeeded) == ["succeeded"]


NUMBERS = [1.0, 0.1, 0.550915140503695, 1.0315147803154315e-307, 1e300, 2**63 - 1, -(2**63), 0]
"""SQLite stores a text that is a number as one: 1.0 as an integer, and others to fifteen digits."""


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_number_comes_back_as_it_went_in(queue: JobQueue, number: float) -> None:
    job, _ = await enqueue(queue), await enqueue(queue)
    for lease in await queue.lease(["test.ping"], "w", limit=2):
        beat = await queue.heartbeat(lease.token, number)
        read = [beat.job.progress, (await queue.get(lease.job.id)).progress]
        if lease.job.id == job.id:
            read.append((await queue.complete(lease.token, number)).result)
        else:
            await queue.succeed(lease.token, number)
        read.append((await queue.get(lease.job.id)).result)
        assert {repr(each) for each in read} == {repr(number)}


async def test_a_success_is_refused_if_the_lease_is_lost(queue: JobQueue) -> None:
    job = await enqueue(queue)
    lost = await lease_one(queue)
    await queue.release(lost.token)
    held = await lease_one(queue)
    with pytest.raises(LeaseLost):
        await queue.succeed(lost.token, 1)
    assert (await queue.get(job.id)).status is JobStatus.RUNNING
    await queue.succeed(held.token, 2)
    assert (await queue.get(job.id)).result == 2


async def test_reports_of_one_group_do_not_disturb_each_other(queue: JobQueue) -> None:
    jobs = [await enqueue(queue) for _ in range(4)]
    leases = {each.job.id: each for each in await queue.lease(["test.ping"], "worker-1", limit=4)}
    tokens = [leases[job.id].token for job in jobs]
    await queue.release(tokens[3])
    answers = await asyncio.gather(
        queue.succeed(tokens[0], 1),
        queue.complete(tokens[1], 2),
        queue.fail(tokens[2], BROKEN, retryable=False),
        queue.succeed(tokens[3], 4),
        return_exceptions=True,
    )
    assert isinstance(answers[3], LeaseLost)
    stored = [await queue.get(job.id) for job in jobs]
    assert [job.status.value for job in stored] == ["succeeded", "succeeded", "failed", "queued"]
    assert [job.result for job in stored] == [1, 2, None, None]


async def test_of_two_reports_at_once_one_counts(queue: JobQueue) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    results = await asyncio.gather(
        queue.fail(lease.token, BROKEN),
        queue.release(lease.token),
        queue.snooze(lease.token, 5),
        return_exceptions=True,
    )
    assert sum(isinstance(result, LeaseLost) for result in results) == 2
    assert len(await outcomes(queue, job)) == 1


async def test_a_failed_attempt_is_tried_again_after_its_backoff_until_none_is_left(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue)
    for attempt, least, most in ((1, 0.5, 1.0), (2, 1.0, 2.0)):
        lease = await lease_one(queue)
        assert lease.job.attempt == attempt
        failed = await queue.fail(lease.token, BROKEN)
        assert (failed.status, failed.error) == (JobStatus.QUEUED, BROKEN)
        waiting = await queue.waiting_reason(failed)
        assert isinstance(waiting, ScheduledFor)
        assert await queue.lease(["test.ping"], "w") == []
        await advance(database_url, least - 0.2)
        assert await queue.lease(["test.ping"], "w") == []
        await advance(database_url, most - least + 0.2)
    lease = await lease_one(queue)
    last = await queue.fail(lease.token, BROKEN)
    assert (last.status, last.attempt, last.next_run_at) == (JobStatus.FAILED, 3, None)
    assert await outcomes(queue, job) == ["failed"] * 3


async def test_jobs_that_fail_together_are_tried_again_one_after_another(queue: JobQueue) -> None:
    await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 8)
    leases = await queue.lease(["test.ping"], "w", limit=8)
    failed = await asyncio.gather(*(queue.fail(lease.token, BROKEN) for lease in leases))
    assert len({job.next_run_at for job in failed}) > 4


async def test_what_is_not_retryable_fails_at_once(queue: JobQueue) -> None:
    await enqueue(queue)
    lease = await lease_one(queue)
    failed = await queue.fail(lease.token, BROKEN, retryable=False)
    assert (failed.status, failed.attempt) == (JobStatus.FAILED, 1)


async def test_retry_after_replaces_the_backoff(queue: JobQueue, database_url: str) -> None:
    await enqueue(queue)
    lease = await lease_one(queue)
    await queue.fail(lease.token, BROKEN, retry_after_seconds=100)
    await advance(database_url, 99)
    assert await queue.lease(["test.ping"], "w") == []
    await advance(database_url, 1.1)
    assert await queue.lease(["test.ping"], "w") != []
    with pytest.raises(InputInvalid):
        await queue.fail(lease.token, BROKEN, retry_after_seconds=-1)


async def test_releases_and_snoozes_give_the_attempt_back(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue, max_attempts=1)
    for _ in range(5):
        lease = await lease_one(queue)
        assert lease.job.attempt == 1
        assert (await queue.release(lease.token)).attempt == 0
        await advance(database_url, 60)
    lease = await lease_one(queue)
    snoozed = await queue.snooze(lease.token, 50)
    assert (snoozed.attempt, snoozed.status) == (0, JobStatus.QUEUED)
    await advance(database_url, 51)
    assert (await lease_one(queue)).job.attempt == 1
    assert await outcomes(queue, job) == ["released"] * 5 + ["snoozed", None]


async def test_a_lost_lease_spends_its_attempt_and_its_token_writes_nothing_more(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    await advance(database_url, 31)

    for report in (
        queue.complete(lease.token),
        queue.fail(lease.token, BROKEN),
        queue.release(lease.token),
        queue.snooze(lease.token, 1),
        queue.heartbeat(lease.token),
    ):
        with pytest.raises(LeaseLost):
            await report
    (recovered,) = await queue.recover()
    assert (recovered.id, recovered.status, recovered.attempt) == (job.id, JobStatus.QUEUED, 1)
    assert await outcomes(queue, job) == ["lost"]

    await advance(database_url, 10)
    again = await lease_one(queue)
    with pytest.raises(LeaseLost):
        await queue.complete(lease.token)
    assert (await queue.complete(again.token)).status is JobStatus.SUCCEEDED


async def test_whoever_claims_recovers(queue: JobQueue, database_url: str) -> None:
    job = await enqueue(queue)
    await lease_one(queue)
    await advance(database_url, 31)
    # A worker of another type asks, and finds nothing to do for itself.
    assert await queue.lease(["test.pong"], "w") == []
    assert (await queue.get(job.id)).status is JobStatus.QUEUED


async def test_heartbeats_keep_a_lease_and_never_extend_the_timeout(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    await advance(database_url, 25)
    beat = await queue.heartbeat(lease.token, {"done": 1})
    assert beat.seconds_left == pytest.approx(35, abs=1)
    assert (await queue.get(job.id)).progress == {"done": 1}
    await advance(database_url, 25)
    assert (await queue.heartbeat(lease.token)).job.progress == {"done": 1}
    await advance(database_url, 11)
    with pytest.raises(LeaseLost):
        await queue.heartbeat(lease.token)
    (recovered,) = await queue.recover()
    assert recovered.error is not None
    assert recovered.error.code == "timed_out"
    assert "its worker did not report it" in recovered.error.message
    assert await outcomes(queue, job) == ["timed_out"]


async def test_lost_leases_are_counted_against_max_attempts(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue, max_attempts=2)
    for _ in range(2):
        await lease_one(queue)
        await advance(database_url, 31)
        await queue.recover()
        await advance(database_url, 10)
    ended = await queue.get(job.id)
    assert (ended.status, ended.attempt) == (JobStatus.FAILED, 2)
    assert await outcomes(queue, job) == ["lost", "lost"]


async def test_a_queued_job_is_cancelled_at_once(queue: JobQueue) -> None:
    job = await enqueue(queue)
    assert (await queue.cancel(job.id)).status is JobStatus.CANCELLED
    assert await queue.lease(["test.ping"], "w") == []
    with pytest.raises(JobStateConflict) as refused:
        await queue.cancel(job.id)
    assert refused.value.status is JobStatus.CANCELLED


@pytest.mark.cases(2)
@pytest.mark.parametrize("end", ["fail", "release", "snooze", "stop", "lost"])
async def test_a_running_job_is_cancelled_when_its_worker_stops(
    queue: JobQueue, database_url: str, end: str
) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    asked = await queue.cancel(job.id)
    assert asked.status is JobStatus.RUNNING
    assert (await queue.heartbeat(lease.token)).cancel_requested

    match end:
        case "fail":
            await queue.fail(lease.token, BROKEN)
        case "release":
            await queue.release(lease.token)
        case "snooze":
            await queue.snooze(lease.token, 5)
        case "stop":
            await queue.stop(lease.token, BROKEN)
        case "lost":
            await advance(database_url, 31)
            await queue.recover()
    assert (await queue.get(job.id)).status is JobStatus.CANCELLED
    assert await outcomes(queue, job) == ["cancelled"]


async def test_a_job_that_was_done_before_its_cancellation_arrived_succeeded(
    queue: JobQueue,
) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    await queue.cancel(job.id)
    assert (await queue.complete(lease.token)).status is JobStatus.SUCCEEDED


async def test_a_change_that_another_has_just_made_possible_is_made(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, to cancel a queued job failed, because it was queued."""
    job = await enqueue(queue)
    await queue.cancel(job.id)
    get, waiting = Store.get, [queue.retry, queue.cancel]

    async def changed_meanwhile(store: Store, *arguments: Any) -> Any:
        if waiting:
            await waiting.pop(0)(job.id)
        return await get(store, *arguments)

    monkeypatch.setattr(Store, "get", changed_meanwhile)
    assert (await queue.cancel(job.id)).status is JobStatus.CANCELLED
    await queue.retry(job.id)
    assert (await queue.retry(job.id)).status is JobStatus.QUEUED
    with pytest.raises(JobStateConflict) as refused:
        await queue.retry(job.id)
    assert refused.value.status is JobStatus.QUEUED


async def test_failed_and_cancelled_jobs_are_retried_with_an_attempt_left(
    queue: JobQueue,
) -> None:
    job = await enqueue(queue, max_attempts=1)
    with pytest.raises(JobStateConflict):
        await queue.retry(job.id)
    lease = await lease_one(queue)
    await queue.fail(lease.token, BROKEN)
    retried = await queue.retry(job.id)
    assert (retried.status, retried.attempt, retried.max_attempts) == (JobStatus.QUEUED, 1, 2)
    assert (await lease_one(queue)).job.attempt == 2

    cancelled = await enqueue(queue)
    await queue.cancel(cancelled.id)
    assert (await queue.retry(cancelled.id)).max_attempts == 3
    with pytest.raises(JobNotFound):
        await queue.retry("01a20b59-007a-7389-bb53-785ecafc486c")


async def test_due_jobs_go_by_priority_then_time_then_id(queue: JobQueue) -> None:
    low = await enqueue(queue, priority=10)
    due = datetime.now(UTC)
    jobs = [await enqueue(queue, schedule_at=due) for _ in range(5)]
    high = await enqueue(queue, priority=100)
    earlier = await enqueue(queue, schedule_at=due - timedelta(seconds=1))
    order = []
    for limit in (1, 1, 1, 1, 9):
        leases = await queue.lease(["test.ping", "test.pong"], "w", limit=limit)
        order += [lease.job.id for lease in leases]
    assert order == [high.id, earlier.id, *(job.id for job in jobs), low.id]


async def test_types_of_one_priority_take_turns(queue: JobQueue) -> None:
    # Given a flood of one type, then some jobs of another, and a job of a lower priority
    for _ in range(20):
        await enqueue(queue, "test.ping")
    for _ in range(3):
        await enqueue(queue, "test.pong")
    await enqueue(queue, "test.limited", priority=10)

    # When jobs are leased one by one, and when they are leased together
    singly = [(await queue.lease(["test.ping", "test.pong"], "w"))[0].job.type for _ in range(4)]
    types = ["test.ping", "test.pong", "test.limited"]
    together = await queue.lease(types, "w", limit=6)

    # I expect the other type to have every second turn, for as long as it has jobs
    assert singly in (["test.ping", "test.pong"] * 2, ["test.pong", "test.ping"] * 2)
    assert sorted(lease.job.type for lease in together) == ["test.ping"] * 5 + ["test.pong"]

    # And no more jobs than were wanted, if that is not a multiple of the types
    await queue.enqueue_many([EnqueueRequest("test.pong", {})] * 3)
    assert len(await queue.lease(types, "w", limit=3)) == 3


async def test_a_job_that_is_released_again_and_again_waits_longer_each_time(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue)
    waits = []
    for _ in range(10):
        lease = await lease_one(queue)
        returned = await queue.snooze(lease.token, 0)
        assert returned.next_run_at is not None
        waits.append((returned.next_run_at - await queue._store.now()).total_seconds())
        await advance(database_url, 61)
    assert waits[0] <= 0
    assert [round(wait) for wait in waits[1:]] == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    # An attempt that is spent begins anew
    await queue.fail((await lease_one(queue)).token, BROKEN)
    await advance(database_url, 61)
    lease = await lease_one(queue)
    assert (await queue.release(lease.token)).error == BROKEN
    lease = await lease_one(queue)
    assert lease.job.id == job.id

    # And so does one that runs for longer than a few seconds
    await advance(database_url, 11)
    await queue.release(lease.token)
    await queue.release((await lease_one(queue)).token)
    await queue.release((await lease_one(queue)).token)

    # And so does one that is cancelled and retried
    await queue.cancel(job.id)
    await queue.retry(job.id)
    await queue.release((await lease_one(queue)).token)
    assert (await lease_one(queue)).job.id == job.id


@pytest.mark.slow
async def test_attempts_that_were_released_are_kept_up_to_a_bound(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue)
    for _ in range(70):
        await queue.release((await lease_one(queue)).token)
        await advance(database_url, 61)
    assert 32 <= len(await outcomes(queue, job)) <= 64


async def test_of_attempts_that_are_too_large_together_the_latest_are_given(
    queue: JobQueue,
) -> None:
    job = await enqueue(queue)
    for _ in range(3):
        await queue.fail((await lease_one(queue)).token, BROKEN, retryable=False)
        await queue.retry(job.id)
    for max_bytes, attempts in ((1, [3]), (10**6, [1, 2, 3])):
        latest, are_all = await queue.latest_attempts([job.id], max_bytes)
        assert [each.attempt for each in latest[job.id]] == attempts
        assert are_all == (len(attempts) == 3)


async def test_attempts_of_a_job_that_is_cancelled_and_retried_are_kept_up_to_a_bound(
    queue: JobQueue,
) -> None:
    job = await enqueue(queue)
    for _ in range(70):
        lease = await lease_one(queue)
        await queue.cancel(job.id)
        assert (await queue.release(lease.token)).status is JobStatus.CANCELLED
        await queue.retry(job.id)
    assert 32 <= len(await outcomes(queue, job)) <= 64


async def test_attempts_that_a_handler_cancels_are_kept_up_to_a_bound(queue: JobQueue) -> None:
    job = await enqueue(queue)
    for _ in range(70):
        await queue.stop((await lease_one(queue)).token, BROKEN)
        await queue.retry(job.id)
    assert 32 <= len(await outcomes(queue, job)) <= 64


@pytest.mark.slow
async def test_a_success_leaves_a_bounded_number_of_released_attempts(
    queue: JobQueue, database_url: str
) -> None:
    job = await enqueue(queue)
    for _ in range(63):
        await queue.release((await lease_one(queue)).token)
        await advance(database_url, 61)
    await queue.succeed((await lease_one(queue)).token)
    assert await outcomes(queue, job) == ["released"] * 32 + ["succeeded"]


@pytest.mark.slow  # A thousand attempts.
@pytest.mark.parametrize("spend", [True, False])
async def test_attempts_of_a_job_that_fails_and_is_retried_are_kept_up_to_a_bound(
    queue: JobQueue, spend: bool
) -> None:
    job = await enqueue(queue)
    for _ in range(1_060):
        lease = await lease_one(queue)
        await queue.fail(lease.token, BROKEN, retryable=False, spend_attempt=spend)
        await queue.retry(job.id)
    assert 1_000 <= len(await outcomes(queue, job)) <= 1_032


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        # PostgreSQL stores this one compressed.
        ("ab" * 125_000, [4, 4, 2, 0]),
        # As JSON, each of these takes six bytes. They cannot be compressed.
        ("".join(random.Random(1).choices(CONTROLS, k=40_000)), [5, 5, 0, 0]),
    ],
    ids=["compressed", "escaped"],
)
async def test_no_more_jobs_are_leased_once_their_payloads_have_a_megabyte(
    queue: JobQueue, text: str, counts: list[int]
) -> None:
    payload, types = {"text": text}, ["test.ping", "test.pong"]
    jobs = [(await queue.enqueue(EnqueueRequest("test.ping", payload))).job for _ in range(10)]
    together = [await queue.lease(types, "w", limit=100) for _ in range(4)]
    assert [len(leases) for leases in together] == counts
    # In order, and the others were never leased
    assert [lease.job.id for leases in together for lease in leases] == [job.id for job in jobs]
    assert {len(await outcomes(queue, job)) for job in jobs} == {1}

    # The same holds for several types together
    await queue.enqueue_many([EnqueueRequest(name, payload) for name in types * 3])
    both = await queue.lease(types, "w", limit=100)
    assert len(both) == counts[0]
    assert {lease.job.type for lease in both} == set(types)


async def test_a_limit_is_never_passed_and_a_full_type_holds_up_no_other(
    queue: JobQueue,
) -> None:
    for _ in range(5):
        await enqueue(queue, "test.limited", priority=100)
    other = await enqueue(queue)

    leases = await queue.lease(["test.limited", "test.ping"], "w", limit=10)
    assert sorted(lease.job.type for lease in leases) == ["test.limited"] * 2 + ["test.ping"]
    assert other.id in {lease.job.id for lease in leases}
    assert await queue.lease(["test.limited", "test.ping"], "w", limit=10) == []

    await queue.complete(leases[0].token)
    assert len(await queue.lease(["test.limited"], "w", limit=10)) == 1


async def test_concurrent_claims_over_several_processes_keep_the_limit_and_share_no_job(
    queue: JobQueue, database_url: str
) -> None:
    await queue.enqueue_many([EnqueueRequest("test.limited", {}) for _ in range(20)])
    await queue.enqueue_many([EnqueueRequest("test.ping", {}) for _ in range(200)])
    async with _other(queue, database_url) as second, _other(queue, database_url) as third:
        claims = await asyncio.gather(
            *(
                each.lease(["test.limited", "test.ping"], f"w{n}", limit=20)
                for n in range(4)
                for each in (queue, second, third)
            )
        )
    leased = [lease.job for claim in claims for lease in claim]
    assert len({job.id for job in leased}) == len(leased)
    assert sum(job.type == "test.limited" for job in leased) == 2


async def test_a_waiting_lease_notices_a_job_of_another_process_and_of_room(
    queue: JobQueue, database_url: str
) -> None:
    async with _other(queue, database_url) as other:
        clock = asyncio.get_running_loop().time
        waiting = asyncio.create_task(queue.lease(["test.limited"], "w", limit=2, wait_seconds=9))
        await asyncio.sleep(0.3)
        started = clock()
        for _ in range(3):
            await enqueue(other, "test.limited")
        leases = await waiting
        while len(leases) < 2:
            leases += await queue.lease(["test.limited"], "w", wait_seconds=9)
        # Full now: the next one comes when another process makes room.
        waiting = asyncio.create_task(queue.lease(["test.limited"], "w", wait_seconds=9))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await other.complete(leases[0].token)
        assert len(await waiting) == 1
        assert clock() - started < 3


async def test_a_postgresql_url_may_hold_options_of_libpq(
    registry: JobRegistry, fresh_postgresql_url: str
) -> None:
    joined = "&" if "?" in fresh_postgresql_url else "?"
    url = f"{fresh_postgresql_url}{joined}sslmode=disable&application_name=jobs"
    async with (
        JobQueue.from_url(url, registry, lease_seconds=30) as queue,
        JobQueue.from_url(url, registry, lease_seconds=30) as other,
    ):
        with other.events.subscribe() as received:
            job = await enqueue(queue)
            async with asyncio.timeout(3):
                assert (await anext(received)).job_id == job.id


async def test_stopping_ends_a_wait(queue: JobQueue) -> None:
    stop = asyncio.Event()
    waiting = asyncio.create_task(queue.lease(["test.ping"], "w", wait_seconds=20, stop=stop))
    await asyncio.sleep(0.1)
    stop.set()
    async with asyncio.timeout(1):
        assert await waiting == []


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"job_types": []}, "/jobTypes"),
        ({"job_types": ["test.ping", "nope"]}, "/jobTypes/1"),
        ({"limit": 0}, "/limit"),
        ({"limit": 101}, "/limit"),
        ({"wait_seconds": 31}, "/waitSeconds"),
        ({"wait_seconds": -1}, "/waitSeconds"),
        ({"worker_id": ""}, "/workerId"),
        ({"worker_id": "w" * 256}, "/workerId"),
        ({"worker_id": "a\0b"}, "/workerId"),
    ],
)
async def test_a_wrong_lease_is_refused(
    queue: JobQueue, arguments: dict[str, Any], path: str
) -> None:
    with pytest.raises(InputInvalid) as refused:
        await queue.lease(**{"job_types": ["test.ping"], "worker_id": "w", **arguments})
    assert [v.path for v in refused.value.violations] == [path]


async def test_the_ends_of_each_range_of_a_lease_are_accepted(queue: JobQueue) -> None:
    stop = asyncio.Event()
    stop.set()
    for limit, wait, worker in ((1, 0, "w"), (100, 30, "w" * 255)):
        await enqueue(queue)
        (lease,) = await queue.lease(
            ["test.ping"], worker, limit=limit, wait_seconds=wait, stop=stop
        )
        assert lease.job.worker_id == worker


async def test_a_delay_is_between_nothing_and_a_year(queue: JobQueue) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    for seconds in (-1, MAX_DELAY_SECONDS + 1):
        with pytest.raises(InputInvalid):
            await queue.snooze(lease.token, seconds)
        with pytest.raises(InputInvalid):
            await queue.fail(lease.token, BROKEN, retry_after_seconds=seconds)
    await queue.fail(lease.token, BROKEN, retry_after_seconds=0)
    await queue.snooze((await lease_one(queue)).token, MAX_DELAY_SECONDS)
    assert isinstance(await queue.waiting_reason(await queue.get(job.id)), ScheduledFor)


@pytest.mark.cases(3)
@pytest.mark.parametrize("token", ["", "nope", "0" * 64, "Z" * 64, "\0" * 64])
async def test_a_token_that_is_none_is_a_lost_lease(queue: JobQueue, token: str) -> None:
    with pytest.raises(LeaseLost):
        await queue.complete(token)


async def test_what_cannot_be_stored_as_a_result_is_refused_and_the_lease_holds(
    queue: JobQueue,
) -> None:
    await enqueue(queue)
    lease = await lease_one(queue)
    results: list[Any] = [float("nan"), "a\0b", 2**70, object(), "x" * 300_000]
    for result in results:
        with pytest.raises(InputInvalid):
            await queue.complete(lease.token, result)
    assert (await queue.complete(lease.token)).status is JobStatus.SUCCEEDED


async def test_the_code_of_an_error_has_1_to_255_characters(queue: JobQueue) -> None:
    await enqueue(queue)
    lease = await lease_one(queue)
    codes: list[Any] = ["", "c" * 256, secrets.token_hex(3_000), 7]
    for code in codes:
        with pytest.raises(InputInvalid) as refused:
            await queue.fail(lease.token, JobError(code, "m"))
        assert [v.path for v in refused.value.violations] == ["/error/code"]
    failed = await queue.fail(lease.token, JobError("😀" * 255, "m"), retryable=False)
    assert failed.error is not None
    (listed,) = (await queue.list(JobFilter(error_code=failed.error.code))).jobs
    assert listed.id == failed.id


async def test_waiting_is_explained(queue: JobQueue, database_url: str) -> None:
    job = await enqueue(queue)
    assert await queue.waiting_reason(job) == NoWorkerSeen(None)
    first, second = await enqueue(queue, "test.limited"), await enqueue(queue, "test.limited")
    third = await enqueue(queue, "test.limited")
    fourth = await enqueue(queue, "test.limited", priority=90)
    assert await queue.lease(["test.ping"], "w") != []
    assert await queue.waiting_reason(await queue.get(job.id)) is None

    leases = await queue.lease(["test.limited"], "w")
    assert leases[0].job.id == fourth.id
    assert await queue.waiting_reason(third) == BehindInQueue(2)
    assert await queue.waiting_reason(first) == BehindInQueue(0)
    await queue.lease(["test.limited"], "w")
    assert await queue.waiting_reason(second) == ConcurrencyLimitReached(2, 2)


async def test_counts_follow_every_change(queue: JobQueue, database_url: str) -> None:
    await queue.enqueue_many([EnqueueRequest("test.ping", {}) for _ in range(5)])
    leases = await queue.lease(["test.ping"], "w", limit=4)
    await queue.complete(leases[0].token)
    await queue.fail(leases[1].token, BROKEN, retryable=False)
    await queue.release(leases[2].token)
    counts = (await queue.counts())["test.ping"]
    assert (counts.queued, counts.running, counts.succeeded, counts.failed) == (2, 1, 1, 1)
    await queue.tidy()
    assert (await queue.counts())["test.ping"] == counts

    assert await queue.prune(JobStatus.SUCCEEDED, keep_seconds=100, jobs=10) == 0
    await advance(database_url, 101)
    assert await queue.prune(JobStatus.SUCCEEDED, keep_seconds=100, jobs=10) == 1
    assert (await queue.counts())["test.ping"].succeeded == 0
    assert (await queue.counts())["test.ping"].queued == 2


async def test_events_are_delivered_in_every_process_in_order(
    queue: JobQueue, database_url: str
) -> None:
    async with _other(queue, database_url) as other:
        with other.events.subscribe(types=["test.ping"]) as received:
            await enqueue(queue, "test.pong")
            job = await enqueue(queue)
            lease = await lease_one(queue)
            await queue.heartbeat(lease.token, 1)
            await queue.complete(lease.token)
            async with asyncio.timeout(5):
                names = [(await anext(received)).name for _ in range(4)]
        assert names == ["job.created", "job.started", "job.progressed", "job.succeeded"]

        with other.events.subscribe() as received:
            # More than a PostgreSQL notification holds.
            await queue.enqueue_many([EnqueueRequest("test.ping", {}) for _ in range(900)])
            async with asyncio.timeout(5):
                created = {(await anext(received)).job_id for _ in range(900)}
        assert len(created) == 900
        assert job.id not in created


async def test_a_job_can_join_the_callers_own_transaction(
    queue: JobQueue, database_url: str
) -> None:
    engine = create_async_engine(async_url(database_url))
    request = EnqueueRequest("test.ping", {})
    with queue.events.subscribe() as received:
        async with AsyncSession(engine) as session:
            rolled_back = await queue.enqueue(request, session=session)
            await session.rollback()
        async with AsyncSession(engine) as session:
            kept = await queue.enqueue(request, session=session)
            await session.execute(text("SELECT 1"))
            await session.commit()
        async with asyncio.timeout(2):
            assert (await anext(received)).job_id == kept.job.id
    with pytest.raises(JobNotFound):
        await queue.get(rolled_back.job.id)
    assert (await queue.get(kept.job.id)).status is JobStatus.QUEUED
    await engine.dispose()


async def test_an_attempt_that_was_given_back_unspent_may_fail_for_good(
    queue: JobQueue,
) -> None:
    job = await enqueue(queue)
    lease = await lease_one(queue)
    failed = await queue.fail(lease.token, BROKEN, retryable=False, spend_attempt=False)
    assert (failed.status, failed.attempt) == (JobStatus.FAILED, 0)
    attempts = (await queue.attempts([job.id]))[job.id]
    assert [attempt.outcome for attempt in attempts] == [AttemptOutcome.FAILED]


@asynccontextmanager
async def _other(queue: JobQueue, database_url: str) -> AsyncIterator[JobQueue]:
    """What another process has: a queue of its own on the same database."""
    async with JobQueue.from_url(database_url, queue.registry, lease_seconds=30) as other:
        yield other
