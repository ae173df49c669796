"""`drain`: which jobs run, what it reports, what it raises, and that it always ends."""

from __future__ import annotations

import asyncio
import time
import traceback
from datetime import timedelta

import pytest

from job_registry.testing import AttemptOutcome, DrainFailed, JobStatus, TestQueue
from tests.testing.kit_jobs import Count, Do, MailSend, do_thread

ADA = MailSend(to="ada@example.com")


async def do(queue: TestQueue, what: str, job_type: str = "do.async") -> None:
    await queue.enqueue(Do(what=what), job_type=job_type)


async def test_it_runs_the_due_jobs_in_the_order_of_a_claim(job_queue: TestQueue) -> None:
    await do(job_queue, "first")
    await do(job_queue, "second")
    await job_queue.enqueue(Do(what="urgent"), job_type="do.async", priority=90)
    await job_queue.enqueue(ADA, schedule_at=job_queue.now + timedelta(hours=1))
    drained = await job_queue.drain()
    assert [each.job.result for each in drained] == ["urgent", "first", "second"]
    assert {each.outcome for each in drained} == {AttemptOutcome.SUCCEEDED}
    assert await job_queue.drain() == []


@pytest.mark.parametrize("kind", ["do.async", "do.thread", "do.process", "do.process_async"])
async def test_handlers_of_every_kind_run_in_this_process(job_queue: TestQueue, kind: str) -> None:
    await do(job_queue, "thread", kind)
    (drained,) = await job_queue.drain()
    on_the_loop = kind in ("do.async", "do.process_async")
    assert drained.job.result == (on_the_loop if kind != "do.thread" else "False!")


async def test_middleware_and_lifespans_are_those_of_a_worker(job_queue: TestQueue) -> None:
    await do(job_queue, "resource", "do.thread")
    (drained,) = await job_queue.drain()
    assert drained.job.result == "open!"


async def test_jobs_that_handlers_enqueue_run_too(job_queue: TestQueue) -> None:
    await do(job_queue, "mail")
    drained = await job_queue.drain()
    assert [each.job.type for each in drained] == ["do.async", "mail.send"]


async def test_only_the_jobs_of_the_given_types_run(job_queue: TestQueue) -> None:
    await do(job_queue, "mail")
    await do(job_queue, "other", "do.thread")
    assert [each.job.type for each in await job_queue.drain("do.async")] == ["do.async"]
    assert [each.job.type for each in await job_queue.drain(do_thread)] == ["do.thread"]
    assert [each.job.type for each in await job_queue.drain(MailSend)] == ["mail.send"]


async def test_jobs_of_remote_workers_stay_queued(job_queue: TestQueue) -> None:
    await do(job_queue, "anything", "remote")
    assert await job_queue.drain() == []
    assert await job_queue.drain("remote") == []


async def test_the_last_progress_is_stored(job_queue: TestQueue) -> None:
    await do(job_queue, "progress")
    (drained,) = await job_queue.drain()
    assert drained.job.progress == {"done": 1}


# Failures


@pytest.mark.parametrize("kind", ["do.async", "do.thread", "do.process"])
async def test_an_exception_of_a_handler_is_raised_with_its_traceback(
    job_queue: TestQueue, kind: str
) -> None:
    await do(job_queue, "raise", kind)
    with pytest.raises(ValueError, match="it is broken") as failed:
        await job_queue.drain()
    frames = [frame.name for frame in traceback.extract_tb(failed.value.__traceback__)]
    assert frames[-1] == "act"
    assert not {"in_thread", "_end_of", "_watch"} & set(frames)
    (note,) = failed.value.__notes__
    assert note.startswith(f"Raised by the handler of {kind} ")
    assert note.endswith(" in attempt 1 of 3.")
    # As in a worker, the job runs again after its backoff.
    (job,) = job_queue.jobs()
    assert (job.status, job.error and job.error.code) == (JobStatus.QUEUED, "handler_failed")


async def test_the_cause_of_an_exception_keeps_its_traceback(job_queue: TestQueue) -> None:
    await do(job_queue, "cause")
    with pytest.raises(RuntimeError, match="outer") as failed:
        await job_queue.drain()
    cause = failed.value.__cause__
    assert isinstance(cause, KeyError)
    assert [frame.name for frame in traceback.extract_tb(cause.__traceback__)] == ["act"]


@pytest.mark.parametrize(
    ("what", "outcome", "status"),
    [
        ("retry", AttemptOutcome.FAILED, JobStatus.QUEUED),
        ("fail", AttemptOutcome.FAILED, JobStatus.FAILED),
        ("cancel", AttemptOutcome.CANCELLED, JobStatus.CANCELLED),
        ("snooze", AttemptOutcome.SNOOZED, JobStatus.QUEUED),
    ],
)
async def test_the_exceptions_of_job_registry_are_outcomes_and_not_raised(
    job_queue: TestQueue, what: str, outcome: AttemptOutcome, status: JobStatus
) -> None:
    await do(job_queue, what)
    (drained,) = await job_queue.drain()
    assert (drained.outcome, drained.job.status) == (outcome, status)
    assert type(drained.error).__name__.lower() == what


