"""How the fields of a payload read JSON: dates, numbers and UUIDs exactly as its JSON Schema says.

Pydantic accepts more: "2030" as a time in 1970, "1_000" as a decimal, "{...}" as a UUID, true as
`Literal[1]`. It also refuses 1.0 as an integer, which JSON Schema (draft 2020-12) allows.

It writes a set in the order of the hashes of its items, which differs from process to process.
Here equal payloads are written alike, so that an idempotency key finds its job.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from enum import Enum
from functools import partial
from typing import Any, Final, cast
from uuid import UUID

from pydantic import SerializationInfo, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import (
    CoreSchema,
    PydanticKnownError,
    PydanticSerializationUnexpectedValue,
    core_schema,
    to_json,
)

from job_registry.errors import alternatives

_DATE: Final = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
# `fromisoformat` takes an offset of +01:60.
_HOUR_AND_MINUTE: Final = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_CLOCK: Final = rf"{_HOUR_AND_MINUTE}:[0-9]{{2}}(?:\.[0-9]+)?"
_OFFSET: Final = rf"(?:[Zz]|[+-]{_HOUR_AND_MINUTE})"
_FULL_DATE: Final = re.compile(_DATE)
_FULL_TIME: Final = re.compile(_CLOCK + _OFFSET)
_DATE_TIME: Final = re.compile(f"{_DATE}[Tt]{_CLOCK}{_OFFSET}?")
# Years, months and days, or weeks. Beyond RFC 3339, a fraction of a second and a leading sign, as
# Pydantic writes them.
_DURATION: Final = re.compile(
    r"[+-]?P(?=[0-9T])(?:[0-9]+W|(?:[0-9]+Y)?(?:[0-9]+M)?(?:[0-9]+D)?"
    r"(?:T(?=[0-9])(?:[0-9]+H)?(?:[0-9]+M)?(?:[0-9]+(?:\.[0-9]+)?S)?)?)"
)
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
# Without exponents, spaces and underscores, and with ASCII digits only.
_DECIMAL: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_WHOLE: Final = 2.0**63
_SECONDS: Final = TypeAdapter(timedelta)

_TAGGED: Final = "job_registry_reads_as_its_schema_says"
_TAG: Final[dict[str, Any]] = {_TAGGED: True}

reveals_secrets: Final = ContextVar("reveals_secrets", default=False)
"""Whether a payload is written to be stored. Otherwise Pydantic writes stars for a secret."""

MAPPINGS: Final = ("dict", "frozendict", "ordered-dict", "counter")
"""The kinds of core schemas that read an object with any names."""

_JSON_HAS_NONE: Final = ("tuple", "set", "frozenset", "deque", "ordered-dict", "bytes")
"""Kinds that read JSON the same way, strict or not. But after a validator of the user's own that
runs first, Pydantic has JSON as Python values, and a strict tuple refuses the list that it is."""

Reader = Callable[[Any, ValidationInfo], Any]
"""A validator that runs before Pydantic's own."""


def parse_date_time(text: str) -> datetime:
    """Parse a time in RFC 3339. Six digits of a fraction of a second are kept.

    A time without an offset is returned without one; the caller decides whether to refuse it. A
    leap second, which ends in `:60`, is refused, because Python and the databases have none.

    Raises:
        ValueError: the text is not a date and a time of day.
    """
    if _DATE_TIME.fullmatch(text) is None:
        raise ValueError('Expected a time with its offset, such as "2030-01-31T12:00:00Z".')
    return datetime.fromisoformat(text.upper())


