"""Measures what many subscribers cost a server, and what its other requests notice.

    python -m benchmarks.subscribers [--subscribers 1000] [--jobs 100] [--seconds 8]
        [--transport sse|websocket] [--database sqlite|postgresql|URL] [--worker] [--old WORKTREE]

One server process on loopback, without a worker, so that each job is one event. With `--worker` it
runs the jobs too, and each is three events. A second process follows all events on one connection
per subscriber. This one enqueues at a fixed rate and reads a
page of jobs 20 times per second. With `--old`, the server of another checkout takes turns with
this one. benchmarks/README.md has the results.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from benchmarks.load import exchange, post, server
from job_registry_api.queue import migrations
from tests import CODE
from tests.postgresql_server import free_port, running_server

SUBSCRIPTION = "subscription { jobEvents { name jobId type status attempt } }"
QUERY = "{ jobs(first: 10) { nodes { id type status createdAt } } }"
JOB = {"type": "bench.nothing", "payload": {}}
CATALOG = """
from job_registry import JobContext, JobPolicy, JobType, Payload


class Nothing(Payload):
    pass


nothing = JobType(name="bench.nothing", payload=Nothing, policy=JobPolicy())


@nothing.handler
async def work(job: JobContext, payload: Nothing) -> None:
    pass
"""
MARK = b'"jobEvents":{'
DRAIN_SECONDS = 10.0
"""How long events may arrive after the last job."""


@dataclass(frozen=True)
class Found:
    """What one run measured. The CPU time of the server includes the enqueues and queries."""

    idle_ms: float
    loaded_ms: float
    cpu_seconds: float
    cpu_microseconds: float
    """Per event that was delivered."""
    expected: int
    delivered: int
    ended: int
    drained_seconds: float


# The followers


class Follower(asyncio.Protocol):
    """One connection that counts the events it gets, without parsing them."""

    counts: ClassVar = [0, 0]
    """The events of all connections, and the connections that have ended."""

    def __init__(self, transport_name: str, number: int) -> None:
        self._over_websocket = transport_name == "websocket"
        self._number = number
        self._has_subscribed = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._over_websocket:
            request = post("/graphql", {"query": SUBSCRIPTION})
            transport.write(
                request.replace(b"accept: application/json", b"accept: text/event-stream")
            )
            return
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            "GET /graphql HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: websocket\r\n"
            f"connection: upgrade\r\nsec-websocket-key: {key}\r\nsec-websocket-version: 13\r\n"
            "sec-websocket-protocol: graphql-transport-ws\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        if self._over_websocket and not self._has_subscribed and b"\r\n\r\n" in data:
            self._subscribe()
        data = self._rest + data
        self.counts[0] += data.count(MARK)
        self._rest = data[-len(MARK) + 1 :]

    def connection_lost(self, exc: Exception | None) -> None:
        self.counts[1] += 1

    def _subscribe(self) -> None:
        self._has_subscribed = True
        # Clients of graphql-ws send a random id of this length.
        operation_id = f"{self._number:08d}-0000-4000-8000-000000000000"
        subscribe = {"type": "subscribe", "id": operation_id, "payload": {"query": SUBSCRIPTION}}
        for message in ({"type": "connection_init"}, subscribe):
            self._transport.write(_masked(json.dumps(message).encode()))


def _masked(text: bytes) -> bytes:
    """Return a text frame of a client whose mask is zero."""
    length = (
        bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + struct.pack("!H", len(text))
    )
    return b"\x81" + length + bytes(4) + text


async def follow(port: int, transport_name: str, subscribers: int) -> None:
    """Follow all events until standard input ends. Answers each line with the counts."""
    loop = asyncio.get_running_loop()
    for number in range(subscribers):
        await loop.create_connection(partial(Follower, transport_name, number), "127.0.0.1", port)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("ready", flush=True)
    async with asyncio.timeout(120):
        while await lines.readline():
            print(*Follower.counts, flush=True)


@contextmanager
def followers(port: int, transport_name: str, subscribers: int) -> Iterator[subprocess.Popen[str]]:
    arguments = [str(port), transport_name, str(subscribers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.subscribers", "--follow", *arguments],
        env={**os.environ, "PYTHONPATH": CODE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def _counts(process: subprocess.Popen[str]) -> tuple[int, int]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    delivered, ended = map(int, process.stdout.readline().split())
    return delivered, ended


# The load


async def ask(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> float:
    """Send a request on a connection, and return the time until its answer in milliseconds."""
    begun = time.perf_counter()
    await exchange(*streams, request)
    return (time.perf_counter() - begun) * 1_000


async def queries(port: int, seconds: float) -> float:
    """Return the 95th percentile of the time of a query in milliseconds."""
    streams = await asyncio.open_connection("127.0.0.1", port)
    request = post("/graphql", {"query": QUERY})
    times = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        times.append(await ask(streams, request))
        await asyncio.sleep(0.05)
    streams[1].close()
    return sorted(times)[int(len(times) * 0.95)]


async def enqueue(port: int, per_second: int, seconds: float) -> int:
    """Enqueue at this rate, and return how many jobs. A server that is slower gets fewer."""
    request = post("/jobs", JOB)
    begun = time.monotonic()
    stored = 0

    async def one_after_another() -> None:
        nonlocal stored
        streams = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < begun + seconds:
            if stored < (time.monotonic() - begun) * per_second:
                stored += 1
                await ask(streams, request)
            else:
                await asyncio.sleep(0.005)
        streams[1].close()

    await asyncio.gather(*(one_after_another() for _ in range(8)))
    return stored


async def _all_follow(
    port: int, following: subprocess.Popen[str], subscribers: int, events: int
) -> int:
    """Enqueue jobs until the events of one reach every subscriber. Return the number until then."""
    before = 0
    for _ in range(60):
        await enqueue(port, 1, 0.1)
        await asyncio.sleep(1)
        delivered, _ = await asyncio.to_thread(_counts, following)
        if delivered == before + subscribers * events:
            return delivered
        before = delivered
    raise RuntimeError("the subscribers do not get all events")


async def measure(code: str, options: argparse.Namespace, folder: Path) -> Found:
    port = free_port()
    url = options.database
    if url == "sqlite":
        url = f"sqlite:///{shutil.copy(folder / 'jobs.db', tempfile.mkdtemp(dir=folder))}"
    environment = {
        "PYTHONPATH": f"{folder}{os.pathsep}{code}",
        "JOBS_CATALOG": "bench_jobs",
        "JOBS_DATABASE_URL": url,
        "JOBS_LOG_LEVEL": "error",
        "JOBS_MAX_CONNECTIONS": str(options.subscribers + 100),
    }
    command = ["-m", "job_registry_api.cli", "serve", "--port", str(port)]
    if not options.worker:
        command.append("--no-worker")
    events = 3 if options.worker else 1
    with server(command, port, environment) as process:
        await enqueue(port, 50, 0.5)
        idle = await queries(port, 2)
        with followers(port, options.transport, options.subscribers) as following:
            begun_at = await _all_follow(port, following, options.subscribers, events)
            before = sum(process.cpu_times()[:2])
            (loaded, stored) = await asyncio.gather(
                queries(port, options.seconds), enqueue(port, options.jobs, options.seconds)
            )
            expected = stored * options.subscribers * events
            stopped = time.monotonic()
            while True:
                delivered, ended = await asyncio.to_thread(_counts, following)
                delivered -= begun_at
                waited = time.monotonic() - stopped
                if delivered >= expected or waited > DRAIN_SECONDS:
                    break
                await asyncio.sleep(0.1)
            used = sum(process.cpu_times()[:2]) - before
    each = used / max(1, delivered) * 1e6
    return Found(idle, loaded, used, each, expected, delivered, ended, waited)


async def run(options: argparse.Namespace, folder: Path) -> None:
    codes = {"new": CODE}
    if options.old:
        codes = {"old": f"{options.old}/src:{options.old}", **codes}
    print(
        f"{options.subscribers} subscribers over {options.transport}, {options.jobs} jobs/s,"
        f" {options.seconds:g} s"
    )
    heads = ("", "p95 idle", "loaded", "ratio", "CPU", "of an event", "events", "missed", "ended")
    print("".join(f"{head:>12}" for head in (*heads, "after")))
    for name, code in codes.items():
        found = await measure(code, options, folder)
        cells = (
            name,
            f"{found.idle_ms:.1f} ms",
            f"{found.loaded_ms:.1f} ms",
            f"{found.loaded_ms / found.idle_ms:.1f}",
            f"{found.cpu_seconds:.1f} s",
            f"{found.cpu_microseconds:.1f} µs",
            f"{found.expected:,}",
            f"{found.expected - found.delivered:,}",
            f"{found.ended}",
            f"{found.drained_seconds:.1f} s",
        )
        print("".join(f"{cell:>12}" for cell in cells))


def main() -> None:
    if sys.argv[1:2] == ["--follow"]:
        port, transport_name, subscribers = sys.argv[2:]
        with suppress(TimeoutError, KeyboardInterrupt):
            asyncio.run(follow(int(port), transport_name, int(subscribers)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--subscribers", type=int, default=1_000)
    parser.add_argument("--jobs", type=int, default=100, help="per second")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--transport", choices=["sse", "websocket"], default="sse")
    parser.add_argument("--database", default="sqlite", help="`sqlite`, `postgresql` or a URL")
    parser.add_argument("--worker", action="store_true", help="run the jobs too")
    parser.add_argument("--old", help="the worktree of another version, which takes turns")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    try:
        (folder / "bench_jobs.py").write_text(CATALOG)
        migrations.upgrade(f"sqlite:///{folder / 'jobs.db'}")
        with ExitStack() as stack:
            if options.database == "postgresql":
                options.database = stack.enter_context(running_server({})).url
                migrations.upgrade(options.database)
            asyncio.run(run(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
