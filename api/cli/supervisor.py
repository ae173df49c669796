"""The supervisor of `serve --processes`, as the processes that it started see it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress


class Supervisor:
    """The process that started this one. When it ends, in any way, this process ends as well."""

    def __init__(self, channel: int) -> None:
        self._channel = socket.socket(fileno=channel)
        # Processes of handlers must not hold it open.
        self._channel.set_inheritable(False)
        threading.Thread(target=self._end_with_it, name="supervisor", daemon=True).start()

    def tell_started(self) -> None:
        """Tell it that this process has started."""
        with suppress(OSError):  # It has ended.
            self._channel.send(b"+")

    def _end_with_it(self) -> None:
        with suppress(OSError):
            self._channel.recv(1)
        os.kill(os.getpid(), signal.SIGTERM)


def supervisor_on(channel: int | None) -> Supervisor | None:
    """Return the supervisor at the other end of this descriptor. None: this process has none."""
    return None if channel is None else Supervisor(channel)
