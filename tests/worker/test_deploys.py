"""Deploys that change a payload while jobs are queued, with real processes of each version.

Each version is a catalog of its own with the type `note`. A deploy ends the workers of one version
and starts those of another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from job_registry import EnqueueRequest, JobRegistry
from job_registry.discovery import load_registry
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobCounts
from job_registry_api.queue.queue import JobQueue
from tests.cli.test_cli import Shell
from tests.conftest import advance

VERSION = """
from job_registry import JobContext, JobPolicy, JobType, Payload


class NoteV1(Payload):
    text: str


class NoteV2(Payload):
    text: str
    color: str = "blue"


class NoteV3(Payload):
    words: list[str]


class Other(Payload):
    pass


{definition}


@note.handler
async def write(job: JobContext, payload: Note) -> str:
    return type(payload).__name__


other = JobType(name="other", payload=Other)


@other.handler
async def do(job: JobContext, payload: Other) -> str:
    return "done"
"""

DEFINITIONS = {
    "first": 'Note = NoteV1\nnote = JobType(name="note", payload=Note)',
    "optional": 'Note = NoteV2\nnote = JobType(name="note", payload=Note)',
    "changed": 'Note = NoteV3\nnote = JobType(name="note", payload=Note)',
    "failing": "Note = NoteV3\n"
    'note = JobType(name="note", payload=Note, policy=JobPolicy(on_mismatch="fail"))',
    "upgrading": """Note = NoteV3
note = JobType(name="note", payload=Note)


@note.upgrade(NoteV1)
def from_v1(older: NoteV1) -> NoteV3:
    return NoteV3(words=older.text.split())""",
}


class Deploys:
    """A database, and processes of several versions on it."""

    def __init__(self, folder: Path, url: str, queue: JobQueue, monkeypatch: Any) -> None:
        self.shell = Shell(folder)
        self.url = url
        self.queue = queue
        for name, definition in DEFINITIONS.items():
            (folder / f"{name}.py").write_text(VERSION.format(definition=definition))
        monkeypatch.syspath_prepend(str(folder))

    @contextlib.contextmanager
    def worker(self, version: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
        process = self.shell.start(
            "worker",
            **{
                "JOBS_CATALOG": version,
                "JOBS_DATABASE_URL": self.url,
                "JOBS_LOG_LEVEL": "warning",
                "JOBS_LOG_FORMAT": "json",
                "JOBS_LEASE_SECONDS": "2",
                **settings,
            },
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()

    async def enqueue(self, jobs: int, payload: dict[str, Any], version: str) -> None:
        queue = JobQueue(registry_of(version), self.queue._database)
        requests = [EnqueueRequest("note", payload) for _ in range(jobs)]
        for start in range(0, jobs, 500):
            await queue.enqueue_many(requests[start : start + 500])

    async def until(self, seconds: float = 60, **counts: int) -> JobCounts:
        """Wait until the type has these numbers of jobs."""
        give_up = time.monotonic() + seconds
        while True:
            now = (await self.queue.counts()).get("note", JobCounts())
            if all(getattr(now, name) == jobs for name, jobs in counts.items()):
                return now
            assert time.monotonic() < give_up, f"expected {counts}; got {now}"
            await asyncio.sleep(0.05)


def registry_of(version: str) -> JobRegistry:
    return load_registry([version])


@pytest.fixture
async def deploys(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Deploys]:
    database = open_database(database_url)
    folder = tmp_path / "deploys"
    folder.mkdir()
    made = Deploys(folder, database_url, JobQueue(JobRegistry([]), database), monkeypatch)
    yield made
    await database.close()


pytestmark = pytest.mark.slow


async def test_an_old_worker_that_meets_a_new_optional_field_leaves_the_job_to_the_new_one(
    deploys: Deploys,
) -> None:
    with deploys.worker("first"):
        await deploys.enqueue(3, {"text": "hello", "color": "red"}, "optional")
        await deploys.until(parked=3, failed=0)
        with deploys.worker("optional"):
            await deploys.until(succeeded=3, parked=0, seconds=20)


async def test_a_backlog_survives_a_deploy_that_cannot_read_it(deploys: Deploys) -> None:
    await deploys.enqueue(640, {"text": "hello world"}, "first")
    with deploys.worker("changed"):
        began = time.monotonic()
        await deploys.until(parked=640, queued=640, failed=0)
        assert time.monotonic() - began < 30
    with deploys.worker("upgrading"):
        await deploys.until(succeeded=640, parked=0)
    page = await deploys.queue.list(first=50)
    assert {(job.attempt, job.result) for job in page.jobs} == {(1, "NoteV3")}


async def test_old_and_new_workers_side_by_side_run_the_jobs_of_both(deploys: Deploys) -> None:
    with deploys.worker("first"), deploys.worker("changed"):
        for _ in range(5):
            await deploys.enqueue(20, {"text": "hello"}, "first")
            await deploys.enqueue(20, {"words": ["hello"]}, "changed")
        await deploys.until(succeeded=200, failed=0)
    page = await deploys.queue.list(first=200)
    assert {job.attempt for job in page.jobs} == {1}
    assert {(job.result, "text" in cast(dict[str, Any], job.payload)) for job in page.jobs} == {
        ("NoteV1", True),
        ("NoteV3", False),
    }


async def test_a_rollback_runs_the_jobs_of_the_version_before(deploys: Deploys) -> None:
    await deploys.enqueue(20, {"words": ["hello"]}, "changed")
    with deploys.worker("first"):
        await deploys.until(parked=20)
    await deploys.enqueue(20, {"text": "hello"}, "first")
    with deploys.worker("changed"):
        await deploys.until(succeeded=20, parked=20)
    with deploys.worker("first"):
        await deploys.until(succeeded=40, failed=0)


async def test_a_type_that_says_so_fails_what_it_cannot_read(deploys: Deploys) -> None:
    await deploys.enqueue(3, {"text": "hello"}, "first")
    with deploys.worker("failing"):
        await deploys.until(failed=3, parked=0)
    (job, *_) = (await deploys.queue.list(first=1)).jobs
    assert (job.attempt, job.error and job.error.code) == (0, "payload_invalid")


async def test_jobs_that_are_parked_for_too_long_fail(deploys: Deploys) -> None:
    await deploys.enqueue(3, {"text": "hello"}, "first")
    with deploys.worker("changed", JOBS_PARKED_DAYS="7"):
        await deploys.until(parked=3)
        await advance(deploys.url, 8 * 86_400)
        await deploys.until(failed=3, parked=0)


async def test_a_worker_that_dies_while_it_parks_loses_nothing(deploys: Deploys) -> None:
    await deploys.enqueue(640, {"text": "hello"}, "first")
    with deploys.worker("changed") as dying:
        while (await deploys.queue.counts())["note"].parked < 50:
            await asyncio.sleep(0.01)
        os.kill(dying.pid, signal.SIGKILL)
        dying.wait(10)
    assert 50 <= (await deploys.queue.counts())["note"].parked < 640
    with deploys.worker("changed"):
        await deploys.until(parked=640, queued=640, running=0)
    with deploys.worker("first"):
        await deploys.until(succeeded=640, failed=0)
