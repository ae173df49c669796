"""`JobsApplication`: the Starlette application, by itself or mounted in another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from job_registry import CodedError
from job_registry_api.http_messages import deny, error_content, respond_json
from job_registry_api.logs import log_unexpected
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.migrations import MigrationRefused

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

log = structlog.get_logger("job_registry.app")


class NotRunning(CodedError):
    """Raised when a request comes before the application has started, or after it has ended."""

    code = "not_running"


class QueueNotOpen(RuntimeError):
    """Raised when the queue of an application is not open on the event loop of its start."""

    def __init__(self) -> None:
        super().__init__(
            "the queue of the application is not open on this event loop; open it first:"
            " `async with queue, jobs.running():`"
        )


class _Start(NamedTuple):
    """A start by a request. `started` is done once the start has succeeded or failed."""

    task: asyncio.Task[None]
    started: asyncio.Future[None]


class JobsApplication(Starlette):
    """The application that `create_app` returns. It runs by itself, or mounted in another one.

    Mounted, it joins the lifespan of its host:

        async with jobs.running():
            yield

    Without that it starts at its first request, and ends with the event loop.
    """

    def __init__(
        self,
        lifespan: Callable[[JobsApplication], AbstractAsyncContextManager[None]],
        **options: Any,
    ) -> None:
        super().__init__(lifespan=JobsApplication.running, **options)
        self._open = lifespan
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop on which the application runs."""
        self._was_joined = False
        self._start: _Start | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the application while the context is open.

        Raises:
            RuntimeError: it is running already, or the queue it was created with is not open here.
            MigrationRefused: the database does not fit this version.
            QueueUnavailable: the database does not answer.
            WorkerStartError: a lifespan of the worker failed to start.
        """
        self._was_joined = True
        async with self._running():
            yield

    async def ensure_running(self) -> None:
        """Start the application if it is not running. All requests wait for the same start.

        Raises:
            NotRunning: its lifespan has ended.
            Exception: what `running` raises. The next call tries again.
        """
        if self._runs_here():
            return
        if self._was_joined:
            raise NotRunning("The application has ended, or its start has not completed.")
        start, loop = self._start, asyncio.get_running_loop()
        if start is None or start.task.done() or start.task.get_loop() is not loop:
            started = loop.create_future()
            # In a context of its own: the application outlives the request that starts it.
            task = asyncio.create_task(
                self._run_until_cancelled(started), name="jobs application", context=Context()
            )
            start = self._start = _Start(task, started)
        # Shielded: a client that hangs up does not end the start that others wait for.
        await asyncio.shield(start.started)

    async def _run_until_cancelled(self, started: asyncio.Future[None]) -> None:
        """Run until the event loop ends, which cancels its tasks."""
        try:
            async with self._running():
                log.warning(
                    "app.started_by_request", advice="enter `running` in the host's lifespan"
                )
                started.set_result(None)
                await asyncio.Event().wait()
        except Exception as error:
            if started.done():
                log_unexpected("application", error)
            else:
                started.set_exception(error)
                started.exception()  # Read here too: every request that waits may have gone.
        finally:
            started.cancel()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        if self._runs_here():
            raise RuntimeError(
                "the application is running already; enter `running` once, before the first request"
            )
        async with self._open(self):
            self._loop = asyncio.get_running_loop()
            try:
                yield
            finally:
                self._loop = None

    def _runs_here(self) -> bool:
        # Not on another loop: one that was closed at once has left the application behind.
        return self._loop is asyncio.get_running_loop()


class StartedApplication:
    """Middleware that starts the application at its first request, and answers 503 if it cannot."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            application: JobsApplication = scope["app"]
            try:
                await application.ensure_running()
            except Exception as error:
                await _respond_unavailable(scope, receive, send, _described(error))
                return
        await self._app(scope, receive, send)


class ShortWay:
    """Middleware that passes the HTTP requests of one path to its endpoint, without the router.

    The endpoint takes every method and answers every error, so that the rest of Starlette has
    nothing to do there. It would take a tenth of the CPU time of an enqueue.
    """

    def __init__(self, app: ASGIApp, *, path: str, endpoint: ASGIApp) -> None:
        self._app = app
        self._path = path
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_here = scope["type"] == "http" and (
            scope["path"] == scope.get("root_path", "") + self._path
        )
        if scope["type"] != "lifespan" and scope["path"].endswith("\n"):
            # Starlette's routes would take it: their "$" also matches before a last line feed.
            scope = {**scope, "path": scope["path"] + "\n"}
        await (self._endpoint if is_here else self._app)(scope, receive, send)


class TracedEndpoint:
    """An endpoint whose requests have a span, unless the host has begun one for them.

    `route` is the path with its parameters by name.
    """

    def __init__(self, endpoint: ASGIApp, route: str, tracing: Tracing) -> None:
        self._endpoint = endpoint
        self._route = route
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._tracing.is_traced_by_host():
            await self._endpoint(scope, receive, send)
            return
        with self._tracing.serving(
            scope["method"], self._route, scope["path"], scope["scheme"], scope["headers"]
        ) as span:

            async def send_traced(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.answered(message["status"])
                await send(message)

            await self._endpoint(scope, receive, send_traced)


def _described(error: Exception) -> CodedError:
    """Log why the application does not run, and return the error for clients."""
    match error:
        case QueueUnavailable():
            log.warning("app.start_failed", kind=error.kind, reason=error.reason)
            return error.for_clients()
        case NotRunning():
            return error
        case MigrationRefused() | QueueNotOpen():
            # Their words say what to do, and the line of an unexpected error has no words.
            log.error("app.start_failed", reason=str(error))
    error_id = log_unexpected("start", error)
    return NotRunning(f"The application could not start. It is logged as {error_id}.")


async def _respond_unavailable(
    scope: Scope, receive: Receive, send: Send, error: CodedError
) -> None:
    content: dict[str, Any]
    if scope["path"].endswith("/graphql"):
        extensions = {"code": error.code, **error.details()}
        content = {"errors": [{"message": str(error), "extensions": extensions}]}
    else:
        details = [error.details()] if error.details() else []
        content = error_content(error.code, str(error), details)
    if scope["type"] == "http":
        await respond_json(send, 503, content, headers=((b"retry-after", b"1"),))
    else:
        await deny(
            WebSocket(scope, receive, send), JSONResponse(content, 503, {"retry-after": "1"})
        )
