"""`JobType`, what it is made of, and the `JobContext` that its handler is given."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from job_registry.errors import DefinitionError, shortened
from job_registry.json_values import json_document

JSON_SCHEMA_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
_MAX_NAME: Final = 100


# Above its user, because making the class below calls them.
def _decimals_as_text(schema: Any) -> Any:
    """The core schema in which every decimal comes as a JSON string, wherever it stands."""
    if isinstance(schema, dict):
        walked = {
            key: value if key in ("metadata", "default") else _decimals_as_text(value)
            for key, value in schema.items()
        }
        if walked.get("type") == "decimal":
            return core_schema.no_info_before_validator_function(
                _decimal_text, cast(CoreSchema, walked)
            )
        return walked
    if isinstance(schema, list):
        return [_decimals_as_text(value) for value in schema]
    if isinstance(schema, tuple):
        return tuple(_decimals_as_text(value) for value in schema)
    return schema


def _decimal_text(value: object) -> object:
    if isinstance(value, str):
        try:
            return Decimal(value)
        except InvalidOperation:
            raise PydanticKnownError("decimal_parsing") from None
    if not isinstance(value, Decimal):
        raise PydanticKnownError("decimal_type")
    return value


class Payload(BaseModel):
    """Base of every payload: strict, frozen, camelCase on the wire, unknown fields refused.

    Strict means that "1" is no number, 1 is no string, and true is no number. A payload is always
    validated as JSON, so dates, times, UUIDs and decimals come as JSON strings; a decimal as a
    JSON number is refused, because a number has lost digits before it gets here.
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
        # What comes in is JSON, where these do not exist.
        allow_inf_nan=False,
        regex_engine="rust-regex",
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return cast(CoreSchema, _decimals_as_text(handler(source)))


P = TypeVar("P", bound=Payload)


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a job waits after a failed attempt: `base * 2^(n-1)` seconds, at most the cap.

    With half jitter: a random share of the second half is left out, so that jobs that failed
    together do not come back together. `base_seconds` is 0 to 86,400, `cap_seconds` 0 to 31
    days and not below the base.
    """

    base_seconds: float = 2.0
    cap_seconds: float = 3_600.0

    def __post_init__(self) -> None:
        faults = [
            *_range_fault("base_seconds", self.base_seconds, 0, 86_400, (int, float)),
            *_range_fault("cap_seconds", self.cap_seconds, 0, 31 * 86_400, (int, float)),
        ]
        if not faults and self.cap_seconds < self.base_seconds:
            faults = [f"cap_seconds {self.cap_seconds} is below base_seconds {self.base_seconds}"]
        if faults:
            raise DefinitionError(f"Backoff: {'; '.join(faults)}")

    def delay_seconds(self, attempt: int, jitter: float) -> float:
        """The wait after attempt number `attempt`, counted from 1.

        `jitter`, 0 to 1, picks between half the wait and the whole of it. The queue computes the
        same in SQL when it ends an attempt.
        """
        whole = min(self.cap_seconds, self.base_seconds * float(1 << min(attempt - 1, 40)))
        return whole * (0.5 + 0.5 * jitter)


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """What the queue enforces for jobs of a type.

    `max_attempts`, 1 to 1000: how often a job runs at most, the first run included.
    `timeout_seconds`, 1 to 604,800: how long one attempt may take.
    `concurrency_limit`, 1 to 100,000 or None: how many jobs of the type run at once, over all
    workers on all machines. None is no limit.
    """

    max_attempts: int = 3
    timeout_seconds: int = 300
    concurrency_limit: int | None = None
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        faults = [
            *_range_fault("max_attempts", self.max_attempts, 1, 1_000, (int,)),
            *_range_fault("timeout_seconds", self.timeout_seconds, 1, 604_800, (int,)),
        ]
        if self.concurrency_limit is not None:
            faults += _range_fault("concurrency_limit", self.concurrency_limit, 1, 100_000, (int,))
        if not isinstance(self.backoff, Backoff):
            faults.append(f"backoff is {shortened(self.backoff)}, expected a Backoff")
        if faults:
            raise DefinitionError(f"JobPolicy: {'; '.join(faults)}")


class JobLogger(Protocol):
    """A logger that says of each line which job, type and attempt wrote it.

    An event is a short name; what it is about comes as named values.
    """

    def debug(self, event: str, **values: Any) -> Any:
        """Write a line for developers."""

    def info(self, event: str, **values: Any) -> Any:
        """Write a line for operators."""

    def warning(self, event: str, **values: Any) -> Any:
        """Write a line about something that somebody should look at."""

    def error(self, event: str, **values: Any) -> Any:
        """Write a line about something that went wrong."""


class _PlainLogger:
    """The logger of a context that no worker made: the standard library's, with the values."""

    def debug(self, event: str, **values: Any) -> None:
        _plain_log.debug(_PLAIN, event, values)

    def info(self, event: str, **values: Any) -> None:
        _plain_log.info(_PLAIN, event, values)

    def warning(self, event: str, **values: Any) -> None:
        _plain_log.warning(_PLAIN, event, values)

    def error(self, event: str, **values: Any) -> None:
        _plain_log.error(_PLAIN, event, values)


