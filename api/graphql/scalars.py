"""The scalars: what they take, and what they give."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, NewType

import strawberry
from graphql import (
    GraphQLScalarType,
    IntValueNode,
    StringValueNode,
    ValueNode,
    print_ast,
)
from pydantic import TypeAdapter, ValidationError
from strawberry.types.scalar import ScalarDefinition

_RFC_3339: Final = "https://datatracker.ietf.org/doc/html/rfc3339"

JSON = NewType("JSON", object)
DateTime = NewType("DateTime", datetime)
TypedJob = NewType("TypedJob", object)
"""Stands for `TypedJobInput` until a registry is at hand to make that of."""


_TIME: Final = TypeAdapter(datetime)


def _parse_time(value: object) -> datetime:
    """A time as RFC 3339 and its relatives write it. That an offset from UTC has to be there is
    said where it has to, in the words of every other door."""
    if isinstance(value, str):
        for parse in (datetime.fromisoformat, _TIME.validate_strings):
            try:
                return parse(value)
            except (ValueError, ValidationError):
                continue
    raise ValueError('expected a string with a time and its offset, "2030-01-31T12:00:00Z"')


def _format_time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


SCALARS: Final[dict[object, ScalarDefinition]] = {
    TypedJob: strawberry.scalar(name="TypedJobInput"),
    JSON: strawberry.scalar(
        name="JSON",
        description="Any JSON value. Integers up to 64 bits are kept exactly.",
        specified_by_url="https://datatracker.ietf.org/doc/html/rfc8259",
    ),
    DateTime: strawberry.scalar(
        name="DateTime",
        description=(
            "A moment, as RFC 3339 writes it. Given in UTC, `2030-01-31T12:00:00Z`; taken with any"
            " offset, which has to be there."
        ),
        specified_by_url=_RFC_3339,
        serialize=_format_time,
        parse_value=_parse_time,
    ),
}


def _text_scalar(name: str, description: str, specified_by_url: str | None) -> GraphQLScalarType:
    """A string in the JSON of a payload. Whether it is well formed the registry says, in the union
    of errors and with the field's path."""

    def text(value: object) -> str:
        if isinstance(value, str):
            return value
        raise ValueError("expected a string")

    return GraphQLScalarType(
        name,
        description=description,
        specified_by_url=specified_by_url,
        coerce_output_value=text,
        coerce_input_value=text,
        coerce_input_literal=lambda node: text(_literal(node)),
    )


TEXT_SCALARS: Final = {
    "date": _text_scalar("Date", "A day, as RFC 3339 writes it: `2030-01-31`.", _RFC_3339),
    "time": _text_scalar("Time", "A time of day, as RFC 3339 writes it: `12:00:00Z`.", _RFC_3339),
    "duration": _text_scalar(
        "Duration",
        "A length of time, as ISO 8601 writes it: `PT1H30M`.",
        "https://datatracker.ietf.org/doc/html/rfc3339#appendix-A",
    ),
    "uuid": _text_scalar(
        "UUID",
        "A UUID: `3f2504e0-4f89-41d3-9a0c-0305e82c3301`.",
        "https://datatracker.ietf.org/doc/html/rfc9562",
    ),
    "decimal": _text_scalar(
        "Decimal", 'A decimal number, written as a string to keep its digits: `"10.50"`.', None
    ),
}
"""By the `format` of a JSON Schema."""


def _big_int(value: object) -> int:
    number = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value, re.ASCII):
        number = int(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError("expected a whole number of 64 bits, or a string of its digits")
    return number


BIG_INT: Final = GraphQLScalarType(
    "BigInt",
    description="A whole number of up to 64 bits. Taken as a number or, where a client's numbers"
    " lose digits past 2^53 as JavaScript's do, as a string of its digits.",
    coerce_output_value=_big_int,
    coerce_input_value=_big_int,
    coerce_input_literal=lambda node: _big_int(_literal(node)),
)


def _literal(node: ValueNode) -> object:
    match node:
        case StringValueNode():
            return node.value
        case IntValueNode():
            # A number of 5,000 digits is no number to anyone, and slow to read.
            return int(node.value) if len(node.value) < 30 else node.value
    return print_ast(node)