async def test_a_result_that_is_no_json_is_a_failure(job_queue: TestQueue) -> None:
    await do(job_queue, "object")
    with pytest.raises(DrainFailed, match="failed as result_invalid: The handler's result"):
        await job_queue.drain()


async def test_retries_are_due_after_their_backoff(job_queue: TestQueue) -> None:
    await do(job_queue, "raise once")
    (first,) = await job_queue.drain(raise_errors=False)
    assert (first.outcome, str(first.error)) == (AttemptOutcome.FAILED, "it is broken")
    job_queue.advance(seconds=4)
    assert await job_queue.drain() == []
    job_queue.advance(seconds=6)
    (second,) = await job_queue.drain()
    assert (second.outcome, second.job.attempt) == (AttemptOutcome.SUCCEEDED, 2)


async def test_skip_time_runs_what_is_due_later_until_nothing_is_queued(
    job_queue: TestQueue,
) -> None:
    await job_queue.enqueue(ADA, schedule_at=job_queue.now + timedelta(days=30))
    await do(job_queue, "raise")
    drained = await job_queue.drain(skip_time=True, raise_errors=False)
    assert [(each.job.type, each.job.attempt) for each in drained] == [
        ("do.async", 1),
        ("do.async", 2),
        ("do.async", 3),
        ("mail.send", 1),
    ]
    assert job_queue.assert_enqueued("do.async").status is JobStatus.FAILED


# The end


async def test_an_endless_chain_of_jobs_is_an_error(job_queue: TestQueue) -> None:
    await job_queue.enqueue(Count(number=0))
    with pytest.raises(DrainFailed, match="drain has run 5 jobs, the last ones count, count") as e:
        await job_queue.drain(max_jobs=5)
    assert "A job that enqueues another of its own type never ends" in str(e.value)
    assert job_queue.jobs(Count)[-1].status is JobStatus.QUEUED


async def test_a_job_that_is_snoozed_for_ever_is_an_error(job_queue: TestQueue) -> None:
    await do(job_queue, "snooze")
    with pytest.raises(DrainFailed, match="3 of them were attempts of jobs that are queued again"):
        await job_queue.drain(skip_time=True, max_jobs=3)


async def test_a_stored_payload_that_no_longer_fits_is_a_failure(job_queue: TestQueue) -> None:
    await do(job_queue, "nothing")
    with job_queue.file._engine.begin() as connection:
        connection.exec_driver_sql("""UPDATE job SET payload = '{"what": 7}'""")
    with pytest.raises(DrainFailed, match="was parked as payload_invalid: The stored payload"):
        await job_queue.drain()


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("kind", "what", "outcome"),
    [
        ("quick", "", AttemptOutcome.TIMED_OUT),
        ("quick.thread", "", AttemptOutcome.TIMED_OUT),
        ("quick.thread", "ask", AttemptOutcome.TIMED_OUT),
    ],
)
async def test_the_timeout_of_the_policy_ends_a_handler(
    job_queue: TestQueue, kind: str, what: str, outcome: AttemptOutcome
) -> None:
    await do(job_queue, what, kind)
    with pytest.raises(DrainFailed, match="failed as timed_out: The attempt exceeded"):
        await job_queue.drain()
    (drained,) = await job_queue.drain(skip_time=True, raise_errors=False)
    assert (drained.outcome, drained.job.status) == (outcome, JobStatus.FAILED)


@pytest.mark.parametrize("kind", ["quick", "quick.thread"])
async def test_its_own_timeout_ends_drain_and_gives_the_job_back(
    job_queue: TestQueue, kind: str
) -> None:
    await do(job_queue, "", kind)
    begun = time.monotonic()
    with pytest.raises(DrainFailed, match=r"for its timeout of 0.1 seconds, and the handler of"):
        await job_queue.drain(timeout=0.1)
    assert time.monotonic() - begun < 10
    (job,) = job_queue.jobs()
    assert job.status is JobStatus.QUEUED


async def test_a_test_that_is_cancelled_stops_its_handlers(job_queue: TestQueue) -> None:
    await do(job_queue, "", "quick.thread")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await job_queue.drain()
    (job,) = job_queue.jobs()
    assert job.status is JobStatus.QUEUED


def test_sync_raises_the_exceptions_of_handlers_too(job_queue: TestQueue) -> None:
    job_queue.sync.enqueue(Do(what="raise"), job_type="do.thread")
    with pytest.raises(ValueError, match="it is broken"):
        job_queue.sync.drain()
    job_queue.sync.enqueue(Do(), job_type="quick.thread")
    with pytest.raises(DrainFailed, match="timed_out"):
        job_queue.sync.drain("quick.thread")
