"""The operations of the queue on PostgreSQL, each one statement in autocommit.

The statements are in `statements/postgresql.sql`. Those that change jobs call functions that the
migrations create; see `alembic/versions/0002_claims.sql`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

from sqlalchemy import BigInteger, Connection, cast, func, insert, select, text
from sqlalchemy.dialects.postgresql import REGCLASS
from sqlalchemy.ext.asyncio import AsyncConnection

from job_registry_api.queue.database import quoted, statement
from job_registry_api.queue.driver_errors import GRANT
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.filters import JSON_VALUES, LAST_ID, Sample
from job_registry_api.queue.models import (
    METADATA,
    AttemptOutcome,
    Job,
    JobAttempt,
    JobRecord,
    JobStatus,
    Owner,
)
from job_registry_api.queue.postgresql_database import PostgreSQLDatabase
from job_registry_api.queue.store import (
    CLOCK_SLACK_SECONDS,
    COUNTS_FOLDED,
    EVENT_BATCHES_PRUNED,
    EVENTS_KEPT_SECONDS,
    LOST,
    RECOVERY_BATCH,
    UNREPORTED_TIMEOUT,
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
    json_text,
    message_of,
    owner_values,
    refuses,
    statements,
    stored_before,
)

SLOW_LOOK_SECONDS: Final = 0.05
"""A claim that takes this much longer than expected for its jobs is reading dead rows."""

SLOW_LOOKS: Final = 3
SECONDS_PER_JOB: Final = 0.002
LOOK_SHARE: Final = 0.05
LONGEST_FAST_SECONDS: Final = 2.0

DUE_BATCH: Final = 1_000
"""Jobs per transaction that are made due after the clock of the database has stepped back."""

MAX_NOTIFIED: Final = 7_900
"""The most bytes of events in a notification, as in `job_announce`."""

MAX_SENT_BYTES: Final = 65_536
"""About how many bytes of documents a statement that locks jobs returns. A connection has buffers
for these, and for the other columns of a hundred jobs. Otherwise the locks would be held until the
answer is read, and a client that has frozen or gone does not read it."""


class PostgreSQLStore(Store):
    """The operations on PostgreSQL."""

    _database: PostgreSQLDatabase

    def __init__(self, database: PostgreSQLDatabase, process: str) -> None:
        self._database = database
        self._sql = _statements(database.schema)
        self.process = process
        self._heads = QueueHeads()
        self._clock = ClockWatch()

    @property
    def _sender(self) -> dict[str, Any]:
        """The parameters of a statement that announces events."""
        return {"process": self.process, "keep": self._database.keeps_events}

    async def insert(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        rows = await self._run("insert", {"jobs": _new_jobs(jobs), "wait": False})
        stored = _stored(rows)
        if keyed := _keyed(jobs, stored):
            try:
                stored |= await self.holders(keyed)
            except QueueUnavailable:
                # The new jobs are committed. The others are tried again.
                if not stored:
                    raise
        return stored

    async def insert_unkeyed(self, jobs: Sequence[NewJob], sender: str) -> list[Stored]:
        ids = [job.id.hex for job in jobs]
        events = [
            ("job.created", job_id, job.type, 0) for job_id, job in zip(ids, jobs, strict=True)
        ]
        message = message_of(sender, events)
        places: dict[tuple[Any, ...], int] = {}
        kinds = [places.setdefault(_kind_of(job), len(places) + 1) for job in jobs]
        columns = dict(zip(_KIND, map(list, zip(*places, strict=True)), strict=True))
        times = [job.next_run_at and job.next_run_at.isoformat() for job in jobs]
        (row,) = await self._run(
            "insert_unkeyed",
            {
                "ids": _array(ids),
                "payloads": [job.payload.decode() for job in jobs],
                "times": times,
                "kinds": _array(kinds),
                **{
                    name: values if name in _TEXTS else _array(values)
                    for name, values in columns.items()
                },
                "message": message,
                "is_batch": self._database.keeps_events or len(message.encode()) > MAX_NOTIFIED,
                "channel": self._database.schema,
                "process": sender,
            },
        )
        now = row["now"]
        return [Stored(now, job.next_run_at or now) for job in jobs]

    async def holders(self, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        return _holders(await self._read("holders", _wanted(jobs)))

    async def insert_all(self, jobs: Sequence[NewJob]) -> tuple[dict[uuid.UUID, Stored], bool]:
        async def insert_all(connection: AsyncConnection) -> dict[uuid.UUID, Stored]:
            return await self._insert_or_refuse(connection, jobs, wait=True)

        try:
            return await self._database.retrying(insert_all), True
        except Refused as refused:
            return refused.stored, False

    async def complete_and_insert(
        self,
        report: Report,
        jobs: Sequence[NewJob],
    ) -> tuple[JobRecord | None, dict[uuid.UUID, Stored]]:
        async def complete(
            connection: AsyncConnection,
        ) -> tuple[Mapping[str, Any], dict[uuid.UUID, Stored]]:
            parameters = {"reports": _reports([report]), **self._sender}
            result = await connection.execute(statement(self._sql["end"]), parameters)
            rows = [dict(row) for row in result.mappings()]
            if not rows:
                raise Refused({})
            # Without waiting for keys: meanwhile the lease of the locked job could not be renewed.
            return rows[0], await self._insert_or_refuse(connection, jobs, wait=False)

        try:
            row, stored = await self._database.retrying(complete)
        except Refused as refused:
            return None, refused.stored
        ended = await self._jobs([row])
        return (ended[0] if ended else None), stored

    async def _insert_or_refuse(
        self,
        connection: AsyncConnection,
        jobs: Sequence[NewJob],
        *,
        wait: bool,
    ) -> dict[uuid.UUID, Stored]:
        stored = await connection.run_sync(lambda opened: self._insert(opened, jobs, wait))
        if keyed := _keyed(jobs, stored):
            result = await connection.execute(statement(self._sql["holders"]), _wanted(keyed))
            stored |= _holders([dict(row) for row in result.mappings()])
        if any(job.id not in stored or refuses(job, stored[job.id]) for job in jobs):
            raise Refused(stored)
        return stored

    def insert_within(
        self, connection: Connection, jobs: Sequence[NewJob]
    ) -> dict[uuid.UUID, Stored]:
        stored = self._insert(connection, jobs, wait=True)
        keyed = _keyed(jobs, stored)
        keys = {(job.type, job.idempotency_key or ""): job for job in keyed}
        holders = self.find_by_key_within(connection, keys) if keys else {}
        for job in keyed:
            if (holder := holders.get((job.type, job.idempotency_key or ""))) is not None:
                stored[job.id] = stored_before(holder, job)
        return stored

    def _insert(
        self, connection: Connection, jobs: Sequence[NewJob], wait: bool
    ) -> dict[uuid.UUID, Stored]:
        parameters = {"jobs": _new_jobs(jobs), "wait": wait, **self._sender}
        return _stored(self._execute_within(connection, "insert", parameters))

    async def claim(self, claim: Claim) -> Claimed:
        claimed = await self._look(claim, *self._heads.known(time.monotonic()))
        if not claim.thorough or claimed.leased or claimed.everything:
            return claimed
        whole = await self._look(claim, None, None)
        if not claimed.recovered:
            return whole
        return replace(whole, recovered=[*claimed.recovered, *whole.recovered], sender=None)

    async def _look(
        self, claim: Claim, heads: Mapping[str, Any] | None, look_back: float | None
    ) -> Claimed:
        started = time.monotonic()
        rows = await self._run("claim", _claimed_by(claim, heads, look_back, self.process))
        if heads is None:
            self._heads.record_full_claim(started, time.monotonic(), len(rows))
        return await self._claimed(claim, rows, everything=heads is None)

    async def succeed(self, reports: Sequence[Report], sender: str) -> dict[uuid.UUID, Ended]:
        parameters = {"reports": _successes(reports), "process": sender}
        return self._ended(await self._run("succeed", parameters))

    async def succeed_and_claim(
        self, reports: Sequence[Report], sender: str, claim: Claim
    ) -> tuple[dict[uuid.UUID, Ended], Claimed]:
        started = time.monotonic()
        heads, look_back = self._heads.known(started)
        # A claim that waits for another one, of a type with a limit, would delay the reports.
        parameters = _claimed_by(claim, heads, look_back, self.process, waits=False)
        parameters |= {"reports": _successes(reports), "reporter": sender}
        rows = await self._run("succeed_and_claim", parameters)
        if heads is None:
            self._heads.record_full_claim(started, time.monotonic(), len(rows))
        ended = self._ended([row for row in rows if row["is_report"]])
        claimed = Claimed([], [], everything=False)
        # The reports are committed. Without the jobs, whose leases are released, they still count.
        with suppress(QueueUnavailable):
            rows = [row for row in rows if not row["is_report"]]
            claimed = await self._claimed(claim, rows, everything=heads is None)
        return ended, claimed

    async def _claimed(
        self, claim: Claim, rows: Sequence[Mapping[str, Any]], *, everything: bool
    ) -> Claimed:
        """Return the outcome of a claim that has returned these rows."""
        taken = [row for row in rows if row["status"] == "running"]
        try:
            ended = [row for row in rows if row["status"] != "running"]
            recovered = await self._recovered(ended) if ended else []
            jobs = {job.id: job for job in await self._jobs(taken)}
        except BaseException:
            # The claim is committed, and its caller does not get the leases.
            with suppress(QueueUnavailable):
                await self._release(taken)
            raise
        leased = [
            ClaimedJob(
                job=jobs[row["id"]],
                token=row["lease_token"],
                expires_at=row["lease_expires_at"],
                deadline_at=row["deadline_at"],
                traceparent=row["traceparent"],
            )
            for row in taken
            if row["id"] in jobs
        ]
        for row in taken:
            self._heads.record_taken(row["type"], row["priority"], row["next_run_at"])
        # Jobs whose attempts it ended have a message of their own, with the same sender.
        sender = claim.sender if len(leased) == len(rows) else None
        return Claimed(leased, recovered, everything, sender)

    async def _release(self, taken: Sequence[Mapping[str, Any]]) -> None:
        """Release leases that no caller gets. If that fails, the leases expire."""
        returned = [
            Report(row["id"], row["lease_token"], AttemptOutcome.RELEASED, delay_seconds=0.0)
            for row in taken
        ]
        if returned:
            await self.end(returned)

    async def recover(self, lease_seconds: float) -> list[Recovered]:
        parameters = {
            "most": RECOVERY_BATCH,
            "lease": lease_seconds,
            "timed_out": error_text(UNREPORTED_TIMEOUT),
            "lost": error_text(LOST),
        }
        recovered = await self._recovered(await self._run("recover", parameters))
        # The leases are ended. If this fails, it is done the next time.
        with suppress(QueueUnavailable):
            await self._correct_for_clock()
        return recovered

    async def _correct_for_clock(self) -> None:
        """Make jobs due that were due at once, if the clock of the database has stepped back.

        Otherwise they would wait until the clock has caught up.
        """
        asked = time.monotonic()
        now = await self.now()
        self._clock.note(asked, time.monotonic(), now)
        parameters: dict[str, Any] = {
            "slack": CLOCK_SLACK_SECONDS,
            "jobs": DUE_BATCH,
            "below": LAST_ID,
        }
        while self._clock.has_stepped_back:
            changed = await self._run("set_due", parameters, in_order=True)
            self._clock.has_stepped_back = len(changed) == DUE_BATCH
            parameters["below"] = min((row["id"] for row in changed), default=LAST_ID)

    async def _recovered(self, rows: Sequence[Mapping[str, Any]]) -> list[Recovered]:
        traceparents = {row["id"]: row["traceparent"] for row in rows}
        return [Recovered(job, traceparents[job.id]) for job in await self._jobs(rows)]

    async def end(self, reports: Sequence[Report]) -> dict[uuid.UUID, Ended]:
        parks = [report for report in reports if report.parked_for is not None]
        unread = [report for report in reports if not report.reads_job]
        others = [r for r in reports if r.reads_job and r.parked_for is None]
        ended: dict[uuid.UUID, Ended] = {}
        try:
            if unread:
                ended = await self.succeed(unread, self.process)
            if others:
                ended |= await self._ended_by("end", {"reports": _reports(others)})
            if parks:
                ended |= await self._ended_by("park", {"parks": _parks(parks)})
        except QueueUnavailable:
            # These are committed. The caller reports the others again.
            if not ended:
                raise
        return ended

    async def _ended_by(self, name: str, parameters: Mapping[str, Any]) -> dict[uuid.UUID, Ended]:
        rows = await self._run(name, parameters)
        ended = self._ended(rows)
        # They are committed. If large documents cannot be read now, the caller reads these jobs.
        with suppress(QueueUnavailable):
            ended |= {job.id: Ended.of(job) for job in await self._jobs(rows)}
        return ended

    def _ended(self, rows: Sequence[Mapping[str, Any]]) -> dict[uuid.UUID, Ended]:
        """Return the jobs of rows without reading more of them."""
        return {row["id"]: self.ended(row) for row in rows}

    async def renew(
        self, renewals: Sequence[LeaseRenewal], lease_seconds: float
    ) -> dict[tuple[uuid.UUID, str], Renewed | None]:
        requested = [
            {
                "id": renewal.job_id.hex,
                "token": renewal.token,
                "progress": renewal.progress.decode() if renewal.progress is not None else None,
            }
            for renewal in renewals
        ]
        rows = await self._run("renew", {"renewals": json_text(requested), "lease": lease_seconds})
        return {
            (row["job_id"], row["token"]): None
            if row["state"] == "lost"
            else Renewed(
                row["expires_at"],
                float(row["seconds_left"]),
                row["cancel_requested"],
                renewed=row["state"] == "renewed",
            )
            for row in rows
        }

    async def store_logs(self, logs: Sequence[LeaseLogs]) -> None:
        kept = [{"id": e.job_id.hex, "token": e.token, "lines": e.lines.decode()} for e in logs]
        await self._run("store_logs", {"kept": json_text(kept)})

    async def settle(self, leases: Sequence[tuple[uuid.UUID, str]]) -> None:
        ended = json_text([{"id": job_id.hex, "token": token} for job_id, token in leases])
        await self._run("settle", {"ended": ended})

    async def cancel(self, job_id: uuid.UUID, owner: Owner | None = None) -> Ended | None:
        parameters = {"id": job_id.hex, **owner_values(owner)}
        return (await self._ended_by("cancel", parameters)).get(job_id)

    async def retry(self, job_id: uuid.UUID, owner: Owner | None = None) -> Ended | None:
        parameters = {"id": job_id.hex, **owner_values(owner)}
        return (await self._ended_by("retry", parameters)).get(job_id)

    async def next_due(self, types: Sequence[str], limits: Mapping[str, int]) -> float | None:
        wanted = json_text([{"type": name, "limit": limits.get(name)} for name in types])
        (row,) = await self._read("next_due", {"wanted": wanted})
        seconds = next(iter(row.values()))
        return None if seconds is None else float(seconds)

    async def see_worker(
        self, types: Sequence[str], versions: Sequence[tuple[str, str]] = ()
    ) -> None:
        seen = [{"type": name, "fingerprint": value} for name, value in versions]
        await self._run("see_worker", {"types": json_text(types), "versions": json_text(seen)})

    async def unpark(
        self, types: Sequence[str], *, parked_until: datetime, jobs: int
    ) -> list[JobRecord]:
        parameters = {
            "types": json_text(sorted(types)),
            "parked_until": parked_until,
            "most": jobs,
        }
        return await self._jobs(await self._run("unpark", parameters))

    async def fail_parked(self, *, older_than_seconds: float, jobs: int) -> list[JobRecord]:
        parameters = {"older_than": older_than_seconds, "most": jobs}
        return await self._jobs(await self._run("fail_parked", parameters))

    async def prune_versions(self, *, keep_seconds: float) -> None:
        await self._run("prune_versions", {"keep_seconds": keep_seconds})

    async def announce_waits_ended(self, waits: str) -> None:
        await self._run("announce_waits_ended", {"waits": waits})

    async def prune(self, status: JobStatus, *, keep_seconds: float, jobs: int) -> int:
        parameters = {"status": str(status), "keep_seconds": keep_seconds, "jobs": jobs}
        (row,) = await self._run("prune", parameters, in_order=True)
        return int(next(iter(row.values())))

    async def fold_counts(self) -> int:
        (row,) = await self._run("fold_counts", {"rows": COUNTS_FOLDED})
        return int(next(iter(row.values())))

    async def prune_events(self) -> int:
        parameters = {"keep_seconds": EVENTS_KEPT_SECONDS, "batches": EVENT_BATCHES_PRUNED}
        return int(next(iter((await self._run("prune_events", parameters))[0].values())))

    async def check_writes(self, *, timeout_seconds: float) -> None:
        async def check(connection: AsyncConnection) -> None:
            await connection.exec_driver_sql("SAVEPOINT readiness")
            await _insert_probe(connection)
            await connection.exec_driver_sql("ROLLBACK TO SAVEPOINT readiness")
            tables = [f"{quoted(self._database.schema)}.{name}" for name in METADATA.tables]
            rows = await connection.execute(_MISSING_GRANTS, {"tables": tables})
            if missing := ", ".join(row.missing for row in rows):
                reason = f"the role lacks {missing}. {GRANT}"
                raise QueueUnavailable(reason, "permission_denied")

        await self._database.retrying(check, timeout_seconds=timeout_seconds)

    async def _sample(self, blocks: int) -> Sample:
        name = f"{quoted(self._database.schema)}.job"
        size = func.pg_relation_size(cast(name, REGCLASS)) / cast(
            func.current_setting("block_size"), BigInteger
        )
        (row,) = await self._select(select(size.label("blocks")))
        percent = min(100.0, 100.0 * blocks / max(1, int(row["blocks"])))
        return Sample(METADATA.tables["job"].tablesample(func.system(percent)))

    async def _run(
        self, name: str, parameters: Mapping[str, Any], *, in_order: bool = False
    ) -> Sequence[Mapping[str, Any]]:
        """Run a statement that changes something. For `in_order`, see `Database.reading`."""
        sql = self._sql[name]
        sender = self._sender if ":process" in sql else {}
        values = {**sender, **parameters}
        return await self._database.execute_at_once(sql, values, in_order=in_order)

    async def _read(
        self, name: str, parameters: Mapping[str, Any], *, in_order: bool = False
    ) -> Sequence[Mapping[str, Any]]:
        sql = self._sql[name]
        return await self._database.execute_at_once(sql, parameters, in_order=in_order)

    def _execute_within(
        self, connection: Connection, name: str, parameters: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Any]]:
        result = connection.execute(statement(self._sql[name]), parameters)
        return [dict(row) for row in result.mappings()]

    async def _jobs(self, rows: Sequence[Mapping[str, Any]]) -> list[JobRecord]:
        """Return the jobs of rows in which large documents may be missing."""
        narrow = {row["id"] for row in rows if row["payload"] is None}
        whole = await self.get_many(narrow) if narrow else {}
        jobs = []
        for row in rows:
            job = self.record(row)
            if job.id in narrow:
                if job.id not in whole:
                    # It was deleted in the meantime.
                    continue
                # Only the documents: by now another worker may have the job.
                complete = whole[job.id]
                job = job._replace(
                    payload=complete.payload,
                    progress=complete.progress,
                    result=complete.result,
                    error=complete.error,
                )
            jobs.append(job)
        return jobs


class QueueHeads:
    """The time of the oldest queued job per type and priority, as this process has seen it.

    PostgreSQL cannot remove the index entries of finished jobs while an older transaction may still
    read them, and every claim has to skip them: 100 ms per claim for 50,000 jobs that finished
    during a long transaction. When three full claims in a row are slow, full claims take at most a
    twentieth of the time, and run at least every two seconds. Claims in between start where the
    last claim took its jobs. The next full claim finds the jobs that they miss: a job whose
    transaction took long to commit, or a new priority.
    """

    def __init__(self) -> None:
        self._heads: dict[str, dict[int, datetime]] = {}
        self._full_look_at = 0.0
        self._looked_at = 0.0
        self._slow_looks = 0

    def known(self, now: float) -> tuple[dict[str, list[tuple[int, str]]] | None, float | None]:
        """Return where a claim may start, and how many seconds to look back for lost leases.

        None means a full claim.
        """
        if now >= self._full_look_at:
            return None, None
        heads = {
            name: [(priority, at.isoformat()) for priority, at in levels.items()]
            for name, levels in self._heads.items()
        }
        return heads, now - self._looked_at + 1.0

    def record_taken(self, name: str, priority: int, due_at: datetime) -> None:
        """Record that a job was claimed, and so were the earlier jobs of its priority."""
        levels = self._heads.setdefault(name, {})
        levels[priority] = max(due_at, levels.get(priority, _EARLIEST))

    def record_full_claim(self, started: float, ended: float, rows: int) -> None:
        """Record how long a full claim took."""
        took = ended - started
        self._looked_at = started
        slow = took - rows * SECONDS_PER_JOB > SLOW_LOOK_SECONDS
        self._slow_looks = self._slow_looks + 1 if slow else 0
        if self._slow_looks >= SLOW_LOOKS and rows < RECOVERY_BATCH:
            self._full_look_at = ended + min(LONGEST_FAST_SECONDS, took / LOOK_SHARE)


class ClockWatch:
    """Detects, by the clock of this process, that the clock of the database has stepped back, or
    that a server whose clock is behind has taken its place."""

    def __init__(self) -> None:
        self.has_stepped_back = False
        self._least: float | None = None
        """The clock of the database is ahead of this process's by at least these seconds."""

    def note(self, asked: float, answered: float, now: datetime) -> None:
        """Note the time of the database at a moment between two times of this process's clock."""
        most = now.timestamp() - asked
        if self._least is not None and most < self._least - CLOCK_SLACK_SECONDS:
            self.has_stepped_back = True
        self._least = now.timestamp() - answered


