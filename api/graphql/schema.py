"""Builds the schema, prints it, and takes off it what costs time in every request."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import strawberry
from strawberry.schema.config import StrawberryConfig
from strawberry.types.field import StrawberryField

from api.graphql.mutations import Mutation
from api.graphql.queries import Query
from api.graphql.scalars import SCALARS
from graphql import (
    GraphQLInterfaceType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
)

SDL_FILE: Final = Path(__file__).parent / "schema.graphql"
"""The schema as it is committed, for clients' code generators and for review."""


def build_schema() -> GraphQLSchema:
    """The schema that is served, as graphql-core executes it."""
    return _without_detours(_strawberry_schema())


def sdl() -> str:
    """The schema in GraphQL's schema definition language."""
    return _strawberry_schema().as_str().rstrip() + "\n"


def _strawberry_schema() -> strawberry.Schema:
    return strawberry.Schema(
        query=Query, mutation=Mutation, config=StrawberryConfig(scalar_map=SCALARS)
    )


def _without_detours(schema: strawberry.Schema) -> GraphQLSchema:
    """The graphql-core schema inside, with Strawberry's general ways replaced by direct ones.

    Strawberry finds the member of a union by trying every type there is, checks each object's
    type again, and reads a plain attribute through four calls. Every object here is an instance
    of the class of its GraphQL type, so its class names the type, and `attrgetter` reads it.
    Measured: see benchmarks/README.md.
    """
    inner = schema._schema
    names: dict[type, str] = {}
    for graphql_type in inner.type_map.values():
        if isinstance(graphql_type, GraphQLObjectType):
            definition = graphql_type.extensions.get("strawberry-definition")
            if definition is not None:
                names[definition.origin] = graphql_type.name

    def name_of(value: Any, _info: Any, _type: Any) -> str:
        return names[type(value)]

    for graphql_type in inner.type_map.values():
        if isinstance(graphql_type, GraphQLUnionType | GraphQLInterfaceType):
            graphql_type.resolve_type = name_of
        elif isinstance(graphql_type, GraphQLObjectType):
            if graphql_type.extensions.get("strawberry-definition") is None:
                continue
            graphql_type.is_type_of = None
            for field in graphql_type.fields.values():
                definition = field.extensions.get("strawberry-definition")
                if isinstance(definition, StrawberryField) and definition.is_basic_field:
                    field.resolve = _reader(definition.python_name)
    return inner


def _reader(attribute: str) -> Callable[..., Any]:
    read = attrgetter(attribute)
    return lambda source, _info: read(source)
