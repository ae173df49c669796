"""Handlers in processes of their own: what they can, how they are ended, and what a crash costs."""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from job_registry import (
    DefinitionError,
    EnqueueRequest,
    JobPolicy,
    JobRegistry,
    JobType,
    Payload,
    WorkerExtension,
)
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker, processes
from job_registry_api.worker.watchdog import Watchdog
from tests.conftest import advance, run_sql
from tests.worker import crowd

pytestmark = pytest.mark.any_database

ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass
class Crowd:
    """A worker of the job types of `crowd`."""

    queue: JobQueue
    worker: Worker

    async def enqueue(self, act: str, argument: str = "", kind: str = "crowd") -> JobRecord:
        payload = {"act": act, "argument": argument}
        return (await self.queue.enqueue(EnqueueRequest(kind, payload))).job

    async def until(self, job: JobRecord, *statuses: JobStatus) -> JobRecord:
        async with asyncio.timeout(30):
            while (now := await self.queue.get(job.id)).status not in statuses:
                await asyncio.sleep(0.03)
        return now

    async def run(self, act: str, argument: str = "", kind: str = "crowd") -> JobRecord:
        return await self.until(await self.enqueue(act, argument, kind), *ENDED)

    async def outcomes(self, job: JobRecord) -> list[str | None]:
        return [attempt.outcome for attempt in (await self.queue.attempts([job.id]))[job.id]]


@asynccontextmanager
async def crowd_of(
    database_url: str, concurrency: int = 4, takes: list[str] | None = None
) -> AsyncIterator[Crowd]:
    database = open_database(database_url)
    types = [crowd.crowd, crowd.deaf, crowd.gentle, crowd.poison, crowd.hasty]
    queue = JobQueue(JobRegistry(types, extensions=[crowd.extension]), database)
    async with queue.events.listening():
        worker = Worker(
            queue, types=takes, concurrency=concurrency, assets="assets", shutdown_seconds=2
        )
        task = asyncio.create_task(worker.run())
        try:
            yield Crowd(queue, worker)
        finally:
            worker.stop()
            await asyncio.wait_for(task, 20)
    await database.close()


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[Crowd]:
    async with crowd_of(database_url) as house:
        yield house


async def written(path: Path) -> list[int]:
    """The process ids that a handler wrote to a file."""
    async with asyncio.timeout(20):
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
    return [int(pid) for pid in path.read_text().split()]


async def gone(pids: list[int]) -> bool:
    async with asyncio.timeout(10):
        while any(
            psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            for pid in pids
        ):
            await asyncio.sleep(0.02)
    return True


async def test_a_process_is_warm_and_has_its_lifespan_middleware_and_context(house: Crowd) -> None:
    first = (await house.run("describe")).result
    assert isinstance(first, dict)
    assert first["pid"] != os.getpid()
    assert first == {
        "pid": first["pid"],
        "leader": True,
        "seen": "crowd 1",
        "opened_in": first["pid"],
        "attempt": 1,
        "middleware": True,
    }
    took = []
    for _ in range(10):
        begun = time.monotonic()
        again = (await house.run("describe")).result
        took.append(time.monotonic() - begun)
        assert again == first
    # A new interpreter takes ten times as long.
    assert statistics.median(took) < 0.25


