"""`job-registry worker`: a worker by itself, and its health over HTTP with `--health-port`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from socket import socket
from typing import TYPE_CHECKING, Annotated, Final

import typer

from job_registry import JobRegistry, JobTypeNotFound
from job_registry_api.cli import startup
from job_registry_api.cli.listening import address_of, listen
from job_registry_api.cli.output import REFUSED, WRONG_USAGE, err, fail, say
from job_registry_api.cli.supervisor import Supervisor, supervisor_on
from job_registry_api.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from job_registry_api.connections import Bounds
    from job_registry_api.tracing import Tracing
    from job_registry_api.worker import Worker

HEALTH_CONNECTIONS: Final = 64
"""The most connections of the health port."""


def worker(
    concurrency: Annotated[
        int | None,
        typer.Option(help="Jobs to run at once. Defaults to JOBS_WORKER_CONCURRENCY."),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(help="Job types to run, separated by commas. Defaults to all with a handler."),
    ] = None,
    health_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65_535,
            help="Port for /healthz, /readyz and /metrics. 0 picks a free port.",
        ),
    ] = None,
    health_host: Annotated[str, typer.Option(help="Address of the health port.")] = "127.0.0.1",
    reload: Annotated[bool, startup.RELOAD] = False,
    channel: Annotated[int | None, startup.CHANNEL] = None,
) -> None:
    """Run jobs until SIGTERM, which lets running jobs end. A second SIGTERM does not wait."""
    settings = startup.read_settings(log_events=True, worker_concurrency=concurrency)
    if reload:
        from job_registry_api.cli.reloading import run_with_reload

        run_with_reload(settings)
        return
    startup.leave_output_to_handlers()
    supervisor = supervisor_on(channel)
    registry = startup.read_registry(settings)
    names = [name.strip() for name in (types or "").split(",") if name.strip()]
    if types is not None and not names:
        fail(WRONG_USAGE, "--types: expected job types separated by commas.")
    for name in names:
        try:
            if not registry.get_type(name).has_handler:
                fail(WRONG_USAGE, f"{name} has no handler. Its jobs are run by remote workers.")
        except JobTypeNotFound as unknown:
            fail(WRONG_USAGE, f"--types: {unknown}")
    if channel is None and not any(job_type.has_handler for job_type in registry.values()):
        fail(WRONG_USAGE, "No job type has a handler, so there is nothing to run.")
    startup.check_assets(settings.assets)
    tracing = startup.read_tracing()
    startup.prepare_database(settings)
    health_socket = None
    if health_port is not None:
        health_socket = listen(health_host, health_port, "--health-port")
        say(f"Health is served at http://{address_of(health_socket)}/healthz", err)
    from job_registry_api.worker import WorkerStartError

    startup.exclude_start_from_collection()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_work(settings, registry, names, health_socket, supervisor, tracing))
    except WorkerStartError as error:
        fail(REFUSED, str(error))


async def _work(
    settings: Settings,
    registry: JobRegistry,
    types: Sequence[str],
    health_socket: socket | None,
    supervisor: Supervisor | None,
    tracing: Tracing | None,
) -> None:
    from job_registry_api.queue.queue import JobQueue
    from job_registry_api.shutdown import Shutdown
    from job_registry_api.worker.loop import CLOSE_SECONDS, worker_of

    async with JobQueue.from_settings(settings, registry, tracing=tracing, prepare=False) as queue:
        worker = worker_of(settings, queue, types=types or None)
        async with contextlib.AsyncExitStack() as stack:
            shutdown = stack.enter_context(
                Shutdown(
                    worker.stop,
                    seconds=settings.shutdown_seconds + CLOSE_SECONDS,
                    abandon=worker.abandon,
                    supervised=supervisor is not None,
                )
            )
            if health_socket is not None:
                from job_registry_api.auth import create_authenticator
                from job_registry_api.connections import bounds_of
                from job_registry_api.health import Health, health_app

                health = Health(queue, worker, authenticator=create_authenticator(settings))
                bounds = replace(bounds_of(settings), connections=HEALTH_CONNECTIONS)
                await stack.enter_async_context(
                    _health_served(health_app(health), bounds, health_socket)
                )
            if supervisor is not None:
                stack.enter_context(_told_once_started(supervisor, worker))
            await worker.run()
            if tracing is not None:
                tracing.close()
            if worker.handlers_left:
                shutdown.work_has_ended(at_once=True)
        shutdown.work_has_ended()


@contextlib.contextmanager
def _told_once_started(supervisor: Supervisor, worker: Worker) -> Iterator[None]:
    """Tell the supervisor when the worker has started."""

    async def tell() -> None:
        await worker.started.wait()
        supervisor.tell_started()

    telling = asyncio.create_task(tell(), name="started")
    try:
        yield
    finally:
        telling.cancel()


@contextlib.asynccontextmanager
async def _health_served(
    application: Starlette, bounds: Bounds, listening: socket
) -> AsyncIterator[None]:
    """Serve the health of a worker on its event loop until the context is left."""
    import uvicorn

    from job_registry_api.connections import ServerConfig

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # The worker handles signals.

    server = Server(
        ServerConfig(
            application,
            bounds,
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]), name="health")
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop, as uvicorn uses it; None without uvloop."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop
