"""The workers of `docs/examples/workers`, each as a process beside a server.

A lease lasts 3 seconds here, so that a test outlasts several.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from job_registry_api.graphql.schema import SDL_FILE
from tests.docs.pages import WORKERS
from tests.http_client import serving
from tests.node_packages import build_project, copy_project, skip_without_packages
from tests.proxy import Proxy

LEASE_SECONDS: Final = "3"

pytestmark = pytest.mark.xdist_group("remote workers")

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture(scope="module")
def built_typescript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in TypeScript, generated from the committed schema and compiled."""
    skip_without_packages()
    folder = tmp_path_factory.mktemp("typescript")
    copy_project(WORKERS / "typescript", folder)
    build_project(folder, ["graphql-codegen"], ["tsc"], SCHEMA=str(SDL_FILE))
    return folder


@pytest.fixture(params=["python", pytest.param("typescript", marks=pytest.mark.slow)])
async def start(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a worker. `seconds` is how long each payout takes."""
    if request.param == "python":
        command = [sys.executable, str(WORKERS / "python" / "payouts.py")]
    else:
        command = ["node", str(request.getfixturevalue("built_typescript") / "build/payouts.js")]
    started: list[asyncio.subprocess.Process] = []
    log = tmp_path / "worker.log"

    async def run(
        address: str, *, seconds: float, concurrency: int = 5
    ) -> asyncio.subprocess.Process:
        own = {"BANK_SECONDS": str(seconds), "WORKER_CONCURRENCY": str(concurrency)}
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                f"http://{address}/graphql",
                env={**os.environ, **own},
                stdout=output,
                stderr=output,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()
    print(log.read_text() if log.exists() else "")  # noqa: T201


@pytest.fixture
def url(sqlite_template: Path, tmp_path: Path) -> str:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@asynccontextmanager
async def server_of(url: str, **settings: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server without a worker of its own."""
    given = {"lease_seconds": LEASE_SECONDS, **settings}
    async with (
        serving(url, "--no-worker", **given) as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as client,
    ):
        yield client


def address_of(server: httpx.AsyncClient) -> str:
    return server.base_url.netloc.decode()


async def enqueue(server: httpx.AsyncClient, batch: str, *, escrow: str = "e") -> str:
    payload = {"batchId": batch, "escrowId": escrow}
    response = await server.post("/jobs", json={"type": "payout.execute", "payload": payload})
    return str(response.json()["jobId"])


async def read(server: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = (await server.get(f"/jobs/{job_id}")).json()
    return job


async def until(
    server: httpx.AsyncClient, job_id: str, *statuses: str, seconds: float = 30
) -> dict[str, Any]:
    """Return the job once it has one of these statuses."""
    deadline = time.monotonic() + seconds
    while (job := await read(server, job_id))["status"] not in statuses:
        assert time.monotonic() < deadline, job
        await asyncio.sleep(0.1)
    return job


def outcomes(job: dict[str, Any]) -> list[str | None]:
    return [attempt["outcome"] for attempt in job["attempts"]]


async def graphql(server: httpx.AsyncClient, query: str, **variables: Any) -> Any:
    response = await server.post("/graphql", json={"query": query, "variables": variables})
    content = response.json()
    assert "errors" not in content, content
    (result,) = content["data"].values()
    return result


LEASE = """mutation { leaseJobs(input: {jobTypes: ["payout.execute"], workerId: "another"}) {
  ... on LeaseJobsSuccess { leases { leaseToken job { id attempt } } } } }"""
COMPLETE = """mutation ($token: String!) { completeJob(leaseToken: $token, result: "another") {
  __typename } }"""
CANCEL = "mutation ($id: ID!) { cancelJob(id: $id) { __typename } }"


async def ended(process: asyncio.subprocess.Process, *, within: float) -> int:
    """Send SIGTERM, and return the exit code."""
    process.send_signal(signal.SIGTERM)
    return await asyncio.wait_for(process.wait(), within)


@pytest.mark.slow
async def test_five_jobs_at_once_outlast_their_leases(url: str, start: Start) -> None:
    async with server_of(url) as server:
        jobs = [await enqueue(server, f"b-{n}") for n in range(5)]
        worker = await start(address_of(server), seconds=8)
        for number, job_id in enumerate(jobs):
            job = await until(server, job_id, "succeeded", "failed")
            assert outcomes(job) == ["succeeded"]
            assert job["result"] == {"paid": f"b-{number}", "attempt": 1}
            assert job["progress"] == {"paying": f"b-{number}"}
        assert await ended(worker, within=4) == 0


@pytest.mark.slow
async def test_each_end_of_a_handler_is_reported_as_such(url: str, start: Start) -> None:
    async with server_of(url) as server:
        escrows = ["unknown", "closed", "review"]
        unknown, closed, review = [await enqueue(server, "b", escrow=each) for each in escrows]
        await start(address_of(server), seconds=0)
        job = await until(server, unknown, "failed")
        assert (outcomes(job), job["error"]["code"]) == (["failed"], "escrow_unknown")
        job = await until(server, closed, "succeeded")
        assert outcomes(job) == ["failed", "succeeded"]
        assert job["attempts"][0]["error"]["code"] == "bank_closed"
        job = await until(server, review, "queued")
        assert (job["status"], job["attempt"], outcomes(job)) == ("queued", 0, ["snoozed"])


@pytest.mark.slow
async def test_a_cancelled_job_is_stopped(url: str, start: Start) -> None:
    async with server_of(url) as server:
        job_id = await enqueue(server, "b-1")
        await start(address_of(server), seconds=50)
        await until(server, job_id, "running")
        await graphql(server, CANCEL, id=job_id)
        job = await until(server, job_id, "cancelled", seconds=4)
        assert outcomes(job) == ["cancelled"]


@pytest.mark.slow
async def test_an_attempt_that_times_out_is_reported_in_time(
    url: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = tmp_path / "quick_payouts.py"
    catalog.write_text(
        "from job_registry import JobPolicy, JobType\n"
        "from job_registry.catalog.payout import PayoutExecute\n"
        "payout = JobType(name='payout.execute', payload=PayoutExecute,\n"
        "                 policy=JobPolicy(max_attempts=1, timeout_seconds=4))\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    async with server_of(url, catalog="quick_payouts") as server:
        job_id = await enqueue(server, "b-1")
        await start(address_of(server), seconds=50)
        job = await until(server, job_id, "failed", seconds=15)
        assert (outcomes(job), job["error"]["code"]) == (["failed"], "timed_out")


@pytest.mark.slow
async def test_a_worker_that_ends_releases_its_job(url: str, start: Start) -> None:
    async with server_of(url) as server:
        job_id = await enqueue(server, "b-1")
        worker = await start(address_of(server), seconds=50)
        await until(server, job_id, "running")
        assert await ended(worker, within=3) == 0
        job = await read(server, job_id)
        assert (job["status"], job["attempt"], outcomes(job)) == ("queued", 0, ["released"])


@pytest.mark.slow
async def test_a_worker_ends_in_the_middle_of_a_long_poll(url: str, start: Start) -> None:
    async with server_of(url) as server:
        warm = await enqueue(server, "b-1")
        worker = await start(address_of(server), seconds=0)
        await until(server, warm, "succeeded")
        await asyncio.sleep(0.5)
        assert await ended(worker, within=2) == 0
        job_id = await enqueue(server, "b-2")
        (lease,) = (await graphql(server, LEASE))["leases"]
        assert lease["job"] == {"id": job_id, "attempt": 1}


@pytest.mark.slow
async def test_workers_that_end_while_jobs_come_lose_none(url: str, start: Start) -> None:
    async with server_of(url) as server:
        warm = await enqueue(server, "b-1")
        workers = [await start(address_of(server), seconds=50) for _ in range(3)]
        await until(server, warm, "running")
        await asyncio.sleep(2)
        enqueueing = asyncio.gather(*(enqueue(server, f"b-{n}") for n in range(4)))
        codes = await asyncio.gather(*(ended(worker, within=5) for worker in workers))
        jobs = await enqueueing
        assert codes == [0, 0, 0]
        for job_id in [warm, *jobs]:
            job = await read(server, job_id)
            assert (job["status"], job["attempt"]) == ("queued", 0)
            assert set(outcomes(job)) <= {"released"}


async def test_a_result_that_is_refused_fails_the_job(url: str, tmp_path: Path) -> None:
    script = tmp_path / "large_results.py"
    script.write_text(
        "import asyncio, sys, worker\n"
        "async def large(job): return 'x' * 100_000\n"
        "asyncio.run(worker.main(sys.argv[1], {'payout.execute': large}))\n"
    )
    async with server_of(url, max_payload_bytes="50000") as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            f"http://{address_of(server)}/graphql",
            env={**os.environ, "PYTHONPATH": str(WORKERS / "python")},
        )
        job = await until(server, await enqueue(server, "b-1"), "failed", "succeeded")
        assert (outcomes(job), job["error"]["code"]) == (["failed"], "report_refused")
        assert await ended(process, within=4) == 0


@pytest.mark.slow
async def test_a_server_that_is_killed_and_started_again_costs_no_attempt(
    url: str, start: Start
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--no-worker", "--port", str(port))
    address = f"127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as server:
        async with serving(url, *options, lease_seconds="12") as (_, pid):
            # The first ends while there is no server, the second after it is back.
            await start(address, seconds=2)
            first = await enqueue(server, "b-1")
            await until(server, first, "running")
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(3)
        async with serving(url, *options, lease_seconds="12"):
            second = await enqueue(server, "b-2")
            for job_id in (first, second):
                job = await until(server, job_id, "succeeded", "failed")
                assert outcomes(job) == ["succeeded"]


@pytest.mark.slow
async def test_a_worker_that_lost_its_lease_drops_the_job(url: str, start: Start) -> None:
    async with server_of(url) as server:
        job_id = await enqueue(server, "b-1")
        # With another free slot, its long poll would lease the job again while it is stopped.
        worker = await start(address_of(server), seconds=8, concurrency=1)
        await until(server, job_id, "running")
        worker.send_signal(signal.SIGSTOP)
        await asyncio.sleep(float(LEASE_SECONDS) + 1)
        # The first request ends the expired attempt. The job then waits for its backoff.
        deadline = time.monotonic() + 15
        while not (leases := (await graphql(server, LEASE))["leases"]):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        worker.send_signal(signal.SIGCONT)
        await asyncio.sleep(1)
        await graphql(server, COMPLETE, token=leases[0]["leaseToken"])
        # The worker goes on with other jobs.
        other = await until(server, await enqueue(server, "b-2"), "succeeded")
        assert outcomes(other) == ["succeeded"]
        job = await read(server, job_id)
        assert (job["result"], outcomes(job)) == ("another", ["lost", "succeeded"])


@pytest.mark.slow
async def test_a_lease_that_ended_on_its_way_is_not_run(
    url: str, start: Start, tmp_path: Path
) -> None:
    async with server_of(url) as server:
        with Proxy(str(server.base_url)) as proxy:
            await start(f"127.0.0.1:{proxy.port}", seconds=0)
            warm = await enqueue(server, "b-1")
            await until(server, warm, "succeeded")
            await asyncio.sleep(0.5)
            # The worker waits for jobs. The answer with the next one does not reach it.
            proxy.stall()
            job_id = await enqueue(server, "b-2")
            await until(server, job_id, "running")
            await asyncio.sleep(float(LEASE_SECONDS) + 0.5)
            proxy.resume()
            await until(server, job_id, "succeeded")
        log = (tmp_path / "worker.log").read_text()
        # Another worker could run the first attempt already, so only the second one is run.
        assert f"{job_id} attempt 1" not in log
        assert f"{job_id} attempt 2" in log


@pytest.mark.slow
async def test_a_lease_that_is_almost_over_when_it_arrives_is_renewed(
    url: str, start: Start
) -> None:
    async with server_of(url, lease_seconds="9") as server:
        with Proxy(str(server.base_url)) as proxy:
            await start(f"127.0.0.1:{proxy.port}", seconds=4)
            warm = await enqueue(server, "b-1")
            await until(server, warm, "succeeded")
            await asyncio.sleep(0.5)
            proxy.stall()
            job_id = await enqueue(server, "b-2")
            await until(server, job_id, "running")
            await asyncio.sleep(8)
            proxy.resume()
            job = await until(server, job_id, "succeeded")
            assert outcomes(job) == ["succeeded"]
