"""`migrate` from outside, and what every command says when the database or the code fails."""

from __future__ import annotations

import json
import re
import sqlite3
import textwrap
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sqlalchemy.engine import make_url

from tests.cli.test_cli import GOOD, Shell
from tests.conftest import run_sql

PASSWORD = "lovelace-1815"


@pytest.fixture
def jobs(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_migrate_names_each_step_and_then_has_nothing_to_do(jobs: Shell) -> None:
    first = jobs("migrate")
    *steps, summary = first.stdout.splitlines()
    assert steps[0] == "0001  Jobs, their attempts, and counts that triggers maintain"
    last = steps[-1].split()[0]
    assert summary == f"Migrated from an empty database to revision {last}."
    second = jobs("migrate")
    assert second.stdout == f"Nothing to do: the database schema is at revision {last}.\n"
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.slow
def test_migrate_reports_the_same_to_programs(jobs: Shell) -> None:
    first = json.loads(jobs("migrate", "--json").stdout)
    assert first["from"] is None
    assert first["to"] == first["steps"][-1]["revision"]
    assert first["steps"][0]["title"] == "Jobs, their attempts, and counts that triggers maintain"
    again = json.loads(jobs("migrate", "--json").stdout)
    assert again == {"from": first["to"], "to": first["to"], "steps": []}


@pytest.mark.slow
def test_a_check_exits_with_1_until_the_database_fits(jobs: Shell) -> None:
    before = jobs("migrate", "--check")
    assert (before.returncode, before.stdout) == (1, "")
    assert before.stderr == (
        "The database has no Job Registry tables yet. Run `job-registry migrate`.\n"
    )
    as_json = jobs("migrate", "--check", "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["verdict"] == "empty"
    assert list(jobs.folder.iterdir()) == []

    jobs("migrate")
    after = jobs("migrate", "--check")
    assert (after.returncode, after.stderr) == (0, "")
    assert "up to date" in after.stdout
    told = json.loads(jobs("migrate", "--check", "--json").stdout)
    assert (told["fits"], told["revision"]) == (True, told["needed"])


@pytest.mark.slow
def test_grants_are_printed_as_sql(jobs: Shell, fresh_postgresql_url: str) -> None:
    result = jobs("migrate", "--grants", "web-app", JOBS_DATABASE_URL=fresh_postgresql_url)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == 'GRANT USAGE ON SCHEMA job_registry TO "web-app";'
    for line in (
        'GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE job_registry.job TO "web-app";',
        'GRANT USAGE, SELECT ON SEQUENCE job_registry.job_attempt_id_seq TO "web-app";',
        'GRANT EXECUTE ON FUNCTION job_registry.job_count_inserted() TO "web-app";',
    ):
        assert line in lines
    as_json = jobs("migrate", "--grants", "x", "--json", JOBS_DATABASE_URL=fresh_postgresql_url)
    assert len(json.loads(as_json.stdout)["statements"]) == len(lines)


def test_grants_of_a_database_without_tables_say_what_to_do(
    jobs: Shell, postgresql_url: str
) -> None:
    url = urlsplit(postgresql_url)._replace(path="/template1").geturl()
    result = jobs("migrate", "--grants", "web", JOBS_DATABASE_URL=url)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Run `job-registry migrate`" in result.stderr


def test_sqlite_has_no_roles_to_grant_to(jobs: Shell) -> None:
    result = jobs("migrate", "--grants", "web")
    assert (result.returncode, result.stdout) == (0, "")
    assert "SQLite has no roles" in result.stderr
    assert list(jobs.folder.iterdir()) == []


def test_check_and_grants_together_are_wrong_usage(jobs: Shell) -> None:
    result = jobs("migrate", "--check", "--grants", "web")
    assert result.returncode == 2
    assert "--check or --grants" in result.stderr


@pytest.mark.parametrize(
    "command", [["migrate"], ["serve", "--port", "0"], ["enqueue", "thumbnail.create", "-"]]
)
def test_a_table_of_somebody_else_is_one_sentence(jobs: Shell, command: list[str]) -> None:
    with closing(sqlite3.connect(jobs.folder / "jobs.db")) as database:
        database.execute("CREATE TABLE job (mine)")
    result = jobs(*command, stdin=GOOD)
    assert result.returncode == 1
    assert result.stderr == (
        "The database already has a table named job that is not Job Registry's. Use another"
        " database for Job Registry, or rename that table.\n"
    )


ALL_THAT_CONNECT = [
    ["migrate"],
    ["migrate", "--check"],
    ["migrate", "--grants", "web"],
    ["serve", "--port", "0"],
    ["worker"],
    ["enqueue", "thumbnail.create", "-"],
]


@pytest.mark.slow
@pytest.mark.parametrize("mistyped", ["host", "port", "name", "user"])
def test_a_mistyped_url_is_one_sentence_without_the_password(
    jobs: Shell, postgresql_url: str, mistyped: str
) -> None:
    right = make_url(postgresql_url).set(password=PASSWORD)
    url = {
        "host": right.set(host="127.0.0.1.invalid", query={}),
        "port": right.set(host="127.0.0.1", port=1, query={}),
        "name": right.set(database="nowhere"),
        "user": right.set(username="nobody_here"),
    }[mistyped].render_as_string(hide_password=False)
    # A database that is not there is refused by the server, in words of its own.
    for command in ALL_THAT_CONNECT if mistyped == "name" else ALL_THAT_CONNECT[:1]:
        result = jobs(*command, stdin=GOOD, JOBS_DATABASE_URL=url)
        assert (result.returncode, result.stdout) == (1, ""), command
        assert result.stderr.startswith("The database is not available: ")
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert PASSWORD not in result.stderr
        result = jobs(*command, stdin=GOOD, JOBS_DATABASE_URL=url, JOBS_LOG_LEVEL="debug")
        assert PASSWORD not in result.stderr + result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:{}@h:port/d",
        "postgresql://ada:{}/1815@h/d",
        "mysql://ada:{}@h/d",
        "postgresql//ada:{}@h/d",
    ],
)
def test_a_url_that_is_written_wrong_is_one_sentence_without_the_password(
    jobs: Shell, url: str
) -> None:
    for command in (
        ["migrate"],
        ["serve"],
        ["types"],
        ["policy", "payout.execute"],
        ["validate", "thumbnail.create", "-"],
        ["schema"],
    ):
        result = jobs(*command, stdin=GOOD, JOBS_DATABASE_URL=url.format(PASSWORD))
        assert (result.returncode, result.stdout) == (2, ""), command
        assert "JOBS_DATABASE_URL" in result.stderr
        assert "Traceback" not in result.stderr
        assert PASSWORD not in result.stderr


