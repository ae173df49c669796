"""Prometheus metrics of one process: their names and labels.

Each `JobQueue` has its own `Metrics` with its own registry, so that one process can run several
applications. Labels are bounded: a job type that is not registered counts as `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
OTHER: Final = "other"


class Attempts(Protocol):
    """The attempts of a worker at this moment."""

    @property
    def running(self) -> int:
        """How many attempts hold a slot."""

    @property
    def overdue(self) -> int:
        """How many attempts have ended while their handler runs on."""


class Metrics:
    """The metrics of one process. No method raises, because they are called after commits."""

    def __init__(self, job_types: Iterable[str]) -> None:
        self._types = frozenset(job_types)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        self._enqueued = counter("job_registry_enqueued", "Jobs stored by this process.", ["type"])
        self._attempts = counter(
            "job_registry_attempts",
            "Attempts whose end this process recorded, by outcome.",
            ["type", "outcome"],
        )
        self._parked = counter(
            "job_registry_parked",
            "Jobs that this process's worker has parked, because it could not read their payload.",
            ["type"],
        )
        self._parked_jobs = gauge(
            "job_registry_parked_jobs",
            "Parked jobs in the database, the same in every process: use max, not sum.",
            ["type"],
        )
        self._running = gauge(
            "job_registry_running_attempts", "Attempts that hold a slot of this process's worker."
        )
        self._overdue = gauge(
            "job_registry_overdue_attempts",
            "Attempts that have ended, by timeout or with their lease, and whose thread runs on.",
        )
        self._jobs = gauge(
            "job_registry_jobs",
            "Jobs in the database, the same in every process: use max, not sum.",
            ["type", "status"],
        )
        self._database_up = gauge(
            "job_registry_database_up",
            "Whether the database answered when the jobs were last counted: 1 or 0.",
        )
        self._database_unavailable = counter(
            "job_registry_database_unavailable",
            "Operations that failed because the database did not answer or could not write.",
        )
        self._renewal_failures = counter(
            "job_registry_lease_renewal_failures", "Renewals of leases that failed."
        )
        self._publish_failures = counter(
            "job_registry_event_publish_failures",
            "Committed events that could not be published in this process.",
        )

    def enqueued(self, job_type: str, jobs: int) -> None:
        """Count stored jobs."""
        self._enqueued.labels(self._label(job_type)).inc(jobs)

    def attempt_ended(self, job_type: str, outcome: str, attempts: int = 1) -> None:
        """Count the end of an attempt, or of several with the same outcome."""
        self._attempts.labels(self._label(job_type), outcome).inc(attempts)

    def parked(self, job_type: str) -> None:
        """Count a job that was parked."""
        self._parked.labels(self._label(job_type)).inc()

    def lease_renewal_failed(self) -> None:
        """Count a renewal that failed."""
        self._renewal_failures.inc()

    def event_publish_failed(self) -> None:
        """Count a committed event that could not be published."""
        self._publish_failures.inc()

    def database_unavailable(self) -> None:
        """Count an operation that the database did not answer."""
        self._database_unavailable.inc()

    def watch(self, attempts: Callable[[], Attempts]) -> None:
        """Show the attempts of a worker from now on."""
        self._running.set_function(lambda: attempts().running)
        self._overdue.set_function(lambda: attempts().overdue)

    def show_jobs(self, counts: Mapping[str, Mapping[str, int]] | None) -> None:
        """Show the number of jobs per type and status; None if the database does not answer.

        `parked` is not a status: these jobs are also among the queued ones.
        """
        self._database_up.set(counts is not None)
        self._jobs.clear()
        self._parked_jobs.clear()
        for job_type, statuses in (counts or {}).items():
            label = self._label(job_type)
            for status, jobs in statuses.items():
                if status == "parked":
                    self._parked_jobs.labels(label).inc(jobs)
                else:
                    self._jobs.labels(label, status).inc(jobs)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _label(self, job_type: str) -> str:
        return job_type if job_type in self._types else OTHER
