"""PgBouncer, mostly in transaction mode: every transaction may be on another connection."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, MutableMapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import pytest
import structlog
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from job_registry import EnqueueRequest, JobContext, JobRegistry, JobType, Payload
from job_registry_api import JobFailed, JobFilter, Worker
from job_registry_api.queue import migrations
from job_registry_api.queue.database import Pooler
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.postgresql_database import PostgreSQLDatabase
from job_registry_api.queue.queue import JobQueue
from tests.conftest import async_url, run_sql
from tests.http_client import serving

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

pytestmark = pytest.mark.skipif(
    PGBOUNCER is None, reason="pgbouncer is not installed: apt-get install pgbouncer"
)

PING = EnqueueRequest("test.ping", {})


@pytest.fixture
def pooled_url(fresh_postgresql_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh, migrated database by way of a PgBouncer in transaction mode."""
    with pooling(fresh_postgresql_url, tmp_path, "pool_mode = transaction") as url:
        yield url


@contextmanager
def pooling(database_url: str, tmp_path: Path, *settings: str) -> Iterator[str]:
    """Run a PgBouncer in front of a database. Yield the URL by way of it."""
    parts = urlsplit(database_url)
    host = parse_qs(parts.query).get("host", [parts.hostname])[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = tmp_path / "pgbouncer.ini"
    configuration.write_text(
        f"""
        [databases]
        * = host={host} port={parts.port or 5432} user={parts.username}
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        default_pool_size = 3
        """.replace("\n        ", "\n")
        + "\n".join(settings),
        "utf-8",
    )
    command = [str(PGBOUNCER), str(configuration)]
    if os.geteuid() == 0:
        # PgBouncer refuses root; who owns a server's socket may use it.
        is_socket = str(host).startswith("/")
        owner = pwd.getpwuid(Path(str(host)).stat().st_uid).pw_name if is_socket else "root"
        user = owner if owner != "root" else "nobody"
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == os.geteuid() and str(folder) not in ("/", "/tmp"):
                folder.chmod(folder.stat().st_mode | 0o055)
        command[1:1] = ["-u", user]
    log = (tmp_path / "pgbouncer.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        give_up = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "pgbouncer.log").read_text()
                assert time.monotonic() < give_up
                time.sleep(0.05)
        yield f"postgresql://{parts.username}@127.0.0.1:{port}{parts.path}"
    finally:
        process.terminate()
        process.wait(10)
        log.close()


async def test_two_queues_share_its_connections(pooled_url: str, registry: JobRegistry) -> None:
    async with AsyncExitStack() as stack:
        queues = []
        for _ in range(2):
            database = PostgreSQLDatabase(pooled_url, pooler="transaction")
            stack.push_async_callback(database.close)
            queues.append(JobQueue(registry, database))
        enqueued = await asyncio.gather(
            *(queues[n % 2].enqueue(PING) for n in range(40)),
            *(queues[n % 2].enqueue_many([PING] * 5) for n in range(10)),
            *(queues[n % 2].ping() for n in range(10)),
        )
        assert len(enqueued) == 60
        done = 0
        while leases := await queues[done % 2].lease(["test.ping"], "w", limit=20):
            await asyncio.gather(
                *(queues[n % 2].complete(each.token) for n, each in enumerate(leases))
            )
            done += len(leases)
        assert done == 90
        counts = (await queues[0].counts())["test.ping"]
        assert (counts.queued, counts.succeeded) == (0, 90)


async def test_a_url_through_it_without_the_setting_is_refused_with_advice(pooled_url: str) -> None:
    database = PostgreSQLDatabase(pooled_url)
    try:
        with pytest.raises(QueueUnavailable) as refused:
            await database.execute_at_once("SELECT 1", {})
    finally:
        await database.close()
    assert "set JOBS_DATABASE_POOLER=transaction" in refused.value.reason


IGNORING = (
    "ignore_startup_parameters = default_transaction_isolation, jit, lock_timeout,"
    " statement_timeout, idle_in_transaction_session_timeout,"
    " idle_session_timeout"
)


@pytest.mark.parametrize("pooler", ["transaction", "session"])
async def test_a_pool_of_statements_is_refused_with_advice(
    fresh_postgresql_url: str, tmp_path: Path, registry: JobRegistry, pooler: Pooler
) -> None:
    with pooling(fresh_postgresql_url, tmp_path, "pool_mode = statement", IGNORING) as url:
        database = PostgreSQLDatabase(url, pooler=pooler)
        try:
            with pytest.raises(QueueUnavailable) as refused:
                await JobQueue(registry, database).ping()
        finally:
            await database.close()
    assert "statement pooling mode" in refused.value.reason
    assert "Set pool_mode to transaction or session in PgBouncer." in refused.value.reason


async def test_a_pool_that_ignores_the_settings_of_sessions_is_refused_with_advice(
    fresh_postgresql_url: str, tmp_path: Path, registry: JobRegistry
) -> None:
    with pooling(fresh_postgresql_url, tmp_path, "pool_mode = transaction", IGNORING) as url:
        database = PostgreSQLDatabase(url)
        queue = JobQueue(registry, database)
        with pytest.raises(QueueUnavailable) as refused:
            # A statement is prepared on one connection of the server, and runs on another.
            for _ in range(20):
                await asyncio.gather(*(queue.counts() for _ in range(10)))
        await database.close()
    assert "set JOBS_DATABASE_POOLER=transaction" in refused.value.reason


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[MutableMapping[str, Any]]:
    """What the connections to PostgreSQL log."""
    capture = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(
        None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    monkeypatch.setattr("job_registry_api.queue.postgresql_database.log", logger)
    return capture.entries


async def test_a_listen_url_that_leads_through_it_is_logged(
    pooled_url: str, registry: JobRegistry, logged: list[MutableMapping[str, Any]]
) -> None:
    database = PostgreSQLDatabase(pooled_url, pooler="transaction", listen_url=pooled_url)
    async with JobQueue(registry, database).events.listening(), asyncio.timeout(10):
        while not logged:
            await asyncio.sleep(0.01)
    await database.close()
    (line,) = logged
    assert line["event"] == "database.not_listening"
    assert "unsupported startup parameter" in line["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("leads", ["through the pool", "to another database"])
async def test_a_listen_url_on_which_no_notification_arrives_is_logged(
    fresh_postgresql_url: str,
    tmp_path: Path,
    registry: JobRegistry,
    logged: list[MutableMapping[str, Any]],
    leads: str,
) -> None:
    """LISTEN is accepted there."""
    with pooling(fresh_postgresql_url, tmp_path, "pool_mode = transaction", IGNORING) as url:
        elsewhere = urlsplit(fresh_postgresql_url)._replace(path="/postgres").geturl()
        listen_url = url if leads == "through the pool" else elsewhere
        database = PostgreSQLDatabase(
            url, pooler="transaction", listen_url=listen_url, timeout_seconds=1.0
        )
        async with JobQueue(registry, database).events.listening(), asyncio.timeout(10):
            while not logged:
                await asyncio.sleep(0.01)
            await asyncio.sleep(2.5)
        await database.close()
    (line,) = logged
    assert line["event"] == "database.not_listening"
    assert "PgBouncer in transaction mode, or to another database" in line["reason"]


@pytest.mark.parametrize("mode", ["session", "direct"])
async def test_a_listen_url_that_works_is_not_logged(
    fresh_postgresql_url: str,
    tmp_path: Path,
    registry: JobRegistry,
    logged: list[MutableMapping[str, Any]],
    mode: str,
) -> None:
    with pooling(fresh_postgresql_url, tmp_path, "pool_mode = session", IGNORING) as url:
        listen_url = url if mode == "session" else fresh_postgresql_url
        one, other = (
            PostgreSQLDatabase(fresh_postgresql_url, pooler="transaction", listen_url=listen_url)
            for _ in range(2)
        )
        queues = JobQueue(registry, one), JobQueue(registry, other)
        async with queues[0].events.listening(), queues[1].events.listening():
            await check_events_arrive(*queues)
        for database in (one, other):
            await database.close()
    assert logged == []


class First(Payload):
    number: int


class Second(Payload):
    number: int


first = JobType(name="first", payload=First)


@first.handler
async def work(job: JobContext, payload: First) -> list[str]:
    return [
        job.enqueue(Second(number=payload.number)),
        job.enqueue(Second(number=100), idempotency_key="once"),
    ]


async def test_jobs_of_handlers_and_of_sessions_are_stored_by_way_of_it(pooled_url: str) -> None:
    types: list[JobType[Any]] = [first, JobType(name="second", payload=Second)]
    # Prepared statements of the program's own engines do not outlive a transaction either.
    parameters = {"prepared_statement_cache_size": 0, "prepared_statement_name_func": str}
    engine = create_async_engine(async_url(pooled_url), connect_args=parameters)
    url = make_url(pooled_url).set(drivername="postgresql+psycopg")
    without_asyncio = create_engine(url, connect_args={"prepare_threshold": None})

    async with JobQueue.from_url(pooled_url, types, pooler="transaction") as queue:

        def store_without_asyncio(number: int) -> None:
            with Session(without_asyncio) as session:
                queue.sync.enqueue(Second(number=number), session=session)
                session.commit()

        async with Worker(queue, concurrency=5).running():
            jobs = [(await queue.enqueue(First(number=n))).job for n in range(10)]
            for job in jobs:
                assert await queue.result(job.id, timeout=30) is not None
        async with AsyncSession(engine) as session:
            await queue.enqueue(Second(number=20), session=session)
            await queue.enqueue_many([Second(number=21)] * 3, atomic=True, session=session)
            await session.commit()
            await queue.enqueue(Second(number=30), session=session)
            await session.rollback()
        await asyncio.to_thread(store_without_asyncio, 40)
        stored = (await queue.list(JobFilter(types=("second",)))).jobs
    without_asyncio.dispose()
    await engine.dispose()
    numbers = sorted(cast(dict[str, int], job.payload)["number"] for job in stored)
    assert numbers == [*range(10), 20, 21, 21, 21, 40, 100]


logging_job = JobType(name="logging", payload=First)


@logging_job.handler
async def log_lines(job: JobContext, payload: First) -> None:
    for line in range(4):
        job.log.info("step", line=line)
        await asyncio.sleep(0.3)
    if payload.number % 5 == 0:
        raise ValueError("five")


async def test_lines_of_jobs_are_stored_by_way_of_it(pooled_url: str) -> None:
    types: list[JobType[Any]] = [logging_job]
    async with JobQueue.from_url(pooled_url, types, pooler="transaction") as queue:
        async with Worker(queue, concurrency=30).running():
            enqueued = [queue.enqueue(First(number=n), max_attempts=1) for n in range(60)]
            jobs = [each.job for each in await asyncio.gather(*enqueued)]
            for number, job in enumerate(jobs):
                if number % 5:
                    await queue.result(job.id, timeout=30)
                else:
                    with pytest.raises(JobFailed):
                        await queue.result(job.id, timeout=30)
        for job in jobs:
            lines = [line.data for line in await queue.logs(job.id)]
            assert lines == [{"line": number} for number in range(4)]


async def test_nothing_of_a_session_outlives_a_transaction(
    pooled_url: str, fresh_postgresql_url: str
) -> None:
    database = PostgreSQLDatabase(pooled_url, pooler="transaction", timeout_seconds=7)
    names = "'statement_timeout', 'lock_timeout', 'jit', 'transaction_isolation'"
    inside = await database.execute_at_once(
        f"SELECT name, setting FROM pg_settings WHERE name IN ({names})", {}
    )
    assert {row["name"]: row["setting"] for row in inside} == {
        "statement_timeout": "6300",
        "lock_timeout": "5600",
        "jit": "off",
        "transaction_isolation": "read committed",
    }
    async with database.transaction() as connection:
        await connection.execute(text("SELECT 1"))
    async with database.reading() as connection:
        prepared = await connection.execute(text("SELECT name FROM pg_prepared_statements"))
        assert [row.name for row in prepared if row.name] == []
    with pytest.raises(QueueUnavailable):
        await database.execute_at_once("SELECT nothing FROM nowhere", {})
    await database.close()
    # Straight through PgBouncer, on the connections that were used: none is in a transaction.
    states = await asyncio.to_thread(
        run_sql,
        fresh_postgresql_url,
        "SELECT state FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid()",
    )
    assert {state for (state,) in states} == {"idle"}


async def test_a_failed_and_a_cancelled_transaction_are_rolled_back(pooled_url: str) -> None:
    database = PostgreSQLDatabase(pooled_url, pooler="transaction")
    insert = text("INSERT INTO job_type_state (type) VALUES ('x')")

    async def wait_inside() -> None:
        async with database.transaction() as connection:
            await connection.execute(insert)
            await asyncio.sleep(60)

    with pytest.raises(KeyError):
        async with database.transaction() as connection:
            await connection.execute(insert)
            raise KeyError
    call = asyncio.create_task(wait_inside())
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not await database.execute_at_once("SELECT * FROM job_type_state", {})
    await database.close()


async def check_events_arrive(one: JobQueue, other: JobQueue) -> None:
    with other.events.subscribe() as subscription:
        enqueued = await one.enqueue(PING)
        event = await asyncio.wait_for(anext(subscription), 5)
        assert (event.name, event.job_id) == ("job.created", enqueued.job.id)


async def test_without_a_direct_url_events_of_others_are_polled_for(
    pooled_url: str, registry: JobRegistry
) -> None:
    first, second = (PostgreSQLDatabase(pooled_url, pooler="transaction") for _ in range(2))
    assert first.keeps_events
    one, other = JobQueue(registry, first), JobQueue(registry, second)
    async with one.events.listening(), other.events.listening():
        await check_events_arrive(one, other)
    await first.close()
    await second.close()


async def test_a_direct_url_carries_notifications(
    pooled_url: str, fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    first, second = (
        PostgreSQLDatabase(pooled_url, pooler="transaction", listen_url=fresh_postgresql_url)
        for _ in range(2)
    )
    assert not first.keeps_events
    one, other = JobQueue(registry, first), JobQueue(registry, second)
    async with one.events.listening(), other.events.listening():
        await check_events_arrive(one, other)
        kept = await first.execute_at_once("SELECT * FROM job_event_batch", {})
        assert not kept
    await first.close()
    await second.close()


async def test_two_servers_start_one_after_the_other(pooled_url: str) -> None:
    import httpx

    for _ in range(2):
        async with (
            serving(pooled_url, "--no-worker", database_pooler="transaction") as (address, _pid),
            httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as client,
        ):
            for _ in range(3):
                job = {
                    "type": "payout.execute",
                    "payload": {"batchId": "b", "escrowId": "e"},
                }
                assert (await client.post("/jobs", json=job)).status_code == 201
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()) == (200, {"status": "ok"})


def test_a_database_is_migrated_through_it(fresh_postgresql_url: str, tmp_path: Path) -> None:
    run_sql(fresh_postgresql_url, "DROP SCHEMA job_registry CASCADE")
    with pooling(fresh_postgresql_url, tmp_path, "pool_mode = transaction") as url:
        assert migrations.upgrade(url, pooler="transaction").steps
        assert migrations.upgrade(url, pooler="transaction").steps == ()
    # That one is built outside the transaction of the migration.
    index = "'job_registry.job_by_creator'::regclass"
    query = f"SELECT indisvalid FROM pg_index WHERE indexrelid = {index}"
    assert [row.indisvalid for row in run_sql(fresh_postgresql_url, query)] == [True]
