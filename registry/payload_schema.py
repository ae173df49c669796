"""The JSON Schema of a payload model, its fingerprint, and an example made from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, cast

from pydantic import BaseModel, JsonValue
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema, to_json, to_jsonable_python

from job_registry.wire_text import ordered, reads_decimals_as_text

MAX_REFERENCES: Final = 10
"""How many models an example has inside each other."""

JSON_SCHEMA_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def json_schema_of(model: type[BaseModel], description: str) -> dict[str, Any]:
    """Return a model's JSON Schema, draft 2020-12, with camelCase names."""
    schema: dict[str, Any] = model.model_json_schema(by_alias=True, schema_generator=_JsonSchema)
    described = {"$schema": JSON_SCHEMA_DIALECT, **schema}
    if description:
        described["description"] = description
    else:
        described.pop("description", None)
    return described


def fingerprint_of(schema: Mapping[str, Any]) -> str:
    """Return a hash of what a schema demands: 64 hexadecimal digits of SHA-256.

    Titles, descriptions and examples do not change it, nor does the order of fields and values.
    """
    text = json.dumps(demands_of(schema), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def demands_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without titles, descriptions and examples, which only people read."""
    demands: dict[str, Any] = _demands(dict(schema))
    return demands


def example_of(schema: Mapping[str, Any]) -> dict[str, JsonValue]:
    """Return an object of this schema, made from its examples and defaults."""
    return cast(dict[str, JsonValue], _example_of(dict(schema), schema.get("$defs", {}), 0))


NAIVE: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?$"
"""The pattern of a date and time without an offset."""


class _JsonSchema(GenerateJsonSchema):
    """Pydantic's JSON Schema, made true where strictness narrows what it says."""

    _class_config: Mapping[str, Any] = {}
    """The configuration of the class whose fields are described."""

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        """Note the configuration of a class for its fields."""
        if "config" not in schema:
            return super().generate_inner(schema)
        outer, self._class_config = self._class_config, schema["config"]
        try:
            return super().generate_inner(schema)
        finally:
            self._class_config = outer

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        """Return the default, with its sets in an order that all processes have."""
        return _in_order(super().get_default_value(schema))

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """Describe a decimal itself, with its bounds, and not only the string it comes as."""
        if reads_decimals_as_text(schema):
            return self.generate_inner(schema["schema"])
        return super().function_before_schema(schema)

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        """Decimals come as strings only. Their bounds have the names of those of numbers."""
        described: JsonSchemaValue = {"type": "string", "format": "decimal"}
        for name, keyword in _DECIMAL_BOUNDS.items():
            value = cast("Decimal | None", schema.get(name))
            if value is not None:
                described[keyword] = int(value) if value == int(value) else float(value)
        return described

    def str_schema(self, schema: core_schema.StringSchema) -> JsonSchemaValue:
        """Name what is done to text before its length and its pattern are checked."""
        changes = [
            name
            for name in ("strip_whitespace", "to_lower", "to_upper")
            if schema.get(name, self._class_config.get(f"str_{name}"))
        ]
        return {**super().str_schema(schema), **({"normalized": changes} if changes else {})}

    def date_schema(self, schema: core_schema.DateSchema) -> JsonSchemaValue:
        return {**super().date_schema(schema), **_time_bounds(schema)}

    def datetime_schema(self, schema: core_schema.DatetimeSchema) -> JsonSchemaValue:
        """Return the format and the bounds. Without an offset it is not a `date-time`."""
        described = super().datetime_schema(schema)
        if schema.get("tz_constraint") == "naive":
            described = {"type": "string", "pattern": NAIVE}
        return {**described, **_time_bounds(schema)}

    def time_schema(self, schema: core_schema.TimeSchema) -> JsonSchemaValue:
        return {**super().time_schema(schema), **_time_bounds(schema)}

    def timedelta_schema(self, schema: core_schema.TimedeltaSchema) -> JsonSchemaValue:
        return {**super().timedelta_schema(schema), **_time_bounds(schema)}

    def url_schema(self, schema: core_schema.UrlSchema) -> JsonSchemaValue:
        return _with_schemes(super().url_schema(schema), schema)

    def multi_host_url_schema(self, schema: core_schema.MultiHostUrlSchema) -> JsonSchemaValue:
        return _with_schemes(super().multi_host_url_schema(schema), schema)

    def model_fields_schema(self, schema: core_schema.ModelFieldsSchema) -> JsonSchemaValue:
        """Return every name that a field is read from. Pydantic describes only the first."""
        described = super().model_fields_schema(schema)
        properties, required = described["properties"], described.get("required", [])
        for field in schema["fields"].values():
            first, *others = _names_of(field) or [""]
            if not others or first not in properties:
                continue
            for name in others:
                inner = {key: value for key, value in properties[first].items() if key != "default"}
                properties[name] = inner
            if first in required:
                required.remove(first)
                one = {"anyOf": [{"required": [name]} for name in (first, *others)]}
                described.setdefault("allOf", []).append(one)
        return described

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        """Require the field that says which model it is. Its default in the model has no effect."""
        described = super().tagged_union_schema(schema)
        name = described.get("discriminator", {}).get("propertyName")
        return {**described, "required": [name]} if name else described

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        return self._with_names(super().dict_schema(schema), schema)

    def frozendict_schema(self, schema: core_schema.FrozenDictSchema) -> JsonSchemaValue:
        return self._with_names(super().frozendict_schema(schema), schema)

    def ordered_dict_schema(self, schema: core_schema.OrderedDictSchema) -> JsonSchemaValue:
        return self._with_names(super().ordered_dict_schema(schema), schema)

    def counter_schema(self, schema: core_schema.CounterSchema) -> JsonSchemaValue:
        return self._with_names(super().counter_schema(schema), schema)

    def _with_names(self, described: JsonSchemaValue, schema: Any) -> JsonSchemaValue:
        """Say which names are refused, also where the keys are not strings in Python."""
        if "patternProperties" in described:
            described["additionalProperties"] = False
        if "keys_schema" in schema and "propertyNames" not in described:
            names = _names(self.generate_inner(schema["keys_schema"]))
            if names:
                described["propertyNames"] = names
        return described


def _with_schemes(described: JsonSchemaValue, schema: Any) -> JsonSchemaValue:
    """Say which schemes a URL may have."""
    schemes = schema.get("allowed_schemes")
    return {**described, **({"schemes": sorted(schemes)} if schemes else {})}


def _names_of(field: core_schema.ModelField) -> list[str]:
    """Return the names in `AliasChoices` of a field, without paths, which a schema cannot say."""
    aliases = field.get("validation_alias")
    paths = aliases if isinstance(aliases, list) else []
    found = (path[0] for path in paths if isinstance(path, list) and len(path) == 1)
    return [name for name in found if isinstance(name, str)]


def _names(keys: JsonSchemaValue) -> JsonSchemaValue:
    """Return what the names of an object have to be, so that they can be read as these keys."""
    names = {key: value for key, value in keys.items() if key not in ("type", "title", "pattern")}
    if "anyOf" in names:
        names["anyOf"] = [_names(each) for each in names["anyOf"]]
    if "type" in keys and keys["type"] != "string":
        names["format"] = keys["type"]
    return names


def _in_order(value: Any) -> Any:
    """Return a value with its sets as sorted lists. The order of a set of enums, or of text inside
    another value, is another one in each process."""
    if isinstance(value, set | frozenset):
        return ordered(map(_in_order, value))
    if type(value) in (list, tuple):
        return [_in_order(item) for item in value]
    if type(value) is dict:
        return {key: _in_order(item) for key, item in value.items()}
    if isinstance(value, BaseModel):
        fields = value.model_dump(by_alias=True)
        return _in_order(fields) if _has_set(fields) else value
    return value


def _has_set(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_set, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_set, value))
    return isinstance(value, set | frozenset)


