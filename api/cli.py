"""The `job-registry` command.

Each command imports only what it needs: `types` imports no database and no GraphQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime
from errno import EADDRINUSE
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from job_registry import (
    CodedError,
    DefinitionError,
    JobRegistry,
    JobTypeNotFound,
    NotJson,
    PayloadInvalid,
    Violation,
    parse_json,
)
from job_registry.discovery import load_registry
from job_registry_api.settings import Settings, SettingsInvalid, load_settings

if TYPE_CHECKING:
    from job_registry_api.queue.enqueueing import Enqueued, Refusal
    from job_registry_api.queue.migrations import Fit, Migrated
    from job_registry_api.queue.queue import JobQueue

REFUSED = 1
WRONG_USAGE = 2
BULK = 500
"""Jobs per transaction of `enqueue`: enough to be fast, few enough to show progress."""

app = typer.Typer(
    name="job-registry",
    help="A typed job queue: an invalid job is rejected when it is enqueued.",
    epilog="Settings are JOBS_* variables; docs/settings.md lists them. Exit codes: 0 done,"
    " 1 refused, 2 wrong usage or settings, 3 did not end in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
TypeName = Annotated[
    str, typer.Argument(metavar="TYPE", help="A job type, such as thumbnail.create.")
]
File = Annotated[
    str,
    typer.Argument(metavar="FILE", help="A file with the payload as JSON. - reads standard input."),
]


def main() -> None:
    """Run the command. Expected errors become a message and an exit code."""
    try:
        app()
    except SettingsInvalid as invalid:
        _fail(WRONG_USAGE, "These settings are wrong:", *(f"  {each}" for each in invalid.faults))
    except DefinitionError as wrong:
        _fail(WRONG_USAGE, f"The job types cannot be loaded: {wrong}")
    except BrokenPipeError:
        # The reader has closed the pipe. Python would report it again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail_unexpectedly(error)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"job-registry {version('job-registry')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
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
) -> None:
    """Serve GraphQL at /graphql and REST at /jobs, with a worker inside."""
    settings = _settings(host=host, port=port, worker_concurrency=concurrency)
    registry = _registry(settings)
    _configure_logs(settings)

    import uvicorn

    from job_registry_api.app import create_app

    application = create_app(settings, registry, worker=worker)
    _prepare_database(settings)
    config = uvicorn.Config(
        application,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws_max_size=settings.max_body_bytes,
        # Requests and jobs have the same time to end, from the same signal.
        timeout_graceful_shutdown=max(1, int(settings.shutdown_seconds)),
    )
    server = _server(config, application, settings)
    # Listen before the start: a taken port is one message, and the printed address works.
    socket = _listening(settings.host, settings.port, "--port or JOBS_PORT")
    err.print(f"Job Registry serves http://{_address(socket)}/graphql  (Ctrl-C ends it)")
    _collect_garbage_rarely()
    try:
        server.run(sockets=[socket])
    except SystemExit:
        # uvicorn exits with 3 if the application does not start.
        sys.exit(REFUSED)
    if not server.started:
        sys.exit(REFUSED)


@app.command()
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
) -> None:
    """Run jobs until SIGTERM, which lets running jobs end. A second SIGTERM does not wait."""
    settings = _settings(worker_concurrency=concurrency)
    registry = _registry(settings)
    wanted = [name.strip() for name in (types or "").split(",") if name.strip()]
    if types is not None and not wanted:
        _fail(WRONG_USAGE, "--types: expected job types separated by commas.")
    for name in wanted:
        try:
            if not registry.get_type(name).has_handler:
                _fail(WRONG_USAGE, f"{name} has no handler. Its jobs are run by remote workers.")
        except JobTypeNotFound as unknown:
            _fail(WRONG_USAGE, f"--types: {unknown}")
    if not any(job_type.has_handler for job_type in registry.values()):
        _fail(WRONG_USAGE, "No job type has a handler, so there is nothing to run.")
    _configure_logs(settings)
    _prepare_database(settings)
    health_socket = None
    if health_port is not None:
        health_socket = _listening(health_host, health_port, "--health-port")
        err.print(f"Health is served at http://{_address(health_socket)}/healthz")
    from job_registry_api.worker import WorkerStartError

    _collect_garbage_rarely()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_work(settings, registry, wanted, health_socket))
    except WorkerStartError as error:
        _fail(REFUSED, str(error))


@app.command()
def migrate(
    check: Annotated[
        bool,
        typer.Option("--check", help="Change nothing. Exit with 1 if the database does not fit."),
    ] = False,
    grants: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE",
            help="Change nothing. Print the GRANTs that a PostgreSQL role needs.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the database schema up to date. Safe to run again."""
    if check and grants is not None:
        _fail(WRONG_USAGE, "Use --check or --grants, not both.")
    settings = _settings()
    _configure_logs(settings, at_least_warnings=True)
    from job_registry_api.queue import migrations

    url = settings.database_url
    where: Any = {"pooler": settings.database_pooler, "schema": settings.database_schema}
    if grants is not None:
        with _database_errors():
            _print_grants(migrations.grants(url, grants, **where), as_json)
    elif check:
        with _database_errors():
            fit = migrations.examine(
                url, timeout_seconds=settings.database_timeout_seconds, **where
            )
        _print_fit(fit, as_json)
        if not fit.fits:
            sys.exit(REFUSED)
    else:
        with _database_errors():
            _print_migrated(migrations.upgrade(url, **where), as_json)


