"""The `job-registry` command, as a process: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import CODE, forks

GOOD = '{"assetId": "a", "versionNumber": 1}'


class Shell:
    """Runs `job-registry` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("JOBS_")},
            "PYTHONPATH": CODE,
        }

    def __call__(
        self, *arguments: str, stdin: str = "", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **settings}
        return forks.run(arguments, environment=environment, folder=self.folder, stdin=stdin)

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "job_registry_api.cli", *arguments],
            cwd=self.folder,
            env={**self.environment, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def jobs(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_the_command_is_imported_ends_it_without_a_word(
    jobs: Shell, ignored: bool
) -> None:
    (jobs.folder / "typer.py").write_text(
        "import pathlib, time\n"
        "pathlib.Path('importing').touch()\n"
        f"time.sleep({1 if ignored else 30})\n"
        "raise SystemExit('imported')\n"
    )
    # A shell starts a command in the background so.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None
    command = jobs.start("types")
    if before is not None:
        signal.signal(signal.SIGINT, before)
    give_up = time.monotonic() + 30
    while not (jobs.folder / "importing").exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    try:
        out, err = command.communicate(timeout=20)
    finally:
        command.kill()
    ended = (1, "", "imported\n") if ignored else (130, "", "")
    assert (command.returncode, out, err) == ended


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(
    ("assets", "says"),
    [
        ("s4://key:secret@bucket/assets", "JOBS_ASSETS=s4://...: expected a folder, or the URL of"),
        ("oss://bucket/assets", "JOBS_ASSETS=oss://...: Install ossfs to access"),
        ("picture", "JOBS_ASSETS=picture: Not a directory"),
        ("picture/assets", "JOBS_ASSETS=picture/assets: Not a directory"),
    ],
)
def test_assets_that_cannot_be_used_stop_the_start(
    jobs: Shell, command: str, assets: str, says: str
) -> None:
    (jobs.folder / "picture").write_text("")
    started = jobs(command, JOBS_ASSETS=assets, JOBS_PORT="0")
    assert (started.returncode, started.stdout) == (2, "")
    assert started.stderr.startswith(f"These settings are wrong:\n  {says}")
    assert "secret" not in started.stderr
    assert not (jobs.folder / "jobs.db").exists()


def test_help_names_every_command_and_the_exit_codes(jobs: Shell) -> None:
    result = jobs("--help")
    assert result.returncode == 0
    for word in [
        "serve",
        "worker",
        "migrate",
        "types",
        "policy",
        "validate",
        "enqueue",
        "lock",
        "check",
        "schema",
        "JOBS_",
        "refused",
    ]:
        assert word in result.stdout
    assert jobs("enqueue", "--help").returncode == 0
    assert jobs("--version").stdout.startswith("job-registry 0.")


@pytest.mark.parametrize(
    "arguments",
    [["nope"], ["types", "--nope"], ["policy"], ["serve", "--port", "x"],
     ["enqueue", "thumbnail.create", "/nope"], ["validate", "thumbnail.create", "/"],
     ["worker", "--types", "nope"], ["worker", "--types", "payout.execute"],
     ["enqueue", "thumbnail.create", "-", "--schedule-at", "soon"]],
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_a_sentence(jobs: Shell, arguments: list[str]) -> None:
    result = jobs(*arguments, stdin=GOOD)
    assert result.returncode == 2
    assert result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "serve --port 99999 --host nowhere --concurrency 0 --processes 0",
        pytest.param("worker --concurrency 0", marks=pytest.mark.slow),
        pytest.param("check --database nowhere", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_option_is_named_as_it_was_given(jobs: Shell, arguments: str) -> None:
    command, *options = arguments.split()
    result = jobs(command, *options, JOBS_LEASE_SECONDS="soon")
    assert (result.returncode, result.stdout) == (2, "")
    given = {line.split(":")[0].strip() for line in result.stderr.splitlines()[1:]}
    assert given == {"JOBS_LEASE_SECONDS", *options[::2]}


def test_wrong_settings_end_with_2_and_all_of_them(jobs: Shell) -> None:
    result = jobs("types", JOBS_PROT="1", JOBS_LEASE_SECONDS="soon", JOBS_HOST="0.0.0.0")
    assert result.returncode == 2
    for variable in ("JOBS_PROT", "JOBS_LEASE_SECONDS", "JOBS_HOST"):
        assert variable in result.stderr
    assert jobs("types", JOBS_CATALOG="not_there").returncode == 2


def test_types_and_policies_for_people_and_for_programs(jobs: Shell) -> None:
    assert "thumbnail.create" in jobs("types").stdout
    listed = json.loads(jobs("types", "--json").stdout)
    assert [each["name"] for each in listed] == ["payout.execute", "thumbnail.create"]
    assert listed[0]["policy"]["concurrencyLimit"] == 5
    assert "5" in jobs("policy", "payout.execute").stdout
    assert json.loads(jobs("policy", "payout.execute", "--json").stdout)["maxAttempts"] == 10
    assert [each["memoryLimitMb"] for each in listed] == [None, 512]
    assert "memoryLimitMb" not in jobs("policy", "payout.execute").stdout
    assert "memoryLimitMb     512" in jobs("policy", "thumbnail.create").stdout
    unknown = jobs("policy", "payout.exec")
    assert unknown.returncode == 1
    assert "Did you mean payout.execute?" in unknown.stderr
    # Not the character of this name: Rich would print it.
    assert '":warning:"' in jobs("policy", ":warning:").stderr


def test_a_payload_is_validated_without_a_database(jobs: Shell) -> None:
    assert jobs("validate", "thumbnail.create", "-", stdin=GOOD).stdout == "valid\n"
    bad = jobs("validate", "thumbnail.create", "-", stdin='{"versionNumber": "1"}')
    assert bad.returncode == 1
    assert "/assetId: " in bad.stderr
    assert "/versionNumber: " in bad.stderr
    as_json = jobs("validate", "thumbnail.create", "-", "--json", stdin="{}")
    assert json.loads(as_json.stdout)["code"] == "payload_invalid"
    assert jobs("validate", "thumbnail.create", "-", stdin="{").returncode == 1
    assert list(jobs.folder.iterdir()) == []


def test_one_payload_is_enqueued_with_its_options(jobs: Shell) -> None:
    options = ["--priority", "9", "--max-attempts", "4", "--idempotency-key", "k", "--json"]
    result = jobs("enqueue", "thumbnail.create", "-", *options, stdin=GOOD)
    assert result.returncode == 0, result.stderr
    first: dict[str, Any] = json.loads(result.stdout)
    assert (first["status"], first["deduplicated"]) == ("queued", False)
    again = json.loads(jobs("enqueue", "thumbnail.create", "-", *options, stdin=GOOD).stdout)
    assert (again["jobId"], again["deduplicated"]) == (first["jobId"], True)
    other = GOOD.replace("1", "2")
    conflict = jobs("enqueue", "thumbnail.create", "-", *options, stdin=other)
    assert conflict.returncode == 1
    assert json.loads(conflict.stdout)["code"] == "idempotency_conflict"


def test_what_is_wrong_for_every_line_is_said_once_and_before_a_line_is_read(jobs: Shell) -> None:
    wrong = ["--priority", "101", "--max-attempts", "0", "--idempotency-key", ""]
    command = ("enqueue", "thumbnail.create", "not-there.jsonl")
    refused = jobs(*command, *wrong, "--schedule-at", "1969-01-01T00:00:00Z")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines() == [
        "--priority: Expected a whole number from 0 to 100; got 101.",
        "--max-attempts: Expected a whole number from 1 to 1,000; got 0.",
        "--schedule-at: Expected a time from 1970 to 8999 in UTC; got 1969-01-01T00:00:00+00:00.",
        "--idempotency-key: Expected a string of 1 to 255 characters; got 0 characters.",
    ]
    soon = jobs(*command, "--priority", "-1", "--schedule-at", "soon")
    assert [each.split(":")[0] for each in soon.stderr.splitlines()] == [
        "--schedule-at",
        "--priority",
    ]
    unknown = jobs("enqueue", "thumbnail.creat", "-", stdin=f"{GOOD}\n{GOOD}")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    (said,) = unknown.stderr.splitlines()
    assert "thumbnail.create" in said
    as_json = jobs("enqueue", "thumbnail.creat", "-", "--json", stdin=f"{GOOD}\n{GOOD}")
    assert json.loads(as_json.stdout)["code"] == "job_type_not_found"
    assert list(jobs.folder.iterdir()) == []


def test_many_lines_are_enqueued_and_each_refused_one_is_named(jobs: Shell) -> None:
    lines = "\n".join([GOOD] * 1_200 + ['{"x": 1}', "", "nope", GOOD])
    (jobs.folder / "many.jsonl").write_text(lines)
    result = jobs("enqueue", "thumbnail.create", "many.jsonl")
    assert result.returncode == 1
    assert "1,201 stored, 0 deduplicated, 2 refused" in result.stdout
    assert "line 1201: /assetId" in result.stderr
    assert "line 1203: payload: This is not valid JSON" in result.stderr
    atomic = jobs("enqueue", "thumbnail.create", "-", "--atomic", stdin=GOOD + "\n{}")
    assert atomic.returncode == 1
    assert "0 stored" in atomic.stdout


def test_lines_end_with_a_line_feed_alone(jobs: Shell) -> None:
    # JSON allows other separators of lines inside strings, as Unicode has them.
    lines = [f'{{"batchId": "a{mark}b", "escrowId": "e"}}' for mark in "\u2028\u2029\x85"]
    stored = jobs("enqueue", "payout.execute", "-", stdin="\r\n".join(lines))
    assert (stored.stdout, stored.stderr) == ("3 stored, 0 deduplicated, 0 refused\n", "")


def test_every_line_that_keeps_an_atomic_bulk_from_being_stored_is_named(jobs: Shell) -> None:
    lines = "\n".join([GOOD, "nope", '{"x": 1}'])
    atomic = jobs("enqueue", "thumbnail.create", "-", "--atomic", stdin=lines)
    assert atomic.returncode == 1
    assert "line 1: Not stored: the call is atomic, and lines 2, 3 were refused." in (atomic.stderr)
    assert "line 2: payload: This is not valid JSON: unexpected character" in atomic.stderr
    assert "line 3: /assetId" in atomic.stderr
    assert atomic.stdout == "0 stored, 0 deduplicated, 3 refused\n"


def test_of_a_file_of_wrong_lines_the_first_are_listed(jobs: Shell) -> None:
    lines = "nope\n" * 150 + GOOD
    listed = jobs("enqueue", "thumbnail.create", "-", stdin=lines)
    assert listed.stdout == "1 stored, 0 deduplicated, 150 refused\n"
    *named, end = listed.stderr.splitlines()
    assert [each.split(":")[0] for each in named] == [f"line {n}" for n in range(1, 101)]
    assert end == "The first 100 refused lines are listed. --json lists all of them."
    in_json = jobs("enqueue", "thumbnail.create", "-", "--json", stdin=lines)
    assert len(in_json.stdout.splitlines()) == 151


@pytest.mark.slow
def test_a_bulk_that_the_database_interrupts_says_how_far_it_came(jobs: Shell) -> None:
    # Given files that cannot grow beyond 4 MB
    (jobs.folder / "many.jsonl").write_text(f"{GOOD}\n" * 20_000)
    command = f"{sys.executable} -m job_registry_api.cli enqueue thumbnail.create many.jsonl"
    stopped = subprocess.run(
        ["bash", "-c", f"ulimit -f 4096; exec {command}"],
        env=jobs.environment,
        cwd=jobs.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    # Then the command says how many jobs it stored, and where it stopped
    assert stopped.returncode == 1
    progress, unknown, reason = stopped.stderr.splitlines()
    with closing(sqlite3.connect(jobs.folder / "jobs.db")) as database:
        ((stored,),) = database.execute("SELECT count(*) FROM job").fetchall()
    assert 0 < stored < 20_000
    line = f"Stopped at line {stored + 1:,}: {stored:,} stored, 0 deduplicated, 0 refused."
    assert progress == line
    assert unknown.startswith(f"It is not known whether the lines {stored + 1:,} to ")
    assert reason.startswith("The database is not available: ")


@pytest.mark.slow
def test_atomic_is_bounded_by_the_setting_for_bulks(jobs: Shell) -> None:
    command = ("enqueue", "thumbnail.create", "-", "--atomic")
    three = jobs(*command, stdin=f"{GOOD}\n" * 3, JOBS_MAX_BULK_SIZE="2")
    assert three.returncode == 2
    assert three.stderr == "--atomic stores up to 2 payloads (JOBS_MAX_BULK_SIZE); got 3.\n"
    two = jobs(*command, stdin=f"{GOOD}\n" * 2, JOBS_MAX_BULK_SIZE="2")
    assert two.stdout == "2 stored, 0 deduplicated, 0 refused\n"


def test_types_without_a_name_are_refused_by_the_worker(jobs: Shell) -> None:
    result = jobs("worker", "--types", ",")
    assert result.returncode == 2
    assert result.stderr == "--types: expected job types separated by commas.\n"


@pytest.mark.slow
def test_the_types_are_listed_one_per_line_in_a_pipe(jobs: Shell) -> None:
    lines = jobs("types").stdout.splitlines()
    assert len(lines) == 3
    assert "Pay one batch of payouts out of its escrow account." in lines[1]


@pytest.mark.slow
def test_the_schema_is_printed_and_a_reader_that_stops_is_no_error(jobs: Shell) -> None:
    command = f"{sys.executable} -m job_registry_api.cli schema | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], env=jobs.environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "0"
    assert "Traceback" not in result.stderr
    assert "type Mutation" in jobs("schema").stdout
    described = json.loads(
        jobs(
            "schema",
            "--openapi",
            JOBS_ROOT_PATH="/queue",
            JOBS_MAX_PAGE_SIZE="77",
            JOBS_MAX_BULK_SIZE="1234",
        ).stdout
    )
    assert described["servers"] == [{"url": "/queue"}]
    assert "/jobs/{id}/cancel" in described["paths"]
    (first,) = [
        each["schema"]
        for each in described["paths"]["/jobs"]["get"]["parameters"]
        if each["name"] == "first"
    ]
    assert first["maximum"] == 77
    bulk = described["components"]["schemas"]["BulkRequest"]
    assert bulk["properties"]["jobs"]["maxItems"] == 1234


@pytest.mark.slow
def test_a_database_that_is_away_is_a_sentence(jobs: Shell) -> None:
    url = "postgresql://ada:lovelace@127.0.0.1:1/jobs"
    for command in (["migrate"], ["serve"], ["worker"], ["enqueue", "thumbnail.create", "-"]):
        result = jobs(*command, stdin=GOOD, JOBS_DATABASE_URL=url)
        assert result.returncode == 1
        assert "The database is not available" in result.stderr
        assert "lovelace" not in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_serve_migrates_answers_works_and_ends_quietly(jobs: Shell, number: int) -> None:
    process = jobs.start("serve", "--port", "0", JOBS_LOG_LEVEL="warning")
    assert process.stderr is not None
    address = process.stderr.readline().split()[3]
    try:
        body = json.dumps({"type": "thumbnail.create", "payload": json.loads(GOOD)}).encode()
        request = urllib.request.Request(
            address.replace("/graphql", "/jobs"), body, {"content-type": "application/json"}
        )
        location = _answer(request).headers["location"]
        until = time.monotonic() + 20
        while True:
            job = json.load(_answer(address.replace("/graphql", location)))
            if job["status"] == "failed" or time.monotonic() > until:
                break
            time.sleep(0.05)
        assert job["error"]["message"] == "There is no picture a/1.* in the assets."
        assert json.load(_answer(address.replace("/graphql", "/readyz"))) == {"status": "ok"}
    finally:
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert (jobs.folder / "jobs.db").exists()


@pytest.mark.slow
def test_a_port_that_is_taken_is_a_sentence(jobs: Shell) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = jobs("serve", "--port", str(port))
        first = subprocess.run(
            [sys.executable, "-m", "job_registry_api.first_minute"],
            env={**jobs.environment, "JOBS_PORT": str(port)},
            cwd=jobs.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert result.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "Choose another port with --port or JOBS_PORT." in result.stderr
    # Nor does `make run` print what to try on that port.
    assert first.returncode == 1
    assert first.stderr == (
        f"Cannot listen on 127.0.0.1:{port}: Address already in use."
        " Choose another port with JOBS_PORT.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_build_of_graphiql_ends_with_make_run(jobs: Shell, number: int) -> None:
    tools, building = jobs.folder / "tools", jobs.folder / "building"
    tools.mkdir()
    make = tools / "make"
    make.write_text(f"#!/bin/sh\necho > {building}\nsleep 60\nrm {building}\n")
    make.chmod(0o700)
    read, write = os.pipe()  # The build has its end of the pipe, until its last process has ended.
    process = subprocess.Popen(
        [sys.executable, "-m", "job_registry_api.first_minute"],
        env={
            **jobs.environment,
            "JOBS_PORT": "0",
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        },
        cwd=jobs.folder,
        stdout=write,
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    try:
        until = time.monotonic() + 30
        while not building.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(number)  # Before it serves: nothing catches it yet.
        process.wait(30)
    with os.fdopen(read) as stream:
        started = time.monotonic()
        stream.read()
    assert time.monotonic() - started < 20


def _answer(request: Any) -> Any:
    return urllib.request.urlopen(request, timeout=10)
