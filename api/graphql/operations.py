"""What is done with a GraphQL document: parsed, held to the limits, validated, executed.

HTTP, server-sent events and WebSockets all come through here, so that what is refused on one way
is refused on all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from inspect import isawaitable, iscoroutine
from typing import Any, Final, NamedTuple

from graphql import (
    DocumentNode,
    ExecutionResult,
    Executor,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    GraphQLSchema,
    InlineFragmentNode,
    NoSchemaIntrospectionCustomRule,
    OperationDefinitionNode,
    SelectionSetNode,
    parse,
    specified_rules,
    subscribe,
    validate,
)

from job_registry_api.graphql.context import Context

MAX_CACHED_DOCUMENTS: Final = 500
MAX_CACHED_LENGTH: Final = 20_000
"""A longer document is not cached, so that the cache holds 10 MB of text at most."""

MAX_ERRORS: Final = 20
"""How many faults of one document are told."""


class DocumentRefused(Exception):
    """Raised when a document cannot be executed, whatever its variables are."""

    def __init__(self, errors: list[GraphQLError]) -> None:
        self.errors = errors
        super().__init__(str(errors[0]))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a document may ask for at most; see the settings of these names."""

    tokens: int = 2_000
    depth: int = 15
    aliases: int = 30
    directives: int = 30
    introspection: bool = True
    suggestions: bool = True


class Prepared(NamedTuple):
    """A document that may be executed, and which of its operations was asked for."""

    document: DocumentNode
    operation: OperationDefinitionNode


