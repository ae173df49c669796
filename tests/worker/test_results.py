"""What becomes of a handler's result and progress: which sizes are taken, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_serializer

from job_registry_api.worker.outcomes import Raised, ResultRefused, Returned
from job_registry_api.worker.progress import Progress
from job_registry_api.worker.results import SMALL_BYTES, is_small, result_of


class Point(BaseModel):
    """A result that is measured once it is converted."""

    x: int = 1
    longer: str = Field("y", serialization_alias="z")


VALUES: tuple[Any, ...] = (
    None,
    "",
    "abc",
    12345,
    True,
    1.5,
    [],
    {},
    [1, 2, 3],
    {"a": 1},
    {"a": {"b": [None, "c"]}, "d": [[]]},
    {str(n): 0 for n in range(500)},
    list(range(500)),
    ["x" * 100, {"y" * 100: "z" * 100}],
)


@pytest.mark.parametrize("value", VALUES)
def test_a_result_of_the_largest_size_is_taken_and_one_byte_more_is_not(value: Any) -> None:
    size = len(json.dumps(value, separators=(",", ":")))
    assert result_of(value, max_bytes=size) == Returned(value)
    if value is not None:
        refused = result_of(value, max_bytes=size - 1)
        assert isinstance(refused, ResultRefused)
        assert f"at most {size - 1:,} bytes" in refused.reason


@pytest.mark.parametrize(
    ("value", "converted"),
    [
        (Point(), {"x": 1, "z": "y"}),
        ([Point()], [{"x": 1, "z": "y"}]),
        ((1, 2), [1, 2]),
        ({1: 2}, {"1": 2}),
    ],
)
def test_a_result_is_measured_as_the_json_that_is_stored(value: Any, converted: Any) -> None:
    size = len(json.dumps(converted, separators=(",", ":")))
    assert result_of(value, max_bytes=size) == Returned(converted)
    assert isinstance(result_of(value, max_bytes=size - 1), ResultRefused)


class Large(BaseModel):
    """It says nothing of its size before it is converted."""

    text: str = "x" * 1_000


def test_a_model_that_is_too_large_says_so_like_any_other_result() -> None:
    assert result_of(Large(), max_bytes=100) == result_of("x" * 1_000, max_bytes=100)
    assert result_of(Large(), max_bytes=2_000) == Returned({"text": "x" * 1_000})


def test_the_first_five_faults_of_a_result_are_named() -> None:
    refused = result_of([float("nan")] * 7, max_bytes=1_000)
    assert isinstance(refused, ResultRefused)
    assert [f"/{n}: " in refused.reason for n in range(7)] == [True] * 5 + [False] * 2
    refused = result_of("\0", max_bytes=100)
    assert isinstance(refused, ResultRefused)
    assert refused.reason.startswith("The handler's result cannot be stored: /: Expected")


class Unknown:
    """What JSON does not have."""


@dataclass
class Row:
    name: str
    value: Any = 1


class Order(BaseModel):
    """Its dates are written by a function of its own, which does not make them a fault."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    made: Unknown = Unknown()
    lines: list[Any] = Field([], serialization_alias="orderLines")

    @field_serializer("made")
    def text(self, _made: Unknown) -> str:
        return "today"


