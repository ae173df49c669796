"""The Starlette application: GraphQL, REST, health, and the worker inside `job-registry serve`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp

from job_registry import JobRegistry
from job_registry.asset_place import anchored
from job_registry.discovery import load_registry
from job_registry.errors import shortened
from job_registry_api import pages, rest
from job_registry_api.application import (
    JobsApplication,
    QueueNotOpen,
    ShortWay,
    StartedApplication,
    TracedEndpoint,
)
from job_registry_api.auth import create_authenticator
from job_registry_api.budget import RequestLimits
from job_registry_api.compression import Compression
from job_registry_api.graphql.admission import Admission
from job_registry_api.graphql.document_limits import Limits
from job_registry_api.graphql.execution import Executor
from job_registry_api.graphql.http import GraphQLOverHTTP
from job_registry_api.graphql.persisted_documents import (
    ManifestInvalid,
    PersistedDocuments,
    read_manifest,
)
from job_registry_api.graphql.websocket import GraphQLOverWebSocket
from job_registry_api.health import Health, OutageLog, health_routes
from job_registry_api.http_messages import (
    GuardedResponses,
    PublishedUnder,
    answer_method_not_allowed,
    error_content,
    prefix_of,
)
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import log_unregistered_types
from job_registry_api.queue.upkeep import maintain
from job_registry_api.settings import Settings, SettingsInvalid, load_settings
from job_registry_api.uploads import Uploads
from job_registry_api.worker import WorkerStartError
from job_registry_api.worker.loop import worker_of

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

log = structlog.get_logger("job_registry.app")


def create_app(
    settings: Settings | None = None,
    registry: JobRegistry | None = None,
    *,
    queue: JobQueue | None = None,
    worker: bool = False,
    tracing: Tracing | None = None,
    prepare: bool = True,
) -> JobsApplication:
    """Create the application. With `worker`, jobs that have a handler run in this process as well.

    `settings` default to those of the `JOBS_*` variables, `registry` to the job types of
    `JOBS_CATALOG`. With `queue`, the application uses an open queue and its registry, and neither
    opens nor closes it. With `tracing`, which defaults to that of the queue, requests, enqueues and
    attempts are traced. With `prepare`, the start creates and migrates a SQLite database, and
    checks that a PostgreSQL database has been migrated.

    During an outage of the database the application answers 503, and it recovers by itself. After
    the start, `app.state.end()` begins the shutdown: waiting requests and subscriptions end, and
    the worker leases no more jobs. A second call does not wait for jobs.

    Raises:
        SettingsInvalid: a variable is wrong, the keys for the tokens or the trusted documents
            cannot be used, or the settings do not fit the queue.
        DefinitionError: a module of the catalog is wrong, or the names of two job types collide in
            the GraphQL schema.
    """
    settings = load_settings() if settings is None else settings
    registry = _registry(settings, registry, queue)
    if queue is not None:
        if tracing not in (None, queue.tracing):
            raise TypeError("a queue has its own tracing; pass either a queue or tracing")
        tracing = queue.tracing

    @asynccontextmanager
    async def lifespan(app: JobsApplication) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if queue is None:
                used = await stack.enter_async_context(
                    JobQueue.from_settings(settings, registry, tracing=tracing, prepare=prepare)
                )
            elif queue.loop is asyncio.get_running_loop():
                used = queue
            else:
                raise QueueNotOpen
            used.on_unavailable = OutageLog()
            app.state.queue = used
            working = None
            stop = asyncio.Event()
            if worker:
                try:
                    working = await stack.enter_async_context(worker_of(settings, used).running())
                except WorkerStartError as error:
                    log.error("worker.start_failed", reason=str(error))
                    raise
            else:
                await log_unregistered_types(used)
                upkeep = maintain(
                    used,
                    stop,
                    keep_succeeded_days=settings.keep_succeeded_days,
                    keep_failed_days=settings.keep_failed_days,
                    parked_days=settings.parked_days,
                )
                await stack.enter_async_context(_until(stop, upkeep))
            health = Health(used, working, authenticator=authenticator)
            app.state.health = health

            def end() -> None:
                health.stopping.set()
                stop.set()
                used.end_waits()
                if working is not None:
                    working.stop()

            app.state.end = end
            if working is not None:
                app.state.abandon = working.abandon
                app.state.handlers_left = lambda: working.handlers_left
            yield

    authenticator = create_authenticator(settings, registry.renamed)
    limits = RequestLimits(
        body_bytes=settings.max_body_bytes,
        values=settings.max_request_values,
        bulk_size=settings.max_bulk_size,
        answer_bytes=settings.max_answer_bytes,
        answer_fields=settings.max_answer_fields,
    )
    executor = _executor(settings, registry, limits)
    graphql_http: ASGIApp = GraphQLOverHTTP(
        executor,
        authenticator,
        get_queries=settings.get_queries,
        page=pages.graphiql() if settings.graphiql else None,
    )
    rest_routes = rest.routes(
        authenticator, limits, described=settings.introspection, uploads=_uploads(settings)
    )
    if tracing is not None:
        graphql_http = TracedEndpoint(graphql_http, "/graphql", tracing)
        rest_routes = [
            Route(each.path, TracedEndpoint(each.endpoint, each.path, tracing))
            for each in rest_routes
        ]
    graphql_websocket = GraphQLOverWebSocket(
        executor,
        authenticator,
        allowed_origins=settings.cors_origins,
        max_operations=settings.max_websocket_operations,
        tracing=tracing,
    )
    application = JobsApplication(
        lifespan,
        routes=[
            Route("/graphql", graphql_http),
            WebSocketRoute("/graphql", graphql_websocket),
            *rest_routes,
            *health_routes(lambda request: cast(Health, request.app.state.health)),
            *([Route("/", pages.root()), *pages.assets()] if settings.graphiql else ()),
        ],
        exception_handlers={404: _answer_not_found, 405: answer_method_not_allowed},
        middleware=[
            *_middleware(settings),
            Middleware(ShortWay, path="/graphql", endpoint=graphql_http),
        ],
    )
    # Until the application has started there is nothing to end.
    application.state.end = application.state.abandon = lambda: None
    application.state.handlers_left = lambda: 0
    return application


def _registry(
    settings: Settings, registry: JobRegistry | None, queue: JobQueue | None
) -> JobRegistry:
    if queue is None:
        if registry is None:
            registry = load_registry(settings.catalog, max_payload_bytes=settings.max_payload_bytes)
        return registry if settings.suggestions else registry.without_suggestions()
    if registry is not None:
        raise TypeError("a queue has its own registry; pass either a queue or a registry")
    if queue.registry.suggests and not settings.suggestions:
        raise SettingsInvalid(
            [
                "JOBS_SUGGESTIONS: it is false, but errors of this queue suggest names; create the"
                " queue with `registry.without_suggestions()`"
            ]
        )
    return queue.registry


def _executor(settings: Settings, registry: JobRegistry, limits: RequestLimits) -> Executor:
    return Executor(
        Admission(registry, federation=settings.federation),
        Limits(
            tokens=settings.max_query_tokens,
            depth=settings.max_query_depth,
            aliases=settings.max_query_aliases,
            directives=settings.max_query_directives,
            introspection=settings.introspection,
            suggestions=settings.suggestions,
        ),
        limits,
        _persisted_documents(settings),
    )


def _uploads(settings: Settings) -> Uploads | None:
    """Return where pictures are stored. None: none are taken."""
    if settings.max_upload_bytes == 0:
        return None
    return Uploads(anchored(settings.assets), settings.max_upload_bytes)


def _persisted_documents(settings: Settings) -> PersistedDocuments:
    """Return the documents that requests may name."""
    trusted = None
    if settings.trusted_documents is not None:
        try:
            trusted = read_manifest(Path(settings.trusted_documents))
        except ManifestInvalid as error:
            got = shortened(settings.trusted_documents)
            raise SettingsInvalid([f"JOBS_TRUSTED_DOCUMENTS: got {got}; {error}"]) from None
    return PersistedDocuments(automatic=settings.persisted_queries, trusted=trusted)


def _middleware(settings: Settings) -> list[Middleware]:
    vary, used = ["Accept"], []
    if settings.root_path:
        used.append(Middleware(PublishedUnder, prefix=settings.root_path))
    if settings.compress_bytes is not None:
        vary.append("Accept-Encoding")
        used.append(Middleware(Compression, min_bytes=settings.compress_bytes))
    if settings.cors_origins:
        vary.append("Origin")
        used.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=settings.cors_headers,
                expose_headers=["link", "location", "retry-after", "www-authenticate"],
                max_age=3_600,
            )
        )
    return [Middleware(GuardedResponses, vary=vary), *used, Middleware(StartedApplication)]


async def _answer_not_found(request: Request, _error: Exception) -> Response:
    """Answer a request for a path that nothing is served at."""
    # The assets of the page are mounted, and a mount adds its path to the prefix.
    prefix = prefix_of(request.scope).removesuffix(f"/{pages.ASSETS}")
    message = (
        f"Nothing is served at this path. GraphQL is at {prefix}/graphql and REST at {prefix}/jobs."
    )
    return JSONResponse(error_content("not_found", message), 404)


@asynccontextmanager
async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        stop.set()
        await task
