"""Every part of a payload is as strict as the payload, or the job type is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID

import pydantic.dataclasses
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    Json,
    PlainSerializer,
    RootModel,
    SecretStr,
    Strict,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypeAliasType, TypedDict

from job_registry import DefinitionError, JobRegistry, JobType, Payload, PayloadInvalid
from job_registry.payload import document_of

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid")


class Address(BaseModel):
    zip_code: int


class ClosedAddress(BaseModel):
    model_config = ConfigDict(extra="forbid")

    zip_code: int


class StrictAddress(BaseModel):
    model_config = ConfigDict(strict=True)

    zip_code: int


class OpenAddress(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    zip_code: int


class Home(BaseModel):
    model_config = STRICT

    address: Address


class LaxPayload(Payload):
    model_config = ConfigDict(strict=False, extra="ignore")

    zip_code: int


class Country(BaseModel):
    kind: Literal["country"]


class Place(BaseModel):
    model_config = STRICT

    kind: Literal["place"]
    zip_code: int


class Tree(Payload):
    address: Address | None = None
    below: list[Tree] | None = None


class Box(Payload, Generic[T]):
    content: T


class LaxBox(BaseModel, Generic[T]):
    content: T


class Number(RootModel[int]):
    """A model of one value."""


class Addresses(RootModel[list[Address]]):
    model_config = ConfigDict(strict=True)


@pydantic.dataclasses.dataclass
class DataAddress:
    zip_code: int


@dataclasses.dataclass
class OwnRules:
    zip_code: int

    __pydantic_config__ = ConfigDict(extra="ignore")


class DictAddress(TypedDict):
    __pydantic_config__ = ConfigDict(extra="ignore")  # type: ignore[misc]  # as Pydantic documents it

    zip_code: int


class Pair(NamedTuple):
    address: Address
    number: int


class Money(BaseModel):
    model_config = STRICT

    amount: Decimal


class Account(BaseModel):
    model_config = STRICT

    password: SecretStr | None


class Password(RootModel[SecretStr]):
    model_config = ConfigDict(strict=True)


class Meeting(BaseModel):
    model_config = STRICT

    at: datetime


class Reachable(BaseModel):
    model_config = STRICT

    at: IPvAnyAddress


@pydantic.dataclasses.dataclass(config=STRICT)
class DataMeeting:
    at: datetime


class Grade(Enum):
    GOOD = 1


class Graded(BaseModel):
    model_config = STRICT

    grade: Grade


class Moment(RootModel[datetime]):
    model_config = ConfigDict(strict=True)


class Team(Enum):
    RED = "red"


class Holiday(Enum):
    NEW_YEAR = date(2030, 1, 1)


class Named(Enum):
    """It finds its member itself."""

    NEW_YEAR = date(2030, 1, 1)

    @classmethod
    def _missing_(cls, value: object) -> Named | None:
        return cls.NEW_YEAR if value == "2030-01-01" else None


class Secretive(Payload):
    pin: int = Field(default=0, exclude=True)


@dataclasses.dataclass
class SecretiveData:
    pin: Annotated[int, Field(exclude=True)] = 0


class OtherBytes(Payload):
    model_config = ConfigDict(ser_json_bytes="base64")

    data: list[bytes] = Field(default=[])


class SameBytes(Payload):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    data: bytes = b""


def deliver(address: Address) -> None:
    """Pydantic reads the arguments of a function too."""


class InSteps:
    """Read as an address, and then changed."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        then = core_schema.no_info_plain_validator_function(lambda value: value)
        return core_schema.chain_schema([handler(Address), then])


