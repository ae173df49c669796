"""What a payload admits is what its own JSON Schema admits, by a validator that is not ours.

`EXCEPTIONS` are the texts on which the two differ on purpose.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema_rs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import (
    Field,
    IPvAnyAddress,
    IPvAnyInterface,
    IPvAnyNetwork,
    Json,
    NaiveDatetime,
    PositiveInt,
    Secret,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    ValidationError,
    computed_field,
    create_model,
    field_validator,
    model_validator,
)

from job_registry import JobRegistry, JobType, Payload, PayloadInvalid
from job_registry.payload import document_of


class Grade(IntEnum):
    FIRST = 1
    SECOND = 2


class Item(Payload):
    at: dt.datetime
    count: int = 1


class Whole(Payload):
    """Every kind of field that has a format or a number."""

    date_time: dt.datetime | None = None
    naive: NaiveDatetime | None = None
    date: dt.date | None = None
    time: dt.time | None = None
    duration: dt.timedelta | None = None
    uuid: UUID | None = None
    decimal: Decimal | None = None
    integer: int | None = None
    positive: PositiveInt | None = None
    number: float | None = None
    either: int | str | None = None
    choice: Literal["a", "b"] | None = None
    version: Literal[1, 2] | None = None
    certain: Literal[True] | None = None
    grade: Grade | None = None
    marks: tuple[Annotated[int, Field(ge=0, le=9)], ...] = ()
    items: tuple[Item, ...] = ()
    by_day: dict[str, int] = Field(default_factory=dict)


WHOLE = JobType(name="test.whole", payload=Whole)
REGISTRY = JobRegistry([WHOLE])
# The one format that is not JSON Schema's own, as `docs/clients.md` describes it.
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")
VALIDATOR = jsonschema_rs.Draft202012Validator(
    dict(WHOLE.payload_schema),
    validate_formats=True,
    formats={"decimal": lambda text: DECIMAL.fullmatch(text) is not None},
)


def admits(payload: dict[str, Any]) -> bool:
    try:
        REGISTRY.admit("test.whole", payload)
    except PayloadInvalid:
        return False
    return True


LEAP_SECOND = re.compile(r"[Tt]?\d\d:\d\d:60")
EXCEPTIONS: dict[str, Callable[[Any], bool]] = {
    # No clock in Python has a leap second, and no calendar the year 0.
    "dateTime": lambda text: bool(LEAP_SECOND.search(text)) or text.startswith("0000"),
    "naive": lambda text: not _is_real(text),
    "date": lambda text: text.startswith("0000"),
    "time": lambda text: bool(LEAP_SECOND.search(text)),
    # RFC 3339 has no sign, no fraction and no gap between units; Pydantic writes all of these. And
    # no `timedelta` is longer than 999,999,999 days.
    "duration": lambda text: (
        text[:1] in "+-" or "." in text or _has_gap(text) or bool(re.search(r"\d{7}", text))
    ),
}
"""By field, the texts that the schema admits and the payload does not, or the other way."""


def _is_real(text: str) -> bool:
    """Whether a calendar has a date and time without an offset, which a pattern cannot say."""
    try:
        dt.datetime.fromisoformat(text.upper())
    except ValueError:
        return False
    return True


def _has_gap(text: str) -> bool:
    present = re.sub(r"[^YMDTHS]", "", text)
    day, _, clock = present.partition("T")
    return day not in ("", "Y", "YM", "YMD", "M", "MD", "D") or clock not in (
        "", "H", "HM", "HMS", "M", "MS", "S",
    )  # fmt: skip


FORMS = {
    "dateTime": r"(\d{4}|2030)-(0[1-9]|1[0-2]|\d\d)-(0[1-9]|[12]\d|\d\d)[Tt _]?"
    r"([01]\d|\d\d):[0-5]\d(:[0-6]\d)?(\.\d{1,9})?([Zz]|[+-][01]\d:?[0-6]\d)?",
    "naive": r"2030-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3\d)[Tt ]"
    r"([01]\d|2\d):[0-5]\d:[0-5]\d(\.\d{1,9})?Z?",
    "date": r"(\d{4}|2030)-?(0[1-9]|1[0-2]|\d)-?(0[1-9]|[12]\d|3\d|\d)( |T00:00:00)?",
    "time": r"([01]\d|2\d):[0-5]\d(:[0-6]\d)?(\.\d{1,9})?([Zz]|[+-][012]\d:?[0-6]\d)?",
    "duration": r"[+-]?P?(\d{1,3}W|(\d{1,3}Y)?(\d{1,3}M)?(\d{1,3}D)?)(T(\d{1,3}H)?(\d{1,3}M)?"
    r"(\d{1,3}(\.\d)?S)?)?",
    "uuid": r"(\{|urn:uuid:)?[0-9a-fA-F]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?"
    r"[0-9a-f]{4}-?[0-9A-F]{12}\}?",
    "decimal": r"[ +-]?\d{0,5}[._]?\d{0,4}([eE]\d)?[ \u0661]?",
}  # fmt: skip
CONTROLS = ["2030", "1893456000", "", " ", "now", "１２", "1_000", "NaN", "Infinity", "0x1"]
TEXTS = {
    field: st.from_regex(re.compile(form, re.ASCII), fullmatch=True)
    | st.sampled_from(CONTROLS)
    | st.text(max_size=12)
    for field, form in FORMS.items()
}


@pytest.mark.cases(3)
@pytest.mark.parametrize("field", FORMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_is_admitted_if_and_only_if_the_schema_admits_it(
    field: str, data: st.DataObject
) -> None:
    text = data.draw(TEXTS[field])
    if any(ord(c) == 0 or 0xD800 <= ord(c) < 0xE000 for c in text):
        return
    if not EXCEPTIONS.get(field, lambda _: False)(text):
        assert admits({field: text}) == VALIDATOR.is_valid({field: text}), text


NUMBERS = (
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e15, max_value=1e15)
    | st.integers(-9, 9).map(float)
    | st.booleans()
    | st.text(max_size=3)
    | st.none()
)


@settings(max_examples=80, deadline=None)
@given(
    field=st.sampled_from(
        ["integer", "positive", "number", "either", "choice", "version", "certain", "grade"]
    ),
    value=NUMBERS,
)
@example(field="integer", value=1.0)
@example(field="integer", value=-(2.0**63))
@example(field="integer", value=-0.0)
@example(field="positive", value=1.5)
@example(field="version", value=True)
@example(field="version", value=1.0)
@example(field="certain", value=1)
@example(field="grade", value=True)
def test_a_number_is_admitted_if_and_only_if_the_schema_admits_it(field: str, value: Any) -> None:
    if not isinstance(value, str) or value.isprintable():
        assert admits({field: value}) == VALIDATOR.is_valid({field: value}), value


def test_an_integer_has_64_bits_also_as_a_float() -> None:
    assert not admits({"integer": 2.0**63})


@settings(max_examples=60, deadline=None)
@given(
    payload=st.fixed_dictionaries(
        {},
        optional={
            "marks": st.lists(st.integers(-1, 10) | st.just(1.0) | st.just("1"), max_size=3),
            "items": st.lists(
                st.fixed_dictionaries(
                    {"at": st.sampled_from(["2030-01-31t00:00:00z", "2030", 5])},
                    optional={"count": NUMBERS, "more": st.just(1)},
                ),
                max_size=2,
            ),
            "byDay": st.dictionaries(st.sampled_from(["a", "2030"]), st.just(2.0) | NUMBERS),
            "by_day": st.just({}),
        },
    )
)
def test_what_is_inside_an_array_or_an_object_follows_the_same_rule(payload: Any) -> None:
    if "\\u" not in ascii(str(payload)) and "\\x" not in ascii(str(payload)):
        assert admits(payload) == VALIDATOR.is_valid(payload), payload


def test_what_the_handler_gets_is_what_the_text_says() -> None:
    sent = {
        "dateTime": "2030-01-31t12:00:00.123456789+05:30",
        "integer": 3.0,
        "decimal": "+010.50",
        "duration": "P1DT2.5S",
        "byDay": {"2030": 1.0},
    }
    admitted = REGISTRY.admit("test.whole", sent)
    parsed = admitted.payload
    assert isinstance(parsed, Whole)
    assert parsed.date_time == dt.datetime.fromisoformat("2030-01-31T06:30:00.123456+00:00")
    assert (parsed.integer, type(parsed.integer)) == (3, int)
    assert parsed.decimal == Decimal("10.50")
    assert parsed.duration == dt.timedelta(days=1, seconds=2.5)
    assert parsed.by_day == {"2030": 1}
    # What is stored is what was sent.
    assert b"123456789+05:30" in admitted.json


def test_models_are_told_apart_by_strings() -> None:
    class First(Payload):
        version: Literal[1]

    class Second(Payload):
        version: Literal[2]

    with pytest.raises(TypeError, match="use a Literal of strings, because JSON's true is not its"):

        class Either(Payload):
            part: Annotated[First | Second, Field(discriminator="version")]


def test_two_fields_have_two_names_in_json() -> None:
    with pytest.raises(TypeError, match="Lines has two fields that are line1 in JSON, line_1 and"):

        class Lines(Payload):
            line_1: str
            line1: str

    class Apart(Payload):
        line_1: str = Field(alias="first")
        line1: str

    assert Apart(line_1="a", line1="b").model_dump() == {"first": "a", "line1": "b"}


@pytest.mark.parametrize("kind", [dict, Mapping, OrderedDict, defaultdict])
def test_keys_of_an_object_are_still_read_as_numbers(kind: Any) -> None:
    model = create_model("Keyed", __base__=Payload, by_number=(kind[int, int], ...))
    keyed = JobRegistry([JobType(name="test.keyed", payload=model, example={"byNumber": {}})])
    parsed: Any = keyed.admit("test.keyed", {"byNumber": {"5": 1.0}}).payload
    assert parsed.by_number == {5: 1}
    with pytest.raises(PayloadInvalid):
        keyed.admit("test.keyed", {"byNumber": {"x": 1}})


def test_a_counter_reads_its_keys_as_numbers() -> None:
    class Counted(Payload):
        votes: Counter[int]

    counted = JobRegistry([JobType(name="test.counted", payload=Counted, example={"votes": {}})])
    assert counted.validate("test.counted", {"votes": {"5": 2}}) == Counted(votes=Counter({5: 2}))


@pytest.mark.parametrize("kind", [IPvAnyAddress, IPvAnyNetwork, IPvAnyInterface])
@pytest.mark.parametrize("value", [1, True, 2.0, None])
def test_an_address_is_text(kind: Any, value: Any) -> None:
    model = create_model("Host", __base__=Payload, at=(kind, ...))
    hosts = JobRegistry([JobType(name="test.host", payload=model, example={"at": "10.0.0.1"})])
    with pytest.raises(PayloadInvalid) as refused:
        hosts.admit("test.host", {"at": value})
    assert [(v.path, v.code) for v in refused.value.violations] == [("/at", "wrong_type")]
    parsed = hosts.validate("test.host", {"at": "::1"})
    assert hosts.validate("test.host", hosts.request(parsed).payload) == parsed


@pytest.mark.parametrize(
    "name", ["type", "ref", "metadata", "default", "fields", "choices", "members", "properties"]
)
def test_a_field_may_be_named_like_a_part_of_a_schema(name: str) -> None:
    fields: dict[str, Any] = {name: (dt.datetime, ...)}
    model = create_model("Named", __base__=Payload, **fields)
    named = JobRegistry([JobType(name="test.named", payload=model)])
    listed: TypeAdapter[Any] = TypeAdapter(list[model])
    good, bad = {name: "2030-01-31T12:00:00Z"}, {name: "2030"}
    assert named.admit("test.named", good).payload == listed.validate_python([good])[0]
    with pytest.raises(PayloadInvalid, match="Expected a date and time"):
        named.admit("test.named", bad)
    with pytest.raises(ValidationError):
        listed.validate_python([bad])


def test_the_tag_of_a_union_may_be_named_like_a_part_of_a_schema() -> None:
    class Plain(Payload):
        kind: Literal["default"]
        at: dt.datetime

    class Special(Payload):
        kind: Literal["type"]

    class Either(Payload):
        part: Annotated[Plain | Special, Field(discriminator="kind")]

    either = JobRegistry([JobType(name="test.either", payload=Either)])
    assert either.admit("test.either", {"part": {"kind": "type"}})
    assert either.admit("test.either", {"part": {"kind": "default", "at": "2030-01-31T12:00:00Z"}})
    with pytest.raises(PayloadInvalid, match="Expected a date and time"):
        either.admit("test.either", {"part": {"kind": "default", "at": "2030"}})


@pytest.mark.parametrize(
    "payload",
    [
        Whole(date_time=dt.datetime(2030, 1, 31, 12), decimal=Decimal("1.5")),
        Whole(time=dt.time(12, 0)),
    ],
)
def test_a_time_in_python_needs_its_offset_too(payload: Whole) -> None:
    with pytest.raises(PayloadInvalid, match="2030-01-31T12:00:00Z|12:00:00Z"):
        REGISTRY.admit("test.whole", REGISTRY.request(payload).payload)


@pytest.mark.parametrize(
    "payload",
    [
        Whole(decimal=Decimal("1E+5")),
        Whole(duration=dt.timedelta(days=400, seconds=1.5)),
        Whole(duration=dt.timedelta(seconds=-5)),
        Whole(naive=dt.datetime(2030, 1, 31, 12)),
    ],
)
def test_what_a_payload_in_python_is_written_as_is_admitted(payload: Whole) -> None:
    parsed = REGISTRY.admit("test.whole", REGISTRY.request(payload).payload).payload
    assert parsed == payload


def unchanged(value: Any) -> Any:
    return value


def passed_on(value: Any, handler: Any) -> Any:
    return handler(value)


runs_before: Any = staticmethod(unchanged)
runs_around: Any = staticmethod(passed_on)
VALIDATORS: dict[str, Any] = {
    "model before": model_validator(mode="before")(runs_before),
    "model wrap": model_validator(mode="wrap")(runs_around),
    "field before": field_validator("v", mode="before")(runs_before),
    "field wrap": field_validator("v", mode="wrap")(runs_around),
}


@pytest.mark.parametrize("validator", VALIDATORS)
@pytest.mark.parametrize(
    ("annotation", "sent", "refused"),
    [
        (tuple[int, str], [1, "a"], [1, 2]),
        (tuple[Item, ...], [{"at": "2030-01-31T12:00:00Z"}], [{"at": "2030"}]),
        (set[str], ["a"], [1]),
        (frozenset[dt.date], ["2030-01-31"], "2030-01-31"),
        (deque[int], [1.0], ["1"]),
        (bytes, "abc", 1),
        (dict[int, set[int]], {"1": [1]}, {"1": ["1"]}),
        (dict[bool, int], {"true": 1}, {"x": 1}),
        (OrderedDict[int, Grade], {"1": 2}, {"1": True}),
        (int | tuple[int, int], [1, 2], [1]),
        (list[int] | set[int], [1], {"a": 1}),
    ],
)
def test_a_validator_that_runs_first_does_not_change_how_json_is_read(
    validator: str, annotation: Any, sent: Any, refused: Any
) -> None:
    plain = create_model("Plain", __base__=Payload, v=(annotation, ...))
    checked = create_model(
        "Checked",
        __base__=Payload,
        __validators__={"check": VALIDATORS[validator]},
        v=(annotation, ...),
    )
    registry = JobRegistry(
        JobType(name=name, payload=model, example={"v": sent})
        for name, model in (("plain", plain), ("checked", checked))
    )
    read: Any = registry.validate("checked", {"v": sent})
    like: Any = registry.validate("plain", {"v": sent})
    assert repr(read.v) == repr(like.v)
    with pytest.raises(PayloadInvalid):
        registry.admit("checked", {"v": refused})


class Amount(Payload):
    total: Decimal | int | float | dt.date | list[Decimal | int] | None = None
    by_name: dict[str, Decimal | float] = Field(default_factory=dict)


@pytest.mark.parametrize(
    "payload",
    [
        Amount(total=2**60 + 1),
        Amount(total=0.1234567891),
        Amount(total=dt.date(2030, 1, 31)),
        Amount(total=[Decimal("1.10"), 5]),
        Amount(by_name={"a": 1e-300, "b": Decimal("1E+2")}),
    ],
)
def test_a_value_beside_a_decimal_in_a_union_is_written_as_what_it_is(payload: Amount) -> None:
    registry = JobRegistry([JobType(name="amount", payload=Amount)])
    parsed = registry.validate("amount", registry.request(payload).payload)
    assert repr(parsed) == repr(payload).replace("1E+2", "100")


class Labelled(Item):
    """An item with a field more."""

    label: str = ""


class Counted(Item):
    """An item with nothing more than a method."""

    def twice(self) -> int:
        return 2 * self.count


@dataclass
class Point:
    x: int


class Shipped(Payload):
    item: Item | None = None
    items: list[Item] = Field(default=[])
    either: Item | Labelled | None = None
    at: Point | None = None


AT = dt.datetime(2030, 1, 31, 12, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        (Shipped(item=Labelled(at=AT, label="a")), "/item/label"),
        (Shipped(items=[Item(at=AT), Labelled(at=AT, label="a")]), "/items/1/label"),
    ],
)
def test_a_field_of_a_subclass_is_refused_and_not_lost(payload: Shipped, path: str) -> None:
    registry = JobRegistry([JobType(name="shipped", payload=Shipped)])
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit("shipped", registry.request(payload).payload)
    assert [(v.path, v.code) for v in refused.value.violations] == [(path, "unknown_field")]


@pytest.mark.parametrize(
    "payload",
    [
        Shipped(item=Item(at=AT, count=2), at=Point(1)),
        Shipped(either=Labelled(at=AT, label="a")),
        Shipped(either=Item(at=AT)),
    ],
)
def test_a_class_that_a_field_names_is_stored_whole(payload: Shipped) -> None:
    registry = JobRegistry([JobType(name="shipped", payload=Shipped)])
    assert registry.validate("shipped", registry.request(payload).payload) == payload


def test_a_subclass_without_fields_of_its_own_is_stored_as_its_base() -> None:
    registry = JobRegistry([JobType(name="shipped", payload=Shipped)])
    sent = Shipped(item=Counted(at=AT, count=2))
    read = registry.validate("shipped", registry.request(sent).payload)
    assert read == Shipped(item=Item(at=AT, count=2))


class Login(Payload):
    """A payload whose fields Pydantic writes in another way than it reads them."""

    password: SecretStr
    sizes: Json[list[int]]
    pin: SecretBytes | None = None
    born: Secret[dt.date] | None = None

    @computed_field
    def length(self) -> int:
        return len(self.password)


class Channel(Enum):
    """Hashed as in one process or, with other seeds for the hashes of text, in another."""

    MAIL = "mail"
    SMS = "sms"

    def __hash__(self) -> int:
        return (self is Channel.SMS) ^ in_another_process.get()


in_another_process: ContextVar[bool] = ContextVar("in_another_process", default=False)


class Reached(Payload):
    channels: frozenset[Channel]
    nested: dict[str, frozenset[Channel]]


def _of_each_process(make: Callable[[], Any]) -> tuple[Any, Any]:
    def make_in_another() -> Any:
        in_another_process.set(True)
        return make()

    return copy_context().run(make), copy_context().run(make_in_another)


def test_a_set_is_written_in_the_same_order_by_every_process() -> None:
    def both() -> frozenset[Channel]:
        return frozenset({Channel.MAIL, Channel.SMS})

    assert [*both()] == [Channel.MAIL, Channel.SMS]

    def made() -> Reached:
        return Reached(channels=both(), nested={"a": both()})

    here, there = _of_each_process(lambda: document_of(made()))
    assert here == there == {"channels": ["mail", "sms"], "nested": {"a": ["mail", "sms"]}}
    assert made().model_dump()["channels"] == both()


def test_a_default_that_is_a_set_gives_the_same_fingerprint_in_every_process() -> None:
    def fingerprint() -> str:
        both = frozenset({Channel.MAIL, Channel.SMS})
        model = create_model("Model", __base__=Payload, channels=(frozenset[Channel], both))
        nested = create_model("Outer", __base__=model, per_user=(dict[str, Any], {"ada": both}))
        return JobType(name="a", payload=nested).fingerprint

    here, there = _of_each_process(fingerprint)
    assert here == there


def test_a_payload_in_python_is_stored_with_its_secrets_and_without_what_is_computed() -> None:
    sent = {"password": "hunter2", "sizes": "[1,2]", "pin": "12", "born": "2000-01-31"}
    registry = JobRegistry([JobType(name="login", payload=Login, example=sent)])
    payload = registry.validate("login", sent)
    document = registry.request(payload).payload
    assert document == sent
    assert registry.admit("login", document).payload == payload

    # Elsewhere the secrets remain hidden.
    dumped = payload.model_dump(mode="json", by_alias=True)
    assert (dumped["password"], dumped["pin"], dumped["born"]) == ("**********",) * 3
    assert dumped["length"] == 7
    assert "hunter2" not in payload.model_dump_json() + repr(payload)


@pytest.mark.parametrize("text", ["2030-01-31T12:00:00+01:60", "2030-01-31T12:00:00-23:99"])
def test_an_offset_has_at_most_59_minutes(text: str) -> None:
    for payload in ({"dateTime": text}, {"time": text.partition("T")[2]}):
        assert not VALIDATOR.is_valid(payload)
        assert not admits(payload)
