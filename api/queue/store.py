"""The SQL: every statement of the queue, each in a function named for what it does.

A function works on the transaction it is given and leaves commit to its caller. What SQLite and
PostgreSQL say differently comes from `database.Dialect`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeVar

from pydantic_core import to_json
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from api.queue.database import Database, Dialect, statement
from api.queue.models import (
    AttemptOutcome,
    AttemptRecord,
    JobCounts,
    JobError,
    JobRecord,
    JobStatus,
)

T = TypeVar("T")

TIMED_OUT: Final = JobError("timed_out", "The attempt ran into its timeoutSeconds.")
LOST: Final = JobError(
    "lost", "The worker stopped renewing its lease: it died, or lost touch with the queue."
)

AHEAD_LIMIT: Final = 1_000
"""How many jobs ahead are counted: beyond that, nobody reads the number."""

EVENTS_KEPT_SECONDS: Final = 60
"""How long a kept event batch waits for other processes to read it."""

RECOVERY_BATCH: Final = 100
"""How many lost leases one claim recovers at most, so that no claim pays for a whole outage."""


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
    """What an insert came to: the times of a new job, or the job that has its key already."""

    created_at: datetime
    next_run_at: datetime
    existing: JobRecord | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker asks for. `limits` holds the concurrency limits of the types that have one."""

    types: tuple[str, ...]
    limits: Mapping[str, int]
    worker_id: str
    jobs: int
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Leased:
    """A claimed job, its lease's token, and how long both clocks still run."""

    job: JobRecord
    token: str
    expires_at: datetime
    deadline_at: datetime


