"""`TypedJobInput`: an input with one field per job type, made from the payloads' JSON Schemas.

Where a schema demands what GraphQL cannot express (unions, maps, names that GraphQL does not
allow), the input has `JSON`. The registry validates every payload, whichever way it comes in.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from enum import Enum, EnumMeta
from typing import Any, ClassVar, Final, cast, get_args
from uuid import UUID

import strawberry
from graphql import specified_scalar_types
from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from job_registry import DefinitionError, JobRegistry, JobType
from job_registry_api.graphql.compiled import built_directly
from job_registry_api.graphql.scalars import SCALARS, TEXT_TYPES, BigInt

TYPED_JOB_INPUT: Final = "TypedJobInput"
_RESERVED: Final = {
    TYPED_JOB_INPUT,
    *(scalar.name for scalar in SCALARS.values()),
    *specified_scalar_types,
}


class PayloadInput:
    """The base of the inputs that are made here, which Strawberry turns into dataclasses.

    An attribute is named for its field of the payload with `_` appended, so that no name is a
    Python keyword. A field that the client omitted is `UNSET`.
    """

    def sent(self) -> dict[str, JsonValue]:
        """Return the fields that the client sent, as JSON."""
        return {
            name[:-1]: _json_of(value)
            for name, value in vars(self).items()
            if value is not strawberry.UNSET
        }


class TypedJob(PayloadInput):
    """The base of `TypedJobInput`. `job_types` are the names of the job types by field."""

    job_types: ClassVar[Mapping[str, str]]

    def sent_job(self) -> tuple[str, JsonValue]:
        """Return the job type and the payload that the client sent."""
        ((field, payload),) = self.sent().items()
        return self.job_types[field], payload


def typed_job_input(
    registry: JobRegistry, is_taken: Callable[[str], bool]
) -> type[TypedJob] | None:
    """Make `TypedJobInput` for a registry; None for one without job types.

    `is_taken` returns whether the rest of the schema has a type of this name.

    Raises:
        DefinitionError: two job types, or a job type and the schema, need the same name for
            different things.
    """
    if not registry:
        return None
    inputs = _Inputs(is_taken)
    job_types: dict[str, str] = {}
    fields: dict[str, _Field] = {}
    for job_type in registry.values():
        name = _camel_case(job_type.name)
        if name in job_types:
            raise DefinitionError(
                f"job types {job_types[name]} and {job_type.name} would both be the field {name} of"
                f" {TYPED_JOB_INPUT}: rename one"
            )
        job_types[name] = job_type.name
        fields[name] = _Field(
            inputs.payload_of(job_type) | None,
            strawberry.field(
                name=name,
                default=strawberry.UNSET,
                description=f"A job `{job_type.name}`. {job_type.description}".strip(),
            ),
        )
    made = types.new_class(
        TYPED_JOB_INPUT, (TypedJob,), exec_body=lambda body: body.update(job_types=job_types)
    )
    _set_fields(made, fields)
    strawberry.input(
        made,
        name=TYPED_JOB_INPUT,
        one_of=True,
        description="A job to store: exactly one field, named for the job type, with its payload.",
    )
    built_directly(made)
    return cast("type[TypedJob]", made)


def _json_of(value: Any) -> JsonValue:
    match value:
        case PayloadInput():
            return value.sent()
        case Enum():
            return cast("JsonValue", value.value)
        case list():
            return [_json_of(item) for item in value]
        case date() | time() | Decimal() | UUID():
            # From the scalars of a host's schema. Ours give the client's text.
            return cast("JsonValue", to_jsonable_python(value))
    return cast("JsonValue", value)


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    annotation: Any
    field: Any


def _set_fields(made: type, fields: Mapping[str, _Field]) -> None:
    """Give a class fields, which `strawberry.input` then reads, as if they stood in its body."""
    made.__annotations__ = {f"{name}_": each.annotation for name, each in fields.items()}
    for name, each in fields.items():
        setattr(made, f"{name}_", each.field)


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    type: type
    content: str
    """The JSON Schema it was made from. Job types with the same one share the type."""
    origin: str


class _Inputs:
    """Makes the types of payloads, each name once."""

    def __init__(self, is_taken: Callable[[str], bool]) -> None:
        self._is_taken = is_taken
        self._made: dict[str, _Made] = {}

    def payload_of(self, job_type: JobType[Any]) -> Any:
        schema = dict(job_type.payload_schema)
        definitions = dict(schema.get("$defs", {}))
        if "$ref" in schema:  # A model that contains itself.
            schema = definitions[_key(schema)]
        for older in job_type.accepted_schemas:
            schema = _with_older_form(schema, older, definitions)
        title = _pascal_case(job_type.name)
        return _OfJobType(self, job_type.name, definitions).object(f"{title}Input", schema)

    def make(
        self, name: str, content: str, origin: str, make: Callable[[], type]
    ) -> tuple[type, bool]:
        """Return the type of this name, and whether it is new and its fields are to be set."""
        if name in _RESERVED or self._is_taken(name):
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
    """Makes the types of one job type's payload, whose JSON Schema has these `$defs`.

    A type is what stands in a Python annotation that Strawberry reads.
    """

    def __init__(self, inputs: _Inputs, job_type: str, definitions: Mapping[str, Any]) -> None:
        self._inputs = inputs
        self._job_type = job_type
        self._definitions = definitions
        self._open: set[str] = set()

    def object(self, name: str, schema: Mapping[str, Any]) -> Any:
        """Return an input; JSON for an object without fields, or with more than named ones."""
        properties = schema.get("properties", {})
        if (
            not properties
            or schema.get("additionalProperties", False) is not False
            or not all(_is_name(field) for field in properties)
        ):
            return JsonValue
        made, is_new = self._inputs.make(
            name,
            self._content(schema),
            self._job_type,
            lambda: types.new_class(name, (PayloadInput,)),
        )
        if is_new:
            owner = name.removesuffix("Input")
            required = schema.get("required", ())
            fields = {
                field: self._field(owner, field, described, required=field in required)
                for field, described in properties.items()
            }
            _set_fields(made, fields)
            description = (
                schema.get("description") or f"`{schema.get('title', name)}` of a payload."
            )
            strawberry.input(made, name=name, description=description)
            built_directly(made)
        return made

    def _field(self, owner: str, name: str, schema: Any, *, required: bool) -> _Field:
        wanted, nullable = self._type_of(schema, owner + name[:1].upper() + name[1:])
        # GraphQL does not allow a required field to be deprecated.
        is_deprecated = isinstance(schema, dict) and schema.get("deprecated") and not required
        field = strawberry.field(
            name=name,
            description=_description(name, schema, wanted),
            deprecation_reason="No longer used." if is_deprecated else None,
            default=dataclasses.MISSING if required and not nullable else strawberry.UNSET,
        )
        return _Field(wanted if required and not nullable else wanted | None, field)

    def _type_of(self, schema: Any, place: str) -> tuple[Any, bool]:
        """Return the type of a schema, and whether null is one of its values."""
        if not isinstance(schema, dict):
            return JsonValue, True
        if "$ref" in schema:
            return self._defined(_key(schema), place)
        options = schema.get("anyOf", schema.get("oneOf"))
        if options is not None:
            rest = [option for option in options if option != _NULL]
            if len(rest) == 1:
                return self._type_of(rest[0], place)[0], True
            return JsonValue, len(rest) < len(options)
        if len(schema.get("allOf", ())) == 1:
            return self._type_of(schema["allOf"][0], place)
        if "enum" in schema or "const" in schema:
            return self._enum(place, schema)
        match schema.get("type"):
            case "string":
                return TEXT_TYPES.get(schema.get("format", ""), str), False
            case "integer":
                return _integer(schema), False
            case "number":
                return float, False
            case "boolean":
                return bool, False
            case "array" if "prefixItems" not in schema:
                item, nullable = self._type_of(schema.get("items"), place)
                return types.GenericAlias(list, (item | None if nullable else item,)), False
            case "array":
                return JsonValue, False
            case "object":
                return self.object(place + "Input", schema), False
        return JsonValue, True

    def _defined(self, key: str, place: str) -> tuple[Any, bool]:
        schema = self._definitions[key]
        name = re.sub(r"\W", "_", key, flags=re.ASCII).lstrip("_") or place
        if schema.get("type") == "object":
            return self.object(name if name.endswith("Input") else f"{name}Input", schema), False
        if "enum" in schema:
            return self._enum(name, schema)
        if key in self._open:  # A list of lists of lists has no name to end it with.
            return JsonValue, True
        self._open.add(key)
        try:
            return self._type_of(schema, place)
        finally:
            self._open.discard(key)

    def _enum(self, name: str, schema: Mapping[str, Any]) -> tuple[Any, bool]:
        """Return an enum, or the type of its values where GraphQL has no names for them."""
        every = schema["enum"] if "enum" in schema else [schema["const"]]
        values = [value for value in every if value is not None]
        nullable = len(values) < len(every)
        if values and all(type(value) is int for value in values):
            return _integer({"minimum": min(values), "maximum": max(values)}), nullable
        if not values or not all(isinstance(value, str) for value in values):
            return JsonValue, nullable
        names = [_enum_name(value) for value in values]
        # Python has its own use for names such as `_A_`.
        if len(set(names)) < len(names) or not all(
            _is_name(each) and not (each[0] == each[-1] == "_") for each in names
        ):
            return str, nullable
        members = {
            each: strawberry.enum_value(value, description=f"Stored as `{json.dumps(value)}`.")
            for each, value in zip(names, values, strict=True)
        }
        made, is_new = self._inputs.make(
            name,
            self._content({"enum": values, "description": schema.get("description")}),
            self._job_type,
            lambda: types.new_class(name, (Enum,), exec_body=lambda body: body.update(members)),
        )
        if is_new:
            description = schema.get("description") or f"`{name}` of a payload."
            strawberry.enum(cast(EnumMeta, made), name=name, description=description)
        return made, nullable

    def _content(self, schema: Mapping[str, Any]) -> str:
        """Return a schema with every definition it refers to, as text."""
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


def _with_older_form(
    schema: Mapping[str, Any], older: Mapping[str, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    """Return the schema of an input that takes a form of a payload and an older one.

    It has the fields of both. One that they describe differently takes any JSON, and only one that
    both require is required. The registry then checks that a payload has one of the forms.
    """
    theirs = older.get("$defs", {})
    if "$ref" in older:
        older = theirs[_key(older)]
    if any(definitions.get(key, inner) != inner for key, inner in theirs.items()):
        theirs = {}
    definitions |= theirs
    fields = dict(schema.get("properties", {}))
    for name, field in older.get("properties", {}).items():
        known = fields.setdefault(name, field if theirs or "$ref" not in json.dumps(field) else {})
        if _without_words(known) != _without_words(field):
            fields[name] = {"description": known.get("description") or f"{_words(name)}."}
    required = {*schema.get("required", ())} & {*older.get("required", ())}
    return {**schema, "properties": fields, "required": sorted(required)}


def _without_words(field: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a schema of a field demands, without what is said to people."""
    words = ("title", "description", "examples", "default", "deprecated")
    return {key: value for key, value in field.items() if key not in words}


