"""Leasing jobs: claims for those who wait, with as few of them as there is work.

Callers that wait for the same types form one line. For a job that arrives, its first caller gets a
claim, not each of them; while nothing is due, one look by one of them serves all.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog

from job_registry import JobRegistry
from job_registry_api.metrics import Metrics
from job_registry_api.queue.events import EventName, Events, JobEvent
from job_registry_api.queue.models import AttemptOutcome, JobRecord, JobStatus
from job_registry_api.queue.store import Claim, Store

WORKER_SEEN_SECONDS: Final = 10.0
"""How often a process notes in the database that it works a type."""

MIN_PAUSE_SECONDS: Final = 0.02
MAX_LOCKED_PAUSE_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 5.0
"""How long the end of the process waits for claims under way: what they lease would be lost."""

MAX_PAUSE_SECONDS: Final = 5.0
"""How long a line relies on events before it looks at the queue without one. Only a message
that was lost without notice makes a job wait for it."""

log = structlog.get_logger("jobs.leasing")


@dataclass(frozen=True, slots=True)
class Lease:
    """A job that is this worker's until `expires_at`, and with heartbeats until `deadline_at`.

    `token` is secret to the worker and proves the lease in every later call.
    """

    token: str
    job: JobRecord
    expires_at: datetime
    deadline_at: datetime


def ended_event(job: JobRecord) -> JobEvent:
    """The event of a job whose attempt has ended."""
    return JobEvent.of(_AFTER_ATTEMPT[job.status], job)


_AFTER_ATTEMPT: Final[dict[JobStatus, EventName]] = {
    JobStatus.QUEUED: "job.retrying",
    JobStatus.SUCCEEDED: "job.succeeded",
    JobStatus.FAILED: "job.failed",
    JobStatus.CANCELLED: "job.cancelled",
}


def count_recovered(metrics: Metrics, recovered: Sequence[JobRecord]) -> None:
    """Count the attempts that were ended because their lease had run out."""
    for job in recovered:
        outcome = AttemptOutcome.CANCELLED.value
        if job.status is not JobStatus.CANCELLED and job.error is not None:
            outcome = job.error.code
        metrics.attempt_ended(job.type, outcome)


class Claiming:
    """The claims of one process.

    `give_back` releases leases that their caller cannot take.
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
    ) -> None:
        self._store = store
        self._registry = registry
        self._events = events
        self._lease_seconds = lease_seconds
        self._give_back = give_back
        self._metrics = metrics
        self._lines: dict[frozenset[str], _Line] = {}
        self._seen: dict[str, float] = {}
        self._served: dict[str, int] = {}
        self._turn = itertools.count(1)
        self.is_ending = False
        """Whether the process shuts down: nobody waits any more."""
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
    ) -> list[Lease]:
        """Lease up to `limit` due jobs of these types; wait up to `wait_seconds` for the first.

        `stop`, once set, ends the wait. A caller that is cancelled takes nothing: what was leased
        for it in that moment is given back.
        """
        if wait_seconds <= 0 or self.is_ending or (stop is not None and stop.is_set()):
            return await self.claim(types, worker_id, limit)
        line = self._lines.setdefault(frozenset(types), _Line(self, tuple(types)))
        waiter = _Waiter(worker_id, limit, asyncio.get_running_loop().create_future())
        line.join(waiter)
        stopped = None if stop is None else asyncio.create_task(stop.wait())
        ends: set[asyncio.Future[Any]] = {waiter.leases}
        if stopped is not None:
            ends.add(stopped)
        try:
            await asyncio.wait(ends, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiter.leases.done() or waiter.is_served:
                # A claim for it is under way: its jobs are this caller's.
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

    async def claim(self, types: Sequence[str], worker_id: str, limit: int) -> list[Lease]:
        """Lease what is due now, at once."""
        # In a task of its own: a caller that is cancelled in mid-claim must not take leases along.
        looking = asyncio.create_task(self.look(types, worker_id, limit, thorough=True))
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
        self, types: Sequence[str], worker_id: str, limit: int, *, thorough: bool = False
    ) -> tuple[list[Lease], bool]:
        """The same, and whether everything that is due was looked at."""
        await self.show_worker(types)
        limits = self.limits(types)
        # Types of one priority take turns: first those whose last turn is longest ago.
        turns = tuple(sorted(types, key=lambda name: self._served.get(name, 0)))
        claimed = await self._store.claim(
            Claim(turns, limits, worker_id, limit, self._lease_seconds, thorough)
        )
        for each in claimed.leased:
            self._served[each.job.type] = next(self._turn)
        happened = [ended_event(job) for job in claimed.recovered]
        happened += [JobEvent.of("job.started", each.job) for each in claimed.leased]
        self._events.publish(happened)
        count_recovered(self._metrics, claimed.recovered)
        leases = [
            Lease(each.job.id.hex + each.token, each.job, each.expires_at, each.deadline_at)
            for each in claimed.leased
        ]
        leases.sort(key=lambda lease: -lease.job.priority)
        return leases, claimed.everything

    def limits(self, types: Sequence[str]) -> dict[str, int]:
        """The concurrency limits of those types that have one."""
        return {
            name: limit
            for name in types
            if (limit := self._registry.policy(name).concurrency_limit) is not None
        }

    async def show_worker(self, types: Sequence[str]) -> None:
        """Note that these types are worked here, also while no slot is free to lease more.

        Written at most every ten seconds per type.
        """
        now = asyncio.get_running_loop().time()
        stale = [t for t in types if now - self._seen.get(t, -1e9) > WORKER_SEEN_SECONDS]
        if stale:
            self._seen |= dict.fromkeys(stale, now)
            await self._store.see_worker(stale)

    async def seconds_to_next(self, types: Sequence[str]) -> float | None:
        """Seconds until a claim of these types may find more than now; None: no time is known."""
        return await self._store.next_due(types, self.limits(types))

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
            # They run out by themselves.
            log.warning("leases.not_returned", leases=len(leases), reason=str(error)[:200])

    @property
    def events(self) -> Events:
        """The events that wake lines."""
        return self._events

    def end(self) -> None:
        """End every wait: the process shuts down."""
        self.is_ending = True
        for line in self._lines.values():
            line.end()

    def drop(self, line: _Line) -> None:
        """Forget a line in which nobody waits any more."""
        self._lines.pop(frozenset(line.types), None)

    async def close(self) -> None:
        """Wait until claims under way have ended and leases that nobody took are given back."""
        lines = [line.task for line in self._lines.values() if line.task is not None]
        if under_way := {*self._looking, *lines}:
            await asyncio.wait(under_way, timeout=CLOSE_SECONDS)
        if self._returning:
            await asyncio.wait(self._returning, timeout=self._lease_seconds)