_plain_log: Final = logging.getLogger("jobs.handler")
_PLAIN: Final = "%s %s"


@dataclass(frozen=True, slots=True)
class JobContext:
    """What a handler knows about the job it runs, and how it talks back.

    `assets` is where the files of jobs are, a folder or an fsspec URL (`JOBS_ASSETS`). `state`
    has the resources that the worker's lifespan yields. `log` writes lines that name the job.
    """

    id: str
    type: str
    attempt: int
    max_attempts: int
    timeout_seconds: float
    assets: str = "assets"
    created_by: str | None = None
    state: SimpleNamespace = field(default_factory=SimpleNamespace)
    log: JobLogger = field(default_factory=_PlainLogger, repr=False)
    _report: Callable[[JsonValue], None] = field(default=lambda _value: None, repr=False)
    _cancelled: Callable[[], bool] = field(default=lambda: False, repr=False)
    _deadline: float = field(default=float("inf"), repr=False)

    def progress(self, value: JsonValue) -> None:
        """Show how far the job is: any JSON.

        Returns at once. The worker stores the newest value about once per second, and the last
        one before the attempt ends. A value that cannot be stored is one warning in the log.
        """
        self._report(value)

    @property
    def cancel_requested(self) -> bool:
        """Whether to stop: the job was cancelled, or its lease is lost, or the worker stops.

        Plain functions look here now and then, and raise `Cancel`. Async handlers are cancelled
        instead.
        """
        return self._cancelled()

    @property
    def seconds_left(self) -> float:
        """Seconds until this attempt's timeout."""
        return max(0.0, self._deadline - time.monotonic())


RunIn = Literal["loop", "thread", "process"]
"""Where a handler runs: on the worker's event loop, in a thread, or in a process of its own."""

Handler = Callable[[JobContext, Any], Awaitable[Any] | Any]


