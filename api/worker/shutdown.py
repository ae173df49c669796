"""Ends a process that serves or works: on time, whatever hangs, with what it has started."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import structlog

LEFTOVER_SECONDS: Final = 2.0
"""How long tasks and threads that do not end may hold up a process whose work is done."""

AT_ONCE_SECONDS: Final = 5.0
"""How long a process may take to hand its jobs back after a second signal."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger("jobs.shutdown")


def keep_signals_from_forks() -> None:
    """Give processes that handlers fork signal handlers of their own.

    A forked process inherits Python's signal handlers, and the descriptor by which they wake the
    event loop: a SIGTERM for it would stop this process, and leave it running.
    """
    os.register_at_fork(after_in_child=_forget_signals)


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Ending:
    """Sees that the process ends after SIGTERM or SIGINT, also when its event loop hangs.

    `seconds` is what an orderly end may take. `abandon` then hands back what can be handed back;
    it runs in a thread.
    """

    def __init__(self, *, seconds: float, abandon: Callable[[], None]) -> None:
        self._seconds = seconds
        self._abandon = abandon
        self._deadline = float("inf")
        self._code = 1
        self._thread: threading.Thread | None = None

    def on_signals(self, stop: Callable[[], object]) -> None:
        """Call `stop` on each signal, between two steps of whatever the main thread does.

        It runs as a signal handler, so it must only schedule what is to be done.
        """

        def handle(_number: int, _frame: FrameType | None) -> None:
            again = self._deadline < float("inf")
            self.within(AT_ONCE_SECONDS if again else self._seconds, code=1)
            stop()

        for number in SIGNALS:
            signal.signal(number, handle)

    def work_is_done(self) -> None:
        """The work has ended in good order: what else still runs in the process may not hold it
        up for long."""
        _kill_children()
        self.within(LEFTOVER_SECONDS, code=0)

    def within(self, seconds: float, *, code: int) -> None:
        """End the process in so many seconds if it still runs then."""
        # No lock: a signal handler may interrupt this very method.
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        self._code = code
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        code = self._code
        if code:
            log.error("process.ends_by_force", waited_seconds=self._seconds)
            handing_back = threading.Thread(target=self._abandon, daemon=True)
            handing_back.start()
            handing_back.join(AT_ONCE_SECONDS)
        _kill_children()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(code)


def _kill_children() -> None:
    """Kill what handlers started with `multiprocessing`: nobody would end it later."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        for child in multiprocessing.active_children():
            child.kill()
