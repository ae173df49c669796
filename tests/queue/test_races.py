"""Claims that race: limits hold, nobody starves, nobody spins, and a frozen process stops nobody.

Each race goes through `JobQueue`, with several databases' pools or several processes, while jobs
arrive; it is judged by what the handlers logged and by the tables.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from tests import CODE
from tests.conftest import async_url, run_sql
from tests.forks import Command
from tests.queue.race_jobs import ONLY, REGISTRY, Nap, most_at_once, queues, read_log

ROOT = Path(__file__).parent.parent.parent

FIRST_DUE = """
    SELECT id FROM job WHERE type = '{type}' AND status = 'queued'
    ORDER BY priority DESC, next_run_at, id LIMIT {jobs} FOR UPDATE"""


@contextmanager
def processes(*commands: list[str], log: Path, **environment: str) -> Iterator[list[int]]:
    """Runs Python processes, and ends them; gives their process ids."""
    log.touch()
    given = {
        **os.environ,
        "RACE_LOG": str(log),
        "JOBS_LOG_LEVEL": "error",
        "PYTHONPATH": CODE,
    } | environment
    errors = log.with_suffix(".errors")
    with errors.open("ab") as stream, Path(os.devnull).open("r+b") as null:
        running = [
            Command(
                arguments,
                module=module,
                environment=given,
                folder=log.parent,
                streams=(null, null, stream),
            )
            for module, *arguments in commands
        ]
    try:
        yield [process.pid for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
    assert not errors.read_text("utf-8"), errors.read_text("utf-8")[-4_000:]


@asynccontextmanager
async def locked(url: str, statement: str) -> AsyncIterator[None]:
    """Another application's transaction, open and idle, that holds the rows of `statement`."""
    async with outsider(url) as connection:
        await connection.exec_driver_sql(statement)
        yield
        await connection.rollback()


@asynccontextmanager
async def outsider(url: str, isolation: str = "READ COMMITTED") -> AsyncIterator[AsyncConnection]:
    """Another application's connection, with none of the queue's deadlines."""
    engine = create_async_engine(async_url(url), isolation_level=isolation)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


async def fill(queue: JobQueue, job_type: str, jobs: int, **options: Any) -> None:
    request = EnqueueRequest(job_type, {}, **options)
    for _ in range(0, jobs, 1_000):
        await queue.enqueue_many([request] * min(jobs, 1_000))


async def complete_all(queue: JobQueue, leases: list[Lease]) -> None:
    await asyncio.gather(*(queue.complete(lease.token) for lease in leases))


async def test_a_job_that_takes_the_place_of_another_is_recorded_as_later(
    fresh_postgresql_url: str,
) -> None:
    # Given a claim that takes long to count the running jobs of a type
    slow_count = """CREATE OR REPLACE FUNCTION job_running(name text, at timestamptz)
        RETURNS integer LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_sleep(0.3);
            RETURN (SELECT count(*) FROM job WHERE status = 'running' AND type = name);
        END $$"""
    await asyncio.to_thread(run_sql, fresh_postgresql_url, slow_count)
    async with queues(fresh_postgresql_url, 2) as (first, second):
        await fill(first, ONLY[0].name, 2)
        (ended,) = await first.lease([ONLY[0].name], "w")
        # When the running one ends before the count, and after the claim has begun
        claim = asyncio.create_task(second.lease([ONLY[0].name], "w"))
        await asyncio.sleep(0.1)
        await first.succeed(ended.token)
        (next_one,) = await claim
        # I expect what is recorded to be within the limit too
        attempts = await first.attempts([ended.job.id, next_one.job.id])
        finished_at = attempts[ended.job.id][0].finished_at
        assert finished_at is not None
        assert finished_at < attempts[next_one.job.id][0].started_at


