"""The comparison of two JSON Schemas: what one admits and the other refuses."""

from __future__ import annotations

import datetime
import enum
import itertools
import json
import time
import uuid
from collections.abc import Callable, Mapping
from decimal import Decimal
from random import Random
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import extend
from pydantic import (
    UUID4,
    AwareDatetime,
    Discriminator,
    Field,
    HttpUrl,
    JsonValue,
    StringConstraints,
    Tag,
    ValidationError,
    create_model,
)

from job_registry import JobRegistry, Payload, PayloadInvalid, compatibility
from job_registry.compatibility import (
    MAX_DIFFERENCES,
    Difference,
    changed_defaults,
    narrowings,
)
from job_registry.json_values import MAX_DEPTH
from job_registry.payload_schema import json_schema_of
from tests.registry.random_models import (
    edited_fields,
    job_type_of,
    random_fields,
    random_object,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class MoreColour(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Mail(Payload):
    kind: Literal["mail"]
    to: str


class MailWithDefault(Payload):
    kind: Literal["mail"] = "mail"
    to: str


class LongerMail(Payload):
    kind: Literal["mail"]
    to: str
    subject: str = ""


class Text(Payload):
    kind: Literal["text", "sms"]
    to: str


class OnlyText(Payload):
    kind: Literal["text"]
    to: str


class Sms(Payload):
    kind: Literal["sms"]
    to: str


class Tree(Payload):
    size: int
    below: tuple[Tree, ...] = ()


class FloatTree(Payload):
    size: float
    below: tuple[FloatTree, ...] = ()


class TextTree(Payload):
    size: str
    below: tuple[TextTree, ...] = ()


def tagged(*models: Any) -> Any:
    return Annotated[
        models[0] if len(models) == 1 else _union(*models), Field(discriminator="kind")
    ]


def _union(*types: Any) -> Any:
    found = types[0]
    for each in types[1:]:
        found |= each
    return found


def payload_of(**fields: Any) -> type[Payload]:
    return create_model("Example", __base__=Payload, __module__=__name__, **fields)


def schema_of(annotation: Any) -> dict[str, Any]:
    """Return the schema of a payload with one field, `v`."""
    return json_schema_of(payload_of(v=(annotation, ...)), "")


def between(before: Any, after: Any) -> tuple[Difference, ...]:
    return narrowings(schema_of(before), schema_of(after))


def is_admitted(payload: type[Payload], value: Mapping[str, JsonValue]) -> bool:
    text = json.dumps(value)
    try:
        payload.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError:
        return False
    return True


COMPATIBLE: list[tuple[str, Any, Any]] = [
    ("wider bounds", Annotated[int, Field(ge=1, le=10)], Annotated[int, Field(ge=0, lt=100)]),
    ("a bound dropped", Annotated[int, Field(ge=1)], int),
    ("more than 0 is at least 1", Annotated[int, Field(gt=0)], Annotated[int, Field(ge=1)]),
    ("an integer is a number", int, float),
    ("with the same bound", Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0.5)]),
    ("multiples", Annotated[int, Field(multiple_of=6)], Annotated[int, Field(multiple_of=3)]),
    ("whole numbers", int, Annotated[float, Field(multiple_of=0.5)]),
    ("longer text", Annotated[str, Field(max_length=5)], Annotated[str, Field(max_length=9)]),
    ("any text", Annotated[str, Field(min_length=1, pattern="^a")], str),
    ("text of a format", uuid.UUID, str),
    ("a format that includes another", UUID4, uuid.UUID),
    ("text for a time", datetime.datetime, str),
    ("any time zone", AwareDatetime, datetime.datetime),
    ("text for a decimal", Decimal, str),
    ("a larger decimal", Annotated[Decimal, Field(lt=10)], Annotated[Decimal, Field(lt=20)]),
    (
        "more digits",
        Annotated[Decimal, Field(max_digits=6, decimal_places=2)],
        Annotated[Decimal, Field(max_digits=7, decimal_places=3)],
    ),
    ("bytes are text", str, bytes),
    ("null as well", str, str | None),
    ("another member of a union", int | str, int | str | bool),
    ("a union in another order", int | str | None, None | str | int),
    ("a part of a union", int | str, str | int | list[int]),
    ("members for numbers", float, int | float),
    ("more values", Literal["a", "b"], Literal["a", "b", "c"]),
    ("more of an enum", Colour, MoreColour),
    ("values by another name", Colour, Literal["red", "blue", "green"]),
    ("text for values", Literal["a", "b"], str),
    ("text of that length", Literal["a", "bb"], Annotated[str, Field(max_length=2)]),
    ("numbers for numbers", Literal[5], Literal[5, 6]),
    ("values over several members", Literal["a", "b"], Literal["a"] | Literal["b"]),
    ("true and false", bool, Literal[True, False]),
    ("anything", dict[str, int], Any),
    ("longer arrays", Annotated[list[int], Field(max_length=2)], list[int]),
    ("items", list[int], list[float]),
    ("a tuple is a list", tuple[int, int], list[int]),
    ("items of a tuple", tuple[int, str], list[int | str]),
    ("a tuple of such length", tuple[int, int], Annotated[list[float], Field(min_length=2)]),
    ("a set is a list", set[int], list[int]),
    ("values of a dict", dict[str, int], dict[str, int | None]),
    ("names of a dict", dict[Literal["a"], int], dict[Literal["a", "b"], int]),
    ("any name", dict[Annotated[str, Field(pattern="^a")], int], dict[str, int]),
    ("names that were numbers", dict[int, int], dict[str, int]),
    ("a model is a dict", Tree, dict[str, Any]),
    ("a field more in a model", Mail, LongerMail),
    ("a default in a model", Mail, MailWithDefault),
    ("a recursive model", Tree, FloatTree),
    ("another branch", tagged(Mail), tagged(Mail, Text)),
    ("another branch with a default", tagged(MailWithDefault, Sms), tagged(MailWithDefault, Text)),
    ("a branch in two", tagged(Mail, Text), tagged(Mail, OnlyText, Sms)),
    ("two branches in one", tagged(Mail, OnlyText, Sms), tagged(Mail, Text)),
    ("a tag is no longer needed", tagged(Mail, Text), Mail | Text),
    ("one is a branch", Mail, tagged(Mail, Text)),
]


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(b, a, id=name) for name, b, a in COMPATIBLE]
)
def test_what_admits_more_is_compatible(before: Any, after: Any) -> None:
    assert between(before, after) == ()


