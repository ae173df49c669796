"""What the lease keeper renews and when, and what it makes of each answer.

The queue is a stand-in that answers as a test says. A lease of 30 seconds is due 10 seconds after
its last renewal, so that tests set how long ago that was instead of waiting.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from job_registry_api.queue.errors import LeaseLost, QueueUnavailable
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.store import Renewed
from job_registry_api.worker import lease_keeper
from job_registry_api.worker.lease_keeper import Hold, LeaseKeeper
from job_registry_api.worker.watchdog import Term

Answer = Renewed | LeaseLost


def in_force(**facts: Any) -> Renewed:
    expires_at = datetime.datetime.now(datetime.UTC)
    return Renewed(expires_at, 60.0, **{"cancel_requested": False, **facts})


class Answers:
    """The queue of a keeper: notes what it is sent, and gives these answers to a renewal."""

    def __init__(self, lease_seconds: float = 30.0) -> None:
        self.lease_seconds = lease_seconds
        self.metrics = self
        self.sent: list[list[Renewal]] = []
        self.released: list[str] = []
        self.failures = 0
        self.answer: Callable[[Renewal], Answer] = lambda _renewal: in_force()
        self.go_on = threading.Event()
        self.go_on.set()
        self.opens_after = 0

    @asynccontextmanager
    async def in_another_loop(self, *, pool_size: int) -> AsyncIterator[Answers]:
        if self.opens_after:
            self.opens_after -= 1
            raise RuntimeError("a bug")
        yield self

    async def connect(self) -> None:
        pass

    async def renew(self, renewals: Sequence[Renewal]) -> list[Answer]:
        self.sent.append(list(renewals))
        while not self.go_on.is_set():
            await asyncio.sleep(0.002)
        return [self.answer(each) for each in renewals]

    async def release(self, token: str) -> None:
        self.released.append(token)
        if token == "locked":
            raise QueueUnavailable("locked")

    def lease_renewal_failed(self) -> None:
        self.failures += 1

    def has_sent(self, renewals: int) -> bool:
        return len(self.sent) >= renewals

    @property
    def tokens(self) -> list[list[str]]:
        return [[each.token for each in renewals] for renewals in self.sent]


class Held(Hold):
    """A lease that notes what happens to it, and in which thread."""

    def __init__(self, token: str, ago: float = 0.0, **options: Any) -> None:
        self.heard: list[str] = []

        def hear(what: str) -> Callable[[], None]:
            return lambda: self.heard.append(f"{what} in {threading.current_thread().name}")

        super().__init__(
            token,
            f"job {token}",
            on_cancel=hear("cancelled"),
            on_lost=hear("lost"),
            on_out_of_touch=hear("out of touch"),
            blocks_loop=options.pop("blocks_loop", False),
            renewed_at=time.monotonic() - ago,
        )
        for name, value in options.items():
            setattr(self, name, value)


def keeper_of(queue: Any) -> LeaseKeeper:
    return LeaseKeeper(queue)


@asynccontextmanager
async def keeping(queue: Answers, *holds: Hold) -> AsyncIterator[LeaseKeeper]:
    keeper = keeper_of(queue)
    for hold in holds:
        keeper.hold(hold)
    keeper.start()
    try:
        yield keeper
    finally:
        await keeper.end()
        assert not any(each.name == "lease-keeper" for each in threading.enumerate())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def a_moment() -> None:
    await asyncio.sleep(0.05)


async def test_a_lease_that_is_due_is_renewed_with_those_that_are_due_soon() -> None:
    queue = Answers()
    async with keeping(queue, Held("not", 4), Held("due", 11), Held("soon", 6)):
        await until(lambda: queue.sent)
        await a_moment()
    assert queue.tokens == [["due", "soon"]]


async def test_a_lease_that_is_due_soon_waits_until_one_is_due() -> None:
    queue = Answers()
    async with keeping(queue, Held("a", 6)) as keeper:
        await a_moment()
        assert queue.sent == []
        keeper.renew_at_once("another")
        keeper.renew_at_once("a")
        await until(lambda: queue.sent)
        keeper.drop("a")
        keeper.renew_at_once("a")
        await a_moment()
    assert queue.tokens == [["a"]]


async def test_a_lease_that_is_held_later_is_renewed_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease_keeper, "TICK_SECONDS", 0.02)
    queue = Answers()
    async with keeping(queue) as keeper:
        await a_moment()
        keeper.hold(Held("a", 9.9))
        await until(lambda: queue.sent)
        await a_moment()
    assert queue.tokens == [["a"]]


async def test_progress_is_sent_at_once_and_then_at_most_once_per_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease_keeper, "PROGRESS_SECONDS", 0.2)
    queue = Answers()
    async with keeping(queue, Held("a"), Held("b")) as keeper:
        await a_moment()
        began = time.monotonic()
        keeper.progress("unknown", b"0")
        keeper.progress("a", b"1")
        await until(lambda: queue.sent)
        # Not with the next look at the leases, which is a second after the last one
        assert time.monotonic() - began < 0.8
        for text in (b"2", b"3"):
            keeper.progress("a", text)
        await until(lambda: len(queue.sent) == 2)
        took = time.monotonic() - began
        await a_moment()
    assert queue.sent == [[Renewal("a", b"1")], [Renewal("a", b"3")]]
    assert took >= 0.2


async def test_progress_that_is_taken_is_not_sent_and_one_under_way_is_waited_for() -> None:
    queue = Answers()
    async with keeping(queue, Held("a")) as keeper:
        assert await keeper.take_progress("a") is None
        assert await keeper.take_progress("unknown") is None
        queue.go_on.clear()
        keeper.progress("a", b"1")
        await until(lambda: queue.sent)
        keeper.progress("a", b"2")
        taking = asyncio.create_task(keeper.take_progress("a"))
        await a_moment()
        assert not taking.done()
        queue.go_on.set()
        assert await taking == b"2"
        assert await keeper.take_progress("a") is None
    assert queue.sent == [[Renewal("a", b"1")]]


async def test_progress_of_a_failed_renewal_is_sent_again_unless_there_is_newer() -> None:
    queue = Answers()

    def away(_renewal: Renewal) -> Answer:
        raise QueueUnavailable("away")

    queue.answer = away
    queue.go_on.clear()
    async with keeping(queue, Held("a"), Held("b")) as keeper:
        keeper.progress("a", b"1")
        keeper.progress("b", b"1")
        await until(lambda: queue.sent)
        keeper.progress("b", b"2")
        taking = asyncio.create_task(keeper.take_progress("a"))
        await a_moment()
        queue.go_on.set()
        async with asyncio.timeout(lease_keeper.END_SECONDS / 2):
            assert await taking == b"1"
        assert await keeper.take_progress("b") == b"2"
    assert queue.failures >= 1


async def test_a_lease_whose_row_is_locked_is_due_again_after_a_quarter_of_the_time() -> None:
    queue = Answers(lease_seconds=3_000)
    queue.answer = lambda renewal: in_force(renewed=renewal.token == "free")
    began = time.monotonic()
    locked = Held("locked", 1_100, answered_at=began - 2_000, progress=b"1")
    free = Held("free", 1_100, answered_at=began - 2_000, progress=b"1")
    async with keeping(queue, locked, free) as keeper:
        await until(lambda: free.answered_at >= began)
        ended = time.monotonic()
        assert began - 750 <= locked.renewed_at <= ended - 750
        assert began <= free.renewed_at <= ended
        # The database has not confirmed it, nor stored its progress.
        assert locked.answered_at == began - 2_000
        assert await keeper.take_progress("locked") == b"1"
        assert await keeper.take_progress("free") is None
    assert queue.sent == [[Renewal("locked", b"1"), Renewal("free", b"1")]]


async def test_a_lost_lease_is_told_once_and_in_the_thread_of_the_worker() -> None:
    queue = Answers()
    queue.answer = lambda renewal: LeaseLost() if renewal.token != "kept" else in_force()
    lost, ended, kept = Held("lost", 6), Held("ended", 6), Held("kept", 6)
    async with keeping(queue, lost, ended, kept) as keeper:
        keeper.keep_place("ended")
        keeper.keep_place("unknown")
        for sent in (1, 2, 3):
            keeper.renew_at_once("lost")
            await until(functools.partial(queue.has_sent, sent))
        await a_moment()
    assert lost.heard == ["lost in MainThread"]
    assert (ended.heard, kept.heard, kept.ended) == ([], [], False)
    assert queue.tokens[0] == ["lost", "ended", "kept"]


async def test_a_cancellation_is_told_once() -> None:
    queue = Answers()
    queue.answer = lambda renewal: in_force(cancel_requested=renewal.token == "cancelled")
    cancelled, other = Held("cancelled", 11), Held("other", 11)
    async with keeping(queue, cancelled, other) as keeper:
        await until(lambda: cancelled.heard)
        keeper.renew_at_once("cancelled")
        await until(lambda: len(queue.sent) == 2)
        await a_moment()
    assert cancelled.heard == ["cancelled in MainThread"]
    assert other.heard == []


async def test_a_worker_that_is_out_of_touch_hears_it_once_per_outage() -> None:
    queue, away = Answers(), True

    def answer(_renewal: Renewal) -> Answer:
        if away:
            raise QueueUnavailable("away")
        return in_force()

    queue.answer = answer
    long_ago = time.monotonic() - 31
    out_of_touch = Held("a", 11, in_touch_at=long_ago)
    ended = Held("b", 11, in_touch_at=long_ago, ended=True)
    in_touch = Held("c", 11, in_touch_at=time.monotonic() - 20)
    async with keeping(queue, out_of_touch, ended, in_touch) as keeper:
        await until(lambda: queue.failures == 2)
        await a_moment()
        assert out_of_touch.heard == ["out of touch in MainThread"]
        away = False
        await until(lambda: out_of_touch.in_touch_at > long_ago)
        out_of_touch.in_touch_at, away = long_ago, True
        keeper.renew_at_once("a")
        await until(lambda: len(out_of_touch.heard) == 2)
    assert (ended.heard, in_touch.heard) == ([], [])


async def test_a_handler_whose_row_is_locked_is_stopped_before_its_lease_ends() -> None:
    queue = Answers(lease_seconds=1.0)
    queue.answer = lambda _renewal: in_force(renewed=False)
    locked = Held("locked")
    began = locked.in_touch_at
    async with keeping(queue, locked):
        await until(lambda: locked.heard)
        assert 0.85 < time.monotonic() - began < 1.0
        await asyncio.sleep(0.2)
    assert locked.heard == ["out of touch in MainThread"]


async def test_a_lease_that_is_old_when_it_is_held_is_renewed_and_watched_at_once() -> None:
    queue = Answers(lease_seconds=3.0)
    queue.go_on.clear()
    async with keeping(queue) as keeper:
        await asyncio.sleep(0.1)  # The thread waits for a second now.
        old = Held("old", 2.3, in_touch_at=time.monotonic() - 2.3)
        keeper.hold(old)
        await asyncio.sleep(0.1)
        assert queue.tokens == [["old"]]
        await until(lambda: old.heard)
        assert time.monotonic() - old.in_touch_at < 2.9
        queue.go_on.set()


@pytest.mark.parametrize(("lease_seconds", "last"), [(30, 29.0), (3, 2.7), (1, 0.9)])
async def test_a_lease_is_sure_until_shortly_before_it_may_be_over(
    lease_seconds: float, last: float
) -> None:
    queue = Answers()
    queue.lease_seconds = lease_seconds
    keeper = keeper_of(queue)
    assert keeper.is_in_touch(Held("a", in_touch_at=time.monotonic() - last + 0.05))
    assert not keeper.is_in_touch(Held("a", in_touch_at=time.monotonic() - last - 0.05))


class NotedTerm(Term):
    """A term that notes its ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def end_at(self, when: float) -> None:
        self.ends.append(when)


