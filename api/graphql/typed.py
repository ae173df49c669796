"""The typed door: an input with one field per job type, made from the payloads' JSON Schemas.

What a schema says that GraphQL cannot (unions, maps, names that are none) is taken as `JSON` there,
and the registry judges it, as it judges everything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, cast

from graphql import (
    FloatValueNode,
    GraphQLBoolean,
    GraphQLDefaultInput,
    GraphQLEnumType,
    GraphQLEnumValue,
    GraphQLFloat,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLInt,
    GraphQLList,
    GraphQLNamedType,
    GraphQLNonNull,
    GraphQLResolveInfo,
    GraphQLScalarType,
    GraphQLString,
    IntValueNode,
    ListValueNode,
    ObjectValueNode,
    StringValueNode,
    Undefined,
    VariableNode,
)

from job_registry import DefinitionError, JobRegistry, JobType
from job_registry_api.graphql.scalars import BIG_INT, TEXT_SCALARS

TYPED_JOB_INPUT: Final = "TypedJobInput"
JOB_TYPE: Final = "job_type"
"""The extension of a field of `TypedJobInput` that holds the name of its job type."""


def typed_job_input(
    registry: JobRegistry, known: Mapping[str, GraphQLNamedType]
) -> GraphQLInputObjectType | None:
    """The input `TypedJobInput` of a registry; None when it has no job type.

    `known` are the types of the schema that the input joins, by name.

    Raises:
        DefinitionError: two job types, or a job type and the schema, need the same name for
            different things.
    """
    if not registry:
        return None
    inputs = _Inputs(known)
    fields: dict[str, GraphQLInputField] = {}
    for job_type in registry.values():
        name = _camel_case(job_type.name)
        if name in fields:
            other = fields[name].extensions[JOB_TYPE]
            raise DefinitionError(
                f"job types {other} and {job_type.name} would both be the field {name} of"
                f" {TYPED_JOB_INPUT}: rename one"
            )
        fields[name] = GraphQLInputField(
            inputs.payload_of(job_type),
            description=f"A job `{job_type.name}`. {job_type.description}".strip(),
            extensions={JOB_TYPE: job_type.name},
        )
    return GraphQLInputObjectType(
        TYPED_JOB_INPUT,
        fields,
        description="A job to store: exactly one field, named for the job type, with its payload.",
        is_one_of=True,
    )


def sent_job(info: GraphQLResolveInfo[Any], job: Mapping[str, Any]) -> tuple[str, object]:
    """The job type, and the payload as the client sent it, of the argument `job` of this field.

    GraphQL's coercion adds defaults and puts fields in the schema's order. The generic door does
    neither, and both have to store the same bytes; so the coerced value is read along with what
    the client sent: variables as they came, or the document's own text.
    """
    input_type = info.parent_type.fields[info.field_name].args["job"].type
    given = info.field_nodes[0].arguments or ()
    argument = next(each for each in given if each.name.value == "job")
    sent = _as_sent(input_type, job, argument.value, info)
    (name, payload) = next(iter(sent.items()))
    fields = cast(GraphQLInputObjectType, cast(GraphQLNonNull[Any], input_type).of_type).fields
    return fields[name].extensions[JOB_TYPE], payload


def _as_sent(
    wanted: GraphQLInputType, coerced: Any, sent: Any, info: GraphQLResolveInfo[Any]
) -> Any:
    if isinstance(wanted, GraphQLNonNull):
        wanted = wanted.of_type
    sent = _source(sent, info)
    if coerced is None:
        return None
    if isinstance(wanted, GraphQLList):
        items = sent.values if isinstance(sent, ListValueNode) else sent
        if not isinstance(items, list | tuple):  # A single value stands for a list of it.
            items = [sent]
        each = wanted.of_type
        return [
            _as_sent(each, item, source, info) for item, source in zip(coerced, items, strict=True)
        ]
    if isinstance(wanted, GraphQLInputObjectType):
        fields: Iterable[tuple[str, Any]] = (
            [(field.name.value, field.value) for field in sent.fields]
            if isinstance(sent, ObjectValueNode)
            else sent.items()
        )
        return {
            name: _as_sent(wanted.fields[name].type, coerced[name], value, info)
            for name, value in fields
            if _source(value, info) is not Undefined
        }
    if wanted is GraphQLFloat or isinstance(coerced, datetime):
        # 5 is no 5.0 in JSON's text, and a time was parsed.
        match sent:
            case IntValueNode():
                return int(sent.value)
            case FloatValueNode():
                return float(sent.value)
            case StringValueNode():
                return sent.value
        return sent
    return coerced


def _source(sent: Any, info: GraphQLResolveInfo[Any]) -> Any:
    """What stands for a variable: its value as it came, its default, or nothing."""
    while isinstance(sent, VariableNode):
        source = info.variable_values.sources.get(sent.name.value)
        if source is None:
            return Undefined
        default = source.signature.default
        if source.value is not Undefined or default is None:
            return source.value
        sent = default.literal
    return sent


@dataclass(frozen=True, slots=True)
class _Made:
    type: GraphQLNamedType
    content: str
    """The JSON Schema it was made of: two job types share a type when theirs are the same."""
    origin: str


class _Inputs:
    """Makes the GraphQL types of payloads, each name once."""

    def __init__(self, known: Mapping[str, GraphQLNamedType]) -> None:
        self._known = known
        self._made: dict[str, _Made] = {}
        self._json = cast(GraphQLScalarType, known["JSON"])
        self._texts: dict[str, GraphQLScalarType] = {
            **TEXT_SCALARS,
            "date-time": cast(GraphQLScalarType, known["DateTime"]),
        }

    def payload_of(self, job_type: JobType[Any]) -> GraphQLInputType:
        schema = dict(job_type.payload_schema)
        definitions = schema.get("$defs", {})
        if "$ref" in schema:  # A model that contains itself.
            schema = definitions[_key(schema)]
        title = _pascal_case(job_type.name)
        return _OfJobType(self, job_type.name, definitions).object(f"{title}Input", schema)

    def make(self, name: str, content: str, origin: str, make: Any) -> tuple[Any, bool]:
        """The type of this name, and whether it was made just now, with fields still to come."""
        if name in self._known or name in _OURS:
            raise DefinitionError(
                f"job type {origin} needs the name {name} in the GraphQL schema, which the schema"
                " itself has: rename the model or the job type"
            )
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = _Made(make(), content, origin)
            return made.type, True
        if made.content != content:
            raise DefinitionError(
                f"job types {made.origin} and {origin} need the name {name} in the GraphQL schema"
                " for different things: rename one of the models or job types"
            )
        return made.type, False


class _OfJobType:
    """Makes the types of one job type's payload, whose JSON Schema has these `$defs`."""

    def __init__(self, inputs: _Inputs, job_type: str, definitions: Mapping[str, Any]) -> None:
        self._inputs = inputs
        self._job_type = job_type
        self._definitions = definitions
        self._open: set[str] = set()

    def object(self, name: str, schema: Mapping[str, Any]) -> GraphQLInputType:
        """An input object; JSON where the object has no fields, or more than named ones."""
        properties = schema.get("properties", {})
        if (
            not properties
            or schema.get("additionalProperties", False) is not False
            or not all(_is_name(field) for field in properties)
        ):
            return self._inputs._json
        fields: dict[str, GraphQLInputField] = {}
        made, is_new = self._inputs.make(
            name,
            self._content(schema),
            self._job_type,
            lambda: GraphQLInputObjectType(
                name,
                lambda: fields,
                description=schema.get("description")
                or f"`{schema.get('title', name)}` of a payload.",
            ),
        )
        if is_new:
            owner = name.removesuffix("Input")
            for field, described in properties.items():
                required = field in schema.get("required", ())
                fields[field] = self._field(owner, field, described, required=required)
        return cast(GraphQLInputType, made)

    def _field(self, owner: str, name: str, schema: Any, *, required: bool) -> GraphQLInputField:
        wanted, nullable = self._type_of(schema, owner + name[:1].upper() + name[1:])
        default = None
        if isinstance(schema, dict) and schema.get("default") is not None:
            default = GraphQLDefaultInput(value=_external(wanted, schema["default"]))
        must_be = not nullable and (required or default is not None)
        # What has to be given cannot be deprecated, says GraphQL.
        is_deprecated = isinstance(schema, dict) and schema.get("deprecated") and not required
        return GraphQLInputField(
            GraphQLNonNull(cast(Any, wanted)) if must_be else wanted,
            default=default,
            description=_description(name, schema),
            deprecation_reason="Not used any more." if is_deprecated else None,
        )

    def _type_of(self, schema: Any, place: str) -> tuple[GraphQLInputType, bool]:
        """The type of a schema, and whether null is one of its values."""
        anything = self._inputs._json, True
        if not isinstance(schema, dict):
            return anything
        if "$ref" in schema:
            return self._defined(_key(schema), place)
        options = schema.get("anyOf", schema.get("oneOf"))
        if options is not None:
            rest = [option for option in options if option != _NULL]
            if len(rest) == 1:
                return self._type_of(rest[0], place)[0], True
            return self._inputs._json, len(rest) < len(options)
        if len(schema.get("allOf", ())) == 1:
            return self._type_of(schema["allOf"][0], place)
        if "enum" in schema or "const" in schema:
            return self._enum(place, schema)
        match schema.get("type"):
            case "string":
                return self._inputs._texts.get(schema.get("format", ""), GraphQLString), False
            case "integer":
                return _integer(schema), False
            case "number":
                return GraphQLFloat, False
            case "boolean":
                return GraphQLBoolean, False
            case "array" if "prefixItems" not in schema:
                item, nullable = self._type_of(schema.get("items"), place)
                return GraphQLList(item if nullable else GraphQLNonNull(item)), False
            case "array":
                return self._inputs._json, False
            case "object":
                return self.object(place + "Input", schema), False
        return anything

    def _defined(self, key: str, place: str) -> tuple[GraphQLInputType, bool]:
        schema = self._definitions[key]
        name = re.sub(r"\W", "_", key, flags=re.ASCII).lstrip("_") or place
        if schema.get("type") == "object":
            return self.object(name if name.endswith("Input") else f"{name}Input", schema), False
        if "enum" in schema:
            return self._enum(name, schema)
        if key in self._open:  # A list of lists of lists has no name to end it with.
            return self._inputs._json, True
        self._open.add(key)
        try:
            return self._type_of(schema, place)
        finally:
            self._open.discard(key)

    def _enum(self, name: str, schema: Mapping[str, Any]) -> tuple[GraphQLInputType, bool]:
        """An enum; what its values are instead where GraphQL has no names for them."""
        every = schema["enum"] if "enum" in schema else [schema["const"]]
        values = [value for value in every if value is not None]
        nullable = len(values) < len(every)
        if values and all(type(value) is int for value in values):
            return _integer({"minimum": min(values), "maximum": max(values)}), nullable
        if not values or not all(isinstance(value, str) for value in values):
            return self._inputs._json, nullable
        names = [re.sub(r"\W", "_", value, flags=re.ASCII).upper() for value in values]
        if len(set(names)) < len(names) or not all(_is_name(each) for each in names):
            return GraphQLString, nullable
        made, _ = self._inputs.make(
            name,
            self._content({"enum": values, "description": schema.get("description")}),
            self._job_type,
            lambda: GraphQLEnumType(
                name,
                {
                    each: GraphQLEnumValue(value, description=f"Stored as `{json.dumps(value)}`.")
                    for each, value in zip(names, values, strict=True)
                },
                description=schema.get("description") or f"`{name}` of a payload.",
            ),
        )
        return cast(GraphQLInputType, made), nullable

    def _content(self, schema: Mapping[str, Any]) -> str:
        """A schema with every definition it leads to, as text."""
        found: dict[str, Any] = {}
        waiting: list[Any] = [schema]
        while waiting:
            item = waiting.pop()
            if isinstance(item, dict):
                waiting += item.values()
                if isinstance(item.get("$ref"), str) and _key(item) not in found:
                    found[_key(item)] = self._definitions[_key(item)]
                    waiting.append(found[_key(item)])
            elif isinstance(item, list):
                waiting += item
        own = {key: value for key, value in schema.items() if key not in ("$defs", "$schema")}
        return json.dumps([own, found], sort_keys=True)


