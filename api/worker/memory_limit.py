"""Limits the memory of a handler in a process of its own: `JobType(memory_limit_mb=...)`.

The limit is RLIMIT_AS, the address space of the process. It is set above what the process holds
while it is idle, because an idle interpreter with its libraries already has some 100 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from job_registry.job_type import is_async

MEGABYTE: Final = 1_048_576

NEAR: Final = 0.8
"""The part of its memory limit from which a crash of a handler counts as exceeding the limit."""


def address_space(pid: int | None = None) -> int | None:
    """Return the bytes of address space of a process. None on a system without /proc.

    There is no limit then. macOS, for example, accepts RLIMIT_AS and ignores it.
    """
    try:
        pages = Path(f"/proc/{pid or 'self'}/statm").read_bytes().split()[0]
    except (OSError, IndexError):
        return None
    return int(pages) * _PAGE


_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class MemoryLimit:
    """The memory limit of the handlers of this process, one handler at a time.

    `idle` is the address space of the idle process, which its handlers may use as well.
    """

    def __init__(self) -> None:
        self._usual = resource.getrlimit(resource.RLIMIT_AS)
        self.idle = _with_a_thread()
        self._allowed = 0
        self._is_set = False
        self.near = 0
        """The address space from which a crash counts as exceeding the limit."""

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Count the memory that the imports of a job type need as memory of the idle process."""
        before = address_space()
        yield
        after = address_space()
        if self.idle is not None and before is not None and after is not None:
            self.idle += max(0, after - before)

    @property
    def left_over(self) -> int:
        """The bytes that earlier jobs have left in this process."""
        now = address_space()
        return 0 if now is None or self.idle is None else max(0, now - self.idle)

    def around(self, handler: Callable[..., Any], megabytes: int) -> Callable[..., Any]:
        """Return the handler with this limit, which is in force until `lift`.

        A handler that runs out of memory lifts it at once, because a report needs memory too.
        """
        assert self.idle is not None, "this system has no RLIMIT_AS"
        # Each thread of the C library would reserve 64 MB of address space for itself.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
        self._allowed = self.idle + megabytes * MEGABYTE
        self.near = self.idle + int(NEAR * megabytes * MEGABYTE)
        if is_async(handler):

            @functools.wraps(handler)
            async def limited(*arguments: Any) -> Any:
                self._set()
                try:
                    return await handler(*arguments)
                except MemoryError:
                    self.lift()
                    raise
        else:

            @functools.wraps(handler)
            def limited(*arguments: Any) -> Any:
                self._set()
                try:
                    return handler(*arguments)
                except MemoryError:
                    self.lift()
                    raise

        return limited

    def lift(self) -> None:
        """Restore the limit that the process was started with."""
        if self._is_set:
            resource.setrlimit(resource.RLIMIT_AS, self._usual)
            self._is_set = False

    def _set(self) -> None:
        finite = [each for each in self._usual if each != resource.RLIM_INFINITY]
        # The hard limit stays: a process cannot raise it again.
        soft, hard = min([self._allowed, *finite]), self._usual[1]
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        self._is_set = True


def _with_a_thread() -> int | None:
    """Return the address space of this process with one more thread, in which a handler runs.

    The C library keeps the stack and the heap of a thread for the next one.
    """
    measured: list[int | None] = []
    thread = threading.Thread(target=lambda: measured.append(address_space()), name="measure")
    thread.start()
    thread.join()
    return measured[0]


_M_ARENA_MAX: Final = -8
