"""Upkeep: rescue lost leases, prune, fold the counts.

Every process does a little of it, and passes over what another is doing. There is no leader.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import structlog

from job_registry_api.metrics import Metrics
from job_registry_api.queue.claiming import count_recovered, ended_event
from job_registry_api.queue.database import Database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.events import Events
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.readiness import Readiness
from job_registry_api.queue.store import EVENT_BATCHES_PRUNED, Store

DAY_SECONDS = 86_400
PRUNE_PAUSE_SECONDS = 0.02
PRUNE_BATCH = 200
"""Jobs a transaction deletes: a few milliseconds, which is what a lease waits on SQLite."""

log = structlog.get_logger("jobs.upkeep")


class Upkeep:
    """The part of `JobQueue` that keeps the queue working and its tables small."""

    events: Events
    lease_seconds: float
    metrics: Metrics
    _database: Database
    _store: Store
    _readiness: Readiness

    async def ping(self) -> None:
        """Return when a job could be stored; raise `QueueUnavailable` otherwise."""
        await self._readiness.check()

    async def recover(self) -> list[JobRecord]:
        """End the attempts whose lease has run out, and return their jobs. Claims do it too."""
        recovered = await self._store.recover(self.lease_seconds)
        self.events.publish([ended_event(job) for job in recovered])
        count_recovered(self.metrics, recovered)
        return recovered

    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        """Delete up to `jobs` jobs that ended with `status` longer ago than `keep_seconds`."""
        return await self._store.prune(status, keep_seconds=keep_seconds, jobs=jobs)

    async def tidy(self) -> int:
        """Keep the table of counts and SQLite's log small; delete events that everyone has read.

        Return how many batches of events were deleted, at most 10,000.
        """
        await self._store.fold_counts()
        await self._database.checkpoint()
        return await self._store.prune_events()


async def maintain(
    queue: Upkeep,
    stop: asyncio.Event,
    *,
    keep_succeeded_days: float,
    keep_failed_days: float,
    every_seconds: float = 10.0,
) -> None:
    """Looks after the queue until `stop` is set. While the database is away it waits.

    Succeeded jobs are deleted `keep_succeeded_days` after they ended, failed and cancelled ones
    after `keep_failed_days`; queued and running ones never.
    """
    keep_days = {
        JobStatus.SUCCEEDED: keep_succeeded_days,
        JobStatus.FAILED: keep_failed_days,
        JobStatus.CANCELLED: keep_failed_days,
    }
    while not stop.is_set():
        # Spread, so that processes started together do not all come at once.
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), every_seconds * random.uniform(0.5, 1.5))
            break
        try:
            await queue.recover()
            await tidy(queue, stop)
            for status, days in keep_days.items():
                await prune(queue, status, keep_days=days, stop=stop)
        except QueueUnavailable as error:
            log.warning("upkeep.postponed", reason=error.reason)
        except Exception:
            log.exception("upkeep.failed")


async def tidy(queue: Upkeep, stop: asyncio.Event) -> None:
    """Fold the counts, delete old events until none are left, and let SQLite's log shrink."""
    while not stop.is_set():
        if await queue.tidy() < EVENT_BATCHES_PRUNED:
            return
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)


async def prune(
    queue: Upkeep,
    status: JobStatus,
    *,
    keep_days: float,
    stop: asyncio.Event | None = None,
) -> int:
    """Delete every job that ended with `status` more than `keep_days` ago; return how many.

    `stop`, once set, ends it after the transaction that is under way.

    In small transactions with a pause between them, so that leases and enqueues go on.
    """
    pruned = 0
    while True:
        count = await queue.prune(status, keep_seconds=keep_days * DAY_SECONDS, jobs=PRUNE_BATCH)
        pruned += count
        if count:
            log.info("jobs.pruned", status=str(status), jobs=count)
        if count < PRUNE_BATCH or (stop is not None and stop.is_set()):
            return pruned
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)