@pytest.mark.parametrize("seconds", [2, pytest.param(5, marks=pytest.mark.slow)])
async def test_types_of_limit_one_never_run_twice_at_once_while_jobs_arrive(
    database_url: str, tmp_path: Path, seconds: float
) -> None:
    names = [job_type.name for job_type in ONLY]
    handed = 0

    async def arrive(queue: JobQueue, until: float) -> None:
        """A type that was empty a moment ago fills while the workers are claiming."""
        nonlocal handed
        while time.monotonic() < until:
            await queue.enqueue(EnqueueRequest(random.choice(names), {"milliseconds": 20}))
            handed += 1
            await asyncio.sleep(random.uniform(0, 0.1))

    with processes(
        *[["job_registry_api.cli", "worker"]] * 4,
        log=tmp_path / "race.log",
        JOBS_DATABASE_URL=database_url,
        JOBS_CATALOG="tests.queue.race_jobs",
    ):
        async with queues(database_url, 5) as crowd:
            await crowd[0].enqueue(EnqueueRequest("race.free", {}))
            handed += 1
            async with asyncio.timeout(60):
                while (await crowd[0].counts())["race.free"].succeeded == 0:
                    await asyncio.sleep(0.05)
            until = time.monotonic() + seconds
            await asyncio.gather(*(arrive(queue, until) for queue in crowd))
            async with asyncio.timeout(30):
                while sum(c.succeeded for c in (await crowd[0].counts()).values()) < handed:
                    await asyncio.sleep(0.05)
    lines = read_log(tmp_path / "race.log")
    assert len([line for line in lines if line.what == "start"]) == handed
    assert {most for name, most in most_at_once(lines).items() if name in names} == {1}
    # Nor do the tables know of two attempts of one job.
    rows = await asyncio.to_thread(run_sql, database_url, "SELECT DISTINCT attempt FROM job")
    assert rows == [(1,)]


async def test_of_many_simultaneous_claims_each_gets_a_job(database_url: str) -> None:
    async with queues(database_url, 4) as crowd:
        await fill(crowd[0], "race.free", 500)
        claims = await asyncio.gather(
            *(queue.lease(["race.free"], f"w{place}") for place, queue in enumerate(crowd * 10))
        )
    jobs = [lease.job.id for claim in claims for lease in claim]
    assert len(jobs) == len(claims) == 40
    assert len(set(jobs)) == 40


@pytest.mark.parametrize(
    "job_type", ["race.roomy", pytest.param("race.free", marks=pytest.mark.slow)]
)
async def test_claims_of_one_job_each_are_hardly_ever_empty(
    fresh_postgresql_url: str, job_type: str
) -> None:
    empty = worked = 0

    async def work(queue: JobQueue, name: str) -> None:
        nonlocal empty, worked
        while worked < 300:
            leases = await queue.lease([job_type], name)
            worked += len(leases)
            empty += not leases
            await complete_all(queue, leases)

    async with queues(fresh_postgresql_url, 4) as crowd:
        # More than are taken: no claim is empty because the queue is.
        await fill(crowd[0], job_type, 400)
        async with asyncio.timeout(60):
            await asyncio.gather(
                *(work(queue, f"w{place}") for place, queue in enumerate(crowd * 2))
            )
    assert empty <= 3, f"{empty} empty claims beside {worked}"


@pytest.mark.parametrize("job_type", ["race.free", "race.roomy"])
async def test_jobs_that_others_hold_locked_do_not_starve_the_rest(
    fresh_postgresql_url: str, job_type: str
) -> None:
    async with queues(fresh_postgresql_url, 2) as (queue, other):
        await fill(queue, job_type, 300)
        async with locked(fresh_postgresql_url, FIRST_DUE.format(type=job_type, jobs=100)):
            leased: list[Lease] = []
            async with asyncio.timeout(10):
                for each in itertools.islice(itertools.cycle((queue, other)), 20):
                    leased += await each.lease([job_type], "w", limit=10)
            assert len({lease.job.id for lease in leased}) == 200
        # What was locked is there once it is free.
        rest = await queue.lease([job_type], "w", limit=100)
        assert len(rest) == 100


