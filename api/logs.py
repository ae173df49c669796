"""How log lines are written: structlog, as JSON or for people, on standard error."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal, TextIO

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
    """Writes lines of `level` and above to `stream`, standard error unless given."""
    stream = stream or sys.stderr
    factory: Any = structlog.WriteLoggerFactory(stream)
    console = style == "console" or (style == "auto" and stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if console:
        plain = structlog.dev.plain_traceback
        shared.append(
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)
        )
    else:
        # Without local variables: they hold payloads and tokens.
        traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared += [
            structlog.processors.ExceptionRenderer(traceback),
            _render_json,
        ]
        factory = structlog.BytesLoggerFactory(stream.buffer)
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        stream=stream, level=max(_LEVELS[level], logging.WARNING), format="%(message)s", force=True
    )


def _render_json(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> bytes:
    """A line as JSON bytes: a busy server writes thousands in a second."""
    return to_json(line, fallback=repr, inf_nan_mode="constants")


def log_unexpected(where: str, error: BaseException) -> str:
    """Logs an error nobody foresaw, with its traceback, and gives the id it is logged under."""
    error_id = secrets.token_hex(8)
    structlog.get_logger("jobs.errors").error(
        "unexpected", error_id=error_id, where=where, exc_info=error
    )
    return error_id
