"""How a handler ended, and the report that follows from it: data, and one pure function."""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from pydantic import JsonValue

from job_registry import Cancel, Fail, Retry, Snooze
from job_registry.errors import shortened_text
from job_registry_api.logs import members_of, traceback_of

MAX_MESSAGE: Final = 2_000

MEMORY_LIMIT_EXCEEDED: Final = "memory_limit_exceeded"
"""The error code of an attempt whose handler reached the memory limit of its job type."""

_CRASHES: Final = tuple(
    -number
    for number in (
        signal.SIGABRT,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGFPE,
    )
)
"""The exit codes of a process that crashes by itself, for example because malloc returned NULL."""


@dataclass(frozen=True, slots=True)
class Returned:
    """The handler returned, and this is its result as JSON."""

    result: JsonValue


@dataclass(frozen=True, slots=True)
class ResultRefused:
    """The handler returned something that cannot be stored as JSON."""

    reason: str


@dataclass(frozen=True, slots=True)
class Raised:
    """The handler raised an exception. `seconds` is the argument of `Retry` or `Snooze`.

    The `kind` of a cancelled handler is "stopped". `traceback`, for the log, has no messages.
    `out_of_memory`: the exception is a MemoryError, or follows from one.
    """

    kind: Literal["error", "retry", "fail", "cancel", "snooze", "stopped"]
    name: str
    message: str
    seconds: float | None = None
    traceback: str = ""
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class MemoryExceeded:
    """The handler raised an exception because it reached the memory limit of its job type."""

    limit_mb: int
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Died:
    """The handler's process ended without a report. A negative exit code is a signal.

    `limit_mb` is the memory limit of its job type. `near_limit`: it was close to that limit.
    `too_late`: the watchdog killed it, because its worker did not run until its lease ended.
    """

    exit_code: int
    limit_mb: int | None = None
    near_limit: bool = False
    too_late: bool = False


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The handler's process could not load the handler or enter a lifespan."""

    reason: str


@dataclass(frozen=True, slots=True)
class StillRunning:
    """The handler did not end in time, and cannot be killed."""


End = Returned | ResultRefused | Raised | MemoryExceeded | Died | NotStarted | StillRunning


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What happened to the attempt while its handler ran.

    `lost`: the lease is not in force, by the answer of the database. `out_of_touch`: the lease may
    have expired, because the database has not answered for as long as a lease lasts.
    """

    timed_out: bool = False
    cancel_requested: bool = False
    releasing: bool = False
    lost: bool = False
    out_of_touch: bool = False


@dataclass(frozen=True, slots=True)
class Complete:
    """Report success."""

    result: JsonValue


@dataclass(frozen=True, slots=True)
class FailAttempt:
    """Report a failed attempt. `after` seconds replace the backoff."""

    code: str
    message: str
    retryable: bool = True
    after: float | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Release the job. Its attempt is not spent."""


@dataclass(frozen=True, slots=True)
class SnoozeFor:
    """Snooze the job. Its attempt is not spent."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Report the job as cancelled."""

    message: str


@dataclass(frozen=True, slots=True)
class TimeOut:
    """Report that the attempt timed out, and whether its handler runs on."""

    still_running: bool


@dataclass(frozen=True, slots=True)
class Nothing:
    """Report nothing: the lease is lost, or the attempt ends when the lease expires."""


Report = Complete | FailAttempt | Release | SnoozeFor | Stop | TimeOut | Nothing


def report_of(end: End, now: Circumstances) -> Report:
    """Return the report for a handler that ended like this, in these circumstances."""
    if now.lost:
        return Nothing()
    if now.timed_out:
        return TimeOut(still_running=isinstance(end, StillRunning))
    match end:
        case Returned(result):
            return Complete(result)
        case ResultRefused(reason):
            return FailAttempt("result_invalid", reason, retryable=False)
        case Raised("snooze", seconds=float() | int() as seconds):
            return SnoozeFor(seconds)
        case Raised("retry", message=message, seconds=after):
            return FailAttempt("retry", message, after=after)
        case Raised("fail", message=message):
            return FailAttempt("failed", message or "The handler raised Fail.", retryable=False)
    if now.releasing:
        # The handler was stopped, or stopped by any exception because of the request.
        return Release()
    match end:
        case Raised("cancel") if now.out_of_touch and not now.cancel_requested:
            return Release()  # It stopped because of the outage; the job is not cancelled.
        case Raised("cancel", message=message):
            return Stop(message or "The handler cancelled the job.")
        case Raised("stopped") if now.cancel_requested:
            return Stop("The job was cancelled while it ran.")
        case Died() if now.cancel_requested:
            return Stop("The job was cancelled while it ran. Its process was killed.")
        case Raised("stopped") | Died() if now.out_of_touch:
            return Release()
        case Raised(name=name, message=message):
            # This includes a handler that cancels itself.
            return FailAttempt("handler_failed", ": ".join(filter(None, (name, message))))
        case MemoryExceeded(limit_mb):
            return FailAttempt(MEMORY_LIMIT_EXCEEDED, memory_exceeded(limit_mb))
        case Died(exit_code, limit_mb=int() as limit_mb, near_limit=near) if (
            exit_code in _CRASHES or (near and exit_code > 0)
        ):
            how = how_it_died(exit_code)
            if near:
                return FailAttempt(MEMORY_LIMIT_EXCEEDED, f"{memory_exceeded(limit_mb)} {how}")
            hint = f"Its memory limit is {limit_mb} MB, and libraries may crash when they reach it."
            return FailAttempt("process_died", f"{how} {hint}")
        case Died(exit_code):
            return FailAttempt("process_died", how_it_died(exit_code))
        case NotStarted(reason):
            return FailAttempt("process_not_started", reason)
    return Nothing()


