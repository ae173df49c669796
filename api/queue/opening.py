"""Whether a queue is open, and on which event loop."""

from __future__ import annotations

import asyncio

from job_registry_api.queue.events import running_loop


class Opening:
    """The part of `JobQueue` that says whether it may be used here."""

    loop: asyncio.AbstractEventLoop | None = None
    """The event loop on which the queue is open."""

    must_be_open = False
    """Whether operations need an open queue: programs and commands open theirs. A queue on a
    `Database` that somebody else manages can be used as it is."""

    _was_opened = False

    def check_open(self) -> None:
        """Check that the queue is open on the running event loop.

        Raises:
            RuntimeError: it is not open, or on another event loop.
        """
        if not self.must_be_open or (self.loop is not None and self.loop is running_loop()):
            return
        if self.loop is not None:
            raise RuntimeError(
                "the queue is open on another event loop; open a queue for each event loop, or use"
                " `queue.sync`"
            )
        if self._was_opened:
            raise RuntimeError("the queue was closed")
        raise RuntimeError("the queue is not open; open it first: `async with queue:`")
