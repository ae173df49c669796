"""Job events: announced in the transaction, published after its commit.

They become log lines, wake workers that wait for jobs, and reach subscribers in every process.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, cast, get_args
from uuid import UUID

import structlog
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncConnection

from api.metrics import Metrics
from api.queue.database import Database
from api.queue.errors import EventsMissed, QueueUnavailable
from api.queue.models import JobRecord, JobStatus
from api.queue.store import JobStore

EventName = Literal[
    "job.created",
    "job.started",
    "job.progressed",
    "job.succeeded",
    "job.retrying",
    "job.failed",
    "job.cancelled",
]

STATUS_AFTER: Final[dict[EventName, JobStatus]] = {
    "job.created": JobStatus.QUEUED,
    "job.started": JobStatus.RUNNING,
    "job.progressed": JobStatus.RUNNING,
    "job.succeeded": JobStatus.SUCCEEDED,
    "job.retrying": JobStatus.QUEUED,
    "job.failed": JobStatus.FAILED,
    "job.cancelled": JobStatus.CANCELLED,
}

MAX_UNREAD_EVENTS: Final = 1_000
"""How many events a subscriber may be behind before it is dropped."""

log = structlog.get_logger("jobs.events")


class JobEvent(NamedTuple):
    """Something that happened to a job and is committed."""

    name: EventName
    job_id: UUID
    type: str
    attempt: int

    @property
    def status(self) -> JobStatus:
        """The job's status since then."""
        return STATUS_AFTER[self.name]

    @classmethod
    def of(cls, name: EventName, job: JobRecord) -> JobEvent:
        """The event `name` of a job as it stands after it."""
        return cls(name, job.id, job.type, job.attempt)


@dataclass(eq=False)
class Subscription:
    """The events of one subscriber, as an async iterator.

    Iterating raises `EventsMissed` once the subscriber fell too far behind, or the connection
    over which other processes are heard was lost: what happened since has to be looked up.
    """

    job_id: UUID | None
    types: frozenset[str] | None
    _unread: deque[JobEvent] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _missed: str | None = None

    def __aiter__(self) -> AsyncIterator[JobEvent]:
        return self

    async def __anext__(self) -> JobEvent:
        while not self._unread:
            if self._missed is not None:
                raise EventsMissed(self._missed)
            self._news.clear()
            await self._news.wait()
        return self._unread.popleft()

    def offer(self, event: JobEvent) -> None:
        """Takes an event in, if it is one that was asked for. Never waits."""
        wanted = (self.job_id is None or event.job_id == self.job_id) and (
            self.types is None or event.type in self.types
        )
        if wanted and self._missed is None:
            if len(self._unread) >= MAX_UNREAD_EVENTS:
                self.drop(f"the subscriber was more than {MAX_UNREAD_EVENTS} events behind")
            else:
                self._unread.append(event)
                self._news.set()

    def drop(self, reason: str) -> None:
        """Lets no further event in; the iterator raises once it has given those it holds."""
        self._missed = reason
        self._news.set()


