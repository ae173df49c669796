"""Ends a process on SIGTERM and SIGINT within a bounded time, even if something hangs.

The first signal lets running work end. The second ends it at once. If the process does not end in
time, a thread that no handler, database or event loop can block ends it.
"""

from __future__ import annotations

import asyncio
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Final

import structlog

from job_registry_api.logs import stack_of

FORCED: Final = 3
"""The exit code of a process that did not end in time."""

AT_ONCE_SECONDS: Final = 3.0
"""How long a process may take after a second signal, to release its jobs."""

LEFTOVER_SECONDS: Final = 2.0
"""How long remaining tasks and threads may delay the end of a process after its work."""

LAST_SECONDS: Final = 2.0
"""How long the last log line and `abandon` may take. Both may block."""

AT_ONCE: Final = signal.SIGUSR1
"""The second signal of a process that has a supervisor."""

_HANDLED: Final = (signal.SIGTERM, signal.SIGINT, AT_ONCE)

log = structlog.get_logger("job_registry.shutdown")


class Shutdown:
    """A context in which SIGTERM and SIGINT call `end` on the running event loop.

    `end` is called once for each of the first two signals. `seconds` after the first signal, or
    shortly after the second, `abandon` is called in a thread, and the process exits with the code
    `FORCED`. A third signal ends the process at once. This still applies after the context is left,
    because closing connections may hang too.

    With `supervised`, SIGTERM and SIGINT count once, and `AT_ONCE` is the second signal and each
    further one. A terminal or a process manager may send a signal to every process, and the
    supervisor sends it as well.

    Enter it in the main thread. Forked children get the default handling of signals: a SIGTERM to a
    child ends the child and does not reach its parent.
    """

    def __init__(
        self,
        end: Callable[[], None],
        *,
        seconds: float,
        abandon: Callable[[], None] = lambda: None,
        supervised: bool = False,
    ) -> None:
        self._end = end
        self._seconds = seconds
        self._abandon = abandon
        self._supervised = supervised
        # `put` is reentrant, so a signal handler may call it. None means that the work has ended.
        self._signals: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._signalled = False
        self._leftover_seconds = LEFTOVER_SECONDS

    def __enter__(self) -> Shutdown:
        self._loop = asyncio.get_running_loop()
        # Started now: a signal handler that starts a thread may interrupt the start of another one,
        # and wait for the lock that the other one holds.
        threading.Thread(target=self._watch, name="shutdown", daemon=True).start()
        default_signals_in_forks()
        for number in (signal.SIGTERM, signal.SIGINT, *([AT_ONCE] if self._supervised else ())):
            signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        # The signal handlers stay: signals still count while connections close.
        return

    def work_has_ended(self, *, at_once: bool = False) -> None:
        """Give remaining tasks and threads a moment, then exit with 0.

        With `at_once` they get none: what they do is done by other processes already.
        """
        if at_once:
            self._leftover_seconds = 0.0
        self._signals.put(None)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._signalled and self._supervised and number != AT_ONCE:
            return
        if not self._signalled:
            self._signalled = True
            # The kernel can end the process even if no thread can run, because a library holds the
            # interpreter lock.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, self._seconds + 2 * LAST_SECONDS)
            if number == AT_ONCE:
                self._signals.put(number)  # It has overtaken the first signal.
        self._signals.put(number)

    def _watch(self) -> None:
        allowed = [self._seconds, AT_ONCE_SECONDS]
        deadline, code = math.inf, FORCED
        while (left := deadline - time.monotonic()) > 0:
            try:
                received = self._signals.get(timeout=None if left == math.inf else left)
            except queue.Empty:
                break
            if received is None:
                _kill_children()
                seconds, code = self._leftover_seconds, 0
            elif allowed:
                seconds = allowed.pop(0)
                with suppress(RuntimeError):  # The loop is closed already.
                    self._loop.call_soon_threadsafe(self._end)
            else:
                break
            deadline = min(deadline, time.monotonic() + seconds)
        if code:
            last = threading.Thread(target=self._give_up, daemon=True)
            last.start()
            last.join(LAST_SECONDS)
        _kill_children()
        os._exit(code)

    def _give_up(self) -> None:
        abandoning = threading.Thread(target=self._abandon, daemon=True)
        abandoning.start()
        with suppress(Exception):  # A handler may have closed the streams.
            log.error(
                "shutdown.forced",
                threads=sorted(thread.name for thread in threading.enumerate()),
                main_thread=stack_of(threading.main_thread()),
            )
            sys.stdout.flush()
            sys.stderr.flush()
        abandoning.join()


def default_signals_in_forks() -> None:
    """Give forked children the default handling of signals, from their first moment."""
    forking = threading.local()

    def block() -> None:
        # A child that is terminated at once, as by a `multiprocessing.Pool` whose user fails, would
        # lose the signal to the inherited handler.
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def reset() -> None:
        signal.set_wakeup_fd(-1)
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


def _kill_children() -> None:
    """Kill the `multiprocessing` children of handlers, which would live on as orphans."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        for child in multiprocessing.active_children():
            child.kill()
