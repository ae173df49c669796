"""`JobType`: a payload, a policy and a handler under one name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from pydantic import JsonValue, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from job_registry.context import JobContext
from job_registry.errors import DefinitionError, shortened
from job_registry.json_values import json_document
from job_registry.payload import Payload
from job_registry.payload_schema import example_of, fingerprint_of, json_schema_of
from job_registry.policy import JobPolicy
from job_registry.strictness import lax_parts
from job_registry.violations import PayloadShape

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
_MAX_NAME: Final = 100
_MEMORY_LIMITS_MB: Final = range(64, 1_048_577)

P = TypeVar("P", bound=Payload)
R = TypeVar("R")

RunIn = Literal["loop", "thread", "process"]
"""Where a handler runs: on the worker's event loop, in a thread, or in a process of its own."""

Handler = Callable[[JobContext, Any], Awaitable[Any] | Any]


class JobType(Generic[P]):
    """A type of job: its name, the model of its payload, its policy and its handler.

    `name` is lower-case words joined by dots, `thumbnail.create`, at most 100 characters.
    `description` is the payload's docstring unless given. `example` is a payload, as JSON; where
    it is left out one is made from the fields' defaults and `examples`. A type with no handler
    is worked by remote workers.

    `run_in` says where the handler runs: "loop", on the worker's event loop, for `async def`;
    "thread", for plain functions that wait; "process", a process of its own, for what computes,
    may crash, or has to be stopped for certain. Unless given, `async def` runs on the loop and
    everything else in a thread. With "process" the job type must be at the top level of a module,
    because its process imports it from there.

    `memory_limit_mb` is how much memory the handler may use, in units of 1,048,576 bytes, 64 to
    1,048,576: what its process takes beyond the idle process. It needs `run_in="process"`. A
    handler that exceeds it gets a MemoryError, and the attempt fails as `memory_limit_exceeded`. A
    limit that is too low fails jobs that need more memory than usual. Unless given, there is none.

    Raises:
        DefinitionError: the definition is wrong, and says what and where.
    """

    def __init__(
        self,
        *,
        name: str,
        payload: type[P],
        policy: JobPolicy | None = None,
        description: str | None = None,
        example: Mapping[str, JsonValue] | None = None,
        run_in: RunIn | None = None,
        memory_limit_mb: int | None = None,
    ) -> None:
        if not isinstance(name, str) or not is_type_name(name):
            raise DefinitionError(
                f"job type {shortened(name)}: a name is lower-case words (letters, digits, _)"
                f" joined by dots, such as thumbnail.create, at most {_MAX_NAME} characters"
            )
        where = f"job type {name}"
        if not (isinstance(payload, type) and issubclass(payload, Payload)):
            raise DefinitionError(
                f"{where}: payload is {shortened(payload)}, expected a subclass of Payload"
            )
        if policy is not None and not isinstance(policy, JobPolicy):
            raise DefinitionError(f"{where}: policy is {shortened(policy)}, expected a JobPolicy")
        if run_in not in (None, *get_args(RunIn)):
            raise DefinitionError(
                f"{where}: run_in is {shortened(run_in)}, expected loop, thread, process or None"
            )
        if memory_limit_mb is not None:
            if type(memory_limit_mb) is not int or memory_limit_mb not in _MEMORY_LIMITS_MB:
                raise DefinitionError(
                    f"{where}: memory_limit_mb is {shortened(memory_limit_mb)}, expected a whole"
                    f" number of megabytes from {_MEMORY_LIMITS_MB[0]} to"
                    f" {_MEMORY_LIMITS_MB[-1]:,}, or None"
                )
            if run_in != "process":
                raise DefinitionError(
                    f"{where}: memory_limit_mb limits a process of its own; add"
                    ' run_in="process", or leave memory_limit_mb out'
                )
        set_ = object.__setattr__
        set_(self, "run_in", run_in)
        set_(self, "memory_limit_mb", memory_limit_mb)
        set_(self, "name", name)
        set_(self, "payload", payload)
        set_(self, "policy", policy or JobPolicy())
        documentation = description or inspect.getdoc(payload) or ""
        set_(self, "description", "" if documentation == inspect.getdoc(Payload) else documentation)
        set_(self, "_handler", None)
        set_(self, "_example", None if example is None else dict(example))
        self._check_payload_model()
        if example is not None:
            self._check_example(dict(example))

    name: str
    payload: type[P]
    policy: JobPolicy
    description: str
    run_in: RunIn | None
    memory_limit_mb: int | None
    _handler: Handler | None
    _example: dict[str, JsonValue] | None

    def __setattr__(self, attribute: str, _value: object) -> None:
        raise AttributeError(f"a JobType is frozen: {attribute} cannot be set")

    def __delattr__(self, attribute: str) -> None:
        raise AttributeError(f"a JobType is frozen: {attribute} cannot be deleted")

    def __repr__(self) -> str:
        return f"JobType(name={self.name!r}, payload={self.payload.__name__})"

    def handler(self, function: Callable[[JobContext, P], R]) -> Callable[[JobContext, P], R]:
        """Register a function as the handler of this type. Use it as a decorator.

        The function takes the `JobContext` and the parsed payload; what it returns is the job's
        result, as JSON. `run_in` says where it runs. A type checker refuses a function that takes
        another payload.

        Raises:
            DefinitionError: there is a handler already, or this is not a function of two
                arguments, or it cannot run where `run_in` says.
        """
        where = f"job type {self.name}"
        if self._handler is not None:
            raise DefinitionError(f"{where}: it has a handler already, {_named(self._handler)}")
        try:
            inspect.signature(function).bind(None, None)
        except (TypeError, ValueError):
            raise DefinitionError(
                f"{where}: the handler {_named(function)} must take (job, payload)"
            ) from None
        if _is_generator(function):
            raise DefinitionError(
                f"{where}: the handler {_named(function)} yields, so its result would not be JSON;"
                " return the result instead"
            )
        if _has_swapped_arguments(function, self.payload):
            raise DefinitionError(
                f"{where}: the handler {_named(function)} takes (payload, job), expected"
                " (job, payload)"
            )
        if self.run_in == "thread" and is_async(function):
            raise DefinitionError(
                f"{where}: the handler {_named(function)} is async and cannot run in a thread;"
                ' leave run_in out, or use "process"'
            )
        object.__setattr__(self, "_handler", function)
        return function

    @property
    def has_handler(self) -> bool:
        """Whether this process has a handler for the type."""
        return self._handler is not None

    @property
    def run(self) -> Handler | None:
        """The handler. None if remote workers run the jobs."""
        return self._handler

    @property
    def runs_in(self) -> RunIn | None:
        """Where the handler runs, also if `run_in` is not given. None without a handler."""
        if self._handler is None:
            return None
        return self.run_in or ("loop" if is_async(self._handler) else "thread")

    @cached_property
    def payload_schema(self) -> Mapping[str, Any]:
        """The payload's JSON Schema, draft 2020-12, with camelCase names."""
        return MappingProxyType(json_schema_of(self.payload, self.description))

    @cached_property
    def example_payload(self) -> Mapping[str, JsonValue]:
        """A valid payload, as JSON: the given example, or one generated from the schema.

        Raises:
            DefinitionError: none was given, and none could be made.
        """
        if self._example is not None:
            return MappingProxyType(self._example)
        example = example_of(self.payload_schema)
        self._check_example(example)
        return MappingProxyType(example)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the payload's schema demands: 64 hexadecimal digits of SHA-256.

        Titles, descriptions and examples are left out: a better sentence is not another type.
        """
        return fingerprint_of(self.payload_schema)

    @cached_property
    def payload_shape(self) -> PayloadShape:
        """Turns Pydantic's faults of a payload into violations."""
        return PayloadShape(self.payload)

    def _check_payload_model(self) -> None:
        """Check that the payload model is strict, with all its parts, and has a JSON Schema."""
        where = f"job type {self.name}: payload {self.payload.__name__}"
        config = self.payload.model_config
        for option, wanted in (("strict", True), ("frozen", True), ("extra", "forbid")):
            if config.get(option) != wanted:
                raise DefinitionError(f"{where} sets {option}={config.get(option)!r}")
        try:
            self.payload.model_rebuild()
            # Also finds, today and not at the first request, what has no JSON Schema.
            _ = self.payload_schema
        except (PydanticUserError, PydanticSchemaGenerationError, NameError) as error:
            raise DefinitionError(f"{where} has no JSON Schema: {error}") from error
        lax = lax_parts(self.payload)
        if lax:
            raise DefinitionError(f"{where} is not strict in all its parts: {'; '.join(lax)}")
        _ = self.example_payload

    def _check_example(self, example: dict[str, JsonValue]) -> None:
        text, violations = json_document(example, max_bytes=1 << 20)
        if not violations:
            try:
                self.payload.model_validate_json(text, by_alias=True, by_name=False)
            except ValidationError as error:
                violations = self.payload_shape.violations(error, example)
        if violations:
            reason = "; ".join(f"{fault.path}: {fault.message}" for fault in violations)
            advice = (
                ""
                if self._example is not None
                else "; give Field(examples=[...]) or JobType(example=...) a valid one"
            )
            raise DefinitionError(
                f"job type {self.name}: its example payload {shortened(example, 200)} is invalid:"
                f" {reason}{advice}"
            )


def is_type_name(text: str) -> bool:
    """Return whether a job type may have this name."""
    return len(text) <= _MAX_NAME and _NAME.fullmatch(text) is not None


def is_async(function: object) -> bool:
    """Return whether a function, or an object with `__call__`, is defined with `async def`."""
    call = getattr(function, "__call__", None)  # noqa: B004 (an object whose call is async)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _is_generator(function: object) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 (an object whose call yields)
    return any(
        inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each)
        for each in (function, call)
    )


def _has_swapped_arguments(function: Callable[..., Any], payload: type[Payload]) -> bool:
    """Return whether the annotations say (payload, job), or the first argument is `payload`.

    Annotations are compared by name, because those of a module may not be importable at run time.
    """
    parameters = list(inspect.signature(function).parameters.values())[:2]
    names = [_annotation_name(parameter.annotation) for parameter in parameters]
    if parameters and parameters[0].annotation is inspect.Parameter.empty:
        names[0] = payload.__name__ if parameters[0].name.strip("_") == "payload" else ""
    return names[:1] == [payload.__name__] or names[1:] == ["JobContext"]


def _annotation_name(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return text.strip("\"'").partition("[")[0].rpartition(".")[2]


def _named(function: object) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
