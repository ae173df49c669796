"""The short form of benchmarks/crash.py: processes are killed, and no promise breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_promise_breaks_when_processes_are_killed_and_postgresql_restarts() -> None:
    result = subprocess.run(
        [sys.executable, "benchmarks/crash.py", "--minutes", "0.2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every promise was kept" in result.stdout
