"""A remote worker of Job Registry: leases jobs, runs handlers, reports how each attempt ended.

`payouts.py` has handlers. This file needs no changes: copy it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import protocol
from jobs import Fail, Job, ending, failure
from protocol import Client, JobLease, Refused, Unreachable

WAIT_SECONDS = 20
"""How long one `leaseJobs` waits for a job. The server takes up to 30."""

REPORT_SECONDS = 5.0
"""How long a shutdown waits for reports that the server does not answer."""

log = logging.getLogger("worker")


Handler = Callable[[Job], Coroutine[Any, Any, Any]]


class Worker:
    """Runs up to `concurrency` jobs at once. `handlers` has a handler for each job type."""

    def __init__(
        self, client: Client, handlers: dict[str, Handler], concurrency: int, grace: float
    ) -> None:
        self.id = f"{socket.gethostname()}:{os.getpid()}"
        self._client, self._handlers = client, handlers
        self._concurrency, self._grace = concurrency, grace
        self._running: dict[asyncio.Task[None], Job] = {}
        self._stopping = asyncio.Event()
        self._beat_seconds = 1 / 3
        """Until a lease says otherwise, for the shortest that there is."""
        self._late = asyncio.Event()
        """Set when a lease arrives that is to be renewed at once."""

    def stop(self) -> None:
        """Lease no more jobs. Running jobs have `grace` seconds to end, and are then released."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`. Raises `Refused` if the server refuses to lease jobs."""
        beating = asyncio.create_task(self._beat())
        stopping = asyncio.create_task(self._stopping.wait())
        failures = 0
        try:
            while not stopping.done():
                free = self._concurrency - len(self._running)
                if free == 0:
                    await asyncio.wait({stopping, *self._running}, return_when="FIRST_COMPLETED")
                    continue
                try:
                    began, leases = await self._lease(free, stopping)
                    failures = 0
                except Unreachable as error:
                    log.warning("leaseJobs: %s", error)
                    pause = max(error.retry_after, backoff(failures))
                    await asyncio.wait({stopping}, timeout=pause)
                    failures += 1
                    continue
                for lease in leases:
                    self._start(lease, began)
        finally:
            self.stop()
            if self._running:
                await asyncio.wait(self._running, timeout=self._grace)
            for job in self._running.values():
                job.stop("shutdown")
            if self._running:
                await asyncio.wait(self._running, timeout=REPORT_SECONDS)
            stopping.cancel()
            beating.cancel()

    async def _lease(self, limit: int, stopping: asyncio.Task[Any]) -> tuple[float, list[JobLease]]:
        """Return when the leases began, and the leases."""
        types, sent = list(self._handlers), asyncio.get_running_loop().time()
        poll = asyncio.create_task(self._client.lease(types, self.id, limit, WAIT_SECONDS))
        await asyncio.wait({poll, stopping}, return_when="FIRST_COMPLETED")
        for _ in range(3):
            if poll.done():
                break
            # Jobs may be on their way to us. If we hung up, they would lose an attempt.
            with suppress(Unreachable):
                await self._client.stop_waiting(self.id)
            await asyncio.wait({poll}, timeout=0.5)
        if not poll.done():
            poll.cancel()
            return sent, []
        answer = poll.result()
        if answer["kind"] == "InputInvalid":
            raise Refused(f"leaseJobs: {answer['violations']}")
        return sent + answer["waitedSeconds"], answer["leases"]

    def _start(self, lease: JobLease, began: float) -> None:
        job = Job(lease, began)
        job.expire_at(job.expires_at)
        self._beat_seconds = lease["leaseSeconds"] / 3
        task = asyncio.create_task(self._work(job))
        self._running[task] = job
        task.add_done_callback(self._running.pop)
        if began + self._beat_seconds < asyncio.get_running_loop().time():
            self._late.set()

    async def _work(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        # A job whose lease may have ended on its way is not run, only released.
        if not self._stopping.is_set() and loop.time() < job.expires_at:
            job.handler = asyncio.create_task(self._handle(job))
            timer = loop.call_at(job.times_out_at, job.stop, "timed_out")
            await asyncio.wait({job.handler})
            timer.cancel()
        await self._report(job, *ending(job))
        job.close()

    async def _handle(self, job: Job) -> Any:
        log.info("%s %s attempt %s", job.type, job.id, job.attempt)
        result = await self._handlers[job.type](job)
        json.dumps(result, allow_nan=False)
        return result

    async def _report(self, job: Job, document: str, variables: dict[str, Any]) -> None:
        """Report the end until the server answers, or until the lease has expired."""
        failures, is_refused = 0, False
        while job.stopped != "lost":
            try:
                answer = await self._client.end(document, job.token, **variables)
            except Unreachable as error:
                await asyncio.sleep(max(error.retry_after, backoff(failures)))
                failures += 1
                continue
            except Refused as error:
                log.error("%s: %s", job.id, error)
                return
            if answer["kind"] == "InputInvalid" and not is_refused:
                # The result is too large, or a number of seconds is out of range.
                is_refused, reason = True, str(answer["violations"])[:1000]
                document = protocol.FAIL
                variables = failure(Fail("report_refused", reason, retryable=False))
                continue
            # LeaseLost: an earlier report has arrived, or the job runs elsewhere.
            log.info("%s %s: %s", job.id, document.split("answer: ")[1].split("(")[0], answer)
            return
        log.warning("%s: the lease is lost", job.id)

    async def _beat(self) -> None:
        """Renew the leases of all running jobs, also of those whose report is not answered."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            renewed = await asyncio.gather(*(self._renew(job) for job in self._running.values()))
            pause = self._beat_seconds if all(renewed) else min(1.0, self._beat_seconds)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._late.wait(), max(0.0, began + pause - loop.time()))
            self._late.clear()

    async def _renew(self, job: Job) -> bool:
        """Send one heartbeat. Return False if it has to be sent again soon."""
        loop = asyncio.get_running_loop()
        sent, progress = loop.time(), job.latest_progress
        try:
            answer = await self._client.heartbeat(job.token, progress, self._beat_seconds)
        except (Unreachable, Refused) as error:
            log.warning("heartbeatJob: %s", error)
            return False
        if answer["kind"] == "LeaseLost":
            job.stop("lost")
        elif answer["kind"] == "InputInvalid":
            # The progress is too large. The next heartbeat renews the lease without it.
            log.error("%s: %s", job.id, answer["violations"])
            job.latest_progress = None
        else:
            job.expire_at(sent + answer["secondsToExpiry"])
            if answer["cancelRequested"]:
                job.stop("cancelled")
        return answer["kind"] != "InputInvalid"


def backoff(failures: int) -> float:
    """Return 0.25 to 15 seconds. The random part keeps workers from asking all at once."""
    return min(15.0, 0.5 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)


async def main(url: str, handlers: dict[str, Handler]) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")
    async with Client(url, os.environ.get("WORKER_TOKEN")) as client:
        concurrency = int(os.environ.get("WORKER_CONCURRENCY", "5"))
        grace = float(os.environ.get("WORKER_SHUTDOWN_SECONDS", "1"))
        worker = Worker(client, handlers, concurrency, grace)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.stop)
        await worker.run()
