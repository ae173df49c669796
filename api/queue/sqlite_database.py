"""SQLite: its file, a pool of connections that read, and one thread that writes."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import quote, unquote

import sqlalchemy.exc
from sqlalchemy import FromClause, event
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from job_registry_api import defaults
from job_registry_api.queue.database import (
    HOUR_SECONDS,
    Database,
    Listener,
    read_json,
    seconds_of,
)
from job_registry_api.queue.driver_errors import as_unavailable
from job_registry_api.queue.errors import QueueUnavailable, UnavailableKind
from job_registry_api.queue.file_writes import FileWrites

SQLITE_POLL_SECONDS: Final = 0.1
"""How often `listen` checks SQLite for commits of other processes (`PRAGMA data_version`) where the
system does not notify it of writes."""

SQLITE_REST_SECONDS: Final = 0.02
"""How long `listen` waits after a commit before it looks for the next one, so that a busy database
is not read after each."""

_VISIBLE_SECONDS: Final = 0.001
_LONGEST_COMMIT_SECONDS: Final = 0.1
"""A commit is visible some time after its write: once the disk has it. It is looked for at growing
intervals between these."""

MAX_WAL_BYTES: Final = 4 * 1024 * 1024
"""SQLite truncates its write-ahead log to this size when it restarts the log."""

_Mode = Literal["ro", "rw", "rwc"]
"""How SQLite opens the file: to read, to write, or to create it as well."""

_PRAGMAS: Final = (
    "journal_mode=WAL",
    # A commit returns only after it has reached the disk.
    "synchronous=FULL",
    "foreign_keys=ON",
    f"journal_size_limit={MAX_WAL_BYTES}",
)
_READING: Final = ("query_only=ON",)

T = TypeVar("T")


def path_of(url: str) -> Path:
    """Return the path of the file in a URL: `sqlite:///jobs.db`."""
    return Path(unquote(url.partition(":///")[2]))


def anchored(url: str) -> str:
    """Return the URL with an absolute path. A program, or a handler, may change the folder of its
    process later, where the path would be another file."""
    return f"sqlite:///{quote(str(path_of(url).absolute()))}"


class SQLiteDatabase(Database):
    """A SQLite database, by its URL: `sqlite:///jobs.db`. `create` creates a missing file.
    `read_only` opens it so that nothing can be written.

    `ahead` returns how many seconds the clock of the queue is ahead of SQLite's. It is for tests.
    """

    name = "sqlite"
    migrates_at_start = True
    schema = None
    keeps_events = True
    notices_commits = True

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = defaults.POOL_SIZE,
        timeout_seconds: float | None = defaults.TIMEOUT_SECONDS,
        create: bool = False,
        read_only: bool = False,
        ahead: Callable[[], float] | None = None,
    ) -> None:
        self._ahead = ahead
        url = anchored(url)
        mode: _Mode = "ro" if read_only else "rwc" if create else "rw"
        self._file = _File(path_of(url), mode=mode, timeout_seconds=timeout_seconds)
        self._thread = _WriterThread(self._file)
        # SQLite has one writer at a time. Waiting for this lock is fair. Waiting in SQLite's busy
        # handler is not, so only writes of other processes are waited for there.
        self._writer = asyncio.Lock()
        engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=self._file.uri, query={"uri": "true"}),
            pool_size=pool_size,
            pool_timeout=min(seconds_of(timeout_seconds), HOUR_SECONDS),
            json_deserializer=read_json,
            connect_args={"timeout": self._file.busy_seconds, "isolation_level": None},
        )
        engine.dialect.statement_compiler = _Compiler
        event.listen(engine.sync_engine, "do_connect", self._file.check_access)
        event.listen(engine.sync_engine, "connect", self._file.prepare)
        event.listen(engine.sync_engine, "checkout", self._file.check_out)
        super().__init__(
            engine,
            pool_size=pool_size,
            timeout_seconds=timeout_seconds,
            opened_with={"url": url, "create": create, "read_only": read_only, "ahead": ahead},
        )

    @property
    def ahead_seconds(self) -> float:
        return 0.0 if self._ahead is None else self._ahead()

    @property
    def shift(self) -> str:
        """The modifier that turns the time of SQLite into the time of the queue."""
        return "+0 seconds" if self._ahead is None else f"+{self._ahead():.3f} seconds"

    async def write(
        self, work: Callable[[sqlite3.Connection], T], *, timeout_seconds: float | None = None
    ) -> T:
        """Run `work` in the thread of the writer between BEGIN IMMEDIATE and COMMIT.

        If the caller is cancelled, the transaction still completes: it is committed if `work`
        returns. `timeout_seconds` can shorten the timeout of the database.

        Raises:
            QueueUnavailable: another process has locked the database, it cannot be written (a full
                disk), or its file was deleted or replaced.
        """
        deadline = self._deadline(timeout_seconds)
        with self._counting(), self._file.unavailable():
            await self._acquire_writer(deadline)
            left = None if deadline is None else max(0.0, deadline - _now())
            try:
                future = self._thread.run(work, _busy(deadline))
            except BaseException:
                self._writer.release()
                raise
            future.add_done_callback(self._written)
            # Not `wait_for`, which would cancel the transaction.
            done, _ = await asyncio.wait({future}, timeout=left)
            if not done:
                raise QueueUnavailable(f"no commit within {left:.3g} seconds", "timeout")
            return future.result()

    def _written(self, future: asyncio.Future[Any]) -> None:
        self._writer.release()
        if not future.cancelled():
            future.exception()  # Mark it as retrieved: the caller may be gone.

    async def checkpoint(self) -> bool:
        with self._file.unavailable():
            return await asyncio.to_thread(self._file.checkpoint)

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """Do nothing: the transaction excludes every other writer."""

    async def listen(self, on_message: Listener, on_gap: Callable[[], None]) -> None:
        on_gap()
        last = None
        while True:
            try:
                # On the event loop on purpose: the pragma reads a counter in shared memory in a few
                # microseconds, and a thread's round trip takes a hundred.
                with closing(self._file.connect()) as connection, self._file.writes() as writes:
                    opened = self._file.opened()
                    soon = 0.0
                    while True:
                        self._file.check(opened)
                        version = connection.execute("PRAGMA data_version").fetchone()
                        if version != last:
                            last, soon = version, 0.0
                            on_gap()
                            await asyncio.sleep(SQLITE_REST_SECONDS)
                        elif soon:
                            await asyncio.sleep(soon)
                            soon = soon * 2 if soon < _LONGEST_COMMIT_SECONDS else 0.0
                        elif await writes.next(SQLITE_POLL_SECONDS):
                            soon = _VISIBLE_SECONDS
            except (sqlite3.Error, QueueUnavailable):
                last = None
                await asyncio.sleep(1.0)

    async def close(self) -> None:
        """End all connections after the current write."""
        await super().close()
        await self._thread.close()

    @asynccontextmanager
    async def _read(
        self, deadline: float | None, *, in_order: bool
    ) -> AsyncIterator[AsyncConnection]:
        with self._file.unavailable():
            # Before it is opened: the thread of a connection that fails to open may outlive the
            # event loop that it reports to.
            self._file.identity()
            # Without an isolation level: to set it is a round trip to the connection's thread.
            async with self._from_pool(self.engine, deadline) as connection:
                yield connection

    async def _acquire(self, engine: AsyncEngine) -> AsyncConnection:
        """Open a connection, also for a caller who is cancelled: nobody would close half of one."""
        connecting = asyncio.ensure_future(_awaited(engine.connect()))
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            self._in_background(_close_unused(connecting))
            raise

    @asynccontextmanager
    async def _begin(self, deadline: float | None) -> AsyncIterator[AsyncConnection]:
        # For migrations: alembic needs a connection of SQLAlchemy. The queue uses `write`.
        with self._file.unavailable():
            self._file.identity()
            await self._acquire_writer(deadline)
            try:
                async with self._from_pool(self._autocommit, deadline) as connection:
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
                    self._file.check(raw.info["opened"])
            finally:
                self._writer.release()

    async def _acquire_writer(self, deadline: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._writer.acquire()
        except TimeoutError as error:
            reason = f"the database was busy for {self.timeout_seconds:g} seconds"
            raise QueueUnavailable(reason, "timeout") from error

    def _connecting_failed(self, error: Exception, seconds: float) -> QueueUnavailable:
        try:
            self._file.identity()
        except QueueUnavailable as missing:
            # The error of SQLite says only that it cannot open the file.
            return missing
        return self._file.naming(super()._connecting_failed(error, seconds))


class _Compiler(SQLiteCompiler):
    """SQLAlchemy's compiler for SQLite, with hints: `INDEXED BY` after the name of a table."""

    def get_from_hint_text(self, table: FromClause, text: str | None) -> str | None:
        return text


