"""`Payload`, the strict base model of every payload."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic.alias_generators import to_camel
from pydantic_core import (
    CoreSchema,
    PydanticKnownError,
    PydanticSerializationError,
    core_schema,
)

from job_registry.errors import shortened, shortened_text


# Above its user, because making the class below calls them.
def _decimals_as_text(schema: Any) -> Any:
    """Return the core schema with every decimal read from a JSON string, at any depth."""
    if isinstance(schema, dict):
        walked = {
            key: value if key in ("metadata", "default") else _decimals_as_text(value)
            for key, value in schema.items()
        }
        if walked.get("type") == "decimal":
            return core_schema.no_info_before_validator_function(
                _decimal_text, cast(CoreSchema, walked)
            )
        return walked
    if isinstance(schema, list):
        return [_decimals_as_text(value) for value in schema]
    if isinstance(schema, tuple):
        return tuple(_decimals_as_text(value) for value in schema)
    return schema


def _decimal_text(value: object) -> object:
    if isinstance(value, str):
        try:
            return Decimal(value)
        except InvalidOperation:
            raise PydanticKnownError("decimal_parsing") from None
    if not isinstance(value, Decimal):
        raise PydanticKnownError("decimal_type")
    return value


class Payload(BaseModel):
    """Base of every payload: strict, frozen, camelCase on the wire, unknown fields refused.

    Strict means that "1" is not a number, 1 is not a string, and true is not a number. A payload is
    always validated as JSON, so dates, times, UUIDs and decimals are JSON strings. A decimal as a
    JSON number is refused, because a parser may have lost some of its digits.
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
        # What comes in is JSON, where these do not exist.
        allow_inf_nan=False,
        regex_engine="rust-regex",
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return cast(CoreSchema, _decimals_as_text(handler(source)))


def document_of(payload: Payload) -> JsonValue:
    """Return a payload as JSON, with every field.

    Raises:
        TypeError: it is not a `Payload`.
        ValueError: it cannot be written as JSON.
    """
    if not isinstance(payload, Payload):
        raise TypeError(f"expected an instance of a Payload; got {shortened(payload)}")
    try:
        # Without warnings about fields of another type: the JSON is validated again.
        document: JsonValue = payload.model_dump(mode="json", by_alias=True, warnings=False)
    except PydanticSerializationError as error:
        raise ValueError(shortened_text(str(error), 200)) from error
    return document
