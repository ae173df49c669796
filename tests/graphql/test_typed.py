"""The typed door: what its input looks like, and that it stores what the generic door stores."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import httpx
import pytest
from graphql import GraphQLEnumType, GraphQLInputObjectType, build_schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from job_registry import DefinitionError, JobRegistry, JobType, Payload
from job_registry_api.graphql.schema import sdl
from tests import forks
from tests.graphql.test_inputs import literal
from tests.http_client import Execute


class Color(Enum):
    """The color of a thing."""

    RED = "red"
    DARK_BLUE = "dark blue"


class Address(Payload):
    """Where someone lives."""

    street: str
    floor: int | None = None


class Node(Payload):
    """A tree."""

    name: str
    children: list[Node] = []


class Everything(Payload):
    """One of each."""

    text: str
    count: int
    ratio: float
    home: Address
    day: date
    moment: datetime
    clock: time
    lasting: timedelta
    reference: UUID
    amount: Decimal
    few: Annotated[int, Field(ge=0, le=100)] = 5
    flag: bool = False
    tags: list[str] = ["a"]
    homes: list[Address] = Field(default=[], description="Other homes.")
    color: Color = Color.RED
    mode: Literal["fast", "very-slow"] = "fast"
    step: Literal[1, 2] = 1
    odd: Literal["+", "-"] = "+"
    tree: Node | None = None
    free: dict[str, int] = {}
    either: int | str = 0
    pair: tuple[int, str] = (1, "a")
    modes: list[Literal["fast", "very-slow"] | None] = ["very-slow", None]
    matrix: list[list[float]] = [[0.5]]
    when: datetime | None = None


@pytest.fixture
def registry() -> JobRegistry:
    return JobRegistry(
        [
            JobType(
                name="test.every_thing",
                payload=Everything,
                example={
                    "text": "",
                    "count": 1,
                    "ratio": 1,
                    "home": {"street": ""},
                    "day": "2030-01-31",
                    "moment": "2030-01-31T12:00:00Z",
                    "clock": "12:00:00Z",
                    "lasting": "PT1H",
                    "reference": "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
                    "amount": "1.50",
                },
            )
        ]
    )


NAMES = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]{0,5}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6)
ADDRESSES = st.fixed_dictionaries(
    {"street": TEXTS}, optional={"floor": st.none() | st.integers(-5, 200)}
)
TREES = st.recursive(
    st.fixed_dictionaries({"name": TEXTS}),
    lambda inner: st.fixed_dictionaries({"name": TEXTS, "children": st.lists(inner, max_size=2)}),
    max_leaves=4,
)
PAYLOADS = (
    st.fixed_dictionaries(
        {
            "text": TEXTS,
            "count": INTEGERS,
            "ratio": FLOATS,
            "home": ADDRESSES,
            "day": st.dates().map(str),
            "moment": st.sampled_from(
                ["2030-01-31T12:00:00Z", "2030-01-31T12:00:00.5+05:30", "2030-01-31T12:00:00"]
            ),
            "clock": st.times().map(str),
            "lasting": st.sampled_from(["PT1H", "P3DT4S", "-PT1.5S"]),
            "reference": st.uuids().map(str),
            "amount": st.decimals(-(10**9), 10**9, places=3).map(str),
        },
        optional={
            "few": st.integers(-10, 110),  # Some are out of range: the registry's to say.
            "flag": st.booleans(),
            "tags": st.lists(TEXTS, max_size=3),
            "homes": st.lists(ADDRESSES, max_size=2),
            "color": st.sampled_from(["red", "dark blue"]),
            "mode": st.sampled_from(["fast", "very-slow"]),
            "step": st.sampled_from([1, 2]),
            "odd": st.sampled_from(["+", "-"]),
            "tree": st.none() | TREES,
            "free": st.dictionaries(NAMES, st.integers(-5, 2**40), max_size=3),
            "either": TEXTS | INTEGERS,
            "pair": st.tuples(INTEGERS, TEXTS).map(list),
            "matrix": st.lists(st.lists(FLOATS, max_size=2), max_size=2),
            "when": st.none() | st.just("2030-01-31T12:00:00+02:00"),
        },
    )
    .flatmap(lambda payload: st.permutations(list(payload.items())))
    .map(dict)
)


def as_client_writes(payload: dict[str, Any], *, long_as_text: bool) -> dict[str, Any]:
    """The payload in the words of the typed door: enums by name, long numbers perhaps as text."""
    written = dict(payload)
    for enum in ("color", "mode"):
        if enum in written:
            written[enum] = written[enum].upper().replace(" ", "_").replace("-", "_")
    if long_as_text:
        written["count"] = str(written["count"])
    return written


def as_literal(payload: dict[str, Any]) -> str:
    """A literal, in which an enum's value has no quotes."""
    fields = [
        f"{name}: {value if name in ('color', 'mode') else literal(value)}"
        for name, value in payload.items()
    ]
    return "{" + ", ".join(fields) + "}"


