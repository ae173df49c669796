"""Reads the file of a lock for the commands that compare with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from job_registry_api.cli.output import WRONG_USAGE, fail

if TYPE_CHECKING:
    from job_registry.lock import Lock


def read_file(path: Path, *advice: str) -> Lock:
    """Return the lock in a file. End the command if the file cannot be read.

    `advice` are sentences on what to do about a file that is not a lock.

    Raises:
        FileNotFoundError: there is no file.
    """
    from job_registry.lock import MAX_LOCK_BYTES, LockInvalid, read_lock

    try:
        with path.open("rb") as stream:
            # One more, so that a larger file is noticed without reading it.
            return read_lock(stream.read(MAX_LOCK_BYTES + 1))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(WRONG_USAGE, f"Cannot read {path}: {reason}.")
    except LockInvalid as invalid:
        fail(WRONG_USAGE, f"{path} is not a lock that this version can read. {invalid}", *advice)
