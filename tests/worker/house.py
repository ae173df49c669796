"""A queue with one job type, `work`, whose handler each test defines, and workers for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from job_registry import EnqueueRequest, JobType, Payload
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker


class Text(Payload):
    text: str = ""


@dataclass
class House:
    """A queue with one job type, `work`, and what its handler does."""

    queue: JobQueue
    database_url: str
    job_type: JobType[Any]
    ran: list[str] = field(default_factory=list)

    async def enqueue(self, text: str = "", **options: Any) -> JobRecord:
        request = EnqueueRequest("work", {"text": text}, **options)
        return (await self.queue.enqueue(request)).job

    @asynccontextmanager
    async def working(self, **options: Any) -> AsyncIterator[Worker]:
        given = {"concurrency": 4, "assets": "assets", "shutdown_seconds": 5.0, **options}
        worker = Worker(self.queue, **given)
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await asyncio.wait_for(task, 20)

    async def until(self, job: JobRecord, *statuses: JobStatus) -> JobRecord:
        async with asyncio.timeout(30):
            while (now := await self.queue.get(job.id)).status not in statuses:
                await asyncio.sleep(0.01)
        return now

    async def run(self, text: str = "", **options: Any) -> JobRecord:
        """One job of this text, run to its end."""
        async with self.working():
            return await self.until(
                await self.enqueue(text, **options),
                JobStatus.SUCCEEDED,
                JobStatus.FAILED,
                JobStatus.CANCELLED,
            )

    async def outcomes(self, job: JobRecord) -> list[str | None]:
        return [attempt.outcome for attempt in (await self.queue.attempts([job.id]))[job.id]]
