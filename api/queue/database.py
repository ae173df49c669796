"""Engine, transactions, and the only place that knows SQLite from PostgreSQL.

`Dialect` holds the fragments of SQL in which the two differ; `store.py` puts them into its
statements. Nothing else asks which database it is.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal, cast

import asyncpg
import sqlalchemy.exc
from pydantic import JsonValue
from pydantic_core import from_json
from sqlalchemy import TextClause, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from api.queue.errors import QueueUnavailable

SQLITE_BUSY_SECONDS: Final = 10.0
"""How long a SQLite statement waits for another process's write before it gives up."""

SQLITE_POLL_SECONDS: Final = 0.1
"""How often `listen` asks SQLite whether another process has committed (`PRAGMA data_version`)."""

CHANNEL: Final = "job_registry"
"""The channel of PostgreSQL's LISTEN and NOTIFY."""

Listener = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The words one database has for what both can do. Times are UTC, by the database's clock."""

    name: Literal["sqlite", "postgresql"]
    now: str
    random: str
    """A random number from 0 up to 1."""
    least: str
    token: str
    """32 random hexadecimal digits, from the database's cryptographic source."""
    skip_locked: str
    """Locks the rows it reads and passes over those that another transaction holds."""
    lock_rows: str
    max_message_bytes: int
    """How much a commit can tell other processes; 0: only that there was one."""
    due_of_slot: str
    """Joins each `slot` (type, priority) with its first `:window` due jobs, in index order."""

    def after(self, seconds: str) -> str:
        """The time `seconds` (an SQL expression) from now."""
        if self.name == "sqlite":
            return (
                f"strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {seconds})) || '000'"
            )
        return f"({self.now} + make_interval(secs => CAST({seconds} AS double precision)))"

    def seconds_until(self, time: str) -> str:
        """How many seconds `time` (an SQL expression) is ahead; negative when it has passed."""
        if self.name == "sqlite":
            return f"((julianday({time}) - julianday('now')) * 86400.0)"
        return f"CAST(EXTRACT(EPOCH FROM {time} - {self.now}) AS double precision)"

    def notify(self, message: str) -> str:
        """An expression that tells the listeners in other processes, once this commits."""
        return f"(SELECT pg_notify('{CHANNEL}', {message}))"

    def as_id(self, parameter: str) -> str:
        """An id, bound as `id_text` writes it."""
        return parameter if self.name == "sqlite" else f"CAST({parameter} AS uuid)"

    def json(self, expression: str) -> str:
        """JSON text as a value of a JSON column."""
        return expression if self.name == "sqlite" else f"CAST({expression} AS jsonb)"

    def rows(self, parameter: str, columns: Mapping[str, str]) -> str:
        """A JSON array of objects, bound to `parameter`, as a table with these typed columns.

        One statement then serves one row and a thousand. JSON documents travel in it as text.
        """
        if self.name == "sqlite":
            fields = ", ".join(f"json_extract(value, '$.{name}') AS {name}" for name in columns)
            return f"(SELECT {fields} FROM json_each({parameter}))"
        fields = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        return (
            f"(SELECT * FROM jsonb_to_recordset(CAST({parameter} AS jsonb)) AS each_row({fields}))"
        )

    def time_text(self, time: datetime) -> str:
        """A time as `rows` takes it: the form in which this database stores and compares times."""
        return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f") + (
            "" if self.name == "sqlite" else "+00"
        )

    def time(self, value: Any) -> datetime | None:
        """A time as this database returns it, as an aware datetime in UTC."""
        if value is None or isinstance(value, datetime):
            return value
        return datetime.fromisoformat(value).replace(tzinfo=UTC)

    def json_value(self, value: Any) -> JsonValue:
        """A JSON column as this database returns it. PostgreSQL's driver has parsed it already."""
        # SQLite makes a number of a JSON column's text that is one.
        if self.name == "sqlite" and isinstance(value, str):
            return read_json(value)
        return cast(JsonValue, value)

    def id(self, value: Any) -> uuid.UUID:
        """An id as this database returns it."""
        return value if isinstance(value, uuid.UUID) else uuid.UUID(value)


SQLITE: Final = Dialect(
    name="sqlite",
    # Six digits, because SQLAlchemy reads the fraction as a count of microseconds.
    now="(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')",
    random="(abs(random() % 1000000) / 1000000.0)",
    least="min",
    token="lower(hex(randomblob(16)))",
    # BEGIN IMMEDIATE has the whole database already.
    skip_locked="",
    lock_rows="",
    max_message_bytes=0,
    due_of_slot="""
        slot CROSS JOIN job AS due ON due.id IN (
            SELECT job.id FROM job
            WHERE job.status = 'queued' AND job.type = slot.type AND job.priority = slot.priority
              AND job.next_run_at <= (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')
            ORDER BY job.next_run_at, job.id LIMIT :window
        )""",
)

