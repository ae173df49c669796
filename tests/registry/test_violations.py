"""Violations point into what the caller sent, whatever the payload model and its names are."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasPath,
    AnyHttpUrl,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    create_model,
    field_validator,
)
from pydantic import Json as JsonText
from pydantic_core import PydanticCustomError

from job_registry import JobPolicy, JobRegistry, JobType, Payload, PayloadInvalid, Violation
from job_registry.catalog.thumbnail import thumbnail_create


class Card(Payload):
    kind: Literal["card"]
    token: str


class Iban(Payload):
    kind: Literal["iban"]
    iban: str


class Slot(Payload):
    day: date = Field(alias="date")
    at: list[int] = Field(default=[], alias="list")


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Node(Payload):
    size: int = 0
    below: list[Node] = []


class Order(Payload):
    method: Annotated[Card | Iban, Field(discriminator="kind")] | None = None
    slot: Slot | None = None
    way: Card | Iban | int | None = None
    sizes: list[int] | list[str] = []
    when: Literal["now", "later"] | Annotated[int, Field(ge=10)] = "now"
    color: Color = Color.RED
    tree: Node | None = None
    ways: list[Card | Iban | int] = []
    counts: dict[Annotated[str, Field(max_length=3)], int] = {}
    initial: Annotated[str, Field(min_length=1, max_length=1)] = "a"
    one: Annotated[list[int], Field(min_length=1, max_length=2)] = [1]
    nested: dict[str, dict[str, int]] = {}
    wait: timedelta = timedelta(0)
    pair: tuple[int, str] = (1, "")
    text: JsonText[dict[str, int]] | None = None
    words: list[int] = []
    paid: Annotated[Card | Iban, Field(discriminator="kind")] | None = None
    inside: int = Field(default=0, validation_alias=AliasPath("outer", "inner"))

    @field_validator("words", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("paid", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        return {"kind": value["how"]}


# Pydantic's JSON Schema has no place for a field with a path.
ORDER = JobRegistry([thumbnail_create, JobType(name="order", payload=Order, example={})])


def violations(payload: object) -> list[Violation]:
    with pytest.raises(PayloadInvalid) as refused:
        ORDER.admit("order", payload)
    return list(refused.value.violations)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"method": {"kind": "card", "token": 1}}, [("/method/token", "wrong_type")]),
        ({"method": {"kind": "card"}}, [("/method/token", "required")]),
        (
            {"method": {"kind": "card", "token": "x", "card": 1}},
            [("/method/card", "unknown_field")],
        ),
        ({"method": {"kind": "cash"}}, [("/method/kind", "not_one_of")]),
        ({"method": {}}, [("/method/kind", "required")]),
        ({"method": []}, [("/method", "wrong_type")]),
        ({"slot": {"date": 1}}, [("/slot/date", "wrong_type")]),
        ({"slot": {}}, [("/slot/date", "required")]),
        ({"slot": {"date": "2030-01-31", "list": ["x"]}}, [("/slot/list/0", "wrong_type")]),
        ({"way": {"kind": "iban", "iban": 5}}, [("/way/iban", "wrong_type")]),
        ({"way": {"kind": "card", "token": "t", "x": 1}}, [("/way/x", "unknown_field")]),
        ({"way": "x"}, [("/way", "wrong_type")]),
        ({"sizes": [1, 2, "x"]}, [("/sizes/2", "wrong_type")]),
        ({"sizes": 1}, [("/sizes", "wrong_type")]),
        ({"when": 5}, [("/when", "out_of_range")]),
        ({"when": "soon"}, [("/when", "wrong_type")]),
        (
            {"tree": {"below": [{"below": [{"size": "x"}]}]}},
            [("/tree/below/0/below/0/size", "wrong_type")],
        ),
        ({"counts": {"a/~b": 1}}, [("/counts/a~1~0b", "too_long")]),
        ({"counts": {"~/": "x"}}, [("/counts/~0~1", "wrong_type")]),
        ({"nested": {"str": {"[key]": "x"}}}, [("/nested/str/[key]", "wrong_type")]),
        ({"wait": 10}, [("/wait", "wrong_type")]),
        ({"pair": [1]}, [("/pair/1", "required")]),
        ({"pair": [1, 2]}, [("/pair/1", "wrong_type")]),
        ({"text": '{"a": "x"}'}, [("/text", "wrong_type")]),
        ({"words": "1,x"}, [("/words", "wrong_type")]),
        ({"paid": {"how": "cash"}}, [("/paid", "not_one_of")]),
        ({"outer": {"inner": "x"}}, [("/outer/inner", "wrong_type")]),
    ],
)
def test_a_violation_points_into_what_was_sent(
    payload: object, expected: list[tuple[str, str]]
) -> None:
    assert [(v.path, v.code) for v in violations(payload)] == expected


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"initial": ""}, 'Expected a string of at least 1 character; got "".'),
        ({"one": []}, "Expected an array of at least 1 item; got []."),
        ({"one": [1, 1, 1]}, "Expected an array of at most 2 items; got [1, 1, 1]."),
        ({"wait": 10}, "Expected a duration in ISO 8601, such as PT30S; got 10."),
        ({"wait": "soon"}, 'Expected a duration in ISO 8601, such as PT30S; got "soon".'),
        ({"slot": {"date": True}}, "Expected a date in ISO 8601, such as 2030-01-31; got true."),
        ({"slot": {"date": None}}, "Expected a date in ISO 8601, such as 2030-01-31; got null."),
        ({"color": "rde"}, 'Expected "red" or "blue"; got "rde". Did you mean "red"?'),
        ({"when": 5}, "Expected a value of at least 10; got 5."),
        (
            {"when": "latr"},
            'Expected "now", "later" or a whole number; got "latr". Did you mean "later"?',
        ),
        ({"way": "x"}, 'Expected an object or a whole number; got "x".'),
        ({"method": {"kind": "crd"}}, 'Expected "card" or "iban"; got "crd". Did you mean "card"?'),
        ({"method": {"kind": "card"}}, 'The required field "token" is missing.'),
        (
            {"method": {"kind": "card", "token": "x", "tokn": 1}},
            'There is no field "tokn". Did you mean token?',
        ),
        ({"tree": {"below": [{"siez": 1}]}}, 'There is no field "siez". Did you mean size?'),
        ({"slot": {"date": "2030-01-31", "at": []}}, 'There is no field "at". Did you mean date?'),
        (
            {"way": {"kind": "card", "token": "x", "tokn": 1}},
            'There is no field "tokn". Did you mean token?',
        ),
        ({"sizes": 'a"\x1b'}, 'Expected an array; got "a\\"\\u001b".'),
        ({"wait": "x" * 500}, f'Expected a duration in ISO 8601, such as PT30S; got "{"x" * 78}….'),
    ],
)
def test_a_message_says_what_was_expected_and_what_came(payload: object, message: str) -> None:
    assert [v.message for v in violations(payload)] == [message]


NAMES = ["str", "int", "list[int]", "date", "time", "list", "function-after", "card", "a/b", "m~n",
         "[key]", "Model", "nullable", "dict[str,int]", "0", "~1", " ", "json"]  # fmt: skip
WRONG = 1.5
"""A value that no type below admits."""

Path = tuple[str | int, ...]


LIST: Any = list
DICT: Any = dict
"""For types that are made here, which a type checker cannot follow."""


@st.composite
def typed(draw: st.DrawFn, depth: int = 3) -> tuple[Any, Any]:
    """A type and a value of it."""
    kinds = ["int", "str", "null"]
    if depth:
        kinds += ["list", "dict", "model", "tagged", "union", "after"] * 2
    match draw(st.sampled_from(kinds)):
        case "int":
            return int, draw(st.integers(0, 9))
        case "str":
            return str, draw(st.sampled_from(NAMES))
        case "null":
            return int | None, draw(st.sampled_from([1, None]))
        case "list":
            inner, value = draw(typed(depth - 1))
            return LIST[inner], [value] * draw(st.integers(1, 2))
        case "dict":
            inner, value = draw(typed(depth - 1))
            return DICT[str, inner], {draw(st.sampled_from(NAMES)): value}
        case "model":
            return draw(modelled(depth))
        case "after":
            inner, value = draw(typed(depth - 1))
            return Annotated[inner, Field(description="Words.")], value
        case "tagged":
            one, value = draw(modelled(depth, tag="one"))
            other, _ = draw(modelled(depth, tag="[key]"))
            return Annotated[one | other, Field(discriminator="tag")], value
    inner, value = draw(modelled(depth))
    below, items = draw(typed(depth - 1))
    value = draw(st.sampled_from([value, [items], "text"]))
    return inner | LIST[below] | str, value


@st.composite
def modelled(draw: st.DrawFn, depth: int, tag: str | None = None) -> tuple[Any, dict[str, Any]]:
    """A payload model, its fields named like Pydantic's labels, and a value of it."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    fields: dict[str, Any] = {}
    value: dict[str, Any] = {}
    if tag is not None:
        fields["tag"] = (Literal[tag], ...)
        value["tag"] = tag
    for number, name in enumerate(names):
        inner, value[name] = draw(typed(depth - 1))
        fields[f"field{number}"] = (inner, Field(alias=name))
    title = draw(st.sampled_from(["Model", "str", "card", "int"]))
    return create_model(title, __base__=Payload, **fields), value


