"""Job events: announced in the transaction that changes a job, published after its commit.

Each event is logged, wakes workers that wait for jobs, and is delivered to subscribers in every
process.

Processes exchange events as messages, one or two per transaction: JSON objects, in notifications of
PostgreSQL or in rows of `job_event_batch`. `process` is the id of the sending process. Each event
is an array of its name, the job's id, the job's type and the attempt:

    {"process": "5f0c…", "events": [["job.created", "01a20b59007a…", "payout.execute", 0]]}

The id may be followed by a slash and the number of the message, such as "5f0c…/17". By it a process
recognizes its own message without parsing it.

Names and types may also be listed once, and events then hold their indexes:

    {"process": "5f0c…", "names": ["job.created"], "types": ["payout.execute"],
     "events": [[0, "01a20b59007a…", 0, 0]]}

The event `worker.stopped_waiting` is of no job: its id is zero, and in the place of the type
is the worker's id, or a JSON list of it and the subject whose waits end.

Events that do not fit into a notification are stored as a row of `job_event_batch`. The
notification then holds the id of that row: `{"process": "5f0c…", "batch": 17}`. Readers skip
unknown names, keys and further columns, so that newer versions can add some.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, cast
from uuid import UUID

import structlog
from pydantic_core import from_json

from job_registry_api.logs import log_together
from job_registry_api.metrics import Metrics
from job_registry_api.queue.database import Database
from job_registry_api.queue.errors import EventsMissed, QueueUnavailable, reason_of
from job_registry_api.queue.event_stream import DELETED, EventStream, Gap
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.recent_events import MAX_KEPT_EVENTS, Numbered, RecentEvents
from job_registry_api.queue.store import WAITS_ENDED, Ended, Store

EventName = Literal[
    "job.created",
    "job.started",
    "job.progressed",
    "job.cancel_requested",
    "job.succeeded",
    "job.retrying",
    "job.failed",
    "job.cancelled",
    "job.settled",
    "job.parked",
    "job.unparked",
]

STATUS_AFTER: Final[dict[EventName, JobStatus]] = {
    "job.created": JobStatus.QUEUED,
    "job.started": JobStatus.RUNNING,
    "job.progressed": JobStatus.RUNNING,
    "job.cancel_requested": JobStatus.RUNNING,
    "job.succeeded": JobStatus.SUCCEEDED,
    "job.retrying": JobStatus.QUEUED,
    "job.failed": JobStatus.FAILED,
    "job.cancelled": JobStatus.CANCELLED,
    # The handler of a timed-out attempt has stopped and frees its place. Subscribers do not get it.
    "job.settled": JobStatus.QUEUED,
    "job.parked": JobStatus.QUEUED,
    "job.unparked": JobStatus.QUEUED,
}

STATUS_TEXT_AFTER: Final = {name: status.value for name, status in STATUS_AFTER.items()}

_AFTER_CHANGE: Final[dict[JobStatus, EventName]] = {
    JobStatus.QUEUED: "job.retrying",
    JobStatus.RUNNING: "job.cancel_requested",
    JobStatus.SUCCEEDED: "job.succeeded",
    JobStatus.FAILED: "job.failed",
    JobStatus.CANCELLED: "job.cancelled",
}
"""The event of each status that a change leaves a job in."""

READ_AT_ONCE: Final = 1_000
"""How many events a subscriber reads at most before others take their turn."""

MAX_ECHOES: Final = 10_000
"""How many own events may be awaited from the database at a time."""

MAX_NUMBERED: Final = 200
"""How many own messages with a number may be awaited from the database at a time."""

ANSWER_TURNS: Final = 5
"""How many turns of the event loop an own message waits for the answer to its statement."""

STOP_SECONDS: Final = 5.0
"""How long `listening` waits at its end for a statement in progress."""

log = structlog.get_logger("job_registry.events")


class JobEvent(NamedTuple):
    """A committed change of a job."""

    name: EventName
    job_id: UUID
    type: str
    attempt: int

    @property
    def status(self) -> JobStatus:
        """The job's status after the event."""
        return STATUS_AFTER[self.name]

    @property
    def queued(self) -> bool:
        """Whether the job now waits for a worker."""
        # Another worker may be able to read a job that one has parked.
        return self.name in ("job.created", "job.retrying", "job.parked", "job.unparked")

    @property
    def made_room(self) -> bool:
        """Whether an attempt ended or a job left the queue, so that others of its type may run."""
        return self.status is not JobStatus.RUNNING and self.name not in (
            "job.created",
            "job.unparked",
        )

    @classmethod
    def of(cls, name: EventName, job: JobRecord | Ended) -> JobEvent:
        """Return the event `name` of a job, as read after the event."""
        return cls(name, job.id, job.type, job.attempt)

    @classmethod
    def of_change(cls, job: JobRecord | Ended) -> JobEvent:
        """Return the event of a job whose attempt ended, or that was cancelled or retried."""
        return cls.of("job.parked" if job.is_parked else _AFTER_CHANGE[job.status], job)


