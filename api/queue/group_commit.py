"""Concurrent calls in one process share one statement and one commit.

There is no timer: calls that arrive during a commit join the next one. A single caller does not
wait, and 32 concurrent callers share one commit (one fsync).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from job_registry_api.queue.errors import QueueUnavailable

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

    async def submit(self, item: Item) -> Result:
        """Return the item's result after its commit, or raise what its commit raised.

        The item of a cancelled caller may still be committed.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="group-commit")
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                count = min(len(self._waiting), self._max_items)
                await self._commit_group([self._waiting.popleft() for _ in range(count)])
        finally:
            self._task = None
            # Callers are left only if this task was cancelled.
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()

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
