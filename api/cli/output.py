"""What every command prints: results, refusals, failures; and its exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console

from job_registry import CodedError, PayloadInvalid, Violation
from job_registry.errors import escaped

REFUSED = 1
WRONG_USAGE = 2

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class OutputFailed(Exception):
    """Raised when standard output cannot be written. `error` is why; None if it is closed."""

    def __init__(self, error: OSError | None) -> None:
        self.error = error
        super().__init__("" if error is None else error.strerror)

    @property
    def is_reader_gone(self) -> bool:
        """Whether the reader of a pipe has ended, as `head` does."""
        return isinstance(self.error, BrokenPipeError)


class Output:
    """Standard output. A failure to write to it raises `OutputFailed`, and no other error does.

    They end the command: Rich and Typer would take some of them for the end of a pipe. A character
    that the encoding of the stream lacks is escaped, as Python does on standard error.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._is_left = False
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def leave_to_handlers(self) -> None:
        """Let handlers and modules of job types print to nowhere if standard output is closed, as
        in any program. For a command that prints nothing here itself."""
        self._is_left = True

    def write(self, text: str) -> int:
        if self._stream is None:
            if self._is_left:
                return len(text)
            raise OutputFailed(None)
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputFailed(error) from None

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except OSError as error:
            raise OutputFailed(error) from None

    def isatty(self) -> bool:
        """Return whether a terminal shows the output."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def fail_without_output(failure: OutputFailed, *unfinished: str) -> NoReturn:
    """End a command whose output cannot be written, silently if nobody reads it.

    `unfinished` are sentences on what the command has not done for that reason.
    """
    if failure.error is not None:
        # Python would write the rest when it ends, and report the failure again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if failure.is_reader_gone and not unfinished:
        sys.exit(0)
    reason = str(failure) or "standard output is closed"
    fail(REFUSED, *unfinished, f"The output could not be written: {reason}.")


def say(text: str, console: Console = out) -> None:
    """Print one line. Parts of it may come from a payload, a file or a database."""
    console.print(escaped(text), markup=False)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table. In a file or a pipe, which have no width, each row is one line, for grep."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not out.is_terminal:
        out.width = 1_000
    out.print(table)


def print_json(content: Any, *, lines: bool = False) -> None:
    """Print a JSON text, on one line with `lines`."""
    # An encoding that lacks a character would escape it in another way than JSON.
    is_unicode = str(getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    text = json.dumps(content, indent=None if lines else 2, ensure_ascii=not is_unicode)
    # Only strings contain other characters that do not print, and JSON escapes them in the same
    # way.
    sys.stdout.write("\n".join(escaped(line) for line in text.split("\n")) + "\n")


def fail(code: int, *sentences: str) -> NoReturn:
    """Print the sentences to standard error and end with this exit code."""
    for sentence in sentences:
        say(sentence, err)
    sys.exit(code)


def refuse(refusal: CodedError, as_json: bool) -> NoReturn:
    """Print a refusal and end with `REFUSED`."""
    if as_json:
        print_json(refusal_json(refusal))
        sys.exit(REFUSED)
    fail(REFUSED, *sentences(refusal))


def sentences(refusal: CodedError) -> list[str]:
    """Return the messages of a refusal."""
    violations: Sequence[Violation] = getattr(refusal, "violations", ())
    if not violations:
        return [str(refusal)]
    whole = "payload" if isinstance(refusal, PayloadInvalid) else ""
    return [each.sentence(whole) for each in violations]


def of_options(faults: Iterable[Violation]) -> Iterator[str]:
    """Yield the faults of a request or a filter, by the options that it was made from."""
    from pydantic.alias_generators import to_snake

    for fault in faults:
        field = fault.path.removeprefix("/filter").lstrip("/").split("/")[0]
        name = to_snake(field).replace("_", "-")
        yield f"{'TYPE' if name == 'types' else '--' + name}: {fault.message}"


def refusal_json(refusal: CodedError) -> dict[str, Any]:
    """Return a refusal as `--json` prints it."""
    # Every refusal has `violations`, so that a program can read it without a check.
    content = {"code": refusal.code, "message": str(refusal), "violations": []}
    return content | refusal.details()


def fail_unexpectedly(error: Exception) -> NoReturn:
    """Log an unexpected error and end the command, with the error id only."""
    from job_registry_api.logs import configuration, configure_logs, log_unexpected

    # An error before the settings were read. structlog's default prints the values of local
    # variables, such as a database password.
    if configuration() is None:
        configure_logs("warning", "auto")
    error_id = log_unexpected("cli", error)
    fail(REFUSED, f"Something went wrong here. It is logged as {error_id}.")
