"""Compiled operations live in the bounded cache of documents."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from graphql import parse

from job_registry import JobRegistry
from job_registry_api.auth import ANYONE, Caller
from job_registry_api.graphql import admission, execution
from job_registry_api.graphql.admission import Admission
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.document_limits import Limits
from job_registry_api.graphql.execution import Executor
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.queue import JobQueue

TEXT = "query One { jobTypes { name } } query Two { jobTypes { description } }"


@pytest.fixture
def executor(registry: JobRegistry, monkeypatch: pytest.MonkeyPatch) -> Executor:
    monkeypatch.setattr(execution, "USES_TO_COMPILE", 2)
    return Executor(Admission(registry), Limits())


def is_compiled(
    executor: Executor, text: str = TEXT, name: str | None = "One", caller: Caller = ANYONE
) -> bool:
    prepared = executor.prepare({"query": text, "operationName": name}, caller)
    return prepared.compiled is not None


def test_an_operation_is_compiled_at_its_second_use(executor: Executor) -> None:
    assert [is_compiled(executor) for _ in range(3)] == [False, True, True]
    assert [is_compiled(executor, name="Two") for _ in range(3)] == [False, True, True]


def test_subscriptions_and_introspection_are_never_compiled(executor: Executor) -> None:
    for text in ("subscription { jobEvents { __typename } }", "{ __schema { description } }"):
        assert [is_compiled(executor, text, None) for _ in range(3)] == [False] * 3


def test_what_was_not_used_for_the_longest_time_makes_room_for_what_is_compiled(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{{ a{number}: jobTypes {{ name }} }}" for number in range(3)]
    sizes = [
        execution.BYTES_PER_TOKEN * parse(text).token_count + sys.getsizeof(text) for text in texts
    ]
    monkeypatch.setattr(execution, "MAX_CACHED_BYTES", sum(sizes) + 100)
    for text in texts:
        is_compiled(executor, text, None)
    assert is_compiled(executor, texts[0], None)
    assert not is_compiled(executor, texts[1], None)


async def test_what_is_compiled_for_the_values_of_variables_makes_room_too(
    executor: Executor, registry: JobRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        "query ($a: Boolean!) { jobTypes @include(if: $a) { name description } }",
        "{ jobTypes { name } }",
    ]
    sizes = [
        execution.BYTES_PER_TOKEN * parse(text).token_count + sys.getsizeof(text) for text in texts
    ]
    monkeypatch.setattr(execution, "MAX_CACHED_BYTES", sum(sizes) + 100)
    queue = JobQueue(registry, open_database(f"sqlite:///{tmp_path / 'unused.db'}"))
    for text in reversed(texts):
        assert not is_compiled(executor, text, None)
    prepared = executor.prepare({"query": texts[0]}, ANYONE)
    assert prepared.compiled is not None
    result = await executor.execute(prepared, {"a": True}, Context(queue, ANYONE))
    assert result.errors is None
    assert not is_compiled(executor, texts[1], None)


def test_a_schema_that_is_no_longer_kept_takes_its_operations_along(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_SCHEMAS", 1)
    one, other = (
        Caller("ada", frozenset({"jobs:read"}), frozenset({name}))
        for name in ("test.ping", "test.pong")
    )
    for _ in range(2):
        is_compiled(executor, caller=one)
    assert is_compiled(executor, caller=one)
    assert not is_compiled(executor, caller=other)
    assert not is_compiled(executor, caller=one)
