"""Puts small faults into the core, one at a time, and sees whether a test notices.

    python -m tests.mutants [--sample-per-area 30] [--only api/queue] [--unnoticed]

Faults go into copies of the project, never into the project itself. First, all tests run without
a fault, and it is recorded which lines each of them executes. A fault then runs the tests that
execute its line, the quickest first, until one fails; a fault in a file of SQL runs those that
`stages.py` names. Results are kept in `.mutants/results.jsonl`, so that a run goes on where the
last one stopped; a changed file starts anew. At the end: the score, and every fault that no test
noticed.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from tests.mutants import lines
from tests.mutants.faults import Mutant, python_mutants, replaced, sql_mutants
from tests.mutants.lines import Lines
from tests.mutants.runner import Runner
from tests.mutants.stages import AREAS, NOT_FOR_MUTANTS, Area, Stage, stages_of_line
from tests.postgresql_server import ServerMissing, running_server

ROOT: Final = Path(__file__).resolve().parent.parent.parent
RESULTS: Final = ROOT / ".mutants" / "results.jsonl"
RECORDED: Final = ROOT / ".mutants" / "lines"

NO_TESTS: Final = 5
"""The exit code of pytest if no test was selected."""

LIMIT_FACTOR: Final = 4.0
MIN_LIMIT_SECONDS: Final = 120.0
"""Tests that take this many times as long as without a fault have noticed it: they hang."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, help="try so many faults, in proportion per area")
    parser.add_argument("--sample-per-area", type=int, help="try so many faults of each area")
    parser.add_argument("--area", action="append", help="only this area, and those given besides")
    parser.add_argument("--only", default="", help="only files whose path starts with this")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="number of copies to test at once")
    parser.add_argument(
        "--quick", action="store_true", help="leave faults that the quick tests pass undecided"
    )
    parser.add_argument("--unnoticed", action="store_true", help="try those of the sample again")
    parser.add_argument("--again", action="store_true", help="forget the results so far")
    parser.add_argument(
        "--no-baseline", action="store_true", help="take the tests of each line from the last run"
    )
    parser.add_argument("--list", action="store_true", help="only count the faults")
    arguments = parser.parse_args()
    if arguments.again:
        RESULTS.unlink(missing_ok=True)
    everything = {
        area: [each for each in _mutants(area) if str(each.path).startswith(arguments.only)]
        for area in AREAS
        if arguments.area is None or area.name in arguments.area
    }
    if arguments.list:
        print(_table(everything, {}))
        return
    chosen = {
        area: sample(mutants, size, arguments.seed)
        for area, mutants in everything.items()
        if (size := _size(mutants, everything, arguments.sample, arguments.sample_per_area))
    }
    results = _read_results()
    again: tuple[str | None, ...] = (None,) if arguments.quick else (None, "undecided")
    if arguments.unnoticed:
        again = (None, "undecided", "survived")
    todo = [
        (area, mutant)
        for area, mutants in chosen.items()
        for mutant in mutants
        if results.get(mutant.key) in again
    ]
    print(f"{sum(map(len, chosen.values()))} faults, {len(todo)} to try", flush=True)
    try:
        with running_server(in_memory=True) as server:
            _try_all(todo, arguments, server.url)
    except ServerMissing as missing:
        sys.exit(str(missing))
    results = _read_results()
    print(_table(chosen, results))
    for mutants in chosen.values():
        for mutant in mutants:
            if (outcome := results.get(mutant.key)) in ("survived", "undecided"):
                print(f"{outcome}: {mutant.path}:{mutant.line}: {mutant.fault}")


def _mutants(area: Area) -> Iterator[Mutant]:
    left_out: set[str] = set()
    # The latest migration first: it may replace functions and triggers of the others.
    for path in sorted({path for each in area.paths for path in ROOT.glob(each)}, reverse=True):
        text, relative = path.read_text("utf-8"), path.relative_to(ROOT)
        if area.sql:
            yield from sql_mutants(relative, text, left_out)
            left_out |= replaced(text)
        else:
            yield from python_mutants(relative, text)


def _size(
    mutants: Sequence[Mutant],
    everything: Mapping[Area, Sequence[Mutant]],
    sample: int | None,
    per_area: int | None,
) -> int:
    if per_area is not None:
        return per_area
    if sample is not None:
        return round(sample * len(mutants) / max(1, sum(map(len, everything.values()))))
    return len(mutants)


def sample(mutants: Sequence[Mutant], size: int, seed: int) -> list[Mutant]:
    """Draw mutants at random. A larger sample of the same seed contains the smaller one."""

    def place(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed} {mutant.key}".encode()).digest()

    return sorted(mutants, key=place)[:size]


def _limit(stage: Stage, recorded: Lines) -> float:
    """Return the seconds after which the tests of a stage hang."""
    usual = sum(each for test, each in recorded.seconds.items() if stage.has(test))
    return max(MIN_LIMIT_SECONDS, LIMIT_FACTOR * usual)


