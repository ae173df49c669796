"""Exceptions that clients see: a stable code, and details that are JSON in camelCase."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from pydantic import JsonValue
from pydantic_core import from_json, to_json

from job_registry import CodedError, JobTypeNotFound, PayloadInvalid, Retry, Snooze, Violation
from job_registry.errors import FaultBudget, escaped, near, shortened, shortened_text
from job_registry.json_values import NotJson
from job_registry_api.auth import Forbidden, TooManyRequests, Unauthenticated
from job_registry_api.queue.errors import (
    EventsMissed,
    IdempotencyKeyTaken,
    InputInvalid,
    JobNotFound,
    JobStateConflict,
    LeaseLost,
    QueueUnavailable,
)
from job_registry_api.queue.models import JobStatus
from job_registry_api.signing_keys import AuthenticationUnavailable

FAULT = Violation("/a~1b", "required", "This field is required.")
FAULT_JSON = {"path": "/a~1b", "code": "required", "message": "This field is required."}


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        (
            JobTypeNotFound("a" * 300, ("b",)),
            "job_type_not_found",
            {"jobType": "a" * 200, "suggestions": ["b"]},
        ),
        (
            PayloadInvalid("a", [FAULT]),
            "payload_invalid",
            {"jobType": "a", "violations": [FAULT_JSON]},
        ),
        (NotJson("no"), "not_json", {}),
        (InputInvalid((FAULT,)), "validation_error", {"violations": [FAULT_JSON]}),
        (JobNotFound("x"), "job_not_found", {"jobId": "x"}),
        (
            JobStateConflict("x", JobStatus.FAILED, "cancelled"),
            "job_state_conflict",
            {"jobId": "x", "status": "failed"},
        ),
        (LeaseLost(), "lease_lost", {}),
        (EventsMissed("it is late"), "events_missed", {}),
        (QueueUnavailable("host db-1", "disk_full"), "queue_unavailable", {"kind": "disk_full"}),
        (Unauthenticated(None), "unauthenticated", {}),
        (Forbidden("no"), "forbidden", {}),
        (TooManyRequests("1 request per minute", 7), "rate_limited", {"retryAfterSeconds": 7}),
        (AuthenticationUnavailable(), "authentication_unavailable", {}),
    ],
)
def test_an_error_carries_its_code_and_its_details(
    error: CodedError, code: str, details: dict[str, JsonValue]
) -> None:
    assert (error.code, error.details()) == (code, details)
    assert from_json(to_json(error.details())) == details


def test_an_error_says_what_is_wrong_and_how_often() -> None:
    assert str(JobTypeNotFound("a")) == 'There is no job type "a".'
    assert str(JobTypeNotFound("a", ("b", "c"))).endswith(" Did you mean b or c?")
    whole = Violation("", "not_json", "Expected JSON.")
    assert str(PayloadInvalid("a", [FAULT, whole])) == (
        "The payload of a is invalid: /a~1b: This field is required. payload: Expected JSON."
    )
    assert PayloadInvalid("a", [FAULT]).summary == "The payload has 1 fault."
    assert PayloadInvalid("a", [FAULT] * 2).summary == "The payload has 2 faults."
    assert PayloadInvalid("a", []).summary == "The payload has 0 faults."


YEAR = 31_536_000


@pytest.mark.parametrize("seconds", [0, 0.5, YEAR])
def test_a_handler_may_delay_its_job_by_up_to_a_year(seconds: float) -> None:
    assert Retry("later", after=seconds).after == Snooze(seconds).seconds == seconds


@pytest.mark.parametrize(
    "seconds", [-0.5, -1, YEAR + 1, float("nan"), float("inf"), "5", timedelta(seconds=5)]
)
def test_another_delay_is_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match="Retry: after is .*, expected 0 to 31,536,000"):
        Retry(after=seconds)
    with pytest.raises(ValueError, match="Snooze: seconds is .*, expected 0 to 31,536,000"):
        Snooze(seconds)


def test_a_retry_may_leave_the_delay_to_the_policy() -> None:
    assert Retry().after is None
    assert str(Retry()) == "The handler requested a retry."
    assert str(Retry("later")) == "later"


def test_a_budget_lists_faults_until_it_is_spent() -> None:
    budget = FaultBudget(faults=3)
    assert budget.listed("It", []) == ()
    assert budget.listed("It", [FAULT, FAULT]) == (FAULT, FAULT)
    assert budget.faults == 1
    # What is left is enough for the next ones, however many they are.
    assert budget.listed("It", [FAULT, FAULT]) == (FAULT, FAULT)
    assert budget.is_spent
    (more,) = budget.listed("It", [FAULT])
    assert (more.path, more.code) == ("", "more")
    assert more.message.startswith("It has 1 fault. They are not listed")


def test_a_budget_charges_the_text_of_faults_and_those_that_were_read() -> None:
    size = len(FAULT.path) + len(FAULT.message)
    budget = FaultBudget(characters=2 * size + 1)
    budget.listed("It", [FAULT, FAULT])
    assert (budget.characters, budget.is_spent) == (1, False)
    budget.listed("It", [FAULT])
    assert budget.is_spent
    budget = FaultBudget()
    budget.listed("It", [FAULT, FAULT], examined=40)
    budget.listed("It", [FAULT, FAULT], examined=4)
    assert budget.faults == 1_000 - 10 - 2


def test_similar_names_are_suggested_until_the_comparisons_are_spent() -> None:
    names = ["payout.execute", "payout.executed", "thumbnail.create"]
    assert near("payout.exeute", names) == ("payout.execute",)
    assert near("payout.exeute", names, count=2) == ("payout.execute", "payout.executed")
    assert near("x", names) == ()
    assert near("PAYOUT.EXECUTE", names) == ("payout.execute",)
    assert near("assetid", ["assetId"]) == ("assetId",)
    budget = FaultBudget(comparisons=4)
    assert budget.suggestion("payout.exeute", names) == " Did you mean payout.execute?"
    assert budget.near("payout.exeute", names, count=2) == names_of("execute", "executed")
    assert budget.near("payout.exeute", names) == ()
    assert budget.suggestion("x", names) == budget.suggestion("payout.execute", names) == ""


def names_of(*ends: str) -> tuple[str, ...]:
    return tuple(f"payout.{end}" for end in ends)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (10, "10"),
        (1.5, "1.5"),
        ("abc", '"abc"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("a\x1bb", '"a\\u001bb"'),
        ("é", '"é"'),
        ([1, "a", None], '[1, "a", null]'),
        ([], "[]"),
        ({"a": 1, "b": [2]}, '{"a": 1, "b": [2]}'),
        (2**1_000, "an integer of 1,001 bits"),
        (2**1_000 - 1, f"{str(2**1_000)[:19]}…"),
        (int, "int"),
        (object(), "a value of the type…"),
        ("x" * 18, f'"{"x" * 18}"'),
        ("x" * 19, f'"{"x" * 18}…'),
    ],
)
def test_a_value_is_shown_as_short_json(value: Any, text: str) -> None:
    limit = 24 if isinstance(value, int) and value == 2**1_000 else 20
    assert shortened(value, limit) == text


def test_what_a_terminal_could_act_on_is_escaped() -> None:
    assert escaped('plain "é"') == 'plain "é"'
    assert escaped('a\n"b"\x1b[0m') == 'a\\n"b"\\u001b[0m'


def test_a_sentence_is_truncated() -> None:
    assert shortened_text("x" * 10, 10) == "x" * 10
    assert shortened_text("x" * 11, 10) == "x" * 9 + "…"


def test_codes_are_snake_case_and_each_belongs_to_one_error() -> None:
    found: list[type[CodedError]] = []
    waiting = [CodedError]
    while waiting:
        below = waiting.pop().__subclasses__()
        found += [kind for kind in below if "code" in vars(kind)]
        waiting += below
    # To a caller who may not know the job with the key, it is the same conflict.
    codes = [kind.code for kind in found if kind is not IdempotencyKeyTaken]
    assert len(codes) >= 13
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", code) for code in codes)
