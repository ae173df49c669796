"""Workers that cannot reach the database stop their handlers before other workers run the jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import pytest

from job_registry import EnqueueRequest, JobContext, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api import Worker
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from tests.conftest import run_sql
from tests.proxy import Proxy

LEASE_SECONDS = 3.0


class Nap(Payload):
    """How long the handler runs, unless it is stopped."""

    seconds: float


def job_type(run_in: Literal["loop", "thread"], note: Callable[[str, float], None]) -> JobType[Nap]:
    """Return a type whose jobs note when they run, one at once, and stop when that is requested."""
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


@asynccontextmanager
async def opened(
    url: str, kind: JobType[Nap], *, lease_seconds: float = LEASE_SECONDS
) -> AsyncIterator[JobQueue]:
    async with JobQueue.from_url(
        url,
        JobRegistry([kind]),
        lease_seconds=lease_seconds,
        timeout_seconds=0.9,
        prepare=False,
    ) as queue:
        yield queue


@pytest.mark.slow
@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_a_handler_ends_before_its_place_is_given_to_another(
    run_in: Literal["loop", "thread"], fresh_postgresql_url: str, proxied: Proxy
) -> None:
    noted: list[tuple[float, str]] = []
    kind = job_type(run_in, lambda what, at: noted.append((at, what)))
    async with AsyncExitStack() as stack:
        direct, away = [
            await stack.enter_async_context(opened(url, kind))
            for url in (fresh_postgresql_url, proxied.url)
        ]
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


@pytest.mark.slow
async def test_a_handler_that_was_stopped_spends_no_attempt_if_the_outage_ends_in_time(
    fresh_postgresql_url: str, proxied: Proxy
) -> None:
    noted: list[str] = []
    kind = job_type("loop", lambda what, at: noted.append(what))
    async with (
        opened(proxied.url, kind, lease_seconds=6.0) as queue,
        Worker(queue, concurrency=1).running() as worker,
    ):
        await queue.enqueue(EnqueueRequest("only", {"seconds": 20}))
        while not noted:
            await asyncio.sleep(0.01)
        proxied.stall()
        while "end" not in noted:
            await asyncio.sleep(0.01)
        proxied.resume()
        while noted != ["start", "end", "start"]:
            await asyncio.sleep(0.01)
        worker.stop()
        worker.stop()
    outcomes = "SELECT outcome FROM job_attempt ORDER BY id"
    found = await asyncio.to_thread(run_sql, fresh_postgresql_url, outcomes)
    assert found == [("released",), ("released",)]


@pytest.mark.slow
async def test_the_first_jobs_outlast_their_leases_on_a_slow_network(proxied: Proxy) -> None:
    noted: list[str] = []
    kind = job_type("loop", lambda what, at: noted.append(what))
    # To open a connection takes a dozen answers.
    proxied.slow_down(0.1)
    async with (
        JobQueue.from_url(
            proxied.url, JobRegistry([kind]), lease_seconds=1.0, prepare=False
        ) as queue,
        Worker(queue, concurrency=1).running(),
    ):
        job = (await queue.enqueue(EnqueueRequest("only", {"seconds": 2.5}))).job
        while (await queue.get(job.id)).status is not JobStatus.SUCCEEDED:
            await asyncio.sleep(0.1)
    assert noted == ["start", "end"]


@pytest.mark.slow
async def test_a_handler_times_out_in_time_although_its_claim_was_answered_late(
    fresh_postgresql_url: str, proxied: Proxy
) -> None:
    ended: list[float] = []
    kind = JobType(name="only", payload=Nap, policy=JobPolicy(timeout_seconds=4, max_attempts=1))

    async def run(job: JobContext, payload: Nap) -> None:
        try:
            await asyncio.sleep(payload.seconds)
        finally:
            ended.append(time.time())

    kind.handler(run)
    async with (
        JobQueue.from_url(proxied.url, JobRegistry([kind]), prepare=False) as queue,
        opened(fresh_postgresql_url, kind) as direct,
        Worker(queue, concurrency=1).running(),
    ):
        await asyncio.sleep(1.0)
        proxied.slow_down(2.0)
        job = (await direct.enqueue(EnqueueRequest("only", {"seconds": 20}))).job
        while (leased := await direct.get(job.id)).started_at is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        proxied.slow_down(0.0)
        while not ended:
            await asyncio.sleep(0.01)
        while (await direct.get(job.id)).status is not JobStatus.FAILED:
            await asyncio.sleep(0.1)
    assert 3.5 < ended[0] - leased.started_at.timestamp() < 4.5


async def test_a_handler_does_not_start_if_its_lease_ended_while_the_loop_was_blocked(
    fresh_postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    kind = job_type("loop", lambda what, at: noted.append(what))
    async with opened(fresh_postgresql_url, kind, lease_seconds=1.0) as queue:
        job = (await queue.enqueue(EnqueueRequest("only", {"seconds": 0.1}))).job
        lease, blocked = queue.lease, False

        async def lease_and_block(*arguments: Any, **options: Any) -> list[Lease]:
            nonlocal blocked
            leases = await lease(*arguments, **options)
            if leases and not blocked:
                blocked = True
                time.sleep(1.2)  # noqa: ASYNC251
            return leases

        monkeypatch.setattr(queue, "lease", lease_and_block)
        async with Worker(queue, concurrency=1).running(), asyncio.timeout(15):
            # Not by the database: a request that the block has interrupted fails.
            while "end" not in noted:
                await asyncio.sleep(0.01)
        assert (await queue.get(job.id)).status is JobStatus.SUCCEEDED
    assert blocked
    assert noted == ["start", "end"]
