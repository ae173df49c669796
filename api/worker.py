"""The worker: leases due jobs, runs their handlers, reports how each attempt ended.

It holds no state that matters: whatever happens to it, the lease runs out and the job goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from pydantic import JsonValue
from pydantic_core import PydanticSerializationError, to_jsonable_python

from api.logs import log_unexpected
from api.queue.errors import InputInvalid, LeaseLost, QueueUnavailable
from api.queue.models import JobError
from api.queue.requests import MAX_LEASE, MAX_WAIT_SECONDS
from api.queue.service import JobService, Lease
from registry import Cancel, Fail, JobContext, JobType, PayloadInvalid, Retry, Snooze
from registry.errors import shortened_text

PROGRESS_SECONDS: Final = 1.0
"""How often a handler's progress is passed on at most."""

GATHER_SECONDS: Final = 0.005
"""How long a worker whose slots were all taken waits for more of them before it leases again."""

CANCEL_GRACE_SECONDS: Final = 5.0
"""How long an async handler may take to end once it was cancelled, before it is left alone."""

MAX_MESSAGE: Final = 2_000

log = structlog.get_logger("jobs.worker")


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """How a worker is: for health checks and metrics.

    `loop_blocked_seconds` is how long its loop has not turned beyond its longest wait,
    `renewals_behind_seconds` how long renewals of leases have been overdue. `overdue` counts
    handlers that go on after their attempt has ended.
    """

    loop_blocked_seconds: float
    renewals_behind_seconds: float
    running: int
    overdue: int


