"""Leases, progress and reports: what keeps a job its worker's, and what never may lose it.

The lease is the default one of 30 seconds unless a test says otherwise, so that whatever waits for
a heartbeat takes ten.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
import sqlalchemy.exc
from pydantic import BaseModel, JsonValue, computed_field

from job_registry import Cancel, JobContext
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import LeaseLost, QueueUnavailable
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import attempt
from tests.conftest import run_sql
from tests.queue.test_races import locked
from tests.worker.house import House, Text

short_lease = pytest.mark.parametrize("lease_seconds", [1.5])


async def test_progress_shortly_before_the_end_does_not_hold_the_end_up(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> str:
        job.progress("half")
        await asyncio.sleep(0.3)
        job.progress("nearly")
        return "done"

    begun = time.monotonic()
    done = await house.run()
    assert time.monotonic() - begun < 4
    assert (done.result, done.progress) == ("done", "nearly")
    assert await house.outcomes(done) == ["succeeded"]


async def test_progress_is_stored_while_a_job_runs_at_most_once_per_second(house: House) -> None:
    go_on = asyncio.Event()

    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> None:
        for step in range(200):
            job.progress({"step": step})
            await asyncio.sleep(0.005)
        await go_on.wait()

    async with house.working():
        job = await house.enqueue()
        with house.queue.events.subscribe(job_id=job.id) as events:
            async with asyncio.timeout(5):
                while (await house.queue.get(job.id)).progress != {"step": 199}:
                    await asyncio.sleep(0.01)
            go_on.set()
            await house.until(job, JobStatus.SUCCEEDED)
            names = []
            async with asyncio.timeout(5):
                while "job.succeeded" not in names:
                    names.append((await anext(events)).name)
    assert 1 <= names.count("job.progressed") <= 4


@pytest.mark.any_database
@short_lease
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_refused_progress_is_one_warning_and_the_lease_is_renewed(
    house: House, kind: str, lines: list[dict[str, Any]]
) -> None:
    refused: tuple[Any, ...] = (float("nan"), "x" * 300_000, object())

    async def work(job: JobContext, _payload: Text) -> str:
        for value in refused:
            job.progress(value)
        await asyncio.sleep(1.9)
        return "done"

    def work_in_thread(job: JobContext, _payload: Text) -> str:
        for value in refused:
            job.progress(value)
        time.sleep(1.9)
        return "done"

    house.job_type.handler(work if kind == "async" else work_in_thread)
    done = await house.run()
    assert await house.outcomes(done) == ["succeeded"]
    warnings = [line for line in lines if line["event"] == "job.progress_refused"]
    assert [line["reason"] for line in warnings] == ["not_finite"]
    assert warnings[0]["job_id"] == str(done.id)


def failures() -> list[Exception]:
    """What a database says: a lock, a statement's time, a deadlock, a conflict, nothing; a bug."""
    raised: list[Exception] = [
        sqlalchemy.exc.DBAPIError("UPDATE", {}, error("simulated"))
        for error in (
            asyncpg.exceptions.LockNotAvailableError,
            asyncpg.exceptions.QueryCanceledError,
            asyncpg.exceptions.DeadlockDetectedError,
            asyncpg.exceptions.SerializationError,
        )
    ]
    return [*raised, QueueUnavailable("away"), RuntimeError("a bug")]


