"""`TestQueue`: a real queue on a SQLite file of its own, whose clock can be advanced."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, NamedTuple, Self

from pydantic import JsonValue, ValidationError
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python
from sqlalchemy.orm import Session

from job_registry import JobRegistry, JobType, Payload
from job_registry.errors import near, shortened
from job_registry_api import defaults
from job_registry_api.logs import use_standard_logging
from job_registry_api.queue.caller_transactions import publish_after_commit
from job_registry_api.queue.errors import JobFailed
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import NewJob, Stored
from job_registry_api.queue.sync import SyncQueue
from job_registry_api.testing.draining import DrainedJob, DrainFailed, drain
from job_registry_api.testing.queue_file import QueueFile, run_in_thread

MAX_JOBS: Final = 1_000
"""How many jobs `drain` runs unless it is given another number."""

TIMEOUT_SECONDS: Final = 30.0
"""How long `drain` may take unless it is given another time."""

SHOWN: Final = 5
"""How many jobs the message of a failed assertion describes."""

What = type[Payload] | JobType[Any] | str
"""A job type: as itself, by its name, or by the class of its payload."""

Jobs = list[JobRecord]
Drained = list[DrainedJob]


class TestQueue(JobQueue):
    """A `JobQueue` for tests, on a new database that is deleted at the end.

        with TestQueue([mail_send]) as queue:
            await place_order(queue)
            queue.assert_enqueued(MailSend, to="ada@example.com")
            await queue.drain()

    Policies, idempotency keys, limits and errors are those of production, because the code is. Jobs
    run only in `drain`. `advance` moves the clock. `sync` is for tests without an event loop.

    It is open at once. Opening and closing it in the tested code has no effect. With `session`, a
    session of any database will do: the job is stored in this queue when the session commits.

    `registry` is a registry, or the job types for one. `assets` is where jobs read and write files;
    by default a folder that is deleted at the end.

    Raises:
        DefinitionError: two job types have the same name.
    """

    __test__: ClassVar[bool] = False  # For pytest: this is not a test.

    def __init__(
        self,
        registry: JobRegistry | Iterable[JobType[Any]],
        *,
        assets: str | Path | None = None,
        lease_seconds: float = defaults.LEASE_SECONDS,
        _file: QueueFile | None = None,
    ) -> None:
        if not isinstance(registry, JobRegistry):
            registry = JobRegistry(registry)
        use_standard_logging()
        self.file = _file or QueueFile()
        """The database of the queue, and its clock."""
        self.assets = str(self.file.folder / "assets" if assets is None else assets)
        """Where jobs read and write files: `job.assets` of their handlers."""
        super().__init__(
            registry,
            self.file.database(),
            lease_seconds=lease_seconds,
        )

    # Opening and closing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Delete the queue and its jobs."""
        if "sync" in self.__dict__:
            self.sync.end()
        self.end()
        self.file.delete()

    def end(self) -> None:
        """Close the connections to the file."""
        run_in_thread(self._database.close)

    async def open(self) -> None:
        """Note the event loop, which `create_app` needs. The queue itself is open."""
        self.loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Forget the event loop. The queue itself is closed at the end of the test."""
        self.loop = None

    @cached_property
    def sync(self) -> SyncTestQueue:
        """The same operations for tests and code without an event loop."""
        return SyncTestQueue(self)

    # Running jobs

    async def drain(
        self,
        *job_types: What,
        skip_time: bool = False,
        raise_errors: bool = True,
        max_jobs: int = MAX_JOBS,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Drained:
        """Run all due jobs now, one after another, and return each attempt.

        They run in the order in which a worker claims them, with its middleware and lifespans,
        until no job is due, including jobs that handlers enqueue. Handlers of every kind run in
        this process. With `job_types`, only jobs of these types run. Jobs of types without a
        handler stay queued.

        Retries, snoozed and scheduled jobs become due when the clock is advanced. With `skip_time`,
        the clock is advanced to the next of them until no job is queued.

        An exception of a handler fails its attempt, as in a worker, and is then raised here. Other
        failures are raised as `DrainFailed`. `Retry`, `Fail`, `Cancel` and `Snooze` are not raised.
        With `raise_errors=False` no failure is raised.

        Raises:
            DrainFailed: an attempt failed without an exception; or more than `max_jobs` jobs were
                due; or a handler has not ended after `timeout` seconds in all.
            WorkerStartError: a lifespan failed to start.
        """
        __tracebackhide__ = True
        names = dict.fromkeys(name for what in job_types for name in self._names(what)[0])
        types = [
            name
            for name in (names if job_types else self.registry)
            if self.registry[name].has_handler
        ]
        return await drain(
            self,
            types,
            assets=self.assets,
            max_jobs=max_jobs,
            timeout=timeout,
            raise_errors=raise_errors,
            skip=(lambda: self._skip_to_next(types)) if skip_time else (lambda: False),
        )

    async def result(self, job_id: str | uuid.UUID, *, timeout: float | None = None) -> JsonValue:
        """Run the due jobs, and return the result of the job.

        Raises:
            JobNotFound: no job has this id.
            JobFailed: the job failed or was cancelled.
            TimeoutError: it has not ended, and `timeout` is given.
            DrainFailed: it has not ended, because it is due later or has no handler.
        """
        job = await self.get(job_id)
        if job.finished_at is None:
            await self.drain(raise_errors=False)
            job = await self.get(job_id)
        if job.status is JobStatus.SUCCEEDED:
            return job.result
        if job.finished_at is not None:
            raise JobFailed(job)
        if timeout is not None:
            raise TimeoutError
        raise DrainFailed(
            f"{job.type} {job.id} has no result: it is {_state(job)}. Outside of a test, this call"
            " would wait for it."
        )

    # The clock

    @property
    def now(self) -> datetime:
        """The time of the queue, in UTC."""
        return datetime.now(UTC) + timedelta(seconds=self.file.ahead)

    def advance(
        self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0
    ) -> None:
        """Advance the clock of the queue. Scheduled jobs and retries become due.

        Only the queue sees it: `datetime.now()` in the tested code is not changed.

        Raises:
            ValueError: the time is negative.
        """
        by = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if by < timedelta():
            raise ValueError(f"expected a time of zero or more; got {by.total_seconds():g} seconds")
        self.file.ahead += by.total_seconds()

    def advance_to(self, time: datetime) -> None:
        """Advance the clock of the queue to this time, unless it is past.

        Raises:
            ValueError: the time has no offset from UTC.
        """
        if time.tzinfo is None:
            raise ValueError(f"expected a time with an offset from UTC; got {time.isoformat()}")
        # The clock of the database has milliseconds.
        self.file.ahead += max(0.0, (time - self.now).total_seconds() + 0.001)

    def _skip_to_next(self, types: Sequence[str]) -> bool:
        times = [
            job.next_run_at
            for job in self.file.jobs(types)
            if job.next_run_at is not None  # Only queued jobs have one.
        ]
        if times:
            self.advance_to(min(times))
        return bool(times)

    # Asserting

    def jobs(self, what: What | Payload | None = None, /, **fields: Any) -> Jobs:
        """Return the jobs of a type whose payload has these fields, in the order of enqueueing.

        They include jobs that have run. `what` may also be a payload, which the jobs then equal.
        Without `what`, return all jobs.

        Raises:
            DefinitionError: the class of the payload belongs to no job type.
            JobTypeNotFound: no job type has this name.
            TypeError: the payload has no such field.
        """
        if what is None and not fields:
            return self.file.jobs()
        if what is None:
            raise TypeError("fields need a job type, as the first argument")
        wanted = self._wanted(what, fields)
        return [job for job in self.file.jobs(wanted.names) if not self._differences(job, wanted)]

    def assert_enqueued(self, what: What | Payload, /, **fields: Any) -> JobRecord:
        """Return the one job of a type whose payload has these fields. See `jobs`.

        The job may have run in the meantime: look at its `status`.

        Raises:
            AssertionError: there is none, or there are several. Names what differs.
        """
        __tracebackhide__ = True
        found = self.jobs(what, **fields)
        if len(found) == 1:
            return found[0]
        wanted = self._wanted(what, fields)
        asked = _asked(wanted)
        if found:
            listed = "\n".join(f"  {_line(job)}" for job in found[:SHOWN])
            raise AssertionError(
                f"Expected one job {asked}; found {len(found)}. `jobs` returns them all:\n{listed}"
            )
        instead = self._what_there_is(wanted)
        raise AssertionError(f"Expected one job {asked}; found none.{instead}")

    def assert_not_enqueued(self, what: What | Payload, /, **fields: Any) -> None:
        """Check that no job of a type has these fields. See `jobs`.

        Raises:
            AssertionError: there is one.
        """
        __tracebackhide__ = True
        if found := self.jobs(what, **fields):
            asked = _asked(self._wanted(what, fields))
            listed = "\n".join(f"  {_line(job)}" for job in found[:SHOWN])
            raise AssertionError(f"Expected no job {asked}; found {len(found)}:\n{listed}")

    def _names(self, what: What) -> tuple[Sequence[str], type[Payload]]:
        """Return the names of the job types that are meant, and the class of their payload."""
        match what:
            case str():
                found = self.registry.get_type(what)
                return [found.name], found.payload
            case JobType():
                return [what.name], self.registry.get_type(what.name).payload
            case type() if issubclass(what, Payload):
                names = [name for name in self.registry if self.registry[name].payload is what]
                return names or [self.registry.type_of(what)], what
        raise TypeError(
            f"expected a job type, its name, or the class of its payload; got {shortened(what)}"
        )

    def _wanted(self, what: What | Payload, fields: dict[str, Any]) -> _Wanted:
        if isinstance(what, Payload):
            if fields:
                raise TypeError("a payload has its own fields; give the class for some of them")
            return _Wanted(*self._names(type(what)), dict(what))
        names, payload = self._names(what)
        for name in fields:
            if name not in payload.model_fields:
                hint = "".join(f" Did you mean {n}?" for n in near(name, payload.model_fields))
                raise TypeError(f"{payload.__name__} has no field {name}.{hint}")
        return _Wanted(names, payload, fields)

    def _differences(self, job: JobRecord, wanted: _Wanted) -> Sequence[str]:
        """Return how the payload of a job differs from the fields."""
        text = to_json(job.payload)
        if wanted.payload is not self.registry.get_type(job.type).payload:
            # An older class, which the job type still accepts.
            try:
                payload = wanted.payload.model_validate_json(text, by_alias=True, by_name=False)
            except ValidationError:
                return [f"the payload does not fit {wanted.payload.__name__}"]
        elif wanted.fields:
            payload = self.registry.read(job.type, text)
        else:
            return []
        return [
            f"{name} is {_shown(getattr(payload, name))}, expected {_shown(value)}"
            for name, value in wanted.fields.items()
            if getattr(payload, name) != value
        ]

    def _what_there_is(self, wanted: _Wanted) -> str:
        """Return the part of a message that says what was enqueued instead."""
        names = wanted.names
        everything = self.file.jobs()
        lines = []
        for job in [job for job in everything if job.type in names][:SHOWN]:
            differences = "; ".join(self._differences(job, wanted))
            lines.append(f"  {job.type} {job.id}, {_state(job)}: {differences}")
        others = Counter(job.type for job in everything if job.type not in names)
        if others:
            listed = ", ".join(f"{name} ({count})" for name, count in sorted(others.items()))
            lines.append(f"  Other jobs: {listed}")
        if uncommitted := self.file.uncommitted_jobs():
            lines.append(f"  Enqueued in a session that has not committed: {uncommitted}")
        return "\n" + "\n".join(lines) if lines else " No job was enqueued."

    # The caller's own transaction, on any database

    def _insert_within(self, session: Session, jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        """Return what an insert would; `_publish_within` keeps the jobs until the commit."""
        session.connection()  # As in production, the session begins its transaction now.
        return self.file.insert_later(session, jobs, self.now)

    def _publish_within(
        self, session: Session, jobs: Sequence[NewJob], stored: Mapping[uuid.UUID, Stored]
    ) -> None:
        new = [job for job in jobs if stored[job.id].existing is None]
        publish_after_commit(session, self.file.insert, new, joined=True)


class SyncTestQueue(SyncQueue):
    """The operations of a `TestQueue` for code without an event loop.

    They run in a thread of their own, on a second `TestQueue` with the same file and clock, because
    an event loop of the test may use the first at the same time.
    """

    def __init__(self, queue: TestQueue) -> None:
        self._twin = TestQueue(
            queue.registry,
            assets=queue.assets,
            lease_seconds=queue.lease_seconds,
            _file=queue.file,
        )
        super().__init__(self._twin)

    def drain(
        self,
        *job_types: What,
        skip_time: bool = False,
        raise_errors: bool = True,
        max_jobs: int = MAX_JOBS,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Drained:
        """Run all due jobs now. See `TestQueue.drain`."""
        __tracebackhide__ = True
        return self._run(
            lambda: self._twin.drain(
                *job_types,
                skip_time=skip_time,
                raise_errors=raise_errors,
                max_jobs=max_jobs,
                timeout=timeout,
            )
        )

    def close(self) -> None:
        """Do nothing: the queue is closed at the end of the test."""

    def end(self) -> None:
        super().close()
        self._twin.end()


class _Wanted(NamedTuple):
    """What is looked for: names of job types, the class that reads their payloads, and fields."""

    names: Sequence[str]
    payload: type[Payload]
    fields: Mapping[str, Any]


def _asked(wanted: _Wanted) -> str:
    """Return the words for what an assertion looks for."""
    fields = ", ".join(f"{name} {_shown(value)}" for name, value in wanted.fields.items())
    return " or ".join(wanted.names) + (f" with {fields}" if fields else "")


def _line(job: JobRecord) -> str:
    return f"{job.type} {job.id}, {_state(job)}: {shortened(job.payload, 200)}"


def _state(job: JobRecord) -> str:
    return f"{job.status}" + (
        f" for {job.next_run_at:%Y-%m-%d %H:%M:%S}" if job.next_run_at else ""
    )


def _shown(value: object) -> str:
    try:
        return shortened(to_jsonable_python(value, by_alias=True), 200)
    except PydanticSerializationError:
        return shortened(value)
