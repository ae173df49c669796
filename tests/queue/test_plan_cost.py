"""No statement reads a long queue, or is estimated so dear that PostgreSQL compiles it.

From `jit_above_cost` (100,000) on, PostgreSQL with LLVM compiles a statement each time it runs,
which takes 50 to 1,600 ms for what runs in one. Only the estimate counts, and an estimate depends
on how many rows PostgreSQL believes there are. The plans come from `auto_explain` in the server's
log, with those of statements inside functions, so this holds whatever the statements are.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.job_logs import LogLevel, LogLine
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.queue import JobQueue
from tests.conftest import run_sql
from tests.postgresql_server import Server
from tests.queue.race_jobs import Nap, queues

MAX_COST: Final = 25_000.0
"""A quarter of `jit_above_cost`. Pages of `jobs` filtered by types and statuses come nearest: at a
million rows 10,500 with statistics and 22,100 without."""

MAX_ROWS: Final = 15_000
"""How many rows a part of one statement handles at most. A page of 100 types and 5 statuses takes
the first 51 of each from an index: of 10,200 that there are, however long the queue is."""

MAX_BLOCKS: Final = 15_000
"""How often a statement looks at a block of 8 kB at most. The same page does so 12,000 times."""

DISABLED_COST: Final = 1e10
"""What PostgreSQL 17 and older add for a part of a plan that a setting disables. Statements that
read an index in order run without sorts where possible, and never with compilation."""

EXPLAIN_ALL: Final = (
    "ALTER DATABASE {name} SET session_preload_libraries = 'auto_explain'",
    "ALTER DATABASE {name} SET auto_explain.log_min_duration = 0",
    "ALTER DATABASE {name} SET auto_explain.log_nested_statements = on",
    "ALTER DATABASE {name} SET auto_explain.log_format = 'json'",
    "ALTER DATABASE {name} SET auto_explain.log_analyze = on",
    "ALTER DATABASE {name} SET auto_explain.log_timing = off",
    "ALTER DATABASE {name} SET auto_explain.log_buffers = on",
)

FILL: Final = """
    INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
        timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
        finished_at)
    SELECT gen_random_uuid(), 'plan.type_' || (n % {types}), 'f', status, '{{}}', 10 * (n % 7), 0,
        3, 60, 1, 8, now(),
        CASE status WHEN 'queued' THEN now() - (n % 100) * interval '1 minute' END,
        CASE status WHEN 'succeeded' THEN now() END
    FROM generate_series(1, {jobs}) AS n, (VALUES ('queued'), ('succeeded')) AS s (status)"""

BROKEN = JobError("broken", "It broke.")


def registry_of(types: int) -> JobRegistry:
    """Types of which every second has a limit; a single one has one as well."""
    return JobRegistry(
        [
            JobType(
                name=f"plan.type_{n}",
                payload=Nap,
                policy=JobPolicy(max_attempts=100, concurrency_limit=None if n % 2 else 50),
            )
            for n in range(types)
        ]
    )


class Plan(NamedTuple):
    """What `auto_explain` says of one statement."""

    statement: str
    cost: float
    rows: int
    """How many rows its largest part handled, those included that did not match."""
    blocks: int
    compiled: bool


def plans(log: str, database: str) -> Iterator[Plan]:
    """The plans in a server's log, of the statements that ran in this database."""
    entry = re.compile(
        rf"^\S+ \S+ \S+ \[\d+\] {database} LOG:  duration: \S+ ms  plan:\n((?:\t.*\n)+)", re.M
    )
    for found in entry.finditer(log):
        plan: dict[str, Any] = json.loads(found[1].replace("\n\t", "\n"), strict=False)
        root = plan["Plan"]
        blocks = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        cost = root["Total Cost"] % DISABLED_COST
        yield Plan(plan["Query Text"], cost, rows(root), blocks, "JIT" in plan)


def rows(part: dict[str, Any]) -> int:
    handled: int = part["Actual Rows"] + sum(
        number for name, number in part.items() if name.startswith("Rows Removed")
    )
    handled *= part["Actual Loops"]
    return max([handled, *map(rows, part.get("Plans", ()))])


