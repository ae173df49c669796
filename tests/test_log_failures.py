"""Log lines that cannot be written are dropped. Lines of a group are written together."""

from __future__ import annotations

import errno
import io
import json
from typing import Any, Literal

import pytest
import structlog

from job_registry_api.logs import configure_logs, log_together


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


def test_lines_that_are_logged_together_are_those_that_are_logged_alone() -> None:
    written = io.BytesIO()
    configure_logs("info", "json", io.TextIOWrapper(written, write_through=True))
    try:
        log = structlog.get_logger("test")
        events = [{"event": "job.created", "job_id": str(number)} for number in range(2)]
        with structlog.contextvars.bound_contextvars(request="7"):
            for event in events:
                log.info(**event)
            log_together(log, events)
        log_together(log, [])
        lines = [{**json.loads(line), "timestamp": ""} for line in written.getvalue().splitlines()]
        assert lines[2:] == lines[:2]
        assert [(line["job_id"], line["request"]) for line in lines[2:]] == [("0", "7"), ("1", "7")]
    finally:
        configure_logs("error", "console")


@pytest.mark.parametrize("style", ["console", "json"])
def test_nothing_is_logged_together_below_the_level(style: Literal["console", "json"]) -> None:
    written = io.BytesIO()
    configure_logs("warning", style, io.TextIOWrapper(written, write_through=True))
    try:
        log_together(structlog.get_logger("test"), [{"event": "job.created"}])
        assert written.getvalue() == b""
    finally:
        configure_logs("error", "console")


class Odd:
    """A value that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_a_line_of_json_shows_what_is_not_json() -> None:
    written = io.BytesIO()
    configure_logs("info", "json", io.TextIOWrapper(written, write_through=True))
    try:
        log = structlog.get_logger("test")
        log.info("odd", odd=Odd(), bytes=b"\xff", alone="\ud800", small=[1], own={1})
        line = json.loads(written.getvalue())
        assert (
            line.items()
            >= {
                "event": "odd",
                "odd": "<Odd: RuntimeError>",
                "bytes": "b'\\xff'",
                "alone": "\\ud800",
                "small": [1],
                "own": [1],
            }.items()
        )
    finally:
        configure_logs("error", "console")
