"""Exceptions that clients see: a stable code, and details that are JSON in camelCase."""

from __future__ import annotations

import re

import pytest
from pydantic import JsonValue
from pydantic_core import from_json, to_json

from job_registry import CodedError, JobTypeNotFound, PayloadInvalid, Violation
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
