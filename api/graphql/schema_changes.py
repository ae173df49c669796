"""Compares two GraphQL schemas: what breaks the clients of the older one.

graphql-core finds most changes. What it does not report is added here: what becomes required, the
root types, `@oneOf`, `@deprecated` and `@specifiedBy`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from graphql import (
    BreakingChangeType,
    DangerousChangeType,
    GraphQLArgument,
    GraphQLEnumType,
    GraphQLError,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLObjectType,
    GraphQLScalarType,
    GraphQLSchema,
    SafeChangeType,
    SchemaChange,
    build_schema,
    find_schema_changes,
    is_required_argument,
    is_required_input_field,
    specified_scalar_types,
)

ChangeKind = Literal["breaking", "dangerous", "safe"]


@dataclass(frozen=True, slots=True)
class ClientChange:
    """One change of a GraphQL schema, as clients of the older schema see it.

    `kind` is "breaking" if a valid operation may be refused or its answer may have another type;
    "dangerous" if it stays valid, but may behave differently; "safe" otherwise. `path` is a schema
    coordinate, such as `Job.status`, `Query.jobs(first:)` or `@oneOf`. `message` is a sentence.
    """

    kind: ChangeKind
    path: str
    message: str


def client_changes(before_sdl: str, after_sdl: str) -> tuple[ClientChange, ...]:
    """Return what changed between two schemas in SDL, breaking changes first, without descriptions.

    Raises:
        ValueError: one of the two is not a valid schema.
    """
    before, after = _schema(before_sdl, "older"), _schema(after_sdl, "newer")
    found = set(_not_in_graphql_core(before, after))
    # What becomes required has lost its default as well.
    broken = {each.path for each in found if each.kind == "breaking"}
    for each in _of_graphql_core(before, after):
        if each.kind != "dangerous" or each.path not in broken:
            found.add(each)
    order = ("breaking", "dangerous", "safe")
    return tuple(sorted(found, key=lambda each: (order.index(each.kind), each.path, each.message)))


def _schema(sdl: str, which: str) -> GraphQLSchema:
    try:
        return build_schema(sdl)
    except (GraphQLError, TypeError) as error:
        raise ValueError(f"The {which} GraphQL schema is not valid: {error}") from error


def _of_graphql_core(before: GraphQLSchema, after: GraphQLSchema) -> Iterator[ClientChange]:
    for change in find_schema_changes(before, after):
        if change.type is SafeChangeType.DESCRIPTION_CHANGED or _is_of_graphql_itself(change):
            continue
        path = _path_of(change)
        kind: ChangeKind = "safe"
        if isinstance(change.type, BreakingChangeType):
            kind = "breaking"
        elif isinstance(change.type, DangerousChangeType):
            kind = "dangerous"
        if change.type is DangerousChangeType.OPTIONAL_INPUT_FIELD_ADDED and _is_one_of(
            after.get_type(path.partition(".")[0])
        ):
            # Clients give exactly one of the fields, and none of them gives a new one.
            kind = "safe"
        yield ClientChange(kind, path, change.description)


def _is_of_graphql_itself(change: SchemaChange) -> bool:
    """Return whether Int, Float or such is used for the first time, or no longer."""
    return change.type in (BreakingChangeType.TYPE_REMOVED, SafeChangeType.TYPE_ADDED) and any(
        name in specified_scalar_types for name in _COORDINATE.findall(change.description)
    )


def _path_of(change: SchemaChange) -> str:
    """Return the schema coordinate that a description of graphql-core names."""
    coordinates = _COORDINATE.findall(change.description)
    if change.type in _NAMED_LAST:
        return str(coordinates[-1])
    longer = [each for each in coordinates if "." in each or "@" in each]
    return str((longer or coordinates)[0])


def _not_in_graphql_core(before: GraphQLSchema, after: GraphQLSchema) -> Iterator[ClientChange]:
    for operation in ("query", "mutation", "subscription"):
        old, new = (getattr(schema, f"{operation}_type") for schema in (before, after))
        if old and new and old.name != new.name:
            message = f"The root type of {operation} changed from {old.name} to {new.name}."
            yield ClientChange("breaking", new.name, message)
        elif old and not new:
            yield ClientChange("breaking", old.name, f"The operation {operation} was removed.")
        elif new and not old:
            yield ClientChange("safe", new.name, f"The operation {operation} was added.")
    for name, old_type, new_type in _both(before.type_map, after.type_map):
        match old_type, new_type:
            case (
                (GraphQLObjectType() | GraphQLInterfaceType()),
                (GraphQLObjectType() | GraphQLInterfaceType()),
            ):
                for field, old, new in _both(old_type.fields, new_type.fields):
                    path = f"{name}.{field}"
                    yield from _deprecation(path, old, new)
                    for argument, old_argument, new_argument in _both(old.args, new.args):
                        where = f"{path}({argument}:)"
                        yield from _deprecation(where, old_argument, new_argument)
                        yield from _becomes_required(
                            where, old_argument, new_argument, is_required_argument
                        )
            case GraphQLInputObjectType(), GraphQLInputObjectType():
                yield from _one_of(name, _is_one_of(old_type), _is_one_of(new_type))
                for field, old_field, new_field in _both(old_type.fields, new_type.fields):
                    path = f"{name}.{field}"
                    yield from _deprecation(path, old_field, new_field)
                    yield from _becomes_required(
                        path, old_field, new_field, is_required_input_field
                    )
            case GraphQLEnumType(), GraphQLEnumType():
                for value, old_value, new_value in _both(old_type.values, new_type.values):
                    yield from _deprecation(f"{name}.{value}", old_value, new_value)
            case GraphQLScalarType(), GraphQLScalarType():
                if old_type.specified_by_url != new_type.specified_by_url:
                    message = (
                        f"The specification of the scalar {name} changed from"
                        f" {old_type.specified_by_url or 'none'} to"
                        f" {new_type.specified_by_url or 'none'}."
                    )
                    yield ClientChange("dangerous", name, message)
            case _:
                # graphql-core reports a type of another kind.
                pass
    old_directives = {each.name: each for each in before.directives}
    new_directives = {each.name: each for each in after.directives}
    for name, old_directive, new_directive in _both(old_directives, new_directives):
        for argument, old, new in _both(old_directive.args, new_directive.args):
            yield from _becomes_required(f"@{name}({argument}:)", old, new, is_required_argument)


T = TypeVar("T")


def _both(before: Mapping[str, T], after: Mapping[str, T]) -> Iterator[tuple[str, T, T]]:
    return ((name, before[name], after[name]) for name in before if name in after)


def _deprecation(path: str, before: Any, after: Any) -> Iterator[ClientChange]:
    """Yield a change of @deprecated, which a field, an argument or an enum value may have."""
    old, new = before.deprecation_reason, after.deprecation_reason
    if old is None and new is not None:
        yield ClientChange("safe", path, f"{path} was deprecated: {new}")
    elif old is not None and new is None:
        yield ClientChange("safe", path, f"{path} is no longer deprecated.")
    elif old != new:
        yield ClientChange("safe", path, f"{path} is deprecated for another reason: {new}")


I = TypeVar("I", GraphQLArgument, GraphQLInputField)  # noqa: E741


def _becomes_required(
    path: str, before: I, after: I, is_required: Callable[[I], bool]
) -> Iterator[ClientChange]:
    """Yield what clients may have left out. For graphql-core only its default was removed."""
    if not is_required(before) and is_required(after) and str(before.type) == str(after.type):
        yield ClientChange("breaking", path, f"{path} became required: its default was removed.")


def _one_of(name: str, before: bool, after: bool) -> Iterator[ClientChange]:
    if after and not before:
        message = f"{name} takes exactly one field now (@oneOf)."
        yield ClientChange("breaking", name, message)
    elif before and not after:
        yield ClientChange("safe", name, f"{name} takes any number of fields now (no @oneOf).")


def _is_one_of(type_: object) -> bool:
    return isinstance(type_, GraphQLInputObjectType) and type_.is_one_of


_COORDINATE: Final = re.compile(r"@?[A-Za-z_]\w*(?:\.\w+)?(?:\(\w+:\))?")
_NAMED_LAST: Final = (
    BreakingChangeType.TYPE_REMOVED_FROM_UNION,
    DangerousChangeType.TYPE_ADDED_TO_UNION,
    DangerousChangeType.IMPLEMENTED_INTERFACE_ADDED,
)
"""Changes whose description begins with the member, and ends with the type that has it."""
