"""Configures log lines: structlog, as JSON or for people, on standard error.

In a program that opens a queue itself, lines go to the loggers of the standard library instead.

No line contains a value of a payload or a token. An exception is logged with its type and
traceback, without its message, which may quote anything.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, BinaryIO, Final, Literal, TextIO, cast

import structlog
from pydantic_core import to_json

from job_registry.errors import escaped
from job_registry_api.unfailing import Unfailing

_MAX_MEMBERS: Final = 5
_MAX_CALLS: Final = 12
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
    """Write lines of `level` and above to `stream`, by default standard error.

    Lines of the standard library's `logging` have the same format and context. Libraries that this
    project uses log only warnings and errors.
    """
    global _configuration, _together
    _configuration = (level, style)
    stream = stream or sys.stderr
    factory: Any = structlog.WriteLoggerFactory(cast(TextIO, Unfailing(stream)))
    console = style == "console" or (style == "auto" and stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _with_trace_ids,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_of_exc_info),
    ]
    render: structlog.typing.Processor
    render_text: structlog.typing.Processor
    if console:
        render = render_text = _ConsoleRenderer(colors=_shows_colors(stream))
    else:
        render, render_text = _render_json, _render_json_text
        factory = structlog.BytesLoggerFactory(cast(BinaryIO, Unfailing(stream.buffer)))
    _together = None if console else _Together(factory, shared, _LEVELS[level] <= logging.INFO)
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
                *shared[:2],
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                *shared[3:],
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render_text],
        )
    )
    logging.basicConfig(handlers=[handler], level=_LEVELS[level], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(_LEVELS[level], logging.WARNING))


def _shows_colors(stream: TextIO) -> bool:
    """Return whether lines have colors, by the conventions that Rich follows for other output
    (https://no-color.org)."""
    is_wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return is_wanted and stream.isatty()


def use_standard_logging() -> None:
    """Write lines to the loggers `job_registry.*` of `logging`, for a program with logs of its own.

    A program that has configured structlog gets them there.
    """
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                _with_trace_ids,
                structlog.stdlib.filter_by_level,
                structlog.stdlib.PositionalArgumentsFormatter(),
                structlog.processors.ExceptionRenderer(_of_exc_info),
                _as_text,
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
            logger_factory=structlog.stdlib.LoggerFactory(),
        )


