"""A server that is measured from outside: what a request costs it in CPU, memory and silence.

Linux only, like the figures: CPU time comes from `/proc/<pid>/stat` and the peak of the resident
size from `VmHWM`, which writing to `clear_refs` starts anew (proc(5)).
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from tests.http_client import serving

ADDRESS_SPACE: Final = 2 * 2**30
"""RLIMIT_AS of the server: a request that would fill the machine fills this instead."""

CALIBRATION_SECONDS: Final = 0.014
"""What `_calibrate` takes on a machine that does nothing else."""

_TICK: Final = os.sysconf("SC_CLK_TCK")
_PROBE_SECONDS: Final = 0.05


@dataclass
class Cost:
    """What a server spent between two moments. Complete when its block has ended."""

    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    """The highest resident size, above that at the beginning."""
    longest_silence_seconds: float = 0.0
    """The longest time that `/healthz` took to answer."""
    slowness: float = 1.0
    """How much CPU time the same work takes while other programs share the machine, 1 alone."""

    def within(self, *, cpu_seconds: float, peak_bytes: int, silence_seconds: float = 1.0) -> str:
        """Return what exceeds these bounds, for the message of an assertion; "" if nothing does.

        The bound of CPU time is for a machine that does nothing else.
        """
        exceeded = []
        cpu_seconds *= self.slowness
        if self.cpu_seconds > cpu_seconds:
            exceeded.append(f"{self.cpu_seconds:.2f} s of CPU, not {cpu_seconds:.2f}")
        if self.peak_bytes > peak_bytes:
            exceeded.append(f"{self.peak_bytes / 1e6:.0f} MB, not {peak_bytes / 1e6:.0f}")
        if self.longest_silence_seconds > silence_seconds:
            exceeded.append(f"/healthz silent for {self.longest_silence_seconds:.1f} s")
        return "; ".join(exceeded)


@dataclass(frozen=True)
class MeasuredServer:
    """A `job-registry serve --no-worker` of the test's own."""

    address: str
    """Host and port."""
    pid: int

    @property
    def url(self) -> str:
        """The address as a URL."""
        return f"http://{self.address}"

    @asynccontextmanager
    async def measuring(self) -> AsyncIterator[Cost]:
        """Measure what happens in this block."""
        cost = Cost()
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            await client.get("/healthz")
            self._forget_peak()
            cost.slowness = max(1.0, _calibrate() / CALIBRATION_SECONDS)
            cpu, resident = self._cpu_seconds(), self._status("VmRSS")
            probe = asyncio.create_task(_probe(client, cost))
            try:
                yield cost
                cost.cpu_seconds = self._cpu_seconds() - cpu
                cost.peak_bytes = max(0, self._status("VmHWM") - resident)
                cost.slowness = max(cost.slowness, _calibrate() / CALIBRATION_SECONDS)
            finally:
                probe.cancel()
                with suppress(asyncio.CancelledError):
                    await probe

    def _forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _cpu_seconds(self) -> float:
        # The name of the command, in parentheses, may hold spaces.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise LookupError(name)


@asynccontextmanager
async def measured_server(
    database_url: str, *options: str, address_space: int = ADDRESS_SPACE, **settings: str
) -> AsyncIterator[MeasuredServer]:
    """Start a server under RLIMIT_AS, with these options and `JOBS_` settings, and warm it up."""
    async with serving(database_url, "--no-worker", *options, **settings) as (address, pid):
        resource.prlimit(pid, resource.RLIMIT_AS, (address_space, address_space))
        server = MeasuredServer(address, pid)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            for _ in range(3):
                await client.post("/graphql", json={"query": "{ jobTypes { name } }"})
        yield server


def _calibrate() -> float:
    """Return the CPU time that a fixed piece of work takes now, in seconds."""
    # A collection would take longer than the work, the more the tests have imported.
    gc.disable()
    try:
        started = time.thread_time()
        for _ in range(10):
            values = {str(number): [number] for number in range(5_000)}
            sum(len(name) for name in sorted(values))
        return time.thread_time() - started
    finally:
        gc.enable()


async def _probe(client: httpx.AsyncClient, cost: Cost) -> None:
    """Ask for `/healthz` again and again, and note the longest time that an answer took."""
    while True:
        started = time.monotonic()
        try:
            await client.get("/healthz")
        finally:
            silence = time.monotonic() - started
            cost.longest_silence_seconds = max(cost.longest_silence_seconds, silence)
        await asyncio.sleep(_PROBE_SECONDS)