def places(value: Any, path: Path = ()) -> list[Path]:
    found = [path]
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


def changed(value: Any, path: Sequence[str | int], change: Any) -> Any:
    """A copy of a document with `change` applied to what is at this path."""
    if not path:
        return change(value)
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], change)
    return copy


def pointed(path: Path) -> str:
    return "".join("/" + str(p).replace("~", "~0").replace("/", "~1") for p in path)


def faults(model: type[Payload], example: Any, payload: object) -> set[tuple[str, str]]:
    try:
        JobRegistry([JobType(name="test", payload=model, example=example)]).admit("test", payload)
    except PayloadInvalid as refused:
        return {(violation.path, violation.code) for violation in refused.violations}
    return set()


@settings(max_examples=50, deadline=None)
@given(data=st.data(), made=modelled(3))
def test_one_fault_is_found_where_it_was_made(data: st.DataObject, made: tuple[Any, Any]) -> None:
    model, value = made
    assert faults(model, value, value) == set()
    path = data.draw(st.sampled_from(places(value)[1:]))
    wrong = faults(model, value, changed(value, path, lambda _: WRONG))
    assert {where for where, _ in wrong} == {pointed(path)}
    # A wrong name in place of the right one: unknown, and the right one missing.
    *parent, last = path
    if isinstance(last, str):
        renamed = faults(
            model,
            value,
            changed(value, parent, lambda old: {k if k != last else "~/": old[k] for k in old}),
        )
        for where, code in renamed:
            assert code in ("unknown_field", "required")
            assert where == pointed((*parent, "~/" if code == "unknown_field" else last))


