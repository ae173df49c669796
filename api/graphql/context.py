"""The context of a request, which its resolvers share, in this schema and in a host's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, Final, NamedTuple
from uuid import UUID

import strawberry
from graphql import DocumentNode, OperationDefinitionNode, ValueNode
from starlette.types import Receive
from strawberry.dataloader import DataLoader

from job_registry.errors import FaultBudget
from job_registry_api.auth import Caller, Unauthenticated
from job_registry_api.budget import Budget, BudgetExceeded, RequestLimits, RequestSize
from job_registry_api.graphql.selections import Selections
from job_registry_api.http_messages import wait_for_disconnect
from job_registry_api.queue.errors import JobNotFound
from job_registry_api.queue.events import JobEvent
from job_registry_api.queue.job_logs import LOG_WEIGHT
from job_registry_api.queue.models import (
    AttemptRecord,
    JobCounts,
    JobRecord,
    Owner,
    weight_of,
)
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import WaitingReason

JOBS_AT_ONCE: Final = 32
"""How many jobs of events are read at once."""

EVENTS_AHEAD: Final = 256
"""Among how many events these jobs are looked for: a job may have many."""

JOBS_BYTES: Final = 1_000_000
"""The most that the jobs that are read at once weigh together."""

JOBS_SECONDS: Final = 1.0
"""For how long the jobs that were read at once are sent. A host may send events slowly."""


class JobsOfEvents:
    """The jobs of events that are sent one after another, read some at a time.

    Otherwise each event of a burst would wait for an answer of the database.
    """

    def __init__(self, queue: JobQueue, events: Sequence[JobEvent]) -> None:
        self._queue = queue
        self._ids = [event.job_id for event in events]
        self._place = 0
        self._at_once = JOBS_AT_ONCE
        self._read: dict[UUID, JobRecord | None] = {}
        self._read_until = 0.0

    async def get(self, job_id: str, owner: Owner | None) -> JobRecord:
        """Return the job of one of the events. `owner` is that of `JobQueue.get`.

        Raises:
            JobNotFound: the job was deleted, or another subject enqueued it.
        """
        wanted = UUID(job_id)
        if time.monotonic() > self._read_until:
            self._read = {}
        if wanted not in self._read:
            ids = self._next(wanted)
            if len(ids) > 1:
                page = await self._queue.get_many(ids, owner=owner, max_bytes=JOBS_BYTES)
                # Without those that did not fit; those that are not found are None.
                self._read = {} if page.stopped_early else dict.fromkeys(ids)
                self._read |= {job.id: job for job in page.jobs}
                self._read_until = time.monotonic() + JOBS_SECONDS
                if page.stopped_early:  # Perhaps before the job that is wanted.
                    self._at_once = len(page.jobs)
        if wanted not in self._read:
            return await self._queue.get(job_id, owner=owner)
        job = self._read[wanted]
        if job is None:
            raise JobNotFound(job_id)
        return job

    def _next(self, wanted: UUID) -> list[UUID]:
        """Return the ids of a job and of those whose events are sent next."""
        try:
            self._place = self._ids.index(wanted, self._place)
        except ValueError:  # A host resolves an earlier event later.
            self._place = self._ids.index(wanted)
        ahead = self._ids[self._place : self._place + EVENTS_AHEAD]
        return list(dict.fromkeys(ahead))[: self._at_once]


@dataclass
class Context:
    """The queue, the caller, and the data that this request has loaded."""

    queue: JobQueue
    caller: Caller
    receive: Receive | None = field(default=None, repr=False)
    """The request's ASGI channel, once its body has been read; None over a WebSocket."""
    verify_again: Callable[[], Awaitable[Caller]] | None = field(default=None, repr=False)
    """Verifies the caller's token again, for operations that last."""
    size: RequestSize | None = None
    """The size of the whole request, if that is known."""
    budget: Budget = field(default_factory=Budget)
    selections: Selections | None = field(default=None, repr=False)
    """What the operation that is executed selects."""
    _gone: asyncio.Event | None = field(default=None, init=False, repr=False)
    _watching: asyncio.Task[None] | None = field(default=None, init=False, repr=False)
    _waiting: int = field(default=0, init=False, repr=False)
    """How many fields wait."""
    _counts: asyncio.Future[dict[str, JobCounts]] | None = field(
        default=None, init=False, repr=False
    )
    _attempts: DataLoader[UUID, list[AttemptRecord]] | None = field(
        default=None, init=False, repr=False
    )
    _logs: DataLoader[int, str] | None = field(default=None, init=False, repr=False)
    _waiting_reasons: DataLoader[JobRecord, WaitingReason | None] | None = field(
        default=None, init=False, repr=False
    )

    @property
    def faults(self) -> FaultBudget:
        """How many more faults may be listed, and which job types they may suggest."""
        faults = self.budget.faults
        faults.job_types = self.caller.job_types
        return faults

    async def counts(self) -> dict[str, JobCounts]:
        """Return the number of jobs per type and status, read once per request."""
        if self._counts is None:
            self._counts = asyncio.ensure_future(self.queue.counts())
        return await self._counts

    @asynccontextmanager
    async def client_gone(self) -> AsyncIterator[asyncio.Event]:
        """Yield an event that is set when the client hangs up before the response.

        For operations that wait: their effect may have to be undone.
        """
        if self._gone is None:
            self._gone = asyncio.Event()
        if self.receive is not None and self._watching is None:
            self._watching = asyncio.create_task(_watch(self.receive, self._gone))
        self._waiting += 1
        try:
            yield self._gone
        finally:
            self._waiting -= 1
            # Fields of a query wait at the same time.
            if self._watching is not None and not self._waiting:
                self._watching.cancel()
                self._watching = None

    @property
    def attempts(self) -> DataLoader[UUID, list[AttemptRecord]]:
        """Load the attempts of jobs, with one query for all jobs of a page."""
        if self._attempts is None:
            self._attempts = DataLoader(load_fn=self._load_attempts)
        return self._attempts

    @property
    def logs(self) -> DataLoader[int, str]:
        """Load the text of the log lines of attempts, with one query for all of a page."""
        if self._logs is None:
            self._logs = DataLoader(load_fn=self._load_logs)
        return self._logs

    @property
    def waiting_reasons(self) -> DataLoader[JobRecord, WaitingReason | None]:
        """Load why jobs wait, with one query for all jobs of a page."""
        if self._waiting_reasons is None:
            self._waiting_reasons = DataLoader(
                load_fn=self._load_waiting_reasons, cache_key_fn=_id_of
            )
        return self._waiting_reasons

    async def job(
        self, job_id: str, owner: Owner | None, jobs: JobsOfEvents | None = None
    ) -> JobRecord:
        """Return a job that the caller may see. With `owner`, it has to be this subject's.

        With `jobs`, it is one of these.

        Raises:
            JobNotFound: no job has this id, it is another's, or the token excludes its type.
        """
        async with self.budget.reading:
            self.budget.check_reading()
            if jobs is None:
                job = await self.queue.get(job_id, owner=owner)
            else:
                job = await jobs.get(job_id, owner)
            self.budget.charge_reading(weight_of(job))
        if not self.caller.may_see(job.type):
            raise JobNotFound(job_id)
        return job

    def forget(self) -> None:
        """Drop the loaded data, and begin a new budget, for the next event of a subscription."""
        self._counts = self._attempts = self._logs = self._waiting_reasons = None
        self.budget = Budget(self.budget.limits)

    async def _load_attempts(self, job_ids: list[UUID]) -> list[list[AttemptRecord]]:
        limits = self.budget.limits
        attempts, is_all = await self.queue.latest_attempts(job_ids, limits.answer_bytes)
        if not is_all:
            message = "The attempts of these jobs are too large. Request the jobs one by one."
            raise BudgetExceeded(message, limits.answer_bytes, "JOBS_MAX_ANSWER_BYTES")
        return [attempts[job_id] for job_id in job_ids]

    async def _load_logs(self, attempts: list[int]) -> list[str]:
        async with self.budget.reading:
            left = self.budget.reading_left // LOG_WEIGHT
            texts, is_all = await self.queue.log_texts(attempts, left)
            if not is_all:
                message = "The log lines are too large. Request those of fewer jobs."
                setting = "JOBS_MAX_ANSWER_BYTES"
                raise BudgetExceeded(message, self.budget.limits.answer_bytes, setting)
            self.budget.charge_reading(LOG_WEIGHT * sum(map(len, texts.values())))
        return [texts.get(attempt, "") for attempt in attempts]

    async def _load_waiting_reasons(self, jobs: list[JobRecord]) -> list[WaitingReason | None]:
        reasons = await self.queue.waiting_reasons(jobs)
        return [reasons.get(job.id) for job in jobs]