BROKEN = f"""
    import job_registry_api.queue.migrations
    import job_registry.discovery

    def fail(*arguments, **options):
        password = "{PASSWORD}"
        raise RuntimeError(password)

    job_registry.discovery.load_registry = fail
    job_registry_api.queue.migrations.upgrade = fail
    job_registry_api.queue.migrations.examine = fail
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["migrate"], ["migrate", "--check"], ["types"], ["policy", "payout.execute"], ["schema"],
     ["validate", "thumbnail.create", "-"], ["enqueue", "thumbnail.create", "-"], ["serve"],
     ["worker"]],
    ids=" ".join,
)  # fmt: skip
def test_an_error_nobody_foresaw_is_a_sentence_with_the_id_it_is_logged_under(
    jobs: Shell, tmp_path: Path, command: list[str]
) -> None:
    # Python imports this module before it runs the command.
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(BROKEN), "utf-8")
    path = f"{folder}:{jobs.environment['PYTHONPATH']}"
    with jobs.start(*command, PYTHONPATH=path, JOBS_LOG_FORMAT="json") as result:
        _, stderr = result.communicate(GOOD, timeout=60)
    assert result.returncode == 1
    *logged, sentence = stderr.splitlines()
    found = re.fullmatch(r"Something went wrong here. It is logged as ([0-9a-f]{16}).", sentence)
    assert found, stderr
    assert found[1] in logged[0]
    assert PASSWORD not in stderr
    assert "locals" not in stderr


@pytest.mark.slow
def test_migrating_a_shared_database_is_a_step_of_its_own(jobs: Shell, postgresql_url: str) -> None:
    url = urlsplit(postgresql_url)._replace(path="/template1").geturl()
    for command in (["serve"], ["worker"], ["enqueue", "thumbnail.create", "-"]):
        result = jobs(*command, stdin=GOOD, JOBS_DATABASE_URL=url)
        assert result.returncode == 1
        assert "Run `job-registry migrate`" in result.stderr
    assert run_sql(url, "SELECT count(*) FROM pg_class WHERE relname = 'job'") == [(0,)]
