"""docs/workers.md stays true: what it shows runs."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from job_registry import Cancel, JobContext
from job_registry.discovery import load_registry
from job_registry_api.queue.database import Database
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.requests import EnqueueRequest
from job_registry_api.worker import Worker

TEXT = (Path(__file__).parents[2] / "docs/workers.md").read_text("utf-8")


async def test_the_handler_of_the_first_example_that_is_stopped_is_not_done() -> None:
    """Its worker stops: a result would make the job succeed with half of its work."""
    (code,) = re.findall(r"<!-- example: run_in -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"__name__": "docs_run_in"}
    exec(compile(code, "workers.md", "exec", dont_inherit=True), names)
    job = JobContext("1", "report.render", 1, 1, 60, _cancelled=lambda: True)
    with pytest.raises(Cancel):
        names["render"](job, names["ReportRender"](rows=5))


@pytest.mark.parametrize(
    ("example", "job_type", "payload", "result"),
    [
        ("run_in", "report.render", {"rows": 5}, {"total": 30}),
        ("extension", "ping", {}, True),
    ],
)
async def test_the_examples_run(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    example: str,
    job_type: str,
    payload: dict[str, object],
    result: object,
) -> None:
    pattern = rf"<!-- example: {example} -->\n```python\n(.*?)```"
    (code,) = re.findall(pattern, TEXT, re.DOTALL)
    (tmp_path / f"docs_{example}.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    database = Database(database_url)
    queue = JobQueue(load_registry([f"docs_{example}"]), database)
    worker = Worker(queue, concurrency=1, assets="", shutdown_seconds=2)
    task = asyncio.create_task(worker.run())
    job = (await queue.enqueue(EnqueueRequest(job_type, payload))).job
    async with asyncio.timeout(20):
        while (done := await queue.get(job.id)).status is not JobStatus.SUCCEEDED:
            await asyncio.sleep(0.02)
    worker.stop()
    await asyncio.wait_for(task, 10)
    await database.close()
    assert done.result == result
