"""A queue of the test kit, without its plugin, which may not be installed in a checkout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from job_registry.testing import TestQueue
from tests.testing.kit_jobs import REGISTRY


@pytest.fixture
def job_queue() -> Iterator[TestQueue]:
    with TestQueue(REGISTRY) as queue:
        yield queue
