"""The operations on the tables of the queue, each documented once.

`postgresql.py` and `sqlite.py` implement them, each in one statement or one transaction. The
statements are in `statements/`, one file per database.
"""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar, cast

import sqlalchemy
from pydantic_core import from_json, to_json
from sqlalchemy import Connection, Executable, NestedTransaction, func
from sqlmodel import col, select

from job_registry_api import defaults
from job_registry_api.queue.database import Database, quoted
from job_registry_api.queue.filters import (
    FIRST_ID,
    JSON_VALUES,
    LAST_ID,
    JobFilter,
    Sample,
    Slice,
    among,
    columns,
    counted,
    found,
    identified,
    is_sifted,
    listed,
    merged,
    narrowed,
    ordered,
    owned_by,
    sampled,
    sampled_own,
    searched,
    walk_end,
    walked,
    walks,
    widths,
)
from job_registry_api.queue.models import (
    PARKED_UNTIL,
    STATUSES,
    AttemptOutcome,
    AttemptRecord,
    Job,
    JobCount,
    JobCounts,
    JobError,
    JobEventBatch,
    JobParked,
    JobRecord,
    JobStatus,
    Owner,
    Parked,
    TypeVersion,
    error_of,
)
from job_registry_api.queue.requests import EARLIEST, LATEST, differing_paths

T = TypeVar("T")

CLAIM_BYTES: Final = 1_000_000
"""No more jobs are leased by one claim once their payloads have this many bytes of JSON text.

Each is read whole, and its objects may take 24 times the memory of their text.
"""

TIMED_OUT: Final = JobError("timed_out", "The attempt exceeded its timeoutSeconds.")
"""The error of an attempt whose report does not say how long the timeout was."""

UNREPORTED_TIMEOUT: Final = JobError(
    TIMED_OUT.code,
    "The attempt exceeded its timeoutSeconds, and its worker did not report it: the worker stopped,"
    " was blocked, or lost its connection to the queue.",
)
"""The error of an attempt that timed out and that a claim ends: one for all that it finds."""

LOST: Final = JobError(
    "lost", "The lease was not renewed: the worker stopped, or lost its connection to the queue."
)

AHEAD_LIMIT: Final = 1_000
"""How many jobs ahead are counted at most. Beyond that the exact number is not useful."""

EXPIRED_LEASES: Final = 10_000
"""How many expired leases are read at most."""

COUNTED_JOBS: Final = 10_000
"""How many jobs of a type are counted at most for its versions."""

WAITS_ENDED: Final = "worker.stopped_waiting"
"""The event of a worker that waits for no more jobs."""

EVENTS_KEPT_SECONDS: Final = 60
"""How long a batch of events is stored, for other processes to read."""

CLOCK_SLACK_SECONDS: Final = 1.0
"""How far in the future a time may be. Beyond that, the clock is assumed to have stepped back."""

RECOVERY_BATCH: Final = 100
"""How many lost leases one claim recovers at most, so that claims stay fast after an outage."""

SAMPLED_BLOCKS: Final = 1_000
"""From how many random places in the table of jobs a sample is read."""

OWN_JOBS: Final = 100_000
"""How many jobs of an owner are counted at most in addition to those whose columns are read."""

OWN_JOBS_PER_SAMPLED: Final = 50

RARE_JOBS: Final = 5_000
"""How many jobs have some types and statuses at most, so that a page of those of a creator or an
error code among them is never cut short."""

_UNBOUNDED: Final = 2**62

PIECE_BYTES: Final = 1_000_000
"""The JSON text of large jobs that is read at once."""

LISTED_AT_ONCE: Final = 50
"""How many jobs are read at once for their sizes and their small values."""


def timed_out(timeout_seconds: int) -> JobError:
    """Return the error of an attempt that took longer than this."""
    message = f"The attempt exceeded its timeoutSeconds of {timeout_seconds}."
    return JobError(TIMED_OUT.code, message)


class StoredEvents(NamedTuple):
    """A stored batch of events: its id, the time of its transaction, and its message."""

    id: int
    created_at: datetime
    message: str


class Listed(NamedTuple):
    """A job of a page, and the length of its JSON values.

    Where `is_partial`, it has None instead of each payload, progress, result and error above
    `SMALL`.
    """

    job: JobRecord
    size: int
    is_partial: bool


class Found(NamedTuple):
    """A part of a list of jobs."""

    listed: list[Listed]
    stopped_at: uuid.UUID | None = None
    """The id at which the search for more jobs stopped. None: there are no more in this part."""


class CountedRange(NamedTuple):
    """How many jobs in a range of an index were read, and how many of them are wanted.

    `end` is the place in the index of the last one that was read, and `at_end` the number of wanted
    ones at that place. The times are those of the newest job, of the last one that was read, and of
    the oldest one in the range. `end` and `oldest` are None if all were read.
    """

    read: int
    matched: int
    at_end: int
    end: Any
    newest: datetime | None
    last: datetime | None
    oldest: datetime | None


class SampledJobs(NamedTuple):
    """How many jobs of a sample have the wanted types and statuses, and how many of these are
    wanted and have not been counted."""

    of_kind: int
    beyond: int


class SampledOwn(NamedTuple):
    """How many jobs of an owner have not been counted, at most `OWN_JOBS`; how many of them are in
    a sample, and how many of those are wanted."""

    jobs: int
    read: int
    matched: int


