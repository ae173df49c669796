"""The baseline: a Starlette route that reads and answers JSON, served as the product is.

    python -m benchmarks.bare PORT [DATABASE_URL]

With a database it has two more routes, which also execute an `enqueueJob`: `/executed` in the same
way as the product, on a prepared document, and `/strawberry` by Strawberry's `schema.execute`. The
difference to `/bare` is the cost of the execution alone.
"""

from __future__ import annotations

import sys

# Python looks in the script's folder first, where graphql.py hides the library of that name.
sys.path.append(sys.path.pop(0))

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route


async def echo(request: Request) -> JSONResponse:
    content = await request.json()
    return JSONResponse({"data": {"id": "01a20b59-007a-7389-bb53-785ecafc486c", "of": content}})


async def alive(_request: Request) -> JSONResponse:
    return JSONResponse({})


def application(database_url: str | None) -> Starlette:
    routes: list[BaseRoute] = [Route("/bare", echo, methods=["POST"]), Route("/healthz", alive)]
    if database_url is None:
        return Starlette(routes=routes)

    from job_registry.discovery import load_registry
    from job_registry_api.auth import ANYONE
    from job_registry_api.cli import startup
    from job_registry_api.graphql.admission import Admission
    from job_registry_api.graphql.context import Context
    from job_registry_api.graphql.document_limits import Limits
    from job_registry_api.graphql.execution import Executor
    from job_registry_api.graphql.schema import build_schema
    from job_registry_api.logs import configure_logs
    from job_registry_api.queue.queue import JobQueue

    configure_logs("info", "json")
    registry = load_registry(["job_registry.catalog"])
    schema = build_schema(registry)
    executor = Executor(Admission(registry), Limits())
    queues: list[JobQueue] = []

    async def executed(request: Request) -> JSONResponse:
        content = await request.json()
        prepared = executor.prepare(content, ANYONE)
        context = Context(queues[0], ANYONE)
        result = await executor.execute(prepared, content["variables"], context)
        return JSONResponse({"data": result.data, **_errors(result)})

    async def by_strawberry(request: Request) -> JSONResponse:
        content = await request.json()
        result = await schema.execute(
            content["query"],
            variable_values=content["variables"],
            context_value=Context(queues[0], ANYONE),
        )
        return JSONResponse({"data": result.data, **_errors(result)})

    def _errors(result: Any) -> dict[str, Any]:
        return {"errors": [str(error) for error in result.errors]} if result.errors else {}

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with JobQueue.from_url(database_url, registry, lease_seconds=30) as queue:
            queues.append(queue)
            startup.collect_garbage_rarely()
            startup.exclude_start_from_collection()
            yield

    routes += [
        Route("/executed", executed, methods=["POST"]),
        Route("/strawberry", by_strawberry, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


if __name__ == "__main__":
    app = application(sys.argv[2] if len(sys.argv) > 2 else None)
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="critical")
