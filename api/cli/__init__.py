"""The `job-registry` command, one file per command; `command.py` puts them together."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command. Ctrl-C ends it without a traceback, also while it is imported."""
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from job_registry_api.cli import command

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command.run()
