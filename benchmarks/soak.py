"""Races and storms for some minutes: what the tests do briefly, longer, and all that crash.py does.

    python benchmarks/soak.py [--minutes 10]

First the tests marked `soak`: long races, an open snapshot under many jobs, statements' costs at a
million rows. They have the first half of the time; what they do not reach is left out, and said so.
Then, for what is left of the time, `crash.py`. Exits with 1 when a promise broke.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_CRASH_MINUTES = 0.5
JUDGING_MINUTES = 1.0
"""How long `crash.py` takes, beside its storm, to start, to judge and to end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    started = time.monotonic()
    # Each failure ends them at once, so an end by the clock is one without a failure.
    tests = [sys.executable, "-m", "pytest", "--soak", "-m", "soak", "-x"]
    tests += ["-n", "2", "--dist", "loadfile"]
    good = _run(tests, minutes=arguments.minutes / 2) is not False
    left = arguments.minutes - (time.monotonic() - started) / 60 - JUDGING_MINUTES
    storm = max(LEAST_CRASH_MINUTES, left)
    crash = [sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--minutes", f"{storm:.2f}"]
    good = bool(_run(crash, minutes=storm + 5)) and good
    print(f"soaked for {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    sys.exit(0 if good else 1)


def _run(command: list[str], *, minutes: float) -> bool | None:
    """Runs a program, which ends what it started: whether it ended well; None: not in time."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            return process.wait(minutes * 60) == 0
        except subprocess.TimeoutExpired:
            print(f"{' '.join(command)}: not over after {minutes:.0f} minutes", flush=True)
            # As Ctrl-C, upon which both end what they have started.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            return None


if __name__ == "__main__":
    main()
