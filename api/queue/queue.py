"""`JobQueue`, the one door to the queue: validate, apply the policy, store, publish.

GraphQL, REST, the CLI and the worker call it and nothing below it.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple, TypeVar, cast

from pydantic import JsonValue
from pydantic_core import from_json
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from job_registry import (
    JobPolicy,
    JobRegistry,
    JobTypeNotFound,
    PayloadInvalid,
    Violation,
    json_document,
    text_fault,
)
from job_registry_api.metrics import Metrics
from job_registry_api.queue.caller_transactions import publish_after_commit
from job_registry_api.queue.database import (
    DEFAULT_SCHEMA,
    DEFAULT_TIMEOUT_SECONDS,
    Database,
    Pooler,
)
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    InputInvalid,
    JobNotFound,
    JobStateConflict,
    LeaseLost,
    QueueUnavailable,
)
from job_registry_api.queue.events import Events, JobEvent
from job_registry_api.queue.group_commit import GroupCommit
from job_registry_api.queue.leasing import Lease, Leasing, ended_event
from job_registry_api.queue.models import (
    AttemptOutcome,
    AttemptRecord,
    JobCounts,
    JobError,
    JobRecord,
    JobStatus,
)
from job_registry_api.queue.postgresql import PostgreSQLStore
from job_registry_api.queue.readiness import Readiness
from job_registry_api.queue.requests import (
    EnqueueRequest,
    check_lease,
    check_seconds,
    differing_paths,
    input_faults,
)
from job_registry_api.queue.sqlite import SQLiteStore
from job_registry_api.queue.store import (
    TIMED_OUT,
    LeaseRenewal,
    LeaseState,
    NewJob,
    Renewed,
    Report,
    Store,
    Stored,
    Waiting,
    present,
)

T = TypeVar("T")

DEFAULT_PRIORITY: Final = 50
WORKER_ABSENT_SECONDS: Final = 60.0
"""A type that no worker asked for in this time has none."""

LOCKED_PAUSE_SECONDS: Final = 0.02
"""How long to wait before a row is tried again that another transaction has locked; doubled up to
half a second."""


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
class Heartbeat:
    """A renewed lease: until when, how long the attempt may still run, and whether to stop."""

    job: JobRecord
    expires_at: datetime
    seconds_left: float
    cancel_requested: bool


class Renewal(NamedTuple):
    """A lease to renew, by its token. `progress` is JSON text; None leaves it as it is.

    `ended` says that the attempt has timed out and its handler has not stopped: only its place in
    the concurrency limit is renewed, and the answer is `LeaseLost`.
    """

    token: str
    progress: bytes | None = None
    ended: bool = False


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


class JobQueue:
    """The queue's operations. Each either happens whole, or raises and changed nothing.

    Each raises, beside what it names, `QueueUnavailable` when the database does not answer.
    `new_id` makes the ids of new jobs, UUIDv7; tests may bring their own. `metrics` are those of
    the process, where it opens several.
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
        self._database = database
        self._readiness = Readiness(database)
        process = secrets.token_hex(8)
        self._store: Store = (
            PostgreSQLStore(database, process)
            if database.name == "postgresql"
            else SQLiteStore(database, process)
        )
        self.metrics = Metrics(registry) if metrics is None else metrics
        database.on_unavailable = self.metrics.database_unavailable
        self.events = Events(database, self._store, process, self.metrics)
        self._new_id = new_id
        # Apart, so that jobs without a key never share a statement with one that has to wait.
        self._inserts = GroupCommit(self._insert)
        self._keyed_inserts = GroupCommit(self._insert)
        self._reports = GroupCommit(self._end)
        self._leasing = Leasing(
            self._store,
            registry,
            self.events,
            lease_seconds=lease_seconds,
            give_back=self._give_back,
            on_recovered=self._count_recovered,
        )

    # Enqueue

    async def enqueue(
        self,
        request: EnqueueRequest,
        *,
        created_by: str | None = None,
        session: AsyncSession | None = None,
    ) -> Enqueued:
        """Store a job. When this returns, the job is on disk.

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
        if session is not None:
            return await self._enqueue_within(session, new, request)
        inserts = self._inserts if new.idempotency_key is None else self._keyed_inserts
        stored = await self._patiently(
            lambda: inserts.submit(new), "another transaction holds the idempotency key"
        )
        return _enqueued(new, request, stored)

    async def _enqueue_within(
        self, session: AsyncSession, new: NewJob, request: EnqueueRequest
    ) -> Enqueued:
        connection = await session.connection()
        for _ in range(10):
            stored = await self._store.insert_within(connection, [new])
            if new.id in stored:
                break
        else:
            raise QueueUnavailable("the holder of the idempotency key was deleted meanwhile")
        enqueued = _enqueued(new, request, stored[new.id])
        if not enqueued.deduplicated:
            created = [JobEvent.of("job.created", enqueued.job)]
            publish_after_commit(session, self.events.publish, created)
        return enqueued

    async def enqueue_many(
        self,
        requests: Sequence[EnqueueRequest],
        *,
        atomic: bool = False,
        created_by: str | None = None,
    ) -> list[Enqueued | Refusal]:
        """Store up to `max_bulk_size` jobs; return a result for each, in order.

        A refused one is its error, returned in its place. With `atomic` one refusal leaves
        every job unstored; those that were good themselves are then `InputInvalid` with the code
        `not_stored`.

        Raises:
            InputInvalid: there are more of them.
        """
        if len(requests) > self._max_bulk_size:
            message = f"Expected at most {self._max_bulk_size} jobs per call, got {len(requests)}."
            raise InputInvalid((Violation("", "too_long", message),))
        results: dict[int, Enqueued | Refusal] = {}
        admitted: dict[int, NewJob] = {}
        for index, request in enumerate(requests):
            try:
                admitted[index] = self._admit(request, created_by)
            except (JobTypeNotFound, PayloadInvalid, InputInvalid) as refusal:
                results[index] = refusal
        if admitted and not (atomic and results):
            stored, committed = await self._insert_bulk(list(admitted.values()), atomic=atomic)
            for (index, new), outcome in zip(admitted.items(), stored, strict=True):
                try:
                    results[index] = _enqueued(new, requests[index], outcome)
                except IdempotencyConflict as refusal:
                    results[index] = refusal if committed else _conflict_within(refusal, admitted)
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
        now = await self._store.now()
        duplicate: JobRecord | None = None
        if new.idempotency_key is not None:
            key = (new.type, new.idempotency_key)
            duplicate = (await self._store.find_by_key([key])).get(key)
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
        job = await self._store.get(parse_job_id(job_id))
        if job is None:
            raise JobNotFound(str(job_id))
        return job

    async def attempts(self, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[AttemptRecord]]:
        """Every attempt of each of these jobs, the first one first; one query for all."""
        return await self._store.attempts(job_ids)

    async def list_jobs(
        self, wanted: JobFilter = JobFilter(), *, first: int = 50, after: uuid.UUID | None = None
    ) -> JobPage:
        """A page of jobs, newest first, behind the job `after`.

        Raises:
            InputInvalid: `first` is not 1 to `max_page_size`.
        """
        if not 1 <= first <= self._max_page_size:
            message = f"Expected 1 to {self._max_page_size} jobs per page, got {first}."
            raise InputInvalid((Violation("/first", "out_of_range", message),))
        # No job has a type that the database could not even be asked for.
        types = tuple(name for name in wanted.types if text_fault(name) is None)
        if wanted.types and not types:
            return JobPage([], has_next_page=False)
        jobs = await self._store.list_jobs(
            types=types, statuses=wanted.statuses, first=first + 1, after=after
        )
        return JobPage(jobs[:first], has_next_page=len(jobs) > first)

    async def counts(self) -> dict[str, JobCounts]:
        """Jobs per type and status, also of types that are no longer registered."""
        return {name: JobCounts() for name in self.registry} | await self._store.counts()

    async def ping(self) -> None:
        """Return when a job could be stored; raise `QueueUnavailable` otherwise."""
        await self._readiness.check()

    async def waiting_reasons(
        self, jobs: Iterable[JobRecord]
    ) -> dict[uuid.UUID, WaitingReason | None]:
        """Why each of these jobs does not run now; None where it is not queued. One query."""
        queued = {job.id: job for job in jobs if job.next_run_at is not None}
        waiting = await self._store.waiting(queued) if queued else {}
        return {
            job_id: self._reason(job, waiting[job_id]) if job_id in waiting else None
            for job_id, job in queued.items()
        }

    async def waiting_reason(self, job: JobRecord) -> WaitingReason | None:
        """Why a queued job does not run at this moment; None when it is not queued."""
        return (await self.waiting_reasons([job])).get(job.id)

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
        """Lease up to `limit` due jobs of these types; wait up to `wait_seconds` for the first.

        `stop`, once set, ends the wait. So does cancelling the call; what was leased for it in
        that moment is given back.

        Waiting holds no database connection. Attempts whose lease has run out, of any worker,
        are ended first.

        Raises:
            InputInvalid: a type is not registered, `limit` is not 1 to 100, `wait_seconds` not 0
                to 30, or `worker_id` not 1 to 255 characters.
        """
        check_lease(self.registry, job_types, worker_id, limit, wait_seconds)
        return await self._leasing.lease(
            tuple(dict.fromkeys(job_types)),
            worker_id,
            limit=limit,
            wait_seconds=wait_seconds,
            stop=stop,
        )

    def give_back(self, leases: Sequence[Lease]) -> None:
        """Release leases whose caller is gone, in the background; their attempts are not spent."""
        self._leasing.give_back(leases)

    async def show_worker(self, types: Sequence[str]) -> None:
        """Note that these types are worked here, also while no slot is free to lease more.

        Written at most every ten seconds; `waiting_reason` reads it.
        """
        await self._leasing.show_worker(types)

    async def heartbeat(self, token: str, progress: JsonValue = None) -> Heartbeat:
        """Renew a lease for another lease time, never past the attempt's deadline.

        `progress`, any JSON, is shown with the job; None leaves it as it is.

        Raises:
            LeaseLost: the lease is not in force any more.
            InputInvalid: `progress` is not JSON, or larger than a payload may be.
        """
        job_id, _ = _parts(token)
        text = None if progress is None else self._document("progress", progress)
        (renewed,) = await self.renew([Renewal(token, text)])
        if isinstance(renewed, LeaseLost):
            raise renewed
        job = await self._store.get(job_id)
        if job is None:
            raise LeaseLost
        return Heartbeat(job, renewed.expires_at, renewed.seconds_left, renewed.cancel_requested)

    async def renew(self, renewals: Sequence[Renewal]) -> list[Renewed | LeaseLost]:
        """Renew leases, all in one statement; return what became of each, in order.

        An attempt that has timed out is `LeaseLost`, and goes on holding its place in the
        concurrency limit of its type.
        """
        keys = [_parts(renewal.token) for renewal in renewals]
        renewed = await self._store.renew(
            [
                LeaseRenewal(job_id, secret, renewal.progress)
                for (job_id, secret), renewal in zip(keys, renewals, strict=True)
            ],
            self.lease_seconds,
        )
        progressed = [
            job_id
            for (job_id, secret), renewal in zip(keys, renewals, strict=True)
            if renewal.progress is not None and renewed.get((job_id, secret)) is not None
        ]
        if progressed:
            # The leases are renewed by now, and other processes hear of it, whatever happens here.
            with suppress(QueueUnavailable):
                jobs = await self._store.get_many(progressed)
                self.events.publish([JobEvent.of("job.progressed", j) for j in jobs.values()])
        return [renewed.get(key) or LeaseLost() for key in keys]

    async def settle(self, tokens: Sequence[str]) -> None:
        """The handlers of these timed-out attempts have ended: free the places they held."""
        if tokens:
            await self._store.settle([_parts(token) for token in tokens])

    @asynccontextmanager
    async def in_another_loop(self, *, pool_size: int = 2) -> AsyncIterator[JobQueue]:
        """The queue on the same database for another event loop, with connections of its own.

        It does not hear other processes. Enter it in that loop.
        """
        database = self._database.for_another_loop(pool_size=pool_size)
        try:
            yield JobQueue(
                self.registry, database, lease_seconds=self.lease_seconds, metrics=self.metrics
            )
        finally:
            await database.close()

    async def complete(self, token: str, result: JsonValue = None) -> JobRecord:
        """End the attempt and the job as succeeded. Sent again, it returns the same job.

        Raises:
            LeaseLost: the lease is not in force any more.
            InputInvalid: `result` is not JSON, or larger than a payload may be.
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
        """End the attempt as failed: queued again after its backoff, or failed for good.

        `retry_after_seconds`, 0 to 31,536,000, replaces the backoff. `retryable` False fails the
        job at once. A job whose cancellation was requested is cancelled.

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
        """Hand the job back, to run again at once; the attempt is not spent.

        A job that is handed back again and again within seconds waits longer each time.

        Raises:
            LeaseLost: the lease is not in force any more.
        """
        job_id, secret = _parts(token)
        return await self._report(
            Report(job_id, secret, AttemptOutcome.RELEASED, delay_seconds=0.0)
        )

    async def snooze(self, token: str, seconds: float) -> JobRecord:
        """Hand the job back, to run again in `seconds`; the attempt is not spent.

        Raises:
            LeaseLost: the lease is not in force any more.
            InputInvalid: `seconds` is not 0 to 31,536,000.
        """
        job_id, secret = _parts(token)
        check_seconds("seconds", seconds)
        return await self._report(
            Report(job_id, secret, AttemptOutcome.SNOOZED, delay_seconds=seconds)
        )

    async def time_out(self, token: str, *, still_running: bool = False) -> JobRecord:
        """End an attempt at its timeout. With `still_running` its handler has not stopped.

        The attempt then holds its place in the concurrency limit for one lease, and for as long
        as `renew` goes on naming it, until `settle`.

        Raises:
            LeaseLost: the queue has ended the attempt already.
        """
        job_id, secret = _parts(token)
        return await self._report(
            Report(
                job_id,
                secret,
                AttemptOutcome.TIMED_OUT,
                error=TIMED_OUT,
                still_running=still_running,
            )
        )

    async def stop(self, token: str, error: JobError) -> JobRecord:
        """End the attempt and the job as cancelled, as its handler asked.

        Raises:
            LeaseLost: the lease is not in force any more.
        """
        job_id, secret = _parts(token)
        return await self._report(
            Report(job_id, secret, AttemptOutcome.CANCELLED, error=self._error(error))
        )

    async def cancel(self, job_id: str | uuid.UUID) -> JobRecord:
        """Cancel a queued job at once; ask the worker of a running one to stop.

        Raises:
            JobNotFound: no job has this id.
            JobStateConflict: the job has ended.
        """
        return await self._change(job_id, self._store.cancel, "cancelled")

    async def retry(self, job_id: str | uuid.UUID) -> JobRecord:
        """Queue a failed or cancelled job again, to run now, with at least one attempt left.

        Raises:
            JobNotFound: no job has this id.
            JobStateConflict: the job is neither failed nor cancelled.
        """
        return await self._change(job_id, self._store.retry, "retried")

    def end_waits(self) -> None:
        """End every wait for a lease, and every subscription: the process shuts down."""
        self._leasing.end()
        self.events.drop_subscribers("the server shuts down")

    async def close(self) -> None:
        """Finish what goes on in the background."""
        self.end_waits()
        await self._leasing.close()

    # Upkeep

    async def recover(self) -> list[JobRecord]:
        """End the attempts whose lease has run out, and return their jobs. Claims do it too."""
        recovered = await self._store.recover(self.lease_seconds)
        self.events.publish([ended_event(job) for job in recovered])
        self._count_recovered(recovered)
        return recovered

    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        """Delete up to `jobs` jobs that ended with `status` longer ago than `keep_seconds`."""
        return await self._store.prune(status, keep_seconds=keep_seconds, jobs=jobs)

    async def tidy(self) -> int:
        """Keep the table of counts and SQLite's log small; delete events that everyone has read.

        Return how many batches of events were deleted, at most 10,000.
        """
        await self._store.fold_counts()
        await self._database.checkpoint()
        return await self._store.prune_events()

    def _count_recovered(self, recovered: Sequence[JobRecord]) -> None:
        for job in recovered:
            outcome = AttemptOutcome.CANCELLED.value
            if job.status is not JobStatus.CANCELLED and job.error is not None:
                outcome = job.error.code
            self.metrics.attempt_ended(job.type, outcome)

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

    async def _insert_bulk(
        self, jobs: Sequence[NewJob], *, atomic: bool
    ) -> tuple[list[Stored], bool]:
        """What became of each job, and whether it was committed."""
        if atomic:
            stored, committed = await self._patiently(
                lambda: self._insert_all(jobs), "the holder of an idempotency key is being deleted"
            )
            if committed:
                self._publish_created(jobs, stored)
            return [stored[job.id] for job in jobs], committed
        outcomes = dict(zip((job.id for job in jobs), await self._insert(jobs), strict=True))
        for job in jobs:
            if outcomes[job.id] is None:
                outcomes[job.id] = await self._patiently(
                    lambda job=job: self._keyed_inserts.submit(job),  # type: ignore[misc]
                    "another transaction holds the idempotency key",
                )
        return [present(outcomes[job.id]) for job in jobs], True

    async def _insert_all(
        self, jobs: Sequence[NewJob]
    ) -> tuple[dict[uuid.UUID, Stored], bool] | None:
        """Insert every job or none. Return None if the holder of a key was deleted meanwhile."""
        stored, committed = await self._store.insert_all(jobs, _conflicts)
        return (stored, committed) if len(stored) == len(jobs) else None

    async def _insert(self, jobs: Sequence[NewJob]) -> list[Stored | None]:
        """Insert jobs in one statement; None where another transaction has the key."""
        stored = await self._store.insert(jobs)
        self._publish_created(jobs, stored)
        return [stored.get(job.id) for job in jobs]

    def _publish_created(self, jobs: Sequence[NewJob], stored: Mapping[uuid.UUID, Stored]) -> None:
        self.events.publish(
            [
                JobEvent("job.created", job.id, job.type, 0)
                for job in jobs
                if (outcome := stored.get(job.id)) is not None and outcome.existing is None
            ]
        )

    def _reason(self, job: JobRecord, waiting: Waiting) -> WaitingReason | None:
        if waiting.due_in_seconds > 0 and job.next_run_at is not None:
            return ScheduledFor(job.next_run_at)
        job_type = self.registry.get(job.type)
        limit = job_type.policy.concurrency_limit if job_type else None
        if limit is not None and waiting.running >= limit:
            return ConcurrencyLimitReached(limit, waiting.running)
        seen = waiting.worker_seen_seconds_ago
        if waiting.running == 0 and (seen is None or seen > WORKER_ABSENT_SECONDS):
            return NoWorkerSeen(seen)
        return BehindInQueue(waiting.ahead)

    async def _report(self, report: Report) -> JobRecord:
        outcome: JobRecord | LeaseLost = await self._patiently(
            lambda: self._reports.submit(report), "another transaction has locked the job"
        )
        if isinstance(outcome, LeaseLost):
            raise outcome
        return outcome

    async def _end(self, reports: Sequence[Report]) -> Sequence[JobRecord | LeaseLost | None]:
        """End attempts, several in one statement; None where another transaction has the row."""
        ended: dict[int, JobRecord | LeaseLost | None] = {}
        waiting = dict(enumerate(reports))
        while waiting:
            # One report per job and statement: of two for one lease, the first to come counts.
            turn = {report.job_id: index for index, report in reversed(waiting.items())}
            these = [waiting.pop(index) for index in sorted(turn.values())]
            jobs = await self._store.end(these)
            self.events.publish([ended_event(job) for job in jobs.values()])
            for report in these:
                if (job := jobs.get(report.job_id)) is not None:
                    cancelled = job.status is JobStatus.CANCELLED
                    outcome = AttemptOutcome.CANCELLED if cancelled else report.outcome
                    self.metrics.attempt_ended(job.type, outcome.value)
            missing = [report for report in these if report.job_id not in jobs]
            states: dict[uuid.UUID, LeaseState] | None = {}
            try:
                states = await self._store.lease_states(missing) if missing else {}
                repeated = [
                    report.job_id
                    for report in missing
                    if report.outcome is AttemptOutcome.SUCCEEDED
                    and (state := states.get(report.job_id)) is not None
                    and state.succeeded
                ]
                jobs |= await self._store.get_many(repeated) if repeated else {}
            except QueueUnavailable:
                # The others are committed, and answered. These are sent again.
                if not (jobs or ended):
                    raise
                states = None
            for report in these:
                if report.job_id in jobs:
                    ended[turn[report.job_id]] = jobs[report.job_id]
                elif states is None or (
                    (state := states.get(report.job_id)) is not None and state.in_force
                ):
                    ended[turn[report.job_id]] = None
                else:
                    ended[turn[report.job_id]] = LeaseLost()
        return [ended[index] for index in range(len(reports))]

    async def _give_back(self, leases: Sequence[Lease]) -> None:
        """Release leases that their caller did not wait for."""
        for lease in leases:
            with suppress(LeaseLost):
                await self.release(lease.token)

    async def _change(
        self,
        job_id: str | uuid.UUID,
        change: Callable[[uuid.UUID], Awaitable[JobRecord | None]],
        asked: str,
    ) -> JobRecord:
        job = await change(parse_job_id(job_id))
        if job is None:
            there = await self._store.get(parse_job_id(job_id))
            if there is None:
                raise JobNotFound(str(job_id))
            raise JobStateConflict(str(job_id), there.status, asked)
        self.events.publish([_changed_event(job)])
        return job

    async def _patiently(self, attempt: Callable[[], Awaitable[T | None]], locked: str) -> T:
        """Try until nobody else's transaction is in the way, without holding a connection.

        Raises:
            QueueUnavailable: it still is at the end of the database's timeout.
        """
        clock = asyncio.get_running_loop().time
        give_up = clock() + self._database.timeout_seconds
        pause = LOCKED_PAUSE_SECONDS
        try:
            # Those in a group that waits for the next one have the same deadline.
            async with asyncio.timeout_at(None if math.isinf(give_up) else give_up):
                while (outcome := await attempt()) is None:
                    if clock() + pause > give_up:
                        raise QueueUnavailable(locked, "busy")
                    await asyncio.sleep(pause)
                    pause = min(0.5, pause * 2)
        except TimeoutError as error:
            reason = f"no answer within {self._database.timeout_seconds:g} seconds"
            raise QueueUnavailable(reason, "timeout") from error
        return outcome

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


@asynccontextmanager
async def open_queue(
    registry: JobRegistry,
    database_url: str,
    *,
    lease_seconds: float,
    pool_size: int = 10,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    pooler: Pooler = "session",
    listen_url: str | None = None,
    schema: str = DEFAULT_SCHEMA,
    max_page_size: int = 200,
    max_bulk_size: int = 1_000,
) -> AsyncIterator[JobQueue]:
    """The queue on this database, which hears other processes while it is open."""
    database = Database(
        database_url,
        pool_size=pool_size,
        timeout_seconds=timeout_seconds,
        pooler=pooler,
        listen_url=listen_url,
        schema=schema,
    )
    queue = JobQueue(
        registry,
        database,
        lease_seconds=lease_seconds,
        max_page_size=max_page_size,
        max_bulk_size=max_bulk_size,
    )
    try:
        async with queue.events.hearing():
            yield queue
            await queue.close()
    finally:
        await database.close()


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


def _conflict_within(
    conflict: IdempotencyConflict, admitted: Mapping[int, NewJob]
) -> IdempotencyConflict | InputInvalid:
    """The conflict, unless it is with a job of the same call, which was not stored either."""
    for index, other in admitted.items():
        if other.id == conflict.existing_job.id:
            message = f"The job at index {index} of this call has this key with another payload."
            return InputInvalid((Violation("/idempotencyKey", "duplicate_key", message),))
    return conflict


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


_TOKEN: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def _changed_event(job: JobRecord) -> JobEvent:
    match job.status:
        case JobStatus.RUNNING:
            return JobEvent.of("job.cancel_requested", job)
        case JobStatus.CANCELLED:
            return JobEvent.of("job.cancelled", job)
    return JobEvent.of("job.retrying", job)
