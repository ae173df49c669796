"""Random valid operations of a schema: every type, field and argument, with fragments, aliases,
directives, variables and literals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from graphql import (
    GraphQLArgument,
    GraphQLEnumType,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLInterfaceType,
    GraphQLList,
    GraphQLNamedType,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    get_named_type,
    is_composite_type,
    is_required_argument,
    is_required_input_field,
)

Composite = GraphQLObjectType | GraphQLInterfaceType | GraphQLUnionType


class RandomOperation:
    """An operation, which is valid but where two fields with one name cannot be merged.

    `values` are what an argument or input field of a name may be, and what a scalar may be. The
    arguments in `always` are never left to their default.
    """

    def __init__(
        self,
        schema: GraphQLSchema,
        root: GraphQLObjectType,
        random: Random,
        values: Mapping[str, Sequence[Any]],
        *,
        depth: int = 3,
        always: frozenset[str] = frozenset(),
    ) -> None:
        self._schema = schema
        self._random = random
        self._values = values
        self._always = always
        self._definitions: list[str] = []
        self._fragments: list[str] = []
        self._names = 0
        self.variables: dict[str, Any] = {}
        kind = "mutation" if root is schema.mutation_type else "query"
        selected = self._selection(root, depth)
        variables = f"({', '.join(self._definitions)})" if self._definitions else ""
        self.text = "\n".join([f"{kind} Random{variables} {selected}", *self._fragments])

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def _selection(self, kind: Composite, depth: int) -> str:
        if depth < -1:
            return "{ __typename }"
        parts = []
        for _ in range(self._random.randint(1, 3)):
            if isinstance(kind, GraphQLUnionType) or self._chance(0.2):
                parts.append(self._fragment(kind, depth))
            else:
                parts.append(self._field(kind, depth))
        return f"{{ {' '.join(parts)} }}"

    def _field(self, kind: Composite, depth: int) -> str:
        fields = {} if isinstance(kind, GraphQLUnionType) else kind.fields
        fitting = [
            name
            for name, field in fields.items()
            if depth > 0 or not is_composite_type(get_named_type(field.type))
        ]
        if not fitting or self._chance(0.15):
            alias = f"{self._name('t')}: " if self._chance(0.3) else ""
            return f"{alias}__typename{self._directives()}"
        name = self._random.choice(fitting)
        field = fields[name]
        arguments = self._arguments(field.args)
        alias = f"{self._name('a')}: " if arguments or self._chance(0.3) else ""
        text = f"{alias}{name}{arguments}{self._directives()}"
        inner: GraphQLNamedType = get_named_type(field.type)
        if isinstance(inner, GraphQLObjectType | GraphQLInterfaceType | GraphQLUnionType):
            text += f" {self._selection(inner, depth - 1)}"
        return text

    def _fragment(self, kind: Composite, depth: int) -> str:
        on: Composite = kind
        if isinstance(kind, GraphQLObjectType):
            others = [
                each
                for each in self._schema.type_map.values()
                if isinstance(each, GraphQLInterfaceType | GraphQLUnionType)
                and self._schema.is_sub_type(each, kind)
            ]
            on = self._random.choice([kind, *others])
        elif self._chance(0.8):
            on = self._random.choice(self._schema.get_possible_types(kind))
        condition = f" on {on.name}" if on is not kind or self._chance(0.5) else ""
        if self._chance(0.4):
            name = self._name("F")
            self._fragments.append(f"fragment {name} on {on.name} {self._selection(on, depth - 1)}")
            spread = f"...{name}{self._directives()}"
            return f"{spread} ...{name}" if self._chance(0.2) else spread
        return f"...{condition}{self._directives()} {self._selection(on, depth - 1)}"

    def _directives(self) -> str:
        text = ""
        for name in ("skip", "include"):
            if self._chance(0.07):
                is_on = self._chance(0.5)
                value = json.dumps(is_on)
                if self._chance(0.6):
                    value = self._variable("Boolean", required=True, json_value=is_on)
                text += f" @{name}(if: {value})"
        return text

    def _arguments(self, arguments: Mapping[str, GraphQLArgument]) -> str:
        given = [
            f"{name}: {self._given(name, each)}"
            for name, each in arguments.items()
            if is_required_argument(each) or name in self._always or self._chance(0.6)
        ]
        return f"({', '.join(given)})" if given else ""

    def _given(self, name: str, each: GraphQLArgument | GraphQLInputField, depth: int = 3) -> str:
        """A variable, or a literal, which may hold variables."""
        if name not in self._always and self._chance(0.4):
            is_required = isinstance(each.type, GraphQLNonNull)
            value = self._json(name, each.type, depth)
            kind = str(_nullable(each.type))
            return self._variable(kind, required=is_required, json_value=value, of=each.type)
        return self._literal(name, each.type, depth)

    def _variable(
        self, kind: str, *, required: bool, json_value: Any, of: GraphQLInputType | None = None
    ) -> str:
        name = self._name("v")
        default = ""
        if self._chance(0.2) and json_value is not None:
            literal = json.dumps(json_value) if of is None else self._literal("", of, 1, bare=True)
            if literal != "null":
                default, required = f" = {literal}", required and self._chance(0.5)
        self._definitions.append(f"${name}: {kind}{'!' if required else ''}{default}")
        if (required and not default) or self._chance(0.8):
            self.variables[name] = json_value
        return f"${name}"

    def _json(self, name: str, kind: GraphQLInputType, depth: int) -> Any:
        """A value of a variable."""
        random = self._random
        if isinstance(kind, GraphQLNonNull):
            kind = kind.of_type
        elif self._chance(0.15):
            return None
        if isinstance(kind, GraphQLList):
            if self._chance(0.15):
                return self._json(name, GraphQLNonNull(_nullable(kind.of_type)), depth)
            return [self._json(name, kind.of_type, depth) for _ in range(random.randint(0, 3))]
        if isinstance(kind, GraphQLEnumType):
            return random.choice(list(kind.values))
        if isinstance(kind, GraphQLInputObjectType):
            fields = kind.fields
            if kind.is_one_of:
                only = random.choice(list(fields))
                return {only: self._json(only, GraphQLNonNull(_nullable(fields[only].type)), depth)}
            return {
                field: self._json(field, each.type, depth - 1)
                for field, each in fields.items()
                if is_required_input_field(each) or (depth > 0 and self._chance(0.5))
            }
        return random.choice(self._values[name if name in self._values else kind.name])

    def _literal(self, name: str, kind: GraphQLInputType, depth: int, *, bare: bool = False) -> str:
        """A value in the document; `bare` is one without variables."""
        random = self._random
        if isinstance(kind, GraphQLNonNull):
            kind = kind.of_type
        elif self._chance(0.15):
            return "null"
        if isinstance(kind, GraphQLList):
            if self._chance(0.15):
                return self._literal(
                    name, GraphQLNonNull(_nullable(kind.of_type)), depth, bare=bare
                )
            items = [
                self._literal(name, kind.of_type, depth, bare=bare)
                for _ in range(random.randint(0, 3))
            ]
            return f"[{', '.join(items)}]"
        if isinstance(kind, GraphQLEnumType):
            return str(random.choice(list(kind.values)))
        if isinstance(kind, GraphQLInputObjectType):
            fields = kind.fields
            if kind.is_one_of:
                only = random.choice(list(fields))
                inner = GraphQLNonNull(_nullable(fields[only].type))
                return f"{{ {only}: {self._literal(only, inner, depth, bare=True)} }}"
            given = [
                f"{field}: "
                + (
                    self._literal(field, each.type, depth - 1, bare=True)
                    if bare or depth <= 0
                    else self._given(field, each, depth - 1)
                )
                for field, each in fields.items()
                if is_required_input_field(each) or (depth > 0 and self._chance(0.5))
            ]
            return f"{{ {', '.join(given)} }}"
        value = random.choice(self._values[name if name in self._values else kind.name])
        return _as_literal(value)


def _nullable(kind: Any) -> Any:
    return kind.of_type if isinstance(kind, GraphQLNonNull) else kind


def _as_literal(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{name}: {_as_literal(each)}" for name, each in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_literal, value))}]"
    return json.dumps(value)
