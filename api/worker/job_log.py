"""`job.log`: a handler's logger, which also passes on the lines that are kept with its attempt.

Each line goes to the worker's log at once. `log_writer` stores the last lines of an attempt.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import reprlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydantic import JsonValue

from job_registry_api.logs import not_shown, traceback_of
from job_registry_api.queue.job_logs import (
    MAX_BYTES,
    MAX_LINE_BYTES,
    MAX_LINES,
    MAX_MESSAGE,
    MAX_TEXT,
    MAX_VALUES,
    LogLevel,
    LogLine,
    line_as_text,
)
from job_registry_api.worker.outcomes import storable

SENT_PER_SECOND: Final = 500
"""How many lines of an attempt its process sends per second before it sends only the last ones."""

MAX_TRACEBACK: Final = 2_000
"""The most characters of a traceback that are kept, the last ones."""

_MAX_INT: Final = 2**53

Keep = Callable[[bytes], None]
"""Keeps the text of a line. It is called in any thread."""

_LEVELS: Final = {
    **dict.fromkeys(("info", "ainfo"), LogLevel.INFO),
    **dict.fromkeys(("warning", "warn", "awarning"), LogLevel.WARNING),
    **dict.fromkeys(("error", "err", "aerror", "exception", "aexception"), LogLevel.ERROR),
    **dict.fromkeys(("critical", "fatal", "acritical", "afatal"), LogLevel.ERROR),
}
"""The level of the lines that each method of structlog's loggers writes."""

_METHODS: Final = (
    (logging.CRITICAL, "critical"),
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
)


class JobLog:
    """The logger of a handler: it logs each line, and keeps those of the level info and above.

    `began` is when the attempt began, by the monotonic clock. What this class does not have it
    takes from the logger. A line that cannot be written or kept raises nothing, as with `logging`.

    `make_logger` is called for the first line: most handlers write none.
    """

    def __init__(
        self,
        make_logger: Callable[[], Any],
        keep: Keep,
        began: float,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self._make_logger = make_logger
        self._keep = keep
        self._began = began
        self._values = values or {}

    @functools.cached_property
    def _logger(self) -> Any:
        return self._make_logger()

    def debug(self, event: Any, *arguments: Any, **values: Any) -> Any:
        """Log a line for developers. It is not kept."""
        return self._write("debug", event, *arguments, **values)

    def info(self, event: Any, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line for operators."""
        return self._write("info", event, *arguments, **values)

    def warning(self, event: Any, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about something that needs attention."""
        return self._write("warning", event, *arguments, **values)

    def error(self, event: Any, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about a failure."""
        return self._write("error", event, *arguments, **values)

    def critical(self, event: Any, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about a failure that needs attention at once."""
        return self._write("critical", event, *arguments, **values)

    def exception(self, event: Any, *arguments: Any, **values: Any) -> Any:
        """Log and keep a line about the exception that is being handled."""
        return self._write("exception", event, *arguments, **{"exc_info": True, **values})

    def log(self, level: int, event: Any, *arguments: Any, **values: Any) -> Any:
        """Log a line of a level of `logging`, and keep it from `logging.INFO`."""
        method = next((name for least, name in _METHODS if level >= least), "debug")
        return self._write(method, event, *arguments, **values)

    def bind(self, **values: Any) -> JobLog:
        """Return a logger that adds these values to each line."""
        return self._with(self._logger.bind(**values), {**self._values, **values})

    def new(self, **values: Any) -> JobLog:
        """Return a logger that adds these values to each line, and no others."""
        return self._with(self._logger.new(**values), values)

    def unbind(self, *names: str) -> JobLog:
        """Return a logger without these values."""
        return self._without(self._logger.unbind(*names), names)

    def try_unbind(self, *names: str) -> JobLog:
        """Return a logger without these values, if it has them."""
        return self._without(self._logger.try_unbind(*names), names)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the logger."""
        if name.startswith("_"):
            # Also of an instance that `copy` has not filled yet.
            raise AttributeError(name, name=name, obj=self)
        attribute = getattr(self._logger, name)
        return functools.partial(self._write, name) if name in _LEVELS else attribute

    def _with(self, logger: Any, values: Mapping[str, Any]) -> JobLog:
        return JobLog(lambda: logger, self._keep, self._began, values)

    def _without(self, logger: Any, names: Sequence[str]) -> JobLog:
        return self._with(logger, {k: v for k, v in self._values.items() if k not in names})

    def _write(self, method: str, event: Any, /, *arguments: Any, **values: Any) -> Any:
        # Whatever a handler logs, and whatever its values do when they are shown, it goes on.
        with contextlib.suppress(Exception):
            if (level := _LEVELS.get(method)) is not None:
                message = _message_of(event, arguments)
                seconds = time.monotonic() - self._began
                self._keep(text_of(level, message, seconds, {**self._values, **values}))
        try:
            return getattr(self._logger, method)(event, *arguments, **values)
        except Exception as error:
            with contextlib.suppress(Exception):
                # Not its values, which may be what cannot be written.
                self._logger.warning("job_log.line_not_written", exc_info=error)
            return None


def _message_of(event: Any, arguments: tuple[Any, ...]) -> str:
    """Return the message of a line with its arguments, as structlog and `logging` show them."""
    try:
        text = event if type(event) is str else str(event)
    except Exception as error:
        return not_shown(event, error)
    if not arguments:
        return text
    try:
        first = arguments[0]
        return text % (first if len(arguments) == 1 and isinstance(first, Mapping) else arguments)
    except Exception:
        return text


def text_of(level: LogLevel, message: str, seconds: float, values: Mapping[str, Any]) -> bytes:
    """Return the text of a line, shortened to what is kept."""
    data: dict[str, JsonValue] = {}
    error = _error_of(values.get("exc_info"))
    if error is not None:
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


def _error_of(exc_info: Any) -> BaseException | None:
    """Return the exception that a line is about, as structlog and `logging` understand it."""
    match exc_info:
        case BaseException():
            return exc_info
        case (_, BaseException() as error, _):
            return error
    return sys.exception() if exc_info and not isinstance(exc_info, tuple) else None


def _shown(value: Any) -> JsonValue:
    """Return a value of a line as it is if it is small, and otherwise the beginning of its text."""
    try:
        return _small(value)
    except Exception as error:
        return storable(not_shown(value, error)[:MAX_TEXT])


def _small(value: Any) -> JsonValue:
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

    def take(self) -> list[bytes]:
        """Return the lines, and drop them."""
        with self._lock:
            lines, self._lines, self._bytes = list(self._lines), deque(), 0
        return lines


class Sender:
    """Sends lines of an attempt, not many more than `SENT_PER_SECOND`. Thread-safe.

    In a flood only the last ones are sent, with the next line after that second or by `flush`.
    """

    def __init__(self, send: Keep) -> None:
        self._send = send
        self._since = time.monotonic()
        self._sent = 0
        self._waiting = Tail(MAX_LINES)
        self._lock = threading.Lock()

    def __call__(self, line: bytes) -> None:
        """Send a line, or keep it for later."""
        with self._lock:
            now = time.monotonic()
            if now - self._since >= 1.0:
                self._since, self._sent = now, 0
            self._waiting.add(line)
            if self._sent < SENT_PER_SECOND:
                self._send_waiting()

    def flush(self) -> None:
        """Send the lines that wait."""
        with self._lock:
            self._send_waiting()

    def _send_waiting(self) -> None:
        for line in self._waiting.take():
            self._sent += 1
            self._send(line)
