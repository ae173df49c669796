"""Enqueueing: validate, apply the policy, store, publish.

One job, many, or as part of the caller's own transaction.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Unpack, cast, overload

from pydantic import JsonValue
from pydantic_core import from_json, to_json
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session

from job_registry import (
    EnqueueRequest,
    JobRegistry,
    JobTypeNotFound,
    Payload,
    PayloadInvalid,
    Violation,
)
from job_registry.enqueue_request import EnqueueOptions
from job_registry.errors import FaultBudget, near, shortened
from job_registry_api.queue.caller_transactions import publish_after_commit
from job_registry_api.queue.database import Database
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    IdempotencyKeyTaken,
    InputInvalid,
    QueueUnavailable,
)
from job_registry_api.queue.events import Events, JobEvent
from job_registry_api.queue.filters import JSON_VALUES
from job_registry_api.queue.group_commit import GroupCommit
from job_registry_api.queue.models import JobRecord, JobStatus, weight_of
from job_registry_api.queue.opening import Opening
from job_registry_api.queue.requests import (
    MAX_DIFFERING,
    creator_faults,
    differing_paths,
    input_faults,
    is_list,
    type_faults,
)
from job_registry_api.queue.store import (
    NewJob,
    Store,
    Stored,
    is_own,
    present,
    refuses,
    stored_before,
)

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

DEFAULT_PRIORITY: Final = 50

_NO_OPTIONS: Final = EnqueueRequest("", None)[2:]
"""What a request has after its type and payload if it has no options."""

OthersJobs = Literal["described", "returned", "hidden"]
"""What a caller learns of the job of another creator that has its idempotency key: everything, the
job if the payload is the same, or nothing but that the key is taken."""


class Enqueued(NamedTuple):
    """The stored job. `deduplicated` is True if an earlier call with this key stored it."""

    job: JobRecord
    deduplicated: bool = False


COMPARED_BYTES: Final = 2_097_152
"""The JSON text of existing payloads that a bulk compares with its own."""


@dataclass(frozen=True, slots=True)
class ExistingValues:
    """Which JSON values the results of a bulk have of jobs that existed: those that are read.

    `payload` is that of a conflict: otherwise it is the payload of the request. `others` are
    progress, result and error. `check` is called with their size, as `weight_of` counts it, before
    anything is stored. It raises if they are too large.
    """

    payload: bool = True
    others: bool = True
    check: Callable[[int], None] | None = None

    def of(self, job: JobRecord) -> JobRecord:
        """Return the job without the values that are not needed, so that they take no memory."""
        if not self.payload:
            job = job._replace(payload=None)
        return job if self.others else job._replace(progress=None, result=None, error=None)

    @property
    def names(self) -> tuple[str, ...]:
        return JSON_VALUES[not self.payload : None if self.others else 1]


NOT_STORED: Final = "not_stored"
"""The code of valid jobs in an atomic call in which other jobs were refused."""


@dataclass(frozen=True, slots=True)
class JobValid:
    """What `enqueue` would store. `duplicate_of` is the job that already has the key."""

    max_attempts: int
    timeout_seconds: int
    priority: int
    next_run_at: datetime
    duplicate_of: JobRecord | None


Refusal = (
    JobTypeNotFound | PayloadInvalid | InputInvalid | IdempotencyConflict | IdempotencyKeyTaken
)


class Enqueueing(Opening):
    """The part of `JobQueue` that stores jobs."""

    registry: JobRegistry
    events: Events
    _database: Database
    _store: Store
    max_bulk_size: int
    """The most jobs of one call."""
    _new_id: Callable[[], uuid.UUID]
    tracing: Tracing | None
    """Creates the spans of enqueues; None if they are not traced."""

    def __init__(self) -> None:
        # Separate groups: a job without a key never shares a statement with one that has to wait.
        self._inserts: GroupCommit[NewJob, Stored | None] = GroupCommit(self._insert_unkeyed)
        self._keyed_inserts = GroupCommit(self._insert)

    def request(
        self, job: Payload | EnqueueRequest, **options: Unpack[EnqueueOptions]
    ) -> EnqueueRequest:
        """Return the request to enqueue a payload, for `enqueue_many`. See `JobRegistry.request`.

        A request is returned as it is.

        Raises:
            DefinitionError: no job type has this class, or several have it and none is given.
            TypeError: there is no option of this name, or a request has options of its own.
        """
        return self.request_of("request", job, options)

    def request_of(
        self, method: str, job: Payload | EnqueueRequest, options: EnqueueOptions
    ) -> EnqueueRequest:
        """Return the request of a payload and its options, which `method` was called with."""
        if options:
            for name in options.keys() - EnqueueOptions.__annotations__.keys():
                names = (*EnqueueOptions.__annotations__, "created_by", "session")
                hint = "".join(f"; did you mean {each}?" for each in near(name, names))
                raise TypeError(f"{method}() has no argument {name}{hint}")
        if not isinstance(job, EnqueueRequest):
            return self.registry.request(job, **options)
        if options:
            raise TypeError(f"an EnqueueRequest has its own {', '.join(sorted(options))}")
        return job

    @overload
    async def enqueue(
        self,
        job: Payload,
        *,
        created_by: str | None = None,
        session: AsyncSession | async_scoped_session[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Enqueued: ...

    @overload
    async def enqueue(
        self,
        job: EnqueueRequest,
        *,
        created_by: str | None = None,
        others: OthersJobs = "described",
        session: AsyncSession | async_scoped_session[Any] | None = None,
        budget: FaultBudget | None = None,
    ) -> Enqueued: ...

    async def enqueue(
        self,
        job: Payload | EnqueueRequest,
        *,
        created_by: str | None = None,
        others: OthersJobs = "described",
        session: AsyncSession | async_scoped_session[Any] | None = None,
        budget: FaultBudget | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Enqueued:
        """Store a job. When this returns, the job is on disk.

        `job` is the payload, whose class determines the job type, with the options of `request`;
        or a request by the name of the type. `created_by` is the subject that enqueues it.

        With `session`, a session of the caller on the same database, the job is inserted in the
        caller's transaction: it becomes visible when the caller commits, and is discarded when
        the caller rolls back.

        `others` is what the caller learns of a job with the same idempotency key that another
        `created_by` stored. Faults are charged to the `budget` of the caller's request.

        Raises:
            DefinitionError: the class of the payload belongs to no job type, or to several.
            JobTypeNotFound: no job type has this name.
            PayloadInvalid: the payload is invalid; lists every fault.
            InputInvalid: another value is out of range; lists the faults of the payload too.
            IdempotencyConflict: the key belongs to a job of this type with another payload.
            IdempotencyKeyTaken: the key belongs to a job of another, of which the caller may not
                learn.
        """
        self.check_open()
        request = self.request_of("enqueue", job, options)
        budget = budget or FaultBudget()
        if session is not None:
            return await _async(session).run_sync(
                lambda opened: self.enqueue_within(
                    opened, request, created_by=created_by, others=others, budget=budget
                )
            )
        new = self.admit(request, created_by, budget)
        if self.tracing is None:
            return _enqueued(new, request, await self._insert_one(new), others, budget)
        with self.tracing.sending({new.id: new.type}) as span:
            new = new._replace(traceparent=span.traceparent)
            enqueued = _enqueued(new, request, await self._insert_one(new), others, budget)
            span.sent(enqueued.job.id)
            return enqueued

    async def enqueue_many(
        self,
        jobs: Sequence[Payload | EnqueueRequest | Refusal],
        *,
        atomic: bool = False,
        created_by: str | None = None,
        others: OthersJobs = "described",
        session: AsyncSession | async_scoped_session[Any] | None = None,
        budget: FaultBudget | None = None,
        values: ExistingValues = ExistingValues(),
    ) -> list[Enqueued | Refusal]:
        """Store up to `max_bulk_size` jobs. Return a result for each, in order.

        Each job is a payload or, with options of its own, a `request`. The result of a refused job
        is its error; a job that the caller has refused is given as its error. With `atomic`, one
        refusal means that no job is stored; the results of valid jobs are then `InputInvalid` with
        the code `not_stored`. The faults of all jobs are charged to one `budget`. `session` is that
        of `enqueue`. `values` says which JSON values of existing jobs the results have; with a
        session, they have all.

        Conflicts with existing payloads of `COMPARED_BYTES` in total are compared. Those of further
        jobs are said to be at the whole payload: "".

        Raises:
            DefinitionError: the class of a payload belongs to no job type, or to several.
            InputInvalid: there are more than `max_bulk_size` jobs.
        """
        self.check_open()
        bulk = self._bulk(jobs, atomic=atomic, others=others, budget=budget)
        for _ in self._admit_each(bulk, created_by):
            # Listing faults takes milliseconds. A bulk of them would block the event loop.
            await asyncio.sleep(0)
        with self._sending(bulk) as new:
            if new and session is None:
                await self._check_existing(new, values)
                stored, committed = await self._insert_bulk(new, atomic=atomic)
                await self._record(bulk, stored, committed, values)
            elif new and session is not None:
                stored, committed = await _async(session).run_sync(
                    lambda opened: self._insert_bulk_within(opened, new, atomic=atomic)
                )
                bulk.record_all(stored, committed)
        return bulk.in_order()

    def enqueue_many_within(
        self,
        session: Session,
        jobs: Sequence[Payload | EnqueueRequest],
        *,
        atomic: bool = False,
        created_by: str | None = None,
    ) -> list[Enqueued | Refusal]:
        """Store jobs in the transaction of a session without asyncio, as `enqueue_many` does."""
        bulk = self._bulk(jobs, atomic=atomic)
        for _ in self._admit_each(bulk, created_by):
            pass
        with self._sending(bulk) as new:
            if new:
                bulk.record_all(*self._insert_bulk_within(session, new, atomic=atomic))
        return bulk.in_order()

    @contextmanager
    def _sending(self, bulk: _Bulk) -> Iterator[list[NewJob]]:
        """Yield the jobs of a bulk to store. If enqueues are traced, they have one span."""
        new = bulk.jobs_to_store()
        if self.tracing is None or not new:
            yield new
            return
        with self.tracing.sending({job.id: job.type for job in new}, is_batch=True) as span:
            bulk.set_traceparent(span.traceparent)
            yield bulk.jobs_to_store()

    async def validate(
        self,
        request: EnqueueRequest,
        *,
        created_by: str | None = None,
        others: OthersJobs = "described",
        budget: FaultBudget | None = None,
    ) -> JobValid:
        """Return what `enqueue` would store. It raises the same errors and writes nothing."""
        self.check_open()
        budget = budget or FaultBudget()
        new = self.admit(request, created_by, budget)
        now = await self._store.now()
        duplicate: JobRecord | None = None
        if new.idempotency_key is not None:
            names = [each.type for each in (new, *_under_former_names(self.registry, [new]))]
            found = await self._store.find_by_key((name, new.idempotency_key) for name in names)
            duplicate = next(iter(found.values()), None)
        if duplicate is not None:
            stored = stored_before(duplicate, new)
            duplicate = _enqueued(new, request, stored, others, budget).job
        return JobValid(
            max_attempts=new.max_attempts,
            timeout_seconds=new.timeout_seconds,
            priority=new.priority,
            next_run_at=new.next_run_at or now,
            duplicate_of=duplicate,
        )

    def enqueue_within(
        self,
        session: Session,
        request: EnqueueRequest,
        *,
        created_by: str | None = None,
        others: OthersJobs = "described",
        budget: FaultBudget | None = None,
    ) -> Enqueued:
        """Store a job in the transaction of a session without asyncio. Raises as `enqueue` does."""
        budget = budget or FaultBudget()
        new = self.admit(request, created_by, budget)
        if self.tracing is None:
            return self._enqueue_within(session, new, request, others, budget)
        with self.tracing.sending({new.id: new.type}) as span:
            new = new._replace(traceparent=span.traceparent)
            enqueued = self._enqueue_within(session, new, request, others, budget)
            span.sent(enqueued.job.id)
            return enqueued

    def _enqueue_within(
        self,
        session: Session,
        new: NewJob,
        request: EnqueueRequest,
        others: OthersJobs,
        budget: FaultBudget,
    ) -> Enqueued:
        stored = self._insert_within(session, [new])
        enqueued = _enqueued(new, request, stored[new.id], others, budget)
        self._publish_within(session, [new], stored)
        return enqueued

    def _insert_bulk_within(
        self, session: Session, jobs: Sequence[NewJob], *, atomic: bool
    ) -> tuple[list[Stored], bool]:
        """Return the outcome of each job, and whether the jobs are part of the transaction."""
        savepoint = self._store.savepoint_within(session.connection()) if atomic else None
        stored = self._insert_within(session, jobs)
        if savepoint is not None:
            if any(refuses(job, stored[job.id]) for job in jobs):
                savepoint.rollback()
                return [stored[job.id] for job in jobs], False
            savepoint.commit()
        self._publish_within(session, jobs, stored)
        return [stored[job.id] for job in jobs], True

    def _insert_within(self, session: Session, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        connection = session.connection()
        stored: dict[uuid.UUID, Stored] = {}
        former = _under_former_names(self.registry, jobs)
        if former:
            keys = {(job.type, job.idempotency_key or "") for job in former}
            found = self._store.find_by_key_within(connection, keys)
            for job in former:
                holder = found.get((job.type, job.idempotency_key or ""))
                if holder is not None:
                    stored[job.id] = stored_before(holder, job)
        for _ in range(10):
            missing = [job for job in jobs if job.id not in stored]
            if not missing:
                return stored
            stored |= self._store.insert_within(connection, missing)
        raise _deleted()

    def _publish_within(
        self, session: Session, jobs: Sequence[NewJob], stored: Mapping[uuid.UUID, Stored]
    ) -> None:
        if created := created_events(jobs, stored):
            publish_after_commit(session, self.events.publish, created)

    def _bulk(
        self,
        jobs: Sequence[Payload | EnqueueRequest | Refusal],
        *,
        atomic: bool,
        others: OthersJobs = "described",
        budget: FaultBudget | None = None,
    ) -> _Bulk:
        if not is_list(jobs):
            message = f"Expected a list of payloads and requests; got {shortened(jobs)}."
            raise InputInvalid((Violation("/jobs", "wrong_type", message),))
        if len(jobs) > self.max_bulk_size:
            message = f"Expected at most {self.max_bulk_size} jobs per call; got {len(jobs)}."
            raise InputInvalid((Violation("", "too_long", message),))
        bulk = _Bulk(len(jobs), atomic, others, budget or FaultBudget())
        for index, job in enumerate(jobs):
            if isinstance(job, Refusal):
                bulk.results[index] = job
            else:
                bulk.requests[index] = self.request(job)
        return bulk

    def _admit_each(self, bulk: _Bulk, created_by: str | None) -> Iterator[None]:
        """Admit the jobs of a bulk. Yields after each job that is refused."""
        for index, request in bulk.requests.items():
            try:
                bulk.admitted[index] = self.admit(
                    request, created_by, bulk.budget, hides_others=bulk.others == "hidden"
                )
            except (JobTypeNotFound, PayloadInvalid, InputInvalid) as refusal:
                bulk.results[index] = refusal
                yield

    def admit(
        self,
        request: EnqueueRequest,
        created_by: str | None = None,
        budget: FaultBudget | None = None,
        *,
        hides_others: bool = False,
        found: Sequence[Violation] = (),
    ) -> NewJob:
        """Return the job that a request describes. Raises as `enqueue` does; writes nothing.

        `found` are faults of fields that the request does not have. It is refused for these too.
        """
        if wrong := type_faults("/type", request.type):
            raise InputInvalid(wrong)
        budget = budget or FaultBudget()
        faults = list(found)
        if faults or request[2:] != _NO_OPTIONS:
            self.registry.get_type(request.type, budget)  # Without a type, they do not matter.
            faults += budget.listed("The request", list(input_faults(request)))
        faults += creator_faults(created_by)
        try:
            admitted = self.registry.admit(request.type, request.payload, budget)
        except PayloadInvalid as invalid:
            if not faults:
                raise
            faults += [
                Violation("/payload" + v.path, v.code, v.message) for v in invalid.violations
            ]
        if faults:
            raise InputInvalid(tuple(faults))
        policy = admitted.job_type.policy
        return NewJob(
            id=self._new_id(),
            type=admitted.job_type.name,
            fingerprint=admitted.fingerprint,
            payload=admitted.json,
            priority=DEFAULT_PRIORITY if request.priority is None else request.priority,
            max_attempts=request.max_attempts or policy.max_attempts,
            timeout_seconds=policy.timeout_seconds,
            backoff_base_seconds=policy.backoff.base_seconds,
            backoff_cap_seconds=policy.backoff.cap_seconds,
            # PostgreSQL reads no offset of 16 hours and more, which RFC 3339 has.
            next_run_at=request.schedule_at and request.schedule_at.astimezone(UTC),
            idempotency_key=request.idempotency_key,
            created_by=created_by,
            hides_others=hides_others,
        )

    async def _insert_bulk(
        self, jobs: Sequence[NewJob], *, atomic: bool
    ) -> tuple[list[Stored], bool]:
        """Return the outcome of each job, and whether the jobs were committed."""
        if all(job.idempotency_key is None for job in jobs):
            return await self._insert_unkeyed(jobs), True
        if atomic:
            stored, committed = await self._database.patiently(
                lambda: self._insert_all(jobs),
                "a job with one of the idempotency keys is being deleted",
            )
            if committed:
                self._publish_created(jobs, stored)
            return [stored[job.id] for job in jobs], committed
        # Jobs without a key come last. If an error ends the call before, none of them is stored,
        # and a caller that sends the bulk again stores no job twice.
        keyed = [job for job in jobs if job.idempotency_key is not None]
        unkeyed = [job for job in jobs if job.idempotency_key is None]
        outcomes = dict(zip((job.id for job in keyed), await self._insert(keyed), strict=True))
        for job in keyed:
            if outcomes[job.id] is None:
                outcomes[job.id] = await self._database.patiently_in(
                    self._keyed_inserts, job, "another transaction holds the idempotency key"
                )
        if unkeyed:
            inserted = await self._insert_unkeyed(unkeyed)
            outcomes |= zip((job.id for job in unkeyed), inserted, strict=True)
        return [present(outcomes[job.id]) for job in jobs], True

    async def _insert_unkeyed(self, jobs: Sequence[NewJob]) -> list[Stored]:
        """Insert jobs without keys. Nothing can conflict, so one statement stores all or none."""
        sender = self.events.sender()
        stored = await self._store.insert_unkeyed(jobs, sender)
        events = [JobEvent("job.created", job.id, job.type, 0) for job in jobs]
        self.events.publish(events, sender)
        return stored

    async def _insert_all(
        self, jobs: Sequence[NewJob]
    ) -> tuple[dict[uuid.UUID, Stored], bool] | None:
        """Insert all jobs or none. Return None if a job with one of the keys is being deleted."""
        held = await held_under_former_names(self._store, self.registry, jobs)
        if any(refuses(job, held[job.id]) for job in jobs if job.id in held):
            nothing = next(iter(held.values()))._replace(existing=None)
            return {job.id: held.get(job.id, nothing) for job in jobs}, False
        rest = [job for job in jobs if job.id not in held]
        stored, committed = await self._store.insert_all(rest)
        stored = held | stored
        return (stored, committed) if len(stored) == len(jobs) else None

    async def _insert(self, jobs: Sequence[NewJob]) -> list[Stored | None]:
        """Insert jobs in one statement. None means that another transaction holds the key."""
        stored = await held_under_former_names(self._store, self.registry, jobs)
        if rest := [job for job in jobs if job.id not in stored]:
            stored |= await self._store.insert(rest)
        self._publish_created(jobs, stored)
        return [stored.get(job.id) for job in jobs]

    async def _insert_one(self, new: NewJob) -> Stored:
        """Insert a job with others in one statement. An existing job is read whole."""
        inserts = self._inserts if new.idempotency_key is None else self._keyed_inserts
        for _ in range(10):
            stored = await self._database.patiently_in(
                inserts, new, "another transaction holds the idempotency key"
            )
            if stored.existing is None:
                return stored
            whole = await self._store.get(stored.existing.id)
            if whole is not None:
                return stored._replace(existing=whole, is_whole=True)
        raise _deleted()

    async def _check_existing(self, jobs: Sequence[NewJob], values: ExistingValues) -> None:
        """Check the size of the values of existing jobs that the results will have."""
        keyed = [job for job in jobs if job.idempotency_key is not None]
        if values.check is None or not keyed or not (values.payload or values.others):
            return
        ids = [
            holder.existing.id
            for holder in (await self._store.holders(keyed)).values()
            if holder.existing is not None and (values.others or not holder.is_same)
        ]
        weight = 0
        async with aclosing(self._store.each_of(ids, values.names)) as existing:
            async for job in existing:
                weight += weight_of(job)
                values.check(weight)

    async def _record(
        self, bulk: _Bulk, stored: Sequence[Stored], committed: bool, values: ExistingValues
    ) -> None:
        """Record the outcomes of a bulk. Existing jobs are read a few at a time."""
        of_existing: dict[uuid.UUID, list[tuple[int, Stored]]] = {}
        for index, outcome in zip(bulk.admitted, stored, strict=True):
            existing = outcome.existing
            if existing is None or (outcome.is_same and not values.others):
                bulk.record(index, outcome, committed)
            else:
                of_existing.setdefault(existing.id, []).append((index, outcome))
        # The jobs are stored: what fails from here on must not look as if they were not.
        with suppress(QueueUnavailable):
            await self._record_existing(bulk, of_existing, committed, values)
        for index, outcome in chain.from_iterable(of_existing.values()):
            bulk.record(index, outcome, committed, values)

    async def _record_existing(
        self,
        bulk: _Bulk,
        of_existing: dict[uuid.UUID, list[tuple[int, Stored]]],
        committed: bool,
        values: ExistingValues,
    ) -> None:
        """Record the outcomes with these existing jobs, and remove them from the dictionary."""
        compared = 0
        names = values.names if values.payload else ("payload", *values.names)
        async with aclosing(self._store.each_of(list(of_existing), names)) as existing:
            async for job in existing:
                size = len(to_json(job.payload))
                for index, outcome in of_existing.pop(job.id):
                    compared += size if outcome.conflicts else 0
                    is_whole = outcome.is_same or compared <= COMPARED_BYTES
                    outcome = outcome._replace(existing=job, is_whole=is_whole)
                    bulk.record(index, outcome, committed, values)
                if compared > COMPARED_BYTES and not (values.payload or values.others):
                    return
                await asyncio.sleep(0)  # A comparison takes milliseconds.
        for outcomes in of_existing.values() if committed else ():
            while outcomes:  # They were deleted in the meantime.
                index, _ = outcomes[0]
                outcome = await self._insert_one(bulk.admitted[index])
                bulk.record(index, outcome, committed, values)
                del outcomes[0]

    def _publish_created(self, jobs: Sequence[NewJob], stored: Mapping[uuid.UUID, Stored]) -> None:
        self.events.publish(created_events(jobs, stored))


@dataclass(frozen=True, slots=True)
class _Bulk:
    """A call of `enqueue_many`: its requests, the jobs that were admitted, and the results so far,
    by index."""

    size: int
    atomic: bool
    others: OthersJobs
    budget: FaultBudget
    requests: dict[int, EnqueueRequest] = field(default_factory=dict)
    admitted: dict[int, NewJob] = field(default_factory=dict)
    results: dict[int, Enqueued | Refusal] = field(default_factory=dict)

    def jobs_to_store(self) -> list[NewJob]:
        """Return the admitted jobs; none if the call is atomic and a job was refused."""
        return [] if self.atomic and self.results else list(self.admitted.values())

    def set_traceparent(self, traceparent: str | None) -> None:
        """Set the span that enqueues the jobs."""
        for index, job in self.admitted.items():
            self.admitted[index] = job._replace(traceparent=traceparent)

    def record_all(self, stored: Sequence[Stored], committed: bool) -> None:
        """Record the outcomes of the admitted jobs."""
        for index, outcome in zip(self.admitted, stored, strict=True):
            self.record(index, outcome, committed)

    def record(
        self,
        index: int,
        outcome: Stored,
        committed: bool,
        values: ExistingValues = ExistingValues(),
    ) -> None:
        """Record the outcome of an admitted job, with these values of the existing one."""
        try:
            enqueued = _enqueued(
                self.admitted[index], self.requests[index], outcome, self.others, self.budget
            )
            if outcome.existing is not None:
                enqueued = enqueued._replace(job=values.of(enqueued.job))
            self.results[index] = enqueued
        except IdempotencyKeyTaken as refusal:
            self.results[index] = refusal
        except IdempotencyConflict as refusal:
            refusal = IdempotencyConflict(values.of(refusal.existing_job), refusal.differing_paths)
            self.results[index] = refusal if committed else _conflict_within(refusal, self.admitted)

    def in_order(self) -> list[Enqueued | Refusal]:
        """Return the result of each job."""
        refused = [i for i, result in self.results.items() if isinstance(result, Exception)]
        if self.atomic and refused:
            because = not_stored(sorted(refused))
            for index in self.admitted:
                if not isinstance(self.results.get(index), Exception):
                    self.results[index] = because
        return [self.results[index] for index in range(self.size)]


async def held_under_former_names(
    store: Store, registry: JobRegistry, jobs: Sequence[NewJob]
) -> dict[uuid.UUID, Stored]:
    """Return the outcomes of the jobs whose key a job has under a former name of the type.

    Only processes that have the former name as the name of the type insert such jobs. One that is
    inserted at this moment is not found.
    """
    former = _under_former_names(registry, jobs)
    held = await store.holders(former) if former else {}
    types = {job.id: job.type for job in jobs}
    return {
        job_id: outcome._replace(existing=present(outcome.existing)._replace(type=types[job_id]))
        for job_id, outcome in held.items()
    }


def _under_former_names(registry: JobRegistry, jobs: Sequence[NewJob]) -> list[NewJob]:
    """Return the jobs that have a key, once for each former name of their type."""
    return [
        job._replace(type=former)
        for job in jobs
        if job.idempotency_key is not None
        for former in registry.get_type(job.type).former_names
    ]


def created_events(jobs: Sequence[NewJob], stored: Mapping[uuid.UUID, Stored]) -> list[JobEvent]:
    """Return the events of the jobs that were stored, not of those that existed."""
    return [
        JobEvent("job.created", job.id, job.type, 0)
        for job in jobs
        if (outcome := stored.get(job.id)) is not None and outcome.existing is None
    ]


def _deleted() -> QueueUnavailable:
    return QueueUnavailable("the job with this idempotency key was deleted in the meantime")


def _async(session: AsyncSession | async_scoped_session[Any]) -> AsyncSession:
    if isinstance(session, async_scoped_session):
        session = session()
    if not isinstance(session, AsyncSession):
        raise TypeError(
            f"session: expected an AsyncSession of SQLAlchemy; got {type(session).__name__}."
            " A Session is for `queue.sync.enqueue`"
        )
    return session


def _enqueued(
    new: NewJob, request: EnqueueRequest, stored: Stored, others: OthersJobs, budget: FaultBudget
) -> Enqueued:
    existing = stored.existing
    if existing is not None:
        known = others == "described" or is_own(new, existing)
        if not known and others == "hidden":
            raise IdempotencyKeyTaken
        most = 1 if budget.is_spent or not known else MAX_DIFFERING
        paths: tuple[str, ...] = ()
        if stored.conflicts:
            paths = ("",)
            if stored.is_whole:
                paths = differing_paths(existing.payload, from_json(new.payload), most) or paths
        elif not stored.is_whole:
            existing = existing._replace(payload=cast(JsonValue, request.payload))
        if paths and not known:
            raise IdempotencyKeyTaken
        if paths:
            budget.faults -= len(paths)
            budget.characters -= sum(map(len, paths))
            raise IdempotencyConflict(existing, paths)
        # Whoever sends the same key and payload gets the job, and not the name of its creator.
        return Enqueued(
            existing if known else existing._replace(created_by=None), deduplicated=True
        )
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


def _conflict_within(
    conflict: IdempotencyConflict, admitted: Mapping[int, NewJob]
) -> IdempotencyConflict | InputInvalid:
    """Return the conflict, or a violation if it is with a job of the same unstored call."""
    for index, other in admitted.items():
        if other.id == conflict.existing_job.id:
            message = f"The job at index {index} of this call has this key with another payload."
            return InputInvalid((Violation("/idempotencyKey", "duplicate_key", message),))
    return conflict


def not_stored(
    refused: list[int], one: str = "the job at index", more: str = "the jobs at index"
) -> InputInvalid:
    """Return the error of a valid job in an atomic call in which other jobs were refused."""
    named = ", ".join(str(index) for index in refused[:10])
    if len(refused) > 10:
        named += f" and {len(refused) - 10} more"
    were = f"{one} {named} was" if len(refused) == 1 else f"{more} {named} were"
    message = f"Not stored: the call is atomic, and {were} refused."
    return InputInvalid((Violation("", NOT_STORED, message),))