RESULT = """{ __typename ... on EnqueueJobSuccess { job { id payload } }
    ... on PayloadInvalid { violations { path code message } } }"""
GENERIC = f"mutation ($input: EnqueueJobInput!) {{ it: enqueueJob(input: $input) {RESULT} }}"
TYPED = f"mutation ($job: TypedJobInput!) {{ it: enqueue(job: $job) {RESULT} }}"


def stored(answer: dict[str, Any]) -> Any:
    """The payload of a stored job, or else the answer.

    GraphQL has fields in the order of the schema, and numbers of a `Float` with a fraction.
    """
    return answer["job"]["payload"] if answer["__typename"] == "EnqueueJobSuccess" else answer


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(payload=PAYLOADS, long_as_text=st.booleans())
async def test_both_mutations_store_the_same_payload_and_refuse_the_same_faults(
    execute: Execute, payload: dict[str, Any], long_as_text: bool
) -> None:
    written = as_client_writes(payload, long_as_text=long_as_text)
    generic = await execute(GENERIC, input={"type": "test.every_thing", "payload": payload})
    by_generic = stored(generic["it"])
    by_variable = await execute(TYPED, job={"testEveryThing": written})
    assert stored(by_variable["it"]) == by_generic
    job = f"{{testEveryThing: {as_literal(written)}}}"
    by_literal = await execute(f"mutation {{ it: enqueue(job: {job}) {RESULT} }}")
    assert stored(by_literal["it"]) == by_generic


async def test_variables_inside_of_a_literal_count_as_what_they_stand_for(
    execute: Execute, registry: JobRegistry
) -> None:
    example = dict(registry["test.every_thing"].example_payload)
    rest = {name: value for name, value in example.items() if name not in ("ratio", "home")}
    job = (
        "{testEveryThing: {ratio: $ratio, few: $few, flag: $flag, tags: $tags,"
        f" home: {{floor: $floor, street: $street}}, {as_literal(rest)[1:-1]}}}}}"
    )
    data = await execute(
        f"""mutation ($ratio: Float!, $few: Int! = 7, $flag: Boolean, $tags: [String!],
              $floor: BigInt, $street: String!) {{ it: enqueue(job: {job}) {RESULT} }}""",
        ratio=2,
        floor=None,
        street="s",
        tags="one",
    )
    payload = data["it"]["job"]["payload"]
    assert payload.pop("home") == {"floor": None, "street": "s"}
    # What was omitted is not stored, whatever its default.
    assert payload == {"few": 7, "tags": ["one"], "ratio": 2} | rest


async def test_null_is_sent_as_null_and_refused_with_its_path(
    execute: Execute, registry: JobRegistry
) -> None:
    payload = dict(registry["test.every_thing"].example_payload) | {"tags": None}
    data = await execute(TYPED, job={"testEveryThing": payload})
    (fault,) = data["it"]["violations"]
    assert (fault["path"], fault["code"]) == ("/tags", "wrong_type")


async def test_a_whole_number_for_a_float_is_the_same_payload_in_both_mutations(
    execute: Execute, registry: JobRegistry
) -> None:
    example = dict(registry["test.every_thing"].example_payload)
    data = await execute(
        """mutation ($input: EnqueueJobInput!, $job: TypedJobInput!) {
             generic: enqueueJob(input: $input) { ... on EnqueueJobSuccess { deduplicated } }
             typed: enqueue(job: $job, options: {idempotencyKey: "k"}) {
               ... on EnqueueJobSuccess { deduplicated } } }""",
        input={"type": "test.every_thing", "payload": example, "idempotencyKey": "k"},
        job={"testEveryThing": example},
    )
    assert json.dumps(example["ratio"]) == "1"
    assert data == {"generic": {"deduplicated": False}, "typed": {"deduplicated": True}}


async def test_options_go_with_the_typed_job(execute: Execute, registry: JobRegistry) -> None:
    data = await execute(
        """mutation ($job: TypedJobInput!, $options: EnqueueOptions) {
             it: enqueue(job: $job, options: $options) {
               ... on EnqueueJobSuccess { deduplicated job { priority maxAttempts nextRunAt } }
               ... on InputInvalid { violations { path } } } }""",
        job={"testEveryThing": dict(registry["test.every_thing"].example_payload)},
        options={
            "priority": 99,
            "maxAttempts": 7,
            "scheduleAt": "2030-01-31T12:00:00Z",
            "idempotencyKey": "k",
        },
    )
    assert data["it"] == {
        "deduplicated": False,
        "job": {"priority": 99, "maxAttempts": 7, "nextRunAt": "2030-01-31T12:00:00Z"},
    }


