"""What can be asked: job types, policies, jobs, and a dry run of `enqueueJob`."""

from __future__ import annotations

import base64
import binascii
import uuid
from typing import Annotated

import strawberry

from job_registry import Violation
from job_registry_api.graphql import errors
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.errors import REFUSALS, refusal
from job_registry_api.graphql.inputs import EnqueueJobInput, JobFilter
from job_registry_api.graphql.scalars import DateTime
from job_registry_api.graphql.scopes import needs
from job_registry_api.graphql.types import (
    Job,
    JobConnection,
    JobEdge,
    JobPolicy,
    JobType,
    PageInfo,
    described,
)
from job_registry_api.queue import reading
from job_registry_api.queue.errors import InputInvalid

JobTypeResult = Annotated[
    JobType | errors.JobTypeNotFound,
    strawberry.union("JobTypeResult", description="The job type, or that there is none."),
]
JobPolicyResult = Annotated[
    JobPolicy | errors.JobTypeNotFound,
    strawberry.union("JobPolicyResult", description="The policy, or that there is no such type."),
]
JobResult = Annotated[
    Job | errors.JobNotFound,
    strawberry.union("JobResult", description="The job, or that there is none."),
]


@strawberry.type(description="`enqueueJob` would store this job.")
class JobValid:
    max_attempts: int = described("How often it would run at most.")
    timeout_seconds: int = described("How long one attempt might take.")
    priority: int = described("The priority it would have.")
    next_run_at: DateTime = described("When it might run first.")
    duplicate_of: Job | None = described(
        "The job that has the idempotency key and this payload already: it would be given back."
    )


ValidateJobResult = Annotated[
    JobValid
    | errors.JobTypeNotFound
    | errors.PayloadInvalid
    | errors.InputInvalid
    | errors.IdempotencyConflict,
    strawberry.union(
        "ValidateJobResult", description="What `enqueueJob` would say to the same input."
    ),
]


@strawberry.type(description="What can be asked.")
class Query:
    @needs("jobs:read", description="Every job type of this server, by name.")
    def job_types(self, info: strawberry.Info[Context, None]) -> list[JobType]:
        context = info.context
        return [
            JobType.of(job_type)
            for name, job_type in context.queue.registry.items()
            if context.caller.may_see(name)
        ]

    @needs("jobs:read", description="One job type.")
    def job_type(
        self,
        info: strawberry.Info[Context, None],
        job_type: Annotated[str, strawberry.argument(description="Its name.")],
    ) -> JobTypeResult:
        info.context.caller.need_types([job_type])
        try:
            return JobType.of(info.context.queue.registry.get_type(job_type))
        except REFUSALS as error:
            return refusal(error)  # type: ignore[no-any-return]

    @needs("jobs:read", description="The limits under which jobs of a type run.")
    def job_policy(
        self,
        info: strawberry.Info[Context, None],
        job_type: Annotated[str, strawberry.argument(description="The name of the job type.")],
    ) -> JobPolicyResult:
        info.context.caller.need_types([job_type])
        try:
            return JobPolicy.of(job_type, info.context.queue.policy(job_type))
        except REFUSALS as error:
            return refusal(error)  # type: ignore[no-any-return]

    @needs(
        "jobs:enqueue",
        "jobs:read",
        description="A dry run of `enqueueJob`: the same checks by the same code, and nothing is"
        " written.",
    )
    async def validate_job(
        self,
        info: strawberry.Info[Context, None],
        input: Annotated[
            EnqueueJobInput, strawberry.argument(description="What `enqueueJob` would be given.")
        ],
    ) -> ValidateJobResult:
        info.context.caller.need_types([input.type])
        try:
            valid = await info.context.queue.validate(input.request())
        except REFUSALS as error:
            return refusal(error)  # type: ignore[no-any-return]
        return JobValid(
            max_attempts=valid.max_attempts,
            timeout_seconds=valid.timeout_seconds,
            priority=valid.priority,
            next_run_at=DateTime(valid.next_run_at),
            duplicate_of=Job.of(valid.duplicate_of) if valid.duplicate_of else None,
        )

    @needs("jobs:read", description="One job.")
    async def job(
        self,
        info: strawberry.Info[Context, None],
        id: Annotated[strawberry.ID, strawberry.argument(description="The job's id.")],
    ) -> JobResult:
        try:
            return Job.of(await info.context.job(id))
        except REFUSALS as error:
            return refusal(error)  # type: ignore[no-any-return]

    @needs("jobs:read", description="Jobs, newest first, a page at a time.")
    async def jobs(
        self,
        info: strawberry.Info[Context, None],
        filter: Annotated[
            JobFilter | None, strawberry.argument(description="Which jobs; all unless given.")
        ] = None,
        first: Annotated[
            int,
            strawberry.argument(
                description="How many on the page, 1 to 200 unless this server is set otherwise."
            ),
        ] = 50,
        after: Annotated[
            str | None,
            strawberry.argument(
                description="The `endCursor` of the page before; null for the first."
            ),
        ] = None,
    ) -> JobConnection:
        types = tuple(filter.types or ()) if filter else ()
        caller = info.context.caller
        caller.need_types(types)
        if not types and caller.job_types is not None:
            # No types is no restriction, and no job has a type without a name.
            types = tuple(sorted(caller.job_types)) or ("",)
        wanted = reading.JobFilter(
            types=types,
            statuses=tuple(filter.statuses or ()) if filter else (),
        )
        page = await info.context.queue.list_jobs(
            wanted, first=first, after=None if after is None else _id_of(after)
        )
        edges = [JobEdge(cursor=_cursor_of(job.id), node=Job.of(job)) for job in page.jobs]
        return JobConnection(
            edges=edges,
            nodes=[edge.node for edge in edges],
            page_info=PageInfo(
                has_next_page=page.has_next_page,
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
        message = "Expected an endCursor of an earlier page."
        raise InputInvalid((Violation("/after", "invalid_format", message),)) from None
