"""The Starlette application: the doors, health, and the worker inside `jobs serve`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import limits
import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from api import pages
from api.auth import Authentication, Entrance, Keys, KeysInvalid, SharedSecret, read_keys
from api.graphql.operations import Limits, Operations
from api.graphql.schema import build_schema
from api.graphql.streaming import StreamingView
from api.graphql.view import GraphQLView
from api.queue.errors import QueueUnavailable
from api.queue.maintenance import maintain
from api.queue.service import JobService, open_service
from api.rest import EnqueueView, JobView
from api.settings import Settings, SettingsInvalid
from api.worker import Worker, WorkerStartError
from registry import JobRegistry

log = structlog.get_logger("jobs.app")


def create_app(settings: Settings, registry: JobRegistry, *, worker: bool = False) -> Starlette:
    """The application. With `worker`, jobs that have a handler run in this process as well.

    The database has to be migrated. While it is away the application answers 503, and it recovers
    by itself.

    Raises:
        SettingsInvalid: the keys that tokens are to be checked with cannot be used.
        DefinitionError: the job types cannot stand together in the GraphQL schema.
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
                    timeout_seconds=settings.database_timeout_seconds,
                    pooler=settings.database_pooler,
                    listen_url=settings.database_listen_url,
                    max_page_size=settings.max_page_size,
                    max_bulk_size=settings.max_bulk_size,
                )
            )
            app.state.service = service
            app.state.stop_worker = lambda: None
            app.state.abandon = lambda: None
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

    entrance = Entrance(
        _authentication(settings),
        [limits.parse(rate) for rate in settings.rate_limit],
        settings.cors_origins,
    )
    operations = Operations(
        build_schema(registry),
        Limits(
            tokens=settings.max_query_tokens,
            depth=settings.max_query_depth,
            aliases=settings.max_query_aliases,
            directives=settings.max_query_directives,
            introspection=settings.introspection,
            suggestions=settings.suggestions,
        ),
    )
    view = GraphQLView(
        operations,
        entrance,
        max_body_bytes=settings.max_body_bytes,
        get_queries=settings.get_queries,
        page=pages.graphiql() if settings.graphiql else None,
    )
    stream = StreamingView(operations, entrance, allowed_origins=settings.cors_origins)
    return Starlette(
        routes=[
            Route("/graphql", view),
            WebSocketRoute("/graphql", stream),
            Route("/jobs", EnqueueView(entrance, max_body_bytes=settings.max_body_bytes)),
            Route("/jobs/{id}", JobView(entrance)),
            Route("/healthz", _alive, methods=["GET"]),
            Route("/readyz", _ready, methods=["GET"]),
            *(pages.assets() if settings.graphiql else ()),
        ],
        middleware=_middleware(settings),
        lifespan=lifespan,
    )


def _authentication(settings: Settings) -> Authentication | None:
    keys: Keys
    if settings.auth_hs256_secret is not None:
        keys = SharedSecret(settings.auth_hs256_secret)
    elif settings.auth_jwks is not None:
        try:
            keys = read_keys(settings.auth_jwks)
        except KeysInvalid as invalid:
            fault = f"JOBS_AUTH_JWKS: got {settings.auth_jwks!r}; {invalid}"
            raise SettingsInvalid([fault]) from None
    else:
        return None
    assert settings.auth_issuer is not None
    assert settings.auth_audience is not None
    return Authentication(
        keys,
        issuer=settings.auth_issuer,
        audience=settings.auth_audience,
        leeway_seconds=settings.auth_leeway_seconds,
    )


def _middleware(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["location", "retry-after", "www-authenticate"],
            max_age=3_600,
        )
    ]


async def _alive(_request: Request) -> JSONResponse:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> JSONResponse:
    """The process can do its work: a job could be stored at this moment."""
    try:
        await request.app.state.service.ping()
    except QueueUnavailable as error:
        log.warning("not_ready", kind=error.kind, reason=error.reason)
        body = {
            "code": "queue_unavailable",
            "kind": error.kind,
            "message": "The database cannot store jobs at the moment. The server's log says why.",
        }
        return JSONResponse({"status": "unavailable", "error": body}, status_code=503)
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
    app.state.stop_worker = worker.stop
    app.state.abandon = worker.abandon
    task = asyncio.create_task(worker.run(), name="worker")
    started = asyncio.create_task(worker.started.wait())
    await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
    started.cancel()
    try:
        if task.done():
            task.result()
    except WorkerStartError as error:
        log.error("worker.start_failed", reason=str(error))
        raise
    try:
        yield
    finally:
        if not worker.is_stopping:
            worker.stop()
        await task
