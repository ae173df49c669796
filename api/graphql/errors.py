"""The refusals clients see, and the one place that makes them of the queue's exceptions."""

from __future__ import annotations

from typing import Any, Final

import strawberry

import job_registry
from job_registry_api.graphql.types import Job, described
from job_registry_api.queue import errors as queue
from job_registry_api.queue.models import JobStatus

CODE = "A stable code in snake_case, to branch on."
MESSAGE = "A sentence for people. It may change."


@strawberry.interface(description="What every refusal has.")
class Error:
    code: str = described(CODE)
    message: str = described(MESSAGE)


@strawberry.type(description="One fault of a value.")
class Violation:
    path: str = described(
        'Where: a JSON Pointer (RFC 6901) into the value, `/sizes/1`; "" is the whole value.'
    )
    code: str = described("Which fault: a stable code, such as `required` or `wrong_type`.")
    message: str = described("What was expected, and what came.")


@strawberry.type(description="There is no job type of this name.")
class JobTypeNotFound(Error):
    job_type: str = described("The name that was given.")
    suggestions: list[str] = described("The nearest names there are, best first.")


@strawberry.type(description="The payload is not what the job type asks for. Nothing was stored.")
class PayloadInvalid(Error):
    job_type: str = described("The job type.")
    violations: list[Violation] = described(
        "Every fault of the payload, with paths into the payload."
    )


@strawberry.type(
    description="A value beside the payload is missing or out of its range. Nothing was stored."
)
class InputInvalid(Error):
    violations: list[Violation] = described(
        "Every fault, with paths into the input; those of the payload start with `/payload`."
    )


@strawberry.type(
    description="The idempotency key belongs to a job of this type with another payload."
)
class IdempotencyConflict(Error):
    existing_job: Job = described("The job that has the key.")
    differing_paths: list[str] = described(
        "JSON Pointers to where the two payloads differ, up to 100."
    )


@strawberry.type(description="No job has this id: it never existed, or it was deleted.")
class JobNotFound(Error):
    job_id: strawberry.ID = described("The id that was given.")


@strawberry.type(description="The job's status does not admit this.")
class JobStateConflict(Error):
    job_id: strawberry.ID = described("The job.")
    status: JobStatus = described("The status it has.")


@strawberry.type(
    description="The lease is not in force: it expired, was ended, or the job was leased again."
    " The worker drops the job and reports nothing more."
)
class LeaseLost(Error):
    pass


REFUSALS: Final = (
    job_registry.JobTypeNotFound,
    job_registry.PayloadInvalid,
    queue.InputInvalid,
    queue.IdempotencyConflict,
    queue.JobNotFound,
    queue.JobStateConflict,
    queue.LeaseLost,
)
"""What a resolver catches to give it as data. Anything else is an error of the request."""


def refusal(error: Exception) -> Any:
    """The GraphQL object of one of `REFUSALS`."""
    if not isinstance(error, job_registry.CodedError):
        raise error
    message = error.summary
    match error:
        case job_registry.JobTypeNotFound():
            return JobTypeNotFound(
                code=error.code,
                message=message,
                job_type=error.job_type[:200],
                suggestions=list(error.suggestions),
            )
        case job_registry.PayloadInvalid():
            return PayloadInvalid(
                code=error.code,
                message=message,
                job_type=error.job_type,
                violations=_violations(error.violations),
            )
        case queue.InputInvalid():
            return InputInvalid(
                code=error.code,
                message=message,
                violations=_violations(error.violations),
            )
        case queue.IdempotencyConflict():
            return IdempotencyConflict(
                code=error.code,
                message=message,
                existing_job=Job.of(error.existing_job, is_foreign=True),
                differing_paths=list(error.differing_paths),
            )
        case queue.JobNotFound():
            return JobNotFound(
                code=error.code, message=message, job_id=strawberry.ID(error.job_id[:200])
            )
        case queue.JobStateConflict():
            return JobStateConflict(
                code=error.code,
                message=message,
                job_id=strawberry.ID(error.job_id),
                status=error.status,
            )
        case queue.LeaseLost():
            return LeaseLost(code=error.code, message=message)
    raise error


def _violations(violations: tuple[job_registry.Violation, ...]) -> list[Violation]:
    return [Violation(path=v.path, code=v.code, message=v.message) for v in violations]
