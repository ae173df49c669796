"""The Python examples do what their pages say. Their types are checked by `make check`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from job_registry import Cancel, EnqueueRequest, Fail, JobContext, Retry
from job_registry.discovery import load_registry
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker
from tests.docs.pages import blocks, write_modules

Imported = Callable[[str], ModuleType]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Imported:
    """Imports an example by the name of its module."""
    folder = tmp_path / "modules"
    folder.mkdir()
    write_modules(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return __import__


def test_every_module_of_the_pages_is_imported_by_a_test() -> None:
    tested = {"myjobs.py", "shop_jobs.py", "reports.py", "extension.py", "shop_orders.py"}
    # Run by a console example.
    tested |= {"shop_enqueue.py"}
    assert {block.argument for block in blocks("module")} == tested


def test_the_first_job_type_takes_ten_lines(imported: Imported) -> None:
    (code,) = (block.text for block in blocks("module", "README.md"))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert imported("myjobs").mail_send.policy.max_attempts == 5


def test_a_handler_whose_worker_stops_reports_no_result(imported: Imported) -> None:
    """A result would make the job succeed with half of its work."""
    reports = imported("reports")
    job = JobContext("1", "report.render", 1, 1, 60, _cancelled=lambda: True)
    with pytest.raises(Cancel):
        reports.render(job, reports.ReportRender(rows=5))


async def test_the_exceptions_of_the_handler_are_raised_as_written(imported: Imported) -> None:
    shop = imported("shop_jobs")
    job = JobContext("1", "invoice.send", 1, 5, 60)
    with pytest.raises(Fail):
        await shop.send(job, shop.InvoiceSend(invoice_id="inv-0"))
    with pytest.raises(Retry):
        await shop.send(job, shop.InvoiceSend(invoice_id="inv-busy"))


@pytest.mark.parametrize(
    ("module", "job_type", "payload", "result"),
    [
        ("myjobs", "mail.send", {"to": "ada@example.com"}, {"sent": "ada@example.com"}),
        ("shop_jobs", "invoice.send", {"invoiceId": "inv-busy"}, {"copies": 1}),
        ("reports", "report.render", {"rows": 5}, {"total": 30}),
        ("extension", "ping", {}, True),
    ],
)
@pytest.mark.usefixtures("imported")
async def test_the_handlers_of_the_pages_succeed(
    database_url: str, module: str, job_type: str, payload: dict[str, object], result: object
) -> None:
    database = open_database(database_url)
    queue = JobQueue(load_registry([module]), database)
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


async def test_the_job_of_the_own_transaction_appears_with_its_order(
    database_url: str, imported: Imported
) -> None:
    orders: Any = imported("shop_orders")
    database = open_database(database_url)
    queue = JobQueue(load_registry(["job_registry.catalog"]), database)
    async with AsyncSession(database.engine) as session:
        connection = await session.connection()
        await connection.run_sync(orders.Base.metadata.create_all)
        await orders.place_order(queue, session, orders.ShopOrder(batch="b-9"))
        stored = (await session.execute(text("SELECT batch FROM shop_order"))).all()
    (job,) = (await queue.list()).jobs
    await database.close()
    assert [tuple(row) for row in stored] == [("b-9",)]
    assert job.payload == {"batchId": "b-9", "escrowId": "e-1"}
