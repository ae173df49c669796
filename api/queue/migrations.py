"""Migrates a database to the schema that this version needs, with alembic. Synchronous.

The scripts are in `alembic/` of a checkout, and in `api/_alembic` of an installed wheel. Alembic is
imported only to run them: a start of a database that fits needs none of it.

A script that only adds to the schema sets `additive = True`. Every migration records the revision
and the oldest revision whose code can use the result (`compatible_from`). With it a process decides
whether it can use a database that a newer version has migrated.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

import asyncpg
import sqlalchemy.exc
import structlog
from sqlalchemy import Connection, inspect, text

from job_registry_api import defaults
from job_registry_api.queue.database import Database, Pooler, quoted
from job_registry_api.queue.databases import file_of, open_database
from job_registry_api.queue.driver_errors import Transient, unavailable
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.models import METADATA

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

T = TypeVar("T")

VERSION_TABLE: Final = "job_registry_version"
"""Not alembic's default name, which migrations of the application may use."""

QUEUE_TABLES: Final = frozenset({*METADATA.tables, VERSION_TABLE})
"""The names of the queue's tables, which migrations of the application leave alone."""

WITHOUT_SCHEMA: Final = "0001"
"""The revision of the release that created its tables in the schema of the search path."""

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_INSTALLED: Final = _PACKAGE / "_alembic"
_SCRIPTS: Final = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "alembic"

BUILDING_PAUSE_SECONDS: Final = 0.2
"""How long a process waits before it looks again at indexes that another one builds."""

MAX_BUILD_CONFLICTS: Final = 20

log = structlog.get_logger("job_registry.migrations")

INSUFFICIENT_PRIVILEGE: Final = "42501"
LOCK_NOT_AVAILABLE: Final = "55P03"

LOCK_SECONDS: Final = 0.5
"""How much longer than `deadlock_timeout`, a second by default, a migration on PostgreSQL waits for
a table that others use. Whoever comes after it waits too, also to read. After that timeout,
PostgreSQL ends an autovacuum that it waits for, which may take hours by itself."""

LOCK_REST_SECONDS: Final = 3.0
"""How long others may use the tables before it tries again."""

WAIT_LOG_SECONDS: Final = 5.0
"""How long a migration waits for others before the log says so."""


class MigrationRefused(Exception):
    """Raised when a migration cannot run. Its message is for the operator."""


class Verdict(StrEnum):
    """How a database fits this version."""

    CURRENT = "current"
    COMPATIBLE = "compatible"
    """A newer version has migrated the database, and has only added to the schema."""
    EMPTY = "empty"
    OUTDATED = "outdated"
    TOO_NEW = "too_new"


@dataclass(frozen=True, slots=True)
class Fit:
    """The revision of a database, the one that this version needs, and whether they fit.

    `compatible_from` is the oldest revision whose code can use the database, as recorded in it.
    """

    verdict: Verdict
    revision: str | None
    needed: str
    compatible_from: str | None = None

    @property
    def fits(self) -> bool:
        """Whether this version can use the database as it is."""
        return self.verdict in (Verdict.CURRENT, Verdict.COMPATIBLE)

    @property
    def sentence(self) -> str:
        """The verdict as a sentence, with the action to take."""
        match self.verdict:
            case Verdict.CURRENT:
                return f"The database schema is up to date, at revision {self.revision}."
            case Verdict.COMPATIBLE:
                return (
                    f"The database schema is at revision {self.revision}, newer than this version's"
                    f" {self.needed} and compatible with it."
                )
            case Verdict.EMPTY:
                return "The database has no Job Registry tables yet. Run `job-registry migrate`."
            case Verdict.OUTDATED:
                return (
                    f"The database schema is out of date: it is at revision {self.revision}, and"
                    f" this version needs {self.needed}. Run `job-registry migrate`."
                )
        return (
            f"The database schema is at revision {self.revision}, which this version (revision"
            f" {self.needed}) cannot use. Upgrade Job Registry on this machine."
        )


class Step(NamedTuple):
    """A migration that ran."""

    revision: str
    title: str


