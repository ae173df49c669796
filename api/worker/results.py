"""Converts a handler's result to JSON. A result that is too large is refused early."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from typing import Any, Final

from pydantic import BaseModel, JsonValue
from pydantic_core import PydanticSerializationError, to_jsonable_python

from job_registry import Violation
from job_registry.errors import shortened_text
from job_registry.json_values import MAX_DEPTH, json_document, pointer_of
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
    except MemoryError as error:
        return raised(error)
    except BaseException as error:  # Including SystemExit, which would end the process.
        return ResultRefused(f"The handler's result is not JSON: {why_not_json(value, error)}")
    if faults:
        return ResultRefused(f"The handler's result cannot be stored: {_sentences(faults)}")
    return Returned(converted)


def why_not_json(value: object, error: BaseException) -> str:
    """Return the place in a value that is not JSON, and what is wrong there.

    `error` was raised when the whole value was converted. It does not say where.
    """
    path: list[str | int] = []
    seen: set[int] = set()
    while len(path) < MAX_DEPTH and id(value) not in seen:  # A value may contain itself.
        seen.add(id(value))
        part = _part_that_fails(value)
        if part is None:
            break
        path.append(part[0])
        value = part[1]
    place = pointer_of(path) or "/"
    if not isinstance(error, _NotOneValue | PydanticSerializationError):
        words = shortened_text(storable(words_of(error)), 500)
        return f"{place}: {type(error).__name__}: {words}"
    if isinstance(value, dict):
        name = next((key for key in value if not _is_convertible({key: None})), value)
        return f"{place}: Expected text as the name of a field; got {_kind_of(name)}."
    return f"{place}: Expected a JSON value; got {_kind_of(value)}."


def _kind_of(value: object) -> str:
    return f"a value of the type {type(value).__name__}"


def _part_that_fails(value: Any) -> tuple[str | int, object] | None:
    """Return the first part of a value that is not JSON, after its name or index.

    None if every part is.
    """
    if isinstance(value, BaseModel):
        return _field_that_fails(value)
    parts: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, dict):
        parts = ((key if isinstance(key, int) else str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = enumerate(value)
    elif is_dataclass(value):
        parts = ((field.name, getattr(value, field.name)) for field in fields_of(value))
    return next((part for part in parts if not _is_convertible(part[1])), None)


def _field_that_fails(model: BaseModel) -> tuple[str, object] | None:
    """Return the first field of a Pydantic model that is not JSON.

    A model may convert a field by a function of its own, so that its value alone says nothing.
    """

    def converts(*names: str) -> bool:
        try:
            model.model_dump(mode="json", by_alias=True, include=set(names))
        except BaseException:
            return False
        return True

    fields = type(model).model_fields
    if converts():  # Otherwise the fault is not in a field.
        for name in (*fields, *type(model).model_computed_fields):
            if not converts(name):
                alias = fields[name].serialization_alias if name in fields else None
                return alias or name, vars(model).get(name)
    return None


def _is_convertible(value: object) -> bool:
    try:
        _walk(value, _SEARCHED_BYTES)
        to_jsonable_python(value, by_alias=True)
    except BaseException:
        return False
    return True


_SEARCHED_BYTES: Final = 1_048_576
"""How much of a value is searched for iterators: it may contain itself."""


class _NotOneValue(Exception):
    """Raised for an iterator, which can be read only once and may never end."""


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
                    raise _NotOneValue
    return size, plain


def _too_large(max_bytes: int) -> ResultRefused:
    return ResultRefused(
        f"The handler's result cannot be stored: expected at most {max_bytes:,} bytes of JSON,"
        " got more. Store large results in the assets, and return their names."
    )


def _sentences(faults: list[Violation]) -> str:
    return " ".join(f"{fault.path or '/'}: {fault.message}" for fault in faults[:5])
