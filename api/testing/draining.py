"""Runs the due jobs of a queue one after another, with the worker's own code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from job_registry import JobContext
from job_registry.context import State
from job_registry.extension import CallNext
from job_registry_api import defaults
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.models import AttemptOutcome, AttemptRecord, JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker.alarm import Alarm
from job_registry_api.worker.attempt import Attempt, Equipment
from job_registry_api.worker.extensions import lifespans
from job_registry_api.worker.lease_keeper import LeaseKeeper
from job_registry_api.worker.outcomes import chain_of
from job_registry_api.worker.running import tasks_of_handlers_contained

END_SECONDS: Final = 1.0
"""How long a handler may take to end after its timeout before it is left behind."""

WORKER_ID: Final = "drain"

_INTENDED_CODES: Final = ("retry", "failed")
"""The error codes of attempts whose handler raised `Retry` or `Fail`."""


class DrainFailed(AssertionError):
    """Raised by `drain` when a job failed without an exception, or when draining does not end."""


@dataclass(frozen=True, slots=True)
class DrainedJob:
    """One attempt that `drain` ran.

    `job` is the job after the attempt, and `outcome` how the attempt ended. `error` is the
    exception that the handler raised, also if it is `Retry`, `Fail`, `Cancel` or `Snooze`.
    """

    job: JobRecord
    outcome: AttemptOutcome
    error: BaseException | None = None


async def drain(
    queue: JobQueue,
    types: Sequence[str],
    *,
    assets: str,
    max_jobs: int,
    timeout: float,
    raise_errors: bool,
    skip: Callable[[], bool],
) -> list[DrainedJob]:
    """Run due jobs of these types until none is due. See `TestQueue.drain`.

    `skip` moves the clock to the next job that is due later, and returns whether there is one.
    """
    __tracebackhide__ = True
    give_up = time.monotonic() + timeout
    drained: list[DrainedJob] = []
    if not types:
        return drained
    keeper = LeaseKeeper(queue)
    async with lifespans(queue.registry.extensions) as state:
        keeper.start()
        try:
            with tasks_of_handlers_contained():
                while True:
                    leases = await queue.lease(types, WORKER_ID, limit=1)
                    if not leases:
                        if skip():
                            continue
                        return drained
                    if len(drained) == max_jobs:
                        await queue.release(leases[0].token)
                        raise DrainFailed(_endless(drained, leases[0].job))
                    run = _Run(queue, keeper, leases[0], assets, state)
                    drained.append(await run.finish(give_up, timeout))
                    if raise_errors:
                        run.raise_error()
        finally:
            await keeper.end()


class _Run:
    """One attempt, and the exception that its handler raised."""

    def __init__(
        self,
        queue: JobQueue,
        keeper: LeaseKeeper,
        lease: Lease,
        assets: str,
        state: State,
    ) -> None:
        self._queue = queue
        self._lease = lease
        self._handler: asyncio.Task[Any] | None = None
        self._raised: _RaisedError | None = None
        self._ended: AttemptRecord | None = None
        middleware = (self._watch, *(m for e in queue.registry.extensions for m in e.middleware))
        equipment = Equipment(
            queue, keeper, Alarm(), None, middleware, state, assets, defaults.KEEP_LOG_LINES
        )
        self._attempt = Attempt(equipment, lease)

    async def finish(self, give_up: float, timeout: float) -> DrainedJob:
        """Run the attempt. A handler that does not end is left behind.

        Raises:
            DrainFailed: the handler has not ended at `give_up`.
        """
        __tracebackhide__ = True
        running = asyncio.create_task(self._attempt.run())
        own_time = self._lease.job.timeout_seconds + END_SECONDS
        try:
            left = max(0.0, give_up - time.monotonic())
            await asyncio.wait({running}, timeout=min(own_time, left))
            is_late = not running.done() and time.monotonic() >= give_up
        finally:
            await self._end(running)
        if is_late:
            raise DrainFailed(
                f"drain has run for its timeout of {timeout:g} seconds, and the handler of"
                f" {_named(self._lease.job)} has not ended. It may wait for something that never"
                " comes; otherwise give drain a longer timeout."
            )
        job = await self._queue.get(self._lease.job.id)
        attempts = await self._queue.attempts([job.id])
        self._ended = attempts[job.id][-1]
        error = None if self._raised is None else self._raised.error
        return DrainedJob(job, self._ended.outcome or AttemptOutcome.LOST, error)

    async def _end(self, running: asyncio.Task[None]) -> None:
        """End an attempt whose handler has not ended in time."""
        if running.done():
            return
        self._attempt.release()
        if not self._attempt.overdue:
            await asyncio.wait({running}, timeout=END_SECONDS)
        # A thread cannot be stopped, and an event loop that is closed waits for its tasks. The
        # first cancellation ends the wait for the result, the next the wait for the thread.
        for _ in range(100):
            if self._handler is None or self._handler.done():
                break
            self._handler.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({running}, timeout=2 * END_SECONDS)
        running.cancel()

    def raise_error(self) -> None:
        """Raise what the handler raised, unless it is one of the four that end an attempt.

        Raises:
            DrainFailed: the attempt failed for another reason.
        """
        __tracebackhide__ = True
        assert self._ended is not None
        job, outcome, error = self._lease.job, self._ended.outcome, self._ended.error
        if outcome in (None, AttemptOutcome.LOST):
            raise DrainFailed(
                f"{_named(job)} lost its lease while its handler ran: the clock was advanced by"
                " more than a lease lasts."
            )
        if outcome is AttemptOutcome.TIMED_OUT and error is not None:
            raise DrainFailed(f"{_named(job)} failed as {error.code}: {error.message}")
        if outcome is AttemptOutcome.RELEASED and error is not None:
            raise DrainFailed(f"{_named(job)} was parked as {error.code}: {error.message}")
        if outcome is not AttemptOutcome.FAILED or error is None or error.code in _INTENDED_CODES:
            return
        if self._raised is None:
            raise DrainFailed(f"{_named(job)} failed as {error.code}: {error.message}")
        self._raised.error.add_note(
            f"Raised by the handler of {_named(job)} in attempt {job.attempt} of"
            f" {job.max_attempts}."
        )
        raise self._raised.restored()

    async def _watch(self, _job: JobContext, call_next: CallNext) -> Any:
        self._handler = asyncio.current_task()
        try:
            return await call_next()
        except Exception as error:
            self._raised = _RaisedError(error)
            raise


@dataclass(slots=True)
class _RaisedError:
    """An exception, and the tracebacks of its chain, which the worker removes from it."""

    error: Exception
    tracebacks: list[tuple[BaseException, TracebackType | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tracebacks = [(each, each.__traceback__) for each in chain_of(self.error)]

    def restored(self) -> Exception:
        """Return the exception with its tracebacks, in which only users' code is left."""
        for each, traceback in self.tracebacks:
            each.__traceback__ = _without_worker(traceback)
        return self.error


def _without_worker(traceback: TracebackType | None) -> TracebackType | None:
    """Return the traceback without the frames of the worker."""
    if traceback is None:
        return None
    inner = _without_worker(traceback.tb_next)
    if traceback.tb_frame.f_globals.get("__name__", "").startswith("job_registry_api."):
        return inner
    return TracebackType(inner, traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno)


def _named(job: JobRecord) -> str:
    return f"{job.type} {job.id}"


def _endless(drained: Sequence[DrainedJob], due: JobRecord) -> str:
    last = ", ".join(each.job.type for each in drained[-3:])
    again = sum(each.job.status is JobStatus.QUEUED for each in drained)
    repeated = f" {again:,} of them were attempts of jobs that are queued again." if again else ""
    return (
        f"drain has run {len(drained):,} jobs, the last ones {last}, and {_named(due)} is due."
        f"{repeated} A job that enqueues another of its own type never ends; otherwise raise"
        " max_jobs."
    )
