"""The house of each test: a fresh database, a queue on it, and one job type."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import structlog

from job_registry import Backoff, JobPolicy, JobRegistry, JobType
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.queue import JobQueue
from job_registry_api.worker import attempt, lease_keeper, loop, processes
from tests.worker.house import House, Text


@pytest.fixture
def lease_seconds() -> float:
    """The default lease. A test about leases overrides it by its parameter of this name."""
    return 30.0


@pytest.fixture
def timeout_seconds() -> int:
    """How long an attempt may take. A test about timeouts overrides it by its parameter."""
    return 60


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The lines that the worker and its handlers log, as data."""
    capture = structlog.testing.LogCapture()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, capture],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        cache_logger_on_first_use=False,
    )
    for module in (attempt, lease_keeper, loop, processes):
        # Their loggers keep the configuration that they were first used with.
        monkeypatch.setattr(module, "log", structlog.get_logger())
    return cast(list[dict[str, Any]], capture.entries)


@pytest.fixture
async def house(
    database_url: str, lease_seconds: float, timeout_seconds: int
) -> AsyncIterator[House]:
    backoff = Backoff(base_seconds=0.05, cap_seconds=0.1)
    job_type = JobType(
        name="work",
        payload=Text,
        policy=JobPolicy(max_attempts=3, timeout_seconds=timeout_seconds, backoff=backoff),
    )
    remote = JobType(name="remote", payload=Text)
    database = open_database(database_url)
    queue = JobQueue(JobRegistry([job_type, remote]), database, lease_seconds=lease_seconds)
    async with queue.events.listening():
        yield House(queue, database_url, job_type)
    await database.close()
