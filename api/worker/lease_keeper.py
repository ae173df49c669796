"""Renews the leases of a worker, in a thread with its own event loop and database connection.

A handler that blocks the worker's event loop does not delay it. It renews all leases in one
statement, stores progress and log lines, receives cancellations, and notices when the worker's loop
is blocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from job_registry_api.logs import log_unexpected, stack_of
from job_registry_api.queue.errors import LeaseLost, QueueUnavailable, reason_of
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import Renewed
from job_registry_api.worker.log_writer import LogWriter
from job_registry_api.worker.watchdog import Term

PROGRESS_SECONDS: Final = 1.0
"""The shortest time between two writes of a job's progress."""

TICK_SECONDS: Final = 1.0
"""How often the keeper looks for leases, and checks the worker's event loop while it has some."""

EARLY_SECONDS: Final = 1.0
"""The time between the stop of a handler and the end of its lease, if the lease cannot be renewed.
It is at most a tenth of the lease. Once the lease ends, another worker may run the job."""

BLOCKED_SECONDS: Final = 2.0
"""How long an event loop may not respond before it counts as blocked."""

END_SECONDS: Final = 2.0
"""How long the keeper may take to end, and to release leases for a process that hangs."""

log = structlog.get_logger("job_registry.worker")

Callback = Callable[[], None]


@dataclass(eq=False)
class Hold:
    """A lease to renew. The callbacks run on the worker's event loop, each at most once.

    Every attempt makes one, so what most of them never change is a default of the class.
    """

    token: str
    name: str
    on_cancel: Callback
    on_lost: Callback
    on_out_of_touch: Callback
    blocks_loop: bool
    renewed_at: float = field(default_factory=time.monotonic)
    answered_at: float = field(default_factory=time.monotonic)
    """When the database last confirmed the lease."""
    in_touch_at: float = field(default_factory=time.monotonic)
    """When the last claim or renewal began that has succeeded. The lease is as old, at most."""
    progressed_at: float = field(default=float("-inf"), init=False)
    progress: bytes | None = field(default=None, init=False)
    sending_progress: bool = field(default=False, init=False)
    landed: asyncio.Future[None] | None = field(default=None, init=False)
    """Set once the write of the progress that is being sent has succeeded or failed."""
    ended: bool = field(default=False, init=False)
    """Whether the attempt has ended in the queue. Only its place in the limit is then renewed."""
    cancel_reported: bool = field(default=False, init=False)
    out_of_touch_reported: bool = field(default=False, init=False)
    term: Term | None = field(default=None, init=False)
    """Until when the process of the handler may run, if it has one."""

    @property
    def has_progress(self) -> bool:
        """Whether some progress is not stored yet. Thread-safe."""
        # In this order, because it is marked as being sent before it no longer waits.
        return self.progress is not None or self.sending_progress


