"""Puts small faults into the core, one at a time, and sees whether a test notices.

    python -m tests.mutants [--sample 100] [--only api/queue] [--again]

Faults go into copies of the project, never into the project itself, and each runs the tests of its
file there, the quick ones first, until one fails. Results are kept in `.mutants/results.jsonl`, so
that a run goes on where the last one stopped, and a sample adds to those before it; a changed file
starts anew. At the end: the score, and every fault that no test noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from tests.mutants.faults import Mutant, python_mutants, sql_mutants
from tests.postgresql_server import ServerMissing, running_server

ROOT: Final = Path(__file__).resolve().parent.parent.parent
RESULTS: Final = ROOT / ".mutants" / "results.jsonl"


@dataclass(frozen=True)
class Area:
    """Files, and the tests that are to notice their faults, in stages: the quickest first."""

    name: str
    paths: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    sql: bool = False


QUEUE_STAGES: Final = (
    ("tests/queue/test_small_faults.py", "tests/queue/test_life_of_a_job.py"),
    ("tests/queue",),
)
AREAS: Final = (
    Area(
        "registry",
        ("registry/**/*.py",),
        (
            ("tests/registry",),
            (
                "tests/queue/test_enqueue.py",
                "tests/graphql/test_inputs.py",
                "tests/graphql/test_typed.py",
            ),
        ),
    ),
    Area("auth", ("api/auth.py",), (("tests/test_auth.py",), ("tests/graphql/test_guards.py",))),
    Area("worker", ("api/worker.py", "api/worker/**/*.py"), (("tests/worker",),)),
    Area("queue", ("api/queue/**/*.py",), QUEUE_STAGES),
    Area(
        "SQL of the queue",
        (
            "api/queue/**/*.sql",
            "api/queue/**/*.py",
            "alembic/versions/*.sql",
            "alembic/versions/*.py",
        ),
        QUEUE_STAGES,
        sql=True,
    ),
)
NOT_FOR_MUTANTS: Final = (
    # Slow, with servers of their own, and about costs, which no fault of these changes.
    "--ignore=tests/queue/test_plan_cost.py",
    "--ignore=tests/queue/test_postgresql_with_llvm.py",
)
STAGE_SECONDS: Final = (150, 420)
"""A fault that makes the tests hang is noticed: so long may a first, and a further stage take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, help="so many faults at most, drawn at random")
    parser.add_argument("--only", help="only faults of files whose path starts with this")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="so many copies at once")
    parser.add_argument("--again", action="store_true", help="forget the results so far")
    parser.add_argument("--list", action="store_true", help="only count the faults")
    arguments = parser.parse_args()
    if arguments.again:
        RESULTS.unlink(missing_ok=True)
    everything = [
        (area, mutant)
        for area in AREAS
        for mutant in _mutants(area)
        if str(mutant.path).startswith(arguments.only or "")
    ]
    if arguments.list:
        print(_table(everything, {}))
        return
    results = _read_results()
    todo = [pair for pair in everything if pair[1].key not in results]
    if arguments.sample is not None and arguments.sample < len(todo):
        todo = random.Random(arguments.seed).sample(todo, arguments.sample)
    print(f"{len(everything)} faults, {len(results)} known, {len(todo)} to try", flush=True)
    try:
        with running_server() as server:
            _try_all(todo, arguments.jobs, server.url)
    except ServerMissing as missing:
        sys.exit(str(missing))
    results = _read_results()
    print(_table(everything, results))
    for _, mutant in everything:
        if results.get(mutant.key) == "survived":
            print(f"survived: {mutant.path}:{mutant.line}: {mutant.fault}")


def _mutants(area: Area) -> Iterator[Mutant]:
    paths = sorted({path for pattern in area.paths for path in ROOT.glob(pattern)})
    for path in paths:
        text, relative = path.read_text("utf-8"), path.relative_to(ROOT)
        yield from sql_mutants(relative, text) if area.sql else python_mutants(relative, text)


def _try_all(todo: Sequence[tuple[Area, Mutant]], jobs: int, postgresql: str) -> None:
    copies: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="jobs-mutants-") as folder:
        for number in range(jobs):
            copies.put(_copy(Path(folder) / str(number)))
        for area in {area.name: area for area, _ in todo}.values():
            copy = copies.get()
            outcome = _test(copy, area, postgresql)
            copies.put(copy)
            if outcome != "survived":
                sys.exit(f"The tests of {area.name} fail without any fault. Mend them first.")

        def attempt(pair: tuple[Area, Mutant]) -> None:
            area, mutant = pair
            mutated = mutant.make()
            if mutated is None:
                _keep(mutant, "impossible", 0)
                return
            copy = copies.get()
            place = copy / mutant.path
            original = place.read_bytes()
            try:
                place.write_text(mutated, "utf-8")
                started = time.monotonic()
                outcome = _test(copy, area, postgresql)
                _keep(mutant, outcome, time.monotonic() - started)
            finally:
                place.write_bytes(original)
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            # Asked for, so that an exception of one is not lost.
            for done, _ in enumerate(pool.map(attempt, todo), 1):
                if done % 20 == 0:
                    print(f"{done} of {len(todo)}", flush=True)


def _copy(folder: Path) -> Path:
    """The project's files, those that are not committed yet too, beside its own environment."""
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
    return folder


def _test(copy: Path, area: Area, postgresql: str) -> str:
    """`killed` when a test fails, `timeout` when they hang, `survived` when nobody notices."""
    environment = {
        **os.environ,
        # Before the environment's own, which leads to the project and not to the copy.
        "PYTHONPATH": os.pathsep.join([str(copy / "src"), str(copy)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for stage, seconds in zip(area.stages, STAGE_SECONDS, strict=False):
        command = [
            sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:xdist",
            f"--postgresql={postgresql}", *stage, *NOT_FOR_MUTANTS,
        ]  # fmt: skip
        with subprocess.Popen(
            command,
            cwd=copy,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                # As Ctrl-C: pytest ends the servers and processes of its fixtures.
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                # What is left is of its group, which nothing else is in.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                return "timeout"
        if code != 0:
            return "killed"
    return "survived"


def _keep(mutant: Mutant, outcome: str, seconds: float) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    line = {
        "key": mutant.key, "outcome": outcome, "file": str(mutant.path), "line": mutant.line,
        "fault": mutant.fault, "seconds": round(seconds, 1),
    }  # fmt: skip
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _read_results() -> dict[str, str]:
    if not RESULTS.exists():
        return {}
    lines = map(json.loads, RESULTS.read_text("utf-8").splitlines())
    return {line["key"]: line["outcome"] for line in lines}


def _table(everything: Sequence[tuple[Area, Mutant]], results: dict[str, str]) -> str:
    rows = ["| area | faults | tried | noticed | score |", "| --- | --- | --- | --- | --- |"]
    for area in AREAS:
        keys = {mutant.key for each, mutant in everything if each is area}
        outcomes = Counter(results[key] for key in keys if key in results)
        noticed = outcomes["killed"] + outcomes["timeout"]
        tried = noticed + outcomes["survived"]
        score = f"{noticed / tried:.0%}" if tried else ""
        rows.append(f"| {area.name} | {len(keys)} | {tried} | {noticed} | {score} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
