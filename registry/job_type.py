"""`JobType`: a payload, a policy and a handler under one name."""

from __future__ import annotations

import hashlib
import inspect
import re
import types
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Generic, Literal, TypeVar, cast, get_args

from pydantic import JsonValue, ValidationError
from pydantic_core import from_json

from job_registry.context import JobContext
from job_registry.errors import (
    DefinitionError,
    FaultBudget,
    PayloadInvalid,
    Violation,
    shortened,
)
from job_registry.json_values import json_document, pointer
from job_registry.payload import Payload
from job_registry.payload_schema import example_of
from job_registry.policy import JobPolicy
from job_registry.upgrades import (
    OlderModel,
    PayloadModel,
    Upgrade,
    UpgradeFailed,
    named,
    older_models,
    upgrade_fault,
    upgrade_of,
)
from job_registry.violations import PayloadShape

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
_MAX_NAME: Final = 100
_NAME_RULE: Final = (
    "a name is lower-case words (letters, digits, _) joined by dots, such as thumbnail.create, at"
    f" most {_MAX_NAME} characters"
)
_MEMORY_LIMITS_MB: Final = range(64, 1_048_577)

P = TypeVar("P", bound=Payload)
R = TypeVar("R")
Old = TypeVar("Old", bound=Payload)
New = TypeVar("New", bound=Payload)

RunIn = Literal["loop", "thread", "process"]
"""Where a handler runs: on the worker's event loop, in a thread, or in a process of its own."""

Handler = Callable[[JobContext, Any], Awaitable[Any] | Any]


