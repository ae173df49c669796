"""The application mounted in Starlette and FastAPI, under a prefix, with and without a lifespan."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import Message
from structlog.testing import capture_logs

from job_registry import JobContext, JobRegistry, JobType, Payload, WorkerExtension
from job_registry_api import JobQueue, JobsApplication, JobStatus, application, create_app
from job_registry_api.settings import Settings, SettingsInvalid, load_settings
from tests.conftest import run_sql

PAYOUT = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
ENQUEUE = """mutation ($input: EnqueueJobInput!) {
  enqueueJob(input: $input) { __typename ... on EnqueueJobSuccess { job { id status } } } }"""

NEWER = "UPDATE job_registry_version SET version_num = '9001', compatible_from = '9001'"

Host = Starlette | FastAPI
MakeHost = Callable[..., Host]


def starlette_host(prefix: str, jobs: JobsApplication, *, joined: bool = False) -> Starlette:
    async def hello(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with jobs.running():
            yield

    routes = [Route("/hello", hello), Mount(prefix, jobs)]
    return Starlette(routes=routes, lifespan=lifespan if joined else None)


def fastapi_host(prefix: str, jobs: JobsApplication, *, joined: bool = False) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with jobs.running():
            yield

    app = FastAPI(lifespan=lifespan if joined else None)

    @app.get("/hello")
    async def hello() -> str:
        return "hello"

    app.mount(prefix, jobs)
    return app


both_hosts = pytest.mark.parametrize(
    "host", [starlette_host, fastapi_host], ids=["starlette", "fastapi"]
)


def registry_with(lifespan: Callable[[], Any]) -> JobRegistry:
    """A job type, and a lifespan for its worker."""

    class Nothing(Payload):
        """Do nothing."""

    return JobRegistry(
        [JobType(name="test.nothing", payload=Nothing)],
        extensions=[WorkerExtension(lifespan=lifespan)],
    )


def settings_of(database_url: str, **settings: str) -> Settings:
    given = {f"JOBS_{name.upper()}": value for name, value in settings.items()}
    return load_settings({"JOBS_DATABASE_URL": database_url} | given)


@asynccontextmanager
async def visiting(
    app: Host, base_url: str = "http://localhost", client: str = "127.0.0.1"
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a host whose lifespan runs, as a server would run it."""
    transport = httpx.ASGITransport(app, client=(client, 1), raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=base_url) as visitor,
    ):
        yield visitor


async def ended() -> None:
    """End an application that a request has started, as the end of the event loop does."""
    for task in asyncio.all_tasks():
        if task.get_name() == "jobs application":
            task.cancel()
            await asyncio.wait({task})


@both_hosts
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "not joined"])
@pytest.mark.parametrize("prefix", ["/queue", "/internal/the queue"])
async def test_a_mounted_application_serves_graphql_rest_health_and_its_page(
    host: MakeHost, joined: bool, prefix: str, database_url: str, registry: JobRegistry
) -> None:
    jobs = create_app(settings_of(database_url), registry)
    async with visiting(host(prefix, jobs, joined=joined)) as client:
        answer = await client.post(
            f"{prefix}/graphql", json={"query": ENQUEUE, "variables": {"input": PAYOUT}}
        )
        stored = answer.json()["data"]["enqueueJob"]
        rest = await client.post(f"{prefix}/jobs", json=PAYOUT)
        job = await client.get(rest.headers["location"])
        ready = await client.get(f"{prefix}/readyz")
        root = await client.get(f"{prefix}/")
        page = await client.get(root.url.join(root.headers["location"]))
        unknown = await client.get(f"{prefix}/nothing")
        await ended()
    assert stored["__typename"] == "EnqueueJobSuccess"
    encoded = prefix.replace(" ", "%20")
    assert rest.headers["location"] == f"{encoded}/jobs/{rest.json()['jobId']}"
    assert job.json()["jobId"] == rest.json()["jobId"]
    assert ready.status_code == 200
    assert (root.status_code, page.url.path) == (307, f"{prefix}/graphql")
    assert f"{encoded}/graphql" in unknown.json()["error"]["message"]


