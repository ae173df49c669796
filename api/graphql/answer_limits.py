"""The limits of an answer: its fields are charged before they resolve, its large values as they do.

A page of jobs ends before it exceeds them. What cannot end early is refused as `budget_exceeded`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple

import strawberry
from graphql import (
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    InlineFragmentNode,
    SelectionSetNode,
)
from pydantic_core import to_json
from strawberry.extensions import FieldExtension

from job_registry_api.graphql.context import Context, context_of
from job_registry_api.graphql.document_limits import fragments_of
from job_registry_api.queue.errors import IdempotencyConflict
from job_registry_api.queue.models import JobRecord, weight_of

SMALL_WEIGHT: Final = 10_000
"""The weight of a job up to which its values are kept and not charged: a request has 30 of them."""

_INTERFACES: Final = ("Error", "Node")


class Selected(NamedTuple):
    """What an operation selects below a field: how many fields in all, below `attempts`, and with
    the name of each of a job's values that may be large."""

    fields: int = 0
    of_attempts: int = 0
    payloads: int = 0
    progresses: int = 0
    results: int = 0
    errors: int = 0

    @property
    def copies(self) -> int:
        """How often the answer has the same value of a job at most."""
        return max(self.payloads, self.progresses, self.results, self.errors, 1)


_UNKNOWN: Final = Selected(payloads=1, progresses=1, results=1, errors=1)


class ReadingJob:
    """A context in which a field reads a job: it waits for the other fields that do.

    Raises:
        BudgetExceeded: the jobs that were read are large enough for an answer.
    """

    # Not `asynccontextmanager`, which takes as long as validating a payload.
    def __init__(self, info: strawberry.Info[Context, None]) -> None:
        self._info = info
        self._budget = context_of(info).budget

    async def __aenter__(self) -> None:
        await self._budget.reading.acquire()
        try:
            self._budget.check_reading()
        except BaseException:
            self._budget.reading.release()
            raise

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._budget.reading.release()
        if isinstance(error, IdempotencyConflict):
            existing = kept_for_answer(self._info, error.existing_job)
            raise IdempotencyConflict(existing, error.differing_paths) from None


def kept_for_answer(info: strawberry.Info[Context, None], job: JobRecord) -> JobRecord:
    """Return a job without the large values that the answer will not have. Charge all of them.

    A request has many fields, and what one of them has read is kept until all are resolved.
    """
    weight = weight_of(job)
    if weight < SMALL_WEIGHT:
        return job
    context_of(info).budget.charge_reading(weight)
    of_each = selected(info)
    return job._replace(
        payload=job.payload if of_each.payloads else None,
        progress=job.progress if of_each.progresses else None,
        result=job.result if of_each.results else None,
        error=job.error if of_each.errors else None,
    )


def selected(info: strawberry.Info[Context, None]) -> Selected:
    """Return what is selected below the root field that is being resolved."""
    executed = context_of(info).operation
    if executed is None:  # The schema is executed without our `Executor`.
        return _UNKNOWN
    document, operation = executed
    path = info.path
    while path.prev is not None:
        path = path.prev
    fragments = fragments_of(document)
    return _below(operation.selection_set, fragments, {}, only=str(path.key))


def _below(
    selection_set: SelectionSetNode,
    fragments: Mapping[str, FragmentDefinitionNode],
    known: dict[str, Selected],
    *,
    only: str | None = None,
) -> Selected:
    """Return what is selected, or what is selected below the fields with one response name.

    `known` keeps that of each fragment. Of the fragments on several object types the largest
    counts, because an object has one type.
    """
    total = Selected()
    of_types: dict[str, Selected] = {}
    spread: set[str] = set()
    for node in selection_set.selections:
        match node:
            case FieldNode(name=name, selection_set=inner):
                if only is not None and (node.alias or name).value != only:
                    continue
                below = Selected() if inner is None else _below(inner, fragments, known)
                total = _sum(total, below if only is not None else _with(name.value, below))
                continue
            case InlineFragmentNode(type_condition=condition, selection_set=inner):
                below = _below(inner, fragments, known, only=only)
                kind = condition.name.value if condition is not None else None
            case FragmentSpreadNode(name=name) if name.value not in spread:
                spread.add(name.value)
                fragment = fragments[name.value]
                if name.value not in known or only is not None:
                    below = _below(fragment.selection_set, fragments, known, only=only)
                    if only is None:
                        known[name.value] = below
                else:
                    below = known[name.value]
                kind = fragment.type_condition.name.value
            case _:
                continue
        if kind is None or kind in _INTERFACES or only is not None:
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
        below.payloads + (name == "payload"),
        below.progresses + (name == "progress"),
        below.results + (name == "result"),
        below.errors + (name == "error"),
    )


def _sum(one: Selected, other: Selected) -> Selected:
    return Selected(*(a + b for a, b in zip(one, other, strict=True)))


class Charged(FieldExtension):
    """Charges a value that may be large, a text or any JSON, to the answer of the request."""

    def resolve(
        self,
        next_: Callable[..., Any],
        source: object,
        info: strawberry.Info[Context, None],
        **arguments: object,
    ) -> Any:
        """Resolve the field.

        Raises:
            BudgetExceeded: the answer would be too large.
        """
        value = next_(source, info, **arguments)
        if value is not None:
            size = len(value if type(value) is str else to_json(value))
            context_of(info).budget.charge_bytes(size)
        return value
