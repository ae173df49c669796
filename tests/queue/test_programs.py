"""The queue as a Python program uses it: typed, in its transactions, with and without asyncio."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from job_registry import (
    DefinitionError,
    EnqueueRequest,
    JobContext,
    JobPolicy,
    JobRegistry,
    JobType,
    JobTypeNotFound,
    Payload,
    PayloadInvalid,
)
from job_registry_api import (
    IdempotencyConflict,
    JobFailed,
    JobNotFound,
    JobQueue,
    JobStatus,
    MigrationRefused,
    QueueUnavailable,
    Worker,
    create_app,
    load_settings,
)
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.events import Events
from tests import ROOT
from tests.conftest import async_url, run_sql

TESTS = [
    "-p", "no:xdist", "tests/queue/test_programs.py", "tests/queue/test_caller_transactions.py",
    "tests/queue/test_life_of_a_job.py", "tests/queue/test_migrations.py",
]  # fmt: skip
"""What must also pass with SQLAlchemy 2.0."""


class MailSend(Payload):
    to: str
    copies: int = 1
    at: datetime | None = None


class Untyped(Payload):
    pass


mail_send = JobType(name="mail.send", payload=MailSend, policy=JobPolicy(max_attempts=1))


@mail_send.handler
async def send(job: JobContext, payload: MailSend) -> dict[str, Any]:
    if payload.to == "nobody":
        raise RuntimeError(f"no mailbox of {payload.to}")
    if payload.to == "slow":
        await asyncio.sleep(30)
    return {"sent": payload.copies}


@pytest.fixture
async def queue(database_url: str) -> AsyncIterator[JobQueue]:
    async with JobQueue.from_url(database_url, [mail_send]) as queue:
        yield queue


async def test_a_payload_is_enqueued_as_the_job_type_that_has_its_class(queue: JobQueue) -> None:
    at = datetime(2030, 1, 31, 12, tzinfo=UTC)
    job = (
        await queue.enqueue(
            MailSend(to="ada", at=at),
            priority=80,
            schedule_at=at,
            max_attempts=7,
            idempotency_key="k",
            created_by="shop",
        )
    ).job
    assert (job.type, job.priority, job.max_attempts, job.next_run_at, job.created_by) == (
        "mail.send",
        80,
        7,
        at,
        "shop",
    )
    # With its defaults: a default that changes does not change jobs that are queued.
    assert (await queue.get(job.id)).payload == {
        "to": "ada",
        "copies": 1,
        "at": "2030-01-31T12:00:00Z",
    }


async def test_the_same_key_and_payload_is_the_first_job(queue: JobQueue) -> None:
    first = await queue.enqueue(MailSend(to="ada"), idempotency_key="k")
    again = await queue.enqueue(MailSend(to="ada"), idempotency_key="k")
    assert (again.job.id, again.deduplicated) == (first.job.id, True)
    with pytest.raises(IdempotencyConflict):
        await queue.enqueue(MailSend(to="bob"), idempotency_key="k")


async def test_an_instance_that_was_not_validated_is_refused(queue: JobQueue) -> None:
    wrong: Any = "two"
    with pytest.raises(PayloadInvalid, match="/copies"):
        await queue.enqueue(MailSend.model_construct(to="ada", copies=wrong))


async def test_a_payload_of_no_job_type_is_a_sentence(queue: JobQueue) -> None:
    with pytest.raises(DefinitionError, match="no job type .* has the payload Untyped; add its"):
        await queue.enqueue(Untyped())
    with pytest.raises(TypeError, match="expected an instance of a Payload"):
        await queue.enqueue(cast(Any, {"to": "ada"}))
    with pytest.raises(TypeError, match="prority"):
        await queue.enqueue(MailSend(to="ada"), **cast(Any, {"prority": 1}))


async def test_many_payloads_are_enqueued_each_with_its_own_options(queue: JobQueue) -> None:
    results = await queue.enqueue_many(
        [
            MailSend(to="ada"),
            queue.request(MailSend(to="bob"), priority=90),
            EnqueueRequest("mail.sned", {}),
        ]
    )
    assert isinstance(results[0], Enqueued)
    assert isinstance(results[1], Enqueued)
    assert (results[0].job.priority, results[1].job.priority) == (50, 90)
    assert isinstance(results[2], JobTypeNotFound)


async def test_a_new_sqlite_file_is_created_and_migrated_when_the_queue_opens(
    tmp_path: Path,
) -> None:
    file = tmp_path / "jobs.db"
    async with JobQueue.from_url(f"sqlite:///{file}", [mail_send]) as queue:
        await queue.enqueue(MailSend(to="ada"))
        assert file.stat().st_mode & 0o777 == 0o600
    async with JobQueue.from_url(f"sqlite:///{file}", [mail_send]) as queue:
        assert len((await queue.list()).jobs) == 1


async def test_a_postgresql_database_that_was_not_migrated_is_a_sentence(
    fresh_postgresql_url: str,
) -> None:
    drop = "DROP SCHEMA job_registry CASCADE"
    await asyncio.to_thread(run_sql, fresh_postgresql_url, drop)
    with pytest.raises(MigrationRefused, match="job-registry migrate"):
        async with JobQueue.from_url(fresh_postgresql_url, [mail_send]):
            pass


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://shop/jobs", "expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"),
        ("postgresql+psycopg://u:secret@shop/jobs", "expected sqlite:///FILE or postgresql://"),
        ("sqlite://", "expected sqlite:///FILE or"),
        ("sqlite:///:memory:", "a database in memory ends with its connection"),
    ],
)
def test_a_wrong_url_is_a_sentence_without_the_password(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match="the URL of the database is wrong: ") as refused:
        JobQueue.from_url(url, [mail_send])
    assert expected in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("value", [0, math.inf, math.nan])
@pytest.mark.parametrize("argument", ["lease_seconds", "timeout_seconds", "pool_size"])
def test_an_argument_that_would_stop_the_queue_is_a_sentence(argument: str, value: float) -> None:
    arguments: dict[str, Any] = {argument: value}
    refusal = f"{argument}: expected a finite number above 0; got {value}"
    with pytest.raises(ValueError, match=refusal):
        JobQueue.from_url("sqlite:///jobs.db", [mail_send], **arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"pooler": "x"}, 'pooler: got "x"; expected "session" or "transaction"'),
        ({"schema": "Bad!"}, 'schema: got "Bad!"; expected 1 to 63 lower-case letters'),
        ({"schema": "pg_jobs"}, "expected a name that does not start with pg_"),
        ({"listen_url": "mysql://u:secret@shop/jobs"}, "listen_url: got "),
    ],
)
def test_the_arguments_of_a_database_are_checked_as_the_settings_are(
    arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=r"^\w+: got ") as refused:
        JobQueue.from_url("postgresql://shop/jobs", [mail_send], **arguments)
    assert expected in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_pooler_for_a_sqlite_file_is_refused() -> None:
    with pytest.raises(ValueError, match="it is for PostgreSQL, and the URL names SQLite"):
        JobQueue.from_url("sqlite:///jobs.db", [mail_send], pooler="transaction")


def test_a_job_type_instead_of_a_list_is_a_sentence() -> None:
    with pytest.raises(DefinitionError, match="expected a list of job types; got"):
        JobQueue.from_url("sqlite:///jobs.db", cast(Any, mail_send))


async def test_a_mistyped_option_names_the_method_that_was_called(queue: JobQueue) -> None:
    mistyped: dict[str, Any] = {"priorty": 3}
    expected = r"^enqueue\(\) has no argument priorty; did you mean priority\?"
    with pytest.raises(TypeError, match=expected):
        await queue.enqueue(MailSend(to="ada"), **mistyped)
    with pytest.raises(TypeError, match=expected):
        queue.sync.enqueue(MailSend(to="ada"), **mistyped)
    with pytest.raises(TypeError, match=r"^request\(\) has no argument priorty"):
        queue.request(MailSend(to="ada"), **mistyped)


def operations(queue: JobQueue) -> list[Coroutine[Any, Any, object]]:
    job_id = uuid.uuid4()
    return [
        queue.enqueue(MailSend(to="ada")),
        queue.enqueue_many([MailSend(to="ada")]),
        queue.validate(queue.request(MailSend(to="ada"))),
        queue.get(job_id),
        queue.list(),
        queue.result(job_id),
        queue.cancel(job_id),
        queue.retry(job_id),
        queue.unpark(),
        Worker(queue).run(),
    ]


async def test_each_operation_says_that_the_queue_is_not_open(database_url: str) -> None:
    queue = JobQueue.from_url(database_url, [mail_send])
    for operation in operations(queue):
        with pytest.raises(RuntimeError, match="the queue is not open; open it first"):
            await operation
    async with queue:
        assert (await queue.enqueue(MailSend(to="ada"))).job.type == "mail.send"
    for operation in operations(queue):
        with pytest.raises(RuntimeError, match="the queue was closed"):
            await operation


async def test_each_operation_says_that_it_runs_on_another_event_loop(queue: JobQueue) -> None:
    def elsewhere(operation: Coroutine[Any, Any, object]) -> None:
        asyncio.run(asyncio.wait_for(operation, 5))

    for operation in operations(queue):
        with pytest.raises(RuntimeError, match=r"open on another event loop; .* `queue\.sync`"):
            await asyncio.to_thread(elsewhere, operation)


@pytest.mark.parametrize("wrong", ["database", "role"])
async def test_opening_says_why_the_database_is_not_available(
    fresh_postgresql_url: str, wrong: str
) -> None:
    url = make_url(fresh_postgresql_url)
    url = url.set(database="nowhere") if wrong == "database" else url.set(username="nobody")
    queue = JobQueue.from_url(url.render_as_string(hide_password=False), [mail_send])
    expected = rf'not available: {wrong} "no\w+" does not exist'
    with pytest.raises(QueueUnavailable, match=expected) as refused:
        await queue.open()
    assert "Try again" not in str(refused.value)
    # A request to the application is not told.
    application = create_app(load_settings({"JOBS_DATABASE_URL": str(url)}), queue=None)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(application), base_url="http://localhost"
    )
    async with client:
        response = await client.get("/jobs/1")
    assert (response.status_code, "nowhere" in response.text) == (503, False)
    assert "is not available. Try again." in response.text


async def test_a_worker_that_could_run_no_job_is_a_sentence(queue: JobQueue) -> None:
    with pytest.raises(ValueError, match="concurrency: expected 1 or more; got 0"):
        Worker(queue, concurrency=0)


async def test_a_worker_of_no_types_works_none(queue: JobQueue) -> None:
    assert Worker(queue, types=[]).types == ()


async def test_a_queue_is_opened_once(queue: JobQueue) -> None:
    with pytest.raises(RuntimeError, match="open already"):
        await queue.open()


def test_a_queue_that_was_closed_can_be_opened_again(database_url: str) -> None:
    """As a module's queue in each test of a web application, or in each command of a program."""
    queue = JobQueue.from_url(database_url, [mail_send])

    async def send_one() -> Any:
        async with queue, Worker(queue).running():
            with queue.events.subscribe() as events:
                job = (await queue.enqueue(MailSend(to="ada"))).job
                assert (await anext(aiter(events))).job_id == job.id
                return await queue.result(job.id, timeout=10)

    assert [asyncio.run(send_one()) for _ in range(2)] == [{"sent": 1}] * 2
    for _ in range(2):
        with queue.sync as sync:
            sync.enqueue(MailSend(to="ada"))
    with queue.sync as sync:
        assert len(sync.list().jobs) == 4
    with pytest.raises(RuntimeError, match="the queue was closed"):
        asyncio.run(queue.list())
    with pytest.raises(RuntimeError, match="the queue was closed"):
        queue.sync.list()


