"""The errors that clients read as data, and how each is made from an exception.

A resolver raises. Where its union has the error's type, Strawberry's exception handlers return the
error as data; elsewhere it becomes an error of the request: see `request_errors`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import strawberry
from strawberry.types.field import StrawberryField

import job_registry
from job_registry_api.graphql.types import Job, JobStatus, Violation
from job_registry_api.queue import errors as queue


@strawberry.interface(description="The fields of every error.")
class Error:
    code: str = strawberry.field(description="A stable code in snake_case, for programs.")
    message: str = strawberry.field(description="A sentence for people. It may change.")


@strawberry.type(description="No job type has this name.")
class JobTypeNotFound(Error):
    job_type: str = strawberry.field(description="The name in the request.")
    suggestions: list[str] = strawberry.field(
        description="The names of similar job types, the most similar first."
    )

    @classmethod
    def of(cls, error: job_registry.JobTypeNotFound) -> JobTypeNotFound:
        return cls(
            code=error.code,
            message=error.summary,
            job_type=error.job_type[:200],
            suggestions=list(error.suggestions),
        )


@strawberry.type(
    description="The payload is not valid by the schema of its job type. Nothing was stored."
)
class PayloadInvalid(Error):
    job_type: str = strawberry.field(description="The job type.")
    violations: list[Violation] = strawberry.field(
        description="Every fault of the payload, with paths into the payload."
    )

    @classmethod
    def of(cls, error: job_registry.PayloadInvalid) -> PayloadInvalid:
        return cls(
            code=error.code,
            message=error.summary,
            job_type=error.job_type,
            violations=list(map(Violation.of, error.violations)),
        )


@strawberry.type(
    description="A value beside the payload is missing or out of range. Nothing was stored."
)
class InputInvalid(Error):
    violations: list[Violation] = strawberry.field(
        description="Every fault, with paths into the input. Paths of faults of the payload start"
        " with `/payload`."
    )

    @classmethod
    def of(cls, error: queue.InputInvalid) -> InputInvalid:
        return cls(
            code=error.code,
            message=error.summary,
            violations=list(map(Violation.of, error.violations)),
        )

    @classmethod
    def of_taken_key(cls, error: queue.IdempotencyKeyTaken) -> InputInvalid:
        """Return the error for a caller who may not know the job that has the key."""
        taken = Violation(path="/idempotencyKey", code=error.code, message=str(error))
        return cls(code=queue.InputInvalid.code, message=str(error), violations=[taken])


@strawberry.type(
    description="The idempotency key belongs to a job of this type with another payload. If"
    " another caller stored it, this error needs the scope `jobs:read` or `jobs:work`. Without"
    " these, the key is a fault of the input."
)
class IdempotencyConflict(Error):
    existing_job: Job = strawberry.field(description="The job that has the key.")
    differing_paths: list[str] = strawberry.field(
        description="JSON Pointers to the places where the two payloads differ, up to 100. A bulk"
        ' compares payloads of 2 MB in total. The path of further conflicts is `""`, the whole'
        " payload."
    )

    @classmethod
    def of(cls, error: queue.IdempotencyConflict) -> IdempotencyConflict:
        return cls(
            code=error.code,
            message=error.summary,
            existing_job=Job(error.existing_job),
            differing_paths=list(error.differing_paths),
        )


@strawberry.type(description="No job has this id: it never existed, or it was deleted.")
class JobNotFound(Error):
    job_id: strawberry.ID = strawberry.field(description="The id in the request.")

    @classmethod
    def of(cls, error: queue.JobNotFound) -> JobNotFound:
        return cls(
            code=error.code,
            message=error.summary,
            job_id=strawberry.ID(error.job_id[:200]),
        )


@strawberry.type(description="The job's status does not allow this.")
class JobStateConflict(Error):
    job_id: strawberry.ID = strawberry.field(description="The job.")
    status: JobStatus = strawberry.field(description="Its status.")

    @classmethod
    def of(cls, error: queue.JobStateConflict) -> JobStateConflict:
        return cls(
            code=error.code,
            message=error.summary,
            job_id=strawberry.ID(error.job_id),
            status=JobStatus[error.status.name],
        )


@strawberry.type(
    description="The lease is not in force: it expired or ended, or the job was leased again. The"
    " worker must drop the job and report nothing more."
)
class LeaseLost(Error):
    @classmethod
    def of(cls, error: queue.LeaseLost) -> LeaseLost:
        return cls(code=error.code, message=error.summary)


Raised = TypeVar("Raised", bound=Exception)
Returned = TypeVar("Returned", bound=Error)


@dataclass(frozen=True, slots=True)
class ErrorAsData(Generic[Raised, Returned]):
    """A `strawberry.ExceptionHandler`: returns exceptions of one class as GraphQL errors."""

    exception_type: type[Raised]
    error_type: type[Returned]
    of: Callable[[Raised], Returned]

    def handle(
        self, exception: Raised, *, field: StrawberryField, info: strawberry.Info
    ) -> Returned:
        return self.of(exception)


EXCEPTION_HANDLERS: Final = (
    ErrorAsData(job_registry.JobTypeNotFound, JobTypeNotFound, JobTypeNotFound.of),
    ErrorAsData(job_registry.PayloadInvalid, PayloadInvalid, PayloadInvalid.of),
    ErrorAsData(queue.InputInvalid, InputInvalid, InputInvalid.of),
    ErrorAsData(queue.IdempotencyConflict, IdempotencyConflict, IdempotencyConflict.of),
    ErrorAsData(queue.IdempotencyKeyTaken, InputInvalid, InputInvalid.of_taken_key),
    ErrorAsData(queue.JobNotFound, JobNotFound, JobNotFound.of),
    ErrorAsData(queue.JobStateConflict, JobStateConflict, JobStateConflict.of),
    ErrorAsData(queue.LeaseLost, LeaseLost, LeaseLost.of),
)
