"""Parses, validates and executes GraphQL documents.

HTTP, server-sent events and WebSockets all use `Executor`, so that the same limits hold for each.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from inspect import isawaitable
from typing import Any, Final, NamedTuple

from graphql import (
    DocumentNode,
    ExecutionResult,
    GraphQLError,
    GraphQLSchema,
    GraphQLSyntaxError,
    Node,
    NoSchemaIntrospectionCustomRule,
    OperationDefinitionNode,
    OperationType,
    create_source_event_stream,
    execute,
    parse,
    specified_rules,
    validate,
)
from graphql import Executor as OperationExecutor
from pydantic_core import to_json
from strawberry.schema.validation_rules.one_of import OneOfInputValidationRule

from job_registry_api.auth import Caller, Forbidden
from job_registry_api.budget import Budget, BudgetExceeded, RequestLimits
from job_registry_api.graphql.admission import Admission, View
from job_registry_api.graphql.argument_limits import RootFields, check_arguments, is_small
from job_registry_api.graphql.compiled import CompiledOperation
from job_registry_api.graphql.context import Context, SentVariables, sent_variables
from job_registry_api.graphql.document_limits import (
    Limits,
    check_length,
    check_size,
    has_too_many,
    too_complex,
)
from job_registry_api.graphql.persisted_documents import PersistedDocuments, names_document
from job_registry_api.graphql.request_errors import (
    BAD_REQUEST,
    MAX_ERRORS,
    OPERATION_RESOLUTION_FAILURE,
    PARSE_FAILED,
    VALIDATION_FAILED,
    coded,
    format_error,
    format_exception,
    format_result,
    message_of,
)
from job_registry_api.graphql.selections import Selections
from job_registry_api.graphql.shared_events import Answers, SharedEvents, answers_of
from job_registry_api.graphql.subscriptions import FollowedJobs

MAX_CACHED_BYTES: Final = 32_000_000
"""The most memory that parsed documents and compiled operations are kept in."""

BYTES_PER_TOKEN: Final = 600
"""The memory of a parsed document, measured: 300 to 560 bytes per token."""

BYTES_PER_FIELD: Final = 1_500
"""The memory of a compiled operation, measured: 800 to 1,260 bytes per field."""

USES_TO_COMPILE: Final = 2
"""An operation is compiled when it is executed so often: most documents of people come once."""


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
    root_fields: RootFields
    selections: Selections
    compiled: CompiledOperation | None = None

    @property
    def is_mutation(self) -> bool:
        return self.operation.operation is OperationType.MUTATION

    @property
    def is_subscription(self) -> bool:
        return self.operation.operation is OperationType.SUBSCRIPTION


class Executor:
    """Executes operations of the schema that a caller is admitted to, within limits."""

    def __init__(
        self,
        admission: Admission,
        limits: Limits,
        request_limits: RequestLimits = RequestLimits(),
        persisted: PersistedDocuments | None = None,
    ) -> None:
        self._admission = admission
        self._limits = limits
        self.request_limits = request_limits
        self._rules = [*specified_rules, OneOfInputValidationRule]
        if not limits.introspection:
            self._rules.append(NoSchemaIntrospectionCustomRule)
        self._documents = _DocumentCache()
        admission.when_dropped(self._documents.forget)
        self._persisted = PersistedDocuments() if persisted is None else persisted
        self._shared = SharedEvents()

    def prepare(self, request: Mapping[str, Any], caller: Caller) -> Prepared:
        """Parse the document of a request, and validate it against what the caller may see.

        `request` has the members of a GraphQL request, checked by `request_faults`. The document is
        its `query`, or one that it names (see `PersistedDocuments`).

        Raises:
            DocumentRefused: the document is not there, does not parse, exceeds a limit, is not
                valid, or lacks the operation; or the caller may do nothing.
        """
        try:
            view = self._admission.view_of(caller)
        except Forbidden as forbidden:
            extensions = {"code": forbidden.code}
            raise DocumentRefused([GraphQLError(str(forbidden), extensions=extensions)]) from None
        try:
            named = self._persisted.find(request)
        except GraphQLError as error:
            raise DocumentRefused([error]) from None
        document = self._document(named.text, view)
        self._persisted.keep(named)
        return document.prepared(request.get("operationName"))

    async def execute(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> ExecutionResult:
        """Execute a query or a mutation. An error without a path is a fault of the variables."""
        refused = self._refused(prepared, variables, context)
        if refused is not None:
            return refused
        if prepared.compiled is not None:
            return await prepared.compiled.execute(
                context, variables or {}, hide_suggestions=not self._limits.suggestions
            )
        result = execute(
            prepared.schema,
            prepared.document,
            context_value=context,
            variable_values=variables,
            operation_name=_name(prepared.operation),
            hide_suggestions=not self._limits.suggestions,
        )
        return await result if isawaitable(result) else result

    async def results(
        self,
        prepared: Prepared,
        variables: dict[str, Any] | None,
        context: Context,
        after: str | None = None,
    ) -> AsyncGenerator[Answers]:
        """Yield the result of a query or mutation, or the results of the events of a subscription.

        A subscription continues after the event with the id `after`. When it fails, for example
        because its token expires, the last result is that error.
        """
        try:
            if prepared.is_subscription:
                async with aclosing(self._events(prepared, variables, context, after)) as results:
                    async for answers in results:
                        yield answers
            else:
                result = await self.execute(prepared, variables, context)
                yield await answers_of(format_result(result))
        except Exception as error:
            yield await answers_of({"errors": [format_exception(error)]})

    def _refused(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> ExecutionResult | None:
        """Return the result of an operation that is not executed; None if it may be.

        The scopes of its fields are checked first, then the size of its arguments, before they are
        coerced. This begins its budget.
        """
        executed = prepared.root_fields.executed(variables or {})
        refusals = self._admission.refusals(prepared.operation.operation, executed, context.caller)
        if refusals:
            return ExecutionResult(None, refusals)
        context.budget = Budget(self.request_limits)
        context.selections = prepared.selections
        sent_variables.set(SentVariables(variables or {}, prepared.operation))
        if is_small(context.size, prepared.root_fields, self.request_limits):
            return None
        try:
            check_arguments(
                prepared.schema,
                prepared.operation,
                executed,
                variables or {},
                self.request_limits,
            )
        except BudgetExceeded as exceeded:
            return ExecutionResult(None, [GraphQLError("", original_error=exceeded)])
        return None

    async def _events(
        self,
        prepared: Prepared,
        variables: dict[str, Any] | None,
        context: Context,
        after: str | None,
    ) -> AsyncGenerator[Answers]:
        def built(context: Context) -> OperationExecutor[Any] | list[GraphQLError]:
            return OperationExecutor.build(
                prepared.schema,
                prepared.document,
                context_value=context,
                raw_variable_values=variables,
                operation_name=_name(prepared.operation),
                hide_suggestions=not self._limits.suggestions,
            )

        def built_again(context: Context) -> OperationExecutor[Any]:
            again = built(context)
            assert isinstance(again, OperationExecutor)
            return again

        refused = self._refused(prepared, variables, context)
        if refused is not None:
            yield await answers_of(format_result(refused))
            return
        operation = built(context)
        if isinstance(operation, list):
            yield await answers_of(format_result(ExecutionResult(None, operation)))
            return
        created = create_source_event_stream(operation)
        source = await created if isawaitable(created) else created
        if isinstance(source, ExecutionResult):
            yield await answers_of(format_result(source))
            return
        assert isinstance(source, FollowedJobs)
        same = (prepared, to_json(variables or {}))
        async with aclosing(self._shared.answers(same, built_again, source, after)) as results:
            async for answers in results:
                yield answers

    def _document(self, text: str, view: View) -> _Document:
        """Return the document of a text that is valid in a caller's view of the schema.

        A generated client sends the same few documents again and again, and to parse and validate
        one takes longer than to execute it.
        """
        kept = self._documents.get(text, view.job_types)
        if kept is not None:
            return kept
        try:
            check_length(text, self._limits)
            document = parse(text, max_tokens=self._limits.tokens)
            check_size(document, self._limits)
            errors = validate(
                view.schema,
                document,
                self._rules,
                max_errors=MAX_ERRORS,
                hide_suggestions=not self._limits.suggestions,
            )
        except GraphQLSyntaxError as error:
            if f"more than {self._limits.tokens} tokens" in error.message:
                setting = "JOBS_MAX_QUERY_TOKENS"
                refusal = has_too_many("tokens", self._limits.tokens, setting)
                raise DocumentRefused([refusal]) from None
            raise DocumentRefused([_shortened(error, PARSE_FAILED)]) from None
        except GraphQLError as error:
            raise DocumentRefused([error]) from None
        except RecursionError:
            raise DocumentRefused([too_complex("The document is nested too deep.")]) from None
        if errors:
            raise DocumentRefused(_merged(errors))
        grown = partial(self._documents.grow, (text, view.job_types))
        return self._documents.add(_Document(text, document, view, grown))


def request_faults(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an error for each member of a GraphQL request that is wrong."""
    faults = []
    query = request.get("query")
    if query in (None, ""):  # The client of graphql-ws cannot leave it out.
        is_wrong = not names_document(request)
    else:
        is_wrong = not isinstance(query, str) or not query.strip()
    if is_wrong:
        faults.append("query has to be a string with a GraphQL document.")
    if not isinstance(request.get("variables"), dict | None):
        faults.append("variables has to be an object or null.")
    if not isinstance(request.get("extensions"), dict | None):
        faults.append("extensions has to be an object or null.")
    if not isinstance(request.get("operationName"), str | None):
        faults.append("operationName has to be a string or null.")
    return [format_error(coded(BAD_REQUEST, fault)) for fault in faults]


