"""The operations of the queue on SQLite, each a function that runs in one BEGIN IMMEDIATE.

That transaction excludes every other writer, in this process and in others, so the operations need
no further locks. The statements are in `statements/sqlite.sql`.
"""

from __future__ import annotations

import random
import re
import secrets
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain, zip_longest
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeVar

from pydantic_core import from_json
from sqlalchemy import (
    JSON,
    Connection,
    Integer,
    NestedTransaction,
    Uuid,
    func,
    literal_column,
    select,
)

from job_registry_api.queue.database import read_json, statement
from job_registry_api.queue.filters import Sample
from job_registry_api.queue.models import (
    METADATA,
    PARKED_UNTIL,
    AttemptOutcome,
    JobRecord,
    JobStatus,
    Owner,
    UtcTime,
)
from job_registry_api.queue.requests import differing_paths
from job_registry_api.queue.sqlite_database import SQLiteDatabase
from job_registry_api.queue.store import (
    CLAIM_BYTES,
    CLOCK_SLACK_SECONDS,
    EVENT_BATCHES_PRUNED,
    EVENTS_KEPT_SECONDS,
    LOST,
    RECOVERY_BATCH,
    UNREPORTED_TIMEOUT,
    WAITS_ENDED,
    Claim,
    Claimed,
    ClaimedJob,
    Ended,
    LeaseLogs,
    LeaseRenewal,
    NewJob,
    Recovered,
    Refused,
    Renewed,
    Report,
    Store,
    Stored,
    error_text,
    ids_text,
    json_text,
    message_of,
    owner_values,
    refuses,
    statements,
    stored_before,
)

SQL: Final = statements("sqlite")

T = TypeVar("T")
Row = Mapping[str, Any]

LOGS_SECONDS: Final = 1.5
"""How long a write of log lines waits for other processes. Workers wait slightly longer for it."""

MAX_REFUSED: Final = 16
"""How many fingerprints that refused a job are remembered."""

NUMBER_LENGTHS: Final = 6
"""How many times as long as another an equal JSON text may be: 1000000000000000000 is 1e18."""

ROWS_PER_BLOCK: Final = 5
"""How many rows of neighbours a sample of jobs reads."""

RETURNED: Final = (AttemptOutcome.RELEASED, AttemptOutcome.SNOOZED)


