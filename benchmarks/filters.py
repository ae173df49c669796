"""How long a page, its last page and `totalCount` of each filter take, by the number of jobs.

    .venv/bin/python -m benchmarks.filters --jobs 1000000

One tenth of the jobs is queued, the others have ended, a minute after they were enqueued. They were
enqueued once per second, the last one just now. Prints the median of some calls in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from job_registry.discovery import load_registry
from job_registry_api.queue import migrations
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import JobStatus, Owner
from job_registry_api.queue.queue import JobQueue
from tests.postgresql_server import running_server

FILL: Final = """
INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
    timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
    finished_at, created_by, idempotency_key, error)
SELECT {id}, CASE n % 2 WHEN 0 THEN 'payout.execute' ELSE 'thumbnail.create' END, 'f',
    CASE n % 10 WHEN 0 THEN 'queued' WHEN 1 THEN 'failed' ELSE 'succeeded' END,
    '{{"batchId": "b", "escrowId": "e"}}', 50, 1, 3, 60, 1, 8, {time},
    CASE n % 10 WHEN 0 THEN {time} END, CASE n % 10 WHEN 0 THEN NULL ELSE {ended} END,
    'user ' || (n % 1000), CASE n % 2 WHEN 0 THEN 'k' || n END, CASE n % 10 WHEN 1 THEN {error} END
FROM {numbers}"""

POSTGRESQL: Final = {
    "id": "CAST(lpad(to_hex(CAST({start} + n AS bigint) * 1000), 12, '0') || '70008000'"
    " || lpad(to_hex(n), 12, '0') AS uuid)",
    "time": "to_timestamp({start} + n)",
    "ended": "to_timestamp({start} + n + 60)",
    "error": """CAST('{{"code": "e' || (n % 70) || '", "message": "Bank closed."}}' AS jsonb)""",
    "numbers": "generate_series(1, {jobs}) AS n",
}
SQLITE: Final = {
    "id": "printf('%012x70008000%012x', ({start} + n) * 1000, n)",
    "time": "strftime('%Y-%m-%d %H:%M:%f', {start} + n, 'unixepoch') || '000'",
    "ended": "strftime('%Y-%m-%d %H:%M:%f', {start} + n + 60, 'unixepoch') || '000'",
    "error": """'{{"code": "e' || (n % 70) || '", "message": "Bank closed."}}'""",
    "numbers": "(WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {jobs})"
    " SELECT n FROM c)",
}

SQLITE_INDEXES: Final = (
    "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'job' AND sql LIKE 'CREATE % INDEX %'"
    " OR tbl_name = 'job' AND sql LIKE 'CREATE INDEX %'"
)
POSTGRESQL_INDEXES: Final = (
    "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'job' AND indexname <> 'job_pkey'"
)


def filters(now: datetime, jobs: int) -> dict[str, tuple[JobFilter, Owner | None]]:
    """Return the filters that are measured."""
    hour, middle = timedelta(hours=1), now - timedelta(seconds=jobs / 2)
    failed = (JobStatus.FAILED,)
    return {
        "all": (JobFilter(), None),
        "types and statuses": (JobFilter(("payout.execute",), failed), None),
        "statuses": (JobFilter(statuses=(JobStatus.FAILED, JobStatus.QUEUED)), None),
        "createdBy": (JobFilter(created_by="user 7"), None),
        "createdBy and statuses": (JobFilter(created_by="user 11", statuses=failed), None),
        "own": (JobFilter(), Owner("user 7")),
        "createdAfter": (JobFilter(created_after=middle), None),
        "createdBefore": (JobFilter(created_before=middle), None),
        "created within an hour": (
            JobFilter(created_after=middle, created_before=middle + hour),
            None,
        ),
        "finishedAfter": (JobFilter(finished_after=middle), None),
        "finishedBefore": (JobFilter(finished_before=middle), None),
        "finishedBefore and statuses": (JobFilter(finished_before=middle, statuses=failed), None),
        "finished within an hour": (
            JobFilter(finished_after=middle, finished_before=middle + hour),
            None,
        ),
        "finishedAfter an hour ago": (JobFilter(finished_after=now - hour), None),
        "idempotencyKey": (JobFilter(idempotency_key="k500"), None),
        "errorCode": (JobFilter(error_code="e11"), None),
        "errorCode and types": (JobFilter(("thumbnail.create",), error_code="e11"), None),
        "search": (JobFilter(search="bank"), None),
        "search of nothing": (JobFilter(search="nothing"), None),
    }


async def measure(url: str, jobs: int, calls: int) -> dict[str, list[float]]:
    """Fill the database, and return the median milliseconds of each filter's three queries."""
    now = datetime.now(UTC)
    await asyncio.to_thread(_fill, url, int(now.timestamp()) - jobs, jobs)
    registry = load_registry(("job_registry.catalog",))
    async with JobQueue.from_url(url, registry) as queue:
        found = {}
        for name, (wanted, owner) in filters(now, jobs).items():
            reads = (
                partial(queue.list, wanted, owner=owner),
                partial(queue.list, wanted, last=50, owner=owner),
                partial(queue.count, wanted, owner=owner),
            )
            found[name] = [await _median(calls, read) for read in reads]
        return found


def _fill(url: str, start: int, jobs: int) -> None:
    migrations.upgrade(url)
    is_sqlite = url.startswith("sqlite")
    parts = SQLITE if is_sqlite else POSTGRESQL
    values = {name: part.format(start=start, jobs=jobs) for name, part in parts.items()}
    fill = FILL.format(**values)
    # The indexes are built afterwards, which takes a third of the time.
    if is_sqlite:
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            indexes = dict(file.execute(SQLITE_INDEXES).fetchall())
            drop = [f"DROP INDEX {name}" for name in indexes]
            file.executescript(";".join(["BEGIN", *drop, fill, *indexes.values(), "COMMIT"]))
            file.execute("ANALYZE")
        return
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = job_registry")
        indexes = dict(connection.execute(POSTGRESQL_INDEXES).fetchall())
        for statement in (*(f"DROP INDEX {name}" for name in indexes), fill, *indexes.values()):
            connection.execute(statement.encode())
        connection.execute("VACUUM ANALYZE job")


async def _median(calls: int, call: Callable[[], Awaitable[Any]]) -> float:
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        await call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1_000


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """Run PostgreSQL, and return the URLs of an empty database of each kind."""
    with running_server(in_memory=True) as server, tempfile.TemporaryDirectory() as folder:
        yield {"SQLite": f"sqlite:///{Path(folder) / 'jobs.db'}", "PostgreSQL": server.url}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--database", choices=["SQLite", "PostgreSQL"], help="only this one")
    given = parser.parse_args()
    with databases() as urls:
        for kind, url in urls.items():
            if given.database not in (None, kind):
                continue
            print(f"\n{kind}, {given.jobs:,} jobs: first page, last page, total (ms)")
            for name, times in asyncio.run(measure(url, given.jobs, given.calls)).items():
                print(f"  {name:30}" + "".join(f"{each:10.1f}" for each in times))
