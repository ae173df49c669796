"""The GraphQL examples run, on both databases, and answer as shown."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import httpx
import pytest

from job_registry.discovery import load_registry
from job_registry_api.app import create_app
from job_registry_api.settings import load_settings
from tests.docs.pages import PAGES, Block, blocks, blocks_of, matches, write_modules
from tests.http_client import serving

CATALOG = ["job_registry.catalog", "myjobs", "shop_jobs", "reports", "extension"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
async def test_the_documents_of_a_page_are_answered_as_shown(
    page: Path, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [block for block in blocks_of(page) if block.kind == "graphql"]
    if not documents:
        return
    (tmp_path / "modules").mkdir()
    write_modules(tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    settings = load_settings({"JOBS_DATABASE_URL": database_url})
    application = create_app(settings, load_registry(CATALOG))
    transport = httpx.ASGITransport(application)
    async with (
        application.router.lifespan_context(application),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        for block in documents:
            response = await client.post("/graphql", json={"query": block.text})
            content = response.json()
            assert "errors" not in content, f"{block}: {response.text}"
            if block.answer is not None:
                shown = json.loads(block.answer)
                assert matches(shown, content), f"{block}: {json.dumps(content, indent=2)}"


@pytest.mark.parametrize("block", blocks("subscription"), ids=str)
async def test_a_subscription_gets_the_event_as_shown(block: Block, database_url: str) -> None:
    assert block.answer is not None
    job = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
    async with (
        serving(database_url, "--no-worker") as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
        asyncio.timeout(20),
        client.stream(
            "POST",
            "/graphql",
            json={"query": block.text},
            headers={"accept": "text/event-stream"},
        ) as response,
    ):
        enqueueing = asyncio.create_task(_enqueue_again_and_again(client, job))
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert matches(json.loads(block.answer), event), event
                break
        enqueueing.cancel()
        await asyncio.wait({enqueueing})


async def _enqueue_again_and_again(client: httpx.AsyncClient, job: object) -> None:
    """A subscription shows what happens after it began, and nothing says when that was."""
    while True:
        await client.post("/jobs", json=job)
        await asyncio.sleep(0.3)
