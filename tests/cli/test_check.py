"""`job-registry check`: what a change of the code means for stored jobs, workers and clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from job_registry import JobType
from job_registry.evolution import changes_between
from job_registry.lock import Lock, ReleasedTypes, lock_text, read_lock, released_types
from job_registry_api.cli.report import Compared, as_json
from job_registry_api.queue import migrations
from tests.cli.test_cli import Shell
from tests.cli.test_terminal import CONTROL, ESCAPED
from tests.conftest import run_sql

V1 = """
    from job_registry import JobPolicy, JobType, Payload

    class MailSend(Payload):
        to: str
        subject: str = "Hello"

    mail_send = JobType(name="mail.send", payload=MailSend, policy=JobPolicy(concurrency_limit=5))
"""


class Code(Shell):
    """Runs the command in a folder with a catalog of its own, `myjobs.py`."""

    def write(self, source: str) -> None:
        (self.folder / "myjobs.py").write_text(textwrap.dedent(source))
        self.environment["JOBS_CATALOG"] = "myjobs"
        # Bytecode of a source as long as this one, and written in the same second, would run.
        self.environment["PYTHONDONTWRITEBYTECODE"] = "1"

    def lock(self, source: str) -> Path:
        """Write the lock of this code."""
        path = self.folder / "registry.lock.json"
        path.write_text(lock_text(Lock(types_of(source))))
        return path

    def changes(self) -> list[dict[str, Any]]:
        """The changes since the lock, in this process."""
        released = read_lock((self.folder / "registry.lock.json").read_bytes()).job_types
        today = types_of((self.folder / "myjobs.py").read_text())
        report = as_json([Compared("the lock", changes_between(released, today))], None, False)
        changes: list[dict[str, Any]] = report["compared"][0]["changes"]
        return changes


def types_of(source: str) -> ReleasedTypes:
    module = sys.modules["locked"] = ModuleType("locked")
    # Without the `from __future__` of this file.
    exec(compile(textwrap.dedent(source), "locked", "exec", dont_inherit=True), vars(module))
    del sys.modules["locked"]
    return released_types(value for value in vars(module).values() if isinstance(value, JobType))


@pytest.fixture
def code(tmp_path: Path) -> Code:
    code = Code(tmp_path)
    code.lock(V1)
    code.write(V1)
    return code


def fields(*lines: str, extra: str = "") -> str:
    """The job type `mail.send` with these fields."""
    return "\n".join(
        [
            "from job_registry import JobPolicy, JobType, Payload",
            "class MailSend(Payload):",
            *(f"    {line}" for line in lines),
            f"mail_send = JobType(name='mail.send', payload=MailSend,"
            f" policy=JobPolicy(concurrency_limit=5){extra})",
        ]
    )


def outcomes(change: dict[str, Any]) -> tuple[str, str, str]:
    return change["storedJobs"], change["olderWorkers"], change["olderClients"]


# The code and the lock


def test_the_same_code_breaks_nothing(code: Code) -> None:
    result = code("check")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "Changes since registry.lock.json: none.\n"


@pytest.mark.slow
def test_the_report_for_programs_has_every_change(code: Code) -> None:
    code.write(fields("to: str", "cc: str | None = None"))
    result = code("check", "--json")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["breaks"]
    assert report["database"] is None
    ((compared),) = report["compared"]
    assert (compared["with"], compared["clients"]) == ("registry.lock.json", [])
    assert compared["changes"] == code.changes()
    code.write(fields("to: str", "subject: str = 'Hello'", "cc: str | None = None"))
    result = code("check", "--json")
    assert (result.returncode, json.loads(result.stdout)["breaks"]) == (0, False)


def test_a_new_optional_field_breaks_nothing_and_waits_for_newer_workers(code: Code) -> None:
    code.write(fields("to: str", "subject: str = 'Hello'", "cc: str | None = None"))
    ((change),) = code.changes()
    assert (change["level"], change["jobType"], change["path"]) == ("warning", "mail.send", "/cc")
    assert (change["before"], change["after"]) == ("not a field", "optional")
    assert outcomes(change) == ("survive", "wait", "survive")


def test_a_new_required_field_breaks_stored_jobs_and_older_clients(code: Code) -> None:
    code.write(fields("to: str", "subject: str = 'Hello'", "cc: str"))
    result = code("check")
    assert result.returncode == 1
    assert result.stdout == textwrap.dedent(
        """\
        BREAKING mail.send /cc
          was: not a field
          is: required
          A payload without this field is refused.
          Stored jobs break; older workers leave such jobs to newer workers; older clients break.
          > Give the field a default.
          > For stored jobs: upgrade the former model with @mail_send.upgrade(OldModel).
          > For older clients: add OldModel to accepts.
        Changes since registry.lock.json: 1 breaking.
        """
    )


def test_a_removed_field_breaks_those_who_send_it(code: Code) -> None:
    code.write(fields("to: str"))
    ((change),) = code.changes()
    assert (change["path"], change["after"]) == ("/subject", "not a field")
    assert outcomes(change) == ("break", "survive", "break")


def test_a_field_of_another_type_breaks_in_both_directions(code: Code) -> None:
    code.write(fields("to: list[str]", "subject: str = 'Hello'"))
    ((change),) = code.changes()
    assert (change["path"], change["before"], change["after"]) == ("/to", "string", "array")
    assert outcomes(change) == ("break", "wait", "break")


def test_an_upgrade_saves_stored_jobs_and_accepts_saves_older_clients(code: Code) -> None:
    older = ["class MailSendV1(Payload):", "    to: str", "    subject: str = 'Hello'"]
    upgrade = [
        "@mail_send.upgrade(MailSendV1)",
        "def from_v1(older: MailSendV1) -> MailSend:",
        "    return MailSend(to=[older.to], subject=older.subject)",
    ]
    new = fields("to: list[str]", "subject: str = 'Hello'", extra=", accepts=[MailSendV1]")
    head, rest = new.split("\n", 1)
    code.write("\n".join([head, *older, rest, *upgrade]))
    ((change),) = code.changes()
    assert outcomes(change) == ("survive", "wait", "survive")
    code.write("\n".join([head, *older, rest, *upgrade]).replace(", accepts=[MailSendV1]", ""))
    ((change),) = code.changes()
    assert outcomes(change) == ("survive", "wait", "break")
    assert change["advice"] == ["For older clients: add OldModel to accepts."]
    # An upgrade that reads another model than the released one is of no use.
    code.write("\n".join([head, *older, rest, *upgrade]).replace("    to: str\n", "    to: int\n"))
    ((change),) = code.changes()
    assert outcomes(change) == ("break", "wait", "break")


def test_an_upgrade_that_is_removed_breaks_what_is_stored_in_the_older_form(code: Code) -> None:
    with_older = """
        from job_registry import JobType, Payload

        class MailSendV1(Payload):
            address: str

        class MailSend(Payload):
            to: str

        mail_send = JobType(name="mail.send", payload=MailSend, accepts=[MailSendV1])

        @mail_send.upgrade(MailSendV1)
        def from_v1(older: MailSendV1) -> MailSend:
            return MailSend(to=older.address)
    """
    code.lock(with_older)
    code.write(with_older.replace(", accepts=[MailSendV1]", ""))
    ((change),) = code.changes()
    assert (change["kind"], change["before"]) == ("older_form", "MailSendV1")
    assert outcomes(change) == ("survive", "survive", "break")
    code.write(with_older.partition(", accepts")[0] + ")")
    ((change),) = code.changes()
    assert outcomes(change) == ("break", "survive", "break")


def test_a_changed_default_is_told_and_breaks_nothing(code: Code) -> None:
    code.write(fields("to: str", "subject: str = 'Hi'"))
    ((change),) = code.changes()
    assert (change["level"], change["kind"], change["path"]) == ("warning", "default", "/subject")
    assert (change["before"], change["after"]) == ('default "Hello"', 'default "Hi"')


def test_what_the_schemas_do_not_tell_counts_as_breaking(code: Code) -> None:
    pattern = "subject: Annotated[str, Field(pattern='^{0}')] = 'a'"
    imports = "from typing import Annotated\nfrom pydantic import Field\n"
    code.lock(imports + fields("to: str", pattern.format("[a-z]+")))
    code.write(imports + fields("to: str", pattern.format("[a-z0-9]+x?")))
    ((change),) = code.changes()
    assert change["level"] == "breaking"
    assert outcomes(change) == ("unknown", "wait", "unknown")


def test_a_removed_type_breaks_and_one_that_is_like_it_is_suggested(code: Code) -> None:
    code.write(V1.replace("mail.send", "mail.deliver"))
    added, removed = code.changes()
    assert (added["level"], added["kind"], added["jobType"]) == ("safe", "added", "mail.deliver")
    assert (removed["kind"], removed["jobType"]) == ("removed", "mail.send")
    assert outcomes(removed) == ("break", "survive", "break")
    assert removed["advice"][0] == (
        'If mail.deliver is its new name, add former_names=["mail.send"] to mail.deliver.'
    )


def test_a_renamed_type_keeps_its_jobs_and_its_clients(code: Code) -> None:
    renamed = V1.replace('"mail.send"', '"mail.deliver", former_names=["mail.send"]')
    code.write(renamed)
    ((change),) = code.changes()
    assert (change["kind"], change["before"], change["after"]) == (
        "renamed",
        "mail.send",
        "mail.deliver",
    )
    assert outcomes(change) == ("survive", "wait", "survive")
    # The payload of a renamed type is compared as any other.
    code.write(renamed.replace("to: str", "to: int"))
    assert [change["kind"] for change in code.changes()] == ["renamed", "payload"]
    # The former name is a promise of its own.
    code.lock(renamed)
    code.write(renamed.replace(', former_names=["mail.send"]', ""))
    ((change),) = code.changes()
    assert (change["kind"], change["before"]) == ("former_name", "mail.send")
    assert outcomes(change) == ("break", "survive", "break")


@pytest.mark.parametrize(
    ("policy", "level", "says"),
    [
        ("concurrency_limit=4", "warning", "Fewer jobs may run at once."),
        ("concurrency_limit=6", "safe", "More jobs may run at once."),
        ("", "safe", "More jobs may run at once."),
        ("concurrency_limit=5, timeout_seconds=10", "warning", "jobs keep the former timeout"),
        ("concurrency_limit=5, timeout_seconds=1000", "safe", "jobs keep the former timeout"),
        ("concurrency_limit=5, max_attempts=1", "warning", "jobs keep the former number"),
        ("concurrency_limit=5, max_attempts=9", "safe", "jobs keep the former number"),
        ("concurrency_limit=5, on_mismatch='fail'", "warning", "does not stay queued"),
    ],
)
def test_a_change_of_the_policy_says_what_it_holds_for(
    code: Code, policy: str, level: str, says: str
) -> None:
    code.write(V1.replace("concurrency_limit=5", policy))
    ((change),) = code.changes()
    assert (change["kind"], change["level"]) == ("policy", level)
    assert says in change["reason"]
    assert outcomes(change) == ("survive", "survive", "survive")


def test_a_worker_that_fails_what_it_cannot_read_does_not_survive_a_new_field(code: Code) -> None:
    fails = V1.replace("concurrency_limit=5", "on_mismatch='fail'")
    code.lock(fails)
    code.write(fails.replace("    subject", "    cc: str = ''\n        subject"))
    ((change),) = code.changes()
    assert outcomes(change) == ("survive", "break", "survive")
    assert "on_mismatch" in change["advice"][0]


def test_a_handler_that_is_gone_breaks_stored_jobs(code: Code) -> None:
    handler = "\n    @mail_send.handler\n    async def send(job, payload: MailSend) -> None: ...\n"
    code.lock(V1 + handler)
    ((change),) = code.changes()
    assert (change["kind"], change["reason"]) == (
        "handler",
        "The job type has no handler any more. Its jobs wait for remote workers.",
    )
    assert outcomes(change) == ("break", "survive", "survive")
    code.lock(V1)
    code.write(V1 + handler)
    assert code.changes() == []


RECURSIVE = """
    from job_registry import JobType, Payload

    class Node(Payload):
        name: str
        children: list["Node"] = []

    class TreeBuild(Payload):
        root: Node

    tree_build = JobType(name="tree.build", payload=TreeBuild, example={"root": {"name": "a"}})
