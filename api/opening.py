"""Opens the queue of the settings, for the application and the commands."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from job_registry import JobRegistry
from job_registry_api.queue import queue
from job_registry_api.settings import Settings


def open_queue(
    settings: Settings, registry: JobRegistry
) -> AbstractAsyncContextManager[queue.JobQueue]:
    """Open the queue on the database of the settings, with every setting of the queue."""
    return queue.open_queue(
        registry,
        settings.database_url,
        lease_seconds=settings.lease_seconds,
        pool_size=settings.database_pool_size,
        timeout_seconds=settings.database_timeout_seconds,
        pooler=settings.database_pooler,
        listen_url=settings.database_listen_url,
        schema=settings.database_schema,
        max_page_size=settings.max_page_size,
        max_bulk_size=settings.max_bulk_size,
    )
