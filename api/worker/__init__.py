"""The worker: leases due jobs, runs their handlers, and reports how each attempt ended.

`Worker` is imported on first use: the processes in which handlers run also import this package, and
need neither the queue nor a database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job_registry_api.worker.extensions import WorkerStartError
    from job_registry_api.worker.loop import Worker

__all__ = ["Worker", "WorkerStartError"]


def __getattr__(name: str) -> Any:
    if name == "Worker":
        from job_registry_api.worker.loop import Worker

        return Worker
    if name == "WorkerStartError":
        from job_registry_api.worker.extensions import WorkerStartError

        return WorkerStartError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
