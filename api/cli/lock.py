"""`job-registry lock`: writes what the job types promise, to compare later versions with it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from job_registry_api.cli import startup
from job_registry_api.cli.lock_file import read_file
from job_registry_api.cli.output import REFUSED, AsJson, fail, print_json, say
from job_registry_api.defaults import LOCK_FILE

if TYPE_CHECKING:
    from job_registry.lock import ReleasedTypes


def lock(
    file: Annotated[
        str, typer.Option("--lock", metavar="FILE", help="The file to write.")
    ] = LOCK_FILE,
    as_json: AsJson = False,
) -> None:
    """Write what the job types promise to registry.lock.json.

    Commit the file with each release: `check` compares later code with it. A file that is not a
    lock is not replaced.
    """
    registry = startup.read_registry(startup.read_settings())
    from job_registry.lock import Lock, lock_text, released_types
    from job_registry_api.graphql.schema import bare_sdl

    current = released_types(registry.values())
    text = lock_text(Lock(current, bare_sdl(registry)))
    path = Path(file)
    former = _former(path)
    _write_whole(path, text)
    renamed = _renamed(former, current)
    changes = _differences(former, current, renamed)
    if as_json:
        print_json({"file": file, "jobTypes": len(current), "renamed": renamed, **changes})
    else:
        changes["renamed"] = [f"{older} to {name}" for older, name in renamed.items()]
        parts = [f"{what}: {', '.join(names)}" for what, names in changes.items() if names]
        kinds = "1 job type" if len(current) == 1 else f"{len(current):,} job types"
        say(f"{file}: {kinds}. {'; '.join(parts) or 'No job type has changed'}.")


def _former(path: Path) -> ReleasedTypes:
    """Return the job types of the file that is replaced."""
    try:
        return read_file(
            path,
            "It was left as it is. Restore or delete it, and run `job-registry lock` again.",
        ).job_types
    except FileNotFoundError:
        return {}


def _renamed(former: ReleasedTypes, current: ReleasedTypes) -> dict[str, str]:
    """Return the new names of job types by their names in the file that is replaced."""
    return {
        older: name
        for name, released in sorted(current.items())
        for older in released.former_names
        if name not in former and older in former
    }


def _differences(
    former: ReleasedTypes, current: ReleasedTypes, renamed: dict[str, str]
) -> dict[str, list[str]]:
    return {
        "added": sorted(current.keys() - former.keys() - set(renamed.values())),
        "changed": sorted(
            name for name in current.keys() & former if current[name] != former[name]
        ),
        "removed": sorted(former.keys() - current.keys() - renamed.keys()),
    }


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it has the whole text, or what it had before."""
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with partial.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except (OSError, ValueError) as error:
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        fail(REFUSED, f"Cannot write {path}: {reason}.")
