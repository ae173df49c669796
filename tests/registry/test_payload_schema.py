"""The JSON Schema of each kind of field, and the example that is made from it."""

from __future__ import annotations

import datetime
import enum
import json
import uuid
from collections import Counter, OrderedDict
from decimal import Decimal
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import (
    AliasChoices,
    AnyUrl,
    AwareDatetime,
    ConfigDict,
    Field,
    HttpUrl,
    NaiveDatetime,
    PastDate,
    PostgresDsn,
    StringConstraints,
    create_model,
)
from pydantic.json_schema import PydanticJsonSchemaWarning

from job_registry import DefinitionError, JobRegistry, JobType, Payload, PayloadInvalid
from job_registry.compatibility import narrowings
from job_registry.payload_schema import MAX_REFERENCES, NAIVE, fingerprint_of, json_schema_of
from job_registry_api.graphql.schema import sdl

NEW_YEAR = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
TEXT = {"type": "string"}
NUMBERS = {"type": "object", "additionalProperties": {"type": "integer"}}


def payload_of(annotation: Any) -> type[Payload]:
    """Return a payload with one field, `v`."""
    return create_model("Some", __base__=Payload, v=(annotation, ...))


def example_of(annotation: Any) -> Any:
    return JobType(name="a", payload=payload_of(annotation)).example_payload


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (Decimal, {**TEXT, "format": "decimal"}),
        (
            Annotated[Decimal, Field(ge=1, lt=Decimal("2.5"), multiple_of=0.25)],
            {**TEXT, "format": "decimal", "minimum": 1, "exclusiveMaximum": 2.5,
             "multipleOf": 0.25},
        ),
        (
            Annotated[Decimal, Field(gt=Decimal("0.5"), le=10)],
            {**TEXT, "format": "decimal", "exclusiveMinimum": 0.5, "maximum": 10},
        ),
        (
            Annotated[Decimal, Field(max_digits=6, decimal_places=2)],
            {**TEXT, "format": "decimal", "maxDigits": 6, "decimalPlaces": 2},
        ),
        (str, TEXT),
        (
            Annotated[str, StringConstraints(to_lower=True, max_length=3)],
            {**TEXT, "maxLength": 3, "normalized": ["to_lower"]},
        ),
        (
            Annotated[str, StringConstraints(to_upper=True, strip_whitespace=True)],
            {**TEXT, "normalized": ["strip_whitespace", "to_upper"]},
        ),
        (Annotated[str, StringConstraints(strip_whitespace=False)], TEXT),
        (
            Annotated[datetime.date, Field(ge=datetime.date(2020, 1, 1), lt=NEW_YEAR.date())],
            {**TEXT, "format": "date", "formatMinimum": "2020-01-01",
             "formatExclusiveMaximum": "2030-01-01"},
        ),
        (PastDate, {**TEXT, "format": "date", "relativeToNow": "past"}),
        (datetime.datetime, {**TEXT, "format": "date-time"}),
        (AwareDatetime, {**TEXT, "format": "date-time", "timezone": "aware"}),
        (NaiveDatetime, {**TEXT, "pattern": NAIVE, "timezone": "naive"}),
        (
            Annotated[datetime.datetime, Field(gt=NEW_YEAR)],
            {**TEXT, "format": "date-time", "formatExclusiveMinimum": "2030-01-01T00:00:00Z"},
        ),
        (
            Annotated[datetime.time, Field(ge=datetime.time(8))],
            {**TEXT, "format": "time", "formatMinimum": "08:00:00"},
        ),
        (
            Annotated[datetime.timedelta, Field(le=datetime.timedelta(hours=1))],
            {**TEXT, "format": "duration", "formatMaximum": "PT1H"},
        ),
        (AnyUrl, {**TEXT, "format": "uri", "minLength": 1}),
        (
            HttpUrl,
            {**TEXT, "format": "uri", "minLength": 1, "maxLength": 2083,
             "schemes": ["http", "https"]},
        ),
        (
            PostgresDsn,
            {**TEXT, "format": "multi-host-uri", "minLength": 1,
             "schemes": ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+pg8000",
                         "postgresql+psycopg", "postgresql+psycopg2", "postgresql+psycopg2cffi",
                         "postgresql+py-postgresql", "postgresql+pygresql"]},
        ),
        (dict[str, int], NUMBERS),
        (dict[Any, int], NUMBERS),
        (OrderedDict[int, int], {**NUMBERS, "propertyNames": {"format": "integer"}}),
        (Counter[int], {**NUMBERS, "propertyNames": {"format": "integer"}}),
        (
            OrderedDict[Annotated[str, Field(pattern="^a")], int],
            {"type": "object", "patternProperties": {"^a": {"type": "integer"}},
             "additionalProperties": False},
        ),
        (dict[int, int], {**NUMBERS, "propertyNames": {"format": "integer"}}),
        (dict[bool, int], {**NUMBERS, "propertyNames": {"format": "boolean"}}),
        (dict[uuid.UUID, int], {**NUMBERS, "propertyNames": {"format": "uuid"}}),
        (dict[Literal["a", "b"], int], {**NUMBERS, "propertyNames": {"enum": ["a", "b"]}}),
        (
            dict[Annotated[str, Field(min_length=2)], int],
            {**NUMBERS, "propertyNames": {"minLength": 2}},
        ),
        (
            dict[Annotated[int, Field(ge=1)], int],
            {**NUMBERS, "propertyNames": {"format": "integer", "minimum": 1}},
        ),
        (
            dict[int | datetime.date, int],
            {**NUMBERS, "propertyNames": {"anyOf": [{"format": "integer"}, {"format": "date"}]}},
        ),
        (
            dict[Annotated[str, Field(pattern="^a")], int],
            {"type": "object", "patternProperties": {"^a": {"type": "integer"}},
             "additionalProperties": False},
        ),
    ],
)  # fmt: skip
def test_a_schema_says_what_a_payload_admits(annotation: Any, schema: dict[str, Any]) -> None:
    found = json_schema_of(payload_of(annotation), "")["properties"]["v"]
    assert found == {**schema, "title": "V"}


