"""Leasing: lease jobs, renew leases, and end attempts with the outcome that workers report."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog
from pydantic import JsonValue
from pydantic_core import from_json

from job_registry import JobRegistry, Violation
from job_registry.errors import FaultBudget, shortened
from job_registry.json_values import json_document
from job_registry_api.metrics import Metrics
from job_registry_api.queue.claiming import BusyWorker, Claiming, Lease, Readable, waits_of
from job_registry_api.queue.database import Database
from job_registry_api.queue.enqueueing import created_events, held_under_former_names
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    InputInvalid,
    LeaseLost,
    QueueUnavailable,
    reason_of,
)
from job_registry_api.queue.events import Events, JobEvent
from job_registry_api.queue.group_commit import GroupCommit
from job_registry_api.queue.job_logs import LogLine, text_of_lines
from job_registry_api.queue.models import AttemptOutcome, JobError, JobRecord, JobStatus
from job_registry_api.queue.requests import (
    check_error_code,
    check_lease,
    check_seconds,
    check_worker_id,
    differing_paths,
)
from job_registry_api.queue.store import (
    TIMED_OUT,
    Ended,
    LeaseLogs,
    LeaseRenewal,
    LeaseState,
    NewJob,
    Renewed,
    Report,
    Store,
    present,
    timed_out,
)

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

ANSWER_MARGIN_SECONDS: Final = 1.0
"""How much longer than its deadlines the answer to a claim may take to reach the worker."""

REPORTS_AT_ONCE: Final = 50
"""How many attempts one statement ends. While it runs, a worker runs the jobs of the one before."""

log = structlog.get_logger("job_registry.leasing")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A renewed lease: when it expires, how long the attempt may still run, whether to stop."""

    job: JobRecord
    expires_at: datetime
    seconds_left: float
    cancel_requested: bool
    seconds_to_expiry: float


class Renewal(NamedTuple):
    """A lease to renew, by its token. `progress` is JSON text; None keeps the stored progress."""

    token: str
    progress: bytes | None = None


