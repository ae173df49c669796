"""The wheel: carries what it needs, and runs outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built and installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def jobs(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The wheel comes first on the path, and nothing of the checkout is on it.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JOBS_", "PYTHON"))
    }
    code = "import api; assert 'site' in api.__file__; from api.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_carries_migrations_types_and_the_schema(installed: Path) -> None:
    for name in (
        "api/_alembic/env.py",
        "api/_alembic/versions/0001_jobs.py",
        "api/graphql/schema.graphql",
        "api/py.typed",
        "registry/py.typed",
        "registry/catalog/thumbnail.py",
    ):
        assert (installed / name).is_file(), name
    # A folder of that name would hide the library.
    assert not (installed / "alembic").exists()
    assert not (installed / "tests").exists()


def test_the_wheel_migrates_enqueues_and_lists_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    migrated = jobs(installed, tmp_path, "migrate")
    assert migrated.returncode == 0, migrated.stderr
    assert "0001" in migrated.stdout
    assert (tmp_path / "jobs.db").exists()
    assert "thumbnail.create" in jobs(installed, tmp_path, "types").stdout
    (tmp_path / "payout.json").write_text('{"batchId": "b", "escrowId": "e"}')
    stored = jobs(installed, tmp_path, "enqueue", "payout.execute", "payout.json")
    assert stored.returncode == 0, stored.stderr
    assert "queued" in stored.stdout


def test_listing_the_types_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from api.cli import app;"
        "result = CliRunner().invoke(app, ['types']); assert result.exit_code == 0;"
        "heavy = ['sqlalchemy', 'strawberry', 'graphql', 'uvicorn', 'starlette', 'PIL', 'fsspec',"
        " 'alembic', 'structlog'];"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