async def _insert_probe(connection: AsyncConnection) -> None:
    """Insert a job with an attempt.

    The job is finished. The dead index entry of a queued one would slow claims down until the next
    vacuum.
    """
    job_id, now = uuid.uuid4(), datetime.now(UTC)
    await connection.execute(
        insert(Job).values(
            id=job_id,
            type="readiness",
            fingerprint="",
            status=JobStatus.CANCELLED.value,
            payload={},
            priority=0,
            attempt=0,
            max_attempts=1,
            timeout_seconds=1,
            backoff_base_seconds=1.0,
            backoff_cap_seconds=1.0,
            created_at=now,
            finished_at=now,
        )
    )
    await connection.execute(
        insert(JobAttempt).values(job_id=job_id, attempt=1, worker_id="readiness", started_at=now)
    )


_MISSING_GRANTS: Final = text(
    """
    SELECT privilege || ' on table ' || name AS missing
    FROM unnest(CAST(:tables AS text[])) AS name,
         unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
    WHERE NOT has_table_privilege(to_regclass(name), privilege)
    UNION ALL
    SELECT 'USAGE on sequence ' || sequence
    FROM unnest(CAST(:tables AS text[])) AS name
    JOIN pg_attribute ON attrelid = to_regclass(name) AND attnum > 0 AND NOT attisdropped
        AND attidentity = ''
    CROSS JOIN LATERAL pg_get_serial_sequence(name, attname) AS sequence
    WHERE NOT has_sequence_privilege(sequence, 'USAGE')
    """
)


_EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)


@lru_cache
def _statements(schema: str) -> Mapping[str, str]:
    """Return the statements of a schema by name, those that lock jobs with few documents."""
    sql = statements("postgresql", schema)
    bounded = {name: _with_few_documents(sql[name]) for name in _RETURN_JOBS}
    bounded["succeed_and_claim"] = _with_few_documents(sql["succeed_and_claim"], "is_report")
    return {**sql, **bounded}


def _with_few_documents(sql: str, *others: str) -> str:
    """Return a statement without the documents beyond `MAX_SENT_BYTES`. `_jobs` reads them then.

    `job_small` has left out the large ones. A compressed value is larger when it is sent.
    """
    columns = [name for name in JobRecord._fields if name not in JSON_VALUES]
    columns += ["lease_token", "lease_expires_at", "deadline_at", "traceparent", *others]
    columns += [f"CASE WHEN bytes <= {MAX_SENT_BYTES} THEN {e} END AS {e}" for e in JSON_VALUES]
    size = " + ".join(
        f"CASE WHEN {each} IS NULL THEN 0 WHEN pg_column_compression({each}) IS NULL"
        f" THEN pg_column_size({each}) ELSE 8192 END"
        for each in JSON_VALUES
    )
    return (
        f"SELECT {', '.join(columns)} FROM ("
        f"SELECT *, sum({size}) OVER (ROWS UNBOUNDED PRECEDING) AS bytes FROM ({sql}) AS changed"
        ") AS sized"
    )


