"""Job types for races, and a process that claims and completes their jobs as fast as it can.

    python -m tests.queue.race_jobs URL --seconds 5 [--limit 1] [--types race.free,race.only_0]

Handlers, and the process, append a line to the file `RACE_LOG` when a job starts and when it ends:
`start|end TYPE JOB PROCESS MONOTONIC_SECONDS`. One write each, so lines of processes never mix.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from job_registry import Backoff, JobContext, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.logs import configure_logs
from job_registry_api.queue.errors import LeaseLost
from job_registry_api.queue.queue import JobQueue


class Nap(Payload):
    """A job that takes this long."""

    milliseconds: int = 5


def _job_type(name: str, limit: int | None = None) -> JobType[Nap]:
    policy = JobPolicy(
        max_attempts=1_000,
        timeout_seconds=60,
        concurrency_limit=limit,
        backoff=Backoff(base_seconds=0.1, cap_seconds=0.5),
    )
    job_type = JobType(name=name, payload=Nap, policy=policy)
    job_type.handler(_nap)
    return job_type


async def _nap(job: JobContext, payload: Nap) -> None:
    log("start", job.type, job.id)
    await asyncio.sleep(payload.milliseconds / 1_000)
    log("end", job.type, job.id)


free = _job_type("race.free")
other = _job_type("race.other")
roomy = _job_type("race.roomy", 100_000)
only_0, only_1, only_2, only_3, only_4, only_5 = (_job_type(f"race.only_{n}", 1) for n in range(6))

ONLY = (only_0, only_1, only_2, only_3, only_4, only_5)
REGISTRY = JobRegistry([free, other, roomy, *ONLY])


@asynccontextmanager
async def queues(
    url: str, count: int, registry: JobRegistry = REGISTRY
) -> AsyncIterator[list[JobQueue]]:
    """Services with a `Database` of their own each, as so many processes have them."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(JobQueue.from_url(url, registry, lease_seconds=30))
            for _ in range(count)
        ]


def log(what: str, job_type: str, job_id: object) -> None:
    """Append a line to the race's log."""
    line = f"{what} {job_type} {job_id} {os.getpid()} {time.monotonic()}\n"
    descriptor = os.open(os.environ["RACE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class Line(NamedTuple):
    """One line of the log."""

    what: str
    type: str
    job_id: str
    pid: int
    at: float


def read_log(path: Path) -> list[Line]:
    """The lines of a race's log, in order of time."""
    lines = [line.split() for line in path.read_text("utf-8").splitlines()]
    read = [Line(what, kind, job, int(pid), float(at)) for what, kind, job, pid, at in lines]
    return sorted(read, key=lambda line: line.at)


def most_at_once(lines: Iterable[Line]) -> dict[str, int]:
    """How many jobs of each type ran at the same time at most."""
    now: Counter[str] = Counter()
    most: dict[str, int] = defaultdict(int)
    for line in lines:
        now[line.type] += 1 if line.what == "start" else -1
        most[line.type] = max(most[line.type], now[line.type])
    return dict(most)


async def claim_and_complete(url: str, types: list[str], limit: int, seconds: float) -> None:
    """Claim and complete until the time is over."""
    until = time.monotonic() + seconds
    async with JobQueue.from_url(url, REGISTRY, lease_seconds=30) as queue:
        while time.monotonic() < until:
            leases = await queue.lease(types, f"claimer {os.getpid()}", limit=limit)
            for lease in leases:
                log("start", lease.job.type, lease.job.id)
            for lease in leases:
                log("end", lease.job.type, lease.job.id)
                # The lease of a process that was frozen for long enough is over.
                try:
                    await queue.complete(lease.token)
                except LeaseLost:
                    continue
            if not leases:
                await asyncio.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--limit", type=int, default=1)
    parser.add_argument("--types", default=",".join(REGISTRY))
    arguments = parser.parse_args()
    configure_logs("error", "console")
    types = arguments.types.split(",")
    asyncio.run(claim_and_complete(arguments.url, types, arguments.limit, arguments.seconds))


if __name__ == "__main__":
    main()
