"""`Payload`, the strict base model of every payload."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, JsonValue, PydanticUserError
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticSerializationError, core_schema

from job_registry.embedding import changed, embedded
from job_registry.errors import shortened, shortened_text
from job_registry.wire_text import reveals_secrets, with_wire_text

_in_payload: Final = ContextVar("in_payload", default=False)
"""Whether the core schema of a payload is being made, so that others are parts of it."""


def _reading_wire_text(schema: CoreSchema, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Return the schema of a payload, changed to read JSON as its JSON Schema says.

    Pydantic keeps enums and classes that are not payloads in separate definitions. These are
    changed too.
    """
    definitions: dict[str, Any] = {}

    def change(part: dict[str, Any]) -> Any:
        if part.get("type") == "model-fields":
            _check_names(part)
        if part.get("type") != "definition-ref":
            return with_wire_text(part)
        try:
            defined: Any = handler.resolve_ref_schema(cast(CoreSchema, part))
        except LookupError:
            return part  # A payload that is not complete, such as this one.
        if _is_of_payload(defined):
            return part
        # By another name: elsewhere, the class reads what Pydantic does.
        name = f"{part['schema_ref']}wire"
        if name not in definitions:
            definitions[name] = None  # It may refer to itself.
            definitions[name] = changed({**defined, "ref": name}, change)
        return {**part, "schema_ref": name}

    whole: CoreSchema = changed(schema, change)
    if not definitions:
        return whole
    return core_schema.definitions_schema(whole, list(definitions.values()))


def _check_names(fields: dict[str, Any]) -> None:
    """Refuse two fields with one name in JSON: both would read the same value."""
    names: dict[str, str] = {}
    for field, part in fields["fields"].items():
        name = part.get("validation_alias", field)
        if isinstance(name, str) and names.setdefault(name, field) != field:
            raise TypeError(
                f"{fields['model_name']} has two fields that are {name} in JSON, {names[name]} and"
                f" {field}: rename one, or give one Field(alias=...)"
            )


def _is_of_payload(schema: Any) -> bool:
    """Return whether this is the schema of a payload, perhaps with validators around it."""
    while schema["type"] != "model" and isinstance(schema.get("schema"), dict):
        schema = schema["schema"]
    return schema["type"] == "model" and issubclass(schema["cls"], Payload)


class Payload(BaseModel):
    """Base of every payload: strict, frozen, camelCase on the wire, unknown fields refused.

    Strict means that "1" is not a number, 1 is not a string, and true is not a number. A payload is
    always validated as JSON, so dates, times, UUIDs and decimals are JSON strings, in the formats
    that the JSON Schema names. A decimal as a JSON number is refused, because a parser may have
    lost some of its digits. A number such as 1.0 is an integer, as JSON Schema says.

    As a part of another type, such as `list[MailSend]`, a model or a body in FastAPI, a dict is
    validated as `enqueueJob` does it, by the names and the rules of JSON. A dict with Python
    values, such as a datetime, is validated as the arguments of the class are.
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
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if cls.__dict__.get("__pydantic_complete__"):
            return handler(source) if _in_payload.get() else embedded(cls)
        outside = _in_payload.set(True)
        try:
            return _reading_wire_text(handler(source), handler)
        except PydanticUserError as error:
            if error.code != "discriminator-validator":
                raise
            raise TypeError(
                f"{cls.__name__} has a discriminator of numbers or of true and false: use a"
                " Literal of strings, because JSON's true is not its 1, and Python's is"
            ) from error
        finally:
            _in_payload.reset(outside)


def document_of(payload: Payload) -> JsonValue:
    """Return a payload as JSON, as it is stored: with every field, secrets as well.

    Raises:
        TypeError: it is not a `Payload`.
        ValueError: it cannot be written as JSON.
    """
    if not isinstance(payload, Payload):
        raise TypeError(f"expected an instance of a Payload; got {shortened(payload)}")
    stored = reveals_secrets.set(True)
    try:
        # Without computed fields, and without warnings about fields of another type: the JSON is
        # validated again.
        document: JsonValue = payload.model_dump(
            mode="json",
            by_alias=True,
            round_trip=True,
            # A field of a subclass is written, and then refused. Otherwise it would be left out.
            polymorphic_serialization=True,
            warnings=False,
        )
    except PydanticSerializationError as error:
        raise ValueError(shortened_text(str(error), 200)) from error
    finally:
        reveals_secrets.reset(stored)
    return document