class SQLiteStore(Store):
    """The operations on SQLite."""

    _database: SQLiteDatabase

    def __init__(self, database: SQLiteDatabase, process: str) -> None:
        self._database = database
        self.process = process

    async def insert(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        return await self._write(lambda t: t.insert(jobs))

    async def insert_unkeyed(self, jobs: Sequence[NewJob], sender: str) -> list[Stored]:
        stored = await self._write(lambda t: t.insert(jobs), sender=sender)
        return [stored[job.id] for job in jobs]

    async def insert_all(self, jobs: Sequence[NewJob]) -> tuple[dict[uuid.UUID, Stored], bool]:
        try:
            return await self._write(lambda t: t.insert_or_refuse(jobs)), True
        except Refused as refused:
            return refused.stored, False

    async def holders(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        return await self._write(lambda t: t.holders(jobs))

    def insert_within(
        self, connection: Connection, jobs: Sequence[NewJob]
    ) -> dict[uuid.UUID, Stored]:
        stored: dict[uuid.UUID, Stored] = {}
        created: list[tuple[str, str, str, int]] = []
        shift = {"shift": self._database.shift}
        now = str(connection.execute(statement(SQL["now"]), shift).scalar_one())
        for job in jobs:
            values = dict(zip(_INSERTED, _values(job, now), strict=True))
            if connection.execute(statement(SQL["insert"]), values).rowcount:
                stored[job.id] = _stored(job, _time(now))
                created.append(("job.created", job.id.hex, job.type, 0))
            else:
                key = (job.type, job.idempotency_key or "")
                holder = self.find_by_key_within(connection, [key])[key]
                stored[job.id] = stored_before(holder, job)
        if created:
            kept = {"message": message_of(self.process, created), "now": now}
            connection.execute(statement(SQL["keep_events"]), kept)
        return stored

    def savepoint_within(self, connection: Connection) -> NestedTransaction:
        # The driver begins a transaction at the first statement that writes. Without one, the
        # release of the savepoint would commit. A test's session may be one of another database.
        driver: Any = connection.connection.driver_connection
        if connection.dialect.name == "sqlite" and not driver.in_transaction:
            connection.exec_driver_sql("BEGIN")
        return super().savepoint_within(connection)

    async def complete_and_insert(
        self,
        report: Report,
        jobs: Sequence[NewJob],
    ) -> tuple[JobRecord | None, dict[uuid.UUID, Stored]]:
        def work(transaction: _Transaction) -> tuple[Row, dict[uuid.UUID, Stored]]:
            ended = transaction.end(report)
            if ended is None:
                raise Refused({})
            return ended, transaction.insert_or_refuse(jobs)

        try:
            row, stored = await self._write(work)
        except Refused as refused:
            return None, refused.stored
        return self._job(row), stored

    async def claim(self, claim: Claim) -> Claimed:
        leased, recovered = await self._write(
            lambda t: t.recover_and_claim(claim), sender=claim.sender
        )
        return self._claimed(claim, leased, recovered)

    async def succeed(self, reports: Sequence[Report], sender: str) -> dict[uuid.UUID, Ended]:
        rows = await self._write(lambda t: t.succeed(reports), sender=sender)
        return self._succeeded(reports, rows)

    async def succeed_and_claim(
        self, reports: Sequence[Report], sender: str, claim: Claim
    ) -> tuple[dict[uuid.UUID, Ended], Claimed]:
        def work(transaction: _Transaction) -> tuple[list[Row], list[Row], list[Row]]:
            ended = transaction.succeed(reports)
            transaction.announce(sender)
            return ended, *transaction.recover_and_claim(claim)

        ended, leased, recovered = await self._write(work, sender=claim.sender)
        return self._succeeded(reports, ended), self._claimed(claim, leased, recovered)

    def _succeeded(self, reports: Sequence[Report], rows: Sequence[Row]) -> dict[uuid.UUID, Ended]:
        # They have few columns, of which only the id is converted. The reports have it.
        ids = {report.job_id.hex: report.job_id for report in reports}
        return {ids[row["id"]]: self.ended({**row, "id": ids[row["id"]]}) for row in rows}

    def _claimed(self, claim: Claim, leased: Sequence[Row], recovered: Sequence[Row]) -> Claimed:
        return Claimed(
            [
                ClaimedJob(
                    job=self.record(row),
                    token=row["lease_token"],
                    expires_at=row["lease_expires_at"],
                    deadline_at=row["deadline_at"],
                    traceparent=row["traceparent"],
                )
                for row in map(_typed, leased)
            ],
            [Recovered(self._job(row), row["traceparent"]) for row in recovered],
            # One message has the events of both.
            sender=None if recovered else claim.sender,
        )

    async def recover(self, lease_seconds: float) -> list[Recovered]:
        rows = await self._write(lambda t: t.recover(lease_seconds))
        return [Recovered(self._job(row), row["traceparent"]) for row in rows]

    async def end(self, reports: Sequence[Report]) -> dict[uuid.UUID, Ended]:
        unread = [r for r in reports if r.outcome is AttemptOutcome.SUCCEEDED and not r.reads_job]
        others = [r for r in reports if r.outcome is not AttemptOutcome.SUCCEEDED or r.reads_job]

        def work(transaction: _Transaction) -> tuple[list[Row], list[Row]]:
            read = [row for report in others if (row := transaction.end(report)) is not None]
            return transaction.succeed(unread) if unread else [], read

        narrow, rows = await self._write(work)
        ended = {job.id: Ended.of(job) for job in map(self._job, rows)}
        return ended | self._succeeded(unread, narrow)

    async def renew(
        self, renewals: Sequence[LeaseRenewal], lease_seconds: float
    ) -> dict[tuple[uuid.UUID, str], Renewed | None]:
        def work(transaction: _Transaction) -> dict[tuple[uuid.UUID, str], Renewed | None]:
            return {(r.job_id, r.token): transaction.renew(r, lease_seconds) for r in renewals}

        return await self._write(work)

    async def store_logs(self, logs: Sequence[LeaseLogs]) -> None:
        # A cancelled write still ends. It must not wait for longer than its caller does, because
        # newer lines may then be stored before.
        await self._write(lambda t: t.store_logs(logs), timeout_seconds=LOGS_SECONDS)

    async def settle(self, leases: Sequence[tuple[uuid.UUID, str]]) -> None:
        await self._write(lambda t: t.settle(leases))

    async def cancel(self, job_id: uuid.UUID, owner: Owner | None = None) -> Ended | None:
        row = await self._write(lambda t: t.cancel(job_id, owner))
        return Ended.of(self._job(row)) if row else None

    async def retry(self, job_id: uuid.UUID, owner: Owner | None = None) -> Ended | None:
        row = await self._write(lambda t: t.retry(job_id, owner))
        return Ended.of(self._job(row)) if row else None

    async def next_due(self, types: Sequence[str], limits: Mapping[str, int]) -> float | None:
        # It only reads. Many small statements are fastest in the thread of the writer.
        return await self._write(lambda t: t.next_due(types, limits))

    async def see_worker(
        self, types: Sequence[str], versions: Sequence[tuple[str, str]] = ()
    ) -> None:
        await self._write(lambda t: t.see_worker(types, versions))

    async def unpark(
        self, types: Sequence[str], *, parked_until: datetime, jobs: int
    ) -> list[JobRecord]:
        rows = await self._write(lambda t: t.unpark(types, time_text(parked_until), jobs))
        return [self._job(row) for row in rows]

    async def fail_parked(self, *, older_than_seconds: float, jobs: int) -> list[JobRecord]:
        rows = await self._write(lambda t: t.fail_parked(t.at(-older_than_seconds), jobs))
        return [self._job(row) for row in rows]

    async def prune_versions(self, *, keep_seconds: float) -> None:
        await self._write(lambda t: t.change("prune_versions", before=t.at(-keep_seconds)))

    def _job(self, row: Row) -> JobRecord:
        return self.record(_typed(row))

    async def announce_waits_ended(self, waits: str) -> None:
        await self._write(lambda t: t.announce_waits_ended(waits))

    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        return await self._write(
            lambda t: t.change("prune", status=str(status), before=t.at(-keep_seconds), jobs=jobs)
        )

    async def fold_counts(self) -> int:
        return await self._write(lambda t: t.change("fold_counts"))

    async def prune_events(self) -> int:
        return await self._write(
            lambda t: t.change(
                "prune_events", before=t.at(-EVENTS_KEPT_SECONDS), batches=EVENT_BATCHES_PRUNED
            )
        )

    async def check_writes(self, *, timeout_seconds: float) -> None:
        def check(connection: sqlite3.Connection) -> None:
            connection.execute("SAVEPOINT readiness")
            transaction = _Transaction(connection, self._database.shift)
            transaction.insert([_PROBE])
            transaction.change("open_attempt", id=_PROBE.id.hex, worker="readiness")
            transaction.announce(self.process)
            connection.execute("ROLLBACK TO SAVEPOINT readiness")
            # SQLite writes to its files only when it commits. Committing an unchanged page detects
            # a full disk.
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version = {int(version)}")

        await self._database.write(check, timeout_seconds=timeout_seconds)

    async def _sample(self, blocks: int) -> Sample:
        # Rows are stored in the order of `rowid`, so neighbours are in one page of the file.
        rowid: Any = literal_column("job.rowid", Integer)
        # Apart, each reads one row. Together they would read all.
        first, last = (
            select(end(rowid)).select_from(METADATA.tables["job"]).scalar_subquery()
            for end in (func.min, func.max)
        )
        (row,) = await self._select(select(first.label("first"), last.label("last")))
        places = (row["first"] or 0, row["last"] or 0)
        chosen = [
            begin + step
            for begin in (random.randint(*places) for _ in range(blocks))
            for step in range(ROWS_PER_BLOCK)
        ]
        values = func.json_each(json_text(chosen)).table_valued("value")
        return Sample(METADATA.tables["job"], [rowid.in_(select(values.c.value))])

    async def _write(
        self,
        work: Callable[[_Transaction], T],
        *,
        sender: str | None = None,
        timeout_seconds: float | None = None,
    ) -> T:
        def run(connection: sqlite3.Connection) -> T:
            transaction = _Transaction(connection, self._database.shift)
            result = work(transaction)
            transaction.announce(sender or self.process)
            return result

        return await self._database.write(run, timeout_seconds=timeout_seconds)

    async def _read(
        self, name: str, parameters: Mapping[str, Any], *, in_order: bool = False
    ) -> Sequence[Row]:
        async with self._database.reading(in_order=in_order) as connection:
            values = {
                key: time_text(value) if isinstance(value, datetime) else value
                for key, value in parameters.items()
            }
            values["shift"] = self._database.shift
            result = await connection.execute(statement(SQL[name]), values)
            return [_typed(dict(row)) for row in result.mappings()]

    def _execute_within(
        self, connection: Connection, name: str, parameters: Mapping[str, Any]
    ) -> Sequence[Row]:
        values = {**parameters, "shift": self._database.shift}
        result = connection.execute(statement(SQL[name]), values)
        return [_typed(dict(row)) for row in result.mappings()]


class _Lane(NamedTuple):
    """Jobs that are claimed in one order: those stored under a name of a type.

    `refused`, if given, are the fingerprints that have refused the jobs: the lane is of parked
    jobs. `readable` is a JSON array of the fingerprints that the worker can read.
    """

    type: str
    stored: str
    readable: str | None
    refused: str | None = None


class _Transaction:
    """A transaction: its time, its statements, and the events that it announces at its end."""

    def __init__(self, connection: sqlite3.Connection, shift: str) -> None:
        self._cursor = connection.cursor()
        self._cursor.row_factory = sqlite3.Row
        self._events: list[tuple[str, str, str, int]] = []
        self.now: str = self._cursor.execute(SQL["now"], {"shift": shift}).fetchone()[0]
        self._now = _time(self.now)

    def at(self, seconds: float) -> str:
        """Return the time `seconds` from now, as it is stored."""
        return time_text(self._now + timedelta(seconds=seconds))

    def rows(self, name: str, **parameters: Any) -> list[Any]:
        """Run a statement and return its rows."""
        return self._cursor.execute(SQL[name], {"now": self.now, **parameters}).fetchall()

    def change(self, name: str, **parameters: Any) -> int:
        """Run a statement and return how many rows it changed."""
        return self._cursor.execute(SQL[name], {"now": self.now, **parameters}).rowcount

    def announce(self, process: str) -> None:
        """Store the events, for other processes to read."""
        if self._events:
            message = message_of(process, self._events)
            self._events = []
            self.change("keep_events", message=message)

    def insert(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        rows = [_row_of(_values(job, self.now)) for job in jobs]
        inserted = at = 0
        while at < len(rows):
            size = next(each for each in _INSERTS if each <= len(rows) - at)
            some = chain.from_iterable(rows[at : at + size])
            inserted += self._cursor.execute(_INSERTS[size], tuple(some)).rowcount
            at += size
        new = jobs if inserted == len(jobs) else self._found(jobs)
        stored = {job.id: _stored(job, self._now) for job in new}
        self._events += [("job.created", job.id.hex, job.type, 0) for job in new]
        if len(stored) < len(jobs):
            stored |= self.holders([job for job in jobs if job.id not in stored])
        return stored

    def _found(self, jobs: Sequence[NewJob]) -> list[NewJob]:
        """Return those of the jobs that are stored."""
        found = {row["id"] for row in self.rows("found", ids=ids_text(job.id for job in jobs))}
        return [job for job in jobs if job.id.hex in found]

    def holders(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        return {
            job.id: self._holder(job, row)
            for job in jobs
            for row in self.rows(
                "holder", type=job.type, key=job.idempotency_key, payload=job.payload.decode()
            )
        }

    def _holder(self, job: NewJob, row: sqlite3.Row) -> Stored:
        """Return the outcome for a new job whose key belongs to the job of this row."""
        text = job.payload.decode()
        is_same = bool(row["is_same"])
        length = row["payload_length"]
        if not is_same and length <= NUMBER_LENGTHS * len(text) <= NUMBER_LENGTHS**2 * length:
            # Equal values may have different texts, such as 1 and 1.0.
            (payload,) = self.rows("payload", id=row["id"])[0]
            is_same = not differing_paths(read_json(payload), from_json(job.payload), 1)
        holder = JobRecord.of(_typed(_dict(row)))
        return Stored(holder.created_at, holder.created_at, holder, is_same)

    def insert_or_refuse(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        stored = self.insert(jobs)
        if any(refuses(job, stored[job.id]) for job in jobs if job.id in stored):
            raise Refused(stored)
        return stored

    def recover(self, lease_seconds: float) -> list[Row]:
        self._correct_for_clock(lease_seconds)
        ended: list[Row] = []
        for row in self.rows("expired", most=RECOVERY_BATCH):
            late = bool(row["timed_out"])
            report = Report(
                job_id=uuid.UUID(row["id"]),
                token=row["lease_token"],
                outcome=AttemptOutcome.TIMED_OUT if late else AttemptOutcome.LOST,
                error=UNREPORTED_TIMEOUT if late else LOST,
            )
            job = self.end(report, recovering=True)
            if job is not None:
                ended.append(job)
        return ended

    def _correct_for_clock(self, lease_seconds: float) -> None:
        """Restart leases that end later than a lease can, because the clock has stepped back.

        Otherwise a dead worker would not be detected until the clock has caught up.
        """
        most = {"most": RECOVERY_BATCH}
        lease_end = self.at(lease_seconds + CLOCK_SLACK_SECONDS)
        for row in self.rows("ahead", lease_end=lease_end, lease=lease_seconds, **most):
            deadline = min(row["deadline_at"], self.at(row["timeout_seconds"]))
            self.change(
                "set_lease",
                id=row["id"],
                deadline_at=deadline,
                held_until=self.at(row["lease_seconds"]),
                lease_expires_at=min(self.at(row["lease_seconds"]), deadline),
            )
        newest = int((self._now.timestamp() + CLOCK_SLACK_SECONDS) * 1_000)
        self.change("set_due", newest=f"{newest:012x}", **most)

    def recover_and_claim(self, claim: Claim) -> tuple[list[Row], list[Row]]:
        """Return the leased jobs, and those whose lost attempts were ended first."""
        recovered = self.recover(claim.lease_seconds)
        return self.claim(claim), recovered

    def claim(self, claim: Claim) -> list[Row]:
        """Lease jobs, one priority level after the other, with the types of a level in turns."""
        rooms = dict.fromkeys(claim.types, claim.jobs)
        for name in claim.limits.keys() & rooms.keys():
            rooms[name] = claim.limits[name]
        for _, name, stored in claim.lanes():
            if name in claim.limits:
                rooms[name] -= self.rows("running", type=stored)[0][0]
        every = list(self._lanes(claim))
        tops = {
            lane: level
            for lane in every
            if rooms[lane.type] > 0 and (level := self._next_level(lane, 101)) is not None
        }
        leased: list[Row] = []
        bytes_left = CLAIM_BYTES
        while tops and len(leased) < claim.jobs:
            level = max(tops.values())
            lanes = self._in_turn([lane for lane in every if tops.get(lane) == level], level)
            share = -(-(claim.jobs - len(leased)) // len(lanes))
            for lane in lanes:
                left = claim.jobs - len(leased)
                if left == 0:
                    break
                most = min(share, rooms[lane.type], left)
                taken = self._due(lane, level, most) if most > 0 else []
                fitting: list[Row] = []
                for row in taken:
                    fitting.append(row)
                    bytes_left -= row["bytes"]
                    if bytes_left <= 0:
                        break
                leased += self._lease(fitting, claim)
                if bytes_left <= 0:
                    return leased
                rooms[lane.type] -= len(taken)
                if len(taken) < most:
                    below = self._next_level(lane, level)
                    tops.pop(lane)
                    if below is not None:
                        tops[lane] = below
                elif rooms[lane.type] <= 0:
                    tops.pop(lane)
        return leased

    def _lanes(self, claim: Claim) -> Iterator[_Lane]:
        """Yield the lanes of due jobs and, if there are parked jobs, of those that it may lease."""
        parked = bool(self.rows("any_parked"))
        for _, name, stored in claim.lanes():
            readable = claim.readable.get(name)
            reads = None if readable is None else json_text(readable)
            yield _Lane(name, stored, reads)
            worker = claim.fingerprints.get(name)
            if not parked or (worker is None and reads is None):
                continue
            refused = ""
            while rows := self.rows("next_refused", type=stored, refused=refused):
                refused = rows[0]["refused_by"]
                if worker is None or worker not in refused:
                    yield _Lane(name, stored, reads, refused)

    def _in_turn(self, lanes: Sequence[_Lane], level: int) -> Sequence[_Lane]:
        """Return the lanes of a level in the order of their turns.

        Of a type with several lanes, the one with the oldest job is first. Otherwise a worker that
        leases one job at a time would take parked jobs only when no job is due.
        """
        by_type: dict[str, list[_Lane]] = {}
        for lane in lanes:
            by_type.setdefault(lane.type, []).append(lane)
        if len(by_type) == len(lanes):
            return lanes
        for of_type in by_type.values():
            of_type.sort(key=lambda lane: self._oldest(lane, level))
        return [
            lane
            for round_of_turns in zip_longest(*by_type.values())
            for lane in round_of_turns
            if lane is not None
        ]

    def _oldest(self, lane: _Lane, level: int) -> str:
        """Return the time of the lane's oldest job of a level; a late time if all are leased."""
        if lane.refused is None:
            rows = self.rows("next_level", type=lane.stored, below=level + 1)
        else:
            rows = self.rows(
                "next_parked_level", type=lane.stored, refused=lane.refused, below=level + 1
            )
        return rows[0][1] if rows and rows[0][0] == level else time_text(PARKED_UNTIL)

    def _due(self, lane: _Lane, level: int, jobs: int) -> list[Any]:
        of_lane = {"type": lane.stored, "priority": level, "jobs": jobs}
        if lane.refused is not None:
            return self.rows("due_parked", refused=lane.refused, readable=lane.readable, **of_lane)
        if lane.readable is not None:
            return self.rows("due_readable", readable=lane.readable, **of_lane)
        return self.rows("due", **of_lane)

    def _next_level(self, lane: _Lane, below: int) -> int | None:
        """Return the highest priority below `below` at which the lane has a due job."""
        if lane.refused is not None:
            parked = self.rows(
                "next_parked_level", type=lane.stored, refused=lane.refused, below=below
            )
            return parked[0]["priority"] if parked else None
        while rows := self.rows("next_level", type=lane.stored, below=below):
            level: int = rows[0]["priority"]
            if rows[0]["next_run_at"] <= self.now:
                return level
            below = level
        return None

    def _lease(self, due: Sequence[Row], claim: Claim) -> list[Row]:
        """Lease jobs, and return them in their order."""
        if not due:
            return []
        # Few timeouts differ, and a time takes as long as a lease to format.
        ends = {
            timeout: (self.at(timeout), self.at(min(timeout, claim.lease_seconds)))
            for timeout in {row["timeout_seconds"] for row in due}
        }
        leases = [
            {
                "id": row["id"],
                "token": secrets.token_hex(16),
                "deadline_at": ends[row["timeout_seconds"]][0],
                "lease_expires_at": ends[row["timeout_seconds"]][1],
            }
            for row in due
        ]
        leased: dict[str, Row] = {
            row["id"]: _dict(row)
            for row in self.rows(
                "lease",
                leases=json_text(leases),
                worker=claim.worker_id,
                lease=claim.lease_seconds,
                held_until=self.at(claim.lease_seconds),
            )
        }
        ids = json_text(list(leased))
        self.change("open_attempts", ids=ids)
        in_order = [leased[row["id"]] for row in due if row["id"] in leased]
        for row in in_order:
            self._add_event("job.started", row)
        return in_order

    def end(self, report: Report, *, recovering: bool = False) -> Row | None:
        """End an attempt if its lease is in force. See `job_end` in `0005_quick_writes.sql`."""
        if report.parked_for is not None:
            return self.park(report)
        late = str(report.outcome)
        rows = self.rows("running_lease", id=report.job_id.hex, token=report.token, late=late)
        if not rows:
            return None
        job = _dict(rows[0])
        returned = report.outcome in RETURNED
        quickly = returned and job["started_at"] > self.at(-10)
        if report.outcome is AttemptOutcome.SUCCEEDED:
            status = "succeeded"
        elif report.outcome is AttemptOutcome.CANCELLED or job["cancel_requested_at"] is not None:
            status = "cancelled"
        elif returned or (report.retryable and job["attempt"] < job["max_attempts"]):
            status = "queued"
        else:
            status = "failed"
        error = error_text(report.error)
        held_until = None
        if report.still_running:
            held_until = self.at(job["lease_seconds"] or 30)
        elif recovering and report.outcome is AttemptOutcome.TIMED_OUT:
            # Its worker is alive and may still run it.
            held_until = job["held_until"] if (job["held_until"] or "") > self.now else None
        outcome = "cancelled" if status == "cancelled" else str(report.outcome)
        self.change(
            "close_attempt", id=job["id"], outcome=outcome, error=error, held_until=held_until
        )
        succeeded = status == "succeeded"
        spent = not returned and report.spend
        (ended,) = self.rows(
            "end",
            id=job["id"],
            status=status,
            next_run_at=self.at(_delay(report, job, quickly)) if status == "queued" else None,
            finished_at=self.now if status != "queued" else None,
            attempt=job["attempt"] if spent else job["attempt"] - 1,
            returns=job["returns"] + (not spent),
            quick_returns=job["quick_returns"] + 1 if quickly else 0,
            result=_text(report.result) if succeeded else job["result"],
            error=None if succeeded else error or job["error"],
            lease_token=report.token if succeeded else None,
        )
        self._forget_attempts(ended)
        self._add_event("job.retrying" if status == "queued" else f"job.{status}", ended)
        return _dict(ended)

    def succeed(self, reports: Sequence[Report]) -> list[Row]:
        """End attempts whose lease is in force as succeeded, as `end` does, in two statements."""
        leases = [
            {"id": report.job_id.hex, "token": report.token, "result": report.result}
            for report in reports
        ]
        rows: list[Row] = [_dict(row) for row in self.rows("succeed", leases=json_text(leases))]
        if rows:
            self.change("close_succeeded", ids=json_text([row["id"] for row in rows]))
            ended = {row["id"] for row in rows}
            for report in reports:
                if report.logs is not None and report.job_id.hex in ended:
                    self._store_logs(report.job_id, report.token, report.logs)
        for row in rows:
            self._forget_attempts(row)
            self._add_event("job.succeeded", row)
        return rows

    def _forget_attempts(self, ended: Row) -> None:
        """Delete the oldest attempts of a job that has many."""
        attempts = ended["attempt"] + ended["returns"]
        if attempts % 32 == 0:
            self.change("forget_returned", id=ended["id"])
            if attempts > 1_000:
                self.change("forget_oldest", id=ended["id"])

    def park(self, report: Report) -> Row | None:
        """Park a job that its worker cannot read. See `job_park` in `0003_evolution.sql`."""
        lease = {"id": report.job_id.hex, "token": report.token}
        rows = self.rows("running_lease", late="", **lease)
        if not rows:
            return None
        job = _dict(rows[0])
        is_cancelled = job["cancel_requested_at"] is not None
        error = error_text(report.error)
        outcome = "cancelled" if is_cancelled else "released"
        self.change("close_attempt", id=job["id"], outcome=outcome, error=error, held_until=None)
        if not is_cancelled:
            fingerprint = str(report.parked_for)
            known = self.rows("refused_by", id=job["id"])
            refused = known[0][0].split(",") if known else []
            if fingerprint not in refused:
                refused = [*refused, fingerprint][-MAX_REFUSED:]
            self.change(
                "park",
                id=job["id"],
                due_at=job["started_at"],
                refused_by=",".join(refused),
                error=error,
            )
        (ended,) = self.rows(
            "end",
            id=job["id"],
            status="cancelled" if is_cancelled else "queued",
            next_run_at=None if is_cancelled else time_text(PARKED_UNTIL),
            finished_at=self.now if is_cancelled else None,
            attempt=job["attempt"] - 1,
            returns=job["returns"] + 1,
            quick_returns=job["quick_returns"],
            result=job["result"],
            error=job["error"],
            lease_token=None,
        )
        if (ended["attempt"] + ended["returns"]) % 32 == 0:
            self.change("forget_returned", id=job["id"])
        self._add_event("job.cancelled" if is_cancelled else "job.parked", ended)
        return _dict(ended)

    def unpark(self, types: Sequence[str], parked_until: str, jobs: int) -> list[Row]:
        changed: list[Row] = []
        for name in types:
            for parked in self.rows(
                "parked_of", type=name, parked_until=parked_until, jobs=jobs - len(changed)
            ):
                for row in self.rows("unpark", id=parked["job_id"], due_at=parked["due_at"]):
                    self._add_event("job.unparked", row)
                    changed.append(_dict(row))
                self.change("forget_parked", id=parked["job_id"])
        return changed

    def fail_parked(self, before: str, jobs: int) -> list[Row]:
        failed: list[Row] = []
        for parked in self.rows("parked_before", before=before, jobs=jobs):
            for row in self.rows("fail_parked", id=parked["job_id"], error=parked["error"]):
                self._add_event("job.failed", row)
                failed.append(_dict(row))
        return failed

    def renew(self, renewal: LeaseRenewal, lease_seconds: float) -> Renewed | None:
        lease = {"id": renewal.job_id.hex, "token": renewal.token}
        rows = self.rows("running_lease", late="", **lease)
        if not rows:
            self.change("hold", held_until=self.at(lease_seconds), **lease)
            return None
        job = rows[0]
        expires_at = min(self.at(lease_seconds), job["deadline_at"])
        self.change(
            "renew",
            id=job["id"],
            lease=lease_seconds,
            lease_expires_at=expires_at,
            held_until=self.at(lease_seconds),
            progress=_text(renewal.progress),
        )
        if renewal.progress is not None:
            self._add_event("job.progressed", job)
        seconds_left = (_time(job["deadline_at"]) - self._now).total_seconds()
        return Renewed(_time(expires_at), seconds_left, job["cancel_requested_at"] is not None)

    def store_logs(self, logs: Iterable[LeaseLogs]) -> None:
        for each in logs:
            self._store_logs(*each)
            for row in self.rows("running_lease", late="", id=each.job_id.hex, token=each.token):
                self._add_event("job.progressed", row)

    def _store_logs(self, job_id: uuid.UUID, token: str, lines: bytes) -> None:
        self.change("store_logs", id=job_id.hex, token=token, lines=lines.decode())

    def settle(self, leases: Iterable[tuple[uuid.UUID, str]]) -> None:
        for job_id, token in leases:
            for row in self.rows("settle", id=job_id.hex, token=token):
                self._events.append(("job.settled", job_id.hex, row["type"], row["attempt"]))

    def cancel(self, job_id: uuid.UUID, owner: Owner | None) -> Row | None:
        for row in self.rows("cancel", id=job_id.hex, **owner_values(owner)):
            running = row["status"] == "running"
            self._add_event("job.cancel_requested" if running else "job.cancelled", row)
            return _dict(row)
        return None

    def retry(self, job_id: uuid.UUID, owner: Owner | None) -> Row | None:
        for row in self.rows("retry", id=job_id.hex, **owner_values(owner)):
            self._add_event("job.retrying", row)
            return _dict(row)
        return None

    def next_due(self, types: Sequence[str], limits: Mapping[str, int]) -> float | None:
        soonest: list[str] = []
        for name in types:
            if name in limits and self.rows("running", type=name)[0][0] >= limits[name]:
                continue
            below = 101
            while rows := self.rows("next_level", type=name, below=below):
                soonest.append(rows[0]["next_run_at"])
                below = rows[0]["priority"]
        soonest += [row[0] for row in self.rows("next_end") if row[0] is not None]
        return (_time(min(soonest)) - self._now).total_seconds() if soonest else None

    def see_worker(self, types: Sequence[str], versions: Sequence[tuple[str, str]]) -> None:
        for name in types:
            self.change("see_worker", type=name)
        for name, fingerprint in versions:
            self.change("see_version", type=name, fingerprint=fingerprint)

    def announce_waits_ended(self, waits: str) -> None:
        self._events.append((WAITS_ENDED, uuid.UUID(int=0).hex, waits, 0))

    def _add_event(self, name: str, row: Any) -> None:
        self._events.append((name, row["id"], row["type"], row["attempt"]))


def _dict(row: sqlite3.Row) -> dict[str, Any]:
    """Return a row as a dictionary: `dict(row)` looks for the value of each name by comparing it
    with all names, which takes three times as long."""
    return dict(zip(row.keys(), row, strict=True))


def _typed(row: Row) -> dict[str, Any]:
    """Return a row of a statement with converted values."""
    typed = dict(row)
    # Not the columns of the row: a job has twice as many.
    for name, convert in CONVERSIONS.items():
        if (value := typed.get(name)) is not None:
            typed[name] = convert(value)
    return typed


def time_text(time: datetime) -> str:
    """Return a time in the form in which it is stored and compared."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def _time(value: str) -> datetime:
    return datetime.fromisoformat(f"{value}+00:00")


def _document(value: Any) -> Any:
    # SQLite returns a JSON text that is a number as a number: see `_text`.
    return read_json(value) if isinstance(value, str | bytes) else value


CONVERSIONS: Final[Mapping[str, Callable[[Any], Any]]] = {
    column.name: convert
    for table in METADATA.tables.values()
    for column in table.columns
    for kind, convert in ((Uuid, uuid.UUID), (UtcTime, _time), (JSON, _document))
    if isinstance(column.type, kind)
} | {"now": _time}
"""The functions that convert the values of a column, by column name."""


def _delay(report: Report, job: Row, quickly: bool) -> float:
    """Return the delay until the job runs again: as requested, or the backoff with half jitter.

    The first quick return does not wait. Then the delay doubles, so that a job that is released
    repeatedly does not run in a tight loop.
    """
    if report.delay_seconds is not None:
        delay = report.delay_seconds
    else:
        whole = job["backoff_base_seconds"] * 2.0 ** min(job["attempt"] - 1, 40)
        delay = min(job["backoff_cap_seconds"], whole) * random.uniform(0.5, 1.0)
    if quickly and job["quick_returns"] > 0:
        delay = max(delay, min(60.0, 2.0 ** min(job["quick_returns"] - 1, 6)))
    return delay


_PROBE: Final = NewJob(
    id=uuid.UUID(int=0),
    type="readiness",
    fingerprint="",
    payload=b"{}",
    priority=0,
    max_attempts=1,
    timeout_seconds=1,
    backoff_base_seconds=1.0,
    backoff_cap_seconds=1.0,
    next_run_at=None,
    idempotency_key=None,
    created_by=None,
)
"""The job that `check_writes` inserts and rolls back."""


def _values(job: NewJob, now: str) -> tuple[Any, ...]:
    """Return the values of `insert`, in the order of `_INSERTED`."""
    return (
        job.id.hex,
        job.type,
        job.fingerprint,
        job.payload.decode(),
        job.priority,
        job.max_attempts,
        job.timeout_seconds,
        job.backoff_base_seconds,
        job.backoff_cap_seconds,
        time_text(job.next_run_at) if job.next_run_at else None,
        job.idempotency_key,
        job.created_by,
        job.traceparent,
        now,
    )


_INSERTED: Final = (*NewJob._fields[:-1], "now")

_ROW: Final = SQL["insert"].partition("VALUES")[2].partition("ON CONFLICT")[0].strip()
_row_of: Final = itemgetter(*(_INSERTED.index(name) for name in re.findall(r":(\w+)", _ROW)))
"""Returns the values of one row of `_INSERTS`, from those of `insert`."""

_INSERTS: Final = {
    rows: SQL["insert"].replace(_ROW, ", ".join([re.sub(r":\w+", "?", _ROW)] * rows))
    for rows in (64, 32, 16, 8, 4, 2, 1)
}
"""`insert` for so many rows, without names. With a statement for each row, a row takes twice the
CPU, and SQLite gives up Python's interpreter lock for each. To bind by name takes longer, too."""


def _stored(job: NewJob, now: datetime) -> Stored:
    return Stored(now, job.next_run_at or now)


def _text(document: bytes | None) -> str | bytes | None:
    """Return a document as SQLite stores it unchanged.

    The type of the columns makes numbers of texts: an integer of 1.0, and fifteen exact digits of
    others. Bytes stay as they are. The statement `succeed` does the same.
    """
    if document is None or _FLOAT.match(document):
        return document
    return document.decode()


_FLOAT: Final = re.compile(rb"-?[0-9]+[.e]")
