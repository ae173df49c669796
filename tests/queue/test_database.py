"""Connections: deadlines, dead networks, retries, and what a database's errors become."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy.exc
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue.database import Database
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.postgresql_database import PostgreSQLDatabase
from job_registry_api.queue.queue import JobQueue
from tests.conftest import run_sql
from tests.proxy import Proxy

PING = EnqueueRequest("test.ping", {})
SHORT = 1.0
"""The deadline of these tests, in seconds."""


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Database]:
    database = open_database(url, **({"timeout_seconds": SHORT} | options))
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def opened_postgresql(url: str, **options: Any) -> AsyncIterator[PostgreSQLDatabase]:
    async with opened(url, **options) as database:
        assert isinstance(database, PostgreSQLDatabase)
        yield database


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks()} - {
        task.get_name() for task in [asyncio.current_task()] if task
    }


async def until(condition: Any, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


# A network that swallows packets


@pytest.mark.parametrize("kind", ["reading", "transaction", "execute_at_once"])
async def test_a_black_hole_ends_a_call_at_its_deadline(proxied: Proxy, kind: str) -> None:
    async with opened_postgresql(proxied.url) as database:

        async def call() -> None:
            if kind == "execute_at_once":
                await database.execute_at_once("SELECT 1 AS n", {})
            else:
                async with getattr(database, kind)() as connection:
                    await connection.execute(text("SELECT 1"))

        await call()
        proxied.black_hole()
        with within(SHORT + 0.8), pytest.raises(QueueUnavailable) as refused:
            await call()
        assert refused.value.kind == "timeout"
        # No second connection to cancel the first one's query, and nothing that waits for it.
        assert proxied.connections == 1
        proxied.resume()
        await call()
        assert not tasks()


async def test_a_black_hole_ends_connecting_at_the_deadline(proxied: Proxy) -> None:
    proxied.black_hole()
    async with opened_postgresql(proxied.url) as database:
        with within(SHORT + 0.8), pytest.raises(QueueUnavailable) as refused:
            await database.execute_at_once("SELECT 1", {})
        assert refused.value.kind == "timeout"


async def test_the_first_operation_waits_for_no_more_answers_than_a_later_one(
    proxied: Proxy,
) -> None:
    proxied.slow_down(0.1)
    # It opens a connection and prepares its statement: two answers each.
    async with opened_postgresql(proxied.url, timeout_seconds=0.8) as database:
        rows = await database.execute_at_once("SELECT 1 AS n", {})
    assert [row["n"] for row in rows] == [1]


async def test_what_the_dialect_takes_from_the_driver_is_what_the_server_says(
    fresh_postgresql_url: str,
) -> None:
    async with opened_postgresql(fresh_postgresql_url) as database:
        async with database.reading() as connection:
            query = text("SELECT current_setting('server_version_num')::int AS number")
            number = (await connection.execute(query)).scalar_one()
        dialect = database.engine.dialect
    assert dialect.server_version_info == (number // 10_000,)


async def test_an_outage_is_reported_with_the_time_that_was_waited(proxied: Proxy) -> None:
    async def read(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT 1"))

    proxied.black_hole()
    async with opened_postgresql(proxied.url, timeout_seconds=30) as database:
        with within(SHORT), pytest.raises(QueueUnavailable) as refused:
            await database.retrying(read, timeout_seconds=0.2)
    assert refused.value.reason == "no connection to the database within 0.2 seconds"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_server_that_does_not_listen_is_reported_in_words(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        async with opened_postgresql(
            f"postgresql://ada@{host}:{port}/jobs?sslmode=disable"
        ) as database:
            with pytest.raises(QueueUnavailable) as refused:
                await database.execute_at_once("SELECT 1", {})
    assert refused.value.reason == f"{host}:{port}: Connection refused"


async def test_idle_connections_that_died_cost_one_call_one_deadline(proxied: Proxy) -> None:
    async with opened_postgresql(proxied.url, pool_size=4) as database:
        calls = [database.execute_at_once("SELECT pg_sleep(0.2)", {}) for _ in range(4)]
        await asyncio.gather(*calls)
        assert proxied.connections == 4
        proxied.black_hole()
        with pytest.raises(QueueUnavailable):
            await database.execute_at_once("SELECT 1", {})
        proxied.resume()
        with within(0.8):
            await database.execute_at_once("SELECT 1", {})


async def test_connections_that_the_server_closed_are_not_handed_out(proxied: Proxy) -> None:
    async with opened_postgresql(proxied.url) as database:
        await database.execute_at_once("SELECT 1", {})
        proxied.cut()
        proxied.resume()
        await asyncio.sleep(0.1)
        await database.execute_at_once("SELECT 1", {})


@pytest.mark.parametrize("turns", range(2, 5))
async def test_a_statement_at_the_moment_at_which_the_server_ends_the_connection_runs_on_another(
    fresh_postgresql_url: str, turns: int
) -> None:
    async def read(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT 1"))

    async with opened_postgresql(fresh_postgresql_url) as database:
        uses = (lambda: database.execute_at_once("SELECT 1", {}), lambda: database.retrying(read))
        for use in uses:
            await use()
            # The message and the end of the connection arrive together while the loop is busy, and
            # are read in different turns of the loop.
            with psycopg.connect(fresh_postgresql_url, autocommit=True) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            for _ in range(turns):
                await asyncio.sleep(0)
            await use()


async def test_an_enqueue_through_a_black_hole_fails_and_later_ones_work(
    proxied: Proxy, registry: JobRegistry
) -> None:
    async with opened_postgresql(proxied.url) as database:
        queue = JobQueue(registry, database)
        await queue.enqueue(PING)
        proxied.black_hole()
        with within(SHORT + 0.8):
            calls = [queue.enqueue(PING) for _ in range(20)]
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {QueueUnavailable}
        with pytest.raises(QueueUnavailable):
            await queue.ping()
        proxied.resume()
        await queue.enqueue(PING)
        await asyncio.sleep(1)
        await queue.ping()


async def cancelled_at_once(
    call: asyncio.Task[Any], database: PostgreSQLDatabase, proxied: Proxy
) -> None:
    """Cancel a call on a dead network, and check that the database works once it is back."""
    call.cancel()
    with within(0.5), pytest.raises(asyncio.CancelledError):
        await call
    proxied.resume()
    await database.execute_at_once("SELECT 1", {})
    assert not tasks()


async def test_a_cancelled_caller_is_cancelled_at_once_and_leaves_nothing(proxied: Proxy) -> None:
    async with opened_postgresql(proxied.url, timeout_seconds=30) as database:
        await database.execute_at_once("SELECT 1", {})
        proxied.black_hole()
        call = asyncio.create_task(database.execute_at_once("SELECT 1", {}))
        await asyncio.sleep(0.1)
        await cancelled_at_once(call, database, proxied)


async def test_callers_that_are_cancelled_while_a_connection_opens_leave_no_error_behind(
    proxied: Proxy,
) -> None:
    loop = asyncio.get_running_loop()
    reported: list[object] = []
    loop.set_exception_handler(lambda _loop, context: reported.append(context))
    for step in range(200):
        async with opened_postgresql(proxied.url, timeout_seconds=2) as database:
            call = asyncio.create_task(database.execute_at_once("SELECT 1", {}))
            # Each is cancelled at another moment of the opening.
            for _ in range(step % 20):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait({call})
    gc.collect()
    await asyncio.sleep(0.1)
    assert reported == []
    assert proxied.open_connections == 0


async def test_a_cancelled_transaction_does_not_wait_for_its_rollback(proxied: Proxy) -> None:
    async with opened_postgresql(proxied.url, timeout_seconds=30) as database:
        inside = asyncio.Event()

        async def work() -> None:
            async with database.transaction() as connection:
                await connection.execute(text("INSERT INTO job_type_state (type) VALUES ('x')"))
                inside.set()
                await asyncio.sleep(60)

        call = asyncio.create_task(work())
        await asyncio.wait_for(inside.wait(), 10)
        proxied.black_hole()
        await cancelled_at_once(call, database, proxied)


async def test_closing_does_not_wait_for_a_dead_network(proxied: Proxy) -> None:
    database = PostgreSQLDatabase(proxied.url, timeout_seconds=30)
    calls = [database.execute_at_once("SELECT pg_sleep(0.1)", {}) for _ in range(5)]
    await asyncio.gather(*calls)
    hung = asyncio.create_task(database.execute_at_once("SELECT pg_sleep(60)", {}))
    await asyncio.sleep(0.1)
    proxied.black_hole()
    with within(4):
        await database.close()
        with pytest.raises(QueueUnavailable):
            await hung


async def test_a_transaction_that_its_caller_holds_too_long_is_ended(
    fresh_postgresql_url: str,
) -> None:
    async with opened_postgresql(fresh_postgresql_url) as database:
        with within(SHORT + 0.8), pytest.raises(QueueUnavailable):
            async with database.transaction() as connection:
                await connection.execute(text("LOCK TABLE job"))
                await asyncio.sleep(SHORT + 0.2)
                await connection.execute(text("SELECT 1"))


async def test_the_pool_is_waited_for_no_longer_than_the_deadline(
    fresh_postgresql_url: str,
) -> None:
    async with opened_postgresql(fresh_postgresql_url, pool_size=2) as database:
        async with database.reading(), database.reading():
            with within(SHORT + 0.5), pytest.raises(QueueUnavailable) as refused:
                await database.execute_at_once("SELECT 1", {})
        assert "JOBS_DATABASE_POOL_SIZE" in refused.value.reason
        await database.execute_at_once("SELECT 1", {})


async def test_statements_and_transactions_share_the_connections_of_one_pool(
    proxied: Proxy,
) -> None:
    async with opened_postgresql(proxied.url, pool_size=2) as database:

        async def transact() -> None:
            async with database.transaction() as connection:
                await connection.execute(text("SELECT pg_sleep(0.01)"))

        statement = "SELECT pg_sleep(0.01)"
        for _ in range(5):
            await database.execute_at_once(statement, {})
            calls = [database.execute_at_once(statement, {}) for _ in range(5)]
            await asyncio.gather(*calls, *(transact() for _ in range(5)))
        assert proxied.connections == 2


async def kept_busy(
    call: Callable[[], Awaitable[object]], wanted: AbstractAsyncContextManager[object]
) -> None:
    """Enter a context while four tasks call again and again."""
    is_over = False

    async def again() -> None:
        while not is_over:
            await call()

    busy = [asyncio.create_task(again()) for _ in range(4)]
    await asyncio.sleep(0.05)
    try:
        with within(0.5):
            async with wanted:
                pass
    finally:
        is_over = True
        await asyncio.gather(*busy)


async def test_a_transaction_gets_its_turn_while_statements_use_the_only_connection(
    fresh_postgresql_url: str,
) -> None:
    async with opened_postgresql(fresh_postgresql_url, pool_size=1) as database:
        await kept_busy(lambda: database.execute_at_once("SELECT 1", {}), database.transaction())


async def test_a_reader_gets_its_turn_while_others_use_the_only_connection(
    database_url: str,
) -> None:
    async with opened(database_url, pool_size=1) as database:

        async def read() -> None:
            async with database.reading() as connection:
                await connection.execute(text("SELECT 1"))

        await kept_busy(read, database.reading())


async def test_sessions_have_timeouts_keepalive_and_read_committed(proxied: Proxy) -> None:
    async with opened_postgresql(proxied.url, timeout_seconds=10) as database:
        rows = await database.execute_at_once(
            "SELECT name, setting FROM pg_settings WHERE name = ANY(CAST(:names AS text[]))",
            {
                "names": [
                    "default_transaction_isolation", "jit", "statement_timeout", "lock_timeout",
                    "idle_in_transaction_session_timeout", "idle_session_timeout",
                ]
            },
        )  # fmt: skip
        assert {row["name"]: row["setting"] for row in rows} == {
            "default_transaction_isolation": "read committed",
            "jit": "off",
            "statement_timeout": "9000",
            "lock_timeout": "8000",
            "idle_in_transaction_session_timeout": "10000",
            "idle_session_timeout": "0",
        }


async def test_connections_of_the_pool_stay_open_where_idle_sessions_are_ended(
    fresh_postgresql_url: str,
) -> None:
    name = make_url(fresh_postgresql_url).database
    setting = f"ALTER DATABASE {name} SET idle_session_timeout = '50ms'"
    await asyncio.to_thread(run_sql, fresh_postgresql_url, setting)
    async with opened_postgresql(fresh_postgresql_url) as database:
        sessions = set()
        for _ in range(2):
            (row,) = await database.execute_at_once("SELECT pg_backend_pid() AS session", {})
            sessions.add(row["session"])
            await asyncio.sleep(0.3)
        assert len(sessions) == 1


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_tcp_connections_have_keepalive(proxied: Proxy, uvloop: bool) -> None:
    from uvloop import new_event_loop

    async def run() -> list[str]:
        async with opened_postgresql(proxied.url) as database:
            await database.execute_at_once("SELECT 1", {})
            # The last column of an established connection's timer: 2 is keepalive.
            port = f"{proxied.port:04X}"
            table = Path("/proc/net/tcp").read_text("utf-8")
            rows = [line.split() for line in table.splitlines()]
            found = [row for row in rows if row[2].endswith(":" + port) and row[3] == "01"]
            # The table may change while it is read, and have a connection twice.
            return [*{row[1]: row[5] for row in found}.values()]

    with asyncio.Runner(loop_factory=new_event_loop if uvloop else None) as runner:
        assert [timer[:2] for timer in runner.run(run())] == ["02"]


# LISTEN


async def test_the_listener_notices_a_dead_connection_and_works_again(proxied: Proxy) -> None:
    gaps: list[float] = []
    received: list[str] = []
    async with opened_postgresql(proxied.url) as database:
        listening = asyncio.create_task(
            database.listen(received.append, lambda: gaps.append(time.monotonic()))
        )
        await until(lambda: len(gaps) == 1)
        proxied.black_hole()
        await asyncio.sleep(SHORT)
        proxied.resume()
        await until(lambda: len(gaps) == 2, 4 * SHORT + 1)
        async with opened_postgresql(proxied.url) as other, other.transaction() as connection:
            await connection.execute(text("SELECT pg_notify('job_registry', 'hello')"))
        await until(lambda: received == ["hello"])
        listening.cancel()
        with pytest.raises(asyncio.CancelledError), within(1):
            await listening


# Retries


async def deadlock(database: PostgreSQLDatabase, *, retried: bool) -> list[Any]:
    """Two transactions that take two rows in opposite order."""
    both = [asyncio.Event(), asyncio.Event()]

    async def take(mine: int) -> str:
        async def work(connection: Any) -> str:
            await connection.execute(
                text("UPDATE job_type_state SET worker_seen_at = now() WHERE type = :t"),
                {"t": str(mine)},
            )
            both[mine].set()
            await both[1 - mine].wait()
            await connection.execute(
                text("UPDATE job_type_state SET worker_seen_at = now() WHERE type = :t"),
                {"t": str(1 - mine)},
            )
            return "done"

        if retried:
            return await database.retrying(work)
        async with database.transaction() as connection:
            return await work(connection)

    return list(await asyncio.gather(take(0), take(1), return_exceptions=True))


@pytest.mark.parametrize("retried", [True, False])
async def test_deadlocks_are_run_again_and_never_reach_the_caller_raw(
    fresh_postgresql_url: str, retried: bool
) -> None:
    async with opened_postgresql(fresh_postgresql_url, timeout_seconds=10) as database:
        await database.execute_at_once("INSERT INTO job_type_state VALUES ('0'), ('1')", {})
        failures: list[QueueUnavailable] = []
        database.on_unavailable = failures.append
        results = await deadlock(database, retried=retried)
    if retried:
        assert results == ["done", "done"]
        assert failures == []
    else:
        (victim,) = [result for result in results if result != "done"]
        assert isinstance(victim, QueueUnavailable)
        assert "40P01" in victim.reason


async def test_a_statement_survives_serialization_failures(fresh_postgresql_url: str) -> None:
    run_again = """
        CREATE SEQUENCE tries;
        CREATE FUNCTION fails_twice() RETURNS int LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('tries') < 3 THEN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END IF;
            RETURN 7;
        END $$"""
    async with opened_postgresql(fresh_postgresql_url) as database:
        for sql in run_again.split(";\n        CREATE F"):
            async with database.transaction() as connection:
                whole = sql if "SEQUENCE" in sql else "CREATE F" + sql
                await connection.exec_driver_sql(whole)
        (row,) = await database.execute_at_once("SELECT fails_twice() AS answer", {})
        assert row["answer"] == 7


async def test_a_statement_that_always_fails_is_given_up(fresh_postgresql_url: str) -> None:
    function = """CREATE FUNCTION fails() RETURNS int LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"""
    async with opened_postgresql(fresh_postgresql_url, timeout_seconds=10) as database:
        async with database.transaction() as connection:
            await connection.exec_driver_sql(function)
        with within(3), pytest.raises(QueueUnavailable) as refused:
            await database.execute_at_once("SELECT fails()", {})
        assert refused.value.kind == "busy"


async def test_a_column_that_a_migration_adds_does_not_break_prepared_statements(
    fresh_postgresql_url: str,
) -> None:
    async with opened_postgresql(fresh_postgresql_url, pool_size=2) as database:
        await database.execute_at_once("SELECT * FROM job_type_state", {})
        await asyncio.to_thread(
            run_sql, fresh_postgresql_url, "ALTER TABLE job_type_state ADD COLUMN more int"
        )
        await database.execute_at_once("INSERT INTO job_type_state (type) VALUES ('x')", {})
        (row,) = await database.execute_at_once("SELECT * FROM job_type_state", {})
        assert row["more"] is None


async def test_a_statement_during_which_a_column_is_added_is_run_again(
    fresh_postgresql_url: str,
) -> None:
    made = ("CREATE SEQUENCE tries", "CREATE TABLE shape (a int, b int)")
    function = """CREATE FUNCTION grows() RETURNS SETOF shape LANGUAGE plpgsql AS $$
        DECLARE r record;
        BEGIN
            IF nextval('tries') = 1 THEN SELECT 1 INTO r; ELSE SELECT 1, 2 INTO r; END IF;
            RETURN NEXT r;
        END $$"""
    await asyncio.to_thread(run_sql, fresh_postgresql_url, *made, function)
    async with opened_postgresql(fresh_postgresql_url) as database:
        (row,) = await database.execute_at_once("SELECT b FROM grows()", {})
        assert row["b"] == 2


async def test_a_session_that_still_reads_a_column_that_was_dropped_is_replaced(
    fresh_postgresql_url: str,
) -> None:
    function = """CREATE FUNCTION reads() RETURNS int LANGUAGE plpgsql AS $$
        BEGIN
            IF current_setting('test.stale', true) = 'on' THEN
                RAISE EXCEPTION 'attribute 31 of type record has been dropped'
                    USING ERRCODE = 'undefined_column';
            END IF;
            RETURN 7;
        END $$"""
    await asyncio.to_thread(run_sql, fresh_postgresql_url, function)
    async with opened_postgresql(fresh_postgresql_url) as database:
        await database.execute_at_once("SELECT set_config('test.stale', 'on', false)", {})
        await asyncio.sleep(1.1)
        with pytest.raises(QueueUnavailable):
            await database.execute_at_once("SELECT reads()", {})
        (row,) = await database.execute_at_once("SELECT reads() AS answer", {})
        assert row["answer"] == 7


# What errors become


@pytest.mark.slow
async def test_locks_and_slow_statements_are_given_up_by_the_server(
    fresh_postgresql_url: str,
) -> None:
    async with (
        opened_postgresql(fresh_postgresql_url, timeout_seconds=3) as database,
        opened_postgresql(fresh_postgresql_url, timeout_seconds=30) as holder,
    ):
        await database.execute_at_once("SELECT 1", {})
        with within(3), pytest.raises(QueueUnavailable) as slow:
            await database.execute_at_once("SELECT pg_sleep(60)", {})
        assert "57014" in slow.value.reason
        async with holder.transaction() as connection:
            await connection.execute(text("LOCK TABLE job"))
            with within(3), pytest.raises(QueueUnavailable) as locked:
                await database.execute_at_once("UPDATE job SET priority = 1", {})
        assert "55P03" in locked.value.reason
        assert {slow.value.kind, locked.value.kind} == {"timeout"}


async def test_a_timeout_of_transactions_is_an_outage_as_other_timeouts_are(
    fresh_postgresql_url: str,
) -> None:
    # The server raises it from version 17 on, and then ends the connection.
    ending = """DO $$ BEGIN
        RAISE 'terminating connection due to transaction timeout' USING ERRCODE = '25P04';
        END $$"""
    async with opened_postgresql(fresh_postgresql_url) as database:
        with pytest.raises(QueueUnavailable) as ended:
            await database.execute_at_once(ending, {})
    assert ended.value.kind == "timeout"


@pytest.mark.parametrize(
    ("sql", "kind", "named"),
    [
        ("DROP TABLE job_count", "schema_outdated", "job_count"),
        ("ALTER TABLE job RENAME COLUMN payload TO content", "schema_outdated", "payload"),
        ("DROP TABLE job CASCADE", "schema_outdated", "job"),
    ],
)
async def test_a_schema_that_does_not_fit_says_to_run_migrate(
    database_url: str, registry: JobRegistry, sql: str, kind: str, named: str
) -> None:
    if database_url.startswith("sqlite"):
        sql = sql.replace(" CASCADE", "")
    await asyncio.to_thread(run_sql, database_url, sql)
    async with opened(database_url) as database:
        queue = JobQueue(registry, database)
        for call in (queue.enqueue(PING), queue.ping()):
            with pytest.raises(QueueUnavailable) as refused:
                await call
            assert (refused.value.kind, named in refused.value.reason) == (kind, True)
            assert "job-registry migrate" in refused.value.reason


@pytest.fixture
def dml_only(fresh_postgresql_url: str) -> Iterator[str]:
    """The database by the URL of a role that may use the tables, but not the sequences."""
    role = f"dml_{time.monotonic_ns()}"
    run_sql(
        fresh_postgresql_url,
        f"CREATE ROLE {role} LOGIN PASSWORD 'x'",
        f"GRANT USAGE ON SCHEMA job_registry TO {role}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA job_registry TO {role}",
    )
    url = make_url(fresh_postgresql_url).set(username=role, password="x")
    yield url.render_as_string(hide_password=False)
    run_sql(fresh_postgresql_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_a_missing_grant_is_named(dml_only: str, registry: JobRegistry) -> None:
    async with opened_postgresql(dml_only) as database:
        queue = JobQueue(registry, database)
        for call in (queue.enqueue(PING), queue.ping()):
            with pytest.raises(QueueUnavailable) as refused:
                await call
            assert refused.value.kind == "permission_denied"
            assert "sequence" in refused.value.reason
            assert "job_count_id_seq" in refused.value.reason
            assert "job-registry migrate --grants" in refused.value.reason


async def test_connections_from_when_the_database_was_read_only_are_replaced(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    name = make_url(fresh_postgresql_url).database
    setting = f"ALTER DATABASE {name} {{}} default_transaction_read_only"
    async with (
        opened_postgresql(fresh_postgresql_url, timeout_seconds=10, pool_size=4) as database,
        # A session keeps the value that a database had when it began.
        opened_postgresql(fresh_postgresql_url) as administrator,
    ):
        queue = JobQueue(registry, database)
        await administrator.execute_at_once(setting.format("SET") + " = on", {})
        calls = [
            queue.enqueue(PING),
            queue.enqueue_many([PING] * 2, atomic=True),
            queue.lease(["test.ping"], "w"),
            queue.ping(),
        ]
        for refused in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(refused, QueueUnavailable)
            assert refused.kind == "read_only"
        await administrator.execute_at_once(setting.format("RESET"), {})
        await asyncio.sleep(1.2)
        # One call finds out, and replaces all connections of that time.
        with suppress(QueueUnavailable):
            await queue.enqueue(PING)
        await asyncio.gather(*(queue.enqueue(PING) for _ in range(4)))
        await asyncio.gather(*(queue.enqueue_many([PING] * 2, atomic=True) for _ in range(4)))
        await queue.ping()


async def test_a_violated_constraint_is_the_statements_own_fault(database_url: str) -> None:
    async with opened(database_url) as database:
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            async with database.transaction() as connection:
                insert = text("INSERT INTO job_type_state (type) VALUES ('x')")
                await connection.execute(insert)
                await connection.execute(insert)
        with pytest.raises(sqlalchemy.exc.DBAPIError):
            async with database.reading() as connection:
                await connection.execute(text("SELECT FROM FROM"))


async def test_a_callers_own_error_passes_through_a_transaction(database_url: str) -> None:
    async with opened(database_url) as database:
        with pytest.raises(OSError, match="mine"):
            async with database.transaction() as connection:
                await connection.execute(text("INSERT INTO job_type_state (type) VALUES ('x')"))
                raise OSError("mine")
        async with database.reading() as connection:
            assert not (await connection.execute(text("SELECT * FROM job_type_state"))).all()


# SQLAlchemy leaves a connection whose checkout is cancelled to the collector, which closes it.
@pytest.mark.filterwarnings("ignore:.*non-checked-in connection")
@pytest.mark.parametrize("moment", [0.0, 0.001, 0.005, 0.02, 0.1])
async def test_a_cancelled_transaction_raises_the_cancellation_and_leaves_no_trace(
    database_url: str, moment: float
) -> None:
    async with opened(database_url, timeout_seconds=10) as database:

        async def work(number: int) -> None:
            async with database.transaction() as connection:
                for turn in range(200):
                    await connection.execute(
                        text("INSERT INTO job_type_state (type) VALUES (:t)"),
                        {"t": f"{number}-{turn}"},
                    )
                await asyncio.sleep(60)

        for number in range(5):
            call = asyncio.create_task(work(number))
            await asyncio.sleep(moment)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        async with database.transaction() as connection:
            rows = await connection.execute(text("SELECT * FROM job_type_state"))
            assert not rows.all()
    gc.collect()
    await asyncio.sleep(0.2)  # The thread of such a connection answers this event loop.
    with suppress(StopIteration):
        assert not tasks()


# Readiness


async def test_a_probe_leaves_no_trace_and_is_shared(database_url: str, queue: JobQueue) -> None:
    await asyncio.gather(*(queue.ping() for _ in range(50)))
    assert (await queue.counts()).get("readiness") is None
    rows = await asyncio.to_thread(run_sql, database_url, "SELECT count(*) FROM job")
    assert rows[0][0] == 0


async def test_a_read_only_server_is_not_ready(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    name = fresh_postgresql_url.partition("?")[0].rsplit("/", 1)[1]
    await asyncio.to_thread(
        run_sql,
        fresh_postgresql_url,
        f"ALTER DATABASE {name} SET default_transaction_read_only = on",
    )
    async with opened_postgresql(fresh_postgresql_url) as database:
        queue = JobQueue(registry, database)
        for call in (queue.enqueue(PING), queue.ping()):
            with pytest.raises(QueueUnavailable) as refused:
                await call
            assert refused.value.kind == "read_only"