class Broken(BaseModel):
    x: int = 1

    @computed_field
    def total(self) -> int:
        raise LookupError("no total")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Unknown(), "/: Expected a JSON value; got a value of the type Unknown."),
        (
            {"items": [1, {"a/b": 2}, {"a/b": Unknown()}, Unknown()]},
            "/items/2/a~1b: Expected a JSON value; got a value of the type Unknown.",
        ),
        (
            [{1: (0, {Unknown()})}],
            "/0/1/1/0: Expected a JSON value; got a value of the type Unknown.",
        ),
        (
            {"rows": [Row("a"), Row("b", Unknown())]},
            "/rows/1/value: Expected a JSON value; got a value of the type Unknown.",
        ),
        (
            {"order": Order(lines=[1, Unknown()])},
            "/order/orderLines/1: Expected a JSON value; got a value of the type Unknown.",
        ),
        (
            {"a": [{Unknown(): 1}]},
            "/a/0: Expected text as the name of a field; got a value of the type Unknown.",
        ),
        (
            {"a": 1, "rows": [iter("abc")]},
            "/rows/0: Expected a JSON value; got a value of the type str_ascii_iterator.",
        ),
        ([[range(3)]], "/0/0: Expected a JSON value; got a value of the type range."),
        (
            [0, (c for c in "a")],
            "/1: Expected a JSON value; got a value of the type gen",
        ),
        ({"call": print}, "/call: Expected a JSON value; got a value of the type builtin_function"),
        ({"all": [Broken()]}, "/all/0/total: LookupError: no total"),
        ([0, b"\xff"], "/1: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position"),
    ],
)
def test_a_result_that_is_not_json_names_the_place_in_it(value: Any, reason: str) -> None:
    refused = result_of(value, max_bytes=1_000)
    assert isinstance(refused, ResultRefused)
    assert refused.reason.startswith(f"The handler's result is not JSON: {reason}")


def test_a_result_that_holds_itself_is_refused() -> None:
    row, plain = Row("a"), Row("b")
    row.value = {"again": [row]}
    refused = result_of({"rows": [row]}, max_bytes=1_000)
    assert isinstance(refused, ResultRefused)
    assert "/rows/0/value/again/0: ValueError: Circular reference" in refused.reason
    plain.value = [[]]
    plain.value[0].append(plain.value)
    refused = result_of([plain], max_bytes=1_000)
    assert isinstance(refused, ResultRefused)
    assert "/0/value/0/0: ValueError: Circular reference" in refused.reason


class OutOfMemory(BaseModel):
    @computed_field
    def field(self) -> str:
        raise MemoryError


def test_memory_that_runs_out_while_a_result_is_converted_is_that_of_the_handler() -> None:
    raised = result_of(OutOfMemory(), max_bytes=100)
    assert isinstance(raised, Raised)
    assert raised.out_of_memory


class Exits(BaseModel):
    @computed_field
    def field(self) -> str:
        sys.exit(3)


def test_a_result_that_exits_while_it_is_converted_is_refused() -> None:
    refused = result_of(Exits(), max_bytes=100)
    assert isinstance(refused, ResultRefused)
    assert "SystemExit: 3" in refused.reason


@pytest.mark.parametrize(
    ("make", "small"),
    [
        (lambda: "x" * (SMALL_BYTES - 2), True),
        (lambda: "x" * (SMALL_BYTES - 1), False),
        (lambda: [0] * (SMALL_BYTES // 2), True),
        (lambda: [0] * (SMALL_BYTES // 2 + 1), False),
        (lambda: [0] * SMALL_BYTES, False),
        (lambda: dict.fromkeys(map(str, range(SMALL_BYTES // 2)), 0), False),
        (lambda: {"k" * (SMALL_BYTES - 5): 0}, True),
        (lambda: {"k" * (SMALL_BYTES - 4): 0}, False),
        (lambda: ((None, True), 1.5), True),
        (Point, False),
        (lambda: [Point()], False),
        (lambda: {"a": {1}}, False),
    ],
)
def test_small_plain_json_is_converted_on_the_event_loop(
    make: Callable[[], Any], small: bool
) -> None:
    assert is_small(make()) is small


def test_progress_that_cannot_be_stored_is_one_warning_and_not_passed_on() -> None:
    passed: list[bytes] = []
    warnings: list[dict[str, Any]] = []

    class Log:
        def warning(self, event: str, **facts: Any) -> None:
            warnings.append({"event": event, **facts})

    progress = Progress(passed.append, Log, max_bytes=20)
    progress.report([1, {"a": "b"}])
    progress.report("x" * 18)
    progress.report([float("nan"), "\0"])
    bad: Any = object()
    progress.report(bad)
    progress.report("x" * 19)
    progress.report(2)
    assert passed == [b'[1,{"a":"b"}]', json.dumps("x" * 18).encode(), b"2"]
    assert warnings == [{"event": "job.progress_refused", "reason": "invalid_text, not_finite"}]
