"""What an operation selects: its root fields, and how many fields and large values below each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionNode,
    SelectionSetNode,
)

from job_registry_api.graphql.document_limits import fragments_of

_INTERFACES: Final = ("Error", "Node")


class Selected(NamedTuple):
    """What an operation selects below a field: how many fields in all, below `attempts`, below
    `logs`, and with the name of each of a job's values that may be large."""

    fields: int = 0
    of_attempts: int = 0
    of_logs: int = 0
    payloads: int = 0
    progresses: int = 0
    results: int = 0
    errors: int = 0

    @property
    def copies(self) -> int:
        """How often the answer has the same value of a job at most."""
        return max(self.payloads, self.progresses, self.results, self.errors, 1)


class Selections:
    """What an operation selects below each of its root fields.

    Each is counted once, by the first request that asks for it: fields of each job of a page do.
    """

    def __init__(self, document: DocumentNode, operation: OperationDefinitionNode) -> None:
        self._document = document
        self._operation = operation
        self._below: dict[str, Selected] = {}

    def below(self, response_name: str) -> Selected:
        """Return what is selected below a root field."""
        known = self._below.get(response_name)
        if known is None:
            known = self._below[response_name] = self._count(response_name)
        return known

    def _count(self, response_name: str) -> Selected:
        fragments = fragments_of(self._document)
        total = Selected()
        known: dict[str, Selected] = {}
        for node in root_selections(self._document, self._operation):
            match node:
                case FieldNode(selection_set=SelectionSetNode() as below):
                    if (node.alias or node.name).value == response_name:
                        total = _sum(total, _below(below, fragments, known))
        return total


def root_selections(
    document: DocumentNode,
    operation: OperationDefinitionNode,
    is_skipped: Callable[[SelectionNode], bool] = lambda _: False,
) -> Iterator[SelectionNode]:
    """Yield the selections of the root, with those in fragments, but those that are skipped."""
    fragments = fragments_of(document)
    waiting: list[SelectionSetNode] = [operation.selection_set]
    while waiting:
        for node in waiting.pop().selections:
            if is_skipped(node):
                continue
            yield node
            match node:
                case InlineFragmentNode():
                    waiting.append(node.selection_set)
                case FragmentSpreadNode() if node.name.value in fragments:
                    # Its fields are the same each time it is spread.
                    waiting.append(fragments.pop(node.name.value).selection_set)


def _below(
    selection_set: SelectionSetNode,
    fragments: Mapping[str, FragmentDefinitionNode],
    known: dict[str, Selected],
) -> Selected:
    """Return what is selected. `known` keeps that of each fragment.

    Of the fragments on several object types the largest counts, because an object has one type.
    """
    total = Selected()
    of_types: dict[str, Selected] = {}
    spread: set[str] = set()
    for node in selection_set.selections:
        match node:
            case FieldNode(name=name, selection_set=inner):
                below = Selected() if inner is None else _below(inner, fragments, known)
                total = _sum(total, _with(name.value, below))
                continue
            case InlineFragmentNode(type_condition=condition, selection_set=inner):
                below = _below(inner, fragments, known)
                kind = condition.name.value if condition is not None else None
            case FragmentSpreadNode(name=name) if name.value not in spread:
                spread.add(name.value)
                fragment = fragments[name.value]
                if name.value not in known:
                    known[name.value] = _below(fragment.selection_set, fragments, known)
                below = known[name.value]
                kind = fragment.type_condition.name.value
            case _:
                continue
        if kind is None or kind in _INTERFACES:
            total = _sum(total, below)
        else:
            of_types[kind] = _sum(of_types.get(kind, Selected()), below)
    largest = [max(numbers) for numbers in zip(*of_types.values(), strict=True)]
    return _sum(total, Selected(*largest))


def _with(name: str, below: Selected) -> Selected:
    """Return what a field and the fields below it are."""
    return Selected(
        below.fields + 1,
        below.of_attempts + (below.fields if name == "attempts" else 0),
        below.of_logs + (below.fields if name == "logs" else 0),
        below.payloads + (name == "payload"),
        below.progresses + (name == "progress"),
        below.results + (name == "result"),
        below.errors + (name == "error"),
    )


def _sum(one: Selected, other: Selected) -> Selected:
    return Selected(*(a + b for a, b in zip(one, other, strict=True)))
