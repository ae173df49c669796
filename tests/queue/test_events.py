"""Events: one order for every subscriber, no error after a commit, and no silent loss."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import textwrap
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy import text

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import event_stream, events
from job_registry_api.queue.claiming import BusyWorker
from job_registry_api.queue.database import Database
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.errors import EventsMissed, LeaseLost
from job_registry_api.queue.event_stream import Gap, KeptBatches
from job_registry_api.queue.events import (
    STATUS_AFTER,
    JobEvent,
    Subscription,
    decode,
)
from job_registry_api.queue.leasing import Renewal
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.postgresql_database import PostgreSQLDatabase
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.recent_events import KEPT_SECONDS, RecentEvents
from job_registry_api.queue.store import EVENTS_KEPT_SECONDS, Store, message_of
from tests import CODE

PING = EnqueueRequest("test.ping", {})
LIMITED = EnqueueRequest("test.limited", {})

BROKEN = JobError("broken", "It broke.")
JOB = uuid.UUID("01a20b59-007a-7389-bb53-785ecafc486c")


@pytest.fixture
async def other(
    queue: JobQueue, database_url: str, registry: JobRegistry
) -> AsyncIterator[JobQueue]:
    """What another process has: a queue of its own on the same database."""
    async with JobQueue.from_url(database_url, registry, lease_seconds=30) as other:
        yield other


async def take(subscription: Subscription, count: int) -> list[JobEvent]:
    """The next events, or an error after ten seconds."""
    async with asyncio.timeout(10):
        return [await anext(subscription) for _ in range(count)]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def work(queue: JobQueue, jobs: int, job_type: str = "test.ping") -> None:
    """Leases and completes this many jobs."""
    async with asyncio.timeout(30):
        done = 0
        while done < jobs:
            for lease in await queue.lease([job_type], "w", limit=5, wait_seconds=5):
                await queue.complete(lease.token)
                done += 1


# One order


async def test_every_process_gets_the_same_events_in_the_same_order(
    queue: JobQueue, other: JobQueue
) -> None:
    with queue.events.subscribe() as here, other.events.subscribe() as there:
        await asyncio.gather(
            *(each.enqueue(PING) for each in (queue, other) for _ in range(30)),
            work(queue, 30),
            work(other, 30),
        )
        heard_here, heard_there = await take(here, 180), await take(there, 180)
    assert heard_here == heard_there
    names: dict[uuid.UUID, list[str]] = {}
    for event in heard_here:
        names.setdefault(event.job_id, []).append(event.name)
    assert len(names) == 60
    assert set(map(tuple, names.values())) == {("job.created", "job.started", "job.succeeded")}


async def test_a_process_does_not_parse_all_of_its_own_messages(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str | bytes] = []

    def spy(text: str | bytes) -> events.Message:
        parsed.append(text)
        return decode(text)

    monkeypatch.setattr(events, "decode", spy)
    with queue.events.subscribe() as heard:
        for _ in range(100):
            await queue.enqueue(PING)
        assert len(await take(heard, 100)) == 100
    # A message comes before the answer to its statement: on a busy machine often long before it.
    assert len(parsed) < 95


ENQUEUER = """
    import asyncio, os
    from job_registry import EnqueueRequest
    from job_registry_api.queue.queue import JobQueue
    from job_registry import JobRegistry
    from job_registry.catalog.thumbnail import thumbnail_create

    async def main():
        request = EnqueueRequest(thumbnail_create.name, {"assetId": "a", "versionNumber": 1})
        registry = JobRegistry([thumbnail_create])
        async with JobQueue.from_url(os.environ["URL"], registry, lease_seconds=30) as queue:
            print("ready", flush=True)
            for _ in range(100):
                await queue.enqueue(request)
                await asyncio.sleep(0.01)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


@pytest.mark.slow
async def test_the_last_event_of_a_job_from_another_process_is_its_last(
    queue: JobQueue, database_url: str
) -> None:
    last: dict[uuid.UUID, str] = {}
    with queue.events.subscribe() as received:
        async with _process(ENQUEUER, database_url), asyncio.timeout(60):
            working = asyncio.create_task(work(queue, 100, "thumbnail.create"))
            for _ in range(300):
                event = await anext(received)
                last[event.job_id] = event.name
            await working
    assert list(last.values()) == ["job.succeeded"] * 100


async def test_a_bulk_that_no_notification_holds_keeps_its_place(
    queue: JobQueue, other: JobQueue
) -> None:
    with queue.events.subscribe() as here, other.events.subscribe() as there:
        before = (await other.enqueue(PING)).job
        # Jobs with and without keys are stored by different statements.
        keyed = [PING._replace(idempotency_key=str(number)) for number in range(150)]
        bulk = await queue.enqueue_many([*keyed, *[PING] * 150])
        after = (await other.enqueue(PING)).job
        received = [event.job_id for event in await take(here, 302)]
        assert received[0] == before.id
        assert received[-1] == after.id
        assert set(received[1:-1]) == {each.job.id for each in bulk if isinstance(each, Enqueued)}
        assert [event.job_id for event in await take(there, 302)] == received


