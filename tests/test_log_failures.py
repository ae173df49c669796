"""Log lines that cannot be written are dropped, and the work they tell of goes on."""

from __future__ import annotations

import errno
import io
from typing import Any, Literal

import pytest
import structlog

from job_registry_api.logs import configure_logs


class FullDisk(io.BufferedIOBase):
    """A file that takes nothing."""

    name = "full"

    def __init__(self) -> None:
        self.refused = 0

    def writable(self) -> bool:
        return True

    def write(self, _line: Any) -> int:
        self.refused += 1
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("style", ["console", "json"])
def test_a_line_that_cannot_be_written_is_dropped(style: Literal["console", "json"]) -> None:
    disk = FullDisk()
    stream = io.TextIOWrapper(disk, write_through=True)
    configure_logs("info", style, stream)
    try:
        log = structlog.get_logger("test")
        for _ in range(3):
            log.info("nobody reads this")
        assert disk.refused >= 3
        disk.close()
        log.info("nor this")
    finally:
        configure_logs("error", "console")
