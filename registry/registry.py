"""`JobRegistry`: the job types of one process, and the check that every payload passes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from job_registry.errors import (
    DefinitionError,
    JobTypeNotFound,
    PayloadInvalid,
    Violation,
    shortened,
    shortened_text,
)
from job_registry.extension import WorkerExtension
from job_registry.job_type import JobPolicy, JobType, Payload
from job_registry.json_values import MAX_VIOLATIONS, json_document, paths_of, pointer

DEFAULT_MAX_PAYLOAD_BYTES: Final = 262_144


@dataclass(frozen=True, slots=True)
class AdmittedPayload:
    """A payload that is what its job type asks for.

    `payload` is the parsed model. `json` is the compact JSON text, in UTF-8, of what came in:
    that is what is stored, and parsed again before the job runs.
    """

    job_type: JobType[Any]
    payload: Payload
    json: bytes


class JobRegistry(Mapping[str, JobType[Any]]):
    """An immutable mapping of names to job types.

    `max_payload_bytes` bounds a payload's compact JSON text. `extensions` are what workers put
    around the handlers, the outermost first.

    Raises:
        DefinitionError: two job types share a name.
    """

    def __init__(
        self,
        job_types: Iterable[JobType[Any]],
        *,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        extensions: Iterable[WorkerExtension] = (),
    ) -> None:
        by_name: dict[str, JobType[Any]] = {}
        for job_type in job_types:
            if not isinstance(job_type, JobType):
                raise DefinitionError(f"JobRegistry: {shortened(job_type)} is not a JobType")
            if job_type.name in by_name:
                raise DefinitionError(f"JobRegistry: two job types are named {job_type.name}")
            by_name[job_type.name] = job_type
        self._job_types = MappingProxyType(dict(sorted(by_name.items())))
        self._max_payload_bytes = max_payload_bytes
        self._extensions = tuple(extensions)

    @property
    def extensions(self) -> tuple[WorkerExtension, ...]:
        """What workers put around the handlers: middleware and lifespans, the outermost first."""
        return self._extensions

    @property
    def max_payload_bytes(self) -> int:
        """How long a payload's compact JSON text may be, in bytes."""
        return self._max_payload_bytes

    def __getitem__(self, name: str) -> JobType[Any]:
        return self._job_types[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._job_types)

    def __len__(self) -> int:
        return len(self._job_types)

    def get_type(self, job_type: str) -> JobType[Any]:
        """The job type of this name.

        Raises:
            JobTypeNotFound: there is none; the error suggests the nearest names.
        """
        found = self._job_types.get(job_type)
        if found is None:
            near = difflib.get_close_matches(str(job_type)[:100], self._job_types, n=3, cutoff=0.6)
            raise JobTypeNotFound(job_type, tuple(near))
        return found

    def policy(self, job_type: str) -> JobPolicy:
        """The policy of this job type.

        Raises:
            JobTypeNotFound: there is no such job type.
        """
        return self.get_type(job_type).policy

    def admit(self, job_type: str, payload: object) -> AdmittedPayload:
        """Checks a payload, a JSON value as Python has it, against its job type.

        Raises:
            JobTypeNotFound: there is no such job type.
            PayloadInvalid: the payload is invalid; the error holds every fault, up to 100.
        """
        found = self.get_type(job_type)
        text, faults = json_document(payload, max_bytes=self._max_payload_bytes)
        violations = faults
        if text:
            try:
                parsed = found.payload.model_validate_json(text, by_alias=True, by_name=False)
            except ValidationError as error:
                violations = faults + _violations(error, found.payload, paths_of(faults))
            else:
                if not faults:
                    return AdmittedPayload(found, parsed, text)
        raise PayloadInvalid(found.name, _bounded(sorted(violations, key=lambda v: v.path)))

    def validate(self, job_type: str, payload: object) -> Payload:
        """The parsed payload of a job type; raises as `admit`."""
        return self.admit(job_type, payload).payload

    def is_valid(self, job_type: str, payload: object) -> bool:
        """Whether `validate` would give a payload: False as well for an unknown job type."""
        try:
            self.admit(job_type, payload)
        except (JobTypeNotFound, PayloadInvalid):
            return False
        return True


def _bounded(violations: Sequence[Violation]) -> list[Violation]:
    if len(violations) <= MAX_VIOLATIONS:
        return list(violations)
    more = len(violations) - MAX_VIOLATIONS
    last = Violation("", "more", f"{more} more faults are not listed.")
    return [*violations[:MAX_VIOLATIONS], last]


def _violations(
    error: ValidationError, payload: type[Payload], known: frozenset[str]
) -> list[Violation]:
    """Pydantic's findings as violations, less those at spots whose fault is known already."""
    violations: dict[tuple[str, str], Violation] = {}
    for detail in error.errors(include_url=False):
        violation = _violation(detail, payload)
        if violation.path not in known:
            # A union says the same of each of its members.
            violations.setdefault((violation.path, violation.message), violation)
    return list(violations.values())


