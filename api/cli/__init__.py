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
    if sys.stderr is None:  # It was closed before the start, as in `2>&-`.
        _discard_errors()
    from job_registry_api.cli import command

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command.run()


def _discard_errors() -> None:
    # On its own number: else a database or a connection takes that, and gets what is written there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.set_inheritable(2, True)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
