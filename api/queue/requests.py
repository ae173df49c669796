"""The checks of arguments that need no database."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, cast

from pydantic import JsonValue

from job_registry import EnqueueRequest, JobRegistry, JobTypeNotFound, Violation
from job_registry.errors import MAX_DELAY_SECONDS, FaultBudget, shortened
from job_registry.json_values import MAX_POINTER, MAX_VIOLATIONS, pointer, pointer_of, text_fault
from job_registry.wire_text import parse_date_time
from job_registry_api.queue.errors import InputInvalid, JobNotFound

MAX_LEASE: Final = 100
MAX_WAIT_SECONDS: Final = 30
MAX_READABLE: Final = 1_000
"""How many fingerprints a worker can name."""

_FINGERPRINT: Final = re.compile("[0-9a-f]{64}", re.ASCII)

EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""The range of `scheduleAt`. Its year then has four digits in every offset and database."""


_TIME: Final = "a date and time with an offset from UTC"


def read_request(
    value: object, budget: FaultBudget
) -> tuple[EnqueueRequest | None, tuple[Violation, ...]]:
    """Return the request of a JSON object's sound fields, and the faults of the others.

    The fields are those of `EnqueueJobInput`. Faults are that one is missing, unknown or of the
    wrong type: ranges and the payload are checked when the job is enqueued. The request is None if
    the type or the payload is faulty. Raises nothing.
    """
    if not isinstance(value, Mapping):
        message = f"Expected an object with type and payload; got {shortened(value)}."
        return None, budget.listed("The request", [Violation("", "wrong_type", message)])
    faults: list[Violation] = []
    unknown = [str(name) for name in value if name not in _FIELDS]
    listed = 0 if budget.is_spent else MAX_VIOLATIONS
    for name in unknown[:listed]:
        message = f"There is no field {shortened(name)}.{budget.suggestion(name, _FIELDS)}"
        at = pointer("", name) if len(name) <= MAX_POINTER else ""
        faults.append(Violation(at, "unknown_field", message))
    if len(unknown) > listed:
        more = len(unknown) - listed
        faults.append(Violation("", "more", f"{more:,} more faults are not listed."))
    given: dict[str, Any] = {}
    for name, (attribute, kind, expected) in _FIELDS.items():
        at = pointer("", name)
        came = value.get(name)
        if came is None and name not in ("type", "payload"):
            continue
        if name not in value:
            faults.append(
                Violation(at, "required", f"The required field {shortened(name)} is missing.")
            )
        elif kind is int and isinstance(came, float) and came.is_integer():
            given[attribute] = int(came)
        elif not isinstance(came, kind) or (kind is int and isinstance(came, bool)):
            message = f"Expected {expected}; got {shortened(came)}."
            faults.append(Violation(at, "wrong_type", message))
        elif name == "scheduleAt":
            try:
                given[attribute] = parse_date_time(str(came))
            except ValueError:
                message = f"Expected {expected}; got {shortened(came)}."
                faults.append(Violation(at, "invalid_format", message))
        else:
            given[attribute] = came
    request = EnqueueRequest(**given) if {"type", "payload"} <= given.keys() else None
    return request, budget.listed("The request", faults)


_FIELDS: Final[dict[str, tuple[str, Any, str]]] = {
    "type": ("type", str, "the name of a job type"),
    "payload": ("payload", object, "any JSON"),
    "priority": ("priority", int, "a whole number from 0 to 100"),
    "scheduleAt": ("schedule_at", str, f"{_TIME} in RFC 3339, such as 2030-01-31T12:00:00Z"),
    "maxAttempts": ("max_attempts", int, "a whole number from 1 to 1,000"),
    "idempotencyKey": ("idempotency_key", str, "a string of 1 to 255 characters"),
}


def input_faults(request: EnqueueRequest) -> Iterator[Violation]:
    """Yield the faults of a request outside its payload.

    A Python program may give any value. SQLite would store 1.5 as a priority.
    """
    for path, value, low, high in (
        ("/priority", request.priority, 0, 100),
        ("/maxAttempts", request.max_attempts, 1, 1_000),
    ):
        if value is None:
            continue
        # True counts as 1 in Python, and as no number in PostgreSQL.
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not low <= value <= high:
            yield Violation(
                path,
                "out_of_range" if is_whole else "wrong_type",
                f"Expected a whole number from {low} to {high:,}; got {shortened(value)}.",
            )
    at: Any = request.schedule_at
    if at is not None:
        if not isinstance(at, datetime):
            message = f"Expected a datetime with an offset from UTC; got {shortened(at)}."
            yield Violation("/scheduleAt", "wrong_type", message)
        elif at.tzinfo is None:
            yield Violation(
                "/scheduleAt",
                "time_zone_missing",
                f"Expected {_TIME}, such as 2030-01-31T12:00:00Z; got {at.isoformat()}.",
            )
        elif not EARLIEST <= at < LATEST:
            yield Violation(
                "/scheduleAt",
                "out_of_range",
                f"Expected a time from {EARLIEST.year} to {LATEST.year - 1} in UTC;"
                f" got {at.isoformat()}.",
            )
    key: Any = request.idempotency_key
    if key is not None:
        if fault := _length_fault("/idempotencyKey", key):
            yield fault
        elif reason := text_fault(key):
            yield Violation("/idempotencyKey", "invalid_text", reason)


