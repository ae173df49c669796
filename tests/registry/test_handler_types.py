"""What a type checker says of handlers: the wrong arguments are errors before anything runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = """
from collections.abc import Coroutine
from functools import partial
from typing import Any, assert_type

from job_registry import JobContext, JobType, Payload


class MailSend(Payload):
    address: str


class MailDelete(Payload):
    number: int


def a_job_type() -> JobType[MailSend]:
    return JobType(name="mail.send", payload=MailSend)
"""

GOOD = """
@a_job_type().handler
async def on_the_loop(job: JobContext, payload: MailSend) -> dict[str, int]:
    return {"letters": len(payload.address)}


@a_job_type().handler
def in_a_thread(job: JobContext, payload: MailSend) -> str:
    return payload.address


@a_job_type().handler
def of_any_payload(job: JobContext, payload: Payload) -> None: ...


@a_job_type().handler
def with_more(job: JobContext, payload: MailSend, copies: int = 1, *, fast: bool = True) -> str:
    return payload.address * copies if fast else ""


class Step:
    async def __call__(self, job: JobContext, payload: MailSend) -> None: ...

    def method(self, job: JobContext, payload: MailSend) -> None: ...


def with_a_client(client: str, job: JobContext, payload: MailSend) -> None: ...


a_job_type().handler(Step())
a_job_type().handler(Step().method)
a_job_type().handler(partial(with_a_client, "client"))
a_job_type().handler(lambda job, payload: payload.address)


class MailSendV1(Payload):
    to: str


class MailSendV0(Payload):
    receiver: str


@a_job_type().upgrade(MailSendV1)
def from_v1(older: MailSendV1) -> MailSend:
    return MailSend(address=older.to)


@a_job_type().upgrade(MailSendV0)
def from_v0(older: MailSendV0) -> MailSendV1:
    return MailSendV1(to=older.receiver)


JobType(name="mail.send", payload=MailSend, accepts=[MailSendV1], former_names=["mail"])
a_job_type().upgrade(MailSendV1)(lambda older: MailSend(address=older.to))


async def calls(job: JobContext, payload: MailSend) -> None:
    assert_type(from_v1(MailSendV1(to="")), MailSend)
    assert_type(a_job_type().read("{}"), MailSend)
    assert_type(in_a_thread(job, payload), str)
    assert_type(await on_the_loop(job, payload), dict[str, int])
"""

BAD = """
@a_job_type().handler  # error
async def of_another_payload(job: JobContext, payload: MailDelete) -> None: ...


@a_job_type().handler  # error
def swapped(payload: MailSend, job: JobContext) -> None: ...


@a_job_type().handler  # error
def without_a_context(payload: MailSend) -> None: ...


@a_job_type().handler  # error
def without_a_payload(job: JobContext) -> None: ...


@a_job_type().handler  # error
def with_one_too_many(job: JobContext, payload: MailSend, copies: int) -> None: ...


@a_job_type().handler  # error
def with_a_keyword_too_many(job: JobContext, payload: MailSend, *, copies: int) -> None: ...


@a_job_type().handler  # error
def of_parsed_json(job: JobContext, payload: dict[str, Any]) -> None: ...


class Step:
    def __call__(self, job: JobContext, payload: MailDelete) -> None: ...


a_job_type().handler(Step())  # error
a_job_type().handler(lambda job, payload: payload.number)  # error
JobType(name="mail.send", payload=dict)  # error


@a_job_type().upgrade(MailDelete)  # error
def of_another_model(older: MailSend) -> MailSend: raise NotImplementedError


@a_job_type().upgrade(MailDelete)  # error
def to_a_dict(older: MailDelete) -> dict[str, Any]: raise NotImplementedError


@a_job_type().upgrade(MailDelete)  # error
async def later(older: MailDelete) -> MailSend: raise NotImplementedError


a_job_type().upgrade(dict)  # error
JobType(name="mail.send", payload=MailSend, accepts=[dict])  # error
"""


@pytest.mark.slow
def test_a_handler_with_the_wrong_arguments_is_an_error_of_types(tmp_path: Path) -> None:
    for name, body in (("good.py", GOOD), ("bad.py", BAD)):
        (tmp_path / name).write_text(JOBS + body)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "good.py", "bad.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = set(re.findall(r"^(\w+\.py):(\d+): error", ran.stdout, re.MULTILINE))
    marked = {
        ("bad.py", str(number))
        for number, line in enumerate((JOBS + BAD).splitlines(), start=1)
        if "# error" in line
    }
    assert found == marked, ran.stdout + ran.stderr