NARROWER: list[tuple[Any, Any, str, str, str, JsonValue]] = [
    (float, int, "/v", "number", "integer", 1.5),
    (int | None, int, "/v", "integer or null", "integer", None),
    (int, str, "/v", "integer", "string", 1),
    (int | str, str, "/v", "integer or string", "string", 1),
    (int, Annotated[int, Field(ge=1)], "/v", "any number", "at least 1", 0),
    (Annotated[int, Field(le=9)], Annotated[int, Field(lt=9)], "/v", "at most 9", "at most 8", 9),
    (float, Annotated[float, Field(gt=0.5)], "/v", "any number", "more than 0.5", 0.5),
    (int, Annotated[int, Field(multiple_of=2)], "/v", "any number", "a multiple of 2", 1),
    (str, Annotated[str, Field(max_length=2)], "/v", "any number of characters",
     "at most 2 characters", "abc"),
    (str, Annotated[str, Field(min_length=1)], "/v", "any number of characters",
     "at least 1 character", ""),
    (str, Annotated[str, Field(pattern="^a")], "/v", "string", 'pattern "^a"', "b"),
    (str, uuid.UUID, "/v", "string", "format uuid", "x"),
    (str, datetime.date, "/v", "string", "format date", "x"),
    (str, Decimal, "/v", "string", "format decimal", "x"),
    (datetime.date, Decimal, "/v", "format date", "format decimal", "2030-01-31"),
    (Decimal, Annotated[Decimal, Field(gt=0)], "/v", "any number", "more than 0", "0"),
    (Decimal, Annotated[Decimal, Field(decimal_places=2)], "/v", "any number of decimal places",
     "at most 2 decimal places", "1.234"),
    (Annotated[Decimal, Field(max_digits=5, decimal_places=2)],
     Annotated[Decimal, Field(max_digits=5, decimal_places=3)], "/v",
     "at most 3 digits before the point", "at most 2 digits before the point", "123.4"),
    (str, Literal["a"], "/v", "string", '"a"', "b"),
    (Literal["a", "b"], Literal["a"], "/v", 'one of "a", "b"', '"a"', "b"),
    (MoreColour, Colour, "/v", 'one of "red", "blue", "green"', 'one of "red", "blue"', "green"),
    (Literal["a", "bb"], Annotated[str, Field(max_length=1)], "/v", 'one of "a", "bb"',
     "at most 1 character", "bb"),
    (list[float], list[int], "/v/*", "number", "integer", [1.5]),
    (list[int], Annotated[list[int], Field(max_length=1)], "/v", "any number of items",
     "at most 1 item", [1, 2]),
    (tuple[int, int], tuple[int, str], "/v/1", "integer", "string", [1, 2]),
    (tuple[int, int], tuple[int], "/v", "at most 2 items", "at most 1 item", [1, 2]),
    (dict[str, float], dict[str, int], "/v/*", "number", "integer", {"a": 1.5}),
    (dict[str, int], dict[Literal["a"], int], "/v/*", "name: string", 'name: "a"', {"b": 1}),
    (dict[str, int], dict[int, int], "/v/*", "name: string", "name: format integer", {"b": 1}),
    (dict[str, int], dict[Annotated[str, Field(pattern="^a")], int], "/v/*", "any field",
     "no other fields", {"b": 1}),
    (dict[str, int], Annotated[dict[str, int], Field(min_length=1)], "/v", "any number of fields",
     "at least 1 field", {}),
    (LongerMail, Mail, "/v/subject", "optional", "not a field",
     {"kind": "mail", "to": "x", "subject": "x"}),
    (MailWithDefault, Mail, "/v/kind", "optional", "required", {"to": "x"}),
    (Tree, TextTree, "/v/size", "integer", "string", {"size": 1}),
    (tagged(Mail, Text), tagged(Mail, OnlyText), "/v/kind", '"sms"',
     'one of "mail", "text"',
     {"kind": "sms", "to": "x"}),
    (MailWithDefault, tagged(MailWithDefault, Text), "/v/kind", "optional", "required",
     {"to": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "path", "was", "now", "witness"), NARROWER)
def test_what_admits_less_is_named(
    before: Any, after: Any, path: str, was: str, now: str, witness: JsonValue
) -> None:
    (found, *more) = between(before, after)
    assert (found.path, found.before, found.after, found.is_certain) == (path, was, now, True)
    assert found.reason.endswith(".")
    assert not more
    assert is_admitted(payload_of(v=(before, ...)), {"v": witness})
    assert not is_admitted(payload_of(v=(after, ...)), {"v": witness})


UNCERTAIN: list[tuple[str, Any, Any]] = [
    ("patterns", Annotated[str, Field(pattern="^a")], Annotated[str, Field(pattern="^a|b")]),
    ("a pattern for a format", uuid.UUID, Annotated[str, Field(pattern="-")]),
    ("formats of one family", datetime.time, datetime.timedelta),
    ("a set refuses no repeated items in JSON", list[int], set[int]),
    (
        "a set's length is that of its distinct items",
        Annotated[set[int], Field(max_length=2)],
        Annotated[list[int], Field(max_length=2)],
    ),
    (
        "bytes are longer than their text",
        Annotated[str, Field(max_length=2)],
        Annotated[bytes, Field(max_length=2)],
    ),
    (
        "text is stripped before it is measured",
        Annotated[str, StringConstraints(max_length=2, strip_whitespace=True)],
        Annotated[str, Field(max_length=2)],
    ),
    ("a constant admits 1.0 and true", Literal[1], int),
    ("times with a time zone", datetime.datetime, AwareDatetime),
    ("times since", datetime.date, Annotated[datetime.date, Field(gt=datetime.date(2020, 1, 1))]),
    ("schemes", HttpUrl, Annotated[HttpUrl, Field(max_length=20)]),
]


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(b, a, id=name) for name, b, a in UNCERTAIN]
)
def test_what_cannot_be_told_is_said(before: Any, after: Any) -> None:
    found = between(before, after)
    assert found
    assert not any(each.is_certain for each in found)


