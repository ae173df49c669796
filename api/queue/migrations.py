"""Brings a database to the tables this version needs, with alembic. Synchronous: used at the edge.

The scripts stand in `alembic/` of a checkout, and in `api/_alembic` of an installed wheel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from api.queue.database import DEFAULT_TIMEOUT_SECONDS, Database, Pooler, unavailable

T = TypeVar("T")

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_INSTALLED: Final = _PACKAGE / "_alembic"
_SCRIPTS: Final = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "alembic"

_LOCK: Final = 0x6A6F6273
"""Advisory lock, "jobs" in ASCII: two `jobs migrate` at once would both create the tables."""


def upgrade(url: str, revision: str = "head", *, pooler: Pooler = "session") -> None:
    """Runs the migrations up to `revision`. Whole or not at all; running it again does nothing.

    Raises:
        QueueUnavailable: the database does not answer, or cannot write.
    """
    # However long it takes: an index of millions of rows is not built within a deadline.
    _with_connection(
        url,
        lambda connection: _migrate(connection, command.upgrade, revision),
        pooler=pooler,
        bounded=False,
    )


def downgrade(url: str, revision: str = "base") -> None:
    """Takes the migrations back down to `revision`. Below the first one the jobs are gone.

    Raises:
        QueueUnavailable: the database does not answer, or cannot write.
    """
    _with_connection(
        url, lambda connection: _migrate(connection, command.downgrade, revision), bounded=False
    )


def current(url: str, *, pooler: Pooler = "session") -> str | None:
    """The revision the database is at; None when no migration has run.

    Raises:
        QueueUnavailable: the database does not answer.
    """
    return _with_connection(url, _revision, pooler=pooler)


def is_current(url: str, *, pooler: Pooler = "session") -> bool:
    """Whether the database has exactly the tables this version needs.

    Raises:
        QueueUnavailable: the database does not answer.
    """
    return current(url, pooler=pooler) == ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def _revision(connection: Connection) -> str | None:
    options = {"version_table": "job_registry_version"}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _migrate(connection: Connection, run: Callable[[Config, str], None], revision: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    config = _config()
    config.attributes["connection"] = connection
    run(config, revision)


def _with_connection(
    url: str, work: Callable[[Connection], T], *, pooler: Pooler = "session", bounded: bool = True
) -> T:
    async def run() -> T:
        timeout_seconds = DEFAULT_TIMEOUT_SECONDS if bounded else None
        database = Database(url, timeout_seconds=timeout_seconds, pooler=pooler, create=True)
        try:
            async with database.transaction() as connection:
                return await connection.run_sync(work)
        finally:
            await database.close()

    with unavailable():
        return asyncio.run(run())
