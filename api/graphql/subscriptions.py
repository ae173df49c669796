"""What can be followed: the events of jobs."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Annotated

import strawberry

from job_registry import JobTypeNotFound, Violation
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.scopes import subscription
from job_registry_api.graphql.types import Job, described
from job_registry_api.queue import events
from job_registry_api.queue.errors import InputInvalid, JobNotFound
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.requests import parse_job_id


@strawberry.type(description="Something that happened to a job, told once it is committed.")
class JobEvent:
    name: str = described(
        "`job.created`, `job.started`, `job.progressed`, `job.cancel_requested` (of a running job,"
        " which its worker now stops), `job.succeeded`, `job.retrying` (queued again, for another"
        " attempt), `job.failed` or `job.cancelled`. More names may be added."
    )
    job_id: strawberry.ID = described("The job.")
    type: str = described("Its job type.")
    status: JobStatus = described("The status it has since then.")
    attempt: int = described("How many attempts had begun.")

    @strawberry.field(
        description="The job as it is when this is read, which may be later; null once it was"
        " deleted."
    )
    async def job(self, info: strawberry.Info[Context, None]) -> Job | None:
        try:
            return Job.of(await info.context.queue.get(self.job_id))
        except JobNotFound:
            return None

    @classmethod
    def of(cls, event: events.JobEvent) -> JobEvent:
        return cls(
            name=event.name,
            job_id=strawberry.ID(str(event.job_id)),
            type=event.type,
            status=event.status,
            attempt=event.attempt,
        )


@strawberry.type(description="What can be followed.")
class Subscription:
    @subscription(
        "jobs:read",
        description="What happens to jobs from now on, in every process, in the order of commits."
        " A subscriber that falls 1,000 events behind is dropped with the error `events_missed`: it"
        " reads the jobs and subscribes again.",
    )
    async def job_events(
        self,
        info: strawberry.Info[Context, None],
        job_id: Annotated[
            strawberry.ID | None, strawberry.argument(description="Of this job alone.")
        ] = None,
        job_types: Annotated[
            list[str] | None, strawberry.argument(description="Of jobs of these types alone.")
        ] = None,
    ) -> AsyncGenerator[JobEvent, None]:
        queue, caller = info.context.queue, info.context.caller
        caller.need_types(job_types or ())
        faults = []
        for index, name in enumerate(job_types or ()):
            try:
                queue.registry.get_type(name)
            except JobTypeNotFound as unknown:
                path = f"/jobTypes/{index}"
                faults.append(Violation(path, "job_type_not_found", str(unknown)))
        try:
            of_job = None if job_id is None else parse_job_id(job_id)
        except JobNotFound as unknown:
            faults.append(Violation("/jobId", "job_not_found", str(unknown)))
        if faults:
            raise InputInvalid(tuple(faults))
        types = job_types
        if types is None and caller.job_types is not None:
            types = sorted(caller.job_types)
        return _events(info.context, of_job, types)


async def _events(
    context: Context, job_id: uuid.UUID | None, types: list[str] | None
) -> AsyncGenerator[JobEvent, None]:
    with context.queue.events.subscribe(job_id=job_id, types=types) as subscription:
        async for event in subscription:
            context.forget()
            yield JobEvent.of(event)
