"""What becomes of a handler's result and progress: which sizes are taken, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, Field, computed_field

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