@both_hosts
async def test_the_application_leaves_the_hosts_own_routes_alone(
    host: MakeHost, database_url: str, registry: JobRegistry
) -> None:
    """Its checks of hosts and origins, and its headers, are for what it serves."""
    settings = settings_of(database_url, cors_origins="https://app.example.com")
    app = host("/queue", create_app(settings, registry), joined=True)
    origin = {"origin": "https://app.example.com"}
    async with visiting(app, "http://shop.example.com") as client:
        hello = await client.get("/hello", headers=origin)
        refused = await client.post("/queue/jobs", json=PAYOUT, headers=origin)
    assert hello.status_code == 200
    assert "hello" in hello.text
    assert {"cache-control", "vary", "access-control-allow-origin"}.isdisjoint(hello.headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert "localhost" in refused.json()["error"]["message"]
    assert refused.headers["access-control-allow-origin"] == "https://app.example.com"
    assert refused.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
async def test_without_authentication_other_machines_are_refused(
    address: str, database_url: str, registry: JobRegistry
) -> None:
    """A host application may listen everywhere; `serve` then listens on this machine only."""
    app = fastapi_host("/queue", create_app(settings_of(database_url), registry), joined=True)
    async with visiting(app, client=address) as client:
        refused = await client.post("/queue/jobs", json=PAYOUT)
        hello = await client.get("/hello")
    assert (refused.status_code, hello.status_code) == (403, 200)
    assert "JOBS_AUTH_JWKS" in refused.json()["error"]["message"]


async def test_requests_that_come_together_start_the_application_once(database_url: str) -> None:
    starts = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[dict[str, Any]]:
        starts.append(1)
        await asyncio.sleep(0.1)
        yield {}

    jobs = create_app(settings_of(database_url), registry_with(lifespan), worker=True)
    async with visiting(fastapi_host("/queue", jobs)) as client:
        job = {"type": "test.nothing", "payload": {}}
        answers = await asyncio.gather(*(client.post("/queue/jobs", json=job) for _ in range(20)))
        await ended()
    assert {answer.status_code for answer in answers} == {201}
    assert starts == [1]


async def test_a_client_that_hangs_up_does_not_end_the_start_that_others_wait_for(
    database_url: str, registry: JobRegistry
) -> None:
    jobs = create_app(settings_of(database_url), registry)
    async with visiting(fastapi_host("/queue", jobs)) as client:
        first = asyncio.create_task(client.post("/queue/jobs", json=PAYOUT))
        second = asyncio.create_task(client.post("/queue/jobs", json=PAYOUT))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).status_code == 201
        await ended()


async def test_a_start_that_fails_is_a_503_and_the_next_request_tries_again(
    tmp_path: Path, registry: JobRegistry
) -> None:
    """The database is created at the start, in a folder that is not there yet."""
    jobs = create_app(settings_of(f"sqlite:///{tmp_path / 'later' / 'jobs.db'}"), registry)
    async with visiting(starlette_host("/queue", jobs)) as client:
        graphql = await client.post("/queue/graphql", json={"query": "{ __typename }"})
        rest = await client.post("/queue/jobs", json=PAYOUT)
        (tmp_path / "later").mkdir()
        later = await client.post("/queue/jobs", json=PAYOUT)
        await ended()
    assert (graphql.status_code, rest.status_code, later.status_code) == (503, 503, 201)
    assert graphql.json()["errors"][0]["extensions"]["code"] == "queue_unavailable"
    assert rest.json()["error"]["code"] == "queue_unavailable"
    assert int(rest.headers["retry-after"]) >= 1
    assert rest.headers["cache-control"] == "no-store"
    assert str(tmp_path) not in rest.text + graphql.text


@pytest.mark.parametrize("can_deny", [True, False])
async def test_a_websocket_is_refused_while_the_application_cannot_start(
    tmp_path: Path, registry: JobRegistry, can_deny: bool
) -> None:
    jobs = create_app(settings_of(f"sqlite:///{tmp_path / 'later' / 'jobs.db'}"), registry)
    scope = {
        "type": "websocket",
        "path": "/graphql",
        "query_string": b"",
        "headers": [],
        "subprotocols": ["graphql-transport-ws"],
        "extensions": {"websocket.http.response": {}} if can_deny else {},
    }
    sent: list[Any] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await jobs(scope, receive, send)
    if can_deny:
        assert sent[0]["status"] == 503
        assert (b"retry-after", b"1") in sent[0]["headers"]
        assert b"queue_unavailable" in sent[1]["body"]
    else:  # The server answers with 403.
        assert [each["type"] for each in sent] == ["websocket.close"]


async def test_a_worker_that_cannot_start_is_a_503_whose_reason_is_in_the_log(
    database_url: str,
) -> None:
    fails = True

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[dict[str, Any]]:
        if fails:
            raise OSError("the mail server's password")
        yield {}

    jobs = create_app(settings_of(database_url), registry_with(lifespan), worker=True)
    async with visiting(fastapi_host("/queue", jobs)) as client:
        with capture_logs() as logs:
            refused = await client.get("/queue/readyz")
        fails = False
        ready = await client.get("/queue/readyz")
        await ended()
    assert (refused.status_code, ready.status_code) == (503, 200)
    assert refused.json()["error"]["code"] == "not_running"
    assert "password" not in refused.text
    assert any(line.get("error_id", "?") in refused.text for line in logs)