@pytest.mark.cases(1)
@pytest.mark.any_database
@short_lease
@pytest.mark.parametrize("error", failures(), ids=lambda error: type(error).__name__)
async def test_an_error_of_a_renewal_does_not_end_the_renewals(
    house: House, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> str:
        job.progress({"done": 0.5})
        await asyncio.sleep(1.9)
        return "done"

    failed = 0
    renew = JobQueue.renew

    async def flaky(self: JobQueue, renewals: Sequence[Renewal]) -> Any:
        nonlocal failed
        failed += 1
        if failed <= 2:
            raise error
        return await renew(self, renewals)

    monkeypatch.setattr(JobQueue, "renew", flaky)
    done = await house.run()
    assert failed > 2
    assert (done.result, await house.outcomes(done)) == ("done", ["succeeded"])
    # What a renewal carried that failed, the next one carries.
    assert done.progress == {"done": 0.5}


@pytest.mark.cases(3)
@pytest.mark.any_database
@pytest.mark.parametrize("error", failures(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("report", ["succeed", "fail", "snooze"])
async def test_an_error_of_a_report_does_not_lose_it(
    house: House, monkeypatch: pytest.MonkeyPatch, error: Exception, report: str
) -> None:
    ran = 0

    @house.job_type.handler
    async def work(_job: JobContext, payload: Text) -> str:
        nonlocal ran
        ran += 1
        if ran == 1 and payload.text == "fail":
            raise ValueError
        if ran == 1 and payload.text == "snooze":
            from job_registry import Snooze

            raise Snooze(0.01)
        return "done"

    failed = 0
    real: Callable[..., Any] = getattr(house.queue, report)

    async def flaky(*arguments: Any, **options: Any) -> Any:
        nonlocal failed
        failed += 1
        if failed <= 3:
            raise error
        return await real(*arguments, **options)

    monkeypatch.setattr(house.queue, report, flaky)
    done = await house.run(report)
    former = {"succeed": [], "fail": ["failed"], "snooze": ["snoozed"]}[report]
    assert await house.outcomes(done) == [*former, "succeeded"]
    assert failed == 4


class SlowlyConverted(BaseModel):
    @computed_field
    def slow(self) -> str:
        time.sleep(0.5)
        return "done"


async def test_a_cancellation_while_a_result_is_converted_does_not_undo_the_work(
    house: House,
) -> None:
    returned = asyncio.Event()

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> SlowlyConverted:
        returned.set()
        return SlowlyConverted()

    async with house.working():
        job = await house.enqueue()
        await returned.wait()
        await house.queue.cancel(job.id)
        done = await house.until(job, JobStatus.SUCCEEDED, JobStatus.CANCELLED)
    assert (done.status, done.result) == (JobStatus.SUCCEEDED, {"slow": "done"})


async def test_a_cancellation_while_a_report_is_repeated_is_too_late(
    house: House, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> str:
        return "done"

    succeed, asked = house.queue.succeed, False

    async def flaky(token: str, result: JsonValue = None, **options: Any) -> Any:
        nonlocal asked
        if not asked:
            asked = True
            await house.queue.cancel(job.id)
            await asyncio.sleep(0.05)
            raise QueueUnavailable("away")
        return await succeed(token, result, **options)

    monkeypatch.setattr(house.queue, "succeed", flaky)
    job = await house.enqueue()
    async with house.working():
        done = await house.until(job, JobStatus.SUCCEEDED, JobStatus.CANCELLED)
    assert (done.status, done.result) == (JobStatus.SUCCEEDED, "done")
    assert "job.cancelling" not in [line["event"] for line in lines]


async def test_an_unexpected_error_of_an_attempt_ends_with_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    unheard: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: unheard.append(context))
    tried = asyncio.Event()

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> str:
        return "done"

    def fail(*_arguments: Any) -> Any:
        tried.set()
        raise RuntimeError("a bug")

    monkeypatch.setattr(attempt, "report_of", fail)
    async with house.working() as worker:
        await house.enqueue()
        await asyncio.wait_for(tried.wait(), 10)
        async with asyncio.timeout(5):
            while worker.health.running:
                await asyncio.sleep(0.01)
    gc.collect()
    assert unheard == []


async def test_a_report_that_comes_too_late_is_not_repeated(
    house: House, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> str:
        return "done"

    reported = 0

    async def lost(_token: str, _result: JsonValue = None, **_options: Any) -> Any:
        nonlocal reported
        reported += 1
        raise LeaseLost

    monkeypatch.setattr(house.queue, "succeed", lost)
    async with house.working() as worker:
        job = await house.enqueue()
        await house.until(job, JobStatus.RUNNING)
        async with asyncio.timeout(5):
            while worker.health.running or not reported:
                await asyncio.sleep(0.01)
    assert reported == 1
    assert [line["event"] for line in lines].count("job.lease_lost") == 1


@pytest.mark.slow
@pytest.mark.parametrize("lease_seconds", [4.5])  # two renewals, and 1.5 s to spare
async def test_a_job_whose_row_is_locked_during_two_renewals_keeps_its_lease_and_progress(
    house: House, database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite locks no rows")

    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> str:
        job.progress("half")
        await asyncio.sleep(6)
        return "done"

    job = await house.enqueue()
    async with house.working():
        await house.until(job, JobStatus.RUNNING)
        async with locked(database_url, f"SELECT 1 FROM job WHERE id = '{job.id}' FOR UPDATE"):
            await asyncio.sleep(3.2)
        await asyncio.sleep(1.7)
        assert (await house.queue.get(job.id)).progress == "half"
        done = await house.until(job, JobStatus.SUCCEEDED)
    assert (done.result, await house.outcomes(done)) == ("done", ["succeeded"])


async def test_reports_that_wait_for_locked_rows_do_not_let_a_worker_lease_ever_more_jobs(
    house: House, database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite locks no rows")
    locks, ran = AsyncExitStack(), []

    # Given a handler whose job another transaction locks before it is reported
    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> None:
        ran.append(job.id)
        if len(ran) <= 6:
            lock = f"SELECT 1 FROM job WHERE id = '{job.id}' FOR UPDATE"
            await locks.enter_async_context(locked(database_url, lock))

    jobs = [await house.enqueue() for _ in range(6)]

    # When a worker with one slot runs six jobs
    async with house.working(concurrency=1):
        await asyncio.sleep(1.0)
        at_once = len(ran)
        ran += [""] * 6
        await locks.aclose()
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED)

    # I expect it to have leased one more than it has slots, and not all of them
    assert 1 <= at_once <= 2


@pytest.mark.slow
@short_lease
async def test_a_blocked_event_loop_loses_no_lease_and_the_log_names_the_job(
    house: House, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, payload: Text) -> str:
        if payload.text == "blocks":
            # Long enough for the lease to end twice, and for the loop to be called blocked.
            time.sleep(3.4)  # noqa: ASYNC251
        else:
            await asyncio.sleep(0.5)
        return "done"

    monitor = threading.Event()

    def recover() -> None:
        """Another process, which ends the attempts whose lease has run out."""

        async def watch() -> None:
            database = open_database(house.database_url)
            other = JobQueue(house.queue.registry, database)
            while not monitor.is_set():
                await other.recover()
                await asyncio.sleep(0.05)
            await database.close()

        asyncio.run(watch())

    watching = threading.Thread(target=recover)
    watching.start()
    try:
        async with house.working():
            # Leased together, so that the neighbour runs while the loop is blocked.
            neighbour, blocks = await asyncio.gather(
                house.enqueue("neighbour"), house.enqueue("blocks")
            )
            for job in (neighbour, blocks):
                await house.until(job, JobStatus.SUCCEEDED, JobStatus.FAILED)
    finally:
        monitor.set()
        watching.join()
    assert await house.outcomes(neighbour) == ["succeeded"]
    assert await house.outcomes(blocks) == ["succeeded"]
    named = next(line for line in lines if line["event"].startswith("event loop blocked for"))
    assert f"work {blocks.id}" in named["event"].partition("while running ")[2]
    place, _, function = named["stack"][-1].partition(" ")
    assert place.rpartition(":")[0] == __file__
    assert function.endswith(".work")
    assert [line["event"] for line in lines].count("worker.loop_turns_again") == 1


@pytest.mark.parametrize("kind", ["async", "thread"])
@pytest.mark.parametrize("caller", ["this process", "another process", "during the claim"])
async def test_a_cancellation_is_noticed_at_once(
    house: House, kind: str, caller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(_job: JobContext, _payload: Text) -> None:
        await asyncio.sleep(8)

    def work_in_thread(job: JobContext, _payload: Text) -> None:
        while not job.cancel_requested:
            time.sleep(0.01)
        raise Cancel

    lease = house.queue.lease

    async def lease_slowly(*arguments: Any, **options: Any) -> list[Lease]:
        leases = await lease(*arguments, **options)
        for each in leases:
            await house.queue.cancel(each.job.id)
        return leases

    house.job_type.handler(work if kind == "async" else work_in_thread)
    if caller == "during the claim":
        monkeypatch.setattr(house.queue, "lease", lease_slowly)
    async with house.working():
        job = await house.enqueue()
        await house.until(job, JobStatus.RUNNING, JobStatus.CANCELLED)
        if caller == "this process":
            await house.queue.cancel(job.id)
        elif caller == "another process":
            database = open_database(house.database_url)
            await JobQueue(house.queue.registry, database).cancel(job.id)
            await database.close()
        asked = time.monotonic()
        ended = await house.until(job, JobStatus.CANCELLED, JobStatus.SUCCEEDED, JobStatus.FAILED)
    assert time.monotonic() - asked < 1
    assert await house.outcomes(ended) == ["cancelled"]


@short_lease
async def test_a_cancellation_whose_event_is_lost_is_heard_with_the_next_renewal(
    house: House,
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        await asyncio.sleep(30)

    async with house.working():
        job = await house.enqueue()
        await house.until(job, JobStatus.RUNNING)
        requested = "UPDATE job SET cancel_requested_at = started_at"
        await asyncio.to_thread(run_sql, house.database_url, requested)
        ended = await house.until(job, JobStatus.CANCELLED)
    assert await house.outcomes(ended) == ["cancelled"]


@pytest.mark.slow
@pytest.mark.parametrize("lease_seconds", [4.5])
async def test_a_handler_that_tidies_up_after_its_cancellation_is_not_cancelled_again(
    house: House,
) -> None:
    tidied = []

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            # Two renewals say again that the job is cancelled.
            await asyncio.sleep(3.2)
            tidied.append(True)

    async with house.working():
        job = await house.enqueue()
        await house.until(job, JobStatus.RUNNING)
        await house.queue.cancel(job.id)
        await house.until(job, JobStatus.CANCELLED)
    assert tidied == [True]


class DividesByZero(BaseModel):
    total: int = 1

    @computed_field
    def share(self) -> float:
        return self.total / 0


class Exits(BaseModel):
    @computed_field
    def code(self) -> int:
        sys.exit(3)


class SaysNul(BaseModel):
    @computed_field
    def text(self) -> str:
        raise ValueError("\0 \ud800")


def numbers() -> Iterator[int]:
    yield from range(3)


def without_end() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.cases(3)
@pytest.mark.any_database
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (DividesByZero, "ZeroDivisionError"),
        (lambda: {"deep": [DividesByZero()]}, "ZeroDivisionError"),
        (Exits, "SystemExit"),
        (SaysNul, "ValueError: \ufffd"),
        (numbers, "generator"),
        (lambda: {"deep": [numbers()]}, "generator"),
        (lambda: iter([1]), "list_iterator"),
        (without_end, ""),
    ],
)
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_result_that_cannot_be_converted_fails_the_job_for_good(
    house: House, make: Callable[[], Any], words: str, kind: str
) -> None:
    async def work(_job: JobContext, _payload: Text) -> Any:
        return make()

    def work_in_thread(_job: JobContext, _payload: Text) -> Any:
        return make()

    house.job_type.handler(work if kind == "async" else work_in_thread)
    ended = await house.run()
    assert (ended.status, await house.outcomes(ended)) == (JobStatus.FAILED, ["failed"])
    assert ended.error is not None
    assert ended.error.code == "result_invalid"
    assert words in ended.error.message


@pytest.mark.any_database
@pytest.mark.parametrize(
    "make", [lambda: [[1.5] * 10 for _ in range(400_000)], lambda: "x" * 10**8]
)
async def test_an_oversized_result_is_refused_without_stopping_the_event_loop(
    house: House, make: Callable[[], Any]
) -> None:
    longest = 0.0
    result = make()

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> Any:
        return result

    async def measure() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)

    measuring = asyncio.create_task(measure())
    ended = await house.run()
    measuring.cancel()
    assert ended.error is not None
    assert ended.error.code == "result_invalid"
    assert longest < 1.0


async def test_an_async_handler_behind_a_plain_decorator_is_awaited(house: House) -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> Any:
            return function(*arguments)

        return wrapper

    @house.job_type.handler
    @logged
    async def work(_job: JobContext, payload: Text) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"text": payload.text, "in": threading.current_thread().name}

    done = await house.run("hello")
    assert done.result == {"text": "hello", "in": "MainThread"}


async def test_the_worker_leases_again_at_once_when_a_slot_is_free(house: House) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        await asyncio.sleep(0.05)

    jobs = [await house.enqueue() for _ in range(20)]
    begun = time.monotonic()
    async with house.working(concurrency=1):
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED)
    assert time.monotonic() - begun < 6


@pytest.mark.any_database
@short_lease
async def test_short_jobs_one_after_another_are_no_sign_that_renewals_are_overdue(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them lives to be renewed; the worker always holds a lease, and is in good health."""

    @house.job_type.handler
    async def work(_job: JobContext, payload: Text) -> str:
        await asyncio.sleep(float(payload.text))
        return "done"

    renew, away = JobQueue.renew, False

    async def flaky(self: JobQueue, renewals: Sequence[Renewal]) -> Any:
        nonlocal away
        if away:
            away = False
            raise QueueUnavailable("away for a moment")
        return await renew(self, renewals)

    monkeypatch.setattr(JobQueue, "renew", flaky)
    async with house.working() as worker:
        behind = 0.0
        jobs = []
        begun = time.monotonic()
        while time.monotonic() - begun < 3:
            jobs.append(await house.enqueue("0.35"))
            await asyncio.sleep(0.1)
            behind = max(behind, worker.health.renewals_behind_seconds)
        away = True
        jobs.append(await house.enqueue("0.8"))
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED, JobStatus.FAILED)
        assert not away
        assert behind < 0.5
        assert [await house.outcomes(job) for job in jobs] == [["succeeded"]] * len(jobs)