async def test_own_subscribers_get_own_events_where_nobody_listens(
    database_url: str, registry: JobRegistry
) -> None:
    database = open_database(database_url)
    queue = JobQueue(registry, database)
    with queue.events.subscribe() as received:
        job = (await queue.enqueue(PING)).job
        (lease,) = await queue.lease(["test.ping"], "w")
        await queue.heartbeat(lease.token, {"done": 1})
        await queue.renew([Renewal(lease.token, b'{"done": 2}')])
        await queue.park(lease.token, registry["test.ping"].fingerprint, BROKEN)
        await queue.unpark()
        await queue.cancel(job.id)
        await queue.retry(job.id)
        happened = await take(received, 8)
    assert [event.name for event in happened] == [
        "job.created",
        "job.started",
        "job.progressed",
        "job.progressed",
        "job.parked",
        "job.unparked",
        "job.cancelled",
        "job.retrying",
    ]
    assert {event.job_id for event in happened} == {job.id}
    await database.close()


async def test_a_subscriber_that_leaves_takes_the_events_of_no_other_of_the_same_job(
    queue: JobQueue,
) -> None:
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
    with queue.events.subscribe(job_id=job.id) as one, queue.events.subscribe(job_id=job.id) as two:
        waiting, leaving = asyncio.create_task(anext(one)), asyncio.create_task(anext(two))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        await queue.cancel(job.id)
        async with asyncio.timeout(5):
            assert (await waiting).name == "job.cancelled"


async def test_a_subscriber_gets_nothing_that_its_process_did_before(queue: JobQueue) -> None:
    first = (await queue.enqueue(PING)).job
    with queue.events.subscribe(job_id=first.id) as received:
        await queue.enqueue(PING)
        await queue.cancel(first.id)
        (event,) = await take(received, 1)
        assert (event.name, event.job_id) == ("job.cancelled", first.id)


async def test_leases_and_successes_of_its_process_reach_a_subscriber_once_and_in_order(
    queue: JobQueue, other: JobQueue
) -> None:
    # Given jobs that are leased and completed one after another, by a worker that is busy
    await queue.enqueue_many([PING] * 20)
    leases = deque(await queue.lease(["test.ping"], "w", limit=4))
    worker = BusyWorker(("test.ping",), "w", len, leases.extend)
    names: dict[uuid.UUID, list[str]] = {}

    # When one subscribes here and one in another process, after the first jobs have started
    with (
        queue.events.subscribe() as here,
        other.events.subscribe() as there,
        queue.leasing_with_reports(worker),
    ):
        while leases:
            await queue.succeed(leases.popleft().token)
        heard_here = await take(here, 36)
        await queue.enqueue(LIMITED)
        (after,) = await take(here, 1)
        heard_there = [event async for event in _until(there, after)]

    # I expect both to get the same, and the one here nothing that had happened before
    for event in heard_here:
        names.setdefault(event.job_id, []).append(event.name)
    assert sorted(map(tuple, names.values())) == (
        [("job.started", "job.succeeded")] * 16 + [("job.succeeded",)] * 4
    )
    assert heard_there[-36:] == heard_here
    assert after.name == "job.created"


async def _until(subscription: Subscription, last: JobEvent) -> AsyncIterator[JobEvent]:
    async with asyncio.timeout(10):
        async for event in subscription:
            if event == last:
                return
            yield event


async def test_what_a_lost_lease_announces_is_not_taken_for_what_the_claim_leases(
    database_url: str, registry: JobRegistry
) -> None:
    # Given a lease that expires, and a job that is due
    async with (
        JobQueue.from_url(database_url, registry, lease_seconds=1) as queue,
        JobQueue.from_url(database_url, registry, lease_seconds=1) as other,
    ):
        lost = (await queue.enqueue(PING)).job
        assert await queue.lease(["test.ping"], "dies")
        await asyncio.sleep(1.2)
        due = (await queue.enqueue(LIMITED)).job

        # When one claim ends the lost attempt and leases the other job
        with queue.events.subscribe() as here, other.events.subscribe(job_id=due.id) as there:
            assert [each.job for each in await queue.lease(["test.limited"], "w")] != []
            heard = {(event.name, event.job_id) for event in await take(here, 2)}
            # Another process may also hear of the job's creation.
            while (await take(there, 1))[0].name != "job.started":
                pass

    # I expect both events, here and in other processes
    assert heard == {("job.retrying", lost.id), ("job.started", due.id)}


async def test_no_burst_drops_a_subscriber(queue: JobQueue) -> None:
    with queue.events.subscribe() as slow:
        for _ in range(3):
            await queue.enqueue_many([PING] * 900)
        await take(slow, 2_700)