_RETURN_JOBS: Final = ("claim", "recover", "end", "park", "unpark", "fail_parked")


_KIND: Final = (
    "type",
    "fingerprint",
    "priority",
    "max_attempts",
    "timeout_seconds",
    "backoff_base_seconds",
    "backoff_cap_seconds",
    "created_by",
    "traceparent",
)
"""What many jobs of a bulk have in common."""

_TEXTS: Final = frozenset({"type", "fingerprint", "created_by", "traceparent"})

_kind_of: Callable[[NewJob], tuple[Any, ...]] = attrgetter(*_KIND)


def _array(values: Iterable[object]) -> str:
    """Return an array of PostgreSQL as text. No value is null or needs quotes."""
    return "{" + ",".join(map(str, values)) + "}"


def _new_jobs(jobs: Sequence[NewJob]) -> str:
    return json_text(
        [
            {
                **job._asdict(),
                "id": job.id.hex,
                "payload": job.payload.decode(),
                "next_run_at": job.next_run_at and job.next_run_at.isoformat(),
            }
            for job in jobs
        ]
    )


def _claimed_by(
    claim: Claim,
    heads: Mapping[str, Any] | None,
    look_back: float | None,
    process: str,
    *,
    waits: bool = True,
) -> dict[str, Any]:
    """Return the parameters of a claim of this process."""
    wanted = [
        {
            "type": stored,
            "limit": claim.limits.get(name),
            "heads": None if heads is None else heads.get(stored),
            "group": group,
            "fingerprint": claim.fingerprints.get(name),
            "readable": claim.readable.get(name),
            "waits": waits,
        }
        for group, name, stored in claim.lanes()
    ]
    return {
        "wanted": json_text(wanted),
        "most": claim.jobs,
        "worker": claim.worker_id,
        "lease": claim.lease_seconds,
        "look_back": look_back,
        "timed_out": error_text(UNREPORTED_TIMEOUT),
        "lost": error_text(LOST),
        "process": claim.sender or process,
    }


