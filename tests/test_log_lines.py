"""Lines that belong to one moment are written together, in the format of single lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from job_registry_api.logs import configure_logs, log_together, use_standard_logging

LINES = [{"event": "job.started", "job_id": str(n), "attempt": n} for n in range(3)]

Style = Literal["console", "json"]


class File(io.BytesIO):
    """A file that counts how often it is written to."""

    writes = 0

    def write(self, text: Any) -> int:
        self.writes += 1
        return super().write(text)


@pytest.fixture
def file() -> Iterator[File]:
    yield File()
    configure_logs("error", "console")


def configured(file: File, style: Style, level: Literal["info", "warning"] = "info") -> Any:
    configure_logs(level, style, io.TextIOWrapper(file, write_through=True))
    return structlog.get_logger("test")


def test_lines_of_one_moment_are_one_write_in_the_format_of_single_lines(file: File) -> None:
    log = configured(file, "json")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log_together(log, LINES)
        assert file.writes == 1
        for line in LINES:
            log.info(**line)
    written = [json.loads(line) for line in file.getvalue().splitlines()]
    times = {line.pop("timestamp") for line in written[:3]}
    assert len(times) == 1
    for line in written[3:]:
        assert line.pop("timestamp")
    assert written[:3] == written[3:]
    assert written[0] == {**LINES[0], "level": "info", "request_id": "r1"}


def test_lines_for_people_are_written_one_by_one(file: File) -> None:
    log_together(configured(file, "console"), LINES)
    assert file.getvalue().count(b"job.started") == 3


def test_lines_below_the_level_are_not_written(file: File) -> None:
    log_together(configured(file, "json", "warning"), LINES)
    assert file.getvalue() == b""


def test_lines_can_be_captured_by_tests_of_a_program(file: File) -> None:
    log = configured(file, "json")
    with structlog.testing.capture_logs() as captured:
        log_together(log, LINES)
    assert captured == [{**line, "log_level": "info"} for line in LINES]
    assert file.getvalue() == b""


class TestInAProgramWithItsOwnLogs:
    @pytest.fixture(autouse=True)
    def in_a_program(self, file: File) -> None:
        structlog.reset_defaults()
        use_standard_logging()

    def test_lines_that_logging_drops_are_not_made(self, caplog: pytest.LogCaptureFixture) -> None:
        lines = iter(LINES)
        with caplog.at_level(logging.WARNING, "test"):
            log_together(structlog.get_logger("test"), lines)
        assert list(lines) == LINES
        assert caplog.messages == []

    def test_lines_are_written_from_when_logging_writes_them(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        log = structlog.get_logger("test")
        with caplog.at_level(logging.WARNING, "test"):
            log_together(log, LINES)
        with caplog.at_level(logging.INFO, "test"):
            log_together(log, LINES)
        assert caplog.messages == [f"job.started job_id={n} attempt={n}" for n in range(3)]

    def test_lines_that_logging_drops_can_be_captured(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "test"), structlog.testing.capture_logs() as captured:
            log_together(structlog.get_logger("test"), LINES)
        assert captured == [{**line, "log_level": "info"} for line in LINES]
