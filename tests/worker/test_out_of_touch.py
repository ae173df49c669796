"""Workers that cannot reach the database stop their handlers before other workers run the jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Literal

import pytest

from job_registry import EnqueueRequest, JobContext, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api import Worker
from job_registry_api.queue.queue import JobQueue
from tests.proxy import Proxy

LEASE_SECONDS = 3.0


class Nap(Payload):
    """How long the handler runs, unless it is told to stop."""

    seconds: float


def job_type(run_in: Literal["loop", "thread"], note: Callable[[str, float], None]) -> JobType[Nap]:
    """Return a type whose jobs note when they run, one at once, and stop when they are told."""
    made = JobType(name="only", payload=Nap, policy=JobPolicy(concurrency_limit=1))

    async def run(job: JobContext, payload: Nap) -> None:
        note("start", time.monotonic())
        try:
            await asyncio.sleep(payload.seconds)
        finally:
            note("end", time.monotonic())

    def run_in_thread(job: JobContext, payload: Nap) -> None:
        note("start", time.monotonic())
        try:
            until = time.monotonic() + payload.seconds
            while time.monotonic() < until and not job.cancel_requested:
                time.sleep(0.01)
        finally:
            note("end", time.monotonic())

    made.handler(run if run_in == "loop" else run_in_thread)
    return made


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_a_handler_ends_before_its_place_is_given_to_another(
    run_in: Literal["loop", "thread"], fresh_postgresql_url: str, proxied: Proxy
) -> None:
    noted: list[tuple[float, str]] = []
    kind = job_type(run_in, lambda what, at: noted.append((at, what)))
    async with AsyncExitStack() as stack:

        async def opened(url: str) -> JobQueue:
            return await stack.enter_async_context(
                JobQueue.from_url(
                    url,
                    JobRegistry([kind]),
                    lease_seconds=LEASE_SECONDS,
                    timeout_seconds=0.9,
                    prepare=False,
                )
            )

        direct, away = await opened(fresh_postgresql_url), await opened(proxied.url)
        await stack.enter_async_context(Worker(away, concurrency=1).running())
        await direct.enqueue(EnqueueRequest("only", {"seconds": 20}))
        await direct.enqueue(EnqueueRequest("only", {"seconds": 0.1}))
        while not noted:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        proxied.black_hole()
        await stack.enter_async_context(Worker(direct, concurrency=1).running())
        async with asyncio.timeout(15):
            while len(noted) < 4:
                await asyncio.sleep(0.01)
        proxied.resume()
    assert [what for _, what in sorted(noted)] == ["start", "end"] * 2
