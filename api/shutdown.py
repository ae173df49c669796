"""Ends a process on SIGTERM and SIGINT within its grace, whatever hangs.

The first signal lets running work end. The second ends it at once. What does not end by then is
ended from a thread that no handler, database or event loop can hold up.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Final

import structlog

FORCED: Final = 3
"""The exit code of a process that had to be ended."""

MARGIN_SECONDS: Final = 8.0
"""How long after its grace a process may take: handlers that ignore their cancellation are given
five seconds, and what they leave is reported to the database."""

AT_ONCE_SECONDS: Final = 3.0
"""How long a process may take after a second signal: long enough to hand its jobs back."""

LOG_SECONDS: Final = 1.0
"""How long the last log line may take: nobody may be reading it."""

log = structlog.get_logger("jobs.shutdown")


class Shutdown:
    """While the context is open, SIGTERM and SIGINT call `end` on the running event loop.

    `end` is called once for each of the first two signals. `grace_seconds` and a margin after the
    first, or shortly after the second, the process is ended with the exit code `FORCED`. A third
    signal does not wait. That still holds after the context: closing connections may hang too.

    Enter it in the main thread. A forked child gets the default handling of signals back: it is
    ended by a SIGTERM of its own, and its parent is not.
    """

    def __init__(self, end: Callable[[], None], *, grace_seconds: float) -> None:
        self._end = end
        self._grace_seconds = grace_seconds
        self._pid = os.getpid()
        # Its `put` is reentrant, so a signal handler may call it.
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._asked = False

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Started now: a signal handler that started it could interrupt the start of a thread.
        threading.Thread(target=self._watch, name="shutdown", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        # The handlers stay: a signal that arrives while connections close still counts.
        return

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self._asked:
            self._asked = True
            # Behind the thread's back: the kernel ends even a process whose threads cannot run,
            # because a library holds the interpreter's lock.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            seconds = self._grace_seconds + MARGIN_SECONDS + LOG_SECONDS + 2
            signal.setitimer(signal.ITIMER_REAL, seconds)
        self._signals.put(number)

    def _watch(self) -> None:
        self._signals.get()
        for seconds in (self._grace_seconds + MARGIN_SECONDS, AT_ONCE_SECONDS):
            with suppress(RuntimeError):  # The loop is closed: only the rest has to end.
                self._loop.call_soon_threadsafe(self._end)
            try:
                self._signals.get(timeout=seconds)
            except queue.Empty:
                break
        last_words = threading.Thread(target=_say_what_hangs, daemon=True)
        last_words.start()
        last_words.join(LOG_SECONDS)
        os._exit(FORCED)


def _say_what_hangs() -> None:
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    log.error(
        "shutdown.forced",
        threads=sorted(thread.name for thread in threading.enumerate()),
        main_thread="".join(traceback.format_stack(main)) if main else None,
    )
    sys.stdout.flush()
    sys.stderr.flush()
