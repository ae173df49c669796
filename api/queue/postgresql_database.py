"""PostgreSQL: connections with deadlines, transactions behind poolers, and notifications."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import lru_cache
from typing import Any, Final, TypeVar, cast
from uuid import uuid4

import asyncpg
import sqlalchemy.exc
from sqlalchemy import Connection, Dialect, PoolProxiedConnection, dialects, event
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.sql.compiler import SQLCompiler

from job_registry_api import defaults, postgresql_url
from job_registry_api.postgresql_url import PostgresqlUrl
from job_registry_api.queue.database import (
    HOUR_SECONDS,
    POLL_SECONDS,
    Database,
    Listener,
    Pooler,
    log,
    read_json,
    seconds_of,
    statement,
)
from job_registry_api.queue.driver_errors import (
    Transient,
    advised,
    as_unavailable,
    connecting_failed_by,
    kind_of,
)
from job_registry_api.queue.errors import QueueUnavailable, reason_of

NOT_LISTENING_LOG_SECONDS: Final = 60.0
"""How often the log says that the connection for notifications fails."""

CHECK_CHANNEL: Final = "job_registry check"
"""The channel on which a connection for notifications is checked. It has no events, which processes
of earlier releases would try to read."""

NOT_NOTIFIED: Final = (
    "LISTEN is accepted, but a notification did not arrive within {seconds:g} seconds. The URL for"
    " notifications leads through PgBouncer in transaction mode, or to another database. Set"
    " JOBS_DATABASE_LISTEN_URL to a direct URL of the same database."
)

SUSPECT_SECONDS: Final = 1.0
"""How long a connection is used after its opening while statements fail by what may be its own
fault. Then another one is opened."""

_MAY_BE_OF_THE_SESSION: Final = frozenset({"read_only", "schema_outdated"})
"""Errors that a new connection may not have: it may lead to the new primary, where the server of
the old one never ends it, and a session may keep the columns that a table had."""

DROP_SECONDS: Final = 1.0
"""How long a connection may open on for a caller who is cancelled."""

ATTEMPTS: Final = 5
"""How many times a transaction runs that PostgreSQL aborts because of a deadlock."""

MIGRATION_LOCK: Final = 0x6A6F6273
"""The advisory lock of a migration ("jobs" in ASCII). Only one migration runs at a time."""

_DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    ConnectionError,
)

T = TypeVar("T")

IN_ORDER: Final = {"enable_sort": "off", "jit": "off"}
"""The settings of a statement that reads an index in order. A sort that nothing can replace stays
possible, at an estimated cost from which PostgreSQL would compile the statement."""


class PostgreSQLDatabase(Database):
    """A PostgreSQL database, by its URL: `postgresql://user@host/name`.

    With the `pooler` "transaction" (a mode of PgBouncer), prepared statements and settings do not
    outlive a transaction. LISTEN then needs `listen_url`, a direct connection.

    With `read_only`, every transaction is READ ONLY.

    The tables are in `schema`. Every statement names the schema and ignores the session's search
    path. The channel of LISTEN and NOTIFY has the name of the schema.
    """

    name = "postgresql"
    migrates_at_start = False
    notices_commits = False

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = defaults.POOL_SIZE,
        timeout_seconds: float | None = defaults.TIMEOUT_SECONDS,
        pooler: Pooler = "session",
        listen_url: str | None = None,
        schema: str = defaults.SCHEMA,
        read_only: bool = False,
    ) -> None:
        self._schema = schema
        self._is_read_only = read_only
        self._is_pooled = pooler == "transaction"
        self._url = postgresql_url.parse(url)
        self._listen_url = None if self._is_pooled else self._url
        if listen_url is not None:
            self._listen_url = postgresql_url.parse(listen_url)
        self._connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._spare: list[PoolProxiedConnection] = []
        """Connections that statements have used and not returned to the pool: to take one from it
        takes more CPU than the client's part of a short statement."""
        self._lost_at = float("-inf")
        """Connections that were opened before this time of the loop's clock are not used: one of
        them was lost, or its server takes no writes."""
        engine = create_async_engine(
            # asyncpg parses the URL, because it supports lists of hosts and PG* variables.
            "postgresql+job_registry://",
            pool_size=pool_size,
            max_overflow=0,
            # Slightly before the deadline, whose error does not say what was slow.
            pool_timeout=0.95 * min(seconds_of(timeout_seconds), HOUR_SECONDS),
            json_deserializer=read_json,
            # The tables of `models.py` name no schema, because SQLite has none.
            execution_options={"schema_translate_map": {None: schema}},
            connect_args={"async_creator_fn": self._connect}
            | (
                # Use the unnamed statement, which the next one replaces.
                {"prepared_statement_cache_size": 0, "prepared_statement_name_func": str}
                if self._is_pooled
                else {}
            ),
        )
        event.listen(engine.sync_engine, "connect", _connected)
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "checkin", _check_in)
        event.listen(engine.sync_engine, "before_cursor_execute", _before_statement)
        event.listen(engine.sync_engine, "after_cursor_execute", _after_statement)
        super().__init__(
            engine,
            pool_size=pool_size,
            timeout_seconds=timeout_seconds,
            opened_with={
                "url": url,
                "pooler": pooler,
                "listen_url": listen_url,
                "schema": schema,
                "read_only": read_only,
            },
        )

    @property
    def schema(self) -> str:
        """The schema of the tables."""
        return self._schema

    @property
    def keeps_events(self) -> bool:
        return self._listen_url is None

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
            async with self._begin(self._deadline(timeout_seconds)) as connection:
                return await work(connection)

        with self._counting():
            return await _again(once)

    async def execute_at_once(
        self, sql: str, parameters: Mapping[str, Any], *, in_order: bool = False
    ) -> Sequence[Mapping[str, Any]]:
        """Run one statement in autocommit and return its rows. For `in_order`, see `reading`.

        It is prepared on the driver's connection: SQLAlchemy's execution takes four times the CPU.
        A process that freezes leaves no transaction open. The statement runs again after a
        deadlock or a serialization failure.

        Raises:
            QueueUnavailable: the database does not answer or cannot write, or it failed
                `ATTEMPTS` times.
        """
        deadline = self._deadline()
        positional, names = _positional(sql, self.engine.dialect)
        values = [parameters[name] for name in names]

        async def once() -> Sequence[Mapping[str, Any]]:
            async with self._driver(deadline) as driver:
                if not self._is_pooled and not in_order:
                    return cast(list[Mapping[str, Any]], await driver.fetch(positional, *values))
                async with self._transaction_on(driver, in_order=in_order):
                    return cast(list[Mapping[str, Any]], await driver.fetch(positional, *values))

        with self._counting():
            return await _again(once)

    async def execute_alone(self, sql: str) -> None:
        """See `Database.execute_alone`.

        The driver sends it in one message: a pooler may give each message another connection.
        """
        with self._counting():
            async with self._driver(self._deadline()) as driver:
                await driver.execute(sql)

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")

    async def listen(self, on_message: Listener, on_gap: Callable[[], None]) -> None:
        if self._listen_url is not None:
            await self._listen(self._listen_url, on_message, on_gap)
        log.warning(
            "database.polling",
            reason="PgBouncer in transaction mode does not forward notifications, so events of"
            " other processes are polled. Set JOBS_DATABASE_LISTEN_URL to a direct URL.",
        )
        while True:
            on_gap()
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        while self._spare:
            self._spare.pop().close()
        await super().close()
        for connection in list(self._connections):
            connection.terminate()

    async def _acquire(self, engine: AsyncEngine) -> AsyncConnection:
        if self._spare:
            self._spare.pop().close()
        return await super()._acquire(engine)

    def _begin(self, deadline: float | None) -> AbstractAsyncContextManager[AsyncConnection]:
        if self._is_pooled:
            return self._configured_transaction(deadline)
        return self._direct_transaction(deadline)

    def _read(
        self, deadline: float | None, *, in_order: bool
    ) -> AbstractAsyncContextManager[AsyncConnection]:
        if self._is_pooled or in_order:
            return self._configured_transaction(deadline, in_order=in_order)
        return self._connection(self._autocommit, deadline, each=True)

    @asynccontextmanager
    async def _direct_transaction(self, deadline: float | None) -> AsyncIterator[AsyncConnection]:
        async with self._connection(self.engine, deadline) as connection, connection.begin():
            try:
                yield connection
            except asyncio.CancelledError:
                # A rollback would wait for the network. The server rolls back by itself.
                await connection.invalidate()
                raise

    @asynccontextmanager
    async def _configured_transaction(
        self, deadline: float | None, *, in_order: bool = False
    ) -> AsyncIterator[AsyncConnection]:
        """Open a transaction with local settings."""
        async with self._connection(self._autocommit, deadline) as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, _Connection)
            async with self._transaction_on(driver, in_order=in_order):
                yield connection

    @asynccontextmanager
    async def _transaction_on(
        self, driver: _Connection, *, in_order: bool = False
    ) -> AsyncIterator[None]:
        """Open a transaction with local settings. Its start and its end take a round trip each."""
        try:
            chosen = self._server_settings(self._url) | self._unbounded(self._url, driver)
            chosen |= IN_ORDER if in_order else {}
            settings = "".join(
                f"; SET LOCAL {name} = '{value}'"
                for name, value in chosen.items()
                if not name.startswith(("default_transaction_", "idle_session_"))
            )
            access = " READ ONLY" if self._is_read_only else ""
            await driver.execute(f"BEGIN ISOLATION LEVEL READ COMMITTED{access}{settings}")
            yield
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
    async def _driver(self, deadline: float | None) -> AsyncIterator[_Connection]:
        """Open a connection of the pool as its driver's, which is dropped at the deadline."""
        began = asyncio.get_running_loop().time()
        await self._take_place(deadline)
        try:
            pooled = self._take_spare() or await self._check_out(began, deadline)
            driver = _driver_of(pooled)
            try:
                driver.expire_at(deadline)
                yield driver
            except asyncio.CancelledError:
                # To wait for the answer of the server would wait for the network.
                driver.terminate()
                raise
            except _DRIVER_ERRORS as error:
                if driver.is_closed():
                    # What ended it has probably ended those that were opened before, too.
                    self._lost_at = asyncio.get_running_loop().time()
                if (reported := self._reported(error, driver, began, deadline)) is not None:
                    raise reported from error
                raise
            finally:
                if self._is_closed:
                    driver.terminate()
                if driver.is_closed():
                    pooled.close()
                else:
                    driver.expire_at(None)
                    self._spare.append(pooled)
        finally:
            self._places.release()

    def _take_spare(self) -> PoolProxiedConnection | None:
        """Return a connection that the last statements have used, if it is still open."""
        while self._spare:
            pooled = self._spare.pop()
            if self._may_use(_driver_of(pooled)):
                return pooled
            pooled.close()
        return None

    async def _check_out(self, began: float, deadline: float | None) -> PoolProxiedConnection:
        try:
            async with asyncio.timeout_at(deadline):
                return await self.engine.raw_connection()
        except QueueUnavailable:
            raise
        except Exception as error:
            waited = self.timeout_seconds if deadline is None else deadline - began
            raise self._connecting_failed(error, waited) from error

    @asynccontextmanager
    async def _connection(
        self, engine: AsyncEngine, deadline: float | None, *, each: bool = False
    ) -> AsyncIterator[AsyncConnection]:
        """Open a connection of the pool, which is dropped at the deadline. With `each`, each
        statement has the database's timeout."""
        began = asyncio.get_running_loop().time()
        driver: Any = None
        try:
            async with self._from_pool(engine, deadline) as connection:
                driver = (await connection.get_raw_connection()).driver_connection
                if each:
                    driver.seconds_per_statement = self._timeout
                else:
                    driver.expire_at(deadline)
                yield connection
        except (sqlalchemy.exc.SQLAlchemyError, *_DRIVER_ERRORS) as error:
            reported = self._reported(error, driver, began, None if each else deadline)
            if reported is not None:
                raise reported from error
            raise

    def _reported(
        self, error: Exception, driver: Any, began: float, deadline: float | None
    ) -> QueueUnavailable | None:
        """Return the error that a caller gets; None if the statement is at fault.

        A session stays read-only after its database no longer is, and after a failover a new
        connection may lead to another server. So connections that cannot write are replaced. So are
        those that miss a column: when one was dropped, the functions of some sessions read it on.
        """
        if driver is not None and driver.expired:
            seconds = self.timeout_seconds if deadline is None else deadline - began
            reason = f"the database did not answer within {seconds:.3g} seconds"
            return QueueUnavailable(reason, "timeout")
        reported = as_unavailable(error)
        if reported is not None and reported.kind in _MAY_BE_OF_THE_SESSION:
            now = asyncio.get_running_loop().time()
            self._lost_at = max(self._lost_at, now - SUSPECT_SECONDS)
        return reported

    def _checked_out(self, dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
        if not self._may_use(dbapi_connection.driver_connection):
            raise sqlalchemy.exc.DisconnectionError  # The pool opens another.

    def _may_use(self, driver: _Connection) -> bool:
        """Return whether the server has not ended a connection while it was idle, and takes writes,
        as far as that is known or probable."""
        return not driver.is_closed() and driver.opened_at >= self._lost_at

    async def _connect(self) -> _Connection:
        return await self._open(self._url, direct=not self._is_pooled)

    async def _open(self, url: PostgresqlUrl, *, direct: bool) -> _Connection:
        """Connect to one of the hosts of a URL. Each host gets an equal share of the timeout."""
        seconds = min(self._timeout or defaults.TIMEOUT_SECONDS,
                      seconds_of(url.connect_seconds))  # fmt: skip
        hosts: list[tuple[str | None, int | None]] = list(url.hosts) or [(None, None)]
        if url.shuffle_hosts:
            random.shuffle(hosts)
        settings = dict(url.server_settings) | (self._server_settings(url) if direct else {})
        # Each with a share of the time, so that a host that drops packets does not use all of it.
        # A session that is read-only by its settings would not be found to be read-write.
        session = "any" if self._is_read_only and url.session == "read-write" else url.session
        wanted = ["standby", "any"] if session == "prefer-standby" else [session]
        tries = [(host, port, attributes) for attributes in wanted for host, port in hosts]
        last: Exception | None = None
        where = ""
        for host, port, attributes in tries:
            try:
                connection = await self._undisturbed(
                    asyncpg.connect(
                        url.dsn,
                        host=host,
                        port=port,
                        timeout=seconds / len(tries),
                        connection_class=_Connection,
                        server_settings=settings,
                        target_session_attrs=attributes,
                        servicefile=url.service_file,
                        statement_cache_size=100 if direct else 0,
                    )
                )
            except (OSError, TimeoutError, asyncpg.TargetServerAttributeNotMatched,
                    asyncpg.CannotConnectNowError) as error:  # fmt: skip
                last, where = error, _where(host, port)
                continue
            except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
                raise QueueUnavailable(advised(str(error)), kind_of(error)) from error
            connection.keep_alive(url, self._timeout or defaults.TIMEOUT_SECONDS)
            self._connections.add(connection)
            # Until the pool has the connection, nothing else ends it if the server stops answering.
            connection.expire_at(asyncio.get_running_loop().time() + seconds)
            for name, value in self._unbounded(url, connection).items() if direct else ():
                await connection.execute(f"SET {name} = '{value}'")
            return connection
        if isinstance(last, TimeoutError):
            reason = f"no connection to the database within {round(seconds, 1):g} seconds"
            raise QueueUnavailable(reason, "timeout") from last
        if isinstance(last, asyncpg.TargetServerAttributeNotMatched):
            # The message of asyncpg has the attribute as a Python value.
            reason = f"{where}the server is not {session} (target_session_attrs)"
            takes_writes = session in ("read-write", "primary")
            raise QueueUnavailable(reason, "read_only" if takes_writes else "unreachable") from last
        raise QueueUnavailable(where + connecting_failed_by(last)) from last

    async def _undisturbed(self, connecting: Coroutine[Any, Any, _Connection]) -> _Connection:
        """Open a connection. If the caller is cancelled, it is opened nevertheless, and dropped.

        Where the opening of a socket is cancelled before the reply about TLS, asyncpg leaves an
        error behind that asyncio writes to standard error.
        """
        opening = asyncio.create_task(connecting)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._in_background(_drop(opening))
            raise

    def _server_settings(self, url: PostgresqlUrl) -> dict[str, str]:
        """Return the settings of a session, without those that the URL sets.

        The timeouts of the server are slightly shorter, so that this process keeps the connection.
        """
        # The statements rely on READ COMMITTED, so the URL cannot change it.
        settings = {"default_transaction_isolation": "read committed"}
        if self._is_read_only:
            settings["default_transaction_read_only"] = "on"
        # The server would end connections of the pool at the moment at which they are used.
        # Without a timeout, 0 switches off those of the database or the role.
        milliseconds = 0 if self._timeout is None else int(self._timeout * 1_000)
        optional = {
            "jit": "off",
            "idle_session_timeout": "0",
            "lock_timeout": f"{milliseconds * 8 // 10}ms",
            "statement_timeout": f"{milliseconds * 9 // 10}ms",
            "idle_in_transaction_session_timeout": f"{milliseconds}ms",
        }
        return settings | {name: v for name, v in optional.items() if not url.sets(name)}

    def _unbounded(self, url: PostgresqlUrl, driver: _Connection) -> dict[str, str]:
        """Return what a database without a timeout sets besides. It is not among the settings with
        which a session begins: older servers do not have it, and would refuse the connection."""
        name = "transaction_timeout"
        is_bounded = self._timeout is not None or url.sets(name)
        return {} if is_bounded or driver.get_server_version().major < 17 else {name: "0"}

    async def _listen(
        self, url: PostgresqlUrl, on_message: Listener, on_gap: Callable[[], None]
    ) -> None:
        pause, logged_at = 0.1, float("-inf")
        while True:
            try:
                connection = await self._open(url, direct=True)
                try:
                    lost = asyncio.Event()
                    connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    await self._check_notified(connection)
                    await connection.add_listener(
                        self.schema, lambda _c, _pid, _channel, message: on_message(message)
                    )
                    connection.expire_at(None)
                    pause = 0.1
                    on_gap()
                    await self._watch(connection, lost)
                finally:
                    connection.terminate()
            except (QueueUnavailable, OSError, *_DRIVER_ERRORS) as error:
                now = asyncio.get_running_loop().time()
                if now >= logged_at + NOT_LISTENING_LOG_SECONDS:
                    logged_at = now
                    reason = reason_of(as_unavailable(error) or error)
                    log.warning("database.not_listening", reason=reason)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 5.0)

    async def _check_notified(self, connection: _Connection) -> None:
        """Check that a notification from the pool's connections arrives at this one. A pooler may
        accept LISTEN and forward nothing.

        Raises:
            QueueUnavailable: it does not arrive.
        """
        seconds = min(self.timeout_seconds, defaults.TIMEOUT_SECONDS)
        connection.expire_at(asyncio.get_running_loop().time() + 3 * seconds)
        token, ended = uuid4().hex, asyncio.Event()

        def take(_connection: Any, _pid: int, _channel: str, message: str) -> None:
            if message == token:
                ended.set()

        connection.add_termination_listener(lambda _: ended.set())
        await connection.add_listener(CHECK_CHANNEL, take)
        sql = "SELECT pg_notify(:channel, :message)"
        try:
            await self.execute_at_once(sql, {"channel": CHECK_CHANNEL, "message": token})
        except QueueUnavailable:
            ended.set()  # Nothing was sent, so nothing is known of this connection.
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            raise QueueUnavailable(NOT_NOTIFIED.format(seconds=seconds)) from None
        await connection.remove_listener(CHECK_CHANNEL, take)

    async def _watch(self, connection: _Connection, lost: asyncio.Event) -> None:
        """Return when the connection is lost, or its server takes no writes: others then write to
        another one. When nothing arrives for a while, a query checks that."""
        seconds = min(self.timeout_seconds, defaults.TIMEOUT_SECONDS)
        loop = asyncio.get_running_loop()
        while not lost.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await lost.wait()
                return
            connection.expire_at(loop.time() + seconds)
            if await connection.fetchval("SHOW transaction_read_only") == "on":
                return
            # Once the server's queue of notifications has been full, nothing else removes those
            # that every session has received.
            await connection.fetchval("SELECT pg_notification_queue_usage()")
            connection.expire_at(None)


