"""What commands write to a terminal: nothing that it acts on, and no secret of the process."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import httpx
import pytest
import structlog

from job_registry_api.logs import configure_logs
from tests.cli.test_cli import GOOD, Shell

CONTROL = "\x1b[31mred\x07\x9b2J\r\u202eback"
ESCAPED = r"\u001b[31mred\u0007\u009b2J\r\u202eback"
SECRET = "correct horse battery staple"


def lines(*commands: str) -> list[Any]:
    """Command lines for a test that starts each. All but the first are for the slow tests."""
    return [
        pytest.param(line.split(), id=line, marks=[] if line == commands[0] else pytest.mark.slow)
        for line in commands
    ]


@pytest.fixture
def jobs(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["policy", CONTROL], ""),
        (["policy", "a\udcff" + CONTROL, "--json"], ""),
        (["validate", CONTROL, "-"], GOOD),
        (["validate", "thumbnail.create", CONTROL], ""),
        (["validate", "thumbnail.create", "-"], json.dumps({CONTROL: 1})),
        (["validate", "thumbnail.create", "-", "--json"], json.dumps({CONTROL: 1})),
        (["enqueue", "thumbnail.create", "-"], json.dumps({CONTROL: 1})),
        (["enqueue", CONTROL, "-"], GOOD),
        (["enqueue", "thumbnail.create", "-", "--json"], json.dumps({CONTROL: 1})),
        (["enqueue", "thumbnail.create", "-", "--schedule-at", CONTROL], GOOD),
        (["worker", "--types", CONTROL], ""),
        (["migrate", "--grants", CONTROL], ""),
        (["check", "--lock", CONTROL], ""),
        (["check", "--against", f"http://{CONTROL}/"], ""),
        (["lock", "--lock", f"missing/{CONTROL}"], ""),
    ],
)
def test_control_characters_are_escaped(jobs: Shell, arguments: list[str], stdin: str) -> None:
    result = jobs(*arguments, stdin=stdin)
    printed = result.stdout + result.stderr
    assert all(character.isprintable() or character == "\n" for character in printed), printed
    assert "logged as" not in printed
    assert ESCAPED in printed or "--grants" in arguments


@pytest.mark.slow
def test_control_characters_of_settings_and_modules_are_escaped(jobs: Shell) -> None:
    (jobs.folder / "loud.py").write_text(f"raise ValueError({CONTROL!r})")
    for settings in (
        {"JOBS_CATALOG": "loud"},
        {"JOBS_CATALOG": CONTROL},
        {"JOBS_DATABASE_URL": f"sqlite:///{CONTROL}/jobs.db"},
        {f"JOBS_{CONTROL}": "1"},
    ):
        for arguments in (["types"], ["migrate"], ["enqueue", "payout.execute", "-"]):
            result = jobs(*arguments, stdin=GOOD, **settings)
            assert all(c.isprintable() or c == "\n" for c in result.stderr), result.stderr


def test_control_characters_are_escaped_in_the_log_for_people() -> None:
    stream = io.StringIO()
    configure_logs("info", "console", stream)
    try:
        structlog.get_logger("test").info(CONTROL, job=CONTROL, keys=[CONTROL], **{CONTROL: 1})
        logging.getLogger("a.library").warning("it says %s", CONTROL, extra={"name_": CONTROL})
        try:
            raise OSError(5, CONTROL)
        except OSError:
            structlog.get_logger("test").exception("failed")
    finally:
        configure_logs("error", "console")
    lines = stream.getvalue()
    assert all(character.isprintable() or character == "\n" for character in lines), lines
    assert lines.count("red") >= 7
    assert len(lines.splitlines()) >= 5  # The traceback keeps its lines.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("name", "value", "has_colors"),
    [
        ("TERM", "xterm", True),
        ("NO_COLOR", "1", False),
        ("NO_COLOR", "", True),
        ("TERM", "dumb", False),
    ],
)
def test_the_log_for_people_has_colors_where_the_terminal_shows_them(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, has_colors: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    terminal = Terminal()
    configure_logs("info", "auto", terminal)
    try:
        structlog.get_logger("test").info("started")
    finally:
        configure_logs("error", "console")
    assert "started" in terminal.getvalue()
    assert ("\x1b[" in terminal.getvalue()) == has_colors


@pytest.mark.slow
def test_a_narrow_terminal_shows_the_whole_names_of_a_policy(jobs: Shell) -> None:
    printed, _ = jobs.start("policy", "thumbnail.create", COLUMNS="40").communicate()
    assert "concurrencyLimit" in printed
    assert max(map(len, printed.splitlines())) <= 40


def test_bytes_that_are_no_text_are_a_sentence(jobs: Shell) -> None:
    (jobs.folder / "latin").write_bytes(b'{"assetId": "caf\xe9"}')
    result = jobs("validate", "thumbnail.create", "latin")
    assert result.returncode == 2
    assert result.stderr == "Cannot read latin: byte 17 is not UTF-8.\n"
    given = subprocess.run(
        [sys.executable, "-m", "job_registry_api.cli", "validate", "thumbnail.create", "-"],
        env={**jobs.environment, "LC_ALL": "C", "PYTHONUTF8": "1"},
        input=b'{"assetId": "caf\xe9"}',
        capture_output=True,
        check=False,
    )
    assert given.returncode == 2
    assert given.stderr == b"Cannot read standard input: byte 17 is not UTF-8.\n"


def test_a_file_of_windows_may_begin_with_a_byte_order_mark(jobs: Shell) -> None:
    payload = b'\xef\xbb\xbf{"assetId": "cat", "versionNumber": 1}\r\n'
    (jobs.folder / "marked").write_bytes(payload)
    assert jobs("validate", "thumbnail.create", "marked").stdout == "valid\n"


@pytest.mark.parametrize(
    "arguments",
    lines("types", "policy a", "validate a -", "enqueue a -", "schema", "worker", "serve --port 0"),
)
def test_a_module_that_logs_while_it_is_imported_shows_no_variables(
    jobs: Shell, arguments: list[str]
) -> None:
    (jobs.folder / "broken.py").write_text(
        f"""