def test_an_optional_field_more_is_compatible() -> None:
    before = json_schema_of(payload_of(a=(int, ...)), "")
    after = json_schema_of(payload_of(a=(int, ...), b=(str, "x")), "")
    assert narrowings(before, after) == ()
    assert narrowings(after, before) == (
        Difference(
            "/b",
            "optional",
            "not a field",
            "The field was removed, and unknown fields are refused.",
            True,
        ),
    )


def test_a_field_that_becomes_optional_is_compatible() -> None:
    before = json_schema_of(payload_of(a=(int, ...)), "")
    after = json_schema_of(payload_of(a=(int, 3)), "")
    assert narrowings(before, after) == ()
    assert narrowings(after, before) == (
        Difference("/a", "optional", "required", "A payload without this field is refused.", True),
    )


def test_a_renamed_field_is_one_removed_and_one_required() -> None:
    before = json_schema_of(payload_of(a=(int, ...)), "")
    after = json_schema_of(payload_of(b=(int, ...)), "")
    assert [(each.path, each.before, each.after) for each in narrowings(before, after)] == [
        ("/a", "required", "not a field"),
        ("/b", "not a field", "required"),
    ]


def test_the_same_model_at_two_places_is_named_at_both() -> None:
    before = json_schema_of(payload_of(a=(Tree, ...), b=(list[Tree], ...)), "")
    after = json_schema_of(payload_of(a=(TextTree, ...), b=(list[TextTree], ...)), "")
    assert [each.path for each in narrowings(before, after)] == ["/a/size", "/b/*/size"]


def test_names_are_escaped_as_in_a_json_pointer() -> None:
    before = {"properties": {"a/b~c": {"type": "integer"}}}
    after = {"properties": {"a/b~c": {"type": "string"}}}
    assert [each.path for each in narrowings(before, after)] == ["/a~1b~0c"]


def test_titles_descriptions_examples_and_names_of_definitions_demand_nothing() -> None:
    before = {
        "$defs": {"A": {"type": "integer", "title": "A"}},
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "not": {"const": "a", "title": "B"},
    }
    after = {
        "$defs": {"B": {"type": "integer", "description": "Other.", "examples": [3]}},
        "properties": {"a": {"$ref": "#/$defs/B", "default": 3, "x-order": 1}},
        "not": {"const": "a", "title": "C"},
        "description": "Another.",
    }
    assert narrowings(before, after) == ()


def test_a_union_that_failed_leaves_no_assumption_behind() -> None:
    """A node holds under the assumption that its tree does; the tree does not."""
    node: Any = {
        "type": "object",
        "properties": {"up": {"$ref": "#/$defs/Tree"}},
        "required": ["up"],
    }
    tree: Any = {"type": "object", "properties": {"node": {"$ref": "#/$defs/Node"}, "n": {}}}
    before = {
        "$defs": {
            "Node": node,
            "Tree": {**tree, "properties": {**tree["properties"], "n": {"type": "string"}}},
        },
        "properties": {"a": {"$ref": "#/$defs/Tree"}, "b": {"$ref": "#/$defs/Node"}},
    }
    after = {
        "$defs": {
            "Node": {**node, "title": "x"},
            "Tree": {**tree, "properties": {**tree["properties"], "n": {"type": "integer"}}},
        },
        "properties": {
            "a": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "object"}]},
            "b": {"$ref": "#/$defs/Node"},
        },
    }
    assert [each.path for each in narrowings(before, after)] == ["/b/up/n"]


def test_a_reference_to_the_whole_is_followed() -> None:
    def tree(size: str) -> dict[str, Any]:
        return {"properties": {"size": {"type": size}, "below": {"$ref": "#"}}}

    assert narrowings(tree("integer"), tree("number")) == ()
    assert [each.path for each in narrowings(tree("number"), tree("integer"))] == ["/size"]


