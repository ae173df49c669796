"""The limits of an answer: its fields are charged before they resolve, its large values as they do.

A page of jobs ends before it exceeds them. What cannot end early is refused as `budget_exceeded`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import strawberry
from pydantic_core import to_json

from job_registry_api.graphql.compiled import Resumable
from job_registry_api.graphql.context import Context, context_of
from job_registry_api.graphql.selections import Selected
from job_registry_api.queue.errors import IdempotencyConflict
from job_registry_api.queue.models import JobRecord, weight_of

SMALL_WEIGHT: Final = 10_000
"""The weight of a job up to which its values are kept and not charged: a request has 30 of them."""

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
    selections = context_of(info).selections
    if selections is None:  # The schema is executed without our `Executor`.
        return _UNKNOWN
    path = info.path
    while path.prev is not None:
        path = path.prev
    return selections.below(str(path.key))


class Charged(Resumable):
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
        before = self.call_before()
        if before is not None:
            return self.outcome_of(before, arguments)
        value = next_(source, info, **arguments)
        if value is not None:
            size = len(value if type(value) is str else to_json(value))
            context_of(info).budget.charge_bytes(size)
        return value
