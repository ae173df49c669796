"""Job types whose handlers say in which span they run, for tests of tracing."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from opentelemetry import trace

from job_registry import Backoff, Cancel, Fail, JobContext, JobPolicy, JobType, Payload, Snooze

POLICY = JobPolicy(
    max_attempts=2, timeout_seconds=30, backoff=Backoff(base_seconds=0.05, cap_seconds=0.05)
)


class Act(Payload):
    act: str = ""
    note: str = ""


class Plain(Payload):
    act: str = ""
    note: str = ""


class Slow(Payload):
    pass


def does(job: JobContext, payload: Act) -> str:
    """Do what the payload says, and return the span in which it was done."""
    with trace.get_tracer("tests").start_as_current_span("inner"):
        job.log.info("acting")
        logging.getLogger("somebody").warning("acting")
        match payload.act:
            case "fail once" if job.attempt == 1:
                raise RuntimeError(payload.note)
            case "fail":
                raise Fail(payload.note)
            case "cancel":
                raise Cancel(payload.note)
            case "snooze":
                raise Snooze(3_600)
            case "follow":
                job.enqueue(Plain(note=payload.note))
            case "sleep":
                time.sleep(20)
        return f"{trace.get_current_span().get_span_context().trace_id:032x}"


on_loop = JobType(name="traced.loop", payload=Act, policy=POLICY)
in_thread = JobType(name="traced.thread", payload=Act, policy=POLICY)
in_process = JobType(name="traced.process", payload=Act, policy=POLICY, run_in="process")
plain = JobType(name="traced.plain", payload=Plain)
short = JobType(
    name="traced.short", payload=Slow, policy=JobPolicy(max_attempts=1, timeout_seconds=1)
)
ALL: Final[list[JobType[Any]]] = [on_loop, in_thread, in_process, plain, short]


@on_loop.handler
async def act_on_loop(job: JobContext, payload: Act) -> str:
    return does(job, payload)


@in_thread.handler
def act_in_thread(job: JobContext, payload: Act) -> str:
    return does(job, payload)


@in_process.handler
def act_in_process(job: JobContext, payload: Act) -> str:
    return does(job, payload)


@plain.handler
async def nothing(job: JobContext, payload: Plain) -> None: ...


@short.handler
async def too_long(job: JobContext, payload: Slow) -> None:
    await asyncio.sleep(20)
