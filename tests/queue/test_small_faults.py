"""Rules that one dropped condition would break: each test notices one small fault of the core."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.queue import claiming, reading
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import (
    EventsMissed,
    InputInvalid,
    JobStateConflict,
    LeaseLost,
    QueueUnavailable,
)
from job_registry_api.queue.event_stream import Gap, KeptBatches
from job_registry_api.queue.events import JobEvent, Subscription
from job_registry_api.queue.filters import JSON_VALUES, JobFilter
from job_registry_api.queue.job_logs import (
    LogLevel,
    LogLine,
    check_log_lines,
    line_as_text,
    text_of_lines,
)
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.models import METADATA, JobError, JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import (
    BehindInQueue,
    ConcurrencyLimitReached,
    NoWorkerSeen,
    ScheduledFor,
)
from job_registry_api.queue.store import Ended, LeaseState, Report, statements
from tests.conftest import advance, run_sql

BROKEN = JobError("broken", "It broke.")
PING = EnqueueRequest("test.ping", {})


class Nothing(Payload):
    pass


REPORTS: dict[str, Callable[[JobQueue, str], Awaitable[object]]] = {
    "heartbeat": lambda queue, token: queue.heartbeat(token, {"from": "an intruder"}),
    "complete": lambda queue, token: queue.complete(token, {"from": "an intruder"}),
    "succeed": lambda queue, token: queue.succeed(token, {"from": "an intruder"}),
    "fail": lambda queue, token: queue.fail(token, BROKEN),
    "release": lambda queue, token: queue.release(token),
    "snooze": lambda queue, token: queue.snooze(token, 10),
    "time_out": lambda queue, token: queue.time_out(token),
    "stop": lambda queue, token: queue.stop(token, BROKEN),
    "park": lambda queue, token: queue.park(token, "f" * 64, BROKEN),
}

every_report = pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_statement_has_the_name_of_another(database: str) -> None:
    folder = resources.files("job_registry_api.queue") / "statements"
    text = (folder / f"{database}.sql").read_text("utf-8")
    assert len(statements(database)) == text.count("\n-- name:")


def test_every_json_value_of_a_job_is_bounded_where_jobs_are_locked() -> None:
    columns = METADATA.tables["job"].columns
    assert {column.name for column in columns if isinstance(column.type, JSON)} == set(JSON_VALUES)


@pytest.mark.cases(3)
@every_report
async def test_a_token_with_another_secret_is_refused_and_changes_nothing(
    queue: JobQueue, database_url: str, report: Callable[[JobQueue, str], Awaitable[object]]
) -> None:
    await queue.enqueue(PING)
    (lease,) = await queue.lease(["test.ping"], "w")
    before = await asyncio.to_thread(run_sql, database_url, "SELECT * FROM job")
    # A token names its job, whose id everybody may know, and proves it by the rest.
    forged = lease.token[:32] + secrets.token_hex(16)
    with pytest.raises(LeaseLost):
        await report(queue, forged)
    assert await asyncio.to_thread(run_sql, database_url, "SELECT * FROM job") == before
    assert (await queue.complete(lease.token)).status is JobStatus.SUCCEEDED


@pytest.mark.cases(3)
@every_report
async def test_a_former_attempts_token_cannot_touch_the_attempt_that_runs_now(
    queue: JobQueue, database_url: str, report: Callable[[JobQueue, str], Awaitable[object]]
) -> None:
    await queue.enqueue(PING)
    (first,) = await queue.lease(["test.ping"], "w1")
    await queue.release(first.token)
    (second,) = await queue.lease(["test.ping"], "w2")
    before = await asyncio.to_thread(run_sql, database_url, "SELECT * FROM job")
    with pytest.raises(LeaseLost):
        await report(queue, first.token)
    assert await asyncio.to_thread(run_sql, database_url, "SELECT * FROM job") == before
    assert (await queue.complete(second.token)).status is JobStatus.SUCCEEDED


async def test_a_lost_lease_is_reported_beside_the_one_that_its_process_has_now(
    queue: JobQueue, database_url: str
) -> None:
    # Given a process that lost a job for a while, and leased it anew
    job = (await queue.enqueue(PING)).job
    (lost,) = await queue.lease(["test.ping"], "w")
    await advance(database_url, 31)
    await queue.recover()
    await advance(database_url, 2)
    (held,) = await queue.lease(["test.ping"], "w")

    # When it renews both together, as it does for all of its attempts
    for renewals in (
        [Renewal(lost.token, b'{"from": "before"}'), Renewal(held.token)],
        [Renewal(held.token), Renewal(lost.token, b'{"from": "before"}')],
    ):
        answers = dict(zip(renewals, await queue.renew(renewals), strict=True))

        # I expect the former attempt to be stopped
        for renewal, answer in answers.items():
            assert isinstance(answer, LeaseLost) == (renewal.token == lost.token)
    assert (await queue.get(job.id)).progress is None


@pytest.mark.parametrize("how", ["release", "fail"])
async def test_a_large_job_that_is_released_is_reported_as_it_was_released(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What an answer leaves out is read afterwards, when another worker may have the job."""
    payload = {"text": secrets.token_hex(20_000)}
    job = (await queue.enqueue(EnqueueRequest("test.ping", payload))).job
    (lease,) = await queue.lease(["test.ping"], "w")
    get_many = queue._store.get_many
    leased = []

    async def get_many_later(ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, JobRecord]:
        monkeypatch.undo()
        leased.extend(await queue.lease(["test.ping"], "other"))
        return await get_many(ids)

    monkeypatch.setattr(queue._store, "get_many", get_many_later)
    if how == "release":
        returned = await queue.release(lease.token)
    else:
        returned = await queue.fail(lease.token, BROKEN, retry_after_seconds=0)
        assert returned.error == BROKEN
    assert (returned.id, returned.status) == (job.id, JobStatus.QUEUED)
    assert returned.payload == payload
    for other in leased:
        assert other.job.payload == payload