class Message(NamedTuple):
    """The message of a process: its events, or the id of the batch that holds them.

    `stopped_waiting` are the names of the waits that end, as `waits_of`.
    """

    process: str
    events: tuple[JobEvent, ...]
    batch: int | None = None
    stopped_waiting: tuple[str, ...] = ()


def decode(text: str | bytes) -> Message:
    """Parse a message in either form.

    Raises:
        ValueError: the message is malformed.
    """
    message = from_json(text)
    try:
        process, batch = message["process"], message.get("batch")
        if not isinstance(process, str) or not (batch is None or isinstance(batch, int)):
            raise TypeError
        names, types = message.get("names", ()), message.get("types", ())
        events: list[JobEvent] = []
        stopped: list[str] = []
        for name, job_id, job_type, attempt, *_ in message.get("events", ()):
            if type(name) is not str:
                name = _text(name, names)
            if type(job_type) is not str:
                job_type = _text(job_type, types)
            if name == WAITS_ENDED:
                stopped.append(job_type)
                continue
            event = JobEvent(cast(EventName, name), UUID(job_id), job_type, int(attempt))
            if name in STATUS_AFTER:
                events.append(event)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError("the message does not have the form of a message") from error
    return Message(process.partition("/")[0], tuple(events), batch, tuple(stopped))


_NUMBERED: Final = re.compile(r'"process": ?"([^"/\\]+/\d+)"')
"""The sender in the text of a message that has a number. Within a text of the message, the quotes
would be escaped."""


def _text(value: Any, table: Sequence[Any]) -> str:
    """Return a name or type that is given as itself or as its index in `table`."""
    if isinstance(value, int):
        if value < 0:
            raise IndexError
        value = table[value]
    if not isinstance(value, str):
        raise TypeError
    return value


def _is_followed(event: JobEvent, job_id: UUID | None, types: Collection[str] | None) -> bool:
    """Return whether an event is of this job and of one of these types. None: of any."""
    return (job_id is None or event.job_id == job_id) and (types is None or event.type in types)


NOT_CONTINUED: Final = "the events after Last-Event-ID cannot be read here any more"


@dataclass(eq=False)
class Subscription:
    """The events of one subscriber, as an async iterator.

    Iterating raises `EventsMissed` after the subscriber fell too far behind or the connection to
    the database was lost. The subscriber then has to read the jobs.
    """

    job_id: UUID | None
    types: frozenset[str] | None
    position: int
    """The number of the latest event that was read or passed over."""
    _recent: RecentEvents[JobEvent]
    _idle: _Idle
    _skipped: dict[JobEvent, int] = field(default_factory=dict)
    _unread: deque[JobEvent] = field(default_factory=deque)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def __aiter__(self) -> AsyncIterator[JobEvent]:
        return self

    async def __anext__(self) -> JobEvent:
        while not self._unread:
            await self.wait()
            self._unread.extend(each.item for each in self.take_unread())
        return self._unread.popleft()

    @property
    def has_unread(self) -> bool:
        """Whether there are events after `position`, or they were missed."""
        return self.position < self._recent.last

    def take_unread(self) -> list[Numbered[JobEvent]]:
        """Return the events that can be read without waiting, up to `READ_AT_ONCE`.

        Raises:
            EventsMissed: the next events cannot be read any more.
        """
        found, self.position = self._recent.read(self.position, READ_AT_ONCE)
        return [e for e in found if self.includes(e.item) and not self.is_skipped(e.item)]

    async def wait(self) -> None:
        """Wait until there are events after `position`, or they were missed."""
        while not self.has_unread:
            self._woken.clear()
            self._idle.add(self)
            try:
                await self._woken.wait()
            finally:
                if not self._woken.is_set():
                    self.position = self._recent.last
                self._idle.discard(self)

    def wake(self, passed: int) -> None:
        """End `wait`. The events up to the number `passed` are not included in the subscription."""
        self.position = passed
        self._woken.set()

    def includes(self, event: JobEvent) -> bool:
        return _is_followed(event, self.job_id, self.types)

    def skip(self, earlier: Mapping[JobEvent, int]) -> None:
        """Skip these events, each this many times more, because they precede the subscription."""
        for event, count in earlier.items():
            if count and self.includes(event):
                self._skipped[event] = self._skipped.get(event, 0) + count

    @property
    def skips(self) -> bool:
        """Whether some events are still to be skipped."""
        return bool(self._skipped)

    def is_skipped(self, event: JobEvent) -> bool:
        """Return whether an event that is read now is to be skipped."""
        if event not in self._skipped:
            return False
        self.skip({event: self._skipped.pop(event) - 1})
        return True