class Leasing:
    """The part of `JobQueue` that workers use."""

    registry: JobRegistry
    events: Events
    lease_seconds: float
    metrics: Metrics
    tracing: Tracing | None
    _database: Database
    _store: Store

    def __init__(self) -> None:
        self._reports = GroupCommit(self._end, max_items=REPORTS_AT_ONCE)
        self._claiming = Claiming(
            self._store,
            self.registry,
            self.events,
            lease_seconds=self.lease_seconds,
            give_back=self._give_back,
            metrics=self.metrics,
            tracing=self.tracing,
        )

    async def lease(
        self,
        job_types: Sequence[str],
        worker_id: str,
        *,
        limit: int = 1,
        wait_seconds: float = 0.0,
        stop: asyncio.Event | None = None,
        readable: Mapping[str, Collection[str]] | None = None,
        budget: FaultBudget | None = None,
        subject: str | None = None,
    ) -> list[Lease]:
        """Lease up to `limit` due jobs of these types; wait up to `wait_seconds` for the first.

        The wait ends when `stop` is set or the call is cancelled. Jobs that are leased for a
        cancelled call are released. A type can be named by a former name.

        Without `readable` the job types of this process read the payloads: jobs that workers with
        another fingerprint have parked are leased too. With it somebody else reads them: of the
        types that it has, only jobs that were admitted under one of the fingerprints are leased,
        parked or not; of other types all jobs that are not parked.

        Fewer jobs are leased once their payloads have a megabyte of JSON text together.

        Waiting holds no database connection. Attempts of any worker whose lease has expired are
        ended first. Suggestions of names are charged to the `budget` of the caller's request.
        `subject` is whose call it is: see `stop_waiting`.

        Raises:
            InputInvalid: a type is not registered, `limit` is not 1 to 100, `wait_seconds` is not
                0 to 30, or `worker_id` does not have 1 to 255 characters.
        """
        check_lease(
            self.registry, job_types, worker_id, limit, wait_seconds, readable or {}, budget
        )
        names = [self.registry.get_type(name).name for name in job_types]
        reads: Readable | None = None
        if readable is not None:
            reads = {
                self.registry.get_type(name).name: tuple(sorted(set(fingerprints)))
                for name, fingerprints in readable.items()
            }
        return await self._claiming.lease(
            tuple(dict.fromkeys(names)),
            worker_id,
            limit=limit,
            wait_seconds=wait_seconds,
            stop=stop,
            readable=reads,
            subject=subject,
        )

    def leasing_with_reports(self, worker: BusyWorker) -> AbstractContextManager[None]:
        """Lease jobs for this worker together with reports of success, while the context is open.

        A report and the next lease then take one round trip and one commit. A worker that has free
        slots calls `lease`, which waits for jobs.
        """
        return self._claiming.busy(worker)

    async def release_unanswered(self, worker_id: str, runs: Callable[[uuid.UUID], bool]) -> None:
        """Release the jobs that a worker leased without learning of it, unspent.

        When the database does not answer a claim in time, it may have made it, or make it once it
        goes on. Nobody runs these jobs; at the end of their leases their attempts would be spent.
        `runs` returns whether the worker runs a job. The answer to a claim, with the reading of
        large jobs, takes at most twice the timeout of the database, so younger leases are left, and
        all of them while a claim takes longer: its process was frozen, and its answer is there.

        It reads the database only for a while after a claim has failed, so it can be called often.
        The name must be that of one worker alone.

        Raises:
            QueueUnavailable: the database is still away.
        """
        longest = 2 * self._database.timeout_seconds + ANSWER_MARGIN_SECONDS
        since = time.monotonic() - self._claiming.failed_at
        if longest >= self.lease_seconds or since > longest + self.lease_seconds:
            return
        if self._claiming.has_waited(longest):
            return
        found = await self._store.unanswered(worker_id, seconds=longest)
        released = 0
        for job_id, secret in found:
            if not runs(job_id):
                with suppress(LeaseLost):
                    await self.release(job_id.hex + secret)
                    released += 1
        if released:
            log.warning("leases.unanswered", jobs=released, worker_id=worker_id)

    async def stop_waiting(self, worker_id: str, *, subject: str | None = None) -> None:
        """End the waits of a worker's `lease` calls, in every process. Later calls wait again.

        With `subject`, only those of its calls. A call whose claim is in progress returns the
        leases of that.

        Raises:
            InputInvalid: `worker_id` does not have 1 to 255 characters.
        """
        check_worker_id(worker_id)
        waits = waits_of(worker_id, subject)
        self.events.end_waits(waits)
        await self._store.announce_waits_ended(waits)

    def give_back(self, leases: Sequence[Lease]) -> None:
        """Release leases whose caller is gone, in the background. Their attempts are not spent."""
        self._claiming.give_back(leases)

    async def show_worker(self, types: Sequence[str]) -> None:
        """Record that a worker runs these types, even while it has no free slot.

        It is written at most every ten seconds. `waiting_reason` reads it.
        """
        await self._claiming.show_worker(types)

    async def leased_type(self, token: str) -> str:
        """Return the type of the job that a lease is of, whether or not it is in force.

        Raises:
            LeaseLost: there is no job of this lease.
        """
        job = await self._store.get(_parts(token)[0])
        if job is None:
            raise LeaseLost
        return job.type

    async def heartbeat(
        self, token: str, progress: JsonValue = None, logs: Sequence[LogLine] | None = None
    ) -> Heartbeat:
        """Renew a lease for another lease time, never past the attempt's deadline.

        `progress`, any JSON, is stored with the job; None keeps the stored progress. `logs` are the
        last log lines of the attempt, oldest first. They replace those that are stored; None keeps
        them.

        Raises:
            LeaseLost: the lease is no longer in force.
            InputInvalid: `progress` is not JSON, or larger than a payload may be; or there are more
                log lines, or larger ones, than are kept. The lease is then not renewed.
        """
        job_id, secret = _parts(token)
        text = None if progress is None else self._document("progress", progress)
        lines, faults = text_of_lines(logs or ())
        if faults:
            raise InputInvalid(tuple(faults))
        (renewed,) = await self._renewed([Renewal(token, text)])
        if logs is not None and isinstance(renewed, Renewed):
            await self._store.store_logs([LeaseLogs(job_id, secret, lines)])
        if isinstance(renewed, LeaseLost):
            raise renewed
        job = await self._store.get(job_id)
        if job is None:
            raise LeaseLost
        seconds_to_expiry = min(self.lease_seconds, renewed.seconds_left)
        if not renewed.renewed and job.started_at is not None:
            # The lease is as it was. Its end is known relative to the attempt's deadline alone.
            deadline = job.started_at + timedelta(seconds=job.timeout_seconds)
            seconds_to_expiry = (
                renewed.seconds_left - (deadline - renewed.expires_at).total_seconds()
            )
        # Progress that a lock kept from being stored was not announced.
        if (progress is not None and renewed.renewed) or logs is not None:
            self.events.publish([JobEvent.of("job.progressed", job)])
        return Heartbeat(
            job,
            renewed.expires_at,
            renewed.seconds_left,
            renewed.cancel_requested,
            max(0.0, seconds_to_expiry),
        )

    async def renew(self, renewals: Sequence[Renewal]) -> list[Renewed | LeaseLost]:
        """Renew leases in one statement. Return the result of each, in order.

        The result of an attempt that has timed out is `LeaseLost`. It keeps its place in the
        concurrency limit of its type.
        """
        renewed = await self._renewed(renewals)
        progressed = [
            _parts(renewal.token)[0]
            for renewal, result in zip(renewals, renewed, strict=True)
            if renewal.progress is not None and isinstance(result, Renewed) and result.renewed
        ]
        if progressed:
            # The renewal is committed and announced to other processes, whether this works or not.
            with suppress(QueueUnavailable):
                jobs = await self._store.get_many(progressed)
                self.events.publish([JobEvent.of("job.progressed", j) for j in jobs.values()])
        return renewed

    async def _renewed(self, renewals: Sequence[Renewal]) -> list[Renewed | LeaseLost]:
        keys = [_parts(renewal.token) for renewal in renewals]
        renewed = await self._store.renew(
            [
                LeaseRenewal(job_id, secret, renewal.progress)
                for (job_id, secret), renewal in zip(keys, renewals, strict=True)
            ],
            self.lease_seconds,
        )
        return [renewed.get(key) or LeaseLost() for key in keys]

    async def store_logs(self, logs: Sequence[tuple[str, bytes]]) -> None:
        """Replace the log lines of attempts, by their tokens. The lines are text of `job_logs`.

        The lease does not have to be in force. Lines of a row that another transaction has locked
        are not stored.
        """
        await self._store.store_logs([LeaseLogs(*_parts(token), lines) for token, lines in logs])

    async def settle(self, tokens: Sequence[str]) -> None:
        """Free the places of timed-out attempts whose handlers have stopped."""
        if tokens:
            await self._store.settle([_parts(token) for token in tokens])

    async def complete(
        self, token: str, result: JsonValue = None, *, follow_ups: Sequence[NewJob] = ()
    ) -> JobRecord:
        """End the attempt and the job as succeeded. A repeated call returns the same job.

        `follow_ups` are jobs of `JobQueue.admit`. They are stored in the same transaction.

        Raises:
            LeaseLost: the lease is no longer in force.
            InputInvalid: `result` is not JSON, or larger than a payload may be.
            IdempotencyConflict: the key of a job belongs to one with another payload. Then nothing
                is stored, and the lease stays in force.
        """
        job_id, secret = _parts(token)
        text = None if result is None else self._document("result", result)
        report = Report(job_id, secret, AttemptOutcome.SUCCEEDED, result=text)
        if not follow_ups:
            return await self._end_attempt(report)
        return await self._database.patiently(
            lambda: self._complete_and_insert(report, follow_ups),
            "another transaction has locked the job, or holds an idempotency key",
        )

    async def succeed(
        self,
        token: str,
        result: JsonValue = None,
        *,
        logs: bytes | None = None,
        job_id: uuid.UUID | None = None,
    ) -> None:
        """Do what `complete` does, without reading the job, which takes longer.

        `logs`, text of `job_logs`, replaces the stored log lines of the attempt; None keeps them.
        `job_id` is that of the lease's job. Without it, it is parsed from the token. Raises as
        `complete` does.
        """
        if job_id is None:
            job_id, secret = _parts(token)
        else:
            secret = token[32:]
        text = None if result is None else self._document("result", result)
        await self._report(
            Report(job_id, secret, _SUCCEEDED, result=text, reads_job=False, logs=logs)
        )

    async def _complete_and_insert(
        self, report: Report, follow_ups: Sequence[NewJob]
    ) -> JobRecord | None:
        """Return the completed job. None means that another transaction has locked something."""
        held = await held_under_former_names(self._store, self.registry, follow_ups)
        rest = [new for new in follow_ups if new.id not in held]
        job: JobRecord | None = None
        stored = held
        if not any(outcome.conflicts for outcome in held.values()):
            job, stored = await self._store.complete_and_insert(report, rest)
        if job is not None:
            self.events.publish([*created_events(rest, stored), JobEvent.of_change(job)])
            self.metrics.attempt_ended(job.type, report.outcome.value)
            return job
        for new in follow_ups:
            if (outcome := stored.get(new.id)) is not None and outcome.conflicts:
                holder = present(outcome.existing)
                existing = await self._store.get(holder.id)
                if existing is None:  # It was one of the follow-ups, or was deleted meanwhile.
                    raise IdempotencyConflict(holder, ("",))
                paths = differing_paths(existing.payload, from_json(new.payload))
                raise IdempotencyConflict(existing, paths or ("",))
        if stored:
            return None
        state = (await self._store.lease_states([report])).get(report.job_id)
        if state is not None and state.succeeded:
            return await self._store.get(report.job_id)
        if state is None or not state.in_force:
            raise LeaseLost
        return None

    async def fail(
        self,
        token: str,
        error: JobError,
        *,
        retryable: bool = True,
        retry_after_seconds: float | None = None,
        spend_attempt: bool = True,
    ) -> JobRecord:
        """End the attempt as failed. The job is queued again after its backoff, or failed.

        `retry_after_seconds`, 0 to 31,536,000, replaces the backoff. `retryable=False` fails the
        job at once. A job whose cancellation was requested is cancelled.

        Raises:
            LeaseLost: the lease is no longer in force.
            InputInvalid: a value is out of range.
        """
        job_id, secret = _parts(token)
        if retry_after_seconds is not None:
            check_seconds("retryAfterSeconds", retry_after_seconds)
        error = self._error(error)
        return await self._end_attempt(
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

    async def park(self, token: str, fingerprint: str, error: JobError) -> JobRecord:
        """Queue the job for workers with another fingerprint, because its payload cannot be read.

        The attempt is not spent. The job remembers the last 16 fingerprints that refused it. A job
        whose cancellation was requested is cancelled.

        Raises:
            LeaseLost: the lease is no longer in force.
            InputInvalid: the error is too large to store.
        """
        return await self._end_attempt(
            Report(
                *_parts(token),
                AttemptOutcome.RELEASED,
                error=self._error(error),
                parked_for=fingerprint,
            )
        )

    async def release(self, token: str) -> JobRecord:
        """Queue the job again at once. The attempt is not spent.

        A job that is released repeatedly within seconds waits longer each time.

        Raises:
            LeaseLost: the lease is no longer in force.
        """
        return await self._end_attempt(
            Report(*_parts(token), AttemptOutcome.RELEASED, delay_seconds=0.0)
        )

    async def snooze(self, token: str, seconds: float) -> JobRecord:
        """Queue the job again to run in `seconds`. The attempt is not spent.

        Raises:
            LeaseLost: the lease is no longer in force.
            InputInvalid: `seconds` is not 0 to 31,536,000.
        """
        job_id, secret = _parts(token)
        check_seconds("seconds", seconds)
        return await self._end_attempt(
            Report(job_id, secret, AttemptOutcome.SNOOZED, delay_seconds=seconds)
        )

    async def time_out(
        self, token: str, *, timeout_seconds: int | None = None, still_running: bool = False
    ) -> JobRecord:
        """End an attempt at its timeout. With `still_running` its handler has not stopped.

        The attempt then keeps its place in the concurrency limit for the length of a lease.
        `renew` extends that, and `settle` ends it. `timeout_seconds` are for the message.

        Raises:
            LeaseLost: the queue has already ended the attempt.
        """
        return await self._end_attempt(
            Report(
                *_parts(token),
                AttemptOutcome.TIMED_OUT,
                error=TIMED_OUT if timeout_seconds is None else timed_out(timeout_seconds),
                still_running=still_running,
            )
        )

    async def stop(self, token: str, error: JobError) -> JobRecord:
        """End the attempt and the job as cancelled, because its handler requested that.

        Raises:
            LeaseLost: the lease is no longer in force.
        """
        return await self._end_attempt(
            Report(*_parts(token), AttemptOutcome.CANCELLED, error=self._error(error))
        )

    async def _end_attempt(self, report: Report) -> JobRecord:
        ended = await self._report(report)
        job = ended.job or await self._store.get(ended.id)
        if job is None:  # It was deleted in the meantime.
            raise LeaseLost
        return job

    async def _report(self, report: Report) -> Ended:
        outcome: Ended | LeaseLost = await self._database.patiently_in(
            self._reports, report, "another transaction has locked the job"
        )
        if isinstance(outcome, LeaseLost):
            raise outcome
        return outcome

    async def _end(self, reports: Sequence[Report]) -> Sequence[Ended | LeaseLost | None]:
        """End attempts in one statement. None means that another transaction has locked the row."""
        ended: dict[int, Ended | LeaseLost | None] = {}
        waiting = dict(enumerate(reports))
        while waiting:
            # One report per job in a statement. Of two reports for one lease the first one counts.
            turn = {report.job_id: index for index, report in reversed(waiting.items())}
            these = [waiting.pop(index) for index in sorted(turn.values())]
            try:
                jobs, sender = await self._end_and_lease(these)
            except QueueUnavailable:
                # The reports before these are committed and answered. These are tried again.
                if not ended:
                    raise
                ended |= dict.fromkeys(turn.values())
                continue
            self.events.publish(map(JobEvent.of_change, jobs.values()), sender)
            self._count_outcomes(these, jobs)
            missing = [report for report in these if report.job_id not in jobs]
            states: dict[uuid.UUID, LeaseState] | None = {}
            try:
                states = await self._store.lease_states(missing) if missing else {}
                jobs |= await self._ended_before(missing, states)
            except QueueUnavailable:
                # The other reports are committed and answered. These are tried again.
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

    def _count_outcomes(self, reports: Sequence[Report], jobs: Mapping[uuid.UUID, Ended]) -> None:
        outcomes: Counter[tuple[str, str]] = Counter()
        for report in reports:
            if (job := jobs.get(report.job_id)) is not None:
                cancelled = job.status is JobStatus.CANCELLED
                outcome = AttemptOutcome.CANCELLED if cancelled else report.outcome
                outcomes[job.type, outcome.value] += 1
                if job.is_parked:
                    self.metrics.parked(job.type)
        for (job_type, name), attempts in outcomes.items():
            self.metrics.attempt_ended(job_type, name, attempts)

    async def _ended_before(
        self, reports: Sequence[Report], states: Mapping[uuid.UUID, LeaseState]
    ) -> dict[uuid.UUID, Ended]:
        """Return the jobs that have succeeded by an earlier call with the same report."""
        repeated = [
            report.job_id
            for report in reports
            if report.outcome is AttemptOutcome.SUCCEEDED
            and (state := states.get(report.job_id)) is not None
            and state.succeeded
        ]
        found = await self._store.get_many(repeated) if repeated else {}
        return {job.id: Ended.of(job) for job in found.values()}

    async def _end_and_lease(
        self, reports: Sequence[Report]
    ) -> tuple[dict[uuid.UUID, Ended], str | None]:
        """End attempts, and lease the next jobs of a busy worker in the same statement.

        Return the ended jobs, and the sender of the message of their events, if it has no others.
        """
        if any(each.outcome is not _SUCCEEDED or each.reads_job for each in reports):
            return await self._store.end(reports), None
        sender = self.events.sender()
        found = self._claiming.claim_with({each.job_id for each in reports})
        if found is None:
            return await self._store.succeed(reports, sender), sender
        worker, claim = found
        try:
            with self._claiming.under_way() as requested_at:
                ended, claimed = await self._store.succeed_and_claim(reports, sender, claim)
        except Exception as error:
            # A claim may fail or wait for a lock. That must not delay what has been done.
            log.warning("leases.not_claimed", reason=reason_of(error))
            return await self._store.end(reports), None
        worker.take(self._claiming.leased(claimed, requested_at))
        return ended, sender

    async def _give_back(self, leases: Sequence[Lease]) -> None:
        """Release leases whose caller is gone."""
        for lease in leases:
            with suppress(LeaseLost):
                await self.release(lease.token)

    def _document(self, field: str, value: JsonValue) -> bytes:
        text, faults = json_document(value, max_bytes=self.registry.max_payload_bytes)
        if faults:
            raise InputInvalid(
                tuple(Violation(f"/{field}{v.path}", v.code, v.message) for v in faults)
            )
        return text

    def _error(self, error: JobError) -> JobError:
        check_error_code(error.code)
        self._document("error", {"code": error.code, "message": error.message})
        if error.details is not None:
            self._document("error/details", error.details)
        return error


def _parts(token: str) -> tuple[uuid.UUID, str]:
    """Return the two parts of a lease token: the id of the job, and a random secret."""
    if not isinstance(token, str):
        message = f"Expected the token of a lease; got {shortened(token)}."
        raise InputInvalid((Violation("/leaseToken", "wrong_type", message),))
    if not _TOKEN.fullmatch(token):
        raise LeaseLost
    return uuid.UUID(token[:32]), token[32:]


_SUCCEEDED: Final = AttemptOutcome.SUCCEEDED

_TOKEN: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