def with_wire_text(part: dict[str, Any]) -> Any:
    """Return a part of a core schema, changed to read JSON as its JSON Schema says if needed."""
    kind = part.get("type", "")
    # What refers to this part then refers to it with its reader.
    ref, inner = part.get("ref"), {key: value for key, value in part.items() if key != "ref"}
    if kind in _JSON_HAS_NONE and "strict" not in part:
        part = {**part, "strict": False}
    if kind in MAPPINGS:
        return _with_keys_as_text(part)
    if kind in ("set", "frozenset"):
        written = core_schema.wrap_serializer_function_ser_schema(_ordered_set, when_used="json")
        return {"serialization": written, **part}
    if kind in ("literal", "enum"):
        return _with_numbers_apart(part)
    if kind == "decimal":
        # Written without an exponent, which `_DECIMAL` would refuse.
        plain = core_schema.plain_serializer_function_ser_schema(
            _plain_decimal, return_schema=core_schema.str_schema(), when_used="json-unless-none"
        )
        inner["serialization"] = part.get("serialization", plain)
        return core_schema.no_info_before_validator_function(
            _decimal_text,
            _core(inner),
            ref=ref,
            metadata=_TAG,
            json_schema_input_schema=core_schema.str_schema(),
        )
    if kind == "function-plain" and _hides_secrets(part["function"]):
        return {**part, "function": _SecretWriter(part["function"])}
    read = _READERS.get(kind)
    if kind == "datetime" and part.get("tz_constraint") != "naive":
        read = _aware
    if kind == "function-plain" and _reads_any_address(part["function"]):
        read = _text_only
    if read is None:
        return part
    # Without its reader, an integer takes less than its schema says, and nothing more.
    tag = None if kind == "int" else _TAG
    return core_schema.with_info_before_validator_function(
        read, _core(inner), ref=ref, metadata=tag
    )


