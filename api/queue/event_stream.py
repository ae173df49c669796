"""Reads the event messages of every process, including this one, in one order.

PostgreSQL delivers notifications in commit order. Without notifications (on SQLite, and on
PostgreSQL behind a pooler), messages are rows of `job_event_batch`, read in the order of their
ids. A `Gap` marks each place where messages may be missing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

from job_registry_api.queue.database import Database
from job_registry_api.queue.errors import reason_of
from job_registry_api.queue.store import EVENTS_KEPT_SECONDS, Store, StoredEvents

POLL_SECONDS: Final = 0.25
"""How often stored batches are read on PostgreSQL, where nothing announces new ones."""

RETRY_SECONDS: Final = 0.5
"""How long to wait before reading stored batches again after the database did not answer."""

MAX_UNREAD_MESSAGES: Final = 10_000
"""How many notifications may be unread. More of them are discarded and reported as missed."""

MAX_LATE_BATCHES: Final = 10_000
"""How many ids may lack a batch. If more do, they are reported as missed."""

BATCHES_BEFORE: Final = 100
"""How many ids before the newest one are checked for late commits when reading starts."""

BATCHES_AT_ONCE: Final = 1_000
"""How many batches are read at most before their events are delivered."""

READ_REST: Final = 3.0
MAX_READ_REST_SECONDS: Final = 0.01
"""How many times as long as it took to read stored batches they are not read again, and how long at
most. A read costs as much as a small request, so on SQLite a busy process would otherwise spend a
third of its time on reading each of its commits by itself."""

HISTORY_BATCHES: Final = 10_000
"""How many batches of the time before a process started it reads at most."""

DELETED: Final = "events were deleted before this process read them"

log = structlog.get_logger("job_registry.events")


@dataclass(frozen=True, slots=True)
class Gap:
    """A place in the stream where messages may be missing, and why."""

    reason: str


Take = Callable[[str | Gap], Awaitable[None]]


class EventStream:
    """Passes the messages that are committed from now on to one reader."""

    def __init__(self, database: Database, store: Store) -> None:
        self._database = database
        self._store = store
        self._kept = KeptBatches(store, gapless=database.notices_commits)
        self._notified: deque[str | Gap] = deque()
        self._news = asyncio.Event()
        self._ended = False
        self._is_failing = False
        self.begun: Final = asyncio.Event()
        """Set when the stream includes every message that is committed from then on."""

    async def history(self) -> tuple[list[StoredEvents], float] | None:
        """Return the stored batches that precede the stream, the newest first, and the Unix time
        since which they are complete. None: that is not known.

        A client can continue among them only if batches become visible in the order of their ids.
        On PostgreSQL a batch may become visible after one with a higher id.
        """
        number = self._kept.begun_at
        if number is None or not self._database.notices_commits:
            return None
        read_at = time.time()
        newest = await self._store.events_until(number, HISTORY_BATCHES)
        if any(batch.id != number - index for index, batch in enumerate(newest)):
            return None
        since = read_at - EVENTS_KEPT_SECONDS  # Only older ones have been deleted.
        if len(newest) == HISTORY_BATCHES:
            since = newest[-1].created_at.timestamp()
        return newest, since

    async def feed(self, take: Take) -> None:
        """Call `take` with each message and gap, one after another, until `end` is called."""
        listening = asyncio.create_task(self._listen(), name="job-events-listening")
        try:
            while not self._ended:
                self._news.clear()
                keeps = self._database.keeps_events
                pause = POLL_SECONDS if keeps and not self._database.notices_commits else None
                if not keeps:
                    await self._take_notified(take)
                else:
                    begun = time.monotonic()
                    if not await self._take_kept(take):
                        pause = RETRY_SECONDS
                    took = time.monotonic() - begun
                    await asyncio.sleep(min(READ_REST * took, MAX_READ_REST_SECONDS))
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._news.wait()
        finally:
            listening.cancel()
            await asyncio.wait({listening})

    def look(self) -> None:
        """Read stored batches now, because this process has just committed one."""
        if self._database.keeps_events:
            self._news.set()

    def end(self) -> None:
        """End `feed` after the current message."""
        self._ended = True
        self._news.set()

    async def _listen(self) -> None:
        """Listen for new messages. After an error, start again."""
        while True:
            try:
                await self._database.listen(self._notify, self._notify_gap)
            except Exception:
                with suppress(Exception):
                    log.exception("events.listening_failed")
            await asyncio.sleep(1.0)

    def _notify(self, message: str) -> None:
        if self._database.keeps_events:
            return
        if len(self._notified) >= MAX_UNREAD_MESSAGES:
            self._notified.clear()
            self._notified.append(Gap("this process reads events too slowly"))
        self._notified.append(message)
        self._news.set()

    def _notify_gap(self) -> None:
        # With stored batches, gaps in their ids show whether any is missing.
        if not self._database.keeps_events:
            self._notified.append(Gap("the connection to the database was lost for a while"))
        self._news.set()

    async def _take_notified(self, take: Take) -> None:
        while self._notified and not self._ended:
            item = self._notified.popleft()
            await take(item)
            if isinstance(item, Gap):
                self.begun.set()

    async def _take_kept(self, take: Take) -> bool:
        """Take every new batch; return False if the database did not answer."""
        try:
            while not self._ended:
                items = await self._kept.read()
                self.begun.set()
                for item in items:
                    await take(item)
                # With fewer batches, a later commit sets `_news` again.
                if len(items) < BATCHES_AT_ONCE:
                    break
        except Exception as error:
            # Nothing is missed: the next read continues from the same batch.
            if not self._is_failing:
                with suppress(Exception):
                    log.warning("events.read_failed", reason=reason_of(error))
            self._is_failing = True
            return False
        self._is_failing = False
        return True


class KeptBatches:
    """Reads the table `job_event_batch`, each time from the last batch it read.

    `gapless` means that ids have no gaps and become visible in order, as on SQLite, which has one
    writer at a time. A missing id was then deleted unread. On PostgreSQL a missing id may belong
    to a transaction that rolled back or is not committed yet. Missing ids are looked up again for
    as long as batches are stored, so late messages are delivered late. Of two transactions that
    change one job, the second takes its id after the first is committed, so the events of a job
    are always in order.
    """

    def __init__(
        self, store: Store, *, gapless: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._gapless = gapless
        self._clock = clock
        self._last: int | None = None
        self._last_message: str | None = None
        """The message of `_last`, which differs if the database was restored. None: not known."""
        self._late: dict[int, float] = {}
        """Ids before `_last` that have no batch yet, and when that was first seen."""
        self._read_at = clock()
        self.begun_at: int | None = None
        """The id of the last batch that is not read because reading began after it."""

    async def read(self) -> list[str | Gap]:
        """Return the next messages, in order. The first call only finds the end of the table."""
        if self._last is None:
            newest = await self._store.last_event()
            await self._begin(newest)
            self.begun_at = newest
            return []
        deleted = False
        # With the last one that was read: as long as it is there, nothing has been deleted since.
        batches = await self._store.events_after(self._last - 1, BATCHES_AT_ONCE + 1)
        last = batches.pop(self._last, None)
        if last is not None and self._last_message not in (None, last):
            return await self._begin_again(await self._store.last_event())
        self._last_message = last
        if not batches and last is None:
            newest = await self._store.last_event()
            if 0 < newest < self._last:
                return await self._begin_again(newest)
            if newest > self._last:
                # Committed between the two reads, or already deleted.
                batches = await self._store.events_after(self._last, BATCHES_AT_ONCE)
                deleted = not batches and self._gapless
                self._last = newest if deleted else self._last
        if batches:
            self._last_message = batches[max(batches)]
        if self._gapless:
            return [Gap(DELETED)] if deleted else self._in_order(batches)
        return await self._with_late_ones(batches)

    async def _begin_again(self, newest: int) -> list[str | Gap]:
        await self._begin(newest)
        return [Gap("the database was replaced by an older one")]

    async def _begin(self, newest: int) -> None:
        self._last, self._last_message, self._late = newest, None, {}
        self._read_at = self._clock()
        if not self._gapless and newest:
            before = max(0, newest - BATCHES_BEFORE)
            self._expect(before, await self._store.events_after(before, BATCHES_AT_ONCE))

    def _in_order(self, batches: dict[int, str]) -> list[str | Gap]:
        items: list[str | Gap] = []
        for number, message in batches.items():
            # The first batch of a table has the id 1.
            if number != (self._last or 0) + 1:
                items.append(Gap(DELETED))
            items.append(message)
            self._last = number
        return items

    async def _with_late_ones(self, batches: dict[int, str]) -> list[str | Gap]:
        now = self._clock()
        items: list[str | Gap] = []
        if now - self._read_at > EVENTS_KEPT_SECONDS / 2:
            # A missing id does not show whether a batch was deleted or a transaction rolled back.
            items.append(Gap(DELETED))
        self._read_at = now
        # Read after `batches`, so that every batch committed before one of them is visible.
        late = await self._store.events_among(list(self._late)) if self._late else {}
        self._late = {
            number: since
            for number, since in self._late.items()
            if number not in late and now - since <= EVENTS_KEPT_SECONDS
        }
        if batches:
            before = self._last or max(0, min(batches) - 1 - BATCHES_BEFORE)
            if not self._expect(before, batches):
                items.append(Gap("more events were late than this process can wait for"))
        items += [message for _, message in sorted({**late, **batches}.items())]
        return items

    def _expect(self, before: int, batches: dict[int, str]) -> bool:
        """Record the missing ids between `before` and the last of `batches`.

        Return False, and record none, if there are too many.
        """
        now = self._clock()
        last = max([before, self._last or 0, *batches])
        self._last = last
        if last - before - len(batches) + len(self._late) > MAX_LATE_BATCHES:
            self._late = {}
            return False
        absent = (number for number in range(before + 1, last) if number not in batches)
        self._late |= dict.fromkeys(absent, now)
        return True
