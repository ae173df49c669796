"""A process that does random things to the queue and notes each of them, for the concurrent model.

    python -m tests.queue.random_callers URL LOG --seed 1 --seconds 6

A line of the log is a JSON object: what was done, its outcome, and when it was asked and answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any, Final

from job_registry import Backoff, EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.logs import configure_logs
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.errors import JobNotFound, JobStateConflict, LeaseLost
from job_registry_api.queue.models import JobError
from job_registry_api.queue.queue import JobQueue

LIMITS: Final = {"model.free": None, "model.three": 3, "model.one": 1, "model.only": 1}
MAX_ATTEMPTS: Final = 4
KEYS: Final = 200


class Nothing(Payload):
    """No fields."""


def _job_type(name: str, limit: int | None) -> JobType[Nothing]:
    policy = JobPolicy(
        max_attempts=MAX_ATTEMPTS,
        timeout_seconds=60,
        concurrency_limit=limit,
        backoff=Backoff(base_seconds=0, cap_seconds=0),
    )
    return JobType(name=name, payload=Nothing, policy=policy)


REGISTRY: Final = JobRegistry([_job_type(name, limit) for name, limit in LIMITS.items()])
BROKEN: Final = JobError("broken", "It broke.")


class Caller:
    """One task of a process: it enqueues, works and meddles, as its dice say."""

    def __init__(self, queue: JobQueue, seed: int, log: int, name: str) -> None:
        self._queue = queue
        self._chance = random.Random(seed)
        self._log = log
        self._name = name
        self._known: list[str] = []
        self._held: list[Lease] = []

    async def run(self, until: float) -> None:
        actions = [self.enqueue, self.enqueue_many, self.lease, self.end, self.meddle, self.beat]
        while time.monotonic() < until:
            (action,) = self._chance.choices(actions, [5, 0.5, 9, 9, 1, 1])
            await action()
            await asyncio.sleep(self._chance.uniform(0, 0.01))
        while self._held:
            await self.end()

    async def enqueue(self) -> None:
        asked = time.monotonic()
        request = self._request()
        enqueued = await self._queue.enqueue(request)
        self._enqueued(asked, [request], [enqueued])

    async def enqueue_many(self) -> None:
        asked = time.monotonic()
        requests = [self._request() for _ in range(self._chance.randint(1, 5))]
        results = await self._queue.enqueue_many(requests)
        enqueued = [each for each in results if isinstance(each, Enqueued)]
        assert len(enqueued) == len(requests), results
        self._enqueued(asked, requests, enqueued)

    def _request(self) -> EnqueueRequest:
        key = f"k{self._chance.randrange(KEYS)}" if self._chance.random() < 0.3 else None
        priority = self._chance.choice([None, None, 80])
        name = self._chance.choice(list(LIMITS))
        return EnqueueRequest(name, {}, priority=priority, idempotency_key=key)

    def _enqueued(
        self, asked: float, requests: list[EnqueueRequest], results: list[Enqueued]
    ) -> None:
        for request, enqueued in zip(requests, results, strict=True):
            self._known.append(str(enqueued.job.id))
            self._note(
                "enqueued", asked, job=str(enqueued.job.id), type=request.type,
                key=request.idempotency_key, deduplicated=enqueued.deduplicated,
            )  # fmt: skip

    async def lease(self) -> None:
        asked = time.monotonic()
        names = self._chance.sample(list(LIMITS), self._chance.randint(1, len(LIMITS)))
        limit = self._chance.randint(1, 4)
        wait = self._chance.choice([0, 0, 0.05])
        for lease in await self._queue.lease(names, self._name, limit=limit, wait_seconds=wait):
            self._held.append(lease)
            self._known.append(str(lease.job.id))
            self._note(
                "leased", asked, job=str(lease.job.id), type=lease.job.type, token=lease.token,
                attempt=lease.job.attempt,
            )  # fmt: skip

    async def beat(self) -> None:
        for lease in self._held:
            asked = time.monotonic()
            # Nobody else's doing ends a lease of 30 s: not in the seconds that this takes.
            heartbeat = await self._queue.heartbeat(lease.token, {"at": asked})
            self._note("beat", asked, job=str(lease.job.id), cancel=heartbeat.cancel_requested)

    async def end(self) -> None:
        if not self._held:
            return
        lease = self._held.pop(self._chance.randrange(len(self._held)))
        asked = time.monotonic()
        how = self._chance.choices(
            ["complete", "fail", "give up", "release", "snooze"], [8, 3, 1, 2, 2]
        )[0]
        match how:
            case "complete":
                job = await self._queue.complete(lease.token, {"by": self._name})
            case "fail":
                job = await self._queue.fail(lease.token, BROKEN)
            case "give up":
                job = await self._queue.fail(lease.token, BROKEN, retryable=False)
            case "release":
                job = await self._queue.release(lease.token)
            case _:
                job = await self._queue.snooze(lease.token, 0)
        self._note(
            "ended", asked, job=str(lease.job.id), type=lease.job.type, token=lease.token, how=how,
            status=str(job.status),
        )  # fmt: skip
        if how == "complete" and self._chance.random() < 0.2:
            await self._queue.complete(lease.token, {"by": "a retry over HTTP"})
        if self._chance.random() < 0.2:
            try:
                await self._queue.heartbeat(lease.token)
            except LeaseLost:
                return
            raise AssertionError("an ended lease was renewed")

    async def meddle(self) -> None:
        if not self._known:
            return
        asked, job = time.monotonic(), self._chance.choice(self._known)
        what = self._chance.choice(["cancel", "retry"])
        change = self._queue.cancel if what == "cancel" else self._queue.retry
        try:
            changed = await change(job)
        except (JobStateConflict, JobNotFound):
            return
        self._note(what, asked, job=job, status=str(changed.status))

    def _note(self, what: str, asked: float, **details: Any) -> None:
        line = {"what": what, "by": self._name, "asked": asked, "answered": time.monotonic()}
        os.write(self._log, (json.dumps(line | details) + "\n").encode())


async def call(url: str, log: Path, seed: int, seconds: float, callers: int) -> None:
    """Runs some callers on two queues of this process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async with (
        JobQueue.from_url(url, REGISTRY, lease_seconds=30) as one,
        JobQueue.from_url(url, REGISTRY, lease_seconds=30) as two,
    ):
        until = time.monotonic() + seconds
        await asyncio.gather(
            *(
                Caller((one, two)[n % 2], seed * 1_000 + n, descriptor, f"{os.getpid()}.{n}").run(
                    until
                )
                for n in range(callers)
            )
        )
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("log", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--callers", type=int, default=4)
    arguments = parser.parse_args()
    configure_logs("error", "console")
    asyncio.run(
        call(arguments.url, arguments.log, arguments.seed, arguments.seconds, arguments.callers)
    )


if __name__ == "__main__":
    main()
