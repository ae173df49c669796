"""The Starlette application: the doors, health, and the worker inside `jobs serve`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from api.graphql.schema import build_schema
from api.graphql.streaming import StreamingView
from api.graphql.view import GraphQLView
from api.queue.errors import QueueUnavailable
from api.queue.maintenance import maintain
from api.queue.service import JobService, open_service
from api.rest import EnqueueView, JobView
from api.settings import Settings
from api.worker import Worker
from registry import JobRegistry

log = structlog.get_logger("jobs.app")

PAGE: Final = """<!doctype html>
<html lang="en">
<title>Job Registry: GraphQL</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto }
  pre { background: #f4f4f6; padding: 1rem; overflow: auto; border-radius: .4rem }
</style>
<h1>Job Registry</h1>
<p>This is the GraphQL endpoint. Send it a query as JSON:</p>
<pre>curl http://localhost:8000/graphql --json '{"query":
  "{ jobTypes { name description policy { maxAttempts timeoutSeconds concurrencyLimit } } }"}'</pre>
<p><code>jobs schema</code> prints the whole schema, with its documentation.</p>
</html>
"""


def create_app(settings: Settings, registry: JobRegistry, *, worker: bool = False) -> Starlette:
    """The application. With `worker`, jobs that have a handler run in this process as well.

    The database has to be migrated. While it is away the application answers 503, and it recovers
    by itself.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(
                open_service(
                    registry,
                    settings.database_url,
                    lease_seconds=settings.lease_seconds,
                    pool_size=settings.database_pool_size,
                )
            )
            app.state.service = service
            app.state.end_now = lambda: None
            app.state.end_waits = service.end_waits
            stop = asyncio.Event()
            upkeep = maintain(
                service,
                stop,
                keep_succeeded_days=settings.keep_succeeded_days,
                keep_failed_days=settings.keep_failed_days,
            )
            await stack.enter_async_context(_until(stop, upkeep))
            if worker:
                await stack.enter_async_context(_working(app, service, settings))
            yield

    schema, inner_schema = build_schema()
    stream = StreamingView(schema)
    return Starlette(
        routes=[
            Route(
                "/graphql",
                GraphQLView(
                    inner_schema, stream, max_body_bytes=settings.max_body_bytes, page=PAGE
                ),
            ),
            WebSocketRoute("/graphql", stream),
            Route("/jobs", EnqueueView(max_body_bytes=settings.max_body_bytes)),
            Route("/jobs/{id}", JobView()),
            Route("/healthz", _alive, methods=["GET"]),
            Route("/readyz", _ready, methods=["GET"]),
        ],
        lifespan=lifespan,
    )


async def _alive(_request: Request) -> JSONResponse:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> JSONResponse:
    """The process can do its work: the database answers, with the tables this version needs."""
    try:
        async with asyncio.timeout(2):
            await request.app.state.service.ping()
    except (QueueUnavailable, TimeoutError) as error:
        log.warning("not_ready", reason=getattr(error, "reason", "no answer in 2 seconds"))
        error_body = {"code": "queue_unavailable", "message": "The database does not answer."}
        return JSONResponse({"status": "unavailable", "error": error_body}, status_code=503)
    return JSONResponse({"status": "ok"})


@asynccontextmanager
async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        stop.set()
        await task


@asynccontextmanager
async def _working(app: Starlette, service: JobService, settings: Settings) -> AsyncIterator[None]:
    worker = Worker(
        service,
        concurrency=settings.worker_concurrency,
        assets=settings.assets,
        shutdown_seconds=settings.shutdown_seconds,
    )
    app.state.end_now = worker.stop
    task = asyncio.create_task(worker.run(), name="worker")
    try:
        yield
    finally:
        worker.stop()
        await task
