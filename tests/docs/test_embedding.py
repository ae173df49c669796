"""The examples of docs/embedding.md run, on both databases."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider

from job_registry_api import QUEUE_TABLES
from tests.conftest import run_sql
from tests.docs.pages import write_modules

MAIL = {"type": "mail.send", "payload": {"to": "ada@example.com"}}


@pytest.fixture
def example(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], ModuleType]]:
    """Imports an example by the name of its module, with a database in the environment."""
    folder = tmp_path / "modules"
    folder.mkdir()
    write_modules(folder)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in os.environ if name.startswith("JOBS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JOBS_DATABASE_URL", database_url)
    monkeypatch.setenv("JOBS_CATALOG", "job_registry.catalog,myjobs")
    scheme, _, rest = database_url.partition("://")
    driver = {"sqlite": "aiosqlite", "postgresql": "asyncpg"}[scheme]
    monkeypatch.setenv("SHOP_DATABASE", f"{scheme}+{driver}://{rest}")
    yield __import__
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@asynccontextmanager
async def visiting(app: Any, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers
        ) as client,
    ):
        yield client


async def status_of(client: httpx.AsyncClient, location: str) -> str:
    job = (await client.get(location)).json()
    status: str = job["status"]
    return status


async def test_the_mounted_application_runs_jobs(example: Callable[[str], Any]) -> None:
    async with visiting(example("mounted").app) as client, asyncio.timeout(20):
        stored = await client.post("/queue/jobs", json=MAIL)
        assert stored.status_code == 201
        while await status_of(client, stored.headers["location"]) != "succeeded":
            await asyncio.sleep(0.05)


async def test_starlette_mounts_it_under_a_deeper_path(example: Callable[[str], Any]) -> None:
    async with visiting(example("mounted_starlette").app) as client:
        ready = await client.get("/internal/queue/readyz")
        stored = await client.post("/internal/queue/jobs", json=MAIL)
    assert (ready.status_code, stored.status_code) == (200, 201)


async def test_an_opening_and_its_job_are_stored_together_or_not_at_all(
    example: Callable[[str], Any], database_url: str
) -> None:
    shop = example("openings")
    async with shop.engine.begin() as connection:
        await connection.run_sync(shop.Job.__table__.create)
    async with visiting(shop.app) as client, asyncio.timeout(20):
        published = await client.post("/openings", params={"title": "cook"})
        refused = await client.post("/openings", params={"title": ""})
        result = await shop.queue.result(published.json()["jobId"])
        jobs = (await shop.queue.list()).jobs
    openings = await asyncio.to_thread(run_sql, database_url, "SELECT title FROM opening")
    assert (published.status_code, refused.status_code) == (200, 422)
    assert result == {"sent": "editors@example.com"}
    assert len(jobs) == 1
    assert [tuple(row) for row in openings] == [("cook",)]


async def test_the_enqueues_of_a_traced_queue_belong_to_the_program_s_trace(
    example: Callable[[str], Any],
) -> None:
    program = example("traced")
    async with program.queue, program.jobs.running():
        with TracerProvider().get_tracer("shop").start_as_current_span("order") as order:
            await program.queue.enqueue(__import__("myjobs").MailSend(to="ada@example.com"))
        (lease,) = await program.queue.lease(["mail.send"], "w")
    assert f"-{order.get_span_context().trace_id:032x}-" in lease.traceparent


async def test_the_merged_schema_serves_both_and_knows_the_user(
    example: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    document = """mutation ($input: QueueEnqueueJobInput!) { enqueueJob(input: $input) {
      ... on QueueEnqueueJobSuccess { job { createdBy } } ... on QueueError { code } } }"""
    async with visiting(example("merged_graphql").app) as client:

        async def send(query: str, user: str | None = "ada") -> Any:
            headers = {} if user is None else {"x-user": user}
            content = {"query": query, "variables": {"input": MAIL}}
            return (await client.post("/graphql", json=content, headers=headers)).json()

        assert await send("{ motto jobTypes { name } }") == {
            "data": {"motto": "Fresh every day", "jobTypes": [{"name": "mail.send"}]}
        }
        assert await send(document) == {"data": {"enqueueJob": {"job": {"createdBy": "ada"}}}}
        (error,) = (await send(document, None))["errors"]
        assert error["extensions"]["code"] == "unauthenticated"
        assert caplog.records == []


def test_the_tables_of_the_queue_are_left_out(
    example: Callable[[str], Any], database_url: str
) -> None:
    """These are all its tables, in a SQLite file and in its schema."""
    include_name = example("leave_out").include_name
    if database_url.startswith("sqlite"):
        found = run_sql(
            database_url,
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        )
    else:
        found = run_sql(
            database_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'job_registry'"
        )
    assert {name for (name,) in found} <= QUEUE_TABLES
    assert not any(include_name(name, "table", {}) for (name,) in found)
    assert include_name("opening", "table", {})
    assert not include_name("job_registry", "schema", {})