class LeaseKeeper:
    """Renews the leases of one worker.

    Call its methods on the worker's event loop, unless their docstring says otherwise. No exception
    ends it: it repeats a failed renewal until it succeeds. Only the database decides that a lease
    is lost.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._every = queue.lease_seconds / 3
        early = min(EARLY_SECONDS, queue.lease_seconds / 10)
        self.grace_seconds = early / 2
        """How long a handler out of touch may take to stop, before its process is killed."""
        self._stop_after = queue.lease_seconds - early
        self._holds: dict[str, Hold] = {}
        self._lock = threading.Lock()
        self._worker_loop: asyncio.AbstractEventLoop | None = None
        self._worker_thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._old_lease: asyncio.Event | None = None
        """Set when a lease is held whose claim took long, so that it is to be stopped soon."""
        self._ending = False
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._turned_at = time.monotonic()
        self._awaits_turn = False
        self._blocked_warned = 0.0
        self._unavailable_at = float("-inf")
        """When the database was last found to be unavailable."""
        self.has_connected = False
        """Whether its first connection to the database has opened or failed."""
        self.logs = LogWriter()
        """Stores the log lines of handlers on the loop of this thread."""

    def start(self) -> None:
        """Start the thread. Call it on the worker's event loop."""
        self._worker_loop = asyncio.get_running_loop()
        self._worker_thread = threading.current_thread()
        self._turned_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
        self._thread.start()

    async def end(self) -> None:
        """End the thread, within a bounded time."""
        self._ending = True
        self._alarm(self._wake)
        give_up = time.monotonic() + END_SECONDS
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def hold(self, hold: Hold) -> None:
        """Renew a lease from now on."""
        with self._lock:
            self._holds[hold.token] = hold
        # Mostly without an alarm: the thread looks often enough for the renewal of a new lease.
        if hold.renewed_at + self._every / 2 <= time.monotonic():
            self._alarm(self._wake)
            self._alarm(self._old_lease)

    def renew_at_once(self, token: str) -> None:
        """Renew a lease now, to check whether its job is cancelled."""
        with self._lock:
            if token in self._holds:
                self._holds[token].renewed_at = float("-inf")
        self._alarm(self._wake)

    def is_in_touch(self, hold: Hold) -> bool:
        """Return whether the lease is sure to be in force for another moment."""
        return time.monotonic() < hold.in_touch_at + self._stop_after

    def limit(self, hold: Hold, term: Term) -> None:
        """Let a term end with the lease, and move its end with each renewal."""
        with self._lock:
            hold.term = term
            self._move(hold)

    def _move(self, hold: Hold) -> None:
        if hold.term is not None:
            hold.term.end_at(hold.in_touch_at + self._stop_after + self.grace_seconds)

    def keep_place(self, token: str) -> None:
        """Renew only the place in the concurrency limit, because the attempt has timed out."""
        with self._lock:
            if token in self._holds:
                self._holds[token].ended = True

    def drop(self, token: str) -> None:
        """Stop renewing a lease."""
        with self._lock:
            self._holds.pop(token, None)

    def progress(self, token: str, text: bytes) -> None:
        """Store a job's progress soon; a newer value replaces one that waits. Thread-safe."""
        with self._lock:
            hold = self._holds.get(token)
            if hold is None:
                return
            alarm = hold.progress is None
            hold.progress = text
        if alarm:
            self._alarm(self._wake)

    async def take_progress(self, token: str) -> bytes | None:
        """Return the progress that is not stored yet, and forget it.

        Waits for a write under way, so that it does not arrive after the end of the attempt.
        """
        landed: asyncio.Future[None] | None = None
        with self._lock:
            hold = self._holds.get(token)
            if hold is not None and hold.sending_progress:
                landed = hold.landed = asyncio.get_running_loop().create_future()
        if landed is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(landed, END_SECONDS)
        with self._lock:
            if hold is None:
                return None
            text, hold.progress = hold.progress, None
            return text

    @property
    def seconds_behind(self) -> float:
        """By how many seconds the most overdue renewal is late; 0 if none is. Thread-safe.

        A renewal is not late while it is tried, and the database is not available.
        """
        with self._lock:
            longest_ago = min((hold.answered_at for hold in self._holds.values()), default=None)
        if longest_ago is None:
            return 0.0
        return max(0.0, time.monotonic() - max(longest_ago, self._unavailable_at) - self._every)

    @property
    def loop_blocked_seconds(self) -> float:
        """How long the worker's event loop has not responded. Thread-safe."""
        return time.monotonic() - self._turned_at if self._awaits_turn else 0.0

    def release_all(self) -> None:
        """Release every lease, because the event loop hangs. Call it from another thread."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        with self._lock:
            tokens = [hold.token for hold in self._holds.values() if not hold.ended]
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._release(tokens), loop).result(END_SECONDS)

    async def _release(self, tokens: Sequence[str]) -> None:
        assert self._own is not None
        await asyncio.gather(*map(self._own.release, tokens), return_exceptions=True)

    _own: JobQueue | None = None
    """The queue as opened on this thread's loop."""

    def _run(self) -> None:
        while not self._ending:
            try:
                with asyncio.Runner() as runner:
                    runner.run(self._keep())
            except BaseException as error:
                log_unexpected("lease keeper", error)
                time.sleep(0.5)

    async def _keep(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        self._old_lease = asyncio.Event()
        pause, not_before = 0.1, 0.0
        async with (
            self._queue.in_another_loop(pool_size=2) as self._own,
            _beside(self.logs.run(self._own)),
            _beside(self._watch_touch(self._old_lease)),
            _beside(self._connect(self._own)),
        ):
            while not self._ending:
                due_in = max(self._due_in(), not_before - time.monotonic())
                await wait_at_most(self._wake, min(due_in, TICK_SECONDS))
                self._wake.clear()
                self._watch_loop()
                if time.monotonic() < not_before or self._ending:
                    continue
                holds, renewals = self._collect()
                if not holds:
                    continue
                requested_at = time.monotonic()
                try:
                    async with asyncio.timeout(max(5.0, self._every)):
                        answers = await self._own.renew(renewals)
                except Exception as error:
                    self._failed(holds, renewals, error)
                    not_before = time.monotonic() + pause
                    pause = min(pause * 2, 2.0, self._every)
                else:
                    pause = 0.1
                    self._answered(holds, renewals, answers, requested_at)

    async def _connect(self, own: JobQueue) -> None:
        """Open the connection for renewals. It takes a dozen round trips to PostgreSQL."""
        try:
            with contextlib.suppress(Exception):
                await own.connect()
        finally:
            self.has_connected = True

    def _due_in(self) -> float:
        """Return the seconds until the next renewal, also of a lease that is held from now on."""
        now = time.monotonic()
        with self._lock:
            if not self._holds:
                return self._every
            return max(0.0, min(self._due_at(hold) for hold in self._holds.values()) - now)

    def _due_at(self, hold: Hold) -> float:
        due_at = hold.renewed_at + self._every
        if hold.progress is not None:
            due_at = min(due_at, hold.progressed_at + PROGRESS_SECONDS)
        return due_at

    def _collect(self) -> tuple[list[Hold], list[Renewal]]:
        """Return what to renew now: if one lease is due, all leases that are due soon."""
        now = time.monotonic()
        holds, renewals = [], []
        with self._lock:
            lease_due = any(hold.renewed_at + self._every <= now for hold in self._holds.values())
            for hold in self._holds.values():
                soon = lease_due and hold.renewed_at + self._every / 2 <= now
                if not soon and self._due_at(hold) > now:
                    continue
                holds.append(hold)
                renewals.append(Renewal(hold.token, hold.progress))
                if hold.progress is not None:
                    hold.sending_progress = True
                    hold.progress, hold.progressed_at = None, now
                hold.renewed_at = now
        return holds, renewals

    def _answered(
        self,
        holds: Sequence[Hold],
        renewals: Sequence[Renewal],
        answers: Sequence[Renewed | LeaseLost],
        requested_at: float,
    ) -> None:
        now = time.monotonic()
        with self._lock:
            for hold, renewal, answer in zip(holds, renewals, answers, strict=True):
                if isinstance(answer, Renewed) and not answer.renewed:
                    # Another transaction has locked the row: try again soon. The lease ends as if
                    # there had been no answer.
                    hold.renewed_at = now - self._every * 3 / 4
                    if hold.progress is None:
                        hold.progress = renewal.progress
                else:
                    hold.answered_at = now
                    hold.in_touch_at = requested_at
                    hold.out_of_touch_reported = False
                self._landed(hold)
                if isinstance(answer, LeaseLost):
                    if not hold.ended:
                        hold.ended = True
                        self._call_on_worker_loop(hold.on_lost)
                    continue
                self._move(hold)
                if answer.cancel_requested and not hold.cancel_reported:
                    hold.cancel_reported = True
                    self._call_on_worker_loop(hold.on_cancel)

    def _failed(self, holds: Sequence[Hold], renewals: Sequence[Renewal], error: Exception) -> None:
        unavailable = isinstance(error, QueueUnavailable | TimeoutError)
        log.warning(
            "worker.renewal_failed",
            reason=reason_of(error),
            leases=len(holds),
            exc_info=None if unavailable else error,
        )
        self._queue.metrics.lease_renewal_failed()
        now = time.monotonic()
        if unavailable:
            self._unavailable_at = now
        with self._lock:
            for hold, renewal in zip(holds, renewals, strict=True):
                # Due at once.
                hold.renewed_at = min(hold.renewed_at, now - self._every)
                if hold.progress is None:
                    hold.progress = renewal.progress
                self._landed(hold)

    async def _watch_touch(self, old_lease: asyncio.Event) -> None:
        """Stop handlers whose leases end, because they could not be renewed for that long.

        Beside the renewals: one that is not answered takes as long as the network lets it.
        """
        while True:
            now = time.monotonic()
            next_at = now + min(TICK_SECONDS, self._stop_after / 2)
            with self._lock:
                for hold in self._holds.values():
                    if hold.ended or hold.out_of_touch_reported:
                        continue
                    stop_at = hold.in_touch_at + self._stop_after
                    if now >= stop_at:
                        hold.out_of_touch_reported = True
                        self._call_on_worker_loop(hold.on_out_of_touch)
                    next_at = min(next_at, stop_at)
            await wait_at_most(old_lease, max(0.01, next_at - now))
            old_lease.clear()

    def _landed(self, hold: Hold) -> None:
        hold.sending_progress = False
        if hold.landed is not None:
            landed, hold.landed = hold.landed, None
            self._call_on_worker_loop(lambda: None if landed.done() else landed.set_result(None))

    def _call_on_worker_loop(self, callback: Callback) -> None:
        assert self._worker_loop is not None
        with contextlib.suppress(RuntimeError):  # The worker's loop is closed.
            self._worker_loop.call_soon_threadsafe(callback)

    def _alarm(self, event: asyncio.Event | None) -> None:
        if self._loop is not None and event is not None:
            with contextlib.suppress(RuntimeError):  # The thread is ending.
                self._loop.call_soon_threadsafe(event.set)

    # The worker's event loop

    def _watch_loop(self) -> None:
        now = time.monotonic()
        with self._lock:
            running = [hold.name for hold in self._holds.values() if hold.blocks_loop]
        if not self._awaits_turn:
            if self._holds and now - self._turned_at >= TICK_SECONDS:
                self._turned_at, self._awaits_turn = now, True
                self._call_on_worker_loop(self._turned)
            return
        seconds = now - self._turned_at
        if seconds >= max(BLOCKED_SECONDS, 2 * self._blocked_warned):
            self._blocked_warned = seconds
            names = ", ".join(running[:20]) or "none of the async handlers"
            log.warning(
                f"event loop blocked for {seconds:.0f} s while running {names}",
                seconds=round(seconds, 1),
                stack=stack_of(self._worker_thread),
            )

    def _turned(self) -> None:
        """Note that the worker's event loop responds. Runs on that loop."""
        seconds = time.monotonic() - self._turned_at
        if self._blocked_warned:
            log.warning("worker.loop_turns_again", seconds=round(seconds, 1))
        self._blocked_warned = 0.0
        self._turned_at, self._awaits_turn = time.monotonic(), False


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run work beside this task, until the context ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def wait_at_most(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, at most for this time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
