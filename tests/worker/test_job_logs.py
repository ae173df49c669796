"""What handlers log by `job.log` is kept with their attempts."""

from __future__ import annotations

import asyncio
import copy
import io
import logging
import os
import sqlite3
import sys
import threading
import time
from contextlib import closing
from typing import Any, Literal, cast

import pytest
import structlog
from pydantic_core import from_json, to_json

from job_registry import Fail, JobContext, Retry
from job_registry_api import JobQueue
from job_registry_api.logs import configure_logs, use_standard_logging
from job_registry_api.queue.errors import InputInvalid, LeaseLost, QueueUnavailable
from job_registry_api.queue.job_logs import MAX_BYTES, LogLevel, LogLine
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.worker.job_log import SENT_PER_SECOND, JobLog, Tail, text_of
from job_registry_api.worker.log_writer import STORED_AT_ONCE, WRITE_SECONDS, LogWriter
from tests.conftest import run_sql
from tests.worker import crowd
from tests.worker.house import House, Text
from tests.worker.test_in_processes import crowd_of
from tests.worker.test_worker import logged

INFO, WARNING, ERROR = LogLevel


async def lines(house: House, job: JobRecord) -> list[tuple[str, str, Any]]:
    kept = await house.queue.logs(job.id)
    return [(line.level.value, line.message, line.data) for line in kept]


