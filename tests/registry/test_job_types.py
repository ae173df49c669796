"""Defining job types: what is right, and that what is wrong fails at once and says where."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, ForwardRef, Literal, Protocol, cast
from uuid import UUID

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field, create_model

from job_registry import (
    Backoff,
    DefinitionError,
    JobContext,
    JobPolicy,
    JobRegistry,
    JobType,
    JobTypeNotFound,
    Payload,
)
from job_registry.catalog.payout import payout_execute
from job_registry.catalog.thumbnail import thumbnail_create
from job_registry.evolution import changes_between
from job_registry.lock import Lock, lock_text, released_types


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Part(Payload):
    size: int
    price: Decimal


class Everything(Payload):
    """All that a payload may hold."""

    text: Annotated[str, Field(min_length=3, max_length=9)]
    count: Annotated[int, Field(ge=5, lt=9)]
    ratio: float
    flag: bool
    color: Color
    kind: Literal["a", "b"]
    when: datetime
    day: date
    ident: UUID
    amount: Annotated[Decimal, Field(gt=0, max_digits=6, decimal_places=2)]
    part: Part
    parts: Annotated[list[Part], Field(min_length=2)]
    names: dict[str, int]
    maybe: str | None = None
    tags: list[str] = ["x"]  # noqa: RUF012  (Pydantic copies defaults)


class Note(Payload):
    text: str = "hello"


@pytest.mark.parametrize(
    "name", ["", "Thumb", "a..b", ".a", "a.", "a b", "1a", "a-b", "a" * 101, "ä", 3, None, "a\n"]
)
def test_a_bad_name_is_refused(name: Any) -> None:
    with pytest.raises(DefinitionError, match="name"):
        JobType(name=name, payload=Note)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"max_attempts": -1}, "max_attempts is -1"),
        ({"max_attempts": 1001}, "max_attempts is 1001"),
        ({"max_attempts": True}, "max_attempts is true"),
        ({"max_attempts": 1.5}, "max_attempts is 1.5"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
        ({"timeout_seconds": "60"}, 'timeout_seconds is "60"'),
        ({"timeout_seconds": 604_801}, "timeout_seconds is 604801"),
        ({"concurrency_limit": 0}, "concurrency_limit is 0"),
        ({"concurrency_limit": 100_001}, "is 100001, expected a whole number from 1 to 100,000"),
        ({"on_mismatch": "stop"}, 'on_mismatch is "stop", expected park or fail'),
        ({"backoff": 2}, "backoff is 2"),
    ],
)
def test_a_bad_policy_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        JobPolicy(**options)


def test_every_fault_of_a_policy_is_reported() -> None:
    with pytest.raises(DefinitionError, match="max_attempts is 0.*timeout_seconds is 0"):
        JobPolicy(max_attempts=0, timeout_seconds=0)


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 1, "timeout_seconds": 1, "concurrency_limit": 1},
        {"max_attempts": 1_000, "timeout_seconds": 604_800, "concurrency_limit": 100_000},
        {"concurrency_limit": None},
    ],
)
def test_a_policy_within_its_bounds_is_taken(options: dict[str, Any]) -> None:
    policy = JobPolicy(**options)
    assert {name: getattr(policy, name) for name in options} == options


def test_a_policy_has_defaults() -> None:
    policy = JobPolicy()
    assert (policy.max_attempts, policy.timeout_seconds) == (3, 300)
    assert (policy.concurrency_limit, policy.on_mismatch) == (None, "park")
    assert policy.backoff == Backoff(base_seconds=2.0, cap_seconds=3_600.0)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"base_seconds": -1}, "base_seconds is -1, expected a number from 0 to 86,400"),
        ({"base_seconds": 86_401}, "base_seconds is 86401"),
        ({"base_seconds": None}, "base_seconds is null"),
        ({"cap_seconds": -0.5}, "cap_seconds is -0.5, expected a number from 0 to 2,678,400"),
        ({"cap_seconds": 2_678_401}, "cap_seconds is 2678401"),
        ({"base_seconds": 9, "cap_seconds": 8}, "cap_seconds 8 is below base_seconds 9"),
    ],
)
def test_a_bad_backoff_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(DefinitionError, match=f"Backoff: {fault}"):
        Backoff(**options)


@pytest.mark.parametrize("seconds", [(0, 0), (0.5, 0.5), (86_400, 2_678_400)])
def test_a_backoff_within_its_bounds_is_taken(seconds: tuple[float, float]) -> None:
    backoff = Backoff(*seconds)
    assert (backoff.base_seconds, backoff.cap_seconds) == seconds


@pytest.mark.parametrize("payload", [dict, BaseModel, None, Note()])
def test_a_payload_that_is_no_payload_is_refused(payload: Any) -> None:
    with pytest.raises(DefinitionError, match="expected a subclass of Payload"):
        JobType(name="a", payload=payload)


def test_a_payload_that_is_not_strict_any_more_is_refused() -> None:
    class Lax(Payload):
        model_config = ConfigDict(extra="allow")

    with pytest.raises(DefinitionError, match="extra='allow'"):
        JobType(name="a", payload=Lax)


def test_a_payload_with_no_json_schema_is_refused() -> None:
    class Odd(Payload):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        code: Callable[[int], int]

    with pytest.raises(DefinitionError, match="JSON Schema"):
        JobType(name="a", payload=Odd)

    # The first refers to a class that does not exist, the second to one that Pydantic cannot read.
    not_there: Any = ForwardRef("NotThere")
    unfinished = create_model("Unfinished", __base__=Payload, code=(not_there, ...))
    with pytest.raises(DefinitionError, match="JSON Schema"):
        JobType(name="a", payload=unfinished)

    class Late(Payload):
        code: Code

    class Code:
        pass

    with pytest.raises(DefinitionError, match="JSON Schema"):
        JobType(name="a", payload=Late)


def test_everything_is_frozen() -> None:
    job_type = JobType(name="a", payload=Note)
    schema: Any = job_type.payload_schema
    registry: Any = JobRegistry([job_type])
    for change in (
        lambda: setattr(job_type, "name", "b"),
        lambda: setattr(job_type.policy, "max_attempts", 5),
        lambda: setattr(Note(), "text", "b"),
        lambda: setattr(JobContext("1", "a", 1, 3, 60), "attempt", 2),
        lambda: schema.__setitem__("x", 1),
        lambda: registry.__setitem__("b", job_type),
    ):
        with pytest.raises((AttributeError, TypeError, ValueError)):
            change()


def test_a_context_of_a_test_logs_to_the_standard_library(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = JobContext("1", "a", 1, 3, 60).log.bind(page=3)
    try:
        raise KeyError("x")
    except KeyError:
        log.exception("failed", of=9)
    log.critical("on fire")
    assert [(line.levelname, line.getMessage()) for line in caplog.records] == [
        ("ERROR", "failed {'page': 3, 'of': 9}"),
        ("CRITICAL", "on fire {'page': 3}"),
    ]
    assert caplog.records[0].exc_info is not None


def test_one_handler_is_attached_and_given_back() -> None:
    job_type = JobType(name="a", payload=Note)
    assert not job_type.has_handler

    @job_type.handler
    def run(job: JobContext, payload: Note) -> str:
        return payload.text

    assert job_type.run is run
    assert run(JobContext("1", "a", 1, 3, 60), Note()) == "hello"
    with pytest.raises(DefinitionError, match=r"has a handler already.*run"):
        job_type.handler(lambda job, payload: None)
    with pytest.raises(DefinitionError, match=r"must take \(job, payload\)"):
        JobType(name="b", payload=Note).handler(cast(Any, lambda job: None))


def test_a_handler_that_yields_is_refused() -> None:
    async def run(job: JobContext, payload: Note) -> AsyncIterator[str]:
        yield payload.text

    def run_in_thread(job: JobContext, payload: Note) -> Iterator[str]:
        yield payload.text

    for handler in (run, run_in_thread):
        with pytest.raises(DefinitionError, match=r"run\S* yields, .*; return the result instead"):
            JobType(name="a", payload=Note).handler(handler)


def test_a_handler_with_swapped_arguments_is_refused() -> None:
    def run(payload: Note, job: JobContext) -> None:
        """As its annotations say, it takes (payload, job)."""

    def half(payload: Note, job):  # type: ignore[no-untyped-def]  # as users write it
        """One annotation is enough."""

    class Step:
        def run(self, payload: Note, job: JobContext) -> None:
            """A method's own arguments count."""

    handlers: list[Any] = [run, half, Step().run, lambda payload, job: None]
    for handler in handlers:
        with pytest.raises(DefinitionError, match=r"takes \(payload, job\), expected"):
            JobType(name="a", payload=Note).handler(handler)


