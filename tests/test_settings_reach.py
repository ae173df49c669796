"""Each setting and option reaches what it is for; one that is read and not passed on is noticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from job_registry_api.connections import Bounds, bounds_of
from job_registry_api.settings import Settings, load_settings
from tests import CODE
from tests.cli.test_cli import Shell
from tests.conftest import run_sql
from tests.forks import Command
from tests.http_client import Visit, serving
from tests.test_auth import AUTH, CLAIMS, bearer

Test = TypeVar("Test", bound=Callable[..., Any])
TRIED: set[str] = set()


def reaches(*settings: str) -> Callable[[Test], Test]:
    """Marks a test that fails if one of these settings is read and not passed on."""

    def mark(test: Test) -> Test:
        TRIED.update(settings)
        return test

    return mark


def test_every_setting_is_tried_here() -> None:
    assert Settings.model_fields.keys() == TRIED


@pytest.fixture
def jobs(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


THUMBNAIL = {"type": "thumbnail.create", "payload": {"assetId": "a", "versionNumber": 1}}
PING = {"type": "test.ping", "payload": {}}


async def ask(client: httpx.AsyncClient, query: str, **headers: str) -> dict[str, Any]:
    response = await client.post("/graphql", json={"query": query}, headers=headers)
    answer: dict[str, Any] = response.json()
    return answer


def codes(answer: dict[str, Any]) -> list[str]:
    return [error["extensions"]["code"] for error in answer.get("errors", ())]


# Guards of requests


@reaches("max_answer_bytes", "max_answer_fields")
async def test_an_answer_is_as_large_as_set(visit: Visit) -> None:
    bulk = "mutation($i: [EnqueueJobInput!]!) { enqueueJobs(inputs: $i) { __typename } }"
    aliases = " ".join(f"a{number}: %s" for number in range(25))
    page = "{ jobs { nodes { payload %s } pageInfo { stoppedEarly hasNextPage } } }"
    jobs = [{"type": "test.ping", "payload": {"text": "x" * 3_000}}] * 50
    async with visit() as client:
        await client.post("/graphql", json={"query": bulk, "variables": {"i": jobs}})
    limits: list[tuple[dict[str, str], int]] = [
        ({}, 50),
        ({"max_answer_bytes": "65536"}, 21),
        ({"max_answer_fields": "1000"}, 25),
    ]
    for setting, most in limits:
        async with visit(**setting) as client:
            answer = await ask(client, page % aliases.replace("%s", "id"))
            assert len(answer["data"]["jobs"]["nodes"]) == most
            stopped = most < 50
            assert answer["data"]["jobs"]["pageInfo"] == {
                "stoppedEarly": stopped,
                "hasNextPage": stopped,
            }
    async with visit(max_answer_bytes="65536") as client:
        answer = await ask(client, page % aliases.replace("%s", "payload"))
        assert set(codes(answer)) == {"budget_exceeded"}
        assert answer["errors"][0]["extensions"]["setting"] == "JOBS_MAX_ANSWER_BYTES"


@reaches("max_request_values")
async def test_a_request_may_have_as_many_values_as_set(visit: Visit) -> None:
    body = {"type": "test.ping", "payload": {"text": [0] * 1_500}}
    asked = {"query": "{ __typename }", "variables": body}
    for limit, status in (("1000", 413), ("2000", 422)):
        async with visit(max_request_values=limit) as client:
            assert (await client.post("/jobs", json=body)).status_code == status
            answer = await client.post("/graphql", json=asked)
            assert answer.status_code == (200 if status == 422 else 413)


@reaches("federation")
async def test_the_schema_is_a_subgraph_if_that_is_set(visit: Visit) -> None:
    for federation in ("true", "false"):
        async with visit(federation=federation) as client:
            answer = await client.post("/graphql", json={"query": "{ _service { sdl } }"})
            assert ("errors" in answer.json()) == (federation == "false")


@reaches("max_body_bytes")
async def test_a_body_may_be_as_large_as_set(visit: Visit) -> None:
    body = {"type": "test.ping", "payload": {"text": "x" * 2_000}}
    for limit, status in (("1024", 413), ("4096", 201)):
        async with visit(max_body_bytes=limit) as client:
            assert (await client.post("/jobs", json=body)).status_code == status
            answer = await client.post("/graphql", json={"query": "{ __typename }" + " " * 2_000})
            assert answer.status_code == (200 if status == 201 else 413)


@reaches("max_page_size")
async def test_a_page_may_be_as_large_as_set(visit: Visit) -> None:
    for limit, refused in (("50", True), ("51", False)):
        async with visit(max_page_size=limit) as client:
            answer = await ask(client, "{ jobs(first: 51) { nodes { id } } }")
            assert ("errors" in answer) == refused


@reaches("max_bulk_size")
async def test_a_bulk_may_be_as_large_as_set(visit: Visit) -> None:
    job = '{type: "test.ping", payload: {}}'
    query = f"mutation {{ enqueueJobs(inputs: [{job}, {job}]) {{ __typename }} }}"
    for limit, refused in (("1", True), ("2", False)):
        async with visit(max_bulk_size=limit) as client:
            assert ("errors" in await ask(client, query)) == refused


@reaches("max_query_tokens", "max_query_depth", "max_query_aliases", "max_query_directives")
@pytest.mark.parametrize(
    ("setting", "limit", "query"),
    [
        ("max_query_tokens", "100", "{ " + "__typename " * 200 + "}"),
        ("max_query_depth", "5", "{ jobs { nodes { policy { backoff { a { b { c } } } } } } }"),
        ("max_query_aliases", "0", "{ a: __typename }"),
        ("max_query_directives", "0", "{ __typename @include(if: true) }"),
    ],
)
async def test_a_document_may_be_as_complex_as_set(
    visit: Visit, setting: str, limit: str, query: str
) -> None:
    async with visit(**{setting: limit}) as strict:
        told = json.dumps(await ask(strict, query))
    many = "10000"
    generous = {"max_query_tokens": many, "max_query_depth": "100", "max_query_aliases": many}
    async with visit(**generous, max_query_directives=many) as client:
        assert json.dumps(await ask(client, query)) != told
    assert "errors" in told


@reaches("rate_limit")
async def test_callers_may_call_as_often_as_set(visit: Visit) -> None:
    async with visit(rate_limit="2/hour") as client:
        statuses = [(await client.post("/jobs", json=PING)).status_code for _ in range(3)]
    assert statuses == [201, 201, 429]


@reaches("cors_origins")
async def test_pages_of_the_origins_that_are_set_may_call(visit: Visit) -> None:
    origin = "https://app.example.com"
    for settings, allowed in (({}, None), ({"cors_origins": origin}, origin)):
        async with visit(**settings) as client:
            response = await client.post("/jobs", json=PING, headers={"origin": origin})
            assert response.headers.get("access-control-allow-origin") == allowed


@reaches("cors_headers")
async def test_pages_may_send_the_headers_that_are_set(visit: Visit) -> None:
    asked = {
        "origin": "https://app.example.com",
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-own",
    }
    for settings, status in (({}, 400), ({"cors_headers": "x-own"}, 200)):
        async with visit(cors_origins="https://app.example.com", **settings) as client:
            assert (await client.options("/graphql", headers=asked)).status_code == status


@reaches("root_path", "compress_bytes")
async def test_the_application_is_published_as_set(visit: Visit) -> None:
    body = {"query": "{ jobTypes { payloadSchema } }"}
    for settings, status, encoding in (
        ({}, 404, None),
        ({"root_path": "/queue"}, 200, None),
        ({"root_path": "/queue", "compress_bytes": "500"}, 200, "br"),
    ):
        async with visit(**settings) as client:
            answer = await client.post("/queue/graphql", json=body)
            assert answer.status_code == status
            assert answer.headers.get("content-encoding") == encoding


@reaches("proxies")
async def test_the_proxies_that_are_set_are_believed(database_url: str) -> None:
    foreign = {"x-forwarded-for": "203.0.113.9"}  # Without authentication, it is refused.
    for settings, status in (({}, 201), ({"proxies": "127.0.0.0/8"}, 403)):
        async with (
            serving(database_url, "--no-worker", **settings) as (address, _),
            httpx.AsyncClient(base_url=f"http://{address}") as client,
        ):
            answer = await client.post("/jobs", json=THUMBNAIL, headers=foreign)
            assert answer.status_code == status


@reaches("max_upload_bytes")
async def test_a_picture_may_be_as_large_as_set(visit: Visit, tmp_path: Path) -> None:
    picture, png = b"\x89PNG\r\n\x1a\n" + b"." * 600, {"content-type": "image/png"}
    for limit, status in (("0", 404), ("600", 413), ("700", 201)):
        async with visit(assets=str(tmp_path), max_upload_bytes=limit) as client:
            answer = await client.post("/assets/a/1", content=picture, headers=png)
            assert answer.status_code == status


@reaches("persisted_queries", "trusted_documents")
async def test_documents_are_named_as_set(visit: Visit, tmp_path: Path) -> None:
    manifest = tmp_path / "documents.json"
    manifest.write_text('{"types": "{ jobTypes { name } }"}')
    hashed = {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": "types"}}}
    for settings, code in (
        ({}, "PERSISTED_QUERY_NOT_FOUND"),
        ({"persisted_queries": "false"}, "PERSISTED_QUERY_NOT_SUPPORTED"),
        ({"trusted_documents": str(manifest)}, None),
    ):
        async with visit(**settings) as client:
            answer = (await client.post("/graphql", json=hashed)).json()
            assert codes(answer) == ([] if code is None else [code])


@reaches("production", "introspection", "suggestions", "graphiql", "get_queries")
async def test_what_is_switched_off_is_off_alone_and_in_production_together(visit: Visit) -> None:
    async def switched_on(**settings: str) -> dict[str, bool]:
        async with visit(**settings) as client:
            introspected = await ask(client, "{ __schema { queryType { name } } }")
            mistaken = await ask(client, "{ jobType }")
            page = await client.get("/graphql", headers={"accept": "text/html"})
            got = await client.get("/graphql", params={"query": "{ __typename }"})
            return {
                "introspection": "errors" not in introspected,
                "suggestions": "Did you mean" in json.dumps(await ask(client, "{ jobTypess }")),
                "graphiql": page.headers["content-type"].startswith("text/html"),
                "get_queries": got.status_code == 200 and "errors" in mistaken,
            }

    everything = await switched_on()
    # GraphiQL is there where Node has built it.
    assert all(on for name, on in everything.items() if name != "graphiql")
    for name in everything:
        assert await switched_on(**{name: "false"}) == everything | {name: False}
    assert not any((await switched_on(production="true")).values())


@reaches("auth_hs256_secret", "auth_issuer", "auth_audience", "auth_leeway_seconds")
async def test_tokens_are_checked_against_all_that_is_set(visit: Visit) -> None:
    late = bearer("jobs:enqueue", exp=int(time.time()) - 100)
    good = bearer("jobs:enqueue")
    for changed, headers, status in (
        ({}, good, 201),
        ({}, late, 401),
        ({"auth_leeway_seconds": "200"}, late, 201),
        ({"auth_issuer": "another"}, good, 401),
        ({"auth_audience": "another"}, good, 401),
        ({"auth_hs256_secret": "another secret, also of 32 bytes or more"}, good, 401),
    ):
        async with visit(**AUTH | changed) as client:
            assert (await client.post("/jobs", json=PING, headers=headers)).status_code == status


@reaches("auth_jwks")
async def test_tokens_are_checked_with_the_keys_that_are_set(visit: Visit, tmp_path: Path) -> None:
    import jwt

    from tests.test_auth import claims

    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(key.public_key())) | {"kid": "k", "alg": "ES256"}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [public]}), "utf-8")
    async with visit(auth_jwks=str(tmp_path / "keys.json"), **CLAIMS) as client:
        token = jwt.encode(claims("jobs:enqueue"), key, "ES256", headers={"kid": "k"})
        headers = {"authorization": f"Bearer {token}"}
        assert (await client.post("/jobs", json=PING, headers=headers)).status_code == 201
        assert (await client.post("/jobs", json=PING, headers=bearer("jobs:enqueue"))).is_error


@reaches(
    "max_connections",
    "header_timeout_seconds",
    "body_timeout_seconds",
    "idle_timeout_seconds",
    "unread_timeout_seconds",
    "max_websocket_operations",
)
def test_connections_have_the_bounds_that_are_set() -> None:
    # Each bound is tried on a server in tests/test_connections.py and graphql/test_websocket.py.
    settings = load_settings(
        {
            "JOBS_MAX_CONNECTIONS": "101",
            "JOBS_HEADER_TIMEOUT_SECONDS": "102",
            "JOBS_BODY_TIMEOUT_SECONDS": "103",
            "JOBS_IDLE_TIMEOUT_SECONDS": "104",
            "JOBS_UNREAD_TIMEOUT_SECONDS": "105",
            "JOBS_MAX_BODY_BYTES": "106000",
            "JOBS_MAX_UPLOAD_BYTES": "107000",
        }
    )
    assert bounds_of(settings) == Bounds(101, 102, 103, 104, 105, 106_000, 107_000)


# The command


@reaches("catalog")
def test_job_types_come_from_the_catalog_that_is_set(jobs: Shell, house: Path) -> None:
    names = [each["name"] for each in json.loads(jobs("types", "--json", **HOUSE).stdout)]
    assert names == ["look"]


@reaches("max_payload_bytes")
@pytest.mark.parametrize("command", ["validate", "enqueue"])
def test_a_payload_may_be_as_large_as_set(jobs: Shell, command: str) -> None:
    payload = json.dumps({"batchId": "b" * 1_200, "escrowId": "e"})
    refused = jobs(
        command, "payout.execute", "-", "--json", stdin=payload, JOBS_MAX_PAYLOAD_BYTES="1024"
    )
    assert refused.returncode == 1
    codes = [each["code"] for each in json.loads(refused.stdout)["violations"]]
    assert "too_large" in codes or "too_long" in codes
    text = json.dumps({"batchId": "b" * 100, "escrowId": "e"})
    assert jobs(command, "payout.execute", "-", stdin=text).returncode == 0


@reaches("database_url")
@pytest.mark.parametrize("command", [["migrate"], ["enqueue", "payout.execute", "-"]])
def test_the_database_that_is_set_is_used(jobs: Shell, command: list[str]) -> None:
    payload = '{"batchId": "b", "escrowId": "e"}'
    url = "sqlite:///elsewhere.db"
    assert jobs(*command, stdin=payload, JOBS_DATABASE_URL=url).returncode == 0
    assert sorted(path.name for path in jobs.folder.glob("*.db")) == ["elsewhere.db"]


@pytest.mark.slow
@reaches("database_schema")
def test_the_schema_that_is_set_is_used(fresh_postgresql_url: str, jobs: Shell) -> None:
    payload = '{"batchId": "b", "escrowId": "e"}'
    settings = {"JOBS_DATABASE_URL": fresh_postgresql_url, "JOBS_DATABASE_SCHEMA": "elsewhere"}
    assert jobs("enqueue", "payout.execute", "-", stdin=payload, **settings).returncode == 1
    assert jobs("migrate", **settings).returncode == 0
    assert jobs("migrate", "--check", **settings).returncode == 0
    assert "SCHEMA elsewhere TO web" in jobs("migrate", "--grants", "web", **settings).stdout
    assert jobs("enqueue", "payout.execute", "-", stdin=payload, **settings).returncode == 0
    assert run_sql(fresh_postgresql_url, "SELECT count(*) FROM elsewhere.job") == [(1,)]
    assert run_sql(fresh_postgresql_url, "SELECT count(*) FROM job_registry.job") == [(0,)]
    for wrong in ("pg_mine", "Mine", 'my"schema', "x" * 64):
        refused = jobs("migrate", **settings | {"JOBS_DATABASE_SCHEMA": wrong})
        assert refused.returncode == 2
        assert "JOBS_DATABASE_SCHEMA" in refused.stderr


# Processes

HOUSE = {"JOBS_CATALOG": "house"}

CATALOG = """
    import asyncio
    import json
    from pathlib import Path
    from job_registry_api.queue import databases
    from job_registry import JobContext, JobPolicy, JobType, Payload

    class Empty(Payload):
        pass

    look = JobType(
        name="look", payload=Empty, policy=JobPolicy(max_attempts=2, timeout_seconds=600)
    )

    @look.handler
    async def look_around(job: JobContext, payload: Empty) -> None:
        job.progress({"assets": job.assets})
        for step in range(5):
            job.log.info("looked", step=step)
        await asyncio.sleep(600)

    def seen(url, **options):
        with Path("databases.jsonl").open("a") as file:
            file.write(json.dumps(options, default=str) + "\\n")
        return databases.open_database(url, **options)

    from job_registry_api.queue import queue
    queue.open_database = seen
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    (tmp_path / "house.py").write_text(textwrap.dedent(CATALOG), "utf-8")
    return tmp_path


