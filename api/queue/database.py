"""Connections, transactions and deadlines: the module that handles the two databases' differences.

The statements are in `statements/`; `postgresql.py` and `sqlite.py` run them.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import socket
import sqlite3
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast
from urllib.parse import quote

import asyncpg
import sqlalchemy.exc
import structlog
from pydantic import JsonValue
from pydantic_core import from_json
from sqlalchemy import Row, TextClause, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from job_registry_api import postgresql_url
from job_registry_api.postgresql_url import PostgresqlUrl
from job_registry_api.queue import defaults
from job_registry_api.queue.errors import QueueUnavailable, UnavailableKind

SQLITE_POLL_SECONDS: Final = 0.1
"""How often `listen` checks SQLite for commits of other processes (`PRAGMA data_version`)."""

POLL_SECONDS: Final = 0.5
"""How often `listen` reports a gap where PostgreSQL's notifications cannot reach this process."""

MAX_WAL_BYTES: Final = 4 * 1024 * 1024
"""SQLite truncates its write-ahead log to this size when it restarts the log."""

ATTEMPTS: Final = 5
"""How many times a transaction runs that PostgreSQL aborts because of a deadlock."""

Listener = Callable[[str], None]
Pooler = Literal["session", "transaction"]
LOCKED_PAUSE_SECONDS: Final = 0.02
"""How long to wait before trying a locked row again. The pause doubles up to half a second."""

T = TypeVar("T")

log = structlog.get_logger("jobs.database")


