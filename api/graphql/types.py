"""The objects that clients read: job types, policies, jobs, attempts, leases."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import datetime
from enum import Enum
from operator import attrgetter
from typing import Annotated, Any, Final
from uuid import UUID

import strawberry
from pydantic import JsonValue
from strawberry.types.base import get_object_definition

from job_registry import JobPolicy as Policy
from job_registry import JobType as RegisteredType
from job_registry import JobTypeNotFound
from job_registry import Violation as Fault
from job_registry_api.auth import AccessScope
from job_registry_api.graphql.access_scopes import OPEN, Requires, RequiresOrOwns
from job_registry_api.graphql.answer_limits import Charged, selected
from job_registry_api.graphql.context import Context, context_of
from job_registry_api.queue import claiming, models, reading
from job_registry_api.queue.job_logs import LogLine, check_log_lines, count_lines, lines_of

MAX_INT: Final = 2**31 - 1
"""The greatest `Int`."""

READERS: Final[tuple[AccessScope, ...]] = ("jobs:read", "jobs:work")
"""Who may read the result and the errors of a job. A caller who may only enqueue can reach a job
that another caller stored: by its idempotency key and payload."""


@strawberry.enum(description="The state of a job.")
class JobStatus(Enum):
    QUEUED = strawberry.enum_value(
        "queued",
        description="Waiting to run. When `nextRunAt` is in the future, the job is scheduled or"
        " waits for its next attempt.",
    )
    RUNNING = strawberry.enum_value("running", description="Leased by a worker.")
    SUCCEEDED = strawberry.enum_value("succeeded", description="It ran and succeeded. Final.")
    FAILED = strawberry.enum_value(
        "failed",
        description="No attempt is left, or another would not help. `retryJob` queues it again.",
    )
    CANCELLED = strawberry.enum_value(
        "cancelled", description="It was cancelled. `retryJob` queues it again."
    )


@strawberry.enum(description="How an attempt ended.")
class AttemptOutcome(Enum):
    SUCCEEDED = strawberry.enum_value("succeeded", description="The job is done.")
    FAILED = strawberry.enum_value(
        "failed", description="The handler, or the remote worker, reported an error."
    )
    TIMED_OUT = strawberry.enum_value(
        "timed_out", description="The attempt exceeded the job's `timeoutSeconds`."
    )
    LOST = strawberry.enum_value(
        "lost",
        description="The worker stopped renewing its lease: it died, or lost its connection.",
    )
    RELEASED = strawberry.enum_value(
        "released",
        description="The worker returned the job, because it shut down or could not read the"
        " payload. The attempt is not spent.",
    )
    SNOOZED = strawberry.enum_value(
        "snoozed", description="The job was postponed. The attempt is not spent."
    )
    CANCELLED = strawberry.enum_value(
        "cancelled", description="The job was cancelled while it ran."
    )


@strawberry.type(description="How long a failed job waits before its next attempt.")
class Backoff:
    base_seconds: float = strawberry.field(
        description="The wait after the first attempt. It doubles with each further attempt."
    )
    cap_seconds: float = strawberry.field(description="The longest wait.")


@strawberry.enum(
    description="What happens to a queued job whose stored payload the current job type cannot"
    " read."
)
class OnMismatch(Enum):
    PARK = strawberry.enum_value(
        "park",
        description="The job stays queued, and its attempt is not spent, until a worker with"
        " another fingerprint takes it.",
    )
    FAIL = strawberry.enum_value(
        "fail", description="The job fails at once, with the code `payload_invalid`."
    )


@strawberry.type(
    description="The limits that the queue enforces for the jobs of a type, over all workers."
)
class JobPolicy:
    type: str = strawberry.field(description="The job type.")
    max_attempts: int = strawberry.field(
        description="How often a job runs at most, the first run included."
    )
    timeout_seconds: int = strawberry.field(description="How long one attempt may take.")
    concurrency_limit: int | None = strawberry.field(
        description="How many jobs of the type run at once at most, over all workers and machines."
        " Null: no limit."
    )
    backoff: Backoff = strawberry.field(description="The wait between attempts.")
    on_mismatch: OnMismatch = strawberry.field(
        description="What happens to a queued job whose stored payload cannot be read."
    )

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
            on_mismatch=OnMismatch(policy.on_mismatch),
        )


@strawberry.type(description="The number of jobs of a type in each status.")
class JobCounts:
    queued: int = strawberry.field(
        description="Waiting to run, scheduled jobs and those between attempts included."
    )
    running: int = strawberry.field(description="Leased by a worker.")
    succeeded: int = strawberry.field(description="Succeeded and not yet deleted.")
    failed: int = strawberry.field(description="Failed and not yet deleted.")
    cancelled: int = strawberry.field(description="Cancelled and not yet deleted.")
    parked: int = strawberry.field(
        description="Parked jobs, which are also counted as queued: no worker could read their"
        " payload yet."
    )

    @classmethod
    def of(cls, counts: models.JobCounts) -> JobCounts:
        return cls(**asdict(counts))


@strawberry.type(
    description="A version of a job type: jobs were admitted under it, or workers have it. At most"
    " 10,000 jobs of a type are counted for each number, in the order in which they run."
)
class JobTypeVersion:
    fingerprint: str = strawberry.field(
        description="Of jobs, the fingerprint that they were admitted under; of workers, the"
        " `fingerprint` of their job type."
    )
    queued: int = strawberry.field(
        description="Queued jobs that were admitted under it, parked ones not included."
    )
    running: int = strawberry.field(description="Running jobs that were admitted under it.")
    parked: int = strawberry.field(description="Parked jobs that were admitted under it.")
    refused: int = strawberry.field(
        description="Parked jobs that a worker with this fingerprint has refused."
    )
    last_worker_at: datetime | None = strawberry.field(
        description="When a worker with this fingerprint was last seen. Null if none was in the"
        " last 30 days. Of the fingerprints that remote workers name, those in"
        " `readableFingerprints` are recorded."
    )

    @classmethod
    def of(cls, version: models.TypeVersion) -> JobTypeVersion:
        return cls(
            fingerprint=version.fingerprint,
            queued=version.queued,
            running=version.running,
            parked=version.parked,
            refused=version.refused,
            last_worker_at=version.worker_seen_at,
        )


@strawberry.type(
    description="A job type that has jobs in the queue and that this server does not know."
)
class UnregisteredType:
    name: str = strawberry.field(description="The name that the jobs are stored under.")
    counts: JobCounts = strawberry.field(description="The number of its jobs in each status.")


@strawberry.type(description="A type of job: the schema of its payload, and how its jobs run.")
class JobType:
    registered: strawberry.Private[RegisteredType[Any]]
    name: str = strawberry.field(
        description="The name to pass to `enqueueJob`, such as `thumbnail.create`."
    )
    description: str = strawberry.field(description="What a job of this type does.")
    has_handler: bool = strawberry.field(
        description="Whether the code of this server has a handler for it, which the workers of"
        " `job-registry` run. Otherwise remote workers run it, with `leaseJobs`."
    )

    @strawberry.field(
        extensions=[Charged()], description="The JSON Schema of the payload, draft 2020-12."
    )
    def payload_schema(self) -> JsonValue:
        return dict(self.registered.payload_schema)

    @strawberry.field(extensions=[Charged()], description="A valid payload to start from.")
    def example_payload(self) -> JsonValue:
        return dict(self.registered.example_payload)

    @strawberry.field(description="The limits of its jobs.")
    def policy(self) -> JobPolicy:
        return JobPolicy.of(self.name, self.registered.policy)

    @strawberry.field(
        description="A hash of the rules of the payload's schema, and of the older schemas that"
        " this server upgrades. It does not change with descriptions."
    )
    def fingerprint(self) -> str:
        return self.registered.fingerprint

    @strawberry.field(description="The former names of the type. They are accepted like `name`.")
    def former_names(self) -> list[str]:
        return list(self.registered.former_names)

    @strawberry.field(
        description="The fingerprints of the payloads that this server reads: the current one, and"
        " those of the older ones that it upgrades. A job is stored with the one that it was"
        " admitted under."
    )
    def readable_fingerprints(self) -> list[str]:
        return list(self.registered.readable_fingerprints)

    @strawberry.field(
        extensions=[Requires("jobs:read")],
        description="The versions of this type that jobs were admitted under, or that workers"
        " have.",
    )
    async def versions(self, info: strawberry.Info[Context, None]) -> list[JobTypeVersion] | None:
        versions = await context_of(info).queue.versions(self.name)
        context_of(info).budget.charge_fields(len(versions) * selected(info).fields)
        return [JobTypeVersion.of(each) for each in versions]

    @strawberry.field(
        extensions=[Requires("jobs:read")],
        description="The number of jobs of this type in each status.",
    )
    async def counts(self, info: strawberry.Info[Context, None]) -> JobCounts | None:
        return JobCounts.of((await context_of(info).counts())[self.name])

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
    code: str = strawberry.field(
        description="A stable code, such as `handler_failed`, `timed_out`, `lost`,"
        " `payload_invalid`, or the one that a remote worker reported."
    )
    message: str = strawberry.field(extensions=[Charged()], description="A sentence for people.")
    details: JsonValue | None = strawberry.field(
        extensions=[Charged()], description="More about the error. Null if there is no more."
    )

    @classmethod
    def of(cls, error: models.JobError | None) -> JobError | None:
        if error is None:
            return None
        return cls(code=error.code, message=error.message, details=error.details)


@strawberry.enum(description="How important a log line is.")
class JobLogLevel(Enum):
    INFO = strawberry.enum_value("info", description="It says what happened.")
    WARNING = strawberry.enum_value("warning", description="It needs attention.")
    ERROR = strawberry.enum_value("error", description="Something failed.")


@strawberry.type(description="A line that a handler logged.")
class JobLogLine:
    logged_at: datetime = strawberry.field(description="When it was logged.")
    level: JobLogLevel = strawberry.field(description="How important it is.")
    message: str = strawberry.field(
        extensions=[Charged()], description="What happened, usually a short name."
    )
    data: JsonValue = strawberry.field(
        extensions=[Charged()], description="The named values of the line: a JSON object."
    )

    @classmethod
    def of(cls, line: LogLine, began: datetime) -> JobLogLine:
        return cls(
            logged_at=line.logged_at(began),
            level=JobLogLevel[line.level.name],
            message=line.message,
            data=line.data,
        )


@strawberry.type(description="One run of a job, from the start of its lease to the end.")
class JobAttempt:
    id: strawberry.Private[int]
    attempt: int = strawberry.field(
        description="The number of the attempt. The next attempt after a released or snoozed one"
        " has the same number."
    )
    worker_id: str = strawberry.field(description="The worker that leased the job.")
    started_at: datetime = strawberry.field(description="When the job was leased.")
    finished_at: datetime | None = strawberry.field(
        description="When the attempt ended. Null while it runs."
    )
    outcome: AttemptOutcome | None = strawberry.field(
        description="How the attempt ended. Null while it runs."
    )
    still_running: bool = strawberry.field(
        description="Whether the attempt has timed out and its handler has not stopped yet. Until"
        " it stops, it counts towards the concurrency limit of its type."
    )
    error: JobError | None = strawberry.field(description="Why the attempt failed, if it did.")

    @strawberry.field(
        extensions=[Requires(*READERS)],
        description="What its handler logged by `job.log`, or a remote worker sent, oldest first."
        " Only the last lines are kept (`JOBS_KEEP_LOG_LINES`). While it runs, they appear after"
        " about two seconds.",
    )
    async def logs(
        self,
        info: strawberry.Info[Context, None],
        last: Annotated[
            int,
            strawberry.argument(
                description="How many of the last lines to return at most, 0 to 1,000."
            ),
        ] = 100,
    ) -> list[JobLogLine] | None:
        check_log_lines(last)
        context = context_of(info)
        text = await context.logs.load(self.id)
        context.budget.charge_fields(min(last, count_lines(text)) * selected(info).of_logs)
        return [JobLogLine.of(line, self.started_at) for line in lines_of(text, last)]

    @classmethod
    def of(cls, attempt: models.AttemptRecord) -> JobAttempt:
        return cls(
            id=attempt.id,
            attempt=attempt.attempt,
            worker_id=attempt.worker_id,
            started_at=attempt.started_at,
            finished_at=attempt.finished_at,
            outcome=AttemptOutcome[attempt.outcome.name] if attempt.outcome else None,
            still_running=attempt.still_running,
            error=JobError.of(attempt.error),
        )


@strawberry.type(description="One fault of a value.")
class Violation:
    path: str = strawberry.field(
        extensions=[Charged()],
        description="The place of the fault: a JSON Pointer (RFC 6901) into the value, such as"
        ' `/sizes/1`. "" is the whole value.',
    )
    code: str = strawberry.field(
        description="A stable code of the fault, such as `required` or `wrong_type`."
    )
    message: str = strawberry.field(
        extensions=[Charged()], description="What was expected, and what was received."
    )

    @classmethod
    def of(cls, fault: Fault) -> Violation:
        return cls(path=fault.path, code=fault.code, message=fault.message)


@strawberry.type(
    description="The job is parked: a worker could not read its stored payload. A worker with"
    " another `fingerprint` takes it, and `unparkJobs` lets every worker try again."
)
class PayloadMismatch:
    fingerprint: str = strawberry.field(
        description="The fingerprint of the worker that refused the payload last."
    )
    violations: list[Violation] = strawberry.field(
        description="The faults of the payload, as that worker's job type finds them."
    )

    @classmethod
    def of(cls, reason: reading.PayloadMismatch) -> PayloadMismatch:
        return cls(
            fingerprint=reason.fingerprint,
            violations=list(map(Violation.of, reason.violations)),
        )


@strawberry.type(description="The job is scheduled for a later time.")
class ScheduledFor:
    next_run_at: datetime = strawberry.field(description="The earliest time of the next run.")


@strawberry.type(description="As many jobs of the type run as its policy allows.")
class ConcurrencyLimitReached:
    limit: int = strawberry.field(description="The policy's `concurrencyLimit`.")
    running: int = strawberry.field(description="How many run now.")


@strawberry.type(description="No worker has requested jobs of this type in the last minute.")
class NoWorkerSeen:
    last_seen_seconds_ago: float | None = strawberry.field(
        description="How long ago a worker last requested them. Null if none has."
    )


@strawberry.type(description="Other due jobs of the type run first.")
class BehindInQueue:
    ahead: int = strawberry.field(description="How many due jobs run first, counted up to 1,000.")


WaitingReason = Annotated[
    ScheduledFor | ConcurrencyLimitReached | NoWorkerSeen | BehindInQueue | PayloadMismatch,
    strawberry.union("WaitingReason", description="Why a queued job does not run at this moment."),
]


@strawberry.interface(description="An object that `node` returns by its id.")
class Node:
    id: strawberry.ID = strawberry.field(description="The id, unique among all objects.")


@strawberry.type(description="A job: a payload of some type, its state, and its result.")
class Job(Node):
    record: strawberry.Private[models.JobRecord]
    id: strawberry.ID = strawberry.field(
        metadata=OPEN,
        description="A UUID of version 7. Later jobs have greater ids if the clocks of the"
        " processes that stored them agree.",
    )
    type: str = strawberry.field(metadata=OPEN, description="The job type.")
    status: JobStatus = strawberry.field(metadata=OPEN, description="Its state.")
    priority: int = strawberry.field(
        metadata=OPEN,
        description="0 to 100. Among due jobs the higher priority runs first.",
    )
    attempt: int = strawberry.field(
        metadata=OPEN, description="How many attempts have begun: 0 before the first run."
    )
    max_attempts: int = strawberry.field(
        metadata=OPEN, description="How often it runs at most, the first run included."
    )
    timeout_seconds: int = strawberry.field(
        metadata=OPEN, description="How long one attempt may take."
    )
    next_run_at: datetime | None = strawberry.field(
        metadata=OPEN,
        description="The earliest time of its next run. Null unless it is queued, and for a parked"
        " job: see `PayloadMismatch`.",
    )
    created_at: datetime = strawberry.field(metadata=OPEN, description="When it was stored.")
    started_at: datetime | None = strawberry.field(
        metadata=OPEN, description="When its latest attempt began."
    )
    finished_at: datetime | None = strawberry.field(
        metadata=OPEN, description="When it succeeded, failed or was cancelled."
    )
    created_by: str | None = strawberry.field(
        metadata=OPEN, description="Who enqueued it: the `sub` of the caller's token."
    )
    idempotency_key: str | None = strawberry.field(
        metadata=OPEN, description="The idempotency key it was enqueued with."
    )
    cancel_requested_at: datetime | None = strawberry.field(
        metadata=OPEN,
        description="When its cancellation was requested. For a running job, the response to the"
        " worker's next heartbeat says so.",
    )
    worker_id: str | None = strawberry.field(
        extensions=[RequiresOrOwns(*READERS)], description="The worker of its latest attempt."
    )
    progress: JsonValue | None = strawberry.field(
        extensions=[RequiresOrOwns(*READERS), Charged()],
        description="The progress that its handler last reported.",
    )
    result: JsonValue | None = strawberry.field(
        extensions=[RequiresOrOwns(*READERS), Charged()],
        description="The value that its handler returned.",
    )
    error: JobError | None = strawberry.field(
        extensions=[RequiresOrOwns(*READERS)],
        description="Why its latest attempt failed. Null once it succeeded.",
    )

    @strawberry.field(
        metadata=OPEN,
        extensions=[Charged()],
        description="The payload as the client sent it.",
    )
    def payload(self) -> JsonValue:
        return self.record.payload

    @strawberry.field(
        extensions=[RequiresOrOwns(*READERS)],
        description="Every attempt so far, the first one first.",
    )
    async def attempts(self, info: strawberry.Info[Context, None]) -> list[JobAttempt] | None:
        attempts = await context_of(info).attempts.load(self.record.id)
        context_of(info).budget.charge_fields(len(attempts) * selected(info).of_attempts)
        return [JobAttempt.of(attempt) for attempt in attempts]

    @strawberry.field(
        metadata=OPEN,
        description="The current policy of its type. Null when the type is no longer registered."
        " A job keeps the `maxAttempts`, `timeoutSeconds` and backoff that it was enqueued with.",
    )
    def policy(self, info: strawberry.Info[Context, None]) -> JobPolicy | None:
        try:
            registered = context_of(info).queue.registry.get_type(self.type)
        except JobTypeNotFound:
            return None
        return JobPolicy.of(registered.name, registered.policy)

    @strawberry.field(
        metadata=OPEN,
        description="Why it does not run at this moment. Null unless it is queued.",
    )
    async def waiting_reason(self, info: strawberry.Info[Context, None]) -> WaitingReason | None:
        match await context_of(info).waiting_reasons.load(self.record):
            case reading.ScheduledFor(next_run_at):
                return ScheduledFor(next_run_at=next_run_at)
            case reading.ConcurrencyLimitReached(limit, running):
                return ConcurrencyLimitReached(limit=limit, running=running)
            case reading.NoWorkerSeen(seconds):
                return NoWorkerSeen(last_seen_seconds_ago=seconds)
            case reading.BehindInQueue(ahead):
                return BehindInQueue(ahead=ahead)
            case reading.PayloadMismatch() as mismatch:
                return PayloadMismatch.of(mismatch)
        return None

    def __init__(self, record: models.JobRecord) -> None:
        self.record = record


def _read_from_record(cls: type[Job], read: dict[str, Callable[[Job], object]]) -> None:
    """Make the fields of jobs properties, which read the record when they are selected.

    Few of the fields are: to copy all of them took a third of the time of a resolver. `read` are
    those that differ from the record's.
    """
    for each in get_object_definition(cls, strict=True).fields:
        name = each.python_name
        if each.base_resolver is None and name != "record":
            setattr(cls, name, property(read.get(name, attrgetter(f"record.{name}"))))


_STATUSES: Final = {each: JobStatus[each.name] for each in models.JobStatus}

_read_from_record(
    Job,
    {
        "id": lambda job: str(job.record.id),
        "status": lambda job: _STATUSES[job.record.status],
        "error": lambda job: JobError.of(job.record.error),
    },
)


@strawberry.type(description="The position of a page among all pages.")
class PageInfo:
    has_older: strawberry.Private[Callable[[], Awaitable[bool]]]
    has_newer: strawberry.Private[Callable[[], Awaitable[bool]]]
    start_cursor: str | None = strawberry.field(
        description="The cursor of the first job on the page, or of the place where a"
        " search with `last` stopped. Pass it as `before`, with `last`, for"
        " the previous page."
    )
    end_cursor: str | None = strawberry.field(
        description="The cursor of the last job on the page, or of the place where a"
        " search stopped. Pass it as `after` for the next page."
    )
    stopped_early: bool = strawberry.field(
        description="Whether the page has fewer jobs than `first` or `last` although there are"
        " more, because they would exceed the limit of an answer in fields"
        " (`JOBS_MAX_ANSWER_FIELDS`) or bytes (`JOBS_MAX_ANSWER_BYTES`), or because more than"
        " 10,000 jobs of a status would be searched for those that ended in a wide range of time,"
        " or more than 10,000 of a creator or an error code for those that other fields of the"
        " filter want. It may have no jobs then. Read on from its `endCursor`, or with `last` from"
        " its `startCursor`."
    )

    @strawberry.field(description="Whether older jobs follow.")
    async def has_next_page(self) -> bool:
        return await self.has_older()

    @strawberry.field(description="Whether newer jobs precede.")
    async def has_previous_page(self) -> bool:
        return await self.has_newer()


def cursor_of(job_id: UUID) -> str:
    """Return the position of a job in a list."""
    return base64.urlsafe_b64encode(job_id.bytes).decode().rstrip("=")


@strawberry.type(description="A job on a page, and its cursor.")
class JobEdge:
    cursor: str = strawberry.field(description="The position of the job in the list, opaque.")
    node: Job = strawberry.field(description="The job.")


@strawberry.type(description="A page of jobs, newest first.")
class JobConnection:
    @strawberry.field(description="The jobs with their cursors.")
    def edges(self) -> list[JobEdge]:
        return [JobEdge(cursor=cursor_of(each.record.id), node=each) for each in self.nodes]

    nodes: list[Job] = strawberry.field(description="The jobs without cursors.")
    page_info: PageInfo = strawberry.field(description="The position of the page.")
    total: strawberry.Private[Callable[[], Awaitable[reading.JobTotal]]]

    @strawberry.field(
        description="The number of jobs on all pages. It is exact without a filter, and with a"
        " filter of types and statuses. With another filter, or with the scope `jobs:own` alone, it"
        " is exact up to 10,000 entries of the index that is read. Above that it is an estimate,"
        " from a sample of the jobs. With `jobs:own` alone, at most 110,000 jobs are counted."
    )
    async def total_count(self) -> int | None:
        return min((await self.total()).jobs, MAX_INT)

    @strawberry.field(description="Whether `totalCount` is an estimate.")
    async def total_count_is_estimate(self) -> bool | None:
        return (await self.total()).is_estimate


@strawberry.type(
    description="A job leased to a worker. Until `expiresAt`, no other worker gets the job."
)
class JobLease:
    lease_token: str = strawberry.field(
        description="Identifies the lease in every later request. Treat it like a password."
    )
    job: Job = strawberry.field(description="The job to run.")
    expires_at: datetime = strawberry.field(
        description="When the lease ends without a heartbeat. Renew it well before."
    )
    deadline_at: datetime = strawberry.field(
        description="When the attempt times out. Heartbeats do not extend it."
    )
    lease_seconds: float = strawberry.field(
        description="How long the lease lasts after each heartbeat. Send one every third"
        " of this time."
    )
    seconds_to_expiry: float = strawberry.field(
        description="The time until the lease ends without a heartbeat, counted from the start of"
        " the lease. Unlike `expiresAt`, it does not depend on the worker's clock."
    )
    seconds_left: float = strawberry.field(
        description="The time until the attempt times out, counted from the start of the lease."
        " Unlike `deadlineAt`, it does not depend on the worker's clock."
    )
    traceparent: str | None = strawberry.field(
        description="The span that enqueued the job, as W3C Trace Context writes it: the parent of"
        " the worker's own span. Null if the enqueue was not traced."
    )

    @classmethod
    def of(cls, lease: claiming.Lease) -> JobLease:
        return cls(
            lease_token=lease.token,
            job=Job(lease.job),
            expires_at=lease.expires_at,
            deadline_at=lease.deadline_at,
            lease_seconds=lease.lease_seconds,
            seconds_to_expiry=lease.seconds_to_expiry,
            seconds_left=lease.job.timeout_seconds,
            traceparent=lease.traceparent,
        )
