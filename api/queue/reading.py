"""Reading: jobs, their attempts, counts, and why a job waits."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

import structlog
from pydantic import JsonValue
from pydantic.alias_generators import to_camel

from job_registry import JobPolicy, JobRegistry, Violation
from job_registry.errors import shortened
from job_registry.json_values import text_fault
from job_registry_api.queue.errors import (
    EventsMissed,
    InputInvalid,
    JobFailed,
    JobNotFound,
    QueueUnavailable,
)
from job_registry_api.queue.events import Events, Subscription
from job_registry_api.queue.filters import (
    FIRST_ID,
    LAST_ID,
    MAX_SEARCH,
    JobFilter,
    Slice,
    check_owner,
)
from job_registry_api.queue.job_logs import LogLine, lines_of
from job_registry_api.queue.models import (
    AttemptRecord,
    JobCounts,
    JobRecord,
    JobStatus,
    Owner,
    Parked,
    TypeVersion,
    weight_of,
)
from job_registry_api.queue.opening import Opening
from job_registry_api.queue.requests import (
    EARLIEST,
    LATEST,
    MAX_WAIT_SECONDS,
    checked_ids,
    parse_job_id,
    seconds_faults,
    size_faults,
    type_faults,
)
from job_registry_api.queue.store import (
    AHEAD_LIMIT,
    PIECE_BYTES,
    SAMPLED_BLOCKS,
    CountedRange,
    Listed,
    SampledJobs,
    Store,
    Waiting,
    ids_of_piece,
)

MAX_FILTER_TYPES: Final = 100
"""A page is merged from one query per type and status. SQLite merges at most 500 queries."""

PAGE_SIZE: Final = 50
"""The jobs of a page whose size is not given."""

EXACT_TOTAL: Final = 10_000
"""Up to so many jobs a filter's total is exact. Beyond it is an estimate, so that its cost does not
grow with the queue."""

MISSED_PAUSE_SECONDS: Final = 0.2
"""How long `result` waits before it reads the job again when events were missed."""

MAX_LOG_BYTES: Final = 8_388_608
"""The most bytes of log lines that `logs` reads, and the most of the attempts that they are of."""

MAX_CREATORS: Final = 10_000
"""For how many jobs it is remembered who enqueued them."""

FEW_WAITING: Final = 100
"""For so many jobs of a type and a priority, the jobs ahead are counted for each."""

WORKER_ABSENT_SECONDS: Final = 60.0
"""After this time without a claim, a type counts as having no worker."""


log = structlog.get_logger("job_registry.reading")


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of jobs, newest first. The cursor of a job is its id.

    Whether other jobs stand before it or behind it was read at the end to which it was read. At
    its other end it is assumed: of a page after or before a job, True.
    """

    jobs: list[JobRecord]
    has_next_page: bool
    has_previous_page: bool = False
    stopped_early: bool = False
    """Whether it has fewer jobs than there are and were requested, because of a limit."""
    stopped_at: uuid.UUID | None = None
    """Where to read on, if it stopped early at the limit of a search and not after a job: `after`
    or, with `last`, `before`. It may have no jobs then."""
    weight: int = 0
    """The memory that its jobs take, and the one that did not fit."""


class JobTotal(NamedTuple):
    """How many jobs there are, and whether that is an estimate."""

    jobs: int
    is_estimate: bool


@dataclass(frozen=True, slots=True)
class ScheduledFor:
    """The job is scheduled for later."""

    next_run_at: datetime


@dataclass(frozen=True, slots=True)
class ConcurrencyLimitReached:
    """The running jobs of the type have reached the limit of its policy."""

    limit: int
    running: int


@dataclass(frozen=True, slots=True)
class NoWorkerSeen:
    """No worker has claimed the type in the last minute. None means that none ever has."""

    last_seen_seconds_ago: float | None


@dataclass(frozen=True, slots=True)
class BehindInQueue:
    """A worker runs the type, and this many jobs go first (counted up to 1,000)."""

    ahead: int


