"""`job-registry schema`: the GraphQL schema, for clients that generate code from it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from job_registry_api.cli import startup
from job_registry_api.cli.output import print_json


def schema(
    openapi: Annotated[
        bool, typer.Option("--openapi", help="Print the OpenAPI description of REST instead.")
    ] = False,
    federation: Annotated[
        bool,
        typer.Option("--federation", help="Print the schema as a subgraph of Apollo Federation."),
    ] = False,
) -> None:
    """Print the GraphQL schema of the job types in JOBS_CATALOG, with its documentation."""
    if openapi and federation:
        raise typer.BadParameter("--openapi and --federation exclude each other.")
    settings = startup.read_settings()
    registry = startup.read_registry(settings)
    if openapi:
        from job_registry_api.openapi import describe

        described = describe(
            registry.values(),
            settings.root_path,
            uploads=settings.max_upload_bytes > 0,
            max_page_size=settings.max_page_size,
            max_bulk_size=settings.max_bulk_size,
        )
        print_json(described)
        return
    from job_registry_api.graphql.schema import sdl, subgraph_sdl

    sys.stdout.write(subgraph_sdl(registry) if federation else sdl(registry))