@contextmanager
def running(folder: Path, *command: str, **settings: str) -> Iterator[Command]:
    process = Command(
        command,
        environment={
            **os.environ,
            **HOUSE,
            "PYTHONPATH": f"{folder}{os.pathsep}{CODE}",
            **{f"JOBS_{name.upper()}": value for name, value in settings.items()},
        },
        folder=folder,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def eventually(rows: Callable[[], Any], expected: Any) -> None:
    give_up = time.monotonic() + 40
    while (found := rows()) != expected and time.monotonic() < give_up:
        time.sleep(0.05)
    assert found == expected


OLD = """INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
    timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, finished_at)
    SELECT printf('%032x', {number}), 'look', 'f', '{status}', '{{}}', 50, 1, 3, 60, 2, 60,
        strftime('%Y-%m-%d %H:%M:%f', 'now', '-{days} days') || '000',
        strftime('%Y-%m-%d %H:%M:%f', 'now', '-{days} days') || '000'"""


PARKED = (
    """INSERT INTO job (id, type, fingerprint, status, payload, priority, attempt, max_attempts,
    timeout_seconds, backoff_base_seconds, backoff_cap_seconds, created_at, next_run_at)
    SELECT printf('%032x', {number}), 'other', 'f', 'queued', '{{}}', 50, 0, 3, 60, 2, 60,
        '2026-01-01 00:00:00.000000', '9999-01-01 00:00:00.000000'""",
    """INSERT INTO job_parked (job_id, type, priority, fingerprint, due_at, parked_at, refused_by)
    SELECT id, type, priority, fingerprint, created_at,
        strftime('%Y-%m-%d %H:%M:%f', 'now', '-{days} days') || '000', 'f'
    FROM job WHERE id = printf('%032x', {number})""",
)


@pytest.mark.slow
@reaches(
    "assets",
    "lease_seconds",
    "worker_concurrency",
    "keep_succeeded_days",
    "keep_failed_days",
    "keep_log_lines",
    "parked_days",
    "database_pool_size",
    "database_timeout_seconds",
    "shutdown_seconds",
)
@pytest.mark.parametrize("option", [False, True], ids=["variable", "option"])
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_what_is_set_for_a_worker_reaches_it(
    sqlite_template: Path, house: Path, command: str, option: bool
) -> None:
    shutil.copy(sqlite_template, house / "jobs.db")
    url = f"sqlite:///{house / 'jobs.db'}"
    for number, (status, days) in enumerate(
        [("succeeded", 2), ("succeeded", 4), ("failed", 4), ("failed", 6)], start=1
    ):
        run_sql(url, OLD.format(number=number, status=status, days=days))
    for number, days in enumerate([2, 4], start=5):
        run_sql(url, *(each.format(number=number, days=days) for each in PARKED))
    Shell(house)("enqueue", "look", "-", stdin="{}\n" * 5, **HOUSE)
    arguments = ["--concurrency", "3"] if option else []
    arguments += ["--port", "0"] if command == "serve" else []
    settings = {
        "worker_concurrency": "2" if option else "3",
        "assets": "pictures",
        "lease_seconds": "77",
        "keep_succeeded_days": "3",
        "keep_failed_days": "5",
        "keep_log_lines": "2",
        "parked_days": "3",
        "database_pool_size": "7",
        "database_timeout_seconds": "12",
        "shutdown_seconds": "0",
        "log_level": "error",
    }
    (house / "databases.jsonl").unlink()
    with running(house, command, *arguments, **settings) as process:
        running_jobs = "SELECT json_extract(progress, '$.assets') FROM job WHERE status = 'running'"
        eventually(lambda: run_sql(url, running_jobs), [(str(house / "pictures"),)] * 3)
        lease = """SELECT DISTINCT round((julianday(lease_expires_at) - julianday(started_at))
            * 86400 / 10) FROM job WHERE status = 'running'"""
        assert run_sql(url, lease) == [(8,)]
        kept = """SELECT DISTINCT length(logs) - length(replace(logs, 'looked', ''))
            FROM job_attempt WHERE logs IS NOT NULL"""
        eventually(lambda: run_sql(url, kept), [(2 * len("looked"),)])
        finished = "SELECT status, count(*) FROM job WHERE finished_at NOT NULL GROUP BY status"
        # One of each kept, and one that was parked for too long.
        eventually(lambda: run_sql(url, finished), [("failed", 2), ("succeeded", 1)])
        pools = [json.loads(line) for line in (house / "databases.jsonl").read_text().splitlines()]
        assert (pools[0]["pool_size"], pools[0]["timeout_seconds"]) == (7, 12.0)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        # The default would let the jobs run on for 20 seconds.
        process.wait(15)
        assert time.monotonic() - asked < 15
        assert process.returncode == 0
    assert run_sql(url, "SELECT DISTINCT status FROM job WHERE finished_at IS NULL") == [
        ("queued",)
    ]


@reaches("database_pooler", "database_listen_url")
@pytest.mark.parametrize("command", ["serve", "worker", "enqueue", "migrate"])
def test_how_the_database_is_reached_is_what_every_command_uses(
    fresh_postgresql_url: str, house: Path, command: str
) -> None:
    settings = {
        "JOBS_DATABASE_URL": fresh_postgresql_url,
        "JOBS_DATABASE_POOLER": "transaction",
        "JOBS_DATABASE_LISTEN_URL": fresh_postgresql_url,
    }
    opened = house / "databases.jsonl"
    if command in ("serve", "worker"):
        arguments = ["--port", "0"] if command == "serve" else ["--health-port", "0"]
        variables = {name.removeprefix("JOBS_").lower(): value for name, value in settings.items()}
        with running(house, command, *arguments, **variables) as process:
            assert process.stderr is not None
            process.stderr.readline()
            eventually(lambda: opened.exists() and "transaction" in opened.read_text(), True)
    else:
        arguments = ["look", "-"] if command == "enqueue" else ["--check"]
        Shell(house)(command, *arguments, stdin="{}", **HOUSE | settings)
    if command == "migrate":
        return  # It needs no job types, so the spy is not loaded: that it succeeds is enough.
    used = [json.loads(line) for line in opened.read_text().splitlines()]
    assert used[-1]["pooler"] == "transaction"
    assert used[-1]["listen_url"] == fresh_postgresql_url


@reaches("host", "port")
@pytest.mark.parametrize("option", [False, True], ids=["variable", "option"])
def test_the_server_listens_where_it_is_set_to(house: Path, option: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = str(free.getsockname()[1])
    arguments = ["--host", "127.0.0.2", "--port", port] if option else []
    settings = {} if option else {"host": "127.0.0.2", "port": port}
    with running(house, "serve", "--no-worker", *arguments, **settings) as process:
        assert process.stderr is not None
        assert f"http://127.0.0.2:{port}/graphql" in process.stderr.readline()
        answer = urllib.request.urlopen(f"http://127.0.0.2:{port}/readyz", timeout=20)
        assert answer.status == 200


@reaches("serve_processes")
@pytest.mark.parametrize(
    "option", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["variable", "option"]
)
def test_the_server_has_as_many_processes_as_set(house: Path, option: bool) -> None:
    arguments = ["--processes", "2"] if option else []
    settings = {} if option else {"serve_processes": "2"}
    with running(house, "serve", "--port", "0", *arguments, **settings) as process:
        assert process.stderr is not None
        assert " from 2 processes " in process.stderr.readline()


@reaches("log_level", "log_format")
def test_the_log_is_written_as_set(sqlite_template: Path, house: Path) -> None:
    def lines(**settings: str) -> list[str]:
        shutil.copy(sqlite_template, house / "jobs.db")
        with running(house, "worker", **settings) as process:
            url = f"sqlite:///{house / 'jobs.db'}"
            seen = "SELECT count(*) FROM job_type_state"
            eventually(lambda: run_sql(url, seen), [(1,)])
            process.terminate()
            assert process.wait(20) == 0
            assert process.stderr is not None
            return process.stderr.read().splitlines()

    events = [json.loads(line)["event"] for line in lines(log_format="json")]
    assert events == ["worker.started", "worker.stopped"]
    (first, _last) = lines(log_format="console")
    assert "worker.started" in first
    assert not first.startswith("{")
    assert lines(log_format="json", log_level="error") == []


def test_a_worker_runs_only_the_types_of_its_setting(sqlite_template: Path, house: Path) -> None:
    (house / "more.py").write_text(
        "from house import Empty, JobPolicy, JobType\n"
        "other = JobType(name='other', payload=Empty, policy=JobPolicy(timeout_seconds=600))\n"
        "@other.handler\n"
        "async def do(job, payload): pass\n",
        "utf-8",
    )
    shutil.copy(sqlite_template, house / "jobs.db")
    url = f"sqlite:///{house / 'jobs.db'}"
    with running(house, "worker", "--types", "other", catalog="house,more"):
        eventually(lambda: run_sql(url, "SELECT type FROM job_type_state"), [("other",)])