class _Idle:
    """The subscriptions that wait, by what they follow.

    Thousands may wait, and an event that none of them follows should cost nothing.
    """

    def __init__(self) -> None:
        self._waiting: dict[UUID | None, dict[frozenset[str] | None, set[Subscription]]] = {}

    def add(self, subscription: Subscription) -> None:
        of_job = self._waiting.setdefault(subscription.job_id, {})
        of_job.setdefault(subscription.types, set()).add(subscription)

    def discard(self, subscription: Subscription) -> None:
        """Remove a subscription, if it is there."""
        of_job = self._waiting.get(subscription.job_id, {})
        waiting = of_job.get(subscription.types, set())
        waiting.discard(subscription)
        if not waiting:
            of_job.pop(subscription.types, None)
        if not of_job:
            self._waiting.pop(subscription.job_id, None)

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def take(self, event: JobEvent) -> list[Subscription]:
        """Remove and return the subscriptions that include an event."""
        return [
            each
            for job_id in (event.job_id, None)
            for types in tuple(self._waiting.get(job_id, ()))
            if types is None or event.type in types
            for each in self._taken(job_id, types)
        ]

    def take_all(self) -> list[Subscription]:
        of_jobs, self._waiting = self._waiting, {}
        return [each for of_job in of_jobs.values() for some in of_job.values() for each in some]

    def _taken(self, job_id: UUID | None, types: frozenset[str] | None) -> set[Subscription]:
        taken = self._waiting[job_id].pop(types)
        if not self._waiting[job_id]:
            del self._waiting[job_id]
        return taken


@dataclass(frozen=True, slots=True, eq=False)
class _Callback:
    """A function that is called on the event loop on which it was registered."""

    call: Callable[..., None]
    loop: asyncio.AbstractEventLoop

    def __call__(self, argument: Any) -> None:
        if running_loop() is self.loop:
            self.call(argument)
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.call, argument)


