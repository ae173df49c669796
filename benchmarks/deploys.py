"""Rolls five versions of a catalog forward and back under load, and checks every guarantee.

    python -m benchmarks.deploys [--minutes 2] [--seed 1] [--database sqlite|postgresql|both]

2 servers and 3 workers share one database. Each is at first of some version. Again and again one of
them is ended and started with another version, so that old and new run side by side.
Meanwhile clients enqueue over HTTP what the version of their server admits, older forms included.

The versions are those of a payload's life: a type; a new optional field; a renamed field, with an
upgrade; a new required field, with another upgrade; and the type under a new name.

Afterwards every process is of the last version. Then every job whose enqueue was answered has to
succeed, no job may have failed, no attempt may have ended but by success or by the end of its
process, and each handler may have got only payloads of its own version, with the values that were
enqueued. Exits with 1 if one of these is false.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.crash import _postgresql
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import AttemptOutcome, JobStatus
from job_registry_api.queue.queue import JobQueue
from tests import CODE
from tests.postgresql_server import free_port

LEASE_SECONDS: Final = 5
PATIENCE_SECONDS: Final = 90.0
"""How long the last version may take to run what the others left."""

CATALOG: Final = """
import json
import os

from job_registry import JobContext, JobPolicy, JobType, Payload

LOG = os.open(os.environ["DEPLOYS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


class Mail1(Payload):
    number: int
    to: str


class Mail2(Payload):
    number: int
    to: str
    subject: str = "Hello"


class Mail3(Payload):
    number: int
    recipient: str
    subject: str = "Hello"


class Mail4(Payload):
    number: int
    recipient: str
    subject: str
    urgency: int


def run(job: JobContext, payload: Payload) -> str:
    line = {"version": VERSION, "job": job.id, "class": type(payload).__name__,
            **payload.model_dump(by_alias=True)}
    os.write(LOG, json.dumps(line).encode() + b"\\n")
    return VERSION
"""

UPGRADES: Final = """

@mail.upgrade(Mail2)
def renamed(older: Mail2) -> Mail3:
    return Mail3(number=older.number, recipient=older.to, subject=older.subject)
"""

VERSIONS: Final = {
    "mail1": 'mail = JobType(name="mail.send", payload=Mail1)\n',
    "mail2": 'mail = JobType(name="mail.send", payload=Mail2)\n',
    "mail3": 'mail = JobType(name="mail.send", payload=Mail3, accepts=[Mail2])\n' + UPGRADES,
    "mail4": 'mail = JobType(name="mail.send", payload=Mail4, accepts=[Mail2, Mail3])\n'
    + UPGRADES
    + """

@mail.upgrade(Mail3)
def completed(older: Mail3) -> Mail4:
    return Mail4(number=older.number, recipient=older.recipient, subject=older.subject, urgency=5)
""",
}
VERSIONS["mail5"] = VERSIONS["mail4"].replace(
    'name="mail.send"', 'name="mail.deliver", former_names=["mail.send"]'
)
CLASSES: Final = dict(zip(VERSIONS, ("Mail1", "Mail2", "Mail3", "Mail4", "Mail4"), strict=True))
ORDER: Final = tuple(VERSIONS)

Form = Callable[[int], dict[str, Any]]

FORMS: Final[dict[str, Form]] = {
    "Mail1": lambda number: {"to": f"user-{number}"},
    "Mail2": lambda number: {"to": f"user-{number}", "subject": f"about {number}"},
    "Mail3": lambda number: {"recipient": f"user-{number}", "subject": f"about {number}"},
    "Mail4": lambda number: {
        "recipient": f"user-{number}",
        "subject": f"about {number}",
        "urgency": number % 10,
    },
}
ADMITTED: Final = {
    "mail1": ("Mail1",),
    "mail2": ("Mail1", "Mail2"),
    "mail3": ("Mail1", "Mail2", "Mail3"),
    "mail4": ("Mail1", "Mail2", "Mail3", "Mail4"),
    "mail5": ("Mail1", "Mail2", "Mail3", "Mail4"),
}
"""The forms that each version admits: its own, and those that it accepts."""


@dataclass
class Place:
    """A server or a worker: its process, and the version that it runs."""

    name: str
    serves: bool
    port: int = field(default_factory=free_port)
    """Where it serves, or answers whether it is ready."""
    version: str = ORDER[0]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0


@dataclass
class Deploys:
    """One run of the benchmark."""

    folder: Path
    url: str
    random: random.Random
    places: list[Place] = field(default_factory=list)
    enqueued: dict[str, int] = field(default_factory=dict)
    """The number in the payload of each job, by the job's id."""
    refused: list[str] = field(default_factory=list)
    deploys: int = 0
    number: int = 0

    @property
    def log(self) -> Path:
        """What the handlers wrote, a line per run."""
        return self.folder / "handlers.jsonl"

    def start(self, place: Place, version: str) -> None:
        """Start the process of a place with a version."""
        place.version = version
        place.starts += 1
        command = (
            ["serve", "--no-worker", "--port"] if place.serves else ["worker", "--health-port"]
        )
        with (self.folder / f"{place.name}.log").open("ab") as output:
            place.process = subprocess.Popen(
                [sys.executable, "-m", "job_registry_api.cli", *command, str(place.port)],
                cwd=self.folder,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("JOBS_")},
                    "PYTHONPATH": os.pathsep.join([str(self.folder), CODE]),
                    "JOBS_DATABASE_URL": self.url,
                    "JOBS_CATALOG": version,
                    "JOBS_LEASE_SECONDS": str(LEASE_SECONDS),
                    "JOBS_LOG_LEVEL": "warning",
                    "JOBS_LOG_FORMAT": "json",
                    "JOBS_SHUTDOWN_SECONDS": "5",
                    "DEPLOYS_LOG": str(self.log),
                },
                stdout=output,
                stderr=output,
            )

    async def end(self, place: Place) -> None:
        """End the process of a place, as a deploy does."""
        assert place.process is not None
        place.process.terminate()
        code = await asyncio.to_thread(place.process.wait, 30)
        if code != 0:
            self.refused.append(f"{place.name} of {place.version} ended with {code}")

    async def roll(self, places: list[Place], until: float) -> None:
        """Deploy another version to one of these places after the other."""
        while time.monotonic() < until:
            place = self.random.choice(places)
            # Mostly to a version beside it, as deploys and rollbacks do; sometimes far.
            now = ORDER.index(place.version)
            near = [ORDER[at] for at in (now - 1, now + 1) if 0 <= at < len(ORDER)]
            version = self.random.choice(near if self.random.random() < 0.8 else ORDER)
            await self.end(place)
            self.start(place, version)
            await self.ready([place])
            self.deploys += 1
            await asyncio.sleep(self.random.uniform(0.3, 1.5))

    async def ready(self, places: list[Place]) -> None:
        """Wait until processes work."""
        async with httpx.AsyncClient(timeout=5) as client:
            for place in places:
                give_up = time.monotonic() + PATIENCE_SECONDS
                while time.monotonic() < give_up:
                    with suppress(httpx.TransportError):
                        answer = await client.get(f"http://127.0.0.1:{place.port}/readyz")
                        if answer.status_code == 200:
                            break
                    await asyncio.sleep(0.05)
                else:
                    self.refused.append(f"{place.name} of {place.version} did not come up")

    async def enqueue(self, until: float) -> None:
        """Enqueue what the version of a server admits, until the time is over."""
        async with httpx.AsyncClient(timeout=10) as client:
            while time.monotonic() < until:
                place = self.random.choice([each for each in self.places if each.serves])
                version, starts = place.version, place.starts
                form = self.random.choice(ADMITTED[version])
                self.number += 1
                number = self.number
                # Clients of the last version still use the former name now and then.
                renamed = version == "mail5" and self.random.random() < 0.5
                body = {
                    "type": "mail.deliver" if renamed else "mail.send",
                    "payload": {"number": number, **FORMS[form](number)},
                }
                try:
                    answer = await client.post(f"http://127.0.0.1:{place.port}/jobs", json=body)
                except httpx.TransportError:
                    await asyncio.sleep(0.05)  # It is being deployed.
                    continue
                if answer.status_code == 201:
                    self.enqueued[answer.json()["jobId"]] = number
                elif starts == place.starts and answer.status_code != 503:
                    self.refused.append(f"{version} refused {body}: {answer.text[:300]}")
                await asyncio.sleep(self.random.uniform(0.0, 0.02))

    async def settle(self) -> None:
        """Bring every place to the last version."""
        for place in self.places:
            await self.end(place)
            self.start(place, ORDER[-1])
        await self.ready(self.places)

    def kill(self) -> None:
        """End what is still there."""
        for place in self.places:
            if place.process is not None and place.process.poll() is None:
                place.process.terminate()
        for place in self.places:
            if place.process is not None:
                try:
                    place.process.wait(20)
                except subprocess.TimeoutExpired:
                    place.process.kill()
                    place.process.wait()