def test_a_handler_of_another_payload_is_refused() -> None:
    def copied(job: JobContext, payload: Everything) -> None: ...

    def unparsed(job: JobContext, payload: dict[str, Any]) -> None: ...

    def general(job: JobContext, payload: Payload) -> None: ...

    job_type: JobType[Any] = JobType(name="a", payload=Note)
    with pytest.raises(DefinitionError, match=r"unparsed takes dict, expected Note"):
        job_type.handler(unparsed)
    with pytest.raises(DefinitionError, match=r"copied takes Everything, expected Note"):
        job_type.handler(copied)
    job_type.handler(general)


class Sized(Protocol):
    def __len__(self) -> int: ...


def _of_any(job: JobContext, payload: Any) -> None: ...


def _of_object(job: JobContext, payload: object) -> None: ...


def _of_a_model(job: JobContext, payload: BaseModel) -> None: ...


def _of_a_union(job: JobContext, payload: Note | dict[str, Any]) -> None: ...


def _of_a_protocol(job: JobContext, payload: Sized) -> None: ...


@pytest.mark.parametrize("handler", [_of_any, _of_object, _of_a_model, _of_a_union, _of_a_protocol])
def test_a_handler_of_something_more_general_is_accepted(handler: Any) -> None:
    job_type: JobType[Any] = JobType(name="a", payload=Note)
    job_type.handler(handler)
    assert job_type.has_handler


