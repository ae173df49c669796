"""What the process of a handler does before and after it, in this process."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job_registry import DefinitionError, JobContext, JobType, Payload
from job_registry_api.worker import child
from job_registry_api.worker.child import CUT_OFF, job_type_at


class Some(Payload):
    """Nothing."""


with_handler: JobType[Some] = JobType(name="with_handler", payload=Some)
without_handler: JobType[Some] = JobType(name="without_handler", payload=Some)
several = [without_handler, with_handler]


@with_handler.handler
def run(job: JobContext, payload: Some) -> str:
    return "done"


@pytest.mark.parametrize("attribute", ["with_handler", "several"])
@pytest.mark.parametrize("module", [None, __name__, "collections.abc"])
def test_a_job_type_is_imported_by_its_address(attribute: str, module: str | None) -> None:
    assert job_type_at(f"{__name__}:{attribute}", "with_handler", module) is with_handler


@pytest.mark.parametrize(
    ("attribute", "name", "fault"),
    [
        ("without_handler", "without_handler", "without_handler has no handler once this"),
        ("several", "without_handler", "without_handler has no handler once this"),
        ("with_handler", "another", "this is not the job type another"),
        ("several", "another", "this is not the job type another"),
        ("run", "with_handler", "this is not the job type with_handler"),
        ("nothing", "with_handler", "nothing"),
    ],
)
def test_another_address_is_refused(attribute: str, name: str, fault: str) -> None:
    with pytest.raises(DefinitionError, match=fault):
        job_type_at(f"{__name__}:{attribute}", name, None)


def test_the_module_of_a_handler_is_imported_first() -> None:
    with pytest.raises(DefinitionError, match="no_such_module"):
        job_type_at(f"{__name__}:with_handler", "with_handler", "no_such_module")


class Ended(BaseException):
    """The process would have ended."""


def checked(handler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def end(code: int) -> None:
        assert code == CUT_OFF
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    return child._Descriptors().checked_after(handler)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /dev/fd")
@pytest.mark.parametrize("mounted", ["with /proc", "without /proc"])
async def test_a_handler_that_closes_or_replaces_a_descriptor_ends_its_process(
    mounted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mounted == "without /proc":
        monkeypatch.setattr(child, "Path", lambda path: Path(f"/nowhere{path}"))
    ours, theirs = socket.socketpair()
    null = os.open(os.devnull, os.O_RDONLY)

    def replaces(what: str) -> str:
        if what == "raises":
            raise ValueError
        if what == "replaces":
            os.dup2(null, ours.fileno())
        if what == "closes":
            os.close(theirs.fileno())
        return what

    async def replaces_async(what: str) -> str:
        return replaces(what)

    handler, async_handler = checked(replaces, monkeypatch), checked(replaces_async, monkeypatch)
    assert handler("does nothing") == await async_handler("does nothing") == "does nothing"
    for each in (handler, async_handler):
        assert each.__name__ in ("replaces", "replaces_async")
    with pytest.raises(ValueError):  # noqa: PT011
        handler("raises")
    with pytest.raises(Ended):
        handler("replaces")
    with pytest.raises(Ended):
        await async_handler("does nothing")
    again = checked(replaces, monkeypatch)
    with pytest.raises(Ended):
        again("closes")
    # A descriptor that the handler itself opens is its own affair.
    more = checked(lambda: os.open(os.devnull, os.O_RDONLY), monkeypatch)
    os.close(more())
    # A forked child reports nothing, and is not ended.
    process = os.getpid()
    forked = checked(replaces, monkeypatch)
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    os.close(null)
    assert forked("does nothing") == "does nothing"
    ours.close()
    theirs.detach()


def test_messages_travel_as_frames_until_the_other_end_is_closed() -> None:
    ours, theirs = socket.socketpair()
    link, other = child._Link(ours), child._Link(theirs)
    messages: list[dict[str, Any]] = [{"run": {"number": 1}}, {"text": "é" * 70_000}]
    link.send(messages[0])
    assert other.receive() == messages[0]
    other.send({})
    assert link.receive() == {}
    ours.shutdown(socket.SHUT_RDWR)
    assert other.receive() is None
    # This can no longer be sent. That is not an error, because the process is about to end.
    link.send(messages[1])
    ours.close()
    theirs.close()
