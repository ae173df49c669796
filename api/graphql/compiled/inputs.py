"""Compiles the coercion of variables and arguments.

The compiled functions coerce values that are certainly valid, and raise `Odd` for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from math import isfinite
from typing import Any, Final, NamedTuple

from graphql import (
    GraphQLArgument,
    GraphQLBoolean,
    GraphQLField,
    GraphQLFloat,
    GraphQLID,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLInt,
    GraphQLList,
    GraphQLNonNull,
    GraphQLSchema,
    GraphQLString,
    ListValueNode,
    Node,
    NonNullTypeNode,
    ObjectValueNode,
    OperationDefinitionNode,
    Undefined,
    VariableDefinitionNode,
    VariableNode,
    VariableValues,
    get_argument_values,
    get_variable_values,
    is_input_type,
    is_required_argument,
    is_required_input_field,
    type_from_ast,
)
from graphql.language import FieldNode, NameNode

from job_registry_api.graphql.compiled.leaving import NotCompiled, Odd

Coerce = Callable[[Any], Any]
Variables = Callable[[Mapping[str, Any]], VariableValues]
Arguments = Callable[[VariableValues], dict[str, Any]]

MIN_INT: Final = -(2**31)
MAX_INT: Final = 2**31 - 1

_IMMUTABLE: Final = (str, int, float, bool, type(None), Enum)
_SINGLE: Final = frozenset({str, int, float, bool, dict})
"""The classes of JSON values that are coerced to a list with one entry."""

_NO_VARIABLES: Final = VariableValues({}, {})


class InputCompiler:
    """Compiles the variables of operations. The function for each input type is made once."""

    def __init__(self, schema: GraphQLSchema) -> None:
        self._schema = schema
        self._objects: dict[str, Coerce] = {}
        self._recursive: dict[str, bool] = {}

    def variables(self, operation: OperationDefinitionNode) -> Variables:
        """Return the function that coerces the variables of an operation.

        Raises:
            NotCompiled: a variable's type or default is not valid.
        """
        steps = [self._variable(each) for each in operation.variable_definitions or ()]
        return _coerce_variables(steps)

    def _variable(self, definition: VariableDefinitionNode) -> _Variable:
        """Compile one variable.

        The signature in a `VariableValueSource` has no public constructor, so it is taken from the
        same variable with a nullable type, and only its type is replaced.
        """
        name = definition.variable.name.value
        kind = type_from_ast(self._schema, definition.type)
        if kind is None or not is_input_type(kind):
            raise NotCompiled("a variable without an input type")
        node = definition.type
        nullable = VariableDefinitionNode(
            variable=definition.variable,
            type=node.type if isinstance(node, NonNullTypeNode) else node,
            default_value=definition.default_value,
        )
        absent = get_variable_values(self._schema, [nullable], {})
        if not isinstance(absent, VariableValues):
            raise NotCompiled("a variable with a bad default")
        source = absent.sources[name]
        source = source._replace(signature=source.signature._replace(type=kind))
        is_non_null = isinstance(kind, GraphQLNonNull)
        default: Callable[[], Any] | None = None
        if name in absent.coerced:
            value = absent.coerced[name]
            if value is None and is_non_null:
                raise NotCompiled("a variable with a bad default")
            if isinstance(value, _IMMUTABLE):
                default = partial(_same, value)
            else:  # Each execution gets new lists and objects, as from graphql-core.
                default = partial(self._by_graphql_core, definition)
        by_graphql_core: Coerce = partial(self._by_graphql_core, definition)
        coerce = by_graphql_core if self._is_recursive(kind) else self._coercion(kind)
        return _Variable(name, coerce, source, default, is_non_null)

    def _by_graphql_core(self, definition: VariableDefinitionNode, *sent: Any) -> Any:
        """Coerce the value of a variable, which may be nested without a limit, or its default."""
        name = definition.variable.name.value
        given = {name: sent[0]} if sent else {}
        values = get_variable_values(self._schema, [definition], given, max_errors=1)
        if not isinstance(values, VariableValues):
            raise Odd
        return values.coerced[name]

    def _coercion(self, kind: GraphQLInputType) -> Coerce:
        """Return the function that coerces a value. The type is not recursive."""
        if isinstance(kind, GraphQLNonNull):
            return self._not_null(kind.of_type)
        inner = self._not_null(kind)
        return lambda value: None if value is None else inner(value)

    def _not_null(self, kind: GraphQLInputType) -> Coerce:
        """Return the function that coerces a value which must not be null."""
        if isinstance(kind, GraphQLList):
            return _of_list(self._coercion(kind.of_type))
        if isinstance(kind, GraphQLInputObjectType):
            if kind.name not in self._objects:
                coercions = {
                    name: self._coercion(field.type) for name, field in kind.fields.items()
                }
                self._objects[kind.name] = _of_object(kind, coercions)
            return self._objects[kind.name]
        return _of_leaf(kind)

    def _is_recursive(self, kind: GraphQLInputType, above: frozenset[str] = frozenset()) -> bool:
        """Return whether values of a type may be nested without a limit."""
        while isinstance(kind, GraphQLList | GraphQLNonNull):
            kind = kind.of_type
        if not isinstance(kind, GraphQLInputObjectType):
            return False
        if kind.name in above:
            return True
        if kind.name not in self._recursive:
            inner = above | {kind.name}
            self._recursive[kind.name] = any(
                self._is_recursive(field.type, inner) for field in kind.fields.values()
            )
        return self._recursive[kind.name]


class _Variable(NamedTuple):
    name: str
    coerce: Coerce
    source: Any
    """Its `VariableValueSource` when the client sends no value."""
    default: Callable[[], Any] | None
    is_required: bool


def _coerce_variables(steps: list[_Variable]) -> Variables:
    def coerce_variables(sent: Mapping[str, Any]) -> VariableValues:
        sources: dict[str, Any] = {}
        coerced: dict[str, Any] = {}
        for name, coerce, source, default, is_required in steps:
            if name in sent:
                value = sent[name]
                coerced[name] = coerce(value)
                sources[name] = source.__class__(source.signature, value)
                continue
            sources[name] = source
            if default is not None:
                coerced[name] = default()
            elif is_required:
                raise Odd
        return VariableValues(sources, coerced)

    return coerce_variables


def compile_arguments(field: GraphQLField, node: FieldNode) -> Arguments:
    """Return the function that makes the arguments of a field from the variables."""
    given = {each.name.value: each.value for each in node.arguments or ()}
    if not field.args:
        return lambda _: {}
    bare = FieldNode(name=node.name)
    fixed: dict[str, Any] = {}
    named: list[tuple[str, str, Any, bool, bool]] = []
    for name, argument in field.args.items():
        alone = GraphQLField(field.type, args={name: argument})
        out_name = argument.out_name or name
        value = given.get(name)
        is_required = is_required_argument(argument)
        if isinstance(value, VariableNode):
            # The default of the schema is one object for all executions in graphql-core as well.
            default = {} if is_required else get_argument_values(alone, bare, _NO_VARIABLES)
            is_non_null = isinstance(argument.type, GraphQLNonNull)
            variable = value.name.value
            fixed[out_name] = default.get(out_name, Undefined)
            named.append((out_name, variable, fixed[out_name], is_required, is_non_null))
            continue
        if value is not None and _has_variables(value):
            return lambda variables: get_argument_values(field, node, variables)
        constant = get_argument_values(alone, node, _NO_VARIABLES)
        if value is not None and not isinstance(constant[out_name], _IMMUTABLE):
            # Each execution gets new lists and objects, as from graphql-core.
            return lambda variables: get_argument_values(field, node, variables)
        fixed |= constant

    def arguments(variables: VariableValues) -> dict[str, Any]:
        values = fixed.copy()
        coerced = variables.coerced
        for out_name, variable, default, is_required, is_non_null in named:
            if variable in coerced:
                value = coerced[variable]
                if value is None and is_non_null:
                    raise Odd
                values[out_name] = value
            elif is_required:
                raise Odd
            elif default is Undefined:
                del values[out_name]
        return values

    return arguments


def _same(value: Any) -> Any:
    return value


def _of_leaf(kind: Any) -> Coerce:
    coerce_input_value = kind.coerce_input_value

    def of_leaf(value: Any) -> Any:
        coerced = Undefined if value is None else coerce_input_value(value)
        if coerced is Undefined:
            raise Odd
        return coerced

    if kind in (GraphQLString, GraphQLID):
        return _of_class(str, of_leaf)
    if kind is GraphQLBoolean:
        return _of_class(bool, of_leaf)
    if kind is GraphQLInt:
        return _of_int(of_leaf)
    if kind is GraphQLFloat:
        return _of_float(of_leaf)
    return of_leaf


def _of_class(cls: type, other: Coerce) -> Coerce:
    return lambda value: value if value.__class__ is cls else other(value)


def _of_int(other: Coerce) -> Coerce:
    def of_int(value: Any) -> Any:
        is_valid = value.__class__ is int and MIN_INT <= value <= MAX_INT
        return value if is_valid else other(value)

    return of_int


def _of_float(other: Coerce) -> Coerce:
    def of_float(value: Any) -> Any:
        return value if value.__class__ is float and isfinite(value) else other(value)

    return of_float


def _of_list(coerce_item: Coerce) -> Coerce:
    def of_list(value: Any) -> list[Any]:
        if value.__class__ is list:
            return [coerce_item(each) for each in value]
        if value.__class__ in _SINGLE:
            return [coerce_item(value)]
        raise Odd

    return of_list


def _of_object(kind: GraphQLInputObjectType, coercions: Mapping[str, Coerce]) -> Coerce:
    out_names = {name: each.out_name or name for name, each in kind.fields.items()}
    fields = {name: (out_name, coercions[name]) for name, out_name in out_names.items()}
    # The fields stay in the order of the type, whatever the client sends.
    defaults = {out_names[name]: _default_of(each) for name, each in kind.fields.items()}
    without_default = [
        (name, out_names[name], is_required_input_field(each))
        for name, each in kind.fields.items()
        if defaults[out_names[name]] is Undefined
    ]
    out_type, is_one_of = kind.out_type, kind.is_one_of

    def of_object(value: Any) -> Any:
        if value.__class__ is not dict:
            raise Odd
        coerced = defaults.copy()
        for name, given in value.items():
            if name not in fields:
                raise Odd
            out_name, coerce = fields[name]
            coerced[out_name] = coerce(given)
        for name, out_name, is_required in without_default:
            if name not in value:
                if is_required:
                    raise Odd
                del coerced[out_name]
        if is_one_of and (len(value) != 1 or None in coerced.values()):
            raise Odd
        return out_type(coerced)

    return of_object


def _default_of(field: GraphQLInputField) -> Any:
    """Return the coerced default of an input field; Undefined if it has none.

    graphql-core's public function coerces the defaults of arguments, so the field is made one.
    """
    if is_required_input_field(field):
        return Undefined
    argument = GraphQLArgument(
        field.type, default_value=field.default_value, default=field.default, out_name="default"
    )
    alone = GraphQLField(GraphQLString, args={"default": argument})
    return get_argument_values(alone, FieldNode(name=NameNode(value="alone"))).get(
        "default", Undefined
    )


def _has_variables(node: Node) -> bool:
    match node:
        case VariableNode():
            return True
        case ListValueNode(values=values):
            return any(map(_has_variables, values))
        case ObjectValueNode(fields=fields):
            return any(_has_variables(each.value) for each in fields)
    return False