POSTGRESQL: Final = Dialect(
    name="postgresql",
    # Stable within a statement, so that an index serves it, and fresh in each statement of a
    # transaction that had to wait for a lock: now() would be the time of its BEGIN.
    now="statement_timestamp()",
    random="random()",
    least="least",
    token="replace(CAST(gen_random_uuid() AS text), '-', '')",
    skip_locked="FOR UPDATE SKIP LOCKED",
    lock_rows="FOR UPDATE",
    # A notification is shorter than 8,000 bytes.
    max_message_bytes=7_900,
    due_of_slot="""
        slot CROSS JOIN LATERAL (
            SELECT job.id, job.priority, job.next_run_at FROM job
            WHERE job.status = 'queued' AND job.type = slot.type AND job.priority = slot.priority
              AND job.next_run_at <= statement_timestamp()
            ORDER BY job.next_run_at, job.id LIMIT :window
        ) AS due""",
)


class Database:
    """One database, by its URL: `sqlite:///jobs.db` or `postgresql://user@host/name`.

    Opened lazily; `close` ends its connections. It belongs to the event loop that first uses it.
    """

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self.url: URL = async_url(url)
        sqlite = self.url.get_backend_name() == "sqlite"
        self.dialect: Dialect = SQLITE if sqlite else POSTGRESQL
        if sqlite:
            self.engine: AsyncEngine = create_async_engine(
                self.url,
                pool_size=pool_size,
                connect_args={"timeout": SQLITE_BUSY_SECONDS, "isolation_level": None},
            )
            event.listen(self.engine.sync_engine, "connect", _prepare_sqlite_connection)
        else:
            self.engine = create_async_engine(
                # The URL goes to asyncpg whole: it reads libpq's options, `sslmode` for one.
                self.url.set(query={}),
                async_creator=self._connect_postgresql,
                pool_size=pool_size,
                max_overflow=0,
                pool_timeout=10,
                json_deserializer=read_json,
            )
        self.on_unavailable: Callable[[], None] = lambda: None
        """Called whenever an operation raises `QueueUnavailable`."""
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._thread = _SQLiteThread(self.url.database or "") if sqlite else None
        # SQLite has one writer at a time. Waiting for it here, in order, is fair; waiting in
        # SQLite's busy handler is not, so that is left to other processes' writes.
        self._writer = asyncio.Lock() if sqlite else None

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes; committed at the end, rolled back on an exception.

        READ COMMITTED on PostgreSQL. BEGIN IMMEDIATE on SQLite, where it excludes every other
        writer from its first statement on.

        Raises:
            QueueUnavailable: the database does not answer, or cannot write (a full disk).
        """
        with self._unavailable():
            if self._writer is None:
                async with self.engine.begin() as connection:
                    yield connection
            else:
                async with self._writer, self._autocommit.connect() as connection:
                    # On the driver itself: each call on it is one trip to SQLite's thread, where
                    # SQLAlchemy's cursor takes three.
                    driver = (await connection.get_raw_connection()).driver_connection
                    assert driver is not None
                    await driver.execute("BEGIN IMMEDIATE")
                    try:
                        yield connection
                        await driver.commit()
                    except BaseException:
                        with suppress(sqlite3.Error):
                            await driver.rollback()
                        raise

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection on which each statement is its own transaction.

        Raises:
            QueueUnavailable: the database does not answer.
        """
        with self._unavailable():
            async with self._autocommit.connect() as connection:
                yield connection

    async def commit_at_once(
        self, statements: Sequence[str], parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        """Runs statements as one transaction in one trip, and gives the rows of the first.

        A trip is what a small transaction costs: to PostgreSQL, which takes a single statement
        in it, and to the thread in which SQLite may wait for the disk.

        Raises:
            QueueUnavailable: the database does not answer, or cannot write (a full disk).
        """
        with self._unavailable():
            if self._thread is not None and self._writer is not None:
                async with self._writer:
                    return await self._thread.commit(statements, parameters)
            (single,) = statements
            async with self._autocommit.connect() as connection:
                return (await connection.execute(statement(single), parameters)).all()

    async def notify(self, connection: AsyncConnection, message: str) -> None:
        """Tells the listeners in other processes, once this transaction commits.

        `message` is at most `dialect.max_message_bytes` long. On SQLite it is not carried: the
        commit itself tells that there is something to read.
        """
        if self.dialect.max_message_bytes:
            await connection.execute(_NOTIFY, {"message": message})

    async def listen(self, on_message: Listener, on_gap: Callable[[], None]) -> None:
        """Calls `on_message` with what other connections' transactions told, until cancelled.

        `on_gap` is called where messages may have been missed: at the start, after a lost
        connection, and on SQLite, which says only that something was committed, every time.
        """
        if self.dialect.name == "postgresql":
            await self._listen_postgresql(on_message, on_gap)
        else:
            await self._listen_sqlite(on_gap)

    async def _listen_postgresql(self, on_message: Listener, on_gap: Callable[[], None]) -> None:
        pause = 0.1
        while True:
            lost = asyncio.Event()
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection = await self._connect_postgresql()
                try:
                    connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    await connection.add_listener(
                        CHANNEL, lambda _c, _pid, _channel, message: on_message(message)
                    )
                    pause = 0.1
                    on_gap()
                    await lost.wait()
                finally:
                    with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                        await connection.close(timeout=1)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)

    async def _listen_sqlite(self, on_gap: Callable[[], None]) -> None:
        on_gap()
        last = None
        while True:
            try:
                # On the event loop on purpose: the pragma reads a counter in shared memory, in
                # some microseconds, where a thread's round trip would take a hundred.
                with closing(sqlite3.connect(self.url.database or "")) as connection:
                    while True:
                        version = connection.execute("PRAGMA data_version").fetchone()
                        if version != last:
                            last = version
                            on_gap()
                        await asyncio.sleep(SQLITE_POLL_SECONDS)
            except sqlite3.Error:
                await asyncio.sleep(1.0)

    async def _connect_postgresql(self) -> asyncpg.Connection[asyncpg.Record]:
        dsn = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        return await asyncpg.connect(dsn, timeout=10)

    @contextmanager
    def _unavailable(self) -> Iterator[None]:
        try:
            with unavailable():
                yield
        except QueueUnavailable:
            self.on_unavailable()
            raise

    async def close(self) -> None:
        """Ends every connection."""
        await self.engine.dispose()
        if self._thread is not None:
            await self._thread.close()