@dataclass(frozen=True, slots=True)
class Migrated:
    """The result of a migration. Without `steps` nothing has changed."""

    before: str | None
    after: str | None
    steps: tuple[Step, ...] = ()


def upgrade(
    url: str,
    revision: str = "head",
    *,
    pooler: Pooler = "session",
    schema: str = defaults.SCHEMA,
) -> Migrated:
    """Run the migrations up to `revision`, in one transaction. Safe to run again.

    Afterwards, indexes that would lock a large table for long are built without a lock.

    On PostgreSQL the schema is created if it does not exist, and tables of the release without a
    schema are moved to it. A compatible database that a newer version has migrated is not changed.
    While others use a table that a migration changes, such as a dump, it waits in turns with them.

    Raises:
        MigrationRefused: the database is too new or cannot store every character, the schema has a
            table of the same name that is not Job Registry's, or the role may not create tables.
        QueueUnavailable: the database does not answer, or cannot write.
    """

    def run(connection: Connection, schema: str | None) -> Migrated:
        with _refusals():
            _enter(connection, schema)
        fit = _examine(connection, schema)
        if fit.verdict is Verdict.TOO_NEW:
            raise MigrationRefused(fit.sentence)
        if fit.verdict is Verdict.COMPATIBLE:
            return Migrated(fit.revision, fit.revision)
        if fit.verdict is Verdict.EMPTY:
            _refuse_encoding(connection, schema)
            _refuse_collisions(connection, schema)
        return _migrate(connection, "upgrade", revision, schema)

    # Without a deadline: building an index of millions of rows takes long.
    def opened() -> Database:
        return open_database(url, timeout_seconds=None, pooler=pooler, schema=schema, create=True)

    migrated = _in_transaction(opened, run)
    if migrated.after == _revisions()[-1]:
        _build_indexes(opened())
    return migrated


def prepare(
    url: str,
    *,
    pooler: Pooler = "session",
    timeout_seconds: float = defaults.TIMEOUT_SECONDS,
    schema: str = defaults.SCHEMA,
    only_check: bool = False,
) -> None:
    """Check that the database fits this version, after migrating it if it is SQLite.

    With `only_check`, SQLite is not migrated either.

    Raises:
        MigrationRefused: it does not fit, or as in `upgrade`.
        QueueUnavailable: the database does not answer, or cannot write.
    """

    def fit_now() -> Fit:
        return examine(url, pooler=pooler, timeout_seconds=timeout_seconds, schema=schema)

    if open_database(url).migrates_at_start and not only_check:
        # A database that fits is not locked: the caller may be in a transaction of its own.
        if fit_now().fits:
            return
        upgrade(url)
    fit = fit_now()
    if not fit.fits:
        file = file_of(url)
        where = "" if file is None else f" Its file is {file.absolute()}."
        raise MigrationRefused(fit.sentence + where)


def downgrade(url: str, revision: str = "base", *, schema: str = defaults.SCHEMA) -> Migrated:
    """Undo the migrations down to `revision`. Undoing the first one deletes all jobs.

    It waits for tables that others use as `upgrade` does.

    Raises:
        QueueUnavailable: the database does not answer, or cannot write.
    """

    def run(connection: Connection, schema: str | None) -> Migrated:
        _enter(connection, schema)
        return _migrate(connection, "downgrade", revision, schema)

    return _in_transaction(lambda: open_database(url, timeout_seconds=None, schema=schema), run)


def examine(
    url: str,
    *,
    pooler: Pooler = "session",
    timeout_seconds: float = defaults.TIMEOUT_SECONDS,
    schema: str = defaults.SCHEMA,
    read_only: bool = False,
) -> Fit:
    """Return whether the database fits this version. Changes nothing.

    `read_only` opens it so that nothing can be written.

    Raises:
        QueueUnavailable: the database does not answer.
    """
    database = open_database(
        url, timeout_seconds=timeout_seconds, pooler=pooler, schema=schema, read_only=read_only
    )
    try:
        return _reading(database, _examine)
    except QueueUnavailable as error:
        if error.kind != "file_missing":
            raise
        return Fit(Verdict.EMPTY, None, _revisions()[-1])