@app.command()
def types(as_json: AsJson = False) -> None:
    """List the job types, with their policies."""
    registry = _registry(_settings())
    if as_json:
        _print_json([_type_json(registry, name) for name in registry])
        return
    table = Table(box=None, pad_edge=False)
    for title in ("type", "attempts", "timeout", "at once", "handler", "description"):
        table.add_column(title, overflow="fold")
    for name, job_type in registry.items():
        policy = job_type.policy
        table.add_row(
            name,
            str(policy.max_attempts),
            f"{policy.timeout_seconds} s",
            "no limit" if policy.concurrency_limit is None else str(policy.concurrency_limit),
            "here" if job_type.has_handler else "remote",
            escape(job_type.description.partition("\n")[0]),
        )
    if not out.is_terminal:
        out.width = 1_000  # One line per type, for grep: a file or a pipe has no width.
    out.print(table)


@app.command()
def policy(type_name: TypeName, as_json: AsJson = False) -> None:
    """Show the policy of a job type."""
    registry = _registry(_settings())
    try:
        found = registry.policy(type_name)
    except JobTypeNotFound as unknown:
        _refuse(unknown, as_json)
    if as_json:
        _print_json(_policy_json(registry, type_name))
        return
    limit = "no limit" if found.concurrency_limit is None else found.concurrency_limit
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("maxAttempts", str(found.max_attempts), "runs in all")
    table.add_row("timeoutSeconds", str(found.timeout_seconds), "for one attempt")
    table.add_row("concurrencyLimit", str(limit), "at once, over all workers")
    table.add_row(
        "backoff",
        f"{found.backoff.base_seconds:g} s",
        f"doubling up to {found.backoff.cap_seconds:g} s, with half jitter",
    )
    out.print(table)


@app.command()
def validate(type_name: TypeName, file: File, as_json: AsJson = False) -> None:
    """Check a payload against its job type, as enqueue does. Needs no database."""
    registry = _registry(_settings())
    try:
        registry.admit(type_name, _payload(_read(file), file))
    except (JobTypeNotFound, PayloadInvalid) as refusal:
        _refuse(refusal, as_json)
    if as_json:
        _print_json({"valid": True})
    else:
        out.print("valid")