class Operations:
    """Executes operations of a schema, within limits."""

    def __init__(self, schema: GraphQLSchema, limits: Limits) -> None:
        self._schema = schema
        self._limits = limits
        self._rules = list(specified_rules)
        if not limits.introspection:
            self._rules.append(NoSchemaIntrospectionCustomRule)
        self._known: OrderedDict[str, DocumentNode] = OrderedDict()

    def prepare(self, text: str, operation_name: str | None) -> Prepared:
        """The operation of a document.

        Raises:
            DocumentRefused: the document does not parse, asks for too much, is not valid, or does
                not have the operation.
        """
        document = self._document(text)
        return Prepared(document, _operation(document, operation_name))

    async def execute(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> ExecutionResult:
        """The result of a query or a mutation. One without a path is a fault of the variables."""
        # Not `graphql.execute`, which prepares for @defer and @stream, and not Strawberry's, which
        # costs four times as much. All that our resolvers give to wait for is coroutines, which
        # can be told at a glance.
        executor = Executor.build(
            self._schema,
            prepared.document,
            context_value=context,
            raw_variable_values=variables,
            operation_name=_name(prepared.operation),
            is_awaitable=iscoroutine,  # type: ignore[arg-type]
            hide_suggestions=not self._limits.suggestions,
        )
        if isinstance(executor, list):
            return ExecutionResult(None, executor)
        result = executor.execute_operation()
        if isawaitable(result):
            result = await result
        assert isinstance(result, ExecutionResult)
        return result

    async def subscribe(
        self, prepared: Prepared, variables: dict[str, Any] | None, context: Context
    ) -> AsyncIterator[ExecutionResult] | ExecutionResult:
        """The results of a subscription, or why there are none."""
        subscribed = subscribe(
            self._schema,
            prepared.document,
            context_value=context,
            variable_values=variables,
            operation_name=_name(prepared.operation),
            hide_suggestions=not self._limits.suggestions,
        )
        return await subscribed if isawaitable(subscribed) else subscribed

    def _document(self, text: str) -> DocumentNode:
        """The document of a text. A generated client sends the same few over and over, and to
        parse and validate one takes longer than to execute it."""
        document = self._known.get(text)
        if document is not None:
            self._known.move_to_end(text)
            return document
        try:
            document = parse(text, max_tokens=self._limits.tokens)
            _check_size(document, self._limits)
            errors = validate(
                self._schema,
                document,
                self._rules,
                max_errors=MAX_ERRORS,
                hide_suggestions=not self._limits.suggestions,
            )
        except GraphQLError as error:
            raise DocumentRefused([error]) from None
        except RecursionError:
            raise DocumentRefused([_too_complex("The document is nested too deep.")]) from None
        if errors:
            raise DocumentRefused(_merged(errors))
        if len(text) <= MAX_CACHED_LENGTH:
            self._known[text] = document
            if len(self._known) > MAX_CACHED_DOCUMENTS:
                self._known.popitem(last=False)
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
        message = f"The document has no operation named {name[:100]!r}."
    raise DocumentRefused([GraphQLError(message)])


def _name(operation: OperationDefinitionNode) -> str | None:
    return operation.name.value if operation.name else None


def _merged(errors: list[GraphQLError]) -> list[GraphQLError]:
    """One error for each fault, with every place where it is."""
    nodes: dict[str, list[Any]] = {}
    for error in errors:
        nodes.setdefault(error.message, []).extend(error.nodes or ())
    return [GraphQLError(message, nodes=where) for message, where in nodes.items()]


class _Size(NamedTuple):
    depth: int = 0
    aliases: int = 0
    directives: int = 0


def _check_size(document: DocumentNode, limits: Limits) -> None:
    """Holds every operation, with its fragments in place, to the limits.

    Before validation, whose own time grows with the square of what is asked for twice.

    Raises:
        GraphQLError: an operation asks for too much.
    """
    fragments = {
        node.name.value: node
        for node in document.definitions
        if isinstance(node, FragmentDefinitionNode)
    }
    sizes: dict[str, _Size] = {}
    for node in document.definitions:
        if isinstance(node, OperationDefinitionNode):
            directives = len(node.directives or ()) + sum(
                len(variable.directives or ()) for variable in node.variable_definitions or ()
            )
            size = _size(node.selection_set, fragments, sizes)
        elif isinstance(node, FragmentDefinitionNode):  # Also one that nothing spreads.
            directives = len(node.directives or ())
            size = _size(node.selection_set, fragments, sizes)
        else:
            continue
        for what, came, most in (
            ("levels of fields", size.depth, limits.depth),
            ("aliases and repeated fields", size.aliases, limits.aliases),
            ("directives", size.directives + directives, limits.directives),
        ):
            if came > most:
                raise _too_complex(f"At most {most:,} {what} are taken, and there are more.")


def _size(
    selection_set: SelectionSetNode,
    fragments: dict[str, FragmentDefinitionNode],
    sizes: dict[str, _Size],
) -> _Size:
    """The size of a selection; that of each fragment is counted once and kept in `sizes`."""
    depth = aliases = directives = 0
    names: set[str] = set()
    for node in selection_set.selections:
        directives += len(node.directives or ())
        below, level = _Size(), 0
        match node:
            case FieldNode():
                level = 1
                name = (node.alias or node.name).value
                if node.alias is not None or name in names:
                    aliases += 1
                names.add(name)
                if node.selection_set is not None:
                    below = _size(node.selection_set, fragments, sizes)
            case InlineFragmentNode():
                below = _size(node.selection_set, fragments, sizes)
            case FragmentSpreadNode():
                spread = node.name.value
                if spread in fragments and spread not in sizes:
                    sizes[spread] = _Size()  # One that spreads itself is refused by validation.
                    fragment = fragments[spread]
                    own = _size(fragment.selection_set, fragments, sizes)
                    own_directives = own.directives + len(fragment.directives or ())
                    sizes[spread] = own._replace(directives=own_directives)
                below = sizes.get(spread, _Size())
        depth = max(depth, level + below.depth)
        aliases += below.aliases
        directives += below.directives
    return _Size(depth, aliases, directives)


def _too_complex(message: str) -> GraphQLError:
    return GraphQLError(message, extensions={"code": "document_too_complex"})
