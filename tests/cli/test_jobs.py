"""`job-registry list`, `show`, `cancel` and `retry`: an operator finds and changes stuck jobs."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from job_registry_api.cli.jobs import Status
from job_registry_api.queue import migrations
from job_registry_api.queue.models import JobStatus
from tests.cli.test_cli import Shell, jobs

__all__ = ["jobs"]

CATALOG = """
import asyncio
import time
from job_registry import Backoff, JobContext, JobPolicy, JobType, Payload

class Number(Payload):
    number: int

once = JobPolicy(max_attempts=1)
fails = JobType(name="demo.fails", payload=Number, policy=once)
waits = JobType(name="demo.waits", payload=Number, policy=once)
later = JobPolicy(max_attempts=2, backoff=Backoff(base_seconds=3600, cap_seconds=3600))
again = JobType(name="demo.again", payload=Number, policy=later)

one = JobPolicy(max_attempts=1, timeout_seconds=1, concurrency_limit=1)
stubborn = JobType(name="demo.stubborn", payload=Number, policy=one)

@stubborn.handler
def ignore_timeouts(job: JobContext, payload: Number) -> None:
    time.sleep(20)

@again.handler
@fails.handler
async def run(job: JobContext, payload: Number) -> None:
    job.log.warning("about to fail", number=payload.number)
    raise ValueError("[red]no\\x1b[31m luck\\n")

@waits.handler
async def run_long(job: JobContext, payload: Number) -> None:
    await asyncio.sleep(60)
