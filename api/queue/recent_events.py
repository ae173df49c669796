"""The latest events of all processes, numbered in the order in which this process read them.

All subscribers read from this one list, so a subscriber that is behind needs no buffer that could
fill up.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from job_registry_api.queue.errors import EventsMissed
from job_registry_api.queue.event_stream import Gap

KEPT_SECONDS: Final = 60.0
"""How long an event can be read. A subscriber that is further behind has missed events."""

MAX_KEPT_EVENTS: Final = 50_000
"""The most events that can be read, about 15 MB. Older ones are dropped first."""

MAX_CLOCK_SKEW: Final = 5.0
"""How far the clocks of two processes may differ, in seconds, for `position_of`."""

_TRIMMED_AT_ONCE: Final = 256

T = TypeVar("T")


class Numbered(NamedTuple, Generic[T]):
    """An event, its number in this process, and when it was read, in seconds of Unix time."""

    number: int
    at: int
    item: T


class RecentEvents(Generic[T]):
    """A list of events that grows at its end and is trimmed at its beginning.

    Numbers are consecutive, and 1 is that of the first event since the start. A `Gap` has a number
    too: no reader can read past it.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: list[tuple[float, T | Gap]] = []
        self._first = 1
        self._complete_since = clock()
        """The time since which no event is missing from the entries."""
        self._is_whole = True
        """Whether it has every event since the start."""

    @property
    def last(self) -> int:
        """The number of the newest entry, 0 before the first."""
        return self._first + len(self._entries) - 1

    def extend(self, items: Sequence[T | Gap]) -> int:
        """Add events and gaps, and return the number of the last."""
        now = self._clock()
        if self._entries:
            # In order even if the clock was set back: `position_of` searches by time.
            now = max(now, self._entries[-1][0])
        before = self.last
        self._entries += [(now, item) for item in items]
        if any(isinstance(item, Gap) for item in items):
            self._complete_since, self._is_whole = now, False
        if self.last // _TRIMMED_AT_ONCE > before // _TRIMMED_AT_ONCE:
            self._trim(now)
        return self.last

    def prepend(self, earlier: Sequence[tuple[float, T]], complete_since: float) -> None:
        """Add the events before the start, in order, each with its time.

        No event between `complete_since` and the start is missing from them. They are of no use if
        events since the start are missing, and are then not added.
        """
        if not self._is_whole:
            return
        kept: list[tuple[float, T | Gap]] = []
        before = self._entries[0][0] if self._entries else self._clock()
        for at, item in reversed(earlier[-MAX_KEPT_EVENTS:]):
            before = min(before, at)  # In order even if the clock was set back.
            kept.append((before, item))
        self._entries[:0] = kept[::-1]
        self._first -= len(kept)
        if len(kept) < len(earlier):
            complete_since = before
        self._complete_since = min(self._complete_since, complete_since)

    def read(self, after: int, most: int) -> tuple[list[Numbered[T]], int]:
        """Return up to `most` events after a number, and the number to read on after.

        Raises:
            EventsMissed: the next event has been dropped, or there is a gap before it.
        """
        begin = after + 1 - self._first
        if begin < 0:
            raise EventsMissed(
                f"the subscriber was more than {KEPT_SECONDS:.0f} seconds"
                f" or {MAX_KEPT_EVENTS:,} events behind"
            )
        found: list[Numbered[T]] = []
        for number, (at, item) in enumerate(self._entries[begin : begin + most], after + 1):
            if isinstance(item, Gap):
                if not found and number == after + 1:
                    raise EventsMissed(item.reason)
                return found, number - 1
            found.append(Numbered(number, int(at), item))
        return found, after + len(found)

    def position_of(
        self, is_event: Callable[[T], bool], at: int, is_number: Callable[[int], bool]
    ) -> int | None:
        """Return the number of an event that was read at this time, here or in another process.

        `is_number` recognizes the number of an event of this process. Another process has read the
        same events in the same order, so there the first equal event at that time is taken: nothing
        after it is missed, and what lies between two equal ones may be read again. Return None if
        events after it may be missing.
        """
        # A thousand clients may continue at once, so only the entries of that time are compared.
        begin = bisect_left(self._entries, at - MAX_CLOCK_SKEW - 1, key=_time_of)
        end = bisect_right(self._entries, at + MAX_CLOCK_SKEW + 1, key=_time_of)
        equal = [
            number
            for number, (_, item) in enumerate(self._entries[begin:end], self._first + begin)
            if not isinstance(item, Gap) and is_event(item)
        ]
        for number in equal:
            if is_number(number):
                return number
        if self._complete_since > at - MAX_CLOCK_SKEW:
            return None
        return equal[0] if equal else None

    def _trim(self, now: float) -> None:
        old = bisect_left(self._entries, now - KEPT_SECONDS, key=_time_of)
        # The newest entry stays even if the clock was set back.
        dropped = min(max(old, len(self._entries) - MAX_KEPT_EVENTS), len(self._entries) - 1)
        if dropped > 0:
            del self._entries[:dropped]
            self._first += dropped
            self._is_whole = False
            self._complete_since = max(self._complete_since, self._entries[0][0])


def _time_of(entry: tuple[float, Any]) -> float:
    return entry[0]