async def test_a_locked_due_job_does_not_make_an_idle_worker_spin(
    fresh_postgresql_url: str,
) -> None:
    database = open_database(fresh_postgresql_url)
    queue = JobQueue(REGISTRY, database)
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    async with queue.events.listening():
        await queue.lease(["race.free"], "w")
        await fill(queue, "race.free", 1)
        async with locked(fresh_postgresql_url, FIRST_DUE.format(type="race.free", jobs=1)):
            event.listen(database.engine.sync_engine, "before_cursor_execute", count)
            assert await queue.lease(["race.free"], "w", wait_seconds=3) == []
            spent = statements
        (lease,) = await queue.lease(["race.free"], "w", wait_seconds=10)
        assert lease.job.attempt == 1
    await database.close()
    # One look at the start, one at the end, and one or two a second between.
    assert spent <= 30, f"{spent} statements in 3 s"


@pytest.mark.parametrize("freezes", [20, pytest.param(100, marks=pytest.mark.soak)])
async def test_a_process_frozen_in_mid_claim_stops_nobody_elses_claims(
    fresh_postgresql_url: str, tmp_path: Path, freezes: int
) -> None:
    types = ["race.free", *(job_type.name for job_type in ONLY)]
    command = ["tests.queue.race_jobs", fresh_postgresql_url, "--seconds", "600", "--limit", "20"]
    async with queues(fresh_postgresql_url, 1) as (queue,):

        async def arrive() -> None:
            while True:
                await queue.enqueue_many([EnqueueRequest(name, {}) for name in types])
                await asyncio.sleep(0.002)

        arriving = asyncio.create_task(arrive())
        with processes(command, log=tmp_path / "race.log") as (claimer,):
            async with asyncio.timeout(60):
                while not (tmp_path / "race.log").stat().st_size:
                    await asyncio.sleep(0.02)
            for _ in range(freezes):
                await asyncio.sleep(random.uniform(0.01, 0.06))
                os.kill(claimer, signal.SIGSTOP)
                try:
                    # Whatever the frozen process has leased keeps its place; the claim goes on.
                    for name in types:
                        async with asyncio.timeout(3):
                            await complete_all(queue, await queue.lease([name], "w"))
                    async with asyncio.timeout(3):
                        free = await queue.lease(types, "w", limit=5)
                    await complete_all(queue, free)
                finally:
                    os.kill(claimer, signal.SIGCONT)
        arriving.cancel()


