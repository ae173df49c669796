"""Notices writes of other processes to a file, with inotify on Linux."""

from __future__ import annotations

import asyncio
import ctypes
import os
from contextlib import suppress
from typing import Final

IN_MODIFY: Final = 0x2
"""The event of a write. See inotify(7)."""


class FileWrites:
    """Notices writes to a file. A file that does not exist yet is watched once it exists.

    Use it on one event loop. If the system has no inotify, or its limit of watches is reached,
    no write is noticed.
    """

    def __init__(self, path: str) -> None:
        self._path = os.fsencode(path)
        self._written = asyncio.Event()
        self._is_watching = False
        self._descriptor: int | None = None
        # Python's standard library has no inotify; libc has it only on Linux.
        with suppress(AttributeError, OSError, TypeError):
            self._libc = ctypes.CDLL(None, use_errno=True)
            descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if descriptor >= 0:
                self._descriptor = descriptor
                asyncio.get_running_loop().add_reader(descriptor, self._note)

    async def next(self, seconds: float) -> bool:
        """Wait up to `seconds` for a write since the last call. Return whether there was one."""
        self._watch()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._written.wait()
        written = self._written.is_set()
        self._written.clear()
        return written

    def close(self) -> None:
        """Stop watching the file."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _watch(self) -> None:
        if self._descriptor is not None and not self._is_watching:
            watch = self._libc.inotify_add_watch(self._descriptor, self._path, IN_MODIFY)
            self._is_watching = watch >= 0

    def _note(self) -> None:
        assert self._descriptor is not None
        with suppress(BlockingIOError):
            os.read(self._descriptor, 65_536)
        self._written.set()