class _Dialect(PGDialect_asyncpg):
    """SQLAlchemy's dialect for asyncpg, without the queries on the first connection of a process.

    They take ten round trips, all within the timeout of the first operation, for what the server
    says when a connection opens, or what does not matter here.
    """

    supports_statement_cache = True

    def initialize(self, connection: Connection) -> None:
        """Set what depends on the server, from what the driver knows of it already."""
        self.server_version_info = (_driver_of(connection.connection).get_server_version().major,)
        self.default_isolation_level = "READ COMMITTED"


dialects.registry.register("postgresql.job_registry", __name__, _Dialect.__name__)


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types.
    """A connection with a deadline, at which it is dropped without waiting.

    Cancelling a query opens a second connection to cancel it on the server, and on a dead network
    that never ends. Dropping the connection ends the query with an error at once. The server ends
    the query by its own timeouts.
    """

    def __init__(self, protocol: Any, transport: asyncio.Transport, *rest: Any) -> None:
        super().__init__(protocol, transport, *rest)
        self.expired = False
        self.opened_at = asyncio.get_running_loop().time()
        self.seconds_per_statement: float | None = None
        self._socket_transport = transport
        self._expires_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def expire_at(self, when: float | None) -> None:
        """Drop this connection at a time of the loop's clock. None removes the deadline.

        A timer that runs stays, as long as it is early enough: each statement has a deadline, and
        hardly any reaches it.
        """
        self._expires_at = when
        if when is not None and (self._timer is None or self._timer.when() > when):
            self._set_timer(when)

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
        self._expires_at = None
        if self._timer is not None:
            self._timer.cancel()
        super().terminate()

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when, self._expire)

    def _expire(self) -> None:
        self._timer = None
        when = self._expires_at
        if when is None or self.is_closed():
            return
        if asyncio.get_running_loop().time() < when:
            self._set_timer(when)
        else:
            self.expired = True
            self.terminate()


