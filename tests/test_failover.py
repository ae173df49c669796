"""PostgreSQL's servers change their roles: connections follow the server that takes writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import psycopg
import pytest
from sqlalchemy.engine import make_url

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import migrations
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.queue import JobQueue
from tests.http_client import serving
from tests.postgresql_server import (
    TEST_SETTINGS,
    Server,
    ServerMissing,
    running_server,
    standby_of,
)

PING = EnqueueRequest("test.ping", {})
JOB = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}


def read_only(url: str, value: str) -> None:
    """Change what sessions of the database may do that begin from now on."""
    with psycopg.connect(url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(
            f"ALTER DATABASE {name} SET default_transaction_read_only = {value}".encode()
        )


def listener(url: str) -> int | None:
    """The process id of the session that listens for notifications."""
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND (query LIKE 'LISTEN%' OR query IN ('SELECT 1', 'SHOW transaction_read_only'))"
        ).fetchone()
    return None if found is None else int(found[0])


async def test_connections_to_a_server_that_takes_no_writes_are_replaced(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    url = fresh_postgresql_url
    # A session that has begun keeps its setting, as a connection to a former primary does.
    read_only(url, "on")
    database = open_database(url, timeout_seconds=1)
    queue = JobQueue(registry, database)
    async with queue.events.listening():
        for _ in range(3):
            with pytest.raises(QueueUnavailable) as refused:
                await queue.enqueue(PING)
            assert refused.value.kind == "read_only"
        first = await asyncio.to_thread(listener, url)
        read_only(url, "off")
        give_up = time.monotonic() + 5
        while True:
            try:
                await queue.enqueue(PING)
                break
            except QueueUnavailable:
                assert time.monotonic() < give_up
                await asyncio.sleep(0.1)
        # So is the one that listens, which never writes.
        assert first is not None
        while await asyncio.to_thread(listener, url) in (None, first):
            assert time.monotonic() < give_up
            await asyncio.sleep(0.1)
    await database.close()


@dataclass
class Pair:
    """A primary and its standby, in a URL that names the standby first."""

    primary: Server
    standby: Server

    @property
    def url(self) -> str:
        here, there = (make_url(each.url) for each in (self.standby, self.primary))
        return f"postgresql://postgres@127.0.0.1:{here.port},127.0.0.1:{there.port}/{here.database}"


@pytest.fixture
def pair() -> Iterator[Pair]:
    try:
        with running_server(TEST_SETTINGS, in_memory=True) as primary:
            migrations.upgrade(primary.url)
            with standby_of(primary) as standby:
                yield Pair(primary, standby)
    except ServerMissing as missing:
        pytest.skip(str(missing))


def replicated(url: str, job_id: str) -> None:
    """Wait until a standby has a job: replication is asynchronous."""
    give_up = time.monotonic() + 20
    query = b"SELECT FROM job_registry.job WHERE id = %s"
    while True:
        with psycopg.connect(url) as connection:
            if connection.execute(query, [job_id]).fetchone() is not None:
                return
        assert time.monotonic() < give_up
        time.sleep(0.1)


@pytest.mark.slow
async def test_a_server_follows_the_primary_among_several_hosts(pair: Pair) -> None:
    async with (
        serving(pair.url) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as client,
    ):

        async def until(status: int) -> httpx.Response:
            give_up = time.monotonic() + 15
            while (response := await client.post("/jobs", json=JOB)).status_code != status:
                assert time.monotonic() < give_up, response.text
                await asyncio.sleep(0.1)
            return response

        await until(201)
        # The primary restarts. Meanwhile only the standby answers, which takes no writes.
        await asyncio.to_thread(pair.primary.stop)
        refused = await until(503)
        await asyncio.to_thread(pair.primary.start)
        job_id = (await until(201)).json()["jobId"]
        await asyncio.to_thread(replicated, pair.standby.url, job_id)
        await asyncio.to_thread(pair.primary.stop)
        await until(503)
        await asyncio.to_thread(pair.standby.promote)
        await until(201)
        assert (await client.get(f"/jobs/{job_id}")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
    assert refused.json()["error"]["code"] == "queue_unavailable"
