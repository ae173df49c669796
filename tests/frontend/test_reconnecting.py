"""A client of graphql-ws, npm's reference client, over a restart of its server."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.forks import Command
from tests.frontend.test_frontend import HERE, pytestmark  # noqa: F401

PAYOUT = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}


@asynccontextmanager
async def serving_at(port: int, database: Path) -> AsyncIterator[None]:
    given = {"JOBS_DATABASE_URL": f"sqlite:///{database}", "JOBS_LOG_LEVEL": "error"}
    command = ["serve", "--no-worker", "--port", str(port)]
    process = Command(command, environment={**os.environ, **given})
    assert process.stderr is not None
    await asyncio.to_thread(process.stderr.readline)
    try:
        yield
    finally:
        process.terminate()
        await asyncio.to_thread(process.communicate, 15)


async def enqueue(port: int) -> str:
    async with httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{port}/jobs", json=PAYOUT)
    return str(response.json()["jobId"])


async def test_a_client_subscribes_again_by_itself_when_its_server_restarts(
    sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"ws://127.0.0.1:{port}/graphql"
    async with serving_at(port, tmp_path / "jobs.db"):
        follower = await asyncio.create_subprocess_exec(
            "node", "follow.mjs", url, cwd=HERE, stdout=asyncio.subprocess.PIPE
        )
        assert follower.stdout is not None

        async def line() -> str:
            assert follower.stdout is not None
            read = await asyncio.wait_for(follower.stdout.readline(), 60)
            return read.decode().strip()

        try:
            assert await line() == "connected"
            await asyncio.sleep(1)
            first = await enqueue(port)
            assert await line() == f"job.created {first}"
        except BaseException:
            follower.kill()
            raise
    try:
        # The server has stopped: the subscription has neither failed nor completed.
        assert await line() == "closed 1001"
        async with serving_at(port, tmp_path / "jobs.db"):
            while (said := await line()) != "connected":
                assert said.startswith("closed"), said
            await asyncio.sleep(1)
            second = await enqueue(port)
            assert await line() == f"job.created {second}"
    finally:
        follower.kill()
        await follower.wait()
