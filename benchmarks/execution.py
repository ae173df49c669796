"""Measures the CPU time of an execution alone: compiled, by graphql-core, and by the resolver.

    python -m benchmarks.execution [--rounds 7] [--executions 500]

The queue is faked, so that only the execution is measured: the scopes, the limits, the coercion of
the input, Strawberry's resolver and ours, and the answer. The variants take turns in one process.
To compare with another version, run it there with this file. benchmarks/README.md has the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks in the script's folder first, where graphql.py hides the library of that name.
sys.path[0] = str(Path(__file__).parent.parent)

import argparse
import asyncio
import gc
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, cast

from pydantic import JsonValue

from benchmarks.enqueue import MUTATION
from job_registry import EnqueueRequest
from job_registry.discovery import load_registry
from job_registry_api.auth import ANYONE
from job_registry_api.budget import RequestSize
from job_registry_api.graphql import execution
from job_registry_api.graphql.admission import Admission
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.document_limits import Limits
from job_registry_api.graphql.execution import Executor
from job_registry_api.graphql.mutations import EnqueueJobSuccess
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import JobPage

PAGE = """{ jobs(first: 50) { nodes { id type status priority attempt nextRunAt payload }
  pageInfo { hasNextPage endCursor } } }"""
NOW = datetime.now(UTC)
PAYLOAD: dict[str, JsonValue] = {"batchId": "batch-7", "escrowId": "escrow-1"}
JOB = {"type": "payout.execute", "payload": PAYLOAD}
RECORD = JobRecord(
    uuid.uuid4(), "payout.execute", "", JobStatus.QUEUED, PAYLOAD, 50, 0, 10, 60, NOW
)
DOCUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "enqueueJob": (MUTATION, {"input": JOB}),
    "page of 50 jobs": (PAGE, {}),
}


class FakeQueue:
    """A queue whose every job is one record."""

    registry = load_registry(["job_registry.catalog"])

    async def enqueue(self, _request: EnqueueRequest, **_: object) -> Enqueued:
        return Enqueued(RECORD)

    async def list(self, *_: object, **__: object) -> JobPage:
        return JobPage([RECORD] * 50, has_next_page=False, weight=50)


def executed(
    document: str, variables: dict[str, Any], *, uses: int
) -> Callable[[], Awaitable[Any]]:
    """Return the execution of a document that is compiled when it was used so often."""
    executor, queue = Executor(Admission(FakeQueue.registry), Limits()), FakeQueue()
    size = RequestSize(300, 10)

    async def execute() -> None:
        vars(execution)["USES_TO_COMPILE"] = uses
        prepared = executor.prepare({"query": document}, ANYONE)
        context = Context(cast("JobQueue", queue), ANYONE, size=size)
        result = await executor.execute(prepared, variables, context)
        assert not result.errors

    return execute


async def resolver() -> None:
    """What our resolver of `enqueueJob` does itself."""
    EnqueueJobSuccess.of(
        await FakeQueue().enqueue(EnqueueRequest(type="payout.execute", payload=PAYLOAD))
    )


async def run(rounds: int, executions: int) -> None:
    for name, (document, variables) in DOCUMENTS.items():
        variants = {
            "by graphql-core": executed(document, variables, uses=0),
            "compiled": executed(document, variables, uses=2),
        }
        if name == "enqueueJob":
            variants["the resolver's own part"] = resolver
        best = dict.fromkeys(variants, float("inf"))
        for variant in variants.values():
            for _ in range(20):
                await variant()
        gc.collect()
        gc.freeze()
        for _ in range(rounds):
            for label, variant in variants.items():
                began = time.process_time()
                for _ in range(executions):
                    await variant()
                best[label] = min(best[label], (time.process_time() - began) / executions)
        for label, seconds in best.items():
            ratio = seconds / best["by graphql-core"]
            print(f"{name:<18}{label:<26}{seconds * 1e6:>8.1f} us{ratio:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="how often each variant is measured")
    parser.add_argument("--executions", type=int, default=500, help="for each measurement")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.rounds, arguments.executions))


if __name__ == "__main__":
    main()
