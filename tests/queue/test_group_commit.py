"""Concurrent calls share commits, and each has its own deadline."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from job_registry_api.queue.group_commit import GroupCommit


class Commits:
    """Groups that were committed, in order. A commit takes until `may_end` is set."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.may_end = asyncio.Event()

    async def commit(self, items: Sequence[int]) -> list[int]:
        self.groups.append(list(items))
        await self.may_end.wait()
        return [item * 10 for item in items]


def after(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_calls_that_arrive_during_a_commit_share_the_next_one() -> None:
    commits = Commits()
    group = GroupCommit(commits.commit)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        results = [tasks.create_task(group.submit(0, until=after(60)))]
        while not commits.groups:
            await asyncio.sleep(0)
        results += [tasks.create_task(group.submit(item, until=after(60))) for item in (1, 2)]
        await asyncio.sleep(0)
        commits.may_end.set()
    assert [task.result() for task in results] == [0, 10, 20]
    assert commits.groups == [[0], [1, 2]]


async def test_after_a_group_of_several_calls_the_next_one_waits_while_calls_arrive() -> None:
    commits = Commits()
    group = GroupCommit(commits.commit)
    asyncio.get_running_loop().call_later(0.2, commits.may_end.set)
    await asyncio.gather(group.submit(0), group.submit(1))
    calls = []
    for item in (2, 3, 4):
        calls.append(asyncio.create_task(group.submit(item)))
        for _ in range(3):  # A server reads the next request a turn or two of its loop later.
            await asyncio.sleep(0)
    assert await asyncio.gather(*calls) == [20, 30, 40]
    assert commits.groups == [[0, 1], [2, 3, 4]]


async def test_calls_that_never_stop_arriving_do_not_hold_up_a_commit() -> None:
    commits = Commits()
    group = GroupCommit(commits.commit, max_items=1_000_000)
    asyncio.get_running_loop().call_later(0.02, commits.may_end.set)
    await asyncio.gather(group.submit(0), group.submit(1))
    began = asyncio.get_running_loop().time()
    calls = []
    while len(commits.groups) < 2 and asyncio.get_running_loop().time() < began + 5:
        calls.append(asyncio.create_task(group.submit(2)))
        await asyncio.sleep(0)
    # It waits for about as long as the commit before it took.
    assert asyncio.get_running_loop().time() < began + 1
    await asyncio.gather(*calls)


async def test_a_single_caller_does_not_wait_for_others() -> None:
    commits = Commits()
    group = GroupCommit(commits.commit)
    for item in range(3):
        call = asyncio.create_task(group.submit(item))
        for _ in range(2):  # The call, and its commit.
            await asyncio.sleep(0)
        assert commits.groups[-1] == [item]
        commits.may_end.set()
        await call
        commits.may_end.clear()


async def test_a_group_that_is_full_does_not_wait() -> None:
    commits = Commits()
    group = GroupCommit(commits.commit, max_items=2)
    asyncio.get_running_loop().call_later(0.2, commits.may_end.set)
    await asyncio.gather(*(group.submit(item) for item in range(2)))
    calls = [asyncio.create_task(group.submit(item)) for item in range(2, 5)]
    for _ in range(2):
        await asyncio.sleep(0)
    assert commits.groups[:2] == [[0, 1], [2, 3]]
    assert await asyncio.gather(*calls) == [20, 30, 40]


async def test_a_call_ends_at_its_deadline_and_the_others_go_on() -> None:
    commits = Commits()
    group = GroupCommit(commits.commit)
    until = [after(60), after(0.05), after(0.02), after(60)]
    calls = [asyncio.create_task(group.submit(item, until=time)) for item, time in enumerate(until)]
    done, _ = await asyncio.wait(calls[1:3], timeout=5)
    assert done == set(calls[1:3])
    assert all(isinstance(call.exception(), TimeoutError) for call in done)
    assert not calls[0].done()
    # A later call has a deadline too, after the timer of the earlier ones has ended.
    with pytest.raises(TimeoutError):
        await group.submit(4, until=after(0.02))
    commits.may_end.set()
    assert [await calls[0], await calls[3], await group.submit(5)] == [0, 30, 50]
    # What is late is committed all the same if its commit had begun.
    assert commits.groups == [[0, 1, 2, 3], [5]]


async def test_a_call_has_a_deadline_also_when_no_other_call_is_left() -> None:
    group = GroupCommit(Commits().commit)
    async with asyncio.timeout(5):
        for item in range(2):
            with pytest.raises(TimeoutError):
                await group.submit(item, until=after(0.02))


async def test_many_calls_have_one_timer(timers: list[float]) -> None:
    commits = Commits()
    commits.may_end.set()
    group = GroupCommit(commits.commit)
    for _ in range(5):
        await asyncio.gather(*(group.submit(item, until=after(60)) for item in range(20)))
    assert len(timers) == 1


async def test_a_deadline_that_has_passed_sets_no_further_timer(timers: list[float]) -> None:
    group = GroupCommit(Commits().commit)
    calls = [asyncio.create_task(group.submit(0, until=after(seconds))) for seconds in (60, 0.02)]
    await asyncio.sleep(0.1)
    assert [call.done() for call in calls] == [False, True]
    assert len(timers) <= 4  # Two for the calls, one for that which is left, and the sleep.
    calls[0].cancel()
    await asyncio.wait(calls)


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times of the timers that are set."""
    times: list[float] = []
    loop = asyncio.get_running_loop()
    call_at = loop.call_at

    def counted(when: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
        times.append(when)
        return call_at(when, *arguments, **options)

    monkeypatch.setattr(loop, "call_at", counted)
    return times


async def test_nothing_is_kept_of_a_call_that_has_ended_before_its_deadline() -> None:
    class Row:
        """A result that can be referred to weakly."""

    async def commit(items: Sequence[int]) -> list[Row]:
        return [Row() for _ in items]

    group = GroupCommit(commit)
    ended = weakref.ref(await group.submit(0, until=after(60)))
    await asyncio.sleep(0.01)
    gc.collect()
    assert ended() is None


async def test_the_end_of_the_task_cancels_every_caller() -> None:
    commits = Commits()
    group = GroupCommit(commits.commit, max_items=1)
    calls = [asyncio.create_task(group.submit(item)) for item in range(2)]
    while not commits.groups:
        await asyncio.sleep(0)
    (task,) = (each for each in asyncio.all_tasks() if each.get_name() == "group-commit")
    task.cancel()
    await asyncio.wait([task, *calls], timeout=5)
    assert [each.cancelled() for each in (task, *calls)] == [True, True, True]
    # Calls that come later are committed, and only these.
    commits.may_end.set()
    assert await group.submit(2) == 20
    assert commits.groups == [[0], [2]]