@dataclass(frozen=True, slots=True)
class Report:
    """How a worker says an attempt ended. `token` and `job_id` are those of its lease.

    `outcome` SUCCEEDED brings `result`; FAILED brings `error`, and is tried again if `retryable`
    and attempts are left, after `delay_seconds` or, where that is None, the job's backoff.
    RELEASED and SNOOZED give the attempt back, as does `spend` False.
    """

    job_id: uuid.UUID
    token: str
    outcome: AttemptOutcome
    result: bytes | None = None
    error: JobError | None = None
    retryable: bool = True
    delay_seconds: float | None = None
    spend: bool = True


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a queued job waits for. `due_in_seconds` is negative when its time has come.

    `ahead` counts the due jobs of its type that go first, up to 1,000 of them.
    """

    due_in_seconds: float
    running: int
    worker_seen_seconds_ago: float | None
    ahead: int


class JobStore:
    """The statements, in the words of one database."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        d = dialect
        lease_ends = f"{d.least}(timeout_seconds, CAST(:lease_seconds AS double precision))"
        too_old = d.after("-CAST(:keep_seconds AS double precision)")
        self._insert = f"""
            INSERT INTO job (
                id, type, fingerprint, status, payload, priority, attempt, max_attempts,
                timeout_seconds, backoff_base_seconds, backoff_cap_seconds, idempotency_key,
                created_by, created_at, next_run_at
            )
            SELECT
                new.id, new.type, new.fingerprint, 'queued', {d.json("new.payload")},
                new.priority, 0, new.max_attempts, new.timeout_seconds,
                new.backoff_base_seconds, new.backoff_cap_seconds, new.idempotency_key,
                new.created_by, {d.now}, coalesce(new.next_run_at, {d.now})
            FROM {d.rows(":jobs", _NEW_JOB)} AS new
            WHERE true
            ORDER BY new.type, new.idempotency_key, new.id
            ON CONFLICT (type, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
            RETURNING id, created_at, next_run_at"""
        self._by_key = f"""
            SELECT {_job("job")} FROM job
            JOIN {d.rows(":keys", {"type": "text", "key": "text"})} AS wanted
              ON job.type = wanted.type AND job.idempotency_key = wanted.key"""
        self._recover = _end_attempts(
            d,
            f"""(
                SELECT id, lease_token AS token,
                    CASE WHEN deadline_at <= {d.now} THEN 'timed_out' ELSE 'lost' END AS outcome,
                    1 AS retryable, 1 AS spend, NULL AS delay_seconds, NULL AS result,
                    CASE WHEN deadline_at <= {d.now} THEN CAST(:timed_out AS text)
                        ELSE CAST(:lost AS text) END AS error
                FROM job WHERE status = 'running' AND lease_expires_at <= {d.now}
                ORDER BY lease_expires_at LIMIT {RECOVERY_BATCH} {d.skip_locked}
            )""",
            still=f"job.lease_expires_at <= {d.now}",
        )
        self._end = _end_attempts(
            d, d.rows(":reports", _REPORT), still=f"job.lease_expires_at > {d.now}"
        )
        self._close = f"""
            UPDATE job_attempt
            SET finished_at = {d.now}, outcome = ended.outcome, error = {d.json("ended.error")}
            FROM {d.rows(":ended", {"id": "uuid", "outcome": "text", "error": "text"})} AS ended
            WHERE job_attempt.job_id = ended.id AND job_attempt.finished_at IS NULL"""
        self._lock_types = f"""
            SELECT type FROM job_type_state
            WHERE type IN (SELECT type FROM {d.rows(":types", {"type": "text"})} AS wanted)
            ORDER BY type {d.lock_rows}"""
        self._running = f"""
            SELECT wanted.type,
                (SELECT count(*) FROM job
                 WHERE job.status = 'running' AND job.type = wanted.type) AS running
            FROM {d.rows(":types", {"type": "text"})} AS wanted"""
        self._due_types = f"""
            SELECT wanted.type FROM {d.rows(":types", {"type": "text"})} AS wanted
            WHERE EXISTS (
                SELECT 1 FROM job WHERE job.status = 'queued' AND job.type = wanted.type
            )"""
        self._claim = f"""
            WITH RECURSIVE wanted AS (
                SELECT * FROM {d.rows(":wanted", {"type": "text", "room": "integer"})} AS asked
            ), slot (type, room, priority) AS (
                SELECT wanted.type, wanted.room,
                    (SELECT max(job.priority) FROM job
                     WHERE job.status = 'queued' AND job.type = wanted.type)
                FROM wanted
                UNION ALL
                SELECT slot.type, slot.room,
                    (SELECT max(job.priority) FROM job
                     WHERE job.status = 'queued' AND job.type = slot.type
                       AND job.priority < slot.priority)
                FROM slot WHERE slot.priority IS NOT NULL
            ), due_of_type AS (
                SELECT due.id, due.priority, due.next_run_at, slot.room,
                    row_number() OVER (
                        PARTITION BY slot.type ORDER BY due.priority DESC, due.next_run_at, due.id
                    ) AS place
                FROM {d.due_of_slot}
            ), candidate AS (
                SELECT id FROM due_of_type WHERE place <= room
                ORDER BY priority DESC, next_run_at, id LIMIT :window
            ), claimed AS (
                SELECT id FROM job
                WHERE id IN (SELECT id FROM candidate)
                  AND status = 'queued' AND next_run_at <= {d.now}
                ORDER BY priority DESC, next_run_at, id LIMIT :jobs {d.skip_locked}
            )
            UPDATE job SET
                status = 'running', attempt = attempt + 1, next_run_at = NULL,
                started_at = {d.now}, worker_id = :worker_id, progress = NULL,
                lease_token = {d.token},
                deadline_at = {d.after("timeout_seconds")},
                lease_expires_at = {d.after(lease_ends)}
            WHERE id IN (SELECT id FROM claimed)
            RETURNING {_JOB}, lease_token, lease_expires_at, deadline_at"""
        self._open = f"""
            INSERT INTO job_attempt (job_id, attempt, worker_id, started_at)
            SELECT job.id, job.attempt, job.worker_id, job.started_at
            FROM {d.rows(":ids", {"id": "uuid"})} AS opened JOIN job ON job.id = opened.id"""
        self._heartbeat = f"""
            UPDATE job SET
                lease_expires_at = CASE
                    WHEN {d.after("CAST(:lease_seconds AS double precision)")} < deadline_at
                    THEN {d.after("CAST(:lease_seconds AS double precision)")}
                    ELSE deadline_at END,
                progress = coalesce({d.json("CAST(:progress AS text)")}, progress)
            WHERE id = {d.as_id(":id")} AND lease_token = :token AND status = 'running'
              AND lease_expires_at > {d.now}
            RETURNING {_JOB}, lease_expires_at,
                {d.seconds_until("deadline_at")} AS seconds_left"""
        self._by_token = f"""
            SELECT {_JOB} FROM job
            WHERE id = {d.as_id(":id")} AND lease_token = :token AND status = 'succeeded'"""
        self._cancel = f"""
            UPDATE job SET
                status = CASE status WHEN 'queued' THEN 'cancelled' ELSE status END,
                finished_at = CASE status WHEN 'queued' THEN {d.now} END,
                next_run_at = NULL,
                cancel_requested_at = coalesce(cancel_requested_at, {d.now})
            WHERE id = {d.as_id(":id")} AND status IN ('queued', 'running')
            RETURNING {_JOB}"""
        self._retry = f"""
            UPDATE job SET
                status = 'queued', next_run_at = {d.now}, finished_at = NULL,
                cancel_requested_at = NULL, lease_token = NULL,
                max_attempts = CASE WHEN attempt < max_attempts THEN max_attempts
                                    ELSE attempt + 1 END
            WHERE id = {d.as_id(":id")} AND status IN ('failed', 'cancelled')
            RETURNING {_JOB}"""
        self._get = f"SELECT {_JOB} FROM job WHERE id = {d.as_id(':id')}"
        self._attempts = f"""
            SELECT job_id, attempt, worker_id, started_at, finished_at, outcome, error
            FROM job_attempt
            WHERE job_id IN (SELECT wanted.id FROM {d.rows(":ids", {"id": "uuid"})} AS wanted)
            ORDER BY id"""
        self._next_due = f"""
            WITH RECURSIVE wanted AS (
                SELECT type FROM {d.rows(":types", {"type": "text"})} AS asked
            ), slot (type, priority) AS (
                SELECT wanted.type,
                    (SELECT max(job.priority) FROM job
                     WHERE job.status = 'queued' AND job.type = wanted.type)
                FROM wanted
                UNION ALL
                SELECT slot.type,
                    (SELECT max(job.priority) FROM job
                     WHERE job.status = 'queued' AND job.type = slot.type
                       AND job.priority < slot.priority)
                FROM slot WHERE slot.priority IS NOT NULL
            ), moment AS (
                SELECT (SELECT min(job.next_run_at) FROM job
                        WHERE job.status = 'queued' AND job.type = slot.type
                          AND job.priority = slot.priority) AS at
                FROM slot
                UNION ALL
                SELECT (SELECT min(job.lease_expires_at) FROM job WHERE job.status = 'running')
            )
            SELECT {d.seconds_until("min(at)")} FROM moment"""
        self._see_worker = f"""
            INSERT INTO job_type_state (type, worker_seen_at)
            SELECT seen.type, {d.now} FROM {d.rows(":types", {"type": "text"})} AS seen
            WHERE true ORDER BY seen.type
            ON CONFLICT (type) DO UPDATE SET worker_seen_at = excluded.worker_seen_at"""
        self._waiting = f"""
            SELECT
                {d.seconds_until("job.next_run_at")} AS due_in_seconds,
                (SELECT count(*) FROM job AS other
                 WHERE other.status = 'running' AND other.type = job.type) AS running,
                (SELECT {d.seconds_until("worker_seen_at")} FROM job_type_state
                 WHERE job_type_state.type = job.type) AS seen_in_seconds,
                (SELECT count(*) FROM (
                    SELECT 1 FROM job AS other
                    WHERE other.status = 'queued' AND other.type = job.type
                      AND other.priority > job.priority AND other.next_run_at <= {d.now}
                    LIMIT {AHEAD_LIMIT}
                ) AS higher) + (SELECT count(*) FROM (
                    SELECT 1 FROM job AS other
                    WHERE other.status = 'queued' AND other.type = job.type
                      AND other.priority = job.priority
                      AND (other.next_run_at, other.id) < (job.next_run_at, job.id)
                    LIMIT {AHEAD_LIMIT}
                ) AS earlier) AS ahead
            FROM job WHERE id = {d.as_id(":id")} AND status = 'queued'"""
        self._prune = f"""
            DELETE FROM job WHERE id IN (
                SELECT id FROM job
                WHERE status = :status AND finished_at < {too_old}
                ORDER BY finished_at LIMIT :jobs {d.skip_locked}
            )
            RETURNING id"""
        self._take_counts = f"""
            DELETE FROM job_count WHERE id IN (
                SELECT id FROM job_count ORDER BY id LIMIT :rows {d.skip_locked}
            )
            RETURNING type, status, jobs"""
        self._put_counts = f"""
            INSERT INTO job_count (type, status, jobs)
            SELECT folded.type, folded.status, folded.jobs
            FROM {d.rows(":folded", {"type": "text", "status": "text", "jobs": "bigint"})}
                AS folded"""
        self._keep_events = f"""
            INSERT INTO job_event_batch (message, created_at) VALUES (:message, {d.now})
            RETURNING id"""
        self._events_after = """
            SELECT id, message FROM job_event_batch WHERE id > :after ORDER BY id LIMIT 1000"""
        # A notification goes with the INSERT itself; kept events are a statement beside it.
        self._insert_and_tell = (
            (f"{self._insert}, {d.notify(':message')} AS told",)
            if d.max_message_bytes
            else (self._insert, self._keep_events)
        )
        self._events_among = f"""
            SELECT id, message FROM job_event_batch
            WHERE id IN (SELECT wanted.id FROM {d.rows(":wanted", {"id": "bigint"})} AS wanted)"""
        # SQLite's counter knows of batches that are deleted, also when none are left.
        self._last_event = (
            "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'job_event_batch'"
            if d.name == "sqlite"
            else "SELECT coalesce(max(id), 0) FROM job_event_batch"
        )
        self._events = "SELECT message FROM job_event_batch WHERE id = :id"
        self._prune_events = f"""
            DELETE FROM job_event_batch WHERE id IN (
                SELECT id FROM job_event_batch ORDER BY id LIMIT 1000
            ) AND created_at < {d.after(f"-{EVENTS_KEPT_SECONDS}")}"""
        self._counts = """
            SELECT type, status, CAST(sum(jobs) AS bigint) AS jobs
            FROM job_count GROUP BY type, status"""

    async def insert(
        self, connection: AsyncConnection, jobs: Sequence[NewJob]
    ) -> dict[uuid.UUID, Stored]:
        """Inserts jobs, except where a job of the type has the idempotency key already.

        The unique index decides, in the INSERT itself; a concurrent insert of the same key is
        waited for. Keys are taken in one order, so that two inserts cannot wait for each other.
        A new job whose key is held by a job that was deleted in between is not in the answer.
        """
        rows = await self._run(connection, self._insert, {"jobs": self._new_jobs(jobs)})
        stored = self._stored(rows)
        if len(stored) < len(jobs):
            wanted = {(job.type, job.idempotency_key): None for job in jobs if job.id not in stored}
            holders = await self.find_by_key(connection, [(t, k) for t, k in wanted if k])
            for job in jobs:
                holder = holders.get((job.type, job.idempotency_key or ""))
                if job.id not in stored and holder is not None:
                    stored[job.id] = Stored(holder.created_at, holder.created_at, holder)
        return stored

    async def insert_at_once(
        self, database: Database, jobs: Sequence[NewJob], message: str
    ) -> dict[uuid.UUID, Stored]:
        """Inserts jobs without idempotency keys and tells `message`, in a transaction of its own.

        Without keys no job can be there already, so what is to be told is known beforehand, and
        one trip to the database does for all: half of what an enqueue costs is trips.
        """
        parameters = {"jobs": self._new_jobs(jobs), "message": message}
        return self._stored(await database.commit_at_once(self._insert_and_tell, parameters))

    async def find_by_key(
        self, connection: AsyncConnection, keys: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], JobRecord]:
        """The jobs that hold these (type, idempotency key) pairs."""
        rows = await self._run(
            connection, self._by_key, {"keys": _text([{"type": t, "key": k} for t, k in keys])}
        )
        found = [self._record(row) for row in rows]
        return {(job.type, job.idempotency_key or ""): job for job in found}

    async def lease(
        self, connection: AsyncConnection, claim: Claim
    ) -> tuple[list[Leased], frozenset[str]]:
        """Claims due jobs: highest priority first, then `next_run_at`, then id.

        Gives the leased jobs and the types that are full. Per type and priority it reads the
        first entries of the index `job_claim`, so its cost does not grow with the queue.

        A type with a limit is locked first, by its row of `job_type_state`, and its running jobs
        are counted in the next statement, which sees what the lock was waited for. Types without
        a limit lock nothing but the jobs they take, and pass over those that others are taking.
        """
        rooms = dict.fromkeys(claim.types, claim.jobs)
        limited = [name for name in claim.types if name in claim.limits]
        if limited:
            rows = await self._run(connection, self._due_types, {"types": _types(limited)})
            limited = [row.type for row in rows]
        if limited:
            await self._run(connection, self._lock_types, {"types": _types(limited)})
            for row in await self._run(connection, self._running, {"types": _types(limited)}):
                rooms[row.type] = max(0, claim.limits[row.type] - row.running)
        wanted = [{"type": name, "room": room} for name, room in rooms.items() if room > 0]
        full = frozenset(name for name, room in rooms.items() if room == 0)
        if not wanted:
            return [], full
        rows = await self._run(
            connection,
            self._claim,
            {
                "wanted": _text(wanted),
                "jobs": claim.jobs,
                # Others may be taking the first ones: look past them.
                "window": 2 * claim.jobs + 32,
                "worker_id": claim.worker_id,
                "lease_seconds": claim.lease_seconds,
            },
        )
        if not rows:
            return [], full
        leased = [self._leased(row) for row in rows]
        leased.sort(key=lambda lease: (-lease.job.priority, lease.job.id))
        await self._run(connection, self._open, {"ids": _ids(lease.job.id for lease in leased)})
        return leased, full

    async def recover(self, connection: AsyncConnection) -> list[JobRecord]:
        """Ends the attempts whose lease has run out: `timed_out` past the deadline, else `lost`.

        Each spends its attempt: the job is queued again after its backoff, or failed when none
        is left, or cancelled when that was asked. Attempts that another transaction is ending
        are passed over. Reads the index `job_lease_expiry` from its start.
        """
        errors = {"timed_out": _error_text(TIMED_OUT), "lost": _error_text(LOST)}
        rows = await self._run(connection, self._recover, errors)
        jobs = [self._record(row) for row in rows]
        await self._close_attempts(
            connection,
            [
                (
                    job,
                    AttemptOutcome.CANCELLED
                    if job.status is JobStatus.CANCELLED
                    else AttemptOutcome(_sure(job.error).code),
                    job.error,
                )
                for job in jobs
            ],
        )
        return jobs

    async def end(
        self, connection: AsyncConnection, reports: Sequence[Report]
    ) -> dict[uuid.UUID, JobRecord]:
        """Ends attempts as their workers report, where the lease is still in force.

        The UPDATE itself compares token, status and expiry, so a late worker writes nothing; its
        job is not in the answer. A cancellation that was asked for wins over anything but success.
        """
        rows = await self._run(
            connection, self._end, {"reports": _text([_report_row(r) for r in reports])}
        )
        jobs = {job.id: job for job in map(self._record, rows)}
        await self._close_attempts(
            connection,
            [
                (
                    jobs[report.job_id],
                    AttemptOutcome.CANCELLED
                    if jobs[report.job_id].status is JobStatus.CANCELLED
                    else report.outcome,
                    report.error,
                )
                for report in reports
                if report.job_id in jobs
            ],
        )
        return jobs

    async def find_succeeded(
        self, connection: AsyncConnection, job_id: uuid.UUID, token: str
    ) -> JobRecord | None:
        """The job that this lease completed: what makes `completeJob` safe to send again."""
        rows = await self._run(connection, self._by_token, {"id": job_id.hex, "token": token})
        return self._record(rows[0]) if rows else None

    async def heartbeat(
        self,
        connection: AsyncConnection,
        job_id: uuid.UUID,
        token: str,
        *,
        lease_seconds: float,
        progress: bytes | None,
    ) -> tuple[JobRecord, datetime, float] | None:
        """Renews a lease in force, up to its attempt's deadline and never past it.

        Gives the job, when the lease expires now, and the seconds left to the deadline.
        """
        rows = await self._run(
            connection,
            self._heartbeat,
            {
                "id": job_id.hex,
                "token": token,
                "lease_seconds": lease_seconds,
                "progress": progress.decode() if progress is not None else None,
            },
        )
        if not rows:
            return None
        row = rows[0]
        return (
            self._record(row),
            _sure(self._dialect.time(row.lease_expires_at)),
            float(row.seconds_left),
        )

    async def cancel(self, connection: AsyncConnection, job_id: uuid.UUID) -> JobRecord | None:
        """Cancels a queued job; of a running one, notes that its worker is to stop.

        None when the job is neither, or is not there.
        """
        rows = await self._run(connection, self._cancel, {"id": job_id.hex})
        return self._record(rows[0]) if rows else None

    async def retry(self, connection: AsyncConnection, job_id: uuid.UUID) -> JobRecord | None:
        """Queues a failed or cancelled job at once; where no attempt is left it gets one more.

        None when the job is neither, or is not there.
        """
        rows = await self._run(connection, self._retry, {"id": job_id.hex})
        return self._record(rows[0]) if rows else None

    async def get(self, connection: AsyncConnection, job_id: uuid.UUID) -> JobRecord | None:
        """One job by its primary key."""
        rows = await self._run(connection, self._get, {"id": job_id.hex})
        return self._record(rows[0]) if rows else None

    async def attempts(
        self, connection: AsyncConnection, job_ids: Sequence[uuid.UUID]
    ) -> dict[uuid.UUID, list[AttemptRecord]]:
        """Every attempt of these jobs, the first one first."""
        rows = await self._run(connection, self._attempts, {"ids": _ids(job_ids)})
        attempts: dict[uuid.UUID, list[AttemptRecord]] = {job_id: [] for job_id in job_ids}
        for row in rows:
            job_id = self._dialect.id(row.job_id)
            attempts[job_id].append(
                AttemptRecord(
                    job_id=job_id,
                    attempt=row.attempt,
                    worker_id=row.worker_id,
                    started_at=_sure(self._dialect.time(row.started_at)),
                    finished_at=self._dialect.time(row.finished_at),
                    outcome=AttemptOutcome(row.outcome) if row.outcome else None,
                    error=_error(self._dialect.json_value(row.error)),
                )
            )
        return attempts

    async def list_jobs(
        self,
        connection: AsyncConnection,
        *,
        types: Sequence[str],
        statuses: Sequence[JobStatus],
        first: int,
        after: uuid.UUID | None,
    ) -> list[JobRecord]:
        """Jobs, newest first, starting behind `after`: a keyset page, whose cost does not grow
        with how far it is. Ids are UUIDv7, so their order is that of creation."""
        conditions, parameters = ["true"], dict[str, Any](first=first)
        for column, values in (("type", types), ("status", [str(s) for s in statuses])):
            if len(values) == 1:
                conditions.append(f"{column} = :{column}")
                parameters[column] = values[0]
            elif values:
                listed = self._dialect.rows(f":{column}", {"value": "text"})
                conditions.append(f"{column} IN (SELECT value FROM {listed} AS listed)")
                parameters[column] = _text([{"value": value} for value in values])
        if after is not None:
            conditions.append(f"id < {self._dialect.as_id(':after')}")
            parameters["after"] = after.hex
        wanted = " AND ".join(conditions)
        template = f"SELECT {_JOB} FROM job WHERE {wanted} ORDER BY id DESC LIMIT :first"
        rows = await self._run(connection, template, parameters)
        return [self._record(row) for row in rows]

    async def now(self, connection: AsyncConnection) -> datetime:
        """The database's time."""
        rows = await self._run(connection, f"SELECT {self._dialect.now}", {})
        return _sure(self._dialect.time(rows[0][0]))

    async def seconds_to_next(
        self, connection: AsyncConnection, types: Sequence[str]
    ) -> float | None:
        """Seconds until a queued job of these types is due or any lease runs out; None: never."""
        rows = await self._run(connection, self._next_due, {"types": _types(types)})
        return None if rows[0][0] is None else float(rows[0][0])

    async def see_worker(self, connection: AsyncConnection, types: Sequence[str]) -> None:
        """Notes that a worker asks for these types, and makes the rows that a claim locks."""
        await self._run(connection, self._see_worker, {"types": _types(types)})

    async def counts(self, connection: AsyncConnection) -> dict[str, JobCounts]:
        """Jobs per type and status. A type that never had a job is not in the answer."""
        counts: dict[str, dict[str, int]] = {}
        for row in await self._run(connection, self._counts, {}):
            counts.setdefault(row.type, {})[row.status] = row.jobs
        return {name: JobCounts(**of_status) for name, of_status in counts.items()}

    async def waiting(self, connection: AsyncConnection, job_id: uuid.UUID) -> Waiting | None:
        """What a queued job waits for; None when it is not queued. Reads index ranges only."""
        rows = await self._run(connection, self._waiting, {"id": job_id.hex})
        if not rows:
            return None
        seen = rows[0].seen_in_seconds
        return Waiting(
            due_in_seconds=float(rows[0].due_in_seconds),
            running=rows[0].running,
            worker_seen_seconds_ago=None if seen is None else -float(seen),
            ahead=min(rows[0].ahead, AHEAD_LIMIT),
        )

    async def prune(
        self, connection: AsyncConnection, status: JobStatus, *, keep_seconds: float, jobs: int
    ) -> int:
        """Deletes up to `jobs` jobs that ended with `status` longer ago than `keep_seconds`.

        The oldest first, by the index `job_finished`; their attempts go with them. A job that
        has not ended has no `finished_at` and is out of reach. Gives how many were deleted.
        """
        rows = await self._run(
            connection,
            self._prune,
            {"status": str(status), "keep_seconds": keep_seconds, "jobs": jobs},
        )
        return len(rows)

    async def fold_counts(self, connection: AsyncConnection, *, rows: int = 10_000) -> None:
        """Replaces rows of `job_count` by their sums. Rows that another is folding stay."""
        taken = await self._run(connection, self._take_counts, {"rows": rows})
        sums: dict[tuple[str, str], int] = {}
        for row in taken:
            sums[row.type, row.status] = sums.get((row.type, row.status), 0) + row.jobs
        folded = [{"type": t, "status": s, "jobs": jobs} for (t, s), jobs in sums.items() if jobs]
        if folded:
            await self._run(connection, self._put_counts, {"folded": _text(folded)})

    async def keep_events(self, connection: AsyncConnection, message: str) -> int:
        """Keeps a batch of events for other processes to read, and gives its number."""
        rows = await self._run(connection, self._keep_events, {"message": message})
        return int(rows[0][0])

    async def events(self, connection: AsyncConnection, number: int) -> str | None:
        """One kept batch; None when it was pruned already."""
        rows = await self._run(connection, self._events, {"id": number})
        return str(rows[0][0]) if rows else None

    async def events_after(self, connection: AsyncConnection, number: int) -> dict[int, str]:
        """The kept batches behind `number`, by their numbers, in order; 1,000 at most."""
        rows = await self._run(connection, self._events_after, {"after": number})
        return {row.id: row.message for row in rows}

    async def events_among(
        self, connection: AsyncConnection, numbers: Sequence[int]
    ) -> dict[int, str]:
        """The kept batches that have these numbers."""
        wanted = _text([{"id": number} for number in numbers])
        rows = await self._run(connection, self._events_among, {"wanted": wanted})
        return {row.id: row.message for row in rows}

    async def last_event(self, connection: AsyncConnection) -> int:
        """The number of the newest batch, deleted ones included on SQLite; 0 without any."""
        return int((await self._run(connection, self._last_event, {}))[0][0])

    async def prune_events(self, connection: AsyncConnection) -> None:
        """Deletes kept batches that every process has had time to read."""
        await self._run(connection, self._prune_events, {})

    async def _run(
        self, connection: AsyncConnection, template: str, parameters: Mapping[str, Any]
    ) -> Sequence[Row[Any]]:
        result = await connection.execute(statement(template), parameters)
        return result.all() if result.returns_rows else ()

    async def _close_attempts(
        self,
        connection: AsyncConnection,
        ended: Sequence[tuple[JobRecord, AttemptOutcome, JobError | None]],
    ) -> None:
        if ended:
            rows = [
                {"id": job.id.hex, "outcome": outcome, "error": _error_text(error)}
                for job, outcome, error in ended
            ]
            await self._run(connection, self._close, {"ended": _text(rows)})

    def _stored(self, rows: Sequence[Any]) -> dict[uuid.UUID, Stored]:
        time = self._dialect.time
        return {
            self._dialect.id(job_id): Stored(_sure(time(created_at)), _sure(time(next_run_at)))
            for job_id, created_at, next_run_at, *_ in rows
        }

    def _new_jobs(self, jobs: Sequence[NewJob]) -> str:
        return _text([self._new_job(job) for job in jobs])

    def _new_job(self, job: NewJob) -> dict[str, Any]:
        return {
            "id": job.id.hex,
            "type": job.type,
            "fingerprint": job.fingerprint,
            "payload": job.payload.decode(),
            "priority": job.priority,
            "max_attempts": job.max_attempts,
            "timeout_seconds": job.timeout_seconds,
            "backoff_base_seconds": job.backoff_base_seconds,
            "backoff_cap_seconds": job.backoff_cap_seconds,
            "next_run_at": self._dialect.time_text(job.next_run_at) if job.next_run_at else None,
            "idempotency_key": job.idempotency_key,
            "created_by": job.created_by,
        }

    def _record(self, row: Row[Any]) -> JobRecord:
        time = self._dialect.time
        return JobRecord(
            id=self._dialect.id(row.id),
            type=row.type,
            fingerprint=row.fingerprint,
            status=JobStatus(row.status),
            payload=self._dialect.json_value(row.payload),
            priority=row.priority,
            attempt=row.attempt,
            max_attempts=row.max_attempts,
            timeout_seconds=row.timeout_seconds,
            created_at=_sure(time(row.created_at)),
            idempotency_key=row.idempotency_key,
            created_by=row.created_by,
            next_run_at=time(row.next_run_at),
            started_at=time(row.started_at),
            finished_at=time(row.finished_at),
            cancel_requested_at=time(row.cancel_requested_at),
            worker_id=row.worker_id,
            progress=self._dialect.json_value(row.progress),
            result=self._dialect.json_value(row.result),
            error=_error(self._dialect.json_value(row.error)),
        )

    def _leased(self, row: Row[Any]) -> Leased:
        return Leased(
            job=self._record(row),
            token=row.lease_token,
            expires_at=_sure(self._dialect.time(row.lease_expires_at)),
            deadline_at=_sure(self._dialect.time(row.deadline_at)),
        )