async def test_the_log_says_why_an_application_could_not_start(
    database_url: str, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The module's own may be cached, with the processors of an earlier test.
    monkeypatch.setattr(application, "log", structlog.get_logger("job_registry.app"))
    settings = settings_of(database_url)
    await asyncio.to_thread(run_sql, database_url, NEWER)
    of_another_version = create_app(settings, registry)
    with_a_closed_queue = create_app(settings, queue=JobQueue.from_url(database_url, registry))
    for jobs, reason in (
        (of_another_version, "9001"),
        (with_a_closed_queue, "async with queue, jobs.running()"),
    ):
        async with visiting(fastapi_host("/queue", jobs)) as client:
            with capture_logs() as logs:
                refused = await client.get("/queue/readyz")
            await ended()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_running")
        (line,) = [line for line in logs if line["event"] == "app.start_failed"]
        assert reason in line["reason"]
        assert reason not in refused.text


async def test_after_its_host_has_ended_it_no_request_starts_it_again(
    database_url: str, registry: JobRegistry
) -> None:
    jobs = create_app(settings_of(database_url), registry)
    app = fastapi_host("/queue", jobs, joined=True)
    async with visiting(app) as client:
        assert (await client.post("/queue/jobs", json=PAYOUT)).status_code == 201
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        refused = await client.post("/queue/jobs", json=PAYOUT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_running")
    async with visiting(app) as client:  # As the next test of the host's own does.
        assert (await client.post("/queue/jobs", json=PAYOUT)).status_code == 201


async def test_joining_an_application_that_runs_is_an_error(
    database_url: str, registry: JobRegistry
) -> None:
    jobs = create_app(settings_of(database_url), registry)
    async with jobs.running():
        with pytest.raises(RuntimeError, match="running already"):
            async with jobs.running():
                pass


IDLE_SECONDS = 0.5
"""How long an application is left idle before its event loop ends. The garbage collector warns of a
connection to SQLite whose opening was cancelled."""


def test_the_end_of_the_event_loop_releases_leases_and_closes_connections(
    database_url: str,
) -> None:
    """`asyncio.run` cancels the tasks that are left, all at once."""
    started = threading.Event()

    class Sleep(Payload):
        """Sleep for a minute."""

    sleep = JobType(name="test.sleep", payload=Sleep)

    @sleep.handler
    async def handle(job: JobContext, payload: Sleep) -> None:
        started.set()
        await asyncio.sleep(60)

    registry = JobRegistry([sleep])
    jobs = create_app(settings_of(database_url), registry, worker=True)
    app = fastapi_host("/queue", jobs)

    async def visit() -> str:
        async with visiting(app) as client:
            job = {"type": "test.sleep", "payload": {}}
            answer = await client.post("/queue/jobs", json=job)
            await asyncio.to_thread(started.wait, 10)
        await asyncio.sleep(IDLE_SECONDS)
        job_id: str = answer.json()["jobId"]
        return job_id

    async def look(job_id: str) -> tuple[JobStatus, int]:
        async with JobQueue.from_url(database_url, registry) as queue:
            job = await queue.get(job_id)
            return job.status, job.attempt

    job_id = asyncio.run(visit())
    assert asyncio.run(look(job_id)) == (JobStatus.QUEUED, 0)


async def test_each_event_loop_starts_an_application_that_the_last_one_left_behind(
    database_url: str, registry: JobRegistry
) -> None:
    """As in tests of a host, each of which has a loop of its own."""
    jobs = create_app(settings_of(database_url), registry)
    app = fastapi_host("/queue", jobs)

    async def visit() -> int:
        async with visiting(app) as client:
            status = (await client.post("/queue/jobs", json=PAYOUT)).status_code
        await asyncio.sleep(IDLE_SECONDS)
        return status

    assert [await asyncio.to_thread(asyncio.run, visit()) for _ in range(2)] == [201, 201]


# The host's queue


async def test_an_open_queue_of_the_host_is_used_and_left_open(
    database_url: str, registry: JobRegistry
) -> None:
    async with JobQueue.from_url(database_url, registry) as queue:
        jobs = create_app(settings_of(database_url), queue=queue, worker=True)
        async with visiting(fastapi_host("/queue", jobs, joined=True)) as client:
            answer = await client.post("/queue/jobs", json=PAYOUT)
        assert jobs.state.queue is queue
        assert (await queue.get(answer.json()["jobId"])).type == "payout.execute"


async def test_a_queue_that_is_not_open_is_named_when_the_host_joins(
    database_url: str, registry: JobRegistry
) -> None:
    queue = JobQueue.from_url(database_url, registry)
    jobs = create_app(settings_of(database_url), queue=queue)
    with pytest.raises(RuntimeError, match="not open on this event loop"):
        async with jobs.running():
            pass
    await queue.close()


async def test_a_queue_and_a_registry_or_suggestions_that_the_settings_forbid_are_refused(
    database_url: str, registry: JobRegistry
) -> None:
    queue = JobQueue.from_url(database_url, registry)
    with pytest.raises(TypeError, match="either a queue or a registry"):
        create_app(settings_of(database_url), registry, queue=queue)
    with pytest.raises(SettingsInvalid, match="without_suggestions"):
        create_app(settings_of(database_url, production="true"), queue=queue)
    await queue.close()


async def test_without_arguments_the_settings_and_the_catalog_are_those_of_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBS_DATABASE_URL", f"sqlite:///{tmp_path / 'new.db'}")
    async with visiting(fastapi_host("/queue", create_app(), joined=True)) as client:
        assert (await client.post("/queue/jobs", json=PAYOUT)).status_code == 201
    assert (tmp_path / "new.db").exists()
