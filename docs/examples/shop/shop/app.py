"""The shop over HTTP: orders, their invoices, and the queue with GraphQL below `/queue`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from job_registry_api import IdempotencyConflict, JobQueue, create_app, load_settings
from shop.jobs import OrderConfirm
from shop.models import Base, Order, create_engine, database_url

routes = APIRouter()


def create_shop(queue: JobQueue | None = None) -> FastAPI:
    """Create the application. Tests pass their own queue.

    `SHOP_WORKER=no` leaves out the worker. Then start at least one by `job-registry worker`.
    """
    settings = load_settings(
        {"JOBS_CATALOG": "shop.jobs", "JOBS_DATABASE_URL": database_url(), **os.environ}
    )
    queue = queue or JobQueue.from_settings(settings)
    jobs = create_app(settings, queue=queue, worker=os.environ.get("SHOP_WORKER") != "no")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = create_engine()
        app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
        async with queue:
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            # After the tables, because the worker starts here.
            async with jobs.running():
                yield
        await engine.dispose()

    app = FastAPI(title="Shop", lifespan=lifespan)
    app.state.queue = queue
    app.state.assets = Path(settings.assets)
    app.include_router(routes)
    app.mount("/queue", jobs)
    return app


def queue_of(request: Request) -> JobQueue:
    """Return the queue of the application."""
    queue: JobQueue = request.app.state.queue
    return queue


async def session_of(request: Request) -> AsyncIterator[AsyncSession]:
    """Open a session for one request."""
    async with request.app.state.sessions() as session:
        yield session


Queue = Annotated[JobQueue, Depends(queue_of)]
Session = Annotated[AsyncSession, Depends(session_of)]


class OrderShown(BaseModel):
    """An order as clients see it."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    cents: int
    status: str


class OrderPlaced(BaseModel):
    """An order, and the id of the job that confirms it."""

    order: OrderShown
    job: UUID


@routes.post("/orders", status_code=201)
async def place_order(
    order: OrderConfirm, queue: Queue, session: Session, response: Response
) -> OrderPlaced:
    """Store an order and the job that confirms it, in one transaction.

    The client chooses the id, which is the idempotency key of the job. So a request can be sent
    again when its answer was lost: it returns what the first one has stored.
    """
    try:
        async with session.begin():
            job, was_known = await queue.enqueue(
                order, idempotency_key=str(order.order_id), session=session
            )
            # After the job: of two requests at the same time, the second waits for the first here.
            if was_known:
                stored = await session.get_one(Order, order.order_id)
            else:
                stored = Order(
                    id=order.order_id, email=order.email, cents=order.cents, status="placed"
                )
                session.add(stored)
    except IdempotencyConflict as conflict:
        raise HTTPException(409, f"There is another order with this id: {conflict}") from conflict
    response.status_code = 200 if was_known else 201
    return OrderPlaced(order=OrderShown.model_validate(stored), job=job.id)


@routes.get("/orders/{order_id}")
async def read_order(order_id: UUID, session: Session) -> OrderShown:
    """Return an order."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, "There is no order with this id.")
    return OrderShown.model_validate(order)


@routes.get("/invoices/{order_id}.pdf")
def read_invoice(order_id: UUID, request: Request) -> FileResponse:
    """Return the invoice of an order, once its job has written it."""
    file: Path = request.app.state.assets / "invoices" / f"{order_id}.pdf"
    if not file.is_file():
        raise HTTPException(404, "There is no invoice of this order yet.")
    return FileResponse(file, media_type="application/pdf")


@routes.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page that places orders and follows their jobs."""
    return FileResponse(Path(__file__).with_name("page.html"))
