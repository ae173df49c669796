"""`registry.lock.json`: the job types as they were last released."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field, JsonValue, ValidationError

from job_registry.errors import escaped, shortened
from job_registry.job_type import JobType
from job_registry.json_values import NotJson, parse_json
from job_registry.payload import Payload
from job_registry.payload_schema import demands_of, json_schema_of
from job_registry.violations import PayloadShape

LOCK_FORMAT: Final = 1
"""It is raised when a reader of the previous format would misread the file."""

MAX_LOCK_BYTES: Final = 32 * 1024 * 1024


class LockInvalid(Exception):
    """Raised when a text is not a lock of this format. The message says where and why."""


class OlderForm(Payload):
    """An older model of a payload that a job type still reads.

    `accepted` says whether clients may still enqueue it.
    """

    model: str
    accepted: bool
    payload_schema: dict[str, JsonValue]


class ReleasedType(Payload):
    """What a job type promised when it was released.

    `payload_schema` has what the schema demands, without titles and descriptions. `policy` has the
    fields of the policy in camelCase; a release may lack fields that were added later.
    """

    fingerprint: str
    has_handler: bool
    payload_schema: dict[str, JsonValue]
    policy: dict[str, JsonValue]
    former_names: list[str] = Field(default=[])
    older_forms: list[OlderForm] = Field(default=[])


class _LockFile(Payload):
    format: Literal[1]
    job_types: dict[str, ReleasedType]
    graphql: list[str] = Field(default=[])


ReleasedTypes = Mapping[str, ReleasedType]
"""Job types as they were released, by name."""


@dataclass(frozen=True, slots=True)
class Lock:
    """The job types of a release, and its GraphQL schema as SDL; an empty text if it has none."""

    job_types: ReleasedTypes
    graphql: str = ""


def released_types(job_types: Iterable[JobType[Any]]) -> ReleasedTypes:
    """Return what these job types promise now."""
    return {job_type.name: _released(job_type) for job_type in job_types}


def lock_text(lock: Lock) -> str:
    """Return the text of a lock, one line per promise. The same promises give the same text."""
    content = {
        "format": LOCK_FORMAT,
        "jobTypes": _sorted({
            name: released.model_dump(mode="json", by_alias=True)
            for name, released in lock.job_types.items()
        }),
        # One line per item, so that a difference is readable.
        "graphql": lock.graphql.splitlines(),
    }  # fmt: skip
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # Only strings contain characters that do not print, and JSON escapes them in the same way.
    return "\n".join(escaped(line) for line in text.split("\n")) + "\n"


def read_lock(text: str | bytes) -> Lock:
    """Return the lock in a text.

    Raises:
        LockInvalid: it is not JSON, has another format, or lacks something.
    """
    if len(text) > MAX_LOCK_BYTES:
        raise LockInvalid(f"Expected at most {MAX_LOCK_BYTES:,} bytes; it has more.")
    try:
        document = parse_json(text, "It")
    except NotJson as error:
        raise LockInvalid(f"{error}.") from None
    if not isinstance(document, dict):
        raise LockInvalid(f"Expected a JSON object; got {shortened(document)}.")
    if document.get("format") != LOCK_FORMAT:
        raise LockInvalid(
            f"/format: Expected {LOCK_FORMAT}, the format of this version of Job Registry; got"
            f" {shortened(document.get('format'))}."
        )
    try:
        lock = _LockFile.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        faults = PayloadShape(_LockFile).violations(error, document)
        raise LockInvalid(" ".join(each.sentence() for each in faults[:3])) from None
    return Lock(lock.job_types, "\n".join(lock.graphql) + "\n" if lock.graphql else "")


def _released(job_type: JobType[Any]) -> ReleasedType:
    older = [
        OlderForm(
            model=model.__name__,
            accepted=model in job_type.accepts,
            payload_schema=demands_of(json_schema_of(model, "")),
        )
        for model in job_type.older_payloads
    ]
    return ReleasedType(
        fingerprint=job_type.fingerprint,
        has_handler=job_type.has_handler,
        payload_schema=demands_of(job_type.payload_schema),
        policy=job_type.policy.as_json(),
        former_names=sorted(job_type.former_names),
        older_forms=sorted(older, key=lambda form: form.model),
    )


def _sorted(value: Any) -> Any:
    """Return a JSON value whose objects have their keys in order."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value