async def run(deploys: Deploys, seconds: float) -> list[str]:
    """Roll versions under load, and return the promises that were broken."""
    for name, source in VERSIONS.items():
        text = CATALOG + f'\n\nVERSION = "{name}"\n{source}\n\nmail.handler(run)\n'
        (deploys.folder / f"{name}.py").write_text(text)
    for place in deploys.places:
        deploys.start(place, ORDER[0] if place.serves else deploys.random.choice(ORDER))
    await deploys.ready(deploys.places)
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        # Servers and workers are deployed each by themselves, as two teams do it.
        for serves in (True, False):
            places = [place for place in deploys.places if place.serves is serves]
            tasks.create_task(deploys.roll(places, until))
        for _ in range(3):
            tasks.create_task(deploys.enqueue(until))
    await deploys.settle()
    return await _faults(deploys)


async def _faults(deploys: Deploys) -> list[str]:
    async with JobQueue.from_url(deploys.url, []) as queue:
        waited = time.monotonic()
        while True:
            counts = await queue.counts()
            left = sum(each.queued + each.running for each in counts.values())
            if left == 0 or time.monotonic() > waited + PATIENCE_SECONDS:
                break
            await asyncio.sleep(0.1)
        print(f"the last version was done after {time.monotonic() - waited:.1f} s", flush=True)
        faults = list(deploys.refused[:20])
        if left:
            faults.append(f"{left:,} jobs are not finished: {counts}")
        stored = [job async for job in _all_jobs(queue)]
        statuses = Counter(job.status.value for job in stored)
        if set(statuses) - {JobStatus.SUCCEEDED.value}:
            errors = Counter(job.error.code for job in stored if job.error is not None)
            faults.append(f"not every job succeeded: {dict(statuses)}, errors {dict(errors)}")
        missing = deploys.enqueued.keys() - {str(job.id) for job in stored}
        if missing:
            faults.append(f"{len(missing):,} jobs that were answered are not there")
        outcomes: Counter[str] = Counter()
        ids = [job.id for job in stored]
        for start in range(0, len(ids), 500):
            found = await queue.attempts(ids[start : start + 500])
            outcomes.update(
                attempt.outcome.value if attempt.outcome else "open"
                for attempts in found.values()
                for attempt in attempts
            )
        allowed = {AttemptOutcome.SUCCEEDED.value, AttemptOutcome.RELEASED.value}
        if set(outcomes) - allowed:
            faults.append(f"attempts ended otherwise: {dict(outcomes)}")
    faults += _wrong_runs(deploys)
    parked = sum(
        log.read_text(errors="replace").count('"job.payload_mismatch"')
        for log in deploys.folder.glob("*.log")
    )
    print(
        f"{deploys.deploys} deploys, {len(deploys.enqueued):,} jobs; attempts {dict(outcomes)};"
        f" {parked} warnings of parked jobs",
        flush=True,
    )
    return faults