class JobType(Generic[P]):
    """A type of job: its name, the model of its payload, its policy, and what runs it.

    `name` is lower-case words joined by dots, `thumbnail.create`, at most 100 characters.
    `description` is the payload's docstring unless given. `example` is a payload, as JSON; where
    it is left out one is made from the fields' defaults and `examples`. A type with no handler
    is worked by remote workers.

    `run_in` says where the handler runs: "loop", on the worker's event loop, for `async def`;
    "thread", for plain functions that wait; "process", a process of its own, for what computes,
    may crash, or has to be stopped for certain. Unless given, `async def` runs on the loop and
    everything else in a thread. With "process" the job type must be at the top level of a module,
    because its process imports it from there.

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
    ) -> None:
        if not isinstance(name, str) or len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            raise DefinitionError(
                f"job type {shortened(name)}: a name is lower-case words (letters, digits, _)"
                f" joined by dots, such as thumbnail.create, at most {_MAX_NAME} characters"
            )
        where = f"job type {name}"
        if not (isinstance(payload, type) and issubclass(payload, Payload)):
            raise DefinitionError(
                f"{where}: payload is {shortened(payload)}, expected a subclass of registry.Payload"
            )
        if policy is not None and not isinstance(policy, JobPolicy):
            raise DefinitionError(
                f"{where}: policy is {shortened(policy)}, expected a registry.JobPolicy"
            )
        if run_in not in (None, *get_args(RunIn)):
            raise DefinitionError(
                f"{where}: run_in is {shortened(run_in)}, expected loop, thread, process or None"
            )
        set_ = object.__setattr__
        set_(self, "run_in", run_in)
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
    _handler: Handler | None
    _example: dict[str, JsonValue] | None

    def __setattr__(self, attribute: str, _value: object) -> None:
        raise AttributeError(f"a JobType is frozen: {attribute} cannot be set")

    def __delattr__(self, attribute: str) -> None:
        raise AttributeError(f"a JobType is frozen: {attribute} cannot be deleted")

    def __repr__(self) -> str:
        return f"JobType(name={self.name!r}, payload={self.payload.__name__})"

    HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])

    def handler(self, function: HandlerT) -> HandlerT:
        """Decorator: this function runs the jobs of this type. It returns the function.

        The function takes the `JobContext` and the parsed payload; what it returns is the job's
        result, as JSON. `run_in` says where it runs.

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
        if self.run_in == "thread" and is_async(function):
            raise DefinitionError(
                f"{where}: the handler {_named(function)} is async and cannot run in a thread;"
                ' leave run_in out, or use "process"'
            )
        object.__setattr__(self, "_handler", function)
        return function

    @property
    def has_handler(self) -> bool:
        """Whether jobs of this type can be run in this process."""
        return self._handler is not None

    @property
    def run(self) -> Handler | None:
        """The handler; None where remote workers do the work."""
        return self._handler

    @property
    def runs_in(self) -> RunIn | None:
        """Where the handler runs, also where `run_in` leaves it open; None without a handler."""
        if self._handler is None:
            return None
        return self.run_in or ("loop" if is_async(self._handler) else "thread")

    @cached_property
    def payload_schema(self) -> Mapping[str, Any]:
        """The payload's JSON Schema, draft 2020-12, with the names of the wire."""
        schema: dict[str, Any] = self.payload.model_json_schema(
            by_alias=True, schema_generator=_JsonSchema
        )
        described = {"$schema": JSON_SCHEMA_DIALECT, **schema}
        if self.description:
            described["description"] = self.description
        else:
            described.pop("description", None)
        return MappingProxyType(described)

    @cached_property
    def example_payload(self) -> Mapping[str, JsonValue]:
        """A payload that is valid, as JSON: the one given, or one made from the schema.

        Raises:
            DefinitionError: none was given, and none could be made.
        """
        if self._example is not None:
            return MappingProxyType(self._example)
        schema = dict(self.payload_schema)
        example = cast(dict[str, JsonValue], _example_of(schema, schema.get("$defs", {}), 0))
        self._check_example(example)
        return MappingProxyType(example)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the payload's schema demands: 64 hexadecimal digits of SHA-256.

        Titles, descriptions and examples are left out: a better sentence is not another type.
        """
        text = json.dumps(
            _demands(dict(self.payload_schema)), sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_payload_model(self) -> None:
        """Refuses a payload model that cannot be what it says: not strict, or with no schema."""
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
        _ = self.example_payload

    def _check_example(self, example: dict[str, JsonValue]) -> None:
        text, faults = json_document(example, max_bytes=1 << 20)
        reason = "; ".join(f"{fault.path}: {fault.message}" for fault in faults)
        if not faults:
            try:
                self.payload.model_validate_json(text, by_alias=True, by_name=False)
            except ValidationError as error:
                reason = "; ".join(
                    f"{'/'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
                )
        if reason:
            advice = "" if self._example is not None else "; give JobType(example=...) a valid one"
            raise DefinitionError(
                f"job type {self.name}: its example payload {shortened(example, 200)} is invalid:"
                f" {reason}{advice}"
            )


def is_async(function: object) -> bool:
    """Whether calling this makes a coroutine, as far as its definition says."""
    call = getattr(function, "__call__", None)  # noqa: B004 (an object whose call is async)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _range_fault(
    name: str, value: object, low: float, high: float, kinds: tuple[type[int | float], ...]
) -> list[str]:
    expected = "a whole number" if kinds == (int,) else "a number"
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        return [f"{name} is {shortened(value)}, expected {expected} from {low:,} to {high:,}"]
    return []


def _named(function: object) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"


class _JsonSchema(GenerateJsonSchema):
    """Pydantic's JSON Schema, made true where strictness narrows what it says."""

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        """Decimals come as strings only."""
        described = super().decimal_schema(schema)
        for option in described.get("anyOf", ()):
            if option.get("type") == "string":
                return {**option, "format": "decimal"}
        return {"type": "string", "format": "decimal"}