COUNTS_FOLDED: Final = 10_000
"""How many rows of counts one transaction merges at most."""

EVENT_BATCHES_PRUNED: Final = 10_000
"""How many stored batches one transaction deletes at most."""


class StoredPayload(NamedTuple):
    """The payload of a stored job, as JSON text."""

    id: uuid.UUID
    type: str
    text: str


class NewJob(NamedTuple):
    """A job to insert. `payload` is JSON text; `next_run_at` is in UTC, and None means now."""

    id: uuid.UUID
    type: str
    fingerprint: str
    payload: bytes
    priority: int
    max_attempts: int
    timeout_seconds: int
    backoff_base_seconds: float
    backoff_cap_seconds: float
    next_run_at: datetime | None
    idempotency_key: str | None
    created_by: str | None
    traceparent: str | None = None
    """The span that enqueues it, if enqueues are traced."""
    hides_others: bool = False
    """Whether the creator may not learn of the job of another that has the key."""


class Stored(NamedTuple):
    """The outcome of an insert: the times of a new job, or the existing job with its key.

    `is_same` says whether the existing job has the payload of the new one. Unless `is_whole`, its
    payload, progress, result and error are None: those of a bulk of jobs may be 100 times as large
    as the bulk.
    """

    created_at: datetime
    next_run_at: datetime
    existing: JobRecord | None = None
    is_same: bool = True
    is_whole: bool = False

    @property
    def conflicts(self) -> bool:
        """Whether the key belongs to a job with another payload."""
        return self.existing is not None and not self.is_same


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim: up to `jobs` jobs of `types`, in the order in which the types take turns.

    `limits` has the concurrency limits of the types that have one. A `thorough` claim considers
    all due jobs before it returns none.

    `former` has the former names of types, whose jobs are claimed with them and share their limit.
    `fingerprints` has those of the worker: of these types it also gets the parked jobs that it has
    not refused. `readable` has the fingerprints under which a job of a type must have been
    admitted. `sender` is that of the message of its events; None is the process.
    """

    types: tuple[str, ...]
    limits: Mapping[str, int]
    worker_id: str
    jobs: int
    lease_seconds: float
    thorough: bool = True
    former: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    readable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sender: str | None = None

    def lanes(self) -> Iterator[tuple[int, str, str]]:
        """Yield the names under which jobs are stored: the number of the type, its name, theirs."""
        for number, name in enumerate(self.types, start=1):
            for stored in (name, *self.former.get(name, ())):
                yield number, name, stored


class ClaimedJob(NamedTuple):
    """A claimed job, the token of its lease, and when the lease and the attempt end.

    `traceparent` is the span that enqueued the job, if enqueues are traced.
    """

    job: JobRecord
    token: str
    expires_at: datetime
    deadline_at: datetime
    traceparent: str | None


class Recovered(NamedTuple):
    """A job whose attempt was ended because its lease had expired.

    `traceparent` is the span that enqueued it, if enqueues are traced.
    """

    job: JobRecord
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class Claimed:
    """The outcome of a claim: the leased jobs, and the jobs whose lost attempts it ended first.

    `everything` says whether all due jobs were considered. A claim does not always do that while
    a long transaction makes it expensive. `sender` is that of the message that has the events of
    the leased jobs, in their order, and no others. None: that is not known.
    """

    leased: list[ClaimedJob]
    recovered: list[Recovered]
    everything: bool = True
    sender: str | None = None


class Report(NamedTuple):
    """How an attempt ended, as a worker reports it. `token` and `job_id` belong to its lease.

    `outcome` SUCCEEDED has a `result`. FAILED has an `error`; the job is tried again if `retryable`
    is set and attempts are left, after `delay_seconds` or, if that is None, the job's backoff.
    RELEASED, SNOOZED and `spend=False` do not spend the attempt. TIMED_OUT with `still_running`
    keeps the attempt's place in the concurrency limit, because its handler has not stopped.
    RELEASED with `parked_for`, the fingerprint of the worker, parks the job; `error` says why.
    Unless `reads_job`, the job of a success is not read: a worker does not need it. The `logs` of
    such a report replace the stored log lines; None keeps them.

    It is a tuple because every attempt creates one, and a frozen dataclass takes 2 us longer.
    """

    job_id: uuid.UUID
    token: str
    outcome: AttemptOutcome
    result: bytes | None = None
    error: JobError | None = None
    retryable: bool = True
    delay_seconds: float | None = None
    spend: bool = True
    still_running: bool = False
    parked_for: str | None = None
    reads_job: bool = True
    logs: bytes | None = None


class Ended(NamedTuple):
    """A job whose attempt was ended, or that was cancelled or retried.

    `job` is the whole of it, if the report reads it and the database could read it after that.
    """

    id: uuid.UUID
    type: str
    status: JobStatus
    attempt: int
    is_parked: bool
    job: JobRecord | None = None

    @classmethod
    def of(cls, job: JobRecord) -> Ended:
        """Return a job that was read."""
        return cls(job.id, job.type, job.status, job.attempt, job.is_parked, job)


@dataclass(frozen=True, slots=True)
class LeaseState:
    """The state of a lease: whether it is in force, and whether its job succeeded by it."""

    in_force: bool
    succeeded: bool


class ExpiredLease(NamedTuple):
    """A running job whose lease has expired, with its stored type.

    `is_counted` is whether it is among the running jobs of `Waiting`.
    """

    job_id: uuid.UUID
    type: str
    expired_at: datetime
    is_counted: bool


class LeaseRenewal(NamedTuple):
    """A lease to renew. `progress` is JSON text, or None if it has not changed."""

    job_id: uuid.UUID
    token: str
    progress: bytes | None = None


class LeaseLogs(NamedTuple):
    """The log lines of an attempt, as text of `job_logs`. They replace those that are stored."""

    job_id: uuid.UUID
    token: str
    lines: bytes


@dataclass(frozen=True, slots=True)
class Renewed:
    """A lease in force: when it expires, how long the attempt may still run, whether to stop.

    `renewed` is False if another transaction has locked the row. Then the lease is unchanged, and
    its progress was not stored.
    """

    expires_at: datetime
    seconds_left: float
    cancel_requested: bool
    renewed: bool = True


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a queued job waits for. `due_in_seconds` is negative for a job that is due.

    `ahead` counts the due jobs of its type that go first, up to 1,000.
    """

    due_in_seconds: float
    running: int
    worker_seen_seconds_ago: float | None
    ahead: int