def _where(host: str | None, port: int | None) -> str:
    """Return what to put before the reason for which a host did not answer."""
    if host is None or port is None or host.startswith("/"):  # A folder of sockets.
        return f"{host}: " if host else ""
    return f"[{host}]:{port}: " if ":" in host else f"{host}:{port}: "


async def _drop(opening: asyncio.Task[_Connection]) -> None:
    """Drop a connection once it is open, or soon, so that those of a server that does not answer do
    not become many."""
    with suppress(Exception):
        async with asyncio.timeout(DROP_SECONDS):
            (await opening).terminate()


def _driver_of(pooled: PoolProxiedConnection) -> _Connection:
    driver = pooled.driver_connection
    assert isinstance(driver, _Connection)
    return driver


def _connected(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.driver_connection.expire_at(None)


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


@lru_cache(maxsize=512)
def _positional(sql: str, dialect: Dialect) -> tuple[str, tuple[str, ...]]:
    """Return a statement with the driver's numbers instead of names, and the names in order."""
    compiled = statement(sql).compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    return compiled.string, tuple(compiled.positiontup or ())


async def _again(once: Callable[[], Awaitable[T]]) -> T:
    """Run a transaction again after transient failures, at most `ATTEMPTS` times."""
    for attempt in range(1, ATTEMPTS):
        try:
            return await once()
        except Transient:
            # Full jitter, so that the same transactions do not collide again.
            await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))
    return await once()