"""


@pytest.fixture
def demo(jobs: Shell) -> Shell:
    (jobs.folder / "demo_jobs.py").write_text(CATALOG)
    path = os.pathsep.join([str(jobs.folder), jobs.environment["PYTHONPATH"]])
    jobs.environment |= {"JOBS_CATALOG": "demo_jobs", "PYTHONPATH": path}
    return jobs


@contextmanager
def worker(jobs: Shell) -> Iterator[None]:
    process = jobs.start("worker")
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def enqueued(jobs: Shell, job_type: str, *options: str, numbers: int = 1) -> list[str]:
    """Enqueue jobs, and return their ids, the oldest first."""
    lines = "".join(f'{{"number": {n}}}\n' for n in range(numbers))
    done = jobs("enqueue", job_type, "-", *options, "--json", stdin=lines)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["jobId"] for line in done.stdout.splitlines()]


def shown(jobs: Shell, job_id: str) -> Any:
    return json.loads(jobs("show", job_id, "--json").stdout)


def wait_for(jobs: Shell, job_id: str, status: str) -> Any:
    give_up = time.monotonic() + 30
    while (job := shown(jobs, job_id))["status"] != status:
        assert time.monotonic() < give_up, job
        time.sleep(0.05)
    return job


def test_the_statuses_are_those_of_jobs() -> None:
    assert [each.value for each in Status] == [each.value for each in JobStatus]


def test_jobs_are_listed_newest_first_with_the_reason_why_they_wait(demo: Shell) -> None:
    (now,) = enqueued(demo, "demo.waits")
    (later,) = enqueued(demo, "demo.waits", "--schedule-at", "2030-01-31T12:00:00Z")
    listed = demo("list")
    assert listed.returncode == 0
    titles, *rows = [" ".join(line.split()) for line in listed.stdout.splitlines()]
    assert titles == "id type status attempt created why"
    assert [row.split()[:4] for row in rows] == [
        [later, "demo.waits", "queued", "0/1"],
        [now, "demo.waits", "queued", "0/1"],
    ]
    assert rows[0].endswith("waits until 2030-01-31 12:00:00")
    assert rows[1].endswith("waits: no worker was ever seen for its type")
    first = json.loads(demo("list", "--json").stdout.splitlines()[0])
    assert (first["jobId"], first["payload"]) == (later, {"number": 0})
    assert first["waitingReason"] == {"kind": "ScheduledFor", "nextRunAt": "2030-01-31T12:00:00Z"}


@pytest.mark.slow
def test_the_list_is_one_line_per_job_also_on_a_narrow_terminal(demo: Shell) -> None:
    (job,) = enqueued(demo, "demo.waits")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(ours, "rb") as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "job_registry_api.cli", "list"],
            cwd=demo.folder,
            env=demo.environment | {"TERM": "xterm"},
            stdout=theirs,
        )
        assert process.wait(timeout=30) == 0
        printed = os.read(screen.fileno(), 10_000).decode()
    os.close(theirs)
    titles, row, end = printed.split("\r\n")
    assert titles.split() == ["id", "type", "status", "attempt", "created", "why"]
    assert row.startswith(f"{job}  demo.waits  queued  0/1      ")
    assert row.endswith("waits: no worker was ever seen for its type")
    assert end == ""
    # Spaces at the ends of lines would fill lines of the screen.
    assert "why " not in titles


def test_ids_are_cancelled_and_retried_through_pipes(demo: Shell) -> None:
    old, new = enqueued(demo, "demo.waits", numbers=2)
    ids = demo("list", "demo.waits", "--ids").stdout
    assert ids == f"{new}\n{old}\n"
    cancelled = demo("cancel", "-", stdin=ids)
    assert (cancelled.returncode, cancelled.stderr) == (0, "")
    assert cancelled.stdout == f"{new} cancelled\n{old} cancelled\n"
    assert demo("list", "--status", "queued", "--ids").stdout == ""
    retried = demo("retry", "-", stdin=demo("list", "--status", "cancelled", "--ids").stdout)
    assert retried.stdout == f"{new} queued\n{old} queued\n"


def test_a_refusal_does_not_keep_other_jobs_from_being_changed(demo: Shell) -> None:
    queued, cancelled = enqueued(demo, "demo.waits", numbers=2)
    assert demo("cancel", cancelled).returncode == 0
    done = demo("cancel", cancelled, "nonsense", queued)
    assert done.returncode == 1
    assert done.stdout == f"{queued} cancelled\n"
    assert done.stderr == (
        f'Job {cancelled} is cancelled and cannot be cancelled.\nThere is no job "nonsense".\n'
    )
    as_json = demo("retry", "nonsense", queued, "--json")
    assert as_json.returncode == 1
    refusal, job = map(json.loads, as_json.stdout.splitlines())
    assert (refusal["code"], refusal["jobId"]) == ("job_not_found", "nonsense")
    assert (job["jobId"], job["status"]) == (queued, "queued")


@pytest.mark.slow
def test_it_says_so_if_log_lines_are_too_large_to_show(demo: Shell) -> None:
    (failed,) = enqueued(demo, "demo.fails")
    with worker(demo):
        wait_for(demo, failed, "failed")
    long = json.dumps(["info", 0.1, "x" * 5_000_000, {}])
    with closing(sqlite3.connect(demo.folder / "jobs.db")) as database, database:
        columns = "job_id, attempt, worker_id, started_at, finished_at, outcome, logs"
        database.execute("UPDATE job_attempt SET logs = ?", (long,))
        database.execute(f"INSERT INTO job_attempt ({columns}) SELECT {columns} FROM job_attempt")
    shown = demo("show", failed)
    assert shown.stdout.count("\nlog of 1 ") == 1
    assert shown.stderr == (
        "The log lines of earlier attempts are not shown: all together are too large.\n"
    )
    as_json = json.loads(demo("show", failed, "--json").stdout)
    assert (len(as_json["attempts"]), len(as_json["lines"]), as_json["allLines"]) == (2, 1, False)


def test_a_failed_job_shows_its_attempts_its_error_and_its_log(demo: Shell) -> None:
    (failed,) = enqueued(demo, "demo.fails")
    with worker(demo):
        job = wait_for(demo, failed, "failed")
    (attempt,) = job["attempts"]
    assert (attempt["attempt"], attempt["outcome"]) == (1, "failed")
    (line,) = job["lines"]
    assert (line["level"], line["message"], line["data"]) == (
        "warning",
        "about to fail",
        {"number": 0},
    )
    code = job["error"]["code"]
    assert code == attempt["error"]["code"]
    assert demo("list", "--error-code", code, "--ids").stdout == f"{failed}\n"
    assert demo("list", "--error-code", "other", "--ids").stdout == ""
    text = demo("show", failed).stdout
    assert "why             " + code in text
    assert "attempt 1" in text
    assert 'warning: about to fail {"number":0}' in text
    assert job["allLines"] is True
    # What a handler raised can neither move the cursor nor be read as markup, here or in a list.
    row = demo("list", "demo.fails").stdout.splitlines()[1]
    for shown_text in (text, row):
        assert "[red]no" in shown_text
        assert "\x1b" not in shown_text


@pytest.mark.slow
def test_a_job_that_waits_for_its_next_attempt_does_not_run(demo: Shell) -> None:
    (again,) = enqueued(demo, "demo.again")
    with worker(demo):
        while not shown(demo, again)["attempts"]:
            time.sleep(0.05)
        job = wait_for(demo, again, "queued")
    row = demo("list").stdout.splitlines()[1]
    assert "waits until 20" in row
    assert job["error"]["code"] in row
    assert "runs in" not in row + demo("show", again).stdout


@pytest.mark.slow
@pytest.mark.slow
def test_an_attempt_that_has_timed_out_and_still_runs_is_shown_as_what_others_wait_for(
    demo: Shell,
) -> None:
    first, second = enqueued(demo, "demo.stubborn", numbers=2)
    with worker(demo):
        wait_for(demo, first, "failed")
        assert "1 of its type run, and its limit is 1" in demo("list", "demo.stubborn").stdout
        lines = demo("show", first).stdout.splitlines()
        (attempt,) = (line for line in lines if line.startswith("attempt 1"))
        assert " timed_out, and its handler still runs, in " in attempt
    assert shown(demo, second)["status"] == "queued"


@pytest.mark.slow
def test_a_parked_job_names_the_faults_of_its_payload(demo: Shell) -> None:
    (parked,) = enqueued(demo, "demo.waits")
    renamed = CATALOG.replace("number: int", "size: int").replace("payload.number", "1")
    (demo.folder / "demo_jobs.py").write_text(renamed)
    with worker(demo):
        while not shown(demo, parked)["attempts"]:
            time.sleep(0.05)
        wait_for(demo, parked, "queued")
    (why,) = [line for line in demo("show", parked).stdout.splitlines() if line.startswith("why")]
    assert "cannot read it: /number: There is no field" in why
    assert why.endswith('/size: The required field "size" is missing.')


@pytest.mark.slow
def test_a_running_job_is_stopped_by_its_worker(demo: Shell) -> None:
    (running,) = enqueued(demo, "demo.waits")
    with worker(demo):
        job = wait_for(demo, running, "running")
        assert f"runs in {job['workerId']} since" in demo("list").stdout
        done = demo("cancel", running)
        assert done.stdout == f"{running} running, its worker is requested to stop it\n"
        wait_for(demo, running, "cancelled")


@pytest.mark.slow
def test_a_job_whose_worker_has_died_is_not_said_to_run(demo: Shell) -> None:
    demo.environment["JOBS_LEASE_SECONDS"] = "1"
    (running,) = enqueued(demo, "demo.waits")
    process = demo.start("worker")
    job = wait_for(demo, running, "running")
    process.kill()
    process.communicate(timeout=30)
    time.sleep(1.5)
    assert f"the lease of {job['workerId']} expired at 20" in demo("list").stdout
    assert f"the lease of {job['workerId']} expired at 20" in demo("show", running).stdout


@pytest.mark.slow
def test_a_list_has_many_pages_and_says_what_it_leaves_out(demo: Shell) -> None:
    ids = enqueued(demo, "demo.waits", numbers=120)[::-1]
    small = {"JOBS_MAX_PAGE_SIZE": "50"}
    all_of_them = demo("list", "--ids", "--limit", "120", **small)
    assert (all_of_them.stdout.split(), all_of_them.stderr) == (ids, "")
    some = demo("list", "--ids", "--limit", "70", **small)
    assert some.stdout.split() == ids[:70]
    assert some.stderr == f"There are more jobs: --after {ids[69]} lists the next ones.\n"
    rest = demo("list", "--ids", "--after", ids[69])
    assert rest.stdout.split() == ids[70:]


def test_jobs_of_a_type_that_is_not_registered_any_more_are_listed(demo: Shell) -> None:
    (old,) = enqueued(demo, "demo.waits")
    (demo.folder / "demo_jobs.py").write_text(CATALOG.replace("demo.waits", "demo.longer"))
    assert demo("list", "demo.waits", "--ids").stdout == f"{old}\n"
    unknown = demo("list", "demo.longr")
    assert unknown.returncode == 1
    assert "demo.longer" in unknown.stderr


@pytest.mark.cases(2)
@pytest.mark.parametrize("command", ["list", "show x", "cancel x", "retry x", "versions", "unpark"])
def test_a_command_for_operators_neither_creates_nor_migrates_a_database(
    jobs: Shell, command: str
) -> None:
    file = jobs.folder / "jobs.db"
    nothing = jobs(*command.split())
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert nothing.stderr == (
        "The database has no Job Registry tables yet. Run `job-registry migrate`."
        f" Its file is {file}.\n"
    )
    assert not file.exists()
    migrations.upgrade(f"sqlite:///{file}", "0009")
    outdated = jobs(*command.split())
    assert (outdated.returncode, outdated.stdout) == (1, "")
    assert outdated.stderr.startswith("The database schema is out of date: it is at revision 0009")
    assert f"Run `job-registry migrate`. Its file is {file}." in outdated.stderr


def test_wrong_options_are_wrong_usage(demo: Shell) -> None:
    assert demo("migrate").returncode == 0
    for arguments, said in (
        (["list", "--status", "done"], "'done' is not one of 'queued'"),
        (["list", "--after", "x"], "--after: expected the id of a job; got x."),
        (["list", "--error-code", ""], "--error-code: Expected a string of 1 to 255 characters"),
        (["list", "--limit", "0"], "Invalid value for '--limit'"),
        (["cancel"], "Missing argument 'ID'"),
    ):
        done = demo(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in " ".join(done.stderr.split())


def test_a_job_that_does_not_exist_is_refused(demo: Shell) -> None:
    assert demo("migrate").returncode == 0
    done = demo("show", "nonsense", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "job_not_found"


@pytest.mark.slow
def test_a_command_that_the_database_stops_says_how_far_it_came(demo: Shell) -> None:
    ids = enqueued(demo, "demo.waits", numbers=3)
    with closing(sqlite3.connect(demo.folder / "jobs.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        done = demo("cancel", "nonsense", *ids, JOBS_DATABASE_TIMEOUT_SECONDS="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        'There is no job "nonsense".\n'
        "Stopped: 0 cancelled, 1 refused, 3 left.\n"
        "The database is not available: database is locked\n"
    )


@pytest.mark.slow
def test_a_command_that_starts_on_a_full_disk_says_so(demo: Shell) -> None:
    assert demo("migrate").returncode == 0
    # No file may grow above 8 kB, so there is no room for the index beside the database.
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 8; exec {sys.executable} -m job_registry_api.cli list"],
        cwd=demo.folder,
        env=demo.environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"The database is not available: the database's file {demo.folder}/jobs.db:"
        " database or disk is full\n"
    )


@pytest.mark.slow
def test_an_output_that_nobody_reads_does_not_hide_what_was_left_alone(demo: Shell) -> None:
    ids = enqueued(demo, "demo.waits", numbers=3)
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "job_registry_api.cli", "cancel", *ids],
        cwd=demo.folder,
        env=demo.environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    _, said = process.communicate(timeout=30)
    left = len(demo("list", "--status", "queued", "--ids").stdout.split())
    assert process.returncode == 1
    assert f"{left} of the jobs were not cancelled." in said