@pytest.mark.parametrize("seconds", [2, pytest.param(6, marks=pytest.mark.slow)])
async def test_keyed_bulks_that_overlap_never_fail_while_holders_of_keys_are_pruned(
    database_url: str, seconds: float
) -> None:
    stop = asyncio.Event()
    failures: list[BaseException] = []

    async def bulks(queue: JobQueue, seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            keys = chance.sample(range(60), 40)
            requests = [EnqueueRequest("race.free", {}, idempotency_key=f"k{k}") for k in keys]
            for result in await queue.enqueue_many(requests):
                assert not isinstance(result, Exception), result

    async def finish(queue: JobQueue) -> None:
        while not stop.is_set():
            leases = await queue.lease(["race.free"], "w", limit=20)
            await complete_all(queue, leases)

    async def retain(queue: JobQueue) -> None:
        while not stop.is_set():
            await queue.prune(JobStatus.SUCCEEDED, keep_seconds=0, jobs=50)

    async with queues(database_url, 5) as crowd:
        work = [
            bulks(crowd[0], 1), bulks(crowd[1], 2), finish(crowd[2]), retain(crowd[3]),
            retain(crowd[4]),
        ]  # fmt: skip
        tasks = [asyncio.create_task(each) for each in work]
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        stop.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                failures.append(result)
    assert not failures, failures[0]


async def test_a_flood_of_one_type_does_not_hold_up_others_of_its_priority(
    database_url: str,
) -> None:
    types = ["race.free", "race.other", "race.roomy"]
    async with queues(database_url, 1) as (queue,):
        await fill(queue, "race.free", 1_000)
        await fill(queue, "race.other", 5)
        await fill(queue, "race.roomy", 5)
        first = await queue.lease(types, "w", limit=30)
        # The turns of three types: ten each, and what two of them have not is the third's.
        assert Counter(lease.job.type for lease in first) == {
            "race.free": 20, "race.other": 5, "race.roomy": 5,
        }  # fmt: skip
        await fill(queue, "race.other", 5)
        singly = [lease for _ in range(20) for lease in await queue.lease(types, "w")]
        assert Counter(lease.job.type for lease in singly)["race.other"] >= 1


async def test_within_a_type_the_oldest_goes_first_and_a_higher_priority_before_all(
    database_url: str,
) -> None:
    types = ["race.free", "race.other"]
    async with queues(database_url, 1) as (queue,):
        await fill(queue, "race.free", 50)
        await fill(queue, "race.other", 50)
        stored = run_in_order(await asyncio.to_thread(run_sql, database_url, ORDER))
        await fill(queue, "race.other", 3, priority=51)
        urgent = await queue.lease(types, "w", limit=3)
        assert {(lease.job.type, lease.job.priority) for lease in urgent} == {("race.other", 51)}
        leased: dict[str, list[str]] = {name: [] for name in types}
        for _ in range(10):
            claim = await queue.lease(types, "w", limit=8)
            claim.sort(key=lambda lease: (lease.job.created_at, lease.job.id))
            for lease in claim:
                leased[lease.job.type].append(lease.job.id.hex)
    for name in types:
        assert leased[name] == stored[name][: len(leased[name])]
        assert leased[name]


ORDER = "SELECT type, id FROM job ORDER BY next_run_at, id"


def run_in_order(rows: list[Any]) -> dict[str, list[str]]:
    ordered: dict[str, list[str]] = {}
    for job_type, job_id in rows:
        ordered.setdefault(job_type, []).append(str(job_id).replace("-", ""))
    return ordered


@pytest.mark.soak
async def test_a_snapshot_held_open_bounds_what_a_claim_costs(
    fresh_postgresql_url: str, record_property: Any
) -> None:
    jobs = 50_000
    async with queues(fresh_postgresql_url, 1) as (queue,):
        await fill(queue, "race.free", 1_000)
    before = await cost_of_a_claim(fresh_postgresql_url)
    # The dead versions of every job that passes stay, as long as somebody may still read them.
    async with outsider(fresh_postgresql_url, "REPEATABLE READ") as connection:
        await connection.exec_driver_sql("SELECT count(*) FROM job")
        async with queues(fresh_postgresql_url, 1) as (queue,):
            for _ in range(jobs // 1_000):
                await fill(queue, "race.free", 1_000)
                for _ in range(10):
                    leases = await queue.lease(["race.free"], "w", limit=100)
                    await complete_all(queue, leases)
        after = await cost_of_a_claim(fresh_postgresql_url)
        await connection.rollback()
    record_property("claim_ms", [before, after])
    # 124 ms where every claim passes over the dead entries of each.
    assert after <= 10 * before + 50, f"{before:.1f} ms before, {after:.1f} ms after {jobs} jobs"


async def cost_of_a_claim(url: str) -> float:
    """How many milliseconds a claim of one job takes in a process that has claimed for a while."""
    times = []
    async with queues(url, 1) as (queue,):
        for _ in range(60):
            started = time.perf_counter()
            assert len(await queue.lease(["race.free"], "w")) == 1
            times.append((time.perf_counter() - started) * 1_000)
    return statistics.median(times[20:])


async def test_a_hundred_types_are_claimed_in_turn(database_url: str) -> None:
    names = [f"race.many_{n}" for n in range(100)]
    registry = JobRegistry(
        [
            JobType(
                name=name,
                payload=Nap,
                policy=JobPolicy(concurrency_limit=1 if place % 2 else None),
            )
            for place, name in enumerate(names)
        ]
    )
    async with queues(database_url, 2, registry) as (queue, other):
        for name in names:
            await fill(queue, name, 3)
        one, two = await asyncio.gather(
            queue.lease(names, "w1", limit=100), other.lease(names, "w2", limit=100)
        )
    taken = Counter(lease.job.type for lease in [*one, *two])
    assert all(taken[name] <= 1 for name in names[1::2])
    assert len(taken) == 100