class _Document:
    """A valid document, and its operations: compiled, if they were executed before."""

    def __init__(
        self, text: str, document: DocumentNode, view: View, grown: Callable[[int], None]
    ) -> None:
        self.text = text
        self.job_types = view.job_types
        self._document = document
        self._compiler = view.compiler
        self._grown = grown
        self._operations: dict[str | None, tuple[Prepared, int]] = {}
        tokens = document.token_count or len(text)
        self.bytes = sys.getsizeof(text) + BYTES_PER_TOKEN * tokens
        """About how many bytes of memory it takes, with what is compiled of it."""

    def prepared(self, name: str | None) -> Prepared:
        """Return an operation, by its name if the document has several.

        Raises:
            DocumentRefused: it has none of this name.
        """
        known = self._operations.get(name)
        if known is None:
            operation = _operation(self._document, name)
            known = (
                Prepared(
                    self._document,
                    operation,
                    self._compiler.schema,
                    RootFields(self._document, operation),
                    Selections(self._document, operation),
                ),
                0,
            )
        prepared, uses = known
        uses += 1
        if uses == USES_TO_COMPILE:
            compiled = self._compiler.compile(self._document, prepared.operation, self._grown)
            prepared = prepared._replace(compiled=compiled)
        if uses <= USES_TO_COMPILE:
            self._operations[name] = prepared, uses
        return prepared


