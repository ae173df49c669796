"""Every operation of these tests is executed twice, and compared: see `tests.verified`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.verified import Verified, verifying


@pytest.fixture(autouse=True)
def verified() -> Iterator[Verified]:
    """Compiles operations at their first use, and finds no difference to graphql-core."""
    with verifying() as verified:
        yield verified
    assert [str(each) for each in verified.differences] == []
