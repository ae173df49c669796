"""Processes that work: what handlers do to them, and that they end on time whatever hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
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
from tests.worker import crowd

pytestmark = pytest.mark.slow


@pytest.fixture
async def queue(database_url: str) -> AsyncIterator[JobQueue]:
    database = open_database(database_url)
    types = discover(["tests.worker.hangs", "tests.worker.crowd"])
    queue = JobQueue(JobRegistry(types), database)
    yield queue
    await database.close()


@contextmanager
def process(
    command: str, database_url: str, catalog: str = "tests.worker.hangs", **settings: object
) -> Iterator[subprocess.Popen[str]]:
    """A `job-registry worker` or `job-registry serve` that takes jobs, and is gone afterwards."""
    environment = {
        **os.environ,
        "JOBS_DATABASE_URL": database_url,
        "JOBS_CATALOG": catalog,
        "JOBS_LOG_FORMAT": "json",
        "JOBS_PORT": "0",
        "PYTHONPATH": CODE,
        **{f"JOBS_{name.upper()}": str(value) for name, value in settings.items()},
    }
    running = subprocess.Popen(
        [sys.executable, "-m", "job_registry_api.cli", command],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stderr is not None
        for line in running.stderr:
            if "worker.started" in line:
                break
        # What it writes from now on must not fill the pipe.
        os.set_blocking(running.stderr.fileno(), False)
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


async def enqueue(
    queue: JobQueue, act: str, file: Path | None = None, kind: str = "hang"
) -> JobRecord:
    payload = {"act": act, "file": str(file or "")}
    if not kind.startswith("hang"):
        payload = {"act": act, "argument": str(file or "")}
    return (await queue.enqueue(EnqueueRequest(kind, payload))).job


async def until(queue: JobQueue, job: JobRecord, *statuses: JobStatus) -> JobRecord:
    async with asyncio.timeout(30):
        while (now := await queue.get(job.id)).status not in statuses:
            await asyncio.sleep(0.02)
    return now


async def there(file: Path) -> str:
    async with asyncio.timeout(20):
        while not file.exists() or not file.read_text():
            await asyncio.sleep(0.02)
    return file.read_text()


async def outcomes(queue: JobQueue, job: JobRecord) -> list[str | None]:
    return [attempt.outcome for attempt in (await queue.attempts([job.id]))[job.id]]


commands = pytest.mark.parametrize("command", ["worker", "serve"])


@commands
@pytest.mark.parametrize("kind", ["hang", "hang_in_thread"])
async def test_a_handler_may_fork_and_terminate_its_children(
    database_url: str, queue: JobQueue, command: str, kind: str
) -> None:
    with process(command, database_url) as running:
        job = await enqueue(queue, "fork", kind=kind)
        done = await until(queue, job, JobStatus.SUCCEEDED, JobStatus.FAILED)
        assert done.result == {"children": [-signal.SIGTERM] * 6}
        assert running.poll() is None
        # It still takes jobs: nothing has told it to stop.
        again = await enqueue(queue, "nothing")
        await until(queue, again, JobStatus.SUCCEEDED)


@pytest.mark.any_database
@pytest.mark.parametrize("kind", ["hang", "hang_in_thread"])
async def test_a_fork_of_a_handler_ends_where_the_handler_ends(
    database_url: str, queue: JobQueue, kind: str
) -> None:
    """It has a copy of the worker, whose connections it would use."""
    with process("worker", database_url) as running:
        for act, code in (
            ("sys.exit in a fork", 7),
            ("return in a fork", 0),
            ("sys.exit with a text in a fork", 1),
        ):
            job = await enqueue(queue, act, kind=kind)
            done = await until(queue, job, JobStatus.SUCCEEDED, JobStatus.FAILED)
            assert done.result == f"ended with {code}"
        assert running.poll() is None
        running.terminate()
        assert running.wait(20) == 0
        assert running.stderr is not None
        written = running.stderr.read()
        assert "The reason." in written
        assert "Traceback" not in written


@pytest.mark.any_database
async def test_a_fork_of_middleware_ends_where_the_middleware_ends(
    database_url: str, queue: JobQueue
) -> None:
    with process("worker", database_url) as running:
        job = await enqueue(queue, "nothing", kind="hang_in_middleware")
        done = await until(queue, job, JobStatus.SUCCEEDED, JobStatus.FAILED)
        assert done.result == "ended with 0"
        assert running.poll() is None


@commands
async def test_sys_exit_in_a_task_of_a_handler_ends_only_that_task(
    database_url: str, queue: JobQueue, command: str
) -> None:
    with process(command, database_url) as running:
        job = await enqueue(queue, "exit in a task")
        done = await until(queue, job, JobStatus.SUCCEEDED)
        assert done.result == "RuntimeError('a task of the handler raised SystemExit')"
        assert running.poll() is None


@commands
@pytest.mark.parametrize("act", ["swallow", "pool", "block"])
async def test_a_process_ends_within_its_grace_whatever_its_handlers_do(
    database_url: str, queue: JobQueue, tmp_path: Path, command: str, act: str
) -> None:
    with process(command, database_url, shutdown_seconds=0.5) as running:
        job = await enqueue(queue, act, tmp_path / "there")
        await there(tmp_path / "there")
        begun = time.monotonic()
        running.send_signal(signal.SIGTERM)
        await asyncio.to_thread(running.wait, 25)
        took = time.monotonic() - begun
    # 10 seconds are what a process manager grants beyond `JOBS_SHUTDOWN_SECONDS`.
    assert took < 10.5
    back = await queue.get(job.id)
    assert (back.status, back.attempt) == (JobStatus.QUEUED, 0)
    assert await outcomes(queue, job) == ["released"]


async def test_a_second_signal_ends_a_process_that_hangs_soon(
    database_url: str, queue: JobQueue, tmp_path: Path
) -> None:
    with process("worker", database_url, shutdown_seconds=60) as running:
        await enqueue(queue, "swallow", tmp_path / "there")
        await there(tmp_path / "there")
        begun = time.monotonic()
        running.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        running.send_signal(signal.SIGTERM)
        await asyncio.to_thread(running.wait, 25)
    assert time.monotonic() - begun < 9


async def test_threads_and_children_that_handlers_leave_do_not_outlive_the_process(
    database_url: str, queue: JobQueue, tmp_path: Path
) -> None:
    with process("worker", database_url, shutdown_seconds=1) as running:
        thread = await enqueue(queue, "thread", kind="hang_in_thread")
        child = await enqueue(queue, "leave a child", tmp_path / "pid", "hang_in_thread")
        for job in (thread, child):
            await until(queue, job, JobStatus.SUCCEEDED)
        pid = int((tmp_path / "pid").read_text())
        assert psutil.pid_exists(pid)
        running.send_signal(signal.SIGTERM)
        await asyncio.to_thread(running.wait, 15)
        assert running.returncode == 0
    async with asyncio.timeout(5):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.02)


async def test_the_processes_of_handlers_end_with_a_worker_that_is_killed(
    database_url: str, queue: JobQueue, tmp_path: Path
) -> None:
    with process("worker", database_url, "tests.worker.crowd") as running:
        await enqueue(queue, "wait", tmp_path / "pids", "crowd")
        pids = [int(pid) for pid in (await there(tmp_path / "pids")).split()]
        running.kill()
        async with asyncio.timeout(5):
            while any(
                psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
                for pid in pids
            ):
                await asyncio.sleep(0.02)


async def test_a_process_ends_with_its_worker_though_its_threads_cannot_run(
    database_url: str, queue: JobQueue, tmp_path: Path
) -> None:
    with process("worker", database_url, catalog="tests.worker.crowd") as running:
        file = tmp_path / "pid"
        await enqueue(queue, "hold the interpreter's lock", file, kind="crowd")
        handler = psutil.Process(int(await there(file)))
        running.kill()
        running.wait(10)
        try:
            handler.wait(5)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                handler.kill()


@pytest.mark.parametrize("act", ["segfault", "kill"])
async def test_a_handler_that_ends_its_process_costs_its_neighbours_one_attempt_at_most(
    database_url: str, queue: JobQueue, act: str
) -> None:
    # About leases: a lost worker is noticed when they run out.
    catalog, settings = "tests.worker.crowd", {"lease_seconds": 1}
    with process("worker", database_url, catalog, **settings) as first:
        poison = await enqueue(queue, act, kind="poison")
        neighbour = await enqueue(queue, "", kind="neighbour")
        await asyncio.to_thread(first.wait, 20)
    with process("worker", database_url, catalog, **settings) as second:
        ended = await until(queue, poison, JobStatus.FAILED)
        beside = await enqueue(queue, "", kind="neighbour")
        for job in (neighbour, beside):
            await until(queue, job, JobStatus.SUCCEEDED)
        assert second.poll() is None
    assert await outcomes(queue, poison) == ["lost", "failed", "failed"]
    assert await outcomes(queue, neighbour) in (["lost", "succeeded"], ["succeeded"])
    assert await outcomes(queue, beside) == ["succeeded"]
    assert ended.error is not None
    assert ended.error.code == "process_died"
    name = "signal 11 (SIGSEGV)" if act == "segfault" else "signal 9 (SIGKILL)"
    assert name in ended.error.message


async def test_a_job_whose_worker_died_runs_in_a_process_with_its_lifespan_and_middleware(
    database_url: str, queue: JobQueue
) -> None:
    catalog, settings = "tests.worker.crowd", {"lease_seconds": 1}
    with process("worker", database_url, catalog, **settings) as first:
        job = await enqueue(queue, "once", kind="poison")
        await asyncio.to_thread(first.wait, 20)
    with process("worker", database_url, catalog, **settings) as second:
        done = await until(queue, job, JobStatus.SUCCEEDED, JobStatus.FAILED)
    assert isinstance(done.result, dict)
    assert done.result["pid"] != second.pid
    assert (done.result["seen"], done.result["middleware"]) == ("poison 2", True)


FAILING = """
    from contextlib import asynccontextmanager
    from job_registry import JobType, Payload, WorkerExtension

    class Nothing(Payload):
        pass

    nothing = JobType(name="nothing", payload=Nothing)
    nothing.handler(lambda job, payload: None)

    @asynccontextmanager
    async def resources():
        raise ConnectionError("db.internal does not answer")
        yield

    worker = WorkerExtension(lifespan=resources)
"""


@commands
def test_a_lifespan_that_fails_to_start_is_one_sentence_and_an_exit_code(
    database_url: str, tmp_path: Path, command: str
) -> None:
    (tmp_path / "failing.py").write_text(textwrap.dedent(FAILING), "utf-8")
    environment = {
        **os.environ,
        "JOBS_DATABASE_URL": database_url,
        "JOBS_CATALOG": "failing",
        "JOBS_PORT": "0",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{CODE}",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "job_registry_api.cli", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ran.returncode == 1
    sentence = "The lifespan resources failed to start: ConnectionError: db.internal does not"
    assert sentence in ran.stderr


def test_the_catalog_of_the_tests_is_whole() -> None:
    assert {each.name for each in discover(["tests.worker.crowd"])} == {
        job_type.name
        for job_type in (
            *(crowd.crowd, crowd.deaf, crowd.gentle),
            *(crowd.poison, crowd.hasty, crowd.neighbour),
        )
    }