def grants(
    url: str, role: str, *, pooler: Pooler = "session", schema: str = defaults.SCHEMA
) -> list[str]:
    """Return the SQL that grants `role` what `serve` and `worker` need on PostgreSQL.

    Changes nothing. On SQLite, which has no roles, the list is empty.

    Raises:
        MigrationRefused: the database has no tables of this version to grant.
        QueueUnavailable: the database does not answer.
    """

    def find(connection: Connection, schema: str | None) -> list[str]:
        fit = _examine(connection, schema)
        if not fit.fits:
            raise MigrationRefused(fit.sentence)
        names = {"tables": [*METADATA.tables], "version_table": VERSION_TABLE}
        found = connection.execute(_GRANTS, {"role": role, "schema": schema, **names})
        return list(found.scalars())

    database = open_database(url, pooler=pooler, schema=schema)
    return _reading(database, find) if database.schema is not None else []


def _examine(connection: Connection, schema: str | None) -> Fit:
    known = _revisions()
    needed = known[-1]
    revision, compatible_from = _recorded(connection, schema)
    if revision is None and schema is not None:
        earlier = _earlier_schema(connection)
        if earlier is not None:
            revision, compatible_from = _recorded(connection, earlier)
    if revision is None:
        return Fit(Verdict.EMPTY, None, needed)
    if revision == needed:
        verdict = Verdict.CURRENT
    elif revision in known:
        verdict = Verdict.OUTDATED
    else:
        verdict = Verdict.COMPATIBLE if compatible_from in known else Verdict.TOO_NEW
    return Fit(verdict, revision, needed, compatible_from)


def _recorded(connection: Connection, schema: str | None) -> tuple[str | None, str | None]:
    """Return the revision of the database, and the oldest revision whose code can use it."""
    columns = _version_columns(connection, schema)
    if "version_num" not in columns:
        return None, None
    compatible_from = "compatible_from" if "compatible_from" in columns else "NULL"
    table = VERSION_TABLE if schema is None else f"{quoted(schema)}.{VERSION_TABLE}"
    query = f"SELECT version_num, {compatible_from} FROM {table}"
    try:
        row = connection.exec_driver_sql(query).first()
    except sqlalchemy.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != INSUFFICIENT_PRIVILEGE:
            raise
        raise MigrationRefused(
            f"The database role may not read the table {VERSION_TABLE}. Grant it what"
            " `job-registry migrate --grants ROLE` prints."
        ) from error
    return (None, None) if row is None else (row[0], row[1])


def _version_columns(connection: Connection, schema: str | None) -> set[str]:
    inspector = inspect(connection)
    if not inspector.has_table(VERSION_TABLE, schema=schema):
        return set()
    return {column["name"] for column in inspector.get_columns(VERSION_TABLE, schema=schema)}


def _earlier_schema(connection: Connection) -> str | None:
    """Return the schema in which the release without a schema created its tables.

    Tables of a later revision belong to another deployment in a schema of its own.
    """
    found = connection.execute(_SCHEMA_OF_VERSION_TABLE, {"table": VERSION_TABLE}).scalar()
    if found is None or _recorded(connection, str(found))[0] != WITHOUT_SCHEMA:
        return None
    return str(found)


def _enter(connection: Connection, schema: str | None) -> None:
    """Create the schema, move tables of an earlier release there, and select it.

    `schema` is None on SQLite, which has no schemas.
    """
    if schema is None:
        return
    earlier, home = _earlier_schema(connection), quoted(schema)
    # Not CREATE SCHEMA IF NOT EXISTS: a role that may not create schemas may use one that exists.
    if connection.execute(text("SELECT to_regnamespace(:name)"), {"name": home}).scalar() is None:
        connection.exec_driver_sql(f"CREATE SCHEMA {home}")
    if earlier not in (None, schema) and not _version_columns(connection, schema):
        there = inspect(connection).get_table_names(schema=earlier)
        for table in {*METADATA.tables, VERSION_TABLE} & {*there}:
            connection.exec_driver_sql(f"ALTER TABLE {quoted(earlier)}.{table} SET SCHEMA {home}")
        for function in ("job_count_inserted", "job_count_updated", "job_count_deleted"):
            connection.exec_driver_sql(
                f"ALTER FUNCTION {quoted(earlier)}.{function}() SET SCHEMA {home}"
            )
    # Until the transaction ends. Temporary tables come last, so that none hides a table of ours.
    connection.exec_driver_sql(f"SET LOCAL search_path TO {home}, pg_temp")


