"""`Worker`: leases due jobs for its free slots, runs them, and stops within a bounded time.

It holds no state that must survive: if it dies, its leases expire and the jobs run elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Final, Self
from uuid import UUID

import structlog

from job_registry import DefinitionError, WorkerExtension
from job_registry.asset_place import anchored
from job_registry_api import defaults
from job_registry_api.logs import log_unexpected
from job_registry_api.queue.claiming import BusyWorker, Lease
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.job_logs import MAX_LINES
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import log_unregistered_types
from job_registry_api.queue.requests import MAX_LEASE, MAX_WAIT_SECONDS
from job_registry_api.queue.upkeep import maintain
from job_registry_api.settings import Settings
from job_registry_api.worker.alarm import Alarm
from job_registry_api.worker.attempt import RELEASE_SECONDS, Attempt, Equipment
from job_registry_api.worker.extensions import lifespans
from job_registry_api.worker.lease_keeper import END_SECONDS, LeaseKeeper, wait_at_most
from job_registry_api.worker.memory_limit import address_space
from job_registry_api.worker.processes import LEAVE_SECONDS, HandlerProcesses, address_of
from job_registry_api.worker.running import tasks_of_handlers_contained

GATHER_SECONDS: Final = 0.005
"""How long a worker with a free slot waits for more free slots after it was full. With half of them
free it does not wait."""

CLAIM_SECONDS: Final = 1.0
"""How long a claim under way may take once the worker stops."""

CONNECTING_SECONDS: Final = 0.005
"""How often a worker that starts looks whether leases can be renewed."""

MAX_CANCELLED: Final = 1_000
"""How many cancelled jobs that do not run here are remembered, in case a claim has just leased one.
"""

UNANSWERED_SECONDS: Final = 2.0
"""How often a worker looks for leases that it does not know of, after a claim has failed."""

SHORTEST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 5.0
"""How long a worker waits between claims during an outage. The pauses double."""

CLOSE_SECONDS: Final = RELEASE_SECONDS + CLAIM_SECONDS + END_SECONDS + LEAVE_SECONDS + 1.0
"""How long `Worker.run` may take after its `shutdown_seconds`, even if something hangs."""

log = structlog.get_logger("job_registry.worker")


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """The state of a worker, for health checks and metrics.

    `loop_blocked_seconds` is how long its event loop has not responded, or how long a claim has
    taken beyond its longest wait for a job. `renewals_behind_seconds` is by how much renewals of
    leases are late, other than by an outage of the database. `overdue` counts handlers that run on
    after their attempt has ended.
    """

    loop_blocked_seconds: float
    renewals_behind_seconds: float
    running: int
    overdue: int


class Worker:
    """Runs up to `concurrency` jobs at once, and does the upkeep of the queue.

        async with Worker(queue).running():
            ...

    `types` are the job types to work; by default, all with a handler. An empty list is none of
    them. `assets` is where jobs read and write files. `worker_id` names the worker in attempts.
    After `stop`, running jobs have `shutdown_seconds` to end. `extensions` default to those of the
    registry. Succeeded jobs are deleted `keep_succeeded_days` after they ended, failed and
    cancelled jobs after `keep_failed_days`. Jobs that no worker could read for `parked_days` fail.
    With each attempt its last `keep_log_lines` log lines are kept, at most 1,000.

    Raises:
        DefinitionError: a handler with `run_in="process"` cannot be imported by its process.
        JobTypeNotFound: `types` names a type that the registry does not have.
        ValueError: `concurrency`, `shutdown_seconds` or `keep_log_lines` is too low.
    """

    def __init__(
        self,
        queue: JobQueue,
        *,
        types: Sequence[str] | None = None,
        concurrency: int = defaults.WORKER_CONCURRENCY,
        assets: str = defaults.ASSETS,
        shutdown_seconds: float = defaults.SHUTDOWN_SECONDS,
        worker_id: str | None = None,
        extensions: Sequence[WorkerExtension] | None = None,
        keep_succeeded_days: float = defaults.KEEP_SUCCEEDED_DAYS,
        keep_failed_days: float = defaults.KEEP_FAILED_DAYS,
        parked_days: float = defaults.PARKED_DAYS,
        keep_log_lines: int = defaults.KEEP_LOG_LINES,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency: expected 1 or more; got {concurrency}")
        if shutdown_seconds < 0:
            raise ValueError(f"shutdown_seconds: expected 0 or more; got {shutdown_seconds}")
        if keep_log_lines < 0:
            raise ValueError(f"keep_log_lines: expected 0 or more; got {keep_log_lines}")
        registry = queue.registry
        if types is None:
            types = [name for name in registry if registry[name].has_handler]
        self.types = tuple(dict.fromkeys(registry.get_type(name).name for name in types))
        self.worker_id = worker_id or _worker_id()
        self._has_own_name = worker_id is None
        """Whether no other worker has this name."""
        self._created_in = os.getpid()
        self.started = asyncio.Event()
        """Set once the lifespans have started."""
        self._queue = queue
        self._concurrency = concurrency
        self._assets = anchored(assets)
        self._shutdown_seconds = shutdown_seconds
        self._keep_succeeded_days = keep_succeeded_days
        self._keep_failed_days = keep_failed_days
        self._parked_days = parked_days
        self._keep_log_lines = min(keep_log_lines, MAX_LINES)
        self._extensions = tuple(registry.extensions if extensions is None else extensions)
        self._stopping = asyncio.Event()
        self._stopping_now = asyncio.Event()
        self._running: dict[asyncio.Task[None], Attempt] = {}
        self.handlers_left = 0
        """How many handlers have not stopped with the worker, although their jobs may run elsewhere
        now. A process should end at once if there are some."""
        self._context = copy_context()
        """The context variables in which jobs run, those of `run`. Leases that come with reports
        come in the context of the first report."""
        self._ended = asyncio.Event()
        self._cancelled: dict[UUID, None] = {}
        self._is_claiming = False
        self._turned_at: float | None = None
        self._keeper = LeaseKeeper(queue)
        in_processes = [n for n in self.types if registry.get_type(n).run_in == "process"]
        for name in in_processes:
            if address_of(registry[name]) is None:
                raise DefinitionError(
                    f'job type {name}: with run_in="process" it must be at the top level of an'
                    " importable module, because its process imports it from there"
                )
        limited = [n for n in in_processes if registry[n].memory_limit_mb is not None]
        if limited and address_space() is None:
            log.warning("worker.memory_not_limited", types=limited, platform=sys.platform)
        self._processes = HandlerProcesses(
            assets=self._assets,
            extensions=self._extensions,
            max_bytes=registry.max_payload_bytes,
            needed=bool(in_processes),
            traced=queue.tracing is not None,
        )

    @property
    def overdue(self) -> int:
        """How many handlers run on after their attempt has ended. Each keeps a slot."""
        return sum(attempt.overdue for attempt in list(self._running.values()))

    @property
    def health(self) -> WorkerHealth:
        """The state of the worker at this moment. Thread-safe."""
        blocked = max(self._keeper.loop_blocked_seconds, self._claim_hangs_seconds())
        return WorkerHealth(
            loop_blocked_seconds=blocked,
            renewals_behind_seconds=self._keeper.seconds_behind,
            running=len(self._running),
            overdue=self.overdue,
        )

    def _claim_hangs_seconds(self) -> float:
        turned_at = self._turned_at
        if turned_at is None or self._stopping.is_set():
            return 0.0
        return max(0.0, time.monotonic() - turned_at - MAX_WAIT_SECONDS)

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Lease no more jobs, and let running jobs end. A second call releases them at once."""
        if self._stopping.is_set():
            self._stopping_now.set()
        self._stopping.set()
        self._ended.set()

    def abandon(self) -> None:
        """Release every lease and kill every handler's process, before the process is ended.

        Call it from another thread than the hanging event loop. It returns within seconds.
        """
        self._processes.kill_all()
        self._keeper.release_all()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Run jobs while the context is open. At its end, running jobs have `shutdown_seconds`.

        Raises:
            WorkerStartError: a lifespan failed to start.
        """
        running = asyncio.create_task(self.run(), name="worker")
        started = asyncio.create_task(self.started.wait())
        try:
            await asyncio.wait({running, started}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait({running})
            raise
        finally:
            started.cancel()
        if running.done():
            running.result()
        try:
            yield self
        finally:
            # A second call would release running jobs at once.
            if not self.is_stopping:
                self.stop()
            await running

    async def run(self) -> None:
        """Run jobs until `stop`, then return within `shutdown_seconds` and `CLOSE_SECONDS`.

        During an outage of the database it waits.

        Raises:
            WorkerStartError: a lifespan failed to start.
            RuntimeError: the queue is not open on this event loop.
        """
        self._queue.check_open()
        if self._has_own_name and self._created_in != os.getpid():
            # Other forks of the process that created this worker have its name as well.
            self.worker_id, self._created_in = _worker_id(), os.getpid()
        async with lifespans(self._extensions) as state:
            equipment = Equipment(
                self._queue,
                self._keeper,
                Alarm(),
                self._processes,
                tuple(each for extension in self._extensions for each in extension.middleware),
                state,
                self._assets,
                self._keep_log_lines,
            )
            self._context = copy_context()
            self._keeper.start()
            self.started.set()
            log.info("worker.started", worker_id=self.worker_id, types=list(self.types))
            try:
                await log_unregistered_types(self._queue)
                busy = BusyWorker(
                    self.types,
                    self.worker_id,
                    self._wanted,
                    lambda leases: self._take(equipment, leases),
                )
                with (
                    self._queue.events.on_cancel_requested(self._cancel),
                    self._queue.leasing_with_reports(busy),
                    tasks_of_handlers_contained(),
                ):
                    await self._work(equipment)
            finally:
                await self._processes.close()
                await self._keeper.end()
        log.info("worker.stopped", worker_id=self.worker_id)

    async def _work(self, equipment: Equipment) -> None:
        leasing = asyncio.create_task(self._lease_until_stop(equipment), name="leasing")
        unanswered = asyncio.create_task(self._release_unanswered(), name="unanswered")
        upkeep = asyncio.create_task(
            maintain(
                self._queue,
                self._stopping,
                keep_succeeded_days=self._keep_succeeded_days,
                keep_failed_days=self._keep_failed_days,
                parked_days=self._parked_days,
            ),
            name="upkeep",
        )
        try:
            await self._stopping.wait()
            # Not cancelled at once: the jobs that a claim has just leased would be lost.
            await asyncio.wait({leasing, upkeep, unanswered}, timeout=CLAIM_SECONDS)
            leasing.cancel()
            await self._finish()
        except asyncio.CancelledError:
            # No handler may run on while its lease is not renewed.
            leasing.cancel()
            self._stopping.set()
            self._stopping_now.set()
            await self._finish()
            raise
        finally:
            upkeep.cancel()
            unanswered.cancel()

    async def _lease_until_stop(self, equipment: Equipment) -> None:
        # On a slow network, a short lease would end before its first renewal.
        while not self._keeper.has_connected and not self._stopping.is_set():
            await wait_at_most(self._stopping, CONNECTING_SECONDS)
        pause = SHORTEST_PAUSE
        while self.types and not self._stopping.is_set():
            self._turned_at = time.monotonic()
            try:
                await self._lease_some(equipment)
                pause = SHORTEST_PAUSE
            except QueueUnavailable as error:
                log.warning("worker.waiting", reason=error.reason, seconds=pause)
                await self._pause(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            except Exception as error:
                log_unexpected("worker", error)
                await wait_at_most(self._stopping, 1.0)

    async def _release_unanswered(self) -> None:
        """Release what claims have leased whose answers did not come."""
        while self._has_own_name and not self._stopping.is_set():
            await wait_at_most(self._stopping, UNANSWERED_SECONDS)
            try:
                await self._queue.release_unanswered(self.worker_id, self._runs)
            except QueueUnavailable:
                pass  # It is tried again.
            except Exception as error:
                log_unexpected("worker", error)

    def _runs(self, job_id: UUID) -> bool:
        return any(attempt.job_id == job_id for attempt in self._running.values())

    async def _pause(self, seconds: float) -> None:
        """Wait before the next claim. An event of a job ends the wait: the database is back."""
        with self._queue.events.waiting_for(self.types, ()) as news:
            await wait_at_most(self._stopping, SHORTEST_PAUSE)
            waits = [asyncio.create_task(each.wait()) for each in (self._stopping, news)]
            try:
                await asyncio.wait(
                    waits,
                    timeout=max(0.0, seconds - SHORTEST_PAUSE),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                for wait in waits:
                    wait.cancel()

    async def _lease_some(self, equipment: Equipment) -> None:
        free = self._concurrency - len(self._running)
        if free <= 0:
            # The worker is busy, not gone: renew what `NoWorkerSeen` is derived from.
            await self._queue.show_worker(self.types)
            self._ended.clear()
            if len(self._running) >= self._concurrency and not self._stopping.is_set():
                await wait_at_most(self._ended, 10)
            # Short jobs end within a moment of each other: make one claim for all of them.
            if 2 * len(self._running) > self._concurrency:
                await wait_at_most(self._stopping, GATHER_SECONDS)
            return
        self._is_claiming = True
        try:
            leases = await self._queue.lease(
                self.types,
                self.worker_id,
                limit=min(free, MAX_LEASE),
                wait_seconds=MAX_WAIT_SECONDS,
                stop=self._stopping,
            )
        finally:
            self._is_claiming = False
        self._start(equipment, leases)

    def _wanted(self, reported: Collection[UUID]) -> int:
        """Return how many jobs to lease in exchange for reports: none unless this worker is full,
        because a worker with a free slot leases for itself, or waits for jobs.

        None either while many reports wait for locked rows: their leases are held, too.

        Only its own reports count. Until they are stored their slots are in use, while that of a
        job that is reported in another way may be free before the leases come.
        """
        if self._is_claiming or self._stopping.is_set():
            return 0
        if not self._concurrency <= len(self._running) < 2 * self._concurrency:
            return 0
        handlers = sum(not attempt.has_ended for attempt in self._running.values())
        own = sum(attempt.job_id in reported for attempt in self._running.values())
        return min(own, self._concurrency - handlers)

    def _take(self, equipment: Equipment, leases: Sequence[Lease]) -> None:
        """Run jobs that were leased together with reports."""
        if self._stopping.is_set():
            self._queue.give_back(leases)
        else:
            self._start(equipment, leases)

    def _start(self, equipment: Equipment, leases: Sequence[Lease]) -> None:
        loop = asyncio.get_running_loop()
        for lease in leases:
            attempt = Attempt(equipment, lease, check_at_once=lease.job.id in self._cancelled)
            task = loop.create_task(attempt.run(), context=self._context.copy())
            self._running[task] = attempt
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._ended.set()

    def _cancel(self, job_id: UUID) -> None:
        """Cancel a job if it runs here. Called for every cancellation, in any process."""
        for attempt in self._running.values():
            if attempt.job_id == job_id:
                attempt.cancel()
                return
        # A claim under way may have leased the job before it was cancelled.
        self._cancelled[job_id] = None
        if len(self._cancelled) > MAX_CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]

    async def _finish(self) -> None:
        """Let running jobs end, release the rest, and abandon handlers that do not stop."""
        until = time.monotonic() + self._shutdown_seconds
        if self._unfinished():
            log.info("worker.finishing", worker_id=self.worker_id, jobs=len(self._running))
        now = asyncio.create_task(self._stopping_now.wait())
        while (
            (tasks := self._unfinished())
            and not now.done()
            and (left := until - time.monotonic()) > 0
        ):
            await asyncio.wait({now, *tasks}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        now.cancel()
        attempts = list(self._running.values())
        for attempt in attempts:
            attempt.release()
        if tasks := self._unfinished():
            await asyncio.wait(tasks, timeout=RELEASE_SECONDS + 1.0)
        for task, attempt in list(self._running.items()):
            if not attempt.overdue:
                log.warning("worker.left_behind", job_id=str(attempt.job_id))
            task.cancel()
        self.handlers_left = sum(attempt.is_left or attempt.overdue for attempt in attempts)

    def _unfinished(self) -> list[asyncio.Task[None]]:
        return [task for task, attempt in self._running.items() if not attempt.overdue]


def worker_of(settings: Settings, queue: JobQueue, types: Sequence[str] | None = None) -> Worker:
    """Return a worker with these settings."""
    return Worker(
        queue,
        types=types,
        concurrency=settings.worker_concurrency,
        assets=settings.assets,
        shutdown_seconds=settings.shutdown_seconds,
        keep_succeeded_days=settings.keep_succeeded_days,
        keep_failed_days=settings.keep_failed_days,
        keep_log_lines=settings.keep_log_lines,
        parked_days=settings.parked_days,
    )


def _worker_id() -> str:
    return f"{socket.gethostname()[:100]}:{os.getpid()}:{secrets.token_hex(3)}"