def _with_keys_as_text(part: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping without the reader of whole numbers for its keys: in JSON, they are text."""
    keys = part.get("keys_schema", {})
    if keys.get("type") == "function-before" and keys["function"]["function"] is _whole:
        keys = keys["schema"]
    if keys.get("type") in ("int", "float", "bool") and "strict" not in keys:
        keys = {**keys, "strict": False}  # As `_JSON_HAS_NONE`.
    return {**part, "keys_schema": keys} if keys else part


def _with_numbers_apart(part: dict[str, Any]) -> Any:
    """Return values to choose from, of which true is not 1: Pydantic compares them in Python."""
    members = part["expected"] if part["type"] == "literal" else part["members"]
    values = [each.value if isinstance(each, Enum) else each for each in members]
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers:
        return part
    booleans = {value for value in numbers if isinstance(value, bool)}
    others = {value for value in numbers if not isinstance(value, bool)}
    expected = alternatives(map(repr, values))
    fault: Any = "literal_error" if part["type"] == "literal" else "enum"

    def read(value: Any, info: ValidationInfo) -> Any:
        alike = booleans if isinstance(value, bool) else others
        if info.mode == "json" and isinstance(value, int | float) and value not in alike:
            raise PydanticKnownError(fault, {"expected": expected})
        return value

    # What refers to the values now refers to them with their reader.
    inner = {key: value for key, value in part.items() if key != "ref"}
    return core_schema.with_info_before_validator_function(
        read, _core(inner), ref=part.get("ref"), metadata=_TAG
    )


def ordered(items: Iterable[Any]) -> list[Any]:
    """Return the items of a set in an order that depends on nothing else."""
    listed = list(items)
    try:
        return sorted(listed)
    except TypeError:
        # An item that is not JSON cannot be in a payload. Whoever writes the list says so.
        return sorted(listed, key=partial(to_json, fallback=str))


def reads_as_its_schema_says(schema: Any) -> bool:
    """Return whether this is a core schema of `with_wire_text` that takes less than Pydantic's."""
    return _TAGGED in (schema.get("metadata") or ())


def is_secret(schema: Any) -> bool:
    """Return whether this is the core schema of a secret in a `Payload`."""
    return isinstance(schema.get("serialization", {}).get("function"), _SecretWriter)


def reads_decimals_as_text(schema: Any) -> bool:
    """Return whether this is the core schema of a decimal in a `Payload`."""
    return bool(
        schema["type"] == "function-before" and schema["function"]["function"] is _decimal_text
    )


def _core(part: dict[str, Any]) -> CoreSchema:
    return cast(CoreSchema, part)


def _decimal_text(value: object) -> object:
    if isinstance(value, str):
        try:
            return Decimal(value if _DECIMAL.fullmatch(value) else "")
        except InvalidOperation:
            raise PydanticKnownError("decimal_parsing") from None
    if not isinstance(value, Decimal):
        raise PydanticKnownError("decimal_type")
    return value


def _ordered_set(value: Any, write: Callable[[Any], Any]) -> Any:
    written = write(value)
    return ordered(written) if isinstance(value, set | frozenset) else written


def _plain_decimal(value: object) -> str:
    if not isinstance(value, Decimal):
        # Of a union: the writer of another member is to write it.
        raise PydanticSerializationUnexpectedValue("Expected a decimal")
    return format(value, "f")


def _hides_secrets(function: object) -> bool:
    """Return whether this is Pydantic's serializer of `SecretStr`, `SecretBytes` or `Secret`."""
    name = getattr(function, "__name__", "")
    return getattr(function, "__module__", "") == "pydantic.types" and "_secret" in name


def _reads_any_address(function: object) -> bool:
    """Return whether this is Pydantic's validator of `IPvAnyAddress`, or of its kind."""
    validate = function.get("function") if isinstance(function, dict) else None
    return (
        getattr(validate, "__module__", "") == "pydantic.networks"
        and getattr(validate, "__qualname__", "").startswith("IPvAny")
    )  # fmt: skip


class _SecretWriter:
    """Writes a secret itself if the payload is stored, and what Pydantic writes otherwise."""

    def __init__(self, hide: Callable[[Any, SerializationInfo], Any]) -> None:
        self._hide = hide

    def __call__(self, value: Any, info: SerializationInfo) -> Any:
        return value.get_secret_value() if reveals_secrets.get() else self._hide(value, info)


def _text_reader(pattern: re.Pattern[str], parse: Callable[[str], object], fault: str) -> Reader:
    """Return a validator that parses a JSON string, and leaves other values to Pydantic."""

    def read(value: Any, info: ValidationInfo) -> Any:
        if info.mode != "json" or not isinstance(value, str):
            return value
        try:
            if pattern.fullmatch(value) is not None:
                return parse(value)
        except (ValueError, ValidationError, OverflowError):
            pass
        error: Any = fault
        raise PydanticKnownError(error, {"error": "not in RFC 3339"} if "pars" in fault else None)

    return read


def _naive(text: str) -> datetime:
    found = parse_date_time(text)
    if found.tzinfo is not None:
        raise ValueError
    return found


def _with_offset(text: str) -> datetime:
    found = parse_date_time(text)
    if found.tzinfo is None:
        raise ValueError
    return found


def _whole(value: Any, info: ValidationInfo) -> Any:
    is_whole = type(value) is float and value.is_integer() and -_WHOLE <= value < _WHOLE
    return int(value) if info.mode == "json" and is_whole else value


def _text_only(value: Any, info: ValidationInfo) -> Any:
    """Leave text to Pydantic, which reads a number as an address too."""
    if info.mode == "json" and not isinstance(value, str):
        raise PydanticKnownError("string_type")
    return value


_aware: Final = _text_reader(_DATE_TIME, _with_offset, "datetime_parsing")
_READERS: Final[dict[str, Reader]] = {
    "datetime": _text_reader(_DATE_TIME, _naive, "timezone_naive"),
    "date": _text_reader(_FULL_DATE, date.fromisoformat, "date_parsing"),
    "time": _text_reader(_FULL_TIME, lambda text: time.fromisoformat(text.upper()), "time_parsing"),
    "timedelta": _text_reader(_DURATION, _SECONDS.validate_python, "time_delta_parsing"),
    "uuid": _text_reader(_UUID, UUID, "uuid_parsing"),
    "int": _whole,
}
