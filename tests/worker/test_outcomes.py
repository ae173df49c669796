"""What the queue is told, for every way in which a handler can end."""

from __future__ import annotations

import asyncio
import errno
import signal
import sys
from typing import Any

import pytest

from job_registry import Cancel, Fail, Retry, Snooze
from job_registry_api.worker.outcomes import (
    MAX_MESSAGE,
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
    Returned,
    SnoozeFor,
    StillRunning,
    Stop,
    TimeOut,
    end_as_json,
    end_from_json,
    end_of,
    how_it_died,
    raised,
    report_of,
    storable,
)
from job_registry_api.worker.results import result_of

AS_USUAL = Circumstances()
EMPTY: tuple[Any, ...] = ({}, [], "", 0, {"a": {}, "b": []}, [{}])
CANCELLED = Circumstances(cancel_requested=True)
STOPPING = Circumstances(releasing=True)
TIMED_OUT = Circumstances(timed_out=True)
LOST = Circumstances(lost=True, timed_out=True)
OUT_OF_TOUCH = Circumstances(out_of_touch=True)

DONE = Returned({"a": 1})
BOOM = raised(RuntimeError("boom"))
STOPPED = raised(asyncio.CancelledError())
FAILED = FailAttempt("handler_failed", "RuntimeError: boom", retryable=True)
WHILE_RUNNING = Stop("The job was cancelled while it ran.")
KILLED = Stop("The job was cancelled while it ran. Its process was killed.")
EXCEEDED = "The handler exceeded its memory limit of 64 MB."
HINT = "Its memory limit is 64 MB, and libraries may crash when they reach it."
CRASHES = (
    signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP, signal.SIGFPE,
)  # fmt: skip
SEGFAULT = "The handler's process was killed by signal 11 (SIGSEGV)."


