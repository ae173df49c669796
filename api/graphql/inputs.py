"""What clients give: the inputs of queries and mutations."""

from __future__ import annotations

import strawberry

from job_registry_api.graphql.scalars import JSON, DateTime
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.requests import EnqueueRequest


def optional(text: str) -> object:
    """A field that may be left out, with its description."""
    return strawberry.field(default=None, description=text)


@strawberry.input(description="How a job is stored and run. What is left out is as usual.")
class EnqueueOptions:
    priority: int | None = optional(  # type: ignore[assignment]
        "0 to 100, 50 unless given. Of due jobs the higher ones go first; when workers are swamped,"
        " the lower ones may wait for long."
    )
    schedule_at: DateTime | None = optional(  # type: ignore[assignment]
        "Not to run before this time. In the past, or left out: at once."
    )
    max_attempts: int | None = optional(  # type: ignore[assignment]
        "How often the job runs at most, 1 to 1000. Left out: the type's policy decides."
    )
    idempotency_key: str | None = optional(  # type: ignore[assignment]
        "1 to 255 characters, unique per job type for as long as the job is kept. A second call"
        " with the same key and payload gives back the first job and stores none: safe to repeat."
    )

    def request_of(self, job_type: str, payload: object) -> EnqueueRequest:
        """A job with these options, as the queue takes it."""
        return EnqueueRequest(
            type=job_type,
            payload=payload,
            priority=self.priority,
            schedule_at=self.schedule_at,
            max_attempts=self.max_attempts,
            idempotency_key=self.idempotency_key,
        )


@strawberry.input(description="A job to store.")
class EnqueueJobInput(EnqueueOptions):
    type: str = strawberry.field(description="The job type, such as `thumbnail.create`.")
    payload: JSON = strawberry.field(
        description="An object as the type's `payloadSchema` asks for it."
    )

    def request(self) -> EnqueueRequest:
        """The job as the queue takes it."""
        return self.request_of(self.type, self.payload)


@strawberry.input(description="Which jobs to list.")
class JobFilter:
    types: list[str] | None = optional("Jobs of these types; all unless given.")  # type: ignore[assignment]
    statuses: list[JobStatus] | None = optional(  # type: ignore[assignment]
        "Jobs with one of these statuses; all unless given."
    )


@strawberry.input(description="What a worker asks for.")
class LeaseJobsInput:
    job_types: list[str] = strawberry.field(description="The job types the worker can do.")
    worker_id: str = strawberry.field(
        description="Names the worker in attempts and logs, 1 to 255 characters."
    )
    limit: int = strawberry.field(default=1, description="How many jobs at most, 1 to 100.")
    wait_seconds: int = strawberry.field(
        default=0,
        description="When no job is due: how long to wait for one, 0 to 30 seconds.",
    )


@strawberry.input(description="Why an attempt failed.")
class JobErrorInput:
    message: str = strawberry.field(description="A sentence for people.")
    code: str = strawberry.field(
        default="worker_failed", description="A stable code for programs, in snake_case."
    )
    details: JSON | None = optional("More about it, any JSON.")  # type: ignore[assignment]

    def error(self) -> JobError:
        return JobError(self.code, self.message, self.details)  # type: ignore[arg-type]