def _length_fault(path: str, value: Any) -> Violation | None:
    """Return the fault of a value that is not a string of 1 to 255 characters."""
    expected = "Expected a string of 1 to 255 characters"
    if not isinstance(value, str):
        return Violation(path, "wrong_type", f"{expected}; got {shortened(value)}.")
    if not 1 <= len(value) <= 255:
        return Violation(path, "out_of_range", f"{expected}; got {len(value):,} characters.")
    return None


def creator_faults(created_by: Any) -> Iterator[Violation]:
    """Yield the faults of the subject that enqueues a job.

    SQLite would store a number, and an index of PostgreSQL cannot have a long text.
    """
    if created_by is None:
        return
    if not isinstance(created_by, str):
        message = f"Expected a string; got {shortened(created_by)}."
        yield Violation("/createdBy", "wrong_type", message)
    elif fault := text_fault(created_by):
        yield Violation("/createdBy", "invalid_text", fault)
    elif len(created_by) > 255:
        message = f"Expected at most 255 characters; got {len(created_by):,}."
        yield Violation("/createdBy", "out_of_range", message)


def check_lease(
    registry: JobRegistry,
    job_types: Sequence[str],
    worker_id: str,
    limit: int,
    wait: float,
    readable: Mapping[str, Collection[str]],
    budget: FaultBudget | None = None,
) -> None:
    """Check the arguments of a lease.

    Raises:
        InputInvalid: a value is out of range; lists every fault.
    """
    faults = unknown_types(registry, job_types, budget)
    if not faults and not job_types:
        message = "Expected an array of at least 1 job type; got none."
        faults.append(Violation("/jobTypes", "too_short", message))
    faults += _worker_id_faults(worker_id)
    faults += size_faults("/limit", limit, MAX_LEASE)
    faults += seconds_faults("/waitSeconds", wait, MAX_WAIT_SECONDS)
    if is_list(job_types):
        faults += _readable_faults(job_types, readable)
    if faults:
        raise InputInvalid(tuple(faults))


def _readable_faults(
    job_types: Sequence[str], readable: Mapping[str, Collection[str]]
) -> Iterator[Violation]:
    if sum(map(len, readable.values())) > MAX_READABLE:
        message = f"Expected at most {MAX_READABLE} fingerprints."
        yield Violation("/fingerprints", "too_long", message)
    elif not all(_FINGERPRINT.fullmatch(each) for some in readable.values() for each in some):
        message = "Expected fingerprints of 64 hexadecimal digits, such as `jobType` has."
        yield Violation("/fingerprints", "invalid_format", message)
    for name in list(readable)[:MAX_VIOLATIONS]:
        if name not in job_types:
            message = f"Expected a type that jobTypes has; got {shortened(name)}."
            yield Violation("/fingerprints", "job_type_not_found", message)


def check_worker_id(worker_id: str) -> None:
    """Check the id of a worker.

    Raises:
        InputInvalid: it does not have 1 to 255 characters.
    """
    if faults := _worker_id_faults(worker_id):
        raise InputInvalid(tuple(faults))


def _worker_id_faults(worker_id: Any) -> list[Violation]:
    message = "Expected a string of 1 to 255 characters without NUL."
    if not isinstance(worker_id, str):
        return [Violation("/workerId", "wrong_type", message)]
    if 1 <= len(worker_id) <= 255 and not text_fault(worker_id):
        return []
    return [Violation("/workerId", "out_of_range", message)]


def check_error_code(code: Any) -> None:
    """Check the code of the error of an attempt. On PostgreSQL an index cannot have a long one.

    Raises:
        InputInvalid: it does not have 1 to 255 characters.
    """
    if fault := _length_fault("/error/code", code):
        raise InputInvalid((fault,))


def unknown_types(
    registry: JobRegistry, job_types: Iterable[str], budget: FaultBudget | None = None
) -> list[Violation]:
    """Return a violation for each name without a job type, up to 100 and one for the rest.

    Suggestions are charged to the budget of the request.
    """
    if not is_list(job_types):
        message = f"Expected a list of names of job types; got {shortened(job_types)}."
        return [Violation("/jobTypes", "wrong_type", message)]
    budget = registry.fault_budget(budget)
    faults: list[Violation] = []
    more = 0
    for index, name in enumerate(cast("Iterable[Any]", job_types)):
        if not isinstance(name, str):
            faults.append(_no_name(f"/jobTypes/{index}", name))
            continue
        if name in registry or name in registry.renamed:
            continue
        if len(faults) == MAX_VIOLATIONS:
            more += 1
            continue
        unknown = JobTypeNotFound(name, budget.near_types(name, registry))
        faults.append(Violation(f"/jobTypes/{index}", unknown.code, str(unknown)))
    if more:
        faults.append(Violation("/jobTypes", "more", f"{more:,} more faults are not listed."))
    return faults


