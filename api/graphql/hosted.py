"""`graphql_types`: the types of this schema, for the Strawberry schema of a host application.

Their resolvers run in the host's executor and with the host's context. Access scopes, budgets and
the limits of arguments hold there too. The limits of documents are the host's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import strawberry
from graphql import DocumentNode, GraphQLError, OperationDefinitionNode, OperationType
from strawberry.extensions import SchemaExtension
from strawberry.schema import ExceptionHandler
from strawberry.schema.name_converter import NameConverter
from strawberry.types import ExecutionContext, StreamExecutionResult
from strawberry.types.base import StrawberryObjectDefinition
from strawberry.types.enum import StrawberryEnumDefinition
from strawberry.types.scalar import ScalarDefinition
from strawberry.types.union import StrawberryUnion

from job_registry import CodedError
from job_registry_api.budget import BudgetExceeded, RequestLimits
from job_registry_api.graphql.argument_limits import RootFields, check_arguments
from job_registry_api.graphql.context import (
    Authenticate,
    HostedOperation,
    SentVariables,
    hosted_operation,
    sent_variables,
)
from job_registry_api.graphql.errors import EXCEPTION_HANDLERS
from job_registry_api.graphql.mutations import Mutation
from job_registry_api.graphql.queries import Query
from job_registry_api.graphql.scalars import scalars_of_host
from job_registry_api.graphql.schema import executable, mutation_of, schema_with
from job_registry_api.graphql.subscriptions import Subscription
from job_registry_api.queue.queue import JobQueue


@dataclass(frozen=True, slots=True)
class GraphQLTypes:
    """The parts of a host's Strawberry schema. The schema needs all of them.

    jobs = graphql_types(queue, authenticate=caller_of)
    schema = strawberry.Schema(
        query=merge_types("Query", (Query, jobs.query)),
        mutation=merge_types("Mutation", (Mutation, jobs.mutation)),
        subscription=jobs.subscription,
        extensions=[*jobs.extensions],
        exception_handlers=[*jobs.exception_handlers],
        config=StrawberryConfig(scalar_map=jobs.scalars, name_converter=jobs.name_converter),
    )
    """

    query: type[Query]
    mutation: type[Mutation]
    subscription: type[Subscription]
    extensions: Sequence[type[SchemaExtension]]
    exception_handlers: Sequence[ExceptionHandler[Any]]
    scalars: Mapping[object, ScalarDefinition]
    name_converter: NameConverter


def graphql_types(
    queue: JobQueue,
    *,
    authenticate: Authenticate | None = None,
    prefix: str = "",
    scalars: Mapping[object, ScalarDefinition] = {},
    limits: RequestLimits = RequestLimits(),
) -> GraphQLTypes:
    """Return the types of the queue's schema for a host's Strawberry schema.

    `authenticate` gets the host's context (`info.context`), and returns the `Caller`, or None for
    no access; without it, nobody has access. It is called once per operation that has one of these
    fields. `prefix` stands before the names of all types, for a host that has types of the same
    names. `scalars` is the host's own `scalar_map`, if it has one. `limits` bound one operation.

    Raises:
        DefinitionError: the names of two job types collide in the GraphQL schema.
    """
    mutation = mutation_of(queue.registry)
    schema = schema_with(mutation)
    roots = map(executable(schema).get_root_type, OperationType)
    names = frozenset(name for root in roots if root is not None for name in root.fields)

    class JobsOperation(SchemaExtension):
        """Begins an operation that has root fields of the queue, and gives its errors codes."""

        def on_execute(self) -> Iterator[None]:
            # An operation that a resolver of another one executes, in the same task, must not leave
            # its caller to the fields that follow there.
            outer, outer_variables = hosted_operation.get(), sent_variables.get()
            try:
                hosted_operation.set(self._begun())
                yield
            finally:
                hosted_operation.set(outer)
                sent_variables.set(outer_variables)
            _add_codes(getattr(self.execution_context.result, "errors", None))

        def _begun(self) -> HostedOperation | None:
            """Return the operation; None if it has no root fields of the queue."""
            executed = _operation_of(self.execution_context)
            variables = self.execution_context.variables or {}
            sent_variables.set(None if executed is None else SentVariables(variables, executed[1]))
            if executed is None:
                return None
            fields = RootFields(*executed).executed(variables)
            if not any(each.name.value in names for each in fields):
                return None
            try:
                check_arguments(
                    executable(self.execution_context.schema),
                    executed[1],
                    fields,
                    variables,
                    limits,
                    names=names,
                )
            except BudgetExceeded as exceeded:
                raise GraphQLError(str(exceeded), extensions=_extensions(exceeded)) from None
            context = self.execution_context.context
            return HostedOperation(queue, authenticate or _no_access, limits, context, executed)

        def on_stream_result(self, result: StreamExecutionResult) -> Iterator[None]:
            _add_codes(getattr(result, "errors", None))
            yield

    return GraphQLTypes(
        query=Query,
        mutation=mutation,
        subscription=Subscription,
        extensions=(JobsOperation,),
        exception_handlers=EXCEPTION_HANDLERS,
        scalars=scalars_of_host(scalars),
        name_converter=_PrefixedNames(prefix, schema),
    )


def _no_access(_context: Any) -> None:
    return None


def _operation_of(
    context: ExecutionContext,
) -> tuple[DocumentNode, OperationDefinitionNode] | None:
    """Return the document and the operation that is executed."""
    document, name = context.graphql_document, context.operation_name
    for node in document.definitions if document is not None else ():
        if isinstance(node, OperationDefinitionNode) and (
            name is None or (node.name is not None and node.name.value == name)
        ):
            assert document is not None
            return document, node
    return None


def _add_codes(errors: Sequence[GraphQLError] | None) -> None:
    """Give errors of the queue their code and details."""
    for error in errors or ():
        if isinstance(error.original_error, CodedError) and not error.extensions:
            error.extensions = _extensions(error.original_error)


def _extensions(error: CodedError) -> dict[str, Any]:
    return {"code": error.code, **error.details()}


class _PrefixedNames(NameConverter):
    """Puts a prefix before the names of our types, and leaves those of the host as they are."""

    def __init__(self, prefix: str, schema: strawberry.Schema) -> None:
        super().__init__()
        self._prefix = prefix
        definitions = [schema.get_type_by_name(name) for name in executable(schema).type_map]
        self._ours = {each for each in map(_class_of, definitions) if each is not None}

    def from_type(self, type_: Any) -> str:
        name = super().from_type(type_)
        return f"{self._prefix}{name}" if self._is_ours(type_) else name

    def _is_ours(self, type_: Any) -> bool:
        if isinstance(type_, StrawberryUnion):
            return type_.graphql_name is not None and all(
                _class_of(getattr(each, "__strawberry_definition__", None)) in self._ours
                for each in type_.types
            )
        return _class_of(type_) in self._ours


def _class_of(definition: object) -> type | None:
    """Return the class that an object, an input or an enum of a schema is made from."""
    match definition:
        case StrawberryObjectDefinition():
            return definition.origin
        case StrawberryEnumDefinition():
            return definition.wrapped_cls
    return None
