"""Each page and each count of `jobs` costs the same however long the queue is, and each page has
what a plain filter finds: with and without statistics, and with those of a shorter queue."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sqlite3
import uuid
from collections.abc import Awaitable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
import pytest
from sqlalchemy import Engine, event

from job_registry_api.queue import filters, reading, replaying, store
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import JobStatus, Owner
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.replaying import replay
from tests.conftest import run_sql
from tests.postgresql_server import Server
from tests.queue.race_jobs import queues
from tests.queue.test_plan_cost import EXPLAIN_ALL, plans, registry_of

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
EVERY: Final = timedelta(minutes=2)
"""Between two jobs, so that an hour, by which ranges of ids are longer, has 30."""

SHORT: Final = 2_000
LONG: Final = 20_000

LIMITS: Final[dict[tuple[Any, str], int]] = {
    (reading, "EXACT_TOTAL"): 100,
    (reading, "SAMPLED_BLOCKS"): 5,
    (store, "SAMPLED_BLOCKS"): 5,
    (store, "OWN_JOBS"): 200,
    (store, "COUNTED_JOBS"): 100,
    (store, "RARE_JOBS"): 50,
    (replaying, "PAGE_JOBS"): 500,
    (filters, "WIDE_RANGE"): 50,
    (filters, "WALKED_JOBS"): 200,
    (filters, "SEARCHED_JOBS"): 100,
}
"""How many jobs are read at most, so that a short queue has more."""

MAX_ROWS: Final = 1_000
"""How many rows a part of a statement handles at most: those of the limits, of an hour at each end
of a range of time, and of a page of each type and status."""

MAX_BLOCKS: Final = 2_000
"""How often a statement looks at a block of 8 kB at most."""

MAX_GROWTH: Final = 1.5
"""How many times the instructions SQLite runs at most when there are ten times as many jobs."""


class Stored(NamedTuple):
    """The columns of a job by which it is found."""

    id: uuid.UUID
    type: str
    status: str
    created_by: str | None
    key: str | None
    code: str | None
    created_at: datetime
    finished_at: datetime | None

    def matches(self, wanted: JobFilter, owner: Owner | None) -> bool:
        created, finished = self.created_at, self.finished_at
        return (
            (wanted.types is None or self.type in wanted.types)
            and (wanted.statuses is None or self.status in wanted.statuses)
            and wanted.created_by in (None, self.created_by)
            and (owner is None or owner.subject == self.created_by is not None)
            and wanted.idempotency_key in (None, self.key)
            and wanted.error_code in (None, self.code)
            and (wanted.created_after is None or created >= wanted.created_after)
            and (wanted.created_before is None or created < wanted.created_before)
            and not (wanted.is_of_finished and finished is None)
            and not (wanted.finished_after and finished and finished < wanted.finished_after)
            and not (wanted.finished_before and finished and finished >= wanted.finished_before)
        )


def stored(jobs: int) -> list[Stored]:
    """Return jobs, oldest first. Six of them have the values that are rare."""
    made = []
    rare = {jobs * part // 7 for part in range(1, 7)}
    for n in range(jobs):
        created = START + n * EVERY
        is_rare = n in rare
        status = "cancelled" if is_rare else ("queued", "succeeded", "failed", "failed")[n % 4]
        made.append(
            Stored(
                uuid.UUID(int=(int(created.timestamp() * 1000) << 80) + (7 << 76) + n),
                "plan.type_1" if is_rare else "plan.type_0",
                status,
                "bob" if is_rare else "ada",
                f"k{n}" if n % 2 else None,
                "rare" if is_rare else "c" if status == "failed" else None,
                created,
                None if status == "queued" else created + timedelta(seconds=30),
            )
        )
    return made


COLUMNS: Final = (
    "id, type, status, created_by, idempotency_key, error, created_at, next_run_at, finished_at,"
    " fingerprint, payload, priority, attempt, max_attempts, timeout_seconds,"
    " backoff_base_seconds, backoff_cap_seconds"
)
REST: Final = ("f", "{}", 50, 1, 3, 60, 1.0, 8.0)


def fill(url: str, jobs: list[Stored]) -> None:
    rows = [
        (
            *(each.id, each.type, each.status, each.created_by, each.key),
            each.code and f'{{"code": "{each.code}", "message": "It broke."}}',
            *(each.created_at, each.created_at if each.finished_at is None else None),
            *(each.finished_at, *REST),
        )
        for each in jobs
    ]
    if url.startswith("sqlite"):
        sql = f"INSERT INTO job ({COLUMNS}) VALUES ({', '.join('?' * 17)})"
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file, file:
            file.executemany(sql, [[_as_sqlite(value) for value in row] for row in rows])
        return
    with (
        psycopg.connect(url, autocommit=True) as connection,
        connection.cursor() as cursor,
        cursor.copy(f"COPY job_registry.job ({COLUMNS}) FROM STDIN") as copy,
    ):
        for row in rows:
            copy.write_row(row)


def _as_sqlite(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")
    return value.hex if isinstance(value, uuid.UUID) else value


VALUES: Final[dict[str, dict[str, Any]]] = {
    "all": {},
    "creator": {"created_by": "ada"},
    "rare creator": {"created_by": "bob"},
    "own": {"owner": Owner("ada")},
    "code": {"error_code": "c"},
    "rare code": {"error_code": "rare"},
    "type": {"types": ("plan.type_0",)},
    "rare type": {"types": ("plan.type_1",)},
    "types": {"types": ("plan.type_0", "plan.type_1")},
    "status": {"statuses": (JobStatus.FAILED,)},
    "rare status": {"statuses": (JobStatus.CANCELLED,)},
    "statuses": {"statuses": (JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.RUNNING)},
    "creator and status": {"created_by": "ada", "statuses": (JobStatus.FAILED,)},
    "creator and rare status": {"created_by": "ada", "statuses": (JobStatus.CANCELLED,)},
    "creator and rare type": {"created_by": "ada", "types": ("plan.type_1",)},
    "creator and rare code": {"created_by": "ada", "error_code": "rare"},
    "own and no code": {"owner": Owner("ada"), "error_code": "none"},
    "own and rare status": {"owner": Owner("ada"), "statuses": (JobStatus.CANCELLED,)},
    "code and rare type": {"error_code": "c", "types": ("plan.type_1",)},
    "code and rare creator": {"error_code": "c", "created_by": "bob"},
    "creator, and status of a rare type": {
        "created_by": "ada",
        "types": ("plan.type_1",),
        "statuses": (JobStatus.QUEUED, JobStatus.CANCELLED),
    },
    "rare type and status": {"types": ("plan.type_1",), "statuses": (JobStatus.FAILED,)},
}
"""Filters whose pages read an index in its order."""


class Case(NamedTuple):
    """A page of a filter, or its count."""

    name: str
    wanted: JobFilter
    owner: Owner | None = None
    page: dict[str, Any] | None = None

    async def read(self, queue: JobQueue) -> list[uuid.UUID] | None:
        """Return the ids of the page. None: it is a count, or the page is not all that there is."""
        if self.page is None:
            await queue.count(self.wanted, owner=self.owner)
            return None
        page = await queue.list(self.wanted, owner=self.owner, **self.page)
        if page.stopped_early or self.wanted.search is not None:
            return None
        return [job.id for job in page.jobs]

    def expected(self, jobs: list[Stored]) -> list[uuid.UUID]:
        page = self.page or {}
        after, before, last = (page.get(name) for name in ("after", "before", "last"))
        found = [
            each.id
            for each in reversed(jobs)
            if each.matches(self.wanted, self.owner)
            and (after is None or each.id < after)
            and (before is None or each.id > before)
        ]
        return found[:50] if last is None else found[-last:]


def cases(jobs: list[Stored]) -> Iterator[Case]:
    """Yield filters with ranges of time that end before, among and after the jobs."""
    middle, end = jobs[len(jobs) // 2], jobs[-1].created_at
    now, hours = middle.created_at, timedelta(hours=5)
    first: dict[str, Any] = {}
    last = {"last": 50}
    after, before = {"after": middle.id}, {"before": middle.id, "last": 50}
    ranges: list[tuple[dict[str, Any], list[dict[str, Any] | None]]] = [
        ({}, [first, last, after, before, None]),
        ({"created_after": now}, [first, last, None]),
        ({"created_before": now}, [first, last, None]),
        ({"created_after": now, "created_before": now + hours}, [first, None]),
        ({"created_after": end + timedelta(days=1)}, [first]),
        ({"created_before": START - timedelta(days=1)}, [last]),
    ]
    for (name, fields), (times, pages) in product(VALUES.items(), ranges):
        given = {**fields, **times}
        owner = given.pop("owner", None)
        for page in pages:
            yield Case(f"{name} {[*times]} {page}", JobFilter(**given), owner, page)
    others: dict[str, dict[str, Any]] = {
        "key": {"idempotency_key": "k7"},
        "search": {"search": "broke"},
        "search of nothing": {"search": "nothing"},
        "search of a creator's": {"search": "broke", "created_by": "ada"},
        "finished after": {"finished_after": now},
        "finished before": {"finished_before": now},
        "finished": {"finished_after": now, "finished_before": now + hours / 5},
        "finished of a rare type": {"finished_after": now, "types": ("plan.type_1",)},
    }
    for (name, fields), page in product(others.items(), (first, last, after, before, None)):
        yield Case(f"{name} {page}", JobFilter(**fields), None, page)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), number in LIMITS.items():
        monkeypatch.setattr(module, name, number)


@pytest.mark.parametrize(
    ("statistics", "plan"),
    [
        pytest.param("none", "custom", marks=pytest.mark.slow),
        pytest.param("stale", "generic", marks=pytest.mark.slow),
        pytest.param("none", "generic", marks=pytest.mark.slow),
        pytest.param("stale", "custom", marks=pytest.mark.slow),
        pytest.param("new", "custom", marks=pytest.mark.slow),
        pytest.param("new", "generic", marks=pytest.mark.slow),
    ],
)
async def test_few_rows_are_read_on_postgresql(
    debian_server: Server, debian_url: str, statistics: str, plan: str
) -> None:
    name = debian_url.rsplit("/", 1)[1]
    settings = [statement.format(name=name) for statement in EXPLAIN_ALL]
    settings.append(f"ALTER DATABASE {name} SET plan_cache_mode = force_{plan}_plan")
    jobs = stored(LONG)
    run_sql_in = partial(asyncio.to_thread, run_sql, debian_url)
    await run_sql_in("ALTER TABLE job SET (autovacuum_enabled = off)")
    fill(debian_url, jobs[:SHORT])
    if statistics == "stale":
        await run_sql_in("ANALYZE")
    fill(debian_url, jobs[SHORT:])
    if statistics == "new":
        await run_sql_in("ANALYZE")
    await run_sql_in(*settings)
    wrong: list[Any] = []

    async def check(what: str, reading_it: Awaitable[Any]) -> Any:
        start = debian_server.log.stat().st_size
        result = await reading_it
        with debian_server.log.open("rb") as stream:
            stream.seek(start)
            read = list(plans(stream.read().decode("utf-8", "replace"), name))
        assert read
        for each in read:
            if each.rows > MAX_ROWS or each.blocks > MAX_BLOCKS:
                wrong.append((what, each.rows, each.blocks))
        return result

    registry = registry_of(2)
    async with queues(debian_url, 1, registry) as (queue,):
        for case in cases(jobs):
            if await check(case.name, case.read(queue)) not in (None, case.expected(jobs)):
                wrong.append(case.name)
        await check("versions", queue.versions("plan.type_0"))
        replayed = await check("replay", asyncio.to_thread(replay, debian_url, registry))
        assert replayed.total == sum(each.status == "queued" for each in jobs)
        assert await check("prune", queue.prune(JobStatus.FAILED, keep_seconds=0, jobs=50)) == 50
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    "analyzed",
    [pytest.param(each, marks=pytest.mark.slow) for each in (False, True)],
    ids=["unanalyzed", "analyzed"],
)
async def test_a_longer_queue_costs_no_more_on_sqlite(
    sqlite_template: Path, tmp_path: Path, analyzed: bool
) -> None:
    steps: list[dict[str, int]] = []
    wrong = []
    with counted_steps() as counter:
        for size in (SHORT, LONG):
            path = tmp_path / f"{size}.db"
            shutil.copy(sqlite_template, path)
            jobs = stored(size)
            fill(f"sqlite:///{path}", jobs)
            if analyzed:
                await asyncio.to_thread(run_sql, f"sqlite:///{path}", "ANALYZE")
            steps.append({})
            async with queues(f"sqlite:///{path}", 1, registry_of(2)) as (queue,):
                for case in cases(jobs):
                    start = next(counter)
                    if await case.read(queue) not in (None, case.expected(jobs)):
                        wrong.append(case.name)
                    name = case.name.replace(str(jobs[size // 2].id), "")
                    steps[-1][name] = next(counter) - start
                start = next(counter)
                await queue.versions("plan.type_0")
                steps[-1]["versions"] = next(counter) - start
    short, long = steps
    assert not wrong
    grown = {
        name: (short[name], number)
        for name, number in long.items()
        if number > MAX_GROWTH * short[name] + 300
    }
    assert not grown, "\n".join(map(str, grown.items()))


@contextmanager
def counted_steps() -> Iterator[Iterator[int]]:
    """Yield a counter of the tens of instructions that SQLite has run."""
    counter = itertools.count()

    def step() -> int:
        next(counter)
        return 0

    def watch(connection: Any, _record: Any) -> None:
        connection.run_async(lambda driver: driver.set_progress_handler(step, 10))

    event.listen(Engine, "connect", watch)
    try:
        yield counter
    finally:
        event.remove(Engine, "connect", watch)
