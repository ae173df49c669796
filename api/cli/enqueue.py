"""`job-registry enqueue`: stores one payload, or one per line of a file."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job_registry import CodedError, JobRegistry, JobTypeNotFound, PayloadInvalid, Violation
from job_registry.json_values import NotJson, parse_json
from job_registry.wire_text import parse_date_time
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
    sentences,
)
from job_registry_api.cli.payloads import TypeName, parse_lines, read
from job_registry_api.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress

    from job_registry_api.queue.enqueueing import Enqueued, Refusal
    from job_registry_api.queue.errors import QueueUnavailable
    from job_registry_api.queue.queue import JobQueue
    from job_registry_api.tracing import Tracing

    Results = list[tuple[int, Enqueued | Refusal]]

Batch = list[tuple[int, str]]
"""Lines of a file and their numbers."""

BULK = 1_000
"""Jobs per transaction: enough to be fast, few enough to show progress."""

UNDER_WAY = 2
"""Batches at once: while the database stores one, the lines of the next are read and checked."""

UNKNOWN = ("unreachable", "timeout")
"""Kinds of failures after which the database may have stored a batch."""

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""

LISTED = 100
"""How many refused lines are listed for people. An atomic call has few lines: it lists all."""


def enqueue(
    type_name: TypeName,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A file with one payload as JSON, or many as JSON Lines. - reads standard input.",
        ),
    ],
    priority: Annotated[
        int | None, typer.Option(help="Priority, 0 to 100, higher first. Defaults to 50.")
    ] = None,
    schedule_at: Annotated[
        str | None,
        typer.Option(help="Earliest time of the first run, such as 2030-01-31T12:00:00Z."),
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Most attempts, 1 to 1,000. Defaults to the policy.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="A key that makes the command safe to repeat. For one payload."),
    ] = None,
    atomic: Annotated[
        bool, typer.Option(help="Store all payloads or none, up to JOBS_MAX_BULK_SIZE.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Store one job, or one per line."""
    settings = startup.read_settings()
    registry = startup.read_registry(settings)
    try:
        registry.get_type(type_name)
    except JobTypeNotFound as unknown:
        refuse(unknown, as_json)
    options = _options(priority, schedule_at, max_attempts, idempotency_key)
    lines = parse_lines(read(file), file)
    if len(lines) > 1 and idempotency_key is not None:
        fail(WRONG_USAGE, f"--idempotency-key is for a single payload; got {len(lines):,}.")
    if atomic and len(lines) > settings.max_bulk_size:
        fail(
            WRONG_USAGE,
            f"--atomic stores up to {settings.max_bulk_size:,} payloads (JOBS_MAX_BULK_SIZE);"
            f" got {len(lines):,}.",
        )
    startup.prepare_database(settings)
    with startup.database_errors(), startup.traced_command("enqueue") as tracing:
        refused = asyncio.run(
            _enqueue_all(settings, registry, tracing, type_name, lines, options, atomic, as_json)
        )
    if refused:
        sys.exit(REFUSED)


def _options(
    priority: int | None,
    schedule_at: str | None,
    max_attempts: int | None,
    idempotency_key: str | None,
) -> dict[str, Any]:
    """Return the options of every job. End the command if one is wrong."""
    from job_registry import EnqueueRequest
    from job_registry_api.queue.requests import input_faults

    faults: list[str] = []
    options: dict[str, Any] = {
        "priority": priority,
        "max_attempts": max_attempts,
        "idempotency_key": idempotency_key,
    }
    if schedule_at is not None:
        try:
            options["schedule_at"] = parse_date_time(schedule_at)
        except ValueError:
            faults.append(
                "--schedule-at: Expected a time with its offset, such as 2030-01-31T12:00:00Z;"
                f" got {schedule_at}."
            )
    faults += of_options(input_faults(EnqueueRequest("", None, **options)))
    if faults:
        fail(WRONG_USAGE, *faults)
    return options


async def _enqueue_all(
    settings: Settings,
    registry: JobRegistry,
    tracing: Tracing | None,
    type_name: str,
    lines: list[tuple[int, str]],
    options: dict[str, Any],
    atomic: bool,
    as_json: bool,
) -> int:
    """Store the payloads, print the result of each, and return how many were refused."""
    from job_registry_api.queue.errors import QueueUnavailable
    from job_registry_api.queue.queue import JobQueue

    counts = {"stored": 0, "deduplicated": 0, "refused": 0}
    size = len(lines) if atomic else min(BULK, settings.max_bulk_size)
    listed = len(lines) if atomic else LISTED
    async with JobQueue.from_settings(settings, registry, tracing=tracing, prepare=False) as queue:
        with _progress(len(lines)) as progress, _interruptible() as stopping:
            bar = progress.add_task("enqueue", total=len(lines))
            batches = (lines[start : start + size] for start in range(0, len(lines), size))
            stored = _in_order(
                batches,
                lambda batch: _enqueue_batch(queue, type_name, batch, options, atomic),
                stopping,
            )
            failed: list[tuple[Batch, QueueUnavailable]] = []
            unwritten: OutputFailed | None = None
            done = 0
            async for batch, results in stored:
                if isinstance(results, QueueUnavailable):
                    failed.append((batch, results))
                    continue
                for number, result in results:
                    try:
                        _show_enqueued(number, result, counts, listed, len(lines) > 1, as_json)
                    except OutputFailed as failure:
                        unwritten = failure
                        stopping.set()
                progress.advance(bar, len(batch))
                done = batch[-1][0]
    if failed:
        if len(lines) > 1:
            for sentence in _where_it_stopped(failed, done, counts):
                say(sentence, err)
        raise failed[0][1]
    stopped = [] if done == lines[-1][0] else _where_it_stopped(failed, done, counts)
    if unwritten is not None:
        fail_without_output(unwritten, *stopped)
    if stopped:
        fail(INTERRUPTED, *stopped)
    if counts["refused"] > listed and not as_json:
        say(f"The first {listed} refused lines are listed. --json lists all of them.", err)
    if len(lines) > 1 and not as_json:
        say(_summary(counts))
    return counts["refused"]