def outcome_of(report: Report) -> tuple[str, str | None]:
    """Return the outcome of an attempt with this report, and the code of its error."""
    match report:
        case Complete():
            return "succeeded", None
        case FailAttempt(code):
            return "failed", code
        case Stop():
            return "cancelled", None
        case Release():
            return "released", None
        case SnoozeFor():
            return "snoozed", None
        case TimeOut():
            return "timed_out", "timed_out"
        case Nothing():
            return "lost", "lost"


def raised(error: BaseException) -> Raised:
    """Convert a handler's exception to data: the exception itself would keep every frame alive.

    A group of one exception counts as that exception: task groups raise groups.
    """
    sole = error
    while isinstance(sole, BaseExceptionGroup) and len(sole.exceptions) == 1:
        sole = sole.exceptions[0]
    name, message = type(sole).__name__, storable(words_of(sole))
    match sole:
        case Snooze(seconds=seconds):
            return Raised("snooze", name, message, seconds)
        case Retry(after=after):
            return Raised("retry", name, message, after)
        case Fail():
            return Raised("fail", name, message)
        case Cancel():
            return Raised("cancel", name, message)
        case asyncio.CancelledError():
            return Raised("stopped", name, message, traceback=traceback_of(error))
    return Raised(
        "error",
        name,
        message,
        traceback=traceback_of(error),
        out_of_memory=_is_out_of_memory(error),
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or one of those that caused it, says that memory ran out."""
    return any(
        isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno == errno.ENOMEM)
        for each in chain_of(error, hidden=False)
    )


def chain_of(error: BaseException, *, hidden: bool = True) -> Iterator[BaseException]:
    """Yield an exception and, once each, those that caused it and the members of groups.

    Those that `raise ... from` hides are left out unless `hidden`.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting.append(each.__cause__)
        if hidden or not each.__suppress_context__:
            waiting.append(each.__context__)
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions


def end_of(ended: asyncio.Task[End]) -> End:
    """Return the end of a handler from its task, even if the code around the handler failed."""
    if ended.cancelled():
        return Raised("stopped", "CancelledError", "")
    error = ended.exception()
    return ended.result() if error is None else raised(error)


def how_it_died(exit_code: int) -> str:
    """Describe how a process ended that sent no report."""
    if exit_code >= 0:
        return f"The handler's process ended with exit code {exit_code}."
    try:
        name = f" ({signal.Signals(-exit_code).name})"
    except ValueError:
        name = ""
    advice = " The system kills processes when memory runs out." if exit_code == -9 else ""
    return f"The handler's process was killed by signal {-exit_code}{name}.{advice}"


def memory_exceeded(limit_mb: int) -> str:
    """Return the sentence for a handler that exceeded its memory limit."""
    return f"The handler exceeded its memory limit of {limit_mb} MB."


def end_as_json(end: End) -> dict[str, Any]:
    """Encode an end, for a process to send to its worker."""
    return {"end": type(end).__name__, **asdict(end)}


def end_from_json(content: Mapping[str, Any]) -> End:
    """Decode an end from `end_as_json`."""
    kinds: dict[str, type[End]] = {
        kind.__name__: kind
        for kind in (Returned, ResultRefused, Raised, MemoryExceeded, Died, NotStarted)
    }
    values = dict(content)
    return kinds[values.pop("end")](**values)


def words_of(error: BaseException) -> str:
    """Return the text of an exception, and of those in a group.

    Its `__str__` is user code, and may raise or exit.
    """
    try:
        words = str(error)
    except BaseException:
        words = "(message unavailable)"
    if isinstance(error, BaseExceptionGroup):
        inner = [f"{type(each).__name__}: {words_of(each)}" for each in members_of(error)]
        words = "; ".join([words, *inner])
    return words


def storable(text: str) -> str:
    """Truncate a text, and replace the characters that cannot be stored."""
    clean = text[: 2 * MAX_MESSAGE].replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    return shortened_text(clean, MAX_MESSAGE)
