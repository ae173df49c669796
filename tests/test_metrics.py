"""What /metrics counts, at what price, and for whom."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType
from job_registry_api.app import create_app
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobError
from job_registry_api.queue.queue import JobQueue
from job_registry_api.settings import load_settings
from tests.conftest import Ping, advance, run_sql
from tests.http_client import Visit, application_of, queue_of
from tests.test_auth import AUTH, bearer

PING = EnqueueRequest("test.ping", {})


class Samples:
    """The samples of a scrape, by name and labels; 0 where there is none."""

    def __init__(self, text: str) -> None:
        self.all = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.all.get((f"job_registry_{name}", frozenset(labels.items())), 0.0)

    def labels(self, label: str) -> set[str]:
        return {value for _, labels in self.all for name, value in labels if name == label}


async def scrape(client: httpx.AsyncClient, **headers: str) -> Samples:
    response = await client.get("/metrics", headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    return Samples(response.text)


async def test_enqueued_jobs_are_counted_by_type_and_repeated_ones_are_not(visit: Visit) -> None:
    async with visit() as client:
        for body in (
            {"type": "test.ping", "payload": {}},
            {"type": "test.ping", "payload": {}, "idempotencyKey": "k"},
            {"type": "test.ping", "payload": {}, "idempotencyKey": "k"},
            {"type": "test.pong", "payload": {}},
            {"type": "nope", "payload": {}},
        ):
            await client.post("/jobs", json=body)
        found = await scrape(client)
    assert found("enqueued_total", type="test.ping") == 2
    assert found("enqueued_total", type="test.pong") == 1
    assert found.labels("type") == {
        "test.ping", "test.pong", "test.limited", "payout.execute", "thumbnail.create"
    }  # fmt: skip


async def test_attempts_are_counted_by_how_they_ended(visit: Visit, database_url: str) -> None:
    async with visit() as client:
        queue = queue_of(client)
        await queue.enqueue_many([PING] * 8)
        leases = await queue.lease(["test.ping"], "w", limit=8)
        done, again, failed, released, snoozed, stopped, _lost, _also_lost = (
            lease.token for lease in leases
        )
        error = JobError("broken", "It broke.")
        await queue.complete(done)
        await queue.complete(done)  # A retry over HTTP: it ends nothing.
        await queue.complete(again)
        await queue.fail(failed, error)
        await queue.release(released)
        await queue.snooze(snoozed, 60)
        await queue.stop(stopped, error)
        await advance(database_url, 31)
        await queue.recover()
        found = await scrape(client)
        ended = {
            outcome: found("attempts_total", type="test.ping", outcome=outcome)
            for outcome in found.labels("outcome")
        }
        assert ended == {
            "succeeded": 2,
            "failed": 1,
            "released": 1,
            "snoozed": 1,
            "cancelled": 1,
            "lost": 2,
        }
        # A claim recovers lost attempts too.
        await queue.lease(["test.ping"], "w", limit=1)
        await advance(database_url, 61)
        await queue.lease(["test.pong"], "w", limit=1)
        found = await scrape(client)
        assert found("attempts_total", type="test.ping", outcome="timed_out") == 1
        # One that was to stop, and whose worker died, was cancelled.
        (lease,) = await queue.lease(["test.ping"], "w", limit=1)
        await queue.cancel(lease.job.id)
        await advance(database_url, 31)
        assert [job.status for job in await queue.recover()] == ["cancelled"]
        found = await scrape(client)
        assert found("attempts_total", type="test.ping", outcome="cancelled") == 2
        assert found("attempts_total", type="test.ping", outcome="lost") == 2


async def test_jobs_in_the_database_are_shown_by_type_and_status(
    visit: Visit, database_url: str
) -> None:
    database = open_database(database_url)
    policy = JobPolicy(max_attempts=3, timeout_seconds=60)
    others = JobRegistry(
        JobType(name=name, payload=Ping, policy=policy) for name in ("retired.one", "retired.two")
    )
    elsewhere = JobQueue(others, database)
    for name in others:
        await elsewhere.enqueue(EnqueueRequest(name, {}))
    await database.close()
    async with visit() as client:
        queue = queue_of(client)
        await queue.enqueue_many([PING] * 3)
        (lease,) = await queue.lease(["test.ping"], "w")
        await queue.complete(lease.token)
        found = await scrape(client)
    assert found("jobs", type="test.ping", status="queued") == 2
    assert found("jobs", type="test.ping", status="succeeded") == 1
    assert found("jobs", type="other", status="queued") == 2
    assert found.labels("type").isdisjoint(others)
    assert found("database_up") == 1


async def test_scrapers_share_one_count_of_the_jobs(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with visit() as client:
        queue = queue_of(client)
        counted = 0
        count = queue.counts

        async def counts() -> Any:
            nonlocal counted
            counted += 1
            return await count()

        monkeypatch.setattr(queue, "counts", counts)
        await asyncio.gather(*(scrape(client) for _ in range(20)))
        assert counted == 1


async def test_a_database_in_trouble_is_counted_and_the_scrape_answers(
    sqlite_template: Path, tmp_path: Path, registry: JobRegistry
) -> None:
    path = tmp_path / "jobs.db"
    await asyncio.to_thread(shutil.copy, sqlite_template, path)
    url = f"sqlite:///{path}"
    application = create_app(load_settings({"JOBS_DATABASE_URL": url}), registry)
    async with (
        application.router.lifespan_context(application),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(application), base_url="http://localhost"
        ) as client,
    ):
        await asyncio.to_thread(run_sql, url, "ALTER TABLE job RENAME TO gone")
        await asyncio.to_thread(run_sql, url, "ALTER TABLE job_count RENAME TO gone_too")
        for _ in range(3):
            answer = await client.post("/jobs", json={"type": "test.ping", "payload": {}})
            assert answer.status_code == 503
        found = await scrape(client)
        assert found("database_up") == 0
        assert found("database_unavailable_total") >= 3
        assert found("enqueued_total", type="test.ping") == 0
        assert found.labels("status") == set()


async def test_the_metrics_are_of_one_application_and_in_no_global_registry(visit: Visit) -> None:
    async with visit() as one, visit() as other:
        await queue_of(one).enqueue(PING)
        assert (await scrape(one))("enqueued_total", type="test.ping") == 1
        assert (await scrape(other))("enqueued_total", type="test.ping") == 0
    assert "job_registry" not in prometheus_client.generate_latest().decode()


async def test_strangers_read_no_metrics(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        for headers, status in (
            ({}, 401),
            (bearer("jobs:enqueue", "jobs:work"), 403),
            (bearer("jobs:read", **{"jobs:types": ["test.ping"]}), 403),
            (bearer("jobs:read"), 200),
        ):
            response = await client.get("/metrics", headers=headers)
            assert response.status_code == status
            assert ("job_registry_enqueued" in response.text) == (status == 200)
            if status != 200:
                assert response.json()["error"].keys() == {"code", "message", "details"}
        # Probes have no token.
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_without_authentication_only_this_machine_reads_metrics(
    visit: Visit, database_url: str
) -> None:
    async with visit() as client:
        application = application_of(client)
        for address, status in (
            ("10.0.0.7", 403),
            ("::ffff:10.0.0.7", 403),
            ("::1", 200),
            ("127.0.0.1", 200),
            ("::ffff:127.0.0.1", 200),
        ):
            transport = httpx.ASGITransport(application, client=(address, 4711))
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as stranger:
                assert (await stranger.get("/metrics")).status_code == status


async def test_an_event_that_cannot_be_published_is_counted_and_the_job_is_stored(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_event: object) -> None:
        raise RuntimeError("the log is broken")

    monkeypatch.setattr("job_registry_api.queue.events._log", broken)
    async with visit() as client:
        payload = {"batchId": "b", "escrowId": "e"}
        stored = await client.post("/jobs", json={"type": "payout.execute", "payload": payload})
        assert stored.status_code == 201
        found = Samples((await client.get("/metrics")).text)
    assert found("event_publish_failures_total") == 1
    assert found("enqueued_total", type="payout.execute") == 1