async def test_a_subscriber_that_is_too_far_behind_is_dropped_and_holds_nobody_up(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job_registry_api.queue.recent_events.MAX_KEPT_EVENTS", 1_000)
    with queue.events.subscribe() as slow, queue.events.subscribe() as other:
        for _ in range(3):
            await queue.enqueue_many([PING] * 900)
            # The other one reads in time, and misses nothing.
            await take(other, 900)
        with pytest.raises(EventsMissed, match="behind"):
            await anext(slow)
    assert len(queue.events._recent._entries) < 1_300


async def test_events_are_kept_for_a_minute() -> None:
    now = 1_000_000.0
    recent: RecentEvents[str] = RecentEvents(clock=lambda: now)
    for number in range(300):
        recent.extend([f"event {number}"])
    now += KEPT_SECONDS - 1
    for number in range(300):
        recent.extend([f"later event {number}"])
    assert recent.read(0, 1) == ([(1, 1_000_000, "event 0")], 1)
    now += 2
    for number in range(300):
        recent.extend([f"last event {number}"])
    with pytest.raises(EventsMissed, match="60 seconds"):
        recent.read(0, 1)
    assert recent.read(300, 1) == ([(301, 1_000_059, "later event 0")], 301)


@pytest.mark.any_database
async def test_a_subscriber_whom_nothing_concerned_is_not_behind(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job_registry_api.queue.recent_events.MAX_KEPT_EVENTS", 300)
    with queue.events.subscribe(types=["test.pong"]) as waiting:
        # The wait is interrupted now and then, as a subscription over HTTP does.
        for _ in range(3):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await asyncio.gather(anext(waiting), queue.enqueue_many([PING] * 900))
        following = asyncio.create_task(anext(waiting))
        await asyncio.sleep(0)
        await queue.enqueue_many([PING] * 900)
        job = (await queue.enqueue(EnqueueRequest("test.pong", {}))).job
        assert (await asyncio.wait_for(following, 10)).job_id == job.id


async def test_nothing_is_delivered_of_what_was_not_committed(
    queue: JobQueue, other: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with queue.events.subscribe() as here, other.events.subscribe() as there:
        good = EnqueueRequest("test.ping", {}, idempotency_key="taken")
        conflicting = EnqueueRequest("test.ping", {"text": "other"}, idempotency_key="taken")
        first = (await queue.enqueue(good)).job
        # The first job is stored and taken back, because the second is refused.
        refused = await queue.enqueue_many([PING, conflicting], atomic=True)
        assert all(isinstance(each, Exception) for each in refused)
        kept = (await queue.enqueue(PING)).job
        for received in (here, there):
            assert [event.job_id for event in await take(received, 2)] == [first.id, kept.id]


# Nothing after a commit raises


def _unwritable(*_arguments: object) -> Any:
    raise BrokenPipeError(32, "Broken pipe")


def _logger(processor: Any) -> Any:
    return structlog.wrap_logger(
        structlog.PrintLogger(), processors=[processor], wrapper_class=structlog.BoundLogger
    )


@pytest.mark.parametrize("received", [True, False])
async def test_a_log_that_cannot_be_written_fails_no_operation(
    database_url: str, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch, received: bool
) -> None:
    broken = _logger(_unwritable)
    monkeypatch.setattr("job_registry_api.queue.events.log", broken)
    database = open_database(database_url)
    queue = JobQueue(registry, database)
    async with AsyncExitStack() as stack:
        if received:
            await stack.enter_async_context(queue.events.listening())
        with queue.events.subscribe() as subscription:
            job = (await queue.enqueue(PING)).job
            keyed = EnqueueRequest("test.ping", {}, idempotency_key="once")
            assert not (await queue.enqueue(keyed)).deduplicated
            (lease, _) = await queue.lease(["test.ping"], "w", limit=2)
            await queue.heartbeat(lease.token, {"half": True})
            await queue.complete(lease.token)
            (enqueued,) = await queue.enqueue_many([PING])
            assert isinstance(enqueued, Enqueued)
            await queue.cancel(enqueued.job.id)
            # Everyone hears of it all the same.
            names = [event.name for event in await take(subscription, 8)]
            assert names.count("job.created") == 3
            assert names[-1] == "job.cancelled"
    assert job.status is JobStatus.QUEUED
    assert (await queue.counts())["test.ping"].queued == 0
    assert queue.events.failures == 7
    await database.close()


@pytest.mark.slow
@pytest.mark.any_database
async def test_a_reader_of_standard_error_that_has_gone_fails_no_call(database_url: str) -> None:
    # What `job-registry serve 2>&1 | head -1` does.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "job_registry_api.cli", "serve", "--port", "0",
        env={**os.environ, "JOBS_DATABASE_URL": database_url, "JOBS_LOG_FORMAT": "json"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=(pipe := os.pipe())[1],
    )  # fmt: skip
    os.close(pipe[1])
    with open(pipe[0], "rb", buffering=0) as reading:  # noqa: ASYNC230, PTH123
        banner = b""
        while b"http://" not in banner or not banner.endswith(b"\n"):
            banner += await asyncio.to_thread(reading.read, 1)
    address = banner.decode().split("http://")[1].split("/graphql")[0].strip()
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=20) as client:
            payload = {"assetId": "a", "versionNumber": 1}
            created = [
                await client.post("/jobs", json={"type": "thumbnail.create", "payload": payload})
                for _ in range(5)
            ]
            assert [response.status_code for response in created] == [201] * 5
            query = "{ jobs { nodes { status } } }"
            async with asyncio.timeout(20):
                while True:
                    answer = await client.post("/graphql", json={"query": query})
                    assert answer.status_code == 200
                    statuses = {job["status"] for job in answer.json()["data"]["jobs"]["nodes"]}
                    # Its worker goes on as well: the asset does not exist, so the jobs fail.
                    if "RUNNING" not in statuses and len(statuses) == 1:
                        break
                    await asyncio.sleep(0.1)
            assert len(answer.json()["data"]["jobs"]["nodes"]) == 5
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 15)


async def test_a_broken_subscriber_harms_neither_the_caller_nor_the_others(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with queue.events.subscribe() as broken, queue.events.subscribe() as sound:
        monkeypatch.setattr(broken, "wake", _unwritable)
        waiting = asyncio.create_task(broken.wait())
        await asyncio.sleep(0)
        job = (await queue.enqueue(PING)).job
        assert [event.job_id for event in await take(sound, 1)] == [job.id]
        waiting.cancel()
    assert queue.events.failures == 1


async def test_broken_callbacks_harm_neither_the_caller_nor_the_others(
    queue: JobQueue,
) -> None:
    received: list[object] = []
    events = queue.events
    with (
        events.on_waits_ended(_unwritable),
        events.on_cancel_requested(_unwritable),
        events.on_waits_ended(received.append),
        events.on_cancel_requested(received.append),
    ):
        job = (await queue.enqueue(PING)).job
        assert await queue.lease(["test.ping"], "w")
        await queue.cancel(job.id)
        events.end_waits("w")
        assert received == [job.id, "w"]
    assert events.failures == 2


async def test_publishing_from_another_thread_reaches_this_loop(queue: JobQueue) -> None:
    threads: list[int] = []
    event = JobEvent("job.cancel_requested", JOB, "test.ping", 1)
    with queue.events.on_cancel_requested(lambda _: threads.append(threading.get_ident())):
        await asyncio.to_thread(queue.events.publish, [event])
        await until(lambda: threads)
    assert threads == [threading.get_ident()]


# What is missed is told


SUBSCRIBER = """
    import asyncio, os
    from job_registry_api.queue.errors import EventsMissed
    from job_registry_api.queue.queue import JobQueue
    from job_registry import JobRegistry
    from job_registry.catalog.thumbnail import thumbnail_create

    async def main():
        registry = JobRegistry([thumbnail_create])
        async with JobQueue.from_url(os.environ["URL"], registry, lease_seconds=30) as queue:
            with queue.events.subscribe() as received:
                print("ready", flush=True)
                try:
                    async for event in received:
                        print(event.job_id, flush=True)
                except EventsMissed:
                    print("missed", flush=True)

    asyncio.run(main())
"""


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_process_that_stalls_while_events_are_deleted_is_reported(
    queue: JobQueue, database_url: str, more: bool
) -> None:
    async with _process(SUBSCRIBER, database_url) as process, asyncio.timeout(20):
        assert process.stdout is not None
        job = (await queue.enqueue(PING)).job
        assert (await process.stdout.readline()).decode().strip() == str(job.id)
        os.kill(process.pid, signal.SIGSTOP)
        # More than a notification holds, so that it is kept on PostgreSQL too.
        await queue.enqueue_many([PING] * 300)
        await _let_kept_events_grow_old(queue, database_url)
        if more:
            await queue.enqueue(PING)
        os.kill(process.pid, signal.SIGCONT)
        assert (await process.stdout.readline()).decode().strip() == "missed"


async def test_a_reader_that_starts_where_all_was_deleted_misses_nothing(
    queue: JobQueue, database_url: str, registry: JobRegistry
) -> None:
    await queue.enqueue_many([PING] * 300)
    await _let_kept_events_grow_old(queue, database_url)
    async with JobQueue.from_url(database_url, registry, lease_seconds=30) as late:
        with late.events.subscribe() as received:
            job = (await queue.enqueue(PING)).job
            assert [event.job_id for event in await take(received, 1)] == [job.id]


async def test_subscriptions_survive_the_deletion_of_events_they_have_read(
    queue: JobQueue, other: JobQueue, database_url: str
) -> None:
    with other.events.subscribe() as received:
        for _ in range(3):
            bulk = await queue.enqueue_many([PING] * 300)
            events = await take(received, 300)
            assert {event.job_id for event in events} == {
                each.job.id for each in bulk if isinstance(each, Enqueued)
            }
            await _let_kept_events_grow_old(queue, database_url)
        job = (await queue.enqueue(PING)).job
        assert [event.job_id for event in await take(received, 1)] == [job.id]


async def test_a_database_that_cannot_be_read_for_a_while_loses_no_events(
    queue: JobQueue, other: JobQueue, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    if not database_url.startswith("sqlite"):
        pytest.skip("on PostgreSQL the connection that listens is lost with the database")
    failed = asyncio.Event()

    @asynccontextmanager
    async def away(_database: Database, **_options: Any) -> AsyncIterator[None]:
        failed.set()
        raise OSError("disk I/O error")
        yield

    with other.events.subscribe() as received, monkeypatch.context() as patched:
        patched.setattr(Database, "reading", away)
        job = (await queue.enqueue(PING)).job
        async with asyncio.timeout(5):
            await failed.wait()
        patched.undo()
        # Nothing is committed meanwhile that would make it look again.
        assert [event.job_id for event in await take(received, 1)] == [job.id]


async def test_a_lost_connection_is_reported_to_subscribers_and_to_those_that_wait(
    queue: JobQueue, database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite has no connection to lose")
    with (
        queue.events.subscribe() as received,
        queue.events.waiting_for(["test.pong"], []) as woken,
    ):
        database = open_database(database_url)
        async with database.reading() as connection:
            await connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            )
        await database.close()
        with pytest.raises(EventsMissed, match="connection"):
            await take(received, 1)
        assert woken.is_set()
    with queue.events.subscribe() as received:
        job = (await queue.enqueue(PING)).job
        assert [event.job_id for event in await take(received, 1)] == [job.id]


async def test_more_notifications_than_can_wait_are_reported_as_missed(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("events that are kept in a table wait there")
    monkeypatch.setattr("job_registry_api.queue.event_stream.MAX_UNREAD_MESSAGES", 10)
    with queue.events.subscribe() as received:
        each = (_message("job.created", uuid.UUID(int=number)) for number in range(50))
        await _tell(database_url, *each)
        with pytest.raises(EventsMissed, match="slowly"):
            await take(received, 50)


# Messages


EVENTS = [JobEvent(name, JOB, f"type.{name}", number) for number, name in enumerate(STATUS_AFTER)]


def test_every_event_survives_its_message() -> None:
    message = decode(
        message_of("here", [(e.name, e.job_id.hex, e.type, e.attempt) for e in EVENTS])
    )
    assert message.process == "here"
    assert list(message.events) == EVENTS
    assert message.batch is None


def test_names_travel_as_names() -> None:
    # So a process whose list of names is another one reads the same events.
    sent = message_of("here", [(e.name, e.job_id.hex, e.type, e.attempt) for e in EVENTS]).replace(
        "job.created", "job.succeeded"
    )
    assert [event.name for event in decode(sent).events[:2]] == ["job.succeeded", EVENTS[1].name]


def test_the_plain_form_is_read_too() -> None:
    rows = [["job.succeeded", str(JOB), "test.ping", 1], ["job.started", JOB.hex, "test.pong", 2]]
    assert decode(json.dumps({"process": "there", "events": rows})).events == (
        JobEvent("job.succeeded", JOB, "test.ping", 1),
        JobEvent("job.started", JOB, "test.pong", 2),
    )


def test_what_a_newer_process_adds_is_skipped() -> None:
    rows = [
        ["job.paused", JOB.hex, "test.ping", 1],
        ["job.started", JOB.hex, "test.ping", 1, {"added": "column"}],
    ]
    message = {"process": "there", "added": ["key"], "events": rows}
    started = JobEvent("job.started", JOB, "test.ping", 1)
    assert decode(json.dumps(message)).events == (started,)
    message = {"process": "there", "names": ["job.paused", "job.started"], "types": ["test.ping"]}
    message["events"] = [[0, JOB.hex, 0, 1], [1, JOB.hex, 0, 1]]
    assert decode(json.dumps(message)).events == (started,)
    assert decode('{"process": "there", "queue.paused": true}').events == ()


GARBLED = [
    "nope",
    "",
    "[]",
    "7",
    '{"events": []}',
    '{"process": 7, "events": []}',
    '{"process": "x", "batch": "y"}',
    '{"process": "x", "events": 7}',
    '{"process": "x", "events": [["job.created"]]}',
    '{"process": "x", "events": [["job.created", "no id", "t", 1]]}',
    f'{{"process": "x", "events": [["job.created", "{JOB.hex}", "t", "no"]]}}',
    f'{{"process": "x", "events": [["job.created", "{JOB.hex}", 0, 1]]}}',
    f'{{"process": "x", "names": ["job.created"], "events": [[-1, "{JOB.hex}", "t", 1]]}}',
    f'{{"process": "x", "names": [7], "events": [[0, "{JOB.hex}", "t", 1]]}}',
    '{"process": "x", "events": [[{}, [], {}, {}]]}',
]


@pytest.mark.parametrize("message", GARBLED)
def test_a_garbled_message_is_refused_whole(message: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decode(message)


async def test_a_garbled_message_is_one_log_line_and_events_missed(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def keep(_logger: object, _method: str, line: Any) -> Any:
        lines.append(line["event"])
        raise structlog.DropEvent

    monkeypatch.setattr("job_registry_api.queue.events.log", _logger(keep))
    with queue.events.subscribe() as received, queue.events.waiting_for([], []) as woken:
        await _tell(database_url, '{"process": "x", "events": [["job.created"]]}')
        with pytest.raises(EventsMissed):
            await take(received, 1)
        assert woken.is_set()
    assert lines == ["events.unreadable"]
    with queue.events.subscribe() as received:
        job = (await queue.enqueue(PING)).job
        assert [event.job_id for event in await take(received, 1)] == [job.id]


# Who waits for work, and for cancellations


async def test_each_job_wakes_those_that_wait_once_by_this_process_and_others(
    queue: JobQueue, other: JobQueue
) -> None:
    with (
        queue.events.waiting_for(["test.ping"], []) as for_ping,
        queue.events.waiting_for(["test.limited"], ["test.limited"]) as for_limited,
        queue.events.subscribe() as received,
    ):

        def woken() -> list[bool]:
            were = [for_ping.is_set(), for_limited.is_set()]
            for_ping.clear()
            for_limited.clear()
            return were

        await queue.enqueue(PING)
        # An own job wakes them at once, and not again when it is received.
        assert woken() == [True, False]
        await take(received, 1)
        assert woken() == [False, False]
        await other.enqueue_many([PING] * 3)
        await take(received, 3)
        assert woken() == [True, False]
        await other.enqueue(LIMITED)
        await queue.enqueue(LIMITED)
        await take(received, 2)
        assert woken() == [False, True]

        for each in (queue, other):
            (ping,) = await each.lease(["test.ping"], "w")
            (limited,) = await each.lease(["test.limited"], "w")
            # That a ping ends makes room for nobody.
            await each.complete(ping.token)
            await take(received, 3)
            assert woken() == [False, False]
            await each.complete(limited.token)
            await take(received, 1)
            assert woken() == [False, True]


@pytest.mark.parametrize("where", ["this process", "another"])
async def test_a_requested_cancellation_is_reported_at_once(
    queue: JobQueue, other: JobQueue, where: str
) -> None:
    announced: list[uuid.UUID] = []
    canceller = queue if where == "this process" else other
    job = (await queue.enqueue(PING)).job
    (lease,) = await queue.lease(["test.ping"], "w")
    with (
        queue.events.on_cancel_requested(announced.append),
        queue.events.subscribe(job_id=job.id) as received,
    ):
        started = asyncio.get_running_loop().time()
        await canceller.cancel(job.id)
        await until(lambda: announced)
        assert asyncio.get_running_loop().time() - started < 2
        (event,) = await take(received, 1)
        assert (event.name, event.status) == ("job.cancel_requested", JobStatus.RUNNING)
        assert announced == [job.id]
        # One that is queued needs no worker to stop.
        await canceller.cancel((await canceller.enqueue(PING)).job.id)
        await queue.complete(lease.token)
        await take(received, 1)
    assert announced == [job.id]
    with pytest.raises(LeaseLost):
        await queue.fail(lease.token, error=BROKEN)


async def test_a_callback_is_called_on_the_loop_where_it_was_registered(
    queue: JobQueue, other: JobQueue
) -> None:
    job = (await queue.enqueue(PING)).job
    assert await queue.lease(["test.ping"], "w")
    announced: list[tuple[uuid.UUID, int]] = []
    registered, done = threading.Event(), threading.Event()

    async def keep() -> None:
        received = asyncio.Event()

        def tell(job_id: uuid.UUID) -> None:
            announced.append((job_id, threading.get_ident()))
            received.set()

        with queue.events.on_cancel_requested(tell):
            registered.set()
            async with asyncio.timeout(10):
                await received.wait()
        done.set()

    keeper = threading.Thread(target=lambda: asyncio.run(keep()))
    keeper.start()
    await asyncio.to_thread(registered.wait, 5)
    await other.cancel(job.id)
    await asyncio.to_thread(keeper.join, 15)
    assert announced == [(job.id, keeper.ident)]


async def test_a_job_whose_caller_was_cancelled_during_the_commit_is_worked_at_once(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.create_task(queue.lease(["test.ping"], "w", wait_seconds=20))
    await asyncio.sleep(0.2)
    # Such a caller stores its job, and comes to nothing after that.
    monkeypatch.setattr(queue.events, "publish", lambda *_: None)
    job = (await queue.enqueue(PING)).job
    async with asyncio.timeout(2):
        (lease,) = await waiting
    assert lease.job.id == job.id


# Ends


async def test_the_end_of_the_server_ends_subscriptions_and_waits(queue: JobQueue) -> None:
    with queue.events.subscribe() as received:
        waiting = asyncio.create_task(queue.lease(["test.ping"], "w", wait_seconds=20))
        await asyncio.sleep(0.1)
        queue.end_waits()
        async with asyncio.timeout(2):
            assert await waiting == []
            with pytest.raises(EventsMissed, match="shuts down"):
                await anext(received)
    # One that comes later does not hold the end up either.
    with queue.events.subscribe() as received:
        async with asyncio.timeout(2):
            with pytest.raises(EventsMissed, match="shuts down"):
                await anext(received)


@pytest.mark.slow
async def test_abandoned_subscriptions_leave_nothing_behind(queue: JobQueue) -> None:
    async def following() -> AsyncGenerator[JobEvent, None]:
        with queue.events.subscribe() as received:
            async for event in received:
                yield event

    tasks = len(asyncio.all_tasks())
    for number in range(1_000):
        generator = following()
        waiting = asyncio.create_task(anext(generator))
        await asyncio.sleep(0)
        assert queue.events.subscribers >= 1
        if number % 2:
            # It waits for an event when its client goes.
            waiting.cancel()
            await asyncio.wait({waiting})
        else:
            # It has given one, and is never asked for another.
            await queue.enqueue(PING)
            await asyncio.wait_for(waiting, 5)
        del generator, waiting
    gc.collect()
    await until(lambda: queue.events.subscribers == 0)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)


async def test_listening_leaves_no_task_behind(database_url: str, registry: JobRegistry) -> None:
    tasks = asyncio.all_tasks()
    async with JobQueue.from_url(database_url, registry, lease_seconds=30) as queue:
        assert asyncio.all_tasks() > tasks
        await queue.enqueue(PING)
    assert asyncio.all_tasks() == tasks


# Kept events on PostgreSQL, behind a pooler that has no LISTEN


@pytest.fixture
def polled(monkeypatch: pytest.MonkeyPatch, fresh_postgresql_url: str) -> str:
    monkeypatch.setattr(PostgreSQLDatabase, "keeps_events", True)
    return fresh_postgresql_url


async def test_events_are_polled_where_there_are_no_notifications(
    polled: str, registry: JobRegistry
) -> None:
    async with (
        JobQueue.from_url(polled, registry, lease_seconds=30) as one,
        JobQueue.from_url(polled, registry, lease_seconds=30) as other,
    ):
        with one.events.subscribe() as here, other.events.subscribe() as there:
            await asyncio.gather(*(each.enqueue(PING) for each in (one, other) for _ in range(20)))
            await work(one, 40)
            heard_here, heard_there = await take(here, 120), await take(there, 120)
    for received in (heard_here, heard_there):
        names: dict[uuid.UUID, list[str]] = {}
        for event in received:
            names.setdefault(event.job_id, []).append(event.name)
        assert set(map(tuple, names.values())) == {("job.created", "job.started", "job.succeeded")}
        assert len(names) == 40


async def test_a_batch_that_commits_late_is_delivered_late(
    polled: str, registry: JobRegistry
) -> None:
    late, rolled_back, in_time, last = (uuid.UUID(int=number) for number in range(4))
    database = open_database(polled)

    async def keep(connection: Any, job_id: uuid.UUID) -> None:
        await connection.execute(_KEEP, {"message": _message("job.created", job_id)})

    async with database.engine.connect() as before:
        await keep(before, late)
        async with JobQueue.from_url(polled, registry, lease_seconds=30) as queue:
            with queue.events.subscribe() as received:
                async with database.engine.connect() as slow, database.engine.connect() as failing:
                    await keep(slow, late)
                    await keep(failing, rolled_back)
                    async with database.transaction() as connection:
                        await keep(connection, in_time)
                    assert [event.job_id for event in await take(received, 1)] == [in_time]
                    await failing.rollback()
                    await asyncio.sleep(1)
                    await slow.commit()
                    assert [event.job_id for event in await take(received, 1)] == [late]
                    # One that was late when reading began, too.
                    await before.commit()
                    assert [event.job_id for event in await take(received, 1)] == [late]
                    async with database.transaction() as connection:
                        await keep(connection, last)
                    assert [event.job_id for event in await take(received, 1)] == [last]
    await database.close()


async def test_a_busy_process_reads_several_stored_batches_at_once(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not queue._database.keeps_events:
        pytest.skip("PostgreSQL notifies of each transaction")
    monkeypatch.setattr(event_stream, "READ_REST", 1e6)
    monkeypatch.setattr(event_stream, "MAX_READ_REST_SECONDS", 0.5)
    reads = 0
    read = Store.events_after

    async def counted(*arguments: Any) -> dict[int, str]:
        nonlocal reads
        reads += 1
        return await read(*arguments)

    monkeypatch.setattr(Store, "events_after", counted)
    with queue.events.subscribe() as received:
        begun = time.monotonic()
        jobs = [(await queue.enqueue(PING)).job.id for _ in range(30)]
        assert [event.job_id for event in await take(received, 30)] == jobs
        assert reads <= (time.monotonic() - begun) / 0.5 + 2


class Table:
    """What is visible of `job_event_batch`, by id."""

    def __init__(self) -> None:
        self.rows: dict[int, str] = {}
        self.looked_up: list[int] = []

    async def last_event(self) -> int:
        return max(self.rows, default=0)

    async def events_after(self, number: int, most: int = 1_000) -> dict[int, str]:
        after = [each for each in sorted(self.rows) if each > number]
        return {each: self.rows[each] for each in after[:most]}

    async def events_among(self, numbers: Sequence[int]) -> dict[int, str]:
        self.looked_up += numbers
        return {number: self.rows[number] for number in numbers if number in self.rows}


async def test_late_batches_come_once_and_in_the_order_of_their_ids() -> None:
    table: Any = Table()
    batches = KeptBatches(table, gapless=False)
    assert await batches.read() == []
    table.rows = {103: "c"}
    assert await batches.read() == ["c"]
    assert await batches.read() == []
    # The first two are committed in the other order, and a third after them.
    table.rows |= {102: "b"}
    table.rows |= {101: "a", 104: "d"}
    assert await batches.read() == ["a", "b", "d"]
    assert await batches.read() == []


async def test_a_poll_that_stalls_is_reported_and_ids_that_never_come_are_given_up() -> None:
    now = 1_000.0
    table: Any = Table()
    batches = KeptBatches(table, gapless=False, clock=lambda: now)
    table.rows = {1: "a"}
    assert await batches.read() == []
    table.rows |= {3: "c"}
    assert await batches.read() == ["c"]
    now += EVENTS_KEPT_SECONDS / 2 + 1
    table.rows |= {4: "d"}
    gap, message = await batches.read()
    assert (type(gap), message) == (Gap, "d")
    assert 2 in table.looked_up
    for _ in range(4):
        now += EVENTS_KEPT_SECONDS / 4
        assert await batches.read() == []
    table.looked_up.clear()
    assert await batches.read() == []
    assert table.looked_up == []


async def test_more_late_ids_than_can_be_waited_for_are_reported_as_missed() -> None:
    table: Any = Table()
    batches = KeptBatches(table, gapless=False)
    table.rows = {1: "a"}
    assert await batches.read() == []
    table.rows |= {1_000_000: "z"}
    gap, message = await batches.read()
    assert (type(gap), message) == (Gap, "z")
    assert await batches.read() == []
    assert table.looked_up == []


@pytest.mark.parametrize("gapless", [False, True])
async def test_a_database_that_was_restored_is_reported_as_missed(gapless: bool) -> None:
    table: Any = Table()
    batches = KeptBatches(table, gapless=gapless)
    table.rows = {500: "a"}
    assert await batches.read() == []
    table.rows = {7: "b"}
    (gap,) = await batches.read()
    assert isinstance(gap, Gap)
    table.rows |= {8: "c"}
    assert await batches.read() == ["c"]


@pytest.mark.parametrize("gapless", [False, True])
async def test_a_restored_database_is_noticed_although_it_has_as_many_events_again(
    gapless: bool,
) -> None:
    table: Any = Table()
    batches = KeptBatches(table, gapless=gapless)
    table.rows = {6: "a"}
    assert await batches.read() == []
    table.rows |= {7: "b", 8: "c"}
    assert await batches.read() == ["b", "c"]
    # Restored from a copy of the time after "a". Others were faster with events than this reader.
    table.rows = {6: "a", 7: "d", 8: "e", 9: "f"}
    (gap,) = await batches.read()
    assert isinstance(gap, Gap)
    table.rows |= {10: "g"}
    assert await batches.read() == ["g"]


async def test_a_caller_waits_for_polled_jobs_no_longer_than_a_poll(
    polled: str, registry: JobRegistry
) -> None:
    async with (
        JobQueue.from_url(polled, registry, lease_seconds=30) as one,
        JobQueue.from_url(polled, registry, lease_seconds=30) as other,
    ):
        waiting = asyncio.create_task(one.lease(["test.ping"], "w", wait_seconds=20))
        await asyncio.sleep(0.2)
        await other.enqueue(PING)
        async with asyncio.timeout(2):
            assert len(await waiting) == 1


_NOTIFY = text("SELECT pg_notify('job_registry', :message)")
_KEEP = text(
    "INSERT INTO job_event_batch (message, created_at) VALUES (:message, CURRENT_TIMESTAMP)"
)


def _message(name: str, *job_ids: uuid.UUID) -> str:
    """A message of another process, in the plain form."""
    rows = [[name, job_id.hex, "test.ping", 0] for job_id in job_ids]
    return json.dumps({"process": "another", "events": rows})


async def _tell(url: str, *messages: str) -> None:
    """Sends messages as another process would."""
    database = open_database(url)
    async with database.transaction() as connection:
        for message in messages:
            if database.keeps_events:
                await connection.execute(_KEEP, {"message": message})
            else:
                await connection.execute(_NOTIFY, {"message": message})
    await database.close()


async def _let_kept_events_grow_old(queue: JobQueue, url: str) -> None:
    """Deletes every batch that is kept, as upkeep does once they are old enough."""
    database = open_database(url)
    async with database.transaction() as connection:
        await connection.exec_driver_sql(
            "UPDATE job_event_batch SET created_at = '2020-01-01 00:00:00.000000'"
        )
    await queue.tidy()
    async with database.reading() as connection:
        left = (await connection.exec_driver_sql("SELECT count(*) FROM job_event_batch")).scalar()
    await database.close()
    assert left == 0


@asynccontextmanager
async def _process(script: str, url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process that has printed `ready`; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(script),
        env={**os.environ, "URL": url, "PYTHONPATH": CODE},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_place_of_an_event_is_found_among_those_of_its_time() -> None:
    now, compared = 1_000.0, 0
    recent: RecentEvents[int] = RecentEvents(clock=lambda: now)
    for number in range(1, 41):
        recent.extend([number])
        now += 1.0

    def is_event(item: int) -> bool:
        nonlocal compared
        compared += 1
        return item == 20

    assert recent.position_of(is_event, 1_019, lambda number: number == 20) == 20
    assert recent.position_of(is_event, 1_019, lambda number: False) == 20
    # A thousand clients that continue at once must not read all events each.
    assert compared <= 2 * 13
    assert recent.position_of(is_event, 1_030, lambda number: False) is None
    now -= 3_600.0
    assert recent.extend([20]) == 41
    assert recent.position_of(is_event, 1_039, lambda number: number == 41) == 41