async def test_a_report_is_answered_though_what_became_of_another_cannot_be_read(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.enqueue_many([PING, PING])
    lost, held = await queue.lease(["test.ping"], "w", limit=2)
    await queue.release(lost.token)
    lease_states = queue._store.lease_states

    async def unavailable(reports: Sequence[Report]) -> dict[uuid.UUID, LeaseState]:
        monkeypatch.setattr(queue._store, "lease_states", lease_states)
        raise QueueUnavailable("it is away for a moment")

    monkeypatch.setattr(queue._store, "lease_states", unavailable)
    # Both are in one group.
    answers = await asyncio.gather(
        queue.complete(lost.token), queue.fail(held.token, BROKEN), return_exceptions=True
    )
    assert isinstance(answers[0], LeaseLost)
    assert isinstance(answers[1], JobRecord)
    assert answers[1].status is JobStatus.QUEUED


async def test_a_report_is_answered_though_the_repetition_of_another_fails(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.enqueue_many([PING, PING])
    twice, once = await queue.lease(["test.ping"], "w", limit=2)
    end = queue._store.end
    groups: list[int] = []

    async def unavailable_later(reports: Sequence[Report]) -> dict[uuid.UUID, Ended]:
        groups.append(len(reports))
        if len(groups) == 2:
            raise QueueUnavailable("it is away for a moment")
        return await end(reports)

    monkeypatch.setattr(queue._store, "end", unavailable_later)
    # All are in one group, which has a statement for each report of a job.
    answers = await asyncio.gather(
        *(queue.fail(lease.token, BROKEN) for lease in (twice, twice, once)),
        return_exceptions=True,
    )
    assert [type(each) for each in answers] == [JobRecord, LeaseLost, JobRecord]
    assert groups == [2, 1, 1]


async def test_a_report_that_the_database_refuses_says_why_at_once(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.enqueue(PING)
    (lease,) = await queue.lease(["test.ping"], "w")
    for method, token in (("end", lease.token), ("lease_states", "0" * 64)):
        with monkeypatch.context() as away:
            away.setattr(queue._store, method, _unavailable)
            with pytest.raises(QueueUnavailable) as caught:
                await asyncio.wait_for(queue.fail(token, BROKEN), 5)
            assert caught.value.reason == "it is away for a moment"
    with pytest.raises(LeaseLost):
        await queue.leased_type("0" * 64)


async def _unavailable(_of: object) -> Any:
    raise QueueUnavailable("it is away for a moment")


async def test_reports_are_answered_though_a_later_statement_of_their_group_fails(
    fresh_postgresql_url: str, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with JobQueue.from_url(fresh_postgresql_url, registry, prepare=False) as queue:
        await queue.enqueue_many([PING, PING])
        failed, parked = await queue.lease(["test.ping"], "w", limit=2)
        store: Any = queue._store
        run = store._run

        async def unavailable(name: str, parameters: Mapping[str, Any]) -> object:
            if name == "park":
                monkeypatch.setattr(store, "_run", run)
                raise QueueUnavailable("it is away for a moment")
            return await run(name, parameters)

        monkeypatch.setattr(store, "_run", unavailable)
        answers = await asyncio.gather(
            queue.fail(failed.token, BROKEN), queue.park(parked.token, "f" * 64, BROKEN)
        )
        assert [each.is_parked for each in answers] == [False, True]


async def test_reports_are_answered_though_a_large_job_cannot_be_read_at_once(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"text": secrets.token_hex(20_000)}
    await queue.enqueue_many([PING, EnqueueRequest("test.ping", large)])
    leases = await queue.lease(["test.ping"], "w", limit=2)
    get_many = queue._store.get_many

    async def unavailable(_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, JobRecord]:
        monkeypatch.setattr(queue._store, "get_many", get_many)
        raise QueueUnavailable("it is away for a moment")

    monkeypatch.setattr(queue._store, "get_many", unavailable)
    answers = await asyncio.gather(*(queue.fail(lease.token, BROKEN) for lease in leases))
    assert [each.error for each in answers] == [BROKEN, BROKEN]
    assert large in [each.payload for each in answers]
    for lease in leases:
        monkeypatch.setattr(queue._store, "get_many", unavailable)
        cancelled = await queue.cancel(lease.job.id)
        assert (cancelled.status, cancelled.payload) == (JobStatus.CANCELLED, lease.job.payload)


async def test_a_renewal_is_answered_though_its_event_cannot_be_published_here(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")

    async def unavailable(ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, JobRecord]:
        raise QueueUnavailable("it is away for a moment")

    with monkeypatch.context() as away:
        away.setattr(queue._store, "get_many", unavailable)
        (renewed,) = await queue.renew([Renewal(lease.token, b'{"done": 1}')])
    assert not isinstance(renewed, LeaseLost)
    assert (await queue.get(job.id)).progress == {"done": 1}


@pytest.mark.parametrize("name", ["\x00", "\ud800", "a\"b'c:d", "\\u0000"])
async def test_jobs_of_a_type_that_cannot_be_are_none(queue: JobQueue, name: str) -> None:
    await queue.enqueue(PING)
    assert (await queue.list(JobFilter(types=(name,)))).jobs == []
    assert len((await queue.list(JobFilter(types=(name, "test.ping")))).jobs) == 1


# A worker whose clock is ahead of the queue's ends an attempt at its timeout all the same.
@pytest.mark.parametrize("report", [v for k, v in REPORTS.items() if k != "time_out"])
async def test_a_lease_that_ran_out_is_lost_before_anybody_recovers_it(
    queue: JobQueue, database_url: str, report: Callable[[JobQueue, str], Awaitable[object]]
) -> None:
    await queue.enqueue(PING)
    (lease,) = await queue.lease(["test.ping"], "w")
    await advance(database_url, 31)
    with pytest.raises(LeaseLost):
        await report(queue, lease.token)
    job = await queue.get(lease.job.id)
    assert (job.status, job.progress) == (JobStatus.RUNNING, None)


async def test_a_lease_that_holds_is_not_recovered(queue: JobQueue, database_url: str) -> None:
    await queue.enqueue_many([PING, PING])
    (kept,) = await queue.lease(["test.ping"], "w1")
    await advance(database_url, 20)
    await queue.heartbeat(kept.token)
    (other,) = await queue.lease(["test.ping"], "w2")
    await advance(database_url, 29)
    assert await queue.recover() == []
    assert await queue.lease(["test.ping"], "w3") == []
    await queue.complete(kept.token)
    await queue.complete(other.token)


async def test_an_enqueue_whose_caller_is_cancelled_leaves_those_beside_it_answered(
    queue: JobQueue,
) -> None:
    for cancelled_places in ({0}, {3}, {0, 4, 9}, set(range(9))):
        calls = [asyncio.create_task(queue.enqueue(PING)) for _ in range(10)]
        # Once with the group still waiting, and once with its commit under way.
        await asyncio.sleep(0 if 3 in cancelled_places else 0.001)
        for place in cancelled_places:
            calls[place].cancel()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*calls, return_exceptions=True)
        for place, result in enumerate(results):
            if place not in cancelled_places:
                assert not isinstance(result, BaseException), result
                assert (await queue.get(result.job.id)).status is JobStatus.QUEUED
        # Nor does the next group hang.
        async with asyncio.timeout(10):
            await queue.enqueue(PING)


async def test_a_report_whose_caller_is_cancelled_leaves_those_beside_it_answered(
    queue: JobQueue,
) -> None:
    await queue.enqueue_many([PING] * 10)
    leases = await queue.lease(["test.ping"], "w", limit=10)
    calls = [asyncio.create_task(queue.complete(lease.token)) for lease in leases]
    await asyncio.sleep(0.001)
    for place in (0, 5):
        calls[place].cancel()
    async with asyncio.timeout(10):
        results = await asyncio.gather(*calls, return_exceptions=True)
    answered = [result for place, result in enumerate(results) if place not in (0, 5)]
    assert all(not isinstance(result, BaseException) for result in answered), answered
    # Sent again, the others' are answered as well, whether or not they had been written.
    for place in (0, 5):
        assert (await queue.complete(leases[place].token)).status is JobStatus.SUCCEEDED


async def test_a_retried_job_is_not_marked_as_cancelled_any_more(queue: JobQueue) -> None:
    job = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")
    assert (await queue.cancel(job.id)).cancel_requested_at is not None
    assert (await queue.heartbeat(lease.token)).cancel_requested
    assert (await queue.fail(lease.token, BROKEN)).status is JobStatus.CANCELLED

    retried = await queue.retry(job.id)
    assert (retried.status, retried.cancel_requested_at) == (JobStatus.QUEUED, None)
    (again,) = await queue.lease(["test.ping"], "w")
    assert again.job.cancel_requested_at is None
    assert not (await queue.heartbeat(again.token)).cancel_requested
    # Its failure is a failure, and no late answer to the cancellation of before.
    assert (await queue.fail(again.token, BROKEN)).status is JobStatus.QUEUED


async def test_a_job_that_was_cancelled_while_queued_and_retried_runs_like_any_other(
    queue: JobQueue,
) -> None:
    job = (await queue.enqueue(PING)).job
    cancelled = await queue.cancel(job.id)
    assert (cancelled.status, cancelled.next_run_at) == (JobStatus.CANCELLED, None)
    assert await queue.lease(["test.ping"], "w") == []
    with pytest.raises(JobStateConflict):
        await queue.cancel(job.id)
    await queue.retry(job.id)
    (lease,) = await queue.lease(["test.ping"], "w")
    assert not (await queue.heartbeat(lease.token)).cancel_requested
    done = await queue.complete(lease.token)
    assert (done.status, done.cancel_requested_at) == (JobStatus.SUCCEEDED, None)


@pytest.mark.parametrize("ending", ["fail", "release", "snooze", "lost"])
async def test_a_new_attempt_does_not_show_the_progress_of_the_former(
    queue: JobQueue, database_url: str, ending: str
) -> None:
    job = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.heartbeat(lease.token, {"done": 0.5})
    # A heartbeat without progress leaves it as it is.
    await queue.heartbeat(lease.token)
    assert (await queue.get(job.id)).progress == {"done": 0.5}
    match ending:
        case "fail":
            await queue.fail(lease.token, BROKEN, retry_after_seconds=0)
        case "release":
            await queue.release(lease.token)
        case "snooze":
            await queue.snooze(lease.token, 0)
        case "lost":
            await advance(database_url, 31)
            await queue.recover()
            await advance(database_url, 10)
    (again,) = await queue.lease(["test.ping"], "w")
    assert again.job.progress is None
    assert (await queue.get(job.id)).progress is None


async def test_waiting_for_its_time_comes_before_every_other_reason(
    queue: JobQueue, database_url: str
) -> None:
    job = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")
    later = await queue.snooze(lease.token, 100)
    assert later.next_run_at is not None
    assert await queue.waiting_reason(later) == ScheduledFor(later.next_run_at)
    await advance(database_url, 101)
    due = await queue.get(job.id)
    assert isinstance(await queue.waiting_reason(due), NoWorkerSeen)


async def test_waiting_for_room_is_reported_with_the_limit_and_what_runs(queue: JobQueue) -> None:
    limited = EnqueueRequest("test.limited", {})
    jobs = [(await queue.enqueue(limited)).job for _ in range(3)]
    leases = await queue.lease(["test.limited"], "w", limit=2)
    assert await queue.waiting_reason(jobs[2]) == ConcurrencyLimitReached(2, 2)
    await queue.complete(leases[0].token)
    # There is room again, and a worker that works this type.
    assert await queue.waiting_reason(jobs[2]) == BehindInQueue(0)


async def test_waiting_for_a_worker_says_how_long_ago_one_was_seen(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (await queue.enqueue(PING)).job
    assert await queue.waiting_reason(job) == NoWorkerSeen(None)
    # A worker for another type is none for this one.
    await queue.lease(["test.pong"], "w")
    assert await queue.waiting_reason(job) == NoWorkerSeen(None)
    (lease,) = await queue.lease(["test.ping"], "w")
    job = await queue.release(lease.token)
    assert await queue.waiting_reason(job) == BehindInQueue(0)
    await advance(database_url, 59)
    assert await queue.waiting_reason(job) == BehindInQueue(0)
    await advance(database_url, 10)
    reason = await queue.waiting_reason(job)
    assert isinstance(reason, NoWorkerSeen)
    assert reason.last_seen_seconds_ago is not None
    assert 69 <= reason.last_seen_seconds_ago < 80
    monkeypatch.setattr(claiming, "WORKER_SEEN_SECONDS", 0.0)
    await queue.show_worker(["test.ping"])
    assert await queue.waiting_reason(job) == BehindInQueue(0)


@pytest.mark.parametrize("job_type", ["test.ping", "test.limited"])
async def test_jobs_of_workers_that_died_do_not_count_as_running(
    queue: JobQueue, database_url: str, job_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WORKER_ABSENT_SECONDS", 30.0)
    jobs = [(await queue.enqueue(EnqueueRequest(job_type, {}))).job for _ in range(3)]
    leases = await queue.lease([job_type], "w", limit=2)
    await advance(database_url, 25)
    await queue.heartbeat(leases[0].token)
    await advance(database_url, 20)
    assert list(await queue.expired_leases()) == [leases[1].job.id]
    # A worker that has no free slot requests no jobs, and renews its leases.
    assert await queue.waiting_reason(jobs[2]) == BehindInQueue(0)
    # Without a process that claims or does the upkeep, nobody ends their attempts.
    await advance(database_url, 15)
    assert isinstance(await queue.waiting_reason(jobs[2]), NoWorkerSeen)
    assert set(await queue.expired_leases()) == {each.job.id for each in leases}
    await queue.recover()
    assert await queue.expired_leases() == {}


async def test_leases_that_expired_long_ago_do_not_hide_the_jobs_that_run(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WORKER_ABSENT_SECONDS", 30.0)
    policy = JobPolicy(timeout_seconds=600, concurrency_limit=2)
    slow = JobType(name="test.slow", payload=Nothing, policy=policy)
    async with JobQueue.from_url(database_url, [slow]) as queue:
        jobs = [(await queue.enqueue(Nothing())).job for _ in range(3)]
        running, _ = await queue.lease(["test.slow"], "w", limit=2)
        for _ in range(4):
            await advance(database_url, 25)
            await queue.heartbeat(running.token)
        assert len(await queue.expired_leases()) == 1
        assert await queue.waiting_reason(jobs[2]) == BehindInQueue(0)


async def test_a_lease_under_one_name_that_expired_does_not_hide_jobs_that_run_under_another(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WORKER_ABSENT_SECONDS", 30.0)
    memo = JobType(name="memo", payload=Nothing)
    note = JobType(name="note", payload=Nothing, former_names=["memo"])
    async with (
        JobQueue.from_url(database_url, [memo]) as before,
        JobQueue.from_url(database_url, [note]) as queue,
    ):
        job = (await before.enqueue(Nothing())).job
        running = (await queue.lease(["note"], "w"))[0]
        await queue.enqueue(Nothing())
        (lost,) = await queue.lease(["note"], "w")
        assert running.job.id == job.id != lost.job.id
        last = (await before.enqueue(Nothing())).job
        await advance(database_url, 25)
        await queue.heartbeat(running.token)
        await advance(database_url, 20)
        assert await queue.waiting_reason(await queue.get(last.id)) == BehindInQueue(0)


async def test_waiting_behind_others_counts_those_due_before_it(queue: JobQueue) -> None:
    first, second = (await queue.enqueue(PING)).job, (await queue.enqueue(PING)).job
    high = (await queue.enqueue(PING._replace(priority=90))).job
    low = (await queue.enqueue(PING._replace(priority=10))).job
    # Neither another type nor what is not due goes before.
    await queue.enqueue(EnqueueRequest("test.pong", {}, priority=99))
    soon = first.created_at.replace(year=first.created_at.year + 1)
    await queue.enqueue(PING._replace(schedule_at=soon, priority=99))
    await queue.show_worker(["test.ping"])
    reasons = [await queue.waiting_reason(job) for job in (high, first, second, low)]
    assert reasons == [BehindInQueue(0), BehindInQueue(1), BehindInQueue(2), BehindInQueue(3)]


async def test_a_job_that_does_not_wait_has_no_reason(queue: JobQueue) -> None:
    job = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")
    assert await queue.waiting_reason(await queue.get(job.id)) is None
    await queue.complete(lease.token)
    assert await queue.waiting_reason(await queue.get(job.id)) is None


async def test_a_subscriber_that_missed_events_gets_the_error_after_those_it_has(
    queue: JobQueue,
) -> None:
    with queue.events.subscribe() as slow, queue.events.subscribe() as quick:
        await queue.enqueue_many([PING] * 200)
        async with asyncio.timeout(10):
            assert await _count(quick, 200) == 200
            queue.events.drop_subscribers("the server shuts down")
            assert await _count(slow, 200) == 200
            for subscription in (slow, quick):
                with pytest.raises(EventsMissed):
                    await _count(subscription, 1)


async def _count(subscription: Subscription, wanted: int) -> int:
    seen = 0
    async for _ in subscription:
        seen += 1
        if seen == wanted:
            break
    return seen


async def test_equal_events_before_a_subscription_are_skipped_as_often_as_they_come(
    queue: JobQueue,
) -> None:
    # A job that is released and leased again starts twice with the same attempt.
    started = JobEvent("job.started", uuid.uuid4(), "test.ping", 1)
    with queue.events.subscribe() as subscription:
        for _ in range(2):
            subscription.skip({started: 1})
        assert [subscription.is_skipped(started) for _ in range(3)] == [True, True, False]


async def test_events_of_another_process_that_were_deleted_unread_are_missed_and_said_so(
    queue: JobQueue, registry: JobRegistry, database_url: str
) -> None:
    # A batch too large for a notification is kept in a table, and only its number is told.
    sqlite = database_url.startswith("sqlite")
    database = open_database(database_url)
    other = JobQueue(registry, database)
    with queue.events.subscribe() as subscription:
        delete = DELETE_EVERY_BATCH["sqlite" if sqlite else "postgresql"]
        await asyncio.to_thread(run_sql, database_url, *delete)
        await other.enqueue_many([PING] * 300)
        stop = "DROP TRIGGER forget" + ("" if sqlite else " ON job_event_batch")
        await asyncio.to_thread(run_sql, database_url, stop)
        # On SQLite it is the next batch that shows the gap.
        await other.enqueue(PING)
        async with asyncio.timeout(10):
            with pytest.raises(EventsMissed):
                await _count(subscription, 1_000)
    await database.close()


async def test_the_very_first_batch_that_is_deleted_unread_is_missed_as_well(
    tmp_path: Path, sqlite_template: Path, registry: JobRegistry
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    database = open_database(url)
    queue = JobQueue(registry, database)
    kept = KeptBatches(queue._store, gapless=True)
    assert await kept.read() == []
    await queue.enqueue(PING)
    await asyncio.to_thread(run_sql, url, "DELETE FROM job_event_batch")
    await queue.enqueue(PING)
    gap, message = await kept.read()
    assert isinstance(gap, Gap)
    assert isinstance(message, str)
    await queue.enqueue(PING)
    assert [type(item) for item in await kept.read()] == [str]
    await database.close()


DELETE_EVERY_BATCH = {
    "sqlite": [
        "CREATE TRIGGER forget AFTER INSERT ON job_event_batch"
        " BEGIN DELETE FROM job_event_batch WHERE id = NEW.id; END"
    ],
    "postgresql": [
        "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN DELETE FROM job_event_batch; RETURN NULL; END $$",
        "CREATE TRIGGER forget AFTER INSERT ON job_event_batch"
        " FOR EACH STATEMENT EXECUTE FUNCTION forget()",
    ],
}
"""Statements after which every kept batch is deleted as soon as it is there."""


async def test_the_lines_of_a_job_with_large_errors_are_read_up_to_a_size(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job_registry_api.queue.reading.MAX_LOG_BYTES", 6_000)
    job = (await queue.enqueue(PING)).job
    for message in ("first", "second", "third"):
        (lease,) = await queue.lease(["test.ping"], "w")
        line = line_as_text(LogLine(LogLevel.INFO, message, 0.0))
        await queue.store_logs([(lease.token, line)])
        await queue.fail(lease.token, JobError("broken", "x" * 5_000), retry_after_seconds=0)
    assert [line.message for line in await queue.logs(job.id)] == ["third"]


async def test_a_wait_of_no_seconds_returns_the_job_as_it_is(queue: JobQueue) -> None:
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
    assert (await queue.wait(job.id, seconds=0)).status is JobStatus.QUEUED


def test_the_faults_of_log_lines_are_sentences() -> None:
    _, faults = text_of_lines([LogLine(LogLevel.INFO, "", -1.0)])
    assert [(each.path, each.code, each.message) for each in faults] == [
        (
            "/logs/0/seconds",
            "out_of_range",
            "Expected 0 to 10,000,000 seconds since the start of the attempt; got -1.0.",
        ),
        ("/logs/0/message", "out_of_range", "Expected 1 to 1,000 characters; got 0."),
    ]
    with pytest.raises(InputInvalid, match=r"/last: Expected a whole number from 0 to 1,000; got"):
        check_log_lines(1_001)
