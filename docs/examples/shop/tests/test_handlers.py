"""A handler by itself, without a queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from job_registry.testing import TestContext
from shop.jobs import Line, OrderInvoice, invoice, order_invoice


def test_an_invoice_has_a_page_for_each_line(job_context: Callable[..., TestContext]) -> None:
    job = job_context(order_invoice)
    lines = [Line(article="tea"), Line(article="cup", quantity=3)]
    result = invoice(job, OrderInvoice(order_id=uuid4(), lines=lines))
    assert job.progress_reports == [{"page": 1, "of": 2}, {"page": 2, "of": 2}]
    assert (Path(job.assets) / result["file"]).read_bytes().startswith(b"%PDF")
