"""When the watchdog of a worker kills a process group; `test_stopped_workers.py` has workers."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from job_registry_api.worker.watchdog import LOOK_SECONDS, Term, Watchdog

Sleeper = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog()
    watchdog.start()
    yield watchdog
    watchdog.end()


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Start processes, each in a group of its own."""
    with ExitStack() as stack:

        def start() -> subprocess.Popen[bytes]:
            process = stack.enter_context(subprocess.Popen(["sleep", "60"], start_new_session=True))
            stack.callback(process.kill)
            return process

        yield start


def seconds_until_killed(process: subprocess.Popen[bytes]) -> float:
    began = time.monotonic()
    assert process.wait(10) == -signal.SIGKILL
    return time.monotonic() - began


@pytest.mark.parametrize("seconds", [0.0, LOOK_SECONDS * 2.5])
def test_a_process_is_killed_at_the_end_of_its_term(
    watchdog: Watchdog, sleeper: Sleeper, seconds: float
) -> None:
    process = sleeper()
    watched = watchdog.watch(process.pid)
    term = Term()
    term.end_at(time.monotonic() + seconds)
    assert not watched.was_killed
    term.begin(watched)
    assert seconds - 0.1 <= seconds_until_killed(process) < seconds + 1
    assert watched.was_killed


def test_a_term_may_end_before_the_watchdog_would_look_again(
    watchdog: Watchdog, sleeper: Sleeper
) -> None:
    late = []
    for _ in range(5):
        process = sleeper()
        term = Term()
        term.end_at(time.monotonic() + LOOK_SECONDS / 5)
        term.begin(watchdog.watch(process.pid))
        late.append(seconds_until_killed(process) - LOOK_SECONDS / 5)
    assert statistics.median(late) < LOOK_SECONDS / 5


def test_a_signal_to_all_processes_of_a_service_does_not_end_it(
    watchdog: Watchdog, sleeper: Sleeper
) -> None:
    children = psutil.Process().children()
    [its_process] = [child for child in children if "watchdog.py" in " ".join(child.cmdline())]
    # Its start.
    time.sleep(0.5)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        its_process.send_signal(number)
    process = sleeper()
    term = Term()
    term.end_at(time.monotonic())
    term.begin(watchdog.watch(process.pid))
    assert seconds_until_killed(process) < 2


def test_a_term_is_extended_until_its_limit(watchdog: Watchdog, sleeper: Sleeper) -> None:
    process, now = sleeper(), time.monotonic()
    term = Term(at_most=now + 1.2)
    term.end_at(now + 0.3)
    term.begin(watchdog.watch(process.pid))
    term.end_at(now + 0.8)
    time.sleep(0.5)
    assert process.poll() is None
    term.end_at(now + 60)
    time.sleep(0.5)
    assert process.poll() is None
    assert seconds_until_killed(process) < 0.5


def test_a_process_that_waits_for_a_job_is_not_killed(watchdog: Watchdog, sleeper: Sleeper) -> None:
    process = sleeper()
    watched = watchdog.watch(process.pid)
    earlier, term = Term(), Term()
    earlier.end_at(time.monotonic() + 0.2)
    earlier.begin(watched)
    earlier.finish()
    # A renewal that was under way at the end of the job.
    earlier.end_at(time.monotonic() + 0.2)
    term.begin(watched)
    time.sleep(0.5)
    assert process.poll() is None


def test_each_process_has_its_own_time(watchdog: Watchdog, sleeper: Sleeper) -> None:
    killed, ended, spared = sleeper(), sleeper(), sleeper()
    rows = [watchdog.watch(each.pid) for each in (killed, ended, spared)]
    rows[1].forget()
    ended.kill()
    # It gets the row of the one that has ended.
    late = sleeper()
    rows[1] = watchdog.watch(late.pid)
    for row in rows[:2]:
        term = Term()
        term.end_at(time.monotonic() + 0.2)
        term.begin(row)
    assert killed.wait(10) == late.wait(10) == -signal.SIGKILL
    assert spared.poll() is None
    assert [each.was_killed for each in rows] == [True, True, False]


def test_all_processes_end_with_the_worker_even_if_it_has_forked(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, subprocess, sys, time
from job_registry_api.worker.watchdog import Watchdog

watchdog = Watchdog()
watchdog.start()
watched = subprocess.Popen(["sleep", "60"], start_new_session=True)
watchdog.watch(watched.pid)
forked = os.fork()
if forked == 0:
    time.sleep(60)
print(watched.pid, forked, flush=True)
time.sleep(60)
""",
        "utf-8",
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        watched, forked = map(int, worker.stdout.readline().split())
        # Its start.
        time.sleep(0.5)
        worker.kill()
        worker.wait()
        until = time.monotonic() + 5
        while psutil.pid_exists(watched) and time.monotonic() < until:
            if psutil.Process(watched).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.01)
        else:
            assert not psutil.pid_exists(watched)
        psutil.Process(forked).kill()
