"""Stores the log lines of handlers with their attempts.

Once a second it stores those of attempts that run, on the loop of the lease keeper, so that no
handler can hold it up. The report of an attempt that ends brings its last lines along.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import Final

import structlog

from job_registry_api.queue.errors import reason_of
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker.job_log import Tail

STORE_SECONDS: Final = 1.0
"""How often the lines of running attempts are stored."""

WRITE_SECONDS: Final = 2.0
"""How long one write may take. Reports of attempts whose lines it stores wait for its end."""

STORED_AT_ONCE: Final = 50
"""The lines of how many attempts are stored in one statement."""

log = structlog.get_logger("job_registry.worker")


class LogWriter:
    """Stores the lines of the attempts of one worker. `add` and `take` are thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: dict[str, Tail] = {}
        """The tails with lines that are not stored, by the token of the lease."""
        self._writing: set[str] = set()
        self._awaited: dict[str, asyncio.Future[None]] = {}

    def add(self, token: str, tail: Tail, line: bytes) -> None:
        """Add a line to the tail of an attempt. It is stored soon, unless it is taken before."""
        tail.add(line)
        with self._lock:
            self._changed[token] = tail

    async def take(self, token: str) -> bytes | None:
        """Return all lines of an attempt if some are not stored, and leave them to the caller.

        Waits for a write in progress, whose older lines would otherwise replace the caller's.
        """
        if not self._changed and not self._writing:
            return None
        written: asyncio.Future[None] | None = None
        with self._lock:
            if token in self._writing:
                written = self._awaited[token] = asyncio.get_running_loop().create_future()
        if written is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(written, 2 * WRITE_SECONDS)
        with self._lock:
            tail = self._changed.pop(token, None)
        return None if tail is None else tail.text()

    async def run(self, queue: JobQueue) -> None:
        """Store lines until cancelled. `queue` is open on this loop."""
        while True:
            await asyncio.sleep(STORE_SECONDS)
            with self._lock:
                changed, self._changed = list(self._changed.items()), {}
                self._writing = {token for token, _ in changed}
            for start in range(0, len(changed), STORED_AT_ONCE):
                await self._store(queue, changed[start : start + STORED_AT_ONCE])

    async def _store(self, queue: JobQueue, tails: Sequence[tuple[str, Tail]]) -> None:
        failed = False
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await queue.store_logs([(token, tail.text()) for token, tail in tails])
        except Exception as error:
            failed = True
            log.warning("worker.logs_not_stored", reason=reason_of(error))
        with self._lock:
            for token, tail in tails:
                self._writing.discard(token)
                awaited = self._awaited.pop(token, None)
                if failed:
                    self._changed.setdefault(token, tail)
                if awaited is not None:
                    with contextlib.suppress(RuntimeError):  # The worker's loop is closed.
                        awaited.get_loop().call_soon_threadsafe(_settle, awaited)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
