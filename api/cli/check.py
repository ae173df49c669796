"""`job-registry check`: what the code breaks for stored jobs, older workers and older clients."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from job_registry import JobRegistry, JobTypeNotFound
from job_registry_api.cli import startup
from job_registry_api.cli.lock_file import read_file
from job_registry_api.cli.output import REFUSED, WRONG_USAGE, AsJson, err, fail, print_json, say
from job_registry_api.defaults import LOCK_FILE

if TYPE_CHECKING:
    from job_registry.lock import Lock
    from job_registry_api.cli.remote import ServerTypes
    from job_registry_api.cli.report import Compared
    from job_registry_api.graphql.schema_changes import ClientChange
    from job_registry_api.queue.replaying import OnPage, Replay
    from job_registry_api.settings import Settings


def check(
    lock: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help=f"Compare with this lock. Defaults to {LOCK_FILE}, which may be missing only with"
            " --against or --database.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Compare with the server at this URL."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            envvar="JOB_REGISTRY_TOKEN",
            show_envvar=True,
            help="The bearer token for --against. It needs the scope jobs:read.",
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Read every unfinished job of this database with the job types of your code. A"
            " role that may only SELECT is enough.",
        ),
    ] = None,
    clients: Annotated[
        bool, typer.Option("--clients", help="Compare the GraphQL schema with that of the lock.")
    ] = False,
    print_as_json: AsJson = False,
    github: Annotated[
        bool,
        typer.Option(
            "--github",
            help="Also print annotations for GitHub Actions to standard error. The default if"
            " GITHUB_ACTIONS is true.",
        ),
    ] = False,
) -> None:
    """Show what your code breaks for stored jobs, older workers and older clients.

    Exit codes: 0 nothing breaks, 1 something breaks or may break, 2 it could not be checked: wrong
    usage, no lock, or a server or a database that does not answer.
    """
    settings = startup.read_settings(database_url=database)
    registry = startup.read_registry(settings)
    from job_registry_api.cli import report

    locked = _read_lock(lock, is_needed=clients or (against is None and database is None))
    server = None if against is None else _read_server(against, token)
    replay = None if database is None else _replay(settings, registry)

    running = dict(replay.running) if replay else {}
    compared = []
    if locked is not None:
        compared.append(_compare(lock or LOCK_FILE, locked, registry, replay, running, clients))
    if against is not None and server is not None:
        running = running or dict(server.running)
        compared.append(_compare(against, server.lock, registry, replay, running, False))
    queue = None if replay is None else report.Queue(replay, _limits(registry))
    breaks = any(each.breaks for each in compared) or bool(replay and not replay.reads_all)

    if print_as_json:
        print_json(report.as_json(compared, queue, breaks))
    else:
        for each in compared:
            for line in report.lines_of(each):
                say(line)
        for line in report.lines_of_queue(queue) if queue else ():
            say(line)
    if github or os.environ.get("GITHUB_ACTIONS") == "true":
        for line in report.github_annotations(compared, queue):
            say(line, err)
    if breaks:
        sys.exit(REFUSED)


def _read_lock(name: str | None, *, is_needed: bool) -> Lock | None:
    path = Path(name or LOCK_FILE)
    try:
        return read_file(path)
    except FileNotFoundError:
        if name is None and not is_needed:
            return None
        fail(
            WRONG_USAGE,
            f"There is no lock {path}. Write it with `job-registry lock` and commit it.",
        )


def _read_server(url: str, token: str | None) -> ServerTypes:
    from job_registry_api.cli.remote import ServerFailed, read_server

    try:
        return read_server(url, token)
    except ServerFailed as failed:
        fail(WRONG_USAGE, str(failed))


def _replay(settings: Settings, registry: JobRegistry) -> Replay:
    from job_registry_api.queue import migrations
    from job_registry_api.queue.errors import QueueUnavailable
    from job_registry_api.queue.migrations import MigrationRefused, Verdict
    from job_registry_api.queue.replaying import replay

    url, pooler, schema = settings.database_url, settings.database_pooler, settings.database_schema
    seconds = settings.database_timeout_seconds
    try:
        fit = migrations.examine(
            url, pooler=pooler, schema=schema, timeout_seconds=seconds, read_only=True
        )
        if fit.verdict in (Verdict.EMPTY, Verdict.TOO_NEW):
            fail(WRONG_USAGE, fit.sentence)
        if fit.verdict is Verdict.OUTDATED:
            # The check runs before the deploy that migrates. What it reads is in every revision.
            say(fit.sentence, err)
        with _progress() as on_page:
            return replay(
                url, registry, pooler=pooler, schema=schema, timeout_seconds=seconds,
                on_page=on_page,
            )  # fmt: skip
    except MigrationRefused as refused:
        fail(WRONG_USAGE, str(refused))
    except QueueUnavailable as error:
        fail(WRONG_USAGE, f"The database is not available: {error.reason}")


@contextmanager
def _progress() -> Iterator[OnPage]:
    """Show a progress bar on a terminal."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    progress = Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with progress:
        bar = progress.add_task("check", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _compare(
    name: str,
    released: Lock,
    registry: JobRegistry,
    replay: Replay | None,
    running: Mapping[str, int],
    clients: bool,
) -> Compared:
    from job_registry.evolution import changes_between, settled_by_queue
    from job_registry.lock import released_types
    from job_registry_api.cli.report import Compared

    changes = changes_between(released.job_types, released_types(registry.values()), running)
    if replay is not None:
        changes = settled_by_queue(changes, _read_whole(registry, replay))
    return Compared(name, changes, _client_changes(name, released, registry) if clients else ())


def _read_whole(registry: JobRegistry, replay: Replay) -> Mapping[str, int]:
    """Return the number of unfinished jobs, for the types of which every payload can be read."""
    jobs, refused = Counter[str](), Counter[str]()
    for name, count in replay.jobs.items():
        try:
            current = registry.get_type(name).name
        except JobTypeNotFound:
            continue
        jobs[current] += count
        refused[current] += replay.refused[name]
    return {name: jobs[name] for name in registry if not refused[name]}


def _client_changes(name: str, released: Lock, registry: JobRegistry) -> tuple[ClientChange, ...]:
    from job_registry_api.graphql.schema import bare_sdl
    from job_registry_api.graphql.schema_changes import client_changes

    if not released.graphql:
        fail(WRONG_USAGE, f"{name} has no GraphQL schema. Write it with `job-registry lock`.")
    try:
        return client_changes(released.graphql, bare_sdl(registry))
    except ValueError as error:
        fail(WRONG_USAGE, f"The GraphQL schema of {name} cannot be read. {error}")


def _limits(registry: JobRegistry) -> dict[str, int]:
    return {
        name: job_type.policy.concurrency_limit
        for name, job_type in registry.items()
        if job_type.policy.concurrency_limit is not None
    }
