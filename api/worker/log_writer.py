"""Stores the log lines of handlers with their attempts.

It runs on the loop of the lease keeper, so that no handler can hold it up: once a second for an
attempt that runs, and at once for one that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable
from typing import Final

import structlog

from job_registry_api.queue.errors import reason_of
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker.job_log import Tail

STORE_SECONDS: Final = 1.0
"""The shortest time between two writes of the lines of an attempt that runs."""

FLUSH_SECONDS: Final = 2.0
"""How long the end of an attempt waits until its last lines are stored."""

WRITE_SECONDS: Final = 5.0
"""How long one write may take."""

STORED_AT_ONCE: Final = 50
"""The lines of how many attempts are stored in one statement."""

log = structlog.get_logger("job_registry.worker")


class LogWriter:
    """Stores the lines of the attempts of one worker. `add` and `flush` are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: dict[str, Tail] = {}
        """The tails with lines that are not stored, by the token of the lease."""
        self._written_at: dict[str, float] = {}
        self._writing: set[str] = set()
        self._flushed: dict[str, asyncio.Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alarm = asyncio.Event()

    def add(self, token: str, tail: Tail, line: bytes) -> None:
        """Add a line to the tail of an attempt. It is stored soon."""
        tail.add(line)
        with self._lock:
            is_first = not self._changed
            self._changed[token] = tail
            self._written_at.setdefault(token, time.monotonic())
        if is_first:
            self._wake()

    async def flush(self, token: str) -> None:
        """Store the lines of an attempt that has ended; wait at most `FLUSH_SECONDS`."""
        with self._lock:
            self._written_at.pop(token, None)
            if token not in self._changed and token not in self._writing:
                return
            stored = self._flushed[token] = asyncio.get_running_loop().create_future()
        self._wake()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stored, FLUSH_SECONDS)

    async def run(self, queue: JobQueue) -> None:
        """Store lines until cancelled. `queue` is open on this loop."""
        self._loop, self._alarm = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._due_in()):
                    await self._alarm.wait()
            self._alarm.clear()
            due = self._take()
            for start in range(0, len(due), STORED_AT_ONCE):
                await self._store(queue, due[start : start + STORED_AT_ONCE])

    def _due_in(self) -> float | None:
        """Return the seconds until lines are due to be stored; None if there are none."""
        with self._lock:
            if not self._changed:
                return None
            now = time.monotonic()
            return max(0.0, min(map(self._due_at, self._changed)) - now)

    def _due_at(self, token: str) -> float:
        if token in self._flushed or token not in self._written_at:
            return float("-inf")
        return self._written_at[token] + STORE_SECONDS

    def _take(self) -> list[tuple[str, Tail]]:
        """Return what is due, and note that it is being written."""
        with self._lock:
            now = time.monotonic()
            due = [each for each in self._changed.items() if self._due_at(each[0]) <= now]
            for token, _ in due:
                del self._changed[token]
                self._writing.add(token)
                if token in self._written_at:
                    self._written_at[token] = now
        return due

    async def _store(self, queue: JobQueue, tails: Iterable[tuple[str, Tail]]) -> None:
        stored = False
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await queue.store_logs([(token, tail.text()) for token, tail in tails])
            stored = True
        except Exception as error:
            log.warning("worker.logs_not_stored", reason=reason_of(error))
        with self._lock:
            for token, tail in tails:
                self._writing.discard(token)
                if token in self._changed:
                    continue  # It is written again, and then has been flushed.
                if not stored and token in self._written_at:
                    self._changed[token] = tail
                elif (flushed := self._flushed.pop(token, None)) is not None:
                    with contextlib.suppress(RuntimeError):  # The worker's loop is closed.
                        flushed.get_loop().call_soon_threadsafe(_settle, flushed)

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # The thread is ending.
                loop.call_soon_threadsafe(self._alarm.set)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
