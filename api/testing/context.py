"""A `JobContext` for calling a handler directly, without a queue."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import JsonValue
from pydantic_core import from_json, to_jsonable_python
from uuid_utils.compat import uuid7

from job_registry import EnqueueRequest, JobContext, JobPolicy, JobType, Payload
from job_registry.context import State
from job_registry.json_values import json_document
from job_registry.payload import document_of
from job_registry.registry import DEFAULT_MAX_PAYLOAD_BYTES
from job_registry_api.queue.errors import InputInvalid
from job_registry_api.queue.requests import input_faults


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A job that a handler enqueued with `job.enqueue`: its payload, its options and its id."""

    payload: Payload
    job_type: str | None = None
    priority: int | None = None
    schedule_at: datetime | None = None
    max_attempts: int | None = None
    idempotency_key: str | None = None
    id: str = field(default_factory=lambda: str(uuid7()), compare=False)


@dataclass(frozen=True)
class TestContext(JobContext):
    """A `JobContext` that records what the handler does. Create it with `job_context`.

    `progress_reports` are the values of `job.progress`, as JSON, and `enqueued` the jobs of
    `job.enqueue`, both in order.
    """

    __test__: ClassVar[bool] = False  # For pytest: this is not a test.

    progress_reports: list[JsonValue] = field(default_factory=list)
    enqueued: list[FollowUp] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def request_cancel(self) -> None:
        """Make `job.cancel_requested` true. Thread-safe."""
        self._stop.set()


def job_context(
    job_type: JobType[Any] | None = None,
    *,
    attempt: int = 1,
    max_attempts: int | None = None,
    timeout_seconds: float | None = None,
    state: Mapping[str, Any] | None = None,
    assets: str | Path | None = None,
    created_by: str | None = None,
) -> TestContext:
    """Return a context for calling a handler: `await send(job_context(), MailSend(to="…"))`.

    With a job type, its name and its policy are those of the context. `state` has the attributes of
    `job.state`. `assets` defaults to an empty folder, which is deleted with the context.

    `job.progress` raises TypeError for a value that is not JSON, where a worker logs a warning.
    """
    policy = JobPolicy() if job_type is None else job_type.policy
    timeout = policy.timeout_seconds if timeout_seconds is None else timeout_seconds
    folder = tempfile.mkdtemp(prefix="job-assets-") if assets is None else str(assets)
    stop = threading.Event()
    reports: list[JsonValue] = []
    enqueued: list[FollowUp] = []
    name = "test.job" if job_type is None else job_type.name

    def report(value: JsonValue) -> None:
        try:
            converted = to_jsonable_python(value, by_alias=True)
        except Exception as error:
            from job_registry_api.worker.results import why_not_json

            reason = why_not_json(value, error)
            raise TypeError(f"the progress cannot be stored: {reason}") from error
        text, faults = json_document(converted, max_bytes=DEFAULT_MAX_PAYLOAD_BYTES)
        if faults:
            place = faults[0].path or "/"
            raise TypeError(f"the progress cannot be stored: {place}: {faults[0].message}")
        reports.append(from_json(text))

    def enqueue(payload: Payload, **options: Any) -> str:
        request = EnqueueRequest(options["job_type"] or "", document_of(payload), **_rest(options))
        if faults := tuple(input_faults(request)):
            raise InputInvalid(faults)
        enqueued.append(FollowUp(payload, **options))
        return enqueued[-1].id

    context = TestContext(
        id=str(uuid7()),
        type=name,
        attempt=attempt,
        max_attempts=max(attempt, policy.max_attempts if max_attempts is None else max_attempts),
        timeout_seconds=timeout,
        assets=folder,
        created_by=created_by,
        state=State(**(state or {})),
        progress_reports=reports,
        enqueued=enqueued,
        _report=report,
        _enqueue=enqueue,
        _cancelled=stop.is_set,
        _deadline=time.monotonic() + timeout,
        _stop=stop,
    )
    if assets is None:
        weakref.finalize(context, shutil.rmtree, folder, ignore_errors=True)
    return context


def _rest(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "job_type"}
