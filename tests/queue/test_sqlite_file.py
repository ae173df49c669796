"""The file of a SQLite database: one writer, a log that shrinks, and a file that vanishes."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import event, text

from job_registry import EnqueueRequest, JobRegistry
from job_registry_api.queue import sqlite_database
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.sqlite_database import MAX_WAL_BYTES, SQLiteDatabase
from tests.conftest import run_sql

PING = EnqueueRequest("test.ping", {})


@pytest.fixture
def path(sqlite_template: Path, tmp_path: Path) -> Path:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    return tmp_path / "jobs.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[SQLiteDatabase]:
    database = SQLiteDatabase(f"sqlite:///{path}", timeout_seconds=2)
    yield database
    await database.close()


def store(name: str, seconds: float = 0.0) -> Callable[[sqlite3.Connection], str]:
    def work(connection: sqlite3.Connection) -> str:
        connection.execute("INSERT INTO job_type_state (type) VALUES (?)", (name,))
        time.sleep(seconds)
        return name

    return work


async def stored(database: SQLiteDatabase) -> set[str]:
    async with database.reading() as connection:
        rows = await connection.execute(text("SELECT type FROM job_type_state"))
        return {row.type for row in rows}


async def test_a_table_of_the_application_with_numbers_of_its_own_hides_no_events(
    tmp_path: Path, sqlite_template: Path, registry: JobRegistry
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    await asyncio.to_thread(
        run_sql,
        url,
        "CREATE TABLE mine (id INTEGER PRIMARY KEY AUTOINCREMENT)",
        "INSERT INTO mine VALUES (1000)",
    )
    async with JobQueue.from_url(url, registry) as queue, JobQueue.from_url(url, registry) as other:
        with queue.events.subscribe() as heard:
            for _ in range(2):
                job = (await other.enqueue(EnqueueRequest("test.ping", {}))).job
                async with asyncio.timeout(5):
                    assert (await anext(heard)).job_id == job.id


async def test_the_jobs_of_a_bulk_are_inserted_by_few_statements(
    path: Path, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    inserts: set[str] = set()
    connect = sqlite3.connect

    def note(statement: str) -> None:
        # It is called again for each trigger. The values, such as ids, are in the text.
        if statement.startswith("INSERT INTO job ("):
            inserts.add(statement)

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)
        connection.set_trace_callback(note)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    async with JobQueue.from_url(f"sqlite:///{path}", registry) as queue:
        stored = await queue.enqueue_many([PING] * 199)
        # 64 rows three times, then 4, 2 and 1.
        assert (len(stored), len(inserts)) == (199, 6)
        inserts.clear()
        await asyncio.gather(*(queue.enqueue(PING) for _ in range(100)))
        # The first begins at once, and the others share a commit.
        assert 1 <= len(inserts) <= 10


async def test_a_read_that_is_cancelled_leaves_no_connection_behind(path: Path) -> None:
    gc.collect()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(60):
            database = SQLiteDatabase(f"sqlite:///{path}", timeout_seconds=2)
            if step % 2:
                await stored(database)  # Then a connection is in the pool.
            reading = asyncio.create_task(stored(database))
            await asyncio.sleep(step * 0.000_1)
            reading.cancel()
            await asyncio.wait({reading})
            await database.close()
        gc.collect()
    assert [str(each.message) for each in warned] == []


async def test_writes_are_whole_or_not_at_all(database: SQLiteDatabase) -> None:
    def broken(connection: sqlite3.Connection) -> None:
        store("half")(connection)
        raise KeyError("half")

    assert await database.write(store("one")) == "one"
    with pytest.raises(KeyError):
        await database.write(broken)
    assert await stored(database) == {"one"}


async def test_writes_are_one_at_a_time_with_transactions_between_them(
    database: SQLiteDatabase,
) -> None:
    async def transaction(number: int) -> None:
        async with database.transaction() as connection:
            before = await connection.execute(text("SELECT count(*) FROM job_type_state"))
            await asyncio.sleep(0.001)
            await connection.execute(
                text("INSERT INTO job_type_state (type) VALUES (:t)"),
                {"t": f"t{number}-{before.scalar_one()}"},
            )

    writes = [database.write(store(f"w{n}")) for n in range(20)]
    await asyncio.gather(*writes, *(transaction(n) for n in range(20)))
    counted = {int(name.partition("-")[2]) for name in await stored(database) if "-" in name}
    assert len(counted) == 20


async def test_a_cancelled_write_is_cancelled_at_once_and_ends_by_itself(
    database: SQLiteDatabase,
) -> None:
    call = asyncio.create_task(database.write(store("slow", 0.5)))
    await asyncio.sleep(0.1)
    call.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert time.monotonic() - began < 0.2
    await database.write(store("next"))
    assert await stored(database) == {"slow", "next"}


async def test_a_write_that_is_cancelled_before_its_turn_never_begins(
    database: SQLiteDatabase,
) -> None:
    first = asyncio.create_task(database.write(store("first", 0.3)))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(database.write(store("second")))
    await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.wait({first, second})
    assert second.cancelled()
    assert await stored(database) == {"first"}


async def test_a_write_without_a_thread_is_refused_and_not_made_later(
    database: SQLiteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as limited:
        # As with a limit of processes (pids.max, RLIMIT_NPROC), which counts threads
        def fail(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        limited.setattr(threading.Thread, "start", fail)
        for _ in range(2):
            with pytest.raises(QueueUnavailable) as refused:
                await database.write(store("refused"))
        assert refused.value.reason == "no thread for its writes: can't start new thread"
    assert await database.write(store("stored")) == "stored"
    assert await stored(database) == {"stored"}


async def test_another_processs_write_is_waited_for_until_the_deadline(
    path: Path, database: SQLiteDatabase
) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(QueueUnavailable) as refused:
            await database.write(store("late"))
        assert refused.value.kind == "timeout"
        async with asyncio.TaskGroup() as group:
            for call in (database.write(store("x")), begin(database)):
                group.create_task(refuse(call))
        assert time.monotonic() - began < 2 * 2 + 1
        other.execute("ROLLBACK")
    await database.write(store("now"))
    assert await stored(database) == {"now"}


async def begin(database: SQLiteDatabase) -> None:
    async with database.transaction():
        pass


async def refuse(call: Awaitable[object]) -> None:
    with pytest.raises(QueueUnavailable):
        await call


@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_a_file_that_vanishes_is_noticed_and_one_that_comes_back_is_used(
    path: Path, database: SQLiteDatabase, registry: JobRegistry, sqlite_template: Path, how: str
) -> None:
    queue = JobQueue(registry, database)
    job = (await queue.enqueue(PING)).job
    # The files as they are, to be put back later.
    saved = path.with_name("saved")
    saved.mkdir()
    await queue.ping()
    for each in path.parent.glob("jobs.db*"):
        shutil.move(each, saved)
    if how == "replaced":
        path.write_bytes(b"")
    else:
        for call in (queue.enqueue(PING), queue.get(job.id), queue.ping()):
            with pytest.raises(QueueUnavailable) as refused:
                await call
            assert refused.value.kind == "file_missing"
            assert "No such file or directory" in refused.value.reason
        assert not path.exists()
    if how == "replaced":
        for call in (queue.enqueue(PING), queue.get(job.id), queue.ping()):
            with pytest.raises(QueueUnavailable) as refused:
                await call
            assert "job-registry migrate" in refused.value.reason
        for each in path.parent.glob("jobs.db*"):
            each.unlink()
    for each in saved.glob("jobs.db*"):
        shutil.move(each, path.parent)
    assert (await queue.get(job.id)).id == job.id
    again = (await queue.enqueue(PING)).job
    with closing(sqlite3.connect(path)) as other:
        rows = other.execute("SELECT id FROM job").fetchall()
    assert {row[0] for row in rows} == {job.id.hex, again.id.hex}
    await queue.ping()


@contextmanager
def unprivileged_folder() -> Iterator[Path]:
    """A folder of a user who is bound by the modes of files, as whom this process acts: root is
    not."""
    nobody = 65_534
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() != 0:
            yield Path(name)
            return
        os.chown(name, nobody, nobody)
        os.seteuid(nobody)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


async def test_a_file_that_may_be_written_again_is_written(sqlite_template: Path) -> None:
    template = sqlite_template.read_bytes()
    with unprivileged_folder() as folder:
        path = folder / "jobs.db"
        path.write_bytes(template)
        path.chmod(0o400)
        database = SQLiteDatabase(f"sqlite:///{path}")
        for _ in range(2):
            with pytest.raises(QueueUnavailable) as refused:
                await database.write(store("a"))
            assert refused.value.kind == "read_only"
        # SQLite has given its log and its index the mode of the file.
        for each in folder.iterdir():
            each.chmod(0o600)
        await database.write(store("b"))
        assert await stored(database) == {"b"}
        await database.close()


async def test_a_file_deleted_during_a_write_is_not_answered_as_stored(
    path: Path, database: SQLiteDatabase
) -> None:
    def work(connection: sqlite3.Connection) -> None:
        store("gone")(connection)
        path.unlink()

    with pytest.raises(QueueUnavailable):
        await database.write(work)


@pytest.mark.parametrize("end", ["-wal", "-shm"])
async def test_nothing_is_stored_once_the_log_or_its_index_is_deleted(
    path: Path, registry: JobRegistry, end: str
) -> None:
    database = SQLiteDatabase(f"sqlite:///{path}")
    queue = JobQueue(registry, database)
    job = (await queue.enqueue(PING)).job
    assert (await queue.get(job.id)).id == job.id
    beside = path.with_name(path.name + end)
    beside.unlink()
    for content in (None, b""):
        if content is not None:
            beside.write_bytes(content)  # As a process that starts now creates it.
        for call in (queue.enqueue(PING), queue.get(job.id), queue.ping()):
            with pytest.raises(QueueUnavailable) as refused:
                await call
            assert refused.value.kind == "file_missing"
            assert f"jobs.db{end} was deleted or replaced" in refused.value.reason
    beside.unlink()
    # Once all processes have ended, the job is there: the last connection stores it in the file.
    await database.close()
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT id FROM job").fetchall() == [(job.id.hex,)]


async def test_a_log_that_others_delete_and_create_meanwhile_stops_no_reader(path: Path) -> None:
    writer = sqlite3.connect(path)
    writer.execute("SELECT count(*) FROM job").fetchall()
    database = SQLiteDatabase(f"sqlite:///{path}", read_only=True)

    def restart(_connection: Any, _record: Any) -> None:
        nonlocal writer
        writer.close()  # The last process that writes has ended, and another one begins.
        path.with_name("another file").touch()  # It may have the number of the deleted log.
        writer = sqlite3.connect(path)
        writer.execute("SELECT count(*) FROM job").fetchall()

    event.listen(database.engine.sync_engine, "connect", restart)
    async with database.reading() as connection:
        await connection.exec_driver_sql("SELECT count(*) FROM job")
    await database.close()
    writer.close()


async def test_a_log_deleted_during_a_write_is_not_answered_as_stored(
    path: Path, database: SQLiteDatabase
) -> None:
    def work(connection: sqlite3.Connection) -> None:
        store("gone")(connection)
        path.with_name(f"{path.name}-wal").unlink()

    with pytest.raises(QueueUnavailable):
        await database.write(work)


async def test_a_missing_file_is_not_created(tmp_path: Path) -> None:
    database = SQLiteDatabase(f"sqlite:///{tmp_path / 'none.db'}")
    for call in (database.write(store("x")), stored(database)):
        with pytest.raises(QueueUnavailable):
            await call
    await database.close()
    assert list(tmp_path.iterdir()) == []


async def test_a_path_with_characters_of_urls_is_that_path(
    sqlite_template: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a b%20?#c.db"
    shutil.copy(sqlite_template, path)
    database = SQLiteDatabase(f"sqlite:///{quote(str(path))}")
    await database.write(store("x"))
    assert await stored(database) == {"x"}
    await database.close()


async def test_a_relative_path_stays_the_same_file_when_the_folder_of_the_process_changes(
    tmp_path: Path, sqlite_template: Path, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
        shutil.copy(sqlite_template, folder / "jobs.db")
    monkeypatch.chdir(here)
    opened_here = JobQueue.from_url("sqlite:///jobs.db", registry)
    created_here = JobQueue.from_url("sqlite:///new.db", registry)
    async with opened_here:
        await opened_here.enqueue(PING)
        monkeypatch.chdir(elsewhere)  # As a handler, or a daemon at its start, may do.
        await opened_here.enqueue(PING)
        async with opened_here.in_another_loop() as other:
            await other.enqueue(PING)
        async with created_here:
            await created_here.enqueue(PING)
    jobs = "SELECT id FROM job"
    databases = [here / "jobs.db", here / "new.db", elsewhere / "jobs.db"]
    numbers = [await asyncio.to_thread(run_sql, f"sqlite:///{each}", jobs) for each in databases]
    assert [len(rows) for rows in numbers] == [3, 1, 0]
    assert not (elsewhere / "new.db").exists()


async def test_a_symbolic_link_may_lead_to_a_file_that_does_not_exist_yet(
    tmp_path: Path, registry: JobRegistry
) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "jobs.db").symlink_to("volume/jobs.db")
    async with JobQueue.from_url(f"sqlite:///{tmp_path}/jobs.db", registry) as queue:
        await queue.enqueue(PING)
    assert (tmp_path / "volume" / "jobs.db").exists()


async def test_the_listener_notices_commits_of_a_file_that_came_back(
    path: Path, database: SQLiteDatabase
) -> None:
    gaps: list[int] = []
    listening = asyncio.create_task(database.listen(lambda _: None, lambda: gaps.append(1)))
    saved = path.with_name("saved.db")
    async with asyncio.timeout(10):
        while len(gaps) < 2:
            await asyncio.sleep(0.02)
        path.rename(saved)
        await asyncio.sleep(0.3)
        assert not path.exists()
        saved.rename(path)
        received = len(gaps)
        while len(gaps) == received:
            await asyncio.sleep(0.05)
        received = len(gaps)
        await database.write(store("x"))
        while len(gaps) == received:
            await asyncio.sleep(0.02)
    listening.cancel()
    await asyncio.wait({listening})


def grow_log(path: Path, megabytes: int) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN")
        for number in range(megabytes):
            writer.execute(
                "INSERT INTO job_type_state (type) VALUES (?)", (f"{number}" + "x" * 1_000_000,)
            )
        writer.execute("COMMIT")
        writer.execute("DELETE FROM job_type_state")


async def test_the_log_shrinks_by_itself_to_its_limit(path: Path, database: SQLiteDatabase) -> None:
    await database.write(store("first"))
    await asyncio.to_thread(grow_log, path, 16)
    log = path.with_name("jobs.db-wal")
    assert log.stat().st_size > 2 * MAX_WAL_BYTES
    for number in range(20):
        await database.write(store(f"after {number}"))
    assert log.stat().st_size <= MAX_WAL_BYTES


async def test_a_checkpoint_empties_the_log_and_holds_up_no_writer(
    path: Path, database: SQLiteDatabase
) -> None:
    await database.write(store("first"))
    await asyncio.to_thread(grow_log, path, 8)
    log = path.with_name("jobs.db-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM job_type_state").fetchone()
        await database.write(store("second"))
        began = time.monotonic()
        assert not await database.checkpoint()
        assert time.monotonic() - began < 1
        reader.execute("ROLLBACK")
    stop = threading.Event()
    slowest = 0.0

    async def write_all_the_time() -> None:
        nonlocal slowest
        number = 0
        while not stop.is_set():
            began = time.monotonic()
            await database.write(store(f"w{number}"))
            slowest = max(slowest, time.monotonic() - began)
            number += 1
            await asyncio.sleep(0.001)

    writing = asyncio.create_task(write_all_the_time())
    async with asyncio.timeout(10):
        while not await database.checkpoint():
            await asyncio.sleep(0.01)
    stop.set()
    await writing
    assert slowest < 1
    assert await database.checkpoint()
    assert log.stat().st_size == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems notify of no writes")
@pytest.mark.parametrize("is_link", [False, True])
async def test_a_commit_of_another_process_is_noticed_before_the_next_poll(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    database = SQLiteDatabase(f"sqlite:///{link if is_link else path}")
    monkeypatch.setattr(sqlite_database, "SQLITE_POLL_SECONDS", 60.0)
    noticed = asyncio.Event()
    listening = asyncio.create_task(database.listen(lambda _: None, noticed.set))
    await asyncio.sleep(0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        for number in range(3):
            noticed.clear()
            other.execute("INSERT INTO job_type_state (type) VALUES (?)", (str(number),))
            async with asyncio.timeout(5):
                await noticed.wait()
    listening.cancel()
    await database.close()


async def test_a_commit_is_noticed_by_polls_where_no_write_is(
    path: Path, database: SQLiteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    noticed = asyncio.Event()
    listening = asyncio.create_task(database.listen(lambda _: None, noticed.set))
    await asyncio.sleep(0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        noticed.clear()
        other.execute("INSERT INTO job_type_state (type) VALUES ('other')")
    async with asyncio.timeout(5):
        await noticed.wait()
    listening.cancel()