_NULL: Final = {"type": "null"}
_OURS: Final = {TYPED_JOB_INPUT, BIG_INT.name, *(each.name for each in TEXT_SCALARS.values())}


def _integer(schema: Mapping[str, Any]) -> GraphQLScalarType:
    """Int where no value is out of its 32 bits; BigInt otherwise."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    fits = low is not None and high is not None and low >= -(2**31) and high < 2**31
    return GraphQLInt if fits else BIG_INT


def _external(wanted: Any, value: Any) -> Any:
    """A default, a JSON value, as a client would write it: an enum's value by its name."""
    if value is None:
        return None
    if isinstance(wanted, GraphQLNonNull):
        return _external(wanted.of_type, value)
    if isinstance(wanted, GraphQLList):
        return [_external(wanted.of_type, item) for item in value]
    if isinstance(wanted, GraphQLEnumType):
        return next(name for name, each in wanted.values.items() if each.value == value)
    if isinstance(wanted, GraphQLInputObjectType):
        return {
            name: _external(wanted.fields[name].type, item) if name in wanted.fields else item
            for name, item in value.items()
        }
    return value


def _description(name: str, schema: Any) -> str:
    """What the model says of a field, and the bounds that the registry holds it to."""
    if not isinstance(schema, dict):
        return f"{_words(name)}, any JSON."
    text = str(schema.get("description") or f"{_words(name)}.")
    rest = [option for option in schema.get("anyOf", ()) if option != _NULL]
    return " ".join([text, *_bounds(rest[0] if len(rest) == 1 else schema)])


