"""`serve --processes`: several processes serve one port, and one more runs the worker.

This process serves nothing. It starts the others, restarts those that die, and ends them all. Each
of them has a channel to it, on which it says that it has started. When this process ends, however
it ends, the channels close, and the others end too.

uvicorn's own supervisor does not fit: it needs an application that another process can import,
kills a process that a handler blocks for 5 seconds, waits without a limit for the others to end,
does not pass on a second signal, and leaves them behind when it is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

import structlog

from job_registry_api.cli.listening import address_of, listen_together
from job_registry_api.cli.output import REFUSED, err, say
from job_registry_api.settings import Settings
from job_registry_api.shutdown import AT_ONCE, FORCED

SETTLED_SECONDS: Final = 30.0
"""A process that dies sooner than this after its start is restarted after a pause."""

LONGEST_PAUSE: Final = 30.0
"""The pauses begin with one second and double up to this."""

KILL_SECONDS: Final = 13.0
"""How long after `shutdown_seconds` a process is killed. It ends by itself sooner, even if
something hangs. Process managers wait for 15 seconds."""

log = structlog.get_logger("job_registry.processes")


def serve_in_processes(settings: Settings, *, worker: bool) -> NoReturn:
    """Serve from `serve_processes` processes until SIGTERM or SIGINT, then exit.

    The first one starts alone: it migrates an SQLite database, and if it cannot start it prints
    why, once. Its exit code is then that of the command. A signal before it serves ends the command
    as it ends `serve` with one process: with 130 for SIGINT, and by SIGTERM itself.
    """
    sockets = listen_together(
        settings.host, settings.port, settings.serve_processes, "--port or JOBS_PORT"
    )
    roles = [
        _Role(f"server {number}", ("serve", "--no-worker"), listening)
        for number, listening in enumerate(sockets, 1)
    ]
    if worker:
        roles.append(_Role("worker", ("worker",), None))
    code = asyncio.run(_Processes(settings, roles).run())
    if code == -signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    sys.exit(128 - code if code < 0 else code)


@dataclass(frozen=True, slots=True)
class _Role:
    """What one of the processes does."""

    name: str
    command: tuple[str, ...]
    listening: socket.socket | None


class _Child:
    def __init__(
        self, process: asyncio.subprocess.Process, channel: socket.socket, role: _Role
    ) -> None:
        self.role = role
        self.process = process
        self._channel = channel
        self._began = time.monotonic()

    @property
    def age(self) -> float:
        """The seconds since its start."""
        return time.monotonic() - self._began

    async def has_started(self) -> bool:
        """Wait until the process has started. Return whether it has; false if it ended before."""
        return bool(await asyncio.get_running_loop().sock_recv(self._channel, 1))

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def wait(self) -> int:
        """Wait until the process has ended, and return its exit code, negative for a signal."""
        code = await self.process.wait()
        self._channel.close()
        return code


class _Processes:
    def __init__(self, settings: Settings, roles: Sequence[_Role]) -> None:
        self._roles = roles
        self._end_seconds = settings.shutdown_seconds + KILL_SECONDS
        self._environment = {
            **os.environ,
            "JOBS_HOST": settings.host,
            "JOBS_PORT": str(settings.port),
            "JOBS_WORKER_CONCURRENCY": str(settings.worker_concurrency),
        }
        self._running: dict[str, _Child] = {}
        self._signals = 0
        self._interrupted_by: int | None = None
        """The signal that came before anything was served."""
        self._serves = False
        self._ending = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """Run all processes until a signal. Return the exit code of the command.

        It is negative for a signal that came before anything was served.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end_by, number)
        first, *others = self._roles
        if await self._start_all([first]):
            self._serves = True
            self._say_where()
            if await self._start_all(others):
                log.info("processes.started", processes=[role.name for role in self._roles])
        keeping = [asyncio.create_task(self._keep(child)) for child in self._running.values()]
        await self._ending.wait()
        if keeping:
            await asyncio.wait(keeping, timeout=self._end_seconds)
        for child in self._running.values():
            log.error("process.killed", process=child.role.name, process_id=child.process.pid)
            child.send(signal.SIGKILL)
        await asyncio.gather(*keeping)
        return self._code or -(self._interrupted_by or 0)

    def _say_where(self) -> None:
        sockets = [role.listening for role in self._roles if role.listening is not None]
        say(
            f"Job Registry serves http://{address_of(sockets[0])}/graphql"
            f" from {len(sockets)} processes  (Ctrl-C ends it)",
            err,
        )

    def _end_by(self, number: int) -> None:
        if not self._serves and not self._ending.is_set():
            self._interrupted_by = number
        self._end()

    def _end(self) -> None:
        """End all processes. Each further call is one more signal for them."""
        self._signals += 1
        self._ending.set()
        for child in self._running.values():
            child.send(self._signal)
        for role in self._roles:
            if role.listening is not None:
                role.listening.close()

    @property
    def _signal(self) -> int:
        return signal.SIGTERM if self._signals == 1 else AT_ONCE

    async def _start_all(self, roles: Sequence[_Role]) -> bool:
        """Start processes, and return whether they run. If one does not start, end all."""
        await asyncio.gather(*map(self._start_first_time, roles))
        return not self._ending.is_set()

    async def _start_first_time(self, role: _Role) -> None:
        """Start a process, and end all if it does not start, also those that still start."""
        child = await self._start(role)
        if child is None or await self._has_started(child) or self._ending.is_set():
            return
        code = await child.wait()
        if self._ending.is_set():
            return
        # It has printed why, unless it was ended by a signal.
        if code < 0:
            log.error("process.not_started", process=role.name, **_ended(code))
        self._code = code if code > 0 else REFUSED
        self._end()

    async def _has_started(self, child: _Child) -> bool:
        """Wait until a process has started or ended, or until all end: it may hang at its start."""
        started = asyncio.create_task(child.has_started())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({started, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not started.done():
            started.cancel()
            return False
        return started.result()

    async def _start(self, role: _Role) -> _Child | None:
        """Start the process of a role. None: all processes are ending."""
        while not self._ending.is_set():
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            options, descriptors = ["--channel", str(theirs.fileno())], [theirs.fileno()]
            if role.listening is not None:
                options += ["--fd", str(role.listening.fileno())]
                descriptors.append(role.listening.fileno())
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "job_registry_api.cli", *role.command, *options),
                    pass_fds=descriptors,
                    env=self._environment,
                )
            except OSError as error:
                ours.close()
                log.error("process.not_started", process=role.name, reason=error.strerror)
                await self._pause(LONGEST_PAUSE)
                continue
            finally:
                theirs.close()
            child = self._running[role.name] = _Child(process, ours, role)
            if self._ending.is_set():
                child.send(self._signal)
            return child
        return None

    async def _keep(self, child: _Child | None) -> None:
        """Restart a process when it dies, until all end."""
        deaths = 0
        while child is not None:
            code = await child.wait()
            del self._running[child.role.name]
            if self._ending.is_set():
                if code not in _ENDED_BY_SIGNAL:
                    self._code = self._code or FORCED
                return
            deaths = deaths + 1 if child.age < SETTLED_SECONDS else 0
            pause = min(LONGEST_PAUSE, 2.0 ** (deaths - 1)) if deaths else 0.0
            log.error(
                "process.ended",
                process=child.role.name,
                process_id=child.process.pid,
                **_ended(code),
                restart_in_seconds=pause,
            )
            self._leave_to_others(child.role.listening)
            await self._pause(pause)
            child = await self._start(child.role)

    def _leave_to_others(self, listening: socket.socket | None) -> None:
        """Let the other processes get the connections of one that has died, until its successor
        listens. Each connection to its own socket would wait for that."""
        if listening is None or not _listens(listening):
            return  # It died before it listened.
        others = (role.listening for role in self._roles if role.listening is not listening)
        if any(each is not None and _listens(each) for each in others):
            listening.shutdown(socket.SHUT_RDWR)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()


_ENDED_BY_SIGNAL: Final = (0, REFUSED, 130, -signal.SIGTERM, -AT_ONCE)
"""Exit codes of a process that ended in time. Those but 0 are of one that had not started yet."""


def _listens(bound: socket.socket) -> bool:
    return bool(bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _ended(code: int) -> dict[str, object]:
    return {"exit_code": code} if code >= 0 else {"signal": signal.Signals(-code).name}
