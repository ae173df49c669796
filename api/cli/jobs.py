"""`job-registry list`, `show`, `cancel` and `retry`: the jobs of the queue, for its operator.

They use the database itself, so they also work when no server answers.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from pydantic_core import to_json
from rich.cells import cell_len

from job_registry import CodedError, JobRegistry, JobTypeNotFound
from job_registry.errors import escaped, shortened_text
from job_registry_api.cli import startup
from job_registry_api.cli.output import (
    REFUSED,
    WRONG_USAGE,
    AsJson,
    OutputFailed,
    err,
    fail,
    fail_without_output,
    of_options,
    print_json,
    refusal_json,
    refuse,
    say,
)
from job_registry_api.cli.payloads import read
from job_registry_api.settings import Settings

if TYPE_CHECKING:
    from job_registry_api.queue.filters import JobFilter
    from job_registry_api.queue.models import JobError, JobRecord
    from job_registry_api.queue.queue import JobQueue
    from job_registry_api.queue.reading import WaitingReason


class Status(StrEnum):
    """`JobStatus`, without the import of the database."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


MOST: Final = 10_000
"""How many jobs one command lists at most."""

SHOWN_CHARACTERS: Final = 100
"""How much of an error a row of the list shows."""

JobIds = Annotated[
    list[str],
    typer.Argument(
        metavar="ID", help="Ids of jobs. - reads them from standard input, one per line."
    ),
]


