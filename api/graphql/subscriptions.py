"""Subscriptions: the events of jobs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Final

import strawberry

from job_registry import Violation
from job_registry_api.auth import Unauthenticated
from job_registry_api.graphql.access_scopes import Requires
from job_registry_api.graphql.context import (
    Context,
    HostedOperation,
    context_of,
    hosted_operation,
)
from job_registry_api.graphql.types import Job, JobStatus
from job_registry_api.queue import events
from job_registry_api.queue.errors import InputInvalid, JobNotFound
from job_registry_api.queue.models import JobRecord
from job_registry_api.queue.requests import parse_job_id, unknown_types

VERIFIED_SECONDS: Final = 60.0
"""How long a subscription continues before its token is verified again."""


@strawberry.type(description="A change of a job, sent once it is committed.")
class JobEvent:
    name: str = strawberry.field(
        description="`job.current` (the state of the job when the subscription began),"
        " `job.created`, `job.started`, `job.progressed`, `job.cancel_requested` (of a"
        " running job, whose worker now stops), `job.succeeded`, `job.retrying` (queued again for"
        " another attempt), `job.parked` (queued for a worker that can read its payload),"
        " `job.unparked`, `job.failed` or `job.cancelled`. More names may be added."
    )
    job_id: strawberry.ID = strawberry.field(description="The job.")
    type: str = strawberry.field(description="Its job type.")
    status: JobStatus = strawberry.field(description="Its status after the event.")
    attempt: int = strawberry.field(description="How many attempts had begun.")

    @strawberry.field(
        description="The job when this field is read, which may be later than the event. Null once"
        " the job was deleted."
    )
    async def job(self, info: strawberry.Info[Context, None]) -> Job | None:
        context = context_of(info)
        owner = context.caller.owner_unless("jobs:read")
        try:
            return Job.of(await context.job(self.job_id, owner))
        except JobNotFound:
            return None

    @classmethod
    def current(cls, job: JobRecord) -> JobEvent:
        """Return the first event of a job that is followed."""
        return cls(
            name="job.current",
            job_id=strawberry.ID(str(job.id)),
            type=job.type,
            status=JobStatus[job.status.name],
            attempt=job.attempt,
        )

    @classmethod
    def of(cls, event: events.JobEvent) -> JobEvent:
        return cls(
            name=event.name,
            job_id=strawberry.ID(str(event.job_id)),
            type=event.type,
            status=JobStatus[event.status.name],
            attempt=event.attempt,
        )


@strawberry.type(description="Subscriptions: the events of jobs.")
class Subscription:
    @strawberry.subscription(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="The events of jobs from now on, of every process, in the order of commits."
        " With `jobId`, the first event is `job.current`, with the job as it is, so that nothing"
        " is missed between reading and subscribing. With the scope `jobs:own` alone, these are the"
        " events of the caller's own jobs. A subscriber that falls 1,000 events behind is dropped"
        " with the error `events_missed`. It must read the jobs and subscribe again.",
    )
    async def job_events(
        self,
        info: strawberry.Info[Context, None],
        job_id: Annotated[
            strawberry.ID | None, strawberry.argument(description="Only events of this job.")
        ] = None,
        job_types: Annotated[
            list[str] | None,
            strawberry.argument(description="Only events of jobs of these types."),
        ] = None,
    ) -> AsyncGenerator[JobEvent, None]:
        queue, caller = context_of(info).queue, context_of(info).caller
        caller.need_types(job_types or ())
        faults = unknown_types(queue.registry, job_types or ())
        try:
            of_job = None if job_id is None else parse_job_id(job_id)
        except JobNotFound as unknown:
            faults.append(Violation("/jobId", "job_not_found", str(unknown)))
        if faults:
            raise InputInvalid(tuple(faults))
        types = job_types and [queue.registry.current_name(name) for name in job_types]
        if types is None and caller.job_types is not None:
            types = sorted(caller.job_types)
        return _events(context_of(info), hosted_operation.get(), of_job, types)


async def _events(
    context: Context,
    hosted: HostedOperation | None,
    job_id: uuid.UUID | None,
    types: list[str] | None,
) -> AsyncGenerator[JobEvent, None]:
    """Yield events while the caller's token is valid.

    Raises:
        Unauthenticated: the token has expired or is otherwise invalid.
    """
    verified_at = time.time()
    with context.queue.events.subscribe(job_id=job_id, types=types) as subscription:
        if job_id is not None:
            # Read after subscribing, so that each later change is an event.
            current = await context.job(str(job_id), context.caller.owner_unless("jobs:read"))
            if types is None or current.type in types:
                hosted_operation.set(hosted)
                yield JobEvent.current(current)
        while True:
            found: list[events.JobEvent] = []
            try:
                async with asyncio.timeout(_seconds_valid(context, verified_at)):
                    found = await _next_events(context, subscription)
            except StopAsyncIteration:
                return
            except TimeoutError:
                pass
            if _seconds_valid(context, verified_at) <= 0:
                await _verify_again(context)
                verified_at = time.time()
            for event in found:
                context.forget()
                # Each event may be requested by another task, which resolves its fields.
                hosted_operation.set(hosted)
                yield JobEvent.of(event)


async def _next_events(
    context: Context, subscription: events.Subscription
) -> list[events.JobEvent]:
    """Wait for events, and return those that the caller may see."""
    event = await anext(subscription)
    owner = context.caller.owner_unless("jobs:read")
    if owner is None or subscription.job_id is not None:
        return [event]
    found = [event, *subscription.take_unread()]
    creators = await context.queue.creators({each.job_id for each in found})
    return [each for each in found if context.caller.owns(creators.get(each.job_id))]


def _seconds_valid(context: Context, verified_at: float) -> float:
    """Return for how long a token that was verified then needs not be verified again."""
    until = verified_at + VERIFIED_SECONDS
    return min(until, context.caller.expires_at or until) - time.time()


async def _verify_again(context: Context) -> None:
    expires_at = context.caller.expires_at
    if expires_at is not None and expires_at <= time.time():
        raise Unauthenticated("The token has expired.")
    if context.verify_again is not None:
        await context.verify_again()
