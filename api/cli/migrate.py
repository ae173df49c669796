"""`job-registry migrate`: the database schema, its check, and the grants of a role."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job_registry_api.cli import startup
from job_registry_api.cli.output import (
    REFUSED,
    WRONG_USAGE,
    AsJson,
    err,
    fail,
    out,
    print_json,
    say,
)

if TYPE_CHECKING:
    from job_registry_api.queue.migrations import Fit, Migrated


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
        fail(WRONG_USAGE, "Use --check or --grants, not both.")
    settings = startup.read_settings()
    from job_registry_api.queue import migrations

    url = settings.database_url
    where: Any = {"pooler": settings.database_pooler, "schema": settings.database_schema}
    if grants is not None:
        with startup.database_errors():
            _print_grants(migrations.grants(url, grants, **where), as_json)
    elif check:
        with startup.database_errors():
            fit = migrations.examine(
                url,
                timeout_seconds=settings.database_timeout_seconds,
                read_only=True,
                **where,
            )
        _print_fit(fit, as_json)
        if not fit.fits:
            sys.exit(REFUSED)
    else:
        with startup.database_errors():
            _print_migrated(migrations.upgrade(url, **where), as_json)


def _print_migrated(migrated: Migrated, as_json: bool) -> None:
    if as_json:
        steps = [{"revision": step.revision, "title": step.title} for step in migrated.steps]
        print_json({"from": migrated.before, "to": migrated.after, "steps": steps})
    elif not migrated.steps:
        say(f"Nothing to do: the database schema is at revision {migrated.after}.")
    else:
        for step in migrated.steps:
            say(f"{step.revision}  {step.title}")
        before = migrated.before or "an empty database"
        say(f"Migrated from {before} to revision {migrated.after}.")


def _print_fit(fit: Fit, as_json: bool) -> None:
    if not as_json:
        say(fit.sentence, out if fit.fits else err)
        return
    print_json(
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
        print_json({"statements": list(statements)})
    elif not statements:
        say("SQLite has no roles: everyone who may write to the file may use the queue.", err)
    else:
        for statement in statements:
            say(statement)