REFERENCES = {
    "#/allOf/0": True,
    "#/allOf/1": False,
    "#/allOf/x": False,
    "#/properties/a~1b": True,
    "#/properties/c~0d": True,
    "#/properties/0": False,
    "#/title/0": False,
    "#x/properties": False,
    "x/properties": False,
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_within_the_document_is_followed(reference: str) -> None:
    after = {
        "properties": {"a/b": {}, "c~d": {}, "v": {"$ref": reference}},
        "allOf": [{}],
        "title": "x",
    }
    found = [each.reason for each in narrowings({}, after)]
    followed = f'The reference "{reference}" cannot be followed.'
    assert found == ([] if REFERENCES[reference] else [followed])


KEYWORDS: list[tuple[Any, Any]] = [
    ({}, {"not": {"type": "string"}}),
    ({}, {"if": {"type": "string"}, "then": {"minLength": 1}}),
    ({}, {"contains": {"type": "string"}}),
    ({}, {"dependentRequired": {"a": ["b"]}}),
    ({}, {"unevaluatedProperties": False}),
    ({}, {"madeUp": 3}),
    ({}, {"oneOf": [{"type": "string"}, {"minLength": 3}]}),
    ({}, {"$ref": "https://example.com/schema"}),
    ({}, {"$ref": "#/nowhere"}),
    ({}, {"items": [{"type": "string"}]}),
    ({"madeUp": 3}, {"madeUp": 4}),
    ({"madeUp": 3, "other": 3}, {"madeUp": 3, "other": 4}),
    ({"$ref": "#"}, {"$ref": 5}),
    ({"contains": {"type": "string"}}, {"contains": {"type": "string"}, "minContains": 2}),
    ({"format": "one"}, {"format": "two"}),
    (
        {"properties": {"a": {}}, "unevaluatedProperties": False},
        {"properties": {"b": {}}, "unevaluatedProperties": False},
    ),
]


@pytest.mark.parametrize(("before", "after"), KEYWORDS)
def test_a_keyword_whose_effect_is_not_known_cannot_be_told(before: Any, after: Any) -> None:
    found = narrowings(before, after)
    assert found
    assert not any(each.is_certain for each in found)
    assert narrowings(after, after) == ()
    assert narrowings({**after, "title": "Same"}, json.loads(json.dumps(after))) == ()


def test_an_unchanged_keyword_that_is_not_known_is_no_difference() -> None:
    before = {"type": "integer", "minimum": 3, "madeUp": {"a": 1}, "not": {"const": 5}}
    after = {"type": "integer", "minimum": 2, "madeUp": {"a": 1}, "not": {"const": 5}}
    assert narrowings(before, after) == ()


def test_the_same_words_that_lead_to_another_definition_are_a_difference() -> None:
    def schema(kind: str) -> dict[str, Any]:
        return {"$defs": {"A": {"type": kind}}, "not": {"$ref": "#/$defs/A"}, "title": "x"}

    assert narrowings(schema("string"), schema("string")) == ()
    assert narrowings(schema("string"), schema("integer"))


INT, TEXT, ONLY = {"type": "integer"}, {"type": "string"}, {"additionalProperties": False}
DECIMAL = {**TEXT, "format": "decimal"}
LETTERS = ", ".join(f'"{letter}"' for letter in "abcdefghij")
SET: dict[str, Any] = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
SET_OF_NUMBERS: dict[str, Any] = {**SET, "items": {"type": "number"}}

SCHEMAS: list[tuple[Any, Any, bool]] = [
    ({}, True, True),
    (True, {}, True),
    (False, {"type": "string"}, True),
    ({"type": "string"}, False, False),
    ({"type": ["integer", "null"]}, {"type": ["null", "number"]}, True),
    ({"type": ["integer", "null"]}, {"anyOf": [{"type": "null"}, {"type": "integer"}]}, True),
    ({"allOf": [{"minimum": 3}, {"type": "integer"}]}, {"type": "integer", "minimum": 2}, True),
    ({"minimum": 3}, {"allOf": [{"minimum": 2}, {"minimum": 4}]}, False),
    ({"type": "string", "minimum": 3}, {"minimum": 4}, True),
    ({"const": 3}, {"minimum": 3}, True),
    ({"const": 3}, {"exclusiveMinimum": 3}, False),
    ({"const": {"a": 1}}, {"const": {"a": 1}}, True),
    ({"const": 1}, {"const": True}, False),
    ({"const": "a"}, {"enum": ["a", "b"]}, True),
    ({"enum": ["a", 1]}, {"anyOf": [{"type": "string"}, {"type": "number"}]}, False),
    ({"enum": ["a", 5]}, {"anyOf": [{"type": "string"}, {"type": "number"}]}, True),
    ({"enum": ["a", 5]}, {"type": "string"}, False),
    ({"prefixItems": [{"type": "string"}]}, {"items": {"type": "string"}}, False),
    (
        {"prefixItems": [{"type": "string"}], "items": False},
        {"items": {"type": "string"}},
        True,
    ),
    ({"items": {"type": "string"}}, {"prefixItems": [{"type": "string"}]}, True),
    ({"items": {"type": "string"}}, {"prefixItems": [{"type": "integer"}]}, False),
    (
        {"patternProperties": {"^a": {"type": "string"}}},
        {"patternProperties": {"^a": {"type": ["string", "null"]}}},
        True,
    ),
    (
        {"additionalProperties": {"type": "string"}},
        {"patternProperties": {"^a": {"type": "string"}}},
        True,
    ),
    (
        {"properties": {"ab": {"type": "string"}}, "additionalProperties": False},
        {"patternProperties": {"^a": {"type": "integer"}}},
        False,
    ),
    (
        {"properties": {"ab": {"type": "string"}}, "additionalProperties": False},
        {"propertyNames": {"maxLength": 2}, "maxProperties": 1},
        True,
    ),
    (
        {"properties": {"ab": {"type": "string"}}, "additionalProperties": False},
        {"propertyNames": {"maxLength": 1}},
        False,
    ),
    ({"patternProperties": {"^a": {}}}, {"additionalProperties": False}, False),
    ({"properties": {"a": {}}}, {"properties": {"a": False}}, False),
    ({"properties": {"a": False}}, {"properties": {"a": {"type": "string"}}}, True),
    ({"required": ["a", "b"]}, {"required": ["b"], "minProperties": 2}, True),
    ({"type": "array", "uniqueItems": True}, {"uniqueItems": True}, True),
    ({"anyOf": [{"const": "a"}, {"const": "b"}]}, {"enum": ["a", "b", "c"]}, True),
    ({"minimum": 2**53 + 1, "type": "integer"}, {"minimum": 2**53 + 1, "type": "number"}, False),
    ({"type": "number"}, {"multipleOf": 0.5}, False),
    ({"type": "number"}, {"multipleOf": 1}, False),
    ({"type": "number"}, {"multipleOf": 0}, True),
    ({"type": "string", "format": "uri"}, {"minLength": 0}, True),
    ({"type": "string", "format": "uri", "minLength": 3}, {"minLength": 1}, False),
    ({}, {"minItems": 0, "minLength": 0, "minProperties": 0}, True),
    ({"type": "array"}, {"minItems": 1}, False),
    ({"type": "array", "maxItems": 1}, {"uniqueItems": True}, True),
    ({"type": "array", "maxItems": 2}, {"uniqueItems": True}, False),
    (
        {"type": "array", "uniqueItems": True, "maxItems": 2},
        {"uniqueItems": True, "maxItems": 3},
        True,
    ),
    # A set of two integers may be one of fewer numbers, and a list of at least two.
    ({**SET, "minItems": 2}, {"items": {"type": "number"}, "minItems": 2}, True),
    ({**SET, "minItems": 2}, {**SET_OF_NUMBERS, "minItems": 1}, True),
    ({**SET, "minItems": 2}, {**SET_OF_NUMBERS, "minItems": 2}, False),
    (SET, {**SET_OF_NUMBERS, "minItems": 1}, False),
    ({"type": ["boolean", "null"]}, {"enum": [True, False, None]}, True),
    ({"type": ["boolean", "null"]}, {"enum": [True, False]}, False),
    ({"type": ["boolean", "null"]}, {"enum": [True, None]}, False),
    ({"type": "boolean"}, {"enum": [False, None]}, False),
    ({"type": "boolean"}, {"enum": [True, False]}, True),
    ({"type": "null"}, {"const": None}, True),
    ({"type": "null"}, {"enum": [True, False]}, False),
    # A constant also admits what Python counts as equal: true for 1, and false for 0.
    ({"const": 0}, {"type": "number"}, False),
    ({"const": 1}, {"type": "number"}, False),
    ({"const": 0}, {"type": ["number", "boolean"]}, True),
    ({"const": 5}, {"type": "number"}, True),
    ({"const": -1}, {"type": "number"}, True),
    ({"const": {"title": "a"}}, {"const": {"title": "b"}}, False),
    ({"const": {"a": 1, "b": 2}}, {"const": {"b": 2, "a": 1}}, True),
    ({"not": True}, TEXT, True),
    ({"not": {}}, TEXT, True),
    (TEXT, {"not": True}, False),
    ({"enum": [{"title": "a"}]}, {"enum": [{"title": "b"}]}, False),
    ({"propertyNames": {"type": "integer"}}, {"propertyNames": {"maxLength": 3}}, False),
    # A pattern demands something only of the names that match it, as do further properties.
    ({**ONLY, "properties": {"b": INT}}, {"patternProperties": {"^a": TEXT}}, True),
    (
        {**ONLY, "properties": {"b": INT}},
        {**ONLY, "properties": {"b": INT}, "patternProperties": {"^a": TEXT}},
        True,
    ),
    ({**ONLY, "properties": {"ab": INT}}, {**ONLY, "patternProperties": {"^a": INT}}, True),
    (
        {"patternProperties": {"(": TEXT}, "additionalProperties": INT},
        {"properties": {"a": INT}},
        False,
    ),
    ({**ONLY, "properties": {"b": INT}}, {**ONLY, "patternProperties": {"^a": INT}}, False),
    (
        {"properties": {"a": False, "b": TEXT}},
        {"properties": {"a": INT, "b": INT}},
        False,
    ),
    ({**ONLY, "properties": {"a": TEXT}}, {"patternProperties": {"(": INT}}, False),
    ({"type": "object"}, {"patternProperties": {"^a": INT}}, False),
    ({"type": "object"}, {"additionalProperties": INT}, False),
    ({"type": "number", "minimum": 3}, {"exclusiveMinimum": 3}, False),
    ({"type": "number", "exclusiveMinimum": 3}, {"minimum": 3}, True),
    ({"type": "number", "exclusiveMinimum": 3}, {"exclusiveMinimum": 3, "maximum": 5}, False),
    (
        {"type": "number", "exclusiveMinimum": 3, "maximum": 5},
        {"exclusiveMinimum": 3, "maximum": 6},
        True,
    ),
    ({"enum": [4, 5]}, {"minimum": 3}, True),
    ({"enum": [2, 5]}, {"minimum": 3}, False),
    ({"enum": [0, 2]}, {"maximum": 3}, True),
    ({"enum": [0, 4]}, {"maximum": 3}, False),
    # An item beyond the longest array does not count.
    ({"prefixItems": [INT, INT], "maxItems": 1}, {"prefixItems": [INT, TEXT]}, True),
    ({"prefixItems": [INT], "maxItems": 1}, {"prefixItems": [INT], "items": TEXT}, True),
    ({"prefixItems": [INT], "maxItems": 2}, {"prefixItems": [INT], "items": TEXT}, False),
    ({**DECIMAL, "maxDigits": 5}, {**DECIMAL, "maxDigits": 6}, True),
    ({**DECIMAL, "maxDigits": 5}, {**DECIMAL, "maxDigits": 5, "decimalPlaces": 5}, False),
    (
        {**DECIMAL, "maxDigits": 5, "decimalPlaces": 2},
        {**DECIMAL, "maxDigits": 6, "decimalPlaces": 3},
        True,
    ),
    ({"const": 1.5}, {"exclusiveMinimum": 1.5}, False),
    ({"oneOf": [INT, TEXT], "minLength": 2}, {"oneOf": [INT, TEXT], "minLength": 1}, True),
    (
        {**ONLY, "patternProperties": {"^a": TEXT}},
        {**ONLY, "patternProperties": {"^a": {"type": ["string", "null"]}}},
        True,
    ),
    # Keywords beside those of a union hold for each of its branches.
    (
        {"minimum": 3, "anyOf": [{"type": "integer"}, {"type": "null"}]},
        {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]},
        True,
    ),
    (
        {"properties": {"title": {"type": "string"}}},
        {"properties": {"title": {"type": "integer"}}},
        False,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "is_compatible"), SCHEMAS)