def test_a_flood_of_faults_is_cheap_and_bounded() -> None:
    good = {"assetId": "a", "versionNumber": 1}
    for name, payload in (
        ("thumbnail.create", {**good, **{f"assetI{number}": 1 for number in range(16_000)}}),
        ("thumbnail.create", {**good, **{f"{number}" + "x" * 2_400: 1 for number in range(100)}}),
        ("thumbnail.create", {**good, "x" * 100_000: ["\0", *([1] * 70_000)]}),
        ("order", {"nested": {"k" * 100_000: dict.fromkeys(map(str, range(15_000)), "x")}}),
        ("order", {"sizes": [None] * 50_000}),
        ("order", {"ways": [{}] * 80_000}),
        ("order", {"ways": [[{}]] * 60_000}),
    ):
        start = time.process_time()
        with pytest.raises(PayloadInvalid) as refused:
            ORDER.admit(name, payload)
        assert time.process_time() - start < 2.0
        found = refused.value.violations
        assert len(found) <= 101
        assert sum(len(v.path) + len(v.message) for v in found) < 300_000


class Tree(Payload):
    value: list[Tree] | dict[str, Tree] | int | None = None


NUMBERS: Any = {f"field_{n}": (int, 0) for n in range(800)}
WIDE = create_model("Wide", __base__=Payload, **NUMBERS)
CODES = Enum("Code", {f"C{number}": f"code-{number}" for number in range(3_000)})  # type: ignore[misc]  # made here
CODED = create_model("Coded", __base__=Payload, codes=(list[CODES], []))


@pytest.mark.parametrize(
    ("payload", "path", "expected"),
    [
        ({"value": {"k": {"value": "x"}}}, "/value/k/value", "an array, an object or a whole"),
        ({"value": {"k": {"value": {"k": {"q": 1}}}}}, "/value/k/value/k/q", "no field"),
        ({"value": [{"value": {"k": {"value": "x"}}}]}, "/value/0/value/k/value", "an array, an"),
    ],
)
def test_of_a_union_that_contains_itself_the_best_branch_is_reported(
    payload: dict[str, Any], path: str, expected: str
) -> None:
    (violation,) = violations_of(Tree, payload)
    assert violation.path == path
    assert expected in violation.message


