"""Stores the log lines of handlers with their attempts.

Once a second it stores those of attempts that run, on the loop of the lease keeper, so that no
handler can hold it up. The report of an attempt that ends brings its last lines along.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Final

import structlog

from job_registry_api.queue.errors import reason_of
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker.job_log import Tail

STORE_SECONDS: Final = 1.0
"""How often the lines of running attempts are stored."""

WRITE_SECONDS: Final = 2.0
"""How long one write may take. Reports of the attempts whose lines it stores wait for its end."""

STORED_AT_ONCE: Final = 50
"""The lines of how many attempts are stored in one statement."""

log = structlog.get_logger("job_registry.worker")


class LogWriter:
    """Stores the lines of the attempts of one worker. `add` and `take` are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: dict[str, Tail] = {}
        """The tails with lines that are not stored, by the token of the lease."""
        self._writing: dict[str, Tail] = {}
        """The tails whose lines are being stored."""
        self._awaited: dict[str, asyncio.Future[None]] = {}
        self._fails = False

    def add(self, token: str, tail: Tail, line: bytes) -> None:
        """Add a line to the tail of an attempt. It is stored soon, unless it is taken before."""
        tail.add(line)
        with self._lock:
            self._changed[token] = tail

    async def take(self, token: str) -> bytes | None:
        """Return all lines of an attempt if some are not stored, and leave them to the caller.

        Waits for a write of its lines, whose older lines would otherwise replace the caller's.
        """
        written: asyncio.Future[None] | None = None
        with self._lock:
            if token in self._writing:
                written = self._awaited[token] = asyncio.get_running_loop().create_future()
            elif token not in self._changed:
                return None  # As for most attempts.
        if written is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(written, WRITE_SECONDS + 0.5)
        with self._lock:
            tail = self._changed.pop(token, None) or self._writing.get(token)
        return None if tail is None else tail.text()

    async def run(self, queue: JobQueue) -> None:
        """Store lines until cancelled. `queue` is open on this loop."""
        while True:
            await asyncio.sleep(STORE_SECONDS)
            with self._lock:
                tokens = list(self._changed)
            for start in range(0, len(tokens), STORED_AT_ONCE):
                with self._lock:
                    # Those of attempts that have ended are taken.
                    self._writing = {
                        token: self._changed.pop(token)
                        for token in tokens[start : start + STORED_AT_ONCE]
                        if token in self._changed
                    }
                if not await self._store(queue):
                    break  # The others would fail as well, each after a while.

    async def _store(self, queue: JobQueue) -> bool:
        """Store the lines in `_writing`. Return whether they are stored."""
        stored = False
        try:
            if self._writing:
                async with asyncio.timeout(WRITE_SECONDS):
                    await queue.store_logs([(k, tail.text()) for k, tail in self._writing.items()])
            stored = True
        except Exception as error:
            if not self._fails:
                log.warning("worker.logs_not_stored", reason=reason_of(error))
        finally:
            self._fails = not stored
            with self._lock:
                written, self._writing = self._writing, {}
                if not stored:
                    self._changed = {**written, **self._changed}
                awaited = [self._awaited.pop(token) for token in written if token in self._awaited]
            for each in awaited:
                with contextlib.suppress(RuntimeError):  # The worker's loop is closed.
                    each.get_loop().call_soon_threadsafe(_settle, each)
        return stored


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
