"""Default values, shared by the settings and what they configure. It imports nothing."""

from __future__ import annotations

from typing import Final

ASSETS: Final = "assets"
KEEP_FAILED_DAYS: Final = 90.0
KEEP_SUCCEEDED_DAYS: Final = 7.0
LEASE_SECONDS: Final = 30.0
MAX_BULK_SIZE: Final = 1_000
MAX_PAGE_SIZE: Final = 200
PARKED_DAYS: Final = 7.0
POOL_SIZE: Final = 10
SCHEMA: Final = "job_registry"
SHUTDOWN_SECONDS: Final = 20.0
TIMEOUT_SECONDS: Final = 10.0
WORKER_CONCURRENCY: Final = 8
