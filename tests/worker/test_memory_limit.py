"""`JobType(memory_limit_mb=...)`: what counts, how an attempt that exceeds it ends, and when its
process is replaced.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from job_registry import DefinitionError, EnqueueRequest, JobRegistry, JobType, Payload
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker, loop
from tests.worker import hungry

pytestmark = [
    pytest.mark.any_database,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory"),
]

EXCEEDED = "The handler exceeded its memory limit of 64 MB."
TYPES = [hungry.hungry, hungry.hungry_async, hungry.unlimited]


@dataclass
class Diner:
    """A worker of the job types of `hungry`."""

    queue: JobQueue

    async def run(
        self, how: str, megabytes: int = 0, kind: str = "hungry", max_attempts: int = 1
    ) -> JobRecord:
        payload = {"how": how, "megabytes": megabytes}
        request = EnqueueRequest(kind, payload, max_attempts=max_attempts)
        job = (await self.queue.enqueue(request)).job
        async with asyncio.timeout(30):
            while (now := await self.queue.get(job.id)).finished_at is None:
                await asyncio.sleep(0.03)
        return now

    async def succeed(self, how: str, megabytes: int = 0, kind: str = "hungry") -> Any:
        done = await self.run(how, megabytes, kind)
        assert done.status is JobStatus.SUCCEEDED, done.error
        return done.result


@pytest.fixture
async def diner(database_url: str) -> AsyncIterator[Diner]:
    database = open_database(database_url)
    queue = JobQueue(JobRegistry(TYPES), database)
    async with queue.events.listening():
        worker = Worker(queue, concurrency=1, assets="assets", shutdown_seconds=2)
        task = asyncio.create_task(worker.run())
        try:
            yield Diner(queue)
        finally:
            worker.stop()
            await asyncio.wait_for(task, 20)
    await database.close()


@pytest.mark.parametrize("kind", ["hungry", pytest.param("hungry_async", marks=pytest.mark.slow)])
async def test_a_handler_may_use_its_limit_and_not_more(diner: Diner, kind: str) -> None:
    assert isinstance(await diner.succeed("bytes", 56, kind), int)
    failed = await diner.run("bytes", 66, kind, max_attempts=2)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("memory_limit_exceeded", EXCEEDED)
    # What a handler needs may depend on more than its payload, so the attempts are used.
    attempts = (await diner.queue.attempts([failed.id]))[failed.id]
    assert [attempt.outcome for attempt in attempts] == ["failed", "failed"]


@pytest.mark.parametrize(
    "how",
    [
        "small objects",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("result", "map", "says otherwise")),
    ],
)
async def test_the_error_names_the_limit_wherever_memory_runs_out(diner: Diner, how: str) -> None:
    failed = await diner.run(how, 400)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("memory_limit_exceeded", EXCEEDED)


async def test_a_handler_may_catch_the_memory_error_and_fail_with_its_own_words(
    diner: Diner,
) -> None:
    failed = await diner.run("fails itself", 400)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == (
        "failed",
        "This file needs too much memory.",
    )


async def test_a_crash_close_to_the_limit_counts_as_exceeding_it(diner: Diner) -> None:
    failed = await diner.run("library crashes", 2)
    assert failed.error is not None
    assert failed.error.code == "memory_limit_exceeded"
    assert failed.error.message == (
        f"{EXCEEDED} The handler's process was killed by signal 6 (SIGABRT)."
    )


@pytest.mark.slow
async def test_a_crash_far_below_the_limit_is_a_crash(diner: Diner) -> None:
    failed = await diner.run("crashes early")
    assert failed.error is not None
    assert failed.error.code == "process_died"
    assert failed.error.message == (
        "The handler's process was killed by signal 6 (SIGABRT). Its memory limit is 64 MB, and"
        " libraries may crash when they reach it."
    )


@pytest.mark.slow
async def test_a_process_that_exceeded_its_limit_is_replaced(diner: Diner) -> None:
    first = await diner.succeed("bytes")
    assert await diner.succeed("bytes") == first
    await diner.run("bytes", 400)
    assert await diner.succeed("bytes") != first
    async with asyncio.timeout(10):
        while psutil.pid_exists(first) and psutil.Process(first).status() != "zombie":
            await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_what_earlier_jobs_left_does_not_fail_a_later_one(diner: Diner) -> None:
    """Leftovers count, so that a process never grows beyond its limit; a full one is replaced."""
    first = await diner.succeed("keep", 20)
    assert await diner.succeed("keep", 20) == first
    assert await diner.succeed("bytes", 50) != first


async def test_the_limit_ends_with_its_job(diner: Diner) -> None:
    here = resource.getrlimit(resource.RLIMIT_AS)[0]
    assert await diner.succeed("limit", kind="unlimited") == here
    limited = await diner.succeed("limit")
    assert 0 < limited < 1 << 40
    assert await diner.succeed("limit", kind="unlimited") == here
    assert await diner.succeed("limit") == limited


async def test_processes_that_a_handler_starts_have_the_limit_too(diner: Diner) -> None:
    assert await diner.succeed("child", 1) == 0
    assert await diner.succeed("child", 2_000) == 1


async def test_a_limit_bounds_what_is_resident(diner: Diner) -> None:
    before = await diner.succeed("peak")
    await diner.succeed("bytes", 56)
    assert 50 < await diner.succeed("peak") - before <= 64


@pytest.mark.parametrize("limit", [0, -1, 63, 1.5, True, "128", 1_048_577])
def test_a_memory_limit_is_a_whole_number_of_megabytes(limit: Any) -> None:
    class Here(Payload):
        pass

    with pytest.raises(DefinitionError, match=r"memory_limit_mb is .* from 64 to 1,048,576"):
        JobType(name="here", payload=Here, run_in="process", memory_limit_mb=limit)


@pytest.mark.parametrize("run_in", [None, "loop", "thread"])
def test_only_a_process_of_its_own_has_a_memory_limit(run_in: Any) -> None:
    class Here(Payload):
        pass

    with pytest.raises(DefinitionError, match='add run_in="process", or leave memory_limit_mb'):
        JobType(name="here", payload=Here, run_in=run_in, memory_limit_mb=128)


async def test_the_log_says_once_that_a_system_does_not_limit_memory(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "address_space", lambda: None)
    lines: list[tuple[str, Any]] = []

    class Log:
        def warning(self, event: str, **fields: Any) -> None:
            lines.append((event, fields["types"]))

    monkeypatch.setattr(loop, "log", Log())
    Worker(
        JobQueue(JobRegistry(TYPES), queue._database),
        concurrency=1,
        assets="",
        shutdown_seconds=1,
    )
    assert lines == [("worker.memory_not_limited", ["hungry", "hungry_async"])]
