"""What handlers see of a job, and how each end of a handler is reported."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, Literal

import protocol
from protocol import JobLease

log = logging.getLogger("worker")


class Fail(Exception):
    """Raise it in a handler to fail the attempt, with a code for programs."""

    def __init__(
        self, code: str, message: str, *, retryable: bool = True, after: int | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.retryable, self.after = code, retryable, after


class Snooze(Exception):
    """Raise it in a handler to run the job again in `seconds`. The attempt is not spent."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"snoozed for {seconds} s")
        self.seconds = seconds


class Job:
    """A leased job, as its handler sees it."""

    def __init__(self, lease: JobLease, began: float) -> None:
        """`began` is when the lease began, or earlier, by the clock of the event loop."""
        self.expires_at = began + lease["secondsToExpiry"]
        # A second before the server ends the attempt, so that the report is in time.
        self.times_out_at = began + max(lease["secondsLeft"] - 1, lease["secondsLeft"] / 2)
        self.token = lease["leaseToken"]
        self.id, self.type = lease["job"]["id"], lease["job"]["type"]
        self.attempt, self.payload = lease["job"]["attempt"], lease["job"]["payload"]
        self.latest_progress: Any = None
        self.handler: asyncio.Task[Any] | None = None
        self.stopped: Literal["cancelled", "timed_out", "lost", "shutdown"] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def progress(self, value: Any) -> None:
        """Send any JSON with the next heartbeat."""
        self.latest_progress = json.loads(json.dumps(value, allow_nan=False))

    def stop(self, reason: Literal["cancelled", "timed_out", "lost", "shutdown"]) -> None:
        """Cancel the handler."""
        if self.stopped is None or reason == "lost":
            self.stopped = reason
        if self.handler is not None:
            self.handler.cancel()

    def expire_at(self, time: float) -> None:
        """Stop the job then, unless a heartbeat comes first: another worker may run it."""
        self.close()
        self.expires_at = time
        self._expiry = asyncio.get_running_loop().call_at(time, self.stop, "lost")

    def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()


def ending(job: Job) -> tuple[str, dict[str, Any]]:
    """Return the mutation that reports how the handler ended, and its variables."""
    if job.handler is None or (job.handler.cancelled() and job.stopped == "shutdown"):
        return protocol.RELEASE, {}
    if job.handler.cancelled():
        code = job.stopped or "cancelled"
        return protocol.FAIL, failure(Fail(code, f"The worker stopped the handler: {code}."))
    match job.handler.exception():
        case None:
            return protocol.COMPLETE, {"result": job.handler.result()}
        case Snooze() as snooze:
            return protocol.SNOOZE, {"seconds": snooze.seconds}
        case Fail() as fail:
            return protocol.FAIL, failure(fail)
        case error:
            log.error("%s failed", job.id, exc_info=error)
            return protocol.FAIL, failure(Fail("handler_failed", f"{error!r}"[:1000]))


def failure(fail: Fail) -> dict[str, Any]:
    error = {"code": fail.code, "message": str(fail)}
    return {"error": error, "retryable": fail.retryable, "after": fail.after}