def check_seconds(field: str, seconds: float) -> None:
    """Check a delay.

    Raises:
        InputInvalid: the delay is negative or longer than a year.
    """
    if faults := seconds_faults(f"/{field}", seconds, MAX_DELAY_SECONDS):
        raise InputInvalid(faults)


def seconds_faults(path: str, seconds: Any, most: float) -> tuple[Violation, ...]:
    """Return the fault of a number of seconds, which is from 0 to `most`."""
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if is_number and 0 <= seconds <= most:
        return ()
    up_to = f" from 0 to {most:,}" if most < math.inf else ""
    message = f"Expected a number of seconds{up_to}; got {shortened(seconds)}."
    return (Violation(path, "out_of_range" if is_number else "wrong_type", message),)


def size_faults(path: str, size: Any, most: int) -> tuple[Violation, ...]:
    """Return the fault of a number of jobs, which is from 1 to `most`."""
    is_whole = isinstance(size, int) and not isinstance(size, bool)
    if is_whole and 1 <= size <= most:
        return ()
    message = f"Expected a whole number from 1 to {most:,}; got {shortened(size)}."
    return (Violation(path, "out_of_range" if is_whole else "wrong_type", message),)


def is_list(values: object) -> bool:
    """Return whether these are several values. A text is one, although it has characters."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)


def type_faults(path: str, name: object) -> tuple[Violation, ...]:
    """Return the fault of the name of a job type that is not text."""
    return () if isinstance(name, str) else (_no_name(path, name),)


def _no_name(path: str, name: object) -> Violation:
    message = f"Expected the name of a job type; got {shortened(name)}."
    return Violation(path, "wrong_type", message)


def checked_ids(job_ids: Iterable[uuid.UUID]) -> list[uuid.UUID]:
    """Return the ids of jobs.

    Raises:
        InputInvalid: one is not a UUID; lists the first faults.
    """
    if not is_list(job_ids):
        message = f"Expected a list of ids of jobs; got {shortened(job_ids)}."
        raise InputInvalid((Violation("/jobIds", "wrong_type", message),))
    ids = list(job_ids)
    faults = (
        Violation(
            f"/jobIds/{index}",
            "wrong_type",
            f"Expected the id of a job as a uuid.UUID; got {shortened(job_id)}.",
        )
        for index, job_id in enumerate(ids)
        if not isinstance(job_id, uuid.UUID)
    )
    if listed := tuple(islice(faults, MAX_VIOLATIONS)):
        raise InputInvalid(listed)
    return ids


MAX_DIFFERING: Final = 100


def differing_paths(one: JsonValue, other: JsonValue, most: int = MAX_DIFFERING) -> tuple[str, ...]:
    """Return JSON Pointers (RFC 6901) to the first places where two values differ. 1 equals 1.0."""
    found = islice(_differences(one, other, []), most)
    return tuple(found)


def _differences(one: JsonValue, other: JsonValue, path: list[str | int]) -> Iterator[str]:
    """Yield the pointer of each difference. `path` is where the two values are."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            path.append(key)
            if key in one and key in other:
                yield from _differences(one[key], other[key], path)
            else:
                yield pointer_of(path)
            path.pop()
        return
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            path.append(index)
            yield from _differences(left, right, path)
            path.pop()
        return
    if isinstance(one, float) != isinstance(other, float) and _are_numbers(one, other):
        # JSONB stores 4.354964846572381e+16 as 43549648465723810, an integer.
        one, other = float(cast(float, one)), float(cast(float, other))
    if one != other or isinstance(one, bool) != isinstance(other, bool):
        yield pointer_of(path)


def _are_numbers(*values: object) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def parse_job_id(job_id: str | uuid.UUID) -> uuid.UUID:
    """Parse the id of a job.

    Raises:
        JobNotFound: it is not a UUID, so no job has it.
        InputInvalid: it is neither text nor a UUID.
    """
    if isinstance(job_id, uuid.UUID):
        return job_id
    if not isinstance(job_id, str):
        message = f"Expected the id of a job, as text or a uuid.UUID; got {shortened(job_id)}."
        raise InputInvalid((Violation("/jobId", "wrong_type", message),))
    try:
        return uuid.UUID(job_id)
    except ValueError:
        raise JobNotFound(job_id) from None