async def _all_jobs(queue: JobQueue) -> Any:
    after = None
    while True:
        page = await queue.list(JobFilter(), first=200, after=after)
        for job in page.jobs:
            yield job
        if not page.has_next_page:
            return
        after = page.jobs[-1].id


def _wrong_runs(deploys: Deploys) -> list[str]:
    """Return the runs whose payload was not the one of its version, or not the one enqueued."""
    faults = []
    by_version: Counter[str] = Counter()
    with suppress(FileNotFoundError), deploys.log.open("rb") as lines:
        for line in lines:
            entry = json.loads(line)
            by_version[entry["version"]] += 1
            number = entry["number"]
            who = entry.get("to", entry.get("recipient"))
            wrong = entry["class"] != CLASSES[entry["version"]] or who != f"user-{number}"
            if wrong or deploys.enqueued.get(entry["job"], number) != number:
                faults.append(f"a handler got another payload: {entry}")
    print(f"runs by version: {dict(sorted(by_version.items()))}", flush=True)
    return faults[:20]


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a migrated database of its own."""
    with _urls(kind, folder) as url:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("JOBS_")},
            "PYTHONPATH": CODE,
            "JOBS_DATABASE_URL": url,
        }
        command = [sys.executable, "-m", "job_registry_api.cli", "migrate"]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        yield url


@contextmanager
def _urls(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'jobs.db'}"
        return
    with _postgresql("bundled", folder) as server:
        yield server.url


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else random.randrange(1 << 30)
    kinds = ["sqlite", "postgresql"] if given.database == "both" else [given.database]
    broken = False
    for kind in kinds:
        print(f"{kind}: {given.minutes:g} minutes, seed {seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="deploys-") as name:
            folder = Path(name)
            with _database(kind, folder) as url:
                places = [Place(f"server{number}", serves=True) for number in range(2)]
                places += [Place(f"worker{number}", serves=False) for number in range(3)]
                deploys = Deploys(folder, url, random.Random(seed), places)
                try:
                    faults = asyncio.run(run(deploys, given.minutes * 60))
                finally:
                    deploys.kill()
            for fault in faults:
                print(f"BROKEN: {fault}", flush=True)
            if faults:
                for log in sorted(folder.glob("*.log")):
                    lines = log.read_text(errors="replace").splitlines()
                    print(f"--- {log.name}\n" + "\n".join(lines[-5:]), flush=True)
            broken = broken or bool(faults)
    if broken:
        sys.exit(1)
    print("every promise was kept", flush=True)


if __name__ == "__main__":
    main()
