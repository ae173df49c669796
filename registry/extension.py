"""`WorkerExtension`: what a user's own code adds around every handler of a worker."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from job_registry.context import JobContext
from job_registry.errors import DefinitionError, shortened
from job_registry.job_type import is_async

CallNext = Callable[[], Awaitable[Any]]
"""Runs the next middleware, or the handler. It returns the handler's result."""

Middleware = Callable[[JobContext, CallNext], Awaitable[Any]]
"""`async def middleware(job, call_next)`: it awaits `call_next()` and returns its result."""

Lifespan = Callable[[], AbstractAsyncContextManager[Mapping[str, Any] | None]]
"""An async context manager that yields the attributes of `job.state`."""


@dataclass(frozen=True, slots=True, eq=False)
class WorkerExtension:
    """Middleware around every handler, and a lifespan of the worker. Both are optional.

    Define it at the top level of a module that `JOBS_CATALOG` names. Where there are several, the
    first one found is the outermost. `middleware` is entered in its order, around handlers of
    every kind. `lifespan` is entered once per worker, and once in each process of handlers that
    run in processes; the names it yields are attributes of `job.state`.

    Raises:
        DefinitionError: `middleware` holds something other than async functions of two arguments,
            or `lifespan` is not a function without arguments.
    """

    middleware: Sequence[Middleware] = ()
    lifespan: Lifespan | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.middleware, Sequence):
            raise DefinitionError(
                f"WorkerExtension: middleware is {shortened(self.middleware)}, expected a list"
            )
        object.__setattr__(self, "middleware", tuple(self.middleware))
        for each in self.middleware:
            if not _takes(each, 2) or not is_async(each):
                raise DefinitionError(
                    f"WorkerExtension: the middleware {shortened(each)} must be an"
                    " `async def` of (job, call_next)"
                )
        if self.lifespan is not None and not _takes(self.lifespan, 0):
            raise DefinitionError(
                f"WorkerExtension: the lifespan {shortened(self.lifespan)} must be a function"
                " without arguments, such as one with @asynccontextmanager"
            )


def _takes(function: Callable[..., object], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except (TypeError, ValueError):
        return False
    return True
