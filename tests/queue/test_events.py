"""Subscribers: what they hear, and that a slow one is dropped."""

from __future__ import annotations

import asyncio

import pytest

from api.queue.errors import EventsMissed
from api.queue.events import MAX_UNREAD_EVENTS
from api.queue.requests import EnqueueRequest
from api.queue.service import JobService


async def test_a_slow_subscriber_is_dropped_with_an_error_and_holds_nobody_up(
    service: JobService,
) -> None:
    ping = EnqueueRequest("test.ping", {})
    with service.events.subscribe() as slow, service.events.subscribe() as other:
        await service.enqueue_many([ping] * 900)
        for _ in range(900):
            await anext(other)
        await service.enqueue_many([ping] * 900)
        for _ in range(MAX_UNREAD_EVENTS):
            await anext(slow)
        with pytest.raises(EventsMissed, match="behind"):
            await anext(slow)
        # The other one read in time, and misses nothing.
        for _ in range(900):
            await anext(other)


async def test_only_what_was_asked_for_is_heard(service: JobService) -> None:
    first = (await service.enqueue(EnqueueRequest("test.ping", {}))).job
    with service.events.subscribe(job_id=first.id) as heard:
        await service.enqueue(EnqueueRequest("test.ping", {}))
        await service.cancel(first.id)
        event = await anext(heard)
        assert (event.name, event.job_id) == ("job.cancelled", first.id)


async def test_nothing_is_heard_of_what_was_not_committed(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_arguments: object) -> None:
        raise RuntimeError("before the commit")

    with service.events.subscribe() as heard:
        with monkeypatch.context() as patched:
            patched.setattr(service.events, "announce", broken)
            with pytest.raises(RuntimeError):
                # With a key, because what is told then depends on what the database finds.
                await service.enqueue(EnqueueRequest("test.ping", {}, idempotency_key="lost"))
        kept = await service.enqueue(EnqueueRequest("test.ping", {}))
        async with asyncio.timeout(2):
            assert (await anext(heard)).job_id == kept.job.id


async def test_the_end_of_the_server_ends_subscriptions_and_waits(service: JobService) -> None:
    with service.events.subscribe() as heard:
        waiting = asyncio.create_task(service.lease(["test.ping"], "w", wait_seconds=20))
        await asyncio.sleep(0.1)
        service.end_waits()
        async with asyncio.timeout(2):
            assert await waiting == []
            with pytest.raises(EventsMissed, match="shuts down"):
                await anext(heard)
