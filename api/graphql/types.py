"""What clients read: job types, policies, jobs, attempts, leases."""

from __future__ import annotations

from typing import Annotated, Any, Final

import strawberry

from job_registry import JobPolicy as Policy
from job_registry import JobType as RegisteredType
from job_registry_api.auth import AccessScope
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.scalars import JSON, DateTime
from job_registry_api.graphql.scopes import needs, open_to_all
from job_registry_api.queue import claiming, models, reading
from job_registry_api.queue.models import AttemptOutcome, JobStatus

strawberry.enum(JobStatus, name="JobStatus", description="Where a job is in its life.")
strawberry.enum(AttemptOutcome, name="AttemptOutcome", description="How an attempt ended.")

_STATUS_DESCRIPTIONS = {
    "QUEUED": "Waiting to run. Scheduled for later, or waiting for another attempt, when"
    " `nextRunAt` is ahead.",
    "RUNNING": "A worker has leased it.",
    "SUCCEEDED": "It ran and succeeded. Final.",
    "FAILED": "No attempt is left, or another would not help. `retryJob` queues it again.",
    "CANCELLED": "It was cancelled. `retryJob` queues it again.",
}
_OUTCOME_DESCRIPTIONS = {
    "SUCCEEDED": "The job was done.",
    "FAILED": "The handler, or the remote worker, reported an error.",
    "TIMED_OUT": "It ran into the job's `timeoutSeconds`.",
    "LOST": "The worker stopped renewing its lease: it died, or lost touch.",
    "RELEASED": "The worker handed the job back, usually because it shut down. The attempt is not"
    " spent.",
    "SNOOZED": "The job was put off. The attempt is not spent.",
    "CANCELLED": "The job was cancelled while it ran.",
}


def _describe_values(enum: Any, descriptions: dict[str, str]) -> None:
    for value in enum.__strawberry_definition__.values:
        value.description = descriptions[value.name]


_describe_values(JobStatus, _STATUS_DESCRIPTIONS)
_describe_values(AttemptOutcome, _OUTCOME_DESCRIPTIONS)


READERS: Final[tuple[AccessScope, ...]] = ("jobs:read", "jobs:work")
"""Who may read what is in a job. One who only enqueues may be given a job that was there before."""


def described(text: str) -> Any:
    """A field that is read off its object, with its description."""
    return strawberry.field(description=text)


@strawberry.type(description="How long a failed job waits before its next attempt.")
class Backoff:
    base_seconds: float = described(
        "The wait after the first attempt; it doubles with each further one."
    )
    cap_seconds: float = described("The longest wait.")


@strawberry.type(
    description="What the queue enforces for the jobs of a type, while they run, over all workers."
)
class JobPolicy:
    type: str = described("The job type.")
    max_attempts: int = described("How often a job runs at most, the first run included.")
    timeout_seconds: int = described("How long one attempt may take.")
    concurrency_limit: int | None = described(
        "How many jobs of the type run at once, over all workers and machines. Null: no limit."
    )
    backoff: Backoff = described("The wait between attempts.")

    @classmethod
    def of(cls, job_type: str, policy: Policy) -> JobPolicy:
        return cls(
            type=job_type,
            max_attempts=policy.max_attempts,
            timeout_seconds=policy.timeout_seconds,
            concurrency_limit=policy.concurrency_limit,
            backoff=Backoff(
                base_seconds=policy.backoff.base_seconds, cap_seconds=policy.backoff.cap_seconds
            ),
        )


@strawberry.type(description="How many jobs of a type there are in each status.")
class JobCounts:
    queued: int = described("Waiting, also those that are scheduled or will be tried again.")
    running: int = described("Leased by a worker.")
    succeeded: int = described("Succeeded and not yet deleted.")
    failed: int = described("Failed and not yet deleted.")
    cancelled: int = described("Cancelled and not yet deleted.")


