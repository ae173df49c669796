"""Job types whose handlers run in processes of their own: a catalog for the tests to name."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from job_registry import (
    Backoff,
    CallNext,
    Fail,
    JobContext,
    JobPolicy,
    JobType,
    Payload,
    Snooze,
    WorkerExtension,
)

POLICY = JobPolicy(max_attempts=3, timeout_seconds=30, backoff=Backoff(0.05, 0.1))


class Act(Payload):
    """What the handler does, and with what."""

    act: str = "return"
    argument: str = ""


seen: ContextVar[str] = ContextVar("seen", default="")


async def announce(job: JobContext, call_next: CallNext) -> Any:
    """A middleware that sets a context variable, and adds what it saw to a result."""
    seen.set(f"{job.type} {job.attempt}")
    result = await call_next()
    return {**result, "middleware": True} if isinstance(result, dict) else result


@asynccontextmanager
async def resources() -> AsyncIterator[dict[str, Any]]:
    yield {"opened_in": os.getpid()}


extension = WorkerExtension(middleware=[announce], lifespan=resources)

crowd = JobType(name="crowd", payload=Act, policy=POLICY, run_in="process")
deaf = JobType(
    name="deaf", payload=Act, policy=JobPolicy(1, 1, backoff=Backoff(0.05, 0.1)), run_in="process"
)
gentle = JobType(name="gentle", payload=Act, policy=POLICY, run_in="process")
poison = JobType(name="poison", payload=Act, policy=POLICY)
hasty = JobType(name="hasty", payload=Act, policy=JobPolicy(3, 4, backoff=Backoff(0.05, 0.1)))
neighbour = JobType(name="neighbour", payload=Act, policy=POLICY)


@crowd.handler
@deaf.handler
def act(job: JobContext, payload: Act) -> Any:
    """Do what the payload says, in whatever process this is."""
    match payload.act:
        case "describe":
            logging.getLogger("mine").info("from the handler")
            return {
                "pid": os.getpid(),
                "leader": os.getsid(0) == os.getpid(),
                "seen": seen.get(),
                "opened_in": job.state.opened_in,
                "attempt": job.attempt,
            }
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit(1)
        case "fork and exit":
            forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            forked.start()
            Path(payload.argument).write_text(str(forked.pid))
            os._exit(3)
        case "fork and return twice":
            child_pid = os.fork()
            Path(payload.argument).write_text(str(child_pid or os.getpid()))
            if child_pid == 0:
                return "the forked child's"
            time.sleep(0.5)
        case "terminate":
            # As systemd sends them to all processes of a service.
            for each in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), each)
            time.sleep(0.1)
            program = subprocess.Popen(["sleep", "60"])
            program.terminate()
            forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            forked.start()
            forked.terminate()
            forked.join(5)
            return [program.wait(5), forked.exitcode]
        case "hold the interpreter's lock":
            Path(payload.argument).write_text(str(os.getpid()))
            re.match("(a+)+$", "a" * 60 + "b")
        case "run a coroutine":
            return asyncio.run(asyncio.sleep(0, "done"))
        case "print":
            sys.stdout.write(f"{payload.argument}\n")
        case "raise":
            raise ValueError("from a process")
        case "fail":
            raise Fail("for good")
        case "snooze":
            if not Path(payload.argument).exists():
                Path(payload.argument).touch()
                raise Snooze(0.01)
        case "wait":
            # With a child, which a kill has to take along.
            child = subprocess.Popen(["sleep", "300"])
            Path(payload.argument).write_text(f"{os.getpid()} {child.pid}")
            while True:
                time.sleep(0.05)
        case "until cancelled":
            Path(payload.argument).write_text(str(os.getpid()))
            while not job.cancel_requested:
                time.sleep(0.01)
            raise Fail("cancelled by itself")
        case "log":
            job.log.info("from a process", argument=payload.argument)
        case "flood":
            lines = int(payload.argument)
            for number in range(lines):
                job.log.info("flood", number=number)
            job.log.info("after", number=lines)
        case "log and crash":
            job.log.info("about to crash")
            os.kill(os.getpid(), signal.SIGSEGV)
        case "progress":
            job.progress({"step": 1})
            job.progress(float("nan"))
            job.progress({"step": 2})
        case "close":
            first, last = map(int, payload.argument.split())
            os.closerange(first, last)
        case "close and open":
            os.closerange(3, 256)
            with Path(payload.argument).open("w") as file:
                for descriptor in range(3, 64):
                    os.dup2(file.fileno(), descriptor)
        case "compute":
            finish = time.process_time() + 0.7
            while time.process_time() < finish:
                sum(range(1_000))
            return {"pid": os.getpid()}
        case "large":
            return "x" * 10**6
        case "generator":
            return (n for n in range(3))
    return payload.argument


@gentle.handler
async def act_gently(job: JobContext, payload: Act) -> Any:
    """An async handler, which is cancelled."""
    if payload.act == "wait":
        Path(payload.argument).write_text(str(os.getpid()))
        try:
            await asyncio.sleep(300)
        finally:
            Path(payload.argument).write_text("cancelled")
    if payload.act == "close":
        os.closerange(3, 256)
    return {"pid": os.getpid(), "seen": seen.get()}


@poison.handler
@hasty.handler
async def end_the_process(job: JobContext, payload: Act) -> Any:
    """End the worker, as a crash in a library would."""
    if payload.act == "once" and job.attempt > 1:
        return {"pid": os.getpid(), "seen": seen.get()}
    await asyncio.sleep(0.3)
    os.kill(os.getpid(), signal.SIGSEGV if payload.act == "segfault" else signal.SIGKILL)


@neighbour.handler
async def live_on(job: JobContext, payload: Act) -> Any:
    """Run beside the poison, and take a while."""
    await asyncio.sleep(1.0)
    return {"pid": os.getpid()}
