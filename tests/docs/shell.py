"""A reader's terminals: runs console blocks in order, and compares what they print."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests import CODE, ROOT
from tests.docs.pages import Block, pattern_of
from tests.postgresql_server import free_port

PATIENCE_SECONDS: Final = 30.0

_SERVES: Final = re.compile(r"(.*\s)?(?P<what>make run|\.venv/bin/job-registry (serve|worker)\b.*)")
_ONLY_LOOKS: Final = ("ls ", "cat ")
"""Commands that a reader repeats until a job has run."""


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Each command of a block with what it prints. A command may go over several lines."""
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        lines = part.splitlines()
        count = 1
        while count < len(lines) and _goes_on("\n".join(lines[:count])):
            count += 1
        yield "\n".join(lines[:count]), "\n".join(lines[count:])


def _goes_on(command: str) -> bool:
    if command.endswith("\\"):
        return True
    checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False)
    return checked.returncode != 0


class Shell:
    """A folder with a reader's files, a shell in it, and the servers that the reader starts.

    `replace` maps what a page shows to what a test has instead, such as the URL of a database.
    """

    def __init__(self, folder: Path, replace: Mapping[str, str]) -> None:
        self._folder = folder
        ports = {"8000": free_port(), "9000": free_port()}
        self._replace = {
            **replace,
            "127.0.0.1:8000": f"127.0.0.1:{ports['8000']}",
            "127.0.0.1:9000": f"127.0.0.1:{ports['9000']}",
            "--health-port 9000": f"--health-port {ports['9000']}",
        }
        self._port = ports["8000"]
        self._health_port = ports["9000"]
        self._state = folder.parent / f"{folder.name}.environment"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("JOBS_", "PYTHON"))}
        self._environment = clean | {
            "PYTHONPATH": CODE,
            "PYTHONDONTWRITEBYTECODE": "1",
            "JOBS_PORT": str(self._port),
            "JOBS_LOG_LEVEL": "error",
            "COLUMNS": "200",
            "CURL_HOME": str(folder.parent),
        }
        # On a terminal curl shows no progress.
        (folder.parent / ".curlrc").write_text("silent\nshow-error\n")
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        programs = folder / ".venv/bin"
        programs.mkdir(parents=True)
        for name, module in (("python", ""), ("job-registry", " -m job_registry_api.cli")):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
            (programs / name).chmod(0o755)

    def run(self, block: Block) -> None:
        """Run the commands of a block. What a command prints has to be what the block shows.

        A command that serves goes on in the background until another takes its place. One that
        fails is followed by `echo $?`.
        """
        code = 0
        steps = list(commands(block))
        for number, (shown_command, shown) in enumerate(steps):
            following = steps[number + 1][0] if number + 1 < len(steps) else ""
            command = shown_command
            for text, ours in self._replace.items():
                command = command.replace(text, ours)
            if serves := _SERVES.fullmatch(command):
                self._serve(command, serves["what"])
                continue
            give_up = time.monotonic() + PATIENCE_SECONDS
            pattern = pattern_of(_normal(shown))
            while True:
                now, printed = self._command(command, code)
                if pattern.fullmatch(_normal(printed)) or not shown:
                    break
                repeats = command.startswith(_ONLY_LOOKS) and time.monotonic() < give_up
                assert repeats, f"{block}: {command}\nprints\n{printed}\nand not\n{shown}"
                time.sleep(0.1)
            code = now
            assert code == 0 or following == "echo $?", f"{block}: {command}\n{printed}"

    def _command(self, command: str, code: int) -> tuple[int, str]:
        """The exit code of a command and what it prints. Its exports hold for the next one."""
        script = f"""
set -o pipefail -a
(exit {code})
{command}
code=$?
env -0 >{self._state}
exit $code"""
        ran = subprocess.run(
            ["bash", "-c", script],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        state = self._state.read_bytes().decode()
        pairs = [pair.partition("=") for pair in state.split("\0") if pair]
        self._environment = {name: value for name, _, value in pairs if name != "code"}
        return ran.returncode, ran.stdout.decode()

    def _serve(self, command: str, what: str) -> None:
        role = "worker" if " worker" in what else "server"
        self._end(role)
        if what == "make run":
            recipe = (
                (ROOT / "Makefile").read_text().partition("\nrun: .venv/running\n\t@$(BIN)/")[2]
            )
            command = f".venv/bin/{recipe.partition(chr(10))[0]}"
        self._servers[role] = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"],
            cwd=self._folder,
            env=self._environment,
            stderr=subprocess.DEVNULL,
        )
        if role == "server":
            _wait_for(self._port)
        elif "--health-port" in what:
            _wait_for(self._health_port)

    def _end(self, role: str) -> None:
        if server := self._servers.pop(role, None):
            server.terminate()
            server.wait(60)

    def end(self) -> None:
        """End the servers."""
        for role in list(self._servers):
            self._end(role)


@contextmanager
def shell(folder: Path, **replace: str) -> Iterator[Shell]:
    """A shell in a folder, whose servers end with it."""
    folder.mkdir()
    opened = Shell(folder, replace)
    try:
        yield opened
    finally:
        opened.end()


def _normal(text: str) -> str:
    """A text in which every run of spaces and line ends is one space: terminals differ in them."""
    return " ".join(text.split())


def _wait_for(port: int) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < give_up, f"nothing listens on port {port}"
            time.sleep(0.1)
