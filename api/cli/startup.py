"""What a command prepares before it runs: settings, job types, logs and the database."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from job_registry import JobRegistry
from job_registry.asset_place import anchored
from job_registry.discovery import load_registry
from job_registry_api.cli.output import REFUSED, Output, fail
from job_registry_api.settings import Settings, SettingsInvalid, load_settings
from job_registry_api.tracing_settings import configured_tracing

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

RELOAD: Final = typer.Option(
    "--reload", help="Restart when a Python file changes. For development."
)
"""The option of the commands that run jobs."""

CHANNEL: Final = typer.Option(
    "--channel", hidden=True, help="The descriptor of the channel to `serve --processes`."
)
"""The option with which `serve --processes` starts its processes."""


_OPTIONS: Final = {
    "host": "--host",
    "port": "--port",
    "worker_concurrency": "--concurrency",
    "serve_processes": "--processes",
    "database_url": "--database",
}
"""The options that override settings."""


def leave_output_to_handlers() -> None:
    """Let handlers and modules of job types print: see `Output.leave_to_handlers`."""
    output: object = sys.stdout
    if isinstance(output, Output):
        output.leave_to_handlers()


def read_settings(*, log_events: bool = False, **overrides: Any) -> Settings:
    """Read the settings, and configure the logs before anything else can fail or write lines.

    An option of the command that is given overrides its variable. Without `log_events`, as in a
    command whose output is for people, only warnings and errors are logged.
    """
    from job_registry_api import logs

    given = {name: value for name, value in overrides.items() if value is not None}
    environment = {**os.environ, **{f"JOBS_{n.upper()}": str(v) for n, v in given.items()}}
    settings = load_settings(environment, options={name: _OPTIONS[name] for name in given})
    quiet = not log_events and settings.log_level in ("debug", "info")
    logs.configure_logs("warning" if quiet else settings.log_level, settings.log_format)
    return settings


def read_registry(settings: Settings) -> JobRegistry:
    """Load the job types of `JOBS_CATALOG`."""
    # Find modules in the current folder, as `python -m` does.
    if "" not in sys.path:
        sys.path.insert(0, "")
    return load_registry(settings.catalog, max_payload_bytes=settings.max_payload_bytes)


def check_assets(assets: str) -> None:
    """Check that the assets can be a folder or a bucket, without the network.

    Raises:
        SettingsInvalid: they cannot.
    """
    scheme, is_url, _ = assets.partition("://")
    fault = _fault_of_scheme(scheme) if is_url else _fault_of_folder(assets)
    if fault is not None:
        # A URL may have a password.
        shown = f"{scheme}://..." if is_url else assets
        raise SettingsInvalid([f"JOBS_ASSETS={shown}: {fault}."])


def _fault_of_scheme(scheme: str) -> str | None:
    from fsspec.registry import known_implementations, registry

    scheme = scheme.partition("::")[0]  # As in simplecache::s3://bucket/assets.
    if scheme in registry:
        return None
    if scheme not in known_implementations:
        return "expected a folder, or the URL of a bucket, such as s3://bucket/assets"
    # To import a client takes seconds.
    client = known_implementations[scheme]
    package = client["class"].partition(".")[0]
    is_installed = importlib.util.find_spec(package) is not None
    return None if is_installed else client.get("err", f"install {package}")


def _fault_of_folder(folder: str) -> str | None:
    try:
        os.scandir(anchored(folder)).close()
    except FileNotFoundError:
        return None  # The first upload creates it.
    except OSError as error:
        return error.strerror
    return None


def read_tracing() -> Tracing | None:
    """Set up tracing, if variables of OpenTelemetry configure it.

    Call it once the job types are loaded: their modules may have set a provider of their own.

    Raises:
        SettingsInvalid: a variable is wrong, or the packages for tracing are not installed.
    """
    return configured_tracing(os.environ)


@contextlib.contextmanager
def traced_command(name: str) -> Iterator[Tracing | None]:
    """Trace this run of a command that ends by itself, if variables configure tracing.

    It joins the trace of `TRACEPARENT` in the environment. Tracing that cannot be configured is
    logged and does not stop the command: the variables may be meant for other programs.
    """
    try:
        # Standard output is the command's.
        tracing = configured_tracing(os.environ, console=sys.stderr)
    except SettingsInvalid as invalid:
        import structlog

        structlog.get_logger("job_registry.tracing").warning(
            "tracing.not_configured", reason=str(invalid)
        )
        tracing = None
    if tracing is None:
        yield None
        return
    try:
        with tracing.running(f"job-registry {name}", os.environ):
            yield tracing
    finally:
        tracing.close()


def prepare_database(settings: Settings, *, only_check: bool = False) -> None:
    """Migrate an SQLite database. Check that a PostgreSQL database is migrated.

    With `only_check`, SQLite is only checked too: a command that reads or repairs may be run in the
    wrong folder, or by a newer version than that of the running processes.
    """
    from job_registry_api.queue import migrations
    from job_registry_api.queue.databases import file_of

    with database_errors():
        migrations.prepare(
            settings.database_url,
            pooler=settings.database_pooler,
            schema=settings.database_schema,
            timeout_seconds=settings.database_timeout_seconds,
            only_check=only_check,
        )
    if (file := file_of(settings.database_url)) is not None:
        _warn_of_other_readers(file)


def _warn_of_other_readers(file: Path) -> None:
    """Log it if every user of this machine can read or write the database."""
    import structlog

    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & stat.S_IRWXO:
        structlog.get_logger("job_registry.cli").warning(
            "database.open_to_all_users",
            file=str(file),
            mode=f"{mode:04o}",
            advice=f"It holds the payloads of jobs. Run: chmod 600 {file}*",
        )


@contextlib.contextmanager
def database_errors() -> Iterator[None]:
    """End the command with one sentence if the database is unavailable or cannot be migrated."""
    from job_registry_api.queue.errors import QueueUnavailable
    from job_registry_api.queue.migrations import MigrationRefused

    try:
        yield
    except MigrationRefused as refused:
        fail(REFUSED, str(refused))
    except QueueUnavailable as error:
        fail(REFUSED, f"The database is not available: {error.reason}")


def collect_garbage_rarely() -> None:
    """Run the garbage collector rarely, from before the imports on.

    The modules and the schema are 150,000 objects that stay. Visiting them again and again took a
    tenth of the CPU time of a start (measured).
    """
    gc.set_threshold(50_000, 20, 50)
    # Python collects garbage again when it ends, which took a fifth of the CPU time of `types`.
    atexit.register(gc.freeze)


def exclude_start_from_collection() -> None:
    """Exclude what the start has created from garbage collection. Next to nothing of it is garbage.

    Visiting it took a third of the time of an enqueue (measured, see benchmarks/README.md).
    """
    gc.freeze()
