"""Mutations: enqueue, cancel and retry jobs, and run them as a remote worker.

`enqueue`, whose input depends on the job types, is in `typed_mutation`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Final

import strawberry
from pydantic import JsonValue
from pydantic_core import to_json

import job_registry
from job_registry import EnqueueRequest
from job_registry_api.graphql import errors
from job_registry_api.graphql.access_scopes import Requires
from job_registry_api.graphql.answer_limits import ReadingJob, kept_for_answer, selected
from job_registry_api.graphql.context import Context, context_of
from job_registry_api.graphql.inputs import (
    EnqueueJobInput,
    JobErrorInput,
    JobLogLineInput,
    LeaseJobsInput,
)
from job_registry_api.graphql.types import Job, JobLease
from job_registry_api.queue.changing import Changing
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.enqueueing import Enqueued, ExistingValues, Refusal
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    IdempotencyKeyTaken,
    InputInvalid,
    LeaseLost,
)
from job_registry_api.queue.models import JobRecord
from job_registry_api.queue.requests import MAX_LEASE


@strawberry.type(description="The job is stored on disk.")
class EnqueueJobSuccess:
    job: Job = strawberry.field(description="The job.")
    deduplicated: bool = strawberry.field(
        description="Whether an earlier request with this idempotency key stored the job, and this"
        " request stored nothing."
    )

    @classmethod
    def of(cls, enqueued: Enqueued) -> EnqueueJobSuccess:
        return cls(job=Job(enqueued.job), deduplicated=enqueued.deduplicated)


@strawberry.type(description="The leased jobs. The list is empty when no job was due.")
class LeaseJobsSuccess:
    leases: list[JobLease] = strawberry.field(description="The leases of this worker.")
    waited_seconds: float = strawberry.field(
        description="How long the server waited for a job before it leased these. Count the times"
        " of the leases from when the request was sent, plus this time: the answer may arrive late."
    )


@strawberry.type(description="The waits of the worker's `leaseJobs` requests are ended.")
class StopWaitingSuccess:
    worker_id: str = strawberry.field(description="The worker's name.")


@strawberry.type(description="The lease is renewed.")
class HeartbeatJobSuccess:
    expires_at: datetime = strawberry.field(
        description="When the lease ends without another heartbeat."
    )
    seconds_to_expiry: float = strawberry.field(
        description="The time until the lease ends without another heartbeat."
    )
    seconds_left: float = strawberry.field(
        description="The time until the attempt times out. Heartbeats do not extend it."
    )
    cancel_requested: bool = strawberry.field(
        description="Whether the worker must stop. It then reports with `failJob` or `releaseJob`,"
        " and the job is cancelled."
    )
    job: Job = strawberry.field(description="The job.")


@strawberry.type(description="The job was changed.")
class JobChanged:
    job: Job = strawberry.field(description="The job after the change.")

    @classmethod
    def of(cls, job: JobRecord) -> JobChanged:
        return cls(job=Job(job))


@strawberry.type(description="The parked jobs are due again.")
class UnparkJobsSuccess:
    unparked: int = strawberry.field(description="How many jobs were parked.")


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
    strawberry.union("LeaseJobsResult", description="The leased jobs, or why none was leased."),
]
StopWaitingResult = Annotated[
    StopWaitingSuccess | errors.InputInvalid,
    strawberry.union("StopWaitingResult", description="Success, or why no wait was ended."),
]
HeartbeatJobResult = Annotated[
    HeartbeatJobSuccess | errors.LeaseLost | errors.InputInvalid,
    strawberry.union(
        "HeartbeatJobResult", description="The renewed lease, or why it was not renewed."
    ),
]
CompleteJobResult = Annotated[
    JobChanged | errors.LeaseLost | errors.InputInvalid,
    strawberry.union("CompleteJobResult", description="The job, or why it was not completed."),
]
FailJobResult = Annotated[
    JobChanged | errors.LeaseLost | errors.InputInvalid,
    strawberry.union("FailJobResult", description="The job, or why the attempt was not ended."),
]
ReleaseJobResult = Annotated[
    JobChanged | errors.LeaseLost,
    strawberry.union("ReleaseJobResult", description="The job, or why it was not released."),
]
SnoozeJobResult = Annotated[
    JobChanged | errors.LeaseLost | errors.InputInvalid,
    strawberry.union("SnoozeJobResult", description="The job, or why it was not snoozed."),
]

UnparkJobsResult = Annotated[
    UnparkJobsSuccess | errors.InputInvalid,
    strawberry.union("UnparkJobsResult", description="What was done, or why nothing was."),
]

JobId = Annotated[strawberry.ID, strawberry.argument(description="The job's id.")]
LeaseToken = Annotated[str, strawberry.argument(description="The `leaseToken` from `leaseJobs`.")]
Info = strawberry.Info[Context, None]


MUTATIONS: Final = "Mutations: enqueue, cancel and retry jobs, and run them as a remote worker."


@strawberry.type(description=MUTATIONS)
class Mutation:
    @strawberry.mutation(
        extensions=[Requires("jobs:enqueue", "jobs:own")],
        description="Store a job, to run by the policy of its type. A payload that is not valid is"
        " refused, with every fault.",
    )
    async def enqueue_job(
        self,
        info: Info,
        input: Annotated[EnqueueJobInput, strawberry.argument(description="The job.")],
    ) -> EnqueueJobResult | None:
        caller = context_of(info).caller
        caller.need_types([input.type])
        return await stored(info, input.request())

    @strawberry.mutation(
        extensions=[Requires("jobs:enqueue", "jobs:own")],
        description="Store many jobs, up to 1,000 unless the server is configured otherwise, in one"
        " transaction. The results are in the order of the inputs. A refused job does not affect"
        " the others, unless `atomic` is set.",
    )
    async def enqueue_jobs(
        self,
        info: Info,
        inputs: Annotated[list[EnqueueJobInput], strawberry.argument(description="The jobs.")],
        atomic: Annotated[
            bool,
            strawberry.argument(
                description="Store all jobs or none. When one is refused, the others are refused as"
                " `InputInvalid` with the code `not_stored`."
            ),
        ] = False,
    ) -> list[EnqueueJobResult | None] | None:
        caller = context_of(info).caller
        caller.need_types(each.type for each in inputs)
        # Before anything is stored: afterwards the client would not learn what was.
        budget, size, of_each = context_of(info).budget, context_of(info).size, selected(info)
        budget.charge_fields(len(inputs) * of_each.fields)
        if size is not None and of_each.payloads:
            budget.check_bytes(size.bytes * of_each.payloads)
        results = await context_of(info).queue.enqueue_many(
            [each.request() for each in inputs],
            atomic=atomic,
            created_by=caller.subject,
            others=caller.others_jobs,
            budget=context_of(info).faults,
            values=ExistingValues(
                payload=of_each.payloads > 0,
                others=of_each.progresses + of_each.results + of_each.errors > 0,
                check=lambda weight: budget.check_bytes(weight * of_each.copies),
            ),
        )
        return [_enqueued_or_refused(result) for result in results]

    @strawberry.mutation(
        extensions=[Requires("jobs:own", "jobs:admin")],
        description="Cancel a job. A queued job is cancelled at once. The worker of a running"
        " job is requested to stop; the job is cancelled when it stops or its lease expires.",
    )
    async def cancel_job(self, info: Info, id: JobId) -> CancelJobResult | None:
        return await _changed_if_visible(info, id, Changing.cancel)

    @strawberry.mutation(
        extensions=[Requires("jobs:own", "jobs:admin")],
        description="Queue a failed or cancelled job again, to run now. A job without attempts left"
        " gets one more.",
    )
    async def retry_job(self, info: Info, id: JobId) -> RetryJobResult | None:
        return await _changed_if_visible(info, id, Changing.retry)

    @strawberry.mutation(
        extensions=[Requires("jobs:admin")],
        description="Let every worker try the parked jobs of some types again, also those that have"
        " refused them. Needed after an upgrade was repaired without a change of its models.",
    )
    async def unpark_jobs(
        self,
        info: Info,
        job_types: Annotated[
            list[str] | None,
            strawberry.argument(description="The job types. Defaults to all types."),
        ] = None,
    ) -> UnparkJobsResult | None:
        caller, queue = context_of(info).caller, context_of(info).queue
        if job_types is None and caller.job_types is not None:
            job_types = sorted(caller.job_types & frozenset(queue.registry))
        caller.need_types(job_types or ())
        unparked = await queue.unpark(job_types, budget=context_of(info).faults)
        return UnparkJobsSuccess(unparked=unparked)

    @strawberry.mutation(
        extensions=[Requires("jobs:work")],
        description="Lease due jobs to a worker, the highest priority first. The worker renews each"
        " lease with `heartbeatJob` and ends it with `completeJob`, `failJob`, `releaseJob` or"
        " `snoozeJob`. A lease that expires spends the attempt. Jobs whose payloads would exceed"
        " `JOBS_MAX_ANSWER_BYTES` together, or follow a megabyte of payloads, are not leased.",
    )
    async def lease_jobs(
        self,
        info: Info,
        input: Annotated[
            LeaseJobsInput,
            strawberry.argument(description="The job types, the worker, and how many jobs."),
        ],
    ) -> LeaseJobsResult | None:
        received_at = time.monotonic()
        context_of(info).caller.need_types(input.job_types)
        queue, budget, of_each = context_of(info).queue, context_of(info).budget, selected(info)
        budget.charge_fields(max(0, min(input.limit, MAX_LEASE)) * of_each.fields)
        budget.check_reading()
        async with context_of(info).client_gone() as gone:
            leases = await queue.lease(
                input.job_types,
                input.worker_id,
                limit=input.limit,
                wait_seconds=input.wait_seconds,
                stop=gone,
                readable=input.readable(),
                budget=context_of(info).faults,
                subject=context_of(info).caller.subject,
            )
            if gone.is_set():
                # Nobody receives these leases, and their attempts would be spent.
                queue.give_back(leases)
                leases = []
            fitting = _fitting(leases, budget.bytes_left // of_each.copies)
            if len(fitting) < len(leases):
                queue.give_back(leases[len(fitting) :])
                leases = fitting
            leases = [each._replace(job=kept_for_answer(info, each.job)) for each in leases]
        began_at = min((each.requested_at for each in leases), default=time.monotonic())
        return LeaseJobsSuccess(
            leases=[JobLease.of(lease) for lease in leases],
            waited_seconds=began_at - received_at,
        )

    @strawberry.mutation(
        extensions=[Requires("jobs:work")],
        description="End the waits of a worker's `leaseJobs` requests, in every server process."
        " Each is answered at once, with the leases that it has or with none. Without the scope"
        " `jobs:admin`, these are the requests of the token's subject. A worker that shuts down"
        " sends it and reads the answer of its `leaseJobs`, so that no lease is lost.",
    )
    async def stop_waiting(
        self,
        info: Info,
        worker_id: Annotated[
            str, strawberry.argument(description="The `workerId` of the `leaseJobs` requests.")
        ],
    ) -> StopWaitingResult | None:
        caller = context_of(info).caller
        subject = None if caller.has("jobs:admin") else caller.subject
        await context_of(info).queue.stop_waiting(worker_id, subject=subject)
        return StopWaitingSuccess(worker_id=worker_id)

    @strawberry.mutation(
        extensions=[Requires("jobs:work")],
        description="Renew a lease. The response says whether to stop.",
    )
    async def heartbeat_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        progress: Annotated[
            JsonValue | None,
            strawberry.argument(
                description="The progress of the job, as any JSON. Null keeps the last one."
            ),
        ] = None,
        logs: Annotated[
            list[JobLogLineInput] | None,
            strawberry.argument(
                description="The last log lines of the attempt, oldest first: at most 1,000, and"
                " 64 KB. They replace those that were sent before, so a repeated heartbeat adds"
                " nothing. Null keeps them."
            ),
        ] = None,
    ) -> HeartbeatJobResult | None:
        await _check_lease(context_of(info), lease_token)
        lines = None if logs is None else [each.line() for each in logs]
        async with ReadingJob(info):
            heartbeat = await context_of(info).queue.heartbeat(lease_token, progress, lines)
            return HeartbeatJobSuccess(
                expires_at=heartbeat.expires_at,
                seconds_to_expiry=heartbeat.seconds_to_expiry,
                seconds_left=heartbeat.seconds_left,
                cancel_requested=heartbeat.cancel_requested,
                job=Job(kept_for_answer(info, heartbeat.job)),
            )

    @strawberry.mutation(
        extensions=[Requires("jobs:work")],
        description="End the job as succeeded. The same request sent again succeeds again and"
        " writes nothing.",
    )
    async def complete_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        result: Annotated[
            JsonValue | None,
            strawberry.argument(description="The result of the job, as any JSON."),
        ] = None,
    ) -> CompleteJobResult | None:
        await _check_lease(context_of(info), lease_token)
        return await _changed(info, lambda: context_of(info).queue.complete(lease_token, result))

    @strawberry.mutation(
        extensions=[Requires("jobs:work")],
        description="End the attempt as failed. While attempts are left, the job runs again after"
        " its backoff. Otherwise it fails.",
    )
    async def fail_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        error: Annotated[JobErrorInput, strawberry.argument(description="Why it failed.")],
        retryable: Annotated[
            bool, strawberry.argument(description="False when another attempt would not help.")
        ] = True,
        retry_after_seconds: Annotated[
            int | None,
            strawberry.argument(
                description="The wait before the next attempt, 0 to 31,536,000 seconds."
                " Defaults to the job's backoff."
            ),
        ] = None,
    ) -> FailJobResult | None:
        await _check_lease(context_of(info), lease_token)
        return await _changed(
            info,
            lambda: context_of(info).queue.fail(
                lease_token,
                error.error(),
                retryable=retryable,
                retry_after_seconds=retry_after_seconds,
            ),
        )

    @strawberry.mutation(
        extensions=[Requires("jobs:work")],
        description="Return the job to the queue, to run again at once. The attempt is not spent."
        " A job that is returned again and again within seconds waits longer each time, up to a"
        " minute.",
    )
    async def release_job(self, info: Info, lease_token: LeaseToken) -> ReleaseJobResult | None:
        await _check_lease(context_of(info), lease_token)
        return await _changed(info, lambda: context_of(info).queue.release(lease_token))

    @strawberry.mutation(
        extensions=[Requires("jobs:work")],
        description="Return the job to the queue, to run again later. The attempt is not spent.",
    )
    async def snooze_job(
        self,
        info: Info,
        lease_token: LeaseToken,
        seconds: Annotated[
            int,
            strawberry.argument(
                description="The wait before the next run, 0 to 31,536,000 seconds."
            ),
        ],
    ) -> SnoozeJobResult | None:
        await _check_lease(context_of(info), lease_token)
        return await _changed(info, lambda: context_of(info).queue.snooze(lease_token, seconds))


def _fitting(leases: list[Lease], max_bytes: int) -> list[Lease]:
    """Return the first leases whose payloads are small enough together: one at least."""
    total = 0
    for index, lease in enumerate(leases):
        total += len(to_json(lease.job.payload))
        if index > 0 and total > max_bytes:
            return leases[:index]
    return leases


def _enqueued_or_refused(result: Enqueued | Refusal) -> EnqueueJobResult:
    match result:
        case Enqueued():
            return EnqueueJobSuccess.of(result)
        case job_registry.JobTypeNotFound():
            return errors.JobTypeNotFound.of(result)
        case job_registry.PayloadInvalid():
            return errors.PayloadInvalid.of(result)
        case InputInvalid():
            return errors.InputInvalid.of(result)
        case IdempotencyConflict():
            return errors.IdempotencyConflict.of(result)
        case IdempotencyKeyTaken():
            return errors.InputInvalid.of_taken_key(result)


async def _check_lease(context: Context, lease_token: str) -> None:
    """Check that a lease is of a job that the caller may see.

    Raises:
        LeaseLost: it is not. The answer is that to a lease which does not exist.
    """
    if context.caller.job_types is not None:
        job_type = await context.queue.leased_type(lease_token)
        if not context.caller.may_see(job_type):
            raise LeaseLost


async def stored(info: Info, request: EnqueueRequest) -> EnqueueJobSuccess:
    """Store a job for the caller. An existing job counts as read.

    Raises:
        BudgetExceeded: the jobs that the request has read are large enough for an answer.
    """
    context = context_of(info)
    if request.idempotency_key is None:  # The job is new, and nothing is read.
        return EnqueueJobSuccess.of(await _enqueued(context, request))
    async with ReadingJob(info):
        enqueued = await _enqueued(context, request)
        if enqueued.deduplicated:
            enqueued = enqueued._replace(job=kept_for_answer(info, enqueued.job))
        return EnqueueJobSuccess.of(enqueued)


def _enqueued(context: Context, request: EnqueueRequest) -> Awaitable[Enqueued]:
    caller = context.caller
    return context.queue.enqueue(
        request,
        created_by=caller.subject,
        others=caller.others_jobs,
        budget=context.faults,
    )


async def _changed(info: Info, change: Callable[[], Awaitable[JobRecord]]) -> JobChanged:
    """Change a job, which counts as read. It is not changed if no more jobs may be read."""
    async with ReadingJob(info):
        return JobChanged.of(kept_for_answer(info, await change()))


async def _changed_if_visible(
    info: Info, job_id: str, change: Callable[..., Awaitable[JobRecord]]
) -> JobChanged:
    """Change a job that the caller may change. The type of a job never changes."""
    context = context_of(info)
    owner = context.caller.owner_unless("jobs:admin")
    if context.caller.job_types is not None:
        await context.job(job_id, owner)
    return await _changed(info, lambda: change(context.queue, job_id, owner=owner))
