"""A host project of its own folder, whose names are ours: packages, a model and alembic.

It runs in processes of its own, as it would in production: uvicorn serves it, with the queue, a
worker and the mounted application in its lifespan.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from tests import ROOT
from tests.conftest import run_sql
from tests.embedding import host_project
from tests.http_client import served

EVENTS = "subscription { jobEvents { name type } }"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "host"
    host_project.write_to(folder)
    return folder


@pytest.fixture
def environment(database_url: str) -> dict[str, str]:
    """The host's database is the queue's. In a file both share, a table cannot be there twice."""
    scheme, _, rest = database_url.partition("://")
    if scheme == "postgresql":
        name = rest.partition("?")[0].rpartition("/")[2]
        # As a database has it that is not the one of our tests.
        run_sql(database_url, f'ALTER DATABASE {name} SET search_path = "$user", public')
    driver = {"sqlite": "aiosqlite", "postgresql": "asyncpg"}[scheme]
    given = {name: value for name, value in os.environ.items() if not name.startswith("JOBS_")}
    return given | {
        "PYTHONPATH": str(ROOT / "src"),
        "JOBS_DATABASE_URL": database_url,
        "HOST_DATABASE": f"{scheme}+{driver}://{rest}",
        "JOB_TABLE": "opening" if scheme == "sqlite" else "job",
    }


def alembic(project: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def migrate(project: Path, environment: dict[str, str]) -> str:
    """Migrate the host's own tables. Return the migration that alembic has written."""
    alembic(project, environment, "revision", "--autogenerate", "-m", "openings")
    alembic(project, environment, "upgrade", "head")
    (written,) = (project / "alembic" / "versions").glob("*.py")
    return written.read_text("utf-8")


@pytest.fixture
def tables(database_url: str) -> None:
    """The host's own table."""
    if database_url.startswith("sqlite"):
        statement = "CREATE TABLE opening (id INTEGER PRIMARY KEY, title TEXT)"
    else:
        statement = "CREATE TABLE public.job (id SERIAL PRIMARY KEY, title TEXT)"
    run_sql(database_url, statement)


def host(project: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """The project, which uvicorn serves."""
    return subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "api.main:app", "--port", "0", *options],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
async def test_the_hosts_alembic_sees_its_own_tables_only(
    project: Path, environment: dict[str, str]
) -> None:
    written = await asyncio.to_thread(migrate, project, environment)
    assert re.findall(r"op\.(\w+)\(\s*'(\w+)'", written) == [
        ("create_table", environment["JOB_TABLE"]),
        ("drop_table", environment["JOB_TABLE"]),
    ]
    assert "No new upgrade operations detected" in alembic(project, environment, "check")


@pytest.mark.usefixtures("tables")
async def test_the_hosts_transaction_stores_its_row_and_the_job_or_neither(
    project: Path, environment: dict[str, str]
) -> None:
    async with served(host(project, environment)) as client:
        published = await client.post("/openings/cook")
        assert published.status_code == 200, published.text
        refused = await client.post("/openings/refused")
        result = await client.get(f"/results/{published.json()['job']}")
        count = await client.get("/openings")
        jobs = await client.post("/queue/graphql", json={"query": "{ jobs { nodes { status } } }"})
    assert refused.status_code == 409
    assert result.json() == {"sent": "cook@example.com"}
    assert count.json() == 1
    assert jobs.json() == {"data": {"jobs": {"nodes": [{"status": "SUCCEEDED"}]}}}


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
async def test_subscriptions_are_served_under_the_prefix_by_sse_and_websocket(
    project: Path, environment: dict[str, str]
) -> None:
    async def by_sse(client: httpx.AsyncClient) -> object:
        headers = {"accept": "text/event-stream"}
        async with client.stream(
            "POST", "/queue/graphql", json={"query": EVENTS}, headers=headers
        ) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    return json.loads(line.removeprefix("data: "))["data"]["jobEvents"]
        return None

    async def by_websocket(address: str) -> object:
        protocol = Subprotocol("graphql-transport-ws")
        async with connect(f"ws://{address}/queue/graphql", subprotocols=[protocol]) as socket:
            await socket.send(json.dumps({"type": "connection_init"}))
            assert json.loads(await socket.recv()) == {"type": "connection_ack"}
            payload = {"query": EVENTS}
            await socket.send(json.dumps({"type": "subscribe", "id": "1", "payload": payload}))
            return json.loads(await socket.recv())["payload"]["data"]["jobEvents"]

    async def publish(client: httpx.AsyncClient) -> None:
        # A subscription shows what happens after it began, and nothing says when that was.
        while True:
            await client.post("/openings/cook")
            await asyncio.sleep(0.3)

    async with (
        served(host(project, environment)) as client,
        asyncio.timeout(30),
    ):
        address = client.base_url.netloc.decode()
        publishing = asyncio.create_task(publish(client))
        events = await asyncio.gather(by_sse(client), by_websocket(address))
        publishing.cancel()
        await asyncio.wait({publishing})
    assert [event["type"] for event in events if isinstance(event, dict)] == ["mail.send"] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
async def test_sigterm_ends_the_host_the_worker_and_the_application(
    project: Path, environment: dict[str, str]
) -> None:
    process = host(project, environment)
    async with served(process) as client:
        assert (await client.get("/queue/readyz")).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, said = await asyncio.to_thread(process.communicate, timeout=20)
    assert "Application shutdown complete" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
async def test_behind_a_proxy_locations_have_the_whole_prefix(
    project: Path, environment: dict[str, str]
) -> None:
    async with served(host(project, environment, "--root-path", "/shop")) as client:
        job = {"type": "mail.send", "payload": {"to": "ada@example.com"}}
        stored = await client.post("/queue/jobs", json=job)
    assert stored.headers["location"] == f"/shop/queue/jobs/{stored.json()['jobId']}"
