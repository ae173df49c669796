"""The limits of an operation's arguments, which hold before GraphQL coerces them.

Arguments that share a variable count each for itself: each is coerced, checked and stored.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

from graphql import (
    BooleanValueNode,
    DocumentNode,
    FieldNode,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLSchema,
    ListValueNode,
    Node,
    ObjectValueNode,
    OperationDefinitionNode,
    SelectionNode,
    ValueNode,
    VariableNode,
)

from job_registry_api.budget import BudgetExceeded, RequestLimits, RequestSize, too_many_values
from job_registry_api.graphql.selections import root_selections


def check_arguments(
    schema: GraphQLSchema,
    operation: OperationDefinitionNode,
    executed: Sequence[FieldNode],
    variables: Mapping[str, Any],
    limits: RequestLimits,
    *,
    names: Container[str] | None = None,
) -> None:
    """Check the arguments of the root fields that are executed: of all, or of those with `names`.

    Raises:
        BudgetExceeded: they have more values, characters or jobs than a limit allows.
    """
    root = schema.get_root_type(operation.operation)
    if root is None:
        return
    fields = [
        each for each in executed if each.arguments and (names is None or each.name.value in names)
    ]
    size = _Size(variables, _defaults(operation), limits)
    for each in fields:
        definition = root.fields.get(each.name.value)
        for argument in each.arguments or ():
            known = definition.args.get(argument.name.value) if definition else None
            size.add_argument(argument.value, known.type if known else None)


def is_small(request: RequestSize | None, fields: RootFields, limits: RequestLimits) -> bool:
    """Return whether a request is so small that `check_arguments` has nothing to find.

    The common case: even if every argument were the whole request, it would be allowed.
    """
    if request is None:
        return False
    uses = fields.uses
    most = min(limits.bulk_size, limits.values)  # `typed_values` is never less.
    return request.values * uses <= most and request.bytes * uses <= limits.body_bytes


class RootFields:
    """The root fields of an operation of a valid document, with fragments in place."""

    def __init__(self, document: DocumentNode, operation: OperationDefinitionNode) -> None:
        self._document = document
        self._operation = operation
        all_ = [*root_selections(document, operation)]
        self._always: Sequence[FieldNode] | None = None
        if not any(node.directives for node in all_):
            self._always = [node for node in all_ if isinstance(node, FieldNode)]

    @cached_property
    def uses(self) -> int:
        """How often the arguments hold one value at most: one more than they use variables."""
        selections = root_selections(self._document, self._operation)
        fields = [node for node in selections if isinstance(node, FieldNode)]
        arguments = [each for node in fields for each in node.arguments or ()]
        return 1 + sum(1 for _ in _variables_in(arguments))

    def executed(self, variables: Mapping[str, Any]) -> Sequence[FieldNode]:
        """Return those that are executed.

        Nothing of a field that `@skip` or `@include` leaves out is coerced.
        """
        if self._always is not None:
            return self._always
        values = {
            definition.variable.name.value: variables.get(
                definition.variable.name.value,
                definition.default_value.value
                if isinstance(definition.default_value, BooleanValueNode)
                else None,
            )
            for definition in self._operation.variable_definitions or ()
        }
        executed = root_selections(
            self._document, self._operation, lambda node: _is_skipped(node, values)
        )
        return [node for node in executed if isinstance(node, FieldNode)]


def _is_skipped(node: SelectionNode, values: Mapping[str, Any]) -> bool:
    """Return whether `@skip` or `@include` certainly leaves a selection out."""
    for directive in node.directives or ():
        for argument in directive.arguments or ():
            value: Any = None
            match argument.value:
                case BooleanValueNode(value=literal):
                    value = literal
                case VariableNode(name=name):
                    value = values.get(name.value)
            if (directive.name.value, value) in (("skip", True), ("include", False)):
                return True
    return False


_LOG_LINE: Final = "JobLogLineInput"
"""The one input type whose lists are not jobs. `heartbeatJob` limits its lines."""


class _Size:
    """The size of arguments, so far. Each addition checks it."""

    def __init__(
        self, variables: Mapping[str, Any], defaults: Mapping[str, ValueNode], limits: RequestLimits
    ) -> None:
        self._variables = variables
        self._defaults = defaults
        self._limits = limits
        self._counted: dict[tuple[str, GraphQLInputType | None], _Count] = {}
        self._jobs = 0
        self._typed = 0
        self._values = 0
        self._characters = 0

    def add_argument(self, node: ValueNode, kind: GraphQLInputType | None) -> None:
        """Add an argument of a root field."""
        item = _nullable(_item_of(kind))
        if isinstance(item, GraphQLInputObjectType) and item.name != _LOG_LINE:
            self._add_jobs(node)
        self._add_literal(node, kind)

    def _add_jobs(self, node: ValueNode) -> None:
        match node:
            case VariableNode():
                value = self._variables.get(node.name.value)
                self._jobs += len(value) if isinstance(value, list) else 1
            case ListValueNode():
                self._jobs += len(node.values)
            case _:
                self._jobs += 1
        if self._jobs > self._limits.bulk_size:
            message = f"The request enqueues {self._jobs:,} jobs. Send several requests."
            raise BudgetExceeded(message, self._limits.bulk_size, "JOBS_MAX_BULK_SIZE")

    def _add_literal(self, node: ValueNode, kind: GraphQLInputType | None) -> None:
        """Add a value in the document, which may hold variables."""
        kind = _nullable(kind)
        match node:
            case VariableNode():
                name = node.name.value
                if name in self._variables:
                    self._add(name, kind)
                elif name in self._defaults:
                    self._add_literal(self._defaults[name], kind)
                return
            case ListValueNode():
                item = _item_of(kind)
                for each in node.values:
                    self._add_literal(each, item)
            case ObjectValueNode():
                for given in node.fields:
                    self._add_literal(given.value, _field_of(kind, given.name.value))
            case _:
                value = getattr(node, "value", None)
                self._characters += len(value) if isinstance(value, str) else 0
        self._values += 1
        self._typed += kind is not None
        self._check()

    def _add(self, name: str, kind: GraphQLInputType | None) -> None:
        """Add the value of a variable."""
        counted = self._counted.get((name, kind))
        if counted is None:
            counted = _count(self._variables[name], kind)
            self._counted[name, kind] = counted
        self._values += counted.values
        self._typed += counted.typed
        self._characters += counted.characters
        self._check()

    def _check(self) -> None:
        limits = self._limits
        if self._values > limits.values:
            raise too_many_values(limits)
        if self._typed > limits.typed_values:
            message = (
                "The arguments have too many values with a type in the schema. Send fewer, or the"
                " payload as JSON."
            )
            raise BudgetExceeded(message, limits.typed_values, "JOBS_MAX_BULK_SIZE")
        if self._characters > limits.body_bytes:
            message = "The arguments are too long together: they share a long variable."
            raise BudgetExceeded(message, limits.body_bytes, "JOBS_MAX_BODY_BYTES")


class _Count(NamedTuple):
    """How many values a value holds, itself included; how many of them have a type in the schema;
    and the length of its texts."""

    values: int
    typed: int
    characters: int


_INNER: Final = (GraphQLList, GraphQLInputObjectType)
"""The types whose values hold others that have a type."""


def _count(value: Any, kind: GraphQLInputType | None) -> _Count:
    """Count a value along its type, as far as the schema has one. Below that it is any JSON."""
    values = typed = characters = 0
    waiting: list[tuple[Any, GraphQLInputType | None]] = [(value, kind)]
    untyped: list[Any] = []
    # The objects of a bulk have the same fields.
    fields_of: dict[GraphQLInputType, dict[str, GraphQLInputType | None]] = {}
    while waiting:
        each, kind = waiting.pop()
        kind = _nullable(kind)
        is_inner = isinstance(kind, _INNER)
        if kind is None or (type(each) in (dict, list) and not is_inner):
            typed += kind is not None
            untyped.append(each)
            continue
        values += 1
        typed += 1
        if type(each) is str:
            characters += len(each)
        elif type(each) is dict:
            characters += sum(map(len, each))
            fields = fields_of.setdefault(kind, {})
            for name, item in each.items():
                if name not in fields:
                    fields[name] = _field_of(kind, name)
                waiting.append((item, fields[name]))
        elif type(each) is list:
            item_kind = _item_of(kind)
            waiting += ((item, item_kind) for item in each)
    while untyped:
        each = untyped.pop()
        values += 1
        if type(each) is str:
            characters += len(each)
        elif type(each) is dict:
            characters += sum(map(len, each))
            untyped += each.values()
        elif type(each) is list:
            untyped += each
    return _Count(values, typed, characters)


def _item_of(kind: GraphQLInputType | None) -> GraphQLInputType | None:
    """Return the type of a list's items; None where it is not a list."""
    kind = _nullable(kind)
    item: GraphQLInputType | None = kind.of_type if isinstance(kind, GraphQLList) else None
    return item