_COLUMNS: Final = [
    "id",
    "type",
    "fingerprint",
    "status",
    "payload",
    "priority",
    "attempt",
    "max_attempts",
    "timeout_seconds",
    "created_at",
    "idempotency_key",
    "created_by",
    "next_run_at",
    "started_at",
    "finished_at",
    "cancel_requested_at",
    "worker_id",
    "progress",
    "result",
    "error",
]
_JOB: Final = ", ".join(_COLUMNS)


def _job(table: str) -> str:
    return ", ".join(f"{table}.{column}" for column in _COLUMNS)


_NEW_JOB: Final = {
    "id": "uuid",
    "type": "text",
    "fingerprint": "text",
    "payload": "text",
    "priority": "smallint",
    "max_attempts": "integer",
    "timeout_seconds": "integer",
    "backoff_base_seconds": "double precision",
    "backoff_cap_seconds": "double precision",
    "next_run_at": "timestamptz",
    "idempotency_key": "text",
    "created_by": "text",
}
_REPORT: Final = {
    "id": "uuid",
    "token": "text",
    "outcome": "text",
    "retryable": "integer",
    "spend": "integer",
    "delay_seconds": "double precision",
    "result": "text",
    "error": "text",
}


def _end_attempts(d: Dialect, reports: str, still: str) -> str:
    """The one statement that ends attempts: those that `reports` names, if `still` is true."""
    status = """CASE
                    WHEN report.outcome = 'succeeded' THEN 'succeeded'
                    WHEN report.outcome = 'cancelled' OR job.cancel_requested_at IS NOT NULL
                        THEN 'cancelled'
                    WHEN report.outcome IN ('released', 'snoozed') THEN 'queued'
                    WHEN report.retryable = 1 AND job.attempt < job.max_attempts THEN 'queued'
                    ELSE 'failed' END"""
    # The same rule as registry.Backoff.delay_seconds, with the exponent bounded.
    backoff = f"""{d.least}(
                        job.backoff_cap_seconds,
                        job.backoff_base_seconds
                            * (CAST(1 AS bigint) << {d.least}(job.attempt - 1, 40))
                    ) * (0.5 + 0.5 * {d.random})"""
    delay = f"coalesce(CAST(report.delay_seconds AS double precision), {backoff})"
    return f"""
            UPDATE job SET
                status = {status},
                next_run_at = CASE WHEN {status} = 'queued' THEN {d.after(delay)} END,
                finished_at = CASE WHEN {status} <> 'queued' THEN {d.now} END,
                attempt = CASE WHEN report.outcome IN ('released', 'snoozed') OR report.spend = 0
                               THEN job.attempt - 1 ELSE job.attempt END,
                result = CASE WHEN report.outcome = 'succeeded' THEN {d.json("report.result")}
                              ELSE job.result END,
                error = CASE WHEN report.outcome = 'succeeded' THEN NULL
                             ELSE coalesce({d.json("report.error")}, job.error) END,
                lease_token = CASE WHEN report.outcome = 'succeeded' THEN job.lease_token END,
                lease_expires_at = NULL,
                deadline_at = NULL
            FROM {reports} AS report
            WHERE job.id = report.id AND job.lease_token = report.token
              AND job.status = 'running' AND {still}
            RETURNING {_job("job")}"""


