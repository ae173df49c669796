"""Which process runs a job, when one is replaced, and what its messages mean.

The processes are stand-ins that answer as a test says; `test_in_processes.py` has real ones.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from job_registry import JobType, Payload
from job_registry_api.worker import processes
from job_registry_api.worker.memory_limit import MEGABYTE
from job_registry_api.worker.outcomes import (
    Died,
    End,
    MemoryExceeded,
    NotStarted,
    Raised,
    Returned,
    end_as_json,
)
from job_registry_api.worker.processes import HandlerProcesses, ProcessCall
from job_registry_api.worker.watchdog import Term

Message = dict[str, Any]


class StandIn:
    """A process that receives these messages from its child, and then nothing more."""

    started: list[StandIn]
    script: Callable[[StandIn], list[Message]]

    pid = 4242

    def __init__(self, start: Message, path: Sequence[str], watchdog: StandInWatchdog) -> None:
        self.start = start
        self.path = path
        self.is_ready = self.is_begun = self.was_used = False
        self.left_over = self.number = self.cancelled = self.received = 0
        self.alive = True
        self.killed = self.ended = False
        self.sent: list[Message] = []
        self.seeing_off: asyncio.Task[Any] | None = None
        self.retire: Callable[[], None] = lambda: None
        self.started.append(self)

    was_too_late = False

    def begin(self, term: Term) -> None:
        pass

    def run(self, run: Message) -> None:
        self.number += 1
        self.is_begun = False
        self.sent.append(run)

    async def receive(self) -> Message | None:
        await asyncio.sleep(0)
        messages = type(self).script(self)
        self.received += 1
        return messages[self.received - 1] if self.received <= len(messages) else None

    def cancel(self) -> None:
        self.cancelled += 1

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def wait_for_job(self, retire: Callable[[], None]) -> None:
        self.retire = retire

    def stop_waiting(self) -> bool:
        return self.alive

    def is_alive(self) -> bool:
        return self.alive

    def kill(self) -> None:
        self.killed = True

    async def end(self) -> int:
        self.ended, self.alive = True, False
        return 3


class StandInWatchdog:
    """A watchdog that watches nothing."""

    def start(self) -> None:
        pass

    def end(self) -> None:
        pass


READY: Message = {"ready": True}


def ended(number: int = 1, end: End = Returned("done"), left_over: int = 0) -> Message:
    return {"ended": number, "left_over": left_over, "end": end_as_json(end)}


def answering(*messages: Message) -> Callable[[StandIn], list[Message]]:
    return lambda _process: list(messages)


class Empty(Payload):
    """Nothing."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The processes that were started."""
    StandIn.started, StandIn.script = [], answering(READY, {"begun": 1}, ended())
    monkeypatch.setattr(processes, "_Process", StandIn)
    monkeypatch.setattr(processes, "Watchdog", StandInWatchdog)
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 0.05)
    return StandIn.started


def pool() -> Any:
    return HandlerProcesses(assets="assets", extensions=(), max_bytes=100, needed=False)


class Call:
    """One call in a pool, and what its handler passed on."""

    def __init__(
        self,
        pool: HandlerProcesses,
        memory_limit_mb: int | None = None,
        may_start: Callable[[], bool] = lambda: True,
        on_follow_up: Callable[[Any], None] | None = None,
    ) -> None:
        self.progress: list[bytes] = []
        self.lines: list[bytes] = []
        self.follow_ups: list[Any] = []
        job_type = JobType(
            name="a", payload=Empty, run_in="process", memory_limit_mb=memory_limit_mb
        )
        self.call = ProcessCall(
            pool,
            "module:a",
            job_type,
            {"id": "1"},
            {},
            deadline=time.monotonic() + 60,
            on_progress=self.progress.append,
            on_log_line=self.lines.append,
            on_follow_up=on_follow_up or self.follow_ups.append,
            may_start=may_start,
        )

    async def end(self) -> End:
        return await asyncio.wait_for(self.call.ended, 5)


async def a_moment() -> None:
    await asyncio.sleep(0.02)


async def test_a_process_is_started_once_and_used_again(started: list[StandIn]) -> None:
    all_of_them = pool()
    first = all_of_them.take()
    assert first.start["assets"] == "assets"
    assert (first.start["extensions"], first.start["max_bytes"]) == ([], 100)
    second = all_of_them.take()
    assert second is not first
    all_of_them.give_back(first)
    assert all_of_them.take() is first
    assert len(started) == 2


async def test_a_process_in_which_more_than_half_of_the_limit_is_left_is_replaced(
    started: list[StandIn],
) -> None:
    all_of_them = pool()
    process = all_of_them.take()
    process.left_over = 5 * MEGABYTE
    for limit_mb in (None, 10):
        all_of_them.give_back(process)
        assert all_of_them.take(limit_mb) is process
    process.left_over += 1
    all_of_them.give_back(process)
    assert all_of_them.take(10) is not process
    assert process.sent == [{"leave": True}]
    process.alive = False
    await asyncio.wait_for(process.seeing_off, 5)
    assert process.ended