class _DocumentCache:
    """The documents that were used last, up to a size in memory.

    A document is valid for the job types that its sender may see.
    """

    def __init__(self) -> None:
        self._documents: OrderedDict[tuple[str, frozenset[str] | None], _Document] = OrderedDict()
        self._bytes = 0

    def get(self, text: str, job_types: frozenset[str] | None) -> _Document | None:
        document = self._documents.get((text, job_types))
        if document is not None:
            self._documents.move_to_end((text, job_types))
        return document

    def add(self, document: _Document) -> _Document:
        """Keep a document, and drop those that were not used for the longest time."""
        self._documents[document.text, document.job_types] = document
        self._take(document.bytes)
        return document

    def grow(self, key: tuple[str, frozenset[str] | None], fields: int) -> None:
        """Count fields of a document that were compiled, unless it was dropped."""
        document = self._documents.get(key)
        if document is not None:
            document.bytes += BYTES_PER_FIELD * fields
            self._take(BYTES_PER_FIELD * fields)

    def forget(self, job_types: frozenset[str]) -> None:
        """Drop the documents of a schema."""
        for key in [key for key in self._documents if key[1] == job_types]:
            self._bytes -= self._documents.pop(key).bytes

    def _take(self, size: int) -> None:
        """Count memory, and drop the documents that were not used for the longest time."""
        self._bytes += size
        while self._bytes > MAX_CACHED_BYTES:
            _, dropped = self._documents.popitem(last=False)
            self._bytes -= dropped.bytes


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
    raise DocumentRefused([coded(OPERATION_RESOLUTION_FAILURE, message)])


def _name(operation: OperationDefinitionNode) -> str | None:
    return operation.name.value if operation.name else None


def _merged(errors: list[GraphQLError]) -> list[GraphQLError]:
    """Return one error per message, with every place where it occurs."""
    nodes: dict[str, list[Node]] = {}
    for error in errors:
        nodes.setdefault(error.message, []).extend(error.nodes or ())
    return [
        _shortened(GraphQLError(message, nodes=where), VALIDATION_FAILED)
        for message, where in nodes.items()
    ]


def _shortened(error: GraphQLError, code: str) -> GraphQLError:
    """Return an error with a code, whose message quotes at most 1,000 characters."""
    return GraphQLError(
        message_of(error),
        nodes=error.nodes,
        source=error.source,
        positions=error.positions,
        extensions={"code": code},
    )