class Events:
    """One process's view of what happens to jobs.

    `announce` goes inside the transaction and `publish` after its commit. `hearing` is for
    the other processes; without it, their jobs are noticed only when a worker looks by itself.
    """

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._store = JobStore(database.dialect)
        self._process = secrets.token_hex(8)
        self._waiting: dict[asyncio.Event, tuple[frozenset[str], frozenset[str]]] = {}
        self._subscriptions: set[Subscription] = set()
        self._listening = asyncio.Event()

    async def announce(self, connection: AsyncConnection, events: Sequence[JobEvent]) -> None:
        """Tells the other processes, in one message, if this transaction commits."""
        if not events:
            return
        message = _encode(self._process, events)
        if len(message) > self._database.dialect.max_message_bytes:
            number = await self._store.keep_events(connection, message)
            message = json.dumps({"process": self._process, "batch": number})
        await self._database.notify(connection, message)

    def message_of(self, events: Sequence[JobEvent]) -> str | None:
        """What tells the other processes of these events; None where it is too long to be told
        in the statement that makes them, and has to be announced."""
        message = _encode(self._process, events)
        limit = self._database.dialect.max_message_bytes
        return message if limit == 0 or len(message) <= limit else None

    def publish(self, events: Iterable[JobEvent]) -> None:
        """Says what was committed: a log line each, and word to this process. Never raises: the
        caller would take what is stored for refused."""
        for event in events:
            if event.name == "job.created":
                self._metrics.enqueued(event.type)
            try:
                self._deliver(event)
                log.info(
                    event.name,
                    job_id=str(event.job_id),
                    type=event.type,
                    status=event.status.value,
                    attempt=event.attempt,
                )
            except Exception:
                self._metrics.event_publish_failed()

    @contextmanager
    def subscribe(
        self, *, job_id: UUID | None = None, types: Collection[str] | None = None
    ) -> Iterator[Subscription]:
        """The events of one job, or of jobs of these types, or all, from now on."""
        subscription = Subscription(job_id, None if types is None else frozenset(types))
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    @contextmanager
    def waiting_for(self, types: Iterable[str], limited: Iterable[str]) -> Iterator[asyncio.Event]:
        """An `asyncio.Event` that is set when a claim may find more than before: a job of these
        types was queued, or one of the `limited` types ended and made room.

        Clear it before looking at the queue, not after: what comes in between is then kept.
        """
        woken = asyncio.Event()
        self._waiting[woken] = (frozenset(types), frozenset(limited))
        try:
            yield woken
        finally:
            del self._waiting[woken]

    @asynccontextmanager
    async def hearing(self) -> AsyncIterator[None]:
        """Hears what other processes announce, while the context is open."""
        heard: asyncio.Queue[str | Literal[False] | None] = asyncio.Queue(maxsize=10_000)

        def take(message: str | None) -> None:
            try:
                heard.put_nowait(message)
            except asyncio.QueueFull:
                self._miss("this process is too slow to hear the others")

        reading = asyncio.create_task(self._hear(heard), name="job-events")
        listening = asyncio.create_task(self._database.listen(take, lambda: take(None)))
        try:
            # So that a subscriber of the first moment misses nothing; without the database, go on.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._listening.wait(), 2.0)
            yield
        finally:
            listening.cancel()
            # Not cancelled: it may be in the middle of a statement.
            await heard.put(False)
            await asyncio.wait({listening, reading})

    async def _hear(self, heard: asyncio.Queue[str | Literal[False] | None]) -> None:
        last: int | None = None
        while (message := await heard.get()) is not False:
            try:
                if message is not None:
                    await self._receive(message)
                elif self._database.dialect.max_message_bytes == 0:
                    last = await self._read_kept(last)
                elif self._listening.is_set():
                    self._miss("the connection to the database was lost for a while")
                self._listening.set()
            except QueueUnavailable:
                self._miss("the database is not available")
            except Exception:
                log.exception("events.unreadable")

    async def _read_kept(self, last: int | None) -> int:
        """Delivers every batch behind `last`; with None, which is the start, none of them."""
        async with self._database.reading() as connection:
            if last is None:
                return await self._store.last_event(connection)
            while batches := await self._store.events_after(connection, last):
                for message in batches.values():
                    await self._receive(message)
                last = max(batches)
        return last

    async def _receive(self, message: str) -> None:
        content = json.loads(message)
        if content["process"] == self._process:
            return
        if "batch" in content:
            async with self._database.reading() as connection:
                kept = await self._store.events(connection, content["batch"])
            if kept is None:
                self._miss("events were deleted before this process read them")
                return
            content = json.loads(kept)
        for event in _decode(content):
            self._deliver(event)

    def _deliver(self, event: JobEvent) -> None:
        queued = event.status is JobStatus.QUEUED
        ended = event.status is not JobStatus.RUNNING and event.name != "job.created"
        for woken, (types, limited) in self._waiting.items():
            if (queued and event.type in types) or (ended and event.type in limited):
                woken.set()
        for subscription in self._subscriptions:
            subscription.offer(event)

    def drop_subscribers(self, reason: str) -> None:
        """Ends every subscription of this process with `EventsMissed`."""
        for subscription in self._subscriptions:
            subscription.drop(reason)

    def _miss(self, reason: str) -> None:
        for woken in self._waiting:
            woken.set()
        self.drop_subscribers(reason)


_NAMES: Final = get_args(EventName)


def _encode(process: str, events: Sequence[JobEvent]) -> str:
    """Compact, because a notification holds less than 8,000 bytes: about 150 events."""
    types = {event.type: None for event in events}
    numbers = {name: number for number, name in enumerate(types)}
    rows = [
        [_NAMES.index(event.name), event.job_id.hex, numbers[event.type], event.attempt]
        for event in events
    ]
    return to_json({"process": process, "types": list(types), "events": rows}).decode()


def _decode(content: dict[str, list[object]]) -> Iterator[JobEvent]:
    types = cast(list[str], content["types"])
    for name, job_id, job_type, attempt in cast(list[tuple[int, str, int, int]], content["events"]):
        yield JobEvent(_NAMES[name], UUID(job_id), types[job_type], attempt)
