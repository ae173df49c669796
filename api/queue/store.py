"""What the queue does to its tables: every operation, described once.

`postgresql.py` and `sqlite.py` carry the operations out, each in one statement or one transaction.
The texts of the statements stand in `statements/`, a file per database.
"""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from importlib import resources
from typing import Any, Final, NamedTuple, TypeVar, cast

import sqlalchemy
from pydantic_core import to_json
from sqlalchemy import Executable, func, union_all
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from job_registry_api.queue import defaults
from job_registry_api.queue.database import Database, quoted
from job_registry_api.queue.models import (
    AttemptOutcome,
    AttemptRecord,
    Job,
    JobCount,
    JobCounts,
    JobError,
    JobEventBatch,
    JobRecord,
    JobStatus,
    error_of,
)

T = TypeVar("T")

TIMED_OUT: Final = JobError("timed_out", "The attempt exceeded its timeoutSeconds.")
LOST: Final = JobError(
    "lost", "The lease was not renewed: the worker stopped, or lost its connection to the queue."
)

AHEAD_LIMIT: Final = 1_000
"""How many jobs ahead are counted at most: beyond that, the exact number helps nobody."""

EVENTS_KEPT_SECONDS: Final = 60
"""How long a stored batch of events waits for other processes to read it."""

RECOVERY_BATCH: Final = 100
"""How many lost leases one claim recovers at most, so that no claim pays for a whole outage."""

_BEHIND_ALL: Final = uuid.UUID(int=2**128 - 1)
"""Greater than the id of any job."""

EVENT_BATCHES_PRUNED: Final = 10_000
"""How many stored batches one transaction deletes at most."""


class NewJob(NamedTuple):
    """A job to insert. `payload` is JSON text; `next_run_at` None means now."""

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


class Stored(NamedTuple):
    """The outcome of an insert: the times of a new job, or the job that has its key already."""

    created_at: datetime
    next_run_at: datetime
    existing: JobRecord | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker asks for: up to `jobs` jobs of `types`, which are in the order of their turns.

    `limits` holds the concurrency limits of the types that have one. A `thorough` claim says that
    nothing is due only after it looked at everything.
    """

    types: tuple[str, ...]
    limits: Mapping[str, int]
    worker_id: str
    jobs: int
    lease_seconds: float
    thorough: bool = True


@dataclass(frozen=True, slots=True)
class Leased:
    """A claimed job, its lease's token, and when both clocks end. `due_at` is when it was due."""

    job: JobRecord
    token: str
    expires_at: datetime
    deadline_at: datetime


@dataclass(frozen=True, slots=True)
class Claimed:
    """The outcome of a claim: the leased jobs, and those whose lost attempts it ended first.

    `everything` says that all due jobs were looked at, which a claim does not always do while a
    long transaction makes that expensive.
    """

    leased: list[Leased]
    recovered: list[JobRecord]
    everything: bool = True


@dataclass(frozen=True, slots=True)
class Report:
    """How a worker says an attempt ended. `token` and `job_id` are those of its lease.

    `outcome` SUCCEEDED brings `result`; FAILED brings `error`, and is tried again if `retryable`
    and attempts are left, after `delay_seconds` or, where that is None, the job's backoff.
    RELEASED and SNOOZED give the attempt back, as does `spend` False. `still_running`, with
    TIMED_OUT, keeps the attempt's place in the concurrency limit: its handler has not stopped.
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


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What has become of a lease that a report named."""

    in_force: bool
    succeeded: bool


class LeaseRenewal(NamedTuple):
    """A lease to renew. `progress` is JSON text, or None where it has not changed."""

    job_id: uuid.UUID
    token: str
    progress: bytes | None = None