@pytest.mark.parametrize(
    ("end", "circumstances", "report"),
    [
        (DONE, AS_USUAL, Complete({"a": 1})),
        (DONE, CANCELLED, Complete({"a": 1})),
        (DONE, STOPPING, Complete({"a": 1})),
        (DONE, OUT_OF_TOUCH, Complete({"a": 1})),
        (DONE, TIMED_OUT, TimeOut(still_running=False)),
        (DONE, LOST, Nothing()),
        (ResultRefused("no"), AS_USUAL, FailAttempt("result_invalid", "no", retryable=False)),
        (ResultRefused("no"), STOPPING, FailAttempt("result_invalid", "no", retryable=False)),
        (raised(Snooze(3)), AS_USUAL, SnoozeFor(3)),
        (raised(Snooze(3)), STOPPING, SnoozeFor(3)),
        (raised(Retry("r", after=2)), AS_USUAL, FailAttempt("retry", "r", after=2)),
        (raised(Retry("r")), STOPPING, FailAttempt("retry", "r")),
        (raised(Fail("f")), AS_USUAL, FailAttempt("failed", "f", retryable=False)),
        (raised(Fail("f")), STOPPING, FailAttempt("failed", "f", retryable=False)),
        (raised(Fail()), AS_USUAL, FailAttempt("failed", "The handler raised Fail.", False)),
        (raised(Cancel("c")), AS_USUAL, Stop("c")),
        (raised(Cancel()), AS_USUAL, Stop("The handler cancelled the job.")),
        (raised(Cancel("c")), STOPPING, Release()),
        (raised(Cancel("c")), OUT_OF_TOUCH, Release()),
        (raised(Cancel("c")), Circumstances(out_of_touch=True, cancel_requested=True), Stop("c")),
        (BOOM, AS_USUAL, FAILED),
        (BOOM, CANCELLED, FAILED),
        (BOOM, OUT_OF_TOUCH, FAILED),
        (BOOM, STOPPING, Release()),
        (raised(KeyError()), AS_USUAL, FailAttempt("handler_failed", "KeyError")),
        (raised(ExceptionGroup("g", [RuntimeError("boom")])), AS_USUAL, FAILED),
        (
            raised(ExceptionGroup("g", [ExceptionGroup("h", [Fail("f")])])),
            AS_USUAL,
            FailAttempt("failed", "f", retryable=False),
        ),
        (raised(BaseExceptionGroup("g", [asyncio.CancelledError()])), STOPPING, Release()),
        (
            raised(ExceptionGroup("g", [KeyError(1), ExceptionGroup("h", [Fail("f")])])),
            AS_USUAL,
            FailAttempt(
                "handler_failed", "ExceptionGroup: g (2 sub-exceptions); KeyError: 1; Fail: f"
            ),
        ),
        (BOOM, TIMED_OUT, TimeOut(still_running=False)),
        (STOPPED, AS_USUAL, FailAttempt("handler_failed", "CancelledError")),
        (STOPPED, CANCELLED, WHILE_RUNNING),
        (STOPPED, STOPPING, Release()),
        (STOPPED, OUT_OF_TOUCH, Release()),
        (STOPPED, TIMED_OUT, TimeOut(still_running=False)),
        (Died(-11), AS_USUAL, FailAttempt("process_died", SEGFAULT)),
        (MemoryExceeded(64), AS_USUAL, FailAttempt("memory_limit_exceeded", EXCEEDED)),
        (MemoryExceeded(64), STOPPING, Release()),
        (MemoryExceeded(64), TIMED_OUT, TimeOut(still_running=False)),
        (
            Died(-11, 64, near_limit=True),
            AS_USUAL,
            FailAttempt("memory_limit_exceeded", f"{EXCEEDED} {SEGFAULT}"),
        ),
        (Died(-11, 64, near_limit=True), STOPPING, Release()),
        (
            Died(2, 64, near_limit=True),
            AS_USUAL,
            FailAttempt("memory_limit_exceeded", f"{EXCEEDED} {how_it_died(2)}"),
        ),
        (Died(2, 64), AS_USUAL, FailAttempt("process_died", how_it_died(2))),
        (Died(0, 64, near_limit=True), AS_USUAL, FailAttempt("process_died", how_it_died(0))),
        (
            Died(1, 64, near_limit=True),
            AS_USUAL,
            FailAttempt("memory_limit_exceeded", f"{EXCEEDED} {how_it_died(1)}"),
        ),
        (Died(1, None, near_limit=True), AS_USUAL, FailAttempt("process_died", how_it_died(1))),
        *(
            (
                Died(-crash, 64),
                AS_USUAL,
                FailAttempt("process_died", f"{how_it_died(-crash)} {HINT}"),
            )
            for crash in CRASHES
        ),
        # Neither the system nor a person kills a process because of this limit.
        (Died(-9, 64, near_limit=True), AS_USUAL, FailAttempt("process_died", how_it_died(-9))),
        (Died(-9), CANCELLED, KILLED),
        (Died(-9), STOPPING, Release()),
        (Died(-9), TIMED_OUT, TimeOut(still_running=False)),
        (Died(-9), OUT_OF_TOUCH, Release()),
        (Died(-9), LOST, Nothing()),
        (NotStarted("why"), AS_USUAL, FailAttempt("process_not_started", "why")),
        (NotStarted("why"), STOPPING, Release()),
        (StillRunning(), TIMED_OUT, TimeOut(still_running=True)),
        (StillRunning(), STOPPING, Release()),
        (StillRunning(), LOST, Nothing()),
        (StillRunning(), OUT_OF_TOUCH, Nothing()),
    ],
)
def test_the_report_follows_from_the_end_and_the_circumstances(
    end: End, circumstances: Circumstances, report: Report
) -> None:
    assert report_of(end, circumstances) == report


@pytest.mark.parametrize(
    "end",
    [DONE, ResultRefused("no"), BOOM, STOPPED, raised(Snooze(3)), MemoryExceeded(64, "trace")],
)
def test_an_end_travels_between_processes_as_it_is(end: Any) -> None:
    assert end_from_json(end_as_json(end)) == end


@pytest.mark.parametrize(
    ("exit_code", "sentence"),
    [
        (3, "The handler's process ended with exit code 3."),
        (0, "The handler's process ended with exit code 0."),
        (-1, "The handler's process was killed by signal 1 (SIGHUP)."),
        (
            -9,
            "The handler's process was killed by signal 9 (SIGKILL). The system kills processes"
            " when memory runs out.",
        ),
        (-11, SEGFAULT),
        (-64, "The handler's process was killed by signal 64 (SIGRTMAX)."),
        (-33, "The handler's process was killed by signal 33."),
    ],
)
def test_a_process_that_dies_is_reported_with_its_signal_or_exit_code(
    exit_code: int, sentence: str
) -> None:
    assert how_it_died(exit_code) == sentence