@app.command()
def enqueue(
    type_name: TypeName,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A file with one payload as JSON, or many as JSON Lines. - reads standard input.",
        ),
    ],
    priority: Annotated[
        int | None, typer.Option(help="0 to 100, higher first. Defaults to 50.")
    ] = None,
    schedule_at: Annotated[
        str | None, typer.Option(help="Earliest time of the first run: 2030-01-31T12:00:00Z.")
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="1 to 1,000. Defaults to the policy.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Makes it safe to repeat the command. For a single payload.")
    ] = None,
    atomic: Annotated[
        bool, typer.Option(help="Store all payloads or none, up to JOBS_MAX_BULK_SIZE.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Store one job, or one per line."""
    settings = _settings()
    registry = _registry(settings)
    text = _read(file)
    options = {
        "priority": priority,
        "schedule_at": _time(schedule_at),
        "max_attempts": max_attempts,
        "idempotency_key": idempotency_key,
    }
    lines = _lines(text, file)
    if len(lines) > 1 and idempotency_key is not None:
        _fail(WRONG_USAGE, f"--idempotency-key is for a single payload; got {len(lines):,}.")
    if atomic and len(lines) > settings.max_bulk_size:
        _fail(
            WRONG_USAGE,
            f"--atomic stores up to {settings.max_bulk_size:,} payloads (JOBS_MAX_BULK_SIZE);"
            f" got {len(lines):,}.",
        )
    _configure_logs(settings, at_least_warnings=True)
    _prepare_database(settings)
    with _database_errors():
        refused = asyncio.run(
            _enqueue(settings, registry, type_name, lines, options, atomic, as_json)
        )
    if refused:
        sys.exit(REFUSED)


@app.command()
def schema() -> None:
    """Print the GraphQL schema of the job types in JOBS_CATALOG, with its documentation."""
    registry = _registry(_settings())
    from job_registry_api.graphql.schema import sdl

    sys.stdout.write(sdl(registry))


async def _work(
    settings: Settings, registry: JobRegistry, types: Sequence[str], health_socket: Any | None
) -> None:
    from job_registry_api.opening import open_queue
    from job_registry_api.queue.upkeep import maintain
    from job_registry_api.shutdown import Shutdown
    from job_registry_api.worker import Worker
    from job_registry_api.worker.loop import CLOSE_SECONDS

    async with open_queue(settings, registry) as queue:
        worker = Worker(
            queue,
            types=types or None,
            concurrency=settings.worker_concurrency,
            assets=settings.assets,
            shutdown_seconds=settings.shutdown_seconds,
        )
        stop = asyncio.Event()

        def end() -> None:
            stop.set()
            worker.stop()

        async with contextlib.AsyncExitStack() as stack:
            shutdown = stack.enter_context(
                Shutdown(
                    end,
                    seconds=settings.shutdown_seconds + CLOSE_SECONDS,
                    abandon=worker.abandon,
                )
            )
            if health_socket is not None:
                from job_registry_api.auth import create_authenticator
                from job_registry_api.health import Health, health_app

                health = Health(queue, worker, authenticator=create_authenticator(settings))
                await stack.enter_async_context(_health_served(health_app(health), health_socket))
            upkeep = asyncio.create_task(
                maintain(
                    queue,
                    stop,
                    keep_succeeded_days=settings.keep_succeeded_days,
                    keep_failed_days=settings.keep_failed_days,
                )
            )
            await worker.run()
            stop.set()
            await upkeep
        shutdown.work_has_ended()


async def _enqueue(
    settings: Settings,
    registry: JobRegistry,
    type_name: str,
    lines: list[tuple[int, str]],
    options: dict[str, Any],
    atomic: bool,
    as_json: bool,
) -> int:
    """Store the payloads, print the result of each, and return how many were refused."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from job_registry_api.opening import open_queue

    counts = {"stored": 0, "deduplicated": 0, "refused": 0}
    size = len(lines) if atomic else min(BULK, settings.max_bulk_size)
    async with open_queue(settings, registry) as queue:
        progress = Progress(
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=len(lines) < 2 or not err.is_terminal,
        )
        with progress:
            bar = progress.add_task("enqueue", total=len(lines))
            for start in range(0, len(lines), size):
                batch = lines[start : start + size]
                for number, result in await _enqueue_batch(
                    queue, type_name, batch, options, atomic
                ):
                    _show_enqueued(number, result, counts, len(lines) > 1, as_json)
                progress.advance(bar, len(batch))
    if len(lines) > 1 and not as_json:
        out.print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    return counts["refused"]


async def _enqueue_batch(
    queue: JobQueue,
    type_name: str,
    batch: list[tuple[int, str]],
    options: dict[str, Any],
    atomic: bool,
) -> Iterator[tuple[int, Enqueued | Refusal]]:
    from job_registry_api.queue.enqueueing import not_stored
    from job_registry_api.queue.requests import EnqueueRequest

    results: dict[int, Enqueued | Refusal] = {}
    requests: dict[int, EnqueueRequest] = {}
    for number, text in batch:
        try:
            requests[number] = EnqueueRequest(type_name, parse_json(text), **options)
        except NotJson as error:
            violation = Violation("", "not_json", str(error))
            results[number] = PayloadInvalid(type_name, [violation])
    if atomic and results:
        refusal = not_stored(sorted(results))
        results |= dict.fromkeys(requests, refusal)
    elif requests:
        stored = await queue.enqueue_many(list(requests.values()), atomic=atomic)
        results |= zip(requests, stored, strict=True)
    return iter(sorted(results.items()))


def _show_enqueued(
    number: int, result: Any, counts: dict[str, int], many: bool, as_json: bool
) -> None:
    if isinstance(result, CodedError):
        counts["refused"] += 1
        if as_json:
            _print_json({"line": number, **_refusal_json(result)}, lines=True)
        else:
            where = f"line {number}: " if many else ""
            for text in _sentences(result):
                err.print(f"{where}{text}", markup=False)
        return
    counts["deduplicated" if result.deduplicated else "stored"] += 1
    job = result.job
    if as_json:
        content = {
            "line": number,
            "jobId": str(job.id),
            "status": job.status.value,
            "type": job.type,
            "deduplicated": result.deduplicated,
        }
        _print_json(content, lines=True)
    elif not many:
        out.print(f"{job.id} {'was there already' if result.deduplicated else job.status.value}")


def _settings(**overrides: Any) -> Settings:
    given = {name: value for name, value in overrides.items() if value is not None}
    environment = {**os.environ, **{f"JOBS_{n.upper()}": str(v) for n, v in given.items()}}
    return load_settings(environment)


def _registry(settings: Settings) -> JobRegistry:
    # Find modules in the current folder, as `python -m` does.
    if "" not in sys.path:
        sys.path.insert(0, "")
    return load_registry(settings.catalog, max_payload_bytes=settings.max_payload_bytes)


def _configure_logs(settings: Settings, *, at_least_warnings: bool = False) -> None:
    from job_registry_api.logs import configure_logs

    quiet = at_least_warnings and settings.log_level in ("debug", "info")
    configure_logs("warning" if quiet else settings.log_level, settings.log_format)


def _prepare_database(settings: Settings) -> None:
    """Migrate an SQLite database. Check that a PostgreSQL database is migrated."""
    from job_registry_api.queue import migrations

    with _database_errors():
        if settings.database_url.startswith("sqlite"):
            migrations.upgrade(settings.database_url)
            return
        fit = migrations.examine(
            settings.database_url,
            pooler=settings.database_pooler,
            schema=settings.database_schema,
            timeout_seconds=settings.database_timeout_seconds,
        )
    if not fit.fits:
        _fail(REFUSED, fit.sentence)


@contextlib.contextmanager
def _database_errors() -> Iterator[None]:
    from job_registry_api.queue.errors import QueueUnavailable
    from job_registry_api.queue.migrations import MigrationRefused

    try:
        yield
    except MigrationRefused as refused:
        _fail(REFUSED, str(refused))
    except QueueUnavailable as error:
        _fail(REFUSED, f"The database is not available: {error.reason}")


def _print_migrated(migrated: Migrated, as_json: bool) -> None:
    if as_json:
        steps = [{"revision": step.revision, "title": step.title} for step in migrated.steps]
        _print_json({"from": migrated.before, "to": migrated.after, "steps": steps})
    elif not migrated.steps:
        out.print(f"Nothing to do: the database schema is at revision {migrated.after}.")
    else:
        for step in migrated.steps:
            out.print(f"{step.revision}  {step.title}", markup=False)
        before = migrated.before or "an empty database"
        out.print(f"Migrated from {before} to revision {migrated.after}.")


def _print_fit(fit: Fit, as_json: bool) -> None:
    if not as_json:
        (out if fit.fits else err).print(fit.sentence, markup=False)
        return
    _print_json(
        {
            "fits": fit.fits,
            "verdict": fit.verdict.value,
            "revision": fit.revision,
            "needed": fit.needed,
            "compatibleFrom": fit.compatible_from,
            "message": fit.sentence,
        }
    )


def _print_grants(statements: Sequence[str], as_json: bool) -> None:
    if as_json:
        _print_json({"statements": list(statements)})
    elif not statements:
        err.print("SQLite has no roles: everyone who may write to the file may use the queue.")
    else:
        for statement in statements:
            out.print(statement, markup=False)


def _loop_factory() -> Any:
    """Return uvloop's event loop, as uvicorn uses it; None without uvloop."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop


def _collect_garbage_rarely() -> None:
    """Exclude the objects of the schema and the modules from garbage collection.

    They are a million objects that stay. Visiting them again and again took a third of the time of
    an enqueue (measured, see benchmarks/README.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _server(config: Any, application: Any, settings: Settings) -> Any:
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


@contextlib.asynccontextmanager
async def _health_served(application: Any, socket: Any) -> AsyncIterator[None]:
    """Serve the health of a worker on its event loop until the context is left."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # The worker handles signals.

    server = Server(
        uvicorn.Config(
            application,
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[socket]), name="health")
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _listening(host: str, port: int, chosen_by: str) -> Any:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        advice = f" Choose another port with {chosen_by}." if error.errno == EADDRINUSE else ""
        _fail(REFUSED, f"Cannot listen on {host}:{port}: {error.strerror}.{advice}")
    return bound


def _address(bound: Any) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _fail(WRONG_USAGE, f"Cannot read {file}: {reason}.")


def _payload(text: str, file: str) -> Any:
    try:
        return parse_json(text)
    except NotJson as error:
        _fail(REFUSED, f"{'Standard input' if file == '-' else file}: {error}")


def _lines(text: str, file: str) -> list[tuple[int, str]]:
    """Return the payloads of a file with their line numbers: one JSON text, or one per line."""
    with contextlib.suppress(NotJson):
        parse_json(text)
        return [(1, text)]
    lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if len(lines) < 2:
        _payload(text, file)
    return lines


def _time(text: str | None) -> datetime | None:
    try:
        time = None if text is None else datetime.fromisoformat(text)
    except ValueError:
        time = None
    if text is not None and (time is None or time.tzinfo is None):
        _fail(
            WRONG_USAGE,
            "--schedule-at: expected a time with its offset, such as 2030-01-31T12:00:00Z;"
            f" got {text}.",
        )
    return time


def _type_json(registry: JobRegistry, name: str) -> dict[str, Any]:
    job_type = registry[name]
    return {
        "name": name,
        "description": job_type.description,
        "hasHandler": job_type.has_handler,
        "fingerprint": job_type.fingerprint,
        "policy": _policy_json(registry, name),
        "payloadSchema": dict(job_type.payload_schema),
        "examplePayload": dict(job_type.example_payload),
    }


def _policy_json(registry: JobRegistry, name: str) -> dict[str, Any]:
    found = registry.policy(name)
    return {
        "type": name,
        "maxAttempts": found.max_attempts,
        "timeoutSeconds": found.timeout_seconds,
        "concurrencyLimit": found.concurrency_limit,
        "backoff": {
            "baseSeconds": found.backoff.base_seconds,
            "capSeconds": found.backoff.cap_seconds,
        },
    }


def _refuse(refusal: CodedError, as_json: bool) -> NoReturn:
    if as_json:
        _print_json(_refusal_json(refusal))
        sys.exit(REFUSED)
    _fail(REFUSED, *_sentences(refusal))


def _sentences(refusal: CodedError) -> list[str]:
    """Return the messages of a refusal."""
    violations: Sequence[Violation] = getattr(refusal, "violations", ())
    if not violations:
        return [str(refusal)]
    return [f"{each.path or 'payload'}: {each.message}" for each in violations]


def _refusal_json(refusal: CodedError) -> dict[str, Any]:
    # `violations` is there for every refusal, so that a program can read it without a test.
    content = {"code": refusal.code, "message": str(refusal), "violations": []}
    return content | refusal.details()


def _print_json(content: Any, *, lines: bool = False) -> None:
    sys.stdout.write(json.dumps(content, indent=None if lines else 2, ensure_ascii=False) + "\n")


def _fail(code: int, *sentences: str) -> NoReturn:
    for sentence in sentences:
        err.print(sentence, markup=False)
    sys.exit(code)


def _fail_unexpectedly(error: Exception) -> NoReturn:
    import structlog

    from job_registry_api.logs import configure_logs, log_unexpected

    # structlog's default prints the values of local variables, such as a database password.
    if not structlog.is_configured():
        configure_logs("warning", "auto")
    error_id = log_unexpected("cli", error)
    _fail(REFUSED, f"Something went wrong here. It is logged as {error_id}.")


if __name__ == "__main__":
    main()
