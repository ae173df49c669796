"""Jobs in a caller's own transaction: exactly the events of what was committed are published."""

from __future__ import annotations

import asyncio
import gc
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import structlog
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue.caller_transactions import publish_after_commit
from job_registry_api.queue.events import JobEvent, Subscription
from job_registry_api.queue.queue import JobQueue
from tests.conftest import async_url

PING = EnqueueRequest("test.ping", {})


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """The caller's own engine on the queue's database."""
    engine = create_async_engine(async_url(database_url))
    if database_url.startswith("sqlite"):
        _begin_explicitly(engine.sync_engine)
    yield engine
    await engine.dispose()


class Published:
    """What was published in this process, and what another process received."""

    def __init__(self, queue: JobQueue, there: Subscription) -> None:
        self._queue = queue
        self._there = there
        self.here: list[uuid.UUID] = []

    async def jobs(self) -> list[uuid.UUID]:
        """The jobs whose events were published since the last call, the same here and there."""
        # What comes before this one's event is all there is to come.
        last = (await self._queue.enqueue(PING)).job.id
        received: list[uuid.UUID] = []
        async with asyncio.timeout(10):
            while (job_id := (await anext(self._there)).job_id) != last:
                received.append(job_id)
        published = self.here[:-1]
        assert self.here[-1] == last
        self.here.clear()
        assert received == published
        return published


@pytest.fixture
async def announced(
    queue: JobQueue,
    database_url: str,
    registry: JobRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Published]:
    async with JobQueue.from_url(database_url, registry, lease_seconds=30) as other:
        with other.events.subscribe() as there:
            published = Published(queue, there)

            def keep(_logger: object, _method: str, line: Any) -> Any:
                if line["event"].startswith("job."):
                    published.here.append(uuid.UUID(line["job_id"]))
                raise structlog.DropEvent

            logger = structlog.wrap_logger(
                structlog.PrintLogger(), processors=[keep], wrapper_class=structlog.BoundLogger
            )
            monkeypatch.setattr("job_registry_api.queue.events.log", logger)
            yield published


async def enqueue(queue: JobQueue, session: AsyncSession) -> uuid.UUID:
    return (await queue.enqueue(PING, session=session)).job.id


async def stored(queue: JobQueue, *job_ids: uuid.UUID) -> list[bool]:
    found = {job.id for job in (await queue.list(first=200)).jobs}
    return [job_id in found for job_id in job_ids]


