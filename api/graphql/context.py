"""What resolvers are given with each request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cached_property
from uuid import UUID

from strawberry.dataloader import DataLoader

from api.queue.models import AttemptRecord, JobCounts
from api.queue.service import JobService


@dataclass
class Context:
    """What resolvers are given: the queue, who calls, and what this request has loaded."""

    service: JobService
    created_by: str | None = None
    _counts: asyncio.Future[dict[str, JobCounts]] | None = field(default=None, repr=False)

    async def counts(self) -> dict[str, JobCounts]:
        """Jobs per type and status, read once a request."""
        if self._counts is None:
            self._counts = asyncio.ensure_future(self.service.counts())
        return await self._counts

    @cached_property
    def attempts(self) -> DataLoader[UUID, list[AttemptRecord]]:
        """The attempts of jobs, with one query for all jobs of a page."""

        async def load(job_ids: list[UUID]) -> list[list[AttemptRecord]]:
            attempts = await self.service.attempts(job_ids)
            return [attempts[job_id] for job_id in job_ids]

        return DataLoader(load_fn=load)
