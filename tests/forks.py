"""`job-registry` in processes forked from one that has imported it: they start in no time.

A Python that imports all of Job Registry takes a second of a core and more, and the tests start the
command two hundred times. As a program, this module is the process that forks. What is about the
start itself starts the command as its users do. Other modules of the tests can run so too.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from tests import CODE

MAX_REQUEST_BYTES: Final = 2**17
CLI: Final = "job_registry_api.cli"
PIPE_BYTES: Final = 2**20
"""So much may a process write before somebody reads it."""


class Command:
    """A `job-registry`, or another module, that runs: what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        module: str = CLI,
        folder: Path | None = None,
        streams: Sequence[IO[bytes]] = (),
    ) -> None:
        """Start it, with these as its three streams, or with a pipe as its standard error."""
        self.returncode: int | None = None
        self.stderr: IO[str] | None = None
        self._news, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Whoever ends it does not always wait for it.
        weakref.finalize(self, self._news.close)
        with contextlib.ExitStack() as stack:
            stack.enter_context(its)
            if streams:
                files = [stream.fileno() for stream in streams]
            else:
                null = stack.enter_context(Path(os.devnull).open("r+b"))
                reading, writing = os.pipe()
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                self.stderr = os.fdopen(reading, encoding="utf-8")
                stack.callback(os.close, writing)
                files = [null.fileno(), null.fileno(), writing]
            request = [module, list(arguments), str(folder or Path.cwd()), dict(environment)]
            message = json.dumps(request).encode()
            socket.send_fds(_forking(), [message], [its.fileno(), *files])
        self._news.settimeout(60)
        self.pid = int(self._news.recv(16))

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: the process runs on.
        """
        if self.returncode is None:
            self._news.settimeout(timeout)
            try:
                self.returncode = int(self._news.recv(16))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("job-registry", timeout or 0) from None
            self._news.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for the end, and return the rest of standard error."""
        self.wait(timeout)
        assert self.stderr is not None
        with self.stderr:
            return None, self.stderr.read()


def run(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    module: str = CLI,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run `job-registry`, or another module, to its end, as `subprocess.run` does."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin.encode())
        given.seek(0)
        streams = (given, out, err)
        command = Command(
            arguments, environment=environment, module=module, folder=folder, streams=streams
        )
        try:
            code = command.wait(60)
        except subprocess.TimeoutExpired:
            command.kill()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(
            arguments, code, out.read().decode(), err.read().decode()
        )


@functools.cache
def _forking() -> socket.socket:
    """The connection with the process that forks, which ends with this one."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOBS_")}
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(its.fileno())],
            env=clean | {"PYTHONPATH": CODE},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def end() -> None:
        ours.close()
        process.wait(10)

    atexit.register(end)
    return ours


def _fork_for_each_request(connection: socket.socket) -> tuple[str, list[str]]:
    """Return, in a process forked for it, the module of a request and its arguments. The caller
    never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    # A process between waits for the command, and tells how it ended.
    connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    news, *streams = files
    if pid := os.fork():
        for file in streams:
            os.close(file)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with socket.socket(fileno=news) as told:
            told.send(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(BrokenPipeError):
                told.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.close(news)
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    module, arguments, folder, environment = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Python reads this variable only when it starts.
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    # As `python -m` has it, with the folder first.
    sys.path[:0] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    return module, arguments


def _end_at_once(code: int) -> None:
    """Write what is buffered, and end the process without clearing its memory.

    To clear it, Python writes to each of its objects, and the kernel copies the pages that the
    processes share. That took seven times as long as `job-registry types`.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):
        return  # Python reports it as it does for users.
    os._exit(code)


if __name__ == "__main__":
    ending: list[int] = []
    """The exit code, once it is known."""
    # Registered before what the imports and the command register, so that it is called after these.
    atexit.register(lambda: _end_at_once(*ending) if ending else None)

    import uvicorn  # noqa: F401

    import job_registry_api.app
    import job_registry_api.cli.command
    import job_registry_api.queue.migrations
    import job_registry_api.worker  # noqa: F401
    from job_registry_api import cli

    # Otherwise the garbage collector writes to each object, in each process.
    gc.freeze()
    wanted, given = _fork_for_each_request(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [cli.__file__, *given]
    try:
        if wanted == CLI:
            cli.main()
        else:
            runpy.run_module(wanted, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, int):
            ending.append(ended.code)
        raise
    ending.append(0)