async def test_a_process_that_is_gone_is_not_used(started: list[StandIn]) -> None:
    all_of_them = pool()
    one, other = all_of_them.take(), all_of_them.take()
    all_of_them.give_back(one)
    all_of_them.give_back(other)
    other.alive = False
    assert all_of_them.take() is one
    await asyncio.wait_for(other.seeing_off, 5)
    assert other.ended


async def test_a_process_that_waits_too_long_leaves_and_one_that_works_does_not(
    started: list[StandIn],
) -> None:
    all_of_them = pool()
    idle, busy = all_of_them.take(), all_of_them.take()
    all_of_them.give_back(busy)
    all_of_them.give_back(idle)
    idle.retire()
    assert idle.sent == [{"leave": True}]
    assert all_of_them.take() is busy
    busy.retire()
    assert busy.sent == []
    # It does not leave, and is killed.
    began = time.monotonic()
    await asyncio.wait_for(idle.seeing_off, 5)
    assert idle.ended
    assert 0.05 <= time.monotonic() - began < 1


async def test_all_processes_are_killed_at_once(started: list[StandIn]) -> None:
    all_of_them = pool()
    idle, _busy = all_of_them.take(), all_of_them.take()
    all_of_them.give_back(idle)
    all_of_them.kill_all()
    assert [each.killed for each in started] == [True, True]


@pytest.mark.parametrize("leaves", [True, False])
async def test_processes_leave_and_end_when_the_worker_ends(
    started: list[StandIn], leaves: bool
) -> None:
    all_of_them = pool()
    idle, busy = all_of_them.take(), all_of_them.take()
    all_of_them.give_back(idle)
    closing = asyncio.create_task(all_of_them.close())
    await a_moment()
    assert (idle.sent, busy.sent) == ([{"leave": True}], [])
    assert not idle.ended
    idle.alive = not leaves
    await asyncio.wait_for(closing, 1)
    assert [each.ended for each in started] == [True, True]
    # One that comes back later ends as well.
    late = StandIn({}, [], StandInWatchdog())
    all_of_them.give_back(late)
    await asyncio.wait_for(late.seeing_off or asyncio.sleep(0), 1)
    assert late.ended


async def test_what_a_process_sends_about_its_job_is_passed_on(started: list[StandIn]) -> None:
    all_of_them = pool()
    StandIn.script = answering(
        READY,
        {"begun": 1},
        {"progress": 1, "text": "half"},
        {"progress": 0, "text": "of an earlier job"},
        {"follow_up": 1, "job": "next"},
        {"follow_up": 0, "job": "of an earlier job"},
        ended(0),
        ended(1, left_over=7),
        {"begun": 2},
        ended(2, Raised("error", "ValueError", "x")),
    )
    call = Call(all_of_them)
    assert await call.end() == Returned("done")
    assert (call.progress, call.follow_ups) == ([b"half"], ["next"])
    (process,) = started
    assert (process.is_begun, process.was_used, process.left_over) == (True, True, 7)
    (run,) = process.sent
    assert (run["address"], run["job"], run["payload"]) == ("module:a", {"id": "1"}, {})
    assert 59 < run["seconds_left"] <= 60
    assert (process.ended, process.cancelled) == (False, 0)
    # The same process runs the next job.
    assert await Call(all_of_them).end() == Raised("error", "ValueError", "x")
    assert started == [process]


async def test_a_process_is_ended_if_what_it_sends_raises_an_error(started: list[StandIn]) -> None:
    # Given a job whose validator has a bug
    def refuse(_job: Any) -> None:
        raise KeyError("rate")

    StandIn.script = answering(READY, {"begun": 1}, {"follow_up": 1, "job": "next"}, ended())
    all_of_them = pool()
    call = Call(all_of_them, on_follow_up=refuse)

    # I expect its handler not to run on after the attempt has ended
    with pytest.raises(KeyError):
        await call.end()
    assert [each.ended for each in started] == [True]
    await Call(all_of_them).end()
    assert len(started) == 2


async def test_a_process_that_cannot_load_its_handler_says_why(started: list[StandIn]) -> None:
    StandIn.script = answering({"failed": "no such module"})
    assert await Call(pool()).end() == NotStarted("no such module")
    assert [each.ended for each in started] == [True]


async def test_a_process_that_is_ready_and_cannot_load_a_handler_is_kept(
    started: list[StandIn],
) -> None:
    StandIn.script = answering(READY, {"begun": 1}, ended(1, NotStarted("no such type")))
    assert await Call(pool()).end() == NotStarted("no such type")
    assert [(each.ended, each.sent[1:]) for each in started] == [(False, [])]


