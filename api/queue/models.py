"""The tables, as SQLModel classes, and the records that the operations of the queue return.

Queries are in `store.py`, statements in `statements/`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from operator import itemgetter
from typing import Any, ClassVar, Final, Literal, NamedTuple

from pydantic import JsonValue
from pydantic_core import to_json
from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Text,
    TextClause,
    TypeDecorator,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import registry
from sqlalchemy.sql.visitors import InternalTraversal
from sqlmodel import Field, SQLModel

METADATA: Final = MetaData()
"""The tables of the queue. `SQLModel.metadata` belongs to the application."""


PARKED_UNTIL: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""The `next_run_at` of a parked job. No caller can schedule a job for this time."""


class JobStatus(StrEnum):
    """The stored states of a job. Scheduled and retrying jobs are queued; see `next_run_at`."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


STATUSES: Final = {status.value: status for status in JobStatus}
"""The statuses by their values. To call the enum takes ten times as long."""


FINAL: Final = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
"""The states of jobs that have ended."""


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    RELEASED = "released"
    SNOOZED = "snoozed"
    CANCELLED = "cancelled"


def _json() -> Any:
    return JSON().with_variant(JSONB(), "postgresql")


class UtcTime(TypeDecorator[datetime]):
    """A time in UTC. SQLite stores it as text without an offset, so that texts compare."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC, because the text in SQLite has no offset."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return an aware time on both databases."""
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def _one_of(column: str, values: type[StrEnum]) -> str:
    listed = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({listed})"


def _partial_index(
    name: str, *columns: str | ColumnElement[Any] | TextClause, where: str, unique: bool = False
) -> Index:
    condition = text(where)
    return Index(name, *columns, unique=unique, sqlite_where=condition, postgresql_where=condition)


def _serial() -> Column[int]:
    # SQLite numbers rows only in a column of exactly this type.
    numbers = BigInteger().with_variant(Integer, "sqlite")
    return Column(numbers, primary_key=True, autoincrement=True)


class _ErrorText(ColumnElement[str]):
    """A text of the column `error`, written as the index of error codes has it."""

    inherit_cache = True
    _traverse_internals = [("name", InternalTraversal.dp_string)]  # noqa: RUF012
    type = Text()

    def __init__(self, name: Literal["code", "message"]) -> None:
        self.name = name


@compiles(_ErrorText)
def _postgresql(element: _ErrorText, _compiler: Any, **_options: Any) -> str:
    return f"(error ->> '{element.name}')"


@compiles(_ErrorText, "sqlite")
def _sqlite(element: _ErrorText, _compiler: Any, **_options: Any) -> str:
    return f"json_extract(error, '$.{element.name}')"


def error_code() -> ColumnElement[str]:
    """Return the code of a job's error, in a query of jobs."""
    return _ErrorText("code")


def error_message() -> ColumnElement[str]:
    """Return the message of a job's error, in a query of jobs."""
    return _ErrorText("message")


class Table(SQLModel, registry=registry(metadata=METADATA)):
    """Base of the tables. It has its own registry, so the application may define `Job` too."""

    metadata: ClassVar[MetaData] = METADATA


