"""The short form of benchmarks/crash.py: processes are killed, and no promise breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crash import LONG_FREEZE_SECONDS, Crash, most_at_once, runs_of

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_no_promise_breaks_when_processes_and_the_network_fail_and_postgresql_restarts() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.crash", "--minutes", "0.2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every promise was kept" in result.stdout


def most(folder: Path, log: str, **done: Any) -> int:
    (folder / "handlers.log").write_text(log, "utf-8")
    crash = Crash(folder, {}, {}, **done)
    return len(most_at_once(runs_of(folder / "handlers.log", crash)))


def test_the_judge_sees_two_runs_at_once(tmp_path: Path) -> None:
    apart = "start t a 1 9 1.0\nend t a 1 9 2.0\nstart t b 2 9 2.0\nend t b 2 9 3.0\n"
    assert most(tmp_path, apart) == 1
    assert most(tmp_path, apart.replace("start t b 2 9 2.0", "start t b 2 9 1.9")) == 2
    # One that never ended goes on.
    assert most(tmp_path, "start t a 1 9 1.0\nstart t b 2 9 5.0\nend t b 2 9 6.0\n") == 2


def test_a_killed_process_runs_nothing_any_more(tmp_path: Path) -> None:
    log = "start t a 1 9 1.0\nstart t b 2 9 5.0\nend t b 2 9 6.0\n"
    assert most(tmp_path, log, killed={1: 4.0}) == 1
    assert most(tmp_path, log, killed={1: 5.5}) == 2


def test_a_process_of_a_killed_worker_ends_with_it(tmp_path: Path) -> None:
    log = "start t a 1 9 1.0\nstart t b 2 9 5.0\nend t b 2 9 6.0\n"
    assert most(tmp_path, log, killed={9: 4.0}) == 1
    assert most(tmp_path, log, killed={8: 4.0}) == 2


def test_a_frozen_process_has_lost_what_it_ran_once_its_leases_are_over(tmp_path: Path) -> None:
    log = "start t a 1 9 1.0\nstart t b 2 9 8.9\nend t b 2 9 9.5\nend t a 1 9 20.0\n"
    long, short = LONG_FREEZE_SECONDS + 1, 0.9
    assert most(tmp_path, log, frozen={1: [(1.5, 1.5 + long)]}) == 1
    # A short freeze ends no lease: such a run still counts.
    assert most(tmp_path, log, frozen={1: [(1.5, 1.5 + short)]}) == 2


def test_a_process_that_is_not_frozen_with_its_worker_still_counts(tmp_path: Path) -> None:
    long = LONG_FREEZE_SECONDS + 1
    log = "".join(
        f"{what} crash.process {job} {pid} 9 {at}\n"
        for what, job, pid, at in [
            ("start", "a", 1, 1.0),
            ("goes-on", "a", 1, 8.8),
            ("start", "b", 2, 8.9),
            ("goes-on", "a", 1, 9.1),
            ("end", "b", 2, 9.5),
        ]
    )
    assert most(tmp_path, log, frozen={9: [(1.5, 1.5 + long)]}) == 2
    assert most(tmp_path, log.replace("9.1", "8.85"), frozen={9: [(1.5, 1.5 + long)]}) == 1