_CODES: Final = {
    "missing": "required",
    "extra_forbidden": "unknown_field",
    "model_type": "wrong_type",
    "model_attributes_type": "wrong_type",
    "dataclass_type": "wrong_type",
    "dict_type": "wrong_type",
    "list_type": "wrong_type",
    "tuple_type": "wrong_type",
    "set_type": "wrong_type",
    "string_type": "wrong_type",
    "int_type": "wrong_type",
    "float_type": "wrong_type",
    "bool_type": "wrong_type",
    "none_required": "wrong_type",
    "date_type": "wrong_type",
    "datetime_type": "wrong_type",
    "time_type": "wrong_type",
    "time_delta_type": "wrong_type",
    "uuid_type": "wrong_type",
    "decimal_type": "wrong_type",
    "enum": "not_one_of",
    "literal_error": "not_one_of",
    "union_tag_invalid": "not_one_of",
    "union_tag_not_found": "required",
    "greater_than": "out_of_range",
    "greater_than_equal": "out_of_range",
    "less_than": "out_of_range",
    "less_than_equal": "out_of_range",
    "multiple_of": "out_of_range",
    "decimal_max_digits": "out_of_range",
    "decimal_max_places": "out_of_range",
    "decimal_whole_digits": "out_of_range",
    "string_too_short": "too_short",
    "too_short": "too_short",
    "string_too_long": "too_long",
    "too_long": "too_long",
    "string_pattern_mismatch": "pattern_mismatch",
    "value_error": "refused",
    "assertion_error": "refused",
}
"""Pydantic's error types as our codes, which stay when Pydantic renames its own. What is not
here ends in `_parsing`, `_from_date_parsing` and the like, and is `invalid_format`."""

_EXPECTED: Final = {
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "tuple_type": "an array",
    "set_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "decimal_type": "a decimal number written as a string",
    "date_type": 'a date written as a string, "2030-01-31"',
    "datetime_type": 'a time written as a string, "2030-01-31T12:00:00Z"',
    "uuid_type": "a UUID written as a string",
}


def _violation(detail: ErrorDetails, payload: type[Payload]) -> Violation:
    kind, came = detail["type"], detail.get("input")
    location = _fields(kind, detail["loc"])
    path = ""
    for part in location:
        path = pointer(path, part)
    context = detail.get("ctx", {})
    if kind == "missing":
        return Violation(path, "required", "This field is required, and it is missing.")
    if kind == "extra_forbidden":
        return Violation(path, "unknown_field", _unknown_field(location, payload))
    code = _CODES.get(kind, "invalid_format" if "pars" in kind else "refused")
    if kind in ("value_error", "assertion_error"):
        reason = str(context.get("error", detail["msg"])) or detail["msg"]
        return Violation(path, code, f"{shortened_text(reason)} (got {shortened(_json(came))})")
    expected = _expected(kind, detail["msg"])
    return Violation(path, code, f"Expected {expected}, got {_came(came)}.")


def _fields(kind: str, location: tuple[int | str, ...]) -> list[int | str]:
    """Pydantic's location without the steps that name a union's member or a validator.

    The first step is always a field, and so is the last where a field is missing or unknown: that
    one has the name that the caller chose, which may look like anything.
    """
    last = len(location) - 1 if kind in ("missing", "extra_forbidden") else 0
    return [
        part
        for index, part in enumerate(location)
        if index in (0, last) or not (isinstance(part, str) and _is_label(part))
    ]


def _is_label(part: str) -> bool:
    return "[" in part or part in _UNION_LABELS or part.endswith("()")


_UNION_LABELS: Final = frozenset(
    [
        "str",
        "int",
        "float",
        "bool",
        "none",
        "list",
        "dict",
        "decimal",
        "date",
        "datetime",
        "time",
        "uuid",
        "constrained-str",
        "constrained-int",
        "constrained-float",
        "nullable",
    ]
)


def _unknown_field(location: Sequence[int | str], payload: type[Payload]) -> str:
    name = str(location[-1])
    names: list[str] = []
    if len(location) == 1:
        names = [field.alias or field_name for field_name, field in payload.model_fields.items()]
        if name in payload.model_fields:
            alias = payload.model_fields[name].alias
            return f"There is no field {shortened(name)}. Did you mean {alias}?"
    near = difflib.get_close_matches(name[:100], names, n=1, cutoff=0.6)
    return f"There is no field {shortened(name)}." + (f" Did you mean {near[0]}?" if near else "")


def _expected(kind: str, message: str) -> str:
    """What was expected, from Pydantic's sentence: "Input should be greater than 0"."""
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    rest = message.removeprefix("Input should be ")
    if rest != message:
        return f"a number {rest}" if _CODES.get(kind) == "out_of_range" else rest
    for start, what in (
        ("String should match", "a string that matches"),
        ("String should have", "a string of"),
        ("List should have", "an array of"),
        ("Input should have", "a value of"),
        ("Value should have", "a value of"),
    ):
        if message.startswith(start):
            return what + message.removeprefix(start).split(" after validation")[0]
    return f"a valid value ({message})"


def _came(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the string {shortened(value)}"
        case int() | float():
            return f"the number {value!r}"
        case list():
            return "an array"
        case dict():
            return "an object"
    return shortened(value)


def _json(value: object) -> object:
    return str(value) if isinstance(value, Payload) else value