def test_schemas_that_no_model_made_are_compared(
    before: Any, after: Any, is_compatible: bool
) -> None:
    wrapped = ({"properties": {"v": each}} for each in (before, after))
    assert (narrowings(*wrapped) == ()) is is_compatible


WORDS: list[tuple[Any, Any, Difference]] = [
    (
        {"type": "number"},
        {"type": "integer"},
        Difference("", "number", "integer", "A number such as 1.5 is refused.", True),
    ),
    (
        {"type": ["integer", "null"]},
        {"type": "integer"},
        Difference("", "integer or null", "integer", "A value of type null is refused.", True),
    ),
    (
        {"type": "string", "minLength": 1},
        {"minLength": 3},
        Difference(
            "", "at least 1 character", "at least 3 characters", "Fewer characters are refused.",
            True,
        ),
    ),
    (
        {"type": "array", "maxItems": 3},
        {"maxItems": 2},
        Difference("", "at most 3 items", "at most 2 items", "More items are refused.", True),
    ),
    # The two sides are bounded in different ways, so the earlier bound says nothing here.
    (
        {**SET, "maxItems": 2},
        {"type": "array", "maxItems": 2},
        Difference(
            "", "at most 2 items", "at most 2 items",
            "The number of items is counted in another way, and is now bounded.", False,
        ),
    ),
    (
        {**SET, "minItems": 1},
        {**SET_OF_NUMBERS, "minItems": 2},
        Difference(
            "", "at least 1 item", "at least 2 items",
            "The number of items is counted in another way, and is now bounded.", False,
        ),
    ),
    (
        SET,
        {**SET_OF_NUMBERS, "minItems": 2},
        Difference(
            "", "any number of items", "at least 2 items",
            "The number of items is counted in another way, and is now bounded.", False,
        ),
    ),
    (
        {"allOf": [{**SET, "minItems": 1}, {"minItems": 2}]},
        {**SET_OF_NUMBERS, "minItems": 3},
        Difference(
            "", "at least 2 items", "at least 3 items",
            "The number of items is counted in another way, and is now bounded.", False,
        ),
    ),
    (
        {"allOf": [{**SET, "maxItems": 3}, {"maxItems": 2}]},
        {"type": "array", "maxItems": 1},
        Difference(
            "", "at most 2 items", "at most 1 item",
            "The number of items is counted in another way, and is now bounded.", False,
        ),
    ),
    (
        {"type": "object", "required": ["a"]},
        {"minProperties": 2},
        Difference("", "at least 1 field", "at least 2 fields", "Fewer fields are refused.", True),
    ),
    # What the items of a constant are is not compared.
    (
        {"const": {"a": 1}},
        {"required": ["b"]},
        Difference("/b", "optional", "required", "A payload without this field is refused.", False),
    ),
    (
        {"allOf": [{"type": "string", "format": "date"}, {"format": "email"}]},
        {"type": "integer"},
        Difference(
            "", "string (format date)", "integer", "A value of type string is refused.", True
        ),
    ),
    (
        {"allOf": [{"type": "string", "format": "date"}, {"format": "email"}]},
        {"format": "uuid"},
        Difference(
            "", "format date", "format uuid", "Text that is not of the format uuid is refused.",
            True,
        ),
    ),
    (
        {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "b$"}]},
        {"pattern": "c"},
        Difference(
            "", 'pattern "^a"', 'pattern "c"', "Text that does not match the pattern is refused.",
            False,
        ),
    ),
    (
        {"allOf": [{"type": "number", "multipleOf": 2}, {"multipleOf": 5}]},
        {"multipleOf": 3},
        Difference(
            "", "a multiple of 2", "a multiple of 3",
            "A number that is not a multiple of 3 is refused.", False,
        ),
    ),
    (
        {"type": "string"},
        {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        Difference(
            "", "string", "integer or null", "String is not among what is admitted.", True
        ),
    ),
    # Of two branches that admit a part, the nearest is shown: the other one may admit the rest.
    (
        INT,
        {"anyOf": [{**INT, "minimum": 5}, {**INT, "maximum": 3}]},
        Difference(
            "", "any number", "at least 5", "A number that is not at least 5 is refused.", False
        ),
    ),
    (
        {"items": TEXT},
        {"items": False},
        Difference("/*", "string", "nothing", "No value is admitted here any more.", True),
    ),
    # A pattern may accept the texts that are tried and refuse others.
    (
        TEXT,
        {"pattern": "^"},
        Difference(
            "", "string", 'pattern "^"', "Text that does not match the pattern is refused.", False
        ),
    ),
    (
        {**TEXT, "minLength": 2, "maxLength": 2},
        {"pattern": "^[b-y]+$"},
        Difference(
            "", "string", 'pattern "^[b-y]+$"', "Text that does not match the pattern is refused.",
            True,
        ),
    ),
    (
        {**TEXT, "minLength": 1, "maxLength": 3},
        {"pattern": "^.$|^...$"},
        Difference(
            "", "string", 'pattern "^.$|^...$"', "Text that does not match the pattern is refused.",
            False,
        ),
    ),
    (
        TEXT,
        {"pattern": "^$|^..+$"},
        Difference(
            "", "string", 'pattern "^$|^..+$"', "Text that does not match the pattern is refused.",
            True,
        ),
    ),
    (
        TEXT,
        {"pattern": "zz"},
        Difference(
            "", "string", 'pattern "zz"', "Text that does not match the pattern is refused.", True
        ),
    ),
    (
        {"enum": [*"abcdefghij"]},
        INT,
        Difference(
            "", f"one of {LETTERS}", "integer",
            "A value of type string is refused.", True,
        ),
    ),
    (
        {"enum": [*"abcdefghijk"]},
        INT,
        Difference(
            "", f"one of {LETTERS}, …", "integer",
            "A value of type string is refused.", True,
        ),
    ),
    (
        {"const": "a"},
        {"type": "integer"},
        Difference("", '"a"', "integer", "A value of type string is refused.", True),
    ),
    (
        {"type": "number", "multipleOf": 2},
        {"minimum": 1},
        Difference(
            "", "any number", "at least 1", "A number that is not at least 1 is refused.", False
        ),
    ),
    (
        {"type": "integer", "minimum": 2**53},
        {"type": "number", "minimum": 2**53},
        Difference(
            "", f"at least {2**53}", f"at least {2**53}",
            f"A number that is not at least {2**53} is refused.", False,
        ),
    ),
    # Without constants of their own, the branches do not say which tags they take.
    (
        {
            "type": "object",
            "properties": {"kind": {"const": "a"}, "x": {"const": "y"}},
            "required": ["kind", "x"],
        },
        {
            "discriminator": {"propertyName": "kind"},
            "oneOf": [{"type": "object", "properties": {"x": {"const": "z"}}, "required": ["x"]}],
        },
        Difference("", "object", "object", "Object is not among what is admitted.", True),
    ),
    (
        {"const": 1},
        {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
        Difference("", "1", "boolean", "A value of type integer is refused.", False),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "difference"), WORDS)
def test_a_difference_says_what_is_refused(before: Any, after: Any, difference: Difference) -> None:
    assert narrowings(before, after) == (difference,)


UUIDS = tuple(f"uuid{version}" for version in range(1, 9))
FAMILIES = [
    ("uuid", *UUIDS),
    ("ipv4", "ipv6", "ipvanyaddress"),
    ("date", "date-time", "time", "duration"),
    *[(name,) for name in ("decimal", "email", "uri", "integer", "number", "boolean")],
]
INCLUDED = {
    *((each, "uuid") for each in UUIDS),
    *((f"ipv{v}{what}", f"ipvany{what or 'address'}")
      for v in (4, 6) for what in ("", "network", "interface")),
    ("file-path", "path"),
    ("directory-path", "path"),
}  # fmt: skip


def test_text_of_a_format_fits_a_format_that_includes_it_and_no_other() -> None:
    def between_formats(one: str, other: str) -> tuple[Difference, ...]:
        return narrowings(
            {"type": "string", "format": one}, {"type": "string", "format": other, "title": "v"}
        )

    family = {each: names[0] for names in FAMILIES for each in names}
    for one, other in itertools.product(family, family):
        found = between_formats(one, other)
        assert (found == ()) is (one == other or (one, other) in INCLUDED), (one, other)
        # Of one family, both may admit the same text.
        assert any(each.is_certain for each in found) is (family[one] != family[other])
    for one, other in INCLUDED:
        assert between_formats(one, other) == ()
        assert not any(each.is_certain for each in between_formats(other, one))
        assert between_formats(other, one)
    # Any text is a password. Nothing is known about a format of the user.
    assert between_formats("uuid", "password") == ()
    assert [each.is_certain for each in between_formats("uuid", "mine")] == [False]
    for unknown in ("mine", "uuid0", "uuid9"):
        assert [each.is_certain for each in between_formats(unknown, "uuid")] == [False]


def test_a_keyword_that_cannot_be_compared_is_shown_as_it_was_and_is() -> None:
    before = {"properties": {"v": {"type": "string"}}}
    after = {"properties": {"v": {"type": "string", "not": {"const": "a"}}}}
    (found,) = narrowings(before, after)
    assert (found.before, found.after) == ("no not", 'not {"const": "a"}')
    (found,) = narrowings(after, {"properties": {"v": {"type": "string", "not": {"const": "b"}}}})
    assert (found.before, found.after) == ('not {"const": "a"}', 'not {"const": "b"}')


def test_a_union_whose_branches_are_chosen_by_a_function_cannot_be_told() -> None:
    def of(*branches: Any) -> Any:
        return Annotated[_union(*branches), Discriminator(lambda value: "x")]

    one, two, three = Annotated[Mail, Tag("x")], Annotated[Sms, Tag("y")], Annotated[Text, Tag("z")]
    assert between(of(one, two), of(one, two)) == ()
    (found,) = between(of(one, two), of(one, two, three))
    assert not found.is_certain


def test_at_most_100_differences_are_returned() -> None:
    before = {"properties": {f"f{n}": {"type": "integer"} for n in range(3_000)}}
    after = {"properties": {f"f{n}": {"type": "string"} for n in range(3_000)}}
    assert len(narrowings(before, after)) == MAX_DIFFERENCES == 100
    one: Any = {"properties": {f"f{n}": {"default": 1} for n in range(150)}}
    other: Any = {"properties": {f"f{n}": {"default": 2} for n in range(150)}}
    assert len(changed_defaults(one, other)) == 100


def nested_unions(depth: int, width: int, leaf: str) -> dict[str, Any]:
    """Models of which each has a union of several of the next, all of them alike."""
    definitions: dict[str, Any] = {}
    for level, number in itertools.product(range(depth), range(width)):
        inner: Any = {"type": leaf}
        if level + 1 < depth:
            inner = {"anyOf": [{"$ref": f"#/$defs/N{level + 1}_{n}"} for n in range(width)]}
        definitions[f"N{level}_{number}"] = {
            "type": "object",
            "properties": {"inner": inner, f"only{number}": {"type": "integer"}},
            "additionalProperties": False,
        }
    return {"$defs": definitions, "$ref": "#/$defs/N0_0"}


@pytest.mark.parametrize(("depth", "width"), [(4, 4), (60, 2), (5, 8), (2, 40)])
def test_nested_unions_are_compared_in_bounded_time(depth: int, width: int) -> None:
    started = time.process_time()
    assert narrowings(nested_unions(depth, width, "number"), nested_unions(depth, width, "integer"))
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Literal[1, True], int | bool),
        (Literal["a", 1, True, None], Literal["a", 1, True, "b"] | None),
        (Literal[0, False, 1, True], tagged(Mail, Text)),
    ],
)
def test_constants_that_are_equal_in_python_are_compared_in_bounded_time(
    before: Any, after: Any
) -> None:
    started = time.process_time()
    between(before, after)
    assert time.process_time() - started < 2


