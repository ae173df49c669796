"""Concurrent enqueues of one process share one INSERT and one commit.

No timer: what arrives while one commit is under way goes with the next. A lone caller waits for
nobody, and at 32 callers a commit (an fsync) is paid once for up to 32 jobs.
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
    """Hands what callers `submit` to `commit`, as many at once as have come together.

    `commit` writes a group in one transaction and gives a result for each item, in order. When it
    raises anything but `QueueUnavailable`, some item is at fault: each is then committed alone,
    so that only its own caller gets the error.
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
        """Gives the item's result once it is committed, or raises what its commit raised.

        A caller that is cancelled while it waits may still have its item committed.
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
            # Only when this task itself was cancelled is anyone still waiting here.
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
