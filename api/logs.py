"""How log lines are written: structlog, as JSON or for people, on standard error.

No line holds a payload's value or a token: of an exception it has the type and the traceback, not
the message, which may quote anything.
"""

from __future__ import annotations

import logging
import secrets
import sys
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, BinaryIO, Final, Literal, TextIO, cast

import structlog
from pydantic_core import to_json

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logs(
    level: Literal["debug", "info", "warning", "error"],
    style: Literal["auto", "console", "json"],
    stream: TextIO | None = None,
) -> None:
    """Write lines of `level` and above to `stream`, standard error unless given.

    Lines of the standard library's `logging` look the same, and carry the same context. Of
    libraries that this project itself uses, only warnings and errors are written.
    """
    global _configuration
    _configuration = (level, style)
    stream = stream or sys.stderr
    factory: Any = structlog.WriteLoggerFactory(cast(TextIO, _Unfailing(stream)))
    console = style == "console" or (style == "auto" and stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_of_exc_info),
    ]
    render: structlog.typing.Processor
    render_text: structlog.typing.Processor
    if console:
        render = render_text = structlog.dev.ConsoleRenderer(colors=stream.isatty())
    else:
        render, render_text = _render_json, _render_json_text
        factory = structlog.BytesLoggerFactory(cast(BinaryIO, _Unfailing(stream.buffer)))
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                *shared[:1],
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                *shared[2:],
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render_text],
        )
    )
    logging.basicConfig(handlers=[handler], level=_LEVELS[level], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(_LEVELS[level], logging.WARNING))


def configuration() -> tuple[str, str] | None:
    """The level and style that were configured, for another process; None: nobody has."""
    return _configuration


_configuration: tuple[str, str] | None = None

_QUIET: Final = (
    "aiosqlite",
    "alembic",
    "asyncio",
    "asyncpg",
    "fsspec",
    "PIL",
    "sqlalchemy",
    "uvicorn",
)
"""Libraries that this project itself uses, and that write lines about themselves."""


def _render_json_text(logger: Any, method: str, line: MutableMapping[str, Any]) -> str:
    return _render_json(logger, method, line).decode()


class _Unfailing:
    """A stream that drops what it cannot write: its reader has gone, or its disk is full.

    A line is often written after a commit or in an error's handler, where an error of its own
    would be taken for that of the work. `logging` does the same for the standard library's lines.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, line: str | bytes) -> None:
        # ValueError: the stream is closed.
        with suppress(OSError, ValueError):
            self._stream.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def _render_json(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> bytes:
    """A line as JSON bytes: a busy server writes thousands in a second."""
    return to_json(line, fallback=repr, inf_nan_mode="constants")


def traceback_of(error: BaseException) -> str:
    """Where an exception came from, and each that it came of: files, lines, types.

    Of the system's own errors the words are added, which tell a full disk from a missing file.
    """
    parts: list[str] = []
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        name = f"{type(following).__module__}.{type(following).__qualname__}"
        words = following.strerror if isinstance(following, OSError) else None
        frames = "".join(traceback.format_tb(following.__traceback__))
        parts.append(f"{frames}{name.removeprefix('builtins.')}{f': {words}' if words else ''}")
        hidden = following.__suppress_context__
        following = following.__cause__ or (None if hidden else following.__context__)
    return "\n\nwhich came of\n\n".join(parts)


def _of_exc_info(exc_info: Any) -> str:
    return traceback_of(exc_info[1])


def log_unexpected(where: str, error: BaseException) -> str:
    """Logs an error nobody foresaw, with its traceback, and gives the id it is logged under."""
    error_id = secrets.token_hex(8)
    structlog.get_logger("jobs.errors").error(
        "unexpected", error_id=error_id, where=where, exc_info=error
    )
    return error_id