@dataclass(frozen=True, slots=True)
class Renewed:
    """A lease in force: until when, how long the attempt may still run, and whether to stop.

    `renewed` is False where another transaction has the row locked: the lease is as it was, and
    its progress was not stored.
    """

    expires_at: datetime
    seconds_left: float
    cancel_requested: bool
    renewed: bool = True


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a queued job waits for. `due_in_seconds` is negative when its time has come.

    `ahead` counts the due jobs of its type that go first, up to 1,000 of them.
    """

    due_in_seconds: float
    running: int
    worker_seen_seconds_ago: float | None
    ahead: int


class Store(ABC):
    """The operations of the queue on its tables.

    Those that change jobs announce what they did to other processes in the same transaction, as
    events of `process`. Each raises `QueueUnavailable` when the database does not answer in time.
    """

    _database: Database

    @abstractmethod
    async def insert(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        """Insert jobs, except where a job of the type has the idempotency key already.

        The unique index decides. A job whose key another transaction is just inserting or
        deleting is not in the answer: nobody waits for that transaction here.
        """

    @abstractmethod
    async def insert_all(
        self, jobs: Sequence[NewJob], conflicts: Callable[[NewJob, Stored], bool]
    ) -> tuple[dict[uuid.UUID, Stored], bool]:
        """Insert every job, or none of them where one `conflicts` with the holder of its key.

        Return the outcomes, and whether they were committed. Transactions that hold one of the
        keys are waited for.
        """

    @abstractmethod
    async def insert_within(
        self, connection: AsyncConnection, jobs: Sequence[NewJob]
    ) -> dict[uuid.UUID, Stored]:
        """Insert jobs in the caller's own transaction; a held key is waited for."""

    @abstractmethod
    async def claim(self, claim: Claim) -> Claimed:
        """Lease due jobs: the highest priority first, types of one priority in turns, and within
        a type the oldest first.

        A type with a limit is locked before its running jobs are counted, and no claim takes
        jobs of a type with a limit that it has not locked and counted. Rows that another
        transaction holds are passed over. Attempts whose lease has run out are ended first.
        """

    @abstractmethod
    async def recover(self, lease_seconds: float) -> list[JobRecord]:
        """End attempts whose lease has run out: `timed_out` past the deadline, else `lost`.

        Each spends its attempt: the job is queued again after its backoff, or failed when none
        is left, or cancelled when that was requested.
        """

    @abstractmethod
    async def end(self, reports: Sequence[Report]) -> dict[uuid.UUID, JobRecord]:
        """End attempts as their workers report, at most one per job, where the lease is in force.

        A late worker writes nothing: its job is not in the answer. Neither is one whose row
        another transaction has locked. A requested cancellation wins over all but success.
        """

    @abstractmethod
    async def renew(
        self, renewals: Sequence[LeaseRenewal], lease_seconds: float
    ) -> dict[tuple[uuid.UUID, str], Renewed | None]:
        """Renew leases in force, each up to its attempt's deadline and never past it.

        None where the lease is lost; a timed-out attempt goes on holding its place. A row that
        another transaction has locked keeps the lease it has.
        """

    @abstractmethod
    async def settle(self, leases: Sequence[tuple[uuid.UUID, str]]) -> None:
        """Free the places that timed-out attempts hold: their handlers have ended."""

    @abstractmethod
    async def cancel(self, job_id: uuid.UUID) -> JobRecord | None:
        """Cancel a queued job; of a running one, note that its worker is to stop.

        None when the job is neither, or does not exist.
        """

    @abstractmethod
    async def retry(self, job_id: uuid.UUID) -> JobRecord | None:
        """Queue a failed or cancelled job at once; where no attempt is left it gets one more.

        None when the job is neither, or does not exist.
        """

    @abstractmethod
    async def next_due(self, types: Sequence[str], limits: Mapping[str, int]) -> float | None:
        """Seconds until a claim of these types may find more than now; None: no time is known."""

    @abstractmethod
    async def see_worker(self, types: Sequence[str]) -> None:
        """Note that a worker asks for these types."""

    @abstractmethod
    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        """Delete up to `jobs` jobs that ended with `status` longer ago than `keep_seconds`.

        The oldest first; their attempts go with them. Return how many were deleted.
        """

    @abstractmethod
    async def fold_counts(self) -> None:
        """Keep the table of counts small."""

    @abstractmethod
    async def prune_events(self) -> int:
        """Delete stored batches of events that every process has had time to read.

        Return how many were deleted, at most `EVENT_BATCHES_PRUNED`.
        """

    @abstractmethod
    async def _read(self, name: str, parameters: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Run a statement that only reads; its values are as the columns' types return them."""

    async def _select(self, query: Executable) -> list[dict[str, Any]]:
        """Run an ordinary query."""
        async with self._database.reading() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]

    # Reading. Statements of the file have the same names and columns on both databases.

    async def lease_states(self, reports: Sequence[Report]) -> dict[uuid.UUID, LeaseState]:
        """What has become of the leases of these reports."""
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

    async def get(self, job_id: uuid.UUID) -> JobRecord | None:
        """One job by its primary key."""
        return (await self.get_many([job_id])).get(job_id)

    async def get_many(self, job_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, JobRecord]:
        """Jobs by their primary keys."""
        rows = await self._select(select(Job).where(col(Job.id).in_(list(job_ids))))
        return {job.id: job for job in map(JobRecord.of, rows)}

    async def find_by_key(
        self, keys: Iterable[tuple[str, str]]
    ) -> dict[tuple[str, str], JobRecord]:
        """The jobs that hold these (type, idempotency key) pairs."""
        wanted = json_text([{"type": job_type, "key": key} for job_type, key in keys])
        found = [JobRecord.of(row) for row in await self._read("by_key", {"keys": wanted})]
        return {(job.type, job.idempotency_key or ""): job for job in found}

    async def attempts(self, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[AttemptRecord]]:
        """Every attempt of these jobs, the first one first."""
        attempts: dict[uuid.UUID, list[AttemptRecord]] = {job_id: [] for job_id in job_ids}
        for row in await self._read("attempts", {"ids": ids_text(job_ids)}):
            job_id = row["job_id"]
            attempts[job_id].append(
                AttemptRecord(
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
        return attempts

    async def list_jobs(
        self,
        *,
        types: Sequence[str],
        statuses: Sequence[JobStatus],
        first: int,
        after: uuid.UUID | None,
    ) -> list[JobRecord]:
        """Jobs, newest first, starting behind `after`: a keyset page, whose cost does not grow
        with how far it is. Ids are UUIDv7, so their order is that of creation."""
        if len(types) > 1:
            # As a union, 100 types and 4 statuses take half a second to build and to compile.
            pairs = [
                {"type": name, "status": status}
                for name in dict.fromkeys(types)
                for status in dict.fromkeys(statuses or JobStatus)
            ]
            behind = (after or _BEHIND_ALL).hex
            wanted = {"pairs": json_text(pairs), "after": behind, "first": first}
            return [JobRecord.of(row) for row in await self._read("newest", wanted)]
        newest = _newest(types, statuses, first=first, after=after)
        return [JobRecord.of(row) for row in await self._select(newest)]

    async def waiting(self, job_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Waiting]:
        """What queued jobs wait for; jobs that are not queued are not in the answer."""
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

    async def now(self) -> datetime:
        """The database's time."""
        (row,) = await self._read("now", {})
        now: datetime = row["now"]
        return now

    async def counts(self) -> dict[str, JobCounts]:
        """Jobs per type and status. A type that never had a job is not in the answer."""
        counts: dict[str, dict[str, int]] = {}
        jobs = func.sum(JobCount.jobs).label("jobs")
        by_type = select(JobCount.type, JobCount.status, jobs).group_by(
            col(JobCount.type), col(JobCount.status)
        )
        for row in await self._select(by_type):
            counts.setdefault(row["type"], {})[row["status"]] = int(row["jobs"])
        return {name: JobCounts(**of_status) for name, of_status in counts.items()}

    async def events(self, number: int) -> str | None:
        """One stored batch of events; None when it was deleted already."""
        rows = await self._select(select(JobEventBatch).where(JobEventBatch.id == number))
        return str(rows[0]["message"]) if rows else None

    async def events_after(self, number: int) -> dict[int, str]:
        """The stored batches behind `number`, by their numbers, in order; 1,000 at most."""
        behind = select(JobEventBatch).where(col(JobEventBatch.id) > number)
        rows = await self._select(behind.order_by(col(JobEventBatch.id)).limit(1_000))
        return {row["id"]: row["message"] for row in rows}

    async def events_among(self, numbers: Sequence[int]) -> dict[int, str]:
        """The stored batches that have these numbers."""
        among = select(JobEventBatch).where(col(JobEventBatch.id).in_(numbers))
        return {row["id"]: row["message"] for row in await self._select(among)}

    async def last_event(self) -> int:
        """The number of the newest batch that was ever stored, 0 when there was none."""
        (row,) = await self._read("last_event", {})
        return int(next(iter(row.values())))


def _newest(
    types: Sequence[str], statuses: Sequence[JobStatus], *, first: int, after: uuid.UUID | None
) -> SelectOfScalar[Job]:
    """The query of a page of one type, or of all. Each has an index in the order of ids.

    Of several statuses, the newest ids of each are read and merged: no index has them in one order.
    """

    def newest(query: Any) -> Any:
        return query.order_by(col(Job.id).desc()).limit(first)

    behind = [] if after is None else [col(Job.id) < after]
    of_types = [col(Job.type) == name for name in types]
    of_statuses = [[col(Job.status) == str(status)] for status in dict.fromkeys(statuses)] or [[]]
    conditions = [[*of_types, *one, *behind] for one in of_statuses]
    if len(conditions) == 1:
        return cast("SelectOfScalar[Job]", newest(select(Job).where(*conditions[0])))
    found = union_all(
        *(newest(select(Job.id).where(*each)).subquery().select() for each in conditions)
    ).subquery()
    ids = sqlalchemy.select(found.c.id).order_by(found.c.id.desc()).limit(first)
    return select(Job).where(col(Job.id).in_(ids)).order_by(col(Job.id).desc())


@lru_cache
def statements(database: str, schema: str | None = None) -> Mapping[str, str]:
    """The statements of `statements/<database>.sql` by their names.

    Each begins with a line `-- name: ...` and lines of comment that say what it is for. They name
    the default schema, which `schema` replaces.
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


def message_of(process: str, events: Sequence[tuple[str, str, str, int]]) -> str:
    """Events, each (name, job's id in hexadecimal, type, attempt), as other processes read them."""
    return json_text({"process": process, "events": events})


def json_text(value: Any) -> str:
    """JSON text. Pydantic's writer takes a third of the time of the standard library's."""
    return to_json(value).decode()


def ids_text(ids: Iterable[uuid.UUID]) -> str:
    """A JSON array of ids, each in the form in which SQLite stores it."""
    return json_text([job_id.hex for job_id in ids])


def error_text(error: JobError | None) -> str | None:
    """An error as a JSON column stores it."""
    if error is None:
        return None
    return json_text({"code": error.code, "message": error.message, "details": error.details})


def present(value: T | None) -> T:
    """A value that the statement never leaves out."""
    assert value is not None
    return value