def test_a_schema_says_what_a_class_does_to_its_text() -> None:
    class Address(Payload):
        city: str

    class Order(Payload):
        model_config = ConfigDict(str_strip_whitespace=True, str_to_lower=True)
        item: str
        note: Annotated[str, StringConstraints(strip_whitespace=False)]
        address: Address
        tags: list[str]

    schema = json_schema_of(Order, "")
    fields = schema["properties"]
    assert fields["item"]["normalized"] == ["strip_whitespace", "to_lower"]
    assert fields["note"]["normalized"] == ["to_lower"]
    assert fields["tags"]["items"]["normalized"] == ["strip_whitespace", "to_lower"]
    assert "normalized" not in schema["$defs"]["Address"]["properties"]["city"]
    payload = {"item": " A ", "note": " B ", "address": {"city": " C "}, "tags": [" D "]}
    read = Order.model_validate_json(json.dumps(payload))
    assert (read.item, read.note, read.address.city, read.tags) == ("a", " b ", " C ", ["d"])


class Card(Payload):
    kind: Literal["card"] = "card"
    number: int = 1


class Iban(Payload):
    kind: Literal["iban"] = "iban"


class Paid(Payload):
    by: Annotated[Card | Iban, Field(discriminator="kind")]
    card: Card = Card()


@pytest.mark.parametrize(
    "payload",
    [
        {"by": {"kind": "card"}},
        {"by": {"kind": "iban"}, "card": {"number": 2}},
        {"by": {}},
        {"by": {"number": 1}},
        {"by": {"kind": "cash"}},
    ],
)
def test_a_schema_requires_the_field_that_says_which_model_it_is(payload: dict[str, Any]) -> None:
    job_type = JobType(name="a", payload=Paid, example={"by": {"kind": "card"}})
    try:
        is_admitted = bool(JobRegistry([job_type]).admit("a", payload))
    except PayloadInvalid:
        is_admitted = False
    assert is_admitted == Draft202012Validator(dict(job_type.payload_schema)).is_valid(payload)


