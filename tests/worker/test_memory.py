"""What an attempt leaves behind: nothing, and without waiting for a garbage collection.

Collections are rare in a process that serves (see `job_registry_api.cli.startup`): what waits
piles up. `benchmarks/memory.py` shows the same at full size.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from job_registry import Fail, JobContext
from job_registry_api.queue.models import JobStatus
from tests.worker.house import House, Text

pytestmark = pytest.mark.any_database


class Large:
    """Something that a handler holds on to in its frame."""

    def __init__(self, size: int = 0) -> None:
        self.content = bytearray(size)


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def fail(job: JobContext, payload: Text, held: Large) -> Any:
    """Fail as handlers do: from below, with one exception from another, or with a verdict."""
    here = held
    if payload.text == "returns":
        return "done"
    if payload.text == "fails":
        raise Fail("for good")
    try:
        raise KeyError("below")
    except KeyError as error:
        kept = error
        raise ValueError(f"{kept} {here}") from kept


@pytest.mark.cases(3)
@pytest.mark.parametrize("text", ["returns", "fails", "raises", "times out", "is cancelled"])
@pytest.mark.parametrize("kind", ["async", "thread"])
@pytest.mark.parametrize("timeout_seconds", [1])
@pytest.mark.usefixtures("no_collections")
async def test_what_a_handler_holds_is_freed_when_its_attempt_ends(
    house: House, text: str, kind: str
) -> None:
    held: list[weakref.ref[Large]] = []
    waits = text in ("times out", "is cancelled")
    if waits and kind == "thread":
        pytest.skip("a thread is not ended from outside")

    async def work(job: JobContext, payload: Text) -> Any:
        large = Large()
        held.append(weakref.ref(large))
        job.progress({"at": "work"})
        if waits:
            await asyncio.sleep(30)
        return fail(job, payload, large)

    def work_in_thread(job: JobContext, payload: Text) -> Any:
        large = Large()
        held.append(weakref.ref(large))
        job.progress({"at": "work"})
        return fail(job, payload, large)

    house.job_type.handler(work if kind == "async" else work_in_thread)
    async with house.working() as worker:
        jobs = [await house.enqueue(text, max_attempts=1) for _ in range(5)]
        if text == "is cancelled":
            for job in jobs:
                await house.until(job, JobStatus.RUNNING)
                await house.queue.cancel(job.id)
        for job in jobs:
            await house.until(job, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
        async with asyncio.timeout(5):
            while worker.health.running:
                await asyncio.sleep(0.01)
        # The last thing that the loop and a thread did is forgotten with the next.
        await asyncio.sleep(0.1)
        alive = [ref for ref in held if ref() is not None]
        assert len(held) >= 4
        assert alive == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["async", "thread"])
@pytest.mark.usefixtures("no_collections")
async def test_the_resident_size_levels_off(house: House, kind: str) -> None:
    async def work(job: JobContext, payload: Text) -> Any:
        large = Large(8_000_000)
        return fail(job, payload, large) and "r" * 50_000

    def work_in_thread(job: JobContext, payload: Text) -> Any:
        large = Large(8_000_000)
        return fail(job, payload, large) and "r" * 50_000

    house.job_type.handler(work if kind == "async" else work_in_thread)
    process = psutil.Process()

    async def run(jobs: int) -> int:
        for text in ("returns", "raises"):
            for job in [await house.enqueue(text, max_attempts=1) for _ in range(jobs)]:
                await house.until(job, JobStatus.SUCCEEDED, JobStatus.FAILED)
        resident: int = process.memory_info().rss
        return resident

    async with house.working():
        before = await run(10)
        after = await run(40)
    # 80 attempts held 640 MB.
    assert after - before < 100_000_000
