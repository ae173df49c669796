"""The `job-registry` command, one file per command; `command.py` puts them together."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command. Ctrl-C ends it without a traceback, also while it is imported."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:  # It was closed before the start, as in `2>&-`.
            _take_number(number)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    from job_registry_api.cli import command

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command.run()


def _take_number(number: int) -> None:
    """Open nothing under the number of a standard stream.

    Else a database or a connection takes it, and gets what is written there; and libuv aborts the
    process when it closes a connection with such a number.
    """
    os.dup2(os.open(os.devnull, os.O_RDWR), number)
    os.set_inheritable(number, True)
