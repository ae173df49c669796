"""`job-registry schema`: the GraphQL schema, for clients that generate code from it."""

from __future__ import annotations

import sys

from job_registry_api.cli import startup


def schema() -> None:
    """Print the GraphQL schema of the job types in JOBS_CATALOG, with its documentation."""
    registry = startup.read_registry(startup.read_settings())
    from job_registry_api.graphql.schema import sdl

    sys.stdout.write(sdl(registry))
