"""Subscriptions: the events of jobs."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Final, cast

import strawberry

from job_registry_api.auth import Caller, Unauthenticated
from job_registry_api.budget import Budget
from job_registry_api.graphql.access_scopes import Requires
from job_registry_api.graphql.context import (
    Context,
    HostedOperation,
    JobsOfEvents,
    context_of,
    hosted_operation,
)
from job_registry_api.graphql.types import Job, JobStatus
from job_registry_api.queue import events
from job_registry_api.queue.errors import EventsMissed, InputInvalid, JobNotFound
from job_registry_api.queue.events import NOT_CONTINUED
from job_registry_api.queue.models import JobRecord
from job_registry_api.queue.recent_events import Numbered
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
    jobs: strawberry.Private[JobsOfEvents | None] = None

    @strawberry.field(
        description="The job when this field is read, which may be later than the event. Null once"
        " the job was deleted."
    )
    async def job(self, info: strawberry.Info[Context, None]) -> Job | None:
        context = context_of(info)
        owner = context.caller.owner_unless("jobs:read")
        try:
            return Job(await context.job(self.job_id, owner, self.jobs))
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
    def of(cls, event: events.JobEvent, jobs: JobsOfEvents | None = None) -> JobEvent:
        return cls(
            name=event.name,
            job_id=strawberry.ID(str(event.job_id)),
            type=event.type,
            status=JobStatus[event.status.name],
            attempt=event.attempt,
            jobs=jobs,
        )


@strawberry.type(description="Subscriptions: the events of jobs.")
class Subscription:
    @strawberry.subscription(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="The events of jobs from now on, of every process, in the order of commits."
        " With `jobId`, the first event is `job.current`, with the current state of the job, so"
        " that no change is missed between reading and subscribing; so does a stream of server-sent"
        " events that cannot be continued after its `Last-Event-ID`. If no job has this id, the"
        " error is `job_not_found`. With the scope `jobs:own`"
        " alone, these are the events of the caller's own jobs. A subscriber that falls 60 seconds"
        " or 50,000 events of the queue behind is dropped with the error `events_missed`. It must"
        " read the jobs and subscribe again.",
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
        of_job = None if job_id is None else parse_job_id(job_id)
        faults = unknown_types(queue.registry, job_types or (), context_of(info).faults)
        if faults:
            raise InputInvalid(tuple(faults))
        types = job_types and [queue.registry.current_name(name) for name in job_types]
        if types is None and caller.job_types is not None:
            types = sorted(caller.job_types)
        # Executors iterate over it. Ours reads from it what several subscribers share.
        return cast(
            AsyncGenerator[JobEvent, None],
            FollowedJobs(context_of(info), of_job, types, hosted_operation.get()),
        )


@dataclass(eq=False)
class FollowedJobs:
    """The events that one subscriber follows, as an async iterable.

    `types` are the current names of job types.
    """

    context: Context
    job_id: uuid.UUID | None
    types: Sequence[str] | None
    hosted: HostedOperation | None = None
    verified_at: float = field(default_factory=time.time)

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        """Yield events while the caller's token is valid.

        Raises:
            EventsMissed: events were missed.
            JobNotFound: the caller follows one job, and may not see it.
            Unauthenticated: the token has expired or is otherwise invalid.
        """
        with self.subscribed() as subscription:
            current = await self.current()
            if current is not None:
                hosted_operation.set(self.hosted)
                yield current
            while True:
                await self.wait(subscription)
                found = await self.visible(subscription.take_unread())
                jobs = self.jobs_of(found)
                for _, _, event in found:
                    self.context.forget()
                    # Each event may be requested by another task, which resolves its fields.
                    hosted_operation.set(self.hosted)
                    yield JobEvent.of(event, jobs)

    def subscribed(self, after: str | None = None) -> AbstractContextManager[events.Subscription]:
        """Subscribe to the events after the one with the id `after`, or from now on.

        Raises:
            EventsMissed: the events after it cannot be read any more.
        """
        return self.context.queue.events.subscribe(
            job_id=self.job_id, types=self.types, after=after
        )

    async def check_seen(self, number: int) -> None:
        """Check that an event is one of those that the caller follows and may see.

        Raises:
            EventsMissed: it is not. The error is the same as for an event that never happened, so
                that a made-up id reveals nothing about the jobs of other callers.
        """
        found, _ = self.read(number - 1, 1)
        if not await self.visible(found):
            raise EventsMissed(NOT_CONTINUED)

    async def can_continue(self, after: str) -> bool:
        """Return whether the events after the one with this id can be read, and the caller may see
        that one."""
        try:
            with self.subscribed(after) as subscription:
                await self.check_seen(subscription.position)
        except EventsMissed:
            return False
        return True

    async def current(self) -> JobEvent | None:
        """Return the first event if one job is followed, otherwise None.

        It is read after subscribing, so that each later change is an event.

        Raises:
            JobNotFound: the caller may not see the job.
        """
        if self.job_id is None:
            return None
        owner = self.context.caller.owner_unless("jobs:read")
        job = await self.context.job(str(self.job_id), owner)
        return JobEvent.current(job) if self.types is None or job.type in self.types else None

    async def wait(self, subscription: events.Subscription) -> None:
        """Wait for events, and verify the caller's token again from time to time while waiting.

        Raises:
            Unauthenticated: the token has expired or is otherwise invalid.
        """
        while True:
            seconds = _seconds_valid(self.context, self.verified_at)
            if seconds <= 0:
                await _verify_again(self.context)
                self.verified_at = time.time()
            elif subscription.has_unread:
                return
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await subscription.wait()

    def shared_by(self, caller: Caller) -> FollowedJobs:
        """Return the same events for a group of subscribers, which `caller` represents."""
        limits = self.context.budget.limits
        context = Context(self.context.queue, caller, budget=Budget(limits))
        context.selections = self.context.selections
        return FollowedJobs(context, self.job_id, self.types)

    def read(self, after: int, most: int) -> tuple[list[Numbered[events.JobEvent]], int]:
        """Return which of the next `most` events are followed, and the number to read on after.

        Raises:
            EventsMissed: the next events cannot be read any more.
        """
        return self.context.queue.events.read(
            after, job_id=self.job_id, types=self.types, most=most
        )

    async def visible(
        self, found: list[Numbered[events.JobEvent]]
    ) -> list[Numbered[events.JobEvent]]:
        """Return the events that the caller may see."""
        caller = self.context.caller
        if caller.owner_unless("jobs:read") is None or self.job_id is not None or not found:
            return found
        creators = await self.context.queue.creators({each.item.job_id for each in found})
        return [each for each in found if caller.owns(creators.get(each.item.job_id))]

    def jobs_of(self, found: Sequence[Numbered[events.JobEvent]]) -> JobsOfEvents:
        """Return the jobs of these events, which are sent soon."""
        return JobsOfEvents(self.context.queue, [each.item for each in found])

    def id_of(self, each: Numbered[events.JobEvent]) -> str:
        """Return the id of an event, after which a subscription can be continued."""
        return self.context.queue.events.id_of(each)


def _seconds_valid(context: Context, verified_at: float) -> float:
    """Return for how many seconds a token that was verified at this time remains verified."""
    until = verified_at + VERIFIED_SECONDS
    return min(until, context.caller.expires_at or until) - time.time()


async def _verify_again(context: Context) -> None:
    expires_at = context.caller.expires_at
    if expires_at is not None and expires_at <= time.time():
        raise Unauthenticated("The token has expired.")
    if context.verify_again is not None:
        await context.verify_again()
