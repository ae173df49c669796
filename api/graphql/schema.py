"""Builds the schema, prints it, and takes off it what costs time in every request."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import strawberry
from graphql import (
    GraphQLInterfaceType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
)
from strawberry.schema.config import StrawberryConfig
from strawberry.types import get_object_definition
from strawberry.types.base import StrawberryList, StrawberryOptional
from strawberry.types.field import StrawberryField
from strawberry.utils.str_converters import to_camel_case

from api.graphql.mutations import Mutation
from api.graphql.queries import Query
from api.graphql.scalars import SCALARS
from api.graphql.streaming import TellErrors
from api.graphql.subscriptions import Subscription

SDL_FILE: Final = Path(__file__).parent / "schema.graphql"
"""The schema as it is committed, for clients' code generators and for review."""


def build_schema() -> tuple[strawberry.Schema, GraphQLSchema]:
    """The schema that is served: Strawberry's, which streams, and inside it graphql-core's, which
    executes queries and mutations."""
    schema = _strawberry_schema()
    return schema, _without_detours(schema)


def sdl() -> str:
    """The schema in GraphQL's schema definition language."""
    return _strawberry_schema().as_str().rstrip() + "\n"


def _strawberry_schema() -> strawberry.Schema:
    return strawberry.Schema(
        query=Query,
        mutation=Mutation,
        subscription=Subscription,
        config=StrawberryConfig(scalar_map=SCALARS),
        extensions=[TellErrors],
    )


def _without_detours(schema: strawberry.Schema) -> GraphQLSchema:
    """The graphql-core schema inside, with Strawberry's general ways replaced by direct ones.

    Strawberry finds the member of a union by trying every type there is, checks each object's
    type again, reads a plain attribute through four calls, and looks at the types of arguments
    anew in each request. Here every object is an instance of the class of its GraphQL type, so
    its class names the type; and what an argument becomes is settled once.
    Measured: see benchmarks/README.md.
    """
    inner = schema._schema
    names: dict[type, str] = {}
    for graphql_type in inner.type_map.values():
        definition = graphql_type.extensions.get("strawberry-definition")
        if isinstance(graphql_type, GraphQLObjectType) and definition is not None:
            names[definition.origin] = graphql_type.name

    def name_of(value: Any, _info: Any, _type: Any) -> str:
        return names[type(value)]

    for graphql_type in inner.type_map.values():
        if isinstance(graphql_type, GraphQLUnionType | GraphQLInterfaceType):
            graphql_type.resolve_type = name_of
        elif isinstance(graphql_type, GraphQLObjectType) and graphql_type.name in names.values():
            graphql_type.is_type_of = None
            if graphql_type is inner.subscription_type:
                continue
            for field in graphql_type.fields.values():
                field.resolve = _direct(field.extensions["strawberry-definition"])
    return inner


def _direct(field: StrawberryField) -> Callable[..., Any]:
    """What resolves a field: reads the attribute, or calls the method it was written as.

    The method's `info` is graphql-core's own, whose `context` is all that our methods use.
    """
    if field.base_resolver is None:
        read = attrgetter(field.python_name)
        return lambda source, _info: read(source)
    function: Callable[..., Any] = field.base_resolver.wrapped_func  # type: ignore[assignment]
    takes_info = field.base_resolver.info_parameter is not None
    arguments = [
        (to_camel_case(argument.python_name), argument.python_name, _conversion(argument.type))
        for argument in field.arguments
    ]

    def resolve(source: Any, info: Any, **given: Any) -> Any:
        converted = {
            python_name: given[name] if convert is None else convert(given[name])
            for name, python_name, convert in arguments
            if name in given
        }
        return function(source, info, **converted) if takes_info else function(source, **converted)

    return resolve


def _conversion(wanted: Any) -> Callable[[Any], Any] | None:
    """What makes the Python value of a type out of graphql-core's; None where it is the same."""
    if isinstance(wanted, StrawberryOptional):
        inner = _conversion(wanted.of_type)
        return None if inner is None else lambda value: None if value is None else inner(value)
    if isinstance(wanted, StrawberryList):
        each = _conversion(wanted.of_type)
        return None if each is None else lambda values: [each(value) for value in values]
    definition = get_object_definition(wanted)
    if definition is None:
        return None
    make = definition.origin
    fields = [
        (to_camel_case(field.python_name), field.python_name, _conversion(field.type))
        for field in definition.fields
    ]
    return lambda given: make(
        **{
            python_name: given[name] if convert is None else convert(given[name])
            for name, python_name, convert in fields
            if name in given
        }
    )
