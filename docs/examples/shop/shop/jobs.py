"""The three job types of the shop. `JOBS_CATALOG=shop.jobs` names this module to every process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import Field
from sqlalchemy import update
from sqlalchemy.ext.asyncio import async_sessionmaker

from job_registry import (
    Backoff,
    Fail,
    JobContext,
    JobPolicy,
    JobType,
    Payload,
    Retry,
    WorkerExtension,
)
from shop.invoice import draw_page, write_pdf
from shop.models import Order, create_engine
from shop.services import AddressUnknown, Bank, Busy, MailService

CENTS: Final = {"tea": 450, "cup": 1200, "pot": 3900}
"""What each article costs."""


class Line(Payload):
    """An article of an order."""

    article: Literal["tea", "cup", "pot"]
    quantity: Annotated[int, Field(ge=1, le=100)] = 1


class OrderConfirm(Payload):
    """Confirm one order by mail."""

    order_id: UUID
    email: Annotated[
        str, Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=200, examples=["ada@example.com"])
    ]
    lines: Annotated[list[Line], Field(min_length=1, max_length=20)]

    @property
    def cents(self) -> int:
        """What the order costs."""
        return sum(CENTS[line.article] * line.quantity for line in self.lines)


class OrderInvoice(Payload):
    """Draw the invoice of one order as a PDF, a page for each line."""

    order_id: UUID
    lines: Annotated[list[Line], Field(min_length=1, max_length=20)]


class PayoutSettle(Payload):
    """Pay the sellers their share of one order."""

    order_id: UUID
    cents: Annotated[int, Field(ge=1)]


order_confirm = JobType(
    name="order.confirm",
    payload=OrderConfirm,
    policy=JobPolicy(
        max_attempts=5, timeout_seconds=30, backoff=Backoff(base_seconds=1, cap_seconds=60)
    ),
)
order_invoice = JobType(
    name="order.invoice",
    payload=OrderInvoice,
    policy=JobPolicy(timeout_seconds=60),
    run_in="process",  # Drawing computes, and would stop everything else on the event loop.
)
payout_settle = JobType(
    name="payout.settle",
    payload=PayoutSettle,
    policy=JobPolicy(max_attempts=10, concurrency_limit=1),  # One payout at a time.
)


@order_confirm.handler
async def confirm(job: JobContext, order: OrderConfirm) -> dict[str, str]:
    """Send the mail, then enqueue the invoice and the payout.

    A job may run twice, for example when its worker dies at the end. The customer may get the mail
    twice then. The two jobs are stored once, together with the success of this one.
    """
    mail: MailService = job.state.mail
    try:
        await mail.send(order.email, f"We have your order over {order.cents / 100:.2f} EUR.")
    except AddressUnknown as error:
        raise Fail(f"There is no mailbox {order.email}.") from error
    except Busy as error:
        raise Retry("The mail service is busy.", after=error.seconds) from error
    # Any other exception is a failed attempt too: the next one waits for the backoff.
    await set_status(job, order.order_id, "confirmed")
    key = str(order.order_id)
    job.enqueue(OrderInvoice(order_id=order.order_id, lines=order.lines), idempotency_key=key)
    job.enqueue(PayoutSettle(order_id=order.order_id, cents=order.cents), idempotency_key=key)
    return {"mailed": order.email}


@order_invoice.handler
def invoice(job: JobContext, payload: OrderInvoice) -> dict[str, Any]:
    """Draw the pages, in a process that is killed at the timeout and at a cancellation."""
    pages = []
    for number, line in enumerate(payload.lines, start=1):
        price = CENTS[line.article] * line.quantity / 100
        pages.append(
            draw_page(f"Order {payload.order_id}", f"{line.quantity} x {line.article}: {price:.2f}")
        )
        job.progress({"page": number, "of": len(payload.lines)})
    name = f"invoices/{payload.order_id}.pdf"
    write_pdf(Path(job.assets) / name, pages)
    return {"file": name, "pages": len(pages)}


@payout_settle.handler
async def settle(job: JobContext, payout: PayoutSettle) -> dict[str, str]:
    """Pay. The bank knows the reference, so a second run pays nothing."""
    bank: Bank = job.state.bank
    receipt = await bank.pay(reference=str(payout.order_id), cents=payout.cents)
    await set_status(job, payout.order_id, "settled")
    return {"receipt": receipt}


async def set_status(job: JobContext, order_id: UUID, status: str) -> None:
    """Change the status of an order."""
    async with job.state.sessions.begin() as session:
        await session.execute(update(Order).where(Order.id == order_id).values(status=status))


@asynccontextmanager
async def resources() -> AsyncIterator[dict[str, Any]]:
    """Open what the handlers share, once per worker: the attributes of `job.state`."""
    engine = create_engine()
    yield {"sessions": async_sessionmaker(engine), "mail": MailService(), "bank": Bank()}
    await engine.dispose()


worker = WorkerExtension(lifespan=resources)