@dataclass(eq=False, slots=True)
class _Waiter:
    """A caller in a line."""

    worker_id: str
    limit: int
    leases: asyncio.Future[list[Lease]]
    is_served: bool = False
    is_leaving: bool = False
    is_gone: bool = False


class _Line:
    """Those who wait for jobs of the same types, first come first served."""

    def __init__(self, claiming: Claiming, types: tuple[str, ...]) -> None:
        self.types = types
        self._claiming = claiming
        self._waiters: deque[_Waiter] = deque()
        self._woken = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def join(self, waiter: _Waiter) -> None:
        """Take a place at the end, and look at the queue once for it."""
        self._waiters.append(waiter)
        self._woken.set()
        if self.task is None:
            self.task = asyncio.create_task(self._run(), name="leases")

    def leave(self, waiter: _Waiter) -> None:
        """Give the place up. A line that has emptied ends."""
        with suppress(ValueError):
            self._waiters.remove(waiter)
        if not self._waiters:
            self._woken.set()

    def end(self) -> None:
        """End every wait without a lease; a claim that is under way ends its own."""
        for waiter in self._waiters:
            if not waiter.is_served and not waiter.leases.done():
                waiter.leases.set_result([])

    async def _run(self) -> None:
        claiming = self._claiming
        limited = list(claiming.limits(self.types))
        locked = 0
        try:
            with claiming.events.waiting_for(self.types, limited) as self._woken:
                while self._waiters:
                    self._woken.clear()
                    everything = await self._serve()
                    if not self._waiters:
                        break
                    seconds = await claiming.seconds_to_next(self.types) if everything else 0.25
                    if seconds is not None and seconds <= 0:
                        # Due, and not claimed: another transaction has the row locked.
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
        """Claim for one waiter after the other, until a claim finds nothing more."""
        everything = True
        while self._waiters:
            waiter = self._waiters[0]
            if waiter.leases.done() or waiter.is_gone:
                self._waiters.popleft()
                continue
            waiter.is_served = True
            try:
                leases, everything = await self._claiming.look(
                    self.types, waiter.worker_id, waiter.limit
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
        """Raise the error in every caller: the database did not answer."""
        for waiter in self._waiters:
            if not waiter.leases.done():
                waiter.leases.set_exception(error)