"""


def test_recursive_models_are_compared(code: Code) -> None:
    code.lock(RECURSIVE)
    code.write(RECURSIVE)
    assert code.changes() == []
    code.write(RECURSIVE.replace("name: str", "name: str | int"))
    ((change),) = code.changes()
    assert (change["level"], change["path"]) == ("warning", "/root/name")


# Usage


@pytest.mark.slow
def test_without_a_lock_the_command_says_how_to_write_one(code: Code) -> None:
    (code.folder / "registry.lock.json").unlink()
    missing = code("check")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == (
        "There is no lock registry.lock.json. Write it with `job-registry lock` and commit it.\n"
    )


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "content",
    [b"nope", b"\xff\xfe", b"{}", b'{"format": 7}', b'{"format": 1, "jobTypes": []}',
     b'{"format": 1, "jobTypes": {"a": {"fingerprint": 1}}}', b"[" * 3_000_000],
)  # fmt: skip
def test_a_lock_that_is_not_one_is_a_sentence(code: Code, content: bytes) -> None:
    (code.folder / "registry.lock.json").write_bytes(content)
    result = code("check")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("registry.lock.json is not a lock that this version can read.")
    assert len(result.stderr.splitlines()) == 1


def test_a_lock_that_is_too_large_is_not_read(code: Code) -> None:
    with (code.folder / "registry.lock.json").open("wb") as stream:
        stream.truncate(50_000_000)
    result = code("check")
    assert result.returncode == 2
    assert "Expected at most 33,554,432 bytes; it has more." in result.stderr


def test_a_policy_of_any_kind_in_a_lock_is_compared(code: Code) -> None:
    path = code.folder / "registry.lock.json"
    lock = json.loads(path.read_text())
    lock["jobTypes"]["mail.send"]["policy"] = {
        "concurrencyLimit": "many", "timeoutSeconds": None, "maxAttempts": [], "backoff": 1,
        "onMismatch": {}, "unheardOf": 1,
    }  # fmt: skip
    path.write_text(json.dumps(lock))
    changes = code.changes()
    assert {change["reason"] for change in changes} == {"The policy has changed."}


@pytest.mark.parametrize(
    "schema",
    [{"$ref": 5}, {"properties": 3}, {"required": {}}, {"type": ["x", {}]}, {"anyOf": "a"},
     {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"pattern": "((((("},
     {"properties": {"to": True, "x": False}}, {"enum": 1}, {"minimum": "a"}, {"items": []}],
    ids=str,
)  # fmt: skip
def test_a_schema_of_any_kind_in_a_lock_is_compared(code: Code, schema: dict[str, Any]) -> None:
    path = code.folder / "registry.lock.json"
    lock = json.loads(path.read_text())
    lock["jobTypes"]["mail.send"]["payloadSchema"] = schema
    lock["jobTypes"]["other"] = lock["jobTypes"]["mail.send"]
    path.write_text(json.dumps(lock))
    removed = [each for each in code.changes() if each["kind"] == "removed"]
    assert [each["jobType"] for each in removed] == ["other"]


def test_a_catalog_that_cannot_be_imported_is_a_sentence(code: Code) -> None:
    code.write("raise RuntimeError('no')")
    result = code("check")
    assert result.returncode == 2
    assert result.stderr.startswith("The job types cannot be loaded: myjobs: RuntimeError: no")


@pytest.mark.slow
def test_control_characters_of_a_lock_do_not_reach_the_terminal(code: Code) -> None:
    path = code.folder / "registry.lock.json"
    lock = json.loads(path.read_text())
    of_mail = lock["jobTypes"].pop("mail.send")
    of_mail["payloadSchema"]["properties"][CONTROL] = {"const": CONTROL}
    of_mail["formerNames"] = [CONTROL]
    lock["jobTypes"] = {CONTROL: of_mail, "mail.send": of_mail}
    path.write_text(json.dumps(lock))
    for arguments in ((), ("--json",), ("--github",)):
        result = code("check", *arguments)
        assert result.returncode == 1
        printed = result.stdout + result.stderr
        assert all(c.isprintable() or c == "\n" for c in printed), printed
        assert "red" in printed
        if not arguments:
            assert ESCAPED in printed
    lock["format"] = CONTROL
    path.write_text(json.dumps(lock))
    result = code("check", "--lock", "registry.lock.json")
    assert all(c.isprintable() or c == "\n" for c in result.stderr)


# GitHub


@pytest.mark.slow
def test_annotations_are_written_for_github_and_escaped(code: Code) -> None:
    strange = "from pydantic import Field\n" + fields(
        "to: str", "subject: str = 'Hello'", "x: str = Field(alias='50%: a,b\\n::error::c')"
    )
    code.write(strange)
    here = code("check", "--lock", "registry.lock.json", GITHUB_ACTIONS="true")
    assert here.stderr == (
        "::error file=registry.lock.json,title=mail.send /50%25%3A a%2Cb\\n%3A%3Aerror%3A%3Ac::"
        "A payload without this field is refused. Give the field a default. For stored jobs:"
        " upgrade the former model with @mail_send.upgrade(OldModel). For older"
        " clients: add OldModel to accepts.\n"
    )
    assert code("check", "--github").stderr == here.stderr
    assert code("check", "--github", "--json").stderr == here.stderr
    assert code("check").stderr == ""


def test_a_warning_is_annotated_and_a_safe_change_is_not(code: Code) -> None:
    code.write(V1.replace("concurrency_limit=5", "concurrency_limit=4, max_attempts=9"))
    result = code("check", "--github")
    assert result.returncode == 0
    assert result.stderr == (
        "::warning file=registry.lock.json,title=mail.send policy /concurrencyLimit::Fewer jobs may"
        " run at once. It takes effect at once, also for queued jobs.\n"
    )


# Generated clients


@pytest.mark.slow
def test_breaking_dangerous_and_safe_changes_of_the_graphql_schema_are_told(code: Code) -> None:
    without = code("check", "--clients")
    assert without.returncode == 2
    assert "has no GraphQL schema" in without.stderr
    assert code("lock").returncode == 0
    assert code("check", "--clients").stdout == "Changes since registry.lock.json: none.\n"
    code.write(fields("to: str", "subject: str = 'Hello'", "cc: str"))
    report = json.loads(code("check", "--clients", "--json").stdout)
    (change,) = report["compared"][0]["clients"]
    assert change["kind"] == "breaking"
    assert "MailSendInput" in change["message"]
    assert "BREAKING GraphQL " in code("check", "--clients").stdout


# A running server


@pytest.mark.slow
def test_a_server_is_compared_and_its_running_jobs_count(code: Code) -> None:
    process = code.start("serve", "--port", "0", "--no-worker", JOBS_LOG_LEVEL="warning")
    assert process.stderr is not None
    url = process.stderr.readline().split()[3]
    try:
        (code.folder / "registry.lock.json").unlink()
        same = code("check", "--against", url)
        assert (same.returncode, same.stdout) == (0, f"Changes since {url}: none.\n"), same.stderr
        for number in range(3):
            stored = code("enqueue", "mail.send", "-", stdin=json.dumps({"to": f"{number}"}))
            assert stored.returncode == 0, stored.stderr
        lease = """mutation { leaseJobs(input: {
            jobTypes: ["mail.send"], workerId: "w", limit: 3 }) { __typename } }"""
        assert post(url, {"query": lease})["data"]["leaseJobs"]["__typename"] == "LeaseJobsSuccess"
        code.write(V1.replace("limit=5", "limit=2").replace("to: str", "to: int"))
        bare = url.removesuffix("/graphql")
        report = json.loads(code("check", "--against", bare, "--json").stdout)
        payload, policy = report["compared"][0]["changes"]
        assert outcomes(payload) == ("break", "wait", "break")
        assert "3 run now" in policy["reason"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def post(url: str, body: dict[str, Any]) -> Any:
    import urllib.request

    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@contextmanager
def server(status: int, body: bytes, *, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """A server that answers every request with this. Yields its URL and the requests."""
    requests: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append({**self.headers})
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.server_port}/graphql", requests
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join()


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b"<html>Welcome</html>",
         '127.0.0.1: Expected an answer in JSON from a GraphQL API; got the HTTP status 200 and'
         ' "<html>Welcome</html>".'),
        (502, b"\x1b[31mbad", "the HTTP status 502 and \"\\u001b[31mbad\"."),
        (200, b"[]", 'the HTTP status 200 and "[]".'),
        (200, b'{"data": []}', "It did not return its job types."),
        (200, b'{"data": {"jobTypes": [1]}}', "do not have the expected form."),
        (200, b'{"data": {"jobTypes": [{"name": "a"}]}}', "do not have the expected form."),
        (401, b'{"errors": [{"message": "A token is needed.\x07"}]}'.replace(b"\x07", b"\\u0007"),
         "It did not return its job types. A token is needed.\\u0007"),
        (200, b'{"errors": 1}', "It did not return its job types. "),
        (302, b"", "the HTTP status 302"),
    ],
)  # fmt: skip
def test_a_server_that_is_not_one_is_a_sentence(
    code: Code, status: int, body: bytes, says: str
) -> None:
    with server(status, body, headers={"location": "http://127.0.0.1:1/"}) as (url, _):
        result = code("check", "--against", url)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "logged as" not in result.stderr


@pytest.mark.slow
def test_the_token_is_sent_and_never_printed(code: Code) -> None:
    with server(403, b'{"errors": [{"message": "no"}]}') as (url, requests):
        result = code("check", "--against", url, "--token", "s3cret-token")
        code("check", "--against", url, JOB_REGISTRY_TOKEN="s3cret-token")
    assert {each["Authorization"] for each in requests} == {"Bearer s3cret-token"}
    assert "s3cret" not in result.stderr + result.stdout
    bad = code("check", "--against", url, "--token", "a\nb")
    assert bad.returncode == 2
    assert bad.stderr == "The token has characters that a header cannot have.\n"


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://a/",
        "http://",
        "file:///etc/passwd",
        "http://[",
        "http://a:99999",
        "http://a/\u00e9",
        "http://a b/",
    ],
)
def test_a_url_that_is_not_of_a_server_is_a_sentence(code: Code, url: str) -> None:
    result = code("check", "--against", url)
    assert result.returncode == 2
    assert result.stderr == f"Expected a URL such as https://jobs.example.com; got {url}.\n"


def test_a_password_in_a_url_is_refused_and_not_printed(code: Code) -> None:
    result = code("check", "--against", "http://ada:lovelace@127.0.0.1:1/")
    assert result.returncode == 2
    assert result.stderr == "Expected a URL without a user and a password. Use --token.\n"


def test_a_server_that_cannot_be_reached_is_a_sentence(code: Code) -> None:
    result = code("check", "--against", "http://127.0.0.1:1")
    assert result.returncode == 2
    assert result.stderr.startswith("127.0.0.1: The server cannot be reached: ")


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up_in_time(code: Code) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        result = code("check", "--against", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert result.returncode == 2
    assert result.stderr == "127.0.0.1: No answer within 10 seconds.\n"
    assert time.monotonic() - started < 30


# The queue


def enqueue(code: Code, url: str, *payloads: dict[str, Any], job_type: str = "mail.send") -> None:
    lines = "\n".join(json.dumps(each) for each in payloads)
    stored = code("enqueue", job_type, "-", stdin=lines, JOBS_DATABASE_URL=url)
    assert stored.returncode == 0, stored.stderr


def test_every_stored_payload_is_read_and_those_that_are_refused_are_counted(
    code: Code, database_url: str
) -> None:
    enqueue(code, database_url, *({"to": f"{n}"} for n in range(1_200)))
    enqueue(code, database_url, *({"to": "a", "subject": "b"} for _ in range(1_300)))
    before = run_sql(database_url, "SELECT status, count(*) FROM job GROUP BY status")
    code.write(fields("to: str"))
    report = json.loads(code("check", "--database", database_url, "--json").stdout)
    database = report["database"]
    assert database["jobTypes"] == [{"jobType": "mail.send", "jobs": 2_500, "refused": 1_300}]
    ((fault),) = database["faults"]
    assert (fault["path"], fault["code"], fault["jobs"]) == ("/subject", "unknown_field", 1_300)
    assert len(fault["sampleIds"]) == 3
    assert report["breaks"]
    people = code("check", "--database", database_url)
    assert people.returncode == 1
    assert "BREAKING mail.send /subject: unknown_field in 1,300 jobs, such as 01" in people.stdout
    assert people.stdout.endswith(
        "Unfinished jobs in the database: 2,500; 1,300 cannot be read, 0 have an unknown type.\n"
    )
    # A bar is for a terminal.
    assert people.stderr == ""
    assert run_sql(database_url, "SELECT status, count(*) FROM job GROUP BY status") == before


def test_the_payloads_of_the_queue_prove_what_the_schemas_do_not_tell(
    code: Code, database_url: str
) -> None:
    imports = "from typing import Annotated\nfrom pydantic import Field\n"
    pattern = "to: Annotated[str, Field(pattern='{0}', examples=['a'])]"
    code.lock(imports + fields(pattern.format("^[a-z]+$")))
    code.write(imports + fields(pattern.format("^[a-z0-9]+$")))
    assert [outcomes(each) for each in code.changes()] == [("unknown", "wait", "unknown")]
    # With no job there is no client that is known to send what is admitted.
    assert code("check").returncode == 1
    empty = code("check", "--database", database_url, "--json")
    ((change),) = json.loads(empty.stdout)["compared"][0]["changes"]
    assert (empty.returncode, *outcomes(change)) == (1, "survive", "wait", "unknown")
    enqueue(code, database_url, {"to": "a"}, {"to": "b"})
    proven = code("check", "--database", database_url, "--json")
    ((change),) = json.loads(proven.stdout)["compared"][0]["changes"]
    assert (proven.returncode, *outcomes(change)) == (0, "survive", "wait", "survive")
    assert "The queue has 2 unfinished jobs of the type, and all are read." in change["reason"]
    # One payload proves the contrary.
    run_sql(database_url, 'UPDATE job SET payload = \'{"to": "A"}\'')
    refused = code("check", "--database", database_url, "--json")
    ((change),) = json.loads(refused.stdout)["compared"][0]["changes"]
    assert (refused.returncode, *outcomes(change)) == (1, "unknown", "wait", "unknown")


def test_upgrades_and_former_names_are_used_for_what_is_stored(
    code: Code, database_url: str
) -> None:
    enqueue(code, database_url, {"to": "a"}, {"to": "b", "subject": "c"})
    code.write(
        """
        from job_registry import JobType, Payload

        class MailSendV1(Payload):
            to: str
            subject: str = "Hello"

        class MailDeliver(Payload):
            recipients: list[str]

        deliver = JobType(name="mail.deliver", payload=MailDeliver, former_names=["mail.send"])

        @deliver.upgrade(MailSendV1)
        def from_v1(older: MailSendV1) -> MailDeliver:
            if older.to == "b":
                raise RuntimeError
            return MailDeliver(recipients=[older.to])
        """
    )
    (code.folder / "registry.lock.json").unlink()
    report = json.loads(code("check", "--database", database_url, "--json").stdout)
    assert report["compared"] == []
    assert report["database"]["unknown"] == []
    assert report["database"]["jobTypes"] == [{"jobType": "mail.send", "jobs": 2, "refused": 1}]


def test_types_that_the_code_does_not_know_are_named(code: Code, database_url: str) -> None:
    enqueue(code, database_url, {"to": "a"}, {"to": "b"})
    code.write(V1.replace("mail.send", "mail.other"))
    (code.folder / "registry.lock.json").unlink()
    result = code("check", "--database", database_url)
    assert result.returncode == 1
    first, advice, last = result.stdout.splitlines()
    assert first.startswith(
        "BREAKING mail.send: there is no job type of this name, for 2 jobs, such as 01"
    )
    assert "JOBS_CATALOG" in advice
    assert last == ("Unfinished jobs in the database: 2; 0 cannot be read, 2 have an unknown type.")


def test_running_jobs_are_read_too_and_compared_with_the_limit(
    code: Code, database_url: str
) -> None:
    enqueue(code, database_url, *({"to": f"{n}"} for n in range(4)))
    run_sql(
        database_url,
        "UPDATE job SET status = 'running', next_run_at = NULL, lease_token = 't',"
        " lease_expires_at = created_at, deadline_at = created_at",
    )
    code.write(fields("to: int", "subject: str = 'Hello'").replace("limit=5", "limit=2"))
    result = json.loads(code("check", "--database", database_url, "--json").stdout)
    assert result["database"]["jobTypes"] == [{"jobType": "mail.send", "jobs": 4, "refused": 4}]
    assert result["database"]["overLimit"] == [{"jobType": "mail.send", "running": 4, "limit": 2}]
    assert "4 run now" in result["compared"][0]["changes"][-1]["reason"]
    people = code("check", "--database", database_url).stdout
    assert "WARNING mail.send: 4 jobs run now, and the concurrency limit is 2" in people


def test_a_validator_that_raises_anything_refuses_the_payload(code: Code, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    enqueue(code, url, {"to": "a"})
    code.write(
        """
        from pydantic import field_validator
        from job_registry import JobType, Payload

        class MailSend(Payload):
            to: str = "x"
            subject: str = "Hello"

            @field_validator("to")
            @classmethod
            def check(cls, value: str) -> str:
                if value == "a":
                    raise KeyError(value)
                return value

        mail_send = JobType(name="mail.send", payload=MailSend)
        """
    )
    (code.folder / "registry.lock.json").unlink()
    report = json.loads(code("check", "--database", url, "--json").stdout)
    ((fault),) = report["database"]["faults"]
    assert (fault["path"], fault["code"]) == ("", "raised KeyError")


def test_the_items_of_an_array_count_as_one_path(code: Code, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    code.write(fields("to: list[str]"))
    enqueue(code, url, {"to": ["a"] * 5}, {"to": ["a"]})
    code.write(fields("to: list[int]"))
    (code.folder / "registry.lock.json").unlink()
    report = json.loads(code("check", "--database", url, "--json").stdout)
    ((fault),) = report["database"]["faults"]
    assert (fault["path"], fault["code"], fault["jobs"]) == ("/to/*", "wrong_type", 2)


def test_a_role_that_may_only_select_is_enough(code: Code, fresh_postgresql_url: str) -> None:
    enqueue(code, fresh_postgresql_url, {"to": "a"})
    role = f"reader_{os.getpid()}_{time.monotonic_ns()}"
    run_sql(
        fresh_postgresql_url,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT USAGE ON SCHEMA job_registry TO {role}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA job_registry TO {role}",
    )
    try:
        url = as_role(fresh_postgresql_url, role)
        result = code("check", "--database", url)
        assert (result.returncode, result.stderr) == (0, "")
        assert "Unfinished jobs in the database: 1; 0 cannot be read" in result.stdout
        pooled = code("check", "--database", url, JOBS_DATABASE_POOLER="transaction")
        assert (pooled.returncode, pooled.stdout, pooled.stderr) == (0, result.stdout, "")
        run_sql(fresh_postgresql_url, f"REVOKE SELECT ON job_registry.job FROM {role}")
        denied = code("check", "--database", url)
        assert denied.returncode == 2
        assert denied.stderr.startswith("The database is not available: permission denied")
    finally:
        run_sql(fresh_postgresql_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def as_role(url: str, role: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).set(username=role).render_as_string(hide_password=False)


def test_the_file_of_sqlite_may_be_read_only(code: Code, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    enqueue(code, url, {"to": "a"})
    before = (tmp_path / "jobs.db").read_bytes()
    (tmp_path / "jobs.db").chmod(0o400)
    result = code("check", "--database", url)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "jobs.db").read_bytes() == before


def test_a_database_without_tables_is_a_sentence(code: Code, tmp_path: Path) -> None:
    missing = code("check", "--database", f"sqlite:///{tmp_path / 'none.db'}")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == (
        "The database has no Job Registry tables yet. Run `job-registry migrate`.\n"
    )
    assert not (tmp_path / "none.db").exists()


@pytest.mark.slow
def test_a_database_that_is_away_is_a_sentence(code: Code) -> None:
    away = code("check", "--database", "postgresql://ada:lovelace@127.0.0.1:1/jobs")
    assert away.returncode == 2
    assert away.stderr.startswith("The database is not available: ")
    assert "lovelace" not in away.stderr
    wrong = code("check", "--database", "mysql://ada:lovelace@localhost/jobs")
    assert wrong.returncode == 2
    assert "lovelace" not in wrong.stderr


@pytest.mark.slow
def test_a_database_that_the_deploy_will_migrate_is_read(code: Code, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    enqueue(code, url, {"to": "a"})
    migrations.downgrade(url, "0001")
    result = code("check", "--database", url)
    assert result.returncode == 0
    assert result.stderr.startswith("The database schema is out of date: it is at revision 0001")
    assert "Unfinished jobs in the database: 1;" in result.stdout


@pytest.mark.slow
def test_ctrl_c_ends_the_reading_of_a_database_at_once(code: Code, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    enqueue(code, url, *({"to": f"{n}"} for n in range(3_000)))
    code.write(
        """
        import time
        from pathlib import Path
        from pydantic import field_validator
        from job_registry import JobType, Payload

        class MailSend(Payload):
            to: str = "x"
            subject: str = "Hello"

            @field_validator("to")
            @classmethod
            def check(cls, value: str) -> str:
                if value.isdigit():
                    Path("reading").touch()
                    time.sleep(0.002)
                return value

        mail_send = JobType(name="mail.send", payload=MailSend)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "job_registry_api.cli", "check", "--database", url],
        cwd=code.folder, env=code.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    give_up = time.monotonic() + 30
    while not (code.folder / "reading").exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
