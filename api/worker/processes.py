"""Starts, reuses and ends the processes in which handlers with `run_in="process"` run.

Each is a fresh interpreter, not a fork, in its own session: a kill ends the processes that its
handler has started as well, and Ctrl-C at a terminal does not reach it. SIGTERM does not end it. It
runs one job at a time, and ends after a minute without one. Written on `subprocess` and a socket,
because Pebble's pool cannot pass progress and cancellations, sends SIGTERM to a single process
first, and checks timeouts every 0.1 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import structlog
from pydantic_core import from_json

from job_registry import DefinitionError, JobType, WorkerExtension
from job_registry.discovery import locate
from job_registry_api.logs import configuration
from job_registry_api.worker.child import HEADER, frame
from job_registry_api.worker.memory_limit import MEGABYTE, address_space
from job_registry_api.worker.outcomes import (
    Died,
    End,
    MemoryExceeded,
    NotStarted,
    Raised,
    end_from_json,
)
from job_registry_api.worker.watchdog import Term, Watchdog

IDLE_SECONDS: Final = 60.0
"""How long a process waits for its next job before it ends."""

LEAVE_SECONDS: Final = 1.0
"""How long a process may take to leave its lifespans before it is killed."""

WATCH_SECONDS: Final = 0.02
"""How often to look at the memory of a process with a memory limit, in a few microseconds."""

log = structlog.get_logger("job_registry.worker")


def address_of(job_type: JobType[Any]) -> str | None:
    """Return the address from which another process can import this job type; None if it cannot."""
    handler = getattr(job_type.run, "__module__", None)
    return locate(job_type, handler, job_type.payload.__module__)


class HandlerProcesses:
    """The processes of one worker.

    Raises:
        DefinitionError: another process cannot import one of `extensions`, and `needed` is true.
    """

    def __init__(
        self,
        *,
        assets: str,
        extensions: Sequence[WorkerExtension],
        max_bytes: int,
        needed: bool,
        traced: bool = False,
    ) -> None:
        addresses = [locate(each) for each in extensions]
        self.can_start = None not in addresses
        if needed and not self.can_start:
            raise DefinitionError(
                "a WorkerExtension must be at the top level of an importable module when handlers"
                " run in processes, because each process imports it from there"
            )
        self._start = {
            "assets": assets,
            "extensions": addresses,
            "max_bytes": max_bytes,
            "traced": traced,
        }
        self._folder = Path()
        with contextlib.suppress(OSError):  # It was deleted.
            # A handler may change the folder of this process later.
            self._folder = Path.cwd()
        self._watchdog = Watchdog()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._closed = False

    def take(self, limit_mb: int | None = None) -> _Process:
        """Return an idle process; start one if there is none.

        What earlier jobs have left in the process counts towards the memory limit of the next. A
        process in which that is more than half of the limit is replaced.

        Raises:
            OSError: no process can be started, or no watchdog.
        """
        self._watchdog.start()
        while self._idle:
            process = self._idle.pop()
            alive = process.stop_waiting()
            if not alive:
                self._discard(process)
            elif limit_mb is not None and process.left_over > limit_mb * MEGABYTE // 2:
                self.replace(process)
            else:
                return process
        start = {**self._start, "logs": configuration()}
        process = _Process(start, self._import_path(), self._watchdog)
        self._all.add(process)
        return process

    def _import_path(self) -> list[str]:
        """Return the entries with which a process finds modules where this one does.

        Those in the first folder of this process are absolute. Some entries are not files: that of
        an editable install has a name for its import hook.
        """
        places = [(str(each), str(self._folder / each)) for each in sys.path]
        # `Path.exists` raises an error for a folder that this process may not search.
        return [place if os.path.exists(place) else each for each, place in places]  # noqa: PTH110

    def give_back(self, process: _Process) -> None:
        """Keep a process for the next job."""
        if self._closed:
            self._discard(process)
        else:
            self._idle.append(process)
            process.wait_for_job(lambda: self._retire(process))

    async def end(self, process: _Process) -> int:
        """Kill a process and all it has started, and return the exit code."""
        self._all.discard(process)
        return await process.end()

    async def close(self) -> None:
        """End every process. Idle ones leave their lifespans first."""
        self._closed = True
        idle, self._idle = self._idle, []
        for process in idle:
            process.send({"leave": True})
        give_up = time.monotonic() + LEAVE_SECONDS
        while any(each.is_alive() for each in idle) and time.monotonic() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.gather(*(self.end(process) for process in list(self._all)))
        self._watchdog.end()

    def kill_all(self) -> None:
        """Kill every process now. Thread-safe."""
        for process in list(self._all):
            process.kill()

    def replace(self, process: _Process) -> None:
        """Let a process leave its lifespans and end: it is not to run another job."""
        process.send({"leave": True})
        process.seeing_off = asyncio.create_task(self._see_off(process))

    def _retire(self, process: _Process) -> None:
        if process in self._idle:
            self._idle.remove(process)
            self.replace(process)

    async def _see_off(self, process: _Process) -> None:
        give_up = time.monotonic() + LEAVE_SECONDS
        while process.is_alive() and time.monotonic() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await self.end(process)

    def _discard(self, process: _Process) -> None:
        process.seeing_off = asyncio.create_task(self.end(process))


class ProcessCall:
    """One call of a handler, in an idle process or in a new one, which is killed after the `term`.

    `ended` is a task whose result is the `End`. `traceparent` is the span that the handler belongs
    to, if attempts are traced. `may_start` is called once the process is ready, which can take
    seconds. If it returns False, the call ends as one whose handler was cancelled.
    """

    can_be_killed = True

    def __init__(
        self,
        processes: HandlerProcesses,
        address: str,
        job_type: JobType[Any],
        job: Mapping[str, Any],
        payload: Any,
        *,
        deadline: float,
        on_progress: Callable[[bytes], None],
        on_log_line: Callable[[bytes], None],
        on_follow_up: Callable[[Mapping[str, Any]], None],
        traceparent: str | None = None,
        may_start: Callable[[], bool] = lambda: True,
        term: Term | None = None,
    ) -> None:
        self._processes = processes
        self._run = {
            "address": address,
            "handler_module": getattr(job_type.run, "__module__", None),
            "job": dict(job),
            "payload": payload,
            "traceparent": traceparent,
        }
        self._limit_mb = job_type.memory_limit_mb
        self._near_limit = False
        self._deadline = deadline
        self._on_progress = on_progress
        self._on_log_line = on_log_line
        self._on_follow_up = on_follow_up
        self._may_start = may_start
        self._term = term or Term()
        self._stop_requested = False
        self._killed = False
        self._process: _Process | None = None
        self.ended: asyncio.Task[End] = asyncio.create_task(self._work())

    def request_stop(self) -> None:
        """Cancel an async handler; a plain one sees `job.cancel_requested`."""
        self._stop_requested = True
        if self._process is not None:
            self._process.cancel()

    def stack(self) -> list[str]:
        """Return nothing: a process that was killed runs no Python."""
        return []

    def kill(self) -> None:
        """Kill the handler and every process it has started."""
        self._killed = True
        if self._process is not None:
            self._process.kill()

    async def _work(self) -> End:
        # The system may kill an idle process just before it gets a job.
        for _ in range(3):
            try:
                process = self._process = self._processes.take(self._limit_mb)
            except OSError as error:
                reason = f"{type(error).__name__}: {error.strerror}"
                return NotStarted(f"A process for the handler cannot be started: {reason}.")
            if self._killed:
                process.kill()
            try:
                end = await self._run_in(process)
            except Exception:
                # Its handler must not run on after the attempt, which ends with this error.
                await self._processes.end(process)
                raise
            if end is None:
                exit_code = await self._processes.end(process)
                if process.is_begun or not process.was_used or self._killed:
                    too_late = process.was_too_late
                    return Died(exit_code, self._limit_mb, self._near_limit, too_late)
                continue
            if isinstance(end, NotStarted) and not process.is_ready:
                await self._processes.end(process)
            elif isinstance(end, MemoryExceeded):
                # Its heap may be in pieces, and what the handler held may still be referenced.
                self._processes.replace(process)
            else:
                self._processes.give_back(process)
            return end
        return NotStarted("The handler's process ended before it took the job, three times.")

    async def _run_in(self, process: _Process) -> End | None:
        """Run the job and return its end; None if the process died."""
        if not process.is_ready:
            message = await process.receive()
            if message is None:
                return None
            if "failed" in message:
                return NotStarted(message["failed"])
            process.is_ready = True
        watch: asyncio.Task[None] | None = None
        # Before the lease is checked: the worker may be stopped after that.
        process.begin(self._term)
        try:
            if self._stop_requested or not self._may_start():
                return Raised("stopped", "CancelledError", "")
            process.run({**self._run, "seconds_left": self._deadline - time.monotonic()})
            while (message := await process.receive()) is not None:
                if message.get("begun") == process.number:
                    process.is_begun = True
                elif message.get("progress") == process.number:
                    self._on_progress(message["text"].encode())
                elif message.get("logged") == process.number:
                    self._on_log_line(message["line"].encode())
                elif message.get("follow_up") == process.number:
                    self._on_follow_up(message["job"])
                elif message.get("limited") == process.number:
                    watch = asyncio.create_task(self._watch(process, message["near"]))
                elif message.get("ended") == process.number:
                    process.was_used = True
                    process.left_over = message["left_over"]
                    return end_from_json(message["end"])
        finally:
            self._term.finish()
            if watch is not None:
                watch.cancel()
        return None

    async def _watch(self, process: _Process, near: int) -> None:
        """Note whether the process comes close to its memory limit.

        A library that is refused memory may crash the process, and the system keeps no record of
        why: this tells such a crash from others.
        """
        while not self._near_limit:
            self._near_limit = (address_space(process.pid) or 0) >= near
            await asyncio.sleep(WATCH_SECONDS)


class _Process:
    """One process and the socket to it. It finds modules by `path`."""

    def __init__(self, start: dict[str, Any], path: Sequence[str], watchdog: Watchdog) -> None:
        self.is_ready = False
        self.is_begun = False
        self.was_used = False
        self.left_over = 0
        self.number = 0
        self.seeing_off: asyncio.Task[Any] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._ours, theirs = socket.socketpair()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._unsent = [{**start}]
        code = f"import sys; sys.path[:] = {json.dumps(path)}\n" + _MAIN.format(theirs.fileno())
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self._watched = watchdog.watch(self._popen.pid)
        except BaseException:
            self._ours.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def begin(self, term: Term) -> None:
        """Let the watchdog kill the process at the end of this term."""
        term.begin(self._watched)

    @property
    def was_too_late(self) -> bool:
        """Whether the watchdog has killed the process at the end of a term."""
        return self._watched.was_killed

    def run(self, run: dict[str, Any]) -> None:
        """Send a job."""
        self.number += 1
        self.is_begun = False
        self.send({"run": {**run, "number": self.number}})

    def cancel(self) -> None:
        """Send a cancellation of the running job."""
        if self.is_ready:
            self.send({"cancel": self.number})

    def send(self, message: dict[str, Any]) -> None:
        if self._streams is None:
            self._unsent.append(message)
        elif not self._streams[1].is_closing():  # uvloop raises if the process has ended.
            self._streams[1].write(frame(message))

    async def receive(self) -> dict[str, Any] | None:
        """Return the next message; None once the process has ended."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_unix_connection(sock=self._ours)
                for message in self._unsent:
                    self._streams[1].write(frame(message))
                self._unsent.clear()
            reader = self._streams[0]
            size = HEADER.unpack(await reader.readexactly(HEADER.size))[0]
            return cast(dict[str, Any], from_json(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError, ValueError):
            return None  # ValueError: the handler wrote to the socket.

    def wait_for_job(self, retire: Callable[[], None]) -> None:
        """Call `retire` unless a job comes within a minute."""
        self._idle_timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, retire)

    def stop_waiting(self) -> bool:
        """Stop the idle timer, and return whether the process is alive."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        return self.is_alive()

    def is_alive(self) -> bool:
        return self._popen.returncode is None and self._popen.poll() is None

    def kill(self) -> None:
        """Kill the process and all it has started."""
        # Its id is that of its group. A group may outlive its first process.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    async def end(self) -> int:
        """Kill the process and its group, and return the exit code."""
        # A process that exits closes its socket a moment before its exit code is available.
        for _ in range(10):
            if not self.is_alive():
                break
            await asyncio.sleep(0.002)
        self.kill()
        self._watched.forget()
        give_up = time.monotonic() + 5
        while self.is_alive() and time.monotonic() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        if self._streams is not None:
            self._streams[1].close()
        else:
            self._ours.close()
        code = self._popen.returncode
        return -signal.SIGKILL if code is None else code


_MAIN: Final = """\
import signal
for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, lambda *_: None)
from job_registry_api.worker.child import main
main({})"""
"""A process manager may send a signal to all processes of a service, as systemd does. The worker
lets running jobs end, and ends the processes. Not `SIG_IGN`: programs of the handler inherit it."""
