"""Claims jobs for waiting callers, with as few claims as possible.

Callers that wait for the same types form a waiting line. When a job arrives, only the first caller
claims. While no job is due, one claim that finds nothing serves all callers.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import structlog
from pydantic_core import to_json

from job_registry import JobRegistry
from job_registry_api.metrics import Metrics
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.events import Events, JobEvent
from job_registry_api.queue.models import AttemptOutcome, JobRecord, JobStatus
from job_registry_api.queue.store import Claim, Claimed, ClaimedJob, Recovered, Store

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

WORKER_SEEN_SECONDS: Final = 10.0
"""How often a process records in the database that it runs a type."""

Readable = Mapping[str, tuple[str, ...]]
"""For types, the fingerprints under which a job must have been admitted for a caller to read it."""

SLOW_CLAIM_SECONDS: Final = 0.5
"""From how slow an answer on a claim's leases may be over. No lease is shorter."""

MIN_PAUSE_SECONDS: Final = 0.02
MAX_LOCKED_PAUSE_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 5.0
"""How long the end of the process waits for claims in progress, whose leases would be lost."""

MAX_PAUSE_SECONDS: Final = 5.0
"""How long a waiting line relies on events before it claims without one. A job waits this long
only if a message is lost without notice."""

log = structlog.get_logger("job_registry.leasing")


class Lease(NamedTuple):
    """A job that a worker holds until `expires_at`, and with heartbeats until `deadline_at`.

    `token` is a secret of the worker. It identifies the lease in every later call.
    """

    token: str
    job: JobRecord
    expires_at: datetime
    deadline_at: datetime
    lease_seconds: float
    """How long the lease lasts after each heartbeat, but never past `deadline_at`."""
    requested_at: float
    """When its claim was sent, as `time.monotonic()`. The lease began then or later."""
    traceparent: str | None = None
    """The span that enqueued the job (W3C Trace Context); None if its enqueue was not traced."""

    @property
    def seconds_to_expiry(self) -> float:
        """How long after its beginning the lease expires without a heartbeat."""
        assert self.job.started_at is not None
        return (self.expires_at - self.job.started_at).total_seconds()


@dataclass(frozen=True, slots=True, eq=False)
class BusyWorker:
    """A worker of this process, whose next jobs can be claimed together with reports.

    `wanted` returns how many jobs it wants in exchange for the reports of some jobs, of which other
    workers may have run some. `take` gets their leases. Neither waits.
    """

    types: tuple[str, ...]
    worker_id: str
    wanted: Callable[[Collection[UUID]], int]
    take: Callable[[Sequence[Lease]], None]


def note_recovered(
    metrics: Metrics, tracing: Tracing | None, recovered: Collection[Recovered]
) -> None:
    """Count and trace the attempts that were ended because their lease expired."""
    for job, traceparent in recovered:
        outcome = AttemptOutcome.CANCELLED.value
        if job.status is not JobStatus.CANCELLED and job.error is not None:
            outcome = job.error.code
        metrics.attempt_ended(job.type, outcome)
        if tracing is not None:
            tracing.recovered(
                str(job.id), job.type, attempt=job.attempt, outcome=outcome, parent=traceparent
            )


