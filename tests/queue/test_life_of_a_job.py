"""The state machine: leases, ends of attempts, retries, cancellation, limits, order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from job_registry import JobRegistry
from job_registry_api.queue.database import async_url
from job_registry_api.queue.errors import InputInvalid, JobNotFound, JobStateConflict, LeaseLost
from job_registry_api.queue.models import AttemptOutcome, JobError, JobRecord, JobStatus
from job_registry_api.queue.requests import EnqueueRequest
from job_registry_api.queue.service import (
    BehindInQueue,
    ConcurrencyLimitReached,
    JobService,
    Lease,
    NoWorkerSeen,
    ScheduledFor,
    open_service,
)
from tests.conftest import advance

BROKEN = JobError("broken", "It broke.")


async def enqueue(service: JobService, job_type: str = "test.ping", **options: object) -> JobRecord:
    request = EnqueueRequest(job_type, {}, **options)  # type: ignore[arg-type]
    return (await service.enqueue(request)).job


async def lease_one(service: JobService, job_type: str = "test.ping") -> Lease:
    (lease,) = await service.lease([job_type], "worker-1")
    return lease


async def outcomes(service: JobService, job: JobRecord) -> list[str | None]:
    return [attempt.outcome for attempt in (await service.attempts([job.id]))[job.id]]


async def test_a_leased_job_runs_and_a_completed_one_succeeded(service: JobService) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    assert (lease.job.id, lease.job.status, lease.job.attempt) == (job.id, JobStatus.RUNNING, 1)
    assert lease.job.worker_id == "worker-1"
    assert (lease.deadline_at - lease.job.started_at).total_seconds() == 60  # type: ignore[operator]

    done = await service.complete(lease.token, {"ok": True})
    assert (done.status, done.result, done.error) == (JobStatus.SUCCEEDED, {"ok": True}, None)
    assert done.finished_at is not None
    assert await outcomes(service, job) == ["succeeded"]


async def test_the_same_completion_sent_twice_succeeds_twice_and_writes_once(
    service: JobService,
) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    first = await service.complete(lease.token, 1)
    second = await service.complete(lease.token, 2)
    both = await asyncio.gather(*(service.complete(lease.token, 3) for _ in range(3)))
    assert {done.result for done in (first, second, *both)} == {1}
    assert await outcomes(service, job) == ["succeeded"]


async def test_of_two_reports_at_once_one_counts(service: JobService) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    results = await asyncio.gather(
        service.fail(lease.token, BROKEN),
        service.release(lease.token),
        service.snooze(lease.token, 5),
        return_exceptions=True,
    )
    assert sum(isinstance(result, LeaseLost) for result in results) == 2
    assert len(await outcomes(service, job)) == 1


async def test_a_failed_attempt_is_tried_again_after_its_backoff_until_none_is_left(
    service: JobService, database_url: str
) -> None:
    job = await enqueue(service)
    for attempt, least, most in ((1, 0.5, 1.0), (2, 1.0, 2.0)):
        lease = await lease_one(service)
        assert lease.job.attempt == attempt
        failed = await service.fail(lease.token, BROKEN)
        assert (failed.status, failed.error) == (JobStatus.QUEUED, BROKEN)
        waiting = await service.waiting_reason(failed)
        assert isinstance(waiting, ScheduledFor)
        assert await service.lease(["test.ping"], "w") == []
        await advance(database_url, least - 0.2)
        assert await service.lease(["test.ping"], "w") == []
        await advance(database_url, most - least + 0.2)
    lease = await lease_one(service)
    last = await service.fail(lease.token, BROKEN)
    assert (last.status, last.attempt, last.next_run_at) == (JobStatus.FAILED, 3, None)
    assert await outcomes(service, job) == ["failed"] * 3


async def test_what_is_not_retryable_fails_at_once(service: JobService) -> None:
    await enqueue(service)
    lease = await lease_one(service)
    failed = await service.fail(lease.token, BROKEN, retryable=False)
    assert (failed.status, failed.attempt) == (JobStatus.FAILED, 1)


async def test_retry_after_replaces_the_backoff(service: JobService, database_url: str) -> None:
    await enqueue(service)
    lease = await lease_one(service)
    await service.fail(lease.token, BROKEN, retry_after_seconds=100)
    await advance(database_url, 99)
    assert await service.lease(["test.ping"], "w") == []
    await advance(database_url, 1.1)
    assert await service.lease(["test.ping"], "w") != []
    with pytest.raises(InputInvalid):
        await service.fail(lease.token, BROKEN, retry_after_seconds=-1)


async def test_releases_and_snoozes_give_the_attempt_back(
    service: JobService, database_url: str
) -> None:
    job = await enqueue(service)
    for _ in range(5):
        lease = await lease_one(service)
        assert lease.job.attempt == 1
        assert (await service.release(lease.token)).attempt == 0
        await advance(database_url, 60)
    lease = await lease_one(service)
    snoozed = await service.snooze(lease.token, 50)
    assert (snoozed.attempt, snoozed.status) == (0, JobStatus.QUEUED)
    await advance(database_url, 51)
    assert (await lease_one(service)).job.attempt == 1
    assert await outcomes(service, job) == ["released"] * 5 + ["snoozed", None]


async def test_a_lost_lease_spends_its_attempt_and_its_token_writes_nothing_more(
    service: JobService, database_url: str
) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    await advance(database_url, 31)

    for report in (
        service.complete(lease.token),
        service.fail(lease.token, BROKEN),
        service.release(lease.token),
        service.snooze(lease.token, 1),
        service.heartbeat(lease.token),
    ):
        with pytest.raises(LeaseLost):
            await report
    (recovered,) = await service.recover()
    assert (recovered.id, recovered.status, recovered.attempt) == (job.id, JobStatus.QUEUED, 1)
    assert await outcomes(service, job) == ["lost"]

    await advance(database_url, 10)
    again = await lease_one(service)
    with pytest.raises(LeaseLost):
        await service.complete(lease.token)
    assert (await service.complete(again.token)).status is JobStatus.SUCCEEDED


async def test_whoever_claims_recovers(service: JobService, database_url: str) -> None:
    job = await enqueue(service)
    await lease_one(service)
    await advance(database_url, 31)
    # A worker of another type asks, and finds nothing to do for itself.
    assert await service.lease(["test.pong"], "w") == []
    assert (await service.get(job.id)).status is JobStatus.QUEUED


async def test_heartbeats_keep_a_lease_and_never_extend_the_timeout(
    service: JobService, database_url: str
) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    await advance(database_url, 25)
    beat = await service.heartbeat(lease.token, {"done": 1})
    assert beat.seconds_left == pytest.approx(35, abs=1)
    assert (await service.get(job.id)).progress == {"done": 1}
    await advance(database_url, 25)
    assert (await service.heartbeat(lease.token)).job.progress == {"done": 1}
    await advance(database_url, 11)
    with pytest.raises(LeaseLost):
        await service.heartbeat(lease.token)
    (recovered,) = await service.recover()
    assert recovered.error is not None
    assert recovered.error.code == "timed_out"
    assert await outcomes(service, job) == ["timed_out"]


async def test_lost_leases_are_counted_against_max_attempts(
    service: JobService, database_url: str
) -> None:
    job = await enqueue(service, max_attempts=2)
    for _ in range(2):
        await lease_one(service)
        await advance(database_url, 31)
        await service.recover()
        await advance(database_url, 10)
    ended = await service.get(job.id)
    assert (ended.status, ended.attempt) == (JobStatus.FAILED, 2)
    assert await outcomes(service, job) == ["lost", "lost"]


async def test_a_queued_job_is_cancelled_at_once(service: JobService) -> None:
    job = await enqueue(service)
    assert (await service.cancel(job.id)).status is JobStatus.CANCELLED
    assert await service.lease(["test.ping"], "w") == []
    with pytest.raises(JobStateConflict) as refused:
        await service.cancel(job.id)
    assert refused.value.status is JobStatus.CANCELLED


@pytest.mark.parametrize("end", ["fail", "release", "snooze", "stop", "lost"])
async def test_a_running_job_is_cancelled_when_its_worker_stops(
    service: JobService, database_url: str, end: str
) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    asked = await service.cancel(job.id)
    assert asked.status is JobStatus.RUNNING
    assert (await service.heartbeat(lease.token)).cancel_requested

    match end:
        case "fail":
            await service.fail(lease.token, BROKEN)
        case "release":
            await service.release(lease.token)
        case "snooze":
            await service.snooze(lease.token, 5)
        case "stop":
            await service.stop(lease.token, BROKEN)
        case "lost":
            await advance(database_url, 31)
            await service.recover()
    assert (await service.get(job.id)).status is JobStatus.CANCELLED
    assert await outcomes(service, job) == ["cancelled"]


async def test_a_job_that_was_done_before_it_heard_of_its_cancellation_succeeded(
    service: JobService,
) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    await service.cancel(job.id)
    assert (await service.complete(lease.token)).status is JobStatus.SUCCEEDED


async def test_failed_and_cancelled_jobs_are_retried_with_an_attempt_left(
    service: JobService,
) -> None:
    job = await enqueue(service, max_attempts=1)
    with pytest.raises(JobStateConflict):
        await service.retry(job.id)
    lease = await lease_one(service)
    await service.fail(lease.token, BROKEN)
    retried = await service.retry(job.id)
    assert (retried.status, retried.attempt, retried.max_attempts) == (JobStatus.QUEUED, 1, 2)
    assert (await lease_one(service)).job.attempt == 2

    cancelled = await enqueue(service)
    await service.cancel(cancelled.id)
    assert (await service.retry(cancelled.id)).max_attempts == 3
    with pytest.raises(JobNotFound):
        await service.retry("01a20b59-007a-7389-bb53-785ecafc486c")


async def test_due_jobs_go_by_priority_then_time_then_id(service: JobService) -> None:
    low = await enqueue(service, priority=10)
    first = await enqueue(service)
    second = await enqueue(service)
    high = await enqueue(service, priority=100)
    order = []
    for _ in range(4):
        (lease,) = await service.lease(["test.ping", "test.pong"], "w")
        order.append(lease.job.id)
    assert order == [high.id, first.id, second.id, low.id]


async def test_types_of_one_priority_take_turns(service: JobService) -> None:
    # Given a flood of one type, and then some jobs of another
    for _ in range(20):
        await enqueue(service, "test.ping")
    for _ in range(3):
        await enqueue(service, "test.pong")

    # When jobs are leased one by one, and when they are leased together
    singly = [(await service.lease(["test.ping", "test.pong"], "w"))[0].job.type for _ in range(4)]
    together = await service.lease(["test.ping", "test.pong"], "w", limit=6)

    # I expect the other type to have every second turn, for as long as it has jobs
    assert singly in (["test.ping", "test.pong"] * 2, ["test.pong", "test.ping"] * 2)
    assert sorted(lease.job.type for lease in together) == ["test.ping"] * 5 + ["test.pong"]


async def test_a_job_that_is_handed_back_again_and_again_waits_longer_each_time(
    service: JobService, database_url: str
) -> None:
    job = await enqueue(service)
    waits = []
    for _ in range(10):
        lease = await lease_one(service)
        returned = await service.snooze(lease.token, 0)
        assert returned.next_run_at is not None
        waits.append((returned.next_run_at - await service._store.now()).total_seconds())
        await advance(database_url, 61)
    assert waits[0] <= 0
    assert [round(wait) for wait in waits[1:]] == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    # An attempt that is spent begins anew
    await service.fail((await lease_one(service)).token, BROKEN)
    await advance(database_url, 61)
    lease = await lease_one(service)
    assert (await service.release(lease.token)).next_run_at is not None
    assert (await lease_one(service)).job.id == job.id


async def test_attempts_that_were_handed_back_are_kept_up_to_a_bound(
    service: JobService, database_url: str
) -> None:
    job = await enqueue(service)
    for _ in range(70):
        await service.release((await lease_one(service)).token)
        await advance(database_url, 61)
    assert 32 <= len(await outcomes(service, job)) <= 64


async def test_a_limit_is_never_passed_and_a_full_type_holds_up_no_other(
    service: JobService,
) -> None:
    for _ in range(5):
        await enqueue(service, "test.limited", priority=100)
    other = await enqueue(service)

    leases = await service.lease(["test.limited", "test.ping"], "w", limit=10)
    assert sorted(lease.job.type for lease in leases) == ["test.limited"] * 2 + ["test.ping"]
    assert other.id in {lease.job.id for lease in leases}
    assert await service.lease(["test.limited", "test.ping"], "w", limit=10) == []

    await service.complete(leases[0].token)
    assert len(await service.lease(["test.limited"], "w", limit=10)) == 1


async def test_concurrent_claims_over_several_processes_keep_the_limit_and_share_no_job(
    service: JobService, database_url: str
) -> None:
    await service.enqueue_many([EnqueueRequest("test.limited", {}) for _ in range(20)])
    await service.enqueue_many([EnqueueRequest("test.ping", {}) for _ in range(200)])
    async with _other(service, database_url) as second, _other(service, database_url) as third:
        claims = await asyncio.gather(
            *(
                each.lease(["test.limited", "test.ping"], f"w{n}", limit=20)
                for n in range(4)
                for each in (service, second, third)
            )
        )
    leased = [lease.job for claim in claims for lease in claim]
    assert len({job.id for job in leased}) == len(leased)
    assert sum(job.type == "test.limited" for job in leased) == 2


async def test_a_waiting_lease_hears_of_a_job_from_another_process_and_of_room(
    service: JobService, database_url: str
) -> None:
    async with _other(service, database_url) as other:
        clock = asyncio.get_running_loop().time
        waiting = asyncio.create_task(service.lease(["test.limited"], "w", limit=2, wait_seconds=9))
        await asyncio.sleep(0.3)
        started = clock()
        for _ in range(3):
            await enqueue(other, "test.limited")
        leases = await waiting
        while len(leases) < 2:
            leases += await service.lease(["test.limited"], "w", wait_seconds=9)
        # Full now: the next one comes when another process makes room.
        waiting = asyncio.create_task(service.lease(["test.limited"], "w", wait_seconds=9))
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
        open_service(registry, url, lease_seconds=30) as service,
        open_service(registry, url, lease_seconds=30) as other,
    ):
        with other.events.subscribe() as heard:
            job = await enqueue(service)
            async with asyncio.timeout(3):
                assert (await anext(heard)).job_id == job.id


async def test_stopping_ends_a_wait(service: JobService) -> None:
    stop = asyncio.Event()
    waiting = asyncio.create_task(service.lease(["test.ping"], "w", wait_seconds=20, stop=stop))
    await asyncio.sleep(0.1)
    stop.set()
    async with asyncio.timeout(1):
        assert await waiting == []


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"job_types": []}, "/jobTypes"),
        ({"job_types": ["test.ping", "nope"]}, "/jobTypes/1"),
        ({"limit": 0}, "/limit"),
        ({"limit": 101}, "/limit"),
        ({"wait_seconds": 31}, "/waitSeconds"),
        ({"worker_id": ""}, "/workerId"),
    ],
)
async def test_a_wrong_lease_is_refused(
    service: JobService, arguments: dict[str, object], path: str
) -> None:
    with pytest.raises(InputInvalid) as refused:
        await service.lease(**{"job_types": ["test.ping"], "worker_id": "w", **arguments})  # type: ignore[arg-type]
    assert [v.path for v in refused.value.violations] == [path]


@pytest.mark.parametrize("token", ["", "nope", "0" * 64, "Z" * 64, "\0" * 64])
async def test_a_token_that_is_none_is_a_lost_lease(service: JobService, token: str) -> None:
    with pytest.raises(LeaseLost):
        await service.complete(token)


async def test_what_cannot_be_stored_as_a_result_is_refused_and_the_lease_holds(
    service: JobService,
) -> None:
    await enqueue(service)
    lease = await lease_one(service)
    for result in (float("nan"), "a\0b", 2**70, object(), "x" * 300_000):
        with pytest.raises(InputInvalid):
            await service.complete(lease.token, result)  # type: ignore[arg-type]
    assert (await service.complete(lease.token)).status is JobStatus.SUCCEEDED


async def test_waiting_is_explained(service: JobService, database_url: str) -> None:
    job = await enqueue(service)
    assert await service.waiting_reason(job) == NoWorkerSeen(None)
    first, second = await enqueue(service, "test.limited"), await enqueue(service, "test.limited")
    third = await enqueue(service, "test.limited")
    fourth = await enqueue(service, "test.limited", priority=90)
    assert await service.lease(["test.ping"], "w") != []
    assert await service.waiting_reason(await service.get(job.id)) is None

    leases = await service.lease(["test.limited"], "w")
    assert leases[0].job.id == fourth.id
    assert await service.waiting_reason(third) == BehindInQueue(2)
    assert await service.waiting_reason(first) == BehindInQueue(0)
    await service.lease(["test.limited"], "w")
    assert await service.waiting_reason(second) == ConcurrencyLimitReached(2, 2)


async def test_counts_follow_every_change(service: JobService, database_url: str) -> None:
    await service.enqueue_many([EnqueueRequest("test.ping", {}) for _ in range(5)])
    leases = await service.lease(["test.ping"], "w", limit=4)
    await service.complete(leases[0].token)
    await service.fail(leases[1].token, BROKEN, retryable=False)
    await service.release(leases[2].token)
    counts = (await service.counts())["test.ping"]
    assert (counts.queued, counts.running, counts.succeeded, counts.failed) == (2, 1, 1, 1)
    await service.tidy()
    assert (await service.counts())["test.ping"] == counts

    assert await service.prune(JobStatus.SUCCEEDED, keep_seconds=100, jobs=10) == 0
    await advance(database_url, 101)
    assert await service.prune(JobStatus.SUCCEEDED, keep_seconds=100, jobs=10) == 1
    assert (await service.counts())["test.ping"].succeeded == 0
    assert (await service.counts())["test.ping"].queued == 2


async def test_events_are_heard_in_every_process_in_order(
    service: JobService, database_url: str
) -> None:
    async with _other(service, database_url) as other:
        with other.events.subscribe(types=["test.ping"]) as heard:
            await enqueue(service, "test.pong")
            job = await enqueue(service)
            lease = await lease_one(service)
            await service.heartbeat(lease.token, 1)
            await service.complete(lease.token)
            async with asyncio.timeout(5):
                names = [(await anext(heard)).name for _ in range(4)]
        assert names == ["job.created", "job.started", "job.progressed", "job.succeeded"]

        with other.events.subscribe() as heard:
            # More than a PostgreSQL notification holds.
            await service.enqueue_many([EnqueueRequest("test.ping", {}) for _ in range(900)])
            async with asyncio.timeout(5):
                created = {(await anext(heard)).job_id for _ in range(900)}
        assert len(created) == 900
        assert job.id not in created


async def test_a_job_can_join_the_callers_own_transaction(
    service: JobService, database_url: str
) -> None:
    engine = create_async_engine(async_url(database_url))
    request = EnqueueRequest("test.ping", {})
    with service.events.subscribe() as heard:
        async with AsyncSession(engine) as session:
            rolled_back = await service.enqueue(request, session=session)
            await session.rollback()
        async with AsyncSession(engine) as session:
            kept = await service.enqueue(request, session=session)
            await session.execute(text("SELECT 1"))
            await session.commit()
        async with asyncio.timeout(2):
            assert (await anext(heard)).job_id == kept.job.id
    with pytest.raises(JobNotFound):
        await service.get(rolled_back.job.id)
    assert (await service.get(kept.job.id)).status is JobStatus.QUEUED
    await engine.dispose()


async def test_an_attempt_that_was_given_back_unspent_may_fail_for_good(
    service: JobService,
) -> None:
    job = await enqueue(service)
    lease = await lease_one(service)
    failed = await service.fail(lease.token, BROKEN, retryable=False, spend_attempt=False)
    assert (failed.status, failed.attempt) == (JobStatus.FAILED, 0)
    attempts = (await service.attempts([job.id]))[job.id]
    assert [attempt.outcome for attempt in attempts] == [AttemptOutcome.FAILED]


@asynccontextmanager
async def _other(service: JobService, database_url: str) -> AsyncIterator[JobService]:
    """What another process has: a service of its own on the same database."""
    async with open_service(service.registry, database_url, lease_seconds=30) as other:
        yield other
