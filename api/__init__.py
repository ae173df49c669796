"""Job Registry for programs: the queue, the worker and the application.

Job types are defined with `job_registry`. Each name is imported on first use, because commands and
the processes of handlers need few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from job_registry_api.app import create_app
    from job_registry_api.application import JobsApplication
    from job_registry_api.auth import Caller
    from job_registry_api.budget import RequestLimits
    from job_registry_api.graphql.hosted import GraphQLTypes, graphql_types
    from job_registry_api.queue.enqueueing import Enqueued
    from job_registry_api.queue.errors import (
        EventsMissed,
        IdempotencyConflict,
        InputInvalid,
        JobFailed,
        JobNotFound,
        JobStateConflict,
        QueueUnavailable,
    )
    from job_registry_api.queue.filters import JobFilter
    from job_registry_api.queue.job_logs import LogLevel, LogLine
    from job_registry_api.queue.migrations import QUEUE_TABLES, MigrationRefused
    from job_registry_api.queue.models import AttemptRecord, JobError, JobRecord, JobStatus
    from job_registry_api.queue.queue import JobQueue
    from job_registry_api.queue.reading import JobPage
    from job_registry_api.queue.sync import SyncQueue
    from job_registry_api.settings import Settings, SettingsInvalid, load_settings
    from job_registry_api.tracing import Tracing
    from job_registry_api.worker.extensions import WorkerStartError
    from job_registry_api.worker.loop import Worker

__all__ = [
    "QUEUE_TABLES",
    "AttemptRecord",
    "Caller",
    "Enqueued",
    "EventsMissed",
    "GraphQLTypes",
    "IdempotencyConflict",
    "InputInvalid",
    "JobError",
    "JobFailed",
    "JobFilter",
    "JobNotFound",
    "JobPage",
    "JobQueue",
    "JobRecord",
    "JobStateConflict",
    "JobStatus",
    "JobsApplication",
    "LogLevel",
    "LogLine",
    "MigrationRefused",
    "QueueUnavailable",
    "RequestLimits",
    "Settings",
    "SettingsInvalid",
    "SyncQueue",
    "Tracing",
    "Worker",
    "WorkerStartError",
    "create_app",
    "graphql_types",
    "load_settings",
]

_HOMES: Final = {
    "app": ("create_app",),
    "application": ("JobsApplication",),
    "auth": ("Caller",),
    "budget": ("RequestLimits",),
    "graphql.hosted": ("GraphQLTypes", "graphql_types"),
    "queue.enqueueing": ("Enqueued",),
    "queue.errors": (
        "EventsMissed",
        "IdempotencyConflict",
        "InputInvalid",
        "JobFailed",
        "JobNotFound",
        "JobStateConflict",
        "QueueUnavailable",
    ),
    "queue.job_logs": ("LogLevel", "LogLine"),
    "queue.migrations": ("QUEUE_TABLES", "MigrationRefused"),
    "queue.models": ("AttemptRecord", "JobError", "JobRecord", "JobStatus"),
    "queue.queue": ("JobQueue",),
    "queue.filters": ("JobFilter",),
    "queue.reading": ("JobPage",),
    "queue.sync": ("SyncQueue",),
    "settings": ("Settings", "SettingsInvalid", "load_settings"),
    "tracing": ("Tracing",),
    "worker.extensions": ("WorkerStartError",),
    "worker.loop": ("Worker",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