_NULL: Final = {"type": "null"}


def _integer(schema: Mapping[str, Any]) -> Any:
    """Return Int where no value is out of its 32 bits; BigInt otherwise."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    fits = low is not None and high is not None and low >= -(2**31) and high < 2**31
    return int if fits else BigInt


def _description(name: str, schema: Any, wanted: Any) -> str:
    """Return the model's description of a field, its bounds, and its default."""
    if not isinstance(schema, dict):
        return f"{_words(name)}, as any JSON."
    text = str(schema.get("description") or f"{_words(name)}.")
    rest = [option for option in schema.get("anyOf", ()) if option != _NULL]
    sentences = [text, *_bounds(rest[0] if len(rest) == 1 else schema)]
    default = schema.get("default")
    if default is not None:
        sentences.append(f"Defaults to `{_literal(default, wanted)}`.")
    return " ".join(sentences)


def _literal(value: Any, wanted: Any) -> str:
    """Return a default as it is sent: enums by name, also in a list."""
    inner = get_args(wanted)
    if isinstance(wanted, EnumMeta):
        return _enum_name(value)
    if isinstance(wanted, types.GenericAlias) and isinstance(value, list):
        return f"[{', '.join(_literal(item, inner[0]) for item in value)}]"
    if isinstance(wanted, types.UnionType) and value is not None:
        return _literal(value, inner[0])
    return json.dumps(value)


def _enum_name(value: str) -> str:
    return re.sub(r"\W", "_", value, flags=re.ASCII).upper()


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
            case int() | float() as least, most if least == most:
                yield f"Exactly {least:,}{what}."
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
    """Whether GraphQL allows this name. Names with two underscores in front are its own."""
    return re.fullmatch(r"(?!__)[_A-Za-z][_0-9A-Za-z]*", text) is not None


def _pascal_case(name: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in re.split(r"[._]+", name))


def _camel_case(name: str) -> str:
    pascal = _pascal_case(name)
    return pascal[:1].lower() + pascal[1:]