class ObjectHandler:
    """A handler that is an object."""

    async def __call__(self, job: JobContext, payload: Note) -> None: ...


async def _async(job: JobContext, payload: Note) -> None: ...


def _plain(job: JobContext, payload: Note) -> None: ...


@pytest.mark.parametrize(
    ("handler", "place"), [(_async, "loop"), (ObjectHandler(), "loop"), (_plain, "thread")]
)
def test_an_async_handler_runs_on_the_event_loop_and_a_plain_one_in_a_thread(
    handler: Any, place: str
) -> None:
    job_type = JobType(name="a", payload=Note)
    assert job_type.runs_in is None
    job_type.handler(handler)
    assert job_type.runs_in == place
    in_thread = JobType(name="b", payload=Note, run_in="thread")
    if place == "loop":
        with pytest.raises(DefinitionError, match="async"):
            in_thread.handler(handler)
    else:
        in_thread.handler(handler)
        assert in_thread.runs_in == "thread"


def test_the_description_is_the_payloads_docstring() -> None:
    assert JobType(name="a", payload=Everything).description == "All that a payload may hold."
    assert JobType(name="a", payload=Note).description == ""
    assert JobType(name="a", payload=Note, description="Other.").description == "Other."


@pytest.mark.parametrize(
    "job_type", [thumbnail_create, payout_execute, JobType(name="a.b", payload=Everything)]
)
def test_an_example_is_valid_against_the_json_schema(job_type: JobType[Any]) -> None:
    schema, example = dict(job_type.payload_schema), dict(job_type.example_payload)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(example)
    assert JobRegistry([job_type]).admit(job_type.name, example)


def test_an_example_that_is_given_has_to_be_valid() -> None:
    assert JobType(name="a", payload=Note, example={"text": "b"}).example_payload == {"text": "b"}
    with pytest.raises(DefinitionError, match="example"):
        JobType(name="a", payload=Note, example={"text": 1})


def test_a_default_that_its_annotation_does_not_allow_is_named() -> None:
    class Due(Payload):
        days: int = cast(int, None)

    message = r"/days: Expected a whole number; got null\. That is the default: change it, or allow"
    with pytest.raises(DefinitionError, match=message):
        JobType(name="a", payload=Due)


