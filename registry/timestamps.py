"""Finds dates and times that are written as a number of seconds, which Pydantic reads from text.

It takes "2030" for 1970-01-01T00:33:50Z. A caller who writes that means something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from typing import Final

from pydantic import BaseModel

from job_registry.errors import Violation, shortened
from job_registry.json_values import pointer_of

DATE: Final = "a date in ISO 8601, such as 2030-01-31"
DATE_TIME: Final = "a date and time in ISO 8601, such as 2030-01-31T12:00:00Z"

_NUMBER: Final = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)


def timestamps(
    parsed: object, sent: object, path: tuple[str | int, ...] = ()
) -> Iterator[Violation]:
    """Yield a violation for each date or time in `parsed` that is a number in `sent`.

    `sent` is the JSON value that was parsed.
    """
    if isinstance(sent, str):
        if isinstance(parsed, date) and _NUMBER.fullmatch(sent):
            expected = DATE_TIME if isinstance(parsed, datetime) else DATE
            message = f"Expected {expected}; got {shortened(sent)}."
            yield Violation(pointer_of(path), "invalid_format", message)
    elif isinstance(sent, Mapping):
        for name, value in _fields(parsed):
            if name in sent:
                yield from timestamps(value, sent[name], (*path, name))
    elif isinstance(sent, list) and isinstance(parsed, list | tuple):
        for index, (value, item) in enumerate(zip(parsed, sent, strict=False)):
            yield from timestamps(value, item, (*path, index))


def _fields(parsed: object) -> Iterator[tuple[str, object]]:
    """Yield what an object holds, by the names that JSON has for it."""
    if isinstance(parsed, BaseModel):
        for name, field in type(parsed).model_fields.items():
            alias = field.validation_alias or field.alias or name
            if isinstance(alias, str):
                yield alias, getattr(parsed, name)
    elif isinstance(parsed, Mapping):
        yield from ((key, value) for key, value in parsed.items() if isinstance(key, str))
