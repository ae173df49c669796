"""The queue against a plain-Python model of it, by random operations, on both databases.

Hypothesis picks the operations. After each, what the queue says is compared with the model, and
the promises are checked on the tables themselves.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from job_registry import Backoff, EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import JobStateConflict, LeaseLost
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.queue import JobQueue
from tests.conftest import advance, run_sql

T = TypeVar("T")

LEASE, TIMEOUT, LIMIT = 30, 70, 2
ERROR = JobError("broken", "It broke.")


class Nothing(Payload):
    """No fields."""


class Something(Payload):
    """The payload of another deploy, which may read the same jobs."""

    text: str = ""


def job_type(name: str, limit: int | None, payload: type[Payload] = Nothing) -> JobType[Any]:
    # A backoff without a range to jitter in, so that the model knows it.
    policy = JobPolicy(
        max_attempts=3,
        timeout_seconds=TIMEOUT,
        concurrency_limit=limit,
        backoff=Backoff(base_seconds=0, cap_seconds=0),
    )
    return JobType(name=name, payload=payload, policy=policy)


REGISTRY, OTHER = (
    JobRegistry([job_type("free", None, payload), job_type("limited", LIMIT, payload)])
    for payload in (Nothing, Something)
)


@dataclass
class ModelJob:
    """What the model knows of a job."""

    type: str
    max_attempts: int
    status: str = "queued"
    attempt: int = 0
    due_at: float = 0.0
    token: str | None = None
    expires_at: float = 0.0
    deadline_at: float = 0.0
    leased_at: float = 0.0
    held_until: float = 0.0
    quick_returns: int = 0
    cancel_requested: bool = False
    parked: bool = False
    leased_by: str = ""
    refused_by: set[str] = field(default_factory=set)
    outcomes: list[str] = field(default_factory=list)

    def park(self) -> None:
        self.token, self.attempt = None, self.attempt - 1
        if self.cancel_requested:
            self.status = "cancelled"
        else:
            self.status, self.parked = "queued", True
            self.refused_by.add(self.leased_by)
        self.outcomes.append("cancelled" if self.cancel_requested else "released")

    def may_go_to(self, deploy: str, now: float) -> bool:
        if self.status != "queued":
            return False
        return deploy not in self.refused_by if self.parked else self.due_at <= now

    def end(self, outcome: str, now: float, *, retryable: bool = True, delay: float = 0.0) -> None:
        self.token = None
        if outcome in ("released", "snoozed"):
            self.attempt -= 1
            quickly = self.leased_at > now - 10
            if quickly and self.quick_returns:
                delay = max(delay, min(60, 2 ** (self.quick_returns - 1)))
            self.quick_returns = self.quick_returns + 1 if quickly else 0
        else:
            self.quick_returns = 0
        if outcome == "succeeded":
            self.status = "succeeded"
        elif self.cancel_requested:
            self.status, outcome = "cancelled", "cancelled"
        elif outcome in ("released", "snoozed") or (retryable and self.attempt < self.max_attempts):
            self.status, self.due_at = "queued", now + delay
        else:
            self.status = "failed"
        self.outcomes.append(outcome)


def with_a_token(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A rule for one of the tokens that workers hold, if there is one.

    No `Bundle`: how many there are depends on how fast the test runs, because a claim takes what
    comes due meanwhile, and what Hypothesis draws may not.
    """

    def decorate(work: Callable[..., None]) -> Any:
        @functools.wraps(work)
        def turn(self: QueueMachine, which: int, **arguments: Any) -> None:
            if self.tokens:
                work(self, self.tokens[-1 - which % len(self.tokens)], **arguments)

        of_one: Any = rule
        return of_one(which=st.integers(0, 99), **drawn)(turn)

    return decorate


