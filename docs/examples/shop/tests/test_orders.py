"""Orders over HTTP, and what their jobs do."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from job_registry import Retry
from job_registry.testing import JobStatus, TestQueue
from shop.jobs import OrderConfirm, OrderInvoice, PayoutSettle

ORDER_ID = "7f1b5c1e-9c64-4a55-9d0c-0f6d1f7a2b11"


def order(**changes: Any) -> dict[str, Any]:
    lines = [{"article": "tea", "quantity": 2}, {"article": "pot"}]
    return {"orderId": ORDER_ID, "email": "ada@example.com", "lines": lines} | changes


async def status_of(shop: httpx.AsyncClient) -> object:
    return (await shop.get(f"/orders/{ORDER_ID}")).json()["status"]


async def test_an_order_is_stored_with_the_job_that_confirms_it(
    shop: httpx.AsyncClient, job_queue: TestQueue
) -> None:
    placed = await shop.post("/orders", json=order())
    assert placed.status_code == 201
    job = job_queue.assert_enqueued(OrderConfirm, email="ada@example.com")
    assert placed.json() == {
        "order": {"id": ORDER_ID, "cents": 4800, "status": "placed"},
        "job": str(job.id),
    }


async def test_an_order_that_is_sent_twice_is_one_order(
    shop: httpx.AsyncClient, job_queue: TestQueue
) -> None:
    first = await shop.post("/orders", json=order())
    again = await shop.post("/orders", json=order())
    assert (again.status_code, again.json()) == (200, first.json())
    other = await shop.post("/orders", json=order(email="eve@example.com"))
    assert (other.status_code, "/email" in other.text) == (409, True)
    assert len(job_queue.jobs()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"orderId": "7"},
        {"email": "nobody"},
        {"lines": []},
        {"lines": [{"article": "car"}]},
        {"lines": [{"article": "tea", "quantity": "2"}]},
        {"coupon": "x"},
    ],
)
async def test_an_invalid_order_is_refused_and_stores_nothing(
    shop: httpx.AsyncClient, job_queue: TestQueue, changes: dict[str, Any]
) -> None:
    assert (await shop.post("/orders", json=order(**changes))).status_code == 422
    assert (await shop.get(f"/orders/{ORDER_ID}")).status_code == 404
    job_queue.assert_not_enqueued(OrderConfirm)


async def test_a_confirmed_order_gets_its_invoice_and_is_settled(
    shop: httpx.AsyncClient, job_queue: TestQueue
) -> None:
    await shop.post("/orders", json=order())
    await job_queue.drain(OrderConfirm)
    assert await status_of(shop) == "confirmed"
    job_queue.assert_enqueued(PayoutSettle, cents=4800)
    assert (await shop.get(f"/invoices/{ORDER_ID}.pdf")).status_code == 404

    await job_queue.drain()
    assert job_queue.assert_enqueued(OrderInvoice).result == {
        "file": f"invoices/{ORDER_ID}.pdf",
        "pages": 2,
    }
    assert (await shop.get(f"/invoices/{ORDER_ID}.pdf")).content.startswith(b"%PDF")
    assert await status_of(shop) == "settled"
    again = await shop.post("/orders", json=order())
    assert (again.status_code, again.json()["order"]["status"]) == (200, "settled")


async def test_a_busy_mail_service_gets_the_mail_again_when_it_has_time(
    shop: httpx.AsyncClient, job_queue: TestQueue
) -> None:
    await shop.post("/orders", json=order(email="busy@example.com"))
    (first,) = await job_queue.drain()
    assert isinstance(first.error, Retry)
    assert (first.job.status, first.job.attempt) == (JobStatus.QUEUED, 1)
    job_queue.advance(seconds=2)
    await job_queue.drain()
    assert job_queue.assert_enqueued(OrderConfirm).status is JobStatus.SUCCEEDED
    assert await status_of(shop) == "settled"


async def test_an_order_without_a_mailbox_is_not_confirmed(
    shop: httpx.AsyncClient, job_queue: TestQueue
) -> None:
    await shop.post("/orders", json=order(email="ada@nowhere.invalid"))
    await job_queue.drain()
    job = job_queue.assert_enqueued(OrderConfirm)
    assert (job.status, job.attempt) == (JobStatus.FAILED, 1)
    assert await status_of(shop) == "placed"
    job_queue.assert_not_enqueued(PayoutSettle)


async def test_graphql_is_served_below_queue(shop: httpx.AsyncClient) -> None:
    await shop.post("/orders", json=order())
    query = "{ jobs { nodes { type status payload } } }"
    answer = (await shop.post("/queue/graphql", json={"query": query})).json()
    assert answer["data"]["jobs"]["nodes"] == [
        {
            "type": "order.confirm",
            "status": "QUEUED",
            "payload": order(
                lines=[{"article": "tea", "quantity": 2}, {"article": "pot", "quantity": 1}]
            ),
        }
    ]
