"""Kills handlers in processes whose leases end while their worker cannot end them.

A worker that is stopped, as by Ctrl-Z, renews no lease and ends no handler. Nor does one in which a
handler holds the interpreter lock. The processes of its other handlers run on, and other workers
would run the same jobs beside them. So each worker with processes has one more, the watchdog. It
reads in shared memory until when each of them may run, and kills the process group of one whose
time is over. If the worker ends, it kills all of them.

As a program, this module is the watchdog. It imports little, so that it is small and starts fast.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time

LOOK_SECONDS = 0.5
"""How often the watchdog looks at the times. Its worker wakes it for times that are sooner."""

MAX_PROCESSES = 4096

# The shared memory is a table of 64-bit floats, each of which is written at once.
_GROUP, _UNTIL, _KILLED, _COLUMNS = 0, 1, 2, 3
"""Columns: a process group, until when it may run, and the group that was killed at that time."""

_UNUSED, _FREE = 0.0, -1.0
"""Instead of a process group: all further rows are unused too; this row was used."""

_FOREVER = float("inf")


class Watchdog:
    """The watchdog of one worker, and the table that it reads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: int | None = None
        self._table: memoryview[float] | None = None

    def start(self) -> None:
        """Start the process, unless it runs.

        Raises:
            OSError: it cannot be started.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._end_process()
        if self._memory is None:
            self._memory = _new_memory()
            self._table = _table_in(self._memory)
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", __file__, str(os.getpid()), str(self._memory)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[self._memory],
            # Ctrl-Z at a terminal does not reach it.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def watch(self, group: int) -> Watched:
        """Watch a process group from now on.

        Raises:
            OSError: too many are watched.
        """
        assert self._table is not None, "the watchdog is not started"
        for row in range(0, len(self._table), _COLUMNS):
            if self._table[row + _GROUP] in (_UNUSED, _FREE):
                self._table[row + _UNTIL], self._table[row + _KILLED] = _FOREVER, 0.0
                self._table[row + _GROUP] = group
                return Watched(self, self._table, row)
        raise OSError(f"a worker has at most {MAX_PROCESSES} processes")

    def wake(self) -> None:
        """Let the watchdog look at the times. Thread-safe."""
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # It has ended.
                process.stdin.write(b"\0")

    def end(self) -> None:
        """End the process. Nothing is watched any more."""
        self._end_process()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = self._table = None

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Watched:
    """A process group that is watched, until `forget`."""

    def __init__(self, watchdog: Watchdog, table: memoryview[float], row: int) -> None:
        self._watchdog = watchdog
        self._table = table
        self._row = row
        self._group = table[row + _GROUP]

    def may_run_until(self, when: float) -> None:
        """Kill the group at this time of the monotonic clock, instead of an earlier one."""
        self._table[self._row + _UNTIL] = when
        if when < time.monotonic() + LOOK_SECONDS:
            self._watchdog.wake()

    @property
    def was_killed(self) -> bool:
        """Whether the watchdog has killed the group because its time was over."""
        return self._table[self._row + _KILLED] == self._group

    def forget(self) -> None:
        """Do not watch the group any more: it has ended."""
        if self._table[self._row + _GROUP] == self._group:
            self._table[self._row + _GROUP] = _FREE


class Term:
    """Until when the process of one attempt may run: as long as its lease is sure. Thread-safe.

    It also ends at `at_most`, the timeout of the attempt.
    """

    def __init__(self, at_most: float = _FOREVER) -> None:
        self._at_most = at_most
        self._until = at_most
        self._watched: Watched | None = None
        self._lock = threading.Lock()

    def end_at(self, when: float) -> None:
        """Move its end, because the lease is renewed."""
        with self._lock:
            self._until = min(when, self._at_most)
            if self._watched is not None:
                self._watched.may_run_until(self._until)

    def begin(self, watched: Watched) -> None:
        """Let a process run until the end of this term, from now on."""
        with self._lock:
            self._watched = watched
            watched.may_run_until(self._until)

    def finish(self) -> None:
        """Let the process wait for its next job."""
        with self._lock:
            if self._watched is not None:
                self._watched.may_run_until(_FOREVER)
                self._watched = None


def _new_memory() -> int:
    """Return a file descriptor of memory that two processes can share."""
    if sys.platform == "linux":
        memory = os.memfd_create("watchdog")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.truncate(memory, MAX_PROCESSES * _COLUMNS * 8)
    return memory


def _table_in(memory: int) -> memoryview[float]:
    return memoryview(mmap.mmap(memory, 0)).cast("d")


def _watch(worker: int, memory: int) -> None:
    """Kill each group whose time is over, until the worker ends. Then kill all of them."""
    # The worker ends it. A signal to all processes of a service does not.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    table = _table_in(memory)
    while True:
        look_at = time.monotonic() + LOOK_SECONDS
        for row, group in _groups(table):
            until = table[row + _UNTIL]
            if table[row + _KILLED] == group:
                continue
            if until > time.monotonic():
                look_at = min(look_at, until)
                continue
            # The group, because the row may be another one's by now.
            table[row + _KILLED] = group
            _kill(group)
        pause = max(0.0, look_at - time.monotonic())
        awake, _, _ = select.select([_STDIN], [], [], pause)
        # The pipe stays open after the end of a worker that has forked.
        if (awake and not os.read(_STDIN, 4096)) or os.getppid() != worker:
            for _row, group in _groups(table):
                _kill(group)
            return


def _groups(table: memoryview[float]) -> list[tuple[int, float]]:
    """Return each row with a process group, and that group."""
    found = []
    for row in range(0, len(table), _COLUMNS):
        group = table[row + _GROUP]
        if group == _UNUSED:
            break
        if group != _FREE:
            found.append((row, group))
    return found


def _kill(group: float) -> None:
    with contextlib.suppress(OSError):  # It has ended.
        os.killpg(int(group), signal.SIGKILL)


_STDIN = 0

if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]))