def test_a_schema_of_thousands_of_nodes_is_compared() -> None:
    wide = {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "null"}]}
    wider = {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}
    before = {"properties": {f"f{n}": wide for n in range(2_000)}}
    after = json.loads(json.dumps({"properties": {f"f{n}": wider for n in range(2_000)}}))
    assert narrowings(before, after) == ()


def test_a_chain_of_models_that_no_payload_can_fill_cannot_be_told() -> None:
    def chain(leaf: str) -> dict[str, Any]:
        definitions = {
            f"N{n}": {"properties": {"n": {"$ref": f"#/$defs/N{n + 1}"}}} for n in range(2_000)
        }
        return {"$defs": {**definitions, "N2000": {"type": leaf}}, "$ref": "#/$defs/N0"}

    (found,) = narrowings(chain("string"), chain("integer"))
    assert not found.is_certain


STEPS: dict[str, Callable[[Any], Any]] = {
    "items": lambda inner: {"items": inner},
    "prefixItems": lambda inner: {"prefixItems": [inner]},
    "properties": lambda inner: {"properties": {"a": inner}},
    "patternProperties": lambda inner: {"patternProperties": {"^a": inner}},
    "additionalProperties": lambda inner: {"additionalProperties": inner},
    "propertyNames": lambda inner: {"propertyNames": inner},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("levels", [MAX_DEPTH, MAX_DEPTH + 1])
def test_64_levels_of_nesting_are_compared(step: str, levels: int) -> None:
    def nested(leaf: str) -> Any:
        schema = STEPS[step]({"type": leaf})
        for _ in range(levels - 1):
            schema = {"properties": {"a": schema}}
        return schema

    (found,) = narrowings(nested("string"), nested("integer"))
    assert found.is_certain is (levels == 64)
    if not found.is_certain:
        assert found.reason.endswith("More than 64 levels of nesting are not compared.")


def test_only_so_many_pairs_of_schemas_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(kind: str, fields: int) -> Any:
        properties = {f"f{n}": {"type": kind} for n in range(fields)}
        return {"type": "object", "properties": properties}

    monkeypatch.setattr(compatibility, "MAX_COMPARISONS", 5)
    assert narrowings(wide("integer", 4), wide("number", 4)) == ()
    (found,) = narrowings(wide("integer", 5), wide("number", 5))
    assert found.path == "/f4"
    assert found.reason == "The schemas are too large to be compared in full."


def test_only_so_many_combinations_of_unions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "MAX_ALTERNATIVES", 4)
    kinds = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    after = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}

    def bounds(count: int) -> Any:
        return {"anyOf": [{"minimum": n} for n in range(1, count + 1)]}

    assert narrowings({"allOf": [kinds, bounds(2)]}, after) == ()
    for two in ([kinds, bounds(3)], [bounds(3), kinds]):
        found = narrowings({"allOf": two}, after)
        assert found
        assert not any(each.is_certain for each in found)
    # One union is compared in full, alone and beside something else.
    texts = [f"c{n}" for n in range(9)]
    assert narrowings({"anyOf": [{"const": text} for text in texts]}, {"enum": texts}) == ()
    assert narrowings({"allOf": [bounds(9), {"type": "integer"}]}, {"type": "integer"}) == ()