async def work(queue: JobQueue, types: list[str]) -> None:
    """Every operation that a busy queue runs, and each often enough for a generic plan."""
    for turn in range(8):
        name = types[turn % len(types)]
        request = EnqueueRequest(name, {})
        job = (await queue.enqueue(request)).job
        await queue.enqueue(request._replace(idempotency_key=f"k{turn // 2}"))
        await queue.enqueue_many([request] * 20)
        keyed = [request._replace(idempotency_key=f"b{turn}.{n}") for n in range(20)]
        await queue.enqueue_many(keyed)
        await queue.validate(request._replace(idempotency_key=f"k{turn}"))
        leases: list[Lease] = []
        async with asyncio.timeout(30):
            # A claim finds less while claims are slow: see `QueueHeads`.
            while len(leases) <= 5:
                leases += await queue.lease(types, "w", limit=10)
                leases += await queue.lease(types, "w", limit=100)
        logged = [LogLine(LogLevel.INFO, "turn", 0.0, {"number": turn})]
        await queue.heartbeat(leases[0].token, {"done": turn}, logged)
        await asyncio.gather(*(queue.complete(lease.token) for lease in leases[5:]))
        await queue.succeed(leases[4].token)
        await queue.fail(leases[0].token, BROKEN)
        await queue.release(leases[1].token)
        await queue.snooze(leases[2].token, 30)
        await queue.recover()
        await queue.cancel(leases[3].job.id)
        await queue.fail(leases[3].token, BROKEN)
        await queue.retry(leases[3].job.id)
        await queue.get(job.id)
        await queue.attempts([each.job.id for each in leases])
        assert (await queue.logs(leases[0].job.id))[-1:] == logged
        await queue.waiting_reason(job)
        await queue.counts()
        await queue.list(JobFilter(types=(name,)))
        await queue.list(JobFilter(types=tuple(types)))
        await queue.list(JobFilter(statuses=(JobStatus.QUEUED, JobStatus.RUNNING)))
        await queue.list(JobFilter((name,), (JobStatus.SUCCEEDED,)), after=job.id)
        await queue.list(JobFilter(types=tuple(types)), last=50)
        await queue.count(JobFilter(created_by="ada"))
        await queue.prune(JobStatus.SUCCEEDED, keep_seconds=3_600, jobs=100)
        await queue.tidy()


@pytest.mark.parametrize(
    "analyzed",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["unanalyzed", "analyzed"],
)
@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(40_000, marks=pytest.mark.slow),
        pytest.param(500_000, marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("types", [pytest.param(1, marks=pytest.mark.slow), 100])
async def test_no_statement_is_estimated_near_what_postgresql_compiles(
    debian_server: Server, debian_url: str, types: int, jobs: int, analyzed: bool
) -> None:
    name = debian_url.rsplit("/", 1)[1]
    # Each is as many queued jobs as finished ones: 1,000,000 rows at the most.
    settings = [statement.format(name=name) for statement in EXPLAIN_ALL]
    filling = [FILL.format(types=types, jobs=jobs)] + ["ANALYZE"] * analyzed
    if not analyzed:
        # Nor does autovacuum, halfway through.
        filling.insert(0, "ALTER TABLE job SET (autovacuum_enabled = off)")
    await asyncio.to_thread(run_sql, debian_url, *filling, *settings)
    registry = registry_of(types)
    start = debian_server.log.stat().st_size
    async with queues(debian_url, 1, registry) as (queue,):
        await work(queue, list(registry))
    with debian_server.log.open("rb") as stream:
        stream.seek(start)
        found = list(plans(stream.read().decode("utf-8", "replace"), name))
    assert len(found) > 100
    dear = {plan.statement: plan.cost for plan in found if plan.cost >= MAX_COST}
    assert not dear, [
        f"{cost:,.0f}: {' '.join(text.split())[:200]}"
        for text, cost in sorted(dear.items(), key=lambda each: -each[1])
    ]
    assert not [plan for plan in found if plan.compiled]
    long = {plan.statement: plan.rows for plan in found if plan.rows > MAX_ROWS}
    assert not long, [
        f"{number:,}: {' '.join(text.split())[:200]}" for text, number in long.items()
    ]
