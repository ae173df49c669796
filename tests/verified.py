"""The verify mode of compiled operations: each is repeated by graphql-core and compared.

As a program, this module is `job-registry` in this mode. A difference is then an `internal_error`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from graphql import ExecutionResult

from job_registry_api.graphql import execution
from job_registry_api.graphql.compiled import CompiledOperation, Different


@dataclass
class Verified:
    """What was executed in the verify mode."""

    compiled: int = 0
    left: list[Exception] = field(default_factory=list)
    """Why operations were left to graphql-core."""
    differences: list[Different] = field(default_factory=list)


@contextmanager
def verifying() -> Iterator[Verified]:
    """Execute every operation both ways, also those that are used once."""
    verified = Verified()

    async def execute(
        self: CompiledOperation, context: Any, sent: Mapping[str, Any], **options: Any
    ) -> ExecutionResult:
        try:
            result, reason = await self.verify(context, sent, **options)
        except Different as difference:
            verified.differences.append(difference)
            raise
        if reason is None:
            verified.compiled += 1
        else:
            verified.left.append(reason)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledOperation, "execute", execute)
        patch.setattr(execution, "USES_TO_COMPILE", 1)
        yield verified


if __name__ == "__main__":
    from job_registry_api.cli import main

    with verifying():
        main()
