"""The wheel: carries what it needs, and runs outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from job_registry_api import pages
from tests import CODE, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
VERSION = PROJECT["project"]["version"]

WITHOUT_GRAPHIQL = "JOB_REGISTRY_WITHOUT_GRAPHIQL"
WHEEL_SOURCES = ("api", "registry", "alembic", "pyproject.toml", "README.md", "LICENSE")

# One process builds the wheel.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built and installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    # Where Node is missing, what else the wheel holds is tested all the same.
    without = {} if (pages.DIST / "index.html").is_file() else {WITHOUT_GRAPHIQL: "1"}
    python(ROOT, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), **without)
    (wheel,) = folder.glob("*.whl")
    python(
        folder, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel),
    )  # fmt: skip
    return folder / "site"


def python(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python without the settings and paths of this process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JOBS_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def jobs(installed: Path, cwd: Path, *arguments: str) -> str:
    """What the wheel's own `job-registry` prints.

    Without `site` (-S) the checkout, which an editable installation names in a .pth file, is not
    on the path: only the wheel is, and the libraries.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    return python(
        cwd, "-S", str(installed / "bin" / "job-registry"), *arguments, PYTHONPATH=path
    ).stdout


def test_the_wheel_carries_migrations_types_and_the_schema(installed: Path) -> None:
    for name in (
        "job_registry_api/_alembic/env.py",
        "job_registry_api/_alembic/versions/0001_jobs.py",
        "job_registry_api/graphql/schema.graphql",
        "job_registry_api/py.typed",
        "job_registry/py.typed",
        "job_registry/catalog/thumbnail.py",
    ):
        assert (installed / name).is_file(), name
    # A folder of that name would hide the library.
    assert not (installed / "alembic").exists()
    assert not (installed / "tests").exists()


@pytest.mark.skipif(
    not (ROOT / "api/web/dist/index.html").is_file(),
    reason="GraphiQL is not built: install Node 20.19 or newer and run `make install`",
)
def test_the_wheel_carries_graphiql_as_built_and_not_what_it_is_built_of(installed: Path) -> None:
    dist = installed / "job_registry_api/web/dist"
    assert (dist / "index.html").is_file()
    assert list((dist / "graphql/assets").glob("*.worker-*.js"))
    licenses = (dist / "graphql/assets/licenses.md").read_text("utf-8")
    assert all(f"## {name} - " in licenses for name in ("graphiql", "react", "monaco-editor"))
    assert [path.name for path in dist.parent.iterdir()] == ["dist"]


