"""What can be done: enqueue, cancel and retry jobs, and work them from anywhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import strawberry

from job_registry_api.graphql import errors
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.errors import REFUSALS, refusal
from job_registry_api.graphql.inputs import (
    EnqueueJobInput,
    EnqueueOptions,
    JobErrorInput,
    LeaseJobsInput,
)
from job_registry_api.graphql.scalars import JSON, DateTime, TypedJob
from job_registry_api.graphql.scopes import needs
from job_registry_api.graphql.typed import sent_job
from job_registry_api.graphql.types import Job, JobLease, described
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.models import JobRecord
from job_registry_api.queue.requests import EnqueueRequest


@strawberry.type(description="The job is stored, and on disk.")
class EnqueueJobSuccess:
    job: Job = described("The job.")
    deduplicated: bool = described(
        "Whether an earlier call with this idempotency key had stored it; this one stored nothing."
    )


@strawberry.type(description="Leased jobs; none when none was due.")
class LeaseJobsSuccess:
    leases: list[JobLease] = described("The jobs that are now this worker's.")


@strawberry.type(description="The lease is renewed.")
class HeartbeatJobSuccess:
    expires_at: DateTime = described("Until when the lease holds without another heartbeat.")
    seconds_left: float = described("Until the attempt times out; no heartbeat extends that.")
    cancel_requested: bool = described(
        "Whether the worker is to stop. It then reports with `failJob` or `releaseJob`, and the job"
        " is cancelled."
    )
    job: Job = described("The job.")


@strawberry.type(description="The change was made.")
class JobChanged:
    job: Job = described("The job as it stands now.")


EnqueueJobResult = Annotated[
    EnqueueJobSuccess
    | errors.JobTypeNotFound
    | errors.PayloadInvalid
    | errors.InputInvalid
    | errors.IdempotencyConflict,
    strawberry.union("EnqueueJobResult", description="The stored job, or why it was refused."),
]
CancelJobResult = Annotated[
    JobChanged | errors.JobNotFound | errors.JobStateConflict,
    strawberry.union("CancelJobResult", description="The job, or why it was not cancelled."),
]
RetryJobResult = Annotated[
    JobChanged | errors.JobNotFound | errors.JobStateConflict,
    strawberry.union("RetryJobResult", description="The job, or why it was not queued again."),
]
LeaseJobsResult = Annotated[
    LeaseJobsSuccess | errors.InputInvalid,
    strawberry.union("LeaseJobsResult", description="The leased jobs, or why none could be."),
]
HeartbeatJobResult = Annotated[
    HeartbeatJobSuccess | errors.LeaseLost | errors.InputInvalid,
    strawberry.union("HeartbeatJobResult", description="The renewed lease, or that it is lost."),
]
CompleteJobResult = Annotated[
    JobChanged | errors.LeaseLost | errors.InputInvalid,
    strawberry.union("CompleteJobResult", description="The job, or that the lease is lost."),
]
FailJobResult = Annotated[
    JobChanged | errors.LeaseLost | errors.InputInvalid,
    strawberry.union("FailJobResult", description="The job, or that the lease is lost."),
]
ReleaseJobResult = Annotated[
    JobChanged | errors.LeaseLost,
    strawberry.union("ReleaseJobResult", description="The job, or that the lease is lost."),
]
SnoozeJobResult = Annotated[
    JobChanged | errors.LeaseLost | errors.InputInvalid,
    strawberry.union("SnoozeJobResult", description="The job, or that the lease is lost."),
]

JobId = Annotated[strawberry.ID, strawberry.argument(description="The job's id.")]
LeaseToken = Annotated[
    str, strawberry.argument(description="The `leaseToken` that `leaseJobs` gave.")
]
Info = strawberry.Info[Context, None]


@strawberry.type(description="What can be done.")
class Mutation:
    @needs(
        "jobs:enqueue",
        description="Stores a job, to run as its type's policy says. A payload that is not what the"
        " type asks for is refused, with every fault of it.",
    )
    async def enqueue_job(
        self,
        info: Info,
        input: Annotated[EnqueueJobInput, strawberry.argument(description="The job.")],
    ) -> EnqueueJobResult:
        return await _enqueued(info.context, input.request())  # type: ignore[no-any-return]

    @needs(
        "jobs:enqueue",
        description="Stores a job, as `enqueueJob` does, with a field for each job type: a client"
        " that is generated from this schema has its payload checked when it is compiled.",
    )
    async def enqueue(
        self,
        info: Info,
        job: Annotated[
            TypedJob, strawberry.argument(description="The job: its type, and its payload.")
        ],
        options: Annotated[
            EnqueueOptions | None,
            strawberry.argument(description="How it runs, where that is not as usual."),
        ] = None,
    ) -> EnqueueJobResult:
        job_type, payload = sent_job(info, job)  # type: ignore[arg-type]
        request = (options or EnqueueOptions()).request_of(job_type, payload)
        return await _enqueued(info.context, request)  # type: ignore[no-any-return]

    @needs(
        "jobs:enqueue",
        description="Stores many jobs, up to 1,000 unless this server is set otherwise, in one"
        " transaction and answers for each, in order. A refused one does not keep the others out,"
        " unless `atomic` asks for all or none.",
    )
    async def enqueue_jobs(
        self,
        info: Info,
        inputs: Annotated[list[EnqueueJobInput], strawberry.argument(description="The jobs.")],
        atomic: Annotated[
            bool,
            strawberry.argument(
                description="Store all or none: when one is refused, so are the others, as"
                " `InputInvalid` with the code `not_stored`."
            ),
        ] = False,
    ) -> list[EnqueueJobResult]:
        caller = info.context.caller
        caller.need_types(each.type for each in inputs)
        results = await info.context.queue.enqueue_many(
            [each.request() for each in inputs], atomic=atomic, created_by=caller.subject
        )
        return [
            EnqueueJobSuccess(job=Job.of(result.job), deduplicated=result.deduplicated)
            if isinstance(result, Enqueued)
            else refusal(result)
            for result in results
        ]

    @needs(
        "jobs:admin",
        description="Cancels a queued job at once. A running one's worker is asked to stop, and it"
        " is cancelled when it does, or when its lease runs out.",
    )
    async def cancel_job(self, info: Info, id: JobId) -> CancelJobResult:
        return await _changed(_seen(info.context, id, info.context.queue.cancel))  # type: ignore[no-any-return]

    @needs(
        "jobs:admin",
        description="Queues a failed or cancelled job again, to run now. When it has no attempt"
        " left, it gets one more.",
    )
    async def retry_job(self, info: Info, id: JobId) -> RetryJobResult:
        return await _changed(_seen(info.context, id, info.context.queue.retry))  # type: ignore[no-any-return]

    @needs(
        "jobs:work",
        description="Leases due jobs to a worker, the highest priority first. The worker renews"
        " each lease with `heartbeatJob` and ends it with one of `completeJob`, `failJob`,"
        " `releaseJob` and `snoozeJob`; a lease that runs out spends the attempt.",
    )
    async def lease_jobs(
        self,
        info: Info,
        input: Annotated[
            LeaseJobsInput, strawberry.argument(description="Which jobs, how many, and for whom.")
        ],
    ) -> LeaseJobsResult:
        info.context.caller.need_types(input.job_types)
        queue = info.context.queue
        try:
            async with info.context.client_gone() as gone:
                leases = await queue.lease(
                    input.job_types,
                    input.worker_id,
                    limit=input.limit,
                    wait_seconds=input.wait_seconds,
                    stop=gone,
                )
                if gone.is_set():
                    # Nobody would hear of them, and their attempts would be spent.
                    queue.give_back(leases)
                    leases = []
        except REFUSALS as error:
            return refusal(error)  # type: ignore[no-any-return]
        return LeaseJobsSuccess(leases=[JobLease.of(lease) for lease in leases])

    @needs("jobs:work", description="Renews a lease, and hears whether to stop.")
    async def heartbeat_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        progress: Annotated[
            JSON | None,
            strawberry.argument(description="How far the job is; null leaves what was said last."),
        ] = None,
    ) -> HeartbeatJobResult:
        try:
            heartbeat = await info.context.queue.heartbeat(lease_token, progress)  # type: ignore[arg-type]
        except REFUSALS as error:
            return refusal(error)  # type: ignore[no-any-return]
        return HeartbeatJobSuccess(
            expires_at=DateTime(heartbeat.expires_at),
            seconds_left=heartbeat.seconds_left,
            cancel_requested=heartbeat.cancel_requested,
            job=Job.of(heartbeat.job),
        )

    @needs(
        "jobs:work",
        description="Ends the job as succeeded. Sent again with the same token, it succeeds again"
        " and writes nothing.",
    )
    async def complete_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        result: Annotated[
            JSON | None, strawberry.argument(description="What came of it, any JSON.")
        ] = None,
    ) -> CompleteJobResult:
        return await _changed(info.context.queue.complete(lease_token, result))  # type: ignore

    @needs(
        "jobs:work",
        description="Ends the attempt as failed. The job is tried again after its backoff while"
        " attempts are left, and fails otherwise.",
    )
    async def fail_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        error: Annotated[JobErrorInput, strawberry.argument(description="Why it failed.")],
        retryable: Annotated[
            bool, strawberry.argument(description="False: another attempt would not help.")
        ] = True,
        retry_after_seconds: Annotated[
            int | None,
            strawberry.argument(description="How long to wait instead of the type's backoff."),
        ] = None,
    ) -> FailJobResult:
        return await _changed(  # type: ignore[no-any-return]
            info.context.queue.fail(
                lease_token,
                error.error(),
                retryable=retryable,
                retry_after_seconds=retry_after_seconds,
            )
        )

    @needs(
        "jobs:work",
        description="Hands the job back, to run again at once; the attempt is not spent.",
    )
    async def release_job(self, info: Info, lease_token: LeaseToken) -> ReleaseJobResult:
        return await _changed(info.context.queue.release(lease_token))  # type: ignore[no-any-return]

    @needs(
        "jobs:work", description="Hands the job back, to run again later; the attempt is not spent."
    )
    async def snooze_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        seconds: Annotated[
            int, strawberry.argument(description="How much later, 0 to 31,536,000 seconds.")
        ],
    ) -> SnoozeJobResult:
        return await _changed(info.context.queue.snooze(lease_token, seconds))  # type: ignore[no-any-return]


async def _enqueued(context: Context, request: EnqueueRequest) -> Any:
    context.caller.need_types([request.type])
    try:
        enqueued = await context.queue.enqueue(request, created_by=context.caller.subject)
    except REFUSALS as error:
        return refusal(error)
    return EnqueueJobSuccess(job=Job.of(enqueued.job), deduplicated=enqueued.deduplicated)


async def _seen(
    context: Context, job_id: str, change: Callable[[str], Awaitable[JobRecord]]
) -> JobRecord:
    """The change of a job that exists for the caller. A job's type never changes."""
    if context.caller.job_types is not None:
        await context.job(job_id)
    return await change(job_id)


async def _changed(change: Any) -> Any:
    try:
        return JobChanged(job=Job.of(await change))
    except REFUSALS as error:
        return refusal(error)
