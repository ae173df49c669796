"""Variables inside a JSON literal: what the client sent is what is stored, at any depth."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any

import pytest
import strawberry
from strawberry.schema.config import StrawberryConfig
from strawberry.tools import merge_types

from job_registry import JobRegistry, JobType, Payload
from job_registry_api import JobQueue, graphql_types
from tests.embedding.test_merged_graphql import ADA, HostMutation, HostQuery, caller_of
from tests.http_client import Execute


class Anything(Payload):
    """A payload that holds any JSON."""

    value: Any = None


@pytest.fixture
def registry() -> JobRegistry:
    return JobRegistry([JobType(name="test.any", payload=Anything)])


ENQUEUE = """mutation (%s) {
  enqueueJob(input: {type: "test.any", payload: {value: %s}}) { __typename
    ... on EnqueueJobSuccess { job { payload } }
    ... on PayloadInvalid { violations { path message } } } }"""

FILTER = {"statuses": ["QUEUED"], "createdAfter": "2030-01-01T00:00:00Z"}
CASES: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "an absent variable leaves its entry out": ("$a: Int", "{a: $a, b: 1}", {}, {"b": 1}),
    "null is null": ("$a: Int", "{a: $a, b: 1}", {"a": None}, {"a": None, "b": 1}),
    "absent in a list is null": ("$a: Int", "[1, $a, [$a]]", {}, [1, None, [None]]),
    "absent at any depth": ("$a: ID", "[{a: [{b: $a, c: {d: $a}}]}]", {}, [{"a": [{"c": {}}]}]),
    "a default is used": ("$a: Int = 7", "{a: $a}", {}, {"a": 7}),
    "a default that is an enum": ("$a: JobStatus = QUEUED", "{a: $a}", {}, {"a": "QUEUED"}),
    "an enum": (
        "$a: JobStatus! $b: [JobStatus!]",
        "{a: $a, b: [$a, {c: $b}]}",
        {"a": "FAILED", "b": ["QUEUED"]},
        {"a": "FAILED", "b": ["FAILED", {"c": ["QUEUED"]}]},
    ),
    "a time": (
        "$a: DateTime!",
        "{a: [$a]}",
        {"a": "2030-01-31t12:00:00.5+02:00"},
        {"a": ["2030-01-31t12:00:00.5+02:00"]},
    ),
    "an input object": (
        "$a: JobErrorInput! $f: [JobFilter!]",
        "{a: $a, f: [$f]}",
        {"a": {"message": "m"}, "f": [FILTER]},
        {"a": {"message": "m"}, "f": [[FILTER]]},
    ),
    "any JSON": (
        "$a: JSON",
        "{a: $a, b: [$a]}",
        {"a": {"x-y": [1.5, None, {"": True}]}},
        {"a": {"x-y": [1.5, None, {"": True}]}, "b": [{"x-y": [1.5, None, {"": True}]}]},
    ),
    "an id that is a number": ("$a: ID!", "{a: $a}", {"a": 5}, {"a": 5}),
    "a single value for a list": ("$a: [Int!]", "{a: $a}", {"a": 3}, {"a": 3}),
}  # fmt: skip


@pytest.mark.cases(4)
@pytest.mark.parametrize("case", CASES)
async def test_what_a_variable_in_a_literal_was_sent_as_is_stored(
    execute: Execute, case: str
) -> None:
    declared, literal, variables, expected = CASES[case]
    data = await execute(ENQUEUE % (declared, literal), **variables)
    assert data["enqueueJob"] == {
        "__typename": "EnqueueJobSuccess",
        "job": {"payload": {"value": expected}},
    }


@enum.unique
class Color(enum.Enum):
    RED = "#f00"


Color = strawberry.enum(Color)  # type: ignore[misc]  # as users write it


@strawberry.input
class Spot:
    color: Color
    at: datetime | None = None
    note: str = "default"


@strawberry.type
class SpotQuery:
    @strawberry.field
    def spots(self, spots: list[Spot]) -> int:
        return len(spots)


async def test_a_hosts_own_types_in_a_literal_are_stored_as_they_were_sent(
    queue: JobQueue,
) -> None:
    jobs = graphql_types(queue, authenticate=caller_of)
    schema = strawberry.Schema(
        query=merge_types("Query", (HostQuery, SpotQuery, jobs.query)),
        mutation=merge_types("Mutation", (HostMutation, jobs.mutation)),
        extensions=[*jobs.extensions],
        exception_handlers=[*jobs.exception_handlers],
        config=StrawberryConfig(scalar_map=jobs.scalars, name_converter=jobs.name_converter),
    )
    spot = {"color": "RED", "at": "2030-01-31T12:00:00Z"}
    result = await schema.execute(
        ENQUEUE % ("$s: Spot!, $c: Color!, $t: DateTime!, $no: Int", "[$s, {c: $c, n: $no}, [$t]]"),
        {"s": spot, "c": "RED", "t": "2030-01-31T12:00:00Z"},
        context_value=ADA,
    )
    assert result.errors is None
    assert result.data is not None
    assert result.data["enqueueJob"]["job"]["payload"] == {
        "value": [spot, {"c": "RED"}, ["2030-01-31T12:00:00Z"]]
    }
