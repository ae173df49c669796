"""`job-registry serve`: the application in a uvicorn server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from job_registry_api.cli import startup
from job_registry_api.cli.listening import address_of, listen
from job_registry_api.cli.output import REFUSED, err, say
from job_registry_api.settings import Settings

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Defaults to JOBS_HOST.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on. Defaults to JOBS_PORT.")
    ] = None,
    worker: Annotated[bool, typer.Option(help="Run jobs in this process.")] = True,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Jobs to run at once. Defaults to JOBS_WORKER_CONCURRENCY."),
    ] = None,
    reload: Annotated[bool, startup.RELOAD] = False,
) -> None:
    """Serve GraphQL at /graphql and REST at /jobs, with a worker inside."""
    settings = startup.read_settings(
        log_events=True, host=host, port=port, worker_concurrency=concurrency
    )
    if reload:
        from job_registry_api.cli.reloading import run_with_reload

        run_with_reload(settings)
        return
    registry = startup.read_registry(settings)

    from job_registry_api.app import create_app
    from job_registry_api.connections import ServerConfig, bounds_of

    application = create_app(settings, registry, worker=worker, prepare=False)
    startup.prepare_database(settings)
    config = ServerConfig(
        application,
        bounds_of(settings),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        lifespan="on",
        # Requests and jobs have the same time to end, from the same signal.
        timeout_graceful_shutdown=max(1, int(settings.shutdown_seconds)),
    )
    server = _server(config, application, settings)
    # Listen before the start: a taken port is one message, and the printed address works.
    socket = listen(settings.host, settings.port, "--port or JOBS_PORT")
    say(f"Job Registry serves http://{address_of(socket)}/graphql  (Ctrl-C ends it)", err)
    startup.exclude_start_from_collection()
    try:
        server.run(sockets=[socket])
    except SystemExit:
        # uvicorn exits with 3 if the application does not start.
        sys.exit(REFUSED)
    if not server.started:
        sys.exit(REFUSED)


def _server(config: uvicorn.Config, application: Starlette, settings: Settings) -> uvicorn.Server:
    """Create a uvicorn server that ends with `Shutdown`.

    uvicorn's own shutdown raises the signal again at its end, which prints a traceback, and starts
    to stop the worker only after all requests.
    """
    import uvicorn

    from job_registry_api.shutdown import Shutdown
    from job_registry_api.worker.loop import CLOSE_SECONDS

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            with Shutdown(
                self.end,
                seconds=settings.shutdown_seconds + CLOSE_SECONDS,
                abandon=lambda: application.state.abandon(),
            ) as shutdown:
                yield
            shutdown.work_has_ended()

        def end(self) -> None:
            self.should_exit = True
            application.state.end()

    return Server(config)
