"""Whether a queue is open, and on which event loop."""

from __future__ import annotations

import asyncio
import os

from job_registry_api.queue.events import running_loop


class Opening:
    """The part of `JobQueue` that says whether it may be used here."""

    loop: asyncio.AbstractEventLoop | None = None
    """The event loop on which the queue is open."""

    must_be_open = False
    """Whether operations need an open queue: programs and commands open theirs. A queue on a
    `Database` that somebody else manages can be used as it is."""

    was_opened = False
    """Whether the queue is open, or was."""

    _opened_in: int | None = None
    """The id of the process that has opened the queue."""

    def check_process(self) -> None:
        """Check that this process was not forked while the queue was open.

        Raises:
            RuntimeError: it was. The connections and the event loop are those of its parent.
        """
        if self._opened_in not in (None, os.getpid()):
            raise RuntimeError(
                "the queue was opened before this process was forked; create one in each process"
            )

    def check_open(self) -> None:
        """Check that the queue is open on the running event loop.

        Raises:
            RuntimeError: it is not open, or on another event loop, or in another process.
        """
        if not self.must_be_open or (self.loop is not None and self.loop is running_loop()):
            return
        self.check_process()
        if self.loop is not None:
            raise RuntimeError(
                "the queue is open on another event loop; open a queue for each event loop, or use"
                " `queue.sync`"
            )
        if self.was_opened:
            raise RuntimeError("the queue was closed")
        raise RuntimeError("the queue is not open; open it first: `async with queue:`")