def _nullable(kind: GraphQLInputType | None) -> GraphQLInputType | None:
    while isinstance(kind, GraphQLNonNull):
        kind = kind.of_type
    return kind


def _field_of(kind: GraphQLInputType | None, name: str) -> GraphQLInputType | None:
    """Return the type of a field of an input object, or of that which is a list of one."""
    while isinstance(kind, GraphQLList | GraphQLNonNull):
        kind = kind.of_type
    if not isinstance(kind, GraphQLInputObjectType) or name not in kind.fields:
        return None
    field_kind: GraphQLInputType = kind.fields[name].type
    return field_kind


def _defaults(operation: OperationDefinitionNode) -> dict[str, ValueNode]:
    return {
        each.variable.name.value: each.default_value
        for each in operation.variable_definitions or ()
        if each.default_value is not None
    }


def _variables_in(nodes: Iterable[Node]) -> Iterator[VariableNode]:
    """Yield every use of a variable in these arguments."""
    waiting: list[Any] = [*nodes]
    while waiting:
        match waiting.pop():
            case VariableNode() as node:
                yield node
            case ListValueNode(values=values):
                waiting += values
            case ObjectValueNode(fields=fields):
                waiting += fields
            case node if hasattr(node, "value") and isinstance(node.value, Node):
                waiting.append(node.value)