@dataclass(slots=True)
class _Recorder:
    """Records each step. Alembic calls it after the step, in its transaction."""

    scripts: ScriptDirectory
    schema: str | None
    steps: list[Step] = field(default_factory=list)

    def __call__(self, *, ctx: Any, step: Any, **_others: Any) -> None:
        script = self.scripts.get_revision(step.up_revision_id)
        self.steps.append(Step(script.revision, (script.doc or "").rstrip(".")))
        destination = step.destination_revision_ids
        if destination:
            compatible_from = self._compatible_from(destination[0])
            _record_compatibility(ctx.connection, self.schema, compatible_from)

    def _compatible_from(self, revision: str) -> str:
        script = self.scripts.get_revision(revision)
        while getattr(script.module, "additive", False) and isinstance(script.down_revision, str):
            script = self.scripts.get_revision(script.down_revision)
        return script.revision


def _record_compatibility(connection: Connection, schema: str | None, revision: str) -> None:
    # In alembic's table, which has one row. Alembic updates only its column `version_num`.
    if "compatible_from" not in _version_columns(connection, schema):
        connection.exec_driver_sql(f"ALTER TABLE {VERSION_TABLE} ADD COLUMN compatible_from TEXT")
    connection.execute(
        text(f"UPDATE {VERSION_TABLE} SET compatible_from = :revision"), {"revision": revision}
    )


def _migrate(
    connection: Connection,
    direction: Literal["upgrade", "downgrade"],
    revision: str,
    schema: str | None,
) -> Migrated:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    recorder = _Recorder(ScriptDirectory.from_config(config), schema)
    config.attributes["connection"] = connection
    config.attributes["version_table"] = VERSION_TABLE
    config.attributes["on_version_apply"] = recorder
    before, _ = _recorded(connection, schema)
    run = command.upgrade if direction == "upgrade" else command.downgrade
    with _refusals():
        run(config, revision)
    after, _ = _recorded(connection, schema)
    return Migrated(before, after, tuple(recorder.steps))


def _build_indexes(database: Database) -> None:
    """Build the `concurrent_indexes` of all scripts that PostgreSQL does not have yet.

    `CREATE INDEX` locks out every write until it ends. `CONCURRENTLY` does not, and cannot be part
    of a transaction. An index whose build was interrupted is marked invalid, and is built again.
    """
    if database.schema is None:
        return
    from alembic.script import ScriptDirectory

    home = quoted(database.schema)
    wanted: dict[str, str] = {}
    for script in ScriptDirectory(str(_SCRIPTS)).walk_revisions():
        wanted |= getattr(script.module, "concurrent_indexes", {})

    async def build_next() -> bool:
        """Build one index, or wait for another process that builds one. False: all are there."""
        async with database.reading() as connection:
            found = await connection.execute(_INDEXES, {"schema": database.schema})
            state = {row.name: row for row in found}
        missing = [n for n in sorted(wanted) if n not in state or not state[n].is_valid]
        if not missing:
            return False
        if any(name in state and state[name].is_being_built for name in missing):
            await asyncio.sleep(BUILDING_PAUSE_SECONDS)
            return True
        name = missing[0]
        with _saying_later(_INDEX_TAKES_LONG, index=name):
            await database.execute_alone(f"DROP INDEX CONCURRENTLY IF EXISTS {home}.{name}")
            await database.execute_alone(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {home}.{wanted[name]}"
            )
        return True

    async def run() -> None:
        conflicts, goes_on = 0, True
        while goes_on:
            try:
                goes_on = await build_next()
            except Transient:
                conflicts += 1
                if conflicts > MAX_BUILD_CONFLICTS:
                    raise
                # Two processes that begin at the same moment wait for each other, and PostgreSQL
                # ends one of them. What it leaves behind is not valid, and is built again.
                await asyncio.sleep(BUILDING_PAUSE_SECONDS * (1 + random.random()))

    with _refusals():
        _run(database, run)