async def test_a_process_whose_handler_exceeded_its_memory_is_replaced(
    started: list[StandIn],
) -> None:
    StandIn.script = answering(READY, {"begun": 1}, ended(1, MemoryExceeded(64)))
    all_of_them = pool()
    assert await Call(all_of_them, 64).end() == MemoryExceeded(64)
    assert started[0].sent[1:] == [{"leave": True}]
    assert all_of_them.take() is not started[0]


@pytest.mark.parametrize("messages", [(), (READY,), (READY, {"begun": 1})])
async def test_a_process_that_dies_in_its_first_job_costs_an_attempt(
    started: list[StandIn], messages: tuple[Message, ...]
) -> None:
    StandIn.script = answering(*messages)
    assert await Call(pool()).end() == Died(3)
    assert len(started) == 1


async def test_a_process_that_died_while_it_waited_costs_no_attempt(
    started: list[StandIn],
) -> None:
    all_of_them = pool()

    def script(process: StandIn) -> list[Message]:
        used = process is started[0]
        return [READY, {"begun": 1}, ended(1)] if used else [READY, {"begun": 1}, ended(1, OTHER)]

    StandIn.script = script
    assert await Call(all_of_them).end() == Returned("done")
    assert await Call(all_of_them).end() == OTHER
    assert [each.ended for each in started] == [True, False]


OTHER = Returned("by another process")


async def test_a_job_that_three_processes_did_not_take_is_not_started(
    started: list[StandIn],
) -> None:
    all_of_them = pool()
    StandIn.script = answering(READY, {"begun": 1}, ended(1))
    calls = [Call(all_of_them) for _ in range(4)]
    for call in calls:
        await call.end()
    assert len(started) == 4
    last = Call(all_of_them)
    assert await last.end() == NotStarted(
        "The handler's process ended before it took the job, three times."
    )
    assert [each.ended for each in started] == [False, True, True, True]


async def test_a_handler_that_is_killed_has_died(started: list[StandIn]) -> None:
    all_of_them = pool()
    await Call(all_of_them).end()
    assert not started[0].killed
    call = Call(all_of_them)
    call.call.kill()
    assert await call.end() == Died(3)
    assert started[0].killed
    assert len(started) == 1


async def test_a_stop_that_is_requested_before_the_process_is_ready_keeps_it_for_another_job(
    started: list[StandIn],
) -> None:
    all_of_them = pool()
    call = Call(all_of_them)
    call.call.request_stop()
    assert await call.end() == Raised("stopped", "CancelledError", "")
    assert started[0].sent == []
    assert all_of_them.take() is started[0]


async def test_a_handler_does_not_start_once_its_lease_is_not_sure(
    started: list[StandIn],
) -> None:
    call = Call(pool(), may_start=lambda: False)
    assert await call.end() == Raised("stopped", "CancelledError", "")
    assert started[0].sent == []


async def test_a_stop_is_passed_on_while_the_handler_runs(started: list[StandIn]) -> None:
    call = Call(pool())
    await asyncio.sleep(0)
    call.call.request_stop()
    assert started[0].cancelled == 1
    await call.end()


async def test_a_process_that_cannot_be_started_says_why(
    started: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_start: Message, _path: Sequence[str], _watchdog: StandInWatchdog) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(processes, "_Process", refuse)
    assert await Call(pool()).end() == NotStarted(
        "A process for the handler cannot be started: OSError: Too many open files."
    )


async def test_processes_start_in_a_folder_that_was_deleted(
    started: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert pool().take() is started[0]


async def test_processes_find_modules_as_the_worker_does(
    started: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of an editable install, whose entry is the name of an import hook."""
    (tmp_path / "lib").mkdir()
    monkeypatch.chdir(tmp_path)
    processes_of_a_worker = pool()
    monkeypatch.chdir("/")
    hook = "__editable__.acme.finder.__path_hook__"
    monkeypatch.setattr(sys, "path", ["", "lib", hook, "/absent"])
    processes_of_a_worker.take()
    here = str(tmp_path)
    assert [each.rstrip("/") for each in started[0].path] == [here, here + "/lib", hook, "/absent"]


@pytest.mark.parametrize(("size", "near"), [(99, False), (100, True), (101, True), (None, False)])
async def test_a_crash_close_to_the_memory_limit_is_told_from_others(
    started: list[StandIn], monkeypatch: pytest.MonkeyPatch, size: int | None, near: bool
) -> None:
    monkeypatch.setattr(processes, "address_space", lambda pid: size if pid == 4242 else 0)
    begun = asyncio.Event()

    class Watched(StandIn):
        async def receive(self) -> Message | None:
            if self.received == 3:
                begun.set()
                await a_moment()
            return await super().receive()

    monkeypatch.setattr(processes, "_Process", Watched)
    Watched.script = answering(
        READY, {"begun": 1}, {"limited": 1, "near": 100}, {"limited": 0, "near": 0}
    )
    assert await Call(pool(), 64).end() == Died(3, 64, near_limit=near)
    assert begun.is_set()