Authenticate = Callable[[Any], Caller | Awaitable[Caller | None] | None]
"""Returns the caller of an operation from the context of the host's schema; None for no access."""


@dataclass
class HostedOperation:
    """An operation of a host's schema, whose own context is of any kind."""

    queue: JobQueue
    authenticate: Authenticate
    limits: RequestLimits
    hosts_context: Any = field(repr=False)
    operation: tuple[DocumentNode, OperationDefinitionNode] = field(repr=False)
    context: Context | None = None
    _authenticating: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    async def enter(self) -> Context:
        """Return the context. The first field authenticates the caller for all.

        Raises:
            Unauthenticated: the host gives the caller no access.
        """
        async with self._authenticating:
            if self.context is None:
                answer = self.authenticate(self.hosts_context)
                caller = await answer if isawaitable(answer) else answer
                if caller is None:
                    raise Unauthenticated("This request has no access to the job queue.")
                if not isinstance(caller, Caller):
                    raise TypeError("`authenticate` must return a Caller or None")
                budget = Budget(self.limits)
                selections = Selections(*self.operation)
                self.context = Context(self.queue, caller, budget=budget, selections=selections)
        return self.context


hosted_operation: Final[ContextVar[HostedOperation | None]] = ContextVar(
    "hosted_operation", default=None
)


