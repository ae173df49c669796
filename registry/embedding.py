"""How a payload is validated inside a type that is not a payload: a list, a model, FastAPI's body.

Frameworks parse JSON first and validate what they parsed, as Python values. A strict model refuses
dates and UUIDs there, which are strings in JSON. So a dict inside such a type is taken for JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import (
    BaseModel,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from job_registry.errors import Violation, shortened
from job_registry.json_values import json_document, names_in


def embedded(model: type[BaseModel]) -> CoreSchema:
    """Return the core schema of a payload as a part of another type.

    A dict is validated as `enqueueJob` does it. One that holds Python values, such as a datetime,
    cannot come from JSON: it is validated as the arguments of the class are.
    """

    def read(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if type(value) is not dict:
            return handler(value)
        text, faults = json_document(value, max_bytes=sys.maxsize)
        if any(fault.code == "not_json" for fault in faults):
            return handler(value)
        if faults:
            raise _refused(model, faults, value)
        return model.model_validate_json(text, context=info.context, by_alias=True, by_name=False)

    schema: Any = changed(TypeAdapter(model).core_schema, _renamed)
    definitions: list[Any] = []
    if schema["type"] == "definitions":
        schema, definitions = schema["schema"], schema["definitions"]
    reference = schema.get("ref") or schema.get("schema_ref")
    if schema["type"] == "definition-ref":
        # A model that contains itself: its parts still refer to the model.
        schema = next(each for each in definitions if each["ref"] == reference)
        schema = changed(schema, dict)
    schema.pop("ref", None)
    reader = core_schema.with_info_wrap_validator_function(
        read, schema, ref=_marked(reference, "read") if reference else None
    )
    return core_schema.definitions_schema(reader, definitions)


def _renamed(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part with its own references: elsewhere they refer to the unchanged class."""
    renamed = dict(part)
    for key in ("ref", "schema_ref"):
        if key in part:
            renamed[key] = _marked(part[key], "part")
    if "metadata" in part:
        # Pydantic writes into it.
        renamed["metadata"] = dict(part["metadata"])
    return renamed


def _marked(reference: str, mark: str) -> str:
    """Return another reference for the same class: names in JSON Schema leave out what follows `:`.

    A reference is `module.Class:id`, or `module.Class:id[…]` for a generic class.
    """
    head, bracket, arguments = reference.partition("[")
    return f"{head}.{mark}{bracket}{arguments}"


def _refused(model: type[BaseModel], faults: Iterable[Violation], sent: object) -> ValidationError:
    """Return the error for faults that JSON Schema does not know."""
    lines = []
    for fault in faults:
        place: list[str | int] = []
        value: Any = sent
        for name in names_in(fault.path):
            place.append(int(name) if isinstance(value, list) else name)
            value = value[place[-1]]
        error = PydanticCustomError(fault.code, "{message}", {"message": fault.message})
        # As text: frameworks put it into their answer, and JSON has no such value.
        lines.append(InitErrorDetails(type=error, loc=tuple(place), input=shortened(value)))
    return ValidationError.from_exception_data(model.__name__, lines)


def changed(schema: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a copy of a core schema in which each part is changed, the innermost first."""
    if isinstance(schema, dict):
        return change({key: _changed_below(key, value, change) for key, value in schema.items()})
    if isinstance(schema, list | tuple):
        return type(schema)(changed(value, change) for value in schema)
    return schema


def _changed_below(key: str, value: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a copy of what a part has under a key, with its own parts changed."""
    if key in ("metadata", "default"):
        return value
    if key in ("fields", "choices") and isinstance(value, dict):
        # Parts by name. The mapping itself is not a part: a field may be named `type` or `default`.
        return {name: changed(part, change) for name, part in value.items()}
    return changed(value, change)