class Database:
    """One database, by its URL: `sqlite:///jobs.db` or `postgresql://user@host/name`.

    It connects lazily; `close` ends its connections. It belongs to the event loop that first uses
    it.

    A call without an answer within `timeout_seconds` raises `QueueUnavailable`, and its connection
    is dropped without waiting for the network. None means no timeout; migrations use it.

    With the `pooler` "transaction" (a mode of PgBouncer), prepared statements and settings do not
    outlive a transaction on PostgreSQL. LISTEN then needs `listen_url`, a direct connection.
    `create` creates a missing SQLite file.

    On PostgreSQL the tables are in `schema`. Every statement names the schema and ignores the
    session's search path. The channel of LISTEN and NOTIFY has the name of the schema.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = defaults.POOL_SIZE,
        timeout_seconds: float | None = defaults.TIMEOUT_SECONDS,
        pooler: Pooler = "session",
        listen_url: str | None = None,
        schema: str = defaults.SCHEMA,
        create: bool = False,
    ) -> None:
        self._opened_with: dict[str, Any] = {
            "url": url,
            "schema": schema,
            "timeout_seconds": timeout_seconds,
            "pooler": pooler,
            "listen_url": listen_url,
        }
        self._timeout = timeout_seconds
        self._pool_size = pool_size
        self._connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._file: _SQLiteFile | None = None
        self._thread: _SQLiteThread | None = None
        if url.startswith("sqlite"):
            self._pooled = False
            self.name: Literal["sqlite", "postgresql"] = "sqlite"
            self.schema: str | None = None
            path = make_url(url).database or ""
            self._file = _SQLiteFile(path, create=create, timeout_seconds=timeout_seconds)
            self._thread = _SQLiteThread(self._file)
            self.engine: AsyncEngine = create_async_engine(
                URL.create("sqlite+aiosqlite", database=self._file.uri, query={"uri": "true"}),
                pool_size=pool_size,
                pool_timeout=min(_seconds(timeout_seconds), _HOUR),
                json_deserializer=read_json,
                connect_args={
                    "timeout": self._file.busy_seconds,
                    "isolation_level": None,
                },
            )
            event.listen(self.engine.sync_engine, "connect", self._file.prepare)
            event.listen(self.engine.sync_engine, "checkout", self._file.check_out)
        else:
            self._pooled = pooler == "transaction"
            self._url = postgresql_url.parse(url)
            self._listen_url = (
                postgresql_url.parse(listen_url)
                if listen_url is not None
                else None
                if self._pooled
                else self._url
            )
            self.name = "postgresql"
            self.schema = schema
            self.engine = create_async_engine(
                # asyncpg parses the URL, because it supports lists of hosts and PG* variables.
                "postgresql+asyncpg://",
                pool_size=pool_size,
                max_overflow=0,
                # Slightly before the deadline, whose error does not say what was slow.
                pool_timeout=0.95 * min(_seconds(timeout_seconds), _HOUR),
                json_deserializer=read_json,
                # The tables of `models.py` name no schema, because SQLite has none.
                execution_options={"schema_translate_map": {None: schema}},
                connect_args={"async_creator_fn": self._connect_postgresql}
                | (
                    # Use the unnamed statement, which the next one replaces.
                    {"prepared_statement_cache_size": 0, "prepared_statement_name_func": str}
                    if self._pooled
                    else {}
                ),
            )
            event.listen(self.engine.sync_engine, "connect", _connected)
            event.listen(self.engine.sync_engine, "checkout", _check_out)
            event.listen(self.engine.sync_engine, "checkin", _check_in)
            event.listen(self.engine.sync_engine, "before_cursor_execute", _before_statement)
            event.listen(self.engine.sync_engine, "after_cursor_execute", _after_statement)
        self.on_unavailable: Callable[[], None] = lambda: None
        """Called when an operation raises `QueueUnavailable`."""
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        # SQLite has one writer at a time. Waiting for this lock is fair. Waiting in SQLite's busy
        # handler is not, so only writes of other processes are waited for there.
        self._writer = asyncio.Lock()

    def for_another_loop(self, *, pool_size: int) -> Database:
        """Return the same database for another event loop, with its own connections."""
        return Database(**self._opened_with, pool_size=pool_size)

    @property
    def keeps_events(self) -> bool:
        """Whether other processes read events from `job_event_batch`: on SQLite, and on PostgreSQL
        without notifications."""
        return self.name == "sqlite" or self._listen_url is None

    @property
    def notices_commits(self) -> bool:
        """Whether `listen` detects each commit of another process, in the order of ids in
        `job_event_batch`, which then have no gaps: on SQLite, which has one writer."""
        return self.name == "sqlite"

    @property
    def timeout_seconds(self) -> float:
        """How long a call may wait for the database. Infinite without a timeout."""
        return _seconds(self._timeout)

    @asynccontextmanager
    async def transaction(
        self, *, timeout_seconds: float | None = None
    ) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that writes. Commit at the end, roll back on an exception.

        READ COMMITTED on PostgreSQL. BEGIN IMMEDIATE on SQLite, which excludes every other writer
        from its start. `timeout_seconds` can shorten the timeout of the database. It bounds the
        whole transaction.

        Raises:
            QueueUnavailable: the database does not answer, cannot write (a full disk), or aborted
                the transaction because of a deadlock (`retrying` runs it again instead).
        """
        deadline = self._deadline(timeout_seconds)
        if self._file is not None:
            begun = self._sqlite_transaction(self._file, deadline)
        elif self._pooled:
            begun = self._pooled_transaction(deadline)
        else:
            begun = self._postgresql_transaction(deadline)
        with self._counting():
            async with begun as connection:
                yield connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection on which each statement is a transaction with its own deadline.

        Behind a pooler the whole block is one READ COMMITTED transaction with one deadline.

        Raises:
            QueueUnavailable: the database does not answer.
        """
        deadline = self._deadline()
        opened = (
            self._pooled_transaction(deadline)
            if self._pooled
            else self._connection(self._autocommit, deadline, each=True)
        )
        with self._counting():
            async with opened as connection:
                yield connection

    async def retrying(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        *,
        timeout_seconds: float | None = None,
    ) -> T:
        """Run `work` in a transaction, and again if PostgreSQL aborts it because of a deadlock or a
        serialization failure. `work` must be able to run more than once.

        Raises:
            QueueUnavailable: as in `transaction`, or it failed `ATTEMPTS` times.
        """

        async def once() -> T:
            async with self.transaction(timeout_seconds=timeout_seconds) as connection:
                return await work(connection)

        return await _again(once)

    async def patiently(self, attempt: Callable[[], Awaitable[T | None]], locked: str) -> T:
        """Call `attempt` until it does not return None, which means that something is locked.

        No connection is held between the calls. `locked` is the reason in the error.

        Raises:
            QueueUnavailable: it is still locked at the end of the database's timeout.
        """
        clock = asyncio.get_running_loop().time
        give_up = clock() + self.timeout_seconds
        pause = LOCKED_PAUSE_SECONDS
        try:
            # An attempt may wait for a group commit in progress; the deadline includes that.
            async with asyncio.timeout_at(None if math.isinf(give_up) else give_up):
                while (outcome := await attempt()) is None:
                    if clock() + pause > give_up:
                        raise QueueUnavailable(locked, "busy")
                    await asyncio.sleep(pause)
                    pause = min(0.5, pause * 2)
        except TimeoutError as error:
            reason = f"no answer within {self.timeout_seconds:g} seconds"
            raise QueueUnavailable(reason, "timeout") from error
        return outcome

    async def execute_at_once(self, sql: str, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """PostgreSQL: run one statement in autocommit and return its rows.

        A process that freezes leaves no transaction open. The statement runs again after a
        deadlock or a serialization failure.

        Raises:
            QueueUnavailable: the database does not answer or cannot write, or it failed
                `ATTEMPTS` times.
        """
        if self._file is not None:
            raise TypeError("on SQLite a write is a function: see Database.write")
        deadline = self._deadline()

        async def once() -> Sequence[Row[Any]]:
            begun = (
                self._pooled_transaction(deadline)
                if self._pooled
                else self._connection(self._autocommit, deadline)
            )
            async with begun as connection:
                result = await connection.execute(statement(sql), parameters)
                return result.all() if result.returns_rows else ()

        with self._counting():
            return await _again(once)

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """SQLite: run `work` in the thread of the writer between BEGIN IMMEDIATE and COMMIT.

        If the caller is cancelled, the transaction still completes: it is committed if `work`
        returns.

        Raises:
            QueueUnavailable: another process has locked the database, it cannot be written (a full
                disk), or its file was deleted or replaced.
        """
        if self._thread is None:
            raise TypeError("on PostgreSQL a write is a statement: see Database.execute_at_once")
        deadline = self._deadline()
        with self._counting(), _unavailable_sqlite():
            await self._acquire_writer(deadline)
            loop = asyncio.get_running_loop()
            left = None if deadline is None else max(0.0, deadline - loop.time())
            try:
                future = self._thread.run(work, _busy(deadline))
            except BaseException:
                self._writer.release()
                raise
            future.add_done_callback(self._written)
            # Not `wait_for`, which would cancel the transaction.
            done, _ = await asyncio.wait({future}, timeout=left)
            if not done:
                raise QueueUnavailable(f"no commit within {self._timeout:g} seconds", "timeout")
            return future.result()

    def _written(self, future: asyncio.Future[Any]) -> None:
        self._writer.release()
        if not future.cancelled():
            future.exception()  # Mark it as retrieved: the caller may be gone.

    async def check_writes(
        self,
        work: Callable[[AsyncConnection], Awaitable[None]],
        *,
        tables: Sequence[str],
        timeout_seconds: float,
    ) -> None:
        """Run `work`, which writes, and roll it back. On PostgreSQL, also check for missing grants.

        SQLite writes to its files only when it commits. To detect a full disk, an unchanged page
        is committed there.

        Raises:
            QueueUnavailable: a write would fail.
        """

        async def rolled_back(connection: AsyncConnection) -> None:
            await connection.exec_driver_sql("SAVEPOINT readiness")
            await work(connection)
            await connection.exec_driver_sql("ROLLBACK TO SAVEPOINT readiness")
            if self._file is not None:
                version = (await connection.exec_driver_sql("PRAGMA user_version")).scalar_one()
                await connection.exec_driver_sql(f"PRAGMA user_version = {int(version)}")
            else:
                named = [f"{quoted(self.schema or '')}.{table}" for table in tables]
                rows = await connection.execute(_MISSING_GRANTS, {"tables": named})
                if missing := ", ".join(row.missing for row in rows):
                    reason = f"the role lacks {missing}. {_GRANT}"
                    raise QueueUnavailable(reason, "permission_denied")

        await self.retrying(rolled_back, timeout_seconds=timeout_seconds)

    async def checkpoint(self) -> bool:
        """SQLite: copy the write-ahead log into the database and truncate it, unless it is being
        read. Return whether that succeeded. Writers never wait for it.

        Raises:
            QueueUnavailable: the database's files cannot be read or written.
        """
        if self._file is None:
            return True
        with _unavailable_sqlite():
            return await asyncio.to_thread(self._file.checkpoint)

    async def listen(self, on_message: Listener, on_gap: Callable[[], None]) -> None:
        """Call `on_message` with the notifications of PostgreSQL, until cancelled.

        `on_gap` is called when messages may have been missed: at the start, after a lost
        connection and, if events are stored in the table (`keeps_events`), when there may be new
        ones.
        """
        if self._file is not None:
            await self._listen_sqlite(self._file, on_gap)
        elif self._listen_url is None:
            log.warning(
                "database.polling",
                reason="PgBouncer in transaction mode does not forward notifications, so events of"
                " other processes are polled. Set JOBS_DATABASE_LISTEN_URL to a direct URL.",
            )
            while True:
                on_gap()
                await asyncio.sleep(POLL_SECONDS)
        else:
            await self._listen_postgresql(self._listen_url, on_message, on_gap)

    async def close(self) -> None:
        """End all connections, including those in use. Takes at most two seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self.engine.dispose()
        for connection in list(self._connections):
            connection.terminate()
        if self._thread is not None:
            await self._thread.close()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except QueueUnavailable:
            self.on_unavailable()
            raise

    def _deadline(self, timeout_seconds: float | None = None) -> float | None:
        seconds = min(_seconds(self._timeout), _seconds(timeout_seconds))
        return None if seconds == _NEVER else asyncio.get_running_loop().time() + seconds

    # PostgreSQL

    @asynccontextmanager
    async def _postgresql_transaction(
        self, deadline: float | None
    ) -> AsyncIterator[AsyncConnection]:
        async with self._connection(self.engine, deadline) as connection, connection.begin():
            try:
                yield connection
            except asyncio.CancelledError:
                # A rollback would wait for the network. The server rolls back by itself.
                await connection.invalidate()
                raise

    @asynccontextmanager
    async def _pooled_transaction(self, deadline: float | None) -> AsyncIterator[AsyncConnection]:
        """Open a transaction with local settings. Its start and its end take a round trip each."""
        async with self._connection(self._autocommit, deadline) as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, _Connection)
            try:
                settings = "".join(
                    f"; SET LOCAL {name} = '{value}'"
                    for name, value in self._server_settings(self._url).items()
                    if name != "default_transaction_isolation"
                )
                await driver.execute("BEGIN ISOLATION LEVEL READ COMMITTED" + settings)
                yield connection
                await driver.execute("COMMIT")
            except asyncio.CancelledError:
                driver.terminate()
                raise
            except BaseException:
                if not driver.is_closed():
                    with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                        await driver.execute("ROLLBACK")
                raise

    @asynccontextmanager
    async def _connection(
        self, engine: AsyncEngine, deadline: float | None, *, each: bool = False
    ) -> AsyncIterator[AsyncConnection]:
        """Open a connection of the pool, which is dropped at the deadline. With `each`, each
        statement has the database's timeout."""
        opened = engine.connect()
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(deadline):
                connection = await opened
        except QueueUnavailable:
            raise
        except Exception as error:
            waited = _seconds(self._timeout) if deadline is None else deadline - began
            raise self._connecting_failed(error, waited) from error
        driver: Any = None
        try:
            # Close in a separate task, so that the connection of a cancelled caller is returned.
            async with _closing(connection):
                if self._file is None:
                    driver = (await connection.get_raw_connection()).driver_connection
                    if each:
                        driver.seconds_per_statement = self._timeout
                    else:
                        driver.expire_at(deadline)
                yield connection
        except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, asyncpg.PostgresError,
                asyncpg.InterfaceError, ConnectionError) as error:  # fmt: skip
            if driver is not None and driver.expired:
                seconds = _seconds(self._timeout) if each or deadline is None else deadline - began
                raise QueueUnavailable(
                    f"the database did not answer within {seconds:.3g} seconds", "timeout"
                ) from error
            if (unavailable := as_unavailable(error)) is not None:
                raise unavailable from error
            raise

    def _connecting_failed(self, error: Exception, seconds: float) -> QueueUnavailable:
        if self._file is not None:
            try:
                self._file.identity()
            except QueueUnavailable as missing:
                # The error of SQLite says only that it cannot open the file.
                return missing
        match error:
            case sqlalchemy.exc.TimeoutError():
                return QueueUnavailable(
                    f"all {self._pool_size} connections (JOBS_DATABASE_POOL_SIZE) are in use",
                    "timeout",
                )
            case TimeoutError():
                return QueueUnavailable(
                    f"no connection to the database within {seconds:.3g} seconds", "timeout"
                )
        return as_unavailable(error) or QueueUnavailable(str(error) or type(error).__name__)

    async def _connect_postgresql(self) -> _Connection:
        return await self._open(self._url, direct=not self._pooled)

    async def _open(self, url: PostgresqlUrl, *, direct: bool) -> _Connection:
        """Connect to one of the hosts of a URL. Each host gets an equal share of the timeout."""
        seconds = min(_seconds(self._timeout or defaults.TIMEOUT_SECONDS),
                      _seconds(url.connect_seconds))  # fmt: skip
        hosts: list[tuple[str | None, int | None]] = list(url.hosts) or [(None, None)]
        if url.shuffle_hosts:
            random.shuffle(hosts)
        settings = dict(url.server_settings) | (self._server_settings(url) if direct else {})
        # Each with a share of the time, so that a host that drops packets does not use all of it.
        wanted = ["standby", "any"] if url.session == "prefer-standby" else [url.session]
        tries = [(host, port, session) for session in wanted for host, port in hosts]
        last: Exception | None = None
        last_host: str | None = None
        for host, port, session in tries:
            try:
                connection = await asyncpg.connect(
                    url.dsn,
                    host=host,
                    port=port,
                    timeout=seconds / len(tries),
                    connection_class=_Connection,
                    server_settings=settings,
                    target_session_attrs=session,
                    servicefile=url.service_file,
                    statement_cache_size=100 if direct else 0,
                )
            except (OSError, TimeoutError, asyncpg.TargetServerAttributeNotMatched,
                    asyncpg.CannotConnectNowError) as error:  # fmt: skip
                last, last_host = error, host
                continue
            except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
                raise QueueUnavailable(str(error), _kind(error)) from error
            connection.keep_alive(url, _seconds(self._timeout or defaults.TIMEOUT_SECONDS))
            self._connections.add(connection)
            # Until the pool has the connection, nothing else ends it if the server stops answering.
            connection.expire_at(asyncio.get_running_loop().time() + seconds)
            return cast(_Connection, connection)
        if isinstance(last, TimeoutError):
            reason = f"no connection to the database within {seconds:g} seconds"
            raise QueueUnavailable(reason, "timeout") from last
        where = f"{last_host}: " if last_host else ""
        raise QueueUnavailable(where + _connecting_failed_by(last)) from last

    def _server_settings(self, url: PostgresqlUrl) -> dict[str, str]:
        """Return the settings of a session, without those that the URL sets.

        The timeouts of the server are slightly shorter, so that this process keeps the connection.
        """
        # The statements rely on READ COMMITTED, so the URL cannot change it.
        settings = {"default_transaction_isolation": "read committed"}
        optional = {"jit": "off"}
        if self._timeout is not None:
            milliseconds = int(self._timeout * 1_000)
            optional |= {
                "lock_timeout": f"{milliseconds * 8 // 10}ms",
                "statement_timeout": f"{milliseconds * 9 // 10}ms",
                "idle_in_transaction_session_timeout": f"{milliseconds}ms",
            }
        return settings | {name: v for name, v in optional.items() if not url.sets(name)}

    async def _listen_postgresql(
        self, url: PostgresqlUrl, on_message: Listener, on_gap: Callable[[], None]
    ) -> None:
        pause = 0.1
        while True:
            with suppress(QueueUnavailable, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection = await self._open(url, direct=True)
                try:
                    lost = asyncio.Event()
                    connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    await connection.add_listener(
                        self.schema, lambda _c, _pid, _channel, message: on_message(message)
                    )
                    connection.expire_at(None)
                    pause = 0.1
                    on_gap()
                    await self._watch(connection, lost)
                finally:
                    connection.terminate()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 5.0)

    async def _watch(self, connection: _Connection, lost: asyncio.Event) -> None:
        """Return when the connection is lost. When nothing arrives for a while, a query checks the
        connection."""
        seconds = min(_seconds(self._timeout), defaults.TIMEOUT_SECONDS)
        loop = asyncio.get_running_loop()
        while not lost.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await lost.wait()
                return
            connection.expire_at(loop.time() + seconds)
            await connection.execute("SELECT 1")
            connection.expire_at(None)

    # SQLite

    @asynccontextmanager
    async def _sqlite_transaction(
        self, file: _SQLiteFile, deadline: float | None
    ) -> AsyncIterator[AsyncConnection]:
        with _unavailable_sqlite():
            await self._acquire_writer(deadline)
            try:
                async with self._connection(self._autocommit, deadline) as connection:
                    # Directly on the driver: each call is one round trip to SQLite's thread, where
                    # SQLAlchemy's cursor takes three.
                    raw = await connection.get_raw_connection()
                    driver = raw.driver_connection
                    assert driver is not None
                    try:
                        await driver.execute(f"PRAGMA busy_timeout = {_busy(deadline)}")
                        await driver.execute("BEGIN IMMEDIATE")
                        yield connection
                        await driver.commit()
                    except BaseException:
                        # A cancelled statement has invalidated its connection.
                        if not connection.invalidated:
                            with suppress(sqlite3.Error, ValueError):
                                await driver.rollback()
                        raise
                    file.check(raw.info["identity"])
            finally:
                self._writer.release()

    async def _acquire_writer(self, deadline: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._writer.acquire()
        except TimeoutError as error:
            reason = f"the database was busy for {_seconds(self._timeout):g} seconds"
            raise QueueUnavailable(reason, "timeout") from error

    async def _listen_sqlite(self, file: _SQLiteFile, on_gap: Callable[[], None]) -> None:
        on_gap()
        last = None
        while True:
            try:
                # On the event loop on purpose: the pragma reads a counter in shared memory in a few
                # microseconds, and a thread's round trip takes a hundred.
                with closing(file.connect()) as connection:
                    identity = file.identity()
                    while True:
                        file.check(identity)
                        version = connection.execute("PRAGMA data_version").fetchone()
                        if version != last:
                            last = version
                            on_gap()
                        await asyncio.sleep(SQLITE_POLL_SECONDS)
            except (sqlite3.Error, QueueUnavailable):
                last = None
                await asyncio.sleep(1.0)


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types.
    """A connection with a deadline, at which it is dropped without waiting.

    Cancelling a query opens a second connection to cancel it on the server, and on a dead network
    that never ends. Dropping the connection ends the query with an error at once. The server ends
    the query by its own timeouts.
    """

    def __init__(self, protocol: Any, transport: asyncio.Transport, *rest: Any) -> None:
        super().__init__(protocol, transport, *rest)
        self.expired = False
        self.seconds_per_statement: float | None = None
        self._socket_transport = transport
        self._expiry: asyncio.TimerHandle | None = None

    def expire_at(self, when: float | None) -> None:
        """Drop this connection at a time of the loop's clock. None removes the deadline."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if when is not None:
            self._expiry = asyncio.get_running_loop().call_at(when, self._expire)

    def keep_alive(self, url: PostgresqlUrl, seconds: float) -> None:
        """Set TCP keepalive, so that the operating system detects a lost peer."""
        transport = self._socket_transport.get_extra_info("socket")
        if transport is None or transport.family not in (socket.AF_INET, socket.AF_INET6):
            return
        probe = max(1, int(seconds / 3))
        options = {
            "TCP_KEEPIDLE": url.keepalive_idle_seconds or probe,
            "TCP_KEEPINTVL": url.keepalive_interval_seconds or probe,
            "TCP_KEEPCNT": url.keepalive_count or 3,
            "TCP_USER_TIMEOUT": url.tcp_user_timeout_ms or int(seconds * 1_000),
        }
        # A duplicate of the descriptor, because uvloop's sockets cannot set options.
        with socket.socket(fileno=os.dup(transport.fileno())) as shared:
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(url.keepalives))
            for name, value in options.items():
                # Not every platform has all of these options.
                if (number := getattr(socket, name, None)) is not None:
                    shared.setsockopt(socket.IPPROTO_TCP, number, value)

    async def close(self, *, timeout: float | None = None) -> None:
        """Close the connection, and wait up to a second for the server.

        SQLAlchemy passes a timeout when it drops a failed connection, which needs no wait.
        """
        if timeout is not None:
            self.terminate()
        else:
            with suppress(TimeoutError, OSError, asyncpg.PostgresError):
                await super().close(timeout=1)

    def terminate(self) -> None:
        """Drop the connection at once."""
        if self._expiry is not None:
            self._expiry.cancel()
        super().terminate()

    def _expire(self) -> None:
        if not self.is_closed():
            self.expired = True
            self.terminate()


def _connected(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.driver_connection.expire_at(None)


def _check_out(dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
    if dbapi_connection.driver_connection.is_closed():
        # The server ended it while it was idle. The pool opens another.
        raise sqlalchemy.exc.DisconnectionError


def _check_in(dbapi_connection: Any, _record: Any) -> None:
    if dbapi_connection is not None:
        dbapi_connection.driver_connection.expire_at(None)
        dbapi_connection.driver_connection.seconds_per_statement = None


def _before_statement(connection: Any, *_: Any) -> None:
    driver = connection.connection.driver_connection
    if (seconds := driver.seconds_per_statement) is not None:
        driver.expire_at(asyncio.get_running_loop().time() + seconds)


def _after_statement(connection: Any, *_: Any) -> None:
    driver = connection.connection.driver_connection
    if driver.seconds_per_statement is not None:
        driver.expire_at(None)


@asynccontextmanager
async def _closing(connection: AsyncConnection) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await asyncio.shield(asyncio.ensure_future(connection.close()))


class _Identity(NamedTuple):
    """The identity of a file, independent of its name."""

    device: int
    inode: int


class _SQLiteFile:
    """The file of a SQLite database, and the check that it was not deleted or replaced.

    A deleted file stays writable for processes that have it open, and what they write is lost.
    """

    def __init__(self, path: str, *, create: bool, timeout_seconds: float | None) -> None:
        self._path = Path(path)
        # `rwc` is for migrations. Otherwise a missing file must not be created empty.
        self.uri = f"file:{quote(path)}?mode={'rwc' if create else 'rw'}"
        self.busy_seconds = 0.9 * min(_seconds(timeout_seconds), _HOUR)

    def connect(self) -> sqlite3.Connection:
        """Open the file."""
        connection = sqlite3.connect(
            self.uri, uri=True, timeout=self.busy_seconds, isolation_level=None
        )
        try:
            _set_pragmas(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def identity(self) -> _Identity:
        """Return the identity of the file at this path.

        Raises:
            QueueUnavailable: the file does not exist.
        """
        try:
            found = self._path.stat()
        except OSError as error:
            reason = f"the database's file {self._path}: {error.strerror}"
            raise QueueUnavailable(reason, "file_missing") from error
        return _Identity(found.st_dev, found.st_ino)

    def check(self, opened: _Identity) -> None:
        """Check that the opened file is still the one at this path.

        Raises:
            QueueUnavailable: it was deleted or replaced.
        """
        if self.identity() != opened:
            raise QueueUnavailable(f"the database's file {self._path} was replaced", "file_missing")

    def prepare(self, dbapi_connection: Any, record: Any) -> None:
        """Set up a connection of the pool."""
        record.info["identity"] = self.identity()
        _set_pragmas(dbapi_connection)

    def check_out(self, _dbapi_connection: Any, record: Any, _proxy: Any) -> None:
        """Make the pool replace a connection whose file was deleted or replaced."""
        try:
            self.check(record.info["identity"])
        except QueueUnavailable as error:
            raise sqlalchemy.exc.DisconnectionError from error

    def checkpoint(self) -> bool:
        """See `Database.checkpoint`."""
        with closing(self.connect()) as connection:
            connection.execute("PRAGMA busy_timeout = 0")
            # PASSIVE copies without locks. TRUNCATE, which locks, then has only the end of the log
            # left to copy.
            _, pages, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if pages != copied:
                return False
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy


class _SQLiteThread:
    """The writer: a connection and the thread that uses it, one transaction at a time."""

    def __init__(self, file: _SQLiteFile) -> None:
        self._file = file
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sqlite-writer")
        self._opened: tuple[sqlite3.Connection, _Identity] | None = None

    def run(self, work: Callable[[sqlite3.Connection], T], busy: int) -> asyncio.Future[T]:
        """Start a transaction of `work`. It waits up to `busy` milliseconds for other processes."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._executor, self._commit, work, busy)

    async def close(self) -> None:
        """End the thread after the current transaction."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown()

    def _commit(self, work: Callable[[sqlite3.Connection], T], busy: int) -> T:
        connection, identity = self._connection()
        connection.execute(f"PRAGMA busy_timeout = {busy}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        # If the file was deleted in the meantime, the commit is lost.
        self._file.check(identity)
        return result

    def _connection(self) -> tuple[sqlite3.Connection, _Identity]:
        if self._opened is not None:
            try:
                self._file.check(self._opened[1])
            except QueueUnavailable:
                self._close()
        if self._opened is None:
            identity = self._file.identity() if "mode=rwc" not in self._file.uri else None
            connection = self._file.connect()
            self._opened = connection, identity or self._file.identity()
        return self._opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None


def _busy(deadline: float | None) -> int:
    """Return how many milliseconds to wait for writes of other processes.

    It is slightly less than the time left, so that SQLite fails first and commits nothing after the
    caller got an error.
    """
    if deadline is None:
        return int(_HOUR * 1_000)
    return max(0, int(900 * (deadline - asyncio.get_running_loop().time())))


_NEVER: Final = float("inf")
_HOUR: Final = 3_600.0


def _seconds(timeout: float | None) -> float:
    return _NEVER if timeout is None else timeout


class _Transient(QueueUnavailable):
    """Raised when PostgreSQL aborts a transaction that may succeed when it runs again."""


async def _again(once: Callable[[], Awaitable[T]]) -> T:
    """Run a transaction again after transient failures, at most `ATTEMPTS` times."""
    for attempt in range(1, ATTEMPTS):
        try:
            return await once()
        except _Transient:
            # Full jitter, so that the same transactions do not collide again.
            await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))
    return await once()


_MISSING_GRANTS: Final = text(
    """
    SELECT privilege || ' on table ' || name AS missing
    FROM unnest(CAST(:tables AS text[])) AS name,
         unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
    WHERE NOT has_table_privilege(to_regclass(name), privilege)
    UNION ALL
    SELECT 'USAGE on sequence ' || sequence
    FROM unnest(CAST(:tables AS text[])) AS name
    JOIN pg_attribute ON attrelid = to_regclass(name) AND attnum > 0 AND NOT attisdropped
        AND attidentity = ''
    CROSS JOIN LATERAL pg_get_serial_sequence(name, attname) AS sequence
    WHERE sequence IS NOT NULL AND NOT has_sequence_privilege(sequence, 'USAGE')
    """
)


def quoted(name: str) -> str:
    """Return a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def async_url(url: str) -> URL:
    """Return the URL with the async driver of this project."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    return parsed.set(drivername=driver[parsed.get_backend_name()])


def read_json(value: str) -> JsonValue:
    """Parse the JSON text of a column into the value that the caller sent.

    JSONB of PostgreSQL returns 1e300 as a 1 with 300 zeros. The registry refuses integers over 64
    bits, so a larger integer in the text was a float, and is converted back.
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
    """Return the parsed statement of a text, from a cache."""
    return text(template)


@contextmanager
def unavailable() -> Iterator[None]:
    """Turn the errors of an unavailable, full or busy database into `QueueUnavailable`."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, asyncpg.PostgresError,
            asyncpg.InterfaceError, OSError) as error:  # fmt: skip
        if (as_error := as_unavailable(error)) is not None:
            raise as_error from error
        raise


@contextmanager
def _unavailable_sqlite() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if (as_error := as_unavailable(error)) is not None:
            raise as_error from error
        raise


def as_unavailable(error: BaseException | None) -> QueueUnavailable | None:
    """Return the `QueueUnavailable` for an error, or None if the statement is at fault, for example
    because it violates a constraint."""
    match error:
        case QueueUnavailable():
            return error
        case sqlite3.Error():
            return _sqlite_unavailable(error)
        case sqlalchemy.exc.DBAPIError():
            if isinstance(error.orig, sqlite3.Error):
                return _sqlite_unavailable(error.orig)
            if error.connection_invalidated:
                return QueueUnavailable(_first_line(error.orig))
            return _postgresql_unavailable(error.orig)
        case asyncpg.PostgresError() | asyncpg.InterfaceError():
            return _postgresql_unavailable(error)
        case OSError() | sqlalchemy.exc.TimeoutError():
            return QueueUnavailable(_first_line(error))
    return None


_MIGRATE: Final = "Run `job-registry migrate`."
_GRANT: Final = (
    "The role lacks a grant: `job-registry migrate --grants ROLE` prints those it needs."
)


def _postgresql_unavailable(error: BaseException | None) -> QueueUnavailable | None:
    """Classify an error by https://www.postgresql.org/docs/current/errcodes-appendix.html."""
    state = getattr(error, "sqlstate", None) or ""
    reason = _first_line(error)
    if state in _TRANSIENT or _is_stale_plan(error):
        return _Transient(f"{reason} ({state})", "busy")
    kind = _kind(error)
    match kind:
        case "schema_outdated":
            return QueueUnavailable(f"{reason}. {_MIGRATE}", kind)
        case "permission_denied":
            return QueueUnavailable(f"{reason}. {_GRANT}", kind)
    if state in _OUTAGES or state[:2] in _OUTAGES or _is_lost(error):
        return QueueUnavailable(f"{reason} ({state})" if state else reason, kind)
    return None


_TRANSIENT: Final = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock."""

_OUTAGES: Final = frozenset(
    {
        "08",  # connection
        "53",  # resources: 53100 disk full, 53300 too many connections
        "57",  # operator: 57014 statement_timeout, 57P01 shutdown
        "58",  # system error of the server
        "25006",  # read-only: a standby after a failover
        "25P02",  # the transaction has already failed
        "25P03",  # idle_in_transaction_session_timeout
        "55P03",  # lock_timeout
        "28",  # authorization
        "3D000",  # no such database
        "XX",  # a damaged page or a bug of the server
    }
)

_KINDS: Final[Mapping[str, UnavailableKind]] = {
    "42501": "permission_denied",
    "28000": "permission_denied",
    "28P01": "permission_denied",
    "42P01": "schema_outdated",
    "42703": "schema_outdated",
    "42883": "schema_outdated",
    "42704": "schema_outdated",
    "3F000": "schema_outdated",
    "25006": "read_only",
    "53100": "disk_full",
    "55P03": "timeout",
    "57014": "timeout",
    "25P03": "timeout",
}


def _kind(error: BaseException | None) -> UnavailableKind:
    return _KINDS.get(getattr(error, "sqlstate", None) or "", "unreachable")


def _is_stale_plan(error: BaseException | None) -> bool:
    """Return whether a migration changed the columns of a prepared statement."""
    return any(isinstance(each, asyncpg.InvalidCachedStatementError) for each in _causes(error))


def _is_lost(error: BaseException | None) -> bool:
    """Return whether the connection ended."""
    lost = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
    return any(
        isinstance(each, lost) and not isinstance(each, asyncpg.DataError)
        for each in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _sqlite_unavailable(error: sqlite3.Error) -> QueueUnavailable | None:
    code = getattr(error, "sqlite_errorcode", None)
    reason = _first_line(error)
    if code is None:
        # An error without a code is the module's: the connection was closed during a statement.
        return QueueUnavailable(reason) if isinstance(error, sqlite3.OperationalError) else None
    # https://www.sqlite.org/rescode.html: the low byte is the primary code.
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_ERROR:
        if re.match(r"no such (table|column|function|index)|table \w+ has no column", reason):
            return QueueUnavailable(f"{reason}. {_MIGRATE}", "schema_outdated")
        return None
    kind = _SQLITE_KINDS.get(primary)
    return None if kind is None else QueueUnavailable(reason, kind)


_SQLITE_KINDS: Final[Mapping[int, UnavailableKind]] = {
    sqlite3.SQLITE_BUSY: "timeout",
    sqlite3.SQLITE_LOCKED: "timeout",
    sqlite3.SQLITE_PROTOCOL: "timeout",
    sqlite3.SQLITE_FULL: "disk_full",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_PERM: "permission_denied",
    sqlite3.SQLITE_AUTH: "permission_denied",
    sqlite3.SQLITE_CANTOPEN: "unreachable",
    sqlite3.SQLITE_IOERR: "unreachable",
    sqlite3.SQLITE_NOMEM: "unreachable",
    sqlite3.SQLITE_INTERRUPT: "unreachable",
    sqlite3.SQLITE_CORRUPT: "unreachable",
    sqlite3.SQLITE_NOTADB: "unreachable",
    sqlite3.SQLITE_SCHEMA: "unreachable",
}


def _connecting_failed_by(error: Exception | None) -> str:
    """Return a readable message for an error while connecting.

    Messages of asyncio quote Python values: `[Errno 111] Connect call failed ('::1', 5432, 0, 0)`,
    one for each address.
    """
    if not isinstance(error, socket.gaierror) and isinstance(error, OSError):
        number = error.errno or next(iter(re.findall(r"\[Errno (\d+)\]", str(error))), None)
        if number is not None:
            return os.strerror(int(number))
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _first_line(error: BaseException | None) -> str:
    # SQLAlchemy's adapter puts the class of the driver's error before the message.
    lines = re.sub(r"^<class '[^']*'>: ", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def _set_pragmas(connection: Any) -> None:
    cursor = connection.cursor()
    # FULL: a commit returns only after it has reached the disk.
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"journal_size_limit={MAX_WAL_BYTES}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