def test_where_no_example_can_be_made_one_is_required() -> None:
    class Coded(Payload):
        code: Annotated[str, Field(pattern=r"^[0-9]{4}$")]

    with pytest.raises(DefinitionError, match=r"Field\(examples=\[\.\.\.\]\) or JobType\(example="):
        JobType(name="a", payload=Coded)
    assert JobType(name="a", payload=Coded, example={"code": "1234"})


def test_a_fingerprint_changes_with_the_demands_and_not_with_the_words() -> None:
    def fingerprint(**field: Any) -> str:
        model = type(
            "Model", (Payload,), {"__annotations__": {"title": str}, "title": Field(**field)}
        )
        return JobType(name="a", payload=model).fingerprint

    plain = fingerprint()
    assert fingerprint(description="Words.", examples=["x"]) == plain
    assert fingerprint(max_length=5) != plain
    assert len(plain) == 64


@pytest.mark.parametrize("name", ["title", "description", "examples", "$schema", "x"])
def test_a_fingerprint_changes_with_a_default_whatever_its_names(name: str) -> None:
    def job_type(value: str) -> JobType[Any]:
        model = create_model("Model", __base__=Payload, v=(dict[str, str], {name: value}))
        return JobType(name="a", payload=model)

    one, two = job_type("one"), job_type("two")
    assert one.fingerprint != two.fingerprint
    changes = changes_between(released_types([one]), released_types([two]))
    assert [(change.kind, change.path) for change in changes] == [("default", "/v")]


def test_a_fingerprint_does_not_change_with_the_order_of_fields_and_values() -> None:
    class First(Payload):
        """A payload."""

        b: int
        a: int
        required: Literal["x", "y"] | None = None
        enum: set[str] = Field(default={"x", "y"})

    class Second(Payload):
        enum: set[str] = Field(default={"y", "x"})
        required: Literal["y", "x"] | None = None
        a: int
        b: int

    first, second = JobType(name="a", payload=First), JobType(name="a", payload=Second)
    assert first.fingerprint == second.fingerprint
    assert lock_text(Lock(released_types([first]))) == lock_text(Lock(released_types([second])))


def test_a_registry_finds_its_types_and_suggests_the_nearest() -> None:
    registry = JobRegistry([thumbnail_create, payout_execute])
    assert list(registry) == ["payout.execute", "thumbnail.create"]
    assert registry.policy("payout.execute").max_attempts == 10
    with pytest.raises(JobTypeNotFound) as missing:
        registry.policy("thumbnail.creat")
    assert missing.value.suggestions == ("thumbnail.create",)
    with pytest.raises(JobTypeNotFound) as huge:
        registry.validate("x" * 1_000_000, {})
    assert len(str(huge.value)) < 300
    with pytest.raises(DefinitionError, match="two job types are named payout.execute"):
        JobRegistry([payout_execute, payout_execute])
    with pytest.raises(DefinitionError, match="expected a list of job types; got"):
        JobRegistry(cast(Any, JobType(name="a", payload=Note)))
    with pytest.raises(DefinitionError, match="is not a JobType"):
        JobRegistry(cast(Any, [Note]))


def test_the_built_in_types_are_exactly_the_tables() -> None:
    def shape(job_type: JobType[Any]) -> tuple[set[str], dict[str, str]]:
        schema = job_type.payload_schema
        kinds = {name: field["type"] for name, field in schema["properties"].items()}
        return set(schema["required"]), kinds

    assert shape(thumbnail_create) == (
        {"assetId", "versionNumber"},
        {"assetId": "string", "versionNumber": "integer", "sizes": "array"},
    )
    assert shape(payout_execute) == (
        {"batchId", "escrowId"},
        {"batchId": "string", "escrowId": "string", "isRetry": "boolean"},
    )
    policies = {
        each.name: (
            each.policy.max_attempts,
            each.policy.timeout_seconds,
            each.policy.concurrency_limit,
            each.has_handler,
        )
        for each in (thumbnail_create, payout_execute)
    }
    assert policies == {
        "thumbnail.create": (3, 300, None, True),
        "payout.execute": (10, 60, 5, False),
    }