def _reports(reports: Sequence[Report]) -> str:
    return json_text(
        [
            {
                "id": report.job_id.hex,
                "token": report.token,
                "outcome": report.outcome,
                "retryable": report.retryable,
                "spend": report.spend,
                "delay_seconds": report.delay_seconds,
                "result": report.result.decode() if report.result is not None else None,
                "error": error_text(report.error),
                "still_running": report.still_running,
            }
            for report in reports
        ]
    )


def _successes(reports: Sequence[Report]) -> str:
    """Return the reports of success for `job_succeed`, which reads nothing else of them."""
    return json_text([_success(report) for report in reports])


def _success(report: Report) -> dict[str, str]:
    success = {"id": report.job_id.hex, "token": report.token}
    if report.result is not None:
        success["result"] = report.result.decode()
    if report.logs is not None:
        success["logs"] = report.logs.decode()
    return success


def _parks(reports: Sequence[Report]) -> str:
    return json_text(
        [
            {
                "id": report.job_id.hex,
                "token": report.token,
                "fingerprint": report.parked_for,
                "error": error_text(report.error),
            }
            for report in reports
        ]
    )


def _stored(rows: Sequence[Mapping[str, Any]]) -> dict[uuid.UUID, Stored]:
    return {row["id"]: Stored(row["created_at"], row["next_run_at"]) for row in rows}


def _keyed(jobs: Sequence[NewJob], stored: Mapping[uuid.UUID, Stored]) -> list[NewJob]:
    """Return the jobs that were not stored, because others have their keys."""
    return [job for job in jobs if job.id not in stored and job.idempotency_key is not None]


def _wanted(jobs: Sequence[NewJob]) -> dict[str, str]:
    wanted = [
        {
            "new_id": job.id.hex,
            "type": job.type,
            "key": job.idempotency_key,
            "payload": job.payload.decode(),
        }
        for job in jobs
    ]
    return {"wanted": json_text(wanted)}


def _holders(rows: Sequence[Mapping[str, Any]]) -> dict[uuid.UUID, Stored]:
    return {
        row["new_id"]: Stored(
            row["created_at"], row["created_at"], JobRecord.of(row), row["is_same"]
        )
        for row in rows
    }
