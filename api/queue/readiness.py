"""Checks whether the queue can store a job, with a write that is rolled back."""

from __future__ import annotations

import asyncio
from typing import Final

from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.store import Store

READY_SECONDS: Final = 2.0
"""How long the write may take. Probes time out after a few seconds."""


class Readiness:
    """Checks whether a write would succeed. Concurrent callers share one check."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turn = asyncio.Lock()
        self._tried_at: float | None = None
        self._refusal: QueueUnavailable | None = None

    async def check(self) -> None:
        """Check that a job can be stored.

        Raises:
            QueueUnavailable: it cannot be stored; the reason is for the log.
        """
        clock = asyncio.get_running_loop().time
        called_at = clock()
        async with self._turn:
            # A check that began after this call serves this call too.
            if self._tried_at is None or self._tried_at < called_at:
                self._refusal = None
                tried_at = clock()
                try:
                    await self._store.check_writes(timeout_seconds=READY_SECONDS)
                except QueueUnavailable as refusal:
                    self._refusal = refusal
                self._tried_at = tried_at
            if self._refusal is not None:
                raise QueueUnavailable(self._refusal.reason, self._refusal.kind)
