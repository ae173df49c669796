"""The pytest plugin, in projects of users: each test here runs pytest on one in a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import CODE, ROOT, forks

PLUGIN = "job_registry_api.pytest_plugin"

JOBS = """
    from job_registry import JobContext, JobType, Payload

    class MailSend(Payload):
        to: str

    mail_send = JobType(name="mail.send", payload=MailSend)

    @mail_send.handler
    async def send(job: JobContext, payload: MailSend) -> str:
        if payload.to == "nobody":
            raise LookupError("there is nobody")
        return payload.to
"""

TESTS = """
    import os
    from myjobs import MailSend

    MARK
    async def test_in_an_event_loop(job_queue):
        await job_queue.enqueue(MailSend(to="ada"))
        job_queue.assert_enqueued(MailSend, to="ada")
        (drained,) = await job_queue.drain()
        assert drained.job.result == "ada"

    MARK
    async def test_again(job_queue):
        job_queue.assert_not_enqueued(MailSend)

    def test_without_an_event_loop(job_queue):
        job_queue.sync.enqueue(MailSend(to="eve"))
        (drained,) = job_queue.sync.drain()
        assert drained.job.result == "eve"
"""

Run = Callable[..., str]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\nfilterwarnings = error\n")
    write(tmp_path, "myjobs.py", JOBS)
    return tmp_path


def write(project: Path, name: str, code: str, **replaced: str) -> None:
    text = textwrap.dedent(code)
    for word, replacement in replaced.items():
        text = text.replace(word, replacement)
    (project / name).write_text(text)


@pytest.fixture
def run(project: Path) -> Run:
    """Runs pytest with this plugin and others, and returns what it prints."""

    def run(*arguments: str, plugins: tuple[str, ...] = (), fails: bool = False) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JOBS_", "PYTEST"))}
        environment |= {
            "PYTHONPATH": CODE,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "JOBS_CATALOG": "myjobs",
        }
        named = [word for name in (PLUGIN, *plugins) for word in ("-p", name)]
        if "pytest_asyncio.plugin" in plugins:
            named += ["-o", "asyncio_default_fixture_loop_scope=function"]
        done = forks.run(
            [*named, "-p", "no:cacheprovider", *arguments],
            environment=environment,
            folder=project,
            module="pytest",
        )
        assert done.returncode == int(fails), done.stdout + done.stderr
        return done.stdout

    return run


def passed(output: str) -> int:
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("plugin", "mark", "options"),
    [
        ("pytest_asyncio.plugin", "@pytest.mark.asyncio", ["-o", "asyncio_mode=strict"]),
        ("pytest_asyncio.plugin", "", ["-o", "asyncio_mode=auto"]),
        ("anyio.pytest_plugin", "@pytest.mark.anyio", []),
    ],
    ids=["asyncio-strict", "asyncio-auto", "anyio"],
)
def test_its_fixtures_work_in_async_and_in_ordinary_tests(
    project: Path, run: Run, plugin: str, mark: str, options: list[str]
) -> None:
    write(project, "test_mail.py", "import pytest\n" + textwrap.dedent(TESTS), MARK=mark)
    if "anyio" in plugin:
        write(
            project,
            "conftest.py",
            """
            import pytest

            @pytest.fixture
            def anyio_backend():
                return "asyncio"
            """,
        )
    assert passed(run(*options, plugins=(plugin,))) == 3


@pytest.mark.slow
def test_it_works_in_several_processes(project: Path, run: Run) -> None:
    write(project, "test_mail.py", TESTS, MARK="")
    options = ["-o", "asyncio_mode=auto", "-n", "2"]
    assert passed(run(*options, plugins=("pytest_asyncio.plugin", "xdist"))) == 3


@pytest.mark.slow
def test_the_registry_can_be_overridden(project: Path, run: Run) -> None:
    write(
        project,
        "test_mail.py",
        """
        import pytest
        from myjobs import MailSend, mail_send

        @pytest.fixture
        def job_registry():
            return [mail_send]

        def test_it(job_queue):
            assert list(job_queue.registry) == ["mail.send"]
        """,
    )
    assert passed(run()) == 1


def test_the_context_has_assets_in_the_folder_of_the_test(project: Path, run: Run) -> None:
    write(
        project,
        "test_mail.py",
        """
        import pathlib

        def test_it(job_context, tmp_path):
            job = job_context(attempt=2)
            assert (pathlib.Path(job.assets).parent, job.attempt) == (tmp_path, 2)
            assert not list(pathlib.Path(job.assets).iterdir())
        """,
    )
    assert passed(run()) == 1


def test_a_failure_shows_the_lines_of_the_user(project: Path, run: Run) -> None:
    write(
        project,
        "test_mail.py",
        """
        from myjobs import MailSend

        def test_an_assertion(job_queue):
            job_queue.sync.enqueue(MailSend(to="ada"))
            job_queue.assert_enqueued(MailSend, to="eve")

        def test_a_handler(job_queue):
            job_queue.sync.enqueue(MailSend(to="nobody"))
            job_queue.sync.drain()
        """,
    )
    output = run(fails=True)
    assert 'E       AssertionError: Expected one job mail.send with to "eve"; found none.' in output
    assert 'to is "ada", expected "eve"' in output
    assert re.search(r"^> +raise LookupError\(.there is nobody.\)$", output, re.M)
    shown = set(re.findall(r"^(\S+\.py):\d+: ", output, re.M))
    assert {"test_mail.py", "myjobs.py"} <= shown
    assert not [path for path in shown if "testing/queue.py" in path]


def test_log_lines_go_to_the_loggers_that_they_have_outside_of_tests(
    project: Path, run: Run
) -> None:
    write(
        project,
        "test_log.py",
        """
        import logging
        from myjobs import MailSend

        def test_a_line(job_queue, caplog, capsys):
            caplog.set_level(logging.INFO)
            job_queue.sync.enqueue(MailSend(to="ada"))
            job_queue.sync.drain()
            succeeded = caplog.messages[-1]
            assert succeeded.startswith("job.succeeded job_id=")
            assert caplog.records[-1].name == "job_registry.events"
            assert capsys.readouterr().out == ""
        """,
    )
    assert passed(run()) == 1


def test_loading_it_imports_nothing_but_pytest() -> None:
    """pytest loads it in every project that has Job Registry installed."""
    code = f"""
import sys, time, pytest
before = set(sys.modules)
begun = time.perf_counter()
import {PLUGIN}
seconds = time.perf_counter() - begun
print(*sorted(set(sys.modules) - before))
assert seconds < 0.05, seconds
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": CODE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["job_registry_api", PLUGIN]


def test_pytest_finds_it_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"job_registry": PLUGIN}
    # It is for projects that have pytest, and no reason to install it.
    assert not [name for name in project["dependencies"] if name.startswith("pytest")]
