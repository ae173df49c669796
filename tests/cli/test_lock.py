"""`job-registry lock`: what the file has, when it changes, and that it is written whole."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from job_registry.lock import LOCK_FORMAT, Lock, LockInvalid, lock_text, read_lock
from tests.cli.test_cli import Shell

TYPES = """
    from job_registry import JobPolicy, JobType, Payload

    class MailSend(Payload):
        '''Send a mail.'''
        to: str
        subject: str = "Hello"

    mail_send = JobType(name="mail.send", payload=MailSend, policy=JobPolicy(concurrency_limit=5))

    @mail_send.handler
    async def send(job, payload: MailSend) -> None: ...
"""


class Code(Shell):
    """Runs the command in a folder with a catalog of its own."""

    def write(self, source: str) -> None:
        (self.folder / "myjobs.py").write_text(textwrap.dedent(source))
        self.environment["JOBS_CATALOG"] = "myjobs"
        # Bytecode of a source as long as this one, and written in the same second, would run.
        self.environment["PYTHONDONTWRITEBYTECODE"] = "1"


@pytest.fixture
def code(tmp_path: Path) -> Code:
    code = Code(tmp_path)
    code.write(TYPES)
    return code


def lock_of(code: Code) -> Path:
    locked = code("lock")
    assert locked.returncode == 0, locked.stderr
    return code.folder / "registry.lock.json"


def test_the_lock_has_what_each_job_type_promises(code: Code) -> None:
    locked = code("lock")
    assert (locked.returncode, locked.stderr) == (0, "")
    assert locked.stdout == "registry.lock.json: 1 job type. added: mail.send.\n"
    content = json.loads((code.folder / "registry.lock.json").read_text())
    assert content["format"] == LOCK_FORMAT
    types = json.loads(code("types", "--json").stdout)
    assert content["jobTypes"] == {
        "mail.send": {
            "fingerprint": types[0]["fingerprint"],
            "hasHandler": True,
            "formerNames": [],
            "olderForms": [],
            "payloadSchema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "to": {"type": "string"},
                    "subject": {"type": "string", "default": "Hello"},
                },
                "required": ["to"],
            },
            "policy": {k: v for k, v in types[0]["policy"].items() if k != "type"},
        }
    }
    assert "input MailSendInput {" in content["graphql"]


def test_the_lock_has_the_former_names_and_the_older_forms_of_a_type(code: Code) -> None:
    code.write(
        """
        from job_registry import JobType, Payload

        class MailSendV1(Payload):
            address: str

        class MailSend(Payload):
            to: str

        mail_send = JobType(
            name="mail.send", payload=MailSend, accepts=[MailSendV1], former_names=["mail", "email"]
        )

        @mail_send.upgrade(MailSendV1)
        def from_v1(older: MailSendV1) -> MailSend:
            return MailSend(to=older.address)
        """
    )
    lock = read_lock(lock_of(code).read_bytes()).job_types["mail.send"]
    assert lock.former_names == ["email", "mail"]
    ((form),) = lock.older_forms
    assert (form.model, form.accepted) == ("MailSendV1", True)
    assert form.payload_schema["required"] == ["address"]


@pytest.mark.slow
def test_the_same_promises_are_the_same_text(code: Code) -> None:
    first = lock_of(code).read_bytes()
    code.write(
        re.sub("Send a mail", "Send a letter, which is described better", TYPES)
        + "\n    other = None\n"
    )
    again = code("lock")
    assert again.stdout == "registry.lock.json: 1 job type. No job type has changed.\n"
    assert lock_of(code).read_bytes() == first


@pytest.mark.slow
def test_a_difference_of_two_locks_is_readable(code: Code) -> None:
    before = lock_of(code).read_text().splitlines()
    code.write(TYPES.replace("concurrency_limit=5", "concurrency_limit=6"))
    changed = code("lock")
    assert changed.stdout == "registry.lock.json: 1 job type. changed: mail.send.\n"
    after = lock_of(code).read_text().splitlines()
    assert [line.strip() for line in after if line not in before] == ['"concurrencyLimit": 6,']
    assert max(map(len, after)) < 200


def test_a_renamed_type_is_neither_added_nor_removed(code: Code) -> None:
    lock_of(code)
    code.write(TYPES.replace('name="mail.send"', 'name="mail.deliver", former_names=["mail.send"]'))
    renamed = code("lock", "--lock", "registry.lock.json")
    assert renamed.stdout == "registry.lock.json: 1 job type. renamed: mail.send to mail.deliver.\n"


def test_the_summary_is_there_for_programs(code: Code) -> None:
    assert json.loads(code("lock", "--json", "--lock", "other.json").stdout) == {
        "file": "other.json",
        "jobTypes": 1,
        "renamed": {},
        "added": ["mail.send"],
        "changed": [],
        "removed": [],
    }
    assert sorted(path.name for path in code.folder.glob("*.*")) == ["myjobs.py", "other.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "exit_code", "says"),
    [
        ("missing/registry.lock.json", 1, "Cannot write missing/registry.lock.json: "),
        ("folder", 2, "Cannot read folder: "),
        ("registry.lock.json/x", 2, "Cannot read registry.lock.json/x: "),
    ],
)
def test_a_lock_that_cannot_be_written_leaves_the_former_one(
    code: Code, file: str, exit_code: int, says: str
) -> None:
    before = lock_of(code).read_bytes()
    (code.folder / "folder").mkdir()
    failed = code("lock", "--lock", file)
    assert failed.returncode == exit_code
    assert failed.stderr.startswith(says)
    assert (code.folder / "registry.lock.json").read_bytes() == before
    assert not [path for path in code.folder.iterdir() if path.name.startswith(".registry")]


@pytest.mark.parametrize(
    ("begins", "says"),
    [
        ("<<<<<<< ours\n", "It is not valid JSON: unexpected character at line 1, column 1."),
        (
            '{"format": 2}',
            "/format: Expected 1, the format of this version of Job Registry; got 2.",
        ),
    ],
)
def test_a_file_that_is_not_a_lock_is_not_replaced(code: Code, begins: str, says: str) -> None:
    file = code.folder / "registry.lock.json"
    file.write_text(begins)
    refused = code("lock")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines() == [
        f"registry.lock.json is not a lock that this version can read. {says}",
        "It was left as it is. Restore or delete it, and run `job-registry lock` again.",
    ]
    assert file.read_text() == begins
    file.unlink()
    assert code("lock").returncode == 0


def test_a_catalog_that_cannot_be_imported_writes_nothing(code: Code) -> None:
    before = lock_of(code).read_bytes()
    code.write("import nothing_of_this_name")
    failed = code("lock")
    assert failed.returncode == 2
    assert failed.stderr.startswith("The job types cannot be loaded: myjobs:")
    assert (code.folder / "registry.lock.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "It is not valid JSON: the text ends too early at line 1, column 0."),
        ("[]", "Expected a JSON object; got []."),
        ("[" * 100_000, "It is not valid JSON: too many nested arrays and objects"),
        ("{}", "/format: Expected 1, the format of this version of Job Registry; got null."),
        ('{"format": 2, "jobTypes": {}}', "/format: Expected 1"),
        ('{"format": 1}', "/jobTypes: "),
        ('{"format": 1, "jobTypes": {"a": {}}}', "/jobTypes/a/fingerprint: "),
        ('{"format": 1, "jobTypes": {"a": 7}}', "/jobTypes/a: "),
        ('{"format": 1, "jobTypes": {}, "graphql": "x"}', "/graphql: Expected an array"),
        ('{"format": 1, "jobTypes": {}, "more": 1}', "/more: "),
    ],
)
def test_a_text_that_is_not_a_lock_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(LockInvalid) as refused:
        read_lock(text)
    assert says in str(refused.value)


def test_a_lock_of_any_text_is_read_as_it_was_written() -> None:
    lock = read_lock(
        json.dumps(
            {
                "format": 1,
                "jobTypes": {
                    "a": {
                        "fingerprint": "\x1b\u202e\x7f é",
                        "hasHandler": False,
                        "payloadSchema": {"const": "\u2028\x00\r\n"},
                        "policy": {},
                    }
                },
            }
        )
    )
    text = lock_text(lock)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert read_lock(text) == lock
    assert read_lock(lock_text(Lock({}, "type Query {\n  a: Int\n}\n"))).graphql == (
        "type Query {\n  a: Int\n}\n"
    )