def list_jobs(
    type_names: Annotated[
        list[str] | None, typer.Argument(metavar="TYPE", help="Job types. Defaults to all.")
    ] = None,
    status: Annotated[
        list[Status] | None, typer.Option(help="A status; repeat it for several.")
    ] = None,
    error_code: Annotated[
        str | None, typer.Option(help="The code of the latest error, such as timed_out.")
    ] = None,
    created_by: Annotated[str | None, typer.Option(help="Who enqueued the jobs.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The key of a job.")] = None,
    search: Annotated[
        str | None, typer.Option(help="An id, an idempotency key, or words of an error.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="The most jobs to list.")] = 50,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="Only jobs that are older than this one.")
    ] = None,
    only_ids: Annotated[
        bool, typer.Option("--ids", help="Print only ids, for cancel and retry.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first, and why they wait or what failed.

    With --json, one job per line. Times are in UTC.
    """
    from job_registry_api.queue.filters import JobFilter
    from job_registry_api.queue.models import JobStatus

    wanted = JobFilter(
        types=tuple(type_names) if type_names else None,
        statuses=tuple(map(JobStatus, status)) if status else None,
        created_by=created_by,
        idempotency_key=idempotency_key,
        error_code=error_code,
        search=search,
    )
    older_than = _end(after)
    settings, registry = _opened()
    with startup.database_errors():
        asyncio.run(
            _list(settings, registry, wanted, limit, older_than, _Printed(only_ids, as_json))
        )


def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a job.")],
    as_json: AsJson = False,
) -> None:
    """Show a job: its payload, why it waits or failed, its attempts and their log lines."""
    settings, registry = _opened()
    with startup.database_errors():
        asyncio.run(_show(settings, registry, job_id, as_json))


def cancel(job_ids: JobIds, as_json: AsJson = False) -> None:
    """Cancel queued jobs at once, and stop running ones.

    The worker of a running job is requested to stop it.
    """
    _change_all(job_ids, as_json, "cancelled", lambda queue, job_id: queue.cancel(job_id))


def retry(job_ids: JobIds, as_json: AsJson = False) -> None:
    """Queue failed or cancelled jobs again, to run now, with at least one attempt left."""
    _change_all(job_ids, as_json, "retried", lambda queue, job_id: queue.retry(job_id))


def _opened() -> tuple[Settings, JobRegistry]:
    settings = startup.read_settings()
    registry = startup.read_registry(settings)
    startup.prepare_database(settings, only_check=True)
    return settings, registry


def _end(after: str | None) -> uuid.UUID | None:
    try:
        return None if after is None else uuid.UUID(after)
    except ValueError:
        fail(WRONG_USAGE, f"--after: expected the id of a job; got {after}.")


class _Printed:
    """Prints jobs as they are read: as ids, as JSON Lines, or as a table at the end."""

    def __init__(self, only_ids: bool, as_json: bool) -> None:
        self.only_ids = only_ids
        self.as_json = as_json
        self._rows = [("id", "type", "status", "attempt", "created", "why")]

    def add(self, job: JobRecord, waits: WaitingReason | None, expired_at: datetime | None) -> None:
        if self.only_ids:
            say(str(job.id))
        elif self.as_json:
            print_json(_json_of(job, waits), lines=True)
        else:
            why = shortened_text("; ".join(_reasons(job, waits, expired_at)), SHOWN_CHARACTERS)
            self._rows.append(
                (
                    str(job.id),
                    job.type,
                    job.status.value,
                    f"{job.attempt}/{job.max_attempts}",
                    _time(job.created_at),
                    escaped(why),
                )
            )

    def end(self) -> None:
        if self.only_ids or self.as_json:
            return
        # One line per job, for grep, and so that an id can be copied from a narrow terminal.
        widths = [max(map(cell_len, column)) for column in zip(*self._rows, strict=True)]
        for row in self._rows:
            cells = zip(row, widths, strict=True)
            padded = (cell + " " * (width - cell_len(cell)) for cell, width in cells)
            say("  ".join(padded).rstrip())


async def _list(
    settings: Settings,
    registry: JobRegistry,
    wanted: JobFilter,
    limit: int,
    after: uuid.UUID | None,
    printed: _Printed,
) -> None:
    from job_registry_api.queue.errors import InputInvalid
    from job_registry_api.queue.queue import JobQueue

    async with JobQueue.from_settings(settings, registry, prepare=False) as queue:
        await _check_types(queue, wanted.types or (), printed.as_json)
        listed = 0
        more = True
        while more and listed < limit:
            try:
                page = await queue.list(
                    wanted, first=min(limit - listed, settings.max_page_size), after=after
                )
            except InputInvalid as invalid:
                fail(WRONG_USAGE, *of_options(invalid.violations))
            # A reason may take milliseconds: it counts the jobs that go first.
            reasons = {} if printed.only_ids else await queue.waiting_reasons(page.jobs)
            is_text = not (printed.only_ids or printed.as_json)
            expired = await _expired_leases(queue, page.jobs) if is_text else {}
            for job in page.jobs:
                printed.add(job, reasons.get(job.id), expired.get(job.id))
            listed += len(page.jobs)
            after = page.stopped_at or (page.jobs[-1].id if page.jobs else None)
            more = page.has_next_page and after is not None
    printed.end()
    if more:
        say(f"There are more jobs: --after {after} lists the next ones.", err)


async def _check_types(queue: JobQueue, names: Sequence[str], as_json: bool) -> None:
    """End the command if a type is not registered, and the queue has no jobs of it either."""
    unknown = [name for name in names if queue.registry.get(name) is None]
    stored = await queue.unregistered_types() if unknown else {}
    for name in unknown:
        if name not in stored:
            try:
                queue.registry.get_type(name)
            except JobTypeNotFound as refusal:
                refuse(refusal, as_json)


async def _show(settings: Settings, registry: JobRegistry, job_id: str, as_json: bool) -> None:
    from job_registry_api.job_json import json_of_attempts, json_of_line
    from job_registry_api.queue.job_logs import lines_of
    from job_registry_api.queue.queue import JobQueue
    from job_registry_api.queue.reading import MAX_LOG_BYTES

    async with JobQueue.from_settings(settings, registry, prepare=False) as queue:
        try:
            job = await queue.get(job_id)
        except CodedError as refusal:
            refuse(refusal, as_json)
        waits = await queue.waiting_reason(job)
        expired_at = (await _expired_leases(queue, [job])).get(job.id)
        attempts = (await queue.attempts([job.id]))[job.id]
        texts, is_all = await queue.log_texts([each.id for each in attempts], MAX_LOG_BYTES)
    lines = [(each, line) for each in attempts for line in lines_of(texts.get(each.id, ""))]
    if as_json:
        content = _json_of(job, waits)
        content["attempts"] = json_of_attempts(attempts)
        content["lines"] = [json_of_line(line, each) for each, line in lines]
        content["allLines"] = is_all
        print_json(content)
        return
    shown = {
        "id": str(job.id),
        "type": job.type,
        "status": job.status.value,
        "why": "; ".join(_reasons(job, waits, expired_at)),
        "attempt": f"{job.attempt} of {job.max_attempts}, each up to {job.timeout_seconds:,} s",
        "priority": str(job.priority),
        "created": _time(job.created_at) + (f" by {job.created_by}" if job.created_by else ""),
        "started": _time(job.started_at),
        "finished": _time(job.finished_at),
        "idempotency key": job.idempotency_key,
        "fingerprint": job.fingerprint,
        "payload": _text(job.payload),
        "progress": _text(job.progress),
        "result": _text(job.result),
    }
    for name, value in shown.items():
        if value:
            say(f"{name:<16}{value}")
    for each in attempts:
        ends = f"to {_time(each.finished_at)} {each.outcome.value}" if each.outcome else "runs"
        # Its place in the concurrency limit is taken, though no job is running.
        place = ", and its handler still runs, in " if each.still_running else ", "
        why = f", {_error(each.error)}" if each.error else ""
        say(f"attempt {each.attempt:<8}{_time(each.started_at)} {ends}{place}{each.worker_id}{why}")
    for each, line in lines:
        data = f" {_text(line.data)}" if line.data else ""
        say(
            f"log of {each.attempt:<9}{line.seconds:.3f} s {line.level.value}: {line.message}{data}"
        )
    if not is_all:
        say("The log lines of earlier attempts are not shown: all together are too large.", err)


def _change_all(
    job_ids: list[str],
    as_json: bool,
    done: str,
    change: Callable[[JobQueue, str], Awaitable[JobRecord]],
) -> None:
    """Change the jobs one after another. End with `REFUSED` if one could not be changed."""
    from job_registry_api.queue.errors import JobNotFound, JobStateConflict, QueueUnavailable
    from job_registry_api.queue.queue import JobQueue

    if "-" in job_ids:
        job_ids = [each for each in job_ids if each != "-"] + read("-").split()
    job_ids = list(dict.fromkeys(job_ids))
    settings, registry = _opened()
    changed = 0
    refused = 0

    async def change_all() -> None:
        nonlocal changed, refused
        async with JobQueue.from_settings(settings, registry, prepare=False) as queue:
            for job_id in job_ids:
                try:
                    job = await change(queue, job_id)
                except (JobNotFound, JobStateConflict) as refusal:
                    refused += 1
                    if as_json:
                        print_json(refusal_json(refusal), lines=True)
                    else:
                        say(str(refusal), err)
                    continue
                changed += 1
                if as_json:
                    print_json(_json_of(job, None), lines=True)
                else:
                    say(f"{job.id} {_state(job)}")

    with startup.database_errors():
        try:
            asyncio.run(change_all())
        except OutputFailed as failure:
            left = len(job_ids) - changed - refused
            unfinished = [f"{left:,} of the jobs were not {done}."] if left else []
            fail_without_output(failure, *unfinished)
        except (QueueUnavailable, KeyboardInterrupt):
            # One more may have been changed, whose answer did not come.
            left = len(job_ids) - changed - refused
            say(f"Stopped: {changed:,} {done}, {refused:,} refused, {left:,} left.", err)
            raise
    if refused:
        sys.exit(REFUSED)


def _state(job: JobRecord) -> str:
    if job.cancel_requested_at is not None and job.finished_at is None:
        return f"{job.status.value}, its worker is requested to stop it"
    return job.status.value


def _json_of(job: JobRecord, waits: WaitingReason | None) -> dict[str, Any]:
    from job_registry_api.job_json import json_of_fields, json_of_job

    content = json_of_job(job)
    content["waitingReason"] = (
        None if waits is None else {"kind": type(waits).__name__, **json_of_fields(asdict(waits))}
    )
    return content


async def _expired_leases(queue: JobQueue, jobs: Iterable[JobRecord]) -> dict[uuid.UUID, datetime]:
    """Return the expired leases of the queue, if any of these jobs runs."""
    runs = any(job.status.value == Status.RUNNING for job in jobs)
    return await queue.expired_leases() if runs else {}


def _reasons(
    job: JobRecord, waits: WaitingReason | None, expired_at: datetime | None
) -> Iterator[str]:
    """Yield sentences that say why a job waits, where it runs, and what failed last.

    `expired_at` is when the lease of a running job has expired, if it has.
    """
    from job_registry_api.queue import reading

    match waits:
        case reading.ScheduledFor(next_run_at):
            yield f"waits until {_time(next_run_at)}"
        case reading.ConcurrencyLimitReached(limit, running):
            yield f"waits: {running:,} of its type run, and its limit is {limit:,}"
        case reading.NoWorkerSeen(None):
            yield "waits: no worker was ever seen for its type"
        case reading.NoWorkerSeen(seconds):
            yield f"waits: the last worker for its type was seen {seconds:,.0f} s ago"
        case reading.BehindInQueue(0):
            yield "is the next of its type"
        case reading.BehindInQueue(ahead):
            yield f"waits: {ahead:,} of its type go first"
        case reading.PayloadMismatch(fingerprint, violations):
            faults = " ".join(each.sentence("payload") for each in violations)
            yield f"is parked: workers of version {fingerprint[:12]} cannot read it: {faults}"
    if job.status.value == Status.RUNNING:
        if expired_at is None:
            yield f"runs in {job.worker_id} since {_time(job.started_at)}"
        else:
            yield f"the lease of {job.worker_id} expired at {_time(expired_at)}"
        if job.cancel_requested_at is not None:
            yield f"was requested to stop at {_time(job.cancel_requested_at)}"
    if job.error is not None:
        yield _error(job.error)


def _error(error: JobError) -> str:
    return f"{error.code}: {error.message}"


def _text(value: Any) -> str:
    return "" if value is None else to_json(value).decode()


def _time(time: datetime | None) -> str:
    return "" if time is None else f"{time:%Y-%m-%d %H:%M:%S}"
