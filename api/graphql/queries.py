"""Queries: job types, policies, jobs, and a dry run of `enqueueJob`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Final, TypeVar

import strawberry

from job_registry import Violation
from job_registry_api.graphql import errors
from job_registry_api.graphql.access_scopes import Requires
from job_registry_api.graphql.answer_limits import ReadingJob, kept_for_answer, selected
from job_registry_api.graphql.context import Context, context_of
from job_registry_api.graphql.inputs import EnqueueJobInput, JobFilterInput
from job_registry_api.graphql.types import (
    Job,
    JobConnection,
    JobCounts,
    JobPolicy,
    JobType,
    Node,
    PageInfo,
    UnregisteredType,
    cursor_of,
)
from job_registry_api.queue.errors import InputInvalid, JobNotFound
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import weight_of
from job_registry_api.queue.reading import JobTotal

JobTypeResult = Annotated[
    JobType | errors.JobTypeNotFound,
    strawberry.union("JobTypeResult", description="The job type, or why there is none."),
]
JobPolicyResult = Annotated[
    JobPolicy | errors.JobTypeNotFound,
    strawberry.union("JobPolicyResult", description="The policy, or why there is none."),
]
JobResult = Annotated[
    Job | errors.JobNotFound,
    strawberry.union("JobResult", description="The job, or why there is none."),
]

AwaitJobResult = Annotated[
    Job | errors.JobNotFound | errors.InputInvalid,
    strawberry.union(
        "AwaitJobResult", description="The job as it is after the wait, or why there is none."
    ),
]

FIELDS_PER_TOTAL: Final = 1_000
"""Counting 10,000 jobs takes about as long as answering this many fields."""

FIELDS_PER_JOB: Final = 10
"""How many fields take as long to answer as reading one job. Without this charge, 30 pages of 200
jobs took 0.7 s of CPU."""


@strawberry.type(description="`enqueueJob` would store this job.")
class JobValid:
    max_attempts: int = strawberry.field(description="How often the job would run at most.")
    timeout_seconds: int = strawberry.field(description="How long one attempt could take.")
    priority: int = strawberry.field(description="The priority of the job.")
    next_run_at: datetime = strawberry.field(description="The earliest time of the first run.")
    duplicate_of: Job | None = strawberry.field(
        description="The job that already has the idempotency key and this payload. `enqueueJob`"
        " would return it."
    )


ValidateJobResult = Annotated[
    JobValid
    | errors.JobTypeNotFound
    | errors.PayloadInvalid
    | errors.InputInvalid
    | errors.IdempotencyConflict,
    strawberry.union(
        "ValidateJobResult",
        description="The job that `enqueueJob` would store for the same input, or why it would"
        " refuse it.",
    ),
]

Info = strawberry.Info[Context, None]


@strawberry.type(description="Queries: job types, policies, jobs, and a dry run of `enqueueJob`.")
class Query:
    @strawberry.field(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="Every job type of this server, sorted by name.",
    )
    async def job_types(self, info: Info) -> list[JobType] | None:
        context = context_of(info)
        visible = [
            JobType.of(job_type)
            for name, job_type in context.queue.registry.items()
            if context.caller.may_see(name)
        ]
        context.budget.charge_fields(len(visible) * selected(info).fields)
        return visible

    @strawberry.field(extensions=[Requires("jobs:own", "jobs:read")], description="One job type.")
    async def job_type(
        self,
        info: Info,
        job_type: Annotated[str, strawberry.argument(description="The name of the job type.")],
    ) -> JobTypeResult | None:
        context = context_of(info)
        context.caller.need_types([job_type])
        return JobType.of(context.queue.registry.get_type(job_type, context.faults))

    @strawberry.field(
        extensions=[Requires("jobs:read")],
        description="The job types that have jobs in the queue and that this server does not know,"
        " sorted by name. Another process may know them.",
    )
    async def unregistered_types(self, info: Info) -> list[UnregisteredType] | None:
        context = context_of(info)
        found = await context.queue.unregistered_types()
        visible = [name for name in found if context.caller.may_see(name)]
        context.budget.charge_fields(len(visible) * selected(info).fields)
        return [UnregisteredType(name=name, counts=JobCounts.of(found[name])) for name in visible]

    @strawberry.field(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="The limits of the jobs of a type.",
    )
    async def job_policy(
        self,
        info: Info,
        job_type: Annotated[str, strawberry.argument(description="The name of the job type.")],
    ) -> JobPolicyResult | None:
        context = context_of(info)
        context.caller.need_types([job_type])
        found = context.queue.registry.get_type(job_type, context.faults)
        return JobPolicy.of(found.name, found.policy)

    @strawberry.field(
        extensions=[Requires("jobs:enqueue", "jobs:own", "jobs:read")],
        description="A dry run of `enqueueJob`: makes the same checks and stores nothing.",
    )
    async def validate_job(
        self,
        info: Info,
        input: Annotated[
            EnqueueJobInput, strawberry.argument(description="The input for `enqueueJob`.")
        ],
    ) -> ValidateJobResult | None:
        caller = context_of(info).caller
        caller.need_types([input.type])
        async with ReadingJob(info):
            valid = await context_of(info).queue.validate(
                input.request(),
                created_by=caller.subject,
                others=caller.others_jobs,
                budget=context_of(info).faults,
            )
            duplicate = valid.duplicate_of
            return JobValid(
                max_attempts=valid.max_attempts,
                timeout_seconds=valid.timeout_seconds,
                priority=valid.priority,
                next_run_at=valid.next_run_at,
                duplicate_of=Job(kept_for_answer(info, duplicate)) if duplicate else None,
            )

    @strawberry.field(extensions=[Requires("jobs:own", "jobs:read")], description="One job.")
    async def job(
        self,
        info: Info,
        id: Annotated[strawberry.ID, strawberry.argument(description="The job's id.")],
    ) -> JobResult | None:
        context = context_of(info)
        return Job(await context.job(id, context.caller.owner_unless("jobs:read")))

    @strawberry.field(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="Wait until a job has ended, and return it. After `timeoutSeconds` it is"
        " returned as it is: `finishedAt` says whether it has ended.",
    )
    async def await_job(
        self,
        info: Info,
        id: Annotated[strawberry.ID, strawberry.argument(description="The job's id.")],
        timeout_seconds: Annotated[
            int, strawberry.argument(description="How long to wait, 0 to 30 seconds.")
        ] = 30,
    ) -> AwaitJobResult | None:
        context = context_of(info)
        owner = context.caller.owner_unless("jobs:read")
        if context.caller.job_types is not None:
            await context.job(id, owner)
        async with context.client_gone() as gone:
            job = await context.queue.wait(id, seconds=timeout_seconds, owner=owner, stop=gone)
        async with context.budget.reading:
            context.budget.check_reading()
            context.budget.charge_reading(weight_of(job))
        return Job(job)

    @strawberry.field(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="The job with this id. Null if there is none.",
    )
    async def node(
        self,
        info: Info,
        id: Annotated[strawberry.ID, strawberry.argument(description="The object's id.")],
    ) -> Node | None:
        context = context_of(info)
        try:
            return Job(await context.job(id, context.caller.owner_unless("jobs:read")))
        except JobNotFound:
            return None

    @strawberry.field(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="A page of jobs, newest first: the first ones after a cursor, or the last ones"
        " before one. A page that would exceed the limits of an answer stops early: see"
        " `pageInfo.stoppedEarly`.",
    )
    async def jobs(
        self,
        info: Info,
        filter: Annotated[
            JobFilterInput | None,
            strawberry.argument(description="Which jobs to list. Defaults to all jobs."),
        ] = None,
        first: Annotated[
            int | None,
            strawberry.argument(
                description="The number of jobs on the page, 1 to 200 unless the server is"
                " configured otherwise. Defaults to 50 without `last`."
            ),
        ] = None,
        after: Annotated[
            str | None,
            strawberry.argument(
                description="Only jobs after this cursor: the `endCursor` of the previous page."
            ),
        ] = None,
        last: Annotated[
            int | None,
            strawberry.argument(
                description="The number of jobs on the page, counted from the end of the list, with"
                " the same limits as `first`. Not allowed together with `first`."
            ),
        ] = None,
        before: Annotated[
            str | None,
            strawberry.argument(
                description="Only jobs before this cursor: the `startCursor` of the next page."
            ),
        ] = None,
    ) -> JobConnection | None:
        wanted = filter.filter() if filter else JobFilter()
        context = context_of(info)
        caller, queue, budget = context.caller, context.queue, context.budget
        wanted = replace(wanted, types=caller.types_to_list(wanted.types, queue.registry))
        owner = caller.owner_unless("jobs:read")
        behind, ahead = _id_of(after, "/after"), _id_of(before, "/before")
        of_each = selected(info)
        fields = FIELDS_PER_JOB + of_each.fields
        async with budget.reading:
            budget.check_reading()
            page = await queue.list(
                wanted,
                first=first,
                after=behind,
                last=last,
                before=ahead,
                owner=owner,
                # One job at least: its fields say what exceeds a limit.
                most=max(1, budget.fields_left // fields),
                max_bytes=min(budget.reading_left, budget.bytes_left // of_each.copies),
            )
            budget.charge_reading(page.weight)
            budget.charge_fields(len(page.jobs) * fields)
        start, end = None, None
        if page.jobs:
            start, end = cursor_of(page.jobs[0].id), cursor_of(page.jobs[-1].id)
        if page.stopped_at is not None:
            stopped_at = cursor_of(page.stopped_at)
            start, end = (start, stopped_at) if last is None else (stopped_at, end)

        async def has_older() -> bool:
            if last is None or ahead is None:
                return page.has_next_page
            async with budget.reading:
                return await queue.has_any(wanted, not_newer_than=ahead, owner=owner)

        async def has_newer() -> bool:
            if last is not None or behind is None:
                return page.has_previous_page
            async with budget.reading:
                return await queue.has_any(wanted, not_older_than=behind, owner=owner)

        async def total() -> JobTotal:
            async with budget.reading:
                budget.charge_fields(FIELDS_PER_TOTAL)
                return await queue.count(wanted, owner=owner)

        return JobConnection(
            nodes=[Job(job) for job in page.jobs],
            page_info=PageInfo(
                has_older=_once(has_older),
                has_newer=_once(has_newer),
                stopped_early=page.stopped_early,
                start_cursor=start,
                end_cursor=end,
            ),
            total=_once(total),
        )


Read = TypeVar("Read")


def _once(read: Callable[[], Coroutine[Any, Any, Read]]) -> Callable[[], Awaitable[Read]]:
    """Return a function that reads once, at its first call: several fields share the value."""
    return cache(lambda: asyncio.ensure_future(read()))


def _id_of(cursor: str | None, path: str) -> uuid.UUID | None:
    if cursor is None:
        return None
    try:
        return uuid.UUID(bytes=base64.b64decode(cursor + "==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        message = "Expected the cursor of a job on another page."
        raise InputInvalid((Violation(path, "invalid_format", message),)) from None
