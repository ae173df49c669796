"""Builds the schema, and prints it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import strawberry
from graphql import (
    GraphQLObjectType,
    GraphQLSchema,
    Node,
    Visitor,
    parse,
    print_ast,
    visit,
)
from strawberry.schema.config import StrawberryConfig

from job_registry import JobRegistry
from job_registry_api.graphql.access_scopes import GUARDED, check_access_scope
from job_registry_api.graphql.errors import EXCEPTION_HANDLERS
from job_registry_api.graphql.federation import SCALARS as FEDERATION_SCALARS
from job_registry_api.graphql.federation import SUBGRAPH, federated_query
from job_registry_api.graphql.mutations import Mutation
from job_registry_api.graphql.queries import Query
from job_registry_api.graphql.scalars import SCALARS
from job_registry_api.graphql.subscriptions import Subscription
from job_registry_api.graphql.typed_input import typed_job_input
from job_registry_api.graphql.typed_mutation import mutation_with_enqueue

ONE_OF: Final = "directive @oneOf on INPUT_OBJECT"

SDL_FILE: Final = Path(__file__).parent / "schema.graphql"
"""The schema as it is committed, for clients' code generators and for review."""


def build_schema(registry: JobRegistry, *, federation: bool = False) -> strawberry.Schema:
    """Build the schema for these job types. With `federation`, it is served as a subgraph.

    Raises:
        DefinitionError: the job types cannot stand together in `TypedJobInput`.
        LookupError: a field does not declare its access scope.
    """
    query = federated_query(subgraph_sdl(registry)) if federation else Query
    return schema_with(mutation_of(registry), query)


def mutation_of(registry: JobRegistry) -> type[Mutation]:
    """Return the mutations, with `enqueue` for these job types.

    Raises:
        DefinitionError: the job types cannot stand together in `TypedJobInput`.
    """
    typed_input = typed_job_input(
        registry, lambda name: _without_job_types().get_type_by_name(name) is not None
    )
    return Mutation if typed_input is None else mutation_with_enqueue(typed_input)


def executable(schema: strawberry.Schema) -> GraphQLSchema:
    """Return the schema as graphql-core executes it.

    The one private attribute of a library that is used here: Strawberry has no public name for it,
    and its own integrations read it.
    """
    return schema._schema


def sdl(registry: JobRegistry) -> str:
    """Return the schema of these job types in GraphQL's schema definition language."""
    # GraphQL has the directive @oneOf itself, and Strawberry declares it as well.
    return build_schema(registry).as_str().removeprefix(ONE_OF).strip() + "\n"


def subgraph_sdl(registry: JobRegistry) -> str:
    """Return the schema as `sdl` does, as a subgraph of Apollo Federation."""
    # Composition does not know the directive by itself.
    return f"{ONE_OF}\n\n{sdl(registry)}\n{SUBGRAPH}"


def bare_sdl(registry: JobRegistry) -> str:
    """Return the schema as `sdl` does, without descriptions: they are not part of the contract."""
    document = parse(sdl(registry), no_location=True)
    return print_ast(visit(document, _WithoutDescriptions())) + "\n"


class _WithoutDescriptions(Visitor):
    def enter(self, node: Any, *_: Any) -> Node | None:
        described = getattr(node, "description", None) is not None
        return replace(node, description=None) if described else None


@cache
def _without_job_types() -> strawberry.Schema:
    return schema_with(Mutation)


def schema_with(mutation: type[Mutation], query: type[Query] = Query) -> strawberry.Schema:
    """Build the schema with these mutations and queries.

    Raises:
        LookupError: a field does not declare its access scope.
    """
    schema = strawberry.Schema(
        query=query,
        mutation=mutation,
        subscription=Subscription,
        config=StrawberryConfig(scalar_map={**SCALARS, **FEDERATION_SCALARS}),
        exception_handlers=EXCEPTION_HANDLERS,
    )
    _check_access_scopes(schema)
    return schema


def _check_access_scopes(schema: strawberry.Schema) -> None:
    for graphql_type in executable(schema).type_map.values():
        if isinstance(graphql_type, GraphQLObjectType) and graphql_type.name in GUARDED:
            for name in graphql_type.fields:
                field = schema.get_field_for_type(name, graphql_type.name)
                assert field is not None
                check_access_scope(graphql_type.name, field)
