"""Fixtures: the application on a fresh database, over ASGI without a socket."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from job_registry import JobRegistry
from job_registry_api.app import create_app
from job_registry_api.queue.queue import JobQueue
from job_registry_api.settings import load_settings
from tests.forks import CLI, Command


class ApplicationClient(httpx.AsyncClient):
    """An HTTP client of an application in this process."""

    def __init__(self, application: Starlette) -> None:
        transport = httpx.ASGITransport(application)
        super().__init__(transport=transport, base_url="http://localhost")
        self.application = application


def application_of(client: httpx.AsyncClient) -> Starlette:
    """Return the application of a client that `visit` opened."""
    assert isinstance(client, ApplicationClient)
    return client.application


def queue_of(client: httpx.AsyncClient) -> JobQueue:
    """Return the queue of a client that `visit` opened."""
    queue = application_of(client).state.queue
    assert isinstance(queue, JobQueue)
    return queue


Execute = Callable[..., Any]
Visit = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
async def http(visit: Visit) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the application."""
    async with visit(max_body_bytes="3000000") as client:
        yield client


@pytest.fixture
def visit(database_url: str, registry: JobRegistry) -> Visit:
    """Opens a client of an application with these `JOBS_` settings."""

    @asynccontextmanager
    async def opened(**settings: str) -> AsyncIterator[httpx.AsyncClient]:
        given = {"JOBS_DATABASE_URL": database_url}
        given |= {f"JOBS_{name.upper()}": value for name, value in settings.items()}
        application = create_app(load_settings(given), registry, prepare=False)
        async with (
            application.router.lifespan_context(application),
            ApplicationClient(application) as client,
        ):
            yield client

    return opened


@pytest.fixture
def execute(http: httpx.AsyncClient) -> Execute:
    """Runs a document, expects no errors, and gives its data."""

    async def run(query: str, **variables: object) -> dict[str, Any]:
        response = await http.post("/graphql", json={"query": query, "variables": variables})
        content = response.json()
        assert "errors" not in content, content
        data: dict[str, Any] = content["data"]
        return data

    return run


@asynccontextmanager
async def serving(
    database_url: str, *options: str, module: str = CLI, **settings: str
) -> AsyncIterator[tuple[str, int]]:
    """The host and port, and the process id, of a `job-registry serve` of the test's own.

    `module` is the program, which takes the same arguments.
    """
    given = {f"JOBS_{name.upper()}": value for name, value in settings.items()}
    environment = {**os.environ, "JOBS_DATABASE_URL": database_url, "JOBS_LOG_LEVEL": "error"}
    arguments = ["serve", "--port", "0", *options]
    process = Command(arguments, environment=environment | given, module=module)
    assert process.stderr is not None
    banner = await asyncio.to_thread(process.stderr.readline)
    try:
        yield banner.split("http://")[1].split("/graphql")[0], process.pid
    finally:
        process.terminate()
        # Subscriptions and waits that are open do not hold the end up.
        await asyncio.to_thread(process.communicate, 15)


@asynccontextmanager
async def served(process: Command | subprocess.Popen[str]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the program that this process of uvicorn serves. It ends with the client."""
    assert process.stderr is not None
    said = ""
    try:
        while not (found := re.search(r"running on (http://\S+)", said)):
            line = await asyncio.to_thread(process.stderr.readline)
            assert line, said
            said += line
        async with httpx.AsyncClient(base_url=found[1], timeout=30) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        if not process.stderr.closed:
            _, rest = await asyncio.to_thread(process.communicate, timeout=30)
            said += rest
    assert "Traceback" not in said
