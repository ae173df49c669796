"""Parses, validates and executes GraphQL documents.

HTTP, server-sent events and WebSockets all use `Executor`, so that the same limits hold for each.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from inspect import isawaitable
from typing import Any, Final, NamedTuple

from graphql import (
    DocumentNode,
    ExecutionResult,
    GraphQLError,
    GraphQLSchema,
    Node,
    NoSchemaIntrospectionCustomRule,
    OperationDefinitionNode,
    OperationType,
    execute,
    parse,
    specified_rules,
    subscribe,
    validate,
)
from strawberry.schema.validation_rules.one_of import OneOfInputValidationRule

from job_registry_api.auth import Caller, Forbidden, Unauthenticated
from job_registry_api.graphql.admission import Admission
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.document_limits import Limits, check_size, too_complex
from job_registry_api.graphql.request_errors import format_exception, format_result

MAX_CACHED_DOCUMENTS: Final = 500
MAX_CACHED_LENGTH: Final = 20_000
"""A longer document is not cached, so that the cache holds 10 MB of text at most."""

MAX_ERRORS: Final = 20
"""The most errors that the response lists for one document."""

_A_YEAR: Final = 31_536_000.0
"""An event loop cannot wait for an arbitrarily long time."""


class DocumentRefused(Exception):
    """Raised when a document cannot be executed, with any variables."""

    def __init__(self, errors: list[GraphQLError]) -> None:
        self.errors = errors
        super().__init__(str(errors[0]))


class Prepared(NamedTuple):
    """A document that may be executed, and the operation to execute."""

    document: DocumentNode
    operation: OperationDefinitionNode
    schema: GraphQLSchema
    """The schema with the job types that the caller may see."""

    @property
    def is_mutation(self) -> bool:
        """Whether the operation is a mutation."""
        return self.operation.operation is OperationType.MUTATION

    @property
    def is_subscription(self) -> bool:
        """Whether the operation is a subscription."""
        return self.operation.operation is OperationType.SUBSCRIPTION


class Executor:
    """Executes operations of the schema that a caller is admitted to, within limits."""

    def __init__(self, admission: Admission, limits: Limits) -> None:
        self._admission = admission
        self._limits = limits
        self._rules = [*specified_rules, OneOfInputValidationRule]
        if not limits.introspection:
            self._rules.append(NoSchemaIntrospectionCustomRule)
        self._documents: OrderedDict[tuple[GraphQLSchema, str], DocumentNode] = OrderedDict()

    def prepare(self, text: str, operation_name: str | None, caller: Caller) -> Prepared:
        """Parse a document, and validate it against what the caller may see of the schema.

        Raises:
            DocumentRefused: the document does not parse, exceeds a limit, is not valid, or lacks
                the operation; or the caller may do nothing.
        """
        try:
            schema = self._admission.schema_for(caller)
        except Forbidden as forbidden:
            extensions = {"code": forbidden.code}
            raise DocumentRefused([GraphQLError(str(forbidden), extensions=extensions)]) from None
        document = self._document(text, schema)
        return Prepared(document, _operation(document, operation_name), schema)

    async def execute(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> ExecutionResult:
        """Execute a query or a mutation. An error without a path is a fault of the variables."""
        refusals = self._admission.refusals(*prepared[:2], variables, context.caller)
        if refusals:
            return ExecutionResult(None, refusals)
        result = execute(
            prepared.schema, prepared.document, **self._options(prepared, variables, context)
        )
        return await result if isawaitable(result) else result

    async def results(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield the formatted result of a query or mutation, or one per event of a subscription.

        When a subscription fails, for example because its token expires, the last result is that
        error.
        """
        try:
            if prepared.is_subscription:
                async with aclosing(self._events(prepared, variables, context)) as events:
                    async for result in events:
                        yield format_result(result)
            else:
                yield format_result(await self.execute(prepared, variables, context))
        except Exception as error:
            yield {"errors": [format_exception(error)]}

    def _options(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> dict[str, Any]:
        """Return the arguments that `execute` and `subscribe` share."""
        return {
            "context_value": context,
            "variable_values": variables,
            "operation_name": _name(prepared.operation),
            "hide_suggestions": not self._limits.suggestions,
        }

    async def _events(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> AsyncGenerator[ExecutionResult]:
        refusals = self._admission.refusals(*prepared[:2], variables, context.caller)
        if refusals:
            yield ExecutionResult(None, refusals)
            return
        subscribed = subscribe(
            prepared.schema, prepared.document, **self._options(prepared, variables, context)
        )
        results = await subscribed if isawaitable(subscribed) else subscribed
        if isinstance(results, ExecutionResult):
            yield results
            return
        assert isinstance(results, AsyncGenerator)
        expires_at = context.caller.expires_at
        async with aclosing(results):
            while True:
                left = None if expires_at is None else min(expires_at - time.time(), _A_YEAR)
                try:
                    async with asyncio.timeout(left):
                        result = await anext(results)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise Unauthenticated("The token has expired.") from None
                yield result

    def _document(self, text: str, schema: GraphQLSchema) -> DocumentNode:
        """Return the document of a text that is valid in a schema.

        A generated client sends the same few documents again and again, and to parse and validate
        one takes longer than to execute it.
        """
        document = self._documents.get((schema, text))
        if document is not None:
            self._documents.move_to_end((schema, text))
            return document
        try:
            document = parse(text, max_tokens=self._limits.tokens)
            check_size(document, self._limits)
            errors = validate(
                schema,
                document,
                self._rules,
                max_errors=MAX_ERRORS,
                hide_suggestions=not self._limits.suggestions,
            )
        except GraphQLError as error:
            raise DocumentRefused([error]) from None
        except RecursionError:
            raise DocumentRefused([too_complex("The document is nested too deep.")]) from None
        if errors:
            raise DocumentRefused(_merged(errors))
        if len(text) <= MAX_CACHED_LENGTH:
            self._documents[schema, text] = document
            if len(self._documents) > MAX_CACHED_DOCUMENTS:
                self._documents.popitem(last=False)
        return document


def _operation(document: DocumentNode, name: str | None) -> OperationDefinitionNode:
    operations = [
        node for node in document.definitions if isinstance(node, OperationDefinitionNode)
    ]
    if name is None and len(operations) == 1:
        return operations[0]
    for operation in operations:
        if name is not None and _name(operation) == name:
            return operation
    if name is None and operations:
        message = "The document has several operations; operationName has to name one."
    elif name is None:
        message = "The document has no operation."
    else:
        message = f'The document has no operation named "{name[:100]}".'
    raise DocumentRefused([GraphQLError(message)])


def _name(operation: OperationDefinitionNode) -> str | None:
    return operation.name.value if operation.name else None


def _merged(errors: list[GraphQLError]) -> list[GraphQLError]:
    """Return one error per message, with every place where it occurs."""
    nodes: dict[str, list[Node]] = {}
    for error in errors:
        nodes.setdefault(error.message, []).extend(error.nodes or ())
    return [GraphQLError(message, nodes=where) for message, where in nodes.items()]
