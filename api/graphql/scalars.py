"""The scalars, and the Python type that stands for each in annotations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Final, NewType
from uuid import UUID

import strawberry
from graphql import (
    ListValueNode,
    ObjectValueNode,
    ValueNode,
    VariableNode,
    value_from_ast_untyped,
)
from pydantic import JsonValue
from strawberry.schema.types.scalar import DEFAULT_SCALAR_REGISTRY
from strawberry.types.scalar import ScalarDefinition

from job_registry.wire_text import parse_date_time
from job_registry_api.graphql.context import sent_variables
from job_registry_api.job_json import json_of_time

TimeText = NewType("TimeText", str)
"""A `DateTime` as a client wrote it. A `DateTime` of ours is a plain `datetime`."""

DateText = NewType("DateText", str)
TimeOfDayText = NewType("TimeOfDayText", str)
DurationText = NewType("DurationText", str)
UUIDText = NewType("UUIDText", str)
DecimalText = NewType("DecimalText", str)
BigInt = NewType("BigInt", int)

_RFC_3339: Final = "https://datatracker.ietf.org/doc/html/rfc3339"


def _checked_time(value: object) -> str:
    """Return the text itself: what a payload stores is the client's own text."""
    text = _text(value)
    parse_date_time(text)
    return text


def _text(value: object) -> str:
    """Return a string. Whether it is well formed is for the registry, which names the path."""
    if not isinstance(value, str):
        raise ValueError("Expected a string.")
    return value


def _big_int(value: object) -> int:
    number = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif (isinstance(value, float) and value.is_integer() and abs(value) < 2**63) or (
        isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value, re.ASCII)
    ):
        number = int(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError("Expected a whole number of 64 bits, or a string of its digits.")
    return number


_ABSENT: Final = object()


def _as_is(value: object) -> object:
    return value


def _json_of_literal(node: ValueNode, coerced: dict[str, Any] | None = None) -> Any:
    """Return the JSON of a literal. Variables in it have the values that the client sent.

    GraphQL coerces variables to values in Python, such as the members of enums, which are not JSON.
    As in an input object, an entry whose variable is absent is left out; in a list it is null.
    """
    value = _literal(node, coerced)
    return None if value is _ABSENT else value


def _literal(node: ValueNode, coerced: dict[str, Any] | None) -> Any:
    match node:
        case VariableNode():
            return _variable(node.name.value, coerced)
        case ObjectValueNode(fields=fields):
            entries = ((each.name.value, _literal(each.value, coerced)) for each in fields)
            return {name: value for name, value in entries if value is not _ABSENT}
        case ListValueNode(values=values):
            return [_json_of_literal(each, coerced) for each in values]
    return value_from_ast_untyped(node)


def _variable(name: str, coerced: dict[str, Any] | None) -> Any:
    variables = sent_variables.get()
    if variables is None:  # In a schema without our executor and extensions.
        return (coerced or {}).get(name, _ABSENT)
    if name in variables.sent:
        return variables.sent[name]
    default = variables.default_of(name)
    return _ABSENT if default is None else _literal(default, None)


def _input_scalar(
    name: str,
    description: str,
    specified_by_url: str | None,
    parse: Callable[[object], object] = _text,
) -> ScalarDefinition:
    return strawberry.scalar(
        name=name,
        description=description,
        specified_by_url=specified_by_url,
        serialize=parse,
        parse_value=parse,
    )


_DATE_TIME: Final = strawberry.scalar(
    name="DateTime",
    description="A moment in RFC 3339. Responses have it in UTC, such as `2030-01-31T12:00:00Z`."
    " Inputs may have any offset, and must have one.",
    specified_by_url=_RFC_3339,
    serialize=json_of_time,
    parse_value=_checked_time,
)

SCALARS: Final[dict[object, ScalarDefinition]] = {
    JsonValue: strawberry.scalar(
        name="JSON",
        description="Any JSON value. Integers up to 64 bits are kept exactly.",
        specified_by_url="https://datatracker.ietf.org/doc/html/rfc8259",
        parse_value=_as_is,
        parse_literal=_json_of_literal,
    ),
    datetime: _DATE_TIME,
    TimeText: _DATE_TIME,
    DateText: _input_scalar("Date", "A day in RFC 3339, such as `2030-01-31`.", _RFC_3339),
    TimeOfDayText: _input_scalar(
        "Time", "A time of day in RFC 3339, such as `12:00:00Z`.", _RFC_3339
    ),
    DurationText: _input_scalar(
        "Duration",
        "A length of time in ISO 8601, such as `PT1H30M`.",
        f"{_RFC_3339}#appendix-A",
    ),
    UUIDText: _input_scalar(
        "UUID",
        "A UUID, such as `3f2504e0-4f89-41d3-9a0c-0305e82c3301`.",
        "https://datatracker.ietf.org/doc/html/rfc9562",
    ),
    DecimalText: _input_scalar(
        "Decimal",
        'A decimal number as a string, which keeps its digits, such as `"10.50"`.',
        None,
    ),
    BigInt: _input_scalar(
        "BigInt",
        "A whole number of up to 64 bits. Send a number, or a string of its digits if your client"
        " loses digits past 2^53, as JavaScript does.",
        None,
        _big_int,
    ),
}


def scalars_of_host(hosts: Mapping[object, ScalarDefinition]) -> dict[object, ScalarDefinition]:
    """Return the scalars for a host's schema, whose `scalar_map` is `hosts`.

    A schema has each name once. So ours are the host's, or Strawberry's, where it has these names.
    """
    known = {**DEFAULT_SCALAR_REGISTRY, **hosts}
    # Strawberry's own JSON has no rule for variables inside a literal.
    json = hosts.get(strawberry.scalars.JSON, SCALARS[JsonValue])
    return {
        **hosts,
        strawberry.scalars.JSON: json,
        JsonValue: json,
        TimeText: known[datetime],
        DateText: known[date],
        TimeOfDayText: known[time],
        UUIDText: known[UUID],
        DecimalText: known[Decimal],
        DurationText: SCALARS[DurationText],
        BigInt: SCALARS[BigInt],
    }


TEXT_TYPES: Final[dict[str, object]] = {
    "date-time": TimeText,
    "date": DateText,
    "time": TimeOfDayText,
    "duration": DurationText,
    "uuid": UUIDText,
    "decimal": DecimalText,
}
"""The types of strings by the `format` of their JSON Schema."""
