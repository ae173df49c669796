"""How attempts end: what is left of each in the tables, and what other jobs keep."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import LeaseLost
from job_registry_api.queue.job_logs import LogLevel, LogLine, text_of_lines
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.queue import JobQueue
from tests.conftest import advance, run_sql

BROKEN = JobError("broken", "It broke.")
PING = EnqueueRequest("test.ping", {})
LIMITED = EnqueueRequest("test.limited", {})

ENDS: dict[str, Callable[[JobQueue, str], Awaitable[object]]] = {
    "succeed": lambda queue, token: queue.succeed(token, 1),
    "complete": lambda queue, token: queue.complete(token, 1),
    "fail": lambda queue, token: queue.fail(token, BROKEN),
    "fail for good": lambda queue, token: queue.fail(token, BROKEN, retryable=False),
    "release": lambda queue, token: queue.release(token),
    "snooze": lambda queue, token: queue.snooze(token, 10),
    "time out": lambda queue, token: queue.time_out(token),
    "stop": lambda queue, token: queue.stop(token, BROKEN),
    "park": lambda queue, token: queue.park(token, "f" * 64, BROKEN),
}


async def sql(url: str, *statements: str) -> list[Any]:
    return await asyncio.to_thread(run_sql, url, *statements)


def lines(message: str) -> tuple[LogLine, bytes]:
    line = LogLine(LogLevel.INFO, message, 0.5, {})
    return line, text_of_lines([line])[0]


async def test_a_success_keeps_the_stored_log_lines_or_replaces_them(queue: JobQueue) -> None:
    (old, old_text), (new, new_text) = lines("old"), lines("new")
    for sent, kept in ((None, old), (new_text, new)):
        job = (await queue.enqueue(PING)).job
        (lease,) = await queue.lease(["test.ping"], "w")
        await queue.store_logs([(lease.token, old_text)])
        await queue.succeed(lease.token, logs=sent)
        assert await queue.logs(job.id) == [kept]


async def test_log_lines_of_an_attempt_that_has_ended_are_stored_and_not_announced(
    queue: JobQueue,
) -> None:
    line, text = lines("late")
    ended = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.complete(lease.token)
    again = (await queue.enqueue(PING)).job
    (former,) = await queue.lease(["test.ping"], "w")
    await queue.release(former.token)
    assert await queue.lease(["test.ping"], "w")
    with queue.events.subscribe() as heard:
        await queue.store_logs([(lease.token, text), (former.token, text)])
        last = (await queue.enqueue(PING)).job
        assert (await anext(heard)).job_id == last.id
    assert await queue.logs(ended.id) == await queue.logs(again.id) == [line]


async def test_a_job_that_does_not_run_has_no_lease(queue: JobQueue, database_url: str) -> None:
    jobs = await queue.enqueue_many([PING] * (len(ENDS) + 2))
    leases = await queue.lease(["test.ping"], "w", limit=len(jobs))
    for lease, end in zip(leases, ENDS.values(), strict=False):
        await end(queue, lease.token)
    await queue.cancel(leases[-1].job.id)
    await queue.park(leases[-1].token, "f" * 64, BROKEN)
    left = """SELECT count(*) FROM job WHERE status <> 'running' AND (lease_expires_at IS NOT NULL
        OR deadline_at IS NOT NULL OR held_until IS NOT NULL
        OR status <> 'succeeded' AND lease_token IS NOT NULL)"""
    assert await sql(database_url, left) == [(0,)]
    # The last one is lost.
    await advance(database_url, 31)
    assert [job.id for job in await queue.recover()] == [leases[-2].job.id]
    assert await sql(database_url, left) == [(0,)]
    open_or_held = (
        "SELECT count(*) FROM job_attempt WHERE finished_at IS NULL OR held_until > '2000-01-01'"
    )
    assert await sql(database_url, open_or_held) == [(0,)]


@pytest.mark.parametrize("how", ["succeed", "complete"])
async def test_a_success_clears_the_error_of_the_attempt_before_and_leaves_that_as_it_ended(
    queue: JobQueue, how: str
) -> None:
    job = (await queue.enqueue(PING)).job
    (first,) = await queue.lease(["test.ping"], "w")
    await queue.fail(first.token, BROKEN, retry_after_seconds=0)
    (second,) = await queue.lease(["test.ping"], "w")
    await ENDS[how](queue, second.token)
    assert (await queue.get(job.id)).error is None
    attempts = (await queue.attempts([job.id]))[job.id]
    assert [(each.outcome, each.error) for each in attempts] == [
        ("failed", BROKEN), ("succeeded", None),
    ]  # fmt: skip
    # Sent again it is answered; the token of the attempt before was never the one that succeeded.
    assert (await queue.complete(second.token)).status is JobStatus.SUCCEEDED
    for token in (first.token, second.token[:32] + "0" * 32):
        with pytest.raises(LeaseLost):
            await queue.complete(token)


async def test_a_retried_job_shows_no_progress_and_no_end_of_the_attempt_before(
    queue: JobQueue,
) -> None:
    job = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.heartbeat(lease.token, {"done": 0.5})
    await queue.fail(lease.token, BROKEN, retryable=False)
    await queue.retry(job.id)
    again = await queue.get(job.id)
    assert (again.status, again.progress, again.finished_at) == (JobStatus.QUEUED, None, None)
    assert again.error == BROKEN


async def test_the_first_request_to_cancel_a_running_job_is_the_one_that_is_remembered(
    queue: JobQueue,
) -> None:
    job = (await queue.enqueue(PING)).job
    await queue.lease(["test.ping"], "w")
    first = (await queue.cancel(job.id)).cancel_requested_at
    await asyncio.sleep(0.002)
    assert (await queue.cancel(job.id)).cancel_requested_at == first


async def test_the_end_of_a_timed_out_handler_is_announced_once_and_to_those_who_wait_for_its_type(
    queue: JobQueue, database_url: str, registry: JobRegistry
) -> None:
    database = open_database(database_url)
    other = JobQueue(registry, database)
    for request in (PING, LIMITED, LIMITED):
        await queue.enqueue(request)
    leases = await queue.lease(["test.ping", "test.limited"], "w", limit=3)
    for lease in leases:
        await queue.time_out(lease.token, still_running=True)
    with (
        queue.events.waiting_for([], ["test.ping"]) as ping,
        queue.events.waiting_for([], ["test.limited"]) as limited,
        queue.events.waiting_for([], ["test.pong"]) as pong,
        queue.events.subscribe() as heard,
    ):
        woken = []
        for _ in range(2):
            await other.settle([lease.token for lease in leases])
            await other.enqueue(PING._replace(type="test.pong"))
            async with asyncio.timeout(5):
                await anext(heard)
            woken.append([each.is_set() for each in (ping, limited, pong)])
            ping.clear()
            limited.clear()
    await database.close()
    assert woken == [[True, True, False], [False, False, False]]


def attempts_of(url: str, job_id: uuid.UUID) -> str:
    stored_id = job_id.hex if url.startswith("sqlite") else str(job_id)
    return f"SELECT outcome FROM job_attempt WHERE job_id = '{stored_id}' ORDER BY id"


async def with_attempts(
    queue: JobQueue, url: str, outcomes: list[str], returns: int
) -> tuple[Lease, uuid.UUID]:
    """Two jobs with these former attempts each, of which one runs again."""
    job, other = [(await queue.enqueue(PING._replace(priority=p))).job.id for p in (90, 10)]
    ids = [each.hex if url.startswith("sqlite") else str(each) for each in (job, other)]
    rows = ", ".join(
        f"('{each}', 1, 'w', '2026-01-01', '2026-01-01', '{outcome}')"
        for outcome in outcomes
        for each in ids
    )
    columns = "job_id, attempt, worker_id, started_at, finished_at, outcome"
    await sql(
        url,
        f"INSERT INTO job_attempt ({columns}) VALUES {rows}",
        f"UPDATE job SET returns = {returns}",
    )
    (lease,) = await queue.lease(["test.ping"], "w")
    assert lease.job.id == job
    return lease, other


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        ("succeed", "succeeded"),
        ("fail for good", "failed"),
        ("release", "released"),
        ("park", "released"),
    ],
)
async def test_of_attempts_that_were_given_back_the_last_32_are_kept_and_every_other(
    queue: JobQueue, database_url: str, how: str, outcome: str
) -> None:
    former = ["failed", "failed", *["released", "snoozed", "cancelled"] * 13, "lost"]
    lease, other = await with_attempts(queue, database_url, former, returns=63)
    await ENDS[how](queue, lease.token)
    # What was given back now is one of the 32.
    kept = 31 if outcome == "released" else 32
    rows = await sql(database_url, attempts_of(database_url, lease.job.id))
    returned = former[2:-1][-kept:]
    assert [row[0] for row in rows] == ["failed", "failed", *returned, "lost", outcome]
    rows = await sql(database_url, attempts_of(database_url, other))
    assert [row[0] for row in rows] == former


@pytest.mark.parametrize(
    ("how", "outcome"),
    [("succeed", "succeeded"), ("fail for good", "failed"), ("release", "released")],
)
async def test_of_all_attempts_of_a_job_the_last_thousand_are_kept(
    queue: JobQueue, database_url: str, how: str, outcome: str
) -> None:
    former = ["failed"] * 4 + ["lost"] * 999
    lease, other = await with_attempts(queue, database_url, former, returns=1_023)
    await ENDS[how](queue, lease.token)
    rows = await sql(database_url, attempts_of(database_url, lease.job.id))
    assert [row[0] for row in rows] == ["lost"] * 999 + [outcome]
    rows = await sql(database_url, attempts_of(database_url, other))
    assert [row[0] for row in rows] == former


async def test_fewer_than_a_thousand_attempts_are_all_kept(
    queue: JobQueue, database_url: str
) -> None:
    former = ["failed"] * 40
    lease, _ = await with_attempts(queue, database_url, former, returns=63)
    await queue.succeed(lease.token)
    rows = await sql(database_url, attempts_of(database_url, lease.job.id))
    assert [row[0] for row in rows] == [*former, "succeeded"]


async def test_the_latest_attempts_are_those_that_fit(queue: JobQueue) -> None:
    await queue.enqueue_many([PING] * 3)
    leases = await queue.lease(["test.ping"], "w", limit=3)
    for lease in leases:
        await queue.complete(lease.token)
    ids = [lease.job.id for lease in leases]
    # Each counts with 200 bytes, to the last of which they fit.
    for max_bytes, fitting in ((0, 1), (399, 1), (400, 2), (599, 2), (600, 3)):
        latest, are_all = await queue.latest_attempts(ids, max_bytes)
        found = {job_id for job_id, attempts in latest.items() if attempts}
        assert (len(found), are_all) == (fitting, fitting == 3)