def _time_bounds(
    schema: core_schema.DateSchema
    | core_schema.DatetimeSchema
    | core_schema.TimeSchema
    | core_schema.TimedeltaSchema,
) -> JsonSchemaValue:
    """Return the bounds of a time, as text, under the names that validators of JSON have."""
    bounds = {keyword: schema.get(name) for name, keyword in _TIME_BOUNDS.items()}
    given = {key: value for key, value in bounds.items() if value is not None}
    return cast(JsonSchemaValue, to_jsonable_python(given))


def _demands(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_demands(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    unread = {"title", "description", "examples", "$schema"}
    if isinstance(schema.get("discriminator"), dict):
        unread.add("required")  # The discriminator demands it.
    return {
        key: _demands_of_keyword(key, value) for key, value in schema.items() if key not in unread
    }


def _demands_of_keyword(key: str, value: Any) -> Any:
    if key in ("properties", "$defs") and isinstance(value, dict):
        return {name: _demands(inner) for name, inner in value.items()}
    if key in ("const", "default"):
        return value  # A value, which may be an object with any names.
    if key in ("required", "enum") and isinstance(value, list):
        # In a model they have the order of its lines.
        return sorted(value, key=to_json)
    return _demands(value)


def _example_of(schema: Any, definitions: Mapping[str, Any], references: int) -> JsonValue:
    """A value of this JSON Schema, from its examples and defaults where it has any.

    Only references can lead back to a schema, so their number bounds the depth.
    """
    if references > MAX_REFERENCES or schema is True:
        return None
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _example_of(definitions[name], definitions, references + 1)
    for key in ("examples", "enum"):
        if schema.get(key):
            return cast(JsonValue, schema[key][0])
    for key in ("const", "default"):
        if key in schema:
            return cast(JsonValue, schema[key])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema and schema.get("type") != "object":
            return _example_of(schema[key][0], definitions, references)
    match schema.get("type"):
        case "object":
            required = [*schema.get("required", ())]
            for each in schema.get("allOf", ()):
                match each:  # A field that is read from several names, or a rule of the user's own.
                    case {"anyOf": [{"required": [name]}, *_]}:
                        required.append(name)
            return {
                name: _example_of(inner, definitions, references)
                for name, inner in schema.get("properties", {}).items()
                if name in required or "default" in inner
            }
        case "array":
            if "prefixItems" in schema:
                items = schema["prefixItems"]
                return [_example_of(item, definitions, references) for item in items]
            count = schema.get("minItems", 1)
            return [_example_of(schema.get("items", True), definitions, references)] * count
        case "integer" | "number":
            return _example_number(schema)
        case "boolean":
            return True
        case "null":
            return None
        case "string":
            formats = _FORMATS.get(schema.get("format", ""), "example")
            text = formats.ljust(schema.get("minLength", 0), "x")
            return text[: schema.get("maxLength", len(text))]
    return None


def _example_number(schema: Mapping[str, Any]) -> int | float:
    step = cast("int | float", schema.get("multipleOf", 1))
    if "minimum" in schema:
        return cast("int | float", schema["minimum"])
    if "exclusiveMinimum" in schema:
        return cast("int | float", schema["exclusiveMinimum"] + step)
    if "maximum" in schema:
        return cast("int | float", min(step, schema["maximum"]))
    if "exclusiveMaximum" in schema:
        return cast("int | float", min(step, schema["exclusiveMaximum"] - step))
    return step


_FORMATS: Final = {
    "decimal": "1.00",
    "date": "2030-01-31",
    "date-time": "2030-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "uuid": "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "email": "someone@example.com",
    "uri": "https://example.com/",
}

_DECIMAL_BOUNDS: Final = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "max_digits": "maxDigits",
    "decimal_places": "decimalPlaces",
}
_TIME_BOUNDS: Final = {
    "ge": "formatMinimum",
    "gt": "formatExclusiveMinimum",
    "le": "formatMaximum",
    "lt": "formatExclusiveMaximum",
    "now_op": "relativeToNow",
    "tz_constraint": "timezone",
}