def test_that_a_discriminator_is_required_does_not_change_a_fingerprint() -> None:
    schema = json_schema_of(Paid, "")
    assert schema["properties"]["by"].pop("required") == ["kind"]
    assert fingerprint_of(schema) == fingerprint_of(json_schema_of(Paid, ""))


class Renamed(Payload):
    recipient: str = Field(validation_alias=AliasChoices("recipient", "to"))
    reply_to: str = Field(default="", validation_alias=AliasChoices("replyTo", "from"))


class Nested(Payload):
    mails: list[Renamed]


class Before(Payload):
    to: str


class After(Payload):
    recipient: str
    reply_to: str = ""


@pytest.mark.parametrize(
    "mail",
    [
        {"recipient": "a"},
        {"to": "a"},
        {"to": "a", "from": "b"},
        {"recipient": "a", "replyTo": "b"},
        {"to": 1},
        {"from": "b"},
        {},
        {"to": "a", "reply_to": "b"},
    ],
)
def test_a_schema_has_every_name_that_a_field_is_read_from(mail: dict[str, Any]) -> None:
    job_type = JobType(name="a", payload=Nested)
    registry = JobRegistry([job_type])
    payload = {"mails": [mail]}
    try:
        is_admitted = bool(registry.admit("a", payload))
    except PayloadInvalid:
        is_admitted = False
    assert is_admitted == Draft202012Validator(dict(job_type.payload_schema)).is_valid(payload)


def test_a_field_with_a_second_name_is_compared_and_has_an_example() -> None:
    before, renamed, after = (json_schema_of(model, "") for model in (Before, Renamed, After))
    assert narrowings(before, renamed) == narrowings(after, renamed) == ()
    assert [(each.path, each.is_certain) for each in narrowings(renamed, after)][:2] == [
        ("/to", True),
        ("/from", True),
    ]
    job_type = JobType(name="mail.send", payload=Renamed)
    assert job_type.example_payload == {"recipient": "example", "replyTo": ""}
    lines = [line.strip() for line in sdl(JobRegistry([job_type])).splitlines()]
    assert {"recipient: String", "to: String", "replyTo: String", "from: String"} <= set(lines)


def test_an_example_is_made_beside_rules_of_the_users_own() -> None:
    rule: dict[str, Any] = {"if": {"required": ["copy"]}, "then": {"required": ["to"]}}

    class Mail(Payload):
        model_config = ConfigDict(json_schema_extra={"allOf": [rule, {"anyOf": [True, rule]}]})

        to: str

    assert JobType(name="mail.send", payload=Mail).example_payload == {"to": "example"}


class Letter(enum.Enum):
    A = "a"
    B = "b"
    C = "c"
    D = "d"
    E = "e"
    F = "f"


LETTERS = list("abcdef")


class Sorted(Payload):
    letters: frozenset[Letter] = frozenset(Letter)


@pytest.mark.parametrize(
    ("default", "described"),
    [
        (set(Letter), LETTERS),
        (set(LETTERS), LETTERS),
        ({10, 9, 2}, [2, 9, 10]),
        ({*LETTERS, 1, 2}, [*LETTERS, 1, 2]),
        ([set(LETTERS)], [LETTERS]),
        (frozenset({frozenset(LETTERS), frozenset("a")}), [["a"], LETTERS]),
        ({"k": (frozenset(LETTERS), 1)}, {"k": [LETTERS, 1]}),
        (Sorted(), {"letters": LETTERS}),
        ([Sorted(letters=frozenset())], [{"letters": []}]),
        ((Decimal("1.50"), datetime.date(2030, 1, 31)), ["1.50", "2030-01-31"]),
    ],
)
def test_a_set_is_a_default_in_the_same_order_in_every_process(
    default: Any, described: Any
) -> None:
    model = create_model("Some", __base__=Payload, v=(Any, default))
    assert json_schema_of(model, "")["properties"]["v"]["default"] == described