class Claiming:
    """The claims of one process.

    `give_back` releases leases whose caller is gone.
    """

    def __init__(
        self,
        store: Store,
        registry: JobRegistry,
        events: Events,
        *,
        lease_seconds: float,
        give_back: Callable[[Sequence[Lease]], Awaitable[None]],
        metrics: Metrics,
        tracing: Tracing | None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._events = events
        self._lease_seconds = lease_seconds
        self._give_back = give_back
        self._metrics = metrics
        self._tracing = tracing
        self._lines: dict[_Line, _WaitingLine] = {}
        self._busy: list[BusyWorker] = []
        self._seen: dict[str, float] = {}
        self._served: dict[str, int] = {}
        self._turn = itertools.count(1)
        self.failed_at = float("-inf")
        """When a claim last failed, as `time.monotonic()`."""
        self._under_way: list[float] = []
        """When the claims began that have not ended."""
        self.is_ending = False
        """Whether the process shuts down. Calls then return without waiting."""
        self._returning: set[asyncio.Task[None]] = set()
        self._looking: set[asyncio.Task[tuple[list[Lease], bool]]] = set()

    async def lease(
        self,
        types: Sequence[str],
        worker_id: str,
        *,
        limit: int,
        wait_seconds: float,
        stop: asyncio.Event | None,
        readable: Readable | None = None,
        subject: str | None = None,
    ) -> list[Lease]:
        """Lease up to `limit` due jobs of these types; wait up to `wait_seconds` for the first.

        The wait ends when `stop` is set. Jobs that are leased for a cancelled caller are
        released. `readable` and `subject` are those of `Leasing.lease`.
        """
        if wait_seconds <= 0 or self.is_ending or (stop is not None and stop.is_set()):
            return await self.claim(types, worker_id, limit, readable)
        key = _line(types, readable)
        line = self._lines.setdefault(key, _WaitingLine(self, key, tuple(types), readable))
        waits = frozenset({waits_of(worker_id), waits_of(worker_id, subject)})
        waiter = _Waiter(worker_id, limit, asyncio.get_running_loop().create_future(), waits)
        line.join(waiter)
        stopped = None if stop is None else asyncio.create_task(stop.wait())
        ends: set[asyncio.Future[Any]] = {waiter.leases}
        if stopped is not None:
            ends.add(stopped)
        try:
            await asyncio.wait(ends, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiter.leases.done() or waiter.is_served:
                # A claim for this caller is in progress.
                waiter.is_leaving = True
                return await waiter.leases
            return []
        except asyncio.CancelledError:
            waiter.is_gone = True
            done = waiter.leases.done() and not waiter.leases.cancelled()
            if done and waiter.leases.exception() is None:
                self.give_back(waiter.leases.result())
            raise
        finally:
            line.leave(waiter)
            if stopped is not None:
                stopped.cancel()

    async def claim(
        self, types: Sequence[str], worker_id: str, limit: int, readable: Readable | None = None
    ) -> list[Lease]:
        """Lease jobs that are due now."""
        # In a separate task: cancelling the caller during the claim must not lose its leases.
        looking = asyncio.create_task(self.look(types, worker_id, limit, readable, thorough=True))
        self._looking.add(looking)
        looking.add_done_callback(self._looking.discard)
        try:
            leases, _ = await asyncio.shield(looking)
        except asyncio.CancelledError:
            looking.add_done_callback(self._give_back_result)
            raise
        return leases

    def _give_back_result(self, looking: asyncio.Task[tuple[list[Lease], bool]]) -> None:
        if not looking.cancelled() and looking.exception() is None:
            self.give_back(looking.result()[0])

    async def look(
        self,
        types: Sequence[str],
        worker_id: str,
        limit: int,
        readable: Readable | None = None,
        *,
        thorough: bool = False,
    ) -> tuple[list[Lease], bool]:
        """Lease jobs that are due now. Return them, and whether all due jobs were considered."""
        await self.show_worker(types, readable)
        claim = self._claim(types, worker_id, limit, readable, thorough=thorough)
        with self.under_way() as requested_at:
            claimed = await self._store.claim(claim)
        return self.leased(claimed, requested_at), claimed.everything

    @contextmanager
    def under_way(self) -> Iterator[float]:
        """Note that a claim is under way, and when it fails: the database may have made it, or may
        still make it. Return when it began."""
        began = time.monotonic()
        self._under_way.append(began)
        try:
            yield began
        except QueueUnavailable:
            self.failed_at = time.monotonic()
            raise
        finally:
            self._under_way.remove(began)

    def has_waited(self, seconds: float) -> bool:
        """Return whether a claim has been under way for longer than this."""
        latest = time.monotonic() - seconds
        return any(began < latest for began in self._under_way)

    def _claim(
        self,
        types: Sequence[str],
        worker_id: str,
        limit: int,
        readable: Readable | None = None,
        *,
        thorough: bool = False,
    ) -> Claim:
        # Types of one priority take turns. The one whose last turn is longest ago comes first.
        turns = tuple(sorted(types, key=lambda name: self._served.get(name, 0)))
        return Claim(
            turns,
            self.limits(types),
            worker_id,
            limit,
            self._lease_seconds,
            thorough,
            former=self._former(types),
            fingerprints=self._fingerprints(types) if readable is None else {},
            readable=readable or {},
            sender=self._events.sender(),
        )

    @contextmanager
    def busy(self, worker: BusyWorker) -> Iterator[None]:
        """Claim jobs for this worker together with reports, while the context is open."""
        self._busy.append(worker)
        try:
            yield
        finally:
            self._busy.remove(worker)

    def claim_with(self, reported: Collection[UUID]) -> tuple[BusyWorker, Claim] | None:
        """Return the claim to make together with the reports of these jobs, and for whom."""
        for worker in () if self.is_ending else self._busy:
            if (jobs := worker.wanted(reported)) > 0:
                return worker, self._claim(worker.types, worker.worker_id, jobs)
        return None

    def leased(self, claimed: Claimed, requested_at: float) -> list[Lease]:
        """Announce what a claim did, and return its leases that are sure to be in force.

        `requested_at` is when it began, as `time.monotonic()`. A process that was frozen meanwhile
        may read the answer when others run the jobs already. It releases these leases: if the claim
        had waited before, they are still in force.
        """
        for each in claimed.leased:
            self._served[each.job.type] = next(self._turn)
        happened = [JobEvent.of_change(each.job) for each in claimed.recovered]
        happened += [JobEvent.of("job.started", each.job) for each in claimed.leased]
        with self._named_in_lines(claimed.leased):
            self._events.publish(happened, claimed.sender)
        note_recovered(self._metrics, self._tracing, claimed.recovered)
        leases = [
            Lease(
                each.job.id.hex + each.token,
                each.job,
                each.expires_at,
                each.deadline_at,
                self._lease_seconds,
                requested_at,
                each.traceparent,
            )
            for each in claimed.leased
        ]
        waited = time.monotonic() - requested_at
        if waited > SLOW_CLAIM_SECONDS and (
            late := [each for each in leases if each.seconds_to_expiry <= waited]
        ):
            log.warning("leases.too_late", leases=len(late), seconds=round(waited, 1))
            self.give_back(late)
            leases = [each for each in leases if each.seconds_to_expiry > waited]
        leases.sort(key=lambda lease: -lease.job.priority)
        return leases

    def _named_in_lines(self, leased: Sequence[ClaimedJob]) -> AbstractContextManager[None]:
        """Let the log lines of jobs name their traces: their attempts have no spans yet."""
        if self._tracing is None:
            return nullcontext()
        return self._tracing.named_in_lines({str(each.job.id): each.traceparent for each in leased})

    def limits(self, types: Sequence[str]) -> dict[str, int]:
        """Return the concurrency limits of the types that have one."""
        return {
            name: limit
            for name in types
            if (limit := self._registry.policy(name).concurrency_limit) is not None
        }

    async def show_worker(self, types: Sequence[str], readable: Readable | None = None) -> None:
        """Record that a worker runs these types, even while it has no free slot.

        It is written at most every ten seconds per type, and so are the versions of types.
        """
        now = asyncio.get_running_loop().time()
        if readable is None:
            versions = set(self._fingerprints(types).items())
        else:
            # Only those that this process knows: a worker may name any, and each is a row.
            versions = {
                (name, each)
                for name, some in readable.items()
                for each in {*self._registry.get_type(name).readable_fingerprints}.intersection(
                    some
                )
            }
        stale = [t for t in types if self._is_stale(t, now)]
        unseen = [each for each in versions if self._is_stale("\0".join(each), now)]
        if stale or unseen:
            self._seen |= dict.fromkeys([*stale, *map("\0".join, unseen)], now)
            former = self._former(stale)
            stored = [*stale, *(name for names in former.values() for name in names)]
            await self._store.see_worker(stored, unseen)

    def _is_stale(self, key: str, now: float) -> bool:
        return now - self._seen.get(key, -1e9) > WORKER_SEEN_SECONDS

    def _former(self, types: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the former names of the types that have some."""
        return {
            name: former for name in types if (former := self._registry.get_type(name).former_names)
        }

    def _fingerprints(self, types: Sequence[str]) -> dict[str, str]:
        """Return the fingerprints that the types have in this process."""
        return {name: self._registry.get_type(name).fingerprint for name in types}

    async def seconds_to_next(self, types: Sequence[str]) -> float | None:
        """Return the seconds until a claim may find more jobs, or None if no time is known."""
        limits = self.limits(types)
        stored = list(types)
        for name, names in self._former(types).items():
            stored += names
            if name in limits:
                limits |= dict.fromkeys(names, limits[name])
        return await self._store.next_due(stored, limits)

    def give_back(self, leases: Sequence[Lease]) -> None:
        """Release leases whose caller is gone, in the background."""
        if leases:
            task = asyncio.create_task(self._release(leases), name="give leases back")
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)

    async def _release(self, leases: Sequence[Lease]) -> None:
        try:
            await self._give_back(leases)
        except Exception as error:
            # They expire without this.
            log.warning("leases.release_failed", leases=len(leases), reason=str(error)[:200])

    @property
    def events(self) -> Events:
        """The events that wake waiting lines."""
        return self._events

    def end(self) -> None:
        """End all waits, because the process shuts down."""
        self.is_ending = True
        for line in self._lines.values():
            line.end()

    def drop(self, line: _WaitingLine) -> None:
        """Remove an empty waiting line."""
        self._lines.pop(line.key, None)

    async def close(self) -> None:
        """Wait for claims in progress, and for the release of leases whose callers are gone."""
        lines = [line.task for line in self._lines.values() if line.task is not None]
        if in_progress := {*self._looking, *lines}:
            await asyncio.wait(in_progress, timeout=CLOSE_SECONDS)
        if self._returning:
            await asyncio.wait(self._returning, timeout=self._lease_seconds)


def waits_of(worker_id: str, subject: str | None = None) -> str:
    """Return the name of a worker's waits that this subject called; None means any subject."""
    return worker_id if subject is None else to_json([worker_id, subject]).decode()


@dataclass(eq=False, slots=True)
class _Waiter:
    """A caller in a waiting line."""

    worker_id: str
    limit: int
    leases: asyncio.Future[list[Lease]]
    waits: frozenset[str]
    """The names, as `waits_of`, by which its wait is ended."""
    is_served: bool = False
    is_leaving: bool = False
    is_gone: bool = False


_Line = tuple[frozenset[str], frozenset[tuple[str, tuple[str, ...]]] | None]
"""What a waiting line is for: job types, and the fingerprints that its callers can read."""


def _line(types: Sequence[str], readable: Readable | None) -> _Line:
    return frozenset(types), None if readable is None else frozenset(readable.items())


class _WaitingLine:
    """The callers that wait for jobs of the same types, first come, first served."""

    def __init__(
        self,
        claiming: Claiming,
        key: _Line,
        types: tuple[str, ...],
        readable: Readable | None,
    ) -> None:
        self.key = key
        self.types = types
        self._readable = readable
        self._claiming = claiming
        self._waiters: deque[_Waiter] = deque()
        self._woken = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def join(self, waiter: _Waiter) -> None:
        """Add a caller at the end, and claim for it once."""
        self._waiters.append(waiter)
        self._woken.set()
        if self.task is None:
            # In a context of its own: its claims are not of its first caller alone.
            self.task = asyncio.create_task(self._run(), name="leases", context=Context())

    def leave(self, waiter: _Waiter) -> None:
        """Remove a caller. An empty waiting line ends."""
        # Mostly it has been served and removed. The error of `remove` would quote it.
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        if not self._waiters:
            self._woken.set()

    def end(self, waits: str | None = None) -> None:
        """End all waits, or those of this name, without a lease.

        A wait whose claim is in progress ends with the leases of that.
        """
        for waiter in self._waiters:
            if waits is not None and waits not in waiter.waits:
                continue
            if waiter.is_served:
                waiter.is_leaving = True
            elif not waiter.leases.done():
                waiter.leases.set_result([])

    async def _run(self) -> None:
        claiming = self._claiming
        limited = list(claiming.limits(self.types))
        locked = 0
        try:
            with (
                claiming.events.on_waits_ended(self.end),
                claiming.events.waiting_for(self.types, limited) as self._woken,
            ):
                while self._waiters:
                    self._woken.clear()
                    everything = await self._serve()
                    if not self._waiters:
                        break
                    seconds = await claiming.seconds_to_next(self.types) if everything else 0.25
                    if seconds is not None and seconds <= 0:
                        # A job is due and was not claimed: another transaction has locked its row.
                        seconds = min(MAX_LOCKED_PAUSE_SECONDS, MIN_PAUSE_SECONDS * 2**locked)
                        locked = min(locked + 1, 10)
                    pause = MAX_PAUSE_SECONDS if seconds is None else seconds
                    with suppress(TimeoutError):
                        async with asyncio.timeout(
                            min(MAX_PAUSE_SECONDS, max(MIN_PAUSE_SECONDS, pause))
                        ):
                            await self._woken.wait()
                            locked = 0
        except Exception as error:
            self._fail(error)
        finally:
            self.task = None
            claiming.drop(self)
            for waiter in self._waiters:
                if not waiter.leases.done():
                    waiter.leases.cancel()

    async def _serve(self) -> bool:
        """Claim for one waiter after the other, until a claim finds nothing."""
        everything = True
        while self._waiters:
            waiter = self._waiters[0]
            if waiter.leases.done() or waiter.is_gone:
                self._waiters.popleft()
                continue
            waiter.is_served = True
            try:
                leases, everything = await self._claiming.look(
                    self.types, waiter.worker_id, waiter.limit, self._readable
                )
            finally:
                waiter.is_served = False
            if not leases:
                leaves = waiter.is_leaving or self._claiming.is_ending
                if leaves and not waiter.leases.done():
                    waiter.leases.set_result([])
                if waiter.leases.done() or waiter.is_gone:
                    continue
                break
            if waiter.is_gone or waiter.leases.done():
                self._claiming.give_back(leases)
            else:
                waiter.leases.set_result(leases)
        return everything

    def _fail(self, error: Exception) -> None:
        """Raise the error in every caller."""
        for waiter in self._waiters:
            if not waiter.leases.done():
                waiter.leases.set_exception(error)
