"""How near the estimated total of each filter is, however the jobs came: steadily, in bursts, or in
both ways."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest

from job_registry_api import JobFilter, JobQueue
from job_registry_api.queue import filters as queue_filters
from job_registry_api.queue import reading, store
from job_registry_api.queue.models import JobStatus, Owner
from tests.conftest import run_sql

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = 86_400.0
FAILED, SUCCEEDED, QUEUED = JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.QUEUED


class Came(NamedTuple):
    """So many jobs that came from one second to another, counted from `START`."""

    jobs: int
    begin: float
    end: float


DISTRIBUTIONS: dict[str, tuple[Came, ...]] = {
    "steadily": (Came(6_000, 0, 30 * DAY),),
    "in a burst": (Came(1, 0, 1), Came(6_000, 30 * DAY, 30 * DAY + 2)),
    "at one moment": (Came(6_000, 30 * DAY, 30 * DAY),),
    "in two bursts": (Came(3_000, 0, 2), Came(3_000, 30 * DAY, 30 * DAY + 2)),
    "in a burst, then steadily": (Came(4_000, 0, 2), Came(2_000, 10, 30 * DAY)),
    "steadily, then in a burst": (Came(2_000, 0, 30 * DAY), Came(4_000, 31 * DAY, 31 * DAY + 2)),
    "in a burst in between": (
        Came(1_500, 0, 10 * DAY),
        Came(3_000, 10 * DAY, 10 * DAY + 1),
        Came(1_500, 11 * DAY, 30 * DAY),
    ),
}

QUICK = ("in a burst, then steadily",)

# One creator has 2 of 3 jobs, the others a few each. The newest sixth is queued, a tenth of the
# others has failed. Jobs end an hour after they came.
FILL = """
    INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
        timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at,
        finished_at, created_by, idempotency_key, error)
    SELECT {id}, CASE n % 4 WHEN 0 THEN 'test.pong' ELSE 'test.ping' END, 'f',
        CASE WHEN n > 5000 THEN 'queued' WHEN n % 10 = 1 THEN 'failed' ELSE 'succeeded' END,
        '{{}}', 50, 0, 3, 60, 1, 8, {time},
        CASE WHEN n > 5000 THEN {time} END, CASE WHEN n <= 5000 THEN {ended} END,
        CASE WHEN n % 3 = 0 THEN 'user ' || (n % 97) ELSE 'ada' END, 'k' || n,
        CASE WHEN n <= 5000 AND n % 10 = 1 THEN {error} END
    FROM (SELECT number + {before} AS n, {begin} + {step} * number AS seconds FROM {numbers}) AS c
