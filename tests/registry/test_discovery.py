"""Users' own job types: found in the modules that are named, and in installed packages."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from job_registry import DefinitionError
from job_registry.discovery import discover, load_registry
from tests import CODE, forks

JOBS = """
    from job_registry import JobType, Payload

    class Mail(Payload):
        to: str

    mail_send = JobType(name="{name}", payload=Mail)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, whose modules are forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), "utf-8")


def test_a_module_and_all_modules_of_a_package_are_searched(folder: Path) -> None:
    write(folder / "one_module.py", JOBS.format(name="one.mail"))
    write(folder / "many/__init__.py", "")
    write(folder / "many/mail.py", JOBS.format(name="many.mail"))
    write(folder / "many/deeper/__init__.py", JOBS.format(name="many.deeper"))
    # Importing another's job type is no second definition.
    write(folder / "many/again.py", "from many.mail import mail_send")
    registry = load_registry(["job_registry.catalog", "one_module", "many"])
    assert list(registry) == [
        "many.deeper", "many.mail", "one.mail", "payout.execute", "thumbnail.create"
    ]  # fmt: skip


def test_a_part_of_a_package_with_an_underscore_is_not_even_imported(folder: Path) -> None:
    write(folder / "_app/__init__.py", "")
    write(folder / "_app/jobs/__init__.py", "")
    write(folder / "_app/jobs/mail.py", JOBS.format(name="app.mail"))
    # A named package is searched, whatever its name is.
    for name in ("_app", "_app.jobs"):
        assert list(load_registry([name])) == ["app.mail"]
    write(folder / "_app/jobs/_heavy/__init__.py", "raise RuntimeError('imported')")
    write(folder / "_app/jobs/_heavy/mail.py", JOBS.format(name="heavy.mail"))
    write(folder / "_app/jobs/_one.py", "raise RuntimeError('imported')")
    assert list(load_registry(["_app"])) == ["app.mail"]


@pytest.mark.parametrize(
    ("modules", "catalog", "message"),
    [
        (
            {},
            ["not_there"],
            r"not_there: No module named 'not_there'\. Python searches {folder} first, then"
            r" PYTHONPATH and the installed packages$",
        ),
        ({"here": ""}, ["here.py"], r"here.py: No module .* package\. Name the module: here$"),
        (
            {"broken": "one = 1\none / 0"},
            ["broken"],
            r"broken: ZeroDivisionError: division by zero \(broken.py, line 2\)",
        ),
        (
            {"outer": "import inner", "inner": "\n\nimport nowhere"},
            ["outer"],
            r"outer: ModuleNotFoundError: No module named 'nowhere' \(inner.py, line 3\)",
        ),
        ({"typo": "def ("}, ["typo"], r"typo: SyntaxError: .* \(typo.py, line 1\)$"),
        (
            {"script": "import sys\nsys.exit(0)"},
            ["script"],
            r"script: sys.exit\(0\) was called during the import \(script.py, line 2\)",
        ),
        (
            {"zero": "from job_registry import JobPolicy\nJobPolicy(max_attempts=0)"},
            ["zero"],
            r"zero: JobPolicy: max_attempts is 0, .* \(zero.py, line 2\)",
        ),
        (
            {"empty": ""},
            ["empty"],
            r"empty: no JobType is defined at the top level of this module, {folder}/empty.py$",
        ),
        (
            {"space/deeper/mail": JOBS.format(name="mail")},
            ["space"],
            r"space: no JobType is defined at the top level of the modules of this package,"
            r" {folder}/space; folders in it without __init__.py are not searched$",
        ),
        # A module of the standard library hides the user's own.
        ({"sys": JOBS.format(name="mail")}, ["sys"], "no JobType is .* of this module, built-in$"),
        (
            {"bad": JOBS.format(name="Bad Name")},
            ["bad"],
            'bad: job type "Bad Name"',
        ),
        (
            {"first": JOBS.format(name="mail"), "second": JOBS.format(name="mail")},
            ["first", "second"],
            "second: the job type mail is defined already, in first",
        ),
    ],
)
def test_what_is_wrong_stops_the_start_and_names_the_module(
    folder: Path, modules: dict[str, str], catalog: list[str], message: str
) -> None:
    for name, text in modules.items():
        write(folder / f"{name}.py", text)
    with pytest.raises(DefinitionError, match=message.replace("{folder}", str(folder))):
        discover(catalog)


def test_an_installed_package_joins_by_its_entry_point(tmp_path: Path) -> None:
    # Given a package of somebody's own, installed as pip would leave it
    write(tmp_path / "acme_jobs/__init__.py", JOBS.format(name="acme.mail"))
    write(tmp_path / "acme_jobs/more.py", JOBS.format(name="acme.more"))
    info = tmp_path / "acme_jobs-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: acme-jobs\nVersion: 1.0\n")
    write(
        info / "entry_points.txt",
        "[job_registry.catalog]\nall = acme_jobs\none = acme_jobs.more:mail_send\n",
    )

    # When the command lists the job types
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{CODE}"}
    result = forks.run(
        ["types", "--json"],
        environment=environment,
        folder=tmp_path,
    )

    # I expect the package's among them
    assert result.returncode == 0, result.stderr
    names = [each["name"] for each in json.loads(result.stdout)]
    assert names == ["acme.mail", "acme.more", "payout.execute", "thumbnail.create"]


def test_an_entry_point_to_something_else_is_refused(tmp_path: Path) -> None:
    info = tmp_path / "odd-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    write(info / "entry_points.txt", "[job_registry.catalog]\nodd = json:dumps\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{CODE}"}
    result = forks.run(
        ["types"],
        environment=environment,
        folder=tmp_path,
    )
    assert result.returncode == 2
    assert "entry point odd = json:dumps" in result.stderr
