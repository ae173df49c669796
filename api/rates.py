"""Rates of requests: a sliding window per caller, in memory that does not grow with callers."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from limits import RateLimitItem

MAX_CALLERS: Final = 20_000
"""Callers that are counted at once, about 8 MB. Beyond that, the count of the caller whose last
request is the longest ago begins again."""


class Exceeded(NamedTuple):
    """A limit that a caller has used up, and for how many seconds."""

    limit: RateLimitItem
    seconds: float


@dataclass(slots=True)
class _Window:
    number: int
    count: int = 0
    count_before: int = 0
    """In the window before this one."""


class Rates:
    """Counts requests per caller against limits. The name of a caller is any text."""

    def __init__(self, limits: Sequence[RateLimitItem]) -> None:
        self._limits = tuple(limits)
        self._windows: OrderedDict[str, tuple[_Window, ...]] = OrderedDict()

    def exceeded(self, caller: str) -> Exceeded | None:
        """Return the limit that a further request would exceed; None if it may be sent."""
        if not self._limits or caller not in self._windows:
            return None
        now = time.monotonic()
        longest: Exceeded | None = None
        for limit, window in zip(self._limits, self._windows_of(caller, now), strict=True):
            seconds = _seconds_to_wait(limit, window, now)
            if seconds > 0 and (longest is None or seconds > longest.seconds):
                longest = Exceeded(limit, seconds)
        return longest

    def count(self, caller: str) -> Exceeded | None:
        """Count a request. Return the limit that it exceeds, and do not count it then."""
        if not self._limits:
            return None
        exceeded = self.exceeded(caller)
        if exceeded is None:
            for window in self._windows_of(caller, time.monotonic()):
                window.count += 1
        return exceeded

    def _windows_of(self, caller: str, now: float) -> tuple[_Window, ...]:
        windows = self._windows.get(caller)
        if windows is None:
            numbers = [int(now // limit.get_expiry()) for limit in self._limits]
            windows = self._windows[caller] = tuple(_Window(number) for number in numbers)
            if len(self._windows) > MAX_CALLERS:
                self._windows.popitem(last=False)
            return windows
        self._windows.move_to_end(caller)
        for limit, window in zip(self._limits, windows, strict=True):
            number = int(now // limit.get_expiry())
            if number != window.number:
                window.count_before = window.count if number == window.number + 1 else 0
                window.number, window.count = number, 0
        return windows


def _seconds_to_wait(limit: RateLimitItem, window: _Window, now: float) -> float:
    """Return how long a caller has to wait for its next request; 0 if it need not.

    The window before counts by the part of it that is less than one window ago.
    """
    length = limit.get_expiry()
    passed = now % length
    left = limit.amount - 1 - window.count
    if left < 0:
        return length - passed
    if window.count_before * (1 - passed / length) <= left:
        return 0.0
    return length * (1 - left / window.count_before) - passed