def _refuse_encoding(connection: Connection, schema: str | None) -> None:
    """Refuse a PostgreSQL database that could not store the payloads and results of all jobs."""
    if schema is None:
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding not in _ENCODINGS:
        raise MigrationRefused(
            f"The encoding of the database is {encoding}, which lacks characters that payloads and"
            " results may have. Create a database for Job Registry: CREATE DATABASE jobs ENCODING"
            " 'UTF8' LOCALE 'C.UTF-8' TEMPLATE template0."
        )


_ENCODINGS: Final = frozenset({"UTF8", "SQL_ASCII"})
"""SQL_ASCII stores bytes as they are."""


def _refuse_collisions(connection: Connection, schema: str | None) -> None:
    inspector = inspect(connection)
    there = {*inspector.get_table_names(schema=schema), *inspector.get_view_names(schema=schema)}
    taken = sorted(there & METADATA.tables.keys())
    if taken:
        elsewhere = "another database" if schema is None else "another JOBS_DATABASE_SCHEMA"
        raise MigrationRefused(
            f"The database already has a table named {taken[0]} that is not Job Registry's. Use"
            f" {elsewhere} for Job Registry, or rename that table."
        )


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn errors that an operator can fix into `MigrationRefused`."""
    try:
        yield
    except (sqlalchemy.exc.DBAPIError, asyncpg.PostgresError) as error:
        origin = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        state = getattr(origin, "sqlstate", None) or ""
        words = str(origin)
        reason = words.partition(">: ")[2] or words
        # 42P06, 42P07, 42710, 42723: a schema, table, object or function of this name exists.
        exists = re.search(r" already exists|already (a table|an index) named", reason)
        if state in ("42P06", "42P07", "42710", "42723") or exists:
            raise MigrationRefused(
                f"The database already has an object of the same name that is not Job Registry's:"
                f" {reason}. Use another JOBS_DATABASE_SCHEMA or database for Job Registry, or"
                " rename it."
            ) from error
        if state == INSUFFICIENT_PRIVILEGE:
            raise MigrationRefused(
                f"The database role may not change the schema: {reason}. Run `job-registry migrate`"
                " as the owner of the database, and see `job-registry migrate --grants ROLE`."
            ) from error
        raise


def _revisions() -> list[str]:
    """Return the revisions of the scripts, oldest first. Their files begin with them."""
    return sorted(path.name.partition("_")[0] for path in (_SCRIPTS / "versions").glob("*.py"))


_SCHEMA_OF_VERSION_TABLE: Final = text(
    "SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
    " WHERE pg_class.oid = to_regclass(:table)"
)

_LIMIT_LOCKS: Final = text("""
SELECT set_config('lock_timeout', CAST(CAST(setting AS integer) + :milliseconds AS text), true)
FROM pg_settings WHERE name = 'deadlock_timeout'
""")

_INDEXES: Final = text("""
SELECT pg_class.relname AS name, pg_index.indisvalid AS is_valid,
    EXISTS (SELECT FROM pg_stat_progress_create_index AS building
        WHERE building.index_relid = pg_index.indexrelid) AS is_being_built
