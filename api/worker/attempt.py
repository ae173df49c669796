"""One attempt, from its lease to its report."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from pydantic_core import to_json

from job_registry import JobContext, JobType, PayloadInvalid
from job_registry.context import State
from job_registry.errors import shortened_text
from job_registry.job_type import is_async
from job_registry_api.logs import log_unexpected
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    InputInvalid,
    LeaseLost,
    QueueUnavailable,
    reason_of,
)
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.models import JobError
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import UNREPORTED_TIMEOUT
from job_registry_api.worker.alarm import Alarm
from job_registry_api.worker.follow_ups import REFUSED, FollowUps
from job_registry_api.worker.job_log import JobLog, Tail
from job_registry_api.worker.lease_keeper import Hold, LeaseKeeper
from job_registry_api.worker.log_writer import WRITE_SECONDS
from job_registry_api.worker.outcomes import (
    Circumstances,
    Complete,
    Died,
    End,
    FailAttempt,
    MemoryExceeded,
    Nothing,
    NotStarted,
    Raised,
    Release,
    Report,
    ResultRefused,
    SnoozeFor,
    StillRunning,
    Stop,
    TimeOut,
    end_of,
    how_it_died,
    outcome_of,
    raised,
    report_of,
    storable,
)
from job_registry_api.worker.processes import HandlerProcesses, ProcessCall, address_of
from job_registry_api.worker.progress import Progress
from job_registry_api.worker.running import HandlerCall
from job_registry_api.worker.watchdog import Term

if TYPE_CHECKING:
    from job_registry_api.tracing import AttemptSpan

CANCEL_GRACE_SECONDS: Final = 3.0
"""How long a cancelled handler in a process may take to end before it is killed."""

RELEASE_SECONDS: Final = 2.0
"""How long a handler may take to end when its worker stops, before its job is released."""

EARLY_SECONDS: Final = 0.1
"""How much earlier than the database the worker ends an attempt at its timeout."""

LATE_ANSWER_SECONDS: Final = 0.5
"""How late the answer to a claim may come before the worker checks how much time is left."""

LATE_SECONDS: Final = 0.02
"""How long an async handler may take to end after its timeout before it counts as overdue."""

OVERDUE_LOG_SECONDS: Final = 60.0
"""How often the log names a handler that runs on after its timeout."""

MISMATCH_LOG_SECONDS: Final = 60.0
"""How often the log names a parked job of a type."""

REPORT_SECONDS: Final = 10.0
"""How long to repeat a report after the lease may have expired. The database decides."""

AFTER_CRASH: Final = ("lost", "process_died")
"""The error codes after which the next attempt runs in a separate process."""

ISOLATED_SECONDS: Final = 5
"""The shortest timeout at which an attempt runs in a separate process because the one before timed
out unreported. The start of a process may take a second, and counts towards the timeout."""

_UNFORESEEN: Final = ("error", "stopped")

log = structlog.get_logger("job_registry.worker")


@dataclass(frozen=True, slots=True)
class Equipment:
    """The parts of a worker that all its attempts share.

    Without `processes`, handlers with `run_in="process"` run in this process, as in tests of users.
    """

    queue: JobQueue
    keeper: LeaseKeeper
    alarm: Alarm
    processes: HandlerProcesses | None
    middleware: tuple[Any, ...]
    state: State
    assets: str
    keep_log_lines: int


@dataclass(slots=True, eq=False)
class StopRequest:
    """Whether a handler is to stop. Called in any thread, it returns that."""

    is_requested: bool = False

    def __call__(self) -> bool:
        return self.is_requested


class Attempt:
    """One attempt at a leased job. `run` runs the handler and reports the end, and never raises.

    `check_at_once` renews the lease at once, because the job may already be cancelled.
    """

    def __init__(self, equipment: Equipment, lease: Lease, *, check_at_once: bool = False) -> None:
        self._check_at_once = check_at_once
        self._equipment = equipment
        self._queue = equipment.queue
        self._token = lease.token
        self._job = lease.job
        self._traceparent = lease.traceparent
        self.job_id = lease.job.id
        self._id = str(lease.job.id)
        self._registered: JobType[Any] = self._queue.registry.get_type(lease.job.type)
        self._runs_in = self._registered.runs_in
        # The database counts from the lease, which is earlier by the latency of its answer, and the
        # claims of other workers end attempts that timed out. End early, to report it first.
        self._began = time.monotonic()
        self._deadline = self._began + lease.job.timeout_seconds - EARLY_SECONDS
        self._is_late = self._began > lease.requested_at + LATE_ANSWER_SECONDS
        self._stop = StopRequest()
        self._follow_ups = FollowUps(self._queue, lease.job.created_by)
        self._hold = Hold(
            token=self._token,
            name=f"{self._job.type} {self._id}",
            on_cancel=self.cancel,
            on_lost=self._lose,
            on_out_of_touch=self._lose_touch,
            blocks_loop=self._runs_in == "loop",
            renewed_at=lease.requested_at,
            in_touch_at=lease.requested_at,
        )

    # What most attempts never change. These are defaults of the class.
    _now = Circumstances()
    _stop_by = float("inf")
    _news: asyncio.Future[None] | None = None
    _raised_at: str | None = None
    """Where the handler was when it was stopped, or raised: a traceback."""
    _call: HandlerCall | ProcessCall | None = None
    _span: AttemptSpan | None = None
    """The span of the attempt, if attempts are traced."""
    _reporting = False
    _lines: bytes | None = None
    """The log lines that are not stored yet, once the handler has ended."""
    has_ended = False
    """Whether the handler has ended, and only its report is left."""
    _ended_late = False
    """Whether the handler ended by itself after its timeout, so that its report may be refused."""
    overdue = False
    """Whether the handler runs on after its attempt has ended."""
    is_left = False
    """Whether the handler runs on although its job is released, because the worker stops."""

    @property
    def _log(self) -> Any:
        return log.bind(**self._named())

    def _named(self) -> dict[str, Any]:
        """Return what names this attempt in a log line."""
        return {"job_id": self._id, "type": self._job.type, "attempt": self._job.attempt}

    def cancel(self) -> None:
        """Stop the handler, because the job is cancelled."""
        if not self._now.cancel_requested and not self._reporting:
            self._log.info("job.cancelling")
            self._request_stop(CANCEL_GRACE_SECONDS, cancel_requested=True)

    def release(self) -> None:
        """Stop the handler and release the job, because the worker shuts down."""
        self._request_stop(RELEASE_SECONDS, releasing=True)

    async def run(self) -> None:
        """Run the attempt and report it."""
        self._equipment.keeper.hold(self._hold)
        if self._check_at_once:
            self._equipment.keeper.renew_at_once(self._token)
        try:
            if self._is_late:
                await self._correct_deadline()
            await self._attempt(self._registered)
        except LeaseLost:
            # An attempt that has timed out is logged as that; the queue may have ended it first.
            if self._ended_late:
                self._note(TimeOut(still_running=False))
                self._log_timeout(still_running=False)
            elif not self._now.timed_out:
                self._note(Nothing())
                self._log.warning("job.lease_lost")
            if self.has_ended:
                # The queue may have timed the attempt out, and does not know that it has ended.
                await self._free_place()
        except QueueUnavailable as error:
            if self._span is not None:
                self._span.failed(error.code)
            self._log.warning("job.not_reported", reason=error.reason)
        except Exception as error:
            log_unexpected("worker", error)
        finally:
            self._equipment.keeper.drop(self._token)
            if self._span is not None:
                self._span.forget()
            # They refer to this attempt: break the cycles.
            del self._hold
            self._call = None

    async def _correct_deadline(self) -> None:
        """Let the attempt time out when it does in the database. Its claim was answered late."""
        with contextlib.suppress(QueueUnavailable):
            (renewed,) = await self._queue.renew([Renewal(self._token)])
            if isinstance(renewed, LeaseLost):
                raise renewed
            deadline = time.monotonic() + renewed.seconds_left - EARLY_SECONDS
            self._deadline = min(self._deadline, deadline)

    async def _attempt(self, registered: JobType[Any]) -> None:
        if (tracing := self._queue.tracing) is not None:
            self._span = tracing.processing(
                self._id,
                self._job.type,
                attempt=self._job.attempt,
                worker_id=self._job.worker_id,
                parent=self._traceparent,
            )
        try:
            payload = registered.read(to_json(self._job.payload))
        except PayloadInvalid as invalid:
            await self._refuse(registered, invalid)
            return
        except Exception as error:
            # A validator of the job type raised something other than a validation error.
            failure = raised(error)
            self._log.warning("job.attempt_failed", exception=failure.traceback)
            await self._report(report_of(failure, self._now))
            return
        if registered.run is None:
            await self._report(Release())
            return
        call, end = await self._run(registered, payload)
        self._reporting = True
        self._ended_late = not self._now.timed_out and time.monotonic() >= self._deadline
        self._follow_ups.end()
        if not self._stop.is_requested:
            self._log_unforeseen(end)
        if self._hold.has_progress:
            await self._store_last_progress()
        self._lines = await self._equipment.keeper.logs.take(self._token)
        report = report_of(end, self._now)
        if isinstance(report, Complete) and self._follow_ups.refusal is not None:
            report = _refused(self._follow_ups.refusal)
        if isinstance(report, FailAttempt):
            if isinstance(end, ResultRefused):
                self._log.warning("job.attempt_failed", code=report.code)
            elif isinstance(end, Raised) and end.kind not in _UNFORESEEN:
                self._log.info("job.attempt_failed", code=report.code)
        self.has_ended = not isinstance(end, StillRunning)
        self.overdue = not self.has_ended and not self._now.releasing
        self.is_left = not self.has_ended and self._now.releasing
        if isinstance(end, Raised):
            self._raised_at = end.traceback
        del end
        try:
            if isinstance(report, TimeOut):
                self._log_timeout(still_running=report.still_running)
                self._equipment.keeper.keep_place(self._token)
            if self._now.lost:
                self._log.warning("job.lease_lost")
            await self._report(report)
        finally:
            if not call.ended.done() and not self._now.releasing:
                if self._span is not None:
                    self._span.end()
                await self._outlive(call)

    async def _run(
        self, registered: JobType[Any], payload: Any
    ) -> tuple[HandlerCall | ProcessCall, End]:
        """Call the handler, where it can run, and wait for its end."""
        address = self._process_address(registered)
        if address is not None:
            call: HandlerCall | ProcessCall = self._start_in_process(registered, address)
        else:
            call = self._start_here(registered, payload)
        end = await self._end_of(call)
        if isinstance(end, NotStarted) and registered.run_in != "process":
            self._log.warning("job.cannot_be_isolated")
            call = self._start_here(registered, payload)
            end = await self._end_of(call)
        if isinstance(end, Died) and end.too_late:
            self._notice_too_late()
        return call, end

    def _log_unforeseen(self, end: End) -> None:
        match end:
            case Raised() if end.kind in _UNFORESEEN:
                self._log.warning("job.attempt_failed", exception=end.traceback)
            case MemoryExceeded():
                self._log.warning("job.memory_limit_exceeded", exception=end.traceback)
            case Died():
                self._log.warning("job.process_died", reason=how_it_died(end.exit_code))

    def _log_timeout(self, *, still_running: bool) -> None:
        self._log.warning(
            "job.timed_out",
            timeout_seconds=self._job.timeout_seconds,
            still_running=still_running,
            **({"exception": self._raised_at} if self._raised_at else {}),
        )

    def _start_in_process(self, registered: JobType[Any], address: str) -> ProcessCall:
        assert self._equipment.processes is not None
        term = Term(at_most=self._deadline)
        self._equipment.keeper.limit(self._hold, term)
        return ProcessCall(
            self._equipment.processes,
            address,
            registered,
            self._facts(),
            self._job.payload,
            deadline=self._deadline,
            on_progress=self._progress_sink(),
            on_log_line=self._line_sink(),
            on_follow_up=self._follow_ups.add_from_process,
            traceparent=None if self._span is None else self._span.traceparent,
            may_start=partial(self._may_start, self._hold),
            term=term,
        )

    def _start_here(self, registered: JobType[Any], payload: Any) -> HandlerCall:
        """Start the handler in this process. It does not begin if its stop is requested already."""
        self._may_start(self._hold)
        assert registered.run is not None
        runs_in = self._runs_in
        if runs_in == "process":
            runs_in = "loop" if is_async(registered.run) else "thread"
        max_bytes = self._queue.registry.max_payload_bytes
        # Called when a line is logged: most handlers log none.
        make_logger = partial(structlog.get_logger, "job_registry.handler", **self._named())
        context = JobContext(
            **self._facts(),
            assets=self._equipment.assets,
            state=self._equipment.state,
            log=JobLog(make_logger, self._line_sink(), self._began),
            _report=Progress(self._progress_sink(), make_logger, max_bytes=max_bytes).report,
            _enqueue=self._follow_ups.add,
            _cancelled=self._stop,
            _deadline=self._deadline,
        )
        return HandlerCall(
            registered.run,
            context,
            payload,
            in_thread=runs_in == "thread",
            middleware=self._equipment.middleware,
            max_bytes=max_bytes,
        )

    def _may_start(self, hold: Hold) -> bool:
        """Return whether to start the handler. A lease that may be over requests its stop."""
        if not self._equipment.keeper.is_in_touch(hold):
            self._lose_touch()
        return not self._stop.is_requested

    def _facts(self) -> dict[str, Any]:
        """Return the fields of the `JobContext` that describe the job."""
        return {
            "id": self._id,
            "type": self._job.type,
            "attempt": self._job.attempt,
            "max_attempts": self._job.max_attempts,
            "timeout_seconds": self._job.timeout_seconds,
            "created_by": self._job.created_by,
        }

    def _progress_sink(self) -> Callable[[bytes], None]:
        # Not a method: a handler may keep its context, and with it the attempt.
        keeper, token = self._equipment.keeper, self._token
        return lambda text: keeper.progress(token, text)

    def _line_sink(self) -> Callable[[bytes], None]:
        most = self._equipment.keep_log_lines
        if most == 0:
            return lambda line: None
        logs, token, tail = self._equipment.keeper.logs, self._token, Tail(most)
        return lambda line: logs.add(token, tail, line)

    def _process_address(self, registered: JobType[Any]) -> str | None:
        """Return the address from which a process imports the handler; None to run it here.

        The attempt after a lost one runs in a separate process: the handler may have crashed the
        worker, and would cost the jobs beside it another attempt. An attempt whose timeout comes
        before the end of its lease is not lost, but times out unreported.
        """
        processes = self._equipment.processes
        if processes is None:
            return None
        if registered.run_in == "process":
            return address_of(registered)
        error = self._job.error
        if error is None:
            return None
        if error == UNREPORTED_TIMEOUT:
            if self._job.timeout_seconds < ISOLATED_SECONDS:
                return None
        elif error.code not in AFTER_CRASH:
            return None
        address = address_of(registered) if processes.can_start else None
        self._log.info("job.runs_isolated" if address else "job.cannot_be_isolated")
        return address

    async def _end_of(self, call: HandlerCall | ProcessCall) -> End:
        """Wait for the end of the handler; `StillRunning` if it does not end in time."""
        self._call = call
        if self._stop.is_requested:
            call.request_stop()
        ended = call.ended
        ended.add_done_callback(self._notice)
        while not ended.done():
            until = self._deadline
            if call.can_be_killed or self._now.releasing:
                until = min(until, self._stop_by)
            if time.monotonic() < until:
                try:
                    await self._next_news(until)
                except asyncio.CancelledError:
                    # The event loop ends, and cancels all of its tasks at once, the handler's too.
                    # A worker that shuts down cancels only what it has given up on.
                    if self._now.releasing and time.monotonic() >= self._stop_by:
                        raise
                    self.release()
            else:
                await self._give_up_on(call)
                break
        if not ended.done():
            return StillRunning()
        return end_of(ended)

    async def _next_news(self, until: float) -> None:
        """Wait until the handler has ended or must stop, at most until this time."""
        self._news = asyncio.get_running_loop().create_future()
        # Not `asyncio.timeout` around an `asyncio.Event`, which take five times the CPU.
        self._equipment.alarm.set(self._notice, until)
        try:
            await self._news
        finally:
            self._equipment.alarm.clear(self._notice)

    def _notice(self, _ended: asyncio.Task[End] | None = None) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _give_up_on(self, call: HandlerCall | ProcessCall) -> None:
        """Kill a handler that ran out of time or does not stop, or cancel it again."""
        if time.monotonic() >= self._deadline:
            self._now = replace(self._now, timed_out=True)
        self._stop.is_requested = True
        if call.can_be_killed:
            call.kill()
            await asyncio.wait({call.ended}, timeout=10)
        else:
            # Again: it may have swallowed the first cancellation.
            call.request_stop()
            await asyncio.wait({call.ended}, timeout=LATE_SECONDS)

    async def _outlive(self, call: HandlerCall | ProcessCall) -> None:
        """Wait for a handler that runs on after its attempt has ended.

        Until then it keeps its slot in this worker and its place in the concurrency limit.
        """
        since = self._deadline if self._now.timed_out else time.monotonic()
        try:
            await asyncio.wait({call.ended}, timeout=1.0)
            while not call.ended.done():
                self._log.warning(
                    "job.overdue", seconds=round(time.monotonic() - since, 1), stack=call.stack()
                )
                await asyncio.wait({call.ended}, timeout=OVERDUE_LOG_SECONDS)
        finally:
            self.overdue = False
        self._log.warning("job.overdue_ended", seconds=round(time.monotonic() - since, 1))
        if self._now.timed_out:
            await self._free_place()

    async def _free_place(self) -> None:
        """Free the place of an attempt that has timed out, because its handler has ended."""
        self._equipment.keeper.drop(self._token)
        with contextlib.suppress(Exception):
            # If this fails, the place is free when the lease has expired.
            await self._repeat(lambda: self._queue.settle([self._token]))

    async def _store_last_progress(self) -> None:
        """Store the progress that the keeper has not stored yet."""
        text = await self._equipment.keeper.take_progress(self._token)
        if text is None or self._now.lost:
            return
        try:
            async with asyncio.timeout(5):
                await self._queue.renew([Renewal(self._token, text)])
        except Exception as error:
            self._log.warning("job.progress_lost", reason=reason_of(error))

    async def _store_last_lines(self) -> None:
        """Store the log lines that no report brings along."""
        lines, self._lines = self._lines, None
        if lines is None:
            return
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._queue.store_logs([(self._token, lines)])
        except Exception as error:
            self._log.warning("job.logs_not_stored", reason=reason_of(error))

    def _note(self, report: Report) -> None:
        """Record on the span how the attempt ended."""
        if self._span is not None:
            self._span.ended_as(*outcome_of(report))

    async def _report(self, report: Report) -> None:
        self._note(report)
        queue, token = self._queue, self._token
        jobs = self._follow_ups.jobs
        if jobs or not isinstance(report, Complete):
            await self._store_last_lines()
        match report:
            case Complete(result):
                try:
                    if jobs:
                        await self._repeat(lambda: queue.complete(token, result, follow_ups=jobs))
                    else:
                        await self._repeat(
                            lambda: queue.succeed(
                                token, result, logs=self._lines, job_id=self.job_id
                            )
                        )
                except InputInvalid as invalid:
                    message = f"The handler's result cannot be stored: {invalid}"
                    await self._report(FailAttempt("result_invalid", message, retryable=False))
                except IdempotencyConflict as conflict:
                    await self._report(_refused(str(conflict)))
            case FailAttempt(code, message, retryable, after):
                await self._report_with(
                    JobError(code, storable(message)),
                    lambda error: queue.fail(
                        token, error, retryable=retryable, retry_after_seconds=after
                    ),
                )
            case Stop(message):
                await self._report_with(
                    JobError("cancelled", storable(message)),
                    lambda error: queue.stop(token, error),
                )
            case Release():
                # A lease that is over cannot be released, and the slot is needed.
                until = self._hold.in_touch_at + queue.lease_seconds
                await self._repeat(
                    lambda: queue.release(token), until if self._now.out_of_touch else None
                )
            case SnoozeFor(seconds):
                await self._repeat(lambda: queue.snooze(token, seconds))
            case TimeOut(still_running):
                seconds = self._job.timeout_seconds
                await self._repeat(
                    lambda: queue.time_out(
                        token, timeout_seconds=seconds, still_running=still_running
                    )
                )
            case Nothing():
                pass

    async def _refuse(self, registered: JobType[Any], invalid: PayloadInvalid) -> None:
        """Park or fail the job: neither the current model nor an older one fits its payload."""
        error = JobError(
            invalid.code,
            "The stored payload does not match the current schema of the job type.",
            [violation.as_json() for violation in invalid.violations],
        )
        parks = registered.policy.on_mismatch == "park"
        if self._span is not None:
            self._span.ended_as("parked" if parks else "failed", error.code)
        if parks:
            fingerprint = registered.fingerprint
            if _is_first_in_a_minute(registered.name):
                self._log.warning(
                    "job.payload_mismatch",
                    fingerprint=fingerprint,
                    admitted_under=self._job.fingerprint,
                    # Without their messages, which quote the payload.
                    violations=[
                        f"{each.path or 'payload'}: {each.code}" for each in invalid.violations[:5]
                    ],
                    exc_info=invalid.__cause__,
                )
            await self._report_with(
                error, lambda error: self._queue.park(self._token, fingerprint, error)
            )
            return
        await self._report_with(
            error,
            lambda error: self._queue.fail(
                self._token, error, retryable=False, spend_attempt=False
            ),
        )

    async def _report_with(
        self, error: JobError, send: Callable[[JobError], Awaitable[Any]]
    ) -> None:
        """Report with an error; truncate its message if the whole error is too large to store."""
        try:
            await self._repeat(lambda: send(error))
        except InputInvalid:
            short = JobError(error.code, shortened_text(error.message, 100))
            await self._repeat(lambda: send(short))

    async def _repeat(
        self, report: Callable[[], Awaitable[Any]], give_up: float | None = None
    ) -> None:
        """Send a report, and repeat it while it fails and the lease may still be in force.

        An outage, a lock or a deadlock must not lose finished work. Only the database decides that
        a report is too late.
        """
        pause, failures = 0.05, 0
        if give_up is None:
            give_up = max(time.monotonic() + self._queue.lease_seconds, self._deadline)
            give_up += REPORT_SECONDS
        while True:
            try:
                await report()
                return
            except (LeaseLost, InputInvalid, IdempotencyConflict):
                raise
            except Exception as error:
                if time.monotonic() + pause > give_up:
                    raise
                failures += 1
                if failures == 1:
                    unavailable = isinstance(error, QueueUnavailable)
                    self._log.warning(
                        "job.report_repeated",
                        reason=error.reason if isinstance(error, QueueUnavailable) else None,
                        exc_info=None if unavailable else error,
                    )
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)

    def _lose(self) -> None:
        # Within the last second, this is the timeout by the database's clock.
        if not self._reporting and time.monotonic() < self._deadline - 1.0:
            self._request_stop(CANCEL_GRACE_SECONDS, lost=True)

    def _lose_touch(self) -> None:
        if not self._reporting and not self._now.out_of_touch:
            self._log.warning("job.out_of_touch")
            self._request_stop(self._equipment.keeper.grace_seconds, out_of_touch=True)

    def _notice_too_late(self) -> None:
        """Note why the watchdog has killed the handler, while this worker did not run."""
        if time.monotonic() >= self._deadline:
            self._now = replace(self._now, timed_out=True)
        else:
            self._lose_touch()

    def _request_stop(self, grace: float, **why: bool) -> None:
        self._now = replace(self._now, **why)
        self._stop.is_requested = True
        self._stop_by = min(self._stop_by, time.monotonic() + grace)
        if self._call is not None:
            self._call.request_stop()
        self._notice()


_warned: Final[dict[str, float]] = {}
"""When a parked job of a type was last logged."""


def _is_first_in_a_minute(job_type: str) -> bool:
    """Return whether no parked job of this type was logged in the last minute."""
    now = time.monotonic()
    if now - _warned.get(job_type, -MISMATCH_LOG_SECONDS) < MISMATCH_LOG_SECONDS:
        return False
    _warned[job_type] = now
    return True


def _refused(reason: str) -> FailAttempt:
    message = f"A job that the handler enqueued cannot be stored: {reason}"
    return FailAttempt(REFUSED, message, retryable=False)
