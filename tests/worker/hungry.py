"""Job types with a memory limit, whose handlers use memory in various ways: a catalog for tests."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, computed_field

from job_registry import Backoff, Fail, JobContext, JobPolicy, JobType, Payload
from job_registry_api.worker.memory_limit import MEGABYTE

POLICY = JobPolicy(max_attempts=2, timeout_seconds=30, backoff=Backoff(0.05, 0.1))


class Eat(Payload):
    """How the handler uses memory, and how much."""

    how: str = "bytes"
    megabytes: int = 0


hungry = JobType(name="hungry", payload=Eat, policy=POLICY, run_in="process", memory_limit_mb=64)
hungry_async = JobType(
    name="hungry_async", payload=Eat, policy=POLICY, run_in="process", memory_limit_mb=64
)
unlimited = JobType(name="unlimited", payload=Eat, policy=POLICY, run_in="process")

kept: list[bytearray] = []


@hungry.handler
@unlimited.handler
def eat(job: JobContext, payload: Eat) -> Any:
    """Use memory in the process of the job, and return its id."""
    size = payload.megabytes * MEGABYTE
    match payload.how:
        case "bytes":
            held = bytearray(size)
            held[::4096] = b"1" * len(held[::4096])
        case "keep":
            kept.append(bytearray(size))
        case "small objects":
            objects: list[bytes] = []
            while True:
                objects.append(bytes(200))
        case "result":
            return Large(megabytes=payload.megabytes)
        case "fails itself":
            try:
                bytearray(size)
            except MemoryError:
                raise Fail("This file needs too much memory.") from None
        case "says otherwise":
            try:
                bytearray(size)
            except MemoryError as error:
                raise ValueError("The file cannot be read.") from error
        case "map":
            import mmap

            mmap.mmap(-1, size)
        case "library crashes":
            fill_and_abort(size)
        case "crashes early":
            os.abort()
        case "child":
            code = "import sys; bytearray(int(sys.argv[1]))"
            command = [sys.executable, "-c", code, str(size)]
            return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode
        case "limit":
            return resource.getrlimit(resource.RLIMIT_AS)[0]
        case "peak":
            text = Path("/proc/self/status").read_text("utf-8")
            return int(text.partition("VmHWM:")[2].split()[0]) // 1024
    return os.getpid()


@hungry_async.handler
async def eat_async(job: JobContext, payload: Eat) -> Any:
    """Do the same on the event loop of the process."""
    return eat(job, payload)


class Large(BaseModel):
    """A result that takes much memory to convert."""

    megabytes: int

    @computed_field
    def checksum(self) -> int:
        return len(bytearray(self.megabytes * MEGABYTE))


def fill_and_abort(size: int) -> None:
    """Use memory as a library in C does, and crash when it is refused."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    while libc.malloc(size):
        time.sleep(0.01)
    libc.abort()
