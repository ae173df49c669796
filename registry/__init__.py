"""What a job type is: its payload, its policy, its handler. No I/O, no SQL, no GraphQL."""

from job_registry.context import JobContext
from job_registry.enqueue_request import EnqueueRequest
from job_registry.errors import (
    Cancel,
    CodedError,
    DefinitionError,
    Fail,
    JobTypeNotFound,
    PayloadInvalid,
    Retry,
    Snooze,
    Violation,
)
from job_registry.extension import CallNext, WorkerExtension
from job_registry.job_type import JobType
from job_registry.payload import Payload
from job_registry.policy import Backoff, JobPolicy
from job_registry.registry import AdmittedPayload, JobRegistry

__all__ = [
    "AdmittedPayload",
    "Backoff",
    "CallNext",
    "Cancel",
    "CodedError",
    "DefinitionError",
    "EnqueueRequest",
    "Fail",
    "JobContext",
    "JobPolicy",
    "JobRegistry",
    "JobType",
    "JobTypeNotFound",
    "Payload",
    "PayloadInvalid",
    "Retry",
    "Snooze",
    "Violation",
    "WorkerExtension",
]
