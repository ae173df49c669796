"""A browser's own EventSource follows jobs, and continues after a restart of the server."""

from __future__ import annotations

import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from job_registry import EnqueueRequest
from job_registry.discovery import load_registry
from job_registry_api import JobQueue
from tests.http_client import serving
from tests.postgresql_server import free_port
from tests.web.browser import browsing, needs_browser

PAYOUT = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
PAYOUT_REQUEST = EnqueueRequest(str(PAYOUT["type"]), PAYOUT["payload"])
FOLLOW = """document => {
    window.received = [];
    window.source = new EventSource("/graphql?query=" + encodeURIComponent(document));
    source.addEventListener("next", ({ data, lastEventId }) =>
        received.push({ lastEventId, ...JSON.parse(data) }));
    source.addEventListener("complete", () => source.close());
    return new Promise(resolve => source.addEventListener("open", () => resolve(true)));
}"""

pytestmark = [needs_browser, pytest.mark.slow]


async def test_an_event_source_gets_every_event_over_a_restart_of_the_server(
    sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    address = f"127.0.0.1:{free_port()}"
    listening = ("--no-worker", "--port", address.rpartition(":")[2])
    jobs = []

    async def enqueue() -> None:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            jobs.append((await client.post("/jobs", json=PAYOUT)).json()["jobId"])

    async with AsyncExitStack() as stack:
        async with serving(url, *listening):
            page = await stack.enter_async_context(browsing(address, loses_connections=True))
            await page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
            await page.goto(f"http://{address}/healthz")
            await page.evaluate(FOLLOW, "subscription { jobEvents { jobId } }")
            await enqueue()
            await page.wait_for_function("received.length == 1")
        async with JobQueue.from_url(url, load_registry(("job_registry.catalog",))) as queue:
            jobs.append(str((await queue.enqueue(PAYOUT_REQUEST)).job.id))
        async with serving(url, *listening):
            await enqueue()
            await page.wait_for_function("received.length == 3")
            await enqueue()
            await page.wait_for_function("received.length == 4")
            received = await page.evaluate("received")
    assert [each["data"]["jobEvents"]["jobId"] for each in received] == jobs
