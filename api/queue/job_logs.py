"""The log lines that are kept with an attempt: their limits, and the text that is stored.

Stored is one JSON array per line: level, seconds since the start of the attempt, message and data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from pydantic import JsonValue
from pydantic_core import from_json, to_json

from job_registry import Violation
from job_registry.json_values import json_document
from job_registry_api.queue.errors import InputInvalid

MAX_LINES: Final = 1_000
"""The most lines that are kept of an attempt, whatever the settings of its worker."""

MAX_LINE_BYTES: Final = 4_096
MAX_BYTES: Final = 65_536
"""The most bytes of a line, and of all lines of an attempt, as they are stored."""

MAX_MESSAGE: Final = 1_000
MAX_VALUES: Final = 20
MAX_TEXT: Final = 200
"""The most characters of a message, the most values of a line, and the most characters of one."""

LOG_WEIGHT: Final = 4
"""How many times its size the text of lines counts as it is read: it has many small values."""

_MAX_SECONDS: Final = 10_000_000.0


class LogLevel(StrEnum):
    """How important a log line is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that a handler logged. `seconds` counts from the start of its attempt."""

    level: LogLevel
    message: str
    seconds: float
    data: JsonValue = None
    """Its named values: an object of texts, numbers, truth values and nulls. None means none."""

    def logged_at(self, began: datetime) -> datetime:
        """Return when it was logged, from the start of its attempt by the database's clock."""
        return began + timedelta(seconds=self.seconds)


def line_as_text(line: LogLine) -> bytes:
    """Return the text of a line whose texts can be stored."""
    return to_json(_values(line))


def _values(line: LogLine) -> list[JsonValue]:
    data = {} if line.data is None else line.data
    return [line.level.value, round(line.seconds, 3), line.message, data]


def text_of_lines(lines: Sequence[LogLine]) -> tuple[bytes, list[Violation]]:
    """Return the text of lines that a client sent, and their faults."""
    if len(lines) > MAX_LINES:
        return b"", [_fault("", "out_of_range", f"at most {MAX_LINES:,} lines", f"{len(lines):,}")]
    texts, faults = [], list[Violation]()
    for index, line in enumerate(lines):
        found = list(_faults_of(line, f"/{index}"))
        if not found:
            text, unsound = json_document(_values(line), max_bytes=MAX_LINE_BYTES)
            found = [Violation(f"/logs/{index}", each.code, each.message) for each in unsound]
            texts.append(text)
        faults += found
        if len(faults) > 100:
            break
    text = b"\n".join(texts)
    if len(text) > MAX_BYTES and not faults:
        faults.append(_fault("", "too_large", f"at most {MAX_BYTES:,} bytes", f"{len(text):,}"))
    return text, faults


def _faults_of(line: LogLine, path: str) -> Iterator[Violation]:
    if not 0 <= line.seconds <= _MAX_SECONDS:
        wanted = f"0 to {_MAX_SECONDS:,.0f} seconds since the start of the attempt"
        yield _fault(f"{path}/seconds", "out_of_range", wanted, str(line.seconds))
    if not 1 <= len(line.message) <= MAX_MESSAGE:
        length = f"{len(line.message):,}"
        yield _fault(f"{path}/message", "out_of_range", f"1 to {MAX_MESSAGE:,} characters", length)
    match line.data:
        case None:
            return
        case dict() as data if len(data) <= MAX_VALUES:
            if any(
                isinstance(value, dict | list)
                or (isinstance(value, str) and len(value) > MAX_TEXT)
                or len(name) > MAX_TEXT
                for name, value in data.items()
            ):
                wanted = f"texts of up to {MAX_TEXT} characters, numbers, truth values and nulls"
                yield _fault(f"{path}/data", "wrong_type", wanted, "other values")
        case _:
            wanted = f"an object of at most {MAX_VALUES} values"
            yield _fault(f"{path}/data", "wrong_type", wanted, "something else")


def _fault(path: str, code: str, wanted: str, got: str) -> Violation:
    return Violation(f"/logs{path}", code, f"Expected {wanted}; got {got}.")


def check_log_lines(last: int) -> None:
    """Check how many log lines a caller wants.

    Raises:
        InputInvalid: `last` is not 0 to `MAX_LINES`.
    """
    if not 0 <= last <= MAX_LINES:
        message = f"Expected a whole number from 0 to {MAX_LINES:,}; got {last}."
        raise InputInvalid((Violation("/last", "out_of_range", message),))


def count_lines(text: str) -> int:
    """Return how many lines a stored text has."""
    return text.count("\n") + 1 if text else 0


def lines_of(text: str, last: int = MAX_LINES) -> list[LogLine]:
    """Return the last lines of a stored text, oldest first."""
    if not text or last <= 0:
        return []
    return [
        LogLine(LogLevel(level), message, seconds, data)
        for level, seconds, message, data in map(from_json, text.rsplit("\n", last)[-last:])
    ]