@dataclass(frozen=True, slots=True)
class PayloadMismatch:
    """The job is parked: a worker could not read its payload.

    `fingerprint` is that of the worker, and `violations` are the faults that it found.
    """

    fingerprint: str
    violations: tuple[Violation, ...]


Attempts = dict[uuid.UUID, list[AttemptRecord]]
"""The attempts of jobs, by the id of the job."""

WaitingReason = (
    ScheduledFor | ConcurrencyLimitReached | NoWorkerSeen | BehindInQueue | PayloadMismatch
)


async def log_unregistered_types(queue: Reading) -> None:
    """Log a line for each type that has unfinished jobs and that this process does not know.

    Without the database, log nothing.
    """
    with suppress(QueueUnavailable):
        for name, counts in (await queue.unregistered_types()).items():
            if counts.queued or counts.running:
                log.warning(
                    "queue.type_not_registered",
                    type=name,
                    queued=counts.queued,
                    running=counts.running,
                )


def _is_absent(waiting: Waiting) -> bool:
    seen = waiting.worker_seen_seconds_ago
    return seen is None or seen > WORKER_ABSENT_SECONDS


def _mismatch(parked: Parked) -> PayloadMismatch:
    details = parked.error.details
    violations = (
        [each for each in details if isinstance(each, dict)] if isinstance(details, list) else []
    )
    return PayloadMismatch(
        parked.fingerprint,
        tuple(
            Violation(str(each.get("path", "")), str(each["code"]), str(each["message"]))
            for each in violations
            if "code" in each and "message" in each
        ),
    )


def _at_steady_rate(counted: CountedRange) -> float:
    """Return how many more jobs a range has, as if all had come at the rate of those read."""
    if counted.newest is None or counted.last is None or counted.oldest is None:
        return 0
    read = (counted.newest - counted.last).total_seconds()
    rest = (counted.last - counted.oldest).total_seconds()
    if counted.matched == 0 or rest <= 0:
        return 0
    return counted.matched * rest / read if read > 0 else math.inf


def _plausible(sample: SampledJobs) -> tuple[float, float]:
    """Return between which shares the wanted jobs are of all, from a sample: its standard error.

    Jobs of one place were often stored together, so a place counts as one.
    """
    if sample.of_kind == 0:
        return 0, 1
    share, places = sample.beyond / sample.of_kind, min(SAMPLED_BLOCKS, sample.of_kind)
    error = math.sqrt(share * (1 - share) / places)
    return share - error, share + error + 1 / places


def _together(one: TypeVersion, other: TypeVersion) -> TypeVersion:
    seen = [each.worker_seen_at for each in (one, other) if each.worker_seen_at is not None]
    return TypeVersion(
        one.fingerprint,
        queued=one.queued + other.queued,
        running=one.running + other.running,
        parked=one.parked + other.parked,
        refused=one.refused + other.refused,
        worker_seen_at=max(seen) if seen else None,
    )