import logging, structlog
def connect():
    password = "{SECRET}".upper()
    1 / 0
try:
    connect()
except ZeroDivisionError:
    structlog.get_logger().exception("structlog")
    logging.getLogger("broken").exception("logging")
connect()
"""
    )
    result = jobs(*arguments, stdin=GOOD, JOBS_CATALOG="broken", JOBS_LOG_FORMAT="console")
    assert result.returncode == 2
    assert SECRET.upper() not in result.stderr
    assert "structlog" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("The job types cannot be loaded: broken:")


COMMANDS = lines(
    "types", "types --json", "policy payout.execute", "schema", "migrate", "--version", "--help"
)


@pytest.mark.parametrize("arguments", COMMANDS)
@pytest.mark.parametrize("buffered", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_output_that_cannot_be_written_is_a_sentence(
    jobs: Shell, arguments: list[str], buffered: bool
) -> None:
    with Path("/dev/full").open("w") as full:
        result = run_to(full, jobs, arguments, buffered)
    assert result.stderr == "The output could not be written: No space left on device.\n"
    assert result.returncode == 1


@pytest.mark.parametrize("arguments", COMMANDS)
@pytest.mark.parametrize("buffered", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_command_whose_output_is_read_no_further_ends_silently(
    jobs: Shell, arguments: list[str], buffered: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:  # noqa: PTH123
        result = run_to(pipe, jobs, arguments, buffered)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "settings", "code"),
    [
        ("policy nope", {}, 1),
        ("policy --nope", {}, 2),
        pytest.param("types", {"JOBS_PORT": "http"}, 2, marks=pytest.mark.slow),
        pytest.param("worker --types nope", {}, 2, marks=pytest.mark.slow),
        pytest.param("migrate", {}, 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("reader", ["full", "gone"])
def test_a_command_ends_with_its_code_though_nothing_can_be_written_to_standard_error(
    jobs: Shell, arguments: str, settings: dict[str, str], code: int, reader: str
) -> None:
    if reader == "full":
        errors = os.open("/dev/full", os.O_WRONLY)
    else:
        read_end, errors = os.pipe()
        os.close(read_end)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "job_registry_api.cli", *arguments.split()],
            cwd=jobs.folder,
            env=jobs.environment | settings,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            check=False,
        )
    finally:
        os.close(errors)
    assert result.returncode == code


@pytest.mark.slow
def test_a_server_starts_though_its_log_cannot_be_written(jobs: Shell) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Path("/dev/full").open("w") as full:
        server = subprocess.Popen(
            [sys.executable, "-m", "job_registry_api.cli", "serve", "--port", str(port)],
            cwd=jobs.folder,
            env=jobs.environment,
            stderr=full,
        )
    try:
        give_up = time.monotonic() + 20
        while True:
            try:
                status = httpx.get(f"http://127.0.0.1:{port}/readyz").status_code
                break
            except httpx.TransportError:
                assert server.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.1)
    finally:
        server.terminate()
        server.wait(30)
    assert (status, server.returncode) == (200, 0)


def test_a_closed_output_is_a_sentence(jobs: Shell) -> None:
    command = f"{sys.executable} -m job_registry_api.cli types --json >&-"
    result = subprocess.run(
        ["bash", "-c", command], env=jobs.environment, capture_output=True, text=True, check=False
    )
    expected = "The output could not be written: standard output is closed.\n"
    assert (result.returncode, result.stderr) == (1, expected)


@pytest.mark.parametrize(
    ("closed", "arguments", "code"),
    [
        ("2>&-", "types --json", 0),
        pytest.param("2>&-", "policy nope", 1, marks=pytest.mark.slow),
        pytest.param("2>&-", "enqueue payout.execute payout.json", 0, marks=pytest.mark.slow),
        ("<&- 2>&-", "enqueue payout.execute payout.json", 0),
        (">&- 2>&-", "types", 1),
    ],
)
def test_a_command_runs_also_with_a_closed_standard_error(
    jobs: Shell, closed: str, arguments: str, code: int
) -> None:
    (jobs.folder / "payout.json").write_text('{"batchId": "b", "escrowId": "e"}')
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m job_registry_api.cli {arguments} {closed}"],
        env=jobs.environment,
        cwd=jobs.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (code, "")
    assert "Traceback" not in result.stdout
    assert (result.stdout != "") == (code == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "numbers"), [("<&-", {0}), (">&-", {1}), ("<&- >&-", {0, 1})])
def test_a_server_runs_and_ends_also_with_closed_standard_streams(
    jobs: Shell, closed: str, numbers: set[int]
) -> None:
    (jobs.folder / "loud.py").write_text(
        "from job_registry import JobContext, JobType, Payload\n\n\n"
        "class Empty(Payload):\n    pass\n\n\n"
        'loud = JobType(name="loud", payload=Empty)\nprint("imported")\n\n\n'
        "@loud.handler\n"
        'def shout(job: JobContext, payload: Empty) -> None:\n    print("ran")\n'
    )
    server = subprocess.Popen(
        ["bash", "-c", f"exec {sys.executable} -m job_registry_api.cli serve --port 0 {closed}"],
        cwd=jobs.folder,
        env=jobs.environment | {"JOBS_LOG_LEVEL": "warning", "JOBS_CATALOG": "loud"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        url = server.stderr.readline().split()[3].removesuffix("/graphql")
        job = httpx.post(f"{url}/jobs", json={"type": "loud", "payload": {}}, timeout=20)
        give_up = time.monotonic() + 20
        status = ""
        while status not in ("succeeded", "failed") and time.monotonic() < give_up:
            time.sleep(0.1)
            status = httpx.get(url + job.headers["location"], timeout=20).json()["status"]
        files = {
            number: str(Path(f"/proc/{server.pid}/fd/{number}").readlink()) for number in numbers
        }
    finally:
        server.terminate()
        printed, said = server.communicate(timeout=30)
    assert status == "succeeded"
    assert (server.returncode, said) == (0, "")
    assert printed == ("" if 1 in numbers else "imported\nran\n")
    # Nothing that the server opens has the number of a stream.
    assert files == dict.fromkeys(numbers, "/dev/null")


@pytest.mark.parametrize("arguments", lines("types --json", "types", "schema"))
def test_a_character_that_the_encoding_of_the_output_lacks_is_escaped(
    jobs: Shell, arguments: list[str]
) -> None:
    (jobs.folder / "mails.py").write_text(
        "from job_registry import JobType, Payload\n\n\n"
        'class Mail(Payload):\n    """Schöne 日本."""\n\n\n'
        'mail = JobType(name="mail.send", payload=Mail)\n'
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = jobs.start(*arguments, JOBS_CATALOG="mails", **ascii_only)
    printed, said = process.communicate()
    assert (process.returncode, said) == (0, "")
    if "--json" in arguments:
        assert json.loads(printed)[0]["description"] == "Schöne 日本."
    else:
        assert r"Sch\xf6ne \u65e5\u672c." in printed


def run_to(
    output: TextIO, jobs: Shell, arguments: list[str], buffered: bool
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "job_registry_api.cli", *arguments],
        cwd=jobs.folder,
        env=jobs.environment | {"PYTHONUNBUFFERED": "" if buffered else "1"},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
