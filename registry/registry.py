"""`JobRegistry`: the job types of one process, and the check that every payload passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from job_registry.enqueue_request import EnqueueRequest
from job_registry.errors import (
    DefinitionError,
    FaultBudget,
    JobTypeNotFound,
    PayloadInvalid,
    Violation,
    shortened,
)
from job_registry.extension import WorkerExtension
from job_registry.job_type import JobType
from job_registry.json_values import json_document
from job_registry.payload import Payload, document_of
from job_registry.policy import JobPolicy

DEFAULT_MAX_PAYLOAD_BYTES: Final = 262_144


class AdmittedPayload(NamedTuple):
    """A payload that fits its job type.

    `payload` is the parsed model. `json` is the compact JSON text, in UTF-8, of what came in:
    that is what is stored, and parsed again before the job runs. `fingerprint` is that of the model
    that admitted it: the payload of the type, or an older one that the type accepts. `payload` is
    upgraded then, and `json` is not.
    """

    job_type: JobType[Any]
    payload: Payload
    json: bytes
    fingerprint: str


class JobRegistry(Mapping[str, JobType[Any]]):
    """An immutable mapping of names to job types.

    `max_payload_bytes` bounds a payload's compact JSON text. `extensions` are what workers put
    around the handlers, the outermost first. `suggests` lets errors name similar names and values.

    As a mapping it has the current names. `get_type`, and every method that takes the name of a
    job type, also finds a type by one of its former names.

    Raises:
        DefinitionError: two job types share a name or a former name; the upgrades of a type do not
            lead to its payload; or something is not a job type.
    """

    def __init__(
        self,
        job_types: Iterable[JobType[Any]],
        *,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        extensions: Iterable[WorkerExtension] = (),
        suggests: bool = True,
    ) -> None:
        if not isinstance(job_types, Iterable):
            got = job_types.name if isinstance(job_types, JobType) else shortened(job_types)
            raise DefinitionError(f"JobRegistry: expected a list of job types; got {got}")
        by_name: dict[str, JobType[Any]] = {}
        for job_type in job_types:
            if not isinstance(job_type, JobType):
                raise DefinitionError(f"JobRegistry: {shortened(job_type)} is not a JobType")
            if job_type.name in by_name:
                raise DefinitionError(f"JobRegistry: two job types are named {job_type.name}")
            job_type.check()
            by_name[job_type.name] = job_type
        self._job_types = MappingProxyType(dict(sorted(by_name.items())))
        self._renamed = MappingProxyType(_renamed(self._job_types))
        self._by_payload: dict[type[Payload], list[str]] = {}
        for name, job_type in self._job_types.items():
            for model in (job_type.payload, *job_type.accepts):
                self._by_payload.setdefault(model, []).append(name)
        self._max_payload_bytes = max_payload_bytes
        self._extensions = tuple(extensions)
        self._suggests = suggests

    @property
    def extensions(self) -> tuple[WorkerExtension, ...]:
        """Middleware and lifespans that workers run around the handlers, the outermost first."""
        return self._extensions

    @property
    def suggests(self) -> bool:
        """Whether errors name similar job types, fields and values: "Did you mean ...?"."""
        return self._suggests

    def without_suggestions(self) -> JobRegistry:
        """Return the same registry, whose errors name nothing that the caller did not."""
        return JobRegistry(
            self._job_types.values(),
            max_payload_bytes=self._max_payload_bytes,
            extensions=self._extensions,
            suggests=False,
        )

    def fault_budget(self, given: FaultBudget | None = None) -> FaultBudget:
        """Return the budget for the faults of a request: `given`, or a new one.

        Without `suggests` nothing is compared, so that nothing is suggested.
        """
        budget = given or FaultBudget()
        if not self._suggests:
            budget.comparisons = 0
        return budget

    @property
    def max_payload_bytes(self) -> int:
        """Maximum length of a payload's compact JSON text, in bytes."""
        return self._max_payload_bytes

    def __getitem__(self, name: str) -> JobType[Any]:
        return self._job_types[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._job_types)

    def __len__(self) -> int:
        return len(self._job_types)

    def get_type(self, job_type: str, budget: FaultBudget | None = None) -> JobType[Any]:
        """Return the job type that has this name, or had it.

        Suggestions are charged to the budget of the request.

        Raises:
            JobTypeNotFound: there is none; the error suggests the nearest names.
        """
        found = self._job_types.get(self.current_name(job_type))
        if found is None:
            budget = self.fault_budget(budget)
            raise JobTypeNotFound(job_type, budget.near_types(str(job_type), self._job_types))
        return found

    @property
    def renamed(self) -> Mapping[str, str]:
        """The current name for each former name."""
        return self._renamed

    def current_name(self, job_type: str) -> str:
        """Return the current name of a type that had this name; any other name as it is."""
        return self._renamed.get(job_type, job_type)

    def read(self, job_type: str, payload: bytes | str) -> Payload:
        """Parse a stored payload, JSON text: by the current model, or an older one with upgrades.

        Raises:
            JobTypeNotFound: no job type has this name, or had it.
            PayloadInvalid: no model fits, or an upgrade failed. The violations are those of the
                current model.
        """
        budget = self.fault_budget()
        read: Payload = self.get_type(job_type, budget).read(payload, budget)
        return read

    def request(
        self,
        payload: Payload,
        *,
        job_type: str | None = None,
        priority: int | None = None,
        schedule_at: datetime | None = None,
        max_attempts: int | None = None,
        idempotency_key: str | None = None,
    ) -> EnqueueRequest:
        """Return the request to enqueue a payload as a job of the type that has its class.

        The request has every field of the payload, defaults included: the handler gets what the
        program created, even if a default changes in the meantime. `job_type` is needed only if
        several job types have the same class. The other arguments are those of `EnqueueRequest`.

        Raises:
            DefinitionError: no job type has this class, or several have it and none is given.
            PayloadInvalid: the payload cannot be written as JSON.
            TypeError: `payload` is not an instance of a `Payload`.
        """
        if not isinstance(payload, Payload):
            raise TypeError(f"expected an instance of a Payload; got {shortened(payload)}")
        name = job_type or self.type_of(type(payload))
        try:
            document = document_of(payload)
        except ValueError as error:
            message = f"The payload cannot be written as JSON: {error}"
            raise PayloadInvalid(name, [Violation("", "not_json", message)]) from error
        return EnqueueRequest(name, document, priority, schedule_at, max_attempts, idempotency_key)

    def type_of(self, payload: type[Payload]) -> str:
        """Return the name of the job type that has, or accepts, this class of payload.

        Raises:
            DefinitionError: none has it, or several have it.
        """
        match self._by_payload.get(payload, []):
            case [name]:
                return name
            case []:
                raise DefinitionError(
                    f"no job type of this registry has the payload {payload.__name__}; add its"
                    " job type to the registry"
                )
            case several:
                raise DefinitionError(
                    f"the job types {', '.join(several)} have the payload {payload.__name__};"
                    " give job_type= the name of one"
                )

    def policy(self, job_type: str) -> JobPolicy:
        """Return the policy of a job type.

        Raises:
            JobTypeNotFound: there is no such job type.
        """
        return self.get_type(job_type).policy

    def admit(
        self, job_type: str, payload: object, budget: FaultBudget | None = None
    ) -> AdmittedPayload:
        """Check a payload, a JSON value in Python, against its job type.

        It fits if the current model admits it, or one of the older models in `accepts`. The faults
        are charged to the budget of the request; without `budget`, this payload has one of its own.

        Raises:
            JobTypeNotFound: there is no such job type.
            PayloadInvalid: the payload is invalid; the error holds every fault, up to 100.
        """
        budget = self.fault_budget(budget)
        found = self.get_type(job_type, budget)
        text, faults = json_document(payload, max_bytes=self._max_payload_bytes)
        if not text:
            faults = list(budget.listed("The payload", faults))
        violations = sorted(faults, key=lambda fault: fault.path) if faults else []
        if text:
            try:
                parsed = found.payload.model_validate_json(text, by_alias=True, by_name=False)
            except ValidationError as error:
                if not faults and (admitted := _admitted_older(found, text)):
                    return admitted
                violations = found.payload_shape.violations(error, payload, faults, budget)
            else:
                if not violations:
                    return AdmittedPayload(found, parsed, text, found.payload_fingerprint)
                violations = list(budget.listed("The payload", violations))
        raise PayloadInvalid(found.name, violations)

    def validate(self, job_type: str, payload: object) -> Payload:
        """Return the parsed payload. Raises as `admit` does."""
        return self.admit(job_type, payload).payload


def _renamed(job_types: Mapping[str, JobType[Any]]) -> dict[str, str]:
    """Return the current name for each former name.

    Raises:
        DefinitionError: a former name is that of another type, now or formerly.
    """
    renamed: dict[str, str] = {}
    for name, job_type in job_types.items():
        for former in job_type.former_names:
            if former in job_types:
                raise DefinitionError(
                    f"job type {name}: its former name {former} is the name of another job type;"
                    " rename that one, or leave it out of former_names"
                )
            if former in renamed:
                raise DefinitionError(
                    f"job types {renamed[former]} and {name} both have the former name {former};"
                    " stored jobs can belong to one of them only"
                )
            renamed[former] = name
    return renamed


def _admitted_older(job_type: JobType[Any], text: bytes) -> AdmittedPayload | None:
    """Return the payload of a client that sent a form that the type accepts."""
    if not job_type.accepts:
        return None
    admitted = job_type.admit_older(text)
    return admitted and AdmittedPayload(job_type, admitted[0], text, admitted[1])