_OF_THE_FILE: Final = frozenset({"unreachable", "disk_full", "read_only"})
"""The kinds of errors that depend on the file, its disk or its mode."""


class _Identity(NamedTuple):
    """The identity of a file, independent of its name."""

    device: int
    inode: int


class _Opened(NamedTuple):
    """The files that a connection has opened: the database, and its log and index by their paths.

    As long as a connection is open, SQLite deletes neither the log nor the index.
    """

    file: _Identity
    beside: tuple[tuple[Path, _Identity], ...]


class _File:
    """The file of a SQLite database, and the check that it was not deleted or replaced, nor the log
    and the index beside it.

    A deleted file stays writable for processes that have it open, and what they write is lost.
    """

    def __init__(self, path: Path, *, mode: _Mode, timeout_seconds: float | None) -> None:
        self._path = path
        # `rwc` is for migrations. Otherwise a missing file must not be created empty.
        self.uri = f"file:{quote(str(path))}?mode={mode}"
        self._pragmas = _READING if mode == "ro" else _PRAGMAS
        self.written: _Opened | None = None
        """The files of the writer, while it is open."""
        if mode == "rwc":
            # For its owner only, whatever the umask: it holds payloads. SQLite gives its log and
            # its index the mode of the file.
            with suppress(OSError):  # It exists, or SQLite will say what is wrong.
                os.close(os.open(self._target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self.busy_seconds = 0.9 * min(seconds_of(timeout_seconds), HOUR_SECONDS)

    def connect(self) -> sqlite3.Connection:
        self.check_access()
        connection = sqlite3.connect(
            self.uri, uri=True, timeout=self.busy_seconds, isolation_level=None
        )
        try:
            self._set_pragmas(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def writes(self) -> Iterator[FileWrites]:
        """Notice writes to the log of the file, which precede each commit."""
        writes = FileWrites(f"{self._target}-wal")
        try:
            yield writes
        finally:
            writes.close()

    def identity(self) -> _Identity:
        """Return the identity of the file at this path.

        Raises:
            QueueUnavailable: the file does not exist, or this process may not search its folder.
        """
        try:
            found = self._path.stat()
        except PermissionError as error:
            raise self._fault(str(error.strerror), "permission_denied") from error
        except OSError as error:
            if self._folder.is_dir():
                raise self._fault(str(error.strerror), "file_missing") from error
            reason = f"there is no folder {self._folder}"
            raise self._fault(reason, "unreachable") from error
        return _Identity(found.st_dev, found.st_ino)

    def check_access(self, *_connecting: object) -> None:
        """Check that this process may write to the file, and to the log and the index beside it. To
        read, it has to be allowed to read them.

        SQLite opens a file that it may not write to for reading. The connection, and all later ones
        of the process, then stay read-only when the file becomes writable.

        Raises:
            QueueUnavailable: it may not, the file is mounted without them, or the log of the writer
                was deleted.
        """
        if self.written is not None and self.identity() == self.written.file:
            # A new connection would create another log.
            self.check(self.written)
        reads = self._pragmas is _READING
        what, right = ("read", os.R_OK) if reads else ("write to", os.R_OK | os.W_OK)
        creates = False
        target = self._target
        for path in (target, *_beside(target)):
            try:
                mode = path.stat().st_mode
            except OSError:
                creates = not reads
                continue
            if stat.S_ISDIR(mode):
                raise self._fault(os.strerror(errno.EISDIR), "unreachable")
            # Another process, the last one to close the file, may have deleted what is beside it.
            if not _may(path, right) and _may(path, os.F_OK):
                if not reads and _is_mounted_read_only(path):
                    raise self._fault("its file system is mounted read-only", "read_only")
                reason = f"this process may not {what} {path.name} (mode {stat.S_IMODE(mode):04o})"
                raise self._fault(reason, "permission_denied" if reads else "read_only")
        if not reads and _is_mounted_by_itself(target):
            reason = (
                "it is mounted by itself, so the log beside it, which has the latest jobs, is lost"
                " with the container. Mount its folder instead"
            )
            raise self._fault(reason, "unreachable")
        if creates and not _may(self._folder, os.W_OK | os.X_OK):
            reason = f"this process may not create files beside it, in {self._folder}"
            raise self._fault(reason, "read_only")

    @contextmanager
    def unavailable(self) -> Iterator[None]:
        """Turn the errors of an unavailable, full or busy file into `QueueUnavailable`."""
        try:
            yield
        except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error) as error:
            if (as_error := as_unavailable(error)) is not None:
                raise self.naming(as_error) from error
            raise

    def naming(self, error: QueueUnavailable) -> QueueUnavailable:
        """Return an error of SQLite with the path of the file, which SQLite's messages lack."""
        return self._fault(error.reason, error.kind) if error.kind in _OF_THE_FILE else error

    def _fault(self, reason: str, kind: UnavailableKind) -> QueueUnavailable:
        return QueueUnavailable(f"the database's file {self._path}: {reason}", kind)

    @property
    def _target(self) -> Path:
        """The file itself, if the path is a symbolic link: its log and its index are beside it."""
        return Path(os.path.realpath(self._path))

    @property
    def _folder(self) -> Path:
        return self._target.parent

    def opened(self, file: _Identity | None = None) -> _Opened:
        """Return the files of a connection that was just opened, to `file` if that is known.

        One that only reads has not opened the log yet. The last process that writes may delete it
        until then.
        """
        identity = file or self.identity()
        if self._pragmas is _READING:
            return _Opened(identity, ())
        beside = ((path, _identity(path)) for path in _beside(self._target))
        return _Opened(identity, tuple((path, found) for path, found in beside if found))

    def check(self, opened: _Opened) -> None:
        """Check that the opened files are still those at their paths.

        Raises:
            QueueUnavailable: one was deleted or replaced.
        """
        self.check_file(opened)
        self.check_log(opened)

    def check_file(self, opened: _Opened) -> None:
        """Check that the opened database is still the file at this path.

        Raises:
            QueueUnavailable: it was deleted or replaced.
        """
        if self.identity() != opened.file:
            raise self._fault("it was replaced", "file_missing")

    def check_log(self, opened: _Opened) -> None:
        """Check that the opened log and its index are still those beside the file.

        If not, connections have to stay open, because the last one to close stores the log in the
        file. New ones would use another log, or other locks than those of other processes.

        Raises:
            QueueUnavailable: one was deleted or replaced.
        """
        for path, identity in opened.beside:
            if _identity(path) != identity:
                reason = (
                    f"{path.name} was deleted or replaced while processes used it."
                    " Nothing is stored until all processes have ended and are started again."
                )
                raise self._fault(reason, "file_missing")

    def prepare(self, dbapi_connection: Any, record: Any) -> None:
        """Set up a connection of the pool."""
        identity = self.identity()
        self._set_pragmas(dbapi_connection)
        record.info["opened"] = self.opened(identity)

    def check_out(self, _dbapi_connection: Any, record: Any, _proxy: Any) -> None:
        """Make the pool replace a connection whose file was deleted or replaced.

        Raises:
            QueueUnavailable: only the log or its index was deleted or replaced.
        """
        opened = record.info["opened"]
        try:
            self.check_file(opened)
        except QueueUnavailable as error:
            raise sqlalchemy.exc.DisconnectionError from error
        self.check_log(opened)

    def checkpoint(self) -> bool:
        with closing(self.connect()) as connection:
            connection.execute("PRAGMA busy_timeout = 0")
            # PASSIVE copies without locks. TRUNCATE, which locks, then has only the end of the log
            # left to copy.
            _, pages, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if pages != copied:
                return False
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy

    def _set_pragmas(self, connection: Any) -> None:
        cursor = connection.cursor()
        for pragma in self._pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


class _WriterThread:
    """The writer: a connection and the thread that uses it, one transaction at a time."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self._executor = _one_thread()
        self._opened: tuple[sqlite3.Connection, _Opened] | None = None
        self._closed = False

    def run(self, work: Callable[[sqlite3.Connection], T], busy: int) -> asyncio.Future[T]:
        """Start a transaction of `work`. It waits up to `busy` milliseconds for other processes.

        Raises:
            QueueUnavailable: the system starts no thread, because the process has its limit of them
                or of memory.
        """
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self._executor, self._commit, work, busy)
        except RuntimeError as error:
            if self._closed:
                raise
            # The executor has kept the transaction, and would commit it once it has a thread, long
            # after its caller got this error.
            self._executor = _one_thread()
            raise QueueUnavailable(f"no thread for its writes: {error}") from error

    async def close(self) -> None:
        """End the thread after the current transaction."""
        self._closed = True
        with suppress(RuntimeError):  # There is no thread, and so no connection.
            await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown()

    def _commit(self, work: Callable[[sqlite3.Connection], T], busy: int) -> T:
        connection, opened = self._connection()
        connection.execute(f"PRAGMA busy_timeout = {busy}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        # If the file, or its log, was deleted in the meantime, the commit is lost.
        self._file.check(opened)
        return result

    def _connection(self) -> tuple[sqlite3.Connection, _Opened]:
        if self._opened is not None:
            try:
                self._file.check_file(self._opened[1])
            except QueueUnavailable:
                self._close()
        if self._opened is not None:
            self._file.check_log(self._opened[1])
        else:
            identity = self._file.identity() if "mode=rwc" not in self._file.uri else None
            connection = self._file.connect()
            # The table has triggers, so SQLite keeps a journal of each statement, and writes it to
            # a temporary file otherwise.
            connection.execute("PRAGMA temp_store = MEMORY")
            self._file.written = self._file.opened(identity)
            self._opened = connection, self._file.written
        return self._opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened[0].close()
            self._opened = self._file.written = None


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="sqlite-writer")


def _beside(target: Path) -> tuple[Path, Path]:
    """Return the paths of the log of a database and of the index of the log."""
    return target.with_name(f"{target.name}-wal"), target.with_name(f"{target.name}-shm")


def _identity(path: Path) -> _Identity | None:
    """Return the identity of a file, or None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _Identity(found.st_dev, found.st_ino)


def _may(path: Path, mode: int) -> bool:
    """As `os.access`, but of the user as whom the process acts."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _is_mounted_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:  # Another process has just deleted it.
        return False


def _is_mounted_by_itself(path: Path) -> bool:
    """Return whether this file is a mount point, as with `docker run --volume ./jobs.db:/jobs.db`.

    `os.path.ismount` does not see a bind mount of a file of the same disk.
    """
    try:
        mounts = _MOUNTS.read_bytes().split(b"\n")
    except OSError:  # Not Linux, or without /proc.
        return False
    # proc(5): the fifth field, with spaces and the like as octal numbers. A carriage return stays,
    # so not `splitlines`.
    written = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path))
    return any(line.split(b" ")[4:5] == [written] for line in mounts)


_MOUNTS: Final = Path("/proc/self/mountinfo")


async def _awaited(connecting: AsyncConnection) -> AsyncConnection:
    return await connecting


async def _close_unused(connecting: asyncio.Future[AsyncConnection]) -> None:
    """Return the connection to the pool once it is open."""
    with suppress(Exception):
        await (await connecting).close()


def _busy(deadline: float | None) -> int:
    """Return how many milliseconds to wait for writes of other processes.

    It is slightly less than the time left, so that SQLite fails first and commits nothing after the
    caller got an error.
    """
    if deadline is None:
        return int(HOUR_SECONDS * 1_000)
    return max(0, int(900 * (deadline - _now())))


def _now() -> float:
    return asyncio.get_running_loop().time()