def test_a_set_that_is_not_json_is_not_a_default_of_the_schema() -> None:
    default = frozenset({object(), object()})
    model = create_model("Some", __base__=Payload, v=(Any, default))
    with pytest.warns(PydanticJsonSchemaWarning, match="not JSON serializable"):
        assert "default" not in json_schema_of(model, "")["properties"]["v"]


@pytest.mark.parametrize(
    ("annotation", "example"),
    [
        (int, 1),
        (bool, True),
        (None, None),
        (Any, None),
        (str, "example"),
        (datetime.date, "2030-01-31"),
        (datetime.timedelta, "PT1H"),
        (Decimal, "1.00"),
        (Annotated[str, Field(min_length=10)], "examplexxx"),
        (Annotated[str, Field(max_length=3)], "exa"),
        (Annotated[int, Field(ge=3)], 3),
        (Annotated[int, Field(gt=3)], 4),
        (Annotated[int, Field(le=-3)], -3),
        (Annotated[int, Field(le=9)], 1),
        (Annotated[int, Field(lt=9)], 1),
        (Annotated[int, Field(lt=1)], 0),
        (Annotated[float, Field(lt=0)], -1),
        (Annotated[int, Field(multiple_of=7)], 7),
        (Annotated[int, Field(gt=0, multiple_of=7)], 7),
        (Annotated[int, Field(lt=7, multiple_of=7)], 0),
        (list[int], [1]),
        (list[Any], [None]),
        (Annotated[list[int], Field(min_length=0)], []),
        (Annotated[list[int], Field(min_length=3)], [1, 1, 1]),
        (tuple[int, str], [1, "example"]),
        (dict[str, int], {}),
        (str | int, "example"),
        (Literal["a", "b"], "a"),
        (Literal["a"], "a"),
        (Annotated[int, Field(examples=[5, 6])], 5),
    ],
)
def test_an_example_is_made_from_the_schema(annotation: Any, example: Any) -> None:
    assert example_of(annotation) == {"v": example}


def test_an_example_has_the_required_fields_and_those_with_a_stated_default() -> None:
    class Some(Payload):
        a: int
        b: int = 5
        c: int = Field(default_factory=int)

    assert JobType(name="a", payload=Some).example_payload == {"a": 1, "b": 5}


@pytest.mark.parametrize("models", [MAX_REFERENCES, MAX_REFERENCES + 1])
def test_an_example_has_10_models_inside_each_other(models: int) -> None:
    annotation: Any = int
    for number in range(models):
        annotation = create_model(f"M{number}", __base__=Payload, v=(annotation, ...))
    if models <= 10:
        example = example_of(annotation)
        for _ in range(models + 1):
            example = example["v"]
        assert example == 1
    else:
        with pytest.raises(DefinitionError, match="example"):
            example_of(annotation)


class Endless(Payload):
    next: Endless


def test_a_model_that_requires_itself_has_no_example() -> None:
    with pytest.raises(DefinitionError, match="example"):
        JobType(name="a", payload=Endless)


def test_the_schema_of_a_payload_has_its_docstring_and_that_of_a_plain_one_none() -> None:
    class Plain(Payload):
        a: int = 1

    class Described(Payload):
        """What it is."""

        a: int = 1

    assert "description" not in JobType(name="a", payload=Plain).payload_schema
    described = JobType(name="a", payload=Described)
    assert described.payload_schema["description"] == "What it is."
    # Only people read it.
    assert JobType(name="a", payload=Described, description="Other.").fingerprint == (
        described.fingerprint
    )
