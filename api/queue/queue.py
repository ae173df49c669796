"""`JobQueue`, the interface of the queue. GraphQL, REST, the CLI, the worker and programs call it.

Its operations are in `enqueueing.py`, `reading.py`, `leasing.py`, `changing.py` and `upkeep.py`.
"""

from __future__ import annotations

import asyncio
import math
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from uuid_utils.compat import uuid7

from job_registry import JobRegistry, JobType
from job_registry.discovery import load_registry
from job_registry_api import defaults
from job_registry_api.logs import use_standard_logging
from job_registry_api.metrics import Metrics
from job_registry_api.queue.changing import Changing
from job_registry_api.queue.database import Database, Pooler
from job_registry_api.queue.databases import anchored, open_database, store_of
from job_registry_api.queue.enqueueing import Enqueueing
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.events import Events, new_process
from job_registry_api.queue.leasing import Leasing
from job_registry_api.queue.readiness import Readiness
from job_registry_api.queue.reading import Reading
from job_registry_api.queue.sync import SyncQueue
from job_registry_api.queue.upkeep import Upkeep
from job_registry_api.settings import Settings, check_database, load_settings

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing


class JobQueue(Enqueueing, Reading, Leasing, Changing, Upkeep):
    """The queue. A program creates it with `from_url` or `from_settings`, and opens it:

        async with JobQueue.from_url("sqlite:///jobs.db", [mail_send]) as queue:
            await queue.enqueue(MailSend(to="ada@example.com"))

    While it is open it receives events of other processes, which `result`, subscriptions and
    workers need. An open queue belongs to one event loop; `queue.sync` is for code without one. One
    that was closed can be opened again, also on another event loop.

    Each operation is atomic: it completes, or it raises and changes nothing. Every operation can
    raise `QueueUnavailable`, when the database does not answer, and `RuntimeError`, when the queue
    is not open on the running event loop.

    `new_id` creates the ids of new jobs (UUIDv7); tests can pass their own. `metrics` are the
    metrics of the process; pass them when a process opens several queues. With `tracing`, enqueues
    and attempts are traced; None traces nothing.
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
        tracing: Tracing | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.registry = registry
        self.lease_seconds = lease_seconds
        self.max_page_size = max_page_size
        self.max_bulk_size = max_bulk_size
        self._prepare = prepare
        self._opened: AsyncExitStack | None = None
        self._is_spent = False
        """Whether the connections were used by an event loop, and do not serve another one."""
        self.metrics = Metrics(registry) if metrics is None else metrics
        self.on_unavailable: Callable[[QueueUnavailable], None] = lambda error: None
        """Called when the database does not answer an operation, or cannot write."""
        self._new_id = new_id
        self.tracing = tracing
        self._use(database)

    def _use(self, database: Database) -> None:
        """Create what belongs to one event loop: the connections, and the work in progress."""
        self._database = database
        database.on_unavailable = self._notice_unavailable
        self._store = store_of(database, new_process())
        self._store.renamed = self.registry.renamed
        self._readiness = Readiness(self._store)
        self.events = Events(database, self._store, self.metrics, self.registry.renamed)
        Enqueueing.__init__(self)
        Reading.__init__(self)
        Leasing.__init__(self)

    @classmethod
    def from_url(
        cls,
        url: str,
        registry: JobRegistry | Iterable[JobType[Any]],
        *,
        schema: str = defaults.SCHEMA,
        lease_seconds: float = defaults.LEASE_SECONDS,
        pool_size: int = defaults.POOL_SIZE,
        timeout_seconds: float = defaults.TIMEOUT_SECONDS,
        pooler: Pooler = "session",
        listen_url: str | None = None,
        max_page_size: int = defaults.MAX_PAGE_SIZE,
        max_bulk_size: int = defaults.MAX_BULK_SIZE,
        tracing: Tracing | None = None,
        prepare: bool = True,
    ) -> Self:
        """Return the queue on a database: `sqlite:///jobs.db` or `postgresql://USER@HOST/NAME`.

        `registry` is a registry, or the job types for one. With `prepare`, opening the queue
        creates and migrates a SQLite database, and checks that a PostgreSQL database has been
        migrated. With `tracing`, enqueues and attempts are traced. `docs/settings.md` explains the
        other arguments, which have the names of the settings.

        Raises:
            DefinitionError: two job types have the same name, or `registry` is something else.
            ValueError: the URL, or another argument, is wrong.
        """
        check_database(url, pooler=pooler, schema=schema, listen_url=listen_url)
        _need_positive(
            lease_seconds=lease_seconds,
            pool_size=pool_size,
            timeout_seconds=timeout_seconds,
            max_page_size=max_page_size,
            max_bulk_size=max_bulk_size,
        )
        use_standard_logging()
        url = anchored(url)
        database = open_database(
            url,
            pool_size=pool_size,
            timeout_seconds=timeout_seconds,
            pooler=pooler,
            listen_url=listen_url,
            schema=schema,
        )

        def prepare_database() -> None:
            # Imported here: a queue that another process prepares needs none of it.
            from job_registry_api.queue import migrations

            migrations.prepare(url, pooler=pooler, schema=schema, timeout_seconds=timeout_seconds)

        queue = cls(
            registry if isinstance(registry, JobRegistry) else JobRegistry(registry),
            database,
            lease_seconds=lease_seconds,
            max_page_size=max_page_size,
            max_bulk_size=max_bulk_size,
            tracing=tracing,
            prepare=prepare_database if prepare else None,
        )
        queue.must_be_open = True
        return queue

    @classmethod
    def from_settings(
        cls,
        settings: Settings | None = None,
        registry: JobRegistry | Iterable[JobType[Any]] | None = None,
        *,
        tracing: Tracing | None = None,
        prepare: bool = True,
    ) -> Self:
        """Return the queue of the settings: without `settings`, those of the `JOBS_*` variables.

        `registry` defaults to the job types of `JOBS_CATALOG`. `tracing` and `prepare` are those of
        `from_url`.

        Raises:
            SettingsInvalid: a variable is wrong.
            DefinitionError: a module of the catalog, or a job type, is wrong.
        """
        settings = load_settings() if settings is None else settings
        if registry is None:
            registry = load_registry(settings.catalog, max_payload_bytes=settings.max_payload_bytes)
        elif not isinstance(registry, JobRegistry):
            registry = JobRegistry(registry, max_payload_bytes=settings.max_payload_bytes)
        return cls.from_url(
            settings.database_url,
            registry,
            schema=settings.database_schema,
            lease_seconds=settings.lease_seconds,
            pool_size=settings.database_pool_size,
            timeout_seconds=settings.database_timeout_seconds,
            pooler=settings.database_pooler,
            listen_url=settings.database_listen_url,
            max_page_size=settings.max_page_size,
            max_bulk_size=settings.max_bulk_size,
            tracing=tracing,
            prepare=prepare,
        )

    async def __aenter__(self) -> Self:
        """Open the queue. Raises as `open` does."""
        await self.open()
        return self

    async def open(self) -> None:
        """Open the queue, for code that closes it elsewhere than in an `async with`.

        If it raises one of these, it can be called again.

        Raises:
            MigrationRefused: the database does not fit this version, and says what to do.
            QueueUnavailable: the database does not answer, if the queue was created to prepare it.
                The message says why.
        """
        self.check_process()
        if self._opened is not None:
            raise RuntimeError("the queue is open already, or is still being closed")
        if self._is_spent:
            self._use(self._database.for_another_loop())
        self._opened, self._opened_in = AsyncExitStack(), os.getpid()
        try:
            if self._prepare is not None:
                await asyncio.to_thread(self._prepare)
            self._is_spent = True
            async with AsyncExitStack() as opening:
                opening.push_async_callback(self._database.close)
                await opening.enter_async_context(self.events.listening())
                opening.push_async_callback(self._finish)
                self._opened = opening.pop_all()
        except BaseException as error:
            # Nothing is open, and the next call may succeed.
            self._opened = self._opened_in = None
            if isinstance(error, QueueUnavailable):
                raise QueueUnavailable(error.reason, error.kind, when_opening=True) from error
            raise
        self.loop = asyncio.get_running_loop()
        self.was_opened = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the queue: end all waits, and wait for background work to finish."""
        await self.close()

    async def close(self) -> None:
        """Close the queue: end all waits, and wait for background work to finish."""
        self.loop = None
        if self._opened is not None:
            try:
                await self._opened.aclose()
            finally:
                self._opened = self._opened_in = None
        elif not self._is_spent:
            await self._finish()

    async def _finish(self) -> None:
        self.end_waits()
        await self._claiming.close()

    @cached_property
    def sync(self) -> SyncQueue:
        """The same operations for code without an event loop."""
        return SyncQueue(self)

    @asynccontextmanager
    async def in_another_loop(self, *, pool_size: int = 2) -> AsyncIterator[JobQueue]:
        """Open the queue on the same database for another event loop, with its own connections.

        It does not receive events of other processes. Enter it in that loop.
        """
        database = self._database.for_another_loop(pool_size=pool_size)
        try:
            yield JobQueue(
                self.registry,
                database,
                lease_seconds=self.lease_seconds,
                metrics=self.metrics,
                tracing=self.tracing,
            )
        finally:
            await database.close()

    async def connect(self) -> None:
        """Open a connection to the database, so that the next call does not wait for one.

        Raises:
            QueueUnavailable: the database is not available.
        """
        async with self._database.reading():
            pass

    def end_waits(self) -> None:
        """End all waits for leases and all subscriptions, because the process shuts down."""
        self._claiming.end()
        self.events.drop_subscribers("the server shuts down")

    def _notice_unavailable(self, error: QueueUnavailable) -> None:
        self.metrics.database_unavailable()
        self.on_unavailable(error)


def _need_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0; got {value}")
