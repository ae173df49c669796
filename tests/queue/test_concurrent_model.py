"""The queue under random operations of several queues and processes at once.

The sequential model (`test_model.py`) knows what each call must answer. Here the calls race, so
what is checked is what holds in whatever order they came: from what the processes noted, and from
the tables during the race and after it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_sql
from tests.forks import Command
from tests.queue.random_callers import LIMITS

RUNNING = "SELECT type, count(*) FROM job WHERE status = 'running' GROUP BY type"
DISAGREEING = """
    SELECT count(*) FROM (
        SELECT type, status, CAST(sum(jobs) AS bigint) AS jobs FROM job_count
        GROUP BY type, status HAVING sum(jobs) <> 0
    ) AS counted FULL JOIN (
        SELECT type, status, count(*) AS jobs FROM job GROUP BY type, status
    ) AS there ON counted.type = there.type AND counted.status = there.status
    WHERE counted.jobs IS DISTINCT FROM there.jobs"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [5, pytest.param(40, marks=pytest.mark.soak)])
async def test_whatever_races_every_promise_holds(
    database_url: str, tmp_path: Path, seconds: int, record_property: Any
) -> None:
    seed, log = random.randrange(1_000_000), tmp_path / "calls.log"
    record_property("seed", seed)
    callers = [
        Command(
            [
                database_url, str(log),
                "--seed", str(seed + n), "--seconds", str(seconds), "--callers", "3",
            ],
            module="tests.queue.random_callers", environment=os.environ,
        )
        for n in range(3)
    ]  # fmt: skip
    try:
        ending = [asyncio.create_task(asyncio.to_thread(caller.communicate)) for caller in callers]
        async with asyncio.timeout(seconds + 45):
            while not all(task.done() for task in ending):
                running = dict(await asyncio.to_thread(run_sql, database_url, RUNNING))
                for name, limit in LIMITS.items():
                    assert limit is None or running.get(name, 0) <= limit, (seed, running)
                await asyncio.sleep(0.1)
            errors = [(await task)[1] for task in ending]
    finally:
        for caller in callers:
            caller.kill()
    assert errors == [""] * 3, (seed, errors)
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert len(lines) > 20 * seconds
    check_log(lines)
    await asyncio.to_thread(check_tables, database_url, lines)


def check_log(lines: list[dict[str, Any]]) -> None:
    """By what the processes noted: never over a limit, never two leases of a job in force."""
    ends = {line["token"]: line for line in lines if line["what"] == "ended"}
    leases = [line for line in lines if line["what"] == "leased"]
    assert len({lease["token"] for lease in leases}) == len(leases)
    # A lease was surely in force from when it was answered until its end was asked for.
    held = [(lease, lease["answered"], ends[lease["token"]]["asked"]) for lease in leases]
    of_type: dict[str, list[tuple[float, int]]] = defaultdict(list)
    of_job: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for lease, start, end in held:
        for changes in (of_type[lease["type"]], of_job[lease["job"]]):
            changes += [(start, 1), (end, -1)]
    for name, limit in LIMITS.items():
        assert limit is None or _most(of_type[name]) <= limit, name
    for job, changes in of_job.items():
        assert _most(changes) == 1, job
    # The same key gave the same job, and all but one of its callers were told so.
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    fresh: Counter[tuple[str, str]] = Counter()
    for line in lines:
        if line["what"] == "enqueued" and line["key"] is not None:
            key = line["type"], line["key"]
            keys[key].add(line["job"])
            fresh[key] += not line["deduplicated"]
    assert all(len(jobs) == 1 for jobs in keys.values())
    assert set(fresh.values()) <= {1}


def check_tables(url: str, lines: list[dict[str, Any]]) -> None:
    """By the tables: nothing answered is lost, each attempt ended once, as it was reported."""
    rows = run_sql(url, "SELECT id, type, status, attempt, max_attempts FROM job")
    jobs = {_id(row[0]): tuple(row[1:]) for row in rows}
    assert {line["job"] for line in lines if line["what"] == "enqueued"} == set(jobs)
    assert all(0 <= attempt <= most for _, _, attempt, most in jobs.values())
    attempts: dict[str, list[tuple[int, str | None]]] = defaultdict(list)
    for job, attempt, outcome in run_sql(
        url, "SELECT job_id, attempt, outcome FROM job_attempt ORDER BY id"
    ):
        attempts[_id(job)].append((attempt, outcome))
    leased = Counter(line["job"] for line in lines if line["what"] == "leased")
    assert leased == Counter({job: len(of_job) for job, of_job in attempts.items()})
    reported: dict[str, Counter[str]] = defaultdict(Counter)
    outcome_of = {
        "complete": "succeeded", "fail": "failed", "give up": "failed",
        "release": "released", "snooze": "snoozed",
    }  # fmt: skip
    for line in lines:
        if line["what"] == "ended":
            cancelled = line["status"] == "cancelled"
            reported[line["job"]]["cancelled" if cancelled else outcome_of[line["how"]]] += 1
    for job, (_, status, _, _) in jobs.items():
        outcomes = [outcome for _, outcome in attempts[job]]
        assert Counter(outcomes) == reported[job], job
        assert status != "running"
        assert outcomes.count("succeeded") == (status == "succeeded"), job
        assert status != "succeeded" or outcomes[-1] == "succeeded"
    if not url.startswith("sqlite"):
        assert run_sql(url, DISAGREEING) == [(0,)]


def _most(changes: list[tuple[float, int]]) -> int:
    now = most = 0
    for _, step in sorted(changes):
        now += step
        most = max(most, now)
    return most


def _id(value: object) -> str:
    text = str(value).replace("-", "")
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
