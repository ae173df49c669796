"""Opens the database of a URL: the only module that chooses between SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from job_registry_api import defaults
from job_registry_api.queue import sqlite_database
from job_registry_api.queue.database import Database, Pooler
from job_registry_api.queue.postgresql import PostgreSQLStore
from job_registry_api.queue.postgresql_database import PostgreSQLDatabase
from job_registry_api.queue.sqlite import SQLiteStore
from job_registry_api.queue.sqlite_database import SQLiteDatabase, path_of
from job_registry_api.queue.store import Store


def open_database(
    url: str,
    *,
    pool_size: int = defaults.POOL_SIZE,
    timeout_seconds: float | None = defaults.TIMEOUT_SECONDS,
    pooler: Pooler = "session",
    listen_url: str | None = None,
    schema: str = defaults.SCHEMA,
    create: bool = False,
    read_only: bool = False,
    ahead: Callable[[], float] | None = None,
) -> Database:
    """Return the database of a URL: `sqlite:///jobs.db` or `postgresql://user@host/name`.

    With `read_only`, nothing can be written.
    `create` and `ahead` apply to SQLite; `pooler`, `listen_url` and `schema` apply to PostgreSQL.
    """
    if url.startswith("sqlite"):
        return SQLiteDatabase(
            url,
            pool_size=pool_size,
            timeout_seconds=timeout_seconds,
            create=create,
            read_only=read_only,
            ahead=ahead,
        )
    return PostgreSQLDatabase(
        url,
        pool_size=pool_size,
        timeout_seconds=timeout_seconds,
        pooler=pooler,
        listen_url=listen_url,
        schema=schema,
        read_only=read_only,
    )


def file_of(url: str) -> Path | None:
    """Return the file of an SQLite database; None for PostgreSQL."""
    return path_of(url) if url.startswith("sqlite") else None


def anchored(url: str) -> str:
    """Return the URL of the same database, whatever the folder of the process will be."""
    return sqlite_database.anchored(url) if url.startswith("sqlite") else url


def store_of(database: Database, process: str) -> Store:
    """Return the operations on this database. `process` names the sender of events."""
    match database:
        case SQLiteDatabase():
            return SQLiteStore(database, process)
        case PostgreSQLDatabase():
            return PostgreSQLStore(database, process)
    raise TypeError(f"There is no store for {type(database).__name__}.")
