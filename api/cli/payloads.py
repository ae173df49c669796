"""The arguments TYPE and FILE, and the payloads in a file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from job_registry.json_values import NotJson, parse_json
from job_registry_api.cli.output import REFUSED, WRONG_USAGE, fail

TypeName = Annotated[
    str, typer.Argument(metavar="TYPE", help="A job type, such as thumbnail.create.")
]
File = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A file with the payload as JSON. - reads standard input."),
]


def read(file: str) -> str:
    """Return the text of a file, or of standard input for `-`."""
    name = "standard input" if file == "-" else file
    if file == "-" and sys.stdin is None:
        fail(WRONG_USAGE, "Cannot read standard input: it is closed.")
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig")  # Windows writes a byte order mark.
    except UnicodeDecodeError as error:
        fail(WRONG_USAGE, f"Cannot read {name}: byte {error.start + 1:,} is not UTF-8.")
    except (OSError, ValueError) as error:
        fail(WRONG_USAGE, f"Cannot read {name}: {getattr(error, 'strerror', None) or error}.")


def parse(text: str, file: str) -> Any:
    """Return the payload in a text. End the command if it is not JSON."""
    try:
        return parse_json(text)
    except NotJson as error:
        fail(REFUSED, f"{'Standard input' if file == '-' else file}: {error}")


def parse_lines(text: str, file: str) -> list[tuple[int, str]]:
    """Return the payloads of a file with their line numbers: one JSON text, or one per line."""
    with contextlib.suppress(NotJson):
        parse_json(text)
        return [(1, text)]
    # Not `splitlines`, which also ends a line at separators that JSON allows inside strings.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) < 2:
        parse(text, file)
    return lines