@pytest.mark.parametrize(
    ("act", "status", "code", "message", "outcomes"),
    [
        pytest.param(
            *("raise", "failed", "handler_failed", "ValueError: from a process", ["failed"] * 3),
            marks=pytest.mark.slow,
        ),
        ("fail", "failed", "failed", "for good", ["failed"]),
        pytest.param(
            *("sys.exit", "failed", "handler_failed", "the handler raised SystemExit"),
            ["failed"] * 3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("large", "failed", "result_invalid", "at most 262,144 bytes", ["failed"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("generator", "failed", "result_invalid", "generator", ["failed"]),
            marks=pytest.mark.slow,
        ),
        ("segfault", "failed", "process_died", "killed by signal 11 (SIGSEGV)", ["failed"] * 3),
        pytest.param(
            *("exit", "failed", "process_died", "ended with exit code 3", ["failed"] * 3),
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_how_a_handler_ends_in_a_process_is_reported(
    house: Crowd, act: str, status: str, code: str, message: str, outcomes: list[str]
) -> None:
    ended = await house.run(act)
    assert ended.error is not None
    assert (ended.status, ended.error.code) == (status, code)
    assert message in ended.error.message
    assert await house.outcomes(ended) == outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crowd", "gentle"])
async def test_a_handler_that_closes_the_descriptors_of_its_process_ends_it_at_once(
    house: Crowd, kind: str
) -> None:
    await house.run("describe", kind=kind)  # In a process that is warm.
    began = time.monotonic()
    ended = await house.run("close", "3 256", kind=kind)
    assert time.monotonic() - began < 10  # Its timeout is 30 s.
    assert ended.error is not None
    assert (ended.status, ended.error.code) == ("failed", "process_died")
    assert await house.outcomes(ended) == ["failed"] * 3
    assert (await house.run("describe", kind=kind)).status == "succeeded"


@pytest.mark.slow
async def test_what_a_process_sends_is_not_written_into_a_file_of_its_handler(
    house: Crowd, tmp_path: Path
) -> None:
    path = tmp_path / "written"
    ended = await house.run("close and open", str(path))
    assert ended.error is not None
    assert ended.error.code == "process_died"
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "descriptors", [*(pytest.param(two, marks=pytest.mark.slow) for two in ("0 1", "1 2")), "0 3"]
)
async def test_a_handler_may_close_its_standard_streams(house: Crowd, descriptors: str) -> None:
    assert (await house.run("close", descriptors)).status == "succeeded"
    assert (await house.run("describe")).status == "succeeded"


@pytest.mark.any_database
async def test_a_handler_may_print_what_the_encoding_of_the_output_lacks(
    house: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a thread of `job-registry worker`."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert (await house.run("print", "naïve")).status == JobStatus.SUCCEEDED


async def test_a_snooze_and_progress_work_in_a_process(house: Crowd, tmp_path: Path) -> None:
    snoozed = await house.run("snooze", str(tmp_path / "snoozed"))
    assert await house.outcomes(snoozed) == ["snoozed", "succeeded"]
    done = await house.run("progress", "kept")
    assert (done.result, done.progress) == ("kept", {"step": 2})


async def test_a_timeout_kills_the_process_with_what_it_started(
    house: Crowd, tmp_path: Path
) -> None:
    await house.run("progress", "warm")  # The first start on a busy machine may take its seconds.
    job = await house.enqueue("wait", str(tmp_path / "pids"), "deaf")
    pids = await written(tmp_path / "pids")
    begun = time.monotonic()
    await house.until(job, JobStatus.FAILED)
    assert await house.outcomes(job) == ["timed_out"]
    assert await gone(pids)
    assert time.monotonic() - begun < 4
    assert house.worker.overdue == 0


async def test_a_signal_to_all_processes_of_a_service_ends_no_handler(house: Crowd) -> None:
    done = await house.run("terminate")
    # It ends the programs and forks of the handler, as elsewhere.
    assert done.result == [-signal.SIGTERM, -signal.SIGTERM]


@pytest.mark.slow
async def test_a_cancellation_kills_a_process_that_does_not_listen(
    house: Crowd, tmp_path: Path
) -> None:
    job = await house.enqueue("wait", str(tmp_path / "pids"))
    pids = await written(tmp_path / "pids")
    await house.queue.cancel(job.id)
    begun = time.monotonic()
    await house.until(job, JobStatus.CANCELLED)
    assert time.monotonic() - begun < 6
    assert await house.outcomes(job) == ["cancelled"]
    assert await gone(pids)


@pytest.mark.parametrize("kind", ["crowd", "gentle"])
async def test_a_handler_in_a_process_gets_its_cancellation_at_once(
    house: Crowd, tmp_path: Path, kind: str
) -> None:
    act = "until cancelled" if kind == "crowd" else "wait"
    job = await house.enqueue(act, str(tmp_path / "pids"), kind)
    (pid,) = await written(tmp_path / "pids")
    begun = time.monotonic()
    await house.queue.cancel(job.id)
    await house.until(job, JobStatus.CANCELLED)
    assert time.monotonic() - begun < 1.5
    # The process lives on, for the next job.
    assert psutil.pid_exists(pid)
    if kind == "gentle":
        assert (tmp_path / "pids").read_text() == "cancelled"


@pytest.mark.slow
async def test_a_crash_costs_no_other_job_anything(house: Crowd, tmp_path: Path) -> None:
    waiting = await house.enqueue("until cancelled", str(tmp_path / "pids"))
    await written(tmp_path / "pids")
    assert (await house.run("segfault")).status is JobStatus.FAILED
    assert (await house.queue.get(waiting.id)).status is JobStatus.RUNNING
    await house.queue.cancel(waiting.id)
    await house.until(waiting, JobStatus.CANCELLED)
    assert await house.outcomes(waiting) == ["cancelled"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "is_reported", "is_isolated"),
    [("poison", False, True), ("poison", True, False), ("hasty", False, False)],
)
async def test_an_attempt_that_its_worker_left_to_time_out_may_have_crashed_it(
    database_url: str, kind: str, is_reported: bool, is_isolated: bool
) -> None:
    async with crowd_of(database_url, takes=["deaf"]) as house:
        # Given an attempt whose timeout comes before the end of its lease
        job = await house.enqueue("once", kind=kind)
        (lease,) = await house.queue.lease([kind], "dead")
        if is_reported:
            await house.queue.time_out(lease.token)
        else:
            await advance(database_url, 30)
            await house.queue.recover()
        assert await house.outcomes(job) == ["timed_out"]
    # When another worker runs the next one
    async with crowd_of(database_url) as house:
        done = await house.until(job, *ENDED)
    # Then it runs in a process of its own, if there is time to start one
    assert isinstance(done.result, dict)
    assert (done.result["pid"] != os.getpid()) == is_isolated


async def test_a_process_that_is_killed_while_it_waits_costs_no_attempt(house: Crowd) -> None:
    result = (await house.run("describe")).result
    assert isinstance(result, dict)
    pid = result["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    done = await house.run("describe")
    assert await house.outcomes(done) == ["succeeded"]


async def test_a_default_timeout_of_sockets_does_not_reach_the_processes(house: Crowd) -> None:
    socket.setdefaulttimeout(10)
    try:
        done = await house.run("describe")
    finally:
        socket.setdefaulttimeout(None)
    assert done.status is JobStatus.SUCCEEDED, done.error


async def test_a_handler_of_a_relative_path_is_found_from_any_folder(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command finds modules in its folder by a relative path, as does Python with `-c`."""
    (tmp_path / "nearby.py").write_text(
        "from job_registry import JobType, Payload\n"
        "class Empty(Payload):\n"
        "    pass\n"
        "here = JobType(name='here', payload=Empty, run_in='process')\n"
        "@here.handler\n"
        "def handle(job, payload):\n"
        "    return 'found'\n",
        "utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    nearby = importlib.import_module("nearby")
    async with (
        JobQueue.from_url(database_url, [nearby.here]) as queue,
        Worker(queue).running(),
    ):
        monkeypatch.chdir("/")  # As a handler might.
        job = (await queue.enqueue(nearby.Empty())).job
        assert await queue.result(job.id, timeout=30) == "found"


@pytest.mark.slow
async def test_a_plain_function_may_run_an_event_loop_of_its_own(house: Crowd) -> None:
    """As it may in a thread: the next attempt after a crash runs in a process."""
    assert (await house.run("run a coroutine")).result == "done"


@pytest.mark.slow
async def test_a_crash_is_noticed_though_a_forked_child_lives_on(
    house: Crowd, tmp_path: Path
) -> None:
    job = await house.enqueue("fork and exit", str(tmp_path / "pids"))
    async with asyncio.timeout(10):
        ended = await house.until(job, *ENDED)
    assert ended.error is not None
    assert ended.error.code == "process_died"
    assert "exit code 3" in ended.error.message
    assert await gone(await written(tmp_path / "pids"))


async def test_a_forked_child_that_goes_on_as_the_handler_reports_nothing(
    house: Crowd, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    done = await house.run("fork and return twice", str(path))
    assert (done.result, await house.outcomes(done)) == (str(path), ["succeeded"])


async def test_a_process_that_cannot_be_started_fails_the_attempt_at_once(
    house: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    ended = await house.run("describe")
    assert ended.error is not None
    assert ended.error.code == "process_not_started"
    assert "Too many open files" in ended.error.message
    assert await house.outcomes(ended) == ["failed"] * 3


@pytest.mark.slow
def test_a_process_that_is_gone_may_be_talked_to_on_any_event_loop() -> None:
    watchdog = Watchdog()
    watchdog.start()

    async def talk() -> None:
        process = processes._Process(
            {"assets": "", "extensions": [], "max_bytes": 1_000, "traced": False, "logs": None},
            sys.path,
            watchdog,
        )
        assert await process.receive() == {"ready": True}
        process.is_ready = True
        process.kill()
        assert await process.receive() is None
        for _ in range(5):
            process.cancel()
            await asyncio.sleep(0.01)
        await process.end()
        process.cancel()

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(talk())
    watchdog.end()


@pytest.mark.slow
async def test_handlers_that_compute_use_several_cores(database_url: str) -> None:
    async with crowd_of(database_url, concurrency=2) as house:
        # Warm both, so that the start of an interpreter is not measured.
        await asyncio.gather(house.run("compute"), house.run("compute"))
        jobs = await asyncio.gather(house.enqueue("compute"), house.enqueue("compute"))
        done = [await house.until(job, JobStatus.SUCCEEDED) for job in jobs]
    assert len({str(job.result) for job in done}) == 2


@pytest.mark.slow
async def test_the_processes_end_with_their_worker(database_url: str, tmp_path: Path) -> None:
    async with crowd_of(database_url) as house:
        idle = (await house.run("describe")).result
        assert isinstance(idle, dict)
        idle_pid = idle["pid"]
        assert isinstance(idle_pid, int)
        await house.enqueue("wait", str(tmp_path / "pids"))
        pids = await written(tmp_path / "pids")
    assert await gone([*pids, idle_pid])
    rows = await asyncio.to_thread(
        run_sql, database_url, "SELECT outcome FROM job_attempt ORDER BY id DESC LIMIT 1"
    )
    assert rows == [("released",)]


def test_a_job_type_that_no_process_can_import_stops_the_start(queue: JobQueue) -> None:
    class Here(Payload):
        pass

    local = JobType(name="local", payload=Here, run_in="process")
    local.handler(lambda job, payload: None)
    database = queue._database
    with pytest.raises(DefinitionError, match="job type local: .* top level of an importable"):
        Worker(
            JobQueue(JobRegistry([local]), database),
            concurrency=1,
            assets="",
            shutdown_seconds=1,
        )
    with pytest.raises(DefinitionError, match="WorkerExtension must be at the top level"):
        Worker(
            JobQueue(JobRegistry([crowd.crowd]), database),
            concurrency=1,
            assets="",
            shutdown_seconds=1,
            extensions=[WorkerExtension()],
        )


@pytest.mark.parametrize("run_in", ["Process", "", 1])
def test_where_a_handler_runs_is_checked_at_its_definition(run_in: Any) -> None:
    class Here(Payload):
        pass

    with pytest.raises(DefinitionError, match="expected loop, thread, process or None"):
        JobType(name="here", payload=Here, policy=JobPolicy(), run_in=run_in)

    async def work(_job: Any, _payload: Any) -> None: ...

    in_thread = JobType(name="here", payload=Here, run_in="thread")
    with pytest.raises(DefinitionError, match="is async and cannot run in a thread"):
        in_thread.handler(work)
    assert in_thread.runs_in is None
    assert [JobType(name="here", payload=Here).handler(work)] == [work]
