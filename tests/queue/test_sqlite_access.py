"""A SQLite file that a process may not read or write: what it says, and when it recovers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import CODE

ROOT_WITHOUT_ITS_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Modes of files do not hold for root, as which CI runs the tests."""

pytestmark = [
    pytest.mark.any_database,
    pytest.mark.skipif(
        os.geteuid() == 0 and shutil.which("setpriv") is None, reason="setpriv is not installed"
    ),
]


def as_a_user(
    *command: str, folder: Path, stdin: str = "", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run Python as a user for whom the modes of files hold."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JOBS_")}
    return subprocess.run(
        [*(ROOT_WITHOUT_ITS_RIGHTS if os.geteuid() == 0 else []), sys.executable, *command],
        cwd=folder,
        env={**environment, "PYTHONPATH": CODE, **settings},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def read_only_file(folder: Path) -> None:
    (folder / "jobs.db").chmod(0o400)


def read_only_folder(folder: Path) -> None:
    folder.chmod(0o500)


def unsearchable_folder(folder: Path) -> None:
    folder.chmod(0)


def folder_at_its_place(folder: Path) -> None:
    (folder / "jobs.db").unlink()
    (folder / "jobs.db").mkdir()


def other_file(folder: Path) -> None:
    (folder / "jobs.db").write_text("a file of something else" * 10, "utf-8")


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (read_only_file, "this process may not write to jobs.db (mode 0400)"),
        (other_file, "file is not a database"),
        *(
            pytest.param(prepare, reason, marks=pytest.mark.slow)
            for prepare, reason in (
                (read_only_folder, "this process may not create files beside it, in {folder}"),
                (unsearchable_folder, "Permission denied"),
                (folder_at_its_place, "Is a directory"),
                (no_folder, "there is no folder {folder}"),
            )
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, sqlite_template: Path, prepare: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    shutil.copy(sqlite_template, folder / "jobs.db")
    prepare(folder)
    try:
        refused = as_a_user(
            *("-m", "job_registry_api.cli", "enqueue", "payout.execute", "-"),
            folder=tmp_path,
            stdin='{"batchId": "b", "escrowId": "e"}',
            JOBS_DATABASE_URL=f"sqlite:///{folder}/jobs.db",
        )
    finally:
        if folder.exists():
            folder.chmod(0o700)
    assert refused.stderr == (
        f"The database is not available: the database's file {folder}/jobs.db:"
        f" {reason.format(folder=folder)}\n"
    )
    assert refused.returncode == 1


SHELL = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
"""A shell that may mount, where nobody else sees it."""


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*SHELL, "true"], check=False).returncode != 0,
    reason="unshare is not installed, or not allowed",
)
@pytest.mark.parametrize(
    ("mounts", "reason"),
    [
        (
            'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"',
            "its file system is mounted read-only",
        ),
        (
            # The name of another mount has a carriage return, at which `splitlines` splits.
            'other="$0/$(printf "a\\rb")"; mkdir "$other"; mount --bind "$other" "$other";'
            ' mount --bind "$0/jobs.db" "$0/jobs.db"',
            "it is mounted by itself, so the log beside it, which has the latest jobs, is lost with"
            " the container. Mount its folder instead",
        ),
    ],
    ids=["read-only", "by itself"],
)
def test_a_mount_that_does_not_serve_is_the_reason(
    mounts: str, reason: str, tmp_path: Path, sqlite_template: Path
) -> None:
    folder = tmp_path / "a disk"
    folder.mkdir()
    shutil.copy(sqlite_template, folder / "jobs.db")
    listing = (sys.executable, "-m", "job_registry_api.cli", "list")
    refused = subprocess.run(
        [*SHELL, f'{mounts}; exec "$@"', str(folder), *listing],
        env={
            **os.environ,
            "PYTHONPATH": CODE,
            "JOBS_DATABASE_URL": f"sqlite:///{folder}/jobs.db",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.stderr == (
        f"The database is not available: the database's file {folder}/jobs.db: {reason}\n"
    )
    assert refused.returncode == 1


def test_a_check_of_the_schema_needs_to_read_and_not_to_write(
    tmp_path: Path, sqlite_template: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    check = ("-m", "job_registry_api.cli", "migrate", "--check")
    (tmp_path / "jobs.db").chmod(0o400)
    assert as_a_user(*check, folder=tmp_path).returncode == 0
    (tmp_path / "jobs.db").chmod(0o200)
    refused = as_a_user(*check, folder=tmp_path)
    assert refused.stderr == (
        f"The database is not available: the database's file {tmp_path}/jobs.db:"
        " this process may not read jobs.db (mode 0200)\n"
    )


RECOVERY = """
import asyncio, os, sys
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.sqlite_database import SQLiteDatabase


async def write_and_read(database):
    await database.write(lambda connection: connection.execute("DELETE FROM job_type_state"))
    async with database.reading() as connection:
        await connection.exec_driver_sql("SELECT 1")


async def main():
    database = SQLiteDatabase("sqlite:///jobs.db")
    os.chmod("jobs.db", 0o400)
    for _ in range(2):
        try:
            await write_and_read(database)
        except QueueUnavailable as error:
            print(error.kind)
    os.chmod("jobs.db", 0o600)
    await write_and_read(database)
    await database.close()


asyncio.run(main())
"""


def test_a_file_that_becomes_writable_is_written_without_a_restart(
    tmp_path: Path, sqlite_template: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    ran = as_a_user("-c", RECOVERY, folder=tmp_path)
    assert (ran.stdout, ran.stderr) == ("read_only\nread_only\n", "")
