"""Compiles the selections of an operation.

A completer turns a value into its part of the answer, or raises `Odd`. The awaitables of resolvers
are collected in `Branch.waiting`, to be awaited together, so that data loaders load for all objects
of a level at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from math import isfinite
from types import CoroutineType, GeneratorType
from typing import Any, Final, NamedTuple, Protocol

from graphql import (
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLBoolean,
    GraphQLEnumType,
    GraphQLField,
    GraphQLFloat,
    GraphQLID,
    GraphQLInt,
    GraphQLInterfaceType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLOutputType,
    GraphQLResolveInfo,
    GraphQLResolveInfoHelpers,
    GraphQLScalarType,
    GraphQLSchema,
    GraphQLString,
    GraphQLUnionType,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionNode,
    SelectionSetNode,
    Undefined,
    VariableValues,
    is_abstract_type,
    type_from_ast,
)
from graphql.pyutils import Path, gather_with_cancel, is_awaitable

from job_registry_api.graphql.compiled.inputs import MAX_INT, MIN_INT, Arguments, compile_arguments
from job_registry_api.graphql.compiled.leaving import NotCompiled, Odd


class Classes(Protocol):
    """Information about the Python classes behind a schema."""

    def class_of(self, type_name: str) -> type | None:
        """Return the class whose direct instances are all of this object type or enum; None if
        the class does not determine the type."""

    def attribute_of(self, type_name: str, field_name: str) -> str | None:
        """Return the attribute that a field reads; None if the field has a resolver."""

    def direct_of(self, type_name: str, field_name: str) -> Direct | None:
        """Return how the resolver of a field is called directly; None if it is not."""


class Direct(NamedTuple):
    """How a resolver is called without the layers that handle its errors.

    After an error, the layers answer it: the field is resolved again, and then has to use the
    outcome of the direct call. See `Resumable`.
    """

    converted: Callable[[GraphQLResolveInfo[Any], dict[str, Any]], tuple[Any, dict[str, Any]]]
    """Returns the info and the arguments that the resolver gets."""
    call: Callable[[Any, Any, dict[str, Any]], Any]
    """Calls the resolver with the source, that info and those arguments."""
    is_async: bool
    """Whether it returns an awaitable."""


class Call:
    """A call of a resolver, what it has returned or raised, and where its result belongs.

    `converted` are the arguments of a direct call.
    """

    __slots__ = ("answer", "arguments", "converted", "error", "field", "info", "source", "value")

    def __init__(
        self,
        field: ResolvedField,
        info: GraphQLResolveInfo[Any],
        arguments: dict[str, Any],
        source: Any,
        answer: dict[str, Any],
        converted: dict[str, Any] | None = None,
    ) -> None:
        self.field = field
        self.info = info
        self.arguments = arguments
        self.source = source
        self.answer = answer
        self.converted = converted
        self.value: Any = None
        """Its result; an awaitable until that has been awaited."""
        self.error: Exception | None = None


class Branch:
    """An execution below one root field."""

    __slots__ = ("calls", "context", "root_value", "variables", "waiting")

    def __init__(
        self, context: Any, root_value: Any, variables: VariableValues, calls: list[Call]
    ) -> None:
        self.context = context
        self.root_value = root_value
        self.variables = variables
        self.calls = calls
        self.waiting: list[Call] = []
        """Those whose results are awaitables."""


Complete = Callable[[Any, Branch, Path | None], Any]
"""Returns the answer for a value. The path is that of the value, if a field below it needs one."""


class ResolvedField(NamedTuple):
    """A field with a resolver."""

    key: str
    complete: Complete
    layers: Callable[..., Any]
    """Resolves the field with all layers, also those that a direct call leaves out."""
    is_async: bool
    """Whether the layers certainly return an awaitable."""


class Completer(NamedTuple):
    """How a value is completed, and whether a resolver is called below it."""

    complete: Complete
    calls: bool
    exact: type
    """The class whose direct instances are their own answers; `_NoClass` if there is none."""


class _NoClass:
    """A class without instances."""


Step = Callable[[Any, Branch, Path | None, dict[str, Any]], None]
"""Puts one field of an object into its answer."""


class OutputCompiler:
    """Compiles the selections of one operation. `is_included` evaluates `@skip` and `@include`."""

    def __init__(
        self,
        schema: GraphQLSchema,
        fragments: dict[str, FragmentDefinitionNode],
        operation: OperationDefinitionNode,
        classes: Classes,
        is_included: Callable[[SelectionNode], bool],
        max_fields: int,
    ) -> None:
        self._schema = schema
        self._fragments = fragments
        self._operation = operation
        self._classes = classes
        self._is_included = is_included
        self._max_fields = max_fields
        self.fields = 0
        """How many fields were compiled."""

    def root(self, root_type: GraphQLObjectType) -> list[Step]:
        """Return a step for each field of the operation itself."""
        return [each.step for each in self._fields_of(root_type, [self._operation.selection_set])]

    def _fields_of(
        self, kind: GraphQLObjectType, selection_sets: Iterable[SelectionSetNode]
    ) -> list[_Field]:
        collected = self._collected(kind, selection_sets)
        return [self._field(kind, key, nodes) for key, nodes in collected.items()]

    def _collected(
        self, kind: GraphQLObjectType, selection_sets: Iterable[SelectionSetNode]
    ) -> dict[str, list[FieldNode]]:
        """Return the fields that are selected of an object type, by response name."""
        found: dict[str, list[FieldNode]] = {}
        spread: set[str] = set()
        for each in selection_sets:
            self._collect(kind, each, found, spread)
        return found

    def _collect(
        self,
        kind: GraphQLObjectType,
        selection_set: SelectionSetNode,
        found: dict[str, list[FieldNode]],
        spread: set[str],
    ) -> None:
        for node in selection_set.selections:
            if not self._is_included(node):
                continue
            match node:
                case FieldNode():
                    found.setdefault((node.alias or node.name).value, []).append(node)
                    continue
                case InlineFragmentNode(type_condition=condition, selection_set=inner):
                    pass
                case FragmentSpreadNode(name=name):
                    fragment = self._fragments.get(name.value)
                    if fragment is None or fragment.variable_definitions:
                        raise NotCompiled("a fragment with variables")
                    condition, inner = fragment.type_condition, fragment.selection_set
                    if name.value in spread or not self._applies(condition, kind):
                        continue
                    spread.add(name.value)
                case _:
                    raise NotCompiled("an unknown selection")
            if self._applies(condition, kind):
                self._collect(kind, inner, found, spread)

    def _applies(self, condition: Any, kind: GraphQLObjectType) -> bool:
        if condition is None:
            return True
        named = type_from_ast(self._schema, condition)
        if named is kind:
            return True
        return is_abstract_type(named) and self._schema.is_sub_type(named, kind)

    def _field(self, parent: GraphQLObjectType, key: str, nodes: list[FieldNode]) -> _Field:
        self.fields += 1
        if self.fields > self._max_fields:
            raise NotCompiled("too many fields")
        name = nodes[0].name.value
        if name == "__typename":
            return _constant(key, parent.name)
        field = self._schema.get_field(parent, name)
        if field is None or name.startswith("__"):
            raise NotCompiled("introspection")
        completer = self._completer(field.type, nodes)
        attribute = self._classes.attribute_of(parent.name, name)
        if attribute is not None:
            return _read(key, attribute, completer, parent.name)
        if field.resolve is None:
            raise NotCompiled("a field without a resolver")
        info_of = _info_of(
            self._schema, self._fragments, self._operation, parent, key, nodes, field
        )
        arguments = compile_arguments(field, nodes[0])
        direct = self._classes.direct_of(parent.name, name)
        is_async = direct is not None and direct.is_async
        resolved = ResolvedField(key, completer.complete, field.resolve, is_async)
        if direct is None:
            return _Field(key, _call(resolved, info_of, arguments), True)
        call = _call_directly if is_async else _call_directly_at_once
        return _Field(key, call(resolved, direct, info_of, arguments), True)

    def _completer(self, kind: GraphQLOutputType, nodes: list[FieldNode]) -> Completer:
        if isinstance(kind, GraphQLNonNull):
            return self._nullable(kind.of_type, nodes, is_nullable=False)
        return self._nullable(kind, nodes, is_nullable=True)

    def _nullable(
        self, kind: GraphQLOutputType, nodes: list[FieldNode], *, is_nullable: bool
    ) -> Completer:
        match kind:
            case GraphQLList():
                item = self._completer(kind.of_type, nodes)
                return Completer(_of_list(item, is_nullable), item.calls, _NoClass)
            case GraphQLScalarType():
                return Completer(_of_scalar(kind, is_nullable), False, _exact_class(kind))
            case GraphQLEnumType():
                complete = _of_enum(kind, self._classes.class_of(kind.name), is_nullable)
                return Completer(complete, False, _NoClass)
            case GraphQLObjectType() | GraphQLInterfaceType() | GraphQLUnionType():
                return self._of_objects(kind, nodes, is_nullable)
        raise NotCompiled("an unknown type")

    def _of_objects(
        self,
        kind: GraphQLObjectType | GraphQLInterfaceType | GraphQLUnionType,
        nodes: list[FieldNode],
        is_nullable: bool,
    ) -> Completer:
        """Compile the objects of a type by their classes."""
        possible = (
            [kind] if isinstance(kind, GraphQLObjectType) else self._schema.get_possible_types(kind)
        )
        by_class: dict[type, Complete] = {}
        calls = False
        for each in possible:
            cls = self._classes.class_of(each.name)
            if cls is None or cls in by_class:
                raise NotCompiled("an object whose class does not decide its type")
            sets = [node.selection_set for node in nodes if node.selection_set is not None]
            fields = self._fields_of(each, sets)
            calls = calls or any(field.calls for field in fields)
            by_class[cls] = _of_fields(fields)
        return Completer(_of_class(by_class, is_nullable), calls, _NoClass)


class _Field(NamedTuple):
    """A field of an object type, compiled."""

    key: str
    step: Step
    calls: bool
    constant: str | None = None
    """Its value for every object, if that is the same."""
    complete: Complete | None = None
    """Completes the attribute, if the field is one and has no resolvers below it."""
    attribute: str = ""
    exact: type = _NoClass
    """The class of attributes that need not be completed."""


def _constant(key: str, value: str) -> _Field:
    """Return a field with the same value for each object."""

    def constant(_: Any, _branch: Branch, _path: Path | None, answer: dict[str, Any]) -> None:
        answer[key] = value

    return _Field(key, constant, False, constant=value)


def _read(key: str, attribute: str, completer: Completer, type_name: str) -> _Field:
    """Return a field that is an attribute of the object."""
    complete, calls, exact = completer

    def read(source: Any, branch: Branch, path: Path | None, answer: dict[str, Any]) -> None:
        below = Path(path, key, type_name) if calls else None
        answer[key] = complete(getattr(source, attribute), branch, below)

    if calls:
        return _Field(key, read, True)
    return _Field(key, read, False, complete=complete, attribute=attribute, exact=exact)


def _call(field: ResolvedField, info_of: InfoOf, arguments_of: Arguments) -> Step:
    """Return the step that calls a resolver. An awaitable is left to `Branch.waiting`."""
    key, complete, resolve, _ = field

    def call(source: Any, branch: Branch, path: Path | None, answer: dict[str, Any]) -> None:
        arguments = arguments_of(branch.variables)
        info = info_of(branch, path)
        made = Call(field, info, arguments, source, answer)
        branch.calls.append(made)
        try:
            value = made.value = resolve(source, info, **arguments)
        except Exception as error:
            made.error = error
            raise
        if value.__class__ is CoroutineType or is_awaitable(value):
            answer[key] = None
            branch.waiting.append(made)
        else:
            answer[key] = complete(value, branch, info.path)

    return call


def _call_directly(
    field: ResolvedField, direct: Direct, info_of: InfoOf, arguments_of: Arguments
) -> Step:
    """Return the step that calls an async resolver directly.

    If its arguments cannot be converted there is no call, and graphql-core makes the first one.
    """
    converted_of, resolve, _ = direct
    key = field.key

    def call(source: Any, branch: Branch, path: Path | None, answer: dict[str, Any]) -> None:
        arguments = arguments_of(branch.variables)
        info = info_of(branch, path)
        own_info, converted = converted_of(info, arguments)
        made = Call(field, info, arguments, source, answer, converted)
        branch.calls.append(made)
        answer[key] = None
        try:
            made.value = resolve(source, own_info, converted)
        except Exception as error:
            made.error = error
            raise
        branch.waiting.append(made)

    return call


def _call_directly_at_once(
    field: ResolvedField, direct: Direct, info_of: InfoOf, arguments_of: Arguments
) -> Step:
    """Return the step that calls directly a resolver that is not async."""
    converted_of, resolve, _ = direct
    key, complete = field.key, field.complete

    def call(source: Any, branch: Branch, path: Path | None, answer: dict[str, Any]) -> None:
        arguments = arguments_of(branch.variables)
        info = info_of(branch, path)
        own_info, converted = converted_of(info, arguments)
        made = Call(field, info, arguments, source, answer, converted)
        branch.calls.append(made)
        try:
            value = made.value = resolve(source, own_info, converted)
        except Exception as error:
            made.error = error
            raise
        answer[key] = complete(value, branch, info.path)

    return call


InfoOf = Callable[[Branch, Path | None], GraphQLResolveInfo[Any]]
"""Returns the info of a field, below an object at this path."""


def _info_of(
    schema: GraphQLSchema,
    fragments: dict[str, FragmentDefinitionNode],
    operation: OperationDefinitionNode,
    parent: GraphQLObjectType,
    key: str,
    nodes: list[FieldNode],
    field: GraphQLField,
) -> InfoOf:
    name, type_name, return_type = nodes[0].name.value, parent.name, field.type
    path_of_root_field = Path(None, key, type_name)

    def info_of(branch: Branch, path: Path | None) -> GraphQLResolveInfo[Any]:
        return GraphQLResolveInfo(
            name,
            nodes,
            return_type,
            parent,
            path_of_root_field if path is None else Path(path, key, type_name),
            schema,
            fragments,
            branch.root_value,
            operation,
            branch.variables,
            branch.context,
            is_awaitable,
            None,
            _HELPERS,
        )

    return info_of


_in_background: Final[set[asyncio.Future[Any]]] = set()


def _gather(values: Sequence[Awaitable[Any]]) -> Awaitable[list[Any]]:
    return gather_with_cancel(*values)


def _track(values: Sequence[Any]) -> None:
    awaitables = [value for value in values if is_awaitable(value)]
    if awaitables:
        future = asyncio.gather(*awaitables, return_exceptions=True)
        _in_background.add(future)
        future.add_done_callback(_in_background.discard)


_HELPERS: Final = GraphQLResolveInfoHelpers(gather=_gather, track=_track)


def _of_fields(fields: list[_Field]) -> Complete:
    """Return the completer of an object whose class is known."""
    template = {each.key: each.constant for each in fields}
    plan = [
        (each.key, each.attribute, each.exact, each.complete, each.step)
        for each in fields
        if each.constant is None
    ]

    def of_fields(value: Any, branch: Branch, path: Path | None) -> dict[str, Any]:
        answer: dict[str, Any] = template.copy()
        for key, attribute, exact, complete, step in plan:
            if complete is None:
                step(value, branch, path, answer)
                continue
            read = getattr(value, attribute)
            answer[key] = read if read.__class__ is exact else complete(read, branch, None)
        return answer

    return of_fields


def _of_class(by_class: Mapping[type, Complete], is_nullable: bool) -> Complete:
    """Return the completer of an object, or of one of several, by its class."""

    def of_class(value: Any, branch: Branch, path: Path | None) -> Any:
        complete = by_class.get(value.__class__)
        if complete is not None:
            return complete(value, branch, path)
        if value is None and is_nullable:
            return None
        raise Odd

    return of_class


def _of_list(item: Completer, is_nullable: bool) -> Complete:
    complete, calls, _ = item

    def of_list(value: Any, branch: Branch, path: Path | None) -> Any:
        if value.__class__ is list:
            if calls:
                return [
                    complete(each, branch, Path(path, index, None))
                    for index, each in enumerate(value)
                ]
            return [complete(each, branch, None) for each in value]
        if value is None and is_nullable:
            return None
        raise Odd

    return of_list


def _exact_class(kind: GraphQLScalarType) -> type:
    if kind in (GraphQLString, GraphQLID):
        return str
    return bool if kind is GraphQLBoolean else _NoClass


def _of_scalar(kind: GraphQLScalarType, is_nullable: bool) -> Complete:
    if kind in (GraphQLString, GraphQLID):
        return _of_exact(kind, str, is_nullable)
    if kind is GraphQLBoolean:
        return _of_exact(kind, bool, is_nullable)
    if kind is GraphQLInt:
        return _of_int(kind, is_nullable)
    if kind is GraphQLFloat:
        return _of_float(kind, is_nullable)
    return _of_leaf(kind, is_nullable)


def _of_exact(kind: GraphQLScalarType, cls: type, is_nullable: bool) -> Complete:
    other = _of_leaf(kind, is_nullable)

    def of_exact(value: Any, branch: Branch, path: Path | None) -> Any:
        return value if value.__class__ is cls else other(value, branch, path)

    return of_exact


def _of_int(kind: GraphQLScalarType, is_nullable: bool) -> Complete:
    other = _of_leaf(kind, is_nullable)

    def of_int(value: Any, branch: Branch, path: Path | None) -> Any:
        if value.__class__ is int and MIN_INT <= value <= MAX_INT:
            return value
        return other(value, branch, path)

    return of_int


def _of_float(kind: GraphQLScalarType, is_nullable: bool) -> Complete:
    other = _of_leaf(kind, is_nullable)

    def of_float(value: Any, branch: Branch, path: Path | None) -> Any:
        if value.__class__ is float and isfinite(value):
            return value
        return other(value, branch, path)

    return of_float


_NO_MEMBER: Final = (object(), "")


def _of_enum(kind: GraphQLEnumType, cls: type | None, is_nullable: bool) -> Complete:
    other = _of_leaf(kind, is_nullable)
    if cls is None or not issubclass(cls, Enum):
        return other
    # By identity: to hash a member takes longer than all the rest.
    names = {id(member): (member, kind.coerce_output_value(member)) for member in cls}

    def of_enum(value: Any, branch: Branch, path: Path | None) -> Any:
        member, name = names.get(id(value), _NO_MEMBER)
        return name if member is value else other(value, branch, path)

    return of_enum


_PLAIN: Final = frozenset({str, int, float, bool, dict, list, tuple, bytes})
"""Classes whose instances are certainly neither awaitable nor an exception."""


def _of_leaf(kind: GraphQLScalarType | GraphQLEnumType, is_nullable: bool) -> Complete:
    """Return the completer that serializes a value as graphql-core does."""

    def of_leaf(value: Any, _branch: Branch, _path: Path | None) -> Any:
        if value is None and is_nullable:
            return None
        if value.__class__ not in _PLAIN and (
            value is None
            or value is Undefined
            or isinstance(value, Exception | GeneratorType)
            or is_awaitable(value)
        ):
            raise Odd
        answer = kind.coerce_output_value(value)
        if answer is None or answer is Undefined:
            raise Odd
        return answer

    return of_leaf
