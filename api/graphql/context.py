"""What resolvers are given with each request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from uuid import UUID

from strawberry.dataloader import DataLoader

from api.auth import Caller
from api.queue.errors import JobNotFound
from api.queue.models import AttemptRecord, JobCounts, JobRecord
from api.queue.service import JobService


@dataclass
class Context:
    """What resolvers are given: the queue, who calls, and what this request has loaded."""

    service: JobService
    caller: Caller
    _counts: asyncio.Future[dict[str, JobCounts]] | None = field(default=None, repr=False)
    _attempts: DataLoader[UUID, list[AttemptRecord]] | None = field(default=None, repr=False)

    async def counts(self) -> dict[str, JobCounts]:
        """Jobs per type and status, read once a request."""
        if self._counts is None:
            self._counts = asyncio.ensure_future(self.service.counts())
        return await self._counts

    @property
    def attempts(self) -> DataLoader[UUID, list[AttemptRecord]]:
        """The attempts of jobs, with one query for all jobs of a page."""
        if self._attempts is None:
            self._attempts = DataLoader(load_fn=self._load_attempts)
        return self._attempts

    async def job(self, job_id: str) -> JobRecord:
        """A job that exists for the caller.

        Raises:
            JobNotFound: there is none, or it is of a type that the caller's token is not for.
        """
        job = await self.service.get(job_id)
        if not self.caller.may_see(job.type):
            raise JobNotFound(job_id)
        return job

    def forget(self) -> None:
        """Drops what was loaded: each event of a subscription is told as things are then."""
        self._counts = self._attempts = None

    async def _load_attempts(self, job_ids: list[UUID]) -> list[list[AttemptRecord]]:
        attempts = await self.service.attempts(job_ids)
        return [attempts[job_id] for job_id in job_ids]
