"""Enters the lifespans of a worker's extensions, and chains their middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from job_registry import JobContext, WorkerExtension
from job_registry.context import State
from job_registry.errors import shortened, shortened_text
from job_registry_api.logs import log_unexpected


class WorkerStartError(Exception):
    """Raised when a worker cannot start, because a lifespan failed."""


@asynccontextmanager
async def lifespans(extensions: Sequence[WorkerExtension]) -> AsyncIterator[State]:
    """Enter the lifespans, and yield the namespace that becomes `job.state`.

    They are left in reverse order. An error on leaving is logged.

    Raises:
        WorkerStartError: a lifespan failed to start, or yields something other than a mapping of
            unused names.
    """
    state = State()
    stack = AsyncExitStack()
    try:
        for extension in extensions:
            if extension.lifespan is not None:
                name = getattr(extension.lifespan, "__qualname__", repr(extension.lifespan))
                await _enter(stack, extension.lifespan, name, state)
        yield state
    finally:
        try:
            await stack.aclose()
        except Exception as error:
            log_unexpected("lifespan", error)


def around(
    middleware: Sequence[Callable[[JobContext, Any], Awaitable[Any]]],
    job: JobContext,
    handler: Callable[[], Awaitable[Any]],
) -> Callable[[], Awaitable[Any]]:
    """Wrap the handler in its middleware. The first middleware is the outermost."""
    call = handler
    for each in reversed(middleware):
        call = _wrapped(each, job, call)
    return call


def _wrapped(
    middleware: Callable[[JobContext, Any], Awaitable[Any]],
    job: JobContext,
    call_next: Callable[[], Awaitable[Any]],
) -> Callable[[], Awaitable[Any]]:
    return lambda: middleware(job, call_next)


async def _enter(stack: AsyncExitStack, lifespan: Any, name: str, state: State) -> None:
    try:
        yielded = await stack.enter_async_context(lifespan())
        values = {} if yielded is None else dict(yielded)
    except Exception as error:
        words = shortened_text(str(error), 500)
        raise WorkerStartError(
            f"The lifespan {name} failed to start: {type(error).__name__}: {words}"
        ) from error
    for key, value in values.items():
        if not isinstance(key, str) or not key.isidentifier() or hasattr(state, key):
            raise WorkerStartError(
                f"The lifespan {name} yields {shortened(key)}: expected a name that is an"
                " identifier and that no other lifespan yields"
            )
        setattr(state, key, value)
