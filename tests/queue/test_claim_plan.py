"""What an operation costs does not grow with the queue: each reads an index in order."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from job_registry import EnqueueRequest, JobRegistry
from job_registry.discovery import load_registry
from job_registry_api.queue.database import Database
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import InputInvalid
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import BehindInQueue
from job_registry_api.queue.store import json_text, statements
from tests.queue.test_races import outsider

FILL = {
    "postgresql": """
        INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
            finished_at)
        SELECT gen_random_uuid(), 'test.ping', 'f', status, '{{}}', 10 * (n % 7), 0, 3, 60, 1, 8,
            now(), CASE status WHEN 'queued' THEN now() + (n % 100 - 50) * interval '1 minute' END,
            CASE status WHEN 'succeeded' THEN now() END
        FROM generate_series(1, {jobs}) AS n, (VALUES ('queued'), ('succeeded')) AS s (status)""",
    # An id begins with its time, and a claim on SQLite reads the ids of times to come.
    "sqlite": """
        WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {jobs})
        INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
            finished_at)
        SELECT '00' || lower(hex(randomblob(15))), 'test.ping', 'f', status, '{{}}', 10 * (n % 7),
            0, 3, 60, 1, 8, '2026-01-01 00:00:00.000000',
            CASE status WHEN 'queued' THEN
                strftime('%Y-%m-%d %H:%M:%f', 'now', (n % 100 - 50) || ' minutes') || '000' END,
            CASE status WHEN 'succeeded' THEN '2026-01-01 00:00:00.000000' END
        FROM series, (SELECT 'queued' AS status UNION ALL SELECT 'succeeded')""",
}


async def fill(database: Database, jobs: int) -> None:
    async with database.transaction() as connection:
        await connection.exec_driver_sql(FILL[database.name].format(jobs=jobs))
    async with database.reading() as connection:
        await connection.exec_driver_sql("ANALYZE")


PARAMETERS: dict[str, dict[str, Any]] = {
    "next_level": {"type": "test.ping", "below": 101},
    "due": {"type": "test.ping", "priority": 60, "now": "2030", "jobs": 10},
    "expired": {"now": "2030", "most": 100},
    "ahead": {"lease_end": "2030", "lease": 30, "most": 100},
    "set_due": {"now": "2030", "newest": "f", "most": 100},
    "running": {"now": "2030", "type": "test.ping"},
    "next_end": {"now": "2030"},
    "prune": {"status": "succeeded", "before": "2030", "jobs": 200},
    "unfinished": {"after": "", "jobs": 100, "characters": 10_000},
    "waiting": {"ids": '["f"]', "most": 1_000, "shift": "+0 seconds"},
    "due_readable": {
        "type": "test.ping",
        "priority": 60,
        "now": "2030",
        "jobs": 10,
        "readable": '["f"]',
    },
    "any_parked": {},
    "next_refused": {"type": "test.ping", "refused": ""},
    "next_parked_level": {"type": "test.ping", "refused": "f", "below": 101},
    "due_parked": {
        "type": "test.ping",
        "refused": "f",
        "priority": 60,
        "jobs": 10,
        "readable": None,
    },
    "parked_of": {"type": "test.ping", "parked_until": "2030", "jobs": 10},
    "parked_before": {"before": "2030", "jobs": 10},
}


@pytest.fixture
async def filled_file(tmp_path: Path, sqlite_template: Path) -> AsyncIterator[Database]:
    """A SQLite database with 2,000 queued jobs and as many finished ones."""
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    database = open_database(f"sqlite:///{tmp_path / 'jobs.db'}", timeout_seconds=None)
    await fill(database, 2_000)
    yield database
    await database.close()


async def steps_of(database: Database, name: str, values: dict[str, Any]) -> list[str]:
    """The steps of the plan of a statement of SQLite."""
    async with database.reading() as connection:
        query = text(f"EXPLAIN QUERY PLAN {statements('sqlite')[name]}")
        return [row[-1] for row in await connection.execute(query, values)]


@pytest.mark.cases(6)
@pytest.mark.parametrize("name", PARAMETERS)
async def test_on_sqlite_a_statement_reads_an_index_and_sorts_no_more_than_a_page(
    filled_file: Database, name: str
) -> None:
    steps = await steps_of(filled_file, name, PARAMETERS[name])
    scans = [
        s
        for s in steps
        if re.match(r"SCAN (job|job_attempt|job_parked|other|due)\b(?!.* USING)", s)
    ]
    assert not scans, steps
    # The page of unfinished jobs is put together from two.
    assert name == "unfinished" or not [step for step in steps if "TEMP B-TREE" in step], steps


async def test_on_sqlite_leases_and_their_ends_find_jobs_by_their_ids(
    filled_file: Database,
) -> None:
    for name in BY_ID:
        values = dict.fromkeys(re.findall(r"(?<!\w):(\w+)", statements("sqlite")[name]), "2030")
        steps = await steps_of(filled_file, name, values)
        read = [step for step in steps if re.match(r"(SEARCH|SCAN) job(_\w+)?\b", step)]
        assert read, (name, steps)
        by_id = r"\((job_)?id=\?( AND (id|rowid)<\?)?\)$"
        assert [step for step in read if re.search(by_id, step)] == read, (name, steps)


BY_ID = (
    "lease", "open_attempts", "succeed", "close_succeeded", "running_lease", "end", "close_attempt",
    "forget_returned", "forget_oldest", "set_lease", "renew", "hold", "settle", "cancel", "retry",
    "refused_by", "unpark", "forget_parked", "fail_parked", "lease_states", "attempts", "found",
)  # fmt: skip
"""The statements of SQLite that read only the jobs that they name."""


@pytest.mark.parametrize("name", ["next_level", "any_parked", "next_refused", "next_parked_level"])
async def test_on_sqlite_a_claim_reads_one_row_to_know_what_is_next(
    filled_file: Database, name: str
) -> None:
    values = PARAMETERS[name]
    if name != "next_level":
        async with filled_file.transaction() as connection:
            for statement in PARK["sqlite"]:
                await connection.exec_driver_sql(statement.format(refused="f"))
    async with filled_file.reading() as connection:
        rows = (await connection.execute(text(statements("sqlite")[name]), values)).all()
    assert len(rows) == 1


LISTS = {
    "all": JobFilter(),
    "a type": JobFilter(types=("test.ping",)),
    "types": JobFilter(types=("test.ping", "test.limited")),
    "statuses": JobFilter(statuses=(JobStatus.FAILED, JobStatus.QUEUED)),
    "a type and status": JobFilter(("test.ping",), (JobStatus.SUCCEEDED,)),
    "types and statuses": JobFilter(
        ("test.ping", "test.limited"), (JobStatus.FAILED, JobStatus.QUEUED)
    ),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("size", [{"first": 50}, {"last": 50}], ids=["first", "last"])
@pytest.mark.parametrize("wanted", LISTS.values(), ids=LISTS.keys())
async def test_on_sqlite_a_page_of_jobs_reads_indexes_and_sorts_no_more_than_pages(
    filled_file: Database, registry: JobRegistry, wanted: JobFilter, size: dict[str, Any]
) -> None:
    explain = "EXPLAIN QUERY PLAN"
    steps = [row[-1] for row in await explained(filled_file, registry, wanted, explain, **size)]
    # Without a filter the primary key is read, in its order. `anon` are the ids of some pages.
    scans = [
        s for s in steps if re.match(r"SCAN (?!anon|pair|newest|oldest|\(subquery)(?!.* USING)", s)
    ]
    assert not scans, steps
    # The ids of pages of several kinds are sorted. A type is one for each status.
    if not wanted.types and len(wanted.statuses or ()) < 2:
        assert not [step for step in steps if "TEMP B-TREE" in step], steps


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("statuses", "job_by_status"),
        ("a type and status", "job_by_type_and_status"),
        ("types and statuses", "job_by_type_and_status"),
    ],
)
async def test_on_sqlite_a_page_of_jobs_reads_its_index_whatever_the_statistics_say(
    filled_file: Database, registry: JobRegistry, name: str, index: str
) -> None:
    """Nor does it depend on the version: SQLite 3.53 chooses other indexes with few statistics."""
    async with filled_file.transaction() as connection:
        for statement in (
            "ANALYZE",
            "DELETE FROM sqlite_stat1",
            "INSERT INTO sqlite_stat1 VALUES ('job', 'sqlite_autoindex_job_1', '4000 1')",
            # As if all jobs had the same value.
            f"INSERT INTO sqlite_stat1 VALUES ('job', '{index}', '1000000{3 * ' 1000000'}')",
        ):
            await connection.exec_driver_sql(statement)
    database = filled_file.for_another_loop()  # It reads the statistics when it is opened.
    explain = "EXPLAIN QUERY PLAN"
    steps = [row[-1] for row in await explained(database, registry, LISTS[name], explain, first=50)]
    await database.close()
    searches = [step for step in steps if "id>? AND id<?" in step]
    assert searches, steps
    assert [step for step in searches if f"INDEX {index} " in step] == searches, steps


async def test_a_page_of_several_types_reads_no_more_jobs_than_it_has(queue: JobQueue) -> None:
    for name in ("test.ping", "test.pong", "test.limited"):
        await queue.enqueue_many([EnqueueRequest(name, {})] * 4)
    wanted = JobFilter(("test.ping", "test.pong", "test.limited"), (JobStatus.QUEUED,))
    read: list[int] = []

    def note(_connection: Any, _cursor: Any, _sql: str, parameters: Any, *_: Any) -> None:
        read.append(len([each for each in parameters if ID.match(str(each))]))

    engine = queue._database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    for size in ({"first": 2}, {"last": 2}):
        options: dict[str, Any] = size
        assert len((await queue.list(wanted, **options)).jobs) == 2
    event.remove(engine, "before_cursor_execute", note)
    # One more shows whether there is another page.
    assert max(read) == 3


ID = re.compile(r"0[0-9a-f]{7}-?[0-9a-f]{4}-?7")
"""The ids of jobs of this time."""


async def explained(
    database: Database, registry: JobRegistry, wanted: JobFilter, explain: str, **size: Any
) -> list[Any]:
    """The plan of the query that `list_jobs` runs."""
    ran: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        ran.append((sql, parameters))

    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    await JobQueue(registry, database).list(wanted, **size)
    event.remove(database.engine.sync_engine, "before_cursor_execute", note)
    sql, parameters = ran[0]  # That of the page; those after it read jobs by their ids.
    async with database.reading() as connection:
        rows = await connection.exec_driver_sql(f"{explain} {sql}", parameters)
        return list(rows.all())


async def test_on_postgresql_what_an_operation_reads_does_not_grow_with_the_queue(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    database = open_database(fresh_postgresql_url, timeout_seconds=None)
    queue = JobQueue(registry, database)
    read: dict[int, dict[str, int]] = {}
    for jobs in (2_000, 20_000):
        await fill(database, jobs)
        await queue.lease(["test.ping", "test.limited"], "w", limit=10)
        read[jobs] = {
            "claim": await blocks(database, CLAIM),
            "next due": await blocks(database, NEXT_DUE),
            "recover": await blocks(database, RECOVER),
        }
        for name, wanted in LISTS.items():
            for size in ({"first": 50}, {"last": 50}):
                ((plan,),) = await explained(database, registry, wanted, EXPLAIN, **size)
                read[jobs][f"{size} of {name}"] = blocks_of(plan)
    await database.close()
    small, large = read.values()
    # An index has a level more, perhaps, for each job of a page and of the pages it is made of.
    # What reads the queue would read ten times as much, thousands of blocks.
    grown = {name: (small[name], large[name]) for name in small if large[name] > small[name] + 250}
    assert not grown


@pytest.mark.slow
async def test_on_postgresql_a_filled_table_without_statistics_costs_no_more(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    """A table that has just been filled was not analyzed yet, and estimates are far off."""
    database = open_database(fresh_postgresql_url, timeout_seconds=None)
    queue = JobQueue(registry, database)
    job = (await queue.enqueue(EnqueueRequest("test.limited", {}, priority=0))).job
    async with database.transaction() as connection:
        await connection.exec_driver_sql(
            FILL["postgresql"].format(jobs=20_000).replace("test.ping", "test.limited")
        )
        await connection.exec_driver_sql(
            "INSERT INTO job_attempt (job_id, attempt, worker_id, started_at, finished_at, outcome)"
            " SELECT id, 1, 'w', now(), now(), 'failed' FROM job WHERE status = 'succeeded'"
        )
    read = {
        "claim": await blocks(database, CLAIM),
        "next due": await blocks(database, NEXT_DUE.replace("test.ping", "test.limited")),
        "waiting": await blocks(database, WAITING.format(job.id)),
    }
    await database.close()
    assert max(read.values()) < FEW_BLOCKS, read


@pytest.mark.slow
@pytest.mark.parametrize("analyzed", [False, True], ids=["never", "when it was idle"])
async def test_on_postgresql_a_burst_of_equal_jobs_is_read_by_the_index_of_claims(
    fresh_postgresql_url: str, analyzed: bool
) -> None:
    """To the planner, two indexes seem to have the one job that it expects, and that without the
    order is the smaller one: each claim read and sorted the whole queue, until the next ANALYZE."""
    database = open_database(fresh_postgresql_url, timeout_seconds=None)
    queue = JobQueue(load_registry(["job_registry.catalog"]), database)
    if analyzed:
        async with database.reading() as connection:
            await connection.exec_driver_sql("ANALYZE")
    payout = EnqueueRequest("payout.execute", {"batchId": "b", "escrowId": "e"})
    for _ in range(20):
        await queue.enqueue_many([payout] * 1_000)
    job = (await queue.enqueue(payout)).job
    read = {
        name: await entries(database, statement.replace("test.ping", payout.type))
        for name, statement in {
            "claim": CLAIM,
            "later claim": LATER_CLAIM,
            "next due": NEXT_DUE,
            "waiting": WAITING.format(job.id).replace("1000", "50"),
        }.items()
    }
    await database.close()
    assert max(read.values()) < FEW_ENTRIES, read


@pytest.mark.slow
async def test_jobs_of_higher_priority_that_are_scheduled_for_later_cost_nothing(
    queue: JobQueue, database_url: str
) -> None:
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
    later = datetime.now(UTC) + timedelta(days=1)
    scheduled = [EnqueueRequest("test.ping", {}, priority=60, schedule_at=later)] * 1_000
    for _ in range(10):
        await queue.enqueue_many(scheduled)
    await queue.enqueue_many([EnqueueRequest("test.ping", {}, priority=p) for p in (90, 60, 60)])
    await queue.show_worker(["test.ping"])
    assert await queue.waiting_reason(job) == BehindInQueue(3)
    if database_url.startswith("sqlite"):
        return
    database = open_database(database_url, timeout_seconds=None)
    assert await blocks(database, WAITING.format(job.id)) < FEW_BLOCKS
    await database.close()


@asynccontextmanager
async def long_snapshot(
    url: str, registry: JobRegistry
) -> AsyncIterator[tuple[Database, JobQueue]]:
    """A queue with three due jobs, where 20,000 others ran since a snapshot that is still open."""
    database = open_database(url, timeout_seconds=None)
    queue = JobQueue(registry, database)
    async with outsider(url, "REPEATABLE READ") as report:
        await report.exec_driver_sql("SELECT count(*) FROM job")
        for statement in (RAN_BEFORE, *RAN):
            async with database.reading() as connection:
                await connection.exec_driver_sql(statement)
        await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 3)
        yield database, queue
    await database.close()


@pytest.mark.slow
async def test_on_postgresql_a_report_reads_nothing_of_the_jobs_done_since_a_long_snapshot_began(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    async with long_snapshot(fresh_postgresql_url, registry) as (database, queue):
        leases = await queue.lease(["test.ping"], "w", limit=3)
        lease = leases[0]
        named, parked, succeeded = [
            {"id": each.job.id.hex, "token": each.token[32:], "fingerprint": "1" * 64}
            for each in leases
        ]
        renewals, parks, successes = [json_text([each]) for each in (named, parked, succeeded)]
        reports = json_text([named | {"outcome": "succeeded", "retryable": True, "spend": True}])
        read = {
            "succeed": await blocks(
                database, f"SELECT * FROM job_succeed('{successes}', 'p', true)"
            ),
            "park": await blocks(database, f"SELECT * FROM job_park('{parks}', 'p', true)"),
            "settle": await blocks(database, f"SELECT job_settle('{parks}', 'p', true)"),
            "renew": await blocks(
                database, f"SELECT * FROM job_renew('{renewals}', 30, 'p', true)"
            ),
            "end": await blocks(database, f"SELECT * FROM job_end('{reports}', 'p', true)"),
        }
        assert (await queue.get(lease.job.id)).status is JobStatus.SUCCEEDED
    assert max(read.values()) < FEW_BLOCKS, read


@pytest.mark.slow
async def test_on_postgresql_a_claim_reads_nothing_of_the_jobs_that_ran_since_a_long_snapshot_began(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    """The statistics are those of an idle queue, as after most runs of autovacuum."""
    async with long_snapshot(fresh_postgresql_url, registry) as (database, queue):
        await queue.enqueue(EnqueueRequest("test.limited", {}))
        read = {
            "claim": await entries(database, LATER_CLAIM),
            "claim of a type with a limit": await entries(database, LATER_CLAIM_WITH_LIMIT),
            "recover": await entries(database, RECOVER.replace("NULL, 30", "3, 60")),
        }
    assert max(read.values()) < FEW_ENTRIES, read


async def test_on_postgresql_a_later_claim_of_several_priorities_reads_nothing_of_what_ran(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    """The table has no statistics yet."""
    database = open_database(fresh_postgresql_url, timeout_seconds=None)
    queue = JobQueue(registry, database)
    async with outsider(fresh_postgresql_url, "REPEATABLE READ") as report:
        await report.exec_driver_sql("SELECT count(*) FROM job")
        for _ in range(5):
            await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 1_000)
        async with database.transaction() as connection:
            await connection.exec_driver_sql(
                "UPDATE job SET status = 'succeeded', next_run_at = NULL, finished_at = now()"
            )
        job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
        known = [[priority, str(job.next_run_at)] for priority in (60, 50, 40)]
        read = await entries(database, CLAIM_FROM.format(json_text(known)))
    await database.close()
    assert read < FEW_ENTRIES


@pytest.mark.slow
async def test_on_postgresql_a_claim_does_not_read_what_runs(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    """The statistics are those of an idle queue."""
    database = open_database(fresh_postgresql_url, timeout_seconds=None)
    queue = JobQueue(registry, database)
    running, *_ = RAN
    for statement in (*RAN, "VACUUM ANALYZE job", running):
        async with database.reading() as connection:
            await connection.exec_driver_sql(statement)
    await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 3)
    await queue.enqueue(EnqueueRequest("test.limited", {}))
    read = {
        "claim": await entries(database, CLAIM.replace("30", "60")),
        "next due": await entries(database, NEXT_DUE),
        "recover": await entries(database, RECOVER.replace("30", "60")),
    }
    await database.close()
    assert max(read.values()) < FEW_ENTRIES, read


FEW_BLOCKS = 2_500
"""A new connection reads a thousand of the catalog alone; each job a call passes over is one more.
"""

RAN = (
    """INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
           timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, lease_token,
           lease_expires_at, deadline_at)
       SELECT gen_random_uuid(), 'test.ping', 'f', 'running', '{}', 50, 1, 3, 60, 1, 8, now(), 't',
           now() + interval '1 minute', now() + interval '1 minute'
       FROM generate_series(1, 10000)""",
    """INSERT INTO job_attempt (job_id, attempt, worker_id, started_at)
       SELECT id, 1, 'w', now() FROM job""",
    """UPDATE job SET status = 'succeeded', finished_at = now(), lease_expires_at = NULL,
           deadline_at = NULL""",
    "UPDATE job_attempt SET finished_at = now(), outcome = 'succeeded'",
    "ANALYZE",
)
RAN_BEFORE = RAN[0].replace("test.ping", "test.limited").replace("+ interval '1", "- interval '10")
"""Jobs of a type with a limit, whose leases ended ten minutes ago."""

FEW_ENTRIES = 100
"""Of ten thousand."""

WAITING = """SELECT * FROM job_waiting('["{}"]', 1000)"""
CLAIM = (
    """SELECT * FROM job_claim('[{"type": "test.ping"}, {"type": "test.limited", "limit": 2}]',"""
    " 10, 'w', 30, 'p', true, NULL, NULL, NULL)"
)
CLAIM_FROM = (
    """SELECT * FROM job_claim('[{{"type": "test.ping", "heads": {}}}]',"""
    " 3, 'w', 60, 'p', true, 3, NULL, NULL)"
)
"""One that starts where an earlier one of the process took its jobs."""
LATER_CLAIM = CLAIM_FROM.format('[[50, "2020-01-01T00:00Z"]]')
LATER_CLAIM_WITH_LIMIT = LATER_CLAIM.replace("test.ping", "test.limited").replace(
    '"heads"', '"limit": 2, "heads"'
)
RECOVER = "SELECT * FROM job_recover('p', true, 100, NULL, 30, NULL, NULL)"
NEXT_DUE = """SELECT job_next_due('[{"type": "test.ping"}]')"""


EXPLAIN = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)"


async def blocks(database: Database, statement: str) -> int:
    """How many blocks of tables and indexes a statement reads, of its functions as well."""
    async with database.transaction() as connection:
        plan = (await connection.exec_driver_sql(f"{EXPLAIN} {statement}")).scalar_one()
    return blocks_of(plan)


async def entries(database: Database, statement: str) -> int:
    """How many entries of the indexes of jobs a statement reads, dead ones included."""
    async with database.transaction() as connection:
        # What the connection did before counts too, until it is added to the server's statistics.
        before = (await connection.exec_driver_sql(ENTRIES)).scalar_one()
        await connection.exec_driver_sql(statement)
        after = (await connection.exec_driver_sql(ENTRIES)).scalar_one()
    return int(after - before)


ENTRIES = """
    SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid)) FROM pg_index
    WHERE indrelid = CAST('job' AS regclass)