class SentVariables(NamedTuple):
    """The variables of an operation as the client sent them, for JSON literals that hold some."""

    sent: Mapping[str, Any]
    operation: OperationDefinitionNode

    def default_of(self, name: str) -> ValueNode | None:
        """Return the default value of a variable, as it is written in the document."""
        for each in self.operation.variable_definitions or ():
            if each.variable.name.value == name:
                return each.default_value
        return None


sent_variables: Final[ContextVar[SentVariables | None]] = ContextVar("sent_variables", default=None)


def context_of(info: strawberry.Info[Any, Any]) -> Context:
    """Return the context of a field, below a root field that has entered it."""
    context = info.context
    if isinstance(context, Context):
        return context
    operation = _hosted(info)
    if operation is None or operation.context is None:
        raise RuntimeError("this type is only for the root fields of `graphql_types`")
    return operation.context


async def enter_context(info: strawberry.Info[Any, Any]) -> Context:
    """Return the context of a root field. In a host's schema this authenticates the caller.

    Raises:
        Unauthenticated: the host gives the caller no access.
    """
    if isinstance(info.context, Context):
        return info.context
    operation = _hosted(info)
    if operation is None:
        raise RuntimeError(
            "the schema lacks `extensions=[*jobs.extensions]` of `jobs = graphql_types(...)`"
        )
    return await operation.enter()


def _hosted(info: strawberry.Info[Any, Any]) -> HostedOperation | None:
    """Return the operation of a field in a host's schema.

    Another operation, of a schema without the extensions, may have run in this task before.
    """
    operation = hosted_operation.get()
    if operation is None or operation.hosts_context is not info.context:
        return None
    return operation


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    await wait_for_disconnect(receive)
    gone.set()


def _id_of(job: JobRecord) -> UUID:
    return job.id
