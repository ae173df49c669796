"""Handlers in processes of workers that do not run: they end before other workers run their jobs.

The handler holds a lock on a file, as does what it starts. Its successor notes whether it is alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry.discovery import discover
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from tests import CODE
from tests.forks import Command

LEASE_SECONDS = 2.0

JOBS = """
    import ctypes
    import fcntl
    import os
    import subprocess
    import time
    from pathlib import Path
    from job_registry import Backoff, JobContext, JobPolicy, JobType, Payload

    class Act(Payload):
        act: str = ""
        seconds: float = 60

    soon = Backoff(base_seconds=0.05, cap_seconds=0.05)
    policy = JobPolicy(max_attempts=3, timeout_seconds=90, backoff=soon)
    short = JobPolicy(max_attempts=3, timeout_seconds=4, backoff=soon)
    once = JobPolicy(max_attempts=1, timeout_seconds=90)
    alone = JobType(name="alone", payload=Act, run_in="process", policy=policy)
    timed = JobType(name="timed", payload=Act, run_in="process", policy=short)
    warm = JobType(name="warm", payload=Act, run_in="process", policy=policy)
    hold = JobType(name="hold", payload=Act, run_in="thread", policy=once)
    folder = Path(__file__).parent
    in_c = ctypes.PyDLL(None)
    "The C library; its functions hold the interpreter lock."

    def note(line):
        with (folder / "notes").open("a") as notes:
            notes.write(line + "\\n")

    def run(job: JobContext, payload: Act) -> None:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"beside {job.attempt}")
            return
        note(f"alone {job.attempt}")
        if job.attempt == 1:
            if "start a process" in payload.act:
                subprocess.Popen(["sleep", "60"], pass_fds=[lock])
            if "hold the interpreter lock" in payload.act:
                in_c.usleep(int(payload.seconds * 1e6))
            else:
                time.sleep(payload.seconds)
        os.close(lock)

    alone.handler(run)
    timed.handler(run)

    @warm.handler
    def do_nothing(job: JobContext, payload: Act) -> None:
        pass

    @hold.handler
    def hold_the_interpreter_lock(job: JobContext, payload: Act) -> None:
        note("held")
        in_c.usleep(int(payload.seconds * 1e6))
