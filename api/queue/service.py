"""`JobService`, the one door to the queue: validate, apply the policy, store, publish.

GraphQL, REST, the CLI and the worker call it and nothing below it.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, cast

from pydantic import JsonValue
from pydantic_core import from_json
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from uuid_utils.compat import uuid7

from api.metrics import Metrics
from api.queue.database import Database
from api.queue.errors import (
    IdempotencyConflict,
    InputInvalid,
    JobNotFound,
    JobStateConflict,
    LeaseLost,
    QueueUnavailable,
)
from api.queue.events import EventName, Events, JobEvent
from api.queue.group_commit import GroupCommit
from api.queue.models import (
    AttemptOutcome,
    AttemptRecord,
    JobCounts,
    JobError,
    JobRecord,
    JobStatus,
)
from api.queue.requests import (
    EnqueueRequest,
    check_lease,
    check_seconds,
    differing_paths,
    input_faults,
)
from api.queue.store import TIMED_OUT, Claim, JobStore, NewJob, Report, Stored
from registry import (
    JobPolicy,
    JobRegistry,
    JobTypeNotFound,
    PayloadInvalid,
    Violation,
    json_document,
)

DEFAULT_PRIORITY: Final = 50
WORKER_ABSENT_SECONDS: Final = 60.0
"""A type that no worker asked for in this time has none."""

WORKER_SEEN_SECONDS: Final = 10.0
"""How often a process notes in the database that it works a type."""

MIN_PAUSE_SECONDS: Final = 0.02
MAX_PAUSE_SECONDS: Final = 5.0
"""How long a waiting `lease` trusts that it was told of everything, before it looks by itself."""


class Enqueued(NamedTuple):
    """The stored job. `deduplicated` says that an earlier call with this key had stored it."""

    job: JobRecord
    deduplicated: bool = False


@dataclass(frozen=True, slots=True)
class JobValid:
    """What `enqueue` would store. `duplicate_of` is the job that has the key already."""

    max_attempts: int
    timeout_seconds: int
    priority: int
    next_run_at: datetime
    duplicate_of: JobRecord | None


Refusal = JobTypeNotFound | PayloadInvalid | InputInvalid | IdempotencyConflict


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list; an empty tuple is no restriction."""

    types: tuple[str, ...] = ()
    statuses: tuple[JobStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of jobs, newest first. The cursor of a job is its id."""

    jobs: list[JobRecord]
    has_next_page: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """A job that is this worker's until `expires_at`, and with heartbeats until `deadline_at`.

    `token` is secret to the worker and proves the lease in every later call.
    """

    token: str
    job: JobRecord
    expires_at: datetime
    deadline_at: datetime


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A renewed lease: until when, how long the attempt may still run, and whether to stop."""

    job: JobRecord
    expires_at: datetime
    seconds_left: float
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class ScheduledFor:
    """The job's time has not come."""

    next_run_at: datetime


@dataclass(frozen=True, slots=True)
class ConcurrencyLimitReached:
    """As many jobs of the type run as its policy allows."""

    limit: int
    running: int


@dataclass(frozen=True, slots=True)
class NoWorkerSeen:
    """No worker has asked for the type in the last minute; None: none ever has."""

    last_seen_seconds_ago: float | None


@dataclass(frozen=True, slots=True)
class BehindInQueue:
    """Workers are there, and this many jobs of the type go first (counted up to 1,000)."""

    ahead: int


WaitingReason = ScheduledFor | ConcurrencyLimitReached | NoWorkerSeen | BehindInQueue


class JobService:
    """The queue's operations. Each either happens whole, or raises and changed nothing.

    Each raises, beside what it names, `QueueUnavailable` when the database does not answer.
    `new_id` makes the ids of new jobs, UUIDv7; tests may bring their own. `metrics` are those of
    the process, where it has several services.
    """

    def __init__(
        self,
        registry: JobRegistry,
        database: Database,
        *,
        lease_seconds: float = 30.0,
        max_page_size: int = 200,
        max_bulk_size: int = 1_000,
        new_id: Callable[[], uuid.UUID] = uuid7,
        metrics: Metrics | None = None,
    ) -> None:
        self.registry = registry
        self.lease_seconds = lease_seconds
        self._max_page_size = max_page_size
        self._max_bulk_size = max_bulk_size
        self.metrics = Metrics(registry) if metrics is None else metrics
        self.events = Events(database, self.metrics)
        self._database = database
        database.on_unavailable = self.metrics.database_unavailable
        self._store = JobStore(database.dialect)
        self._new_id = new_id
        self._inserts = GroupCommit(self._insert)
        self._reports = GroupCommit(self._end)
        self._seen: dict[str, float] = {}
        self._waits_ended = asyncio.Event()

    # Enqueue

    async def enqueue(
        self,
        request: EnqueueRequest,
        *,
        created_by: str | None = None,
        session: AsyncSession | None = None,
    ) -> Enqueued:
        """Stores a job. When this returns, the job is on disk.

        With the caller's own `session`, on the queue's database, the job joins the caller's
        transaction: it appears if and when the caller commits, together with the caller's rows,
        and not at all if the caller rolls back.

        Raises:
            JobTypeNotFound: no such job type.
            PayloadInvalid: the payload, with every fault of it.
            InputInvalid: another value is out of its range; payload faults are then here too.
            IdempotencyConflict: the key belongs to a job of this type with another payload.
        """
        new = self._admit(request, created_by)
        if session is None:
            return _enqueued(new, request, await self._inserts.submit(new))
        connection = await session.connection()
        stored = await self._store.insert(connection, [new])
        if new.id not in stored:
            raise QueueUnavailable("the holder of the idempotency key was deleted meanwhile")
        enqueued = _enqueued(new, request, stored[new.id])
        if not enqueued.deduplicated:
            self._publish_after_commit(session, [JobEvent.of("job.created", enqueued.job)])
            await self.events.announce(connection, [JobEvent.of("job.created", enqueued.job)])
        return enqueued

    async def enqueue_many(
        self,
        requests: Sequence[EnqueueRequest],
        *,
        atomic: bool = False,
        created_by: str | None = None,
    ) -> list[Enqueued | Refusal]:
        """Stores up to `max_bulk_size` jobs in one transaction; gives a result for each, in order.

        A refused one is its error, given back in its place. With `atomic` one refusal leaves
        every job unstored; those that were good themselves are then `InputInvalid` with the code
        `not_stored`.

        Raises:
            InputInvalid: there are more of them.
        """
        if len(requests) > self._max_bulk_size:
            message = (
                f"At most {self._max_bulk_size} jobs go in one call; here are {len(requests)}."
            )
            raise InputInvalid((Violation("", "too_long", message),))
        results: dict[int, Enqueued | Refusal] = {}
        stored: Sequence[Stored]
        admitted: dict[int, NewJob] = {}
        for index, request in enumerate(requests):
            try:
                admitted[index] = self._admit(request, created_by)
            except (JobTypeNotFound, PayloadInvalid, InputInvalid) as refusal:
                results[index] = refusal
        if not (atomic and results):
            try:
                stored = await self._insert_or_each(list(admitted.values()), atomic=atomic)
            except _AtomicConflict as conflict:
                stored = conflict.stored
            for (index, new), outcome in zip(admitted.items(), stored, strict=True):
                try:
                    results[index] = _enqueued(new, requests[index], outcome)
                except IdempotencyConflict as refusal:
                    results[index] = refusal
        refused = [index for index, result in results.items() if isinstance(result, Exception)]
        if atomic and refused:
            because = not_stored(sorted(refused))
            for index in admitted:
                if not isinstance(results.get(index), Exception):
                    results[index] = because
        return [results[index] for index in range(len(requests))]

    async def validate(self, request: EnqueueRequest) -> JobValid:
        """What `enqueue` would do with this request; it raises the same and writes nothing."""
        new = self._admit(request, None)
        duplicate: JobRecord | None = None
        async with self._database.reading() as connection:
            now = await self._store.now(connection)
            if new.idempotency_key is not None:
                key = (new.type, new.idempotency_key)
                duplicate = (await self._store.find_by_key(connection, [key])).get(key)
        if duplicate is not None:
            _enqueued(new, request, Stored(now, now, duplicate))
        return JobValid(
            max_attempts=new.max_attempts,
            timeout_seconds=new.timeout_seconds,
            priority=new.priority,
            next_run_at=max(now, new.next_run_at or now),
            duplicate_of=duplicate,
        )

    # Reading

    def policy(self, job_type: str) -> JobPolicy:
        """The policy of a job type.

        Raises:
            JobTypeNotFound: no such job type.
        """
        return self.registry.policy(job_type)

    async def get(self, job_id: str | uuid.UUID) -> JobRecord:
        """One job.

        Raises:
            JobNotFound: no job has this id.
        """
        async with self._database.reading() as connection:
            job = await self._store.get(connection, parse_job_id(job_id))
        if job is None:
            raise JobNotFound(str(job_id))
        return job

    async def attempts(self, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[AttemptRecord]]:
        """Every attempt of each of these jobs, the first one first; one query for all."""
        async with self._database.reading() as connection:
            return await self._store.attempts(connection, job_ids)

    async def list_jobs(
        self, wanted: JobFilter = JobFilter(), *, first: int = 50, after: uuid.UUID | None = None
    ) -> JobPage:
        """A page of jobs, newest first, behind the job `after`.

        Raises:
            InputInvalid: `first` is not 1 to `max_page_size`.
        """
        if not 1 <= first <= self._max_page_size:
            message = f"A page holds 1 to {self._max_page_size} jobs; {first} were asked for."
            raise InputInvalid((Violation("/first", "out_of_range", message),))
        async with self._database.reading() as connection:
            jobs = await self._store.list_jobs(
                connection,
                types=wanted.types,
                statuses=wanted.statuses,
                first=first + 1,
                after=after,
            )
        return JobPage(jobs[:first], has_next_page=len(jobs) > first)

    async def counts(self) -> dict[str, JobCounts]:
        """Jobs per type and status, also of types that are no longer registered."""
        async with self._database.reading() as connection:
            counts = await self._store.counts(connection)
        return {name: JobCounts() for name in self.registry} | counts

    async def ping(self) -> None:
        """Returns when the database answers a query on the queue's tables; raises otherwise."""
        async with self._database.reading() as connection:
            await self._store.get(connection, uuid.UUID(int=0))

    # Work

    async def lease(
        self,
        job_types: Sequence[str],
        worker_id: str,
        *,
        limit: int = 1,
        wait_seconds: float = 0.0,
        stop: asyncio.Event | None = None,
    ) -> list[Lease]:
        """Leases up to `limit` due jobs of these types, and waits up to `wait_seconds` for one.

        `stop`, once set, ends the wait. Cancelling the call instead might lose what it has just
        leased.

        Waiting holds no database connection. Attempts whose lease has run out, whosever they
        were, are ended first.

        Raises:
            InputInvalid: a type is not registered, `limit` is not 1 to 100, `wait_seconds` not 0
                to 30, or `worker_id` not 1 to 255 characters.
        """
        check_lease(self.registry, job_types, worker_id, limit, wait_seconds)
        types = tuple(dict.fromkeys(job_types))
        clock = asyncio.get_running_loop().time
        give_up = clock() + wait_seconds
        limited = [name for name in types if self.registry.policy(name).concurrency_limit]
        with self.events.waiting_for(types, limited) as woken:
            while True:
                woken.clear()
                leases, pause = await self._claim(types, worker_id, limit)
                left = give_up - clock()
                ends = [self._waits_ended] if stop is None else [self._waits_ended, stop]
                if leases or left <= 0 or any(end.is_set() for end in ends):
                    return leases
                await _first(woken, *ends, seconds=min(left, pause))

    async def heartbeat(self, token: str, progress: JsonValue = None) -> Heartbeat:
        """Renews a lease for another lease time, never past the attempt's deadline.

        `progress`, any JSON, is shown with the job; None leaves it as it is.

        Raises:
            LeaseLost: the lease is not in force any more.
            InputInvalid: `progress` is no JSON, or larger than a payload may be.
        """
        job_id, secret = _parts(token)
        text = None if progress is None else self._document("progress", progress)
        async with self._database.transaction() as connection:
            renewed = await self._store.heartbeat(
                connection, job_id, secret, lease_seconds=self.lease_seconds, progress=text
            )
            if renewed is None:
                raise LeaseLost
            job, expires_at, seconds_left = renewed
            happened = [JobEvent.of("job.progressed", job)] if progress is not None else []
            await self.events.announce(connection, happened)
        self.events.publish(happened)
        return Heartbeat(job, expires_at, seconds_left, job.cancel_requested_at is not None)

    async def complete(self, token: str, result: JsonValue = None) -> JobRecord:
        """Ends the attempt and the job as succeeded. Sent again, it gives the same job back.

        Raises:
            LeaseLost: the lease is not in force any more.
            InputInvalid: `result` is no JSON, or larger than a payload may be.
        """
        job_id, secret = _parts(token)
        text = None if result is None else self._document("result", result)
        return await self._report(Report(job_id, secret, AttemptOutcome.SUCCEEDED, result=text))

    async def fail(
        self,
        token: str,
        error: JobError,
        *,
        retryable: bool = True,
        retry_after_seconds: float | None = None,
        spend_attempt: bool = True,
    ) -> JobRecord:
        """Ends the attempt as failed: queued again after its backoff, or failed for good.

        `retry_after_seconds`, 0 to 31,536,000, replaces the backoff. `retryable` False fails the
        job at once. A job whose cancellation was asked for is cancelled.

        Raises:
            LeaseLost: the lease is not in force any more.
            InputInvalid: a value is out of its range.
        """
        job_id, secret = _parts(token)
        if retry_after_seconds is not None:
            check_seconds("retryAfterSeconds", retry_after_seconds)
        error = self._error(error)
        return await self._report(
            Report(
                job_id,
                secret,
                AttemptOutcome.FAILED,
                error=error,
                retryable=retryable,
                delay_seconds=retry_after_seconds,
                spend=spend_attempt,
            )
        )

    async def release(self, token: str) -> JobRecord:
        """Hands the job back, to run again at once; the attempt is not spent.

        Raises:
            LeaseLost: the lease is not in force any more.
        """
        job_id, secret = _parts(token)
        return await self._report(
            Report(job_id, secret, AttemptOutcome.RELEASED, delay_seconds=0.0)
        )

    async def snooze(self, token: str, seconds: float) -> JobRecord:
        """Hands the job back, to run again in `seconds`; the attempt is not spent.

        Raises:
            LeaseLost: the lease is not in force any more.
            InputInvalid: `seconds` is not 0 to 31,536,000.
        """
        job_id, secret = _parts(token)
        check_seconds("seconds", seconds)
        return await self._report(
            Report(job_id, secret, AttemptOutcome.SNOOZED, delay_seconds=seconds)
        )

    async def time_out(self, token: str) -> JobRecord:
        """Ends an attempt that ran into its timeout, as the queue itself would a moment later.

        Raises:
            LeaseLost: the lease is not in force any more; the queue has done it.
        """
        job_id, secret = _parts(token)
        return await self._report(Report(job_id, secret, AttemptOutcome.TIMED_OUT, error=TIMED_OUT))

    async def stop(self, token: str, error: JobError) -> JobRecord:
        """Ends the attempt and the job as cancelled, as its handler asked.

        Raises:
            LeaseLost: the lease is not in force any more.
        """
        job_id, secret = _parts(token)
        return await self._report(
            Report(job_id, secret, AttemptOutcome.CANCELLED, error=self._error(error))
        )

    async def cancel(self, job_id: str | uuid.UUID) -> JobRecord:
        """Cancels a queued job at once; asks the worker of a running one to stop.

        Raises:
            JobNotFound: no job has this id.
            JobStateConflict: the job has ended.
        """
        return await self._change(job_id, self._store.cancel, "cancelled")

    async def retry(self, job_id: str | uuid.UUID) -> JobRecord:
        """Queues a failed or cancelled job again, to run now, with at least one attempt left.

        Raises:
            JobNotFound: no job has this id.
            JobStateConflict: the job is neither failed nor cancelled.
        """
        return await self._change(job_id, self._store.retry, "retried")

    def _publish_after_commit(self, session: AsyncSession, happened: Sequence[JobEvent]) -> None:
        """Publishes if and when the caller's transaction commits; a rollback forgets it."""
        target = session.sync_session
        if _UNPUBLISHED not in target.info:
            unpublished: list[JobEvent] = []
            target.info[_UNPUBLISHED] = unpublished

            def publish(_session: object) -> None:
                self.events.publish(unpublished)
                unpublished.clear()

            def forget(_session: object) -> None:
                unpublished.clear()

            event.listen(target, "after_commit", publish)
            event.listen(target, "after_rollback", forget)
        target.info[_UNPUBLISHED].extend(happened)

    def _admit(self, request: EnqueueRequest, created_by: str | None) -> NewJob:
        job_type = self.registry.get_type(request.type)
        faults = list(input_faults(request))
        try:
            admitted = self.registry.admit(request.type, request.payload)
        except PayloadInvalid as invalid:
            if not faults:
                raise
            faults += [
                Violation("/payload" + v.path, v.code, v.message) for v in invalid.violations
            ]
        if faults:
            raise InputInvalid(tuple(faults))
        policy = job_type.policy
        return NewJob(
            id=self._new_id(),
            type=job_type.name,
            fingerprint=job_type.fingerprint,
            payload=admitted.json,
            priority=DEFAULT_PRIORITY if request.priority is None else request.priority,
            max_attempts=request.max_attempts or policy.max_attempts,
            timeout_seconds=policy.timeout_seconds,
            backoff_base_seconds=policy.backoff.base_seconds,
            backoff_cap_seconds=policy.backoff.cap_seconds,
            next_run_at=request.schedule_at,
            idempotency_key=request.idempotency_key,
            created_by=created_by,
        )

    async def _insert_or_each(self, jobs: Sequence[NewJob], *, atomic: bool) -> list[Stored]:
        if not jobs:
            return []
        return list(await self._insert(jobs, atomic=atomic))

    async def _insert(self, jobs: Sequence[NewJob], *, atomic: bool = False) -> Sequence[Stored]:
        if not any(job.idempotency_key for job in jobs):
            created = [JobEvent("job.created", job.id, job.type, 0) for job in jobs]
            message = self.events.message_of(created)
            if message is not None:
                stored = await self._store.insert_at_once(self._database, jobs, message)
                self.events.publish(created)
                return [stored[job.id] for job in jobs]
        async with self._database.transaction() as connection:
            stored = await self._store.insert(connection, jobs)
            while len(stored) < len(jobs):
                # The holder of a key was deleted between two statements: the key is free now.
                rest = [job for job in jobs if job.id not in stored]
                stored |= await self._store.insert(connection, rest)
            if atomic and any(_conflicts(job, stored[job.id]) for job in jobs):
                raise _AtomicConflict([stored[job.id] for job in jobs])
            created = [
                JobEvent("job.created", job.id, job.type, 0)
                for job in jobs
                if stored[job.id].existing is None
            ]
            await self.events.announce(connection, created)
        self.events.publish(created)
        return [stored[job.id] for job in jobs]

    async def _claim(
        self, types: tuple[str, ...], worker_id: str, limit: int
    ) -> tuple[list[Lease], float]:
        """The leased jobs and, where there are none, how many seconds to wait for a change."""
        limits = {
            name: concurrency
            for name in types
            if (concurrency := self.registry.policy(name).concurrency_limit) is not None
        }
        await self.show_worker(types)
        claim = Claim(types, limits, worker_id, limit, self.lease_seconds)
        async with self._database.transaction() as connection:
            recovered = await self._store.recover(connection)
            leased, full = await self._store.lease(connection, claim)
            happened = [_ended_event(job) for job in recovered]
            happened += [JobEvent.of("job.started", lease.job) for lease in leased]
            await self.events.announce(connection, happened)
        self.events.publish(happened)
        self._count_recovered(recovered)
        if leased:
            return [
                Lease(each.job.id.hex + each.token, each.job, each.expires_at, each.deadline_at)
                for each in leased
            ], 0.0
        async with self._database.reading() as connection:
            seconds = await self._store.seconds_to_next(
                connection, [name for name in types if name not in full]
            )
        # Due, but not claimed: another worker is just taking it, or full types end by themselves.
        return [], max(MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS if seconds is None else seconds)

    async def show_worker(self, types: Sequence[str]) -> None:
        """Notes that these types are worked here, also while no slot is free to lease more.

        Writes at most every ten seconds; `waiting_reason` reads it.
        """
        now = asyncio.get_running_loop().time()
        stale = [t for t in types if now - self._seen.get(t, -1e9) > WORKER_SEEN_SECONDS]
        if stale:
            async with self._database.transaction() as connection:
                await self._store.see_worker(connection, sorted(stale))
            self._seen |= dict.fromkeys(stale, now)

    async def waiting_reason(self, job: JobRecord) -> WaitingReason | None:
        """Why a queued job does not run at this moment; None when it is not queued."""
        async with self._database.reading() as connection:
            waiting = await self._store.waiting(connection, job.id)
        if waiting is None or job.next_run_at is None:
            return None
        if waiting.due_in_seconds > 0:
            return ScheduledFor(job.next_run_at)
        job_type = self.registry.get(job.type)
        limit = job_type.policy.concurrency_limit if job_type else None
        if limit is not None and waiting.running >= limit:
            return ConcurrencyLimitReached(limit, waiting.running)
        seen = waiting.worker_seen_seconds_ago
        if waiting.running == 0 and (seen is None or seen > WORKER_ABSENT_SECONDS):
            return NoWorkerSeen(seen)
        return BehindInQueue(waiting.ahead)

    def end_waits(self) -> None:
        """Ends every wait for a lease, and every subscription: the process shuts down."""
        self._waits_ended.set()
        self.events.drop_subscribers("the server shuts down")

    # Upkeep

    async def recover(self) -> list[JobRecord]:
        """Ends the attempts whose lease has run out, and gives their jobs. Claims do it too."""
        async with self._database.transaction() as connection:
            recovered = await self._store.recover(connection)
            happened = [_ended_event(job) for job in recovered]
            await self.events.announce(connection, happened)
        self.events.publish(happened)
        self._count_recovered(recovered)
        return recovered

    def _count_recovered(self, recovered: Sequence[JobRecord]) -> None:
        for job in recovered:
            outcome = AttemptOutcome.CANCELLED.value
            if job.status is not JobStatus.CANCELLED and job.error is not None:
                outcome = job.error.code
            self.metrics.attempt_ended(job.type, outcome)

    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        """Deletes up to `jobs` jobs that ended with `status` longer ago than `keep_seconds`."""
        async with self._database.transaction() as connection:
            return await self._store.prune(connection, status, keep_seconds=keep_seconds, jobs=jobs)

    async def tidy(self) -> None:
        """Folds the rows of the counts together and deletes events that everyone has read."""
        async with self._database.transaction() as connection:
            await self._store.fold_counts(connection)
            await self._store.prune_events(connection)

    async def _report(self, report: Report) -> JobRecord:
        job = await self._reports.submit(report)
        if job is None:
            raise LeaseLost
        return job

    async def _end(self, reports: Sequence[Report]) -> Sequence[JobRecord | None]:
        """Ends attempts, several in one transaction; None where the lease is not in force."""
        ended: dict[int, JobRecord | None] = {}
        outcomes: list[tuple[str, AttemptOutcome]] = []
        async with self._database.transaction() as connection:
            waiting = dict(enumerate(reports))
            happened: list[JobEvent] = []
            while waiting:
                # One report a job and statement: of two for one lease, the first to come counts.
                turn = {report.job_id: index for index, report in reversed(waiting.items())}
                these = [waiting.pop(index) for index in sorted(turn.values())]
                jobs = await self._store.end(connection, these)
                happened += [_ended_event(job) for job in jobs.values()]
                for report in these:
                    job = jobs.get(report.job_id)
                    if job is not None:
                        cancelled = job.status is JobStatus.CANCELLED
                        outcome = AttemptOutcome.CANCELLED if cancelled else report.outcome
                        outcomes.append((job.type, outcome))
                    if job is None and report.outcome is AttemptOutcome.SUCCEEDED:
                        job = await self._store.find_succeeded(
                            connection, report.job_id, report.token
                        )
                    ended[turn[report.job_id]] = job
            await self.events.announce(connection, happened)
        self.events.publish(happened)
        for job_type, outcome in outcomes:
            self.metrics.attempt_ended(job_type, outcome.value)
        return [ended[index] for index in range(len(reports))]

    async def _change(
        self,
        job_id: str | uuid.UUID,
        change: Callable[[AsyncConnection, uuid.UUID], Awaitable[JobRecord | None]],
        asked: str,
    ) -> JobRecord:
        async with self._database.transaction() as connection:
            job = await change(connection, parse_job_id(job_id))
            if job is None:
                there = await self._store.get(connection, parse_job_id(job_id))
                if there is None:
                    raise JobNotFound(str(job_id))
                raise JobStateConflict(str(job_id), there.status, asked)
            happened = [_changed_event(job)] if job.status is not JobStatus.RUNNING else []
            await self.events.announce(connection, happened)
        self.events.publish(happened)
        return job

    def _document(self, field: str, value: JsonValue) -> bytes:
        text, faults = json_document(value, max_bytes=self.registry.max_payload_bytes)
        if faults:
            raise InputInvalid(
                tuple(Violation(f"/{field}{v.path}", v.code, v.message) for v in faults)
            )
        return text

    def _error(self, error: JobError) -> JobError:
        self._document("error", {"code": error.code, "message": error.message})
        if error.details is not None:
            self._document("error/details", error.details)
        return error


class _AtomicConflict(Exception):
    """Rolls an atomic bulk insert back, and carries what it had come to."""

    def __init__(self, stored: list[Stored]) -> None:
        self.stored = stored


@asynccontextmanager
async def open_service(
    registry: JobRegistry,
    database_url: str,
    *,
    lease_seconds: float,
    pool_size: int = 10,
    max_page_size: int = 200,
    max_bulk_size: int = 1_000,
) -> AsyncIterator[JobService]:
    """A service on this database, that hears other processes while it is open."""
    database = Database(database_url, pool_size=pool_size)
    service = JobService(
        registry,
        database,
        lease_seconds=lease_seconds,
        max_page_size=max_page_size,
        max_bulk_size=max_bulk_size,
    )
    try:
        async with service.events.hearing():
            yield service
    finally:
        await database.close()


async def _first(*events: asyncio.Event, seconds: float) -> None:
    """Returns when one of the events is set, or the time is over."""
    waits = {asyncio.ensure_future(event.wait()) for event in events}
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def _enqueued(new: NewJob, request: EnqueueRequest, stored: Stored) -> Enqueued:
    if stored.existing is not None:
        paths = differing_paths(stored.existing.payload, from_json(new.payload))
        if paths:
            raise IdempotencyConflict(stored.existing, paths[:100])
        return Enqueued(stored.existing, deduplicated=True)
    return Enqueued(
        JobRecord(
            id=new.id,
            type=new.type,
            fingerprint=new.fingerprint,
            status=JobStatus.QUEUED,
            payload=cast(JsonValue, request.payload),
            priority=new.priority,
            attempt=0,
            max_attempts=new.max_attempts,
            timeout_seconds=new.timeout_seconds,
            created_at=stored.created_at,
            idempotency_key=new.idempotency_key,
            created_by=new.created_by,
            next_run_at=stored.next_run_at,
        )
    )


def _conflicts(new: NewJob, stored: Stored) -> bool:
    return stored.existing is not None and bool(
        differing_paths(stored.existing.payload, from_json(new.payload))
    )


def not_stored(refused: list[int]) -> InputInvalid:
    """Why a good job of an atomic call was not stored: those at these places were refused."""
    named = ", ".join(str(index) for index in refused[:10])
    more = f" and {len(refused) - 10} more" if len(refused) > 10 else ""
    message = f"Not stored: the call is atomic, and it was refused at index {named}{more}."
    return InputInvalid((Violation("", "not_stored", message),))


def parse_job_id(job_id: str | uuid.UUID) -> uuid.UUID:
    """A job's id, as clients write it.

    Raises:
        JobNotFound: it is no UUID, so no job has it.
    """
    if isinstance(job_id, uuid.UUID):
        return job_id
    try:
        return uuid.UUID(job_id)
    except ValueError:
        raise JobNotFound(job_id) from None


def _parts(token: str) -> tuple[uuid.UUID, str]:
    """A lease token is the job's id, so that the primary key finds it, and a random secret."""
    if not _TOKEN.fullmatch(token):
        raise LeaseLost
    return uuid.UUID(token[:32]), token[32:]


_UNPUBLISHED: Final = "job_registry.unpublished"
"""Where a caller's session keeps the events of its transaction."""

_TOKEN: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def _ended_event(job: JobRecord) -> JobEvent:
    name: dict[JobStatus, EventName] = {
        JobStatus.QUEUED: "job.retrying",
        JobStatus.SUCCEEDED: "job.succeeded",
        JobStatus.FAILED: "job.failed",
        JobStatus.CANCELLED: "job.cancelled",
    }
    return JobEvent.of(name[job.status], job)


def _changed_event(job: JobRecord) -> JobEvent:
    return JobEvent.of(
        "job.cancelled" if job.status is JobStatus.CANCELLED else "job.retrying", job
    )
