"""The cost of a claim does not grow with the queue: it reads an index in order."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import text

from api.queue.database import Database
from api.queue.requests import EnqueueRequest
from api.queue.service import JobService

FILL = {
    "postgresql": """
        INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
            finished_at)
        SELECT gen_random_uuid(), 'test.ping', 'f', status, '{{}}', 10 * (n % 7), 0, 3, 60, 1, 8,
            now(), CASE status WHEN 'queued' THEN now() + (n % 100 - 50) * interval '1 minute' END,
            CASE status WHEN 'succeeded' THEN now() END
        FROM generate_series(1, {jobs}) AS n, (VALUES ('queued'), ('succeeded')) AS s (status)""",
    "sqlite": """
        WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {jobs})
        INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
            finished_at)
        SELECT lower(hex(randomblob(16))), 'test.ping', 'f', status, '{{}}', 10 * (n % 7), 0, 3, 60,
            1, 8, '2026-01-01 00:00:00.000000',
            CASE status WHEN 'queued' THEN
                strftime('%Y-%m-%d %H:%M:%f', 'now', (n % 100 - 50) || ' minutes') || '000' END,
            CASE status WHEN 'succeeded' THEN '2026-01-01 00:00:00.000000' END
        FROM series, (SELECT 'queued' AS status UNION ALL SELECT 'succeeded')""",
}


async def fill(database: Database, jobs: int) -> None:
    async with database.transaction() as connection:
        statement = FILL[database.dialect.name].format(jobs=jobs)
        await connection.exec_driver_sql(statement)
    async with database.reading() as connection:
        await connection.exec_driver_sql("ANALYZE")


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]


async def test_a_claim_reads_the_index_in_order_and_few_rows_of_it(
    service: JobService, database_url: str
) -> None:
    database = Database(database_url)
    await fill(database, 20_000)
    parameters = {
        "wanted": json.dumps([{"type": "test.ping", "room": 10}]),
        "jobs": 10,
        "window": 52,
        "worker_id": "w",
        "lease_seconds": 30.0,
    }
    claim = service._store._claim
    async with database.reading() as connection:
        if database.dialect.name == "sqlite":
            rows = await connection.execute(text(f"EXPLAIN QUERY PLAN {claim}"), parameters)
            steps = [row[-1] for row in rows]
            # The jobs of a slot come from the index, in its order: nothing of them is sorted.
            assert any("USING" in s and "job_claim (type=? AND priority=? AND next_run_at<?)" in s
                       for s in steps), steps  # fmt: skip
            assert not [s for s in steps if s.startswith("SCAN job")], steps
        else:
            explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {claim}"
            ((plans,),) = (await connection.execute(text(explain), parameters)).all()
            found = nodes(plans[0]["Plan"])
            scans = [node for node in found if node.get("Index Name") == "job_claim"]
            assert scans
            assert not [
                n for n in found if n["Node Type"] == "Seq Scan" and n.get("Relation Name") == "job"
            ]
            # 7 priorities, 52 at most of each, of 20,000 queued jobs and as many finished ones.
            assert sum(n["Actual Rows"] * n["Actual Loops"] for n in scans) <= 7 * (52 + 2)
    await database.close()


async def test_a_filled_queue_gives_the_highest_and_oldest_first(
    service: JobService, database_url: str
) -> None:
    database = Database(database_url)
    await fill(database, 2_000)
    leases = await service.lease(["test.ping"], "w", limit=10)
    assert {lease.job.priority for lease in leases} == {60}
    high = (await service.enqueue(EnqueueRequest("test.ping", {}, priority=99))).job
    (first,) = await service.lease(["test.ping"], "w")
    assert first.job.id == high.id
    await database.close()