def _report_row(report: Report) -> dict[str, Any]:
    return {
        "id": report.job_id.hex,
        "token": report.token,
        "outcome": report.outcome,
        "retryable": int(report.retryable),
        "spend": int(report.spend),
        "delay_seconds": report.delay_seconds,
        "result": report.result.decode() if report.result is not None else None,
        "error": _error_text(report.error),
    }


def _types(types: Iterable[str]) -> str:
    return _text([{"type": name} for name in types])


def _text(value: Any) -> str:
    """JSON text. Pydantic's writer takes a third of the time of the standard library's."""
    return to_json(value).decode()


def _ids(ids: Iterable[uuid.UUID]) -> str:
    return _text([{"id": job_id.hex} for job_id in ids])


def _error(value: Any) -> JobError | None:
    return None if value is None else JobError(**value)


def _error_text(error: JobError | None) -> str | None:
    if error is None:
        return None
    return _text({"code": error.code, "message": error.message, "details": error.details})


def _sure(value: T | None) -> T:
    assert value is not None
    return value


class Store:
    """The kept batches of events, each read on a connection of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._store = JobStore(database.dialect)

    async def last_event(self) -> int:
        """The number of the newest batch, deleted ones included on SQLite; 0 without any."""
        async with self._database.reading() as connection:
            return await self._store.last_event(connection)

    async def events_after(self, number: int) -> dict[int, str]:
        """The kept batches behind `number`, by their numbers, in order; 1,000 at most."""
        async with self._database.reading() as connection:
            return await self._store.events_after(connection, number)

    async def events_among(self, numbers: Sequence[int]) -> dict[int, str]:
        """The kept batches that have these numbers."""
        async with self._database.reading() as connection:
            return await self._store.events_among(connection, numbers)
