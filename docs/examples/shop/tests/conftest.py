"""The shop on a queue of the test kit, and on a SQLite file of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from job_registry import JobRegistry
from job_registry.testing import TestQueue
from shop import jobs
from shop.app import create_shop


@pytest.fixture
def job_registry() -> JobRegistry:
    """The job types of `job_queue`, the fixture of the test kit."""
    return JobRegistry(
        [jobs.order_confirm, jobs.order_invoice, jobs.payout_settle], extensions=[jobs.worker]
    )


@pytest.fixture
async def shop(
    job_queue: TestQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shop. Its jobs run when a test drains the queue."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/shop.db")
    monkeypatch.setenv("JOBS_ASSETS", job_queue.assets)
    monkeypatch.setenv("SHOP_WORKER", "no")
    app = create_shop(job_queue)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client