async def test_the_traceback_of_a_task_group_shows_where_its_tasks_failed() -> None:
    async def step(number: int) -> None:
        raise ValueError(f"secret {number}")

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(step(1))
            tasks.create_task(step(2))
    except* ValueError as error:
        report = raised(error)
    assert report.message.endswith("; ValueError: secret 1; ValueError: secret 2")
    assert report.traceback.count("in step") == 2
    assert "secret" not in report.traceback.replace('raise ValueError(f"secret {number}")', "")


def test_an_exception_is_reported_by_name_and_words_and_its_traceback_has_no_words() -> None:
    try:
        raise ValueError("secret")
    except ValueError as error:
        report = raised(error)
    assert (report.kind, report.name, report.message) == ("error", "ValueError", "secret")
    assert "test_outcomes.py" in report.traceback
    assert "secret" not in report.traceback.replace('raise ValueError("secret")', "")


def caused(error: BaseException, by: BaseException, *, hidden: bool = False) -> BaseException:
    """Return an exception with another one as its cause, or as a context that may be hidden."""
    error.__context__ = by
    error.__suppress_context__ = hidden
    return error


def from_cause(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def in_a_cycle() -> BaseException:
    one, other = ValueError(), KeyError()
    one.__context__, other.__cause__ = other, one
    return one


@pytest.mark.parametrize(
    ("error", "is_out_of_memory"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "no memory"), True),
        (OSError(errno.EMFILE, "too many files"), False),
        (ValueError(), False),
        (Fail(), False),
        (from_cause(ValueError(), MemoryError()), True),
        (caused(ValueError(), MemoryError()), True),
        (caused(ValueError(), MemoryError(), hidden=True), False),
        (ExceptionGroup("two", [ValueError(), MemoryError()]), True),
        (ExceptionGroup("two", [ValueError(), KeyError()]), False),
        (in_a_cycle(), False),
    ],
)
def test_an_exception_says_whether_memory_ran_out(
    error: BaseException, is_out_of_memory: bool
) -> None:
    assert raised(error).out_of_memory is is_out_of_memory


async def test_the_end_of_a_handler_is_data_even_if_the_code_around_it_failed() -> None:
    async def ends(how: BaseException | None) -> End:
        if how is not None:
            raise how
        return DONE

    tasks = [asyncio.create_task(ends(how)) for how in (None, ValueError("x"))]
    cancelled = asyncio.create_task(asyncio.sleep(1, DONE))
    cancelled.cancel()
    await asyncio.wait([*tasks, cancelled])
    done, failed = map(end_of, tasks)
    assert done == DONE
    assert isinstance(failed, Raised)
    assert (failed.kind, failed.name, failed.message) == ("error", "ValueError", "x")
    assert end_of(cancelled) == Raised("stopped", "CancelledError", "")


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("as it is", "as it is"),
        ("a\0b", "a\ufffdb"),
        ("a\ud800b", "a?b"),
        ("x" * MAX_MESSAGE, "x" * MAX_MESSAGE),
    ],
)
def test_a_text_is_stored_without_what_cannot_be_stored(text: str, stored: str) -> None:
    assert storable(text) == stored


def test_a_long_text_is_truncated() -> None:
    stored = storable("x" * 9_000)
    assert len(stored) <= MAX_MESSAGE
    assert stored.startswith("x" * 100)
    assert stored.endswith("…")
    assert storable("x" * (MAX_MESSAGE + 1)).endswith("…")


class Unreadable(Exception):
    def __str__(self) -> str:
        sys.exit(4)


def test_an_exception_whose_text_cannot_be_read_is_reported_by_its_name() -> None:
    failure = raised(Unreadable())
    assert (failure.name, failure.message) == ("Unreadable", "(message unavailable)")


@pytest.mark.parametrize("value", EMPTY)
def test_an_empty_result_is_kept(value: Any) -> None:
    assert result_of(value, max_bytes=100) == Returned(value)
