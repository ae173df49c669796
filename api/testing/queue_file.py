"""The file of a `TestQueue`: a migrated SQLite database, and the clock of its queue."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from pydantic_core import from_json
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from sqlmodel import col

from job_registry_api.queue import migrations
from job_registry_api.queue.caller_transactions import not_yet_published
from job_registry_api.queue.database import Database, read_json
from job_registry_api.queue.databases import open_database, store_of
from job_registry_api.queue.models import Job, JobRecord, JobStatus
from job_registry_api.queue.store import NewJob, Stored, stored_before

_MEMORY: Final = Path("/dev/shm")
_MEMORY_NEEDED: Final = 16 * 1024 * 1024


class QueueFile:
    """A migrated SQLite file of its own, and the clock of its queue.

    It is read and written without an event loop, on short connections: assertions are ordinary
    functions, and the commit of a session is not awaited.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="job-queue-", dir=_memory()))
        # Also at the end of the process, for a test that was not finished.
        self._deleting = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        path = self.folder / "jobs.db"
        path.write_bytes(_template())
        self.ahead = 0.0
        """How many seconds the clock of the queue is ahead."""
        self._url = f"sqlite:///{path}"
        self._engine = sqlalchemy.create_engine(
            self._url, poolclass=NullPool, json_deserializer=read_json
        )
        self._store = store_of(self.database(), "test")
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def database(self) -> Database:
        return open_database(self._url, ahead=lambda: self.ahead)

    def delete(self) -> None:
        """Delete the file, and the assets beside it."""
        self._deleting()

    def jobs(self, types: Sequence[str] | None = None) -> list[JobRecord]:
        """Return the jobs of these types in the order of enqueueing."""
        columns = [col(getattr(Job, name)) for name in JobRecord._fields]
        query = sqlalchemy.select(*columns).order_by(col(Job.id))
        if types is not None:
            query = query.where(col(Job.type).in_(types))
        with self._engine.connect() as connection:
            return [JobRecord.of(dict(row)) for row in connection.execute(query).mappings()]

    def insert(self, jobs: Sequence[NewJob]) -> None:
        """Store jobs, in a transaction of their own."""
        with self._engine.begin() as connection:
            self._store.insert_within(connection, jobs)

    def insert_later(
        self, session: Session, jobs: Sequence[NewJob], now: datetime
    ) -> dict[uuid.UUID, Stored]:
        """Return what `insert` would do when the session commits."""
        self._sessions.add(session)
        uncommitted: list[NewJob] = not_yet_published(session, self.insert)
        holders = {(job.type, job.idempotency_key): job for job in uncommitted}
        stored: dict[uuid.UUID, Stored] = {}
        with self._engine.connect() as connection:
            for job in jobs:
                existing: JobRecord | None = None
                if job.idempotency_key is not None:
                    key = (job.type, job.idempotency_key)
                    existing = self._store.find_by_key_within(connection, [key]).get(key)
                    holder = holders.setdefault(key, job)
                    if existing is None and holder is not job:
                        existing = _record(holder, now)
                stored[job.id] = (
                    Stored(now, job.next_run_at or now)
                    if existing is None
                    else stored_before(existing, job)
                )
        return stored

    def uncommitted_jobs(self) -> int:
        """Return how many jobs await the commit of a session."""
        return sum(len(not_yet_published(session, self.insert)) for session in self._sessions)


@cache
def _template() -> bytes:
    """Return the content of a migrated file. Migrations take longer than most tests."""
    with tempfile.TemporaryDirectory(prefix="job-queue-", dir=_memory()) as folder:
        path = Path(folder) / "jobs.db"
        run_in_thread(lambda: asyncio.to_thread(migrations.upgrade, f"sqlite:///{path}"))
        return path.read_bytes()


def _memory() -> Path | None:
    """Return the folder of files in memory, if there is one: commits there wait for no disk."""
    try:
        is_large = shutil.disk_usage(_MEMORY).free >= _MEMORY_NEEDED
    except OSError:
        return None
    return _MEMORY if is_large and os.access(_MEMORY, os.W_OK) else None


def run_in_thread(work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run `work` on an event loop of its own. This thread may have one that is running."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(lambda: asyncio.run(work())).result()


def _record(job: NewJob, now: datetime) -> JobRecord:
    """Return a job that is not stored yet."""
    return JobRecord(
        id=job.id,
        type=job.type,
        fingerprint=job.fingerprint,
        status=JobStatus.QUEUED,
        payload=from_json(job.payload),
        priority=job.priority,
        attempt=0,
        max_attempts=job.max_attempts,
        timeout_seconds=job.timeout_seconds,
        created_at=now,
        idempotency_key=job.idempotency_key,
        created_by=job.created_by,
        next_run_at=job.next_run_at or now,
    )