class _SQLiteThread:
    """A connection of its own and the thread that uses it, for whole transactions at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sqlite-commit")
        self._connection: sqlite3.Connection | None = None

    async def commit(
        self, statements: Sequence[str], parameters: Mapping[str, Any]
    ) -> Sequence[Any]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._commit, statements, parameters)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown()

    def _commit(self, statements: Sequence[str], parameters: Mapping[str, Any]) -> Sequence[Any]:
        if self._connection is None:
            connection = sqlite3.connect(
                self._path, timeout=SQLITE_BUSY_SECONDS, isolation_level=None
            )
            _prepare_sqlite_connection(connection, None)
            self._connection = connection
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            rows = [connection.execute(each, parameters).fetchall() for each in statements]
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        return rows[0]

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()


_NOTIFY: Final = text("SELECT " + POSTGRESQL.notify(":message"))


def async_url(url: str) -> URL:
    """The URL with the async driver this project uses, from any common spelling of it."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    return parsed.set(drivername=driver[parsed.get_backend_name()])


def read_json(value: str) -> JsonValue:
    """JSON text of a column, as the caller sent it.

    PostgreSQL's JSONB writes 1e300 out as a 1 with 300 zeros. Integers past 64 bits never come
    in (the registry refuses them), so one that comes out was such a float, and is one again.
    """
    parsed: JsonValue = from_json(value)
    return _floats(parsed) if _LONG_INTEGER.search(value) else parsed


def _floats(value: JsonValue) -> JsonValue:
    match value:
        case bool():
            return value
        case int():
            return value if -(2**63) <= value < 2**63 else float(value)
        case list():
            return [_floats(item) for item in value]
        case dict():
            return {key: _floats(item) for key, item in value.items()}
    return value


_LONG_INTEGER: Final = re.compile(r"\d{19}")


@lru_cache(maxsize=512)
def statement(template: str) -> TextClause:
    """The statement of a text, parsed once."""
    return text(template)


@contextmanager
def unavailable() -> Iterator[None]:
    """Turns what a database says when it is away, full or busy into `QueueUnavailable`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise QueueUnavailable(str(error)) from error
    except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError) as error:
        raise QueueUnavailable(str(error.orig)) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        # Only while connecting: what a statement meets comes wrapped, below.
        raise QueueUnavailable(str(error)) from error
    except (sqlalchemy.exc.TimeoutError, ConnectionError, TimeoutError) as error:
        raise QueueUnavailable(str(error) or type(error).__name__) from error
    except sqlalchemy.exc.DBAPIError as error:
        if error.connection_invalidated or _is_outage(error.orig):
            raise QueueUnavailable(str(error.orig)) from error
        raise
    except OSError as error:
        raise QueueUnavailable(str(error)) from error


def _is_outage(error: BaseException | None) -> bool:
    """Whether this is the database's trouble, by SQLSTATE class, not the statement's.

    08 connection, 25006 read-only (a standby after failover), 28 and 3D no such role or database,
    53 resources (53100: disk full), 57P0x shutdown, 58 system error:
    https://www.postgresql.org/docs/current/errcodes-appendix.html
    """
    if isinstance(error, sqlite3.OperationalError):
        return True
    state = getattr(error, "sqlstate", None) or ""
    return state.startswith(("08", "28", "3D", "53", "57P", "58")) or state == "25006"


def _prepare_sqlite_connection(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # FULL: a commit that was answered has reached the disk, see "An enqueue that was answered".
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
