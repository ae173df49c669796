"""`JobContext`: what a handler receives beside its payload."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any, Final, Protocol

from pydantic import JsonValue

from job_registry.payload import Payload


class JobLogger(Protocol):
    """A logger that adds the job, its type and the attempt to each line.

    An event is a short name. The data of the event are named values.
    """

    def debug(self, event: str, **values: Any) -> Any:
        """Write a line for developers."""

    def info(self, event: str, **values: Any) -> Any:
        """Write a line for operators."""

    def warning(self, event: str, **values: Any) -> Any:
        """Write a line about something that needs attention."""

    def error(self, event: str, **values: Any) -> Any:
        """Write a line about a failure."""

    def critical(self, event: str, **values: Any) -> Any:
        """Write a line about a failure that needs attention at once."""

    def exception(self, event: str, **values: Any) -> Any:
        """Write a line about the exception that is being handled."""

    def bind(self, **values: Any) -> JobLogger:
        """Return a logger that adds these values to each line."""
        ...


class _PlainLogger:
    """The logger of a context outside a worker: the standard library's."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def debug(self, event: str, **values: Any) -> None:
        _plain_log.debug(_PLAIN, event, {**self._values, **values})

    def info(self, event: str, **values: Any) -> None:
        _plain_log.info(_PLAIN, event, {**self._values, **values})

    def warning(self, event: str, **values: Any) -> None:
        _plain_log.warning(_PLAIN, event, {**self._values, **values})

    def error(self, event: str, **values: Any) -> None:
        _plain_log.error(_PLAIN, event, {**self._values, **values})

    def critical(self, event: str, **values: Any) -> None:
        _plain_log.critical(_PLAIN, event, {**self._values, **values})

    def exception(self, event: str, **values: Any) -> None:
        _plain_log.exception(_PLAIN, event, {**self._values, **values})

    def bind(self, **values: Any) -> _PlainLogger:
        return _PlainLogger(**{**self._values, **values})


_plain_log: Final = logging.getLogger("job_registry.handler")
_PLAIN: Final = "%s %s"


class State(SimpleNamespace):
    """What the lifespans of a worker yield, as attributes."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"job.state has no {name}: no lifespan of this worker's extensions yields it",
            name=name,
            obj=self,
        )


class EnqueueFollowUp(Protocol):
    """Keeps a job until its handler has returned. See `JobContext.enqueue`."""

    def __call__(
        self,
        payload: Payload,
        *,
        job_type: str | None,
        priority: int | None,
        schedule_at: datetime | None,
        max_attempts: int | None,
        idempotency_key: str | None,
    ) -> str:
        """Check the job, keep it, and return its id."""


def _nowhere(payload: Payload, **_options: Any) -> str:
    raise RuntimeError(
        "this JobContext does not belong to a worker; use job_registry.testing in tests"
    )


@dataclass(frozen=True, slots=True)
class JobContext:
    """The job that a handler runs, and ways to report progress and to see a cancellation.

    `assets` is where the files of jobs are, a folder or an fsspec URL (`JOBS_ASSETS`). `state`
    has the resources that the worker's lifespan yields. `log` writes lines that name the job.
    """

    id: str
    type: str
    attempt: int
    max_attempts: int
    timeout_seconds: float
    assets: str = "assets"
    created_by: str | None = None
    state: State = field(default_factory=State)
    log: JobLogger = field(default_factory=_PlainLogger, repr=False)
    _report: Callable[[JsonValue], None] = field(default=lambda _value: None, repr=False)
    _enqueue: EnqueueFollowUp = field(default=_nowhere, repr=False)
    _cancelled: Callable[[], bool] = field(default=lambda: False, repr=False)
    _deadline: float = field(default=float("inf"), repr=False)

    def progress(self, value: JsonValue) -> None:
        """Report the progress of the job: any JSON.

        Returns at once. The worker stores the newest value about once per second, and the last
        one before the attempt ends. A value that cannot be stored is one warning in the log.
        """
        self._report(value)

    def enqueue(
        self,
        payload: Payload,
        *,
        job_type: str | None = None,
        priority: int | None = None,
        schedule_at: datetime | None = None,
        max_attempts: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Enqueue another job when this one succeeds. Return the id that it will have.

        It is stored in the transaction that completes this job: both, or neither. If this attempt
        ends in another way, the job is never stored. So an attempt that is repeated does not
        enqueue twice. The options are those of `JobQueue.enqueue`. The new job has the same
        `created_by`. If its idempotency key belongs to an earlier job with the same payload, no new
        job is stored, and none has the id.

        If the new job cannot be stored in the end, because its idempotency key belongs to a job
        with another payload, this job fails as `follow_up_refused`. With `run_in="process"`, that
        is also how the errors below appear, because the process does not know the job types.

        Raises:
            DefinitionError: the class of the payload belongs to no job type, or to several.
            PayloadInvalid: the payload is invalid.
            CodedError: an option is out of range, or there are too many jobs (`validation_error`).
            RuntimeError: the handler has ended, and one of its tasks or threads calls this.
        """
        return self._enqueue(
            payload,
            job_type=job_type,
            priority=priority,
            schedule_at=schedule_at,
            max_attempts=max_attempts,
            idempotency_key=idempotency_key,
        )

    @property
    def cancel_requested(self) -> bool:
        """Whether to stop: the job was cancelled, or its lease is lost, or the worker stops.

        Plain functions check this now and then, and raise `Cancel`. Async handlers are cancelled
        instead.
        """
        return self._cancelled()

    @property
    def seconds_left(self) -> float:
        """Seconds until this attempt's timeout."""
        return max(0.0, self._deadline - time.monotonic())
