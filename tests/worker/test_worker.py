"""The worker: runs handlers, keeps leases, reports how each attempt ended."""

from __future__ import annotations

import asyncio
import ctypes
import io
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import anyio
import pytest
import structlog
from pydantic import JsonValue, field_validator

from job_registry import (
    Backoff,
    Cancel,
    EnqueueRequest,
    Fail,
    JobContext,
    JobPolicy,
    JobRegistry,
    JobType,
    Payload,
    Retry,
    Snooze,
    WorkerExtension,
)
from job_registry_api.logs import configure_logs
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import PayloadMismatch
from job_registry_api.queue.requests import MAX_LEASE
from job_registry_api.queue.store import Claim, Claimed, Ended, Report
from job_registry_api.worker import Worker
from job_registry_api.worker.attempt import _warned
from tests.conftest import run_sql
from tests.worker.house import House, Text

LEASE_SECONDS = 1.5
about_timeouts = pytest.mark.parametrize("timeout_seconds", [2])
about_leases = pytest.mark.parametrize("lease_seconds", [LEASE_SECONDS])


class Unprintable(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_full_worker_claims_with_its_reports_and_stays_within_its_slots(
    house: House, monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    # Given twelve jobs, and a count of the claims that are made alone
    alone, together, running, most = [], [], 0, 0
    store = house.queue._store
    claim, succeed_and_claim = store.claim, store.succeed_and_claim

    async def count_claim(wanted: Claim) -> Claimed:
        alone.append(wanted)
        return await claim(wanted)

    async def count_both(
        reports: Sequence[Report], sender: str, wanted: Claim
    ) -> tuple[dict[UUID, Ended], Claimed]:
        together.append(wanted)
        return await succeed_and_claim(reports, sender, wanted)

    monkeypatch.setattr(store, "claim", count_claim)
    monkeypatch.setattr(store, "succeed_and_claim", count_both)

    @house.job_type.handler
    async def run(job: JobContext, payload: Text) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    jobs = [await house.enqueue() for _ in range(12)]

    # When a worker runs them
    async with house.working(concurrency=concurrency):
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED)

    # I expect every slot in use, no job twice, and most jobs from claims that came with a report
    assert most == concurrency
    assert [len(await house.outcomes(job)) for job in jobs] == [1] * 12
    assert together
    assert len(alone) <= 3 + concurrency


async def test_a_worker_that_stops_leases_no_job_with_its_last_report(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, claims = asyncio.Event(), []
    store = house.queue._store
    succeed_and_claim = store.succeed_and_claim

    async def count(
        reports: Sequence[Report], sender: str, wanted: Claim
    ) -> tuple[dict[UUID, Ended], Claimed]:
        claims.append(wanted)
        return await succeed_and_claim(reports, sender, wanted)

    monkeypatch.setattr(store, "succeed_and_claim", count)

    @house.job_type.handler
    async def run(job: JobContext, payload: Text) -> None:
        await go_on.wait()

    async with house.working(concurrency=1) as worker:
        last = await house.enqueue()
        await house.until(last, JobStatus.RUNNING)
        waiting = await house.enqueue()
        worker.stop()
        go_on.set()
        await house.until(last, JobStatus.SUCCEEDED)
    assert claims == []
    assert await house.outcomes(waiting) == []


async def test_a_job_that_comes_with_a_report_does_not_run_in_the_context_of_another_caller(
    house: House,
) -> None:
    # Given a context variable that is set in a request, and nowhere else
    request: ContextVar[str] = ContextVar("request", default="none")
    seen = set()

    @house.job_type.handler
    async def run(job: JobContext, payload: Text) -> None:
        seen.add(request.get())

    jobs = [await house.enqueue() for _ in range(60)]
    await house.queue.enqueue_many([EnqueueRequest("remote", {})] * 60)
    leases = await house.queue.lease(["remote"], "elsewhere", limit=60)

    async def complete_all() -> None:
        request.set("a request")
        for lease in leases:
            await house.queue.complete(lease.token)

    # When the request reports jobs at the same time as a full worker
    completing = asyncio.create_task(complete_all())
    async with house.working(concurrency=1):
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED)
    await completing

    # I expect no handler to see it
    assert seen == {"none"}


async def test_an_async_handler_runs_with_its_parsed_payload_and_returns_the_result(
    house: House,
) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> dict[str, Any]:
        house.ran.append(job.id)
        # A moment less than its timeout, so that the worker ends it before the queue does
        return {"text": payload.text, "attempt": job.attempt, "left": 1 < job.seconds_left < 60}

    done = await house.run("hello")
    assert done.status is JobStatus.SUCCEEDED
    assert done.result == {"text": "hello", "attempt": 1, "left": True}
    assert house.ran == [str(done.id)]
    (attempt,) = (await house.queue.attempts([done.id]))[done.id]
    assert (attempt.attempt, attempt.outcome, attempt.error) == (1, "succeeded", None)
    assert attempt.worker_id == done.worker_id
    assert attempt.finished_at is not None
    assert attempt.started_at <= attempt.finished_at


async def test_a_handler_that_changes_the_folder_of_the_process_moves_no_assets(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    @house.job_type.handler
    def work(job: JobContext, _payload: Text) -> str:
        os.chdir("/")
        return job.assets

    async with house.working(assets="files"):
        for _ in range(2):
            done = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
            assert done.result == str(tmp_path / "files")


async def test_a_plain_function_runs_in_a_thread_of_its_own(house: House) -> None:
    @house.job_type.handler
    def work(_job: JobContext, _payload: Text) -> str:
        return threading.current_thread().name

    done = await house.run()
    assert done.result == f"job {done.id}"
    # Nor is it taken for that of the job, in logs and profiles, once it waits for another.
    assert done.result not in [thread.name for thread in threading.enumerate()]


async def test_what_a_plain_function_leaves_in_its_thread_is_there_for_the_next_jobs(
    house: House,
) -> None:
    # A library keeps a connection per thread, which only the garbage collector would close.
    local = threading.local()
    connections: list[object] = []

    @house.job_type.handler
    def work(_job: JobContext, _payload: Text) -> None:
        if not hasattr(local, "connection"):
            local.connection = object()
            connections.append(local.connection)

    async with house.working(concurrency=3):
        jobs = [await house.enqueue() for _ in range(40)]
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED)
    assert len(connections) <= 3


@pytest.mark.any_database
async def test_an_exception_from_outside_that_comes_after_a_handler_has_ended_is_none_of_the_next(
    house: House,
) -> None:
    @house.job_type.handler
    def work(_job: JobContext, _payload: Text) -> int:
        return threading.get_ident()

    async with house.working(concurrency=1):
        for _ in range(3):
            done = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
            assert isinstance(done.result, int)
            # As libraries raise a timeout in another thread
            thread = ctypes.c_ulong(done.result)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeoutError))


