"""Job events, published after commit: as log lines, to workers that wait, to other processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from api.queue.database import Database
from api.queue.models import JobRecord, JobStatus

EventName = Literal[
    "job.created",
    "job.started",
    "job.progressed",
    "job.succeeded",
    "job.retrying",
    "job.failed",
    "job.cancelled",
]

MAX_MESSAGE_BYTES: Final = 7_900
"""A PostgreSQL notification holds less than 8,000 bytes."""

log = structlog.get_logger("jobs.events")


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job and is committed. `status` is the one it has since."""

    name: EventName
    job_id: UUID
    type: str
    status: JobStatus
    attempt: int

    @classmethod
    def of(cls, name: EventName, job: JobRecord) -> JobEvent:
        """The event `name` of a job as it stands after it."""
        return cls(name, job.id, job.type, job.status, job.attempt)


class Events:
    """One process's view of what happens to jobs.

    `announce` goes inside the transaction and `publish` after its commit. `run` hears the other
    processes; without it, a worker notices their jobs only when it looks.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._process = secrets.token_hex(8)
        self._waiting: dict[asyncio.Event, frozenset[str]] = {}

    async def announce(self, connection: AsyncConnection, events: Sequence[JobEvent]) -> None:
        """Tells the other processes, in one notification, if this transaction commits."""
        if events and self._database.dialect.name == "postgresql":
            await self._database.notify(connection, self._message(events))

    def publish(self, events: Iterable[JobEvent]) -> None:
        """Says what was committed: a log line each, and a nudge to who waits in this process."""
        for event in events:
            log.info(
                event.name,
                job_id=str(event.job_id),
                type=event.type,
                status=event.status.value,
                attempt=event.attempt,
            )
            self._wake(event.type)

    @asynccontextmanager
    async def waiting_for(self, types: Iterable[str]) -> AsyncIterator[asyncio.Event]:
        """An `asyncio.Event` that is set when something happens to a job of these types.

        Clear it before looking at the queue, not after: what comes in between is then kept.
        """
        woken = asyncio.Event()
        self._waiting[woken] = frozenset(types)
        try:
            yield woken
        finally:
            del self._waiting[woken]

    async def run(self) -> None:
        """Hears what other processes announce, until cancelled."""
        await self._database.listen(self._heard, self._wake_all)

    def _message(self, events: Sequence[JobEvent]) -> str:
        types = sorted({event.type for event in events})
        message = json.dumps({"process": self._process, "types": types}, separators=(",", ":"))
        if len(message) > MAX_MESSAGE_BYTES:
            return json.dumps({"process": self._process, "types": None})
        return message

    def _heard(self, message: str) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            heard = json.loads(message)
            if heard["process"] == self._process:
                return
            if heard["types"] is None:
                self._wake_all()
            else:
                for job_type in heard["types"]:
                    self._wake(job_type)

    def _wake(self, job_type: str) -> None:
        for woken, types in self._waiting.items():
            if job_type in types:
                woken.set()

    def _wake_all(self) -> None:
        for woken in self._waiting:
            woken.set()