class Worker:
    """Runs up to `concurrency` jobs at once: async handlers as tasks, plain ones in threads.

    `types` are the job types to work, all that have a handler here unless given. `worker_id`
    names it in attempts. After `stop`, running jobs have `shutdown_seconds` to end.
    """

    def __init__(
        self,
        service: JobService,
        *,
        types: Sequence[str] | None = None,
        concurrency: int,
        assets: str,
        shutdown_seconds: float,
        worker_id: str | None = None,
    ) -> None:
        registry = service.registry
        self.types = tuple(types or (name for name in registry if registry[name].has_handler))
        self.worker_id = worker_id or _worker_id()
        self._service = service
        self._concurrency = concurrency
        self._assets = assets
        self._shutdown_seconds = shutdown_seconds
        self._stopping = asyncio.Event()
        self._stopping_now = asyncio.Event()
        self._runs: dict[asyncio.Task[None], _Run] = {}
        self._overdue: set[asyncio.Future[Any]] = set()
        self._turned_at = time.monotonic()

    @property
    def is_stopping(self) -> bool:
        """Whether it leases nothing more."""
        return self._stopping.is_set()

    @property
    def health(self) -> WorkerHealth:
        """How the worker is at this moment."""
        now = time.monotonic()
        turns = bool(self.types) and not self.is_stopping
        every = self._service.lease_seconds / 3
        unrenewed = max((now - run.renewed_at for run in self._runs.values()), default=0.0)
        return WorkerHealth(
            loop_blocked_seconds=max(0.0, now - self._turned_at - MAX_WAIT_SECONDS) if turns else 0,
            renewals_behind_seconds=max(0.0, unrenewed - every),
            running=len(self._runs),
            overdue=len(self._overdue),
        )

    def stop(self) -> None:
        """Leases nothing more, and lets running jobs end. A second call hands them back at once."""
        if self._stopping.is_set():
            self._stopping_now.set()
        self._stopping.set()

    async def run(self) -> None:
        """Works until `stop`. Outlives the database: while that is away it waits."""
        log.info("worker.started", worker_id=self.worker_id, types=list(self.types))
        pause = 0.2
        while self.types and not self._stopping.is_set():
            self._turned_at = time.monotonic()
            try:
                await self._lease_some()
                pause = 0.2
            except QueueUnavailable as error:
                log.warning("worker.waiting", reason=error.reason, seconds=pause)
                await _wait(self._stopping, pause)
                pause = min(pause * 2, 5.0)
            except Exception as error:
                log_unexpected("worker", error)
                await _wait(self._stopping, 1.0)
        await self._stopping.wait()
        await self._finish()
        log.info("worker.stopped", worker_id=self.worker_id)

    async def _lease_some(self) -> None:
        free = self._concurrency - len(self._runs)
        if free == 0:
            # Jobs of these types are worked here, though none is leased for a while.
            await self._service.show_worker(self.types)
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait(
                {stopping, *self._runs}, timeout=10, return_when=asyncio.FIRST_COMPLETED
            )
            stopping.cancel()
            # Where jobs are short, several end within a moment: one claim for all of them.
            await _wait(self._stopping, GATHER_SECONDS)
            return
        leases = await self._service.lease(
            self.types,
            self.worker_id,
            limit=min(free, MAX_LEASE),
            wait_seconds=MAX_WAIT_SECONDS,
            stop=self._stopping,
        )
        for lease in leases:
            run = _Run(self._service, lease, self._assets, self._overdue)
            task = asyncio.create_task(run.run(), name=f"job {lease.job.id}")
            self._runs[task] = run
            task.add_done_callback(self._runs.pop)

    async def _finish(self) -> None:
        if self._runs:
            log.info("worker.finishing", worker_id=self.worker_id, jobs=len(self._runs))
            now = asyncio.create_task(self._stopping_now.wait())
            until = time.monotonic() + self._shutdown_seconds
            while self._runs and not now.done() and (left := until - time.monotonic()) > 0:
                await asyncio.wait(
                    {now, *self._runs}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
            now.cancel()
            for run in list(self._runs.values()):
                run.hand_back()
            if self._runs:
                await asyncio.wait(list(self._runs), timeout=CANCEL_GRACE_SECONDS + 5)


class _Run:
    """One attempt, from its lease to its report."""

    def __init__(
        self, service: JobService, lease: Lease, assets: str, overdue: set[asyncio.Future[Any]]
    ) -> None:
        self._service = service
        self._overdue = overdue
        self._token = lease.token
        self._job = lease.job
        # The database counts from the lease, so it is ahead of this by the way of the answer;
        # what it has given up by then, it refuses.
        self._deadline = time.monotonic() + lease.job.timeout_seconds
        # What is not sent yet, at most one. Only the loop's thread touches it.
        self._progress: list[JsonValue] = []
        self._progressed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._asked_to_stop = asyncio.Event()
        self._handing_back = False
        self._ended = asyncio.Event()
        self._lost = False
        self.renewed_at = time.monotonic()
        self._handler: asyncio.Future[Any] | None = None
        self._is_async = False
        self._context = JobContext(
            id=str(lease.job.id),
            type=lease.job.type,
            attempt=lease.job.attempt,
            max_attempts=lease.job.max_attempts,
            timeout_seconds=lease.job.timeout_seconds,
            assets=assets,
            created_by=lease.job.created_by,
            _report=self._take_progress,
            _cancelled=self._asked_to_stop.is_set,
            _deadline=self._deadline,
        )
        self._log = log.bind(
            job_id=self._context.id, type=self._context.type, attempt=self._context.attempt
        )

    def hand_back(self) -> None:
        """Ends the attempt without spending it: the process shuts down."""
        self._handing_back = True
        self._ask_to_stop()

    async def run(self) -> None:
        """Runs the attempt and reports it. Raises nothing."""
        try:
            await self._attempt()
        except LeaseLost:
            self._log.warning("job.lease_lost")
        except QueueUnavailable as error:
            self._log.warning("job.not_reported", reason=error.reason)
        except Exception as error:
            log_unexpected("worker", error)

    async def _attempt(self) -> None:
        registered: JobType[Any] = self._service.registry.get_type(self._job.type)
        try:
            payload = self._service.registry.admit(registered.name, self._job.payload).payload
        except PayloadInvalid as invalid:
            await self._refuse(invalid)
            return
        function = registered.run
        if function is None:
            await self._report(lambda: self._service.release(self._token))
            return
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  (an object whose call is async)
        )
        if self._is_async:
            self._handler = asyncio.create_task(_guarded(function(self._context, payload)))
        else:
            self._handler = _in_thread(function, self._context, payload)
        if self._handing_back:
            self._ask_to_stop()
        heartbeat = asyncio.create_task(self._keep_lease())
        try:
            await self._wait_for(self._handler)
        finally:
            # Not cancelled: it may be in the middle of a statement, and it has the last progress.
            self._ended.set()
            self._progressed.set()
            await heartbeat
        if self._handler.done() and not self._lost:
            await self._report_end(self._handler)
        else:
            await self._report_unended(self._handler)

    async def _wait_for(self, handler: asyncio.Future[Any]) -> None:
        """Returns when the handler has ended, or is not to be waited for any longer."""
        asked = asyncio.create_task(self._asked_to_stop.wait())
        left = self._deadline - time.monotonic()
        await asyncio.wait({handler, asked}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if handler.done() or not self._asked_to_stop.is_set():
            return
        if self._is_async:
            await asyncio.wait({handler}, timeout=CANCEL_GRACE_SECONDS)
        elif not (self._lost or self._handing_back):
            # Cancelled: a handler in a thread looks for that by itself, or runs to its end.
            left = self._deadline - time.monotonic()
            await asyncio.wait({handler}, timeout=max(0.0, left))

    async def _report_end(self, handler: asyncio.Future[Any]) -> None:
        """Reports what became of a handler that ended."""
        raised = asyncio.CancelledError() if handler.cancelled() else handler.exception()
        match raised:
            case None:
                await self._complete(handler.result())
            case Snooze(seconds=seconds):
                await self._report(lambda: self._service.snooze(self._token, seconds))
            case Retry(after=after):
                await self._fail("retry", _words(raised), after=after)
            case Fail():
                message = _words(raised) or "The handler gave the job up."
                await self._fail("failed", message, retryable=False)
            case _ if self._handing_back:
                # It was asked to stop, and did, by whatever exception.
                await self._report(lambda: self._service.release(self._token))
            case Cancel():
                await self._stop(_words(raised) or "The handler cancelled the job.")
            case asyncio.CancelledError() if self._asked_to_stop.is_set():
                await self._stop("The job was cancelled while it ran.")
            case _:
                # Also a handler that was cancelled by its own doing: nobody asked for that. What
                # the exception says is kept with the job.
                self._log.warning("job.attempt_failed", exc_info=raised)
                words = [type(raised).__name__, _words(raised)]
                await self._fail("handler_failed", ": ".join(filter(None, words)))

    async def _report_unended(self, handler: asyncio.Future[Any]) -> None:
        """Reports an attempt whose handler goes on: it is left alone, whatever comes of it."""
        handler.add_done_callback(_consume)
        if not self._handing_back:
            self._overdue.add(handler)
            handler.add_done_callback(self._overdue.discard)
        if self._lost:
            raise LeaseLost
        if self._handing_back:
            await self._report(lambda: self._service.release(self._token))
            return
        if time.monotonic() < self._deadline:
            await self._stop("The job was cancelled; its handler did not stop.")
            return
        self._ask_to_stop()
        self._log.warning("job.timed_out", timeout_seconds=self._job.timeout_seconds)
        await self._report(lambda: self._service.time_out(self._token))

    async def _complete(self, result: Any) -> None:
        try:
            value = to_jsonable_python(result, by_alias=True)
            await self._report(lambda: self._service.complete(self._token, value))
        except (PydanticSerializationError, ValueError) as error:
            message = f"The handler's result is no JSON: {error}"
            await self._fail("result_invalid", message, retryable=False)
        except InputInvalid as invalid:
            message = f"The handler's result cannot be stored: {invalid}"
            await self._fail("result_invalid", message, retryable=False)

    async def _refuse(self, invalid: PayloadInvalid) -> None:
        """The payload was admitted under an older schema, and today's refuses it."""
        error = JobError(
            "payload_invalid",
            "The stored payload is not what the job type asks for today.",
            [{"path": v.path, "code": v.code, "message": v.message} for v in invalid.violations],
        )
        await self._report(
            lambda: self._service.fail(self._token, error, retryable=False, spend_attempt=False)
        )

    async def _fail(
        self, code: str, message: str, *, retryable: bool = True, after: float | None = None
    ) -> None:
        error = JobError(code, _storable(message))
        await self._report(
            lambda: self._service.fail(
                self._token, error, retryable=retryable, retry_after_seconds=after
            )
        )

    async def _stop(self, message: str) -> None:
        error = JobError("cancelled", _storable(message))
        await self._report(lambda: self._service.stop(self._token, error))

    async def _report(self, report: Callable[[], Awaitable[Any]]) -> None:
        """Reports, again and again while the database is away and the lease may still hold."""
        pause = 0.1
        give_up = time.monotonic() + self._service.lease_seconds
        while True:
            try:
                await report()
                return
            except QueueUnavailable:
                if time.monotonic() + pause > give_up:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)

    async def _keep_lease(self) -> None:
        """Renews the lease, passes progress on, and hears of a cancellation."""
        every = self._service.lease_seconds / 3
        holds_until = time.monotonic() + self._service.lease_seconds
        while True:
            await _wait(self._progressed, every)
            if self._ended.is_set() and not self._progress:
                return
            self._progressed.clear()
            progress = self._progress.pop() if self._progress else None
            asked = time.monotonic()
            try:
                heartbeat = await self._service.heartbeat(self._token, progress)
            except LeaseLost:
                self._lose()
                return
            except InputInvalid as invalid:
                codes = sorted({violation.code for violation in invalid.violations})
                self._log.warning("job.progress_refused", reason=", ".join(codes))
                continue
            except QueueUnavailable:
                self._service.metrics.lease_renewal_failed()
                if self._ended.is_set():
                    return
                if time.monotonic() > holds_until:
                    self._lose()
                    return
                if progress is not None and not self._progress:
                    self._progress.append(progress)
                await _wait(self._ended, min(1.0, every))
                self._progressed.set()
                continue
            self.renewed_at = time.monotonic()
            holds_until = asked + self._service.lease_seconds
            if heartbeat.cancel_requested and not self._asked_to_stop.is_set():
                self._log.info("job.cancelling")
                self._ask_to_stop()
            await _wait(self._ended, min(PROGRESS_SECONDS, every))

    def _lose(self) -> None:
        self._lost = True
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        """Cancels an async handler; one in a thread sees it in `job.cancel_requested`."""
        self._asked_to_stop.set()
        if self._handler is not None and self._is_async:
            self._handler.cancel()

    def _take_progress(self, value: JsonValue) -> None:
        """Called by the handler, in its thread. Copies: the handler may change the value later."""
        try:
            copy = to_jsonable_python(value, by_alias=True)
        except ValueError as error:
            self._log.warning("job.progress_refused", reason=type(error).__name__)
            return
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody listens any more.
            self._loop.call_soon_threadsafe(self._keep_progress, copy)

    def _keep_progress(self, value: JsonValue) -> None:
        self._progress[:] = [value]
        self._progressed.set()