"""
POSTGRESQL = {
    "id": "CAST(lpad(to_hex(CAST(({start} + seconds) * 1000 AS bigint)), 12, '0') || '70008000'"
    " || lpad(to_hex(n), 12, '0') AS uuid)",
    "time": "to_timestamp({start} + seconds)",
    "ended": "to_timestamp({start} + seconds + 3600)",
    "error": """CAST('{"code": "bank_closed", "message": "It broke."}' AS jsonb)""",
    "numbers": "generate_series(1, {jobs}) AS numbers (number)",
}
SQLITE = {
    "id": "printf('%012x70008000%012x', CAST(({start} + seconds) * 1000 AS integer), n)",
    "time": "strftime('%Y-%m-%d %H:%M:%f', {start} + seconds, 'unixepoch') || '000'",
    "ended": "strftime('%Y-%m-%d %H:%M:%f', {start} + seconds + 3600, 'unixepoch') || '000'",
    "error": """'{"code": "bank_closed", "message": "It broke."}'""",
    "numbers": "(WITH RECURSIVE c (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM c"
    " WHERE number < {jobs}) SELECT number FROM c)",
}

ENDED = (SUCCEEDED, FAILED)


def filters(middle: datetime) -> dict[str, tuple[JobFilter, Owner | None]]:
    """Return the filters, with a time about which half of the jobs came."""
    hour, ended = timedelta(hours=1), middle + timedelta(hours=1)
    return {
        "created by": (JobFilter(created_by="ada"), None),
        "created by, ended": (JobFilter(created_by="ada", statuses=(SUCCEEDED,)), None),
        "created by, of a type": (JobFilter(("test.pong",), created_by="ada"), None),
        "own": (JobFilter(), Owner("ada")),
        "own, queued": (JobFilter(statuses=(QUEUED,)), Owner("ada")),
        "own, ended": (JobFilter(statuses=(SUCCEEDED,)), Owner("ada")),
        "own, created before": (JobFilter(created_before=middle), Owner("ada")),
        "own, finished": (JobFilter(finished_after=ended - 2 * hour), Owner("ada")),
        "created after": (JobFilter(created_after=middle), None),
        "created before": (JobFilter(created_before=middle), None),
        "created before, failed": (JobFilter(created_before=middle, statuses=(FAILED,)), None),
        "created since the start": (JobFilter(created_after=START), None),
        "created since the start, queued": (
            JobFilter(created_after=START, statuses=(QUEUED,)),
            None,
        ),
        "created in a range": (
            JobFilter(created_after=START, created_before=middle, types=("test.ping",)),
            None,
        ),
        "finished after": (JobFilter(finished_after=ended), None),
        "finished before": (JobFilter(finished_before=ended), None),
        "finished since the start": (JobFilter(finished_after=START), None),
        "finished, of a type": (JobFilter(("test.pong",), finished_after=START), None),
        "finished, failed": (JobFilter(finished_after=START, statuses=(FAILED,)), None),
        "error code": (JobFilter(error_code="bank_closed"), None),
        "error code, of a type": (JobFilter(("test.pong",), error_code="bank_closed"), None),
        "key": (JobFilter(idempotency_key="k9"), None),
        "search": (JobFilter(search="broke"), None),
        "types": (JobFilter(("test.pong",)), None),
        "statuses": (JobFilter(statuses=ENDED), None),
    }


def fill(url: str, came: tuple[Came, ...]) -> datetime:
    """Store the jobs, and return the time about which half of them came."""
    is_sqlite = url.startswith("sqlite")
    statements, before, times = [] if is_sqlite else ["SET search_path = job_registry"], 0, []
    for jobs, begin, end in came:
        step = (end - begin) / jobs
        values = {"start": int(START.timestamp()), "jobs": jobs}
        parts = SQLITE if is_sqlite else POSTGRESQL
        named = {
            name: part if name == "error" else part.format(**values) for name, part in parts.items()
        }
        statements.append(FILL.format(**named, before=before, begin=begin, step=f"{step:.9f}"))
        before += jobs
        times += [begin + step * number for number in range(1, jobs + 1)]
    run_sql(url, *statements)
    # Not one of the times itself, because both databases round them.
    return START + timedelta(seconds=round(times[len(times) // 2], 3) + 0.0005)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in DISTRIBUTIONS
    ],
)
async def test_an_estimated_total_is_within_a_factor_of_two(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Given far more jobs than are counted or sampled, I expect neither a wild total nor one above
    the number of jobs of these types and statuses."""
    monkeypatch.setattr(queue_filters, "SEARCHED_JOBS", 150)
    middle = await asyncio.to_thread(fill, database_url, DISTRIBUTIONS[name])
    wrong = {}
    for part, (wanted, owner) in filters(middle).items():
        monkeypatch.setattr(reading, "EXACT_TOTAL", 100_000)
        exact = await queue.count(wanted, owner=owner)
        assert not exact.is_estimate
        most = (await queue.count(JobFilter(wanted.types, wanted.possible_statuses or None))).jobs
        monkeypatch.setattr(reading, "EXACT_TOTAL", 150)
        monkeypatch.setattr(store, "SAMPLED_BLOCKS", 200)
        found = await queue.count(wanted, owner=owner)
        if found.is_estimate:
            low, high = exact.jobs / 2, min(2 * exact.jobs, most)
        else:
            low = high = exact.jobs
        if not low <= found.jobs <= high:
            wrong[part] = (found, exact.jobs, most)
    assert wrong == {}
