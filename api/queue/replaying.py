"""Replaying: whether the job types of this process can read the stored payloads.

It reads the queued and the running jobs, a page at a time, and writes nothing. Each page is one
short transaction, so that no snapshot is held for long.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from job_registry import JobRegistry, JobTypeNotFound, PayloadInvalid
from job_registry_api import defaults
from job_registry_api.queue.database import Pooler, stored_text
from job_registry_api.queue.databases import open_database, store_of
from job_registry_api.queue.driver_errors import unavailable
from job_registry_api.queue.filters import FIRST_ID
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.store import Store, StoredPayload

PAGE_JOBS: Final = 1_000
PAGE_CHARACTERS: Final = 4_000_000
"""A page ends with the payload that reaches this total, so that memory stays bounded."""

SAMPLES: Final = 3
"""How many ids are kept of the jobs with the same fault."""

MAX_FAULTS: Final = 200
"""How many different faults are kept per job type. The others are counted as one, `more`."""

OnPage = Callable[[int, int], None]
"""Called after each page with the number of jobs that were read, and an estimate of the total."""


@dataclass(slots=True)
class Found:
    """Jobs with the same fault: how many there are, and the ids of the first of them."""

    jobs: int = 0
    sample_ids: list[str] = field(default_factory=list)

    def add(self, job_id: uuid.UUID) -> None:
        self.jobs += 1
        if len(self.sample_ids) < SAMPLES:
            self.sample_ids.append(str(job_id))


@dataclass(frozen=True, slots=True)
class Fault:
    """What the current model refuses in payloads. `path` is a JSON Pointer with * for an index."""

    job_type: str
    path: str
    code: str


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome of a replay. Job types have the names that are stored with the jobs.

    `jobs` are the unfinished jobs of each type, `refused` those whose payload cannot be read, and
    `faults` says why. `unknown` are the types that this process does not know. `running` counts the
    running jobs by the current name of their type.
    """

    jobs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: dict[Fault, Found] = field(default_factory=dict)
    unknown: dict[str, Found] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """How many jobs were read."""
        return self.jobs.total()

    @property
    def reads_all(self) -> bool:
        """Whether every payload can be read."""
        return not self.refused and not self.unknown


def replay(
    url: str,
    registry: JobRegistry,
    *,
    pooler: Pooler = "session",
    schema: str = defaults.SCHEMA,
    timeout_seconds: float = defaults.TIMEOUT_SECONDS,
    on_page: OnPage = lambda done, total: None,
) -> Replay:
    """Read the payload of every unfinished job, and return which ones the registry refuses.

    Synchronous. The role of the database needs only SELECT.

    Raises:
        QueueUnavailable: the database does not answer.
    """

    async def run() -> Replay:
        database = open_database(
            url,
            pool_size=2,
            timeout_seconds=timeout_seconds,
            pooler=pooler,
            schema=schema,
            read_only=True,
        )
        try:
            return await _replay(store_of(database, ""), registry, on_page)
        finally:
            await database.close()

    with unavailable():
        return asyncio.run(run())


async def _replay(store: Store, registry: JobRegistry, on_page: OnPage) -> Replay:
    found = Replay()
    expected = 0
    for name, jobs in (await store.counts_by_status()).items():
        running = jobs.get(JobStatus.RUNNING, 0)
        found.running[registry.current_name(name)] += running
        expected += running + jobs.get(JobStatus.QUEUED, 0)
    after = FIRST_ID
    while True:
        page = await store.unfinished(after=after, jobs=PAGE_JOBS, characters=PAGE_CHARACTERS)
        for stored in page:
            _read(registry, stored, found)
        on_page(found.total, max(expected, found.total))
        # Ctrl-C cancels this task where it next waits, which should not be for a connection.
        await asyncio.sleep(0)
        characters = sum(len(stored.text) for stored in page)
        if len(page) < PAGE_JOBS and characters < PAGE_CHARACTERS:
            return found
        after = page[-1].id


def _read(registry: JobRegistry, stored: StoredPayload, found: Replay) -> None:
    found.jobs[stored.type] += 1
    try:
        registry.read(stored.type, stored_text(stored.text))
    except JobTypeNotFound:
        found.unknown.setdefault(stored.type, Found()).add(stored.id)
        return
    except PayloadInvalid as invalid:
        faults = {(_without_indexes(each.path), each.code) for each in invalid.violations}
    except Exception as error:
        # A user's validator may raise anything. A worker could not run the job either.
        faults = {("", f"raised {type(error).__name__}")}
    else:
        return
    found.refused[stored.type] += 1
    for path, code in sorted(faults):
        fault = Fault(stored.type, path, code)
        if fault not in found.faults and _faults_of(stored.type, found.faults) >= MAX_FAULTS:
            fault = Fault(stored.type, "", "more")
        found.faults.setdefault(fault, Found()).add(stored.id)


def _faults_of(job_type: str, faults: Mapping[Fault, Found]) -> int:
    return sum(fault.job_type == job_type for fault in faults)


def _without_indexes(path: str) -> str:
    """Return a JSON Pointer with * for each index, so that the items of an array count as one."""
    return "/".join("*" if token.isdecimal() else token for token in path.split("/"))