async def test_a_job_is_published_when_the_caller_commits_and_not_before(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        job = await enqueue(queue, session)
        assert announced.here == []
        await session.commit()
    assert await announced.jobs() == [job]
    assert await stored(queue, job) == [True]


async def test_a_rollback_publishes_nothing(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        job = await enqueue(queue, session)
        await session.rollback()
    assert await announced.jobs() == []
    assert await stored(queue, job) == [False]


async def test_a_session_that_is_closed_without_a_commit_publishes_nothing(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    session = AsyncSession(engine)
    await enqueue(queue, session)
    await session.close()
    # It can be used again, and the new transaction knows nothing of the old one.
    job = await enqueue(queue, session)
    await session.commit()
    await session.close()
    assert await announced.jobs() == [job]


async def test_a_savepoint_that_is_rolled_back_publishes_nothing_and_the_rest_is_published(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        before = await enqueue(queue, session)
        savepoint = await session.begin_nested()
        lost = await enqueue(queue, session)
        await savepoint.rollback()
        after = await enqueue(queue, session)
        await session.commit()
    assert await announced.jobs() == [before, after]
    assert await stored(queue, before, lost, after) == [True, False, True]


async def test_a_released_savepoint_is_published_with_the_commit_around_it(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            inside = await enqueue(queue, session)
        assert announced.here == []
        after = await enqueue(queue, session)
        assert announced.here == []
        await session.commit()
    assert await announced.jobs() == [inside, after]


async def test_a_released_savepoint_is_lost_with_the_rollback_around_it(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            job = await enqueue(queue, session)
        await session.rollback()
        kept = await enqueue(queue, session)
        await session.commit()
    assert await announced.jobs() == [kept]
    assert await stored(queue, job, kept) == [False, True]


async def test_savepoints_within_savepoints_are_distinguished(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        first = await enqueue(queue, session)
        async with session.begin_nested():
            second = await enqueue(queue, session)
            inner = await session.begin_nested()
            await enqueue(queue, session)
            async with session.begin_nested():
                await enqueue(queue, session)
            # The released one in it is lost as well.
            await inner.rollback()
            async with session.begin_nested():
                third = await enqueue(queue, session)
        outer = await session.begin_nested()
        async with session.begin_nested():
            await enqueue(queue, session)
        await outer.rollback()
        assert announced.here == []
        await session.commit()
    assert await announced.jobs() == [first, second, third]


async def test_a_commit_releases_the_savepoints_that_are_still_open(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        first = await enqueue(queue, session)
        await session.begin_nested()
        second = await enqueue(queue, session)
        await session.begin_nested()
        third = await enqueue(queue, session)
        await session.commit()
    assert await announced.jobs() == [first, second, third]


async def test_a_failed_statement_in_a_savepoint_loses_only_what_the_savepoint_holds(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    async with AsyncSession(engine) as session:
        first = await enqueue(queue, session)
        with suppress(SQLAlchemyError):
            async with session.begin_nested():
                await enqueue(queue, session)
                await session.execute(text("SELECT nothing FROM nowhere"))
        last = await enqueue(queue, session)
        await session.commit()
    assert await announced.jobs() == [first, last]


async def test_a_session_serves_one_transaction_after_another(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    kept = []
    async with AsyncSession(engine) as session:
        for number in range(6):
            job = await enqueue(queue, session)
            if number % 2:
                await session.rollback()
            else:
                await session.commit()
                kept.append(job)
                assert announced.here == kept
    assert await announced.jobs() == kept


async def test_a_deduplicated_job_is_not_published_again(
    queue: JobQueue, engine: AsyncEngine, announced: Published
) -> None:
    request = EnqueueRequest("test.ping", {}, idempotency_key="once")
    async with AsyncSession(engine) as session:
        first = await queue.enqueue(request, session=session)
        again = await queue.enqueue(request, session=session)
        await session.commit()
    assert again.deduplicated
    assert await announced.jobs() == [first.job.id]


async def test_a_commit_is_a_commit_whatever_publishing_does(
    queue: JobQueue, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_events: object) -> None:
        raise RuntimeError("after the commit")

    monkeypatch.setattr(queue.events, "publish", broken)
    async with AsyncSession(engine) as session:
        job = await enqueue(queue, session)
        await session.commit()
        other = await enqueue(queue, session)
        await session.commit()
    assert await stored(queue, job, other) == [True, True]


async def test_a_waiting_worker_gets_a_job_of_a_callers_transaction_at_once(
    queue: JobQueue, engine: AsyncEngine
) -> None:
    waiting = asyncio.create_task(queue.lease(["test.ping"], "w", wait_seconds=20))
    await asyncio.sleep(0.2)
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            job = await enqueue(queue, session)
        await session.commit()
    async with asyncio.timeout(2):
        (lease,) = await waiting
    assert lease.job.id == job


# The tracking itself, on sessions of any kind


@pytest.fixture
def published() -> list[str]:
    return []


def _begin_explicitly(engine: Any) -> None:
    """Savepoints on SQLite need an explicit BEGIN, as SQLAlchemy's documentation says."""

    @event.listens_for(engine, "connect")
    def leave_it_to_us(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")


def _sqlite() -> Any:
    engine = create_engine("sqlite://")
    _begin_explicitly(engine)
    return engine


def note(published: list[str], session: Session, name: str) -> None:
    """Has the event of a job named `name` published after the commit."""

    def publish(events: Sequence[JobEvent]) -> None:
        published.extend(each.type for each in events)

    session.connection()
    publish_after_commit(session, publish, [JobEvent("job.created", uuid.uuid4(), name, 0)])


def test_two_sessions_at_once_are_distinguished(published: list[str]) -> None:
    one_engine, other_engine = _sqlite(), _sqlite()
    with Session(one_engine) as one, Session(other_engine) as other:
        note(published, one, "one")
        note(published, other, "other")
        with other.begin_nested():
            note(published, other, "other, in a savepoint")
        one.rollback()
        assert published == []
        note(published, one, "one again")
        other.commit()
        assert published == ["other", "other, in a savepoint"]
        one.commit()
    assert published == ["other", "other, in a savepoint", "one again"]
    one_engine.dispose()
    other_engine.dispose()


def test_two_queues_in_one_transaction_publish_each_their_own() -> None:
    here: list[str] = []
    there: list[str] = []
    engine = _sqlite()
    with Session(engine) as session:
        note(here, session, "here")
        note(there, session, "there")
        session.commit()
    assert (here, there) == (["here"], ["there"])
    engine.dispose()


def test_a_savepoint_may_be_open_before_the_first_job(published: list[str]) -> None:
    engine = _sqlite()
    with Session(engine) as session:
        session.begin_nested()
        inner = session.begin_nested()
        note(published, session, "lost")
        inner.rollback()
        note(published, session, "kept")
        session.commit()
    assert published == ["kept"]
    engine.dispose()


def test_a_session_within_somebody_elses_transaction_publishes_nothing(
    published: list[str],
) -> None:
    # A test suite that rolls everything back wraps sessions in this way.
    engine = _sqlite()
    for mode in ("create_savepoint", "rollback_only", "conditional_savepoint"):
        with engine.connect() as connection:
            outer = connection.begin()
            with Session(connection, join_transaction_mode=mode) as session:
                note(published, session, "one")
                with session.begin_nested():
                    note(published, session, "two")
                session.commit()
            outer.rollback()
    assert published == []
    engine.dispose()


class Base(DeclarativeBase):
    """The caller's own tables."""


class Thing(Base):
    """A row of the caller's."""

    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)


def test_flushes_do_not_count_as_commits(published: list[str]) -> None:
    engine = _sqlite()
    Base.metadata.create_all(engine)
    with Session(engine) as session:

        @event.listens_for(session, "before_flush")
        def enqueue_in_a_flush(session: Session, *_: object) -> None:
            note(published, session, "in a flush")

        session.add(Thing())
        session.flush()
        assert published == []
        session.rollback()
        assert published == []
        session.add(Thing())
        session.commit()
    assert published == ["in a flush"]
    engine.dispose()


async def test_a_commit_in_another_thread_is_published_on_the_queues_own_loop(
    queue: JobQueue,
) -> None:
    announced: list[int] = []

    def commit() -> None:
        engine = _sqlite()
        with Session(engine) as session:
            session.connection()
            created = JobEvent("job.created", uuid.uuid4(), "test.pong", 0)
            cancelled = JobEvent("job.cancel_requested", uuid.uuid4(), "test.pong", 1)
            publish_after_commit(session, queue.events.publish, [created, cancelled])
            session.commit()
        engine.dispose()

    with (
        queue.events.waiting_for(["test.pong"], []) as woken,
        queue.events.on_cancel_requested(lambda _: announced.append(threading.get_ident())),
    ):
        await asyncio.to_thread(commit)
        async with asyncio.timeout(5):
            await woken.wait()
    assert announced == [threading.get_ident()]


def test_sessions_leave_nothing_behind(published: list[str]) -> None:
    engine = _sqlite()
    sessions: list[weakref.ref[Session]] = []
    for number in range(1_000):
        session = Session(engine)
        note(published, session, "job")
        savepoint = session.begin_nested()
        note(published, session, "in a savepoint")
        if number % 3 == 0:
            session.commit()
        elif number % 3 == 1:
            savepoint.rollback()
        session.close()
        sessions.append(weakref.ref(session))
    del session, savepoint
    gc.collect()
    assert len(published) == 2 * 334
    assert not any(reference() for reference in sessions)
    engine.dispose()