class Refused(Exception):
    """Rolls back a transaction that inserts all jobs or none. `stored` are the outcomes so far."""

    def __init__(self, stored: dict[uuid.UUID, Stored]) -> None:
        self.stored = stored
        super().__init__()


class Store(ABC):
    """The operations of the queue on its tables.

    Operations that change jobs announce the events to other processes in the same transaction.
    Each operation raises `QueueUnavailable` if the database does not answer in time.
    """

    process: str
    """Names the sender of events."""
    _database: Database
    renamed: Mapping[str, str] = MappingProxyType({})
    """The current name for each former name of a type. Records have the current names."""

    def record(self, row: Mapping[str, Any]) -> JobRecord:
        """Return the job of a row of `job` with converted values, under the current type name."""
        job = JobRecord.of(row)
        name = self.renamed.get(job.type)
        return job if name is None else job._replace(type=name)

    def ended(self, row: Mapping[str, Any]) -> Ended:
        """Return the job of a row that has only some of its columns."""
        name = row["type"]
        status = STATUSES[row["status"]]
        is_parked = status is JobStatus.QUEUED and row["next_run_at"] == PARKED_UNTIL
        current = self.renamed.get(name, name)
        return Ended(row["id"], current, status, row["attempt"], is_parked)

    @abstractmethod
    async def insert(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        """Insert jobs, except those whose type already has a job with the idempotency key.

        The unique index decides. If another transaction is inserting or deleting a job with the
        key, the job is missing from the result; this method does not wait for that transaction.
        """

    @abstractmethod
    async def insert_unkeyed(self, jobs: Sequence[NewJob], sender: str) -> list[Stored]:
        """Insert jobs without idempotency keys, all or none. Return their outcomes in order.

        `sender` is that of the one message of their events.
        """

    @abstractmethod
    async def insert_all(self, jobs: Sequence[NewJob]) -> tuple[dict[uuid.UUID, Stored], bool]:
        """Insert all jobs, or none if one conflicts with the existing job of its key.

        Return the outcomes, and whether they were committed. Wait for transactions that hold one
        of the keys.
        """

    @abstractmethod
    async def holders(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        """Return the jobs that have the idempotency keys of new jobs, by the ids of the new."""

    @abstractmethod
    def insert_within(
        self, connection: Connection, jobs: Sequence[NewJob]
    ) -> dict[uuid.UUID, Stored]:
        """Insert jobs in a transaction that is open on this connection, which may be the caller's
        own, of any driver. Wait for transactions that hold one of the keys.
        """

    def savepoint_within(self, connection: Connection) -> NestedTransaction:
        """Begin a savepoint in a transaction that is open on this connection."""
        return connection.begin_nested()

    @abstractmethod
    async def complete_and_insert(
        self,
        report: Report,
        jobs: Sequence[NewJob],
    ) -> tuple[JobRecord | None, dict[uuid.UUID, Stored]]:
        """End an attempt as `end` does, and insert all jobs or none, in one transaction.

        It does not wait for transactions that hold one of the keys. Nothing is changed if the
        attempt was not ended, and the result is then None; or if a job conflicts, which the
        returned outcomes show, or is missing from them.
        """

    @abstractmethod
    async def claim(self, claim: Claim) -> Claimed:
        """Lease due jobs: highest priority first, types of one priority in turns, and within a type
        oldest first.

        A type with a limit is locked before its running jobs are counted. A claim takes jobs of a
        type with a limit only if it has locked and counted it. Rows that another transaction has
        locked are skipped. Attempts whose lease has expired are ended first. No more jobs are
        leased once their payloads have `CLAIM_BYTES`.
        """

    @abstractmethod
    async def recover(self, lease_seconds: float) -> list[Recovered]:
        """End attempts whose lease has expired: `timed_out` past the deadline, otherwise `lost`.

        The attempt is spent. The job is queued again after its backoff, failed if no attempt is
        left, or cancelled if that was requested.
        """

    @abstractmethod
    async def end(self, reports: Sequence[Report]) -> dict[uuid.UUID, Ended]:
        """End attempts as reported, at most one per job, if the lease is in force.

        The result lacks jobs whose lease is lost, and jobs whose row another transaction has
        locked. A requested cancellation takes precedence over every outcome but success.
        """

    @abstractmethod
    async def succeed(self, reports: Sequence[Report], sender: str) -> dict[uuid.UUID, Ended]:
        """Do what `end` does for attempts that succeeded and whose jobs are not read.

        `sender` is that of the message, which has the events of the result in its order.
        """

    @abstractmethod
    async def succeed_and_claim(
        self, reports: Sequence[Report], sender: str, claim: Claim
    ) -> tuple[dict[uuid.UUID, Ended], Claimed]:
        """Do what `succeed` does, then what `claim` does, in one transaction with two messages.

        A worker that is busy takes its next jobs with one round trip and one commit. The claim
        leases nothing if it would have to wait for another one.
        """

    @abstractmethod
    async def renew(
        self, renewals: Sequence[LeaseRenewal], lease_seconds: float
    ) -> dict[tuple[uuid.UUID, str], Renewed | None]:
        """Renew leases in force, never past the attempt's deadline.

        None means that the lease is lost; a timed-out attempt keeps its place. If another
        transaction has locked the row, the lease is unchanged.
        """

    @abstractmethod
    async def store_logs(self, logs: Sequence[LeaseLogs]) -> None:
        """Store the log lines of attempts, whether or not their lease is in force.

        Those of a row that another transaction has locked are not stored.
        """

    @abstractmethod
    async def settle(self, leases: Sequence[tuple[uuid.UUID, str]]) -> None:
        """Free the places of timed-out attempts whose handlers have stopped."""

    @abstractmethod
    async def cancel(self, job_id: uuid.UUID, owner: Owner | None = None) -> Ended | None:
        """Cancel a queued job, or record that the worker of a running job must stop.

        Return None if the job is neither, or does not exist, or is not the owner's.
        """

    @abstractmethod
    async def retry(self, job_id: uuid.UUID, owner: Owner | None = None) -> Ended | None:
        """Queue a failed or cancelled job. If no attempt is left, allow one more.

        Return None if the job is neither, or does not exist, or is not the owner's.
        """

    async def unanswered(self, worker_id: str, *, seconds: float) -> list[tuple[uuid.UUID, str]]:
        """Return the running jobs that a worker leased longer ago, and their tokens."""
        rows = await self._read("unanswered", {"worker": worker_id, "seconds": seconds})
        return [(row["id"], row["lease_token"]) for row in rows]

    @abstractmethod
    async def next_due(self, types: Sequence[str], limits: Mapping[str, int]) -> float | None:
        """Return the seconds until a claim may find more jobs, or None if no time is known."""

    @abstractmethod
    async def see_worker(
        self, types: Sequence[str], versions: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Record that a worker runs these types, and these fingerprints of types."""

    @abstractmethod
    async def unpark(
        self, types: Sequence[str], *, parked_until: datetime, jobs: int
    ) -> list[JobRecord]:
        """Make up to `jobs` jobs of these types that were parked by a time due for every worker.

        What refused them is forgotten. Rows that another transaction has locked are left out.
        """

    @abstractmethod
    async def fail_parked(self, *, older_than_seconds: float, jobs: int) -> list[JobRecord]:
        """Fail up to `jobs` jobs that have been parked for longer, the oldest first."""

    @abstractmethod
    async def prune_versions(self, *, keep_seconds: float) -> None:
        """Delete the versions of types whose workers were last seen longer ago."""

    @abstractmethod
    async def announce_waits_ended(self, waits: str) -> None:
        """Announce to other processes that the waits of this name end."""

    @abstractmethod
    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        """Delete up to `jobs` jobs that ended with `status` longer ago than `keep_seconds`.

        The oldest are deleted first, with their attempts. Return how many.
        """

    @abstractmethod
    async def fold_counts(self) -> int:
        """Merge rows of the table of counts, or delete those that are zero.

        Return how many; on PostgreSQL, at most `COUNTS_FOLDED`.
        """

    @abstractmethod
    async def prune_events(self) -> int:
        """Delete stored batches of events that are older than `EVENTS_KEPT_SECONDS`.

        Return how many, at most `EVENT_BATCHES_PRUNED`.
        """

    @abstractmethod
    async def check_writes(self, *, timeout_seconds: float) -> None:
        """Insert a job with an attempt, and roll back.

        Raises:
            QueueUnavailable: a write would fail, or the role lacks a grant.
        """

    @abstractmethod
    async def _read(
        self, name: str, parameters: Mapping[str, Any], *, in_order: bool = False
    ) -> Sequence[Mapping[str, Any]]:
        """Run a statement that only reads, and return its rows with converted values.

        For `in_order`, see `Database.reading`.
        """

    @abstractmethod
    def _execute_within(
        self, connection: Connection, name: str, parameters: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Any]]:
        """Run a statement in a transaction that is open on this connection."""

    async def _select(self, query: Executable, *, in_order: bool = False) -> list[dict[str, Any]]:
        """Run an ordinary query. For `in_order`, see `Database.reading`."""
        async with self._database.reading(in_order=in_order) as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]

    # Reads. The statements have the same names and columns on both databases.

    async def lease_states(self, reports: Sequence[Report]) -> dict[uuid.UUID, LeaseState]:
        """Return the states of the leases of these reports."""
        leases = json_text(
            [
                {
                    "id": report.job_id.hex,
                    "token": report.token,
                    "late": report.outcome is AttemptOutcome.TIMED_OUT,
                }
                for report in reports
            ]
        )
        return {
            row["id"]: LeaseState(bool(row["in_force"]), bool(row["succeeded"]))
            for row in await self._read("lease_states", {"leases": leases})
        }

    async def get(self, job_id: uuid.UUID, owner: Owner | None = None) -> JobRecord | None:
        """Return a job by its id, if it is the owner's."""
        return (await self.get_many([job_id], owner)).get(job_id)

    async def get_many(
        self, job_ids: Iterable[uuid.UUID], owner: Owner | None = None
    ) -> dict[uuid.UUID, JobRecord]:
        """Return the jobs of the owner with these ids."""
        wanted = select(Job).where(col(Job.id).in_(list(job_ids)), *owned_by(owner))
        rows = await self._select(wanted)
        return {job.id: job for job in map(self.record, rows)}

    async def parked(self, job_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Parked]:
        """Return why these jobs are parked. Jobs that are not are left out."""
        rows = await self._select(
            select(JobParked).where(
                col(JobParked.job_id).in_(list(job_ids)), col(JobParked.parked_at).is_not(None)
            )
        )
        return {
            row["job_id"]: Parked(
                row["refused_by"].rpartition(",")[2], present(error_of(row["error"]))
            )
            for row in rows
        }

    async def creators(self, job_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, str | None]:
        """Return who enqueued these jobs."""
        wanted = select(Job.id, Job.created_by).where(col(Job.id).in_(list(job_ids)))
        return {row["id"]: row["created_by"] for row in await self._select(wanted)}

    async def each_of(
        self, job_ids: Sequence[uuid.UUID], values: tuple[str, ...] = JSON_VALUES
    ) -> AsyncGenerator[JobRecord]:
        """Yield jobs with these of their JSON values. About a megabyte of them is read at once."""
        for start in range(0, len(job_ids), LISTED_AT_ONCE):
            query = listed(values).where(col(Job.id).in_(job_ids[start : start + LISTED_AT_ONCE]))
            large: list[Listed] = []
            for each in map(self._listed_of, await self._select(query)):
                if each.is_partial:
                    large.append(each)
                else:
                    yield each.job
            while large:
                ids = ids_of_piece(large, PIECE_BYTES)
                large = large[len(ids) :]
                whole = sqlalchemy.select(*columns(values)).where(col(Job.id).in_(ids))
                for row in await self._select(whole):
                    yield self.record(row)

    async def find_by_key(
        self, keys: Iterable[tuple[str, str]]
    ) -> dict[tuple[str, str], JobRecord]:
        """Return the jobs with these (type, idempotency key) pairs."""
        return self._by_key(await self._read("by_key", _wanted_keys(keys)))

    def find_by_key_within(
        self, connection: Connection, keys: Iterable[tuple[str, str]]
    ) -> dict[tuple[str, str], JobRecord]:
        """Return them as a transaction that is open on this connection sees them."""
        return self._by_key(self._execute_within(connection, "by_key", _wanted_keys(keys)))

    def _listed_of(self, row: Mapping[str, Any]) -> Listed:
        return Listed(self.record(row), int(row["size"]), bool(row["is_partial"]))

    def _by_key(self, rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], JobRecord]:
        return {(row["type"], row["idempotency_key"] or ""): self.record(row) for row in rows}

    async def attempts(self, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[AttemptRecord]]:
        """Return the attempts of these jobs, oldest first."""
        attempts, _ = await self.latest_attempts(job_ids, _UNBOUNDED)
        return attempts

    async def latest_attempts(
        self, job_ids: Sequence[uuid.UUID], max_bytes: int
    ) -> tuple[dict[uuid.UUID, list[AttemptRecord]], bool]:
        """Return the latest attempts of these jobs up to a size, oldest first; and if they are all.

        An attempt counts with 200 bytes and its error, each comma of which counts as 48 more:
        `weight_of` counts fewer, and its jobs are read a piece at a time.
        """
        attempts: dict[uuid.UUID, list[AttemptRecord]] = {job_id: [] for job_id in job_ids}
        rows = await self._read("attempts", {"ids": ids_text(job_ids), "max_bytes": max_bytes})
        for row in rows:
            job_id = row["job_id"]
            attempts[job_id].append(
                AttemptRecord(
                    id=row["attempt_id"],
                    job_id=job_id,
                    attempt=row["attempt"],
                    worker_id=row["worker_id"],
                    started_at=row["started_at"],
                    finished_at=row["finished_at"],
                    outcome=AttemptOutcome(row["outcome"]) if row["outcome"] else None,
                    error=error_of(row["error"]),
                    still_running=bool(row["still_running"]),
                )
            )
        return attempts, not rows or rows[0]["attempts"] == len(rows)

    async def logs(self, attempt_ids: Sequence[int], max_bytes: int) -> tuple[dict[int, str], bool]:
        """Return the log lines of attempts, as text, up to a size; and if they are all.

        Those of the latest attempts come first. Attempts without lines are missing.
        """
        rows = await self._read(
            "logs", {"ids": json_text(list(attempt_ids)), "max_bytes": max_bytes}
        )
        is_all = not rows or rows[0]["logged"] == len(rows)
        return {row["attempt_id"]: row["logs"] for row in rows}, is_all

    async def list_jobs(self, wanted: JobFilter, owner: Owner | None, part: Slice) -> Found:
        """Return a part of the jobs of the owner, without what is large.

        The first jobs come newest first, the last ones oldest first. It is a keyset page: its cost
        does not depend on its position. Ids are UUIDv7, so they are in the order of creation.
        """
        if owner is not None and owner.subject is None:
            return Found([])  # Without a subject, there is no index of the owner's jobs to read.
        if wanted.search is not None:
            return Found(await self._of_ids(await self._search(wanted, owner, part), part))
        if wanted.is_of_finished and not wanted.possible_statuses:
            return Found([])
        if is_sifted(wanted, owner):
            return await self._sift(wanted, owner, part)
        counting = widths(wanted, owner)
        rows = [] if counting is None else await self._select(counting, in_order=True)
        if any(row["is_wide"] for row in rows):
            return await self._walk(wanted, owner, part)
        return Found(await self._list_all(wanted, owner, part))

    async def _sift(self, wanted: JobFilter, owner: Owner | None, part: Slice) -> Found:
        """Search the jobs of a creator or an error code for those that other fields want."""
        if owner is not None and wanted.created_by not in (None, owner.subject):
            return Found([])
        found = await self._walk(wanted, owner, part)
        has_creator = owner is not None or wanted.created_by is not None
        if found.stopped_at is not None and has_creator and wanted.error_code is not None:
            found = await self._walk(wanted, owner, part, by_error=True)
        kind = JobFilter(wanted.types, wanted.possible_statuses or None)
        if found.stopped_at is None or kind == JobFilter():
            return found
        if await self.count_all(kind) > RARE_JOBS:
            return found
        # Such as the running jobs of a creator who has very many.
        within = narrowed(part, wanted, self._ahead())
        ids = await self._merged(kind, replace(within, size=RARE_JOBS))
        rows = await self._select(among(ids, wanted, owner, part))
        return Found([self._listed_of(row) for row in rows])

    async def _walk(
        self, wanted: JobFilter, owner: Owner | None, part: Slice, *, by_error: bool = False
    ) -> Found:
        """Search a limited number of jobs, in the order of an index."""
        ids: list[uuid.UUID] = []
        ends: list[uuid.UUID] = []
        for walk in walks(wanted, owner, part, by_error=by_error, ahead=self._ahead()):
            rows = await self._select(walked(walk, part.size), in_order=True)
            ids += [row["id"] for row in rows]
            if len(rows) < part.size:
                last = await self._select(walk_end(walk), in_order=True)
                ends += [row["id"] for row in last]
        # Beyond the first end, jobs of that index may be missing.
        stopped_at = (min if part.from_end else max)(ends, default=None)
        ids.sort(reverse=not part.from_end)
        if stopped_at is not None:
            ids = [
                each for each in ids if (each <= stopped_at) == part.from_end or each == stopped_at
            ]
        ids = ids[: part.size]
        if len(ids) == part.size:
            stopped_at = None
        return Found(await self._of_ids(ids, part), stopped_at)

    async def _list_all(self, wanted: JobFilter, owner: Owner | None, part: Slice) -> list[Listed]:
        within = narrowed(part, wanted, self._ahead())
        if (page := ordered(wanted, owner, within)) is not None:
            rows = await self._select(page, in_order=True)
        elif owner is None and wanted.is_of_kind:
            return await self._of_ids(await self._merged(wanted, within), part)
        else:
            rows = await self._select(found(wanted, owner, within))
        return [self._listed_of(row) for row in rows]

    async def _of_ids(self, ids: Sequence[uuid.UUID], part: Slice) -> list[Listed]:
        """Return the jobs of a page whose ids were read."""
        page = part.taken(listed().where(col(Job.id).in_(ids)))
        return [self._listed_of(row) for row in await self._select(page)]

    async def _search(self, wanted: JobFilter, owner: Owner | None, part: Slice) -> list[uuid.UUID]:
        """Return the ids of a page of a search."""
        within = narrowed(part, wanted, self._ahead())
        by_words = await self._select(searched(wanted, owner, within), in_order=True)
        by_name = await self._select(identified(wanted, owner, within))
        ids = {row["id"] for row in (*by_words, *by_name)}
        return sorted(ids, reverse=not part.from_end)[: part.size]

    async def _merged(self, wanted: JobFilter, part: Slice) -> list[uuid.UUID]:
        """Return the ids of a page of jobs of some types or statuses, of which no index has the
        order. They are merged from the index of each."""
        if not wanted.types:
            rows = await self._select(merged(wanted, part), in_order=True)
            return [row["id"] for row in rows]
        # As a union, 100 types and 4 statuses take half a second to build and to compile.
        pairs = [
            {"type": name, "status": status}
            for name in wanted.types
            for status in wanted.statuses or JobStatus
        ]
        values = {
            "pairs": json_text(pairs),
            "older_than": (part.after or LAST_ID).hex,
            "newer_than": (part.before or FIRST_ID).hex,
            "created_after": wanted.created_after or EARLIEST,
            "created_before": wanted.created_before or LATEST,
            "most": part.size,
        }
        name = "oldest" if part.from_end else "newest"
        return [row["id"] for row in await self._read(name, values, in_order=True)]

    async def list_many(self, job_ids: Iterable[uuid.UUID], owner: Owner | None) -> list[Listed]:
        """Return the jobs of the owner with these ids, without what is large."""
        query = listed().where(col(Job.id).in_(list(job_ids)), *owned_by(owner))
        return [self._listed_of(row) for row in await self._select(query)]

    async def count_all(self, wanted: JobFilter) -> int:
        """Return how many jobs of these types and statuses there are. Few rows are read."""
        jobs = func.coalesce(func.sum(JobCount.jobs), 0).label("jobs")
        query = select(jobs)
        if wanted.types:
            query = query.where(col(JobCount.type).in_(wanted.types))
        if statuses := wanted.possible_statuses:
            query = query.where(col(JobCount.status).in_([str(each) for each in statuses]))
        (row,) = await self._select(query)
        return int(row["jobs"])

    async def count_ranges(
        self, wanted: JobFilter, owner: Owner | None, most: int
    ) -> list[CountedRange]:
        """Return how many jobs of the owner are among the newest `most` of each range of an index
        that may have them.
        """
        if wanted.search is not None:
            jobs = len(await self._search(wanted, owner, Slice(most)))
            return [CountedRange(jobs, jobs, 0, None, None, None, None)]
        query = counted(wanted, owner, most=most, ahead=self._ahead())
        in_order = wanted.idempotency_key is None
        rows = [] if query is None else await self._select(query, in_order=in_order)
        return [CountedRange(**row) for row in rows]

    async def sample(self, wanted: JobFilter, ends: Sequence[Any]) -> SampledJobs:
        """Count jobs of a random sample of all jobs. `ends` are those of the ranges that
        `count_ranges` has counted for the filter.

        It costs the same however many jobs there are, and finds jobs wherever they are in time.
        """
        query = sampled(await self._sample(SAMPLED_BLOCKS), wanted, ends, ahead=self._ahead())
        (row,) = await self._select(query)
        return SampledJobs(int(row["of_kind"]), int(row["beyond"]))

    @abstractmethod
    async def _sample(self, blocks: int) -> Sample:
        """Choose jobs at random: those in so many places of the table."""

    async def sample_own(self, wanted: JobFilter, owner: Owner, end: Any) -> SampledOwn:
        """Count jobs of the owner beyond the end of what `count_ranges` has counted."""
        query = sampled_own(
            wanted, owner, end, most=OWN_JOBS, each=OWN_JOBS_PER_SAMPLED, ahead=self._ahead()
        )
        (row,) = await self._select(query, in_order=True)
        return SampledOwn(int(row["jobs"]), int(row["read"]), int(row["matched"]))

    def _ahead(self) -> timedelta:
        return timedelta(seconds=self._database.ahead_seconds)

    async def waiting(self, job_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Waiting]:
        """Return what queued jobs wait for. Jobs that are not queued are left out."""
        rows = await self._read("waiting", {"ids": ids_text(job_ids), "most": AHEAD_LIMIT})
        return {
            row["id"]: Waiting(
                due_in_seconds=float(row["due_in_seconds"]),
                running=row["running"],
                worker_seen_seconds_ago=row["worker_seen_seconds_ago"],
                ahead=min(row["ahead"], AHEAD_LIMIT),
            )
            for row in rows
        }

    async def expired_leases(self) -> list[ExpiredLease]:
        rows = await self._read("expired_leases", {"most": EXPIRED_LEASES}, in_order=True)
        return [
            ExpiredLease(row["id"], row["type"], row["lease_expires_at"], bool(row["is_counted"]))
            for row in rows
        ]

    async def used_places(self, types: Iterable[str]) -> dict[str, int]:
        """Return the used places of the concurrency limits of types, by their stored names."""
        rows = await self._read("used_places", {"types": json_text([*types])}, in_order=True)
        return {row["type"]: row["places"] for row in rows}

    async def unfinished(
        self, *, after: uuid.UUID, jobs: int, characters: int
    ) -> list[StoredPayload]:
        """Return the payloads of queued and running jobs with ids after `after`, in their order.

        They are at most `jobs`, and no more once their texts have `characters` characters. A job
        that is claimed or given back between two pages is on one of them.
        """
        page = {"after": after.hex, "jobs": jobs, "characters": characters}
        return [
            StoredPayload(row["id"], row["type"], row["text"])
            for row in await self._read("unfinished", page, in_order=True)
        ]

    async def now(self) -> datetime:
        """Return the time of the database."""
        (row,) = await self._read("now", {})
        now: datetime = row["now"]
        return now

    async def counts(self) -> dict[str, JobCounts]:
        """Return the number of jobs per type and status. Types without jobs are left out."""
        counts = await self.counts_by_status()
        parked = (
            select(JobParked.type, func.count().label("jobs"))
            .where(col(JobParked.parked_at).is_not(None))
            .group_by(col(JobParked.type))
        )
        for row in await self._select(parked):
            counts.setdefault(row["type"], {})["parked"] = int(row["jobs"])
        return {name: JobCounts(**of_status) for name, of_status in counts.items()}

    async def counts_by_status(self) -> dict[str, dict[str, int]]:
        """Return the same without parked jobs, also from a database of an earlier revision."""
        counts: dict[str, dict[str, int]] = {}
        jobs = func.sum(JobCount.jobs).label("jobs")
        by_type = select(JobCount.type, JobCount.status, jobs).group_by(
            col(JobCount.type), col(JobCount.status)
        )
        for row in await self._select(by_type):
            counts.setdefault(row["type"], {})[row["status"]] = int(row["jobs"])
        return counts

    async def last_parked_at(self) -> datetime | None:
        """Return when the last of the parked jobs was parked. None: there are none."""
        last = func.max(col(JobParked.parked_at)).label("parked_at")
        parked = select(last).where(col(JobParked.parked_at).is_not(None))
        (row,) = await self._select(parked)
        return cast("datetime | None", row["parked_at"])

    async def versions(self, job_type: str) -> list[TypeVersion]:
        """Return the versions of the jobs that are stored under this name, and of its workers."""
        versions = {"type": job_type, "most": COUNTED_JOBS}
        rows = await self._read("versions", versions, in_order=True)
        return [
            TypeVersion(
                row["fingerprint"],
                queued=int(row["queued"]),
                running=int(row["running"]),
                parked=int(row["parked"]),
                refused=int(row["refused"]),
                worker_seen_at=row["worker_seen_at"],
            )
            for row in rows
        ]

    async def events(self, number: int) -> str | None:
        """Return a stored batch of events, or None if it was deleted."""
        rows = await self._select(select(JobEventBatch).where(JobEventBatch.id == number))
        return str(rows[0]["message"]) if rows else None

    async def events_after(self, number: int, most: int) -> dict[int, str]:
        """Return up to `most` stored batches after `number`, by id and in order."""
        rows = await self._read("events_after", {"after": number, "most": most})
        return {row["number"]: row["message"] for row in rows}

    async def events_until(self, number: int, most: int) -> list[StoredEvents]:
        """Return the stored batches with ids up to `number`, the newest first."""
        until = select(JobEventBatch).where(col(JobEventBatch.id) <= number)
        rows = await self._select(until.order_by(col(JobEventBatch.id).desc()).limit(most))
        return [StoredEvents(row["id"], row["created_at"], row["message"]) for row in rows]

    async def events_among(self, numbers: Sequence[int]) -> dict[int, str]:
        """Return the stored batches with these ids."""
        among = select(JobEventBatch).where(col(JobEventBatch.id).in_(numbers))
        return {row["id"]: row["message"] for row in await self._select(among)}

    async def last_event(self) -> int:
        """Return the id of the newest batch that was ever stored, or 0."""
        (row,) = await self._read("last_event", {})
        return int(next(iter(row.values())))


def _wanted_keys(keys: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {"keys": json_text([{"type": job_type, "key": key} for job_type, key in keys])}


def is_own(new: NewJob, existing: JobRecord) -> bool:
    """Return whether the creator of a new job has stored the existing one."""
    return new.created_by is not None and existing.created_by == new.created_by


def refuses(new: NewJob, stored: Stored) -> bool:
    """Return whether a new job is refused because of the existing job with its key."""
    hides = new.hides_others and stored.existing is not None and not is_own(new, stored.existing)
    return hides or stored.conflicts


def stored_before(holder: JobRecord, new: NewJob) -> Stored:
    """Return the outcome for a new job whose key belongs to this one, which has been read whole."""
    is_same = not differing_paths(holder.payload, from_json(new.payload), 1)
    return Stored(holder.created_at, holder.created_at, holder, is_same, is_whole=True)


def ids_of_piece(partial: Iterable[Listed], most: int) -> list[uuid.UUID]:
    """Return the ids of the jobs to read whole at once: the first, and those that fit with it."""
    ids: list[uuid.UUID] = []
    size = 0
    for each in partial:
        size += each.size
        if ids and size > most:
            break
        ids.append(each.job.id)
    return ids


@lru_cache
def statements(database: str, schema: str | None = None) -> Mapping[str, str]:
    """Return the statements of `statements/<database>.sql` by name.

    Each starts with a line `-- name: ...` and a comment with its purpose. They use the default
    schema, which `schema` replaces.
    """
    file = resources.files("job_registry_api.queue") / "statements" / f"{database}.sql"
    text = file.read_text("utf-8")
    if schema is not None:
        text = text.replace(f"{defaults.SCHEMA}.", f"{quoted(schema)}.")
    _, *parts = re.split(r"^-- name: *(\w+)\n", text, flags=re.MULTILINE)
    return {
        name: re.sub(r"^--.*\n", "", body, flags=re.MULTILINE).strip()
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def owner_values(owner: Owner | None) -> dict[str, Any]:
    """Return the parameters of a statement that changes only jobs of the owner."""
    return {"owned": owner is not None, "owner": owner.subject if owner is not None else None}


def message_of(process: str, events: Sequence[tuple[str, str, str, int]]) -> str:
    """Return the message of events, each (name, job id in hexadecimal, type, attempt)."""
    return json_text({"process": process, "events": events})


def json_text(value: Any) -> str:
    """Return JSON text. Pydantic's serializer takes a third of the time of `json.dumps`."""
    return to_json(value).decode()


def ids_text(ids: Iterable[uuid.UUID]) -> str:
    """Return a JSON array of ids, in the form in which SQLite stores them."""
    return json_text([job_id.hex for job_id in ids])


def error_text(error: JobError | None) -> str | None:
    """Return an error as the JSON text of its column."""
    if error is None:
        return None
    return json_text({"code": error.code, "message": error.message, "details": error.details})


def present(value: T | None) -> T:
    """Return a value that is never None."""
    assert value is not None
    return value
