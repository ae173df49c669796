"""A cheap load generator: raw sockets with keep-alive, in one process beside the server's.

Used by the other benchmarks. It is bounded in time and only used on loopback.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.request import urlopen

import psutil

from tests import CODE


@dataclass(frozen=True)
class Measured:
    """The result of a run."""

    requests_per_second: float
    server_ms_per_request: float


@contextmanager
def server(command: list[str], port: int, environment: dict[str, str]) -> Iterator[psutil.Process]:
    """Run a server process on loopback until the context is left."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": CODE, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1):
                    break
            except OSError:
                if time.monotonic() > until or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


async def load(
    process: psutil.Process, port: int, request: bytes, *, connections: int, seconds: float
) -> Measured:
    """Send `request` again and again on each of `connections`, for `seconds`.

    Raises:
        RuntimeError: an answer was not 200 or 201, or has GraphQL errors.
    """
    counts = [0] * connections
    await _send(port, request, counts, 0, time.monotonic() + 0.3)
    counts[:] = [0] * connections
    before = _cpu_seconds(process)
    started = time.monotonic()
    await asyncio.gather(
        *(_send(port, request, counts, n, started + seconds) for n in range(connections))
    )
    elapsed = time.monotonic() - started
    used = _cpu_seconds(process) - before
    return Measured(sum(counts) / elapsed, used / max(1, sum(counts)) * 1_000)


def _cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a server so far, in all its processes."""
    processes = [process, *process.children(recursive=True)]
    return sum(sum(each.cpu_times()[:2]) for each in processes)


async def _send(port: int, request: bytes, counts: list[int], place: int, until: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < until:
        await exchange(reader, writer, request)
        counts[place] += 1
    writer.close()


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> None:
    """Send a request on a connection, and read its answer.

    Raises:
        RuntimeError: the answer was not 200 or 201, or has GraphQL errors.
    """
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    if b" 20" not in head[:14] or b'"errors"' in body:
        raise RuntimeError((head + body).decode()[:500])


def post(path: str, content: object) -> bytes:
    """Return the bytes of an HTTP request with a JSON body."""
    body = json.dumps(content).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"accept: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
