"""What the queue refuses, and why. Data in fields; each door makes its own words of it.

The registry's own refusals, `JobTypeNotFound` and `PayloadInvalid`, stand in `job_registry.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from job_registry import Violation

if TYPE_CHECKING:
    from job_registry_api.queue.models import JobRecord, JobStatus


class QueueError(Exception):
    """Base of everything the queue refuses."""


class InputInvalid(QueueError):
    """Raised when a value beside the payload is out of its range, `/priority` for instance.

    `violations` names every fault. When the payload is faulty as well, its faults are here too,
    below `/payload`, so that a caller learns all of them at once.
    """

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{v.path}: {v.message}" for v in violations))


class IdempotencyConflict(QueueError):
    """Raised when an idempotency key of this job type belongs to a job with another payload.

    `differing_paths` are JSON Pointers into the payloads, where the two differ.
    """

    def __init__(self, existing_job: JobRecord, differing_paths: tuple[str, ...]) -> None:
        self.existing_job = existing_job
        self.differing_paths = differing_paths
        super().__init__(
            f"This idempotency key belongs to job {existing_job.id}, whose payload differs at "
            + ", ".join(path or "the whole" for path in differing_paths)
            + "."
        )


class JobNotFound(QueueError):
    """Raised when no job has this id: it never existed, or it was pruned."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(f"There is no job {job_id[:100]}.")


class JobStateConflict(QueueError):
    """Raised when a job's status does not admit what was asked: cancelling a finished one, say."""

    def __init__(self, job_id: str, status: JobStatus, asked: str) -> None:
        self.job_id = job_id
        self.status = status
        self.asked = asked
        super().__init__(f"Job {job_id} is {status.value} and cannot be {asked}.")


class LeaseLost(QueueError):
    """Raised when a lease token is not, or no longer, the one of a running job.

    The worker that gets it has nothing to report any more: another attempt may be under way.
    """

    def __init__(self) -> None:
        super().__init__(
            "This lease is not in force: it expired, was ended, or its job was leased again."
        )


class EventsMissed(QueueError):
    """Raised when a subscriber cannot be told of everything any more, and why.

    It reads the jobs it is interested in, and subscribes again.
    """

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

    def __init__(self, reason: str, kind: UnavailableKind = "unreachable") -> None:
        self.reason = reason
        self.kind: UnavailableKind = kind
        super().__init__("The queue's database is not available. Try again.")


def reason_of(error: Exception) -> str:
    """Return why a call to the database failed, for a log line. It quotes no value."""
    match error:
        case QueueUnavailable():
            return error.reason
        case TimeoutError():
            return "no answer in time"
    return type(error).__name__
