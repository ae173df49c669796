"""Queries: job types, policies, jobs, and a dry run of `enqueueJob`."""

from __future__ import annotations

import base64
import binascii
import uuid
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Final

import strawberry

from job_registry import Violation
from job_registry_api.graphql import errors
from job_registry_api.graphql.access_scopes import Requires
from job_registry_api.graphql.answer_limits import kept_for_answer, reading_job, selected
from job_registry_api.graphql.context import Context, context_of
from job_registry_api.graphql.inputs import EnqueueJobInput, JobFilterInput
from job_registry_api.graphql.types import (
    Job,
    JobConnection,
    JobCounts,
    JobEdge,
    JobPolicy,
    JobType,
    PageInfo,
    UnregisteredType,
)
from job_registry_api.queue.errors import InputInvalid
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import weight_of

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

FIELDS_PER_JOB: Final = 10
"""How many fields of a job take as long to answer as reading the job. Without this charge, 30 pages
of 200 jobs took 0.7 s of CPU."""


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
        context_of(info).caller.need_types([job_type])
        return JobType.of(context_of(info).queue.registry.get_type(job_type))

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
        context_of(info).caller.need_types([job_type])
        found = context_of(info).queue.registry.get_type(job_type)
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
        async with reading_job(info):
            valid = await context_of(info).queue.validate(
                input.request(),
                created_by=caller.subject,
                others=caller.others_jobs,
                budget=context_of(info).budget.faults,
            )
            duplicate = valid.duplicate_of
            return JobValid(
                max_attempts=valid.max_attempts,
                timeout_seconds=valid.timeout_seconds,
                priority=valid.priority,
                next_run_at=valid.next_run_at,
                duplicate_of=Job.of(kept_for_answer(info, duplicate)) if duplicate else None,
            )

    @strawberry.field(extensions=[Requires("jobs:own", "jobs:read")], description="One job.")
    async def job(
        self,
        info: Info,
        id: Annotated[strawberry.ID, strawberry.argument(description="The job's id.")],
    ) -> JobResult | None:
        context = context_of(info)
        return Job.of(await context.job(id, context.caller.owner_unless("jobs:read")))

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
        return Job.of(job)

    @strawberry.field(
        extensions=[Requires("jobs:own", "jobs:read")],
        description="A page of jobs, newest first. A page that would exceed the limits of an answer"
        " stops early: see `pageInfo.stoppedEarly`.",
    )
    async def jobs(
        self,
        info: Info,
        filter: Annotated[
            JobFilterInput | None,
            strawberry.argument(description="Which jobs to list. Defaults to all jobs."),
        ] = None,
        first: Annotated[
            int,
            strawberry.argument(
                description="The number of jobs on the page, 1 to 200 unless the server is"
                " configured otherwise."
            ),
        ] = 50,
        after: Annotated[
            str | None,
            strawberry.argument(
                description="The `endCursor` of the previous page. Null for the first page."
            ),
        ] = None,
    ) -> JobConnection | None:
        wanted = filter.filter() if filter else JobFilter()
        caller, registry = context_of(info).caller, context_of(info).queue.registry
        wanted = replace(wanted, types=caller.types_to_list(wanted.types, registry))
        budget, of_each = context_of(info).budget, selected(info)
        fields = FIELDS_PER_JOB + of_each.fields
        async with budget.reading:
            budget.check_reading()
            page = await context_of(info).queue.list(
                wanted,
                first=first,
                after=None if after is None else _id_of(after),
                owner=caller.owner_unless("jobs:read"),
                # One job at least: its fields say what exceeds a limit.
                most=max(1, budget.fields_left // fields),
                max_bytes=min(budget.reading_left, budget.bytes_left // of_each.copies),
            )
            budget.charge_reading(page.weight)
            budget.charge_fields(len(page.jobs) * fields)
        edges = [JobEdge(cursor=_cursor_of(job.id), node=Job.of(job)) for job in page.jobs]
        return JobConnection(
            edges=edges,
            nodes=[edge.node for edge in edges],
            page_info=PageInfo(
                has_next_page=page.has_next_page,
                stopped_early=page.stopped_early,
                has_previous_page=after is not None,
                start_cursor=edges[0].cursor if edges else None,
                end_cursor=edges[-1].cursor if edges else None,
            ),
        )


def _cursor_of(job_id: uuid.UUID) -> str:
    return base64.urlsafe_b64encode(job_id.bytes).decode().rstrip("=")


def _id_of(cursor: str) -> uuid.UUID:
    try:
        return uuid.UUID(bytes=base64.b64decode(cursor + "==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        message = "Expected the endCursor of another page."
        raise InputInvalid((Violation("/after", "invalid_format", message),)) from None