@pytest.mark.parametrize(
    ("job", "named"),
    [
        ({"testEveryThing": {"text": 1}}, "testEveryThing.text"),
        ({"testEveryThing": {"nothing": 1}}, "nothing"),
        ({"testNothing": {}}, "testNothing"),
        ({}, "exactly one"),
        ({"testEveryThing": {"count": 2**63}}, "count"),
        ({"testEveryThing": {"count": 1.5}}, "count"),
        ({"testEveryThing": {"count": True}}, "count"),
        ({"testEveryThing": {"count": "0x10"}}, "count"),
        ({"testEveryThing": {"color": "red"}}, "color"),
    ],
)
async def test_a_fault_of_type_is_an_error_of_the_request_that_names_the_field(
    http: httpx.AsyncClient, job: dict[str, Any], named: str
) -> None:
    response = await http.post("/graphql", json={"query": TYPED, "variables": {"job": job}})
    assert any(named in error["message"] for error in response.json()["errors"]), response.text
    assert "data" not in response.json()


def test_a_payload_is_described_by_types_of_its_own(registry: JobRegistry) -> None:
    types = build_schema(sdl(registry)).type_map
    job, payload, node = (
        types[name] for name in ("TypedJobInput", "TestEveryThingInput", "NodeInput")
    )
    assert isinstance(job, GraphQLInputObjectType)
    assert isinstance(payload, GraphQLInputObjectType)
    assert isinstance(node, GraphQLInputObjectType)
    assert job.is_one_of
    assert {name: str(field.type) for name, field in payload.fields.items()} == {
        "text": "String!",
        "count": "BigInt!",
        "ratio": "Float!",
        "home": "AddressInput!",
        "day": "Date!",
        "moment": "DateTime!",
        "clock": "Time!",
        "lasting": "Duration!",
        "reference": "UUID!",
        "amount": "Decimal!",
        # What has a default may be omitted.
        "few": "Int",
        "flag": "Boolean",
        "tags": "[String!]",
        "homes": "[AddressInput!]",
        "color": "Color",
        "mode": "TestEveryThingMode",
        "step": "Int",
        "odd": "String",
        "tree": "NodeInput",
        "free": "JSON",
        "either": "JSON",
        "pair": "JSON",
        "modes": "[TestEveryThingModes]",
        "matrix": "[[Float!]!]",
        "when": "DateTime",
    }
    assert str(node.fields["children"].type) == "[NodeInput!]"
    descriptions = {name: field.description for name, field in payload.fields.items()}
    assert descriptions["few"] == "Few. 0 to 100. Defaults to `5`."
    assert descriptions["homes"] == "Other homes. Defaults to `[]`."
    assert descriptions["color"] == "Color. Defaults to `RED`."
    assert descriptions["pair"] == 'Pair. Exactly 2 items. Defaults to `[1, "a"]`.'
    assert descriptions["modes"] == "Modes. Defaults to `[VERY_SLOW, null]`."
    color = types["Color"]
    assert isinstance(color, GraphQLEnumType)
    assert (list(color.values), color.description) == (
        ["RED", "DARK_BLUE"],
        "The color of a thing.",
    )


class Empty(Payload):
    """A payload of no field."""


class NoNames(Payload):
    """A payload whose field has no name in GraphQL."""

    field: str = Field(default="a", alias="a-b")


class Card(Payload):
    """Paid by card."""

    kind: Literal["card"]


class Transfer(Payload):
    """Paid by transfer."""

    kind: Literal["transfer"]


class Required(Payload):
    """What is required may be null, and what has a factory may be left out."""

    nullable: int | None
    made: list[str] = Field(default_factory=list)
    nested: Empty = Empty()
    mixed: Literal["a", 1, None] = None
    choice: Literal["a", None] = None
    method: Annotated[Card | Transfer, Field(discriminator="kind")]


def test_what_graphql_cannot_say_is_json_and_judged_by_the_registry() -> None:
    types = build_schema(
        sdl(
            JobRegistry(
                [
                    JobType(name="empty", payload=Empty),
                    JobType(name="no.names", payload=NoNames),
                    JobType(name="required", payload=Required),
                ]
            )
        )
    ).type_map
    job, required = types["TypedJobInput"], types["RequiredInput"]
    assert isinstance(job, GraphQLInputObjectType)
    assert isinstance(required, GraphQLInputObjectType)
    assert {name: str(field.type) for name, field in job.fields.items()} == {
        "empty": "JSON",
        "noNames": "JSON",
        "required": "RequiredInput",
    }
    assert {name: str(field.type) for name, field in required.fields.items()} == {
        "nullable": "BigInt",
        "made": "[String!]",
        "nested": "JSON",
        "mixed": "JSON",
        "choice": "RequiredChoice",
        "method": "JSON!",
    }


