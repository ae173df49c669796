"""The fixtures of `job_registry.testing`, for every project that has Job Registry installed.

pytest imports this module at each start, so it imports only pytest. The rest is imported by the
first test that uses a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from job_registry import JobRegistry
    from job_registry.testing import TestContext, TestQueue


@pytest.fixture
def job_registry() -> JobRegistry:
    """The job types of `job_queue`: by default those of JOBS_CATALOG. Override it with your own."""
    from job_registry.discovery import load_registry
    from job_registry_api.settings import load_settings

    settings = load_settings()
    return load_registry(settings.catalog, max_payload_bytes=settings.max_payload_bytes)


@pytest.fixture
def job_queue(job_registry: JobRegistry) -> Iterator[TestQueue]:
    """A queue for one test. Await its operations, or use `job_queue.sync` in ordinary tests."""
    from job_registry.testing import TestQueue

    with TestQueue(job_registry) as queue:
        yield queue


@pytest.fixture
def job_context(tmp_path: Path) -> Callable[..., TestContext]:
    """`job_registry.testing.job_context`, with a folder for assets below `tmp_path`."""
    from job_registry.testing import job_context

    assets = tmp_path / "assets"
    assets.mkdir()
    return partial(job_context, assets=assets)
