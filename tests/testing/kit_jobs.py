"""Job types for the tests of the test kit, with handlers of every kind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Any

from job_registry import (
    Backoff,
    Cancel,
    Fail,
    JobContext,
    JobPolicy,
    JobRegistry,
    JobType,
    Payload,
    Retry,
    Snooze,
    WorkerExtension,
)


class MailSend(Payload):
    """Send one mail."""

    to: str
    reply_to: str | None = None
    sent_on: date | None = None


class Do(Payload):
    """Do what `what` says."""

    what: str = "nothing"


class Count(Payload):
    """Enqueue the next number."""

    number: int


POLICY = JobPolicy(
    max_attempts=3, timeout_seconds=60, backoff=Backoff(base_seconds=10, cap_seconds=60)
)

mail_send = JobType(name="mail.send", payload=MailSend, policy=POLICY)
do_async = JobType(name="do.async", payload=Do, policy=POLICY)
do_thread = JobType(name="do.thread", payload=Do, policy=POLICY)
do_process = JobType(name="do.process", payload=Do, policy=POLICY, run_in="process")
do_process_async = JobType(name="do.process_async", payload=Do, policy=POLICY, run_in="process")
quick = JobType(name="quick", payload=Do, policy=JobPolicy(max_attempts=2, timeout_seconds=1))
quick_thread = JobType(
    name="quick.thread", payload=Do, policy=JobPolicy(max_attempts=2, timeout_seconds=1)
)
count = JobType(name="count", payload=Count, policy=POLICY)
remote = JobType(name="remote", payload=Do, policy=POLICY)


@mail_send.handler
async def send(job: JobContext, payload: MailSend) -> dict[str, str]:
    return {"sent": payload.to}


@do_async.handler
async def run_async(job: JobContext, payload: Do) -> Any:
    return act(job, payload.what)


@do_thread.handler
def run_in_thread(job: JobContext, payload: Do) -> Any:
    return act(job, payload.what)


@do_process.handler
def run_in_process(job: JobContext, payload: Do) -> Any:
    return act(job, payload.what)


@do_process_async.handler
async def run_async_in_process(job: JobContext, payload: Do) -> Any:
    return act(job, payload.what)


@quick.handler
async def wait_for_ever(job: JobContext, payload: Do) -> None:
    await asyncio.Event().wait()


@quick_thread.handler
def wait_in_thread(job: JobContext, payload: Do) -> None:
    if payload.what == "ask":
        while not job.cancel_requested:
            time.sleep(0.01)
        raise Cancel
    threading.Event().wait()


@count.handler
async def count_on(job: JobContext, payload: Count) -> None:
    job.enqueue(Count(number=payload.number + 1))


def act(job: JobContext, what: str) -> Any:
    match what:
        case "raise":
            raise ValueError("it is broken")
        case "raise once" if job.attempt == 1:
            raise ValueError("it is broken")
        case "cause":
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise RuntimeError("outer") from error
        case "retry":
            raise Retry("later")
        case "fail":
            raise Fail("never")
        case "cancel":
            raise Cancel
        case "snooze":
            raise Snooze(3_600)
        case "object":
            return object()
        case "mail":
            job.enqueue(MailSend(to="ada@example.com"))
        case "progress":
            job.progress({"done": 1})
        case "resource":
            return job.state.resource
        case "thread":
            return threading.current_thread() is threading.main_thread()
    return what


@asynccontextmanager
async def resources() -> AsyncIterator[dict[str, Any]]:
    yield {"resource": "open"}


async def exclaimed(job: JobContext, call_next: Any) -> Any:
    result = await call_next()
    return f"{result}!" if job.type == "do.thread" else result


REGISTRY = JobRegistry(
    [
        mail_send,
        do_async,
        do_thread,
        do_process,
        do_process_async,
        quick,
        quick_thread,
        count,
        remote,
    ],
    extensions=[WorkerExtension(middleware=[exclaimed], lifespan=resources)],
)
