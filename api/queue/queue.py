"""`JobQueue`, the interface of the queue, which GraphQL, REST, the CLI and the worker call.

Its operations are in `enqueueing.py`, `reading.py`, `leasing.py`, `changing.py` and `upkeep.py`.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from uuid_utils.compat import uuid7

from job_registry import JobRegistry
from job_registry_api.metrics import Metrics
from job_registry_api.queue import defaults
from job_registry_api.queue.changing import Changing
from job_registry_api.queue.database import Database, Pooler
from job_registry_api.queue.databases import open_database, store_of
from job_registry_api.queue.enqueueing import Enqueueing
from job_registry_api.queue.events import Events
from job_registry_api.queue.leasing import Leasing
from job_registry_api.queue.readiness import Readiness
from job_registry_api.queue.reading import Reading
from job_registry_api.queue.upkeep import Upkeep


class JobQueue(Enqueueing, Reading, Leasing, Changing, Upkeep):
    """The operations of the queue. Each is atomic: it completes, or it raises and changes nothing.

    Every operation can raise `QueueUnavailable`, when the database does not answer. `new_id`
    creates the ids of new jobs (UUIDv7); tests can pass their own. `metrics` are the metrics of
    the process; pass them when a process opens several queues.
    """

    def __init__(
        self,
        registry: JobRegistry,
        database: Database,
        *,
        lease_seconds: float = defaults.LEASE_SECONDS,
        max_page_size: int = defaults.MAX_PAGE_SIZE,
        max_bulk_size: int = defaults.MAX_BULK_SIZE,
        new_id: Callable[[], uuid.UUID] = uuid7,
        metrics: Metrics | None = None,
    ) -> None:
        self.registry = registry
        self.lease_seconds = lease_seconds
        self._max_page_size = max_page_size
        self._max_bulk_size = max_bulk_size
        self._database = database
        process = secrets.token_hex(8)
        self._store = store_of(database, process)
        self._readiness = Readiness(self._store)
        self.metrics = Metrics(registry) if metrics is None else metrics
        database.on_unavailable = self.metrics.database_unavailable
        self.events = Events(database, self._store, process, self.metrics)
        self._new_id = new_id
        Enqueueing.__init__(self)
        Leasing.__init__(self)

    @asynccontextmanager
    async def in_another_loop(self, *, pool_size: int = 2) -> AsyncIterator[JobQueue]:
        """Open the queue on the same database for another event loop, with its own connections.

        It does not receive events of other processes. Enter it in that loop.
        """
        database = self._database.for_another_loop(pool_size=pool_size)
        try:
            yield JobQueue(
                self.registry, database, lease_seconds=self.lease_seconds, metrics=self.metrics
            )
        finally:
            await database.close()

    def end_waits(self) -> None:
        """End all waits for leases and all subscriptions, because the process shuts down."""
        self._claiming.end()
        self.events.drop_subscribers("the server shuts down")

    async def close(self) -> None:
        """End all waits, and wait for background work to finish."""
        self.end_waits()
        await self._claiming.close()


@asynccontextmanager
async def open_queue(
    registry: JobRegistry,
    database_url: str,
    *,
    lease_seconds: float,
    pool_size: int = defaults.POOL_SIZE,
    timeout_seconds: float = defaults.TIMEOUT_SECONDS,
    pooler: Pooler = "session",
    listen_url: str | None = None,
    schema: str = defaults.SCHEMA,
    max_page_size: int = defaults.MAX_PAGE_SIZE,
    max_bulk_size: int = defaults.MAX_BULK_SIZE,
) -> AsyncIterator[JobQueue]:
    """Open the queue on this database. It receives events of other processes while it is open."""
    database = open_database(
        database_url,
        pool_size=pool_size,
        timeout_seconds=timeout_seconds,
        pooler=pooler,
        listen_url=listen_url,
        schema=schema,
    )
    queue = JobQueue(
        registry,
        database,
        lease_seconds=lease_seconds,
        max_page_size=max_page_size,
        max_bulk_size=max_bulk_size,
    )
    try:
        async with queue.events.listening():
            yield queue
            await queue.close()
    finally:
        await database.close()