def test_a_wheel_without_graphiql_is_only_built_when_it_is_requested(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--", *WHEEL_SOURCES], cwd=ROOT, check=True, capture_output=True
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    refused = subprocess.run(build, cwd=checkout, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert f"set {WITHOUT_GRAPHIQL}=1 to build a wheel without GraphiQL" in refused.stderr
    assert not list(checkout.glob("dist/*.whl"))
    python(checkout, *build[1:], **{WITHOUT_GRAPHIQL: "1"})
    assert list(checkout.glob("dist/*.whl"))


def test_the_wheel_migrates_enqueues_and_lists_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    assert "0001" in jobs(installed, tmp_path, "migrate")
    assert (tmp_path / "jobs.db").exists()
    assert "thumbnail.create" in jobs(installed, tmp_path, "types")
    (tmp_path / "payout.json").write_text('{"batchId": "b", "escrowId": "e"}')
    assert "queued" in jobs(installed, tmp_path, "enqueue", "payout.execute", "payout.json")
    assert jobs(installed, tmp_path, "--version") == f"job-registry {VERSION}\n"


@pytest.mark.slow
def test_pytest_finds_the_fixtures_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    (tmp_path / "test_mails.py").write_text(
        "def test_it(job_queue):\n    job_queue.assert_not_enqueued('payout.execute')\n"
    )
    shown = python(tmp_path, "-S", "-m", "pytest", "-p", "no:cacheprovider", PYTHONPATH=path).stdout
    assert "1 passed" in shown


def test_the_migrations_folder_does_not_hide_the_library_from_who_works_in_the_checkout() -> None:
    # A folder is found before site-packages here, but one without __init__.py only if there is
    # no package of that name.
    assert not (ROOT / "alembic" / "__init__.py").exists()
    found = python(ROOT, "-c", "import alembic.config; print(alembic.config.__file__)").stdout
    assert Path(found.strip()).is_relative_to(sysconfig.get_path("purelib"))


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"]),
        (
            "requirements-dev.txt",
            PROJECT["project"]["dependencies"]
            + PROJECT["dependency-groups"]["dev"]
            + PROJECT["build-system"]["requires"],
        ),
        (
            "requirements-otel.txt",
            PROJECT["project"]["dependencies"]
            + PROJECT["project"]["optional-dependencies"]["otel"],
        ),
    ],
)
def test_a_lock_has_what_the_project_needs_by_hash_and_from_any_index(
    lock: str, wanted: list[str]
) -> None:
    text = (ROOT / lock).read_text("utf-8")
    assert "://" not in text
    assert "--index-url" not in text
    assert "--find-links" not in text
    pinned: dict[str, str] = {}
    lines = 0
    for name, version, hashes in re.findall(
        r"^([\w.-]+)==([^\s;]+)[^\n]*\\\n((?:    --hash=sha256:\w{64}(?: \\)?\n)+)", text, re.M
    ):
        assert hashes
        lines += 1  # Of one name there may be two, for different versions of Python.
        pinned[canonicalize_name(name)] = version
    assert lines == len(re.findall(r"^\w", text, re.M)), "a line without version or hash"
    for requirement in map(Requirement, wanted):
        version = pinned.get(canonicalize_name(requirement.name), "")
        assert version, f"{requirement.name} is not in {lock}: make lock"
        assert requirement.specifier.contains(version), f"{lock} has {requirement} as {version}"


def test_the_image_has_the_versions_that_are_tested() -> None:
    tested = (ROOT / "requirements-dev.txt").read_text("utf-8").splitlines()
    installed = (ROOT / "requirements-otel.txt").read_text("utf-8").splitlines()
    assert [line for line in installed if "==" in line and line not in tested] == []


DATABASE = {"sqlalchemy", "sqlmodel", "alembic", "asyncpg", "aiosqlite"}
GRAPHQL = {"strawberry", "graphql"}
HTTP = {"starlette", "uvicorn", "jwt"}
HANDLERS = {"PIL", "fsspec"}


@pytest.mark.parametrize(
    ("command", "not_needed"),
    [
        ("types", DATABASE | GRAPHQL | HTTP | HANDLERS),
        ("policy payout.execute", DATABASE | GRAPHQL | HTTP | HANDLERS),
        ("validate thumbnail.create -", DATABASE | GRAPHQL | HTTP | HANDLERS),
        ("migrate", GRAPHQL | HTTP | HANDLERS),
        ("enqueue thumbnail.create -", GRAPHQL | HTTP | HANDLERS),
        ("schema", HANDLERS | {"uvicorn", "alembic", "aiosqlite"}),
    ],
)
def test_a_command_imports_only_what_it_needs(
    tmp_path: Path, command: str, not_needed: set[str]
) -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from job_registry_api.cli.command import app
payload = '{{"assetId": "a", "versionNumber": 1}}'
result = CliRunner().invoke(app, {command.split()}, input=payload)
assert result.exit_code == 0, result.output
print(*sorted(name for name in sys.modules if "." not in name), file=open("imported", "w"))
"""
    python(tmp_path, "-c", code, PYTHONPATH=CODE)
    imported = set((tmp_path / "imported").read_text().split())
    assert {"job_registry_api", "job_registry", "pydantic"} <= imported
    assert imported & not_needed == set()