@pytest.mark.parametrize("pattern", [5, "(", "a{99999999999}", "(" * 2_000 + ")" * 2_000])
def test_a_pattern_that_python_cannot_use_cannot_be_told(pattern: Any) -> None:
    (found,) = narrowings({"type": "string"}, {"type": "string", "pattern": pattern})
    assert found.reason == "Text that does not match the pattern is refused."
    assert not found.is_certain


def test_schemas_too_deep_to_be_read_cannot_be_told() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(5_000):
        deep = {"items": deep}
    (found,) = narrowings(deep, {"items": deep, "title": "x", "minItems": 1})
    assert not found.is_certain


def test_a_changed_default_is_told_apart_from_what_is_refused() -> None:
    before = json_schema_of(payload_of(a=(int, 3), b=(str, "x"), c=(int, 1), d=(bool, True)), "")
    after = json_schema_of(payload_of(a=(int, 4), b=(str, "x"), c=(int, ...), d=(int, 1)), "")
    assert [(d.path, d.before, d.after, d.is_certain) for d in changed_defaults(before, after)] == [
        ("/a", "default 3", "default 4", True),
        ("/c", "default 1", "no stated default", False),
        ("/d", "default true", "default 1", True),
    ]
    assert changed_defaults(before, before) == ()


def test_changed_defaults_are_found_in_nested_and_recursive_models() -> None:
    def schema(size: int) -> dict[str, Any]:
        tree = {
            "properties": {
                "size": {"type": "integer", "default": size},
                "below": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
            }
        }
        mail = {"properties": {"kind": {"const": "mail"}, "size": {"default": size}}}
        sms = {"properties": {"kind": {"const": "sms"}, "size": {"default": 1}}}
        return {
            "$defs": {"Tree": tree, "Mail": mail, "Sms": sms},
            "properties": {
                "maybe": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]},
                "one": {"oneOf": [{"$ref": "#/$defs/Sms"}, {"$ref": "#/$defs/Mail"}]},
                "pair": {"prefixItems": [True, {"default": size}]},
                "map": {"additionalProperties": {"properties": {"n": {"default": size}}}},
            },
        }

    assert [each.path for each in changed_defaults(schema(1), schema(2))] == [
        "/maybe/size",
        "/one/size",
        "/pair/1",
        "/map/*/n",
    ]


