"""The files that Job Registry makes are for their owner, whatever the umask."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from job_registry.asset_files import AssetFiles
from job_registry_api.first_minute import draw_sample
from job_registry_api.queue import migrations
from job_registry_api.queue.sqlite_database import SQLiteDatabase
from tests.cli.test_cli import GOOD, Shell


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
    }


@pytest.mark.usefixtures("umask")
async def test_a_database_is_for_its_owner_with_its_log_and_index(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    await asyncio.to_thread(migrations.upgrade, url)
    database = SQLiteDatabase(url)
    try:
        await database.write(
            lambda connection: connection.execute("INSERT INTO job_type_state (type) VALUES ('a')")
        )
        assert modes(tmp_path) == {"jobs.db": 0o600, "jobs.db-wal": 0o600, "jobs.db-shm": 0o600}
    finally:
        await database.close()


@pytest.mark.usefixtures("umask")
def test_thumbnails_are_for_their_owner_and_folders_of_the_user_stay_as_they_are(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o755)
    AssetFiles(str(tmp_path / "mine"), "a/b", 1).write("64.webp", b"...")
    AssetFiles(str(tmp_path / "new" / "deep"), "a", 1).write("64.webp", b"...")
    draw_sample(str(tmp_path / "first"))
    assert modes(tmp_path) == {
        "mine": 0o755,
        "mine/a": 0o700,
        "mine/a/b": 0o700,
        "mine/a/b/1": 0o700,
        "mine/a/b/1/64.webp": 0o600,
        "new": 0o700,
        "new/deep": 0o700,
        "new/deep/a": 0o700,
        "new/deep/a/1": 0o700,
        "new/deep/a/1/64.webp": 0o600,
        "first": 0o700,
        "first/sample": 0o700,
        "first/sample/1.png": 0o600,
    }
    with Image.open(tmp_path / "first/sample/1.png") as sample:
        assert sample.size == (1600, 1000)


def test_a_database_that_all_users_can_read_is_said_once_and_left_as_it_is(tmp_path: Path) -> None:
    jobs = Shell(tmp_path)
    jobs("migrate")
    assert modes(tmp_path)["jobs.db"] == 0o600
    quiet = jobs("enqueue", "thumbnail.create", "-", stdin=GOOD)
    (tmp_path / "jobs.db").chmod(0o644)
    loud = jobs("enqueue", "thumbnail.create", "-", stdin=GOOD, JOBS_LOG_FORMAT="json")
    (tmp_path / "jobs.db").chmod(0o640)
    group = jobs("enqueue", "thumbnail.create", "-", stdin=GOOD)
    assert (quiet.stderr, group.stderr) == ("", "")
    assert loud.stderr.count("database.open_to_all_users") == 1
    assert '"mode":"0644"' in loud.stderr
    assert loud.returncode == 0
    assert modes(tmp_path)["jobs.db"] == 0o640
