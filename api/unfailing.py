"""A stream for log lines and for messages of commands on standard error."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


class Unfailing:
    """A stream that drops what it cannot write, because its reader is gone or the disk is full.

    Log lines are written after commits and while errors are handled: an exception from the stream
    would be taken for a failure of the work. `logging` drops lines for the same reason. A command
    goes on, and ends with its exit code.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str | bytes) -> int:
        """Write a text, if possible."""
        # ValueError: the stream is closed.
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, if possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
