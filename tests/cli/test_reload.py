"""`--reload` restarts on changes, survives a syntax error and ends with Ctrl-C. Real processes."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from job_registry_api.cli.reloading import watched_folders
from tests.cli.test_cli import Shell

JOBS = """
import time
from job_registry import JobContext, JobPolicy, JobType, Payload

class Say(Payload):
    pass

say = JobType(name="say", payload=Say, policy=JobPolicy(max_attempts=1, timeout_seconds=600))

@say.handler
def run(job: JobContext, payload: Say) -> None:
    print("VERSION", flush=True)
"""


class Reloading:
    """A command with `--reload`, in a process group of its own, and what it prints."""

    def __init__(self, shell: Shell, *arguments: str, **settings: str) -> None:
        self._shell = shell
        self.settings = {"JOBS_CATALOG": "myjobs", **settings}
        self.write("version 1")
        shell.environment["PYTHONDONTWRITEBYTECODE"] = "1"
        self.process = subprocess.Popen(
            [*_COMMAND, *arguments, "--reload"],
            cwd=shell.folder,
            env={**shell.environment, **self.settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.read: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def write(self, version: str, name: str = "myjobs.py") -> None:
        path = self._shell.folder / name
        path.with_suffix(".new").write_text(JOBS.replace("VERSION", version), "utf-8")
        path.with_suffix(".new").rename(path)

    def enqueue(self) -> None:
        done = self._shell("enqueue", "say", "-", stdin="{}", **self.settings)
        assert done.returncode == 0, done.stderr

    def expect(self, words: str) -> str:
        """Return the next line that has these words."""
        give_up = time.monotonic() + 60
        while (left := give_up - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            self.read.append(line)
            if re.search(words, line):
                return line
        raise AssertionError(f"no {words!r} in:\n{''.join(self.read)}")

    def children(self) -> Any:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)


_COMMAND = [sys.executable, "-m", "job_registry_api.cli"]


Start = Callable[..., Reloading]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Reloading] = []

    def start(*arguments: str, **settings: str) -> Reloading:
        started.append(Reloading(Shell(tmp_path), *arguments, **settings))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def ends(each: Reloading) -> None:
    """Check that the command and its child end."""
    children = each.children()
    assert each.process.wait(15) == 0
    assert psutil.wait_procs(children, timeout=5)[1] == []


@pytest.mark.slow
def test_a_worker_runs_the_changed_code_and_survives_a_syntax_error(
    start: Start,
) -> None:
    worker = start("worker")
    worker.expect("Restarts when a Python file changes in ")
    worker.expect("worker.started")
    worker.enqueue()
    worker.expect("^version 1")

    worker.write("version 2")
    worker.expect("myjobs.py has changed: restarting.")
    worker.expect("worker.stopped")
    worker.expect("worker.started")
    worker.enqueue()
    worker.expect("^version 2")

    worker.write('" +')
    worker.expect("myjobs.py has changed")
    line = worker.expect("SyntaxError")
    assert line.startswith("The job types cannot be loaded: myjobs: SyntaxError: ")
    worker.expect("The process has ended. It starts again when a Python file changes.")
    assert not any("Traceback" in each for each in worker.read)
    worker.write("version 3")
    worker.expect("worker.started")
    worker.enqueue()
    worker.expect("^version 3")

    # As Ctrl-C at a terminal: the whole group gets it.
    os.killpg(worker.process.pid, signal.SIGINT)
    ends(worker)


@pytest.mark.slow
def test_running_jobs_are_released_soon_before_a_restart(
    start: Start,
) -> None:
    worker = start("worker", JOBS_SHUTDOWN_SECONDS="120")
    worker.expect("worker.started")
    worker.write('sleeps", flush=True); time.sleep(600); print("')
    worker.expect("has changed")
    worker.expect("worker.started")
    worker.enqueue()
    worker.expect("^sleeps")
    begun = time.monotonic()
    worker.write("version 2")
    # The same job, whose attempt was not spent.
    worker.expect("^version 2")
    assert time.monotonic() - begun < 30
    worker.process.send_signal(signal.SIGTERM)
    ends(worker)


@pytest.mark.slow
def test_the_server_reloads_too(start: Start) -> None:
    server = start("serve", "--port", "0")
    server.expect("Job Registry serves http://")
    server.write("version 2", "other.py")
    server.expect("other.py has changed: restarting.")
    server.expect("Job Registry serves http://")
    server.process.send_signal(signal.SIGINT)
    ends(server)


def test_the_folders_of_the_catalog_are_watched_but_no_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "inside").mkdir(parents=True)
    there.mkdir()
    for path in (here / "inside" / "__init__.py", there / "shop_jobs.py"):
        path.write_text("raise RuntimeError('it is not imported')")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(there)
    assert watched_folders(["inside.jobs", "shop_jobs", "pydantic", "not_there"]) == [here, there]
