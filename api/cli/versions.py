"""`job-registry versions` and `unpark`: the versions of job types in the queue, and parked jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from job_registry import JobRegistry, JobTypeNotFound
from job_registry_api.cli import startup
from job_registry_api.cli.output import AsJson, print_json, print_table, refuse, say
from job_registry_api.settings import Settings

if TYPE_CHECKING:
    from job_registry_api.queue.models import JobCounts, TypeVersion

TypeNames = Annotated[
    list[str] | None, typer.Argument(metavar="TYPE", help="Job types. Defaults to all.")
]

SHOWN_DIGITS = 12
"""How many digits of a fingerprint a table shows."""


def versions(type_names: TypeNames = None, as_json: AsJson = False) -> None:
    """Show under which versions of the job types the queue has jobs and workers.

    A version is a fingerprint, and (this) marks that of your code. `refused` counts the parked jobs
    that its workers could not read. Times are in UTC.
    """
    settings = startup.read_settings()
    registry = startup.read_registry(settings)
    names = _known(registry, type_names, as_json)
    startup.prepare_database(settings, only_check=True)
    with startup.database_errors():
        found, unregistered = asyncio.run(_versions(settings, registry, names))
    if as_json:
        print_json(_as_json(registry, found, unregistered))
        return
    print_table(
        ("type", "fingerprint", "queued", "running", "parked", "refused", "last worker"),
        _rows(registry, found, unregistered),
    )


def unpark(type_names: TypeNames = None, as_json: AsJson = False) -> None:
    """Let every worker try the parked jobs of some job types again.

    Needed only if no fingerprint changed, for example after a repair inside an upgrade function.
    """
    settings = startup.read_settings()
    registry = startup.read_registry(settings)
    _known(registry, type_names, as_json)
    startup.prepare_database(settings, only_check=True)
    with startup.database_errors():
        unparked = asyncio.run(_unpark(settings, registry, type_names))
    if as_json:
        print_json({"unparked": unparked})
    else:
        say(f"{unparked:,} unparked")


def _known(registry: JobRegistry, type_names: list[str] | None, as_json: bool) -> list[str]:
    """Return the current names. End the command if there is no such type."""
    try:
        return [registry.get_type(name).name for name in type_names or registry]
    except JobTypeNotFound as unknown:
        refuse(unknown, as_json)


async def _versions(
    settings: Settings, registry: JobRegistry, names: list[str]
) -> tuple[dict[str, list[TypeVersion]], dict[str, JobCounts]]:
    from job_registry_api.queue.queue import JobQueue

    async with JobQueue.from_settings(settings, registry, prepare=False) as queue:
        found = {name: list(await queue.versions(name)) for name in names}
        return found, await queue.unregistered_types()


async def _unpark(settings: Settings, registry: JobRegistry, names: list[str] | None) -> int:
    from job_registry_api.queue.queue import JobQueue

    async with JobQueue.from_settings(settings, registry, prepare=False) as queue:
        return await queue.unpark(names or None)


def _rows(
    registry: JobRegistry,
    found: dict[str, list[TypeVersion]],
    unregistered: dict[str, JobCounts],
) -> Iterator[Sequence[str]]:
    for name, some in found.items():
        for each in some:
            mark = " (this)" if each.fingerprint == registry[name].fingerprint else ""
            numbers = (each.queued, each.running, each.parked, each.refused)
            yield (
                name,
                each.fingerprint[:SHOWN_DIGITS] + mark,
                *(f"{number:,}" for number in numbers),
                f"{each.worker_seen_at:%Y-%m-%d %H:%M:%S}" if each.worker_seen_at else "never",
            )
    for name, counts in unregistered.items():
        known = (counts.queued, counts.running, counts.parked)
        yield name, "not registered", *(f"{number:,}" for number in known)


def _as_json(
    registry: JobRegistry,
    found: dict[str, list[TypeVersion]],
    unregistered: dict[str, JobCounts],
) -> dict[str, Any]:
    types = [
        {
            "name": name,
            "fingerprint": registry[name].fingerprint,
            "versions": [
                {
                    "fingerprint": each.fingerprint,
                    "queued": each.queued,
                    "running": each.running,
                    "parked": each.parked,
                    "refused": each.refused,
                    "lastWorkerAt": each.worker_seen_at.isoformat()
                    if each.worker_seen_at
                    else None,
                }
                for each in some
            ],
        }
        for name, some in found.items()
    ]
    others = [{"name": name, "counts": asdict(counts)} for name, counts in unregistered.items()]
    return {"types": types, "unregisteredTypes": others}