class Labelled:
    """A union whose choices have labels."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.union_schema([(handler(Address), "address"), handler(int)])


LaxInt = Annotated[int, Strict(False)]
AliasOfLax = TypeAliasType("AliasOfLax", list[Address])
AliasOfDecimal = TypeAliasType("AliasOfDecimal", Decimal)


def job_type(annotation: Any, **options: Any) -> JobType[Any]:
    """A job type whose payload has a field of this annotation."""
    payload = create_model("Order", __base__=Payload, part=(annotation, ...))
    return JobType(name="order.send", payload=payload, **options)


HIDDEN = "which would be stored without its secrets"
OWN_RULES = "which reads times, decimals, UUIDs, addresses or enums by rules of its own"
ADDRESS = (
    "Address, which drops unknown fields and is not strict: derive Address from Payload, or set"
    " model_config = ConfigDict(strict=True, extra='forbid')"
)


UNLIKE_JSON = "to which no JSON is equal: use strings or numbers, such as those of a StrEnum"


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (Address, f"part is {ADDRESS}"),
        (ClosedAddress, "part is ClosedAddress, which is not strict: derive ClosedAddress from"),
        (StrictAddress, "part is StrictAddress, which drops unknown fields: derive StrictAddress"),
        (OpenAddress, "part is OpenAddress, which takes unknown fields: derive OpenAddress from"),
        (Home, f"part.address is {ADDRESS}"),
        (LaxPayload, "leave strict and extra out of the model_config of LaxPayload"),
        (Address | None, f"part is {ADDRESS}"),
        (Place | Address | str, f"part is {ADDRESS}"),
        (list[Address], f"part[] is {ADDRESS}"),
        (dict[str, list[Address]], f"part[][] is {ADDRESS}"),
        (tuple[int, Address], f"part[1] is {ADDRESS}"),
        (set[LaxInt], "part[] is not strict: remove strict=False"),
        (Annotated[Country | Place, Field(discriminator="kind")], "part is Country, which drops"),
        (Tree, f"part.address is {ADDRESS}"),
        (Box[Address], f"part.content is {ADDRESS}"),
        (Box[Box[LaxInt]], "part.content.content is not strict: remove strict=False"),
        (LaxBox[int], "part is LaxBox[int], which drops unknown fields and is not strict: derive"),
        (Number, "part is Number, which is not strict: set model_config = ConfigDict(strict=True)"),
        (Addresses, f"part[] is {ADDRESS}"),
        (AliasOfLax, f"part[] is {ADDRESS}"),
        (Json[Address], f"part is {ADDRESS}"),
        (DataAddress, "or decorate it with @dataclass(config=ConfigDict(strict=True, extra="),
        (OwnRules, "or set __pydantic_config__ = ConfigDict(strict=True, extra='forbid')"),
        (DictAddress, "or set __pydantic_config__ = ConfigDict(strict=True, extra='forbid')"),
        (Pair, f"part.address is {ADDRESS}"),
        (deliver, f"part.address is {ADDRESS}"),
        (InSteps, f"part is {ADDRESS}"),
        (Labelled, f"part is {ADDRESS}"),
        (LaxInt, "part is not strict: remove strict=False"),
        (Annotated[int | None, Field(strict=False)], "part is not strict: remove strict=False"),
        (Annotated[datetime, Field(strict=False)], "part is not strict: remove strict=False"),
        (
            Annotated[str, Field(strict=False, coerce_numbers_to_str=True)],
            "part is not strict: remove strict=False",
        ),
        (Money, f"part is Money, {OWN_RULES}: derive Money from Payload"),
        (Meeting, f"part is Meeting, {OWN_RULES}: derive Meeting from Payload"),
        (DataMeeting, f"part is DataMeeting, {OWN_RULES}: derive DataMeeting from Payload"),
        (Graded, f"part is Graded, {OWN_RULES}: derive Graded from Payload"),
        (Moment, f"part is Moment, {OWN_RULES}: use what is in Moment itself"),
        (Account, f"part is Account, {HIDDEN}: derive Account from Payload"),
        (Password, f"part is Password, {HIDDEN}: use what is in Password itself"),
        (Reachable, f"part is Reachable, {OWN_RULES}: derive Reachable from Payload"),
        (Iterable[int], "part is read only when it is iterated: use a list, a tuple or a Sequence"),
        (list[Iterable[int]], "part[] is read only when it is iterated"),
        (Secretive, "part.pin would not be stored: remove exclude=True"),
        (SecretiveData | None, "part.pin would not be stored: remove exclude=True"),
        (
            list[OtherBytes],
            "part[].data[] is stored in another way than it is read: give ser_json_bytes and"
            " val_json_bytes the same value",
        ),
        (Literal[Team.RED], f"part takes Team.RED, {UNLIKE_JSON}"),
        (Literal["blue", Team.RED] | None, f"part takes Team.RED, {UNLIKE_JSON}"),
        (list[Holiday], f"part[] takes Holiday.NEW_YEAR, {UNLIKE_JSON}"),
        (Literal[b"x"], f"part takes b'x', {UNLIKE_JSON}"),
    ],
)
def test_a_part_that_is_less_strict_is_refused_with_what_to_do(
    annotation: Any, message: str
) -> None:
    with pytest.raises(DefinitionError) as refused:
        job_type(annotation)
    assert "job type order.send: payload Order is not strict in all its parts: " in str(
        refused.value
    )
    assert message in str(refused.value)


def test_every_class_is_named_once() -> None:
    with pytest.raises(DefinitionError) as refused:
        job_type(tuple[Address, Address, Number, LaxInt])
    assert str(refused.value).partition("parts: ")[2] == "; ".join(
        [
            f"part[0] is {ADDRESS}",
            "part[2] is Number, which is not strict: set model_config = ConfigDict(strict=True)",
            "part[3] is not strict: remove strict=False",
        ]
    )


class Marked(Enum):
    """It refuses other values by a static method."""

    RED = "red"

    @staticmethod
    def _missing_(value: object) -> None:
        return None


def by_name(value: Any) -> Any:
    return Holiday.__members__.get(value, value)


AS_NAME = PlainSerializer(lambda member: member.name, return_type=str)


class Feast(Payload):
    day: Annotated[Holiday, AS_NAME]

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, fields: Any) -> Any:
        return {name: by_name(value) for name, value in fields.items()}


@pytest.mark.parametrize(
    ("annotation", "sent", "value"),
    [
        (Annotated[Holiday, BeforeValidator(by_name), AS_NAME], "NEW_YEAR", Holiday.NEW_YEAR),
        (
            Annotated[Holiday, WrapValidator(lambda value, _: by_name(value)), AS_NAME],
            "NEW_YEAR",
            Holiday.NEW_YEAR,
        ),
        (Feast, {"day": "NEW_YEAR"}, Feast(day=Holiday.NEW_YEAR)),
        (Marked, "red", Marked.RED),
    ],
)
def test_a_validator_may_find_the_member_of_an_enum(annotation: Any, sent: Any, value: Any) -> None:
    found = job_type(annotation, example={"part": sent})
    admitted = JobRegistry([found]).admit("order.send", {"part": sent})
    assert admitted.payload == found.payload(part=value)
    assert document_of(admitted.payload) == {"part": sent}


class PartOfPayload(Payload):
    zip_code: int


class Price(Payload):
    unit_price: Decimal


class Shelf(BaseModel):
    """A strict model that is not a payload, with a payload inside."""

    model_config = STRICT

    price: Price


class Size(IntEnum):
    SMALL = 1


class Tone(StrEnum):
    LOW = "low"


class Color(Enum):
    RED = "red"


@dataclasses.dataclass
class PlainData:
    """It has no rules of its own, so it has those of the payload."""

    number: int


class PlainDict(TypedDict):
    number: int


class PlainTuple(NamedTuple):
    number: int


Alias = TypeAliasType("Alias", int)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (PartOfPayload, {"zipCode": 1}, [{"zipCode": "1"}, {"zipCode": 1, "x": 1}]),
        (Place, {"kind": "place", "zip_code": 1}, [{"kind": "place", "zip_code": "1"}]),
        (Box[int], {"content": 1}, [{"content": "1"}, {"content": 1, "x": 1}]),
        (
            Shelf,
            {"price": {"unitPrice": "1.5"}},
            [{"price": {"unitPrice": 1.5}}, {"price": {"unit_price": "1.5"}}],
        ),
        (PlainData, {"number": 1}, [{"number": "1"}, {"number": 1, "x": 1}]),
        (PlainDict, {"number": 1}, [{"number": "1"}, {"number": 1, "x": 1}]),
        (PlainTuple, [1], [["1"], [1, 2]]),
        (tuple[Alias, Alias], [1, 1], [["1", 1], [1, "1"]]),
        (tuple[Size, Size], [1, 1], [["1", 1], [1, "1"]]),
        (dict[int, Color], {"1": "red"}, [{"x": "red"}, {"1": 1}]),
        (set[UUID], ["3f2504e0-4f89-41d3-9a0c-0305e82c3301"], [[1]]),
        (timedelta, "PT1H", [1, True]),
        (Annotated[str, Strict(False)], "1", [1]),
        (Decimal, "1.50", [1.5, 1]),
        (Literal[Size.SMALL, Tone.LOW, "x"], "low", ["1", "LOW", True]),
        (Named, "2030-01-01", ["2030-01-02", 1]),
        (SameBytes, {"data": "YQ=="}, [{"data": 1}]),
        (Literal["a", 1, True, None], None, ["1", 2, False]),
    ],
)
def test_a_part_that_is_as_strict_is_accepted(annotation: Any, good: Any, bad: list[Any]) -> None:
    registry = JobRegistry([job_type(annotation, example={"part": good})])
    for each in bad:
        with pytest.raises(PayloadInvalid):
            registry.admit("order.send", {"part": each})


def test_a_fault_in_a_payload_inside_another_model_has_its_path() -> None:
    registry = JobRegistry([job_type(list[Shelf])])
    with pytest.raises(PayloadInvalid) as refused:
        registry.admit("order.send", {"part": [{"price": {"unitPrice": 1.5, "x": 1}}]})
    assert [(fault.path, fault.code) for fault in refused.value.violations] == [
        ("/part/0/price/unitPrice", "wrong_type"),
        ("/part/0/price/x", "unknown_field"),
    ]


@pytest.mark.parametrize("annotation", [Any, object, dict[str, Any], list[object]])
def test_a_part_may_be_any_json(annotation: Any) -> None:
    assert job_type(annotation, example={"part": [1]} if annotation is Any else None)


@dataclasses.dataclass(frozen=True)
class Shape:
    """An annotation, a value that fits it, and values that strictness refuses."""

    annotation: Any
    good: Any
    bad: tuple[Any, ...]


STRICT_SCALARS = [
    Shape(int, 1, ("12345", True, 1.5, None)),
    Shape(float, 1.5, ("1.5", True)),
    Shape(bool, True, ("true", 1)),
    Shape(str, "x", (1, None)),
    Shape(datetime, "2030-01-31T12:00:00Z", (5, "x", "2030")),
    Shape(Alias, 1, ("1",)),
    Shape(Size, 1, ("1", True)),
    Shape(Grade, 1, ("1", True)),
    Shape(Decimal, "1.5", (1.5, "x", "1_0")),
    Shape(AliasOfDecimal, "1.5", (1.5, "x")),
    Shape(UUID, "01a20b59-007a-7000-8000-000000000000", ("01a20b59007a70008000000000000000",)),
]
SCALARS = [
    *STRICT_SCALARS,
    Shape(LaxInt, 1, ("12345", True)),
]


Make = Callable[[dict[str, Any]], Any]
"""Makes a class with these fields."""


def named_tuple(fields: dict[str, Any]) -> Any:
    return NamedTuple("Part", list(fields.items()))


def model(base: type[BaseModel], config: ConfigDict) -> Make:
    def make(fields: dict[str, Any]) -> Any:
        made: Any = type("Base", (base,), {"model_config": config, "__module__": __name__})
        required: Any = {name: (annotation, ...) for name, annotation in fields.items()}
        return create_model("Part", __base__=made, **required)

    return make


def typed_dict(config: ConfigDict | None) -> Make:
    def make(fields: dict[str, Any]) -> Any:
        made = TypedDict("Part", fields)  # type: ignore[misc]  # made at run time
        if config is not None:
            setattr(made, "__pydantic_config__", config)  # noqa: B010
        return made

    return make


def data_class(config: ConfigDict | None) -> Make:
    def make(fields: dict[str, Any]) -> Any:
        made = dataclasses.make_dataclass("Part", list(fields.items()))
        return made if config is None else pydantic.dataclasses.dataclass(made, config=config)

    return make


STRICT_CLASSES = [
    model(Payload, ConfigDict()),
    typed_dict(STRICT),
    named_tuple,
]
CLASSES = [
    *STRICT_CLASSES,
    model(BaseModel, STRICT),
    data_class(STRICT),
    model(Payload, ConfigDict(extra="ignore")),
    model(Payload, ConfigDict(strict=False)),
    model(BaseModel, ConfigDict(strict=True)),
    model(BaseModel, ConfigDict(extra="forbid")),
    model(BaseModel, ConfigDict()),
    data_class(None),
    data_class(ConfigDict(strict=True)),
    typed_dict(None),
    typed_dict(ConfigDict(strict=True, extra="allow")),
]


def in_list(shape: Shape) -> Shape:
    annotation: Any = shape.annotation
    return Shape(list[annotation], [shape.good], tuple([b] for b in shape.bad))


def in_dict(shape: Shape) -> Shape:
    annotation: Any = shape.annotation
    return Shape(
        dict[str, annotation],
        {"key": shape.good},
        tuple({"key": each} for each in shape.bad),
    )


def optional(shape: Shape) -> Shape:
    return Shape(shape.annotation | None, shape.good, tuple(b for b in shape.bad if b is not None))


def in_class(make: Make, parts: list[Shape]) -> Shape:
    names = [f"f{index}" for index in range(len(parts))]
    part = make({name: each.annotation for name, each in zip(names, parts, strict=True)})
    good = {name: each.good for name, each in zip(names, parts, strict=True)}
    bad = [{**good, name: bad} for name, each in zip(names, parts, strict=True) for bad in each.bad]
    return Shape(part, good, (*bad, {**good, "extra": 1}, "text"))


def shapes(scalars: list[Shape], classes: list[Make]) -> st.SearchStrategy[Shape]:
    return st.recursive(
        st.sampled_from(scalars),
        lambda inner: (
            inner.map(in_list)
            | inner.map(in_dict)
            | inner.map(optional)
            | st.builds(in_class, st.sampled_from(classes), st.lists(inner, min_size=1, max_size=3))
        ),
        max_leaves=6,
    )


def refuses_each_lax_value(shape: Shape) -> bool:
    """Whether the job type is accepted; then each lax value has to be refused."""
    try:
        registry = JobRegistry([job_type(shape.annotation, example={"part": shape.good})])
    except DefinitionError as refused:
        assert "is not strict in all its parts" in str(refused)  # noqa: PT017
        return False
    for bad in shape.bad:
        with pytest.raises(PayloadInvalid):
            registry.admit("order.send", {"part": bad})
    return True


@settings(max_examples=100, deadline=None)
@given(shape=shapes(SCALARS, CLASSES))
def test_what_is_accepted_refuses_each_lax_value_at_any_depth(shape: Shape) -> None:
    refuses_each_lax_value(shape)


@settings(max_examples=100, deadline=None)
@given(shape=shapes(STRICT_SCALARS, STRICT_CLASSES))
def test_what_is_strict_in_all_its_parts_is_accepted(shape: Shape) -> None:
    assert refuses_each_lax_value(shape)
