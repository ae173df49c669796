"""What `job-registry enqueue` says of a file that it does not store whole is what is stored."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import Final

import pytest

from tests.cli.test_cli import GOOD, Shell, jobs

__all__ = ["jobs"]

LINES: Final = 40_000


@pytest.fixture
def many(jobs: Shell) -> str:
    """The name of a file of so many lines that storing them takes seconds."""
    (jobs.folder / "many.jsonl").write_text(f"{GOOD}\n" * LINES, "utf-8")
    return "many.jsonl"


def stored_in(jobs: Shell) -> int:
    with closing(sqlite3.connect(jobs.folder / "jobs.db")) as database:
        ((stored,),) = database.execute("SELECT count(*) FROM job").fetchall()
    return int(stored)


def stopped_at(stored: int) -> str:
    return f"Stopped at line {stored + 1:,}: {stored:,} stored, 0 deduplicated, 0 refused.\n"


def interrupt(process: subprocess.Popen[str]) -> None:
    """Send SIGINT once the first results are printed."""
    assert process.stdout is not None
    first = process.stdout.readline()
    assert json.loads(first)["line"] == 1
    process.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_stores_and_shows_what_is_under_way(jobs: Shell, many: str) -> None:
    process = jobs.start("enqueue", "thumbnail.create", many, "--json")
    interrupt(process)
    shown, said = process.communicate(timeout=60)
    stored = stored_in(jobs)
    assert 0 < stored < LINES
    assert process.returncode == 130
    assert said == stopped_at(stored)
    last = shown.splitlines()[-1]
    assert json.loads(last)["line"] == stored


@pytest.mark.slow
def test_a_reader_that_ends_stops_it_and_is_told_of(jobs: Shell, many: str) -> None:
    process = jobs.start("enqueue", "thumbnail.create", many, "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    stored = stored_in(jobs)
    assert 0 < stored < LINES
    assert said == stopped_at(stored) + "The output could not be written: Broken pipe.\n"


@pytest.mark.slow
def test_a_reader_that_ends_before_the_last_results_is_no_failure(jobs: Shell) -> None:
    process = jobs.start("enqueue", "thumbnail.create", "-", "--json")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, said = process.communicate(f"{GOOD}\n" * 200, timeout=60)
    assert (process.returncode, said) == (0, "")
    assert stored_in(jobs) == 200


def test_closed_standard_input_is_said(jobs: Shell) -> None:
    command = f"exec {sys.executable} -m job_registry_api.cli enqueue thumbnail.create - <&-"
    closed = subprocess.run(
        ["bash", "-c", command],
        env=jobs.environment,
        cwd=jobs.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert closed.returncode == 2
    assert closed.stderr == "Cannot read standard input: it is closed.\n"


@pytest.mark.slow
def test_lines_whose_outcome_the_database_does_not_tell_are_named(jobs: Shell, many: str) -> None:
    process = jobs.start(
        "enqueue", "thumbnail.create", many, "--json", JOBS_DATABASE_TIMEOUT_SECONDS="1"
    )
    assert process.stdout is not None
    process.stdout.readline()
    with closing(sqlite3.connect(jobs.folder / "jobs.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    stored = stored_in(jobs)
    stopped, unknown, reason = said.splitlines()
    assert stopped + "\n" == stopped_at(stored)
    last = min(stored + 2_000, LINES)
    assert unknown == (f"It is not known whether the lines {stored + 1:,} to {last:,} are stored.")
    assert reason == "The database is not available: database is locked"