def _progress(jobs: int) -> Progress:
    """Return a progress bar, which is shown on a terminal if there are several jobs."""
    from rich.progress import (
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} jobs/s" if speed else "")

    return Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=jobs < 2 or not err.is_terminal,
    )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event, so that what is under way is stored and shown. A second one ends the
    command at once."""
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    former = signal.signal(signal.SIGINT, stop)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, former)


def _where_it_stopped(
    failed: list[tuple[Batch, QueueUnavailable]], done: int, counts: dict[str, int]
) -> list[str]:
    """Return which lines are stored of a file that is not stored whole."""
    first = failed[0][0][0][0] if failed else done + 1
    sentences = [f"Stopped at line {first:,}: {_summary(counts)}."]
    if not failed:
        return sentences
    last = failed[-1][0][-1][0]
    if any(error.kind in UNKNOWN for _, error in failed):
        sentences.append(f"It is not known whether the lines {first:,} to {last:,} are stored.")
    if done > last:
        sentences.append(f"The lines after {last:,} are done up to line {done:,}.")
    return sentences


async def _in_order(
    batches: Iterator[Batch],
    store: Callable[[Batch], Coroutine[Any, Any, Results]],
    stopping: threading.Event,
) -> AsyncIterator[tuple[Batch, Results | QueueUnavailable]]:
    """Store batches, and yield the results of each in order. None is begun after a failure, or
    when `stopping` is set."""
    from job_registry_api.queue.errors import QueueUnavailable

    async def stored(batch: Batch) -> tuple[Batch, Results | QueueUnavailable]:
        try:
            return batch, await store(batch)
        except QueueUnavailable as error:
            return batch, error

    running: deque[asyncio.Task[tuple[Batch, Results | QueueUnavailable]]] = deque()
    for batch in batches:
        if stopping.is_set():
            break
        running.append(asyncio.create_task(stored(batch)))
        if len(running) == UNDER_WAY:
            result = await running.popleft()
            yield result
            if isinstance(result[1], QueueUnavailable):
                break
    for task in running:
        yield await task


def _summary(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


async def _enqueue_batch(
    queue: JobQueue,
    type_name: str,
    batch: Batch,
    options: dict[str, Any],
    atomic: bool,
) -> Results:
    from job_registry import EnqueueRequest
    from job_registry_api.queue.enqueueing import NOT_STORED, not_stored
    from job_registry_api.queue.errors import InputInvalid

    jobs: list[EnqueueRequest | Refusal] = []
    for _, text in batch:
        try:
            jobs.append(EnqueueRequest(type_name, parse_json(text), **options))
        except NotJson as error:
            jobs.append(PayloadInvalid(type_name, [Violation("", "not_json", str(error))]))
    stored = await queue.enqueue_many(jobs, atomic=atomic)
    results = dict(zip((number for number, _ in batch), stored, strict=True))
    left = {
        number
        for number, result in results.items()
        if isinstance(result, InputInvalid) and result.violations[0].code == NOT_STORED
    }
    if left:
        results |= dict.fromkeys(left, not_stored(sorted(results.keys() - left), "line", "lines"))
    return list(results.items())


def _show_enqueued(
    number: int,
    result: Enqueued | Refusal,
    counts: dict[str, int],
    listed: int,
    many: bool,
    as_json: bool,
) -> None:
    if isinstance(result, CodedError):
        counts["refused"] += 1
        if as_json:
            print_json({"line": number, **refusal_json(result)}, lines=True)
        elif counts["refused"] <= listed:
            where = f"line {number}: " if many else ""
            for text in sentences(result):
                say(f"{where}{text}", err)
        return
    counts["deduplicated" if result.deduplicated else "stored"] += 1
    job = result.job
    if as_json:
        content = {
            "line": number,
            "jobId": str(job.id),
            "status": job.status.value,
            "type": job.type,
            "deduplicated": result.deduplicated,
        }
        print_json(content, lines=True)
    elif not many:
        say(f"{job.id} {'was there already' if result.deduplicated else job.status.value}")