async def _is_news(events: Subscription, stopped: asyncio.Future[Any], seconds: float) -> bool:
    """Wait for an event. Return False if none came in time, or events were missed."""
    event = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait((event, stopped), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return event.done() and event.exception() is None and not stopped.done()
    finally:
        event.cancel()


def _faults_of(wanted: Any) -> Iterator[Violation]:
    """Yield the faults of the values of a filter."""
    if not isinstance(wanted, JobFilter):
        message = f"Expected a JobFilter; got {shortened(wanted)}."
        yield Violation("/filter", "wrong_type", message)
        return
    if wanted.types is not None:
        yield from _faults_of_types(wanted.types)
    if wanted.statuses is not None:
        yield from _faults_of_statuses(wanted.statuses)
    for name in ("created_by", "idempotency_key", "error_code", "search"):
        text, path = getattr(wanted, name), f"/filter/{to_camel(name)}"
        if text is None:
            continue
        message = f"Expected a string of 1 to {MAX_SEARCH} characters; got {shortened(text)}."
        if not isinstance(text, str):
            yield Violation(path, "wrong_type", message)
        elif not 1 <= len(text) <= MAX_SEARCH or not text.strip():
            yield Violation(path, "out_of_range", message)
        elif fault := text_fault(text):
            yield Violation(path, "invalid_text", fault)
    for name in ("created_after", "created_before", "finished_after", "finished_before"):
        time, path = getattr(wanted, name), f"/filter/{to_camel(name)}"
        if time is not None and not isinstance(time, datetime):
            message = f"Expected a datetime with an offset from UTC; got {shortened(time)}."
            yield Violation(path, "wrong_type", message)
        elif time is not None and time.tzinfo is None:
            message = "Expected a date and time with an offset from UTC; got one without."
            yield Violation(path, "time_zone_missing", message)
        elif time is not None and not EARLIEST <= time < LATEST:
            message = f"Expected a time from {EARLIEST.year} to {LATEST.year - 1} in UTC."
            yield Violation(path, "out_of_range", message)


def _faults_of_types(types: Any) -> Iterator[Violation]:
    if not isinstance(types, _LISTS):
        message = f"Expected a tuple of names of job types; got {shortened(types)}."
        yield Violation("/filter/types", "wrong_type", message)
        return
    if len(types) > MAX_FILTER_TYPES:
        message = f"Expected at most {MAX_FILTER_TYPES} job types; got {len(types)}."
        yield Violation("/filter/types", "too_long", message)
    for index, name in enumerate(types):
        yield from type_faults(f"/filter/types/{index}", name)


def _faults_of_statuses(statuses: Any) -> Iterator[Violation]:
    if not isinstance(statuses, _LISTS):
        message = f"Expected a tuple of statuses; got {shortened(statuses)}."
        yield Violation("/filter/statuses", "wrong_type", message)
        return
    for index, status in enumerate(statuses):
        if status not in _STATUSES:
            message = f"Expected one of {', '.join(JobStatus)}; got {shortened(status)}."
            yield Violation(f"/filter/statuses/{index}", "invalid_value", message)


_LISTS: Final = (tuple, list, set, frozenset)
_STATUSES: Final = tuple(JobStatus)
"""Not a set, which would refuse a value that has no hash."""


def _faults_of_ends(*ends: object) -> Iterator[Violation]:
    """Yield the faults of the jobs that a page is after and before."""
    for path, end in zip(("/after", "/before"), ends, strict=True):
        if end is not None and not isinstance(end, uuid.UUID):
            message = f"Expected the id of a job as a uuid.UUID; got {shortened(end)}."
            yield Violation(path, "wrong_type", message)


class _PageRead(NamedTuple):
    """The jobs of a page that were read. The weight includes the job that did not fit.

    The database reads that job to find its size, so pages that all stop at it must not be free.
    """

    jobs: list[JobRecord]
    weight: int
    is_whole: bool


class Reading(Opening):
    """The part of `JobQueue` that reads."""

    registry: JobRegistry
    events: Events
    _store: Store
    max_page_size: int

    def __init__(self) -> None:
        self._creators: dict[uuid.UUID, asyncio.Future[dict[uuid.UUID, str | None]]] = {}

    def policy(self, job_type: str) -> JobPolicy:
        """Return the policy of a job type.

        Raises:
            JobTypeNotFound: no job type has this name.
        """
        return self.registry.policy(job_type)

    async def get(self, job_id: str | uuid.UUID, *, owner: Owner | None = None) -> JobRecord:
        """Return a job. With `owner`, only one that this subject enqueued: others are not found.

        Raises:
            JobNotFound: no job has this id, or another subject enqueued it.
        """
        self.check_open()
        return await self._get(parse_job_id(job_id), owner)

    async def get_many(
        self,
        job_ids: Iterable[uuid.UUID],
        *,
        owner: Owner | None = None,
        max_bytes: int | None = None,
    ) -> JobPage:
        """Return the jobs with these ids, in any order. `owner` is that of `get`.

        It stops early before the job with which the weight of all would exceed `max_bytes`.
        """
        self.check_open()
        check_owner(owner)
        listed = await self._store.list_many(checked_ids(job_ids), owner)
        page = await self._read_page(listed, max_bytes)
        return JobPage(
            page.jobs, has_next_page=False, stopped_early=not page.is_whole, weight=page.weight
        )

    async def _get(self, job_id: uuid.UUID, owner: Owner | None = None) -> JobRecord:
        check_owner(owner)
        job = await self._store.get(job_id, owner)
        if job is None:
            raise JobNotFound(str(job_id))
        return job

    async def result(self, job_id: str | uuid.UUID, *, timeout: float | None = None) -> JsonValue:
        """Wait until the job has ended, and return its result.

        `timeout` is in seconds; None waits without end.

        Raises:
            JobNotFound: no job has this id.
            JobFailed: the job failed or was cancelled.
            TimeoutError: the job has not ended in time. It is not cancelled.
            QueueUnavailable: the database does not answer, or the queue was closed.
            InputInvalid: `timeout` is not a number from 0.
        """
        self.check_open()
        if timeout is not None and (faults := seconds_faults("/timeout", timeout, math.inf)):
            raise InputInvalid(faults)
        if not self.events.is_listening:
            raise QueueUnavailable("the queue was closed")
        try:
            async with asyncio.timeout(timeout) as limit:
                job = await self._ended(parse_job_id(job_id))
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(
                f"Job {job_id} has not ended within {timeout:g} seconds."
                " Does a worker run its type?"
            ) from None
        if job.status is not JobStatus.SUCCEEDED:
            raise JobFailed(job)
        return job.result

    async def wait(
        self,
        job_id: str | uuid.UUID,
        *,
        seconds: float,
        owner: Owner | None = None,
        stop: asyncio.Event | None = None,
    ) -> JobRecord:
        """Wait until the job has ended, at most for so many seconds, and return it as it is then.

        The wait ends early when `stop` is set, and when the queue is closed. `owner` is that of
        `get`.

        Raises:
            JobNotFound: no job has this id, or another subject enqueued it.
            InputInvalid: `seconds` is not 0 to 30.
        """
        if faults := seconds_faults("/timeoutSeconds", seconds, MAX_WAIT_SECONDS):
            raise InputInvalid(faults)
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        stopped = asyncio.ensure_future((stop or asyncio.Event()).wait())
        try:
            while True:
                with self.events.subscribe(job_id=parse_job_id(job_id)) as events:
                    # Read after subscribing, and never cancelled in the middle of a statement.
                    while (job := await self.get(job_id, owner=owner)).finished_at is None:
                        if not await _is_news(events, stopped, until - clock()):
                            break
                if (
                    job.finished_at is not None
                    or stopped.done()
                    or clock() >= until
                    or not self.events.is_listening
                ):
                    return job
                await asyncio.sleep(MISSED_PAUSE_SECONDS)
        finally:
            stopped.cancel()

    async def creators(self, job_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, str | None]:
        """Return who enqueued these jobs, for subscribers who follow only their own.

        The creator of a job never changes, so it is read once in this process. Subscribers that
        want the same jobs at once share the statement.
        """
        wanted = set(job_ids)
        unknown = wanted - self._creators.keys()
        if unknown:
            reading = asyncio.ensure_future(self._store.creators(unknown))
            self._creators |= dict.fromkeys(unknown, reading)
        readings = {self._creators[job_id] for job_id in wanted}
        found: dict[uuid.UUID, str | None] = {}
        try:
            for each in readings:
                found |= await asyncio.shield(each)
        except BaseException:
            for job_id in unknown:
                self._creators.pop(job_id, None)
            raise
        while len(self._creators) > MAX_CREATORS:
            del self._creators[next(iter(self._creators))]
        return {job_id: found[job_id] for job_id in wanted & found.keys()}

    async def _ended(self, job_id: uuid.UUID) -> JobRecord:
        while True:
            try:
                with self.events.subscribe(job_id=job_id) as events, suppress(EventsMissed):
                    while (job := await self._get(job_id)).finished_at is None:
                        await anext(events)
                    return job
            except QueueUnavailable:
                if self.events.is_listening:
                    raise
            if not self.events.is_listening:
                raise QueueUnavailable("the queue was closed")
            await asyncio.sleep(MISSED_PAUSE_SECONDS)

    async def attempts(self, job_ids: Sequence[uuid.UUID]) -> Attempts:
        """Return the attempts of each of these jobs, oldest first, in one query."""
        return await self._store.attempts(checked_ids(job_ids))

    async def latest_attempts(
        self, job_ids: Sequence[uuid.UUID], max_bytes: int
    ) -> tuple[Attempts, bool]:
        """Return the latest attempts of these jobs up to a size, and whether they are all.

        Those of each job are in order, oldest first.
        """
        return await self._store.latest_attempts(job_ids, max_bytes)

    async def logs(self, job_id: str | uuid.UUID) -> list[LogLine]:
        """Return the log lines that are kept of a job, oldest first.

        The worker keeps the last ones of each attempt. Of a job with very many attempts, or with
        large errors, the result has those of the latest attempts, up to eight megabytes.

        Raises:
            JobNotFound: the id is text that is not a UUID.
        """
        job_id = parse_job_id(job_id)
        # Errors of a thousand attempts may take half a gigabyte.
        latest, _ = await self.latest_attempts([job_id], MAX_LOG_BYTES)
        attempts = latest[job_id]
        texts, _ = await self.log_texts([attempt.id for attempt in attempts], MAX_LOG_BYTES)
        return [line for attempt in attempts for line in lines_of(texts.get(attempt.id, ""))]

    async def log_texts(
        self, attempts: Sequence[int], max_bytes: int
    ) -> tuple[dict[int, str], bool]:
        """Return the log lines of attempts, by `AttemptRecord.id`, and whether they are all.

        They are text, which `lines_of` reads, of the latest attempts up to a size. Attempts without
        lines are missing.
        """
        return await self._store.logs(attempts, max_bytes)

    async def list(
        self,
        job_filter: JobFilter = JobFilter(),
        *,
        first: int | None = None,
        after: uuid.UUID | None = None,
        last: int | None = None,
        before: uuid.UUID | None = None,
        owner: Owner | None = None,
        most: int | None = None,
        max_bytes: int | None = None,
    ) -> JobPage:
        """Return a page of jobs, newest first: the `first` ones after the job `after`.

        With `last`, it is the last ones before the job `before`. Without either, the first 50. With
        `owner`, only jobs that this subject enqueued are listed.

        It stops early at `most` jobs, and before the job with which the weight of all would exceed
        `max_bytes`, but always has the first job. It also stops, perhaps without any, where too
        many jobs were searched for those that match several fields: see `stopped_at`.

        Raises:
            InputInvalid: `first` or `last` is not 1 to `max_page_size`, both are given, or a value
                of the filter, `after` or `before` is wrong.
        """
        self.check_open()
        check_owner(owner)
        faults = [*self._faults_of_size(first, last), *_faults_of_ends(after, before)]
        size = first if last is None else last
        part = Slice(PAGE_SIZE if size is None else size, after, before, from_end=last is not None)
        wanted = self._as_stored(job_filter, faults)
        if wanted is None:
            return JobPage([], has_next_page=False)
        allowed = part.size if most is None else min(part.size, most)
        found, stopped_at = await self._store.list_jobs(
            wanted, owner, replace(part, size=allowed + 1)
        )
        chosen = found[:allowed]
        page = await self._read_page(chosen, max_bytes)
        more = not page.is_whole or len(found) > len(chosen)
        if more:
            stopped_at = None
        more = more or stopped_at is not None
        return JobPage(
            page.jobs[::-1] if part.from_end else page.jobs,
            has_next_page=before is not None if part.from_end else more,
            has_previous_page=more if part.from_end else after is not None,
            stopped_early=not page.is_whole
            or len(chosen) < min(part.size, len(found))
            or stopped_at is not None,
            stopped_at=stopped_at,
            weight=page.weight,
        )

    async def has_any(
        self,
        job_filter: JobFilter = JobFilter(),
        *,
        not_newer_than: uuid.UUID | None = None,
        not_older_than: uuid.UUID | None = None,
        owner: Owner | None = None,
    ) -> bool:
        """Return whether the list has a job on this side of another one, that one included. Where a
        search for it stops early, it is assumed.

        Raises:
            InputInvalid: a value of the filter is wrong.
        """
        self.check_open()
        check_owner(owner)
        wanted = self._as_stored(job_filter, [])
        after = not_newer_than and uuid.UUID(int=min(not_newer_than.int + 1, LAST_ID.int))
        before = not_older_than and uuid.UUID(int=max(not_older_than.int - 1, FIRST_ID.int))
        part = Slice(1, after, before, from_end=before is not None)
        if wanted is None:
            return False
        found = await self._store.list_jobs(wanted, owner, part)
        return bool(found.listed) or found.stopped_at is not None

    async def count(
        self, job_filter: JobFilter = JobFilter(), *, owner: Owner | None = None
    ) -> JobTotal:
        """Return how many jobs the list has.

        The total of types and statuses is exact. With another field of the filter, or with `owner`,
        it is exact if the index of that field has at most 10,000 jobs. Otherwise it is an estimate:
        the 10,000 newest are read, and the others estimated from a sample of all jobs. It is at
        most the number of jobs of the types and statuses. With `owner`, it is estimated from the
        owner's jobs alone, of which at most 110,000 are counted.

        Raises:
            InputInvalid: a value of the filter is wrong.
        """
        self.check_open()
        check_owner(owner)
        wanted = self._as_stored(job_filter, [])
        if wanted is None or (owner is not None and owner.subject is None):
            return JobTotal(0, False)
        if owner is None and wanted.is_simple:
            return JobTotal(await self._store.count_all(wanted), False)
        ranges = await self._store.count_ranges(wanted, owner, EXACT_TOTAL + 1)
        matched = sum(each.matched for each in ranges)
        if all(each.read <= EXACT_TOTAL for each in ranges):
            return JobTotal(matched, False)
        if wanted.search is not None or wanted.idempotency_key is not None:
            return JobTotal(matched, True)  # They find few more jobs than are counted.
        if owner is None:
            return JobTotal(await self._estimated(wanted, ranges), True)
        (newest,) = ranges
        rest = await self._store.sample_own(wanted, owner, newest.end)
        read = rest.matched / rest.read if rest.read else matched / newest.read
        return JobTotal(matched + round(rest.jobs * read), True)

    async def _estimated(self, wanted: JobFilter, ranges: Sequence[CountedRange]) -> int:
        """Return about how many jobs a filter finds, of which some ranges have been counted.

        A steady rate is assumed where a sample of all jobs does not refute it: it has few of those
        jobs that are rare. In a burst, thousands of jobs come at a rate that says nothing about the
        others.
        """
        jobs = await self._store.count_all(wanted)
        sample = await self._store.sample(wanted, [each.end for each in ranges])
        at_end = sum(each.at_end for each in ranges)
        least, most = (share * jobs - at_end for share in _plausible(sample))
        steady = sum(map(_at_steady_rate, ranges))
        matched = sum(each.matched for each in ranges)
        return min(jobs, matched + max(0, round(min(max(least, steady), most))))

    def _faults_of_size(self, first: int | None, last: int | None) -> Iterator[Violation]:
        for path, size in (("/first", first), ("/last", last)):
            if size is not None:
                yield from size_faults(path, size, self.max_page_size)
        if first is not None and last is not None:
            message = "Expected either first or last; got both."
            yield Violation("/last", "conflicting", message)

    def _as_stored(self, wanted: JobFilter, faults: Sequence[Violation]) -> JobFilter | None:
        """Return the filter with the names under which jobs are stored, and each type and status
        once. None: it finds no jobs.

        Raises:
            InputInvalid: there are `faults`, or a value of the filter is wrong.
        """
        faults = [*faults, *_faults_of(wanted)]
        if faults:
            raise InputInvalid(tuple(faults))
        # The database refuses these names in a query, so no job has one of them.
        types = [
            stored
            for name in wanted.types or ()
            if text_fault(name) is None
            for stored in self._stored_names(name)
        ]
        if wanted.types is not None and not types:
            return None
        if wanted.statuses is not None and not wanted.statuses:
            return None
        # A query has a part for each of them.
        return replace(
            wanted,
            types=tuple(dict.fromkeys(types)) or None,
            statuses=tuple(dict.fromkeys(wanted.statuses or ())) or None,
        )

    async def _read_page(self, listed: Sequence[Listed], max_bytes: int | None) -> _PageRead:
        """Return the first of these jobs, as many as `max_bytes` allows, and one at least.

        What is large is read a piece at a time, because objects take more memory than their text.
        """
        jobs: list[JobRecord] = []
        weight = 0
        whole: dict[uuid.UUID, JobRecord] = {}
        for index, each in enumerate(listed):
            job: JobRecord | None = each.job
            if each.is_partial:
                room = PIECE_BYTES if max_bytes is None else max_bytes - weight
                if max_bytes is not None and jobs and each.size > room:
                    return _PageRead(jobs, weight + each.size, is_whole=False)
                if each.job.id not in whole:
                    partial = (other for other in listed[index:] if other.is_partial)
                    ids = ids_of_piece(partial, min(PIECE_BYTES, room))
                    whole = await self._store.get_many(ids)
                job = whole.get(each.job.id)
            if job is None:  # It was deleted in the meantime.
                continue
            weight_of_job = weight_of(job)
            if max_bytes is not None and jobs and weight + weight_of_job > max_bytes:
                return _PageRead(jobs, weight + weight_of_job, is_whole=False)
            weight += weight_of_job
            jobs.append(job)
        return _PageRead(jobs, weight, is_whole=True)

    async def counts(self) -> dict[str, JobCounts]:
        """Return the number of jobs per type and status, including types no longer registered.

        Jobs that are stored under a former name count for their type.
        """
        counts = {name: JobCounts() for name in self.registry}
        for stored, found in (await self._store.counts()).items():
            name = self.registry.current_name(stored)
            before = asdict(counts.get(name, JobCounts()))
            counts[name] = JobCounts(
                **{status: before[status] + jobs for status, jobs in asdict(found).items()}
            )
        return counts

    async def unregistered_types(self) -> dict[str, JobCounts]:
        """Return the number of jobs per status of the types that this process does not know."""
        counts = await self.counts()
        return {name: counts[name] for name in sorted(counts) if name not in self.registry}

    async def versions(self, job_type: str) -> Sequence[TypeVersion]:
        """Return the versions of a type that jobs were admitted under, or that workers have.

        At most 10,000 queued, running and parked jobs are counted, those first that run first.

        Raises:
            JobTypeNotFound: no job type has this name, or had it.
        """
        found = self.registry.get_type(job_type)
        versions: dict[str, TypeVersion] = {}
        for name in (found.name, *found.former_names):
            for each in await self._store.versions(name):
                known = versions.get(each.fingerprint)
                versions[each.fingerprint] = each if known is None else _together(known, each)
        return [versions[fingerprint] for fingerprint in sorted(versions)]

    def _stored_names(self, job_type: str) -> tuple[str, ...]:
        """Return the names under which the jobs of a type may be stored."""
        found = self.registry.get(self.registry.current_name(job_type))
        return (job_type,) if found is None else (found.name, *found.former_names)

    async def waiting_reasons(
        self, jobs: Iterable[JobRecord]
    ) -> dict[uuid.UUID, WaitingReason | None]:
        """Return why each of these jobs waits. None: it is not queued."""
        reasons: dict[uuid.UUID, WaitingReason | None] = {}
        queued: dict[uuid.UUID, JobRecord] = {}
        parked: list[uuid.UUID] = []
        for job in jobs:
            if job.is_parked:
                parked.append(job.id)
            elif job.next_run_at is not None:
                queued[job.id] = job
        waiting = await self._waiting(queued.values())
        renamed = [
            job
            for job in queued.values()
            if (found := self.registry.get(job.type)) is not None and found.former_names
        ]
        # The jobs of all names of a type count for its limit, and run in the same workers.
        names = {name for job in renamed for name in self._stored_names(job.type)}
        places = await self._store.used_places(names) if names else {}
        for job in renamed:
            if job.id in waiting:
                running = sum(places[name] for name in self._stored_names(job.type))
                waiting[job.id] = replace(waiting[job.id], running=running)
        unseen = [
            job
            for job in queued.values()
            if job.id in waiting and waiting[job.id].running and _is_absent(waiting[job.id])
        ]
        if unseen:
            # Claims end attempts whose lease has expired. Without a worker, nothing does.
            expired = await self._store.expired_leases()
            lost = Counter(each.type for each in expired if each.is_counted)
            for job in unseen:
                ended = sum(lost[name] for name in self._stored_names(job.type))
                running = max(0, waiting[job.id].running - ended)
                waiting[job.id] = replace(waiting[job.id], running=running)
        for job_id, job in queued.items():
            reasons[job_id] = self._reason(job, waiting[job_id]) if job_id in waiting else None
        refusals = await self._store.parked(parked) if parked else {}
        for job_id in parked:
            reasons[job_id] = _mismatch(refusals[job_id]) if job_id in refusals else None
        return reasons

    async def _waiting(self, jobs: Iterable[JobRecord]) -> dict[uuid.UUID, Waiting]:
        """Return what queued jobs wait for.

        To count the jobs ahead of each of 10,000 jobs takes seconds. If too many to count are ahead
        of the first job of a type and a priority, as many are ahead of those behind it.
        """
        lines: dict[tuple[str, int], list[tuple[datetime, uuid.UUID]]] = {}
        for job in jobs:
            if job.next_run_at is not None:
                line = lines.setdefault((job.type, job.priority), [])
                line.append((job.next_run_at, job.id))
        wanted: list[uuid.UUID] = []
        behind: list[list[tuple[datetime, uuid.UUID]]] = []
        for (job_type, _), line in lines.items():
            # Jobs that are stored under a former name wait in another line.
            if len(line) <= FEW_WAITING or len(self._stored_names(job_type)) > 1:
                wanted += (job_id for _, job_id in line)
            else:
                line.sort()
                wanted.append(line[0][1])
                behind.append(line)
        waiting = await self._store.waiting(wanted) if wanted else {}
        uncounted: list[uuid.UUID] = []
        for (first_at, first_id), *others in behind:
            first = waiting.get(first_id)
            if first is None or first.ahead < AHEAD_LIMIT:
                uncounted += (job_id for _, job_id in others)
                continue
            for at, job_id in others:
                due_in_seconds = first.due_in_seconds + (at - first_at).total_seconds()
                waiting[job_id] = replace(first, due_in_seconds=due_in_seconds)
        if uncounted:
            waiting |= await self._store.waiting(uncounted)
        return waiting

    async def waiting_reason(self, job: JobRecord) -> WaitingReason | None:
        """Return why a queued job waits. None: it is not queued."""
        return (await self.waiting_reasons([job])).get(job.id)

    async def expired_leases(self) -> dict[uuid.UUID, datetime]:
        """Return the running jobs whose lease has expired, and when it did.

        Claims end their attempts, and so does the upkeep of servers and workers. So these are the
        jobs of workers that have died while no other process ran.
        """
        return {each.job_id: each.expired_at for each in await self._store.expired_leases()}

    def _reason(self, job: JobRecord, waiting: Waiting) -> WaitingReason | None:
        if waiting.due_in_seconds > 0 and job.next_run_at is not None:
            return ScheduledFor(job.next_run_at)
        job_type = self.registry.get(job.type)
        limit = job_type.policy.concurrency_limit if job_type else None
        if limit is not None and waiting.running >= limit:
            return ConcurrencyLimitReached(limit, waiting.running)
        if waiting.running == 0 and _is_absent(waiting):
            return NoWorkerSeen(waiting.worker_seen_seconds_ago)
        return BehindInQueue(waiting.ahead)
