"""`job-registry` in processes forked from one that has imported it: they start in no time.

A Python that imports all of Job Registry takes a second of a core, and the tests run the command a
hundred times. As a program, this module is the process that forks.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import CODE

MAX_REQUEST_BYTES = 2**20


def run(
    arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str], stdin: str
) -> subprocess.CompletedProcess[str]:
    """Run `job-registry` with these arguments to its end, as `subprocess.run` does."""
    request = json.dumps([list(arguments), str(folder), dict(environment)]).encode()
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin.encode())
        given.seek(0)
        connection = _forking()
        socket.send_fds(connection, [request], [file.fileno() for file in (given, out, err)])
        code = int(connection.recv(16))
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(
            arguments, code, out.read().decode(), err.read().decode()
        )


@functools.cache
def _forking() -> socket.socket:
    """The connection with the process that forks, which ends with this one."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.forks", str(its.fileno())],
            env={name: v for name, v in os.environ.items() if not name.startswith("JOBS_")}
            | {"PYTHONPATH": CODE},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def end() -> None:
        ours.close()
        process.wait(10)

    atexit.register(end)
    return ours


def _fork_for_each_request(connection: socket.socket) -> list[str]:
    """Return, in a process forked for it, the arguments of a request. The caller never returns."""
    while True:
        request, files, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
        if not request:
            os._exit(0)
        pid = os.fork()
        if pid:
            for file in files:
                os.close(file)
            _, status = os.waitpid(pid, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        arguments, folder, environment = json.loads(request)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        # As `python -m` has it, with the folder first.
        sys.path[:0] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
        return list(arguments)


if __name__ == "__main__":
    import uvicorn  # noqa: F401

    import job_registry_api.app
    import job_registry_api.queue.migrations
    import job_registry_api.worker  # noqa: F401
    from job_registry_api import cli

    arguments = _fork_for_each_request(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [cli.__file__, *arguments]
    cli.main()
