"""The scalars `JSON` and `DateTime`: what they take, and what they give."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, NewType

import strawberry
from graphql import GraphQLError
from strawberry.types.scalar import ScalarDefinition

from registry.errors import shortened

JSON = NewType("JSON", object)
DateTime = NewType("DateTime", datetime)


def _parse_time(value: object) -> datetime:
    """A time with its offset from UTC, RFC 3339; without one nobody could say when it is."""
    if isinstance(value, str):
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            time = None
        if time is not None and time.tzinfo is not None:
            return time
    raise GraphQLError(
        'DateTime expects a string with a time and its offset, "2030-01-31T12:00:00Z", got'
        f" {shortened(value)}."
    )


def _format_time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


SCALARS: Final[dict[object, ScalarDefinition]] = {
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
        specified_by_url="https://datatracker.ietf.org/doc/html/rfc3339",
        serialize=_format_time,
        parse_value=_parse_time,
    ),
}