class Events:
    """The job events of one process.

    The statements that change jobs announce the events to other processes. `publish` is called
    after the commit, in the process that committed.

    While `listening` is entered, subscribers receive the events of every process, including this
    one, in commit order. Without it they receive only the events of this process, and workers find
    the jobs of other processes by polling. The events of this process always wake workers at once.

    `publish` may be called from any thread. Everything else belongs to one event loop, except that
    a callback is called on the loop on which it was registered.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        metrics: Metrics,
        renamed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._renamed = renamed
        self.failures = 0
        """How many log lines, deliveries and callbacks have failed since the start."""
        self._database = database
        self._store = store
        self._metrics = metrics
        self._waiting: dict[asyncio.Event, tuple[frozenset[str], frozenset[str]]] = {}
        self._cancellations: dict[_Callback, None] = {}
        self._waits: dict[_Callback, None] = {}
        self._recent: RecentEvents[JobEvent] = RecentEvents()
        self._subscriptions: set[Subscription] = set()
        self._idle = _Idle()
        self._id_key = secrets.token_bytes(16)
        self._stream: EventStream | None = None
        self._recalling: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers: Final = itertools.count(1)
        self._numbered: dict[str, Sequence[JobEvent]] = {}
        """The events of own messages with a number that were published and not yet read, by their
        senders."""
        self._echoes: dict[JobEvent, int] = {}
        """Other own events that were published and not yet read from the stream. Negative counts
        are events that were read and not yet published."""
        self._shut: str | None = None
        self.ended: Final = asyncio.Event()
        """Set when all subscriptions have been ended, because the process shuts down."""

    @property
    def process(self) -> str:
        """The id of this process in messages."""
        return self._store.process

    @property
    def is_listening(self) -> bool:
        """Whether events of other processes arrive, and waits have not been ended."""
        return self._stream is not None and self._shut is None

    @property
    def subscribers(self) -> int:
        """How many subscriptions are open in this process."""
        return len(self._subscriptions)

    def sender(self) -> str:
        """Return the sender of a message with a number, for a statement that sends one message."""
        return f"{self.process}/{next(self._numbers)}"

    def publish(self, events: Iterable[JobEvent], sender: str | None = None) -> None:
        """Log committed events and wake the waiting callers in this process. Never raises.

        `sender` is that of the message that has these events in this order, and no others. This
        process then does not parse the message, or read the stored batch that it names.

        To the caller an error here would look like an error of the commit, and a retry would store
        the job twice. Errors are counted in `failures`.
        """
        happened = tuple(events)
        created = Counter(event.type for event in happened if event.name == "job.created")
        for job_type, jobs in created.items():
            self._metrics.enqueued(job_type, jobs)
        self._guard(_log, happened)
        self._guard(self._hand_over, happened, sender)

    @contextmanager
    def subscribe(
        self,
        *,
        job_id: UUID | None = None,
        types: Collection[str] | None = None,
        after: str | None = None,
    ) -> Iterator[Subscription]:
        """Subscribe to the events of one job, of jobs of these types, or of all jobs.

        The subscription includes every event that is committed after this call, and none that
        this process published before. Events that another process committed shortly before may be
        included.

        With `after`, an id that `id_of` returned in this or another process, the subscription
        includes every event after that one. Between two equal events, some may come again.

        Raises:
            EventsMissed: the events after that id cannot be read any more, or it is not an id.
        """
        self._bind_to_loop()
        wanted = None if types is None else frozenset(types)
        position = self._recent.last if after is None else self._position_of(after)
        if self._shut is not None:
            position = self._recent.extend([Gap(self._shut)]) - 1
        subscription = Subscription(job_id, wanted, position, self._recent, self._idle)
        if after is None:
            subscription.skip({event: count for event, count in self._echoes.items() if count > 0})
            for events in self._numbered.values():
                subscription.skip(Counter(events))
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def recall(self, after: str) -> None:
        """Load the stored events of the time before this process started, if the event with the id
        `after` is not among those that it has read itself.

        They are loaded once. Where the database does not keep events in order, none are.
        """
        if self._stream is None:
            return
        with suppress(EventsMissed):
            self._position_of(after)
            return
        if self._recalling is None:
            self._recalling = asyncio.create_task(self._load(self._stream), name="job-events-past")
        await asyncio.wait({self._recalling})

    async def _load(self, stream: EventStream) -> None:
        earlier: list[tuple[float, JobEvent]] = []
        try:
            history = await stream.history()
            if history is None:
                return
            batches, complete_since = history
            for batch in batches:
                at = batch.created_at.timestamp()
                message = decode(batch.message)
                events = [(at, e) for e in self._renamed_in(message) if _is_public(e)]
                earlier += reversed(events)
                if len(earlier) > MAX_KEPT_EVENTS:
                    break  # `prepend` keeps no more.
                await asyncio.sleep(0)  # Let other requests through.
        except Exception as error:
            with suppress(Exception):
                log.warning("events.not_recalled", reason=reason_of(error))
            return
        self._recent.prepend(earlier[::-1], complete_since)

    def read(
        self,
        after: int,
        *,
        job_id: UUID | None = None,
        types: Collection[str] | None = None,
        most: int = READ_AT_ONCE,
    ) -> tuple[list[Numbered[JobEvent]], int]:
        """Return which of the next `most` events are of this job and of these types, and the number
        to read on after.

        Raises:
            EventsMissed: the next events cannot be read any more.
        """
        found, position = self._recent.read(after, most)
        return [each for each in found if _is_followed(each.item, job_id, types)], position

    def id_of(self, each: Numbered[JobEvent]) -> str:
        """Return the id of an event, after which any process can continue a subscription.

        The number itself would reveal how many events the jobs of other callers have, so the id has
        a hash of it, which distinguishes equal events.
        """
        name, job_id, _, attempt = each.item
        return f"{self._tag(each.number)}/{each.at}/{job_id.hex}/{name}/{attempt}"

    def _position_of(self, event_id: str) -> int:
        """Return the number of an event by its id.

        Raises:
            EventsMissed: the events after it cannot be read any more, or it is not an id.
        """
        number: int | None = None
        # OverflowError: a time of 400 digits.
        with suppress(ValueError, OverflowError):
            tag, at, job_id, name, attempt = event_id.split("/")
            wanted, run = UUID(job_id), int(attempt)
            number = self._recent.position_of(
                lambda event: (
                    event.job_id == wanted and event.name == name and event.attempt == run
                ),
                int(at),
                lambda number: self._tag(number) == tag,
            )
        if number is None:
            raise EventsMissed(NOT_CONTINUED)
        return number

    def _tag(self, number: int) -> str:
        data = number.to_bytes(8, "big", signed=True)
        return blake2b(data, digest_size=6, key=self._id_key).hexdigest()

    @contextmanager
    def waiting_for(self, types: Iterable[str], limited: Iterable[str]) -> Iterator[asyncio.Event]:
        """Return an `asyncio.Event` that is set when a claim may find more jobs: a job of these
        types was queued, a job of the `limited` types ended, or events were missed.

        Clear it before the claim, not after, so that an event during the claim is not lost.
        """
        self._bind_to_loop()
        woken = asyncio.Event()
        self._waiting[woken] = (frozenset(types), frozenset(limited))
        try:
            yield woken
        finally:
            del self._waiting[woken]

    def on_cancel_requested(self, callback: Callable[[UUID], None]) -> AbstractContextManager[None]:
        """Call `callback` with a running job's id when its cancellation is requested.

        The request may come from any process and concern any job. Missed requests are not
        repeated: the next heartbeat reports them.
        """
        return _called_within(self._cancellations, callback)

    def on_waits_ended(self, callback: Callable[[str], None]) -> AbstractContextManager[None]:
        """Call `callback` with the name of waits that end, as `waits_of`."""
        return _called_within(self._waits, callback)

    def end_waits(self, waits: str) -> None:
        """End the waits of this name in this process."""
        for callback in tuple(self._waits):
            self._guard(callback, waits)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Receive the events of every process, including this one, while the context is open."""
        # Processes that were forked after the queue was created have one of these each.
        self._store.process = new_process()
        self._id_key = secrets.token_bytes(16)
        stream = EventStream(self._database, self._store)
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        feeding = asyncio.create_task(stream.feed(self._take), name="job-events")
        try:
            # Early subscribers must miss nothing. Without the database, continue.
            with suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await stream.begun.wait()
            yield
        finally:
            stream.end()
            try:
                # Cancel it only if it hangs: it may be in the middle of a statement.
                await asyncio.wait({feeding}, timeout=STOP_SECONDS)
            finally:
                feeding.cancel()
                self._stream = None
                self._echoes.clear()
                self._numbered.clear()
            tasks = {feeding}
            if self._recalling is not None:
                self._recalling.cancel()
                tasks.add(self._recalling)
                self._recalling = None
            await asyncio.wait(tasks)

    def drop_subscribers(self, reason: str) -> None:
        """End all open and later subscriptions with `EventsMissed`."""
        self._shut = reason
        self.ended.set()
        self._drop(reason)

    async def _take(self, item: str | Gap) -> None:
        """Process the next message of the stream, or a gap."""
        if isinstance(item, Gap):
            self._miss(item.reason)
            return
        if (published := await self._published_in(item)) is not None:
            self._offer(published)
            await asyncio.sleep(0)
            return
        try:
            message = await self._message_of(item)
        except EventsMissed as missed:
            self._miss(missed.reason)
            return
        except QueueUnavailable:
            self._miss("the database is not available")
            return
        except Exception:
            with suppress(Exception):
                log.exception("events.unreadable")
            self._miss("a message could not be read")
            return
        for waits in message.stopped_waiting:
            self.end_waits(waits)
        own = message.process == self.process
        events = self._renamed_in(message)
        if own:
            self._wake([event for event in events if self._is_first(event, published=False)])
        else:
            self._wake(events)
        self._offer(events)
        # Let subscribers read these events before more are delivered.
        await asyncio.sleep(0)

    async def _published_in(self, text: str) -> Sequence[JobEvent] | None:
        """Return the published events of an own message; None of any other, which is parsed.

        The message often arrives just before the answer to the statement that sent it.
        """
        if self.process not in text or (found := _NUMBERED.search(text)) is None:
            return None
        for _ in range(ANSWER_TURNS):
            if (events := self._numbered.pop(found[1], None)) is not None:
                return events
            await asyncio.sleep(0)
        return None

    def _renamed_in(self, message: Message) -> Sequence[JobEvent]:
        """Return the events of a message, each with the current name of its job type."""
        if not self._renamed:
            return message.events
        return [
            event._replace(type=self._renamed.get(event.type, event.type))
            for event in message.events
        ]

    async def _message_of(self, text: str) -> Message:
        """Return a message with its events.

        Raises:
            EventsMissed: it names a batch that has been deleted.
            QueueUnavailable: the batch cannot be read now.
            ValueError: it is malformed.
        """
        message = decode(text)
        if message.batch is None:
            return message
        kept = await self._store.events(message.batch)
        if kept is None:
            raise EventsMissed(DELETED)
        return decode(kept)

    def _bind_to_loop(self) -> None:
        """Without `listening`, deliver on the loop of the caller."""
        if self._stream is None:
            self._loop = running_loop()

    def _hand_over(self, events: Sequence[JobEvent], sender: str | None) -> None:
        """Deliver the events on the loop of this object, from any thread."""
        loop = self._loop
        if loop is None or loop.is_closed() or loop is running_loop():
            self._deliver(events, sender)
        else:
            loop.call_soon_threadsafe(self._deliver, events, sender)

    def _deliver(self, events: Sequence[JobEvent], sender: str | None) -> None:
        if self._stream is None:
            self._wake(events)
            self._offer(events)
            return
        # A message that was read before it was published has been counted event by event.
        if sender is not None and events and self._echoes.get(events[0], 0) >= 0:
            if len(self._numbered) >= MAX_NUMBERED:
                del self._numbered[next(iter(self._numbered))]
            self._numbered[sender] = events
            self._wake(events)
        else:
            self._wake([event for event in events if self._is_first(event, published=True)])
        if self._subscriptions:
            self._stream.look()

    def _is_first(self, event: JobEvent, *, published: bool) -> bool:
        """Return whether an own event is new here, so that each event wakes workers once.

        An own event is published and read from the stream, in either order. Sometimes it is only
        read: a caller that is cancelled during its commit publishes nothing.
        """
        step = 1 if published else -1
        count = self._echoes.pop(event, 0)
        if count + step:
            if len(self._echoes) >= MAX_ECHOES:
                del self._echoes[next(iter(self._echoes))]
            self._echoes[event] = count + step
        return count * step >= 0

    def _wake(self, events: Iterable[JobEvent]) -> None:
        """Wake the callers that wait for jobs or for cancellations."""
        for event in events:
            if event.name == "job.cancel_requested":
                for callback in tuple(self._cancellations):
                    self._guard(callback, event.job_id)
            if self._waiting and (event.queued or event.made_room):
                self._wake_for(event)

    def _wake_for(self, event: JobEvent) -> None:
        """Wake the callers that wait for jobs of the event's type."""
        for woken, (types, limited) in self._waiting.items():
            if (event.queued and event.type in types) or (
                event.made_room and event.type in limited
            ):
                woken.set()

    def _offer(self, events: Sequence[JobEvent]) -> None:
        offered = [event for event in events if _is_public(event)]
        last = self._recent.extend(offered)
        if self._idle.is_empty:
            return
        for passed, event in enumerate(offered, last - len(offered)):
            # Later events find them awake: they read them when they run.
            for subscription in self._idle.take(event):
                self._guard(subscription.wake, passed)

    def _miss(self, reason: str) -> None:
        self._echoes.clear()
        self._numbered.clear()
        for woken in self._waiting:
            woken.set()
        self._drop(reason)

    def _drop(self, reason: str) -> None:
        """Let every subscriber that has read all events before this fail with `EventsMissed`."""
        passed = self._recent.extend([Gap(reason)]) - 1
        for subscription in self._idle.take_all():
            self._guard(subscription.wake, passed)

    def _guard(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception:
            self.failures += 1
            self._metrics.event_publish_failed()
            # The log itself may have failed.
            with suppress(Exception):
                log.exception("events.delivery_failed")


def _is_public(event: JobEvent) -> bool:
    """Return whether subscribers get an event."""
    return event.name != "job.settled"


def _log(events: Sequence[JobEvent]) -> None:
    # Not a list: nothing is made where no line of this level is written.
    lines = (
        {
            "event": name,
            "job_id": str(job_id),
            "type": job_type,
            "status": STATUS_TEXT_AFTER[name],
            "attempt": attempt,
        }
        for name, job_id, job_type, attempt in events
    )
    log_together(log, lines)


@contextmanager
def _called_within(
    callbacks: dict[_Callback, None], callback: Callable[..., None]
) -> Iterator[None]:
    registered = _Callback(callback, asyncio.get_running_loop())
    callbacks[registered] = None
    try:
        yield
    finally:
        del callbacks[registered]


def new_process() -> str:
    """Return an id for a process in messages."""
    return secrets.token_hex(8)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread; None if none is running."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