class JobType(Generic[P]):
    """A type of job: its name, the model of its payload, its policy and its handler.

    `name` is lower-case words joined by dots, `thumbnail.create`, at most 100 characters.
    `description` is the payload's docstring unless given. `example` is a payload, as JSON; without
    it, one is made from the fields' defaults and `examples`. Remote workers run the jobs of a type
    without a handler.

    `run_in` says where the handler runs: "loop", on the worker's event loop, for `async def`;
    "thread", for plain functions that wait; "process", a process of its own, for what computes,
    may crash, or has to be stopped for certain. Unless given, `async def` runs on the loop and
    everything else in a thread. With "process" the job type must be at the top level of a module,
    because its process imports it from there.

    `memory_limit_mb` is how much memory the handler may use, in units of 1,048,576 bytes, 64 to
    1,048,576: what its process takes beyond the idle process. It needs `run_in="process"`. A
    handler that exceeds it gets a MemoryError, and the attempt fails as `memory_limit_exceeded`. A
    limit that is too low fails jobs that need more memory than usual. Unless given, there is none.

    `accepts` are older models of the payload. A client may still enqueue a payload of one of them;
    it is stored as it came, and `upgrade` leads from it to `payload`. `former_names` are the names
    that the type had: stored jobs and clients that use one belong to this type.

    Raises:
        DefinitionError: the definition is wrong. The message says what and where.
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
        accepts: Sequence[type[Payload]] = (),
        former_names: Sequence[str] = (),
    ) -> None:
        if not isinstance(name, str) or not is_type_name(name):
            raise DefinitionError(f"job type {shortened(name)}: {_NAME_RULE}")
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
        _check_former_names(where, name, former_names)
        set_ = object.__setattr__
        set_(self, "former_names", tuple(former_names))
        set_(self, "_upgrades", {})
        set_(self, "run_in", run_in)
        set_(self, "memory_limit_mb", memory_limit_mb)
        set_(self, "name", name)
        set_(self, "payload", payload)
        set_(self, "policy", policy or JobPolicy())
        documentation = description or inspect.getdoc(payload) or ""
        set_(self, "description", "" if documentation == inspect.getdoc(Payload) else documentation)
        set_(self, "_handler", None)
        set_(self, "_runs_in", None)
        set_(self, "_example", None if example is None else dict(example))
        set_(
            self,
            "_model",
            PayloadModel(payload, self.description, f"{where}: payload {payload.__name__}"),
        )
        _ = self.example_payload
        set_(self, "accepts", tuple(self._check_accepted(accepts)))
        if example is not None:
            self._check_example(dict(example))

    name: str
    payload: type[P]
    policy: JobPolicy
    description: str
    run_in: RunIn | None
    memory_limit_mb: int | None
    accepts: tuple[type[Payload], ...]
    former_names: tuple[str, ...]
    _model: PayloadModel
    _upgrades: dict[type[Payload], Upgrade]
    _handler: Handler | None
    _runs_in: RunIn | None
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
                arguments, or it is annotated with another payload, or it cannot run where `run_in`
                says.
        """
        where = f"job type {self.name}"
        if self._handler is not None:
            raise DefinitionError(f"{where}: it has a handler already, {named(self._handler)}")
        where += f": the handler {named(function)}"
        try:
            inspect.signature(function).bind(None, None)
        except (TypeError, ValueError):
            raise DefinitionError(f"{where} must take (job, payload)") from None
        if _is_generator(function):
            raise DefinitionError(
                f"{where} yields, so its result would not be JSON; return the result instead"
            )
        if _has_swapped_arguments(function, self.payload):
            raise DefinitionError(f"{where} takes (payload, job), expected (job, payload)")
        other = _payload_of(function)
        if other is not None and not _is_a(self.payload, other):
            raise DefinitionError(
                f"{where} takes {other.__name__}, expected {self.payload.__name__}"
            )
        if self.run_in == "thread" and is_async(function):
            raise DefinitionError(
                f'{where} is async and cannot run in a thread; leave run_in out, or use "process"'
            )
        object.__setattr__(self, "_handler", function)
        # Once: each attempt reads it, and to find out whether a function is async takes a while.
        runs_in = self.run_in or ("loop" if is_async(function) else "thread")
        object.__setattr__(self, "_runs_in", runs_in)
        return function

    @property
    def has_handler(self) -> bool:
        """Whether this process has a handler for the type."""
        return self._handler is not None

    @property
    def run(self) -> Handler | None:
        """The handler, or None if remote workers run the jobs."""
        return self._handler

    @property
    def runs_in(self) -> RunIn | None:
        """Where the handler runs, also if `run_in` is not given. None without a handler."""
        return self._runs_in

    @cached_property
    def payload_schema(self) -> Mapping[str, Any]:
        """The payload's JSON Schema, draft 2020-12, with camelCase names."""
        return MappingProxyType(dict(self._model.schema))

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
        """A hash of the payloads that can be read: 64 hexadecimal digits of SHA-256.

        It is `payload_fingerprint` unless there are upgrades. With upgrades it depends on the older
        models too, so that a new upgrade changes it.
        """
        older = sorted(each.model.fingerprint for each in self._older)
        if not older:
            return self.payload_fingerprint
        return hashlib.sha256(" ".join([self.payload_fingerprint, *older]).encode()).hexdigest()

    @property
    def payload_fingerprint(self) -> str:
        """A hash of what the payload's schema demands: 64 hexadecimal digits of SHA-256.

        It is stored with each job. A job that was admitted in an older form has the hash of the
        older model. Titles, descriptions and examples do not change it, nor does the order of
        fields and values.
        """
        return self._model.fingerprint

    @cached_property
    def readable_fingerprints(self) -> tuple[str, ...]:
        """The `payload_fingerprint` of the current model, and those of the older models."""
        older = (each.model.fingerprint for each in self._older)
        return tuple(dict.fromkeys((self.payload_fingerprint, *older)))

    @property
    def payload_shape(self) -> PayloadShape:
        """Turns Pydantic's faults of a payload into violations."""
        return self._model.shape

    @property
    def older_payloads(self) -> tuple[type[Payload], ...]:
        """The older models that `read` upgrades, the newest first."""
        return tuple(each.model.model for each in self._older)

    @property
    def accepted_schemas(self) -> tuple[Mapping[str, Any], ...]:
        """The JSON Schemas of the older models in `accepts`, the newest first."""
        return tuple(
            MappingProxyType(dict(each.model.schema))
            for each in self._older
            if each.model.model in self.accepts
        )

    def upgrade(self, older: type[Old]) -> Callable[[Callable[[Old], New]], Callable[[Old], New]]:
        """Register a function that upgrades a payload of an older model. Use it as a decorator.

            @mail_send.upgrade(MailSendV1)
            def from_v1(older: MailSendV1) -> MailSend: ...

        The function returns the payload of this type, or another older model that has an upgrade;
        its annotation says which. It must depend on nothing but its argument: it runs each time a
        payload is read. The stored payload stays as it is. If the function raises, the payload
        counts as one that does not fit.

        Raises:
            DefinitionError: the older model is not strict, is the current one, or has an upgrade
                already; or this is not a plain function of one argument that returns a `Payload`.
        """
        where = f"job type {self.name}"
        if not (isinstance(older, type) and issubclass(older, Payload)):
            raise DefinitionError(
                f"{where}: upgrade({shortened(older)}), expected a subclass of Payload, as in"
                " upgrade(OldModel)"
            )
        if older is self.payload:
            raise DefinitionError(
                f"{where}: upgrade({older.__name__}) is of the payload itself, expected an older"
                " model"
            )
        model = PayloadModel(older, "", f"{where}: older payload {older.__name__}")

        def register(function: Callable[[Old], New]) -> Callable[[Old], New]:
            if older in self._upgrades:
                raise DefinitionError(
                    f"{where}: there is an upgrade from {older.__name__} already,"
                    f" {named(self._upgrades[older].function)}"
                )
            self._upgrades[older] = upgrade_of(where, self.payload, model, function)
            for derived in ("_older", "fingerprint", "readable_fingerprints"):
                self.__dict__.pop(derived, None)
            return function

        return register

    def check(self) -> None:
        """Check what can be known only once all upgrades are registered.

        Raises:
            DefinitionError: the upgrades from a model do not lead to the payload, or a model in
                `accepts` has none.
        """
        older = self.older_payloads
        for model in self.accepts:
            if model not in older:
                raise DefinitionError(
                    f"job type {self.name}: it accepts {model.__name__}, from which no upgrade"
                    f" leads to {self.payload.__name__}; add one with"
                    f" upgrade({model.__name__}), or leave it out of accepts"
                )

    def read(self, payload: bytes | str, budget: FaultBudget | None = None) -> P:
        """Parse a stored payload, JSON text: by the current model, or else by an older one.

        An older payload is upgraded. The first older model that fits decides, beginning with the
        newest. Faults are charged to `budget`.

        Raises:
            PayloadInvalid: no model fits, or the upgrade failed. The violations are those of
                the current model.
        """
        try:
            return self.payload.model_validate_json(payload, by_alias=True, by_name=False)
        except ValidationError as error:
            fault = error
        upgrade_faults: list[Violation] = []
        cause: BaseException | None = None
        for older in self._older:
            old = older.model.parse(payload)
            if old is None:
                continue
            try:
                return cast(P, older.upgraded(old))
            except UpgradeFailed as failed:
                upgrade_faults, cause = [upgrade_fault(self.name, older.model)], failed.__cause__
                break
        document = from_json(payload)
        violations = self.payload_shape.violations(fault, document, budget=budget)
        raise PayloadInvalid(self.name, [*upgrade_faults, *violations]) from cause

    def admit_older(self, text: bytes) -> tuple[P, str] | None:
        """Return the payload of a client that sent an older form, and the form's fingerprint.

        None means that the text fits no model in `accepts`.

        Raises:
            PayloadInvalid: it fits one, and the upgrade failed.
        """
        for older in self._older:
            if older.model.model not in self.accepts:
                continue
            old = older.model.parse(text)
            if old is None:
                continue
            try:
                return cast(P, older.upgraded(old)), older.model.fingerprint
            except UpgradeFailed as failed:
                fault = upgrade_fault(self.name, older.model)
                raise PayloadInvalid(self.name, [fault]) from failed.__cause__
        return None

    @cached_property
    def _older(self) -> tuple[OlderModel, ...]:
        """The older models with their upgrades."""
        upgrades = tuple(self._upgrades.values())
        return older_models(f"job type {self.name}", self.payload, upgrades)

    def _check_accepted(self, accepts: Sequence[type[Payload]]) -> Sequence[type[Payload]]:
        where = f"job type {self.name}: accepts"
        if isinstance(accepts, str) or not isinstance(accepts, Sequence):
            raise DefinitionError(f"{where} is {shortened(accepts)}, expected a list of payloads")
        for index, model in enumerate(accepts):
            if not (isinstance(model, type) and issubclass(model, Payload)):
                raise DefinitionError(
                    f"{where}[{index}] is {shortened(model)}, expected a subclass of Payload"
                )
            if model is self.payload:
                raise DefinitionError(
                    f"{where} has {model.__name__}, the payload itself; list older models only"
                )
            if model in accepts[:index]:
                raise DefinitionError(f"{where} has {model.__name__} twice")
            PayloadModel(model, "", f"job type {self.name}: older payload {model.__name__}")
        return accepts

    def _check_example(self, example: dict[str, JsonValue]) -> None:
        text, violations = json_document(example, max_bytes=1 << 20)
        if not violations:
            try:
                self.payload.model_validate_json(text, by_alias=True, by_name=False)
            except ValidationError as error:
                violations = self.payload_shape.violations(error, example)
        if violations:
            reason = " ".join(fault.sentence() for fault in violations)
            advice = "" if self._example is not None else self._advice(violations)
            raise DefinitionError(
                f"job type {self.name}: its example payload {shortened(example, 200)} is invalid:"
                f" {reason}{advice}"
            )

    def _advice(self, violations: Sequence[Violation]) -> str:
        """Return what to change if the example that was made from the schema is not valid."""
        fields = self.payload_schema.get("properties", {})
        places = {f"/{each.path[1:].partition('/')[0]}" for each in violations}
        of_default = {
            pointer("", name)
            for name, field in fields.items()
            if "default" in field and "examples" not in field
        }
        if places <= of_default:
            return " That is the default: change it, or allow it in the annotation."
        return " Give Field(examples=[...]) or JobType(example=...) a valid one."


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