@strawberry.type(description="A type of job: what its payload looks like, and how its jobs run.")
class JobType:
    registered: strawberry.Private[RegisteredType[Any]]
    name: str = described("The name that `enqueueJob` takes, such as `thumbnail.create`.")
    description: str = described("What a job of this type does.")
    has_handler: bool = described(
        "Whether this server's workers can run it. Otherwise remote workers do, with `leaseJobs`."
    )

    @strawberry.field(description="The payload's JSON Schema, draft 2020-12.")
    def payload_schema(self) -> JSON:
        return JSON(dict(self.registered.payload_schema))

    @strawberry.field(description="A payload that is valid, to start from.")
    def example_payload(self) -> JSON:
        return JSON(dict(self.registered.example_payload))

    @strawberry.field(description="The limits under which its jobs run.")
    def policy(self) -> JobPolicy:
        return JobPolicy.of(self.name, self.registered.policy)

    @strawberry.field(
        description="A hash of what the payload's schema demands. It changes when the schema does,"
        " and not when only a description does."
    )
    def fingerprint(self) -> str:
        return self.registered.fingerprint

    @strawberry.field(description="How many jobs of this type there are in each status.")
    async def counts(self, info: strawberry.Info[Context, None]) -> JobCounts:
        counts = (await info.context.counts())[self.name]
        return JobCounts(
            queued=counts.queued,
            running=counts.running,
            succeeded=counts.succeeded,
            failed=counts.failed,
            cancelled=counts.cancelled,
        )

    @classmethod
    def of(cls, registered: RegisteredType[Any]) -> JobType:
        return cls(
            registered=registered,
            name=registered.name,
            description=registered.description,
            has_handler=registered.has_handler,
        )


@strawberry.type(description="Why an attempt, or a job, failed.")
class JobError:
    code: str = described(
        "A stable code, such as `handler_failed`, `timed_out`, `lost`, `payload_invalid`, or the"
        " one a remote worker gave."
    )
    message: str = described("A sentence for people.")
    details: JSON | None = described("More about it, where there is more.")

    @classmethod
    def of(cls, error: models.JobError | None) -> JobError | None:
        if error is None:
            return None
        return cls(code=error.code, message=error.message, details=JSON(error.details))


@strawberry.type(description="One run of a job: a lease, from its start to its end.")
class JobAttempt:
    attempt: int = described(
        "The number of the attempt. One that was released or snoozed gives its number back."
    )
    worker_id: str = described("The worker that leased the job.")
    started_at: DateTime = described("When it was leased.")
    finished_at: DateTime | None = described("When it ended; null while it runs.")
    outcome: AttemptOutcome | None = described("How it ended; null while it runs.")
    still_running: bool = described(
        "Whether the attempt has timed out and its handler has not stopped yet. It counts towards"
        " the concurrency limit of its type until it has."
    )
    error: JobError | None = described("Why it failed, if it did.")

    @classmethod
    def of(cls, attempt: models.AttemptRecord) -> JobAttempt:
        return cls(
            attempt=attempt.attempt,
            worker_id=attempt.worker_id,
            started_at=DateTime(attempt.started_at),
            finished_at=DateTime(attempt.finished_at) if attempt.finished_at else None,
            outcome=attempt.outcome,
            still_running=attempt.still_running,
            error=JobError.of(attempt.error),
        )


@strawberry.type(description="The job's time has not come.")
class ScheduledFor:
    next_run_at: DateTime = described("When it may run.")


@strawberry.type(description="As many jobs of the type run as its policy allows.")
class ConcurrencyLimitReached:
    limit: int = described("The policy's `concurrencyLimit`.")
    running: int = described("How many run now.")


@strawberry.type(description="No worker has asked for jobs of this type in the last minute.")
class NoWorkerSeen:
    last_seen_seconds_ago: float | None = described(
        "How long ago one last did; null when none ever has."
    )


@strawberry.type(description="Workers are there, and other jobs of the type go first.")
class BehindInQueue:
    ahead: int = described("How many due jobs go first, counted up to 1,000.")


WaitingReason = Annotated[
    ScheduledFor | ConcurrencyLimitReached | NoWorkerSeen | BehindInQueue,
    strawberry.union("WaitingReason", description="Why a queued job does not run at this moment."),
]


