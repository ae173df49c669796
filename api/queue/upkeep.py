"""Upkeep: recover lost leases, prune jobs and events, merge the counts.

Every process does part of the work and skips rows that another process has locked. There is no
leader.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from job_registry_api import defaults
from job_registry_api.metrics import Metrics
from job_registry_api.queue.claiming import note_recovered
from job_registry_api.queue.database import Database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.events import Events, JobEvent
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.readiness import Readiness
from job_registry_api.queue.store import COUNTS_FOLDED, EVENT_BATCHES_PRUNED, Store

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

DAY_SECONDS = 86_400
VERSION_DAYS = 30
"""How long it is remembered that a worker had a version of a type."""

PRUNE_PAUSE_SECONDS = 0.02
PRUNE_BATCH = 200
"""Jobs per transaction. It takes a few milliseconds, for which leases wait on SQLite."""

log = structlog.get_logger("job_registry.upkeep")


class Upkeep:
    """The part of `JobQueue` that keeps the queue working and its tables small."""

    events: Events
    lease_seconds: float
    metrics: Metrics
    tracing: Tracing | None
    _database: Database
    _store: Store
    _readiness: Readiness

    async def ping(self) -> None:
        """Check that a job can be stored. Raise `QueueUnavailable` otherwise."""
        await self._readiness.check()

    async def recover(self) -> list[JobRecord]:
        """End the attempts whose lease has expired, and return their jobs. Claims do this too."""
        recovered = await self._store.recover(self.lease_seconds)
        self.events.publish([JobEvent.of_change(each.job) for each in recovered])
        note_recovered(self.metrics, self.tracing, recovered)
        return [each.job for each in recovered]

    async def fail_parked(self, *, parked_days: float, jobs: int) -> int:
        """Fail up to `jobs` jobs that have been parked for longer, as `payload_invalid`."""
        failed = await self._store.fail_parked(
            older_than_seconds=parked_days * DAY_SECONDS, jobs=jobs
        )
        self.events.publish([JobEvent.of_change(job) for job in failed])
        return len(failed)

    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        """Delete up to `jobs` jobs that ended with `status` longer ago than `keep_seconds`."""
        return await self._store.prune(status, keep_seconds=keep_seconds, jobs=jobs)

    async def tidy(self) -> bool:
        """Merge counts, truncate the log of SQLite, delete old events and versions of types.

        Return whether there may be more counts to merge or more events to delete.
        """
        folded = await self._store.fold_counts()
        await self._store.prune_versions(keep_seconds=VERSION_DAYS * DAY_SECONDS)
        await self._database.checkpoint()
        deleted = await self._store.prune_events()
        return folded >= COUNTS_FOLDED or deleted >= EVENT_BATCHES_PRUNED


async def maintain(
    queue: Upkeep,
    stop: asyncio.Event,
    *,
    keep_succeeded_days: float,
    keep_failed_days: float,
    parked_days: float = defaults.PARKED_DAYS,
    every_seconds: float = 10.0,
) -> None:
    """Run the upkeep of the queue until `stop` is set. While the database is unavailable, wait.

    Succeeded jobs are deleted `keep_succeeded_days` after they ended, failed and cancelled jobs
    after `keep_failed_days`. Queued and running jobs are never deleted. Jobs that have been parked
    for `parked_days` fail.
    """
    keep_days = {
        JobStatus.SUCCEEDED: keep_succeeded_days,
        JobStatus.FAILED: keep_failed_days,
        JobStatus.CANCELLED: keep_failed_days,
    }
    while not stop.is_set():
        # Jitter, so that processes that start together do not run at the same time.
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), every_seconds * random.uniform(0.5, 1.5))
            break
        try:
            await queue.recover()
            await tidy_in_batches(queue, stop)
            await fail_parked_in_batches(queue, stop, parked_days=parked_days)
            for status, days in keep_days.items():
                await prune_in_batches(queue, status, keep_days=days, stop=stop)
        except QueueUnavailable as error:
            log.warning("upkeep.postponed", reason=error.reason)
        except Exception:
            log.exception("upkeep.failed")


async def tidy_in_batches(queue: Upkeep, stop: asyncio.Event) -> None:
    """Merge all counts, truncate the log of SQLite, and delete all old events."""
    while not stop.is_set():
        if not await queue.tidy():
            return
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)


async def fail_parked_in_batches(queue: Upkeep, stop: asyncio.Event, *, parked_days: float) -> None:
    """Fail all jobs that have been parked for longer, in small transactions with pauses."""
    while not stop.is_set():
        failed = await queue.fail_parked(parked_days=parked_days, jobs=PRUNE_BATCH)
        if failed:
            log.warning("jobs.parked_too_long", jobs=failed, parked_days=parked_days)
        if failed < PRUNE_BATCH:
            return
        await asyncio.sleep(PRUNE_PAUSE_SECONDS)


async def prune_in_batches(
    queue: Upkeep,
    status: JobStatus,
    *,
    keep_days: float,
    stop: asyncio.Event | None = None,
) -> int:
    """Delete all jobs that ended with `status` more than `keep_days` ago. Return how many.

    It runs in small transactions with pauses, so that it does not block leases and enqueues.
    When `stop` is set, it ends after the current transaction.
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
