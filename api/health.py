"""`/healthz`, `/readyz` and `/metrics`, the same on the server and on a worker's health port."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Final, Protocol

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from job_registry_api.auth import (
    REFUSALS,
    STATUSES,
    Authenticator,
    Forbidden,
    headers_of,
    is_loopback,
)
from job_registry_api.http_messages import (
    GuardedResponses,
    answer_method_not_allowed,
    error_content,
)
from job_registry_api.metrics import CONTENT_TYPE, Attempts
from job_registry_api.queue.errors import QueueUnavailable, UnavailableKind
from job_registry_api.queue.queue import JobQueue

READY_SECONDS: Final = 2.0
"""How long the database may take to answer `/readyz` or a count of the jobs."""

COUNTS_SECONDS: Final = 5.0
"""How old the counts of jobs on `/metrics` may be, so that several scrapers cost one query."""

STALLED_SECONDS: Final = 30.0
"""How long a worker may be stalled before `/healthz` answers 503."""

OUTAGE_LOG_SECONDS: Final = 60.0
"""How often an outage of one kind is logged while operations fail."""

log = structlog.get_logger("job_registry.health")


class OutageLog:
    """Logs why operations on the database fail: at most one line per kind and minute.

    The first failure of a kind is logged at once. Clients are sent the kind, but not the reason,
    which may name hosts and files.
    """

    def __init__(self) -> None:
        self._logged_at: dict[UnavailableKind, float] = {}
        self._failed: Counter[UnavailableKind] = Counter()

    def __call__(self, error: QueueUnavailable) -> None:
        """Count a failure. Log it if none of its kind was logged within the last minute."""
        self._failed[error.kind] += 1
        now = time.monotonic()
        if now - self._logged_at.get(error.kind, -OUTAGE_LOG_SECONDS) >= OUTAGE_LOG_SECONDS:
            self._logged_at[error.kind] = now
            failed = self._failed.pop(error.kind)
            log.warning(
                "database.unavailable", kind=error.kind, reason=error.reason, operations=failed
            )


class WorkerHealth(Attempts, Protocol):
    """The state of a worker at this moment."""

    @property
    def loop_blocked_seconds(self) -> float:
        """How long its event loop has not responded, or a claim has hung."""

    @property
    def renewals_behind_seconds(self) -> float:
        """By how many seconds renewals of its leases are late."""


class Worker(Protocol):
    """The part of a worker that health checks use."""

    @property
    def is_stopping(self) -> bool:
        """Whether it leases no more jobs."""

    @property
    def health(self) -> WorkerHealth:
        """Its state at this moment."""


class Health:
    """The health of one process: its queue, and its worker if it has one.

    Once `stopping` is set, the process is not ready.
    """

    def __init__(
        self, queue: JobQueue, worker: Worker | None = None, *, authenticator: Authenticator
    ) -> None:
        self._queue = queue
        self._worker = worker
        self._authenticator = authenticator
        self._counted_at = -COUNTS_SECONDS
        self._counting = asyncio.Lock()
        self.stopping = asyncio.Event()
        if worker is not None:
            queue.metrics.watch(lambda: worker.health)

    async def live(self, _request: Request) -> Response:
        """Answer 200 while the worker, if any, makes progress; otherwise 503 with the reason."""
        reason = _stalled(self._worker.health) if self._worker is not None else None
        if reason is None:
            return JSONResponse({"status": "ok"})
        log.error("not_alive", reason=reason)
        return _unavailable("worker_stalled", reason)

    async def ready(self, _request: Request) -> Response:
        """Answer 200 while a job could be stored and the process is not shutting down."""
        if self.stopping.is_set() or (self._worker is not None and self._worker.is_stopping):
            return _unavailable("stopping", "The process is shutting down.")
        try:
            await self._queue.ping()
        except QueueUnavailable as error:
            log.warning("not_ready", kind=error.kind, reason=error.reason)
            message = "The database cannot store jobs at the moment. The log says why."
            return _unavailable(error.code, message, kind=error.kind)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Answer with the metrics, if the caller may read all jobs."""
        refusal = await self._refusal(request)
        if refusal is not None:
            return refusal
        await self._count_jobs()
        return Response(self._queue.metrics.text(), media_type=CONTENT_TYPE)

    async def _refusal(self, request: Request) -> Response | None:
        try:
            caller = await self._authenticator.authenticate(request.scope)
            caller.need("jobs:read")
            if caller.job_types is not None:
                raise Forbidden("The metrics cover all job types; this token is limited to some.")
            if caller.subject is None and not _is_local(request):
                raise Forbidden("Without authentication, only this machine may read the metrics.")
        except REFUSALS as error:
            body = error_content(error.code, error.summary)
            headers = {name.decode(): value.decode() for name, value in headers_of(error)}
            return JSONResponse(body, STATUSES[type(error)], headers)
        return None

    async def _count_jobs(self) -> None:
        async with self._counting:
            if time.monotonic() - self._counted_at < COUNTS_SECONDS:
                return
            shown: dict[str, dict[str, int]] | None = None
            with suppress(QueueUnavailable, TimeoutError):
                async with asyncio.timeout(READY_SECONDS):
                    counts = await self._queue.counts()
                    shown = {name: asdict(each) for name, each in counts.items()}
            # After a failure too, so that scrapers add no load to a database that does not answer.
            self._counted_at = time.monotonic()
            self._queue.metrics.show_jobs(shown)


def health_routes(find: Callable[[Request], Health]) -> Sequence[BaseRoute]:
    """Return the routes of health. `find` returns the `Health` for a request."""

    def of(answer: Callable[[Health, Request], Awaitable[Response]]) -> Callable[..., object]:
        async def endpoint(request: Request) -> Response:
            return await answer(find(request), request)

        return endpoint

    return [
        Route("/healthz", of(Health.live), methods=["GET"]),
        Route("/readyz", of(Health.ready), methods=["GET"]),
        Route("/metrics", of(Health.metrics), methods=["GET"]),
    ]


def health_app(health: Health) -> Starlette:
    """Return an application with only these routes, for the health port of a worker."""
    return Starlette(
        routes=health_routes(lambda _request: health),
        exception_handlers={405: answer_method_not_allowed},
        middleware=[Middleware(GuardedResponses)],
    )


def _stalled(health: WorkerHealth) -> str | None:
    if health.loop_blocked_seconds > STALLED_SECONDS:
        return f"The worker has been stalled for {health.loop_blocked_seconds:.0f} seconds."
    if health.renewals_behind_seconds > STALLED_SECONDS:
        behind = health.renewals_behind_seconds
        return f"Renewals of leases are {behind:.0f} seconds late."
    return None


def _is_local(request: Request) -> bool:
    return request.client is not None and is_loopback(request.client.host)


def _unavailable(code: str, message: str, **details: str) -> Response:
    error = {"code": code, "message": message, **details}
    return JSONResponse({"status": "unavailable", "error": error}, status_code=503)