def _as_text(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> str:
    exception = line.pop("exception", None)
    values = [f"{key}={value}" for key, value in line.items() if key != "event"]
    text = " ".join([str(line["event"]), *values])
    return text if exception is None else f"{text}\n{exception}"


def show_trace_ids(ids_of: Callable[[object], Mapping[str, str]]) -> None:
    """Add to each line what `ids_of` returns for its `job_id`: the ids of a span, if there is one.

    For a line without a `job_id`, it is called with None.
    """
    global _trace_ids_of
    _trace_ids_of = ids_of


_trace_ids_of: Callable[[object], Mapping[str, str]] | None = None


def _with_trace_ids(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> Any:
    if _trace_ids_of is not None:
        for name, value in _trace_ids_of(line.get("job_id")).items():
            line.setdefault(name, value)
    return line


def configuration() -> tuple[str, str] | None:
    """Return the configured level and style, for another process; None if there are none."""
    return _configuration


_configuration: tuple[str, str] | None = None


def log_together(log: Any, lines: Iterable[Mapping[str, Any]]) -> None:
    """Log lines of the level info that belong to one moment. Each has its `event`.

    Lines of JSON share their time, their context and one write: alone, a line takes ten times the
    CPU. If `logging` writes no lines of this level, `lines` is not iterated.
    """
    if _together is not None and _together.is_configured():
        _together.write(lines)
        return
    log = log.bind()
    if _as_text in structlog.get_config()["processors"] and not log.is_enabled_for(logging.INFO):
        return
    for line in lines:
        log.info(**line)


class _Together:
    """Writes lines of JSON together, in the format of `configure_logs`."""

    def __init__(
        self,
        factory: structlog.BytesLoggerFactory,
        processors: Sequence[structlog.typing.Processor],
        is_enabled: bool,
    ) -> None:
        self._factory = factory
        self._logger = factory()
        self._processors = processors
        self._is_enabled = is_enabled

    def is_configured(self) -> bool:
        """Return whether structlog is still configured like this. A test may capture lines."""
        configured = structlog.get_config()
        return (
            configured["logger_factory"] is self._factory
            and configured["processors"][-1] is _render_json
        )

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if not self._is_enabled:
            return
        common: Any = {}
        for process in self._processors:
            common = process(self._logger, "info", common)
        if _trace_ids_of is not None:
            # Most are written outside the contexts of the jobs that they name.
            lines = [{**line, **_trace_ids_of(line.get("job_id"))} for line in lines]
        texts = [_render_json(self._logger, "info", {**common, **line}) for line in lines]
        if texts:
            self._logger.info(b"\n".join(texts))


_together: _Together | None = None

_QUIET: Final = (
    "aiosqlite",
    "alembic",
    "asyncio",
    "asyncpg",
    "fsspec",
    "PIL",
    "sqlalchemy",
    "uvicorn",
    "watchfiles",
)
"""Libraries that this project uses and that log their own activity."""


class _ConsoleRenderer(structlog.dev.ConsoleRenderer):
    """Renders lines for people. Characters that a terminal could act on are escaped."""

    def __call__(self, logger: Any, name: str, event_dict: structlog.typing.EventDict) -> str:
        return super().__call__(
            logger, name, {escaped(key): _escaped(value) for key, value in event_dict.items()}
        )


def _escaped(value: Any) -> Any:
    """Escape the text of a value, except the line breaks of a traceback."""
    text = value if isinstance(value, str | None) else _repr_of(value)
    return text and "\n".join(escaped(line) for line in text.split("\n"))


def _render_json_text(logger: Any, method: str, line: MutableMapping[str, Any]) -> str:
    return _render_json(logger, method, line).decode()


def _render_json(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> bytes:
    """Render a line as JSON bytes: a busy server writes thousands per second."""
    try:
        return to_json(line, fallback=repr, inf_nan_mode="constants")
    except Exception:
        sound = {_sound(str(key)): _renderable(value) for key, value in line.items()}
        return to_json(sound, fallback=repr, inf_nan_mode="constants")


def _renderable(value: Any) -> Any:
    """Return a value that is JSON as it is, and the text of any other."""
    try:
        to_json(value, fallback=repr, inf_nan_mode="constants")
    except Exception:
        return _sound(value if isinstance(value, str) else _repr_of(value))
    return value


def _sound(text: str) -> str:
    """Return a text without surrogates, which no encoding has."""
    return text.encode("utf-8", "backslashreplace").decode()


def _repr_of(value: object) -> str:
    """Return the `repr` of a value, or its type and why it has none."""
    try:
        return repr(value)
    except Exception as error:
        return not_shown(value, error)


def not_shown(value: object, error: Exception) -> str:
    """Return what stands for a value that raises an error when it is shown."""
    return f"<{type(value).__name__}: {type(error).__name__}>"


def traceback_of(error: BaseException) -> str:
    """Format an exception and its causes: files, lines and types, without messages.

    Errors of the operating system keep their text, which distinguishes a full disk from a missing
    file.
    """
    parts: list[str] = []
    seen: set[int] = set()
    waiting: list[tuple[BaseException, str]] = [(error, "")]
    while waiting:
        each, relation = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        name = f"{type(each).__module__}.{type(each).__qualname__}"
        words = each.strerror if isinstance(each, OSError) else None
        frames = "".join(traceback.format_tb(each.__traceback__))
        parts.append(
            f"{relation}{frames}{name.removeprefix('builtins.')}{f': {words}' if words else ''}"
        )
        following = [(inner, "\n\nin this group\n\n") for inner in members_of(each)]
        cause = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        if cause is not None:
            following.append((cause, "\n\ncaused by\n\n"))
        waiting[:0] = following
    return "".join(parts)


def stack_of(thread: threading.Thread | None) -> list[str]:
    """Return where a thread is at this moment: the file, line and function of its last calls.

    The innermost call comes last. A thread that has ended, or has run no Python yet, has none.
    """
    frame = None if thread is None else sys._current_frames().get(thread.ident or 0)
    calls: list[str] = []
    while frame is not None and len(calls) < _MAX_CALLS:
        code = frame.f_code
        calls.append(f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}")
        frame = frame.f_back
    return calls[::-1]


def members_of(error: BaseException) -> list[BaseException]:
    """Return the first exceptions of a group and of the groups in it. Others have none."""
    members: list[BaseException] = []
    waiting = [error]
    while waiting and len(members) < _MAX_MEMBERS:
        each = waiting.pop(0)
        if isinstance(each, BaseExceptionGroup):
            waiting[:0] = each.exceptions
        elif each is not error:
            members.append(each)
    return members


def _of_exc_info(exc_info: Any) -> str:
    return traceback_of(exc_info[1])


def log_unexpected(where: str, error: BaseException) -> str:
    """Log an unexpected error with its traceback, and return the id of the log line."""
    error_id = secrets.token_hex(8)
    structlog.get_logger("job_registry.errors").error(
        "unexpected", error_id=error_id, where=where, exc_info=error
    )
    return error_id
