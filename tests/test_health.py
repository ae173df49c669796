"""/healthz and /readyz, on the server and on a worker's health port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.auth import Authenticator
from job_registry_api.health import Health, health_app
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker
from job_registry_api.worker import loop as worker_module
from tests import CODE, forks
from tests.conftest import run_sql
from tests.forks import Command
from tests.test_auth import AUTH, bearer
from tests.test_metrics import Samples

JOBS = """
    import time
    from job_registry import JobContext, JobPolicy, JobType, Payload

    class Empty(Payload):
        pass

    stuck = JobType(
        name="stuck", payload=Empty, policy=JobPolicy(max_attempts=1, timeout_seconds=600)
    )
    late = JobType(
        name="late", payload=Empty, policy=JobPolicy(max_attempts=1, timeout_seconds=1)
    )

    @stuck.handler
    @late.handler
    def hang(job: JobContext, payload: Empty) -> None:
        time.sleep(600)
"""

REGISTRY = JobRegistry(
    JobType(name=name, payload=Payload, policy=JobPolicy(max_attempts=1, timeout_seconds=seconds))
    for name, seconds in (("stuck", 600), ("late", 1))
)


@contextmanager
def worker(url: str, folder: Path, *options: str, **settings: str) -> Iterator[tuple[str, int]]:
    """A `job-registry worker` with a health port: its address, and its process id."""
    (folder / "hanging.py").write_text(textwrap.dedent(JOBS), "utf-8")
    given = {"database_url": url, "catalog": "hanging", "log_level": "error"} | settings
    process = Command(
        ["worker", "--health-port", "0", *options],
        environment={
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{CODE}",
            **{f"JOBS_{name.upper()}": value for name, value in given.items()},
        },
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("Health is served at http://"), line + process.stderr.read()
        yield line.split()[-1].removesuffix("/healthz"), process.pid
    finally:
        process.kill()
        process.communicate(timeout=10)


def eventually(address: str, path: str, status: int) -> httpx.Response:
    give_up = time.monotonic() + 20
    while True:
        response = httpx.get(address + path, timeout=10)
        if response.status_code == status or time.monotonic() > give_up:
            assert response.status_code == status, response.text
            return response
        time.sleep(0.05)


def eventually_counted(address: str, name: str, value: float, **labels: str) -> Samples:
    give_up = time.monotonic() + 20
    while True:
        found = Samples(httpx.get(address + "/metrics", timeout=10).text)
        if found(name, **labels) == value or time.monotonic() > give_up:
            assert found(name, **labels) == value
            return found
        time.sleep(0.05)


def enqueue(url: str, job_type: str) -> None:
    async def run() -> None:
        async with JobQueue.from_url(url, REGISTRY, lease_seconds=30) as queue:
            await queue.enqueue(EnqueueRequest(job_type, {}))

    asyncio.run(run())


def test_a_worker_shows_its_health_and_what_it_runs(database_url: str, tmp_path: Path) -> None:
    with worker(database_url, tmp_path) as (address, pid):
        assert eventually(address, "/healthz", 200).json() == {"status": "ok"}
        assert eventually(address, "/readyz", 200).json() == {"status": "ok"}
        assert httpx.get(address + "/jobs").status_code == 404
        eventually_counted(address, "running_attempts", 0)
        enqueue(database_url, "stuck")
        found = eventually_counted(address, "running_attempts", 1)
        assert found("overdue_attempts") == 0
        # It lets its job run on, and takes no further one.
        os.kill(pid, signal.SIGTERM)
        assert eventually(address, "/readyz", 503).json()["error"]["code"] == "stopping"
        assert httpx.get(address + "/healthz").status_code == 200


def test_attempts_that_outlive_their_timeout_in_a_thread_are_shown(
    database_url: str, tmp_path: Path
) -> None:
    with worker(database_url, tmp_path) as (address, _):
        enqueue(database_url, "late")
        eventually_counted(address, "overdue_attempts", 1)
        eventually_counted(address, "attempts_total", 1, type="late", outcome="timed_out")


def test_a_worker_without_its_tables_is_not_ready_and_goes_on_living(
    sqlite_template: Path, tmp_path: Path
) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(sqlite_template.read_bytes())
    url = f"sqlite:///{path}"
    with worker(url, tmp_path) as (address, _):
        eventually(address, "/readyz", 200)
        run_sql(url, "ALTER TABLE job RENAME TO gone")
        error = eventually(address, "/readyz", 503).json()["error"]
        assert error == {
            "code": "queue_unavailable",
            "kind": "schema_outdated",
            "message": "The database cannot store jobs at the moment. The log says why.",
        }
        assert httpx.get(address + "/healthz").status_code == 200
        run_sql(url, "ALTER TABLE gone RENAME TO job")
        eventually(address, "/readyz", 200)


def test_where_tokens_are_needed_a_worker_shows_its_metrics_for_a_token(
    sqlite_template: Path, tmp_path: Path
) -> None:
    (tmp_path / "jobs.db").write_bytes(sqlite_template.read_bytes())
    with worker(f"sqlite:///{tmp_path / 'jobs.db'}", tmp_path, **AUTH) as (address, _):
        assert eventually(address, "/healthz", 200)
        assert httpx.get(address + "/metrics").status_code == 401
        assert httpx.get(address + "/metrics", headers=bearer("jobs:read")).status_code == 200


def test_a_health_port_that_is_taken_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = ["worker", "--health-port", port]
        result = forks.run(command, environment=os.environ, folder=tmp_path)
    assert result.returncode == 1
    reason = f"Cannot listen on 127.0.0.1:{port}: Address already in use."
    assert result.stderr == f"{reason} Choose another port with --health-port.\n"


@dataclass(frozen=True)
class Standing:
    """The health of a worker that stands still."""

    loop_blocked_seconds: float = 0.0
    renewals_behind_seconds: float = 0.0
    running: int = 3
    overdue: int = 2


@dataclass(frozen=True)
class FakeWorker:
    health: Standing
    is_stopping: bool = False


@pytest.mark.parametrize(
    ("health", "reason"),
    [
        (Standing(), None),
        (Standing(loop_blocked_seconds=29.0, renewals_behind_seconds=29.0), None),
        (
            Standing(loop_blocked_seconds=31.0),
            "The worker has been stalled for 31 seconds.",
        ),
        (
            Standing(renewals_behind_seconds=44.0),
            "Renewals of leases are 44 seconds late.",
        ),
    ],
)
async def test_a_worker_that_stands_still_is_not_alive_and_the_reason_is_reported(
    queue: JobQueue, health: Standing, reason: str | None
) -> None:
    app = health_app(Health(queue, FakeWorker(health), authenticator=Authenticator(None)))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
    ) as client:
        response = await client.get("/healthz")
        if reason is None:
            assert response.status_code == 200
        else:
            assert response.status_code == 503
            assert response.json()["error"] == {"code": "worker_stalled", "message": reason}
        found = Samples((await client.get("/metrics")).text)
        assert (found("running_attempts"), found("overdue_attempts")) == (3, 2)


async def test_a_worker_whose_claim_hangs_says_for_how_long(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = JobRegistry([napping()])
    async with JobQueue.from_url(database_url, registry, lease_seconds=30) as queue:
        hung = asyncio.Event()

        async def hang(*_arguments: object, **_options: object) -> list[object]:
            await hung.wait()
            return []

        monkeypatch.setattr(queue, "lease", hang)
        monkeypatch.setattr(worker_module, "MAX_WAIT_SECONDS", 0.1)
        worker = Worker(queue, concurrency=2, assets="assets", shutdown_seconds=0)
        assert worker.health.loop_blocked_seconds == 0
        task = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            while worker.health.loop_blocked_seconds == 0:
                await asyncio.sleep(0.01)
        worker.stop()
        assert worker.health.loop_blocked_seconds == 0
        hung.set()
        await task


async def test_a_lease_that_is_not_renewed_is_counted(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = JobRegistry([napping()])
    async with JobQueue.from_url(database_url, registry, lease_seconds=1) as queue:

        async def fail(*_arguments: object) -> None:
            raise QueueUnavailable("gone")

        monkeypatch.setattr(JobQueue, "renew", fail)
        await queue.enqueue(EnqueueRequest("nap", {}))
        worker = Worker(queue, concurrency=2, assets="assets", shutdown_seconds=0)
        task = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            while Samples(queue.metrics.text().decode())("lease_renewal_failures_total") < 1:
                await asyncio.sleep(0.01)
        worker.stop()
        worker.stop()
        await task


def napping() -> JobType[Payload]:
    nap = JobType(
        name="nap", payload=Payload, policy=JobPolicy(max_attempts=1, timeout_seconds=600)
    )

    @nap.handler
    async def sleep(_job: object, _payload: Payload) -> None:
        await asyncio.sleep(600)

    return nap