def _try_all(
    todo: Sequence[tuple[Area, Mutant]], arguments: argparse.Namespace, postgresql: str
) -> None:
    copies: SimpleQueue[Copy] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="jobs-mutants-") as folder, ExitStack() as stack:
        for number in range(arguments.jobs):
            place = _copy(Path(folder) / str(number))
            runner = Runner(place)
            stack.callback(runner.close)
            copies.put(Copy(place, runner, postgresql))
        if not arguments.no_baseline:
            copy = copies.get()
            shutil.rmtree(RECORDED, ignore_errors=True)
            stages = {
                stage: None
                for area, _ in todo
                for stage in area.all
                if not arguments.quick or "--slow" not in stage.options
            }
            for number, stage in enumerate(stages):
                _baseline(copy, stage, RECORDED / str(number))
            copies.put(copy)
        recorded = Lines.of_folders(RECORDED)

        def attempt(pair: tuple[Area, Mutant]) -> None:
            area, mutant = pair
            mutated = mutant.make()
            if mutated is None:
                _keep(area, mutant, "impossible", "", 0)
                return
            copy = copies.get()
            place = copy.folder / mutant.path
            original, times = place.read_bytes(), place.stat()
            try:
                place.write_text(mutated, "utf-8")
                started = time.monotonic()
                stages = stages_of_line(
                    area,
                    mutant.path,
                    mutant.line,
                    recorded,
                    is_decorator="Decorator" in mutant.fault,
                )
                if arguments.quick:
                    stages = [stage for stage in stages if stage.is_quick]
                outcome, by = _test(copy, stages, recorded)
                if arguments.quick and outcome == "survived":
                    outcome = "undecided"
                _keep(area, mutant, outcome, by, time.monotonic() - started)
            finally:
                place.write_bytes(original)
                os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
                copies.put(copy)

        pool = ThreadPoolExecutor(arguments.jobs)
        stack.callback(pool.shutdown, cancel_futures=True)
        # Iterated, so that an exception of one is raised here.
        for done, _ in enumerate(pool.map(attempt, todo), 1):
            if done % 10 == 0:
                print(f"{done} of {len(todo)}", flush=True)


def _copy(folder: Path) -> Path:
    """Copy the project's files, including those that are not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # The runs write no bytecode, so that none is of a fault, but read what is there.
    for package in ("api", "registry"):
        compileall.compile_dir(folder / package, quiet=2)
    return folder


def _baseline(copy: Copy, stage: Stage, folder: Path) -> None:
    """Run tests without a fault, and record in a folder which lines they execute."""
    folder.mkdir(parents=True)
    recording = {lines.FOLDER: str(folder)}
    code, failed = copy.run(["-p", lines.__name__, *stage.arguments], environment=recording)
    if failed:
        # A test that fails because the machine is busy passes by itself.
        code, failed = copy.run(stage.again(failed))
    if code not in (0, NO_TESTS):
        sys.exit(f"Tests fail without any fault. Mend them first: {', '.join(failed)}")


def _test(copy: Copy, stages: Sequence[Stage], recorded: Lines) -> tuple[str, str]:
    """Run the stages until a test fails.

    Return `killed` and the test, `timeout` and the tests that hung, or `survived`.
    """
    for stage in stages:
        limit = _limit(stage, recorded)
        passed_alone: list[str] = []
        while True:
            without = [f"--deselect={test}" for test in passed_alone]
            code, failed = copy.run(["-x", *stage.arguments, *without], limit)
            if code is None:
                return "timeout", " ".join(stage.tests[:5])
            if code in (0, NO_TESTS):
                break
            # A test may fail because the machine is busy.
            if not failed or copy.run(stage.again(failed), limit)[0] != 0:
                return "killed", " ".join(failed) or f"exit code {code}"
            passed_alone += failed
    return "survived", ""


@dataclass(frozen=True)
class Copy:
    """A copy of the project, and what runs the tests in it."""

    folder: Path
    runner: Runner
    postgresql: str

    def run(
        self,
        arguments: Sequence[str],
        limit: float | None = None,
        environment: Mapping[str, str] = {},
    ) -> tuple[int | None, list[str]]:
        """Run pytest. Return its exit code, or None if it hangs, and the tests that failed."""
        failed = self.folder / "failed.txt"
        failed.unlink(missing_ok=True)
        code = self.runner.run(
            [
                "-q", "--no-header", "--tb=no", f"--postgresql={self.postgresql}", *arguments,
                *NOT_FOR_MUTANTS,
            ],
            {"FAILED_TESTS": str(failed), **environment},
            limit,
        )  # fmt: skip
        return code, failed.read_text("utf-8").splitlines() if failed.exists() else []


def _keep(area: Area, mutant: Mutant, outcome: str, by: str, seconds: float) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    line = {
        "key": mutant.key, "area": area.name, "outcome": outcome, "file": str(mutant.path),
        "line": mutant.line, "fault": mutant.fault, "by": by, "seconds": round(seconds, 1),
    }  # fmt: skip
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _read_results() -> dict[str, str]:
    if not RESULTS.exists():
        return {}
    lines = map(json.loads, RESULTS.read_text("utf-8").splitlines())
    return {line["key"]: line["outcome"] for line in lines}


def _table(faults: Mapping[Area, Sequence[Mutant]], results: Mapping[str, str]) -> str:
    rows = ["| area | faults | tried | noticed | score |", "| --- | --- | --- | --- | --- |"]
    for area, mutants in faults.items():
        outcomes = Counter(results[each.key] for each in mutants if each.key in results)
        noticed = outcomes["killed"] + outcomes["timeout"]
        # Nobody has noticed the undecided ones yet.
        tried = noticed + outcomes["survived"] + outcomes["undecided"]
        score = f"{noticed / tried:.0%}" if tried else ""
        rows.append(f"| {area.name} | {len(mutants)} | {tried} | {noticed} | {score} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