@strawberry.type(description="A job: a payload of some type, and what became of it.")
class Job:
    record: strawberry.Private[models.JobRecord]
    is_foreign: strawberry.Private[bool]
    id: strawberry.ID = open_to_all("A UUID of version 7: ids of later jobs are greater.")
    type: str = open_to_all("The job type.")
    status: JobStatus = open_to_all("Where it is in its life.")
    priority: int = open_to_all("0 to 100; of due jobs the higher ones go first.")
    attempt: int = open_to_all("How many attempts have begun: 0 before the first run.")
    max_attempts: int = open_to_all("How often it runs at most, the first run included.")
    timeout_seconds: int = open_to_all("How long one attempt may take.")
    next_run_at: DateTime | None = open_to_all("When it may run next; null unless it is queued.")
    created_at: DateTime = open_to_all("When it was stored.")
    started_at: DateTime | None = open_to_all("When its latest attempt began.")
    finished_at: DateTime | None = open_to_all("When it succeeded, failed or was cancelled.")
    created_by: str | None = open_to_all("Who enqueued it: the `sub` of the caller's token.")
    idempotency_key: str | None = open_to_all("The key it was enqueued with.")
    cancel_requested_at: DateTime | None = open_to_all(
        "When its cancellation was asked for. A running job's worker is told with its heartbeat."
    )
    worker_id: str | None = needs(*READERS, description="The worker of its latest attempt.")
    progress: JSON | None = needs(
        *READERS, description="What its handler last reported of its progress."
    )
    result: JSON | None = needs(*READERS, description="What its handler returned.")
    error: JobError | None = needs(
        *READERS, description="Why its latest attempt failed; null once it succeeded."
    )

    @open_to_all(
        "The payload, as it came in. That of the job in an `IdempotencyConflict`, which another"
        " caller may have stored, needs the scope `jobs:read` or `jobs:work`."
    )
    def payload(self, info: strawberry.Info[Context, None]) -> JSON:
        if self.is_foreign:
            info.context.caller.need(*READERS)
        return JSON(self.record.payload)

    @needs(*READERS, description="Every attempt so far, the first one first.")
    async def attempts(self, info: strawberry.Info[Context, None]) -> list[JobAttempt]:
        attempts = await info.context.attempts.load(self.record.id)
        return [JobAttempt.of(attempt) for attempt in attempts]

    @open_to_all(
        "The policy of its type as it is now; null when the type is not registered any more."
        " What this job keeps to is its own `maxAttempts` and `timeoutSeconds`."
    )
    def policy(self, info: strawberry.Info[Context, None]) -> JobPolicy | None:
        registered = info.context.queue.registry.get(self.type)
        return JobPolicy.of(self.type, registered.policy) if registered else None

    @open_to_all("Why it does not run at this moment; null unless it is queued.")
    async def waiting_reason(self, info: strawberry.Info[Context, None]) -> WaitingReason | None:
        match await info.context.waiting_reasons.load(self.record):
            case reading.ScheduledFor(next_run_at):
                return ScheduledFor(next_run_at=DateTime(next_run_at))
            case reading.ConcurrencyLimitReached(limit, running):
                return ConcurrencyLimitReached(limit=limit, running=running)
            case reading.NoWorkerSeen(seconds):
                return NoWorkerSeen(last_seen_seconds_ago=seconds)
            case reading.BehindInQueue(ahead):
                return BehindInQueue(ahead=ahead)
        return None

    @classmethod
    def of(cls, record: models.JobRecord, *, is_foreign: bool = False) -> Job:
        return cls(
            record=record,
            is_foreign=is_foreign,
            id=strawberry.ID(str(record.id)),
            type=record.type,
            status=record.status,
            priority=record.priority,
            attempt=record.attempt,
            max_attempts=record.max_attempts,
            timeout_seconds=record.timeout_seconds,
            next_run_at=record.next_run_at,  # type: ignore[arg-type]
            created_at=record.created_at,  # type: ignore[arg-type]
            started_at=record.started_at,  # type: ignore[arg-type]
            finished_at=record.finished_at,  # type: ignore[arg-type]
            created_by=record.created_by,
            idempotency_key=record.idempotency_key,
            cancel_requested_at=record.cancel_requested_at,  # type: ignore[arg-type]
            worker_id=record.worker_id,
            progress=JSON(record.progress),
            result=JSON(record.result),
            error=JobError.of(record.error),
        )


@strawberry.type(description="Where a page stands among all pages.")
class PageInfo:
    has_next_page: bool = described("Whether older jobs follow.")
    has_previous_page: bool = described("Whether this page was asked for with `after`.")
    start_cursor: str | None = described("The cursor of the first job on the page.")
    end_cursor: str | None = described("The cursor to ask for the next page with, as `after`.")


@strawberry.type(description="A job on a page, and its cursor.")
class JobEdge:
    cursor: str = described("Names this place in the list; opaque.")
    node: Job = described("The job.")


@strawberry.type(description="A page of jobs, newest first.")
class JobConnection:
    edges: list[JobEdge] = described("The jobs with their cursors.")
    nodes: list[Job] = described("The jobs alone.")
    page_info: PageInfo = described("Where the page stands.")


@strawberry.type(
    description="A job that is leased to a worker: it is this worker's until `expiresAt`, and no"
    " other worker gets it."
)
class JobLease:
    lease_token: str = described(
        "Proves the lease in every later call. Secret to the worker, and new with each lease."
    )
    job: Job = described("The job to do.")
    expires_at: DateTime = described(
        "Until when the lease holds without a heartbeat. Renew it well before."
    )
    deadline_at: DateTime = described(
        "When the attempt times out, however often the lease is renewed."
    )

    @classmethod
    def of(cls, lease: claiming.Lease) -> JobLease:
        return cls(
            lease_token=lease.token,
            job=Job.of(lease.job),
            expires_at=DateTime(lease.expires_at),
            deadline_at=DateTime(lease.deadline_at),
        )
