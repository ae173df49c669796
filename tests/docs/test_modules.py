"""The Python examples do what their pages say. Their types are checked by `make check`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, create_model
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from job_registry import (
    Cancel,
    DefinitionError,
    EnqueueRequest,
    Fail,
    JobContext,
    JobType,
    Payload,
    Retry,
)
from job_registry.discovery import load_registry
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import Worker
from tests import CODE, ROOT
from tests.docs.pages import blocks, write_modules

Imported = Callable[[str], ModuleType]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Imported]:
    """Imports an example by the name of its module."""
    folder = tmp_path / "modules"
    folder.mkdir()
    write_modules(folder)
    monkeypatch.syspath_prepend(folder)
    yield __import__
    for module in folder.glob("*.py"):
        sys.modules.pop(module.stem, None)


def test_every_module_of_the_pages_is_imported_by_a_test() -> None:
    tested = {"myjobs.py", "shop_jobs.py", "reports.py", "extension.py", "shop_orders.py"}
    tested |= {"reminders.py", "invoices.py", "orders.py"}
    # Run by a console example.
    tested |= {"shop_enqueue.py", "mailer.py", "shop_mail.py"}
    tested |= {"shop_orders_nested.py", "shop_api.py"}
    # Loaded by the commands of their page.
    tested |= {str(block.argument) for block in blocks("module", "evolution.md")}
    # Run by pytest, below.
    tested |= {str(block.argument) for block in blocks("module", "testing.md")}
    # By `test_embedding.py`.
    tested |= {"mounted.py", "mounted_starlette.py", "openings.py", "merged_graphql.py"}
    tested |= {"leave_out.py", "traced.py"}
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


@pytest.mark.slow
def test_the_tests_of_the_testing_page_pass(tmp_path: Path) -> None:
    write_modules(tmp_path)
    names = [block.argument for block in blocks("module", "testing.md")]
    tests = [name for name in names if name is not None and name != "conftest.py"]
    plugins = ["job_registry_api.pytest_plugin", "pytest_asyncio.plugin"]
    options = ["pythonpath=.", "asyncio_mode=auto", "asyncio_default_fixture_loop_scope=function"]
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *tests,
            *(word for name in plugins for word in ("-p", name)),
            *(word for option in options for word in ("-o", option)),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": CODE, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shown = sum(block.text.count("def test_") for block in blocks("module", "testing.md"))
    assert f"{shown} passed" in done.stdout


def test_the_first_test_takes_ten_lines() -> None:
    (first, *_) = blocks("module", "testing.md")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 10


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
    assert job.payload == {"batchId": "b-9", "escrowId": "e-1", "isRetry": False}


async def test_a_reminder_is_enqueued_once_per_invoice(
    database_url: str, imported: Imported
) -> None:
    reminders, mailer = imported("reminders"), imported("mailer")
    async with JobQueue.from_url(database_url, [mailer.mail_send]) as queue:
        assert await reminders.remind(queue, "ada@example.com", 7)
        assert not await reminders.remind(queue, "ada@example.com", 7)
        assert await reminders.remind_all(queue, ["bob@example.com"]) == []
        later, now = reversed((await queue.list()).jobs)
    assert (later.priority, later.idempotency_key) == (20, "reminder-7")
    assert later.payload == {"to": "ada@example.com", "subject": "Invoice 7"}
    assert now.payload == {"to": "bob@example.com", "subject": "Hello"}


def test_an_invoice_is_sent_with_its_transaction(
    tmp_path: Path, imported: Imported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    invoices = imported("invoices")
    with invoices.queue.sync as queue:
        assert queue.list().jobs == []
        engine = create_engine("sqlite:///mails.db")
        with Session(engine) as session:
            invoices.send_invoice(session, "ada@example.com")
        engine.dispose()
        (job,) = queue.list().jobs
    assert job.payload == {"to": "ada@example.com", "subject": "Invoice"}


async def test_the_buyer_is_told_when_the_order_is_shipped(
    database_url: str, imported: Imported
) -> None:
    orders, mailer = imported("orders"), imported("mailer")
    async with JobQueue.from_url(database_url, [orders.order_ship, mailer.mail_send]) as queue:
        async with Worker(queue, types=["order.ship"]).running():
            ship = orders.OrderShip(order_id=7, buyer="ada@example.com")
            await queue.result((await queue.enqueue(ship)).job.id, timeout=10)
        mail, _ = (await queue.list()).jobs
    assert (mail.type, mail.priority) == ("mail.send", 80)
    assert mail.payload == {"to": "ada@example.com", "subject": "Order 7"}


async def test_a_payload_is_a_body_in_fastapi(imported: Imported) -> None:
    imported("shop_jobs")
    app: FastAPI = imported("shop_api").app
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop.test") as client:
        accepted = await client.post("/invoices", json={"invoiceId": "inv-7"})
        refused = await client.post("/invoices", json={"invoiceId": 7, "copies": "1"})
    assert (accepted.status_code, accepted.json()) == (200, {"invoiceId": "inv-7", "copies": 1})
    assert refused.status_code == 422


def test_the_classes_inside_a_payload_are_strict_or_the_page_shows_the_error(
    imported: Imported,
) -> None:
    orders = imported("shop_orders_nested")

    class Address(BaseModel):
        street: str
        zip_code: int

    lax = create_model("OrderSend", __base__=Payload, address=(Address, ...))
    with pytest.raises(DefinitionError) as refused:
        JobType(name=orders.order_send.name, payload=lax)
    page = (ROOT / "docs" / "job-types.md").read_text()
    assert str(refused.value) in page.replace("\n> ", " ")
