"""The exceptions of the queue. Each has a code and details.

`JobTypeNotFound` and `PayloadInvalid` are in `job_registry.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from job_registry import CodedError, Violation
from job_registry.errors import counted_faults, shortened

if TYPE_CHECKING:
    from job_registry_api.queue.models import JobRecord, JobStatus


class QueueError(CodedError):
    """Base of the exceptions of the queue."""


class InputInvalid(QueueError):
    """Raised when a value other than the payload is out of range, `/priority` for example.

    `violations` lists every fault. Faults of the payload are included, with paths that start with
    `/payload`.
    """

    code = "validation_error"

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        self.violations = violations
        super().__init__(" ".join(each.sentence() for each in violations))

    def details(self) -> dict[str, JsonValue]:
        """Return the violations."""
        return {"violations": [v.as_json() for v in self.violations]}

    @property
    def summary(self) -> str:
        """The number of faults, as a sentence."""
        return counted_faults("The request", len(self.violations))


class IdempotencyConflict(QueueError):
    """Raised when an idempotency key of this job type belongs to a job with another payload.

    `differing_paths` are JSON Pointers into the payloads, where the two differ.
    """

    code = "idempotency_conflict"

    def __init__(self, existing_job: JobRecord, differing_paths: tuple[str, ...]) -> None:
        self.existing_job = existing_job
        self.differing_paths = differing_paths
        super().__init__(
            f"This idempotency key belongs to job {existing_job.id}, whose payload differs at "
            + ", ".join(path or "the whole" for path in differing_paths)
            + "."
        )

    def details(self) -> dict[str, JsonValue]:
        """Return the id of the job with this key, and where the payloads differ."""
        return {
            "existingJobId": str(self.existing_job.id),
            "differingPaths": list(self.differing_paths),
        }

    @property
    def summary(self) -> str:
        """The conflict, without ids and paths."""
        return "This idempotency key belongs to a job with another payload."


class IdempotencyKeyTaken(QueueError):
    """Raised when an idempotency key belongs to a job that the caller may not know."""

    code = "idempotency_conflict"

    def __init__(self) -> None:
        super().__init__("This idempotency key belongs to another job of this type.")


class JobNotFound(QueueError):
    """Raised when no job has this id. It never existed, or it was deleted."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"There is no job {shortened(job_id, 100)}.")

    def details(self) -> dict[str, JsonValue]:
        """Return the id, truncated to 200 characters."""
        return {"jobId": self.job_id[:200]}


class JobStateConflict(QueueError):
    """Raised when a job's status does not allow an operation, such as cancelling a finished job."""

    code = "job_state_conflict"

    def __init__(self, job_id: str, status: JobStatus, operation: str) -> None:
        self.job_id = job_id
        self.status = status
        self.operation = operation
        super().__init__(f"Job {job_id} is {status.value} and cannot be {operation}.")

    def details(self) -> dict[str, JsonValue]:
        """Return the job's id and its status."""
        return {"jobId": self.job_id, "status": self.status.value}


class JobFailed(Exception):
    """Raised by `JobQueue.result` when the job failed or was cancelled. `job` says why."""

    def __init__(self, job: JobRecord) -> None:
        self.job = job
        status = "failed" if job.status.value == "failed" else "was cancelled"
        why = "."
        if job.error is not None:
            # `Fail` and `Cancel` without a code of their own have the status as their code.
            code = "" if job.error.code == job.status.value else f"{job.error.code}: "
            why = f": {code}{job.error.message}"
        super().__init__(f"Job {job.id} ({job.type}) {status}{why}")


class LeaseLost(QueueError):
    """Raised when a lease token does not belong to a running job, or no longer does.

    The worker must stop and report nothing: another attempt may be running.
    """

    code = "lease_lost"

    def __init__(self) -> None:
        super().__init__(
            "This lease is not in force: it expired, was ended, or its job was leased again."
        )


class EventsMissed(QueueError):
    """Raised when a subscriber may have missed events; `reason` says why.

    The subscriber should read the jobs again and subscribe again.
    """

    code = "events_missed"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"Events were missed: {reason}. Read the jobs and subscribe again.")


UnavailableKind = Literal[
    "unreachable",
    "timeout",
    "busy",
    "disk_full",
    "notify_queue_full",
    "read_only",
    "file_missing",
    "schema_outdated",
    "permission_denied",
]
"""What is wrong with the database, without details that are internal."""


class QueueUnavailable(QueueError):
    """Raised when the database does not answer or cannot write.

    `reason` is for the log. It may name hosts and files, so it is not sent to clients; `kind` is.
    When a program opens the queue, the message has the reason: a wrong name or password does not go
    away by itself.
    """

    code = "queue_unavailable"

    def __init__(
        self, reason: str, kind: UnavailableKind = "unreachable", *, when_opening: bool = False
    ) -> None:
        self.reason = reason
        self.kind: UnavailableKind = kind
        message = "The queue's database is not available"
        super().__init__(
            f"{message}: {reason.rstrip('.')}." if when_opening else f"{message}. Try again."
        )

    def for_clients(self) -> QueueUnavailable:
        """Return the error without the reason in its message."""
        return QueueUnavailable(self.reason, self.kind)

    def details(self) -> dict[str, JsonValue]:
        """Return the kind of failure."""
        return {"kind": self.kind}


def reason_of(error: Exception) -> str:
    """Return why a call to the database failed, for a log line, without quoting values."""
    match error:
        case QueueUnavailable():
            return error.reason
        case TimeoutError():
            return "no answer in time"
    return type(error).__name__
