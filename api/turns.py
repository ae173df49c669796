"""Lets tasks that become ready at the same time take turns, with other requests in between."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

SLICE_SECONDS: Final = 0.002
"""How long tasks that take turns may run before other requests run for as long."""

MAX_AT_ONCE: Final = 256
"""The most tasks that run before the time is measured."""


class Turns:
    """A queue of tasks on one event loop.

    A thousand tasks that one event wakes would all run before the loop serves anything else. After
    `await turns.take()` they run a few at a time. Their number is adjusted so that they take about
    `SLICE_SECONDS`.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._at_once = 8
        self._is_active = False
        self._begun = 0.0

    async def take(self) -> None:
        """Wait for this task's turn, which lasts until the task waits for something."""
        loop = asyncio.get_running_loop()
        if not self._is_active:
            self._is_active = True
            self._begun = loop.time()
            loop.call_soon(self._pause, loop)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the turns of the next tasks."""
        released = 0
        while self._waiting and released < self._at_once:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                released += 1
        if not released:
            self._is_active = False
            return
        self._begun = loop.time()
        # `_pause` runs after the tasks: the loop runs callbacks in the order of scheduling.
        loop.call_soon(self._pause, loop)

    def _pause(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let other requests run for as long as the tasks have run."""
        seconds = loop.time() - self._begun
        if seconds > SLICE_SECONDS:
            self._at_once = max(1, self._at_once // 2)
        elif self._at_once < MAX_AT_ONCE and seconds < SLICE_SECONDS / 2:
            self._at_once *= 2
        loop.call_later(min(seconds, SLICE_SECONDS), self._release, loop)