def test_suggestions_of_a_wide_model_are_bounded() -> None:
    start = time.process_time()
    found = violations_of(WIDE, {f"feld_{number}": 1 for number in range(8_000)})
    assert time.process_time() - start < 2.0
    assert "Did you mean" in found[0].message


def test_faults_of_a_long_enum_are_cheap_and_count_its_values() -> None:
    start = time.process_time()
    found = violations_of(CODED, {"codes": ["code-x"] * 6_000})
    assert time.process_time() - start < 2.0
    assert found[0].path == "/codes/0"
    assert found[0].message.startswith("Expected one of 3,000 values, such as")


def test_a_payload_whose_faults_multiply_is_validated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validated: list[object] = []
    validate = Tangled.model_validate_json

    def counted(text: bytes, **options: Any) -> Tangled:
        validated.append(text)
        return validate(text, **options)

    monkeypatch.setattr(Tangled, "model_validate_json", counted)
    payload: dict[str, Any] = {}
    for _ in range(20):
        payload = {"below": payload}
    (violation,) = violations_of(Tangled, payload)
    assert violation.code == "more"
    assert len(validated) == 2, "the example of the job type, and the payload"


class Tangled(Payload):
    name: str
    below: Tangled | list[Tangled] | dict[str, Tangled] | None = None


def violations_of(model: type[Payload], payload: object) -> Sequence[Violation]:
    registry = JobRegistry([JobType(name="a.b", payload=model)])
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit("a.b", payload)
    return refused.value.violations


def test_a_field_named_like_the_label_of_a_key_is_pointed_at() -> None:
    class Inner(Payload):
        kept: int = Field(alias="[key]")

    class Outer(Payload):
        by_name: dict[str, Inner]

    job_type = JobType(name="label.key", payload=Outer, policy=JobPolicy())
    with pytest.raises(PayloadInvalid) as refused:
        JobRegistry([job_type]).admit("label.key", {"byName": {"a": {}}})
    assert [(v.path, v.code) for v in refused.value.violations] == [("/byName/a/[key]", "required")]


def test_a_date_or_time_written_as_a_number_of_seconds_is_refused_wherever_it_is() -> None:
    class Slot(Payload):
        at: datetime
        on: date | str | None = None

    class Booking(Payload):
        first_slot: Slot
        more: list[Slot] = []
        by_name: dict[str, datetime] = {}
        pair: tuple[int, date] | None = None
        note: str = ""

    job_type = JobType(name="book.slot", payload=Booking, policy=JobPolicy())
    registry = JobRegistry([job_type])
    good = {"at": "2030-01-31T12:00:00Z"}
    registry.admit("book.slot", {"firstSlot": {**good, "on": "2030-01-31"}, "note": "2030"})
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit(
            "book.slot",
            {
                "firstSlot": {"at": "2030"},
                "more": [good, {"at": "-5.5"}],
                "byName": {"a/b": "1893456000"},
                "pair": [1, "86400"],
                "note": "2030",
            },
        )
    assert [(v.path, v.code) for v in refused.value.violations] == [
        ("/byName/a~1b", "invalid_format"),
        ("/firstSlot/at", "invalid_format"),
        ("/more/1/at", "invalid_format"),
        ("/pair/1", "invalid_format"),
    ]
    sentence = 'Expected a date and time in ISO 8601, such as 2030-01-31T12:00:00Z; got "2030".'
    assert refused.value.violations[1].message == sentence
    assert refused.value.violations[3].message.startswith("Expected a date in ISO 8601")


def test_an_item_of_a_tuple_has_the_fields_of_its_own_model() -> None:
    class Place(Payload):
        city: str

    class Route(Payload):
        stops: tuple[int, Place, Annotated[int, Field(ge=5)]]

    example: Any = {"stops": [1, {"city": "x"}, 5]}
    registry = JobRegistry([JobType(name="a", payload=Route, example=example)])
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit("a", {"stops": [1, {"city": "x", "citi": 1}, 4]})
    assert [each.message for each in refused.value.violations] == [
        'There is no field "citi". Did you mean city?',
        "Expected a value of at least 5; got 4.",
    ]


