"""Random requests for each operation of a schema, as schemathesis makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok


def send_for_each_operation(schema: Any, cases: int, check: Callable[[Any], None]) -> list[str]:
    """Call `check` with so many random cases of each operation; gives the operations."""
    labels = []
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        labels.append(operation.label)

        @settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            check(case)

        send()
    return labels
