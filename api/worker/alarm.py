"""One timer for the times of many attempts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Alarm:
    """Calls functions at times of the monotonic clock, on the event loop on which they were set.

    It has one timer, for the earliest of them. Each attempt has a timeout, and hardly any reaches
    it: a timer of its own takes longer than to start its handler.
    """

    def __init__(self) -> None:
        self._times: dict[Callable[[], None], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = float("inf")

    def set(self, call: Callable[[], None], when: float) -> None:
        """Call a function at this time, unless it is cleared before."""
        self._times[call] = when
        if when < self._rings_at:
            self._set_timer(when)

    def clear(self, call: Callable[[], None]) -> None:
        """Do not call a function any more."""
        self._times.pop(call, None)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._rings_at = when
        self._timer = loop.call_later(max(0.0, when - time.monotonic()), self._ring)

    def _ring(self) -> None:
        self._timer, self._rings_at = None, float("inf")
        now = time.monotonic()
        for call in [each for each, when in self._times.items() if when <= now]:
            self.clear(call)
            call()
        # The earliest may have been cleared: a timer that was set early is not set again.
        if self._times:
            self._set_timer(min(self._times.values()))
