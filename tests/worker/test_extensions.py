"""Users' own middleware and lifespans, and what handlers of every kind see of them."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from job_registry import (
    CallNext,
    DefinitionError,
    Fail,
    JobContext,
    Snooze,
    WorkerExtension,
)
from job_registry.discovery import load_registry
from job_registry_api.logs import configure_logs
from job_registry_api.queue.models import JobStatus
from job_registry_api.worker import Worker, WorkerStartError
from tests.worker.house import House, Text

pytestmark = pytest.mark.any_database

tenant: ContextVar[str] = ContextVar("tenant", default="")
opened: ContextVar[str] = ContextVar("opened", default="")


def handler_of(kind: str, do: Callable[[JobContext], Any]) -> Callable[..., Any]:
    """A handler on the loop or in a thread."""

    async def work(job: JobContext, _payload: Text) -> Any:
        return do(job)

    def work_in_thread(job: JobContext, _payload: Text) -> Any:
        return do(job)

    return work if kind == "async" else work_in_thread


kinds = pytest.mark.parametrize("kind", ["async", "thread"])


@kinds
async def test_middleware_runs_around_handlers_of_every_kind_the_first_one_outermost(
    house: House, kind: str
) -> None:
    async def outer(job: JobContext, call_next: CallNext) -> Any:
        tenant.set("ada")
        house.ran.append(f"outer {job.attempt}")
        try:
            return await call_next()
        finally:
            house.ran.append("outer ends")

    async def inner(_job: JobContext, call_next: CallNext) -> Any:
        house.ran.append(f"inner {tenant.get()}")
        return {"result": await call_next()}

    house.job_type.handler(handler_of(kind, lambda _job: f"for {tenant.get()}"))
    extensions = [WorkerExtension(middleware=[outer]), WorkerExtension(middleware=[inner])]
    async with house.working(extensions=extensions):
        done = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
    assert done.result == {"result": "for ada"}
    assert house.ran == ["outer 1", "inner ada", "outer ends"]


@kinds
async def test_middleware_sees_exceptions_and_may_raise_its_own(house: House, kind: str) -> None:
    def boom(_job: JobContext) -> Any:
        raise KeyError("boom")

    async def give_up(_job: JobContext, call_next: CallNext) -> Any:
        try:
            return await call_next()
        except KeyError as error:
            raise Fail("not again") from error

    house.job_type.handler(handler_of(kind, boom))
    async with house.working(extensions=[WorkerExtension(middleware=[give_up])]):
        ended = await house.until(await house.enqueue(), JobStatus.FAILED)
    assert ended.error is not None
    assert (ended.error.code, ended.error.message) == ("failed", "not again")
    assert await house.outcomes(ended) == ["failed"]


@pytest.mark.parametrize("way", ["timeout", "left behind"])
async def test_a_thread_that_its_middleware_gives_up_never_runs_beside_the_next_attempt(
    house: House, way: str
) -> None:
    async def impatient(_job: JobContext, call_next: CallNext) -> Any:
        if way == "timeout":
            async with asyncio.timeout(0.1):
                return await call_next()
        await asyncio.wait({asyncio.ensure_future(call_next())}, timeout=0.1)
        raise TimeoutError

    running, most = 0, 0

    @house.job_type.handler
    def work(_job: JobContext, _payload: Text) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.6)
        running -= 1

    async with house.working(extensions=[WorkerExtension(middleware=[impatient])]):
        ended = await house.until(await house.enqueue(), JobStatus.FAILED)
    assert ended.error is not None
    assert ended.error.message == "TimeoutError"
    assert (await house.outcomes(ended), most) == (["failed"] * 3, 1)


async def test_middleware_may_leave_the_handler_out(house: House) -> None:
    async def not_now(_job: JobContext, call_next: CallNext) -> Any:
        house.ran.append("middleware")
        if len(house.ran) < 3:
            raise Snooze(0.01)
        return await call_next()

    house.job_type.handler(handler_of("async", lambda _job: house.ran.append("handler")))
    async with house.working(extensions=[WorkerExtension(middleware=[not_now])]):
        done = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
    assert await house.outcomes(done) == ["snoozed", "snoozed", "succeeded"]
    assert house.ran == ["middleware"] * 3 + ["handler"]


@kinds
async def test_handlers_reach_what_the_lifespan_yields_while_it_is_open(
    house: House, kind: str
) -> None:
    is_open = False

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[dict[str, Any]]:
        nonlocal is_open
        opened.set("by the lifespan")
        is_open = True
        yield {"engine": "an engine"}
        is_open = False

    house.job_type.handler(handler_of(kind, lambda job: [job.state.engine, opened.get(), is_open]))
    async with house.working(extensions=[WorkerExtension(lifespan=lifespan)]):
        done = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
    assert done.result == ["an engine", "by the lifespan", True]
    assert not is_open


@asynccontextmanager
async def unreachable() -> AsyncIterator[dict[str, Any]]:
    raise ConnectionError("db.internal does not answer")
    yield {}


@asynccontextmanager
async def named_badly() -> AsyncIterator[dict[str, Any]]:
    yield {"not a name": 1}


@asynccontextmanager
async def engine() -> AsyncIterator[dict[str, Any]]:
    yield {"engine": 1}


@pytest.mark.parametrize(
    ("lifespans", "words"),
    [
        ([unreachable], "lifespan unreachable failed to start: ConnectionError: db.internal"),
        ([named_badly], 'lifespan named_badly yields "not a name"'),
        ([engine, engine], 'lifespan engine yields "engine"'),
    ],
)
async def test_a_lifespan_that_fails_to_start_ends_the_worker(
    house: House, lifespans: list[Any], words: str
) -> None:
    house.job_type.handler(handler_of("async", lambda _job: None))
    worker = Worker(
        house.queue,
        concurrency=1,
        assets="",
        shutdown_seconds=1,
        extensions=[WorkerExtension(lifespan=each) for each in lifespans],
    )
    with pytest.raises(WorkerStartError, match=words):
        await asyncio.wait_for(worker.run(), 5)
    assert not worker.started.is_set()


@kinds
async def test_lines_of_a_handler_say_which_job_wrote_them(house: House, kind: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO())
    configure_logs("info", "json", stream)

    def write(job: JobContext) -> None:
        job.log.info("drawn", size=3)
        logging.getLogger("mine").info("from %s", "logging", extra={"more": 1})
        logging.getLogger("mine").debug("not at info")

    house.job_type.handler(handler_of(kind, write))
    async with house.working():
        done = await house.until(await house.enqueue(), JobStatus.SUCCEEDED)
    stream.flush()
    stream.seek(0)
    lines = [json.loads(line) for line in stream]
    mine = {line["event"]: line for line in lines if line["event"] in ("drawn", "from logging")}
    about = {"job_id": str(done.id), "type": "work", "attempt": 1, "level": "info"}
    assert len(mine) == 2
    assert mine["drawn"].items() >= {**about, "size": 3}.items()
    assert mine["from logging"].items() >= {**about, "logger": "mine", "more": 1}.items()
    assert not any(line["event"] == "not at info" for line in lines)


CATALOG = """
    from job_registry import JobType, Payload, WorkerExtension

    class Here(Payload):
        pass

    async def first(job, call_next):
        return await call_next()

    async def second(job, call_next):
        return await call_next()

    here = JobType(name="here", payload=Here)
    worker = WorkerExtension(middleware=[first])
    more = WorkerExtension(middleware=[second])
"""


def test_extensions_are_found_in_the_catalog_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_extension.py").write_text(textwrap.dedent(CATALOG), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry(["job_registry.catalog", "my_extension", "my_extension"])
    names = [each.middleware[0].__name__ for each in registry.extensions]
    assert names == ["first", "second"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"middleware": [lambda job, call_next: None]}, "must be an `async def` of"),
        ({"middleware": [unreachable]}, "must be an `async def` of"),
        ({"middleware": 3}, "expected a list"),
        ({"lifespan": lambda app: None}, "a function without arguments"),
        ({"lifespan": 3}, "a function without arguments"),
    ],
)
def test_an_extension_is_checked_at_its_definition(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        WorkerExtension(**options)
