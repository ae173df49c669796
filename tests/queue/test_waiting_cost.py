"""The jobs ahead of a page of waiting jobs are not counted again for each of its jobs."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

import pytest

from job_registry import EnqueueRequest
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import BehindInQueue, WaitingReason
from job_registry_api.queue.store import AHEAD_LIMIT, Waiting

PING = EnqueueRequest("test.ping", {})


async def test_jobs_behind_one_with_too_many_ahead_to_count_are_not_counted_again(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.lease(["test.ping"], "w")
    await queue.enqueue_many([PING] * 1_000)
    await queue.enqueue_many([PING._replace(priority=90), *[PING] * 199])
    newest = (await queue.list(first=150)).jobs
    oldest = (await queue.list(last=150)).jobs

    alone: dict[uuid.UUID, WaitingReason | None] = {}
    for job in (*newest[::50], *oldest[::50]):
        alone[job.id] = await queue.waiting_reason(job)

    asked: list[uuid.UUID] = []
    waiting = queue._store.waiting

    async def counted(job_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Waiting]:
        ids = list(job_ids)
        asked.extend(ids)
        return await waiting(ids)

    monkeypatch.setattr(queue._store, "waiting", counted)
    reasons = await queue.waiting_reasons(newest)
    assert len(asked) == 1
    assert set(reasons.values()) == {reasons[newest[0].id]}
    reasons |= await queue.waiting_reasons(oldest)
    assert len(asked) == 1 + 150
    assert alone.items() <= reasons.items()
    first = reasons[newest[0].id]
    assert isinstance(first, BehindInQueue)
    assert first.ahead >= AHEAD_LIMIT


async def test_jobs_that_are_scheduled_behind_others_say_until_when(queue: JobQueue) -> None:
    await queue.enqueue_many([PING] * 1_000)
    now = (await queue.list(first=1)).jobs[0].created_at
    later = [now.replace(year=now.year + 1), now.replace(year=now.year + 2)]
    for at in later:
        await queue.enqueue_many([PING._replace(schedule_at=at)] * 60)
    page = (await queue.list(first=180)).jobs
    reasons = await queue.waiting_reasons(page)
    for job in page[::20]:
        assert reasons[job.id] == await queue.waiting_reason(job)