def _demands(schema: Any) -> Any:
    """A schema without what is only said to people."""
    if isinstance(schema, list):
        return [_demands(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: (
            {name: _demands(inner) for name, inner in value.items()}
            if key in ("properties", "$defs") and isinstance(value, dict)
            else _demands(value)
        )
        for key, value in schema.items()
        if key not in ("title", "description", "examples", "$schema")
    }


def _example_of(schema: Any, definitions: Mapping[str, Any], depth: int) -> JsonValue:
    """A value of this JSON Schema, from its examples and defaults where it has any."""
    if depth > 20 or schema is True:
        return None
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return _example_of(definitions[name], definitions, depth + 1)
    for key in ("examples", "enum"):
        if schema.get(key):
            return cast(JsonValue, schema[key][0])
    for key in ("const", "default"):
        if key in schema:
            return cast(JsonValue, schema[key])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return _example_of(schema[key][0], definitions, depth + 1)
    if "allOf" in schema:
        return _example_of(schema["allOf"][0], definitions, depth + 1)
    match schema.get("type"):
        case "object":
            required = schema.get("required", ())
            return {
                name: _example_of(inner, definitions, depth + 1)
                for name, inner in schema.get("properties", {}).items()
                if name in required or "default" in inner
            }
        case "array":
            if "prefixItems" in schema:
                return [_example_of(item, definitions, depth + 1) for item in schema["prefixItems"]]
            count = schema.get("minItems", 1)
            return [_example_of(schema.get("items", True), definitions, depth + 1)] * count
        case "integer" | "number":
            return _example_number(schema)
        case "boolean":
            return True
        case "null":
            return None
        case "string":
            formats = _FORMATS.get(schema.get("format", ""), "example")
            text = formats.ljust(schema.get("minLength", 0), "x")
            return text[: schema.get("maxLength", len(text))]
    return None


def _example_number(schema: Mapping[str, Any]) -> int | float:
    step = schema.get("multipleOf", 1)
    value = schema.get("minimum", schema.get("exclusiveMinimum", 0) + step)
    if "minimum" not in schema and "exclusiveMinimum" not in schema:
        value = min(step, schema.get("maximum", schema.get("exclusiveMaximum", step + 1) - step))
    return cast("int | float", value)


_FORMATS: Final = {
    "decimal": "1.00",
    "date": "2030-01-31",
    "date-time": "2030-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "uuid": "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "email": "someone@example.com",
    "uri": "https://example.com/",
}
