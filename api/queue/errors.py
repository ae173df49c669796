"""What the queue refuses, and why. Each exception has its code and its details.

`JobTypeNotFound` and `PayloadInvalid`, the registry's own, stand in `job_registry.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from job_registry import CodedError, Violation
from job_registry.errors import counted_faults

if TYPE_CHECKING:
    from job_registry_api.queue.models import JobRecord, JobStatus


class QueueError(CodedError):
    """Base of everything the queue refuses."""


class InputInvalid(QueueError):
    """Raised when a value beside the payload is out of its range, `/priority` for instance.

    `violations` names every fault. When the payload is faulty as well, its faults are here too,
    below `/payload`, so that a caller learns all of them at once.
    """

    code = "validation_error"

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{v.path}: {v.message}" for v in violations))

    def details(self) -> dict[str, JsonValue]:
        """Return the violations."""
        return {"violations": [v.as_json() for v in self.violations]}

    @property
    def summary(self) -> str:
        """How many faults there are."""
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
        """Return the id of the job that has the key, and where the payloads differ."""
        return {
            "existingJobId": str(self.existing_job.id),
            "differingPaths": list(self.differing_paths),
        }

    @property
    def summary(self) -> str:
        """What is in conflict."""
        return "This idempotency key belongs to a job with another payload."


class JobNotFound(QueueError):
    """Raised when no job has this id: it never existed, or it was pruned."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"There is no job {job_id[:100]}.")

    def details(self) -> dict[str, JsonValue]:
        """Return the id, up to 200 characters of it."""
        return {"jobId": self.job_id[:200]}


class JobStateConflict(QueueError):
    """Raised when a job's status does not allow an operation, such as cancelling a finished job."""

    code = "job_state_conflict"

    def __init__(self, job_id: str, status: JobStatus, asked: str) -> None:
        self.job_id = job_id
        self.status = status
        self.asked = asked
        super().__init__(f"Job {job_id} is {status.value} and cannot be {asked}.")

    def details(self) -> dict[str, JsonValue]:
        """Return the job's id and its status."""
        return {"jobId": self.job_id, "status": self.status.value}


class LeaseLost(QueueError):
    """Raised when a lease token is not, or no longer, the one of a running job.

    The worker that gets it has nothing to report any more: another attempt may be under way.
    """

    code = "lease_lost"

    def __init__(self) -> None:
        super().__init__(
            "This lease is not in force: it expired, was ended, or its job was leased again."
        )


class EventsMissed(QueueError):
    """Raised when a subscriber cannot be told of everything any more, and why.

    It reads the jobs it is interested in, and subscribes again.
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
    "read_only",
    "file_missing",
    "schema_outdated",
    "permission_denied",
]
"""What is wrong with the database, as far as anyone may know."""


class QueueUnavailable(QueueError):
    """Raised when the database does not answer or cannot write: nothing was answered as stored.

    `reason` is for the log; it may name hosts and files, so no client sees it. `kind` may be shown.
    """

    code = "queue_unavailable"

    def __init__(self, reason: str, kind: UnavailableKind = "unreachable") -> None:
        self.reason = reason
        self.kind: UnavailableKind = kind
        super().__init__("The queue's database is not available. Try again.")

    def details(self) -> dict[str, JsonValue]:
        """Return the kind of failure."""
        return {"kind": self.kind}


def reason_of(error: Exception) -> str:
    """Return why a call to the database failed, for a log line. It quotes no value."""
    match error:
        case QueueUnavailable():
            return error.reason
        case TimeoutError():
            return "no answer in time"
    return type(error).__name__