async def test_a_process_may_run_until_shortly_before_its_lease_may_be_over() -> None:
    queue = Answers(lease_seconds=30.0)
    answers: dict[str, Answer] = {
        "renewed": in_force(),
        "locked": in_force(renewed=False),
        "lost": LeaseLost(),
    }
    queue.answer = lambda renewal: answers[renewal.token]
    began = time.monotonic()
    holds = [Held(token, 11, in_touch_at=began - 11) for token in answers]
    terms = [NotedTerm() for _ in holds]
    async with keeping(queue) as keeper:
        for hold, term in zip(holds, terms, strict=True):
            keeper.limit(hold, term)
            keeper.hold(hold)
        await until(lambda: holds[2].heard)
        ended = time.monotonic()
    # The lease lasts 30 s from the request that renewed it. Its handler is stopped a second before.
    assert [term.ends[0] for term in terms] == [began - 11 + 29.5] * 3
    assert began + 29.5 <= terms[0].ends[-1] <= ended + 29.5
    assert {terms[1].ends[-1], terms[2].ends[-1]} == {began - 11 + 29.5}


async def test_failed_renewals_are_repeated_after_ever_longer_pauses() -> None:
    queue = Answers()

    def away(_renewal: Renewal) -> Answer:
        raise QueueUnavailable("away")

    queue.answer = away
    async with keeping(queue, Held("a", 11)):
        await asyncio.sleep(0.65)
    # At once, and 0.1 and 0.3 seconds later
    assert 2 <= queue.failures <= 3