@dataclass
class Leg:
    way: Card | int
    slot: Slot | None = None


class Stop(NamedTuple):
    way: Card | int
    slot: Slot


class Sizes(RootModel[list[int] | dict[str, int] | str]):
    model_config = ConfigDict(strict=True)


class Day(Payload):
    day: list[date] | int


class Days(RootModel[list[Day]]):
    model_config = ConfigDict(strict=True)


class Box(BaseModel):
    """A strict model that is not a payload."""

    model_config = ConfigDict(strict=True, extra="forbid")

    sizes: list[int] | list[list[Annotated[int, Field(ge=1)]]]


PLACES: list[tuple[Any, Any, list[tuple[str, str]]]] = [
    (
        Stop,
        [{"kind": "card", "token": 1}, {"date": "2030-01-31", "lists": [1]}],
        [("/part/0/token", "wrong_type"), ("/part/1/lists", "unknown_field")],
    ),
    (Stop, ["x", {}], [("/part/0", "wrong_type"), ("/part/1/date", "required")]),
    (
        OrderedDict[str, Card | int],
        {"a": {"kind": "card"}, "b": None},
        [("/part/a/token", "required"), ("/part/b", "wrong_type")],
    ),
    (
        OrderedDict[Annotated[str, Field(max_length=1)], int],
        {"ab": 1, "c": "x"},
        [("/part/ab", "too_long"), ("/part/c", "wrong_type")],
    ),
    (deque[Card | int], [{"kind": "card", "x": 1, "token": ""}], [("/part/0/x", "unknown_field")]),
    (deque[int] | int, [1, "x"], [("/part/1", "wrong_type")]),
    (Mapping[str, int | str] | int, {"a": None}, [("/part/a", "wrong_type")]),
    (Days, [{"day": ["2030-01-31", "x"]}], [("/part/0/day/1", "invalid_format")]),
    (Sizes, [1, "x"], [("/part/1", "wrong_type")]),
    (list[Sizes], [{"a": "x"}, 1], [("/part/0/a", "wrong_type"), ("/part/1", "wrong_type")]),
    (
        Box,
        {"sizes": [[1], [0, "x"]]},
        [
            ("/part/sizes/1/0", "out_of_range"),
            ("/part/sizes/1/1", "wrong_type"),
        ],
    ),
    (
        Leg,
        {"way": {"kind": "card", "token": 1}, "slots": None},
        [("/part/slots", "unknown_field"), ("/part/way/token", "wrong_type")],
    ),
]


@pytest.mark.parametrize(("annotation", "sent", "expected"), PLACES)
def test_a_violation_points_into_every_kind_of_container(
    annotation: Any, sent: Any, expected: list[tuple[str, str]]
) -> None:
    model = create_model("Parts", __base__=Payload, part=(annotation | None, None))
    found = violations_of(model, {"part": sent})
    assert [(each.path, each.code) for each in found] == expected


@pytest.mark.parametrize("kind", [dict, OrderedDict, Mapping])
def test_the_size_of_an_object_is_counted_in_fields(kind: Any) -> None:
    annotation = Annotated[kind[str, int], Field(max_length=1)]
    model = create_model("Sized", __base__=Payload, part=(annotation, {}))
    (found,) = violations_of(model, {"part": {"a": 1, "b": 2}})
    assert found.message == 'Expected an object of at most 1 field; got {"a": 1, "b": 2}.'


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("link", "ftp://x", "Expected a URL with the scheme 'http' or 'https'; got \"ftp://x\"."),
        ("link", "x", 'Expected a URL, such as https://example.com/; got "x".'),
        ("code", "odd", 'The code odd is odd; got "odd".'),
        ("code", "uneven", 'Expected an even code; got "uneven".'),
    ],
)
def test_the_words_of_a_validator_are_kept(field: str, value: str, message: str) -> None:
    class Linked(Payload):
        link: AnyHttpUrl | None = None
        code: str = ""

        @field_validator("code")
        @classmethod
        def _even(cls, code: str) -> str:
            if code == "odd":
                raise PydanticCustomError("odd", "The code {code} is odd", {"code": code})
            if code == "uneven":
                raise PydanticCustomError("odd", "Input should be an even code")
            return code

    registry = JobRegistry([JobType(name="a", payload=Linked)])
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit("a", {field: value})
    assert [each.message for each in refused.value.violations] == [message]
