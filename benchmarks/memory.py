"""Measures the resident size of a worker over many failing and succeeding jobs.

    .venv/bin/python -m benchmarks.memory [--megabytes 20] [--failing 1000] [--succeeding 10000]

Each failing attempt holds that many megabytes in its frame. Each succeeding attempt has a payload
and a result of 50 kB. Runs on a new SQLite file, with the garbage collector set as in a worker.
The size must level off; the last line says whether it does. A reading includes what the attempts of
that moment hold, and what the allocator keeps of them, so the lowest readings are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from job_registry import EnqueueRequest, JobContext, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.logs import configure_logs
from job_registry_api.queue import migrations
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker


class Load(Payload):
    fails: bool
    text: str = ""


megabytes = 20
load = JobType(name="load", payload=Load, policy=JobPolicy(max_attempts=1))
load_in_thread = JobType(name="load_in_thread", payload=Load, policy=JobPolicy(max_attempts=1))


@load.handler
async def work(job: JobContext, payload: Load) -> Any:
    return do(payload)


@load_in_thread.handler
def work_in_thread(job: JobContext, payload: Load) -> Any:
    return do(payload)


def do(payload: Load) -> str:
    if payload.fails:
        held = bytearray(megabytes * 1_000_000)
        raise ValueError(len(held))
    return payload.text


async def run(queue: JobQueue, kind: str, jobs: int, fails: bool) -> None:
    for start in range(0, jobs, 500):
        text = "" if fails else "x" * 50_000
        requests = [
            EnqueueRequest(kind, {"fails": fails, "text": text})
            for _ in range(min(500, jobs - start))
        ]
        await queue.enqueue_many(requests)
        while True:
            counts = (await queue.counts())[kind]
            if not counts.queued and not counts.running:
                break
            await asyncio.sleep(0.05)


async def main() -> None:
    global megabytes
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--failing", type=int, default=1_000)
    parser.add_argument("--succeeding", type=int, default=10_000)
    options = parser.parse_args()
    megabytes = options.megabytes
    configure_logs("error", "console")
    process = psutil.Process()
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/jobs.db"
        await asyncio.to_thread(migrations.upgrade, url)
        registry = JobRegistry([load, load_in_thread])
        async with JobQueue.from_url(url, registry, lease_seconds=30) as queue:
            worker = Worker(queue, concurrency=8, assets=folder, shutdown_seconds=5)
            task = asyncio.create_task(worker.run())
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 50)
            print(f"{'jobs':>28}  resident")
            for part in range(5):
                for fails, jobs in ((True, options.failing), (False, options.succeeding)):
                    for kind in ("load", "load_in_thread"):
                        await run(queue, kind, jobs // 10, fails)
                    name = f"{jobs // 5:,} {'failing' if fails else 'succeeding'}"
                    size = process.memory_info().rss / 1e6
                    sizes.append(size)
                    print(f"{part + 1}. {name:>25}  {size:6.0f} MB", flush=True)
            worker.stop()
            await task
    # Two readings per fifth: those of the second and third against those of the fourth and last.
    growth = min(sizes[6:]) - min(sizes[2:6])
    print(f"The lowest reading of the last two fifths: {growth:+.0f} MB. ", end="")
    print("It levels off." if growth < 50 else "IT GROWS.")
    sys.exit(growth >= 50)


if __name__ == "__main__":
    asyncio.run(main())