class Job(Table, table=True):
    """One row per job. A status and the columns that belong to it change in one statement."""

    __tablename__: ClassVar[Any] = "job"
    __table_args__ = (
        CheckConstraint(_one_of("status", JobStatus), name="job_status"),
        CheckConstraint("priority BETWEEN 0 AND 100", name="job_priority"),
        CheckConstraint("attempt BETWEEN 0 AND max_attempts", name="job_attempt_bound"),
        CheckConstraint(
            "(status = 'queued') = (next_run_at IS NOT NULL)", name="job_queued_has_next_run"
        ),
        CheckConstraint(
            "status <> 'running' OR (lease_token IS NOT NULL AND lease_expires_at IS NOT NULL"
            " AND deadline_at IS NOT NULL)",
            name="job_running_has_lease",
        ),
        CheckConstraint(
            "(status IN ('queued', 'running')) = (finished_at IS NULL)",
            name="job_finished_has_time",
        ),
        # A claim reads this index in order; see `due` in `statements/sqlite.sql`.
        _partial_index(
            "job_claim",
            "type",
            text("priority DESC"),
            "next_run_at",
            "id",
            where="status = 'queued'",
        ),
        # The running jobs of a type with a limit are counted by the ends of their leases.
        _partial_index("job_lease_by_type", "type", "lease_expires_at", where="status = 'running'"),
        _partial_index("job_lease_expiry", "lease_expires_at", where="status = 'running'"),
        _partial_index(
            "job_idempotency_key",
            "type",
            "idempotency_key",
            unique=True,
            where="idempotency_key IS NOT NULL",
        ),
        Index("job_by_status", "status", "id"),
        Index("job_by_type_and_status", "type", "status", "id"),
        # Jobs of one creator: of a filter, and of the callers who see only their own.
        _partial_index("job_by_creator", "created_by", "id", where="created_by IS NOT NULL"),
        # Only what failed at least once has an entry.
        _partial_index("job_by_error_code", _ErrorText("code"), "id", where="error IS NOT NULL"),
        # Pruning reads the oldest finished jobs of a status.
        _partial_index("job_finished", "status", "finished_at", where="finished_at IS NOT NULL"),
    )

    id: uuid.UUID = Field(sa_column=Column(Uuid, primary_key=True))
    type: str = Field(sa_column=Column(Text, nullable=False))
    fingerprint: str = Field(sa_column=Column(Text, nullable=False))
    status: str = Field(sa_column=Column(Text, nullable=False))
    payload: Any = Field(sa_column=Column(_json(), nullable=False))
    priority: int = Field(sa_column=Column(SmallInteger, nullable=False))
    attempt: int = Field(sa_column=Column(Integer, nullable=False))
    max_attempts: int = Field(sa_column=Column(Integer, nullable=False))
    timeout_seconds: int = Field(sa_column=Column(Integer, nullable=False))
    # The backoff is copied onto the job, so that a process without the job type can end an attempt.
    backoff_base_seconds: float = Field(sa_column=Column(Double, nullable=False))
    backoff_cap_seconds: float = Field(sa_column=Column(Double, nullable=False))
    idempotency_key: str | None = Field(sa_column=Column(Text))
    created_by: str | None = Field(sa_column=Column(Text))
    created_at: datetime = Field(sa_column=Column(UtcTime, nullable=False))
    next_run_at: datetime | None = Field(sa_column=Column(UtcTime))
    started_at: datetime | None = Field(sa_column=Column(UtcTime))
    finished_at: datetime | None = Field(sa_column=Column(UtcTime))
    lease_token: str | None = Field(sa_column=Column(Text))
    # How long a lease lasts without a heartbeat, and until when its worker counts as alive.
    # Unlike `lease_expires_at`, it is not bounded by the attempt's deadline.
    lease_seconds: float | None = Field(sa_column=Column(Double))
    held_until: datetime | None = Field(sa_column=Column(UtcTime))
    lease_expires_at: datetime | None = Field(sa_column=Column(UtcTime))
    deadline_at: datetime | None = Field(sa_column=Column(UtcTime))
    cancel_requested_at: datetime | None = Field(sa_column=Column(UtcTime))
    worker_id: str | None = Field(sa_column=Column(Text))
    progress: Any = Field(sa_column=Column(_json()))
    result: Any = Field(sa_column=Column(_json()))
    error: Any = Field(sa_column=Column(_json()))
    # How many attempts ended unspent, and how many in a row were given back within seconds.
    returns: int = Field(sa_column=Column(Integer, nullable=False, server_default="0"))
    quick_returns: int = Field(sa_column=Column(Integer, nullable=False, server_default="0"))
    # The span that enqueued the job, as W3C Trace Context writes it: 55 characters.
    traceparent: str | None = Field(sa_column=Column(Text))