async def _guarded(work: Awaitable[Any]) -> Any:
    """A handler's `sys.exit` ends its attempt, not the worker."""
    try:
        return await work
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        raise RuntimeError(f"the handler raised {type(error).__name__}") from error


def _in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Runs a plain function in a thread of its own.

    Not in a pool: a thread cannot be ended, so one that is given up would keep its place there.
    A daemon, so that it does not keep the process alive either.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
        except BaseException as raised:
            error = RuntimeError(f"the handler raised {type(raised).__name__}")
        if isinstance(error, StopIteration):
            error = RuntimeError("the handler raised StopIteration")
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="job", daemon=True).start()
    return future


def _consume(future: asyncio.Future[Any]) -> None:
    """Looks at a result nobody waits for, so that asyncio does not complain that nobody did."""
    if not future.cancelled():
        future.exception()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _words(raised: BaseException) -> str:
    """An exception's text, which is code of the handler's too."""
    try:
        return str(raised)
    except Exception:
        return "(its text cannot be had)"


def _storable(text: str) -> str:
    """What a handler says, bounded, and without what cannot be stored."""
    clean = text[: 2 * MAX_MESSAGE].replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    return shortened_text(clean, MAX_MESSAGE)


def _worker_id() -> str:
    return f"{socket.gethostname()[:100]}:{os.getpid()}:{secrets.token_hex(3)}"
