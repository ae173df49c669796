"""Replaying: every unfinished payload is read, in pages of bounded size, and nothing is written."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import Field

from job_registry import EnqueueRequest, JobRegistry, JobType, Payload
from job_registry_api.queue import replaying
from job_registry_api.queue.databases import open_database, store_of
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.filters import FIRST_ID
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.replaying import Fault, Replay, replay
from tests.conftest import run_sql


class Entries(Payload):
    entries: dict[str, int] = Field(default={})


def registry_of(payload: type[Payload]) -> JobRegistry:
    return JobRegistry([JobType(name="test.ping", payload=payload)])


async def replayed(url: str, registry: JobRegistry, **options: Any) -> Replay:
    return await asyncio.to_thread(replay, url, registry, **options)


async def test_every_queued_and_running_job_is_read_and_no_other(
    queue: JobQueue, database_url: str, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "PAGE_JOBS", 7)
    await queue.enqueue_many([EnqueueRequest("test.ping", {"text": f"{n}"}) for n in range(50)])
    leases = await queue.lease(["test.ping"], "w", limit=20)
    for lease in leases[:5]:
        await queue.complete(lease.token)
    await queue.cancel(leases[6].job.id)
    pages: list[tuple[int, int]] = []
    found = await replayed(
        database_url, registry, on_page=lambda done, total: pages.append((done, total))
    )
    assert found.jobs == {"test.ping": 45}
    assert found.running["test.ping"] == 15
    assert found.reads_all
    assert pages[0] == (7, 45)
    assert pages[-1] == (45, 45)


async def test_a_page_ends_with_the_payload_that_makes_it_long(
    queue: JobQueue, database_url: str
) -> None:
    texts = ["a" * size for size in (10, 3_000, 3_000, 10, 9_000, 10)]
    await queue.enqueue_many([EnqueueRequest("test.ping", {"text": text}) for text in texts])
    database = open_database(database_url, read_only=True)
    store = store_of(database, "")
    pages, after = [], FIRST_ID
    while page := await store.unfinished(after=after, jobs=10, characters=5_000):
        pages.append([len(stored.text) // 1_000 for stored in page])
        after = page[-1].id
    await database.close()
    assert pages == [[0, 3, 3], [0, 9], [0]]


async def test_a_job_that_is_claimed_or_given_back_between_two_pages_is_read_once(
    queue: JobQueue, database_url: str
) -> None:
    stored = await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 6)
    ids = [each.job.id for each in stored if hasattr(each, "job")]
    (lease,) = await queue.lease(["test.ping"], "w", limit=1)
    assert lease.job.id == ids[0]
    database = open_database(database_url, read_only=True)
    store = store_of(database, "")
    first = await store.unfinished(after=FIRST_ID, jobs=3, characters=10_000)
    await queue.release(lease.token)
    later = await queue.lease(["test.ping"], "w", limit=6)
    assert len(later) == 6
    second = await store.unfinished(after=first[-1].id, jobs=3, characters=10_000)
    await database.close()
    assert [each.id for each in (*first, *second)] == ids


async def test_nothing_can_be_written(database_url: str) -> None:
    for pooler in ("session", "transaction"):
        database = open_database(database_url, read_only=True, pooler=pooler)
        with pytest.raises(QueueUnavailable) as refused:
            async with database.reading() as connection:
                await connection.exec_driver_sql(
                    "INSERT INTO job_type_state (type) VALUES ('x')"
                    if database.schema is None
                    else "INSERT INTO job_registry.job_type_state (type) VALUES ('x')"
                )
        await database.close()
        assert refused.value.kind == "read_only"


async def test_the_faults_that_are_kept_are_bounded(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "MAX_FAULTS", 5)
    await queue.enqueue_many([EnqueueRequest("test.ping", {})] * 9)
    for number, row in enumerate(run_in_thread(database_url, "SELECT id FROM job")):
        text = f'{{"entries": {{"k{number}": "x"}}}}'
        run_in_thread(database_url, f"UPDATE job SET payload = '{text}' WHERE id = '{row[0]}'")
    found = await replayed(database_url, registry_of(Entries))
    assert found.refused == {"test.ping": 9}
    assert len(found.faults) == 6
    assert found.faults[Fault("test.ping", "", "more")].jobs == 4


def run_in_thread(url: str, *statements: str) -> list[Any]:
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run_sql, url, *statements).result()


class Number(Payload):
    number: float = 0.0


async def test_a_float_that_postgresql_writes_as_an_integer_is_still_a_float(
    queue: JobQueue, database_url: str
) -> None:
    stored = await queue.enqueue(EnqueueRequest("test.ping", {}))
    assert stored.job.status is JobStatus.QUEUED
    run_in_thread(database_url, "UPDATE job SET payload = '{\"number\": 1e300}'")
    found = await replayed(database_url, registry_of(Number))
    assert found.reads_all
