"""Jobs as JSON, for REST and the command: field names in camelCase, times in UTC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pydantic.alias_generators import to_camel

from job_registry_api.queue.job_logs import LogLine
from job_registry_api.queue.models import AttemptRecord, JobRecord


def json_of_job(job: JobRecord) -> dict[str, Any]:
    """Return a job as JSON has it. Its `jobId` is the `id` of the record."""
    content = json_of_fields(job._asdict())
    content["jobId"] = str(content.pop("id"))
    content["error"] = None if job.error is None else asdict(job.error)
    return content


def json_of_attempts(attempts: Sequence[AttemptRecord]) -> list[dict[str, Any]]:
    """Return the attempts of one job as JSON has them."""
    return [
        {k: v for k, v in json_of_fields(asdict(each)).items() if k not in ("id", "jobId")}
        for each in attempts
    ]


def json_of_line(line: LogLine, attempt: AttemptRecord) -> dict[str, Any]:
    """Return a line that an attempt logged as JSON has it."""
    return {
        "attempt": attempt.attempt,
        "loggedAt": json_of_time(line.logged_at(attempt.started_at)),
        "level": line.level.value,
        "message": line.message,
        "data": line.data,
    }


def json_of_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a record's fields as JSON has them."""
    return {
        to_camel(name): json_of_time(value) if isinstance(value, datetime) else value
        for name, value in fields.items()
    }


def json_of_time(time: datetime | None) -> str | None:
    """Return a time as JSON has it, such as `2030-01-31T12:00:00Z`."""
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")
