"""`job.log`: a handler's logger, which also passes on the lines that are kept with its attempt.

Each line goes to the worker's log at once. `log_writer` stores the last lines of an attempt.
"""

from __future__ import annotations

import contextlib
import reprlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import JsonValue

from job_registry_api.logs import traceback_of
from job_registry_api.queue.job_logs import (
    MAX_BYTES,
    MAX_LINE_BYTES,
    MAX_MESSAGE,
    MAX_TEXT,
    MAX_VALUES,
    LogLevel,
    LogLine,
    line_as_text,
)
from job_registry_api.worker.outcomes import storable

LINES_PER_SECOND: Final = 500
"""How many lines of an attempt are kept per second. The next line says how many were not."""

MAX_TRACEBACK: Final = 2_000
"""The most characters of a traceback that are kept, the last ones."""

_MAX_INT: Final = 2**53

Keep = Callable[[bytes], None]
"""Keeps the text of a line. It is called in any thread."""


class JobLog:
    """The logger of a handler: it logs each line, and keeps those of the level info and above.

    `began` is when the attempt began, by the monotonic clock. What this class does not have it
    takes from the logger.
    """

    def __init__(
        self, logger: Any, keep: Keep, began: float, values: Mapping[str, Any] | None = None
    ) -> None:
        self._logger = logger
        self._keep = keep
        self._began = began
        self._values = values or {}

    def info(self, event: str, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line for operators."""
        self._keep_line(LogLevel.INFO, event, arguments, values)
        return self._logger.info(event, *arguments, **values)

    def warning(self, event: str, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about something that needs attention."""
        self._keep_line(LogLevel.WARNING, event, arguments, values)
        return self._logger.warning(event, *arguments, **values)

    def error(self, event: str, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about a failure."""
        self._keep_line(LogLevel.ERROR, event, arguments, values)
        return self._logger.error(event, *arguments, **values)

    def critical(self, event: str, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about a failure that needs attention at once."""
        self._keep_line(LogLevel.ERROR, event, arguments, values)
        return self._logger.critical(event, *arguments, **values)

    def exception(self, event: str, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about the exception that is being handled."""
        self._keep_line(LogLevel.ERROR, event, arguments, {**values, "exc_info": True})
        return self._logger.exception(event, *arguments, **values)

    def bind(self, **values: Any) -> JobLog:
        """Return a logger that adds these values to each line."""
        bound = {**self._values, **values}
        return JobLog(self._logger.bind(**values), self._keep, self._began, bound)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the logger."""
        return getattr(self._logger, name)

    def _keep_line(
        self, level: LogLevel, event: Any, arguments: tuple[Any, ...], values: Mapping[str, Any]
    ) -> None:
        # Whatever a handler logs, and whatever its values do when they are shown, it goes on.
        with contextlib.suppress(Exception):
            message = str(event) % arguments if arguments else str(event)
            seconds = time.monotonic() - self._began
            self._keep(text_of(level, message, seconds, {**self._values, **values}))


def text_of(level: LogLevel, message: str, seconds: float, values: Mapping[str, Any]) -> bytes:
    """Return the text of a line, shortened to what is kept."""
    data: dict[str, JsonValue] = {}
    exc_info = values.get("exc_info")
    error = sys.exception() if exc_info is True else exc_info
    if isinstance(error, BaseException):
        data["exception"] = storable(traceback_of(error)[-MAX_TRACEBACK:])
    for name, value in values.items():
        if len(data) == MAX_VALUES:
            break
        if name not in ("exc_info", "stack_info"):
            data[storable(name[:MAX_TEXT])] = _shown(value)
    message = storable(message[:MAX_MESSAGE])
    while True:
        text = line_as_text(LogLine(level, message, max(0.0, seconds), data))
        if len(text) <= MAX_LINE_BYTES:
            return text
        if data:
            data.popitem()
        else:
            message = message[: len(message) // 2]


def _shown(value: Any) -> JsonValue:
    """Return a value of a line as it is if it is small, and otherwise the beginning of its text."""
    match value:
        case None | bool():
            return value
        case int() if type(value) is int and -_MAX_INT <= value <= _MAX_INT:
            return value
        case float() if type(value) is float and value - value == 0:
            return value
        case str():
            return storable(value[:MAX_TEXT])
    return storable(_short.repr(value)[:MAX_TEXT])


_short: Final = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = MAX_TEXT


class LineLimit:
    """Passes on `LINES_PER_SECOND` lines per second, and counts the others."""

    def __init__(self, keep: Keep, began: float) -> None:
        self._keep = keep
        self._began = began
        self._since = began
        self._lines = 0
        self._dropped = 0

    def __call__(self, text: bytes) -> None:
        """Pass on a line, or drop it."""
        now = time.monotonic()
        if now - self._since >= 1.0:
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines > LINES_PER_SECOND:
            self._dropped += 1
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            values = {"lines": dropped}
            self._keep(
                text_of(LogLevel.WARNING, "job_log.lines_dropped", now - self._began, values)
            )
        self._keep(text)


class Tail:
    """The last log lines of an attempt, in at most `most` lines and `MAX_BYTES`. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, line: bytes) -> None:
        """Add a line, and drop the oldest ones that are then too many."""
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line) + 1
            while len(self._lines) > self._most or self._bytes > MAX_BYTES:
                self._bytes -= len(self._lines.popleft()) + 1

    def text(self) -> bytes:
        """Return the text of the lines, as it is stored."""
        with self._lock:
            return b"\n".join(self._lines)
