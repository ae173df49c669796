"""Lets tasks that become ready at the same time take turns, with other requests in between."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

SLICE_SECONDS: Final = 0.002
"""How long tasks that take turns may run before other requests run for as long."""

MAX_AT_ONCE: Final = 256
"""The most tasks that run before the time is measured."""

REST: Final = 9.0
"""How many times as long as the turns of a round the rest lasts until the next round, at most
`MAX_REST_SECONDS`. The few turns after a rare event are followed by next to none."""

MAX_REST_SECONDS: Final = 0.02


class Turns:
    """A queue of tasks on one event loop, which run in rounds.

    A thousand tasks that one event wakes would all run before the loop serves anything else. After
    `await turns.take()` they run a few at a time. Their number is adjusted so that they take about
    `SLICE_SECONDS`.

    A task that comes back during a round waits for the next one. What has happened until then is
    served in one turn: with many tasks, a turn of each for every event would take all the time.
    """

    def __init__(self) -> None:
        self._round: deque[asyncio.Future[None]] = deque()
        self._next_round: deque[asyncio.Future[None]] = deque()
        self._at_once = 8
        self._is_active = False
        self._is_open = False
        """Whether the tasks that come now were ready when the round began."""
        self._begun = 0.0
        self._seconds = 0.0
        """How long the turns of this round have taken."""

    async def take(self, *, again: bool = False) -> None:
        """Wait for this task's turn, which lasts until the task waits for something.

        `again` stands for a task that had its turn in this round, and did not finish in it.
        """
        loop = asyncio.get_running_loop()
        if not self._is_active:
            self._is_active = self._is_open = True
            self._seconds = 0.0
            self._begun = loop.time()
            # It runs after all tasks that are ready now: the loop runs callbacks in the order of
            # scheduling.
            loop.call_soon(self._pause, loop)
            return
        turn = loop.create_future()
        (self._round if again or self._is_open else self._next_round).append(turn)
        await turn

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin a round of the tasks that have come in the meantime."""
        self._round += self._next_round
        self._next_round.clear()
        self._seconds = 0.0
        self._is_active = bool(self._round)
        if self._is_active:
            self._release(loop)

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the turns of the next tasks."""
        released = 0
        while self._round and released < self._at_once:
            turn = self._round.popleft()
            if not turn.done():
                turn.set_result(None)
                released += 1
        if not released:
            loop.call_later(min(REST * self._seconds, MAX_REST_SECONDS), self._begin, loop)
            return
        self._begun = loop.time()
        loop.call_soon(self._pause, loop)  # After the tasks.

    def _pause(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let other requests run for as long as the tasks have run."""
        self._is_open = False
        seconds = loop.time() - self._begun
        self._seconds += seconds
        if seconds > SLICE_SECONDS:
            self._at_once = max(1, self._at_once // 2)
        elif self._at_once < MAX_AT_ONCE and seconds < SLICE_SECONDS / 2:
            self._at_once *= 2
        loop.call_later(min(seconds, SLICE_SECONDS), self._release, loop)