"""


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stopped_jobs.py").write_text(textwrap.dedent(JOBS), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.fixture
async def queue(fresh_postgresql_url: str, catalog: Path) -> AsyncIterator[JobQueue]:
    database = open_database(fresh_postgresql_url)
    yield JobQueue(JobRegistry(discover(["stopped_jobs"])), database)
    await database.close()


@contextmanager
def worker(url: str, catalog: Path, lease_seconds: float = LEASE_SECONDS) -> Iterator[Command]:
    process = Command(
        ["worker"],
        environment={
            **os.environ,
            "JOBS_DATABASE_URL": url,
            "JOBS_CATALOG": "stopped_jobs",
            "JOBS_LOG_FORMAT": "json",
            "JOBS_LEASE_SECONDS": str(lease_seconds),
            "JOBS_WORKER_CONCURRENCY": "2",
            "PYTHONPATH": f"{catalog}{os.pathsep}{CODE}",
        },
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "worker.started" in line:
                break
        yield process
    finally:
        process.kill()
        if process.stderr is not None and not process.stderr.closed:
            process.communicate(20)


async def enqueue(queue: JobQueue, kind: str, act: str = "", seconds: float = 60) -> JobRecord:
    payload = {"act": act, "seconds": seconds}
    return (await queue.enqueue(EnqueueRequest(kind, payload))).job


async def until_done(queue: JobQueue, job: JobRecord) -> None:
    async with asyncio.timeout(60):
        while (await queue.get(job.id)).status is not JobStatus.SUCCEEDED:
            await asyncio.sleep(0.01)


async def until_noted(catalog: Path, line: str) -> None:
    async with asyncio.timeout(20):
        while line not in noted(catalog):
            await asyncio.sleep(0.01)


def noted(catalog: Path) -> list[str]:
    path = catalog / "notes"
    return path.read_text("utf-8").splitlines() if path.exists() else []


def is_free(catalog: Path) -> bool:
    """Whether no process holds the lock of the handler."""
    with (catalog / "lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


async def until_free(catalog: Path) -> None:
    """Wait until no process holds the lock of the handler, for two seconds at most."""
    give_up = time.monotonic() + 2
    while not is_free(catalog):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.001)


async def outcomes(queue: JobQueue, job: JobRecord) -> list[str | None]:
    return [attempt.outcome for attempt in (await queue.attempts([job.id]))[job.id]]


@pytest.mark.parametrize(
    "act",
    [
        "hold the interpreter lock",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("sleep", "start a process")),
    ],
)
async def test_a_handler_ends_before_its_job_runs_elsewhere_while_its_worker_is_stopped(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path, act: str
) -> None:
    with worker(fresh_postgresql_url, catalog) as first:
        job = await enqueue(queue, "alone", act)
        await until_noted(catalog, "alone 1")
        with worker(fresh_postgresql_url, catalog) as second:
            first.send_signal(signal.SIGSTOP)
            # The successor has a process that is ready.
            await until_done(queue, await enqueue(queue, "warm"))
            await until_done(queue, job)
            assert noted(catalog) == ["alone 1", "alone 2"]
            first.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.5)
            second.terminate()
            second.wait(20)
            # The first one runs jobs again.
            await until_done(queue, await enqueue(queue, "warm"))
        first.terminate()
        log = first.communicate(20)[1]
    assert await outcomes(queue, job) == ["lost", "succeeded"]
    # As after an outage of the database, not as after a crash.
    assert "job.out_of_touch" in log or "job.lease_lost" in log
    for word in ("process_died", "attempt_failed", "report_repeated", '"error"', "Traceback"):
        assert word not in log


@pytest.mark.slow
async def test_a_handler_ends_before_its_job_runs_elsewhere_with_the_default_lease(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path
) -> None:
    with worker(fresh_postgresql_url, catalog, 30) as first:
        job = await enqueue(queue, "alone", "start a process")
        await until_noted(catalog, "alone 1")
        with worker(fresh_postgresql_url, catalog, 30):
            first.send_signal(signal.SIGSTOP)
            await until_done(queue, job)
    assert noted(catalog) == ["alone 1", "alone 2"]


@pytest.mark.slow
async def test_a_handler_ends_at_its_timeout_while_its_worker_is_stopped(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path
) -> None:
    with worker(fresh_postgresql_url, catalog, 30) as first:
        job = await enqueue(queue, "timed")
        await until_noted(catalog, "alone 1")
        with worker(fresh_postgresql_url, catalog, 30):
            first.send_signal(signal.SIGSTOP)
            await until_done(queue, await enqueue(queue, "warm"))
            await until_done(queue, job)
            assert noted(catalog) == ["alone 1", "alone 2"]
            first.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.2)
        first.terminate()
        log = first.communicate(20)[1]
    assert await outcomes(queue, job) == ["timed_out", "succeeded"]
    assert "process_died" not in log
    assert "job.timed_out" in log


@pytest.mark.slow
async def test_a_handler_ends_in_time_while_another_holds_the_interpreter_lock_of_its_worker(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path
) -> None:
    with worker(fresh_postgresql_url, catalog) as first:
        job = await enqueue(queue, "alone")
        await until_noted(catalog, "alone 1")
        await enqueue(queue, "hold", seconds=LEASE_SECONDS + 2)
        await until_noted(catalog, "held")
        with worker(fresh_postgresql_url, catalog):
            await until_done(queue, await enqueue(queue, "warm"))
            await until_done(queue, job)
            assert noted(catalog) == ["alone 1", "held", "alone 2"]
        first.terminate()
        assert "process_died" not in first.communicate(20)[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="waits for the state of processes in /proc")
async def test_a_handler_whose_time_is_over_ends_before_its_worker_runs_again(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path
) -> None:
    with worker(fresh_postgresql_url, catalog) as first:
        await enqueue(queue, "alone")
        await until_noted(catalog, "alone 1")
        # As a container is frozen and thawed, in the order that is the worst.
        others = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGSTOP)
        for process in others:
            process.suspend()
        await asyncio.sleep(LEASE_SECONDS + 0.5)
        assert not is_free(catalog)
        for process in others:
            process.resume()
        await until_free(catalog)


@pytest.mark.slow
async def test_a_handler_runs_on_while_its_worker_renews_a_short_lease(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path
) -> None:
    with worker(fresh_postgresql_url, catalog, 1):
        jobs = [await enqueue(queue, "warm") for _ in range(20)]
        long = await enqueue(queue, "alone", seconds=5)
        for job in [*jobs, long]:
            await until_done(queue, job)
    assert await outcomes(queue, long) == ["succeeded"]


async def test_what_a_handler_has_started_ends_with_a_killed_worker(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path
) -> None:
    with worker(fresh_postgresql_url, catalog) as first:
        # Both at once: the handler's process is killed although it does not notice.
        await enqueue(queue, "alone", "start a process and hold the interpreter lock")
        await until_noted(catalog, "alone 1")
        await asyncio.sleep(0.2)
        first.kill()
        await until_free(catalog)


@pytest.mark.slow
async def test_a_watchdog_that_is_killed_is_replaced_with_the_next_job(
    queue: JobQueue, fresh_postgresql_url: str, catalog: Path
) -> None:
    with worker(fresh_postgresql_url, catalog) as first:
        await until_done(queue, await enqueue(queue, "warm"))
        handlers = [
            child
            for child in psutil.Process(first.pid).children()
            if any("worker.child" in word for word in child.cmdline())
        ]
        others = [child for child in psutil.Process(first.pid).children() if child not in handlers]
        for child in others:
            child.kill()
        assert len(others) == 1
        job = await enqueue(queue, "alone")
        await until_noted(catalog, "alone 1")
        with worker(fresh_postgresql_url, catalog):
            first.send_signal(signal.SIGSTOP)
            await until_done(queue, await enqueue(queue, "warm"))
            await until_done(queue, job)
    assert noted(catalog) == ["alone 1", "alone 2"]
