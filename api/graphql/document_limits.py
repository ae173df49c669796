"""The limits of a document's size, which hold before the document is validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionSetNode,
)
from pydantic import JsonValue

from job_registry_api.graphql.request_errors import coded


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a document. Each has a setting, whose description explains it."""

    tokens: int = 2_000
    depth: int = 15
    aliases: int = 30
    directives: int = 30
    introspection: bool = True
    suggestions: bool = True


CHARACTERS_PER_TOKEN: Final = 25
"""Documents of people and generators have about 10, with their indentation. Names, comments and
strings are read character by character: 25 take as long as a token."""

MAX_ALIAS: Final = 256


def check_length(text: str, limits: Limits) -> None:
    """Check the length of a document before it is parsed: 1 MB of it takes 0.1 to 0.7 seconds.

    Raises:
        GraphQLError: it is too long.
    """
    most = CHARACTERS_PER_TOKEN * limits.tokens
    if len(text) > most:
        raise too_complex(
            f"The document has more than {most:,} characters, {CHARACTERS_PER_TOKEN} per token of"
            " JOBS_MAX_QUERY_TOKENS. Send long values in variables."
        )


def check_size(document: DocumentNode, limits: Limits) -> None:
    """Check every operation, with its fragments in place.

    Validation comes after: the time it takes grows with the square of repeated fields.

    Raises:
        GraphQLError: an operation exceeds a limit.
    """
    fragments = fragments_of(document)
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
        for what, came, most, setting in (
            ("levels of fields", size.depth, limits.depth, "JOBS_MAX_QUERY_DEPTH"),
            (
                "aliases and repeated fields",
                size.aliases,
                limits.aliases,
                "JOBS_MAX_QUERY_ALIASES",
            ),
            (
                "directives",
                size.directives + directives,
                limits.directives,
                "JOBS_MAX_QUERY_DIRECTIVES",
            ),
        ):
            if came > most:
                raise has_too_many(what, most, setting)


def fragments_of(document: DocumentNode) -> dict[str, FragmentDefinitionNode]:
    """Return the fragments of a document by their names."""
    return {
        node.name.value: node
        for node in document.definitions
        if isinstance(node, FragmentDefinitionNode)
    }


def has_too_many(what: str, most: int, setting: str) -> GraphQLError:
    """Return the error for a document that exceeds the limit of a setting."""
    message = f"The document has more than {most:,} {what}. {setting} sets this limit."
    return too_complex(message, limit=most, setting=setting)


def too_complex(message: str, **details: JsonValue) -> GraphQLError:
    """Return the error for a document that exceeds a limit."""
    return coded("document_too_complex", message, **details)


class _Size(NamedTuple):
    depth: int = 0
    aliases: int = 0
    directives: int = 0


def _size(
    selection_set: SelectionSetNode,
    fragments: dict[str, FragmentDefinitionNode],
    sizes: dict[str, _Size],
) -> _Size:
    """Return the size of a selection. `sizes` keeps that of each fragment."""
    depth = aliases = directives = 0
    names: set[str] = set()
    for node in selection_set.selections:
        directives += len(node.directives or ())
        below, level = _Size(), 0
        match node:
            case FieldNode():
                level = 1
                name = (node.alias or node.name).value
                if len(name) > MAX_ALIAS:
                    # The response repeats it in each object of a list.
                    raise too_complex(
                        f"The document has an alias of more than {MAX_ALIAS} characters."
                    )
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
                    sizes[spread] = _Size()  # Validation refuses a fragment that spreads itself.
                    fragment = fragments[spread]
                    own = _size(fragment.selection_set, fragments, sizes)
                    own_directives = own.directives + len(fragment.directives or ())
                    sizes[spread] = _Size(own.depth, own.aliases, own_directives)
                below = sizes.get(spread, _Size())
        depth = max(depth, level + below.depth)
        aliases += below.aliases
        directives += below.directives
    return _Size(depth, aliases, directives)
