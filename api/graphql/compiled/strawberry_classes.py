"""The Python classes behind the types of a Strawberry schema, read through its public API."""

from __future__ import annotations

import strawberry
from strawberry.types.base import StrawberryObjectDefinition
from strawberry.types.enum import StrawberryEnumDefinition


class StrawberryClasses:
    """The classes behind the types of a Strawberry schema.

    A direct instance of the class of a type is an object of that type. That does not hold for
    objects marked by `strawberry.cast`, for generic types, and for types with `is_type_of` or
    `resolve_type`.
    """

    def __init__(self, schema: strawberry.Schema) -> None:
        self._schema = schema

    def class_of(self, type_name: str) -> type | None:
        """Return the class of an object type or enum; None if it does not determine the type."""
        match self._schema.get_type_by_name(type_name):
            case StrawberryObjectDefinition() as definition:
                decides_itself = definition.is_type_of is not None or any(
                    each.resolve_type is not None for each in definition.interfaces
                )
                is_generic = definition.is_graphql_generic or definition.concrete_of is not None
                return None if decides_itself or is_generic else definition.origin
            case StrawberryEnumDefinition() as definition:
                return definition.wrapped_cls
        return None

    def attribute_of(self, type_name: str, field_name: str) -> str | None:
        """Return the attribute that a field reads; None if it has a resolver or extensions."""
        field = self._schema.get_field_for_type(field_name, type_name)
        if field is None or not field.is_basic_field or field.default_resolver is not getattr:
            return None
        return field.python_name