"""


def blocks_of(plan: Any) -> int:
    read = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return int(read["Shared Hit Blocks"] + read["Shared Read Blocks"])


async def test_a_filled_queue_gives_the_highest_and_oldest_first(
    queue: JobQueue, database_url: str
) -> None:
    database = open_database(database_url, timeout_seconds=None)
    await fill(database, 2_000)
    leases = await queue.lease(["test.ping"], "w", limit=10)
    assert {lease.job.priority for lease in leases} == {60}
    high = (await queue.enqueue(EnqueueRequest("test.ping", {}, priority=99))).job
    (first,) = await queue.lease(["test.ping"], "w")
    assert first.job.id == high.id
    await database.close()


async def test_a_page_is_merged_of_as_many_types_and_statuses_as_are_named(queue: JobQueue) -> None:
    request = EnqueueRequest("test.ping", {})
    ids = [(await queue.enqueue(request)).job.id for _ in range(5)]
    unknown = tuple(f"unknown.type{n}" for n in range(99))
    every = JobFilter(("test.ping", *unknown), tuple(JobStatus))
    page = await queue.list(every, first=3)
    assert [job.id for job in page.jobs] == ids[:1:-1]
    assert page.has_next_page
    rest = await queue.list(every, first=3, after=page.jobs[-1].id)
    assert [job.id for job in rest.jobs] == ids[1::-1]
    with pytest.raises(InputInvalid, match=r"/filter/types: Expected at most 100"):
        await queue.list(JobFilter((*unknown, "test.ping", "test.pong")))


PARK = {
    "postgresql": (
        "UPDATE job SET next_run_at = '9999-01-01 00:00:00+00' WHERE status = 'queued'",
        "INSERT INTO job_parked"
        " (job_id, type, priority, fingerprint, due_at, parked_at, refused_by)"
        " SELECT id, type, priority, fingerprint, created_at, now(), '{refused}' FROM job"
        " WHERE status = 'queued'",
    ),
    "sqlite": (
        "UPDATE job SET next_run_at = '9999-01-01 00:00:00.000000' WHERE status = 'queued'",
        "INSERT INTO job_parked"
        " (job_id, type, priority, fingerprint, due_at, parked_at, refused_by)"
        " SELECT id, type, priority, fingerprint, created_at, created_at, '{refused}' FROM job"
        " WHERE status = 'queued'",
    ),
}


async def fill_parked(database: Database, jobs: int, refused: str) -> None:
    """Fill the queue with jobs that a worker of this fingerprint has parked."""
    await fill(database, jobs)
    async with database.transaction() as connection:
        for statement in PARK[database.name]:
            await connection.exec_driver_sql(statement.format(refused=refused))
    if database.name == "postgresql":
        # Until then the index has entries of the jobs before they were parked.
        async with database.reading() as connection:
            await connection.exec_driver_sql("VACUUM job")


@pytest.mark.slow
async def test_on_postgresql_a_claim_reads_no_parked_jobs_of_its_own_and_few_of_others(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    database = open_database(fresh_postgresql_url, timeout_seconds=None)
    queue = JobQueue(registry, database)
    await fill_parked(database, 20_000, "a" * 64)
    await queue.enqueue(EnqueueRequest("test.ping", {}, priority=0))
    wanted = [{"type": "test.ping", "fingerprint": digit * 64} for digit in "ab"]
    claim = "SELECT * FROM job_claim('[{}]', 10, 'w', 30, 'p', true, NULL, NULL, NULL)"
    read = [await blocks(database, claim.format(json_text(each))) for each in wanted]
    await database.close()
    assert max(read) < FEW_BLOCKS, read


@pytest.mark.slow
async def test_on_sqlite_a_claim_takes_no_longer_among_parked_jobs(
    tmp_path: Path, sqlite_template: Path, registry: JobRegistry
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    database = open_database(f"sqlite:///{tmp_path / 'jobs.db'}", timeout_seconds=None)
    queue = JobQueue(registry, database)
    await fill_parked(database, 30_000, registry["test.ping"].fingerprint)
    times = []
    for _ in range(20):
        await queue.enqueue(EnqueueRequest("test.ping", {}, priority=0))
        began = time.perf_counter()
        (lease,) = await queue.lease(["test.ping"], "w", limit=10)
        times.append(time.perf_counter() - began)
        await queue.complete(lease.token)
    await database.close()
    # It takes about a millisecond; to pass over the parked jobs would take 15.
    assert min(times) < 0.005