async def test_renewals_behind_are_measured_from_the_last_answer() -> None:
    keeper = keeper_of(Answers())
    assert keeper.seconds_behind == 0.0
    keeper.hold(Held("a", answered_at=time.monotonic() - 9))
    assert keeper.seconds_behind == 0.0
    keeper.hold(Held("b", answered_at=time.monotonic() - 15))
    assert 5 <= keeper.seconds_behind < 6


async def test_renewals_that_the_database_does_not_answer_are_not_behind() -> None:
    queue = Answers()

    def away(_renewal: Renewal) -> Answer:
        raise QueueUnavailable("away")

    queue.answer = away
    async with keeping(queue, Held("a", 60, answered_at=time.monotonic() - 60)) as keeper:
        # A restart of the worker, which a health check causes, does not bring a database back.
        await until(lambda: queue.failures)
        assert keeper.seconds_behind == 0.0
        await until(lambda: queue.failures > 1)
        assert keeper.seconds_behind == 0.0


@pytest.mark.parametrize("blocks_loop", [True, False])
async def test_a_blocked_event_loop_is_measured_and_named(
    monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]], blocks_loop: bool
) -> None:
    monkeypatch.setattr(lease_keeper, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(lease_keeper, "BLOCKED_SECONDS", 0.05)
    measured: list[float] = []
    async with keeping(Answers(), Held("a", blocks_loop=blocks_loop)) as keeper:
        await a_moment()
        timer = threading.Timer(0.2, lambda: measured.append(keeper.loop_blocked_seconds))
        timer.start()
        time.sleep(0.35)  # noqa: ASYNC251
        await until(lambda: any(line["event"] == "worker.loop_turns_again" for line in lines))
        assert keeper.loop_blocked_seconds < 0.05
        # Later it is logged once more only if the loop was blocked once more.
        await asyncio.sleep(0.1)
        # Without a lease, the loop is not watched.
        keeper.drop("a")
        time.sleep(0.1)  # noqa: ASYNC251
        await a_moment()
    assert 0.1 < measured[0] < 0.35
    blocked = [line for line in lines if line["event"].startswith("event loop blocked for 0 s")]
    named = "job a" if blocks_loop else "none of the async handlers"
    assert {line["event"].partition("while running ")[2] for line in blocked} == {named}
    # After 0.05, 0.1 and 0.2 seconds, or a moment later
    assert 2 <= len(blocked) <= 4
    assert all(0.05 <= line["seconds"] <= 0.4 for line in blocked)
    (again,) = [line for line in lines if line["event"] == "worker.loop_turns_again"]
    assert 0.1 < again["seconds"] < 0.6


async def test_a_keeper_that_was_woken_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = 0
    wait = lease_keeper.wait_at_most

    async def counted(event: asyncio.Event, seconds: float) -> None:
        nonlocal waits
        waits += 1
        await wait(event, seconds)

    monkeypatch.setattr(lease_keeper, "wait_at_most", counted)
    queue = Answers()
    async with keeping(queue, Held("a")) as keeper:
        keeper.progress("a", b"1")
        await until(lambda: queue.sent)
        await a_moment()
    assert waits < 20


async def test_all_leases_are_released_from_another_thread() -> None:
    queue = Answers()
    keeper = keeper_of(queue)
    keeper.release_all()  # It has not started.
    async with keeping(queue, Held("locked"), Held("a"), Held("ended"), Held("b")) as keeper:
        keeper.keep_place("ended")
        await a_moment()
        await asyncio.to_thread(keeper.release_all)
        assert queue.released == ["locked", "a", "b"]
    keeper.release_all()  # It has ended.
    assert queue.released == ["locked", "a", "b"]


async def test_a_keeper_that_has_not_started_ends_at_once() -> None:
    await asyncio.wait_for(keeper_of(Answers()).end(), 0.5)


async def test_an_unexpected_error_does_not_end_the_keeper() -> None:
    queue = Answers()
    queue.opens_after = 1
    async with keeping(queue, Held("a", 11)):
        await until(lambda: queue.sent)
    assert queue.tokens == [["a"]]
