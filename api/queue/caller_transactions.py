"""Publishes the events of a caller's own transaction when the caller commits it.

It uses only the session events of SQLAlchemy, so it works for `AsyncSession` and `Session`. Other
processes do not depend on it: their message is written in the transaction, and a rollback discards
it together with the jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

Publish = Callable[[Sequence[Any]], None]


def publish_after_commit(
    session: AsyncSession | Session,
    publish: Publish,
    events: Sequence[Any],
    *,
    joined: bool = False,
) -> None:
    """Call `publish` with these events once the session's current transaction is committed.

    Events of a savepoint are published when the outer transaction commits; a rollback of either
    discards them. A session may join a transaction that was begun on its connection. It does not
    commit that transaction, so nothing is published, and `Events.listening` delivers the events.
    With `joined`, its commit counts: tests often roll back all that the tested code commits.
    """
    target = session if isinstance(session, Session) else session.sync_session
    unpublished = target.info.get(_UNPUBLISHED)
    if not isinstance(unpublished, _Unpublished):
        unpublished = target.info[_UNPUBLISHED] = _Unpublished()
        event.listen(target, "after_commit", unpublished.committed)
        event.listen(target, "after_transaction_end", unpublished.ended)
    unpublished.add(target, _Entry(target.connection(), publish, tuple(events), joined))


def not_yet_published(session: AsyncSession | Session, publish: Publish) -> list[Any]:
    """Return the events of open transactions of this session that await a call of `publish`."""
    target = session if isinstance(session, Session) else session.sync_session
    unpublished = target.info.get(_UNPUBLISHED)
    return unpublished.of(publish) if isinstance(unpublished, _Unpublished) else []


class _Entry(NamedTuple):
    """Events, and the connection on which their jobs were inserted.

    `joined` says whether to publish them when the session has joined an outer transaction.
    """

    connection: Connection
    publish: Publish
    events: tuple[Any, ...]
    joined: bool


class _Unpublished:
    """The events of a session's open transactions, by savepoint."""

    def __init__(self) -> None:
        self._entries: dict[SessionTransaction, list[_Entry]] = {}

    def add(self, session: Session, entry: _Entry) -> None:
        transaction = _innermost(session)
        if transaction is not None:
            self._entries.setdefault(transaction, []).append(entry)

    def of(self, publish: Publish) -> list[Any]:
        """Return what awaits a call of `publish`."""
        return [
            each
            for entries in self._entries.values()
            for entry in entries
            if entry.publish == publish
            for each in entry.events
        ]

    def committed(self, session: Session) -> None:
        """Move the events of a released savepoint to its parent, or publish a transaction's."""
        transaction = _innermost(session)
        happened = self._entries.pop(transaction, []) if transaction is not None else []
        if transaction is None or not happened:
            return
        outer = _savepoint_or_root(transaction.parent)
        if outer is not None:
            self._entries.setdefault(outer, []).extend(happened)
        else:
            for connection, publish, events, joined in happened:
                if joined or not connection.in_transaction():
                    # An error after the commit must not look like an error of the commit.
                    with suppress(Exception):
                        publish(events)

    def ended(self, _session: Session, transaction: SessionTransaction) -> None:
        """Discard what was not committed: it was rolled back, or the session was closed."""
        self._entries.pop(transaction, None)


def _innermost(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


def _savepoint_or_root(transaction: SessionTransaction | None) -> SessionTransaction | None:
    """Skip the session's internal transactions, for example that of a flush."""
    while transaction is not None and not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction


_UNPUBLISHED: Final = "job_registry.unpublished"
"""The key in `Session.info` for the events of its transactions."""
