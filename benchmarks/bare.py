"""The baseline: a Starlette route that reads and answers JSON, served as the product is.

    python -m benchmarks.bare PORT [DATABASE_URL]

With a database it has three more routes. `/inserted` inserts one row per request by the driver
alone, each with its own commit. Two execute an `enqueueJob`: `/executed` in the same way as the
product, on a prepared document, and `/strawberry` by Strawberry's `schema.execute`. The difference
to `/bare` is the cost of the execution alone.
"""

from __future__ import annotations

import sys

# Python looks in the script's folder first, where graphql.py hides the library of that name.
sys.path.append(sys.path.pop(0))

import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

TABLE = "CREATE TABLE IF NOT EXISTS bare"


async def echo(request: Request) -> JSONResponse:
    content = await request.json()
    return JSONResponse({"data": {"id": "01a20b59-007a-7389-bb53-785ecafc486c", "of": content}})


async def alive(_request: Request) -> JSONResponse:
    return JSONResponse({})


@asynccontextmanager
async def inserting(database_url: str) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Yield a function that inserts one row and commits."""
    if database_url.startswith("sqlite"):
        import aiosqlite

        path = database_url.removeprefix("sqlite:///") + ".bare"
        async with aiosqlite.connect(path, isolation_level=None) as connection:
            for pragma in ("journal_mode = WAL", "synchronous = FULL"):
                await connection.execute(f"PRAGMA {pragma}")
            await connection.execute(f"{TABLE} (id TEXT PRIMARY KEY, payload TEXT)")

            async def insert(payload: str) -> None:
                values = (str(uuid.uuid4()), payload)
                await connection.execute("INSERT INTO bare VALUES (?, ?)", values)

            yield insert
        return
    import asyncpg

    async with asyncpg.create_pool(database_url, min_size=10, max_size=10) as pool:
        await pool.execute(f"{TABLE} (id uuid PRIMARY KEY, payload jsonb)")

        async def insert_there(payload: str) -> None:
            await pool.execute("INSERT INTO bare VALUES ($1, $2)", uuid.uuid4(), payload)

        yield insert_there


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

    insert: list[Callable[[str], Awaitable[None]]] = []

    async def inserted(request: Request) -> JSONResponse:
        content = await request.json()
        job = content["variables"]["input"]
        await insert[0](json.dumps(job["payload"]))
        return JSONResponse({"data": {"id": "01a20b59-007a-7389-bb53-785ecafc486c"}})

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with (
            JobQueue.from_url(database_url, registry, lease_seconds=30) as queue,
            inserting(database_url) as insert_row,
        ):
            queues.append(queue)
            insert.append(insert_row)
            startup.collect_garbage_rarely()
            startup.exclude_start_from_collection()
            yield

    routes += [
        Route("/inserted", inserted, methods=["POST"]),
        Route("/executed", executed, methods=["POST"]),
        Route("/strawberry", by_strawberry, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


if __name__ == "__main__":
    app = application(sys.argv[2] if len(sys.argv) > 2 else None)
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="critical")