async def test_lines_of_every_attempt_are_kept_oldest_first(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> None:
        job.log.debug("for developers")
        job.log.info("began", attempt_of=job.max_attempts, text=payload.text)
        await asyncio.sleep(0.1)
        job.log.warning("tired")
        if job.attempt == 1:
            job.log.error("gave up", reasons=["a", "b"])
            raise Retry("again")

    job = await house.run("one")
    assert await lines(house, job) == [
        ("info", "began", {"attempt_of": 3, "text": "one"}),
        ("warning", "tired", {}),
        ("error", "gave up", {"reasons": "['a', 'b']"}),
        ("info", "began", {"attempt_of": 3, "text": "one"}),
        ("warning", "tired", {}),
    ]
    first, second = (await house.queue.logs(job.id))[:2]
    assert 0 <= first.seconds < 1
    assert 0.09 < second.seconds - first.seconds < 1


async def test_lines_go_to_the_workers_log_as_before(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        bound: Any = job.log
        bound.bind(page=3).warning("turned", of=9)
        bound.critical("on fire")

    log = logged("job_registry_api.worker.attempt.log", monkeypatch)
    job = await house.run()
    named = {"job_id": str(job.id), "type": "work", "attempt": 1}
    written = [from_json(line) for line in log.getvalue().splitlines()]
    turned, fire = [each for each in written if each["event"] in ("turned", "on fire")]
    assert turned.items() >= {"level": "warning", "page": 3, "of": 9, **named}.items()
    assert fire.items() >= {"level": "critical", **named}.items()
    assert await lines(house, job) == [
        ("warning", "turned", {"page": 3, "of": 9}),
        ("error", "on fire", {}),
    ]


async def test_lines_of_a_running_attempt_appear_within_two_seconds(house: House) -> None:
    may_end = asyncio.Event()

    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> None:
        job.log.info("waiting")
        await may_end.wait()

    async with house.working():
        job = await house.enqueue()
        async with asyncio.timeout(2.5):
            while not await lines(house, job):
                await asyncio.sleep(0.05)
        assert (await house.queue.get(job.id)).status is JobStatus.RUNNING
        may_end.set()
        await house.until(job, JobStatus.SUCCEEDED)


@pytest.mark.any_database
async def test_lines_of_a_handler_that_blocks_the_event_loop_appear_while_it_does(
    house: House,
) -> None:
    blocking = threading.Event()

    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> None:
        job.log.info("blocking")
        blocking.set()
        time.sleep(2.5)  # noqa: ASYNC251

    schema = "" if house.database_url.startswith("sqlite") else "job_registry."

    def read_while_it_blocks() -> list[Any]:
        blocking.wait(10)
        time.sleep(2.0)
        return run_sql(house.database_url, f"SELECT logs FROM {schema}job_attempt")

    reading = asyncio.create_task(asyncio.to_thread(read_while_it_blocks))
    await house.run()
    assert "blocking" in str(await reading)


async def test_the_last_lines_are_stored_before_the_end_is_reported(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> None:
        job.log.info("done", text=payload.text)

    async with house.working():
        jobs = [await house.enqueue(str(number)) for number in range(30)]
        for number, job in enumerate(jobs):
            await house.queue.result(job.id)
            assert await lines(house, job) == [("info", "done", {"text": str(number)})]


async def test_only_the_last_lines_are_kept(house: House) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        for number in range(30):
            job.log.info("line", number=number)

    async with house.working(keep_log_lines=4):
        job = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
    assert [data["number"] for _, _, data in await lines(house, job)] == [26, 27, 28, 29]


async def test_no_lines_are_kept_if_that_is_set(house: House) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        job.log.info("line")

    async with house.working(keep_log_lines=0):
        job = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
    assert await lines(house, job) == []
    with pytest.raises(ValueError, match="keep_log_lines"):
        async with house.working(keep_log_lines=-1):
            pass


class Odd:
    """A value that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


async def test_whatever_a_handler_logs_its_job_succeeds_and_the_lines_are_small(
    house: House,
) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        anything: Any = job.log
        anything.info("x" * 100_000, **{f"v{n}": "\x00\ud800é" * 1_000 for n in range(100)})
        anything.info("\x01" * 10_000)
        anything.info(Odd())
        anything.info("numbers", big=10**400, nan=float("nan"), deep=[[[[[[]]]]]] * 10**6)
        anything.info("too few %s %s", 1)
        anything.info("last")

    job = await house.run()
    assert job.status is JobStatus.SUCCEEDED
    kept = await house.queue.logs(job.id)
    assert all(len(to_json(line.message)) + len(to_json(line.data)) < 5_000 for line in kept)
    assert [line.message for line in kept][-1] == "last"
    (numbers,) = [line.data for line in kept if line.message == "numbers"]
    assert isinstance(numbers, dict)
    assert numbers["nan"] == "nan"
    assert str(numbers["big"]).startswith("1000")


class OddText(str):
    """A text that cannot be shortened."""

    __slots__ = ()

    def __getitem__(self, _part: Any) -> str:
        raise RuntimeError("no")


@pytest.mark.any_database
@pytest.mark.parametrize("style", ["json", "console"])
async def test_no_value_of_a_line_fails_the_job_or_hides_the_line(
    house: House, style: Literal["json", "console"]
) -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    values: list[Any] = [Odd(), [Odd()], cyclic, b"\xff", "\ud800", 10**5_000, OddText("x")]

    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        log: Any = job.log
        for number, value in enumerate(values):
            log.info(f"value {number}", value=value)
        log.debug("odd", value=Odd())
        log.info(Odd())
        log.info("too few %s %s", 1)
        log.info("value of a name %(a)s", {"a": 1})
        log.info("a name that structlog takes itself", method_name=1)

    written = io.BytesIO()
    stream = io.TextIOWrapper(written, "utf-8", write_through=True)
    try:
        configure_logs("debug", style, stream)
        job = await house.run()
    finally:
        configure_logs("error", "console")
    assert job.status is JobStatus.SUCCEEDED
    kept = await lines(house, job)
    assert [message for _, message, _ in kept] == [
        *(f"value {number}" for number in range(len(values))),
        "<Odd: RuntimeError>",
        "too few %s %s",
        "value of a name 1",
        "a name that structlog takes itself",
    ]
    assert [data["value"] for _, _, data in kept[-6:-4]] == [
        "<int: ValueError>",
        "<OddText: RuntimeError>",
    ]
    text = written.getvalue().decode()
    if style == "json":
        for number in range(len(values)):
            assert f'"value {number}"' in text
        assert text.count("job_log.line_not_written") == 2
        assert "<Odd: RuntimeError>" in text


async def test_every_way_of_structlog_to_log_keeps_the_line(house: House) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> None:
        log: Any = job.log
        log.warn("warn")
        log.fatal("fatal")
        log.log(logging.WARNING, "log %s", "level")
        log.log(logging.DEBUG, "nothing")
        await log.ainfo("ainfo")
        log.bind(a=1, b=2).unbind("a").info("unbind")
        log.bind(a=1).try_unbind("a", "b").info("try_unbind")
        log.bind(a=1).new(b=2).info("new")
        copy.copy(log).info("copy")

    job = await house.run()
    assert await lines(house, job) == [
        ("warning", "warn", {}),
        ("error", "fatal", {}),
        ("warning", "log level", {}),
        ("info", "ainfo", {}),
        ("info", "unbind", {"b": 2}),
        ("info", "try_unbind", {}),
        ("info", "new", {"b": 2}),
        ("info", "copy", {}),
    ]


@pytest.mark.any_database
async def test_in_a_program_with_standard_logging_a_line_has_its_arguments(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        log: Any = job.log
        log.error("page %s of %d", "one", 9)

    structlog.reset_defaults()
    try:
        use_standard_logging()
        await house.run()
    finally:
        configure_logs("error", "console")
    assert ["page one of 9 job_id" in each.getMessage() for each in caplog.records] == [True]


async def test_an_exception_is_kept_however_it_is_named(house: House) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        log: Any = job.log
        try:
            raise KeyError("secret")
        except KeyError as error:
            caught = error
            log.info("as a number", exc_info=1)
            log.warning("as logging does", exc_info=sys.exc_info())
        log.error("the exception", exc_info=caught)
        log.exception("after it was handled", exc_info=caught)
        log.error("none", exc_info=True)
        log.error("none", exc_info=(None, None, None))

    job = await house.run()
    kept = await lines(house, job)
    assert ["KeyError" in data.get("exception", "") for _, _, data in kept] == [True] * 4 + [
        False
    ] * 2


async def test_of_a_flood_of_lines_the_last_ones_are_kept(house: House) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        for number in range(2_000):
            job.log.info("flood", number=number)
        raise Fail("because of the last line")

    job = await house.run()
    kept = await lines(house, job)
    assert [data["number"] for _, _, data in kept] == list(range(1_900, 2_000))


@pytest.mark.any_database
async def test_of_a_flood_of_lines_in_a_process_the_last_ones_are_kept(database_url: str) -> None:
    async with crowd_of(database_url) as house:
        job = await house.run("flood", str(2 * SENT_PER_SECOND))
        kept = await house.queue.logs(job.id)
    messages = [(line.message, cast(Any, line.data)["number"]) for line in kept]
    last = 2 * SENT_PER_SECOND
    assert messages == [
        *(("flood", number) for number in range(last - 99, last)),
        ("after", last),
    ]


def test_the_lines_of_an_attempt_are_at_most_64_kb() -> None:
    kept: list[bytes] = []
    log = JobLog(_Silent, kept.append, time.monotonic())
    log.info("m" * 2_000, **{f"v{n}": "é" * 300 for n in range(30)})
    assert 1_000 < len(kept[0]) <= 4_096
    line = text_of(INFO, "m" * 900, 1.0, {})
    tail = Tail(1_000)
    for _ in range(1_000):
        tail.add(line)
    assert MAX_BYTES - 2_000 < len(tail.text()) <= MAX_BYTES


class _Silent:
    def info(self, *_arguments: Any, **_values: Any) -> None:
        """Nothing."""


async def test_an_exception_is_kept_with_its_traceback_and_without_its_message(
    house: House,
) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        try:
            raise KeyError(payload.text)
        except KeyError:
            anything: Any = job.log
            anything.exception("failed once")

    job = await house.run("secret")
    ((level, message, data),) = await lines(house, job)
    assert (level, message) == ("error", "failed once")
    assert "KeyError" in data["exception"]
    assert "test_job_logs.py" in data["exception"]
    assert "secret" not in str(data)


@pytest.mark.any_database
async def test_lines_of_a_process_are_kept_also_of_one_that_crashes(database_url: str) -> None:
    async with crowd_of(database_url) as house:
        done = await house.run("log", "one")
        crashed = await house.run("log and crash", "two")
        assert [(line.message, line.data) for line in await house.queue.logs(done.id)] == [
            ("from a process", {"argument": "one"})
        ]
        assert crashed.status is JobStatus.FAILED
        attempts = crowd.POLICY.max_attempts
        assert [line.message for line in await house.queue.logs(crashed.id)] == [
            "about to crash"
        ] * attempts


async def test_lines_of_an_attempt_that_timed_out_are_kept(house: House) -> None:
    @house.job_type.handler
    def work(job: JobContext, payload: Text) -> None:
        job.log.info("began")
        while not job.cancel_requested:
            time.sleep(0.01)
        job.log.info("stopping")

    # A job of one second.
    run = "UPDATE {}job SET timeout_seconds = 1"
    prefix = "" if house.database_url.startswith("sqlite") else "job_registry."
    job = await house.enqueue(max_attempts=1)
    await asyncio.to_thread(run_sql, house.database_url, run.format(prefix))
    async with house.working():
        await house.until(job, JobStatus.FAILED)
    messages = [line.message for line in await house.queue.logs(job.id)]
    assert messages[0] == "began"


@pytest.mark.any_database
async def test_when_lines_cannot_be_stored_the_job_ends_as_it_would_and_the_worker_says_so(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> None:
        job.log.info("line")
        raise Fail("for good")

    async def refuse(_queue: Any, _logs: Any) -> None:
        raise OSError(os.strerror(28))

    monkeypatch.setattr("job_registry_api.queue.leasing.Leasing.store_logs", refuse)
    log = logged("job_registry_api.worker.attempt.log", monkeypatch)
    began = time.monotonic()
    job = await house.run()
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error.message == "for good"
    assert time.monotonic() - began < 2
    assert log.getvalue().count(b"job.logs_not_stored") == 1


@pytest.mark.parametrize("how", ["follow-up", "result that cannot be stored"])
async def test_lines_are_kept_however_the_job_succeeds_or_does_not(house: House, how: str) -> None:
    @house.job_type.handler
    async def work(job: JobContext, payload: Text) -> Any:
        job.log.info(how, text=payload.text)
        if how == "follow-up" and payload.text == "first":
            job.enqueue(Text(text="next"), job_type="work")
        return float("nan") if how != "follow-up" else None

    job = await house.run("first")
    assert await lines(house, job) == [("info", how, {"text": "first"})]


class SlowQueue:
    """Stores lines when it may."""

    def __init__(self) -> None:
        self.stored: list[Any] = []
        self.begun = asyncio.Event()
        self.may_store = asyncio.Event()

    async def store_logs(self, logs: list[Any]) -> None:
        self.begun.set()
        await self.may_store.wait()
        self.stored += logs


async def test_the_last_lines_wait_for_older_ones_that_are_being_stored() -> None:
    """Otherwise the older ones could arrive last, and replace them."""
    writer, queue, tail = LogWriter(), SlowQueue(), Tail(10)
    running = asyncio.create_task(writer.run(cast(JobQueue, queue)))
    writer.add("t", tail, b"one")
    await asyncio.wait_for(queue.begun.wait(), 5)
    writer.add("t", tail, b"two")
    taking = asyncio.create_task(writer.take("t"))
    other = asyncio.create_task(writer.take("other"))
    await asyncio.sleep(0.1)
    assert (taking.done(), other.done()) == (False, True)
    queue.may_store.set()
    assert await asyncio.wait_for(taking, 5) == b"one\ntwo"
    assert queue.stored == [("t", b"one")]
    assert await writer.take("t") is None
    running.cancel()


async def test_the_last_lines_are_not_missed_while_a_write_begins() -> None:
    """The loop of the worker takes lines while the thread of the writer picks what to store."""
    writer, queue = LogWriter(), SlowQueue()
    queue.may_store.set()
    taken: list[tuple[bytes | None, list[Any]]] = []

    async def take() -> None:
        taken.append((await writer.take("t"), queue.stored.copy()))

    class Token(str):
        """Its lines are taken once they are not marked as changed, and not yet as being stored."""

        looked_up = 0

        def __hash__(self) -> int:
            self.looked_up += 1
            if self.looked_up == 4:
                thread = threading.Thread(target=lambda: asyncio.run(take()))
                thread.start()
                thread.join(0.2)
            return super().__hash__()

    writer.add(Token("t"), Tail(10), b"one")
    running = asyncio.create_task(writer.run(cast(JobQueue, queue)))
    async with asyncio.timeout(5):
        while not taken:
            await asyncio.sleep(0.01)
    running.cancel()
    assert taken == [(None, [("t", b"one")])]


async def test_the_last_lines_do_not_wait_for_those_of_other_attempts() -> None:
    """Otherwise a job waits for the lines of all others where the database is slow."""
    writer, queue = LogWriter(), SlowQueue()
    tokens = [f"t{number}" for number in range(STORED_AT_ONCE + 1)]
    for token in tokens:
        writer.add(token, Tail(10), b"one")
    running = asyncio.create_task(writer.run(cast(JobQueue, queue)))
    await asyncio.wait_for(queue.begun.wait(), 5)
    assert await asyncio.wait_for(writer.take(tokens[-1]), 0.5) == b"one"
    queue.may_store.set()
    await asyncio.sleep(0.1)
    assert [token for token, _ in queue.stored] == tokens[:-1]
    running.cancel()


async def test_in_an_outage_lines_are_tried_together_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("job_registry_api.worker.log_writer.STORE_SECONDS", 0.02)
    log = logged("job_registry_api.worker.log_writer.log", monkeypatch)
    tries: list[int] = []

    class Outage:
        async def store_logs(self, logs: list[Any]) -> None:
            tries.append(len(logs))
            if len(tries) < 4:
                raise OSError(os.strerror(28))

    writer = LogWriter()
    for number in range(2 * STORED_AT_ONCE):
        writer.add(f"t{number}", Tail(10), b"one")
    running = asyncio.create_task(writer.run(cast(JobQueue, Outage())))
    async with asyncio.timeout(5):
        while len(tries) < 5:
            await asyncio.sleep(0.01)
    running.cancel()
    assert log.getvalue().count(b"worker.logs_not_stored") == 1
    assert await writer.take("t0") is None


async def test_lines_whose_write_was_given_up_on_do_not_replace_newer_ones(house: House) -> None:
    if not house.database_url.startswith("sqlite"):
        pytest.skip("a cancelled write ends only on SQLite")
    await house.enqueue("x")
    (lease,) = await house.queue.lease(["work"], "w")
    path = house.database_url.split("///")[1]
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises((QueueUnavailable, TimeoutError)):
            async with asyncio.timeout(WRITE_SECONDS):
                await house.queue.store_logs([(lease.token, b'["info",0.0,"old",{}]')])
        other.execute("ROLLBACK")
    await asyncio.sleep(0.5)
    assert await house.queue.logs(lease.job.id) == []


async def test_a_remote_worker_sends_its_last_lines_with_heartbeats(house: House) -> None:
    job_id = (await house.enqueue("x")).id
    (lease,) = await house.queue.lease(["work"], "w")
    sent = [LogLine(INFO, "one", 0.5, {"a": 1}), LogLine(WARNING, "two", 1.25)]
    await house.queue.heartbeat(lease.token, logs=sent[:1])
    await house.queue.heartbeat(lease.token, logs=sent)
    # Another heartbeat, and one with progress only, keep them.
    await house.queue.heartbeat(lease.token, {"half": True})
    kept = await house.queue.logs(job_id)
    assert kept == [sent[0], LogLine(WARNING, "two", 1.25, {})]
    await house.queue.heartbeat(lease.token, logs=[])
    assert await house.queue.logs(job_id) == []
    await house.queue.complete(lease.token)
    with pytest.raises(LeaseLost):
        await house.queue.heartbeat(lease.token, logs=sent)
    assert await house.queue.logs(job_id) == []


@pytest.mark.cases(4)
@pytest.mark.any_database
@pytest.mark.parametrize(
    ("line", "path"),
    [
        (LogLine(INFO, "", 0.0), "/logs/0/message"),
        (LogLine(INFO, "x" * 1_001, 0.0), "/logs/0/message"),
        (LogLine(INFO, "nul \x00", 0.0), "/logs/0"),
        (LogLine(INFO, "alone \ud800", 0.0), "/logs/0"),
        (LogLine(INFO, "early", -1.0), "/logs/0/seconds"),
        (LogLine(INFO, "never", float("nan")), "/logs/0/seconds"),
        (LogLine(INFO, "list", 0.0, [1]), "/logs/0/data"),
        (LogLine(INFO, "deep", 0.0, {"a": {}}), "/logs/0/data"),
        (LogLine(INFO, "long", 0.0, {"a": "x" * 201}), "/logs/0/data"),
        (LogLine(INFO, "many", 0.0, {str(n): n for n in range(21)}), "/logs/0/data"),
        (LogLine(INFO, "name", 0.0, {"x" * 201: 1}), "/logs/0/data"),
    ],
    ids=lambda value: value.message[:6] if isinstance(value, LogLine) else "",
)
async def test_a_line_that_cannot_be_kept_is_refused_and_nothing_is_renewed(
    house: House, line: LogLine, path: str
) -> None:
    await house.enqueue("x")
    (lease,) = await house.queue.lease(["work"], "w")
    with pytest.raises(InputInvalid) as refused:
        await house.queue.heartbeat(lease.token, {"p": 1}, [line])
    assert [fault.path for fault in refused.value.violations] == [path]
    assert (await house.queue.get(lease.job.id)).progress is None


@pytest.mark.any_database
async def test_too_many_lines_are_refused(house: House) -> None:
    await house.enqueue("x")
    (lease,) = await house.queue.lease(["work"], "w")
    for sent in ([LogLine(INFO, "x", 0.0)] * 1_001, [LogLine(INFO, "x" * 999, 0.0)] * 70):
        with pytest.raises(InputInvalid) as refused:
            await house.queue.heartbeat(lease.token, logs=sent)
        assert [fault.path for fault in refused.value.violations] == ["/logs"]
    many = [LogLine(INFO, "", -1.0)] * 1_000
    with pytest.raises(InputInvalid) as refused:
        await house.queue.heartbeat(lease.token, logs=many)
    assert 100 <= len(refused.value.violations) <= 102


async def test_stored_lines_are_an_event_of_the_running_job(house: House) -> None:
    job = await house.enqueue("x")
    (lease,) = await house.queue.lease(["work"], "w")
    with house.queue.events.subscribe(job_id=job.id) as events:
        await house.queue.heartbeat(lease.token, logs=[LogLine(INFO, "x", 0.0)])
        assert (await asyncio.wait_for(anext(events), 5)).name == "job.progressed"
