"""docs/operating.md stays true: its commands run, and what it names is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from job_registry_api.metrics import Metrics
from job_registry_api.settings import Settings
from tests import CODE
from tests.conftest import run_sql
from tests.test_health import worker

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/operating.md").read_text("utf-8")


def example(name: str) -> list[str]:
    """The commands of an example, in order."""
    (console,) = re.findall(rf"<!-- example: {name} -->\n```console\n(.*?)```", GUIDE, re.DOTALL)
    return [line.removeprefix("$ ") for line in console.splitlines()]


def run(folder: Path, *commands: str, **settings: str) -> str:
    """Runs commands in one shell, where `.venv/bin/job-registry` is this checkout's command."""
    programs = folder / ".venv/bin"
    if not programs.exists():
        programs.mkdir(parents=True)
        (programs / "python").symlink_to(sys.executable)
        (programs / "job-registry").write_text(
            f'#!/bin/sh\nexec {sys.executable} -m job_registry_api.cli "$@"\n'
        )
        (programs / "job-registry").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JOBS_", "PYTHON"))}
    ran = subprocess.run(
        ["bash", "-c", "\n".join(["set -e -o pipefail", *commands])],
        cwd=folder,
        env=clean | {"PYTHONPATH": CODE} | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_commands_for_one_machine_run_and_its_backup_is_whole(tmp_path: Path) -> None:
    printed = run(tmp_path, *example("one machine"), *example("backup"))
    assert "Migrated from an empty database" in printed
    assert printed.count("up to date") == 2
    for name in ("jobs.db", "backup.db"):
        assert run_sql(f"sqlite:///{tmp_path / name}", "SELECT count(*) FROM job") == [(1,)]


def test_the_commands_for_many_machines_run(tmp_path: Path, fresh_postgresql_url: str) -> None:
    printed = run(tmp_path, *example("many machines"), JOBS_DATABASE_URL=fresh_postgresql_url)
    assert "Nothing to do" in printed
    assert json.loads(printed[printed.index("{") :])["fits"] is True


def test_the_grants_and_the_sql_for_postgresql_run(
    tmp_path: Path, fresh_postgresql_url: str
) -> None:
    printed = run(tmp_path, *example("grants"), JOBS_DATABASE_URL=fresh_postgresql_url)
    run_sql(fresh_postgresql_url, "CREATE ROLE jobs_app LOGIN")
    try:
        statements = printed.splitlines()
        assert len(statements) > 10
        for block in re.findall(r"```sql\n(.*?)```", GUIDE, re.DOTALL):
            statements += [each for each in block.split(";\n") if each.strip()]
        run_sql(fresh_postgresql_url, *statements)
    finally:
        run_sql(fresh_postgresql_url, "DROP OWNED BY jobs_app", "DROP ROLE jobs_app")


def test_the_health_commands_run(sqlite_template: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(sqlite_template.read_bytes())
    with worker(f"sqlite:///{tmp_path / 'jobs.db'}", tmp_path) as (address, _):
        shown = "http://127.0.0.1:9000"
        commands = [each.replace(shown, address) for each in example("health")]
        ready = [each.replace("curl ", "curl --retry 20 --retry-all-errors ") for each in commands]
        printed = run(tmp_path, *ready)
    assert printed.startswith('{"status":"ok"}{"status":"ok"}')
    assert "job_registry_running_attempts 0.0" in printed


def test_every_metric_is_in_the_table_and_none_else() -> None:
    text = Metrics(["a"]).text().decode()
    served = {
        name + ("_total" if kind == "counter" and not name.endswith("_total") else "")
        for name, kind in re.findall(r"^# TYPE (job_registry_\w+) (counter|gauge)$", text, re.M)
    }
    served = {name for name in served if not name.endswith("_created")}
    assert set(re.findall(r"^\| `(job_registry_\w+)` \|", GUIDE, re.M)) == served


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"JOBS_[A-Z_]+", GUIDE))
    assert named
    assert named <= {f"JOBS_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("section", re.findall(r"^## (.*)$", GUIDE, re.M))
def test_every_section_ends_with_what_goes_wrong(section: str) -> None:
    text = GUIDE.split(f"\n## {section}\n")[1].split("\n## ")[0].rstrip()
    last_table = text.rpartition("\n\n")[2]
    assert last_table.startswith("| what goes wrong | how it looks |")
    assert len(last_table.splitlines()) > 2
