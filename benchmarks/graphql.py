"""What stands around the execution of an `enqueueJob` costs: HTTP, authentication, guards.

    python benchmarks/graphql.py [--seconds 2] [--rounds 3]

CPU time per request, 32 at once, SQLite, in one run whose measurements take turns: the bare
Starlette route; the execution alone (the same operation on a prepared document, and Strawberry's
`schema.execute`), without HTTP; and the whole server, open, with an HS256 and with an ES256 token,
with a rate limit and CORS. "Above" is what the server takes on top of the execution alone; it is to
be no more than the bare route twice over. What was found is in benchmarks/README.md.
"""

from __future__ import annotations

import sys

# Python looks beside the script first, and this one has the name of a library.
sys.path.append(sys.path.pop(0))

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import mean
from typing import Any

import jwt
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec
from enqueue import JOB, MUTATION, free_port
from load import HERE, load, post, server

from api.auth import ANYONE
from api.cli import _collect_garbage_rarely
from api.graphql.context import Context
from api.graphql.operations import Limits, Operations
from api.graphql.schema import build_schema, strawberry_schema
from api.logs import configure_logs
from api.queue import migrations
from api.queue.service import JobService, open_service
from registry.discovery import load_registry

AT_ONCE = 32
SECRET = "a secret of more than thirty-two bytes"
CLAIMS = {"iss": "issuer", "aud": "jobs", "sub": "ada", "scope": "jobs:enqueue", "exp": 2**33}
AUTH = {"JOBS_AUTH_ISSUER": "issuer", "JOBS_AUTH_AUDIENCE": "jobs"}
AROUND = {"JOBS_RATE_LIMIT": "1000000000/minute", "JOBS_CORS_ORIGINS": "https://app.example.com"}


async def served(
    command: list[str], port: int, environment: dict[str, str], request: bytes, seconds: float
) -> float:
    """Milliseconds of the server's CPU time per request."""
    with server(command, port, environment) as process:
        measured = await load(process, port, request, connections=AT_ONCE, seconds=seconds)
    return measured.server_ms_per_request


async def bare_route(seconds: float) -> float:
    port = free_port()
    request = post("/bare", {"query": MUTATION, "variables": {"input": JOB}})
    return await served([str(HERE / "bare.py"), str(port)], port, {}, request, seconds)


async def whole(database_url: str, settings: dict[str, str], token: str, seconds: float) -> float:
    port = free_port()
    request = post("/graphql", {"query": MUTATION, "variables": {"input": JOB}})
    if token:
        origin = b"\r\norigin: https://app.example.com\r\nauthorization: Bearer "
        request = request.replace(b"\r\nhost:", origin + token.encode() + b"\r\nhost:", 1)
    command = ["-m", "api.cli", "serve", "--no-worker", "--port", str(port)]
    environment = {"JOBS_DATABASE_URL": database_url, "JOBS_LOG_LEVEL": "info"} | settings
    return await served(command, port, environment, request, seconds)


async def executed(
    database_url: str, execute: Callable[[JobService], Awaitable[Any]], seconds: float
) -> float:
    """Milliseconds of this process's CPU time per execution, without HTTP."""
    registry = load_registry(["registry.catalog"])
    async with open_service(registry, database_url, lease_seconds=30) as service:
        count = 0

        async def one_after_another(until: float) -> None:
            nonlocal count
            while time.monotonic() < until:
                result = await execute(service)
                assert result.errors is None, result.errors
                count += 1

        async def all_of_them(until: float) -> None:
            await asyncio.gather(*(one_after_another(until) for _ in range(AT_ONCE)))

        await all_of_them(time.monotonic() + 0.3)
        count, before = 0, time.process_time()
        await all_of_them(time.monotonic() + seconds)
        return (time.process_time() - before) / count * 1_000


async def run(seconds: float, rounds: int, folder: Path) -> None:
    url = f"sqlite:///{folder / 'jobs.db'}"
    operations = Operations(build_schema(load_registry(["registry.catalog"])), Limits())
    prepared = operations.prepare(MUTATION, None)
    schema = strawberry_schema()
    variables = {"input": JOB}

    def by_operations(service: JobService) -> Awaitable[Any]:
        return operations.execute(prepared, variables, Context(service, ANYONE))

    def by_strawberry(service: JobService) -> Awaitable[Any]:
        context = Context(service, ANYONE)
        return schema.execute(MUTATION, variable_values=variables, context_value=context)

    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.get_algorithm_by_name("ES256").to_jwk(key.public_key()))
    (folder / "keys.json").write_text(json.dumps({"keys": [public | {"kid": "1"}]}))
    by_secret = AUTH | AROUND | {"JOBS_AUTH_HS256_SECRET": SECRET}
    by_key = AUTH | AROUND | {"JOBS_AUTH_JWKS": str(folder / "keys.json")}
    secret_token = jwt.encode(CLAIMS, SECRET, "HS256")
    key_token = jwt.encode(CLAIMS, key, "ES256", headers={"kid": "1"})

    measurements: dict[str, Callable[[], Awaitable[float]]] = {
        "bare route": lambda: bare_route(seconds),
        "execution alone": lambda: executed(url, by_operations, seconds),
        "Strawberry's schema.execute alone": lambda: executed(url, by_strawberry, seconds),
        "server, open": lambda: whole(url, {}, "", seconds),
        "server, HS256, rate limit, CORS": lambda: whole(url, by_secret, secret_token, seconds),
        "server, ES256, rate limit, CORS": lambda: whole(url, by_key, key_token, seconds),
    }
    found: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            found[name].append(await measure())
    bare, alone = mean(found["bare route"]), mean(found["execution alone"])
    print(f"{'':<36}{'CPU':>10}{'of bare':>10}{'above':>12}{'of bare':>10}")
    for name, values in found.items():
        line = f"{name:<36}{mean(values):>7.3f} ms{mean(values) / bare:>10.2f}"
        if name.startswith("server"):
            line += f"{mean(values) - alone:>9.3f} ms{(mean(values) - alone) / bare:>10.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each takes")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    with Path(os.devnull).open("w") as nowhere:
        configure_logs("info", "json", nowhere)
        try:
            migrations.upgrade(f"sqlite:///{folder / 'jobs.db'}")
            _collect_garbage_rarely()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(run(arguments.seconds, arguments.rounds, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
