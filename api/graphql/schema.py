"""Builds the schema, prints it, and takes off it what costs time in every request."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import strawberry
from graphql import (
    GraphQLBoolean,
    GraphQLField,
    GraphQLInterfaceType,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    is_input_object_type,
    is_introspection_type,
    print_schema,
    validate_schema,
)
from graphql.type import introspection
from strawberry.schema.config import StrawberryConfig
from strawberry.types import get_object_definition
from strawberry.types.base import StrawberryList, StrawberryOptional
from strawberry.types.field import StrawberryField
from strawberry.utils.str_converters import to_camel_case

from job_registry import DefinitionError, JobRegistry
from job_registry_api.auth import AccessScope
from job_registry_api.graphql.mutations import Mutation
from job_registry_api.graphql.queries import Query
from job_registry_api.graphql.scalars import SCALARS
from job_registry_api.graphql.scopes import scopes_of
from job_registry_api.graphql.subscriptions import Subscription
from job_registry_api.graphql.typed import TYPED_JOB_INPUT, typed_job_input

SDL_FILE: Final = Path(__file__).parent / "schema.graphql"
"""The schema as it is committed, for clients' code generators and for review."""


def build_schema(registry: JobRegistry) -> GraphQLSchema:
    """The schema that is served for these job types, as graphql-core executes it.

    Raises:
        DefinitionError: the job types cannot stand together in `TypedJobInput`.
        LookupError: a field does not say which scope it needs.
    """
    inner = _with_typed_door(strawberry_schema()._schema, registry)
    _take_detours_out(inner)
    return inner


def sdl(registry: JobRegistry) -> str:
    """The schema of these job types in GraphQL's schema definition language."""
    return print_schema(build_schema(registry)).rstrip() + "\n"


def strawberry_schema() -> strawberry.Schema:
    """The schema as it is written, with Strawberry's own resolvers, before it has job types."""
    return strawberry.Schema(
        query=Query,
        mutation=Mutation,
        subscription=Subscription,
        config=StrawberryConfig(scalar_map=SCALARS),
    )


def _with_typed_door(inner: GraphQLSchema, registry: JobRegistry) -> GraphQLSchema:
    """The schema with the input that is made of the registry; without the field, if it is empty."""
    types = {
        name: graphql_type
        for name, graphql_type in inner.type_map.items()
        if name != TYPED_JOB_INPUT and not is_introspection_type(graphql_type)
    }
    mutation = inner.mutation_type
    assert mutation is not None
    job = typed_job_input(registry, types)
    if job is None:
        del mutation.fields["enqueue"]
    else:
        mutation.fields["enqueue"].args["job"].type = GraphQLNonNull(job)
    # Strawberry's own answer looks for a Strawberry type behind each one.
    introspection.introspection_types["__Type"].fields["isOneOf"] = GraphQLField(  # type: ignore[attr-defined]
        GraphQLBoolean,
        resolve=lambda of, _info: of.is_one_of if is_input_object_type(of) else None,
    )
    made = GraphQLSchema(
        query=inner.query_type,
        mutation=mutation,
        subscription=inner.subscription_type,
        types=list(types.values()),
        directives=inner.directives,
    )
    if faults := validate_schema(made):
        raise DefinitionError("; ".join(fault.message for fault in faults))
    return made


def _take_detours_out(inner: GraphQLSchema) -> None:
    """Replaces Strawberry's general ways by direct ones, and puts each field's scopes in front.

    Strawberry finds the member of a union by trying every type there is, checks each object's
    type again, reads a plain attribute through four calls, and looks at the types of arguments
    anew in each request. Here every object is an instance of the class of its GraphQL type, so
    its class names the type; and what an argument becomes is settled once.
    Measured: see benchmarks/README.md.
    """
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
            for field in graphql_type.fields.values():
                definition = field.extensions["strawberry-definition"]
                resolve = _guarded(scopes_of(graphql_type.name, definition), _direct(definition))
                if graphql_type is inner.subscription_type:
                    field.subscribe, field.resolve = resolve, _itself
                else:
                    field.resolve = resolve


def _itself(event: Any, _info: Any, **_given: Any) -> Any:
    return event


def _guarded(scopes: tuple[AccessScope, ...], resolve: Callable[..., Any]) -> Callable[..., Any]:
    """A resolver behind the check that the caller has one of these scopes."""
    if not scopes:
        return resolve

    def guarded(source: Any, info: Any, **given: Any) -> Any:
        info.context.caller.need(*scopes)
        return resolve(source, info, **given)

    return guarded


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
