"""`job-registry serve`: the application in a uvicorn server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from socket import socket
from typing import TYPE_CHECKING, Annotated

import typer

from job_registry_api.cli import startup
from job_registry_api.cli.listening import address_of, inherited, listen
from job_registry_api.cli.output import REFUSED, WRONG_USAGE, err, fail, say
from job_registry_api.cli.supervisor import Supervisor, supervisor_on
from job_registry_api.settings import Settings

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

    from job_registry_api.tracing import Tracing


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Defaults to JOBS_HOST.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on. Defaults to JOBS_PORT.")
    ] = None,
    worker: Annotated[bool, typer.Option(help="Run jobs as well.")] = True,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Jobs to run at once. Defaults to JOBS_WORKER_CONCURRENCY."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Processes to serve from, to use several cores. The worker runs in one more."
            " Defaults to JOBS_SERVE_PROCESSES."
        ),
    ] = None,
    reload: Annotated[bool, startup.RELOAD] = False,
    channel: Annotated[int | None, startup.CHANNEL] = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="The socket to listen on.")] = None,
) -> None:
    """Serve GraphQL at /graphql and REST at /jobs, with a worker inside."""
    settings = startup.read_settings(
        log_events=True,
        host=host,
        port=port,
        worker_concurrency=concurrency,
        serve_processes=processes,
    )
    if channel is None and settings.serve_processes > 1:
        if reload:
            fail(
                WRONG_USAGE,
                "--reload restarts one process. Leave out --processes and JOBS_SERVE_PROCESSES.",
            )
        from job_registry_api.cli.processes import serve_in_processes

        serve_in_processes(settings, worker=worker)
    if reload:
        from job_registry_api.cli.reloading import run_with_reload

        run_with_reload(settings)
        return
    startup.leave_output_to_handlers()
    supervisor = supervisor_on(channel)
    registry = startup.read_registry(settings)
    if worker or settings.max_upload_bytes:
        startup.check_assets(settings.assets)
    tracing = startup.read_tracing()

    from job_registry_api.app import create_app
    from job_registry_api.connections import ServerConfig, bounds_of

    application = create_app(settings, registry, worker=worker, tracing=tracing, prepare=False)
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
        forwarded_allow_ips=_names_of_proxies(settings.proxies),
        lifespan="on",
        # Requests and jobs have the same time to end, from the same signal.
        timeout_graceful_shutdown=max(1, int(settings.shutdown_seconds)),
    )
    server = _server(config, application, settings, supervisor, tracing)
    if fd is not None:
        listening = inherited(fd)
    else:
        # Listen before the start: a taken port is one message, and the printed address works.
        listening = listen(settings.host, settings.port, "--port or JOBS_PORT")
        say(f"Job Registry serves http://{address_of(listening)}/graphql  (Ctrl-C ends it)", err)
    startup.exclude_start_from_collection()
    try:
        server.run(sockets=[listening])
    except SystemExit:
        # uvicorn exits with 3 if the application does not start.
        sys.exit(REFUSED)
    if not server.started:
        sys.exit(REFUSED)


def _names_of_proxies(proxies: Sequence[str]) -> list[str]:
    """Return the networks of the proxies. One of IPv4 is also returned as a part of IPv6, as a
    server that listens on :: sees it (RFC 4291, section 2.5.5.2)."""
    networks = [ip_network(proxy) for proxy in proxies]
    return [
        *map(str, networks),
        *(
            f"::ffff:{each.network_address}/{96 + each.prefixlen}"
            for each in networks
            if each.version == 4
        ),
    ]


def _server(
    config: uvicorn.Config,
    application: Starlette,
    settings: Settings,
    supervisor: Supervisor | None,
    tracing: Tracing | None,
) -> uvicorn.Server:
    """Create a uvicorn server that ends with `Shutdown`.

    uvicorn's own shutdown raises the signal again at its end, which prints a traceback, and starts
    to stop the worker only after all requests.
    """
    import uvicorn

    from job_registry_api.shutdown import Shutdown
    from job_registry_api.worker.loop import CLOSE_SECONDS

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            if supervisor is not None:
                supervisor.tell_started()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            with Shutdown(
                self.end,
                seconds=settings.shutdown_seconds + CLOSE_SECONDS,
                abandon=lambda: application.state.abandon(),
                supervised=supervisor is not None,
            ) as shutdown:
                yield
            if tracing is not None:
                tracing.close()
            shutdown.work_has_ended(at_once=application.state.handlers_left() > 0)

        def end(self) -> None:
            self.should_exit = True
            application.state.end()

    return Server(config)