class JobAttempt(Table, table=True):
    """One row per lease of a job. The lease in force is the one without `finished_at`."""

    __tablename__: ClassVar[Any] = "job_attempt"
    __table_args__ = (
        CheckConstraint(
            f"outcome IS NULL OR {_one_of('outcome', AttemptOutcome)}", name="job_attempt_outcome"
        ),
        CheckConstraint(
            "(outcome IS NULL) = (finished_at IS NULL)", name="job_attempt_finished_has_outcome"
        ),
        Index("job_attempt_of_job", "job_id", "id"),
        # Attempts that have timed out and may still run. There are few.
        _partial_index(
            "job_attempt_held",
            "held_until",
            where="held_until IS NOT NULL AND finished_at IS NOT NULL",
        ),
        # At most one lease of a job is in force.
        _partial_index("job_attempt_open", "job_id", unique=True, where="finished_at IS NULL"),
    )

    id: int | None = Field(sa_column=_serial())
    job_id: uuid.UUID = Field(
        sa_column=Column(Uuid, ForeignKey("job.id", ondelete="CASCADE"), nullable=False)
    )
    attempt: int = Field(sa_column=Column(Integer, nullable=False))
    worker_id: str = Field(sa_column=Column(Text, nullable=False))
    started_at: datetime = Field(sa_column=Column(UtcTime, nullable=False))
    finished_at: datetime | None = Field(sa_column=Column(UtcTime))
    outcome: str | None = Field(sa_column=Column(Text))
    error: Any = Field(sa_column=Column(_json()))
    # Until when a timed-out attempt keeps its place in the type's concurrency limit, and the token
    # of its lease.
    held_until: datetime | None = Field(sa_column=Column(UtcTime))
    lease_token: str | None = Field(sa_column=Column(Text))
    # Its last log lines, as `job_logs` writes them.
    logs: str | None = Field(sa_column=Column(Text))


class JobParked(Table, table=True):
    """One row per job that a worker could not read: who has refused it, and whether it is parked.

    A parked job is queued with the `next_run_at` `PARKED_UNTIL`, so that claims do not read it
    among the due jobs. A trigger clears `parked_at` when that changes.
    """

    __tablename__: ClassVar[Any] = "job_parked"
    __table_args__ = (
        _partial_index(
            "job_parked_claim",
            "type",
            "refused_by",
            text("priority DESC"),
            "due_at",
            "job_id",
            where="parked_at IS NOT NULL",
        ),
        _partial_index("job_parked_since", "parked_at", where="parked_at IS NOT NULL"),
    )

    job_id: uuid.UUID = Field(
        sa_column=Column(Uuid, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    )
    # Type, priority and fingerprint are those of the job, so that one index has them.
    type: str = Field(sa_column=Column(Text, nullable=False))
    priority: int = Field(sa_column=Column(SmallInteger, nullable=False))
    fingerprint: str = Field(sa_column=Column(Text, nullable=False))
    due_at: datetime = Field(sa_column=Column(UtcTime, nullable=False))
    parked_at: datetime | None = Field(sa_column=Column(UtcTime))
    # The fingerprints of the workers that refused the job, the latest last, joined by commas.
    refused_by: str = Field(sa_column=Column(Text, nullable=False))
    error: Any = Field(sa_column=Column(_json()))


class JobTypeVersion(Table, table=True):
    """One row per job type and fingerprint that a worker has: when it was last seen."""

    __tablename__: ClassVar[Any] = "job_type_version"

    type: str = Field(sa_column=Column(Text, primary_key=True))
    fingerprint: str = Field(sa_column=Column(Text, primary_key=True))
    worker_seen_at: datetime = Field(sa_column=Column(UtcTime, nullable=False))


class JobTypeState(Table, table=True):
    """One row per job type: when a worker last claimed it."""

    __tablename__: ClassVar[Any] = "job_type_state"

    type: str = Field(sa_column=Column(Text, primary_key=True))
    worker_seen_at: datetime | None = Field(sa_column=Column(UtcTime))


class JobCount(Table, table=True):
    """Jobs per type and status, written by triggers on `job`. A count is the sum of its rows.

    On PostgreSQL each statement appends a row, because updating one counter would make commits
    wait for each other; `upkeep.py` merges the rows. Counting millions of jobs reads few rows.
    """

    __tablename__: ClassVar[Any] = "job_count"

    id: int | None = Field(sa_column=_serial())
    type: str = Field(sa_column=Column(Text, nullable=False))
    status: str = Field(sa_column=Column(Text, nullable=False))
    jobs: int = Field(sa_column=Column(BigInteger, nullable=False))


class JobEventBatch(Table, table=True):
    """The events of one transaction, for other processes. Rows are deleted after about a minute.

    On SQLite every transaction stores one, on PostgreSQL those that exceed a notification.
    """

    __tablename__: ClassVar[Any] = "job_event_batch"
    __table_args__ = (
        # Otherwise SQLite reuses the highest id after its row is deleted.
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(sa_column=_serial())
    message: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=Column(UtcTime, nullable=False))


@dataclass(frozen=True, slots=True)
class JobError:
    """Why an attempt or a job failed: a stable code, a sentence, and details if there are any."""

    code: str
    message: str
    details: JsonValue = None


class Owner(NamedTuple):
    """Restricts an operation to the jobs that this subject enqueued. None has enqueued no jobs."""

    subject: str | None


class JobRecord(NamedTuple):
    """A job as it was read: the columns of `Job` that callers may see, by the same names.

    Times are in UTC; `id` is a UUIDv7. A queued job without `next_run_at` is parked.

    It is a tuple because every enqueue creates one, and a frozen dataclass takes four times as
    long.
    """

    id: uuid.UUID
    type: str
    fingerprint: str
    status: JobStatus
    payload: JsonValue
    priority: int
    attempt: int
    max_attempts: int
    timeout_seconds: int
    created_at: datetime
    idempotency_key: str | None = None
    created_by: str | None = None
    next_run_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    worker_id: str | None = None
    progress: JsonValue = None
    result: JsonValue = None
    error: JobError | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> JobRecord:
        """Return the job of a row of `job` with converted values.

        The `next_run_at` of a row that a claim returns is when the job was due.
        """
        values = list(_values_of(row))
        status = values[_STATUS] = STATUSES[row["status"]]
        if status is not JobStatus.QUEUED or row["next_run_at"] == PARKED_UNTIL:
            values[_NEXT_RUN_AT] = None
        values[_ERROR] = error_of(row["error"])
        return cls._make(values)

    @property
    def is_parked(self) -> bool:
        """Whether the job waits for a worker that can read its payload."""
        return self.status is JobStatus.QUEUED and self.next_run_at is None


_values_of: Final[Callable[[Mapping[str, Any]], tuple[Any, ...]]] = itemgetter(*JobRecord._fields)
_STATUS, _NEXT_RUN_AT, _ERROR = map(JobRecord._fields.index, ("status", "next_run_at", "error"))


def weight_of(job: JobRecord) -> int:
    """Return about how many bytes of memory the JSON values of a job take, at least their text.

    Each comma in them counts as 32: the objects of `[{},{}]` take more than their text.
    """
    texts = [to_json(value) for value in (job.payload, job.progress, job.result, job.error)]
    return sum(len(text) + 32 * text.count(b",") for text in texts)


def error_of(value: Any) -> JobError | None:
    """Return the error in a JSON column."""
    return None if value is None else JobError(**value)


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """A lease of a job, as it was read. `outcome` is None while it is in force.

    `still_running` means that the attempt has timed out and its handler has not stopped. Until it
    stops, the attempt keeps its place in the concurrency limit of its type. `id` is that of the
    lease; `attempt` is the number that it has for users.
    """

    id: int
    job_id: uuid.UUID
    attempt: int
    worker_id: str
    started_at: datetime
    finished_at: datetime | None
    outcome: AttemptOutcome | None
    error: JobError | None
    still_running: bool


@dataclass(frozen=True, slots=True)
class JobCounts:
    """The number of jobs of a type, per status. Parked jobs are queued ones."""

    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    parked: int = 0


@dataclass(frozen=True, slots=True)
class Parked:
    """Why a job is parked: the fingerprint that last refused it, and the error of that attempt."""

    fingerprint: str
    error: JobError


@dataclass(frozen=True, slots=True)
class TypeVersion:
    """A version of a job type that jobs were admitted under, or that a worker has.

    The numbers of jobs are those admitted under it, and `parked` those of them that are parked.
    `refused` is the number of jobs that its workers have parked. `worker_seen_at` is None if no
    worker of it was ever seen.
    """

    fingerprint: str
    queued: int = 0
    running: int = 0
    parked: int = 0
    refused: int = 0
    worker_seen_at: datetime | None = None
