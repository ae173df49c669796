"""Builds the inputs of a Strawberry schema with a plan that is made once per schema.

Strawberry itself resolves the types and converts the names of all fields for each value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from strawberry.schema.name_converter import NameConverter
from strawberry.types.arguments import InputContext
from strawberry.types.base import (
    StrawberryList,
    StrawberryMaybe,
    StrawberryObjectDefinition,
    StrawberryOptional,
    get_object_definition,
    has_object_definition,
)
from strawberry.types.field import StrawberryField
from strawberry.types.lazy_type import LazyType

Made = TypeVar("Made")
Build = Callable[[Mapping[str, Any]], Any]


def built_directly(cls: type[Made]) -> type[Made]:
    """Give an input an `InputBuilder` as its `from_input`. The objects are the same."""
    definition = get_object_definition(cls, strict=True)
    definition.from_input = InputBuilder(definition)
    return cls


class InputBuilder:
    """Builds the objects of an input from the values that GraphQL has coerced."""

    def __init__(self, definition: StrawberryObjectDefinition) -> None:
        self._definition = definition
        self._plans: WeakKeyDictionary[NameConverter, _Plan] = WeakKeyDictionary()
        self._latest: tuple[NameConverter, _Plan] | None = None

    def __call__(self, made: type, value: Mapping[str, Any], context: InputContext) -> Any:
        """Build an object, as the `from_input` of Strawberry."""
        plan = self._plan_of(context.config.name_converter)
        if plan.build is not None:
            return plan.build(value)
        arguments = plan.absent.copy()
        for name, given in value.items():
            python_name, kind = plan.fields[name]
            arguments[python_name] = given if kind is None else context.convert(given, kind, name)
        return made(**arguments)

    def without_context(self, names: NameConverter) -> Build | None:
        """Return how an object is built from its value alone; None if values are converted."""
        return self._plan_of(names).build

    def _plan_of(self, names: NameConverter) -> _Plan:
        # A look-up in a `WeakKeyDictionary` takes longer than to build an object.
        if self._latest is not None and self._latest[0] is names:
            return self._latest[1]
        plan = self._plans.get(names)
        if plan is None:
            plan = self._plans[names] = _plan(self._definition, names)
        self._latest = (names, plan)
        return plan


class _Plan(NamedTuple):
    fields: dict[str, tuple[str, Any]]
    """The name in Python of each field, and its type if its values are lists or inputs, which are
    converted; otherwise None."""
    absent: dict[str, Any]
    """None for each field for which the class has no default."""
    build: Build | None
    """Builds an object, if no values are converted."""


def _plan(definition: StrawberryObjectDefinition, names: NameConverter) -> _Plan:
    fields = {
        names.from_field(field): (field.python_name, _converted_type(field, definition))
        for field in definition.fields
    }
    absent = {
        field.python_name: None
        for field in definition.fields
        if field.default is MISSING and field.default_factory is MISSING
    }
    if any(kind is not None for _, kind in fields.values()):
        return _Plan(fields, absent, None)
    python_names = {name: python_name for name, (python_name, _) in fields.items()}
    return _Plan(fields, absent, _build(definition.origin, python_names, absent))


def _build(made: type, python_names: dict[str, str], absent: dict[str, Any]) -> Build:
    def build(value: Mapping[str, Any]) -> Any:
        given = {python_names[name]: each for name, each in value.items()}
        return made(**given) if len(given) == len(python_names) else made(**{**absent, **given})

    return build


def _converted_type(field: StrawberryField, definition: StrawberryObjectDefinition) -> Any:
    kind: Any = field.resolve_type(type_definition=definition)
    inner = kind
    while isinstance(inner, StrawberryOptional) and not isinstance(inner, StrawberryMaybe):
        inner = inner.of_type
    is_converted = isinstance(inner, StrawberryList | StrawberryMaybe | LazyType) or (
        has_object_definition(inner)
    )
    return kind if is_converted else None
