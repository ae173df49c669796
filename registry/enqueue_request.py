"""`EnqueueRequest`: a job to enqueue, before anything about it is checked."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple, TypedDict


class EnqueueRequest(NamedTuple):
    """A job to enqueue, by the name of its type and its payload as JSON.

    None means that the caller omitted the field. `priority` is 0 to 100, higher first, 50 by
    default. `schedule_at` delays the first run. `max_attempts`, 1 to 1000, overrides the policy's.
    `idempotency_key`, 1 to 255 characters, makes a second enqueue with the same type and payload
    return the first job.

    `JobRegistry.request` makes one of a `Payload`, which type checkers can check.
    """

    type: str
    payload: object
    priority: int | None = None
    schedule_at: datetime | None = None
    max_attempts: int | None = None
    idempotency_key: str | None = None


class EnqueueOptions(TypedDict, total=False):
    """The options of a payload that is enqueued. See `JobRegistry.request`."""

    job_type: str | None
    priority: int | None
    schedule_at: datetime | None
    max_attempts: int | None
    idempotency_key: str | None
