"""Checks whether the queue can store a job, with a write that is rolled back."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from job_registry_api.queue.database import Database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.models import (
    Job,
    JobAttempt,
    JobCount,
    JobEventBatch,
    JobStatus,
    JobTypeState,
)

READY_SECONDS: Final = 2.0
"""How long the write may take. Probes time out after a few seconds."""

_TABLES: Final = tuple(
    str(model.__tablename__) for model in (Job, JobAttempt, JobCount, JobEventBatch, JobTypeState)
)


class Readiness:
    """Checks whether a write would succeed. Concurrent callers share one check."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = asyncio.Lock()
        self._tried_at: float | None = None
        self._refusal: QueueUnavailable | None = None

    async def check(self) -> None:
        """Check that a job can be stored.

        Raises:
            QueueUnavailable: it cannot be stored; the reason is for the log.
        """
        clock = asyncio.get_running_loop().time
        called_at = clock()
        async with self._turn:
            # A check that began after this call serves this call too.
            if self._tried_at is None or self._tried_at < called_at:
                self._refusal = None
                tried_at = clock()
                try:
                    await self._database.check_writes(
                        _store_a_job, tables=_TABLES, timeout_seconds=READY_SECONDS
                    )
                except QueueUnavailable as refusal:
                    self._refusal = refusal
                self._tried_at = tried_at
            if self._refusal is not None:
                raise QueueUnavailable(self._refusal.reason, self._refusal.kind)


async def _store_a_job(connection: AsyncConnection) -> None:
    """Insert a job with an attempt, as the queue does.

    The job is finished. The dead index entry of a queued one would slow claims down until the next
    vacuum.
    """
    job_id, now = uuid.uuid4(), datetime.now(UTC)
    await connection.execute(
        insert(Job).values(
            id=job_id,
            type="readiness",
            fingerprint="",
            status=JobStatus.CANCELLED.value,
            payload={},
            priority=0,
            attempt=0,
            max_attempts=1,
            timeout_seconds=1,
            backoff_base_seconds=1.0,
            backoff_cap_seconds=1.0,
            created_at=now,
            finished_at=now,
        )
    )
    await connection.execute(
        insert(JobAttempt).values(job_id=job_id, attempt=1, worker_id="readiness", started_at=now)
    )