class QueueMachine(RuleBasedStateMachine):
    """Random operations on the queue and on the model at once. `url` is set by the test."""

    url: str
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        # Two, as two processes have them: whichever an operation meets, the answer is the same.
        self.databases = [open_database(self.url), open_database(self.url)]
        queues = [JobQueue(REGISTRY, each, lease_seconds=LEASE) for each in self.databases]
        self.turns = itertools.cycle(queues)
        self.deploys = {
            "one": queues[0],
            "other": JobQueue(OTHER, self.databases[1], lease_seconds=LEASE),
        }
        self.model: dict[uuid.UUID, ModelJob] = {}
        self.tokens_of: dict[str, uuid.UUID] = {}
        self.tokens: list[str] = []
        self.now = 0.0
        self.began = time.monotonic()
        # Until when attempts hold a place that have timed out while their workers were alive.
        self.places: list[float] = []
        self.workers = itertools.count()
        run_sql(self.url, "DELETE FROM job", "DELETE FROM job_count")

    @property
    def queue(self) -> JobQueue:
        """The queue whose turn it is."""
        return next(self.turns)

    def teardown(self) -> None:
        for database in self.databases:
            self.do(database.close())
        self.loop.close()

    def do(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return self.loop.run_until_complete(run())

    @rule(
        target=jobs, name=st.sampled_from(["free", "limited"]), most=st.sampled_from([None, 1, 2])
    )
    def enqueue(self, name: str, most: int | None) -> uuid.UUID:
        job = self.do(self.queue.enqueue(EnqueueRequest(name, {}, max_attempts=most))).job
        self.model[job.id] = ModelJob(name, most or 3, due_at=self.now)
        return job.id

    @rule(limit=st.integers(1, 4), deploy=st.sampled_from(["one", "other"]))
    def lease(self, limit: int, deploy: str) -> None:
        queue = self.deploys[deploy]
        leases = self.do(queue.lease(["free", "limited"], f"w{next(self.workers)}", limit=limit))
        # Claiming recovers first.
        self.recover_model()
        for lease in leases:
            job = self.model[lease.job.id]
            # The model's clock stands still while the test runs.
            passed = time.monotonic() - self.began
            assert job.may_go_to(deploy, self.now + passed)
            job.parked, job.leased_by = False, deploy
            job.status, job.token, job.attempt = "running", lease.token, job.attempt + 1
            job.expires_at, job.deadline_at = self.now + LEASE, self.now + TIMEOUT
            job.leased_at, job.held_until = self.now, self.now + LEASE
            self.tokens_of[lease.token] = lease.job.id
            self.tokens.append(lease.token)
        # And it takes all it may.
        held = [until for until in self.places if until > self.now]
        room = LIMIT - self.running("limited") - len(held)
        left = [j for j in self.model.values() if j.may_go_to(deploy, self.now)]
        could = [j for j in left if j.type == "free" or room > 0]
        assert len(leases) == limit or not could

    @rule()
    def lose_the_workers_and_let_others_take_over(self) -> None:
        """The tokens of before are stale then, while their jobs run again."""
        self.pass_time(LEASE + 1)
        self.lease(4, "one")

    @with_a_token()
    def heartbeat(self, token: str) -> None:
        job = self.expect(self.queue.heartbeat(token, {"at": self.now}), token)
        if job is not None:
            job.expires_at = min(self.now + LEASE, job.deadline_at)
            job.held_until = self.now + LEASE

    @with_a_token()
    def complete(self, token: str) -> None:
        job = self.model[self.tokens_of[token]]
        if job.status == "succeeded" and job.outcomes[-1] == "succeeded" and self.last(token):
            # Sent again: it succeeds, and writes nothing.
            self.do(self.queue.complete(token, {"again": True}))
            return
        ended = self.expect(self.queue.complete(token, {"ok": True}), token)
        if ended is not None:
            ended.end("succeeded", self.now)

    @with_a_token(retryable=st.booleans(), delay=st.sampled_from([None, 5]))
    def fail(self, token: str, retryable: bool, delay: int | None) -> None:
        work = self.queue.fail(token, ERROR, retryable=retryable, retry_after_seconds=delay)
        job = self.expect(work, token)
        if job is not None:
            job.end("failed", self.now, retryable=retryable, delay=delay or 0)

    @with_a_token()
    def release(self, token: str) -> None:
        job = self.expect(self.queue.release(token), token)
        if job is not None:
            job.end("released", self.now)

    @with_a_token()
    def park(self, token: str) -> None:
        """The worker cannot read the payload."""
        job = self.model[self.tokens_of[token]]
        fingerprint = (OTHER if job.leased_by == "other" else REGISTRY)[job.type].fingerprint
        parked = self.expect(self.queue.park(token, fingerprint, ERROR), token)
        if parked is not None:
            parked.park()

    @rule(name=st.sampled_from(["free", "limited"]))
    def unpark(self, name: str) -> None:
        parked = [j for j in self.model.values() if j.parked and j.type == name]
        assert self.do(self.queue.unpark([name])) == len(parked)
        for job in parked:
            job.parked, job.due_at = False, self.now
            job.refused_by.clear()

    @with_a_token(seconds=st.sampled_from([0, 20]))
    def snooze(self, token: str, seconds: int) -> None:
        job = self.expect(self.queue.snooze(token, seconds), token)
        if job is not None:
            job.end("snoozed", self.now, delay=seconds)

    @rule(job_id=jobs)
    def cancel(self, job_id: uuid.UUID) -> None:
        job = self.model[job_id]
        try:
            self.do(self.queue.cancel(job_id))
        except JobStateConflict:
            assert job.status not in ("queued", "running")
            return
        assert job.status in ("queued", "running")
        if job.status == "queued":
            job.status, job.parked = "cancelled", False
        else:
            job.cancel_requested = True

    @rule(job_id=jobs)
    def retry(self, job_id: uuid.UUID) -> None:
        job = self.model[job_id]
        try:
            self.do(self.queue.retry(job_id))
        except JobStateConflict:
            assert job.status not in ("failed", "cancelled")
            return
        assert job.status in ("failed", "cancelled")
        job.status, job.due_at, job.cancel_requested = "queued", self.now, False
        job.quick_returns = 0
        job.max_attempts = max(job.max_attempts, job.attempt + 1)

    @rule(seconds=st.sampled_from([3, 16, 31, 80]))
    def pass_time(self, seconds: int) -> None:
        """Also how a worker dies: it just does not renew its leases any more."""
        self.do(advance(self.url, seconds))
        self.now += seconds

    @with_a_token()
    def forget(self, token: str) -> None:
        """A worker that is gone for good."""
        self.tokens.remove(token)

    @rule()
    def recover(self) -> None:
        self.do(self.queue.recover())
        self.recover_model()

    @invariant()
    def tables_keep_the_promises(self) -> None:
        rows = self.rows("SELECT id, status, attempt, max_attempts FROM job ORDER BY id")
        stored = {uuid.UUID(str(row[0])): tuple(row[1:]) for row in rows}
        # No job is lost, and each is where the model has it; an attempt never passes its bound.
        assert stored == {
            job_id: (job.status, job.attempt, job.max_attempts)
            for job_id, job in self.model.items()
        }
        assert all(attempt <= most for _, attempt, most in stored.values())
        attempts = self.rows("SELECT job_id, outcome FROM job_attempt ORDER BY id")
        of_job: dict[uuid.UUID, list[str | None]] = {job_id: [] for job_id in self.model}
        for job_id, outcome in attempts:
            of_job[uuid.UUID(str(job_id))].append(outcome)
        for job_id, job in self.model.items():
            # One lease in force while it runs and none otherwise; each ended as it was reported.
            running: list[str | None] = [None] if job.status == "running" else []
            assert of_job[job_id] == [*job.outcomes, *running]
            assert job.status != "succeeded" or of_job[job_id][-1] == "succeeded"
        assert self.running("limited") <= LIMIT
        counts = self.do(self.queue.counts())
        for name in ("free", "limited"):
            for status in JobStatus:
                wanted = [j for j in self.model.values() if (j.type, j.status) == (name, status)]
                assert getattr(counts[name], status) == len(wanted)
            parked = [j for j in self.model.values() if j.type == name and j.parked]
            assert counts[name].parked == len(parked)

    def rows(self, statement: str) -> Any:
        async def read() -> Any:
            async with self.databases[0].reading() as connection:
                return (await connection.exec_driver_sql(statement)).all()

        return self.do(read())

    def expect(self, work: Awaitable[object], token: str) -> ModelJob | None:
        """The job if the lease is in force, and then the call works; else it is `LeaseLost`."""
        job = self.model[self.tokens_of[token]]
        in_force = job.status == "running" and job.token == token and self.now < job.expires_at
        if in_force:
            self.do(work)
            return job
        with pytest.raises(LeaseLost):
            self.do(work)
        return None

    def last(self, token: str) -> bool:
        """Whether this is the latest lease of its job."""
        job_id = self.tokens_of[token]
        return [t for t, i in self.tokens_of.items() if i == job_id][-1] == token

    def recover_model(self) -> None:
        for job in self.model.values():
            if job.status == "running" and job.expires_at <= self.now:
                outcome = "timed_out" if job.deadline_at <= self.now else "lost"
                if outcome == "timed_out" and job.type == "limited":
                    # Its worker may be alive, and may still run it.
                    self.places.append(job.held_until)
                job.end(outcome, self.now)

    def running(self, name: str) -> int:
        return sum(j.status == "running" and j.type == name for j in self.model.values())


@pytest.mark.parametrize(
    ("examples", "steps"), [(5, 50), pytest.param(100, 80, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_queue_does_what_the_model_does(
    kind: str, examples: int, steps: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if kind == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "jobs.db")
        url = f"sqlite:///{tmp_path / 'jobs.db'}"
    else:
        url = request.getfixturevalue("fresh_postgresql_url")
    machine = type("Machine", (QueueMachine,), {"url": url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            # Another seed each time; what fails is printed as a program that fails again.
            derandomize=False,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
