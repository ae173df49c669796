"""The commands of `job-registry` together, and what their errors become.

The files of the commands are imported at each start. What only one command needs, such as the
database or GraphQL, is imported in its function.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Annotated, Final, TextIO, cast

import typer

from job_registry import DefinitionError
from job_registry_api.cli import (
    check,
    enqueue,
    jobs,
    lock,
    migrate,
    registry,
    schema,
    serve,
    startup,
    versions,
    worker,
)
from job_registry_api.cli.output import (
    WRONG_USAGE,
    Output,
    OutputFailed,
    fail,
    fail_unexpectedly,
    fail_without_output,
    say,
)
from job_registry_api.settings import SettingsInvalid
from job_registry_api.unfailing import Unfailing

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


def run() -> None:
    """Run the command. Expected errors become a message and an exit code."""
    startup.collect_garbage_rarely()
    # Typer also writes there, for example what is wrong with the arguments.
    with contextlib.redirect_stderr(cast(TextIO, Unfailing(sys.stderr))):
        _run()


def _run() -> None:
    try:
        output = Output(sys.stdout)
        with contextlib.redirect_stdout(cast(TextIO, output)):
            try:
                app()
            finally:
                output.flush()
    except OutputFailed as failure:
        fail_without_output(failure)
    except SettingsInvalid as invalid:
        fail(WRONG_USAGE, "These settings are wrong:", *(f"  {each}" for each in invalid.faults))
    except DefinitionError as wrong:
        fail(WRONG_USAGE, f"The job types cannot be loaded: {wrong}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        fail_unexpectedly(error)


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        say(f"job-registry {version('job-registry')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "serve": serve.serve,
    "worker": worker.worker,
    "migrate": migrate.migrate,
    "types": registry.types,
    "policy": registry.policy,
    "validate": registry.validate,
    "enqueue": enqueue.enqueue,
    "list": jobs.list_jobs,
    "show": jobs.show,
    "cancel": jobs.cancel,
    "retry": jobs.retry,
    "versions": versions.versions,
    "unpark": versions.unpark,
    "lock": lock.lock,
    "check": check.check,
    "schema": schema.schema,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
