"""Converts a handler's result to JSON. A result that is too large is refused early."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from job_registry import Violation
from job_registry.errors import shortened_text
from job_registry.json_values import json_document
from job_registry_api.worker.outcomes import (
    Raised,
    ResultRefused,
    Returned,
    raised,
    storable,
    words_of,
)

SMALL_BYTES: Final = 16_384
"""The size up to which plain JSON is converted on the event loop, in about a millisecond."""


def is_small(value: object) -> bool:
    """Return whether converting this value takes at most a millisecond."""
    size, plain = _walk(value, SMALL_BYTES)
    return plain and size <= SMALL_BYTES


def result_of(value: object, *, max_bytes: int) -> Returned | ResultRefused | Raised:
    """Convert a handler's result to JSON, or return why it cannot be stored. Never raises.

    The conversion runs user code, for example the computed fields of a model.
    """
    if value is None:
        return Returned(None)
    try:
        if _walk(value, max_bytes)[0] > max_bytes:
            return _too_large(max_bytes)
        converted: JsonValue = to_jsonable_python(value, by_alias=True)
        # The size of a model is known only now.
        if _walk(converted, max_bytes)[0] > max_bytes:
            return _too_large(max_bytes)
        _, faults = json_document(converted, max_bytes=max_bytes)
    except _NotOneValue as error:
        return ResultRefused(f"The handler's result is not JSON: it holds a {error.kind}.")
    except MemoryError as error:
        return raised(error)
    except BaseException as error:  # Including SystemExit, which would end the process.
        words = shortened_text(storable(words_of(error)), 500)
        return ResultRefused(
            f"The handler's result cannot be converted to JSON: {type(error).__name__}: {words}"
        )
    if faults:
        return ResultRefused(f"The handler's result cannot be stored: {_sentences(faults)}")
    return Returned(converted)


class _NotOneValue(Exception):
    """Raised for an iterator, which can be read only once and may never end."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


def _walk(value: object, limit: int) -> tuple[int, bool]:
    """Return a lower bound of the bytes of a value's JSON, and whether all of it is plain JSON.

    The count ends just above `limit`. A value that is not plain JSON counts as one byte.
    """
    size, plain = 0, True
    waiting: list[Any] = [value]
    while waiting and size <= limit:
        item = waiting.pop()
        kind = type(item)
        if kind is str:
            size += len(item) + 2
        elif kind is dict:
            size += 2 * len(item)
            if size <= limit:
                waiting.extend(item.values())
                waiting.extend(key for key in item if type(key) is str)
        elif kind is list or kind is tuple:
            size += len(item)
            if size <= limit:
                waiting.extend(item)
        else:
            size += 1
            if not (item is None or kind in (bool, int, float)):
                plain = False
                if isinstance(item, Iterator | AsyncIterator):
                    raise _NotOneValue(kind.__name__)
    return size, plain


def _too_large(max_bytes: int) -> ResultRefused:
    return ResultRefused(
        f"The handler's result cannot be stored: expected at most {max_bytes:,} bytes of JSON,"
        " got more. Store large results in the assets, and return their names."
    )


def _sentences(faults: list[Violation]) -> str:
    return " ".join(f"{fault.path or '/'}: {fault.message}" for fault in faults[:5])