def test_defaults_of_the_branches_of_a_union_are_compared_by_tag_or_by_name() -> None:
    def branch(size: int, **more: Any) -> dict[str, Any]:
        return {"properties": {"size": {"default": size}, **more}}

    def schema(sizes: tuple[int, int], names: tuple[str, str], *, tagged: bool) -> dict[str, Any]:
        kinds: Any = [{"kind": {"const": kind}} if tagged else {} for kind in ("a", "b")]
        return {
            "$defs": dict(zip(names, map(branch_of, sizes, kinds), strict=True)),
            "properties": {"v": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}},
        }

    def branch_of(size: int, more: Any) -> dict[str, Any]:
        return branch(size, **more)

    one, two = branch(1), branch(2)
    # By their tags, with other names
    before, after = schema((1, 2), ("A", "B"), tagged=True), schema((1, 3), ("C", "D"), tagged=True)
    assert [each.after for each in changed_defaults(before, after)] == ["default 3"]
    # Without tags, by name
    before, after = (
        schema((1, 2), ("A", "B"), tagged=False),
        schema((3, 1), ("B", "A"), tagged=False),
    )
    assert [(each.before, each.after) for each in changed_defaults(before, after)] == [
        ("default 2", "default 3")
    ]
    # Of tuples, as far as both go
    before, after = {"prefixItems": [{"default": 1}]}, {"prefixItems": [{"default": 2}, {}]}
    assert [each.path for each in changed_defaults(before, after)] == ["/0"]
    # If further fields are not admitted, none of them has a default
    assert not changed_defaults({"additionalProperties": one}, {"additionalProperties": False})
    # Of several that are alike, with the first
    assert changed_defaults({"anyOf": [one]}, {"anyOf": [one, two]}) == ()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_what_is_called_compatible_is_disproved_by_no_payload(seed: int) -> None:
    """Models that are edited step by step, each compared with each, and payloads of each."""
    random = Random(seed)
    fields = random_fields(random)
    versions = []
    for _ in range(4):
        if job_type := job_type_of(random, fields):
            versions.append((fields, job_type.payload_schema, JobRegistry([job_type])))
        fields = edited_fields(random, fields)
    for before, after in itertools.permutations(versions, 2):
        if narrowings(before[1], after[1]):
            continue
        for _ in range(25):
            payload = random_object(random, before[0], before[0])
            if admits(before[2], payload) and not admits(after[2], payload):
                # An Enum also takes what equals its numbers, such as true for 1, though its schema
                # does not say so. The comparison has only the schema.
                assert not fits(before[1], payload), (before[0], after[0], payload)
    for _, schema, _ in versions:
        assert narrowings(schema, json.loads(json.dumps(dict(schema)))) == ()


def fits(schema: Mapping[str, Any], payload: JsonValue) -> bool:
    """Return whether a payload is valid under a schema. The items of a set may repeat in JSON."""
    validator = extend(Draft202012Validator, {"uniqueItems": lambda *_: ()})
    return bool(validator(dict(schema)).is_valid(payload))


def admits(registry: JobRegistry, payload: JsonValue) -> bool:
    try:
        registry.admit("some.type", payload)
    except PayloadInvalid:
        return False
    return True