class Renamed(Payload):
    """A payload whose fields are on their way out."""

    old: str = Field(default="", deprecated=True)
    needed: str = Field(deprecated=True)


def test_a_deprecated_field_is_deprecated_in_the_schema_where_it_may_be_left_out() -> None:
    renamed = build_schema(sdl(JobRegistry([JobType(name="renamed", payload=Renamed)]))).type_map[
        "RenamedInput"
    ]
    assert isinstance(renamed, GraphQLInputObjectType)
    assert renamed.fields["old"].deprecation_reason == "No longer used."
    assert renamed.fields["needed"].deprecation_reason is None


def test_without_job_types_there_is_no_typed_door() -> None:
    text = sdl(JobRegistry([]))
    assert "TypedJobInput" not in text
    assert "enqueueJob(" in text


class TreeWalk(Payload):
    children: list[TreeWalk] = []


@pytest.mark.parametrize("description", [None, "Walks a tree."])
def test_a_payload_may_contain_itself(description: str | None) -> None:
    walk = JobType(name="tree.walk", payload=TreeWalk, description=description)
    payload = build_schema(sdl(JobRegistry([walk]))).type_map["TreeWalkInput"]
    assert isinstance(payload, GraphQLInputObjectType)
    assert str(payload.fields["children"].type) == "[TreeWalkInput!]"


class Date(Enum):
    """Its name is that of a scalar of ours."""

    TODAY = "today"


class Dated(Payload):
    """A payload with both."""

    on: date
    at: Date = Date.TODAY


def address_with(field: str) -> type[Payload]:
    """A model named Address with a field of its own, inside of a payload."""
    namespace = {"__annotations__": {field: str}, "__module__": __name__}
    address = type("Address", (Payload,), namespace)
    fields = {"__annotations__": {"address": address}, "__module__": __name__}
    return type("WithAddress", (Payload,), fields)


class Mode(Payload):
    """Its name is taken in the schema, with `Input` at its end."""

    lease_jobs: LeaseJobs | None = None


class LeaseJobs(Payload):
    """A model with the name of an input of ours."""

    field: str = "a"


@pytest.mark.parametrize(
    ("job_types", "named"),
    [
        (
            [JobType(name="a.b_c", payload=Empty), JobType(name="a_b.c", payload=Empty)],
            ["a.b_c", "a_b.c", "aBC"],
        ),
        (
            [
                JobType(name="one", payload=address_with("street")),
                JobType(name="two", payload=address_with("city")),
            ],
            ["one", "two", "AddressInput"],
        ),
        ([JobType(name="enqueue_job", payload=Address)], ["enqueue_job", "EnqueueJobInput"]),
        ([JobType(name="mode", payload=Mode)], ["mode", "LeaseJobsInput"]),
        (
            [JobType(name="dated", payload=Dated, example={"on": "2030-01-31", "at": "today"})],
            ["dated", "Date"],
        ),
    ],
)
def test_names_that_collide_stop_the_start(
    job_types: Sequence[JobType[Any]], named: Sequence[str]
) -> None:
    with pytest.raises(DefinitionError) as collision:
        sdl(JobRegistry(job_types))
    assert all(name in str(collision.value) for name in named), str(collision.value)


def test_one_model_in_two_job_types_is_one_type() -> None:
    with_address = address_with("street")
    job_types = [JobType(name=name, payload=with_address) for name in ("one", "two")]
    assert sdl(JobRegistry(job_types)).count("input AddressInput") == 1


def test_a_collision_is_reported_by_the_command_with_the_code_of_wrong_usage(
    tmp_path: Path,
) -> None:
    (tmp_path / "colliding.py").write_text(
        "from registry import JobType, Payload\n"
        "class Nothing(Payload): pass\n"
        "one = JobType(name='a.b', payload=Nothing)\n"
        "two = JobType(name='a_b', payload=Nothing)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "JOBS_CATALOG": "colliding",
        "JOBS_DATABASE_URL": f"sqlite:///{tmp_path / 'jobs.db'}",
    }
    ran = forks.run(["serve", "--port", "0"], environment=environment, folder=tmp_path)
    assert ran.returncode == 2
    assert "job types a.b and a_b would both be the field aB of TypedJobInput" in ran.stderr
    assert not (tmp_path / "jobs.db").exists()
