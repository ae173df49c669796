"""Job types whose handlers do to their process what should not end or stop it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from job_registry import Backoff, CallNext, JobContext, JobPolicy, JobType, Payload, WorkerExtension

POLICY = JobPolicy(max_attempts=3, timeout_seconds=60, backoff=Backoff(0.05, 0.1))


class Act(Payload):
    """What the handler does, and the file in which it says that it is there."""

    act: str
    file: str = ""


hang = JobType(name="hang", payload=Act, policy=POLICY)
hang_in_thread = JobType(name="hang_in_thread", payload=Act, policy=POLICY)


hang_in_middleware = JobType(name="hang_in_middleware", payload=Act, policy=POLICY)


async def fork_instead(job: JobContext, call_next: CallNext) -> Any:
    """Fork instead of calling the handler of `hang_in_middleware`."""
    if job.type != "hang_in_middleware":
        return await call_next()
    pid = os.fork()
    return await asyncio.to_thread(exit_code, pid) if pid else "a fork"


extension = WorkerExtension(middleware=[fork_instead])


@hang.handler
async def do(job: JobContext, payload: Act) -> Any:
    """Do what the payload says, on the event loop."""
    match payload.act:
        case "exit in a task":
            task = asyncio.create_task(leave())
            await asyncio.wait({task})
            return repr(task.exception())
        case "swallow":
            Path(payload.file).write_text("here")
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    continue
        case "block":
            Path(payload.file).write_text("here")
            time.sleep(60)  # noqa: ASYNC251
        case "pool":
            Path(payload.file).write_text("here")
            await asyncio.to_thread(time.sleep, 60)
        case "fork":
            return fork(payload)
        case "return in a fork" | "sys.exit in a fork" | "sys.exit with a text in a fork":
            pid = fork_that_ends(payload.act)
            return await asyncio.to_thread(exit_code, pid) if pid else "a fork"
    return os.getpid()


@hang_in_middleware.handler
@hang_in_thread.handler
def do_in_thread(job: JobContext, payload: Act) -> Any:
    """Do what the payload says, in a thread."""
    match payload.act:
        case "thread":
            threading.Thread(target=time.sleep, args=(60,)).start()
        case "leave a child":
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            Path(payload.file).write_text(str(child.pid))
        case "fork":
            return fork(payload)
        case "return in a fork" | "sys.exit in a fork" | "sys.exit with a text in a fork":
            pid = fork_that_ends(payload.act)
            return exit_code(pid) if pid else "a fork"
    return os.getpid()


def fork_that_ends(how: str) -> int:
    """Return the id of a fork, and 0 in the fork, if that does not exit."""
    pid = os.fork()
    if pid == 0 and how == "sys.exit in a fork":
        sys.exit(2**40 + 7)  # For Linux it is 7.
    if pid == 0 and how == "sys.exit with a text in a fork":
        sys.exit("The reason.")
    return pid


def exit_code(pid: int) -> str:
    """Return how a fork ended."""
    _, status = os.waitpid(pid, 0)
    return f"ended with {os.waitstatus_to_exitcode(status)}"


async def leave() -> None:
    """End a task as a program ends."""
    await asyncio.sleep(0)
    sys.exit(7)


def fork(payload: Act) -> dict[str, Any]:
    """Start processes by a fork, terminate each at once or later, and say how they ended."""
    context = multiprocessing.get_context("fork")
    codes = []
    for pause in (0, 0, 0, 0, 0, 0.2):
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(pause)
        child.terminate()
        child.join(5)
        codes.append(child.exitcode)
        child.kill()
    return {"children": codes}