@pytest.mark.any_database
@pytest.mark.parametrize("configured", [True, False, None])
async def test_connections_of_django_are_closed_after_each_job(
    house: House, monkeypatch: pytest.MonkeyPatch, configured: bool | None
) -> None:
    closed: list[str] = []

    def close_old_connections() -> None:
        closed.append(threading.current_thread().name)
        raise ConnectionError

    conf = SimpleNamespace(settings=SimpleNamespace(configured=configured))
    if configured is None:  # Another thread imports it.
        del conf.settings
    database = SimpleNamespace(close_old_connections=close_old_connections)
    monkeypatch.setitem(sys.modules, "django.conf", conf)
    monkeypatch.setitem(sys.modules, "django.db", database)

    @house.job_type.handler
    def work(_job: JobContext, _payload: Text) -> None:
        assert not closed

    done = await house.run()
    assert done.status is JobStatus.SUCCEEDED
    assert closed == [f"job {done.id}"] * bool(configured)


async def test_jobs_run_beside_each_other_up_to_the_concurrency(house: House) -> None:
    running, most = 0, 0

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    jobs = [await house.enqueue() for _ in range(10)]
    async with house.working(concurrency=4):
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED)
    assert most == 4
    # A worker may have more slots than one claim can fill.
    async with house.working(concurrency=MAX_LEASE + 1):
        await house.until(await house.enqueue(), JobStatus.SUCCEEDED)


