"""Older models of a payload, and the functions that upgrade from them to the current model."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from pydantic import ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from job_registry.errors import DefinitionError, Violation
from job_registry.payload import Payload
from job_registry.payload_schema import fingerprint_of, json_schema_of
from job_registry.strictness import lax_parts
from job_registry.violations import PayloadShape

UPGRADE_FAILED: Final = "upgrade_failed"


class PayloadModel:
    """A model of a payload, and what is derived from it: schema, fingerprint, parser, faults.

    `where` names the model in errors.

    Raises:
        DefinitionError: the model is not strict in all its parts, or has no JSON Schema.
    """

    def __init__(self, model: type[Payload], description: str, where: str) -> None:
        self.model = model
        for option, wanted in (("strict", True), ("frozen", True), ("extra", "forbid")):
            if model.model_config.get(option) != wanted:
                raise DefinitionError(f"{where} sets {option}={model.model_config.get(option)!r}")
        try:
            model.model_rebuild()
            # Made here, so that a model without a JSON Schema is an error at the start.
            self.schema: Mapping[str, Any] = json_schema_of(model, description)
        except (PydanticUserError, PydanticSchemaGenerationError, NameError) as error:
            raise DefinitionError(f"{where} has no JSON Schema: {error}") from error
        if lax := lax_parts(model):
            raise DefinitionError(f"{where} is not strict in all its parts: {'; '.join(lax)}")

    @cached_property
    def fingerprint(self) -> str:
        """The hash of what the schema demands."""
        return fingerprint_of(self.schema)

    @cached_property
    def shape(self) -> PayloadShape:
        """Turns Pydantic's faults of a payload into violations."""
        return PayloadShape(self.model)

    def parse(self, text: bytes | str) -> Payload | None:
        """Return the payload of a JSON text. None: it does not fit."""
        try:
            return self.model.model_validate_json(text, by_alias=True, by_name=False)
        except ValidationError:
            return None


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A function from an older model of a payload to the next newer one.

    `newer` is a name if its class could not be found when the function was registered.
    """

    older: PayloadModel
    newer: type[Payload] | str
    function: Callable[[Any], Any]


class UpgradeFailed(Exception):
    """Raised when an upgrade raises, or returns another model. Not seen outside this package."""


@dataclass(frozen=True, slots=True)
class OlderModel:
    """An older model of a payload, with the upgrades that lead from it to the current model."""

    model: PayloadModel
    steps: tuple[tuple[Callable[[Any], Any], type[Payload]], ...]

    def upgraded(self, payload: Payload) -> Payload:
        """Return the payload in its current form.

        Raises:
            UpgradeFailed: an upgrade raised, or returned something other than the newer model.
        """
        for function, newer in self.steps:
            try:
                payload = function(payload)
            except Exception as error:
                raise UpgradeFailed from error
            if not isinstance(payload, newer):
                raise UpgradeFailed from TypeError(
                    f"{named(function)} returned {type(payload).__name__}, expected"
                    f" {newer.__name__}"
                )
        return payload


def upgrade_fault(job_type: str, model: PayloadModel) -> Violation:
    """Return the violation of a payload that fits an older model, and cannot be upgraded."""
    title = model.model.__name__
    message = f"The payload fits {title}, an older form of {job_type}, and its upgrade failed."
    return Violation("", UPGRADE_FAILED, message)


def upgrade_of(
    where: str, current: type[Payload], older: PayloadModel, function: Callable[[Any], Any]
) -> Upgrade:
    """Return the `Upgrade` of a function.

    Raises:
        DefinitionError: it is not a plain function of one argument, or its annotations say that it
            takes or returns something other than a payload.
    """
    where = f"{where}: the upgrade {named(function)}"
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        raise DefinitionError(f"{where} must take one argument, the older payload") from None
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise DefinitionError(f"{where} must be a plain function that returns the newer payload")
    annotation = _annotation_of_result(function)
    newer: type[Payload] | str = current
    if isinstance(annotation, str):
        newer = annotation
    elif annotation is not inspect.Signature.empty:
        if not (isinstance(annotation, type) and issubclass(annotation, Payload)):
            raise DefinitionError(
                f"{where} is annotated to return {annotation!r}, expected a subclass of Payload"
            )
        newer = annotation
    if newer is older.model:
        raise DefinitionError(
            f"{where} returns {older.model.__name__}, the model that it upgrades from"
        )
    return Upgrade(older, newer, function)


def _annotation_of_result(function: Callable[..., Any]) -> Any:
    """Return the annotation of the result: a class, or a name that is not importable."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        annotation = inspect.signature(function).return_annotation
        return annotation.strip("\"'") if isinstance(annotation, str) else annotation
    return hints.get("return", inspect.Signature.empty)


def older_models(
    where: str, current: type[Payload], upgrades: Sequence[Upgrade]
) -> tuple[OlderModel, ...]:
    """Return the older models, those first that need fewer upgrades to the current one.

    Raises:
        DefinitionError: the upgrades from a model do not lead to the current one.
    """
    by_model = {upgrade.older.model: upgrade for upgrade in upgrades}
    by_name = {model.__name__: model for model in (*by_model, current)}
    found: list[OlderModel] = []
    for first in upgrades:
        steps: list[tuple[Callable[[Any], Any], type[Payload]]] = []
        upgrade, passed = first, [first.older.model]
        while True:
            wanted = upgrade.newer
            newer = by_name.get(wanted.rpartition(".")[2]) if isinstance(wanted, str) else wanted
            if newer is None or (newer is not current and newer not in by_model):
                name = wanted if isinstance(wanted, str) else wanted.__name__
                raise DefinitionError(
                    f"{where}: the upgrade {named(upgrade.function)} returns {name}, which is"
                    f" neither the payload {current.__name__} nor a model with an upgrade; add the"
                    f" upgrade from {name}, or return {current.__name__}"
                )
            steps.append((upgrade.function, newer))
            if newer is current:
                break
            if newer in passed:
                cycle = " to ".join(each.__name__ for each in (*passed, newer))
                raise DefinitionError(
                    f"{where}: the upgrades form a cycle, from {cycle}, and never reach the"
                    f" payload {current.__name__}"
                )
            passed.append(newer)
            upgrade = by_model[newer]
        found.append(OlderModel(first.older, tuple(steps)))
    return tuple(sorted(found, key=lambda older: len(older.steps)))


def named(function: object) -> str:
    """Return the name of a function, for errors."""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
