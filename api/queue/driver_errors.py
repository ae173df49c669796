"""Which errors of the databases' drivers mean that the queue is unavailable."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import asyncpg
import sqlalchemy.exc

from job_registry_api.queue.errors import QueueUnavailable, UnavailableKind

_POOLER: Final = "If the URL leads through PgBouncer, set JOBS_DATABASE_POOLER=transaction."

_STATEMENT_POOLING: Final = (
    "The queue needs transactions. Set pool_mode to transaction or session in PgBouncer."
)

GRANT: Final = "The role lacks a grant: `job-registry migrate --grants ROLE` prints those it needs."


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


def as_unavailable(error: BaseException | None) -> QueueUnavailable | None:
    """Return the `QueueUnavailable` for an error, or None if the statement is at fault, for example
    because it violates a constraint."""
    if _is_ending(error):
        return Transient("the server has ended the connection")
    match error:
        case QueueUnavailable():
            return error
        case sqlite3.Error():
            return _sqlite_unavailable(error)
        case sqlalchemy.exc.DBAPIError():
            if isinstance(error.orig, sqlite3.Error):
                return _sqlite_unavailable(error.orig)
            if error.connection_invalidated:
                return QueueUnavailable(advised(_first_line(error.orig)))
            return _postgresql_unavailable(error.orig)
        case asyncpg.PostgresError() | asyncpg.InterfaceError() | asyncpg.InternalClientError():
            return _postgresql_unavailable(error)
        case OSError() | sqlalchemy.exc.TimeoutError():
            return QueueUnavailable(_first_line(error))
    return None


_MIGRATE: Final = "Run `job-registry migrate`."

_READ_ONLY: Final = "The server is a standby, or set to default_transaction_read_only."

_NOTIFY_QUEUE: Final = (
    "A session that listens for notifications, in any database of the server, has a transaction"
    " open for long. SELECT pg_notification_queue_usage() shows how full the queue is, and the"
    " server's log names the session."
)


def _postgresql_unavailable(error: BaseException | None) -> QueueUnavailable | None:
    """Classify an error by https://www.postgresql.org/docs/current/errcodes-appendix.html."""
    state = getattr(error, "sqlstate", None) or ""
    reason = advised(_first_line(error))
    if state in _PREPARED:
        return QueueUnavailable(f"{reason}. {_POOLER}")
    if state in _TRANSIENT or _is_stale_plan(error) or _is_of_former_columns(error):
        return Transient(f"{reason} ({state})", "busy")
    if _is_raised_by(error, asyncpg.ProgramLimitExceededError, "PreCommit_Notify"):
        return QueueUnavailable(f"{reason}. {_NOTIFY_QUEUE}", "notify_queue_full")
    kind = kind_of(error)
    match kind:
        case "schema_outdated":
            return QueueUnavailable(f"{reason}. {_MIGRATE}", kind)
        case "permission_denied":
            return QueueUnavailable(f"{reason}. {GRANT}", kind)
        case "read_only":
            return QueueUnavailable(f"{reason}. {_READ_ONLY}", kind)
    if state in _OUTAGES or state[:2] in _OUTAGES or _is_lost(error):
        return QueueUnavailable(f"{reason} ({state})" if state else reason, kind)
    return None


_TRANSIENT: Final = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock."""

_PREPARED: Final = frozenset({"26000", "42P05"})
"""A prepared statement is missing or already there: the session is not the one before."""

_OUTAGES: Final = frozenset(
    {
        "08",  # connection
        "53",  # resources: 53100 disk full, 53300 too many connections
        "57",  # operator: 57014 statement_timeout, 57P01 shutdown
        "58",  # system error of the server
        "25P02",  # the transaction has already failed
        "25P03",  # idle_in_transaction_session_timeout
        "25P04",  # transaction_timeout
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
    "25P04": "timeout",
}


def kind_of(error: BaseException | None) -> UnavailableKind:
    return _KINDS.get(getattr(error, "sqlstate", None) or "", "unreachable")


def _is_stale_plan(error: BaseException | None) -> bool:
    """Return whether a migration changed the columns of a prepared statement."""
    return any(isinstance(each, asyncpg.InvalidCachedStatementError) for each in _causes(error))


def _is_of_former_columns(error: BaseException | None) -> bool:
    """Return whether the columns of a table changed while a function of the queue ran.

    It returns rows of the table, and has begun with other columns than the table has now.
    """
    return _is_raised_by(error, asyncpg.DatatypeMismatchError, "build_attrmap_by_position")


def _is_raised_by(
    error: BaseException | None, kind: type[asyncpg.PostgresError], function: str
) -> bool:
    """Return whether a function of the server has raised the error.

    The SQLSTATE is that of many errors. The message may be translated, but not the name of the
    function.
    """
    return any(
        isinstance(each, kind) and getattr(each, "server_source_function", None) == function
        for each in _causes(error)
    )


def _is_ending(error: BaseException | None) -> bool:
    """Return whether the driver has not sent a statement, because the server has announced the end
    of the connection. The driver is then in state 2."""
    return any(
        isinstance(each, asyncpg.InternalClientError) and "operation (2)" in str(each)
        for each in _causes(error)
    )


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
    if code == sqlite3.SQLITE_IOERR_SHMSIZE:
        # The first connection had no room for the index of the log, and SQLite does not say why.
        return QueueUnavailable("database or disk is full", "disk_full")
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


def connecting_failed_by(error: Exception | None) -> str:
    """Return a readable message for an error while connecting.

    Messages of asyncio quote Python values: `[Errno 111] Connect call failed ('::1', 5432, 0, 0)`,
    one for each address.
    """
    if not isinstance(error, socket.gaierror) and isinstance(error, OSError):
        number = error.errno or next(iter(re.findall(r"\[Errno (\d+)\]", str(error))), None)
        if number is not None:
            return os.strerror(int(number))
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def advised(reason: str) -> str:
    """Add to an error of PgBouncer what to do."""
    if "unsupported startup parameter" in reason:
        return f"{reason}. {_POOLER}"
    if "statement pooling mode" in reason:
        return f"{reason}. {_STATEMENT_POOLING}"
    return reason


def _first_line(error: BaseException | None) -> str:
    # SQLAlchemy's adapter puts the class of the driver's error before the message.
    lines = re.sub(r"^<class '[^']*'>: ", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


class Transient(QueueUnavailable):
    """Raised when PostgreSQL aborts a transaction that may succeed when it runs again, or ends a
    connection before a statement was sent."""
