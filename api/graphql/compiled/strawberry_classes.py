"""The Python classes behind the types of a Strawberry schema, read through its public API."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import strawberry
from graphql import GraphQLResolveInfo
from strawberry.extensions import FieldExtension
from strawberry.extensions.field_extension import build_field_extension_resolvers
from strawberry.types.arguments import InputContext, StrawberryArgument, convert_argument
from strawberry.types.base import (
    StrawberryList,
    StrawberryObjectDefinition,
    StrawberryOptional,
    get_object_definition,
)
from strawberry.types.enum import StrawberryEnumDefinition
from strawberry.types.field import StrawberryField
from strawberry.types.fields.resolver import StrawberryResolver

from job_registry_api.graphql.compiled.outputs import Direct
from job_registry_api.graphql.compiled.resuming import Resumable
from job_registry_api.graphql.compiled.strawberry_inputs import InputBuilder

_UNCONVERTED: Final = (str, int, float, bool, strawberry.ID)


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

    def direct_of(self, type_name: str, field_name: str) -> Direct | None:
        """Return how a resolver, or the attribute of a field with extensions, is called directly,
        if its outermost extension is a `Resumable`.

        The extensions and the resolver are those that Strawberry calls, with the same arguments.
        What is left out are its exception handlers, and looking up how to convert the arguments.
        """
        field = self._schema.get_field_for_type(field_name, type_name)
        if field is None or not _is_direct(field):
            return None
        name_of = self._schema.config.name_converter.from_argument
        converters = [
            (name_of(each), each.python_name, self._converter(each)) for each in field.arguments
        ]
        info_class = self._schema.config.info_class

        def converted(
            graphql_info: GraphQLResolveInfo[Any], given: dict[str, Any]
        ) -> tuple[strawberry.Info, dict[str, Any]]:
            info, arguments = info_class(graphql_info, field), {}
            for name, python_name, convert in converters:
                if name in given:
                    value = given[name]
                    arguments[python_name] = value if convert is None else convert(value, info)
            return info, arguments

        return Direct(converted, _called(field), field.is_async)

    def _converter(
        self, argument: StrawberryArgument
    ) -> Callable[[Any, strawberry.Info], Any] | None:
        """Return the function that converts an argument; None if it stays as it is."""
        config, scalars = self._schema.config, self._schema.schema_converter.scalar_registry
        kind: Any = argument.type
        path = (config.name_converter.from_argument(argument),)
        inner: Any = kind.of_type if type(kind) is StrawberryOptional else kind
        if inner in _UNCONVERTED:
            return None
        is_list = type(inner) is StrawberryList
        definition = get_object_definition(inner.of_type if is_list else inner)
        build = definition.from_input if definition is not None else None
        if isinstance(build, InputBuilder):
            alone = build.without_context(config.name_converter)
            if alone is not None and is_list:
                return lambda value, _: None if value is None else [*map(alone, value)]
            if alone is not None:
                return lambda value, _: None if value is None else alone(value)

        def convert(value: Any, info: strawberry.Info) -> Any:
            if value.__class__ is dict and build is not None:
                return build(inner, value, InputContext(info, config, scalars, path))
            return convert_argument(value, kind, scalars, config, info, path=path)

        return convert


def _called(field: StrawberryField) -> Callable[[Any, strawberry.Info, dict[str, Any]], Any]:
    """Return how a field is resolved with the source, the info and the arguments."""
    resolve = _resolved(field)
    match field.extensions:
        case [Resumable() as only] if type(only).check is not Resumable.check:
            check = only.check
        case _:
            for extension in build_field_extension_resolvers(field):
                resolve = partial(extension, resolve)
            return lambda source, info, arguments: resolve(source, info, **arguments)

    def checked(source: Any, info: strawberry.Info, arguments: dict[str, Any]) -> Any:
        check(source, info)
        return resolve(source, info, **arguments)

    return checked


def _resolved(field: StrawberryField) -> Callable[..., Any]:
    """Return how the resolver of a field is called with the source, the info and the arguments."""
    resolver, name = field.base_resolver, field.python_name
    if resolver is None:
        return lambda source, _: getattr(source, name)
    function: Any = resolver.wrapped_func
    if resolver.self_parameter is None:
        if resolver.info_parameter is None:
            return lambda _, _info, **arguments: function(**arguments)
        return lambda _, info, **arguments: function(info=info, **arguments)
    if resolver.info_parameter is None:
        return lambda source, _info, **arguments: function(source, **arguments)
    return lambda source, info, **arguments: function(source, info=info, **arguments)


def _is_direct(field: StrawberryField) -> bool:
    resolver, extensions = field.base_resolver, field.extensions
    return (
        bool(extensions)
        and isinstance(extensions[-1], Resumable)
        and all(
            each.supports_async if field.is_async else each.supports_sync for each in extensions
        )
        and all(type(each).map_arguments is FieldExtension.map_arguments for each in extensions)
        and type(field).get_result is StrawberryField.get_result
        and not field.is_subscription
        and (field.default_resolver is getattr if resolver is None else _is_plain(resolver))
    )


def _is_plain(resolver: StrawberryResolver[Any]) -> bool:
    """Return whether a resolver is called with `self`, `info` and the arguments of the field."""
    return (
        callable(resolver.wrapped_func)
        and resolver.parent_parameter is None
        and resolver.root_parameter is None
        and (resolver.info_parameter is None or resolver.info_parameter.name == "info")
    )
