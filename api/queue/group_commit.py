"""Concurrent calls in one process share one statement and one commit.

There is no timer: calls that arrive during a commit join the next one. After a group of several
calls, the next one also waits while more calls arrive, at most for as long as the last commit took.
A single caller does not wait, and 32 concurrent callers share one commit (one fsync).
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Any, Final, Generic, TypeVar

from job_registry_api.queue.errors import QueueUnavailable

GATHERING_TURNS: Final = 4
"""How many turns of the event loop may bring no further call before a group is committed. A server
reads requests in one turn and serves them in the next. On the same machine, the next client needs a
turn or two more."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class GroupCommit(Generic[Item, Result]):
    """Collects the items that callers `submit`, and passes them to `commit` in groups.

    `commit` writes a group in one transaction and returns a result for each item, in order. If it
    raises anything but `QueueUnavailable`, each item is committed alone, so that only the caller
    of a faulty item gets the error.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        *,
        max_items: int = 1_000,
    ) -> None:
        self._commit = commit
        self._max_items = max_items
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._gathering_seconds = 0.0
        """How long the next group may wait for more items. A server that is nearly busy never runs
        out of them: without a limit, the first one would wait until a thousand have come."""
        self._deadlines = _Deadlines()

    async def submit(self, item: Item, *, until: float = math.inf) -> Result:
        """Return the item's result after its commit, or raise what its commit raised.

        The item of a cancelled caller may still be committed, and so may one whose result did not
        come in time after its commit began. One whose time ends earlier is not: its caller may have
        sent it again.

        Raises:
            TimeoutError: there is no result at this time of the event loop.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._deadlines.add(future, until)
        if self._task is None:
            # In a context of its own: what it does and logs is not of its first caller alone.
            self._task = asyncio.create_task(self._run(), name="group-commit", context=Context())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                await self._gather(loop.time() + self._gathering_seconds)
                count = min(len(self._waiting), self._max_items)
                began = loop.time()
                group = [self._waiting.popleft() for _ in range(count)]
                if in_time := [each for each in group if not _is_late(each[1])]:
                    await self._commit_group(in_time)
                self._gathering_seconds = loop.time() - began if count > 1 else 0.0
                self._deadlines.forget_done()
        finally:
            self._task = None
            # Callers are left only if this task was cancelled.
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()

    async def _gather(self, until: float) -> None:
        """Wait while calls arrive, and the group has room for them, at most until this time."""
        loop, count = asyncio.get_running_loop(), 0
        while count < len(self._waiting) < self._max_items and loop.time() < until:
            count = len(self._waiting)
            for _ in range(GATHERING_TURNS):
                await asyncio.sleep(0)

    async def _commit_group(self, group: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._commit([item for item, _ in group])
        except Exception as error:
            if len(group) == 1 or isinstance(error, QueueUnavailable):
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
            else:
                for single in group:
                    await self._commit_group([single])
        except BaseException:
            for _, future in group:
                future.cancel()
            raise
        else:
            for (_, future), result in zip(group, results, strict=True):
                if not future.done():
                    future.set_result(result)


def _is_late(future: asyncio.Future[Any]) -> bool:
    """Return whether the time of a caller has ended, so that it has got an error already."""
    return future.done() and not future.cancelled()


class _Deadlines:
    """Ends futures that are not done in time, with one timer for all of them.

    A timer for each takes longer than to insert a job.
    """

    def __init__(self) -> None:
        self._futures: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, future: asyncio.Future[Any], until: float) -> None:
        """End a future with a TimeoutError at this time of its event loop."""
        if math.isinf(until):
            return
        self._futures.append((until, future))
        if self._timer is None or self._timer.when() > until:
            self._set_timer(future.get_loop(), until)

    def forget_done(self) -> None:
        """Forget the first futures, as far as they are done."""
        while self._futures and self._futures[0][1].done():
            self._futures.popleft()

    def _set_timer(self, loop: asyncio.AbstractEventLoop, time: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(time, self._end_late, loop)

    def _end_late(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for until, future in self._futures:
            if until <= now and not future.done():
                future.set_exception(TimeoutError())
        self._futures = deque(each for each in self._futures if not each[1].done())
        if self._futures:
            self._set_timer(loop, min(until for until, _ in self._futures))
