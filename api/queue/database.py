"""`Database`, what the queue needs of a database, and what the two databases share.

`sqlite_database.py` and `postgresql_database.py` implement it, and `databases.py` opens one by its
URL. The operations of the queue are in `store.py`.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import lru_cache
from typing import Any, ClassVar, Final, Literal, Self, TypeVar

import sqlalchemy.exc
import structlog
from pydantic import JsonValue
from pydantic_core import from_json, to_json
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from job_registry_api.queue.driver_errors import as_unavailable
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.group_commit import GroupCommit

POLL_SECONDS: Final = 0.5
"""How often `listen` reports a gap where PostgreSQL's notifications cannot reach this process."""

Listener = Callable[[str], None]
Pooler = Literal["session", "transaction"]

LOCKED_PAUSE_SECONDS: Final = 0.02
"""How long to wait before trying a locked row again. The pause doubles up to half a second."""

T = TypeVar("T")
Item = TypeVar("Item")

log = structlog.get_logger("job_registry.database")


class Database(ABC):
    """One database: its connections, transactions and deadlines.

    It connects lazily; `close` ends its connections. It belongs to the event loop that first uses
    it.

    A call without an answer within `timeout_seconds` raises `QueueUnavailable`, and its connection
    is dropped without waiting for the network. None means no timeout; migrations use it.
    """

    name: ClassVar[Literal["sqlite", "postgresql"]]
    """Which database it is, for tests and measurements. The queue uses the properties below."""

    migrates_at_start: ClassVar[bool]
    """Whether `serve` and `worker` migrate it: SQLite, whose file is on this machine."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        pool_size: int,
        timeout_seconds: float | None,
        opened_with: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.on_unavailable: Callable[[QueueUnavailable], None] = lambda error: None
        """Called when an operation raises `QueueUnavailable`."""
        self._timeout = timeout_seconds
        self._pool_size = pool_size
        self._opened_with = opened_with | {"timeout_seconds": timeout_seconds}
        self._is_closed = False
        self._background: set[asyncio.Task[None]] = set()
        """Connections that return to the pool while nobody waits for it."""
        self._places = asyncio.Semaphore(pool_size)
        """One for each connection. Who waits for a place gets it in turn. The pool itself gives a
        connection to whoever asks first when it returns, so that busy callers starve others."""
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")

    def for_another_loop(self, *, pool_size: int | None = None) -> Self:
        """Return the same database for another event loop, with its own connections: by default, as
        many as this one has."""
        return type(self)(**self._opened_with, pool_size=pool_size or self._pool_size)

    @property
    @abstractmethod
    def schema(self) -> str | None:
        """The schema of the tables. None on SQLite, which has no schemas."""

    @property
    def ahead_seconds(self) -> float:
        """How far the clock of the database has been advanced, which only tests do."""
        return 0.0

    @property
    @abstractmethod
    def keeps_events(self) -> bool:
        """Whether other processes read events from `job_event_batch`: on SQLite, and on PostgreSQL
        without notifications."""

    @property
    @abstractmethod
    def notices_commits(self) -> bool:
        """Whether `listen` detects each commit of another process, in the order of ids in
        `job_event_batch`, which then have no gaps: on SQLite, which has one writer."""

    @property
    def timeout_seconds(self) -> float:
        """How long a call may wait for the database. Infinite without a timeout."""
        return seconds_of(self._timeout)

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
                the transaction because of a deadlock.
        """
        with self._counting():
            async with self._begin(self._deadline(timeout_seconds)) as connection:
                yield connection

    @asynccontextmanager
    async def reading(self, *, in_order: bool = False) -> AsyncIterator[AsyncConnection]:
        """Open a connection on which each statement is a transaction with its own deadline.

        Behind a pooler the whole block is one READ COMMITTED transaction with one deadline. So it
        is on PostgreSQL for statements that read the first rows of an index `in_order`: otherwise
        it reads and sorts all of them wherever it expects few.

        Raises:
            QueueUnavailable: the database does not answer.
        """
        with self._counting():
            async with self._read(self._deadline(), in_order=in_order) as connection:
                yield connection

    @abstractmethod
    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """Exclude other migrations until the end of the transaction."""

    async def execute_alone(self, sql: str) -> None:
        """Run a statement that cannot be part of a transaction, also behind a pooler.

        Raises:
            QueueUnavailable: the database does not answer.
        """
        async with self.reading() as connection:
            await connection.exec_driver_sql(sql)

    async def patiently(self, attempt: Callable[[], Awaitable[T | None]], locked: str) -> T:
        """Call `attempt` until it does not return None, which means that something is locked.

        No connection is held between the calls. `locked` is the reason in the error.

        Raises:
            QueueUnavailable: it is still locked at the end of the database's timeout.
        """

        async def attempt_until(time: float) -> T | None:
            async with asyncio.timeout_at(None if math.isinf(time) else time):
                return await attempt()

        return await self._patiently(attempt_until, locked)

    async def patiently_in(self, group: GroupCommit[Item, T | None], item: Item, locked: str) -> T:
        """Submit an item to a group until its result is not None, as `patiently` does."""
        return await self._patiently(lambda time: group.submit(item, until=time), locked)

    async def _patiently(self, attempt: Callable[[float], Awaitable[T | None]], locked: str) -> T:
        """Call `attempt` with the time of the event loop at which it ends with a TimeoutError."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + self.timeout_seconds
        pause = LOCKED_PAUSE_SECONDS
        try:
            while (outcome := await attempt(give_up)) is None:
                if clock() + pause > give_up:
                    raise QueueUnavailable(locked, "busy")
                await asyncio.sleep(pause)
                pause = min(0.5, pause * 2)
        except TimeoutError as error:
            reason = f"no answer within {self.timeout_seconds:g} seconds"
            raise QueueUnavailable(reason, "timeout") from error
        return outcome

    async def checkpoint(self) -> bool:
        """SQLite: copy the write-ahead log into the database and truncate it, unless it is being
        read. Return whether that succeeded. Writers never wait for it.

        Raises:
            QueueUnavailable: the database's files cannot be read or written.
        """
        return True

    @abstractmethod
    async def listen(self, on_message: Listener, on_gap: Callable[[], None]) -> None:
        """Call `on_message` with the notifications of PostgreSQL, until cancelled.

        `on_gap` is called when messages may have been missed: at the start, after a lost
        connection and, if events are stored in the table (`keeps_events`), when there may be new
        ones.
        """

    async def close(self) -> None:
        """End all connections, including those in use. Takes at most two seconds."""
        self._is_closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                if self._background:
                    await asyncio.wait(self._background, timeout=1)
                await self.engine.dispose()

    @abstractmethod
    def _begin(self, deadline: float | None) -> AbstractAsyncContextManager[AsyncConnection]:
        """See `transaction`."""

    @abstractmethod
    def _read(
        self, deadline: float | None, *, in_order: bool
    ) -> AbstractAsyncContextManager[AsyncConnection]:
        """See `reading`."""

    @asynccontextmanager
    async def _from_pool(
        self, engine: AsyncEngine, deadline: float | None
    ) -> AsyncIterator[AsyncConnection]:
        """Open a connection of the pool."""
        began = asyncio.get_running_loop().time()
        await self._take_place(deadline)
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    connection = await self._acquire(engine)
            except QueueUnavailable:
                raise
            except Exception as error:
                waited = self.timeout_seconds if deadline is None else deadline - began
                raise self._connecting_failed(error, waited) from error
            try:
                yield connection
            finally:
                # In a separate task, so that the connection of a cancelled caller is returned.
                await asyncio.shield(self._in_background(self._give_back(connection)))
        finally:
            self._places.release()

    async def _give_back(self, connection: AsyncConnection) -> None:
        if self._is_closed:
            # The pool has been disposed of, and would leave it open.
            await connection.invalidate()
        await connection.close()

    async def _take_place(self, deadline: float | None) -> None:
        """Wait until a connection may be taken."""
        try:
            # A timer takes longer than a place that is free.
            async with asyncio.timeout_at(deadline if self._places.locked() else None):
                await self._places.acquire()
        except TimeoutError as error:
            raise self._all_in_use() from error

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _acquire(self, engine: AsyncEngine) -> AsyncConnection:
        return await engine.connect()

    def _connecting_failed(self, error: Exception, seconds: float) -> QueueUnavailable:
        match error:
            case sqlalchemy.exc.TimeoutError():
                return self._all_in_use()
            case TimeoutError():
                return QueueUnavailable(
                    f"no connection to the database within {round(seconds, 1):g} seconds", "timeout"
                )
        return as_unavailable(error) or QueueUnavailable(str(error) or type(error).__name__)

    def _all_in_use(self) -> QueueUnavailable:
        reason = f"all {self._pool_size} connections (JOBS_DATABASE_POOL_SIZE) are in use"
        return QueueUnavailable(reason, "timeout")

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except QueueUnavailable as error:
            self.on_unavailable(error)
            raise

    def _deadline(self, timeout_seconds: float | None = None) -> float | None:
        seconds = min(self.timeout_seconds, seconds_of(timeout_seconds))
        return None if math.isinf(seconds) else asyncio.get_running_loop().time() + seconds


HOUR_SECONDS: Final = 3_600.0


def seconds_of(timeout: float | None) -> float:
    """Return a timeout as a number. No timeout is infinite."""
    return math.inf if timeout is None else timeout


def quoted(name: str) -> str:
    """Return a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def read_json(value: str | bytes) -> JsonValue:
    """Parse the JSON text of a column into the value that the caller sent.

    JSONB of PostgreSQL returns 1e300 as a 1 with 300 zeros. The registry refuses integers over 64
    bits, so a larger integer in the text was a float, and is converted back.
    """
    parsed: JsonValue = from_json(value)
    return _floats(parsed) if _may_have_long_integer(value) else parsed


def stored_text(value: str) -> str | bytes:
    """Return the JSON text of a column with the numbers as the caller sent them."""
    return to_json(read_json(value)) if _may_have_long_integer(value) else value


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


def _may_have_long_integer(value: str | bytes) -> bool:
    """Return whether a JSON text has 19 digits in a row. A regular expression takes longer than to
    parse the text."""
    text = value if isinstance(value, bytes) else value.encode()
    return _LONG_INTEGER in text.translate(_DIGITS)


_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG_INTEGER: Final = b"0" * 19


@lru_cache(maxsize=512)
def statement(template: str) -> TextClause:
    """Return the parsed statement of a text, from a cache."""
    return text(template)
