"""What `job-registry check` prints: for people, as JSON, and as annotations of GitHub Actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from job_registry.errors import escaped, shortened, shortened_text
from job_registry.evolution import Change, Level, Outcome

if TYPE_CHECKING:
    from job_registry_api.graphql.schema_changes import ClientChange
    from job_registry_api.queue.replaying import Found, Replay


@dataclass(frozen=True, slots=True)
class Compared:
    """The changes since `name`: the file of a lock, or the URL of a server.

    `clients` are those of its GraphQL schema, if they were requested.
    """

    name: str
    changes: Sequence[Change]
    clients: Sequence[ClientChange] = ()

    @property
    def breaks(self) -> bool:
        """Whether a change breaks something."""
        return any(change.level is Level.BREAKING for change in self.changes) or any(
            change.kind == "breaking" for change in self.clients
        )


@dataclass(frozen=True, slots=True)
class Queue:
    """The unfinished jobs of a database, and the current concurrency limits by job type."""

    replay: Replay
    limits: Mapping[str, int]

    @property
    def over_limit(self) -> dict[str, tuple[int, int]]:
        """The job types of which more jobs run than their limit, with both numbers."""
        running = self.replay.running
        return {
            name: (running[name], limit)
            for name, limit in sorted(self.limits.items())
            if running[name] > limit
        }


def lines_of(compared: Compared) -> Iterator[str]:
    """Yield the lines about the changes since a lock or a server."""
    for change in compared.changes:
        yield f"{change.level.upper()} {_title(change)}"
        if change.kind not in ("added", "removed"):
            yield f"  was: {_shown(change.before)}"
            yield f"  is: {_shown(change.after)}"
        yield f"  {change.reason}"
        yield f"  {_outcomes(change)}"
        for advice in change.advice:
            yield f"  > {advice}"
    for each in compared.clients:
        if each.kind != "safe":
            yield f"{'WARNING' if each.kind == 'dangerous' else 'BREAKING'} GraphQL {each.path}"
            yield f"  {each.message}"
    levels = Counter[str](change.level.value for change in compared.changes)
    levels.update(_LEVELS[each.kind] for each in compared.clients)
    counts = [
        f"{count:,} {level}{'s' if level is Level.WARNING and count > 1 else ''}"
        for level in Level
        if (count := levels[level.value])
    ]
    yield f"Changes since {compared.name}: {', '.join(counts) or 'none'}."


_LEVELS: Final = {
    "breaking": Level.BREAKING.value,
    "dangerous": Level.WARNING.value,
    "safe": Level.SAFE.value,
}


def lines_of_queue(queue: Queue) -> Iterator[str]:
    """Yield the lines about the unfinished jobs of a database."""
    replay = queue.replay
    for fault, found in replay.faults.items():
        where = fault.path or "the whole payload"
        yield f"BREAKING {fault.job_type} {where}: {fault.code} in {_jobs(found)}"
    for name, found in replay.unknown.items():
        yield f"BREAKING {name}: there is no job type of this name, for {_jobs(found)}"
    if replay.unknown:
        yield "  > Add their modules to JOBS_CATALOG, or their names to former_names."
    for name, (running, limit) in queue.over_limit.items():
        yield f"WARNING {name}: {running:,} jobs run now, and the concurrency limit is {limit:,}"
    refused = replay.refused.total()
    unknown = sum(found.jobs for found in replay.unknown.values())
    yield (
        f"Unfinished jobs in the database: {replay.total:,};"
        f" {refused:,} cannot be read, {unknown:,} have an unknown type."
    )


def as_json(compared: Sequence[Compared], queue: Queue | None, breaks: bool) -> dict[str, Any]:
    """Return the whole report as a JSON object."""
    return {
        "breaks": breaks,
        "compared": [
            {
                "with": each.name,
                "changes": [_change_json(change) for change in each.changes],
                "clients": [
                    {"kind": change.kind, "path": change.path, "message": change.message}
                    for change in each.clients
                ],
            }
            for each in compared
        ],
        "database": None if queue is None else _queue_json(queue),
    }


def github_annotations(compared: Sequence[Compared], queue: Queue | None) -> Iterator[str]:
    """Yield the workflow commands for GitHub Actions, one for each breaking change and warning."""
    for each in compared:
        for change in each.changes:
            if change.level is not Level.SAFE:
                words = " ".join((change.reason, *change.advice))
                yield _annotation(change.level, _title(change), words, each.name)
        for client in each.clients:
            if client.kind != "safe":
                level = Level(_LEVELS[client.kind])
                yield _annotation(level, f"GraphQL {client.path}", client.message, each.name)
    if queue is not None:
        for line in lines_of_queue(queue):
            first, _, words = line.partition(" ")
            if first in ("BREAKING", "WARNING"):
                yield _annotation(Level(first.lower()), words.partition(":")[0], words, None)


def _annotation(level: Level, title: str, message: str, file: str | None) -> str:
    """Return a workflow command, escaped as GitHub's own toolkit does it."""
    command = "error" if level is Level.BREAKING else "warning"
    # A URL is not a file of the repository.
    place = "" if file is None or "://" in file else f"file={_property(file)},"
    return f"::{command} {place}title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return escaped(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _title(change: Change) -> str:
    what = "" if change.kind == "payload" and change.path else f" {change.kind.replace('_', ' ')}"
    return f"{change.job_type}{what} {change.path}".rstrip()


def _outcomes(change: Change) -> str:
    outcomes = {
        "stored jobs": change.stored_jobs,
        "older workers": change.older_workers,
        "older clients": change.older_clients,
    }
    if {*outcomes.values()} == {Outcome.SURVIVE}:
        return "Stored jobs, older workers and older clients survive."
    text = "; ".join(f"{who} {_SEEN[outcome]}" for who, outcome in outcomes.items())
    return f"{text[0].upper()}{text[1:]}."


_SEEN: Final = {
    Outcome.SURVIVE: "survive",
    Outcome.WAIT: "leave such jobs to newer workers",
    Outcome.BREAK: "break",
    Outcome.UNKNOWN: "may break: the schemas alone do not show it",
}


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case str():
            return shortened_text(value)
    return shortened(value, 300)


def _jobs(found: Found) -> str:
    counted = "1 job" if found.jobs == 1 else f"{found.jobs:,} jobs"
    return f"{counted}, such as {', '.join(found.sample_ids)}"


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "level": change.level.value,
        "jobType": change.job_type,
        "kind": change.kind,
        "path": change.path,
        "before": change.before,
        "after": change.after,
        "reason": change.reason,
        "storedJobs": change.stored_jobs.value,
        "olderWorkers": change.older_workers.value,
        "olderClients": change.older_clients.value,
        "advice": list(change.advice),
    }


def _queue_json(queue: Queue) -> dict[str, Any]:
    replay = queue.replay
    return {
        "jobs": replay.total,
        "jobTypes": [
            {"jobType": name, "jobs": jobs, "refused": replay.refused[name]}
            for name, jobs in sorted(replay.jobs.items())
        ],
        "faults": [
            {
                "jobType": fault.job_type,
                "path": fault.path,
                "code": fault.code,
                **_found_json(found),
            }
            for fault, found in replay.faults.items()
        ],
        "unknown": [
            {"jobType": name, **_found_json(found)} for name, found in replay.unknown.items()
        ],
        "overLimit": [
            {"jobType": name, "running": running, "limit": limit}
            for name, (running, limit) in queue.over_limit.items()
        ],
    }


def _found_json(found: Found) -> dict[str, Any]:
    return {"jobs": found.jobs, "sampleIds": list(found.sample_ids)}