@pytest.mark.cases(6)
@pytest.mark.any_database
@pytest.mark.parametrize(
    ("raised", "status", "code", "outcomes"),
    [
        (lambda: RuntimeError("boom"), JobStatus.FAILED, "handler_failed", ["failed"] * 3),
        (lambda: SystemExit(1), JobStatus.FAILED, "handler_failed", ["failed"] * 3),
        (lambda: Retry("later", after=0), JobStatus.FAILED, "retry", ["failed"] * 3),
        (lambda: Retry("x" * 300_000, after=0), JobStatus.FAILED, "retry", ["failed"] * 3),
        (lambda: Retry(after=-1), JobStatus.FAILED, "handler_failed", ["failed"] * 3),
        (lambda: Snooze(float("nan")), JobStatus.FAILED, "handler_failed", ["failed"] * 3),
        (lambda: asyncio.CancelledError(), JobStatus.FAILED, "handler_failed", ["failed"] * 3),
        (lambda: Unprintable(), JobStatus.FAILED, "handler_failed", ["failed"] * 3),
        (lambda: Fail("hopeless \0\ud800"), JobStatus.FAILED, "failed", ["failed"]),
        (lambda: Cancel("enough"), JobStatus.CANCELLED, "cancelled", ["cancelled"]),
        (lambda: Cancel("enough \0"), JobStatus.CANCELLED, "cancelled", ["cancelled"]),
    ],
)
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_what_a_handler_raises_says_how_its_attempt_ends(
    house: House,
    raised: Callable[[], BaseException],
    status: JobStatus,
    code: str,
    outcomes: list[str],
    kind: str,
) -> None:
    if kind == "async":

        @house.job_type.handler
        async def work(_job: JobContext, _payload: Text) -> None:
            raise raised()

    else:

        @house.job_type.handler
        def work_in_thread(_job: JobContext, _payload: Text) -> None:
            raise raised()

    ended = await house.run()
    assert ended.status is status
    assert ended.error is not None
    assert ended.error.code == code
    assert await house.outcomes(ended) == outcomes


