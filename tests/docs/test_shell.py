"""The console examples run as a reader runs them: in order, each page in a folder of its own."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from job_registry_api.queue import migrations
from job_registry_api.settings import load_settings
from tests.conftest import run_sql
from tests.docs.pages import PAGES, blocks, blocks_of, write_modules
from tests.docs.shell import PATIENCE_SECONDS, commands, shell

RESULTS = {
    "README.md": ("mail.send", {"sent": "ada@example.com"}),
    "workers.md": ("report.render", {"total": 30}),
}
"""The results of the jobs that the worker of a page runs."""

NEEDS_POSTGRESQL = ("postgresql", "pgbouncer")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[] if page.name == "README.md" else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_the_commands_of_a_page_print_what_it_shows(page: Path, tmp_path: Path) -> None:
    with shell(tmp_path / "reader") as reader:
        for block in blocks_of(page):
            if block.kind == "module":
                write_modules(tmp_path / "reader", [block])
            elif block.kind == "shell" and block.argument not in NEEDS_POSTGRESQL:
                reader.run(block)
        if page.name in RESULTS:
            assert (
                result_of(tmp_path / "reader/jobs.db", RESULTS[page.name][0])
                == RESULTS[page.name][1]
            )


def result_of(file: Path, job_type: str) -> object:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up:
        with closing(sqlite3.connect(file)) as database:
            query = "SELECT result FROM job WHERE type = ?"
            ((result,),) = database.execute(query, (job_type,)).fetchall()
        if result is not None:
            return json.loads(result)
        time.sleep(0.05)
    return None


@pytest.mark.slow
def test_the_backup_as_shown_is_whole(tmp_path: Path) -> None:
    with shell(tmp_path / "reader") as reader:
        for block in blocks("shell", "operating.md")[:2]:
            reader.run(block)
    for name in ("jobs.db", "backup.db"):
        url = f"sqlite:///{tmp_path / 'reader' / name}"
        assert run_sql(url, "SELECT count(*) FROM job") == [(1,)]


@pytest.mark.slow
def test_the_commands_and_statements_for_postgresql_run(
    tmp_path: Path, fresh_postgresql_url: str
) -> None:
    migrations.downgrade(fresh_postgresql_url)
    shown = "postgresql://jobs:secret@db.internal/jobs"
    with shell(tmp_path / "reader", **{shown: fresh_postgresql_url}) as reader:
        for block in blocks("shell"):
            if block.argument == "postgresql":
                reader.run(block)
    grants = (tmp_path / "reader/grants.sql").read_text().splitlines()
    assert len(grants) > 10
    statements = [each for block in blocks("sql") for each in block.text.split(";\n") if each]
    run_sql(fresh_postgresql_url, "CREATE ROLE jobs_app LOGIN")
    try:
        run_sql(fresh_postgresql_url, *grants, *statements)
    finally:
        run_sql(fresh_postgresql_url, "DROP OWNED BY jobs_app", "DROP ROLE jobs_app")


def test_the_settings_for_pgbouncer_are_accepted_as_shown() -> None:
    (block,) = (each for each in blocks("shell") if each.argument == "pgbouncer")
    exports = [command.removeprefix("export ") for command, _ in commands(block)]
    settings = load_settings(dict(each.split("=", 1) for each in exports))
    assert settings.database_pooler == "transaction"


def test_every_unit_of_systemd_starts_a_command_and_waits_long_enough() -> None:
    units = blocks("unit")
    assert len(units) == 2
    grace = load_settings({}).shutdown_seconds + 15
    for unit in units:
        lines = dict(
            line.split("=", 1) for line in unit.text.splitlines() if "=" in line and line[0] != "#"
        )
        assert " serve" in lines["ExecStart"] or " worker" in lines["ExecStart"]
        assert "/.venv/bin/job-registry " in lines["ExecStart"]
        assert float(lines["TimeoutStopSec"]) >= grace
