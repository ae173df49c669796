"""`--reload`: runs the command in a child process, and restarts it when a Python file changes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import watchfiles

from job_registry_api.cli.output import err, say
from job_registry_api.settings import Settings

SHUTDOWN_SECONDS: Final = 2.0
"""How long running jobs have to end before a restart, if JOBS_SHUTDOWN_SECONDS is not shorter."""

KILL_SECONDS: Final = 12.0
"""How long the whole process may take to end before it is killed."""

NOTICE_SECONDS: Final = 0.3
"""How soon the end of the process is noticed."""


def run_with_reload(settings: Settings) -> None:
    """Run this command without `--reload` in a child process until SIGINT or SIGTERM.

    It is restarted when a Python file in the current folder, or beside the modules of JOBS_CATALOG,
    changes. Installed packages are not watched. If the process ends by itself, because a file has a
    syntax error for example, the next change starts it again.
    """
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    folders = watched_folders(settings.catalog)
    say(f"Restarts when a Python file changes in {', '.join(map(str, folders))}", err)
    child: subprocess.Popen[bytes] | None = _start(settings)
    try:
        for changes in watchfiles.watch(
            *folders,
            watch_filter=watchfiles.PythonFilter(),
            debounce=400,
            rust_timeout=int(1_000 * NOTICE_SECONDS),
            yield_on_timeout=True,
            stop_event=ended,
        ):
            if changes:
                name = min(os.path.relpath(path) for _, path in changes)
                say(f"{name} has changed: restarting.", err)
                _stop(child)
                child = _start(settings)
            elif child is not None and child.poll() is not None and not ended.is_set():
                say("The process has ended. It starts again when a Python file changes.", err)
                child = None
    finally:
        _stop(child)


def watched_folders(catalog: Sequence[str]) -> list[Path]:
    """Return the current folder and those of the catalog's modules, except installed packages."""
    folders = [Path.cwd()]
    if "" not in sys.path:
        sys.path.insert(0, "")
    for name in catalog:
        try:
            # A parent is imported to find a module in it. The module may be what has the error.
            spec = importlib.util.find_spec(name.partition(".")[0])
        except (ImportError, ValueError):
            continue
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).resolve().parent
        is_installed = {"site-packages", "dist-packages"} & set(folder.parts)
        if not is_installed and not any(folder.is_relative_to(known) for known in folders):
            folders.append(folder)
    return folders


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    arguments = [argument for argument in sys.argv[1:] if argument != "--reload"]
    seconds = min(SHUTDOWN_SECONDS, settings.shutdown_seconds)
    return subprocess.Popen(
        [sys.executable, "-m", "job_registry_api.cli", *arguments],
        env={**os.environ, "JOBS_SHUTDOWN_SECONDS": f"{seconds:g}"},
    )


def _stop(child: subprocess.Popen[bytes] | None) -> None:
    if child is None or child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