FROM pg_index JOIN pg_class ON pg_class.oid = pg_index.indexrelid
JOIN pg_namespace ON pg_namespace.oid = pg_class.relnamespace
WHERE pg_namespace.nspname = CAST(:schema AS text)
""")

_GRANTS: Final = text("""
WITH home AS (
    SELECT oid, nspname FROM pg_namespace WHERE nspname = CAST(:schema AS text)
), ours AS (
    SELECT pg_class.oid FROM pg_class JOIN home ON home.oid = relnamespace
    WHERE relkind IN ('r', 'p') AND relname = ANY(CAST(:tables AS text[]))
)
SELECT statement FROM (
    SELECT 1 AS part, nspname AS name, format('GRANT USAGE ON SCHEMA %I TO %I;',
        nspname, CAST(:role AS text)) AS statement FROM home
    UNION ALL
    SELECT 2, relname, format('GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE %I.%I TO %I;',
        nspname, relname, CAST(:role AS text))
    FROM ours JOIN pg_class USING (oid) CROSS JOIN home
    UNION ALL
    SELECT 3, CAST(:version_table AS text), format('GRANT SELECT ON TABLE %I.%I TO %I;',
        nspname, CAST(:version_table AS text), CAST(:role AS text)) FROM home
    UNION ALL
    SELECT 4, sequence.relname, format('GRANT USAGE, SELECT ON SEQUENCE %I.%I TO %I;',
        nspname, sequence.relname, CAST(:role AS text))
    FROM pg_depend
    JOIN pg_class AS sequence ON sequence.oid = pg_depend.objid AND sequence.relkind = 'S'
    JOIN ours ON ours.oid = pg_depend.refobjid CROSS JOIN home
    WHERE pg_depend.deptype IN ('a', 'i')
    UNION ALL
    SELECT 5, proname, format('GRANT EXECUTE ON FUNCTION %I.%I(%s) TO %I;',
        nspname, proname, pg_get_function_identity_arguments(pg_proc.oid), CAST(:role AS text))
    FROM pg_proc JOIN home ON home.oid = pg_proc.pronamespace
    WHERE proname LIKE 'job\\_%'
) AS statements
ORDER BY part, name, statement
""")
"""Names come from the catalogs, so that objects of later migrations need no change here. `format`
quotes the names."""


class _Locked(Exception):
    """Others have used a table for longer than the transaction may wait. Nothing was changed."""


def _in_transaction(
    opened: Callable[[], Database], work: Callable[[Connection, str | None], T]
) -> T:
    """Run `work` in the only transaction that migrates at this time.

    While others use a table that it changes, it is undone, and tried again after a rest.
    """
    is_waiting = False
    while True:
        try:
            return _try_in_transaction(opened(), work)
        except _Locked:
            if not is_waiting:
                log.warning("migration.waits", reason="other sessions use the tables")
            is_waiting = True
            time.sleep(LOCK_REST_SECONDS)


def _try_in_transaction(database: Database, work: Callable[[Connection, str | None], T]) -> T:
    of_file = database.schema is None
    others = "another process writes to the file" if of_file else "another migration runs"

    async def run() -> T:
        async with AsyncExitStack() as stack:
            with _saying_later(others):
                connection = await stack.enter_async_context(database.transaction())
                await database.lock_migrations(connection)
            if database.schema is not None:
                limit = {"milliseconds": round(LOCK_SECONDS * 1000)}
                await connection.execute(_LIMIT_LOCKS, limit)
            try:
                return await connection.run_sync(work, database.schema)
            except sqlalchemy.exc.DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) == LOCK_NOT_AVAILABLE:
                    raise _Locked from error
                raise

    return _run(database, run)


@contextmanager
def _saying_later(reason: str, **more: str) -> Iterator[None]:
    """Log that the migration waits, once this context has been open for a while."""
    waiting = asyncio.get_running_loop().call_later(
        WAIT_LOG_SECONDS, lambda: log.warning("migration.waits", reason=reason, **more)
    )
    try:
        yield
    finally:
        waiting.cancel()


_INDEX_TAKES_LONG: Final = "transactions that began before have not ended, or the index is large"


def _reading(database: Database, work: Callable[[Connection, str | None], T]) -> T:
    async def run() -> T:
        async with database.reading() as connection:
            return await connection.run_sync(work, database.schema)

    return _run(database, run)


def _run(database: Database, work: Callable[[], Awaitable[T]]) -> T:
    async def run() -> T:
        try:
            return await work()
        finally:
            await database.close()

    with unavailable():
        return asyncio.run(run())
