"""Runs the long tests, `deploys.py` and `crash.py` for some minutes.

    python -m benchmarks.soak [--minutes 10]

The tests marked `soak` come first: long races, an open snapshot under many jobs, the costs of
statements at a million rows. They have the first half of the time; the output names the tests that
were not reached. Then `deploys.py` rolls versions on both databases, and `crash.py` has the rest of
the time. Exits with 1 if a guarantee does not hold.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.postgresql_server import SERVERS, memory

ROOT = Path(__file__).resolve().parent.parent
LEAST_CRASH_MINUTES = 0.5
DEPLOYS_SHARE = 0.05
"""The part of the time that versions roll, on each of the two databases."""

JUDGING_MINUTES = 1.0
"""How long `crash.py` takes to start, to check and to end, beside its run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    started = time.monotonic()
    # The first failure ends the tests, so if the time runs out, none has failed.
    tests = [sys.executable, "-m", "pytest", "--soak", "-m", "soak", "-x"]
    tests += ["-n", "2", "--dist", "loadfile"]
    with _servers_end() as servers:
        good = _run(tests, minutes=arguments.minutes / 2, servers=servers) is not False
    deploys = [sys.executable, "-m", "benchmarks.deploys"]
    deploys += ["--minutes", f"{arguments.minutes * DEPLOYS_SHARE:.2f}"]
    with _servers_end() as servers:
        good = bool(_run(deploys, minutes=arguments.minutes / 2 + 5, servers=servers)) and good
    left = arguments.minutes - (time.monotonic() - started) / 60 - JUDGING_MINUTES
    storm = max(LEAST_CRASH_MINUTES, left)
    crash = [sys.executable, "-m", "benchmarks.crash", "--minutes", f"{storm:.2f}"]
    with _servers_end() as servers:
        good = bool(_run(crash, minutes=storm + 5, servers=servers)) and good
    print(f"soaked for {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    sys.exit(0 if good else 1)


@contextmanager
def _servers_end() -> Iterator[Path]:
    """Yield a folder for servers, and end the servers that a program has left behind there.

    Test processes that are interrupted do not end theirs.
    """
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=memory()))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(str(folder) in argument for argument in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str], *, minutes: float, servers: Path) -> bool | None:
    """Run a program, and return whether it succeeded; None if it did not end in time."""
    environment = {**os.environ, SERVERS: str(servers)}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            return process.wait(minutes * 60) == 0
        except subprocess.TimeoutExpired:
            print(f"{' '.join(command)}: not finished after {minutes:.0f} minutes", flush=True)
            # Like Ctrl-C, on which both programs end the processes they have started.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            return None


if __name__ == "__main__":
    main()
