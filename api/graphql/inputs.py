"""The inputs of queries and mutations, except the typed one: see `typed_input`."""

from __future__ import annotations

from datetime import datetime

import strawberry
from pydantic import JsonValue

from job_registry import EnqueueRequest
from job_registry.wire_text import parse_date_time
from job_registry_api.graphql.compiled import built_directly
from job_registry_api.graphql.scalars import TimeText
from job_registry_api.graphql.types import JobLogLevel, JobStatus
from job_registry_api.queue import models
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.job_logs import LogLevel, LogLine
from job_registry_api.queue.models import JobError


@built_directly
@strawberry.input(description="How a job is stored and run. Omitted fields use their defaults.")
class EnqueueOptions:
    priority: int | None = strawberry.field(
        default=None,
        description="0 to 100, higher first. Among due jobs the higher priority runs first; while"
        " all workers are busy, jobs with a lower priority wait. Defaults to 50.",
    )
    schedule_at: TimeText | None = strawberry.field(
        default=None,
        description="The earliest time of the first run. Defaults to now. With a time in the past"
        " the job is due at once, and runs before jobs that became due later.",
    )
    max_attempts: int | None = strawberry.field(
        default=None,
        description="How often the job runs at most, the first run included, 1 to 1000. Defaults"
        " to the policy of the job type.",
    )
    idempotency_key: str | None = strawberry.field(
        default=None,
        description="1 to 255 characters, unique per job type for as long as the job is kept. A"
        " second request with the same key and payload returns the first job and stores nothing,"
        " so it is safe to repeat.",
    )

    def request_for(self, job_type: str, payload: JsonValue) -> EnqueueRequest:
        """Return the request to the queue for a job with these options."""
        schedule_at = _time_of(self.schedule_at)
        return EnqueueRequest(
            job_type, payload, self.priority, schedule_at, self.max_attempts, self.idempotency_key
        )


def _time_of(value: str | datetime | None) -> datetime | None:
    # The `DateTime` of a host's schema gives times, and ours gives the client's text.
    return parse_date_time(value) if isinstance(value, str) else value


@built_directly
@strawberry.input(description="A job to store.")
class EnqueueJobInput(EnqueueOptions):
    type: str = strawberry.field(description="The job type, such as `thumbnail.create`.")
    payload: JsonValue = strawberry.field(
        description="An object that is valid by the `payloadSchema` of the job type."
    )

    def request(self) -> EnqueueRequest:
        return self.request_for(self.type, self.payload)


@built_directly
@strawberry.input(name="JobFilter", description="Which jobs to list. All fields must match.")
class JobFilterInput:
    types: list[str] | None = strawberry.field(
        default=None,
        description="Jobs of these types: none if the list is empty. Defaults to all types.",
    )
    statuses: list[JobStatus] | None = strawberry.field(
        default=None,
        description="Jobs with one of these statuses: none if the list is empty. Defaults to all"
        " statuses.",
    )
    created_by: str | None = strawberry.field(
        default=None, description="Jobs that this caller enqueued: the `sub` of its token."
    )
    created_after: TimeText | None = strawberry.field(
        default=None, description="Jobs that were stored at this time or later."
    )
    created_before: TimeText | None = strawberry.field(
        default=None, description="Jobs that were stored before this time."
    )
    finished_after: TimeText | None = strawberry.field(
        default=None,
        description="Jobs that ended at this time or later. A page of a wide range of time"
        " may stop early: see `pageInfo.stoppedEarly`.",
    )
    finished_before: TimeText | None = strawberry.field(
        default=None, description="Jobs that ended before this time."
    )
    idempotency_key: str | None = strawberry.field(
        default=None, description="Jobs with this idempotency key: at most one of each type."
    )
    error_code: str | None = strawberry.field(
        default=None, description="Jobs whose latest attempt failed with this code."
    )
    search: str | None = strawberry.field(
        default=None,
        description="Jobs with this id or this idempotency key, and failed jobs with all of these"
        " words in the code or the message of the error. The newest 10,000 failed jobs are"
        " searched for words; with `createdBy`, or with the scope `jobs:own` alone, the failed ones"
        " among the newest 10,000 jobs of that caller.",
    )

    def filter(self) -> JobFilter:
        statuses = self.statuses
        return JobFilter(
            types=None if self.types is None else tuple(self.types),
            statuses=None
            if statuses is None
            else tuple(models.JobStatus[each.name] for each in statuses),
            created_by=self.created_by,
            created_after=_time_of(self.created_after),
            created_before=_time_of(self.created_before),
            finished_after=_time_of(self.finished_after),
            finished_before=_time_of(self.finished_before),
            idempotency_key=self.idempotency_key,
            error_code=self.error_code,
            search=self.search,
        )


@built_directly
@strawberry.input(description="A payload of a job type that a worker can read.")
class TypeFingerprintInput:
    type: str = strawberry.field(description="The job type, one of `jobTypes`.")
    fingerprint: str = strawberry.field(
        description="A fingerprint of the type: one of its `readableFingerprints`, or an older one."
    )


@built_directly
@strawberry.input(description="Which jobs to lease, and for which worker.")
class LeaseJobsInput:
    job_types: list[str] = strawberry.field(description="The job types the worker can run.")
    worker_id: str = strawberry.field(
        description="The worker's name in attempts and logs, 1 to 255 characters."
    )
    limit: int = strawberry.field(default=1, description="The most jobs to lease, 1 to 100.")
    wait_seconds: int = strawberry.field(
        default=0, description="How long to wait while no job is due, 0 to 30 seconds."
    )
    fingerprints: list[TypeFingerprintInput] | None = strawberry.field(
        default=None,
        description="The payloads that the worker can read. For each job type that is named here,"
        " only jobs that were admitted under one of its fingerprints are leased. The others stay"
        " for other workers. A type may be named several times. For types that are not named, all"
        " jobs are leased, except parked ones.",
    )

    def readable(self) -> dict[str, list[str]]:
        """Return the fingerprints that the worker can read, by job type."""
        readable: dict[str, list[str]] = {}
        for each in self.fingerprints or ():
            readable.setdefault(each.type, []).append(each.fingerprint)
        return readable


@built_directly
@strawberry.input(description="A line that a remote worker's handler logged.")
class JobLogLineInput:
    message: str = strawberry.field(
        description="What happened, usually a short name: 1 to 1,000 characters."
    )
    seconds: float = strawberry.field(
        description="When it was logged, counted from the start of the attempt."
    )
    level: JobLogLevel = strawberry.field(
        default=JobLogLevel.INFO, description="How important it is."
    )
    data: JsonValue | None = strawberry.field(
        default=None,
        description="The named values of the line: an object of at most 20 texts of up to 200"
        " characters, numbers, truth values and nulls.",
    )

    def line(self) -> LogLine:
        """Return the line as the queue stores it."""
        return LogLine(LogLevel[self.level.name], self.message, self.seconds, self.data)


@built_directly
@strawberry.input(description="Why an attempt failed.")
class JobErrorInput:
    message: str = strawberry.field(description="A sentence for people.")
    code: str = strawberry.field(
        default="worker_failed",
        description="A stable code for programs, in snake_case: 1 to 255 characters.",
    )
    details: JsonValue | None = strawberry.field(
        default=None, description="More about the error, as any JSON."
    )

    def error(self) -> JobError:
        """Return the error as the queue stores it."""
        return JobError(self.code, self.message, self.details)
