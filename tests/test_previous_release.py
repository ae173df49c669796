"""Processes of the previous release and of this one share a database, under load.

The previous release is the newest tag. Before the first release it is the last commit whose newest
migration was 0002.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from job_registry_api import JobFailed, JobQueue, JobStatus
from tests import CODE, ROOT
from tests.postgresql_server import free_port

BEFORE_THE_FIRST_RELEASE = "8a05a8e"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("previous release")]


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the packages of the previous release, as its wheel has them."""
    tag = git("describe", "--tags", "--abbrev=0", "HEAD^")
    release = tag.stdout.decode().strip() if tag.returncode == 0 else BEFORE_THE_FIRST_RELEASE
    archive = git("archive", release)
    if archive.returncode != 0:
        pytest.skip(f"the history of this checkout does not have {release}")
    folder = tmp_path_factory.mktemp("previous")
    checkout, packages = folder / "checkout", folder / "packages"
    checkout.mkdir()
    subprocess.run(["tar", "-x"], cwd=checkout, input=archive.stdout, check=True)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    environment = {**os.environ, "JOB_REGISTRY_WITHOUT_GRAPHIQL": "1"}
    subprocess.run(build, cwd=checkout, env=environment, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    return str(packages)


@pytest.fixture
def url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A database that has nothing yet, not even tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    return str(request.getfixturevalue("fresh_postgresql_url"))


both_databases = pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)


class Release:
    """One of the two releases, whose commands share a database and a folder."""

    def __init__(self, packages: str, url: str, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("JOBS_")},
            "PYTHONPATH": packages,
            "JOBS_DATABASE_URL": url,
            "JOBS_LEASE_SECONDS": "5",
            "JOBS_LOG_LEVEL": "warning",
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "job_registry_api.cli", *arguments]

    def migrate(self) -> None:
        command = self.command("migrate")
        subprocess.run(command, env=self.environment, cwd=self.folder, check=True)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[int]:
        """The port of a `serve` or a `worker` that is up."""
        port = free_port()
        option = "--port" if arguments[0] == "serve" else "--health-port"
        with subprocess.Popen(
            self.command(*arguments, option, str(port)), env=self.environment, cwd=self.folder
        ) as process:
            try:
                for _ in range(600):
                    assert process.poll() is None, "it ended at its start"
                    with suppress(httpx.TransportError):
                        if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                            break
                    try:
                        process.wait(0.1)
                    except subprocess.TimeoutExpired:
                        continue
                yield port
            finally:
                process.terminate()
                assert process.wait(30) == 0


@asynccontextmanager
async def load(*ports: int) -> AsyncIterator[list[str]]:
    """Clients that enqueue pictures that are not there and payouts, at each of these servers."""
    ids: list[str] = []
    faults: list[str] = []

    async def enqueue(client: httpx.AsyncClient, port: int) -> None:
        number = 0
        while True:
            number += 1
            payload = {"assetId": "missing", "versionNumber": number}
            body = {"type": "thumbnail.create", "payload": payload}
            answer = await client.post(f"http://127.0.0.1:{port}/jobs", json=body)
            if answer.status_code == 201:
                ids.append(answer.json()["jobId"])
            else:
                faults.append(answer.text)
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(timeout=20) as client:
        tasks = [asyncio.create_task(enqueue(client, port)) for port in ports]
        try:
            yield ids
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended
    assert faults == []


async def all_ended(url: str, ids: list[str]) -> None:
    """Wait until the jobs have run. Their picture is missing: a handler that ran says so."""
    async with JobQueue.from_url(url, []) as queue, asyncio.timeout(60):
        for job_id in ids:
            with suppress(JobFailed):
                await queue.result(job_id)
            job = await queue.get(job_id)
            assert job.status is JobStatus.FAILED
            assert job.error is not None
            assert "There is no picture" in job.error.message, job.error
            assert job.attempt == 1


@both_databases
async def test_old_processes_survive_the_migration_and_work_beside_new_ones(
    previous: str, url: str, tmp_path: Path
) -> None:
    old, new = Release(previous, url, tmp_path), Release(CODE, url, tmp_path)
    old.migrate()
    with old.running("serve", "--no-worker") as port, old.running("worker"):
        async with load(port) as ids:
            await asyncio.sleep(1)
            await asyncio.to_thread(new.migrate)
            after = len(ids)
            await asyncio.sleep(1)
            assert len(ids) > after
            with new.running("serve") as new_port:
                async with load(new_port) as new_ids:
                    await asyncio.sleep(2)
        await all_ended(url, ids + new_ids)


@both_databases
async def test_a_rollback_starts_old_processes_on_the_new_database(
    previous: str, url: str, tmp_path: Path
) -> None:
    old, new = Release(previous, url, tmp_path), Release(CODE, url, tmp_path)
    new.migrate()
    with new.running("serve", "--no-worker") as new_port:
        async with load(new_port) as ids:
            await asyncio.sleep(1)
            with old.running("worker"), old.running("serve", "--no-worker") as port:
                async with load(port) as old_ids:
                    await asyncio.sleep(2)
                await all_ended(url, [*ids, *old_ids])
        with new.running("worker"):
            await all_ended(url, ids)