async def test_a_queue_whose_opening_was_cancelled_can_be_opened(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def long_in_coming(_: Events) -> AsyncIterator[None]:
        await asyncio.sleep(30)
        yield

    queue = JobQueue.from_url(database_url, [mail_send])
    with monkeypatch.context() as patch:
        patch.setattr(Events, "listening", long_in_coming)
        opening = asyncio.create_task(queue.open())
        await asyncio.sleep(0.5)
        opening.cancel()
        await asyncio.wait({opening})
    async with queue:
        await queue.enqueue(MailSend(to="ada"))


async def test_the_settings_and_the_catalog_are_those_of_the_variables(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBS_DATABASE_URL", database_url)
    monkeypatch.setenv("JOBS_LEASE_SECONDS", "7")
    async with JobQueue.from_settings() as queue:
        assert "payout.execute" in queue.registry
        assert queue.lease_seconds == 7


# Results.


async def test_a_result_is_waited_for(queue: JobQueue) -> None:
    async with Worker(queue).running():
        job = (await queue.enqueue(MailSend(to="ada", copies=3))).job
        assert await queue.result(job.id, timeout=10) == {"sent": 3}
        assert await queue.result(str(job.id), timeout=10) == {"sent": 3}


async def test_the_result_of_another_process_comes_without_a_pause(
    queue: JobQueue, database_url: str
) -> None:
    async with JobQueue.from_url(database_url, [mail_send]) as other, Worker(other).running():
        await asyncio.sleep(0.2)
        job = (await queue.enqueue(MailSend(to="ada"))).job
        started = time.monotonic()
        assert await queue.result(job.id, timeout=10) == {"sent": 1}
        assert time.monotonic() - started < 2


async def test_a_job_that_fails_or_is_cancelled_has_no_result(queue: JobQueue) -> None:
    scheduled = (
        await queue.enqueue(MailSend(to="ada"), schedule_at=datetime(2040, 1, 1, tzinfo=UTC))
    ).job
    async with Worker(queue).running():
        job = (await queue.enqueue(MailSend(to="nobody"))).job
        with pytest.raises(JobFailed, match="failed: handler_failed: .*no mailbox") as failed:
            await queue.result(job.id, timeout=10)
        assert failed.value.job.status is JobStatus.FAILED
    waiting = asyncio.create_task(queue.result(scheduled.id, timeout=10))
    await asyncio.sleep(0.1)
    await queue.cancel(scheduled.id)
    with pytest.raises(JobFailed, match=r"was cancelled(\.|: (?!cancelled))"):
        await waiting


async def test_a_wait_for_a_result_ends_at_its_timeout_and_the_job_goes_on(
    queue: JobQueue,
) -> None:
    job = (await queue.enqueue(MailSend(to="ada"))).job
    with pytest.raises(TimeoutError, match=f"{job.id} has not ended within 0.1 seconds"):
        await queue.result(job.id, timeout=0.1)
    assert (await queue.get(job.id)).status is JobStatus.QUEUED
    with pytest.raises(JobNotFound):
        await queue.result("0" * 32, timeout=1)


async def test_a_wait_for_a_result_ends_when_the_queue_is_closed(database_url: str) -> None:
    # At first, the wait still reads the job.
    for seconds in (0, 0.001, 0.002, 0.003, 0.004, 0.1):
        async with JobQueue.from_url(database_url, [mail_send]) as queue:
            job = (await queue.enqueue(MailSend(to="ada"))).job
            waiting = asyncio.create_task(queue.result(job.id))
            await asyncio.sleep(seconds)
        with pytest.raises(QueueUnavailable) as closed:
            await asyncio.wait_for(waiting, 2)
        assert closed.value.reason == "the queue was closed"
    with pytest.raises(RuntimeError, match="the queue was closed"):
        await queue.result(job.id)


# Logs.

PROGRAM = """
import asyncio, logging, sys
from tests.queue.test_programs import MailSend, mail_send
from job_registry_api import JobQueue, Worker

async def main():
    async with JobQueue.from_url(sys.argv[1], [mail_send]) as queue, Worker(queue).running():
        job = (await queue.enqueue(MailSend(to="nobody"))).job
        try:
            await queue.result(job.id, timeout=20)
        except Exception as error:
            print(type(error).__name__)

if "info" in sys.argv:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["", "info"])
def test_lines_go_to_the_logs_of_the_program_and_never_to_its_output(
    tmp_path: Path, level: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"sqlite:///{tmp_path}/jobs.db", level],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "JobFailed\n"
    assert ("INFO job_registry.events job.created job_id=" in done.stderr) is (level == "info")
    # A failed attempt is a warning, which the standard library writes unless it is told otherwise.
    assert "job.attempt_failed" in done.stderr
    assert "tests/queue/test_programs.py" in done.stderr
    assert "no mailbox of nobody" not in done.stderr


# Without asyncio.


@pytest.fixture
def closed(database_url: str) -> Iterator[JobQueue]:
    """A queue that no event loop has opened."""
    queue = JobQueue.from_url(database_url, [mail_send])
    yield queue
    queue.sync.close()


def test_a_program_without_an_event_loop_has_the_same_operations(closed: JobQueue) -> None:
    with closed.sync as queue:
        job = queue.enqueue(MailSend(to="ada"), priority=70).job
        assert queue.get(job.id).priority == 70
        assert [each.id for each in queue.list().jobs] == [job.id]
        assert queue.cancel(job.id).status is JobStatus.CANCELLED
        assert queue.retry(job.id).status is JobStatus.QUEUED
        many = queue.enqueue_many([MailSend(to="bob"), queue.request(MailSend(to="eve"))])
        assert all(isinstance(each, Enqueued) for each in many)
        with pytest.raises(TimeoutError):
            queue.result(job.id, timeout=0.1)
        with pytest.raises(JobNotFound):
            queue.get("0" * 32)
        # It was ignored.
        with pytest.raises(TypeError, match="an EnqueueRequest has its own priority"):
            queue.enqueue(EnqueueRequest("mail.send", {"to": "ada"}), priority=1)
    assert not [thread for thread in threading.enumerate() if thread.name == "job-queue"]


def test_threads_share_the_queue(closed: JobQueue) -> None:
    def enqueue() -> None:
        for _ in range(10):
            closed.sync.enqueue(MailSend(to="ada"))

    threads = [threading.Thread(target=enqueue) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert closed.sync.list(first=200).jobs.__len__() == 80


async def test_a_thread_of_a_program_with_an_event_loop_uses_the_open_queue(
    queue: JobQueue,
) -> None:
    async with Worker(queue).running():

        def handle_request() -> Any:
            job = queue.sync.enqueue(MailSend(to="ada", copies=2)).job
            return queue.sync.result(job.id, timeout=10)

        assert await asyncio.to_thread(handle_request) == {"sent": 2}
    with pytest.raises(RuntimeError, match="would block the event loop"):
        queue.sync.enqueue(MailSend(to="ada"))


def test_a_failed_start_is_an_error_and_leaves_no_thread(tmp_path: Path) -> None:
    queue = JobQueue.from_url(f"sqlite:///{tmp_path}/missing/jobs.db", [mail_send])
    with pytest.raises(QueueUnavailable):
        queue.sync.enqueue(MailSend(to="ada"))
    assert not [thread for thread in threading.enumerate() if thread.name == "job-queue"]


def _answer_of_a_fork(queue: JobQueue) -> str:
    return _in_a_fork(partial(_enqueued, queue))


def _in_a_fork(function: Callable[[], str]) -> str:
    """Return what a function returns in a process that is forked from this one."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=lambda: answer.put(function()), daemon=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        child.start()
    try:
        return str(answer.get(timeout=10))
    finally:
        child.kill()
        child.join(10)


def _enqueued(queue: JobQueue) -> str:
    try:
        queue.sync.enqueue(MailSend(to="ada"))
    except RuntimeError as error:
        return str(error)
    return "enqueued"


def _worked(worker: Worker, queue: JobQueue) -> str:
    """Return the name under which the worker has run a job."""

    async def work() -> str:
        async with queue, worker.running():
            job = (await queue.enqueue(MailSend(to="ada"))).job
            await queue.result(job.id, timeout=10)
            return (await queue.get(job.id)).worker_id or ""

    return asyncio.run(work())


def test_ctrl_c_during_the_first_call_ends_the_thread_that_opens_the_queue(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://ada@127.0.0.1:{silent.getsockname()[1]}/jobs"
        queue = JobQueue.from_url(url, [mail_send], timeout_seconds=2)
        former = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                queue.sync.enqueue(MailSend(to="ada"))
        finally:
            signal.signal(signal.SIGALRM, former)
        until = time.monotonic() + 10
        while any(thread.name == "job-queue" for thread in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.05)
        # The next call tries again.
        with pytest.raises(QueueUnavailable):
            queue.sync.enqueue(MailSend(to="ada"))
        queue.sync.close()
    assert capfd.readouterr().err == ""


def test_a_forked_process_does_not_use_the_connections_of_its_parent(closed: JobQueue) -> None:
    closed.sync.enqueue(MailSend(to="ada"))
    assert "before this process was forked" in _answer_of_a_fork(closed)


async def test_a_forked_process_does_not_wait_for_the_event_loop_of_its_parent(
    database_url: str,
) -> None:
    async with JobQueue.from_url(database_url, [mail_send]) as queue:
        assert "before this process was forked" in _answer_of_a_fork(queue)


@pytest.mark.any_database
def test_a_queue_that_nobody_has_opened_can_be_opened_in_each_fork(closed: JobQueue) -> None:
    assert closed.sync  # As in a module: `enqueue = queue.sync.enqueue`.
    assert [_answer_of_a_fork(closed) for _ in range(2)] == ["enqueued"] * 2
    closed.sync.enqueue(MailSend(to="ada"))
    assert len(closed.sync.list().jobs) == 3


def test_forks_that_open_the_same_queue_are_different_senders_of_events(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    queue = JobQueue.from_url(url, [mail_send])
    assert [_answer_of_a_fork(queue) for _ in range(2)] == ["enqueued"] * 2
    messages = [json.loads(text) for (text,) in run_sql(url, "SELECT message FROM job_event_batch")]
    assert len({message["process"].partition("/")[0] for message in messages}) == 2


@pytest.mark.any_database
def test_forks_that_run_the_same_worker_are_different_workers(closed: JobQueue) -> None:
    worker = Worker(closed)
    names = {_in_a_fork(partial(_worked, worker, closed)) for _ in range(2)}
    assert len(names | {worker.worker_id}) == 3
    named = Worker(closed, worker_id="mail-1")
    assert _in_a_fork(partial(_worked, named, closed)) == "mail-1"


# In the transactions of the program.


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """The program's own engine, with another driver than the queue's."""
    if database_url.startswith("sqlite"):
        engine = create_engine(database_url)

        @event.listens_for(engine, "connect")
        def no_implicit_begin(connection: Any, _record: object) -> None:
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        url = make_url(database_url.replace("postgres://", "postgresql://", 1))
        engine = create_engine(url.set(drivername="postgresql+psycopg"))
    yield engine
    engine.dispose()


def test_a_session_without_asyncio_stores_the_job_with_the_programs_rows(
    closed: JobQueue, engine: Engine
) -> None:
    with Session(engine) as session:
        session.execute(text("CREATE TABLE shop_order (id INTEGER)"))
        session.commit()
        session.execute(text("INSERT INTO shop_order VALUES (1)"))
        job = closed.sync.enqueue(MailSend(to="ada"), session=session).job
        many = closed.sync.enqueue_many([MailSend(to="b"), MailSend(to="c")], session=session)
        assert closed.sync.list().jobs == []
        session.commit()
        session.execute(text("INSERT INTO shop_order VALUES (2)"))
        closed.sync.enqueue(MailSend(to="never"), session=session)
        session.rollback()
        assert session.execute(text("SELECT count(*) FROM shop_order")).scalar_one() == 1
    stored = {each.id for each in closed.sync.list().jobs}
    assert stored == {job.id, *(each.job.id for each in many if isinstance(each, Enqueued))}


@pytest.mark.any_database
async def test_a_scoped_session_is_the_session_of_its_scope(
    queue: JobQueue, engine: Engine, database_url: str
) -> None:
    """As `db.session` of Flask-SQLAlchemy is."""
    session = scoped_session(sessionmaker(engine))
    queue.sync.enqueue(MailSend(to="never"), session=session)
    session.rollback()
    queue.sync.enqueue(MailSend(to="ada"), session=session)
    queue.sync.enqueue_many([MailSend(to="bob")], session=session)
    session.commit()
    session.remove()
    async_engine = create_async_engine(async_url(database_url))
    async_session = async_scoped_session(
        async_sessionmaker(async_engine), scopefunc=asyncio.current_task
    )
    await queue.enqueue(MailSend(to="eve"), session=async_session)
    await queue.enqueue_many([MailSend(to="zoe")], session=async_session)
    await async_session.commit()
    await async_session.remove()
    await async_engine.dispose()
    stored = [cast(Any, job.payload)["to"] for job in (await queue.list()).jobs]
    assert stored == ["zoe", "eve", "bob", "ada"]


@pytest.mark.any_database
def test_threads_that_a_library_has_replaced_are_a_sentence(
    closed: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gevent and eventlet run all threads of a program in one."""

    class Greenlet:
        def __init__(self, target: Callable[[], None], **_options: Any) -> None:
            self.start = target

        def join(self) -> None: ...

    with monkeypatch.context() as replaced:
        replaced.setattr(threading, "Thread", Greenlet)
        with pytest.raises(RuntimeError, match="gevent or eventlet has replaced threads"):
            closed.sync.list()
    assert closed.sync.list().jobs == []


def test_a_key_is_unique_in_the_session_of_a_program_too(closed: JobQueue, engine: Engine) -> None:
    sync = closed.sync
    first = sync.enqueue(MailSend(to="ada"), idempotency_key="k").job
    with Session(engine) as session:
        again = sync.enqueue(MailSend(to="ada"), idempotency_key="k", session=session)
        assert (again.job.id, again.deduplicated) == (first.id, True)
        with pytest.raises(IdempotencyConflict):
            sync.enqueue(MailSend(to="bob"), idempotency_key="k", session=session)
        results = sync.enqueue_many(
            [MailSend(to="c"), sync.request(MailSend(to="bob"), idempotency_key="k")],
            atomic=True,
            session=session,
        )
        assert all(isinstance(each, Exception) for each in results)
        session.commit()
    assert [job.id for job in sync.list().jobs] == [first.id]


async def test_a_bulk_joins_the_transaction_of_an_async_session(
    queue: JobQueue, database_url: str
) -> None:
    engine = create_async_engine(async_url(database_url))
    async with AsyncSession(engine) as session:
        await queue.enqueue_many([MailSend(to="ada"), MailSend(to="bob")], session=session)
        await session.rollback()
        await queue.enqueue_many([MailSend(to="eve")], session=session)
        await session.commit()
    await engine.dispose()
    assert [cast(Any, job.payload)["to"] for job in (await queue.list()).jobs] == ["eve"]


def test_a_queue_that_could_not_be_opened_is_opened_by_the_next_call(tmp_path: Path) -> None:
    folder = tmp_path / "mounted later"
    with JobQueue.from_url(f"sqlite:///{folder}/jobs.db", [mail_send]).sync as sync:
        with pytest.raises(QueueUnavailable):
            sync.enqueue(MailSend(to="ada"))
        folder.mkdir()
        job = sync.enqueue(MailSend(to="ada")).job
        assert sync.get(job.id) == job


def test_calls_that_closing_interrupts_say_that_the_queue_was_closed(closed: JobQueue) -> None:
    errors: list[Exception] = []

    def call() -> None:
        try:
            while True:
                closed.sync.list()
        except Exception as error:
            errors.append(error)

    closed.sync.list()
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    closed.sync.close()
    for thread in threads:
        thread.join()
    # A call that begins later is that of a queue that was closed.
    assert {type(error) for error in errors} <= {QueueUnavailable, RuntimeError}


def test_an_atomic_bulk_is_discarded_by_a_rollback(closed: JobQueue, engine: Engine) -> None:
    plain = create_engine(engine.url)  # Its driver begins a transaction late on SQLite.
    with Session(plain) as session:
        closed.sync.enqueue_many([MailSend(to="a"), MailSend(to="b")], atomic=True, session=session)
        assert closed.sync.list().jobs == []
        session.rollback()
    plain.dispose()
    assert closed.sync.list().jobs == []


async def test_an_atomic_bulk_is_discarded_by_a_rollback_of_an_async_session(
    queue: JobQueue, database_url: str
) -> None:
    engine = create_async_engine(async_url(database_url))
    async with AsyncSession(engine) as session:
        await queue.enqueue_many([MailSend(to="ada")], atomic=True, session=session)
        await session.rollback()
        await queue.enqueue_many([MailSend(to="eve")], atomic=True, session=session)
        await session.commit()
    await engine.dispose()
    assert [cast(Any, job.payload)["to"] for job in (await queue.list()).jobs] == ["eve"]


async def test_a_session_of_the_other_kind_is_a_sentence(queue: JobQueue, engine: Engine) -> None:
    with Session(engine) as session, pytest.raises(TypeError, match=r"queue\.sync"):
        await queue.enqueue(MailSend(to="ada"), session=cast(Any, session))
    async with AsyncSession() as async_session:
        with pytest.raises(TypeError, match="await queue.enqueue"):
            queue.sync.enqueue(MailSend(to="ada"), session=cast(Any, async_session))
    with pytest.raises(TypeError, match="expected a Session of SQLAlchemy; got Engine"):
        queue.sync.enqueue(MailSend(to="ada"), session=cast(Any, engine))


async def test_a_worker_in_a_program_ends_its_jobs_when_the_program_does(
    queue: JobQueue,
) -> None:
    async with Worker(queue, shutdown_seconds=0.2).running():
        job = (await queue.enqueue(MailSend(to="slow"))).job
        while (await queue.get(job.id)).status is not JobStatus.RUNNING:
            await asyncio.sleep(0.01)
    released = await queue.get(job.id)
    assert (released.status, released.attempt) == (JobStatus.QUEUED, 0)


async def test_two_job_types_with_one_class_need_a_name(database_url: str) -> None:
    registry = JobRegistry([mail_send, JobType(name="mail.resend", payload=MailSend)])
    async with JobQueue.from_url(database_url, registry) as queue:
        with pytest.raises(DefinitionError, match=r"mail\.resend, mail\.send have the payload"):
            await queue.enqueue(MailSend(to="ada"))
        enqueued = await queue.enqueue(MailSend(to="ada"), job_type="mail.resend")
        assert enqueued.job.type == "mail.resend"
        with pytest.raises(JobTypeNotFound):
            await queue.enqueue(MailSend(to="ada"), job_type="mail.sned")


@pytest.mark.slow
def test_sqlalchemy_2_0_serves_as_well(tmp_path: Path) -> None:
    """A program may not be able to use the newest SQLAlchemy."""
    other = tmp_path / "other"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(other)]
    installed = subprocess.run(
        [sys.executable, *install, "sqlalchemy==2.0.*"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"SQLAlchemy 2.0 cannot be installed: {installed.stderr[-200:]}")
    code = (
        "import pytest, sqlalchemy; assert sqlalchemy.__version__.startswith('2.0.');"
        f" raise SystemExit(pytest.main({TESTS}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(other), "src", "."])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3_000:]
