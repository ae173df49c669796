"""Default values of the queue, shared with the settings. No imports, so settings load quickly."""

from __future__ import annotations

from typing import Final

LEASE_SECONDS: Final = 30.0
MAX_BULK_SIZE: Final = 1_000
MAX_PAGE_SIZE: Final = 200
POOL_SIZE: Final = 10
SCHEMA: Final = "job_registry"
TIMEOUT_SECONDS: Final = 10.0