def _payload_of(function: Callable[..., Any]) -> type | None:
    """Return the class that a handler is annotated to take, if that is known at run time."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return None
    for name in list(inspect.signature(function).parameters)[1:2]:
        hint = typing.get_origin(hints.get(name)) or hints.get(name)
        # Both are classes in some versions of Python.
        if isinstance(hint, type) and hint not in (Any, types.UnionType):
            return hint
    return None


def _is_a(payload: type[Payload], other: type) -> bool:
    try:
        return issubclass(payload, other)
    except TypeError:  # A protocol may not be checked at run time.
        return True


def _annotation_name(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return text.strip("\"'").partition("[")[0].rpartition(".")[2]


def _check_former_names(where: str, name: str, former_names: Sequence[str]) -> None:
    if isinstance(former_names, str) or not isinstance(former_names, Sequence):
        raise DefinitionError(
            f"{where}: former_names is {shortened(former_names)}, expected a list of names"
        )
    for index, former in enumerate(former_names):
        if not isinstance(former, str) or not is_type_name(former):
            raise DefinitionError(
                f"{where}: former_names[{index}] is {shortened(former)}: {_NAME_RULE}"
            )
        if former == name:
            raise DefinitionError(f"{where}: former_names has {former}, the name of the type now")
        if former in former_names[:index]:
            raise DefinitionError(f"{where}: former_names has {former} twice")
