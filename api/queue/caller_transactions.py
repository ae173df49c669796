"""Publishes the events of a caller's own transaction if and when the caller commits it.

Only what the caller's SQLAlchemy session reports is used, so it serves `AsyncSession` and
`Session` alike. Events that other processes hear are announced inside the transaction and need
none of this: a rollback takes them back together with the jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from api.queue.events import JobEvent

Publish = Callable[[Sequence[JobEvent]], None]


def publish_after_commit(
    session: AsyncSession | Session, publish: Publish, events: Sequence[JobEvent]
) -> None:
    """Calls `publish` with these events once the session's present transaction is committed.

    In a savepoint they wait for the commit of the transaction around it, and a rollback to the
    savepoint forgets them. A session that joins a transaction somebody else began on its
    connection does not commit it, so its events are left to `Events.hearing`.
    """
    target = session if isinstance(session, Session) else session.sync_session
    unpublished = target.info.get(_UNPUBLISHED)
    if not isinstance(unpublished, _Unpublished):
        unpublished = target.info[_UNPUBLISHED] = _Unpublished()
        event.listen(target, "after_commit", unpublished.committed)
        event.listen(target, "after_transaction_end", unpublished.ended)
    unpublished.add(target, publish, events)


class _Unpublished:
    """The events of a session's open transactions, by the savepoint they were made in."""

    def __init__(self) -> None:
        self._events: dict[SessionTransaction, list[tuple[Publish, Sequence[JobEvent]]]] = {}

    def add(self, session: Session, publish: Publish, events: Sequence[JobEvent]) -> None:
        transaction = _innermost(session)
        if transaction is not None:
            self._events.setdefault(transaction, []).append((publish, tuple(events)))

    def committed(self, session: Session) -> None:
        """A savepoint was released, or the transaction itself is committed."""
        transaction = _innermost(session)
        happened = self._events.pop(transaction, []) if transaction is not None else []
        if transaction is None or not happened:
            return
        outer = _savepoint_or_root(transaction.parent)
        if outer is not None:
            self._events.setdefault(outer, []).extend(happened)
        elif not any(connection.in_transaction() for connection in transaction.connections):
            for publish, events in happened:
                # After the commit: an error here must not look like one of the commit.
                with suppress(Exception):
                    publish(events)

    def ended(self, _session: Session, transaction: SessionTransaction) -> None:
        """Forgets what was not committed: it was rolled back, or the session was closed."""
        self._events.pop(transaction, None)


def _innermost(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


def _savepoint_or_root(transaction: SessionTransaction | None) -> SessionTransaction | None:
    """Passes over the session's internal markers, such as that of a flush."""
    while transaction is not None and not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction


_UNPUBLISHED: Final = "job_registry.unpublished"
"""Where a caller's session keeps the events of its transactions."""
