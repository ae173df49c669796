"""The test kit for users' own tests: a queue, its clock, and a `JobContext`.

It is the one module of `job_registry` that needs the queue, and nothing here imports it.
"""

from job_registry_api.queue.models import AttemptOutcome, JobRecord, JobStatus
from job_registry_api.testing.context import FollowUp, TestContext, job_context
from job_registry_api.testing.draining import DrainedJob, DrainFailed
from job_registry_api.testing.queue import SyncTestQueue, TestQueue

__all__ = [
    "AttemptOutcome",
    "DrainFailed",
    "DrainedJob",
    "FollowUp",
    "JobRecord",
    "JobStatus",
    "SyncTestQueue",
    "TestContext",
    "TestQueue",
    "job_context",
]
