"""`Payload`, the strict base model of every payload."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any, Final, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic.alias_generators import to_camel
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    PydanticKnownError,
    core_schema,
)

from job_registry.errors import Violation
from job_registry.json_values import MAX_VIOLATIONS, json_document
from job_registry.timestamps import timestamps


# Above their user, because making the class below calls them.
def _changed(schema: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a copy of a core schema in which each part is changed, the innermost first."""
    if isinstance(schema, dict):
        return change(
            {
                key: value if key in ("metadata", "default") else _changed(value, change)
                for key, value in schema.items()
            }
        )
    if isinstance(schema, list | tuple):
        return type(schema)(_changed(value, change) for value in schema)
    return schema


def _with_decimal_as_text(part: dict[str, Any]) -> Any:
    """Return a decimal that is read from a JSON string only."""
    if part.get("type") == "decimal":
        return core_schema.no_info_before_validator_function(
            _decimal_text,
            cast(CoreSchema, part),
            json_schema_input_schema=core_schema.str_schema(),
        )
    return part


def _decimal_text(value: object) -> object:
    if isinstance(value, str):
        try:
            return Decimal(value)
        except InvalidOperation:
            raise PydanticKnownError("decimal_parsing") from None
    if not isinstance(value, Decimal):
        raise PydanticKnownError("decimal_type")
    return value


def reads_decimals_as_text(schema: Any) -> bool:
    """Return whether this is the core schema of a decimal in a `Payload`."""
    return bool(
        schema["type"] == "function-before" and schema["function"]["function"] is _decimal_text
    )


_in_payload: Final = ContextVar("in_payload", default=False)
"""Whether the core schema of a payload is being made, so that others are parts of it."""


class Payload(BaseModel):
    """Base of every payload: strict, frozen, camelCase on the wire, unknown fields refused.

    Strict means that "1" is not a number, 1 is not a string, and true is not a number. A payload is
    always validated as JSON, so dates, times, UUIDs and decimals are JSON strings. A decimal as a
    JSON number is refused, because a parser may have lost some of its digits.

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
            return handler(source) if _in_payload.get() else _embedded(cls)
        outside = _in_payload.set(True)
        try:
            return cast(CoreSchema, _changed(handler(source), _with_decimal_as_text))
        finally:
            _in_payload.reset(outside)


def _embedded(model: type[Payload]) -> CoreSchema:
    """Return the core schema of a payload as a part of what is no payload."""

    def read(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if type(value) is not dict:
            return handler(value)
        text, faults = json_document(value, max_bytes=sys.maxsize)
        if any(fault.code == "not_json" for fault in faults):
            return handler(value)
        if faults:
            raise _refused(model, faults, value)
        parsed = model.model_validate_json(text, context=info.context, by_alias=True, by_name=False)
        faults = list(islice(timestamps(parsed, value), MAX_VIOLATIONS))
        if faults:
            raise _refused(model, faults, value)
        return parsed

    schema: Any = _changed(model.__pydantic_core_schema__, _renamed)
    definitions: list[Any] = []
    if schema["type"] == "definitions":
        schema, definitions = schema["schema"], schema["definitions"]
    reference = schema.get("ref") or schema["schema_ref"]
    if schema["type"] == "definition-ref":
        # A model that contains itself: its parts go on meaning the model.
        schema = next(each for each in definitions if each["ref"] == reference)
        schema = _changed(schema, dict)
    schema.pop("ref", None)
    reader = core_schema.with_info_wrap_validator_function(
        read, schema, ref=_marked(reference, "read")
    )
    return core_schema.definitions_schema(reader, definitions)


def _renamed(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part with references of its own: elsewhere they mean the class as it stands."""
    changed = dict(part)
    for key in ("ref", "schema_ref"):
        if key in part:
            changed[key] = _marked(part[key], "part")
    if "metadata" in part:
        # Pydantic writes into it.
        changed["metadata"] = dict(part["metadata"])
    return changed


def _marked(reference: str, mark: str) -> str:
    """Return another reference for the same class: names in JSON Schema leave out what follows `:`.

    A reference is `module.Class:id`, or `module.Class:id[…]` for a generic class.
    """
    head, bracket, arguments = reference.partition("[")
    return f"{head}.{mark}{bracket}{arguments}"


def _refused(model: type[Payload], faults: Iterable[Violation], sent: object) -> ValidationError:
    """Return the error for faults that JSON Schema does not know."""
    lines = []
    for fault in faults:
        place: list[str | int] = []
        value: Any = sent
        for token in fault.path.split("/")[1:]:
            name = token.replace("~1", "/").replace("~0", "~")
            place.append(int(name) if isinstance(value, list) else name)
            value = value[place[-1]]
        error = PydanticCustomError(fault.code, "{message}", {"message": fault.message})
        lines.append(InitErrorDetails(type=error, loc=tuple(place), input=value))
    return ValidationError.from_exception_data(model.__name__, lines)
