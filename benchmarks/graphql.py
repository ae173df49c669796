"""Measures the cost of an `enqueueJob` outside its execution: HTTP, authentication, limits.

    python -m benchmarks.graphql [--seconds 2] [--rounds 3]

Prints the server's CPU time per request with 32 connections on SQLite. The measurements take turns
in one run. The cost of an execution alone is that of a bare Starlette route that executes, minus
that of the bare route that does not: once as the product executes, once by Strawberry's
`schema.execute`. The server of the product is measured without authentication, and with tokens, a
rate limit and CORS. "Above" is its cost without the execution, which should be at most twice that
of the bare route. benchmarks/README.md has the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks in the script's folder first, where this file hides the library of its name. The
# benchmarks import each other from the checkout.
sys.path[0] = str(Path(__file__).parent.parent)

import argparse
import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from statistics import mean

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.enqueue import JOB, MUTATION
from benchmarks.load import load, post, server
from job_registry_api.queue import migrations
from tests.postgresql_server import free_port

CONNECTIONS = 32
SECRET = "a secret of more than thirty-two bytes"
CLAIMS = {"iss": "issuer", "aud": "jobs", "sub": "ada", "scope": "jobs:enqueue", "exp": 2**33}
AUTH = {"JOBS_AUTH_ISSUER": "issuer", "JOBS_AUTH_AUDIENCE": "jobs"}
AROUND = {"JOBS_RATE_LIMIT": "1000000000/minute", "JOBS_CORS_ORIGINS": "https://app.example.com"}
CONTENT = {"query": MUTATION, "variables": {"input": JOB}}


async def measure(
    command: list[str], port: int, environment: dict[str, str], request: bytes, seconds: float
) -> float:
    """Return the server's CPU time per request in milliseconds."""
    with server(command, port, environment) as process:
        measured = await load(process, port, request, connections=CONNECTIONS, seconds=seconds)
    return measured.server_ms_per_request


async def route(path: str, database_url: str, seconds: float) -> float:
    port = free_port()
    command = ["-m", "benchmarks.bare", str(port), *([database_url] if path != "/bare" else [])]
    return await measure(command, port, {}, post(path, CONTENT), seconds)


async def product(database_url: str, settings: dict[str, str], token: str, seconds: float) -> float:
    port = free_port()
    request = post("/graphql", CONTENT)
    if token:
        more = f"\r\norigin: https://app.example.com\r\nauthorization: Bearer {token}\r\nhost:"
        request = request.replace(b"\r\nhost:", more.encode(), 1)
    command = ["-m", "job_registry_api.cli", "serve", "--no-worker", "--port", str(port)]
    environment = {"JOBS_DATABASE_URL": database_url, "JOBS_LOG_LEVEL": "info"} | settings
    return await measure(command, port, environment, request, seconds)


async def run(seconds: float, rounds: int, folder: Path) -> None:
    url = f"sqlite:///{folder / 'jobs.db'}"
    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.get_algorithm_by_name("ES256").to_jwk(key.public_key()))
    (folder / "keys.json").write_text(json.dumps({"keys": [public | {"kid": "1"}]}))
    by_secret = AUTH | {"JOBS_AUTH_HS256_SECRET": SECRET}
    by_key = AUTH | AROUND | {"JOBS_AUTH_JWKS": str(folder / "keys.json")}
    secret_token = jwt.encode(CLAIMS, SECRET, "HS256")
    key_token = jwt.encode(CLAIMS, key, "ES256", headers={"kid": "1"})

    bare, executed, strawberry = "bare route", "bare route that executes", "by schema.execute"
    measurements: dict[str, Callable[[], Awaitable[float]]] = {
        bare: lambda: route("/bare", url, seconds),
        executed: lambda: route("/executed", url, seconds),
        strawberry: lambda: route("/strawberry", url, seconds),
        "server, open": lambda: product(url, {}, "", seconds),
        "server, HS256": lambda: product(url, by_secret, secret_token, seconds),
        "server, ES256, rate limit, CORS": lambda: product(url, by_key, key_token, seconds),
    }
    found: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measurement in measurements.items():
            found[name].append(await measurement())
    cost = {name: mean(values) for name, values in found.items()}
    alone = cost[executed] - cost[bare]
    print(f"{'':<34}{'CPU':>10}{'of bare':>10}{'above':>12}{'of bare':>10}")
    for name, value in cost.items():
        line = f"{name:<34}{value:>7.3f} ms{value / cost[bare]:>10.2f}"
        if name.startswith("server"):
            line += f"{value - alone:>9.3f} ms{(value - alone) / cost[bare]:>10.2f}"
        print(line)
    by_strawberry = cost[strawberry] - cost[bare]
    print(
        f"execution alone: {alone:.3f} ms; by Strawberry's schema.execute: {by_strawberry:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is measured")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    try:
        migrations.upgrade(f"sqlite:///{folder / 'jobs.db'}")
        asyncio.run(run(arguments.seconds, arguments.rounds, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