@pytest.mark.any_database
async def test_a_snoozed_job_runs_again_without_spending_an_attempt(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> int:
        house.ran.append(job.id)
        if len(house.ran) < 4:
            raise Snooze(0.02)
        return job.attempt

    done = await house.run()
    assert done.result == 1
    assert await house.outcomes(done) == ["snoozed"] * 3 + ["succeeded"]


@about_leases
async def test_heartbeats_keep_a_long_job_and_carry_its_progress(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> None:
        for step in range(3):
            job.progress({"step": step})
            await asyncio.sleep(LEASE_SECONDS / 2.6)

    done = await house.run()
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 1)
    assert done.progress == {"step": 2}


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_the_last_progress_before_the_end_is_kept_as_it_was_given(
    house: House, kind: str
) -> None:
    def report(job: JobContext) -> None:
        state: dict[str, JsonValue] = {}
        for step in range(100):
            state["step"] = step
            job.progress(state)
        state["step"] = "not reported"
        raise Fail

    async def work(job: JobContext, _payload: Text) -> None:
        report(job)

    def work_in_thread(job: JobContext, _payload: Text) -> None:
        report(job)

    house.job_type.handler(work if kind == "async" else work_in_thread)
    ended = await house.run()
    assert (ended.status, ended.progress) == (JobStatus.FAILED, {"step": 99})


async def test_progress_that_cannot_be_stored_is_left_out_and_the_job_goes_on(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, _payload: Text) -> str:
        job.progress("half")
        await asyncio.sleep(0.1)
        values: list[Any] = [object(), float("nan"), "a\0"]
        for value in values:
            job.progress(value)
            await asyncio.sleep(0.02)
        return "done"

    done = await house.run()
    assert (done.result, done.progress) == ("done", "half")


@pytest.mark.any_database
@about_timeouts
@pytest.mark.parametrize("kind", ["async", "deaf", "thread"])
async def test_a_timeout_ends_an_attempt_whatever_its_handler_does(house: House, kind: str) -> None:
    if kind == "thread":

        @house.job_type.handler
        def work_in_thread(_job: JobContext, _payload: Text) -> str:
            time.sleep(3)
            return "too late"

    else:

        @house.job_type.handler
        async def work(_job: JobContext, _payload: Text) -> str:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                if kind == "async":
                    raise
                await asyncio.sleep(2)
            return "too late"

    ended = await house.run(max_attempts=1)
    assert (ended.status, ended.result) == (JobStatus.FAILED, None)
    assert await house.outcomes(ended) == ["timed_out"]
    await asyncio.sleep(1.2)
    assert (await house.queue.get(ended.id)).result is None


@pytest.mark.any_database
@about_timeouts
async def test_a_thread_that_outlives_its_timeout_holds_its_slot_until_it_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, settled = threading.Event(), asyncio.Event()
    told: list[bool] = []
    time_out = house.queue.time_out

    async def spy_time_out(token: str, *, still_running: bool = False, **options: Any) -> JobRecord:
        told.append(still_running)
        return await time_out(token, still_running=still_running, **options)

    async def spy_settle(tokens: Sequence[str]) -> None:
        assert len(tokens) == 1
        settled.set()

    monkeypatch.setattr(house.queue, "time_out", spy_time_out)
    monkeypatch.setattr(house.queue, "settle", spy_settle)

    @house.job_type.handler
    def work(_job: JobContext, payload: Text) -> str:
        if payload.text == "stuck":
            given_up.wait(20)
        return "done"

    async with house.working(concurrency=1) as worker:
        stuck = await house.enqueue("stuck", max_attempts=1)
        next_one = await house.enqueue("next")
        async with asyncio.timeout(10):
            while not (worker.overdue and told):
                await asyncio.sleep(0.01)
        # On a busy machine the queue itself has to end the attempt.
        await asyncio.sleep(0.3)
        await house.queue.recover()
        await house.until(stuck, JobStatus.FAILED)
        assert await house.outcomes(stuck) == ["timed_out"]
        assert (told[0], worker.overdue, worker.health.overdue) == (True, 1, 1)
        assert (await house.queue.get(next_one.id)).status is JobStatus.QUEUED
        given_up.set()
        assert (await house.until(next_one, JobStatus.SUCCEEDED)).result == "done"
        await asyncio.wait_for(settled.wait(), 5)
        assert worker.overdue == 0


@pytest.mark.any_database
@about_timeouts
async def test_a_handler_that_ends_after_the_queue_timed_it_out_frees_its_place_at_once(
    house: House,
) -> None:
    # Given a handler that blocks the event loop, so that another process ends its attempt first
    async def recover() -> None:
        database = open_database(house.database_url)
        await JobQueue(house.queue.registry, database).recover()
        await database.close()

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        time.sleep(2.1)  # noqa: ASYNC251
        ending = threading.Thread(target=lambda: asyncio.run(recover()))
        ending.start()
        ending.join()

    async with house.working():
        job = await house.enqueue(max_attempts=1)
        await house.until(job, JobStatus.FAILED)
        assert await house.outcomes(job) == ["timed_out"]

        # Then the place in the limit is not kept for the rest of the lease, 30 seconds
        async with asyncio.timeout(5):
            while (await house.queue.attempts([job.id]))[job.id][0].still_running:
                await asyncio.sleep(0.01)


@pytest.mark.any_database
@about_timeouts
async def test_a_timeout_that_the_queue_recorded_first_is_not_logged_as_a_lost_lease(
    house: House, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        await asyncio.sleep(30)

    time_out = house.queue.time_out

    async def late(token: str, **options: Any) -> Any:
        await time_out(token)
        return await time_out(token, **options)

    monkeypatch.setattr(house.queue, "time_out", late)
    async with house.working() as worker:
        job = await house.enqueue(max_attempts=1)
        await house.until(job, JobStatus.FAILED)
        async with asyncio.timeout(5):
            while worker.health.running:
                await asyncio.sleep(0.01)
    assert "job.lease_lost" not in [line["event"] for line in lines]
    (timed_out,) = [line for line in lines if line["event"] == "job.timed_out"]
    # It says where the handler was.
    assert "await asyncio.sleep(30)" in timed_out["exception"]


@pytest.mark.any_database
@about_timeouts
async def test_a_handler_that_ends_by_itself_after_its_timeout_is_logged_as_timed_out(
    house: House, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> str:
        # It holds up the event loop, so the worker cannot stop it.
        time.sleep(2.5)  # noqa: ASYNC251
        return "too late"

    async with house.working():
        job = await house.enqueue(max_attempts=1)
        ended = await house.until(job, JobStatus.FAILED)
    assert (ended.result, await house.outcomes(job)) == (None, ["timed_out"])
    warnings = [line for line in lines if line["log_level"] == "warning"]
    assert [line["event"] for line in warnings] == ["job.timed_out"]
    assert (warnings[0]["timeout_seconds"], warnings[0]["still_running"]) == (2, False)


@pytest.mark.any_database
@about_timeouts
async def test_an_overdue_thread_is_shown_and_does_not_hold_up_the_end_of_its_worker(
    house: House, lines: list[dict[str, Any]]
) -> None:
    given_up = threading.Event()

    @house.job_type.handler
    def work(_job: JobContext, _payload: Text) -> None:
        given_up.wait(20)

    async with house.working() as worker:
        await house.enqueue(max_attempts=1)
        async with asyncio.timeout(10):
            while "job.overdue" not in [line["event"] for line in lines]:
                await asyncio.sleep(0.01)
        assert worker.overdue == 1
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 2
    overdue = next(line for line in lines if line["event"] == "job.overdue")
    assert any(call.startswith(__file__) and call.endswith(".work") for call in overdue["stack"])
    given_up.set()


@about_leases
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_handler_whose_lease_is_lost_is_stopped_and_writes_nothing(
    house: House, kind: str, lines: list[dict[str, Any]]
) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def work(_job: JobContext, _payload: Text) -> str:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            told.set()
        return "too late"

    def work_in_thread(job: JobContext, _payload: Text) -> str:
        while not job.cancel_requested:
            time.sleep(0.01)
        loop.call_soon_threadsafe(told.set)
        return "too late"

    house.job_type.handler(work if kind == "async" else work_in_thread)
    async with house.working(types=["work"]):
        job = await house.enqueue(max_attempts=1)
        await house.until(job, JobStatus.RUNNING)
        expired = "UPDATE job SET lease_expires_at = created_at"
        await asyncio.to_thread(run_sql, house.database_url, expired)
        await asyncio.wait_for(told.wait(), 5)
        ended = await house.until(job, JobStatus.FAILED)
    assert (ended.result, await house.outcomes(job)) == (None, ["lost"])
    lost = [line for line in lines if line["event"] == "job.lease_lost"]
    assert [line["job_id"] for line in lost] == [str(job.id)]


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_running_job_gets_its_cancellation(house: House, kind: str) -> None:
    if kind == "async":

        @house.job_type.handler
        async def work(_job: JobContext, _payload: Text) -> None:
            await asyncio.sleep(30)

    else:

        @house.job_type.handler
        def work_in_thread(job: JobContext, _payload: Text) -> None:
            while not job.cancel_requested:
                time.sleep(0.01)
            raise Cancel

    async with house.working():
        job = await house.enqueue()
        await house.until(job, JobStatus.RUNNING)
        await house.queue.cancel(job.id)
        ended = await house.until(job, JobStatus.CANCELLED)
    assert await house.outcomes(ended) == ["cancelled"]


async def test_a_stored_payload_that_todays_schema_refuses_is_not_run(house: House) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        house.ran.append("ran")

    job = await house.enqueue()
    await asyncio.to_thread(
        run_sql, house.database_url, """UPDATE job SET payload = '{"text": 1}'"""
    )
    async with house.working(), asyncio.timeout(15):
        while not (parked := await house.queue.get(job.id)).is_parked:
            await asyncio.sleep(0.01)
    assert (parked.attempt, house.ran) == (0, [])
    reason = await house.queue.waiting_reason(parked)
    assert isinstance(reason, PayloadMismatch)
    assert reason.violations[0].path == "/text"


@pytest.mark.parametrize(
    ("payload", "violation"),
    [
        ('{"text": 4111222233334444}', "/text: wrong_type"),
        ('["4111222233334444"]', "payload: wrong_type"),
    ],
)
async def test_jobs_whose_payload_does_not_fit_are_one_warning_without_values_per_type_and_minute(
    house: House, monkeypatch: pytest.MonkeyPatch, payload: str, violation: str
) -> None:
    jobs = [await house.enqueue() for _ in range(5)]
    await asyncio.to_thread(run_sql, house.database_url, f"UPDATE job SET payload = '{payload}'")
    house.job_type.handler(lambda _job, _payload: None)
    _warned.clear()
    log = logged("job_registry_api.worker.attempt.log", monkeypatch)
    async with house.working(), asyncio.timeout(15):
        while (await house.queue.counts())["work"].parked < len(jobs):
            await asyncio.sleep(0.01)
    (warning,) = [json.loads(line) for line in log.getvalue().decode().splitlines()]
    assert (warning["event"], warning["type"]) == ("job.payload_mismatch", "work")
    assert warning["fingerprint"] == house.job_type.fingerprint
    assert warning["violations"] == [violation]
    assert "4111222233334444" not in log.getvalue().decode()


def logged(name: str, monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """The lines of a logger from now on. A logger that was used before keeps its configuration."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer)
    configure_logs("warning", "json", stream)
    monkeypatch.setattr(name, structlog.get_logger())
    _streams.append(stream)  # Its end would close the buffer.
    return buffer


_streams: list[io.TextIOWrapper] = []


async def test_a_worker_names_the_queued_types_that_it_does_not_know(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = JobRegistry([JobType(name="gone", payload=Text)])
    database = open_database(house.database_url)
    job = (await JobQueue(before, database).enqueue(EnqueueRequest("gone", {}))).job
    await database.close()
    house.job_type.handler(lambda _job, _payload: None)
    log = logged("job_registry_api.queue.reading.log", monkeypatch)
    async with house.working(), asyncio.timeout(15):
        while not log.getvalue():
            await asyncio.sleep(0.01)
    (line,) = [json.loads(line) for line in log.getvalue().decode().splitlines()]
    assert (line["event"], line["type"], line["queued"]) == ("queue.type_not_registered", "gone", 1)
    assert (await house.queue.get(job.id)).attempt == 0


async def test_a_validator_that_raises_anything_fails_the_attempt(database_url: str) -> None:
    broken = False

    class Checked(Payload):
        @field_validator("*", mode="before")
        @classmethod
        def check(cls, value: object) -> object:
            if broken:
                raise ConnectionError("a service that the validator asks")
            return value

        name: str = ""

    policy = JobPolicy(max_attempts=2, timeout_seconds=60, backoff=Backoff(0.05, 0.1))
    job_type = JobType(name="checked", payload=Checked, policy=policy)
    job_type.handler(lambda job, payload: None)
    database = open_database(database_url)
    queue = JobQueue(JobRegistry([job_type]), database)
    async with queue.events.listening():
        house = House(queue, database_url, job_type)
        job = (await queue.enqueue(EnqueueRequest("checked", {"name": "a"}))).job
        broken = True
        async with house.working():
            ended = await house.until(job, JobStatus.FAILED)
        assert ended.error is not None
        assert ended.error.code == "handler_failed"
        assert await house.outcomes(job) == ["failed", "failed"]
    await database.close()


class Exits(Exception):
    def __str__(self) -> str:
        sys.exit(4)


async def test_an_exception_that_exits_when_it_is_read_fails_the_attempt(house: House) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        raise Exits

    ended = await house.run(max_attempts=1)
    assert ended.error is not None
    assert ended.error.message == "Exits: (message unavailable)"


@pytest.mark.parametrize("error", [RuntimeError, Cancel])
async def test_an_error_that_is_too_large_to_store_is_reported_with_its_first_words(
    database_url: str, house: House, error: type[Exception]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        raise error("word " * 1_000)

    registry = JobRegistry([house.job_type], max_payload_bytes=1_024)
    database = open_database(database_url)
    queue = JobQueue(registry, database)
    async with queue.events.listening():
        ended = await House(queue, database_url, house.job_type).run(max_attempts=1)
    await database.close()
    assert ended.error is not None
    assert "word word" in ended.error.message


@pytest.mark.cases(2)
@pytest.mark.parametrize("result", [object(), float("nan"), "a\0", "x" * 300_000])
async def test_a_result_that_cannot_be_stored_fails_the_job_for_good(
    house: House, result: object, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> object:
        return result

    ended = await house.run()
    assert (ended.status, ended.attempt) == (JobStatus.FAILED, 1)
    assert ended.error is not None
    assert ended.error.code == "result_invalid"
    [line] = [line for line in lines if line["event"] == "job.attempt_failed"]
    assert (line["log_level"], line["code"]) == ("warning", "result_invalid")


@pytest.mark.parametrize(("outcome", "code"), [(Fail("no: private"), "failed"), (Retry(), "retry")])
async def test_the_log_names_the_code_of_a_failed_attempt_and_not_its_message(
    house: House, outcome: Exception, code: str, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        raise outcome

    await house.run(max_attempts=1)
    [line] = [line for line in lines if line["event"] == "job.attempt_failed"]
    assert (line["log_level"], line["code"], line["type"]) == ("info", code, "work")
    assert "private" not in repr(lines)


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_the_log_says_where_a_handler_called_exit(
    house: House, kind: str, lines: list[dict[str, Any]]
) -> None:
    def parse_arguments() -> None:
        sys.exit(2)

    async def work(_job: JobContext, _payload: Text) -> None:
        parse_arguments()

    def work_in_thread(_job: JobContext, _payload: Text) -> None:
        parse_arguments()

    house.job_type.handler(work if kind == "async" else work_in_thread)
    await house.run(max_attempts=1)
    [line] = [line for line in lines if line["event"] == "job.attempt_failed"]
    assert "in parse_arguments" in line["exception"]


class Connector:
    """A client that connects in the background, as those of message brokers do."""

    error: Exception | None = None
    tries = 0

    async def connect(self) -> None:
        raise OSError("refused")

    async def keep_connecting(self) -> None:
        while True:
            try:
                await self.connect()
            except OSError as error:
                self.error = error
            self.tries += 1
            await asyncio.sleep(0.01)


@pytest.mark.any_database
@pytest.mark.parametrize("again", [True, False])
async def test_a_task_whose_error_a_handler_raises_too_goes_on(house: House, again: bool) -> None:
    connector = Connector()
    connecting = asyncio.create_task(connector.keep_connecting())

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        assert connector.error is not None
        if again:
            raise connector.error
        raise RuntimeError("not connected") from connector.error

    await asyncio.sleep(0.02)
    assert (await house.run(max_attempts=1)).status is JobStatus.FAILED
    tries = connector.tries
    await asyncio.sleep(0.1)
    assert connector.tries > tries
    connecting.cancel()


@pytest.mark.any_database
async def test_a_handler_may_cancel_a_task_group_of_anyio_and_name_its_tasks(house: House) -> None:
    async def wait_long() -> None:
        await asyncio.sleep(60)

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(wait_long)
            group.cancel_scope.cancel()
        task = asyncio.create_task(wait_long())
        await asyncio.sleep(0)
        shown, stack = repr(task), task.get_stack()
        task.cancel()
        return f"{'wait_long() running at' in shown} {len(stack)}"

    ended = await house.run(max_attempts=1)
    assert (ended.error, ended.result) == (None, "True 1")


@pytest.mark.any_database
async def test_stopping_lets_running_jobs_end_and_releases_the_rest(house: House) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, payload: Text) -> None:
        await asyncio.sleep(0.4 if payload.text == "short" else 30)

    async with house.working(shutdown_seconds=1.0):
        short, long = await house.enqueue("short"), await house.enqueue("long")
        await house.until(short, JobStatus.RUNNING)
        await house.until(long, JobStatus.RUNNING)
    assert (await house.queue.get(short.id)).status is JobStatus.SUCCEEDED
    back = await house.queue.get(long.id)
    assert (back.status, back.attempt) == (JobStatus.QUEUED, 0)
    assert await house.outcomes(long) == ["released"]


async def stop_when_asked(job: JobContext, _payload: Text) -> None:
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        raise ConnectionError("closed in the middle") from None


def stop_when_asked_in_thread(job: JobContext, _payload: Text) -> None:
    while not job.cancel_requested:
        time.sleep(0.001)
    raise Cancel


async def test_a_worker_that_is_cancelled_releases_its_jobs_and_leases_no_more(
    house: House,
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        await asyncio.sleep(30)

    worker = Worker(house.queue, concurrency=2, assets="", shutdown_seconds=5)
    running = asyncio.create_task(worker.run())
    first = await house.enqueue()
    await house.until(first, JobStatus.RUNNING)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 10)
    # If the worker was cancelled in the middle of its claim, the queue gives the job back.
    await house.until(first, JobStatus.QUEUED)
    assert await house.outcomes(first) == ["released"]
    second = await house.enqueue()
    await asyncio.sleep(0.3)
    assert (await house.queue.get(second.id)).status is JobStatus.QUEUED


@pytest.mark.any_database
@about_leases
@pytest.mark.parametrize("handler", [stop_when_asked, stop_when_asked_in_thread])
async def test_a_job_that_ends_because_the_worker_stops_is_released(
    house: House, handler: Callable[..., Any]
) -> None:
    house.job_type.handler(handler)
    async with house.working(shutdown_seconds=0.0):
        job = await house.enqueue()
        await house.until(job, JobStatus.RUNNING)
        # Right behind a heartbeat, and in the middle of one, it is no different.
        await asyncio.sleep(LEASE_SECONDS / 3 + 0.05)
    back = await house.queue.get(job.id)
    assert (back.status, back.attempt) == (JobStatus.QUEUED, 0)
    assert await house.outcomes(job) == ["released"]


@pytest.mark.any_database
async def test_a_worker_outlives_a_database_that_goes_away(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> str:
        return "done"

    failures = 3
    lease, end = house.queue.lease, house.queue._end

    async def flaky_lease(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise QueueUnavailable("away")
        return await lease(*arguments, **options)

    async def flaky_end(reports: Any) -> Any:
        monkeypatch.setattr(house.queue._reports, "_commit", end)
        raise QueueUnavailable("away")

    monkeypatch.setattr(house.queue, "lease", flaky_lease)
    monkeypatch.setattr(house.queue._reports, "_commit", flaky_end)
    done = await house.run()
    assert (done.status, done.attempt) == (JobStatus.SUCCEEDED, 1)


@pytest.mark.any_database
async def test_news_of_a_job_ends_the_wait_for_a_database_that_was_away(
    house: House, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> str:
        return "done"

    lease, away = house.queue.lease, True

    async def flaky_lease(*arguments: Any, **options: Any) -> Any:
        if away:
            raise QueueUnavailable("away")
        return await lease(*arguments, **options)

    monkeypatch.setattr(house.queue, "lease", flaky_lease)
    async with house.working():
        async with asyncio.timeout(15):
            while not any(line.get("seconds") == 3.2 for line in lines):
                await asyncio.sleep(0.01)
        away = False
        began = time.monotonic()
        await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
        assert time.monotonic() - began < 2


async def test_a_job_that_no_current_model_reads_fails_at_once_if_its_policy_says_so(
    database_url: str,
) -> None:
    policy = JobPolicy(max_attempts=3, on_mismatch="fail")
    job_type = JobType(name="strict", payload=Text, policy=policy)
    job_type.handler(lambda job, payload: None)
    database = open_database(database_url)
    queue = JobQueue(JobRegistry([job_type]), database)
    async with queue.events.listening():
        house = House(queue, database_url, job_type)
        job = (await queue.enqueue(EnqueueRequest("strict", {"text": "a"}))).job
        changed = """UPDATE job SET payload = '{"text": 1}'"""
        await asyncio.to_thread(run_sql, database_url, changed)
        async with house.working():
            ended = await house.until(job, JobStatus.FAILED)
    await database.close()
    assert ended.error is not None
    assert ended.error.code == "payload_invalid"
    # Its handler has not run.
    assert ended.attempt == 0


async def test_a_full_worker_waits_for_the_end_of_a_job(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = 0
    show_worker = house.queue.show_worker

    async def count(types: Sequence[str]) -> None:
        nonlocal shown
        shown += 1
        await show_worker(types)

    monkeypatch.setattr(house.queue, "show_worker", count)

    @house.job_type.handler
    async def work(_job: JobContext, _payload: Text) -> None:
        await asyncio.sleep(0.3)

    async with house.working(concurrency=1):
        await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
    assert 1 <= shown <= 2


async def test_the_options_of_a_worker_are_checked(house: House) -> None:
    with pytest.raises(ValueError, match="concurrency: expected 1 or more; got 0"):
        Worker(house.queue, concurrency=0)
    with pytest.raises(ValueError, match="shutdown_seconds: expected 0 or more; got -1"):
        Worker(house.queue, shutdown_seconds=-1)
    worker = Worker(house.queue, concurrency=1, shutdown_seconds=0, types=["work", "work"])
    assert worker.types == ("work",)
    assert worker.health.running == worker.health.overdue == worker.overdue == 0
    assert worker.health.loop_blocked_seconds == worker.health.renewals_behind_seconds == 0
    assert not worker.is_stopping
    worker.stop()
    assert worker.is_stopping


async def test_types_without_a_handler_are_left_for_remote_workers(
    house: House, tmp_path: Path
) -> None:
    worker = Worker(house.queue, concurrency=1, assets=str(tmp_path), shutdown_seconds=1)
    assert worker.types == ()
    house.job_type.handler(lambda job, payload: None)
    worker = Worker(house.queue, concurrency=1, assets=str(tmp_path), shutdown_seconds=1)
    assert worker.types == ("work",)


async def test_a_worker_with_a_given_name_releases_no_lease_that_it_does_not_know_of(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker may have that name."""
    asked = []

    async def ask(worker_id: str, _runs: Callable[[UUID], bool]) -> None:
        asked.append(worker_id)

    monkeypatch.setattr(house.queue, "release_unanswered", ask)
    monkeypatch.setattr("job_registry_api.worker.loop.UNANSWERED_SECONDS", 0.01)
    async with house.working(worker_id="mail"), house.working() as other:
        async with asyncio.timeout(5):
            while len(asked) < 3:
                await asyncio.sleep(0.01)
    assert set(asked) == {other.worker_id}


async def test_a_worker_whose_start_is_cancelled_does_not_work(house: House) -> None:
    @asynccontextmanager
    async def slow() -> AsyncIterator[dict[str, Any]]:
        await asyncio.sleep(0.3)
        yield {}

    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> None:
        house.ran.append(payload.text)

    worker = Worker(house.queue, extensions=[WorkerExtension(lifespan=slow)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), worker.running():
            raise AssertionError("it has started")
    job = await house.enqueue()
    await asyncio.sleep(0.5)
    assert house.ran == []
    assert (await house.queue.get(job.id)).status is JobStatus.QUEUED
