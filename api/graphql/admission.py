"""What a caller may see of the schema, and which fields it may use, before anything is coerced.

A caller that is limited to some job types gets a schema with only these in `TypedJobInput`.
Validation, suggestions and introspection then cannot mention the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import strawberry
from graphql import (
    FieldNode,
    GraphQLError,
    GraphQLSchema,
    OperationType,
)

from job_registry import JobRegistry
from job_registry_api.auth import ACCESS_SCOPES, AccessScope, Caller, Forbidden
from job_registry_api.graphql.access_scopes import access_scopes_of
from job_registry_api.graphql.compiled import Compiler, StrawberryClasses
from job_registry_api.graphql.schema import build_schema, executable

MAX_SCHEMAS: Final = 64
"""Schemas that are kept for sets of job types. One takes 0.3 MB, and 25 ms to build."""


class View(NamedTuple):
    """The schema as a caller sees it. `job_types` are those in it; None means all."""

    schema: GraphQLSchema
    job_types: frozenset[str] | None
    compiler: Compiler
    """Compiles the operations of this schema."""


class Admission:
    """Admits callers to the fields and job types of a schema."""

    def __init__(self, registry: JobRegistry, *, federation: bool = False) -> None:
        self._registry = registry
        self._federation = federation
        schema = build_schema(registry, federation=federation)
        self._view = _view(schema, None)
        self._limited: OrderedDict[frozenset[str], View] = OrderedDict()
        self._when_dropped: Callable[[frozenset[str]], None] | None = None
        self._access_scopes: dict[OperationType, dict[str, tuple[AccessScope, ...]]] = {
            operation: {
                name: access_scopes_of(schema, root.name, name) or ACCESS_SCOPES
                for name in root.fields
            }
            for operation in OperationType
            if (root := self._view.schema.get_root_type(operation)) is not None
        }

    def view_of(self, caller: Caller) -> View:
        """Return the schema with the job types that a caller may see.

        Raises:
            Forbidden: the caller has no access scope at all.
        """
        caller.need(*ACCESS_SCOPES)
        if caller.job_types is None:
            return self._view
        visible = caller.job_types & frozenset(self._registry)
        if len(visible) == len(self._registry):
            return self._view
        limited = self._limited.get(visible)
        if limited is None:
            types = [self._registry[name] for name in sorted(visible)]
            schema = build_schema(JobRegistry(types), federation=self._federation)
            limited = self._limited[visible] = _view(schema, visible)
            if len(self._limited) > MAX_SCHEMAS:
                dropped, _ = self._limited.popitem(last=False)
                if self._when_dropped is not None:
                    self._when_dropped(dropped)
        self._limited.move_to_end(visible)
        return limited

    def when_dropped(self, forget: Callable[[frozenset[str]], None]) -> None:
        """Have `forget` called with the job types of each schema that is dropped."""
        self._when_dropped = forget

    def refusals(
        self, operation: OperationType, executed: Iterable[FieldNode], caller: Caller
    ) -> list[GraphQLError]:
        """Return an error for each of these root fields that a caller may not use.

        If there is one, nothing of the operation may be executed, and its variables are not to be
        coerced.
        """
        needed = self._access_scopes[operation]
        errors = []
        for node in executed:
            try:
                caller.need(*needed.get(node.name.value, ACCESS_SCOPES))
            except Forbidden as forbidden:
                key = (node.alias or node.name).value
                errors.append(GraphQLError("", node, path=[key], original_error=forbidden))
        return errors


def _view(schema: strawberry.Schema, job_types: frozenset[str] | None) -> View:
    compiler = Compiler(executable(schema), StrawberryClasses(schema))
    return View(compiler.schema, job_types, compiler)