def _bounds(schema: Mapping[str, Any]) -> Iterable[str]:
    for low, high, what in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
    ):
        match schema.get(low), schema.get(high):
            case None, None:
                continue
            case int() | float() as least, None:
                yield f"At least {least:,}{what}."
            case None, int() | float() as most:
                yield f"At most {most:,}{what}."
            case int() | float() as least, int() | float() as most:
                yield f"{least:,} to {most:,}{what}."
    if "exclusiveMinimum" in schema:
        yield f"More than {schema['exclusiveMinimum']:,}."
    if "exclusiveMaximum" in schema:
        yield f"Less than {schema['exclusiveMaximum']:,}."
    if "pattern" in schema:
        yield f"Matches `{schema['pattern']}`."
    if isinstance(schema.get("items"), dict) and (each := " ".join(_bounds(schema["items"]))):
        yield f"Each: {each}"


def _words(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", name).strip().lower()
    return words[:1].upper() + words[1:]


def _key(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[-1]


def _is_name(text: str) -> bool:
    """Whether GraphQL has this as a name of a client's; those with two underscores are its own."""
    return re.fullmatch(r"(?!__)[_A-Za-z][_0-9A-Za-z]*", text) is not None


def _pascal_case(name: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in re.split(r"[._]+", name))


def _camel_case(name: str) -> str:
    pascal = _pascal_case(name)
    return pascal[:1].lower() + pascal[1:]
