"""Tracing of the commands by the variables of OpenTelemetry: what a collector gets, and when."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from job_registry_api.settings import SettingsInvalid
from job_registry_api.tracing import CLOSE_SECONDS
from job_registry_api.tracing_settings import configured_tracing, traces_exporters
from tests import CODE
from tests.collector import Collector, Sent, collecting
from tests.conftest import run_sql
from tests.forks import Command, run
from tests.postgresql_server import free_port

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
SECRET = "not for a span"
SOON = 10.0
"""What a busy machine may need beside what is promised. The SDK alone would wait for 30 seconds."""


class Served:
    """A `job-registry` that runs: its address, and the lines of its log so far."""

    def __init__(self, process: Command, url: str) -> None:
        self.process = process
        self.client = httpx.Client(base_url=url, timeout=20)
        self.lines: list[dict[str, Any]] = []
        self.others: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.lines.append(json.loads(line))
            else:
                self.others.append(line)

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def enqueue(self, kind: str, act: str = "", **headers: str) -> str:
        body = {"type": kind, "payload": {"act": act, "note": SECRET}}
        answer = self.client.post("/jobs", json=body, headers=headers)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["jobId"])

    def run(self, kind: str, act: str = "", **headers: str) -> Any:
        """Run a job to its end."""
        job_id = self.enqueue(kind, act, **headers)
        return until(lambda: self._ended(job_id))

    def _ended(self, job_id: str) -> Any:
        job = self.client.get(f"/jobs/{job_id}").json()
        return job if job["status"] in ("succeeded", "failed") else None

    def end(self) -> float:
        """End it with SIGTERM. Return how many seconds that took."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(40) == 0
        took = time.monotonic() - began
        self._reading.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return took


@contextmanager
def serving(url: str, *options: str, **variables: str) -> Iterator[Served]:
    """Run `serve` with these variables of OpenTelemetry until the context is left."""
    environment = {
        **os.environ,
        "JOBS_DATABASE_URL": url,
        "JOBS_CATALOG": "tests.traced_jobs",
        "JOBS_LOG_LEVEL": "info",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        **variables,
    }
    process = Command(["serve", "--port", "0", *options], environment=environment)
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"http://\S+(?=/graphql)", said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    served = Served(process, found[0])
    try:
        yield served
    finally:
        served.client.close()
        if process.poll() is None:
            served.end()


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up, "it has not come true"
        time.sleep(0.02)
    return value


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["traced.loop", "traced.thread", "traced.process"])
def test_a_collector_gets_one_trace_with_the_spans_of_the_handler(
    database_url: str, collector: Collector, kind: str
) -> None:
    with serving(database_url, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as served:
        job = served.run(kind, "fail once", **TRACEPARENT)
        served.end()
    assert job["result"] == TRACE

    def in_trace(name: str) -> list[Sent]:
        return [span for span in collector.named(name) if span.trace == TRACE]

    (request,), (sent,) = in_trace("POST /jobs"), in_trace(f"send {kind}")
    attempts = in_trace(f"process {kind}")
    by_outcome = {span.attributes["job_registry.outcome"]: span for span in attempts}
    assert (request.parent, request.kind, request.service) == (SPAN, "SERVER", "job-registry")
    assert (sent.parent, sent.kind) == (request.id, "PRODUCER")
    assert {(span.parent, span.kind) for span in attempts} == {(sent.id, "CONSUMER")}
    assert by_outcome.keys() == {"failed", "succeeded"}
    assert [span.parent for span in in_trace("inner")].count(by_outcome["succeeded"].id) == 1
    # The SDK records the exception on the span that the handler has made itself.
    ours = [span for span in collector.spans if span.name != "inner"]
    assert SECRET not in str(ours)


@pytest.mark.slow
def test_the_lines_of_a_process_of_handlers_name_the_span(
    database_url: str, collector: Collector
) -> None:
    with serving(database_url, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as served:
        served.run("traced.process", **TRACEPARENT)
        served.end()
    acting = served.logged("acting")
    assert [line["trace_id"] for line in acting] == [TRACE, TRACE]
    assert {line["span_id"] for line in acting} == {collector.one("inner").id}


@pytest.mark.slow
def test_every_process_of_serve_exports_its_spans(database_url: str, collector: Collector) -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_SERVICE_NAME": "shop"}
    with serving(database_url, "--processes", "2", **given) as served:
        for _ in range(20):
            with httpx.Client(base_url=served.client.base_url) as client:
                body = {"type": "traced.process", "payload": {}}
                assert client.post("/jobs", json=body).status_code == 201
        until(lambda: len(collector.named("process traced.process")) == 20, 60)
        served.end()
    for name in ("POST /jobs", "send traced.process", "inner"):
        assert len(collector.named(name)) == 20
    assert {span.service for span in collector.spans} == {"shop"}


@pytest.mark.slow
def test_the_last_spans_are_sent_when_a_process_ends(
    database_url: str, collector: Collector
) -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
    with serving(database_url, **given) as served:
        served.run("traced.process")
        assert collector.spans == []
        took = served.end()
    assert len(collector.named("process traced.process")) == 1
    assert len(collector.named("inner")) == 1
    assert took < CLOSE_SECONDS + SOON


@pytest.mark.slow
def test_a_collector_that_never_answers_delays_no_request_no_job_and_no_shutdown(
    database_url: str, collector: Collector
) -> None:
    collector.stalls = True
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_MAX_QUEUE_SIZE": "20"}
    given |= {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10", "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
    with serving(database_url, **given) as served:
        served.run("traced.process")
        until(lambda: collector.requests)
        began = time.monotonic()
        for _ in range(30):
            served.enqueue("traced.loop")
        assert served.run("traced.loop")["status"] == "succeeded"
        assert time.monotonic() - began < 2 * SOON
        took = served.end()
    assert took < CLOSE_SECONDS + SOON
    # One of the server, and one of the process of the handler.
    assert len(served.logged("tracing.spans_lost")) == 2
    assert served.others == []
    assert not [line for line in served.lines if "exception" in line]


@pytest.mark.slow
def test_an_outage_of_the_collector_is_logged_once_and_so_is_its_end(database_url: str) -> None:
    port = free_port()
    given = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}/v1/traces",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2",
    }
    with serving(database_url, **given) as served:
        for _ in range(4):
            served.run("traced.loop")
            time.sleep(0.4)
        (failed,) = until(lambda: served.logged("tracing.export_failed"))
        assert failed["level"] == "warning"
        assert failed["reason"]
        with collecting(port) as collector:
            served.run("traced.loop")
            until(lambda: served.logged("tracing.export_recovered"))
            served.run("traced.loop")
            until(lambda: len(collector.named("process traced.loop")) >= 2)
            served.end()
    assert len(served.logged("tracing.export_failed")) == 1
    assert len(served.logged("tracing.export_recovered")) == 1
    assert served.others == []
    assert not [line for line in served.lines if "opentelemetry" in line.get("logger", "")]


@pytest.mark.slow
def test_a_collector_that_refuses_spans_is_an_outage(
    database_url: str, collector: Collector
) -> None:
    collector.fails = True
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2"}
    with serving(database_url, **given) as served:
        served.run("traced.loop")
        (failed,) = until(lambda: served.logged("tracing.export_failed"))
        assert "timeout" in failed["reason"]


@pytest.mark.slow
def test_a_worker_by_itself_exports_its_spans(
    database_url: str, collector: Collector, tmp_path: Path
) -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    environment = {
        **os.environ,
        **given,
        "JOBS_DATABASE_URL": database_url,
        "JOBS_CATALOG": "tests.traced_jobs",
    }
    with serving(database_url, "--no-worker", **given) as served:
        worker = Command(["worker"], environment=environment)
        try:
            served.run("traced.thread", **TRACEPARENT)
        finally:
            worker.terminate()
            worker.communicate(20)
    assert worker.returncode == 0
    assert collector.one("process traced.thread").parent == collector.one("send traced.thread").id


@pytest.mark.slow
def test_without_a_variable_nothing_of_opentelemetry_is_imported(sqlite_template: Path) -> None:
    program = """
import asyncio, sys, httpx
from job_registry_api import JobQueue, Worker, create_app, load_settings
from job_registry_api.cli import serve, startup, worker
from job_registry import EnqueueRequest
assert startup.read_tracing() is None

async def run():
    app = create_app(load_settings(), worker=True)
    async with app.running(), httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        body = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
        for path in ("/jobs", "/graphql"):
            await client.post("http://localhost" + path, json=body)
asyncio.run(run())
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    environment = {name: value for name, value in os.environ.items() if "OTEL" not in name}
    environment |= {"PYTHONPATH": CODE, "JOBS_DATABASE_URL": f"sqlite:///{sqlite_template}.copy"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


WRONG = [
    ({"OTEL_TRACES_EXPORTER": "zipkin"}, 'OTEL_TRACES_EXPORTER: got "zipkin"; expected otlp,'),
    ({"OTEL_TRACES_EXPORTER": "otlp,jaeger"}, 'OTEL_TRACES_EXPORTER: got "jaeger"'),
    (
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        'OTEL_EXPORTER_OTLP_PROTOCOL: got "grpc"; spans are sent by http/protobuf alone',
    ),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT: expected a"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:b:c"}, "OTEL_EXPORTER_OTLP_ENDPOINT: expected a"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "ftp://collector"}, "OTEL_EXPORTER_OTLP_ENDPOINT: expected a"),
]


@pytest.mark.parametrize(("variables", "message"), WRONG)
def test_a_variable_that_is_wrong_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsInvalid, match=re.escape(message)):
        configured_tracing(variables)


NAMED: list[tuple[dict[str, str], list[str]]] = [
    ({}, []),
    ({"OTEL_TRACES_EXPORTER": ""}, []),
    ({"OTEL_TRACES_EXPORTER": "none"}, []),
    ({"OTEL_TRACES_EXPORTER": "console"}, ["console"]),
    ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["otlp", "console"]),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, ["otlp"]),
    ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/v1/traces"}, ["otlp"]),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost", "OTEL_TRACES_EXPORTER": "none"}, []),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost", "OTEL_SDK_DISABLED": "True"}, []),
    ({"OTEL_SERVICE_NAME": "shop", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://a"}, []),
]


@pytest.mark.parametrize(("variables", "exporters"), NAMED)
def test_variables_name_the_exporters(variables: dict[str, str], exporters: list[str]) -> None:
    assert traces_exporters(variables) == exporters


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, 'OTEL_TRACES_EXPORTER: got "zipkin"'),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"},
            "OTEL_*: the SDK of OpenTelemetry refuses them: max_queue_size must be a positive",
        ),
    ],
)
def test_a_command_with_a_wrong_variable_does_not_start(
    sqlite_template: Path, command: str, variables: dict[str, str], message: str
) -> None:
    given = {"JOBS_DATABASE_URL": f"sqlite:///{sqlite_template}", "JOBS_PORT": "0", **variables}
    process = Command([command], environment={**os.environ, **given})
    _, said = process.communicate(40)
    assert process.returncode == 2
    assert "These settings are wrong:" in said
    assert message in said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_command_without_the_packages_names_the_extra(
    sqlite_template: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry/__init__.py").write_text("raise ImportError", "utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), CODE]),
        "JOBS_DATABASE_URL": f"sqlite:///{sqlite_template}",
        "JOBS_PORT": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318",
    }
    done = subprocess.run(
        [sys.executable, "-m", "job_registry_api.cli", command],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: tracing needs packages" in done.stderr
    assert "job-registry[otel]" in done.stderr
    assert "Traceback" not in done.stderr


def test_requests_that_are_sent_at_once_on_a_connection_are_traces_of_their_own(
    database_url: str, collector: Collector
) -> None:
    traces = [f"{number:032x}" for number in range(1, 4)]
    body = b'{"type": "traced.plain", "payload": {}}'
    with serving(database_url, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as served:
        address = (served.client.base_url.host, served.client.base_url.port)
        with socket.create_connection(address, timeout=20) as connection:
            for trace in traces:
                headers = (
                    "POST /jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\ntraceparent: 00-{trace}-{SPAN}-01\r\n\r\n"
                )
                connection.sendall(headers.encode() + body)
            answers = b""
            while answers.count(b"HTTP/1.1 201") < len(traces):
                answers += connection.recv(65_536)
        served.end()
    for name in ("POST /jobs", "send traced.plain"):
        assert [span.trace for span in collector.named(name)] == traces


def test_operations_over_a_websocket_are_exported(database_url: str, collector: Collector) -> None:
    query = """mutation { enqueueJob(input: {type: "traced.loop", payload: {}}) {
      __typename } }"""
    operation = {"query": query, "extensions": TRACEPARENT}
    with serving(database_url, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as served:
        address = f"ws://{served.client.base_url.netloc.decode()}/graphql"
        with connect(address, subprotocols=[Subprotocol("graphql-transport-ws")]) as socket:
            for message in (
                {"type": "connection_init"},
                {"type": "subscribe", "id": "1", "payload": operation},
            ):
                socket.send(json.dumps(message))
            answered = [json.loads(socket.recv(20))["type"] for _ in range(3)]
        until(lambda: collector.named("process traced.loop"))
        served.end()
    assert answered == ["connection_ack", "next", "complete"]
    operation_span, sent = collector.one("mutation"), collector.one("send traced.loop")
    assert (operation_span.trace, operation_span.parent) == (TRACE, SPAN)
    assert sent.parent == operation_span.id
    assert collector.one("process traced.loop").parent == sent.id


def enqueue(url: str, folder: Path, variables: dict[str, str], lines: int = 1) -> tuple[str, str]:
    """Run `job-registry enqueue`. Return what it prints on standard output and standard error."""
    file = folder / "payloads.jsonl"
    file.write_text("{}\n" * lines, "utf-8")
    given = {"JOBS_DATABASE_URL": url, "JOBS_CATALOG": "tests.traced_jobs", **variables}
    environment = {**os.environ, **given}
    arguments = ["enqueue", "traced.plain", str(file)]
    done = run(arguments, environment=environment, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_jobs_of_the_command_join_the_trace_of_its_environment(
    database_url: str, collector: Collector, tmp_path: Path
) -> None:
    named = {name.upper(): value for name, value in TRACEPARENT.items()}
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, **named}
    out, said = enqueue(database_url, tmp_path, given, 1_500)
    assert (out, said) == ("1,500 stored, 0 deduplicated, 0 refused\n", "")
    command = collector.one("job-registry enqueue")
    sent = collector.named("send traced.plain")
    assert (command.trace, command.parent, command.kind) == (TRACE, SPAN, "INTERNAL")
    assert {span.parent for span in sent} == {command.id}
    stored = {row[0] for row in run_sql(database_url, "SELECT DISTINCT traceparent FROM job")}
    assert stored == {f"00-{TRACE}-{span.id}-01" for span in sent}


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "", "not one"])
def test_the_command_without_a_trace_in_its_environment_begins_one(
    database_url: str, collector: Collector, tmp_path: Path, value: str | None
) -> None:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    given |= {} if value is None else {"TRACEPARENT": value}
    enqueue(database_url, tmp_path, given)
    command, sent = collector.one("job-registry enqueue"), collector.one("send traced.plain")
    assert not command.parent
    assert (sent.trace, sent.parent) == (command.trace, command.id)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"}],
)
def test_the_command_stores_jobs_where_tracing_cannot_be_configured(
    database_url: str, tmp_path: Path, variables: dict[str, str]
) -> None:
    """The variables may be meant for other programs of the machine."""
    given = {"TRACEPARENT": TRACEPARENT["traceparent"]}
    out, said = enqueue(database_url, tmp_path, variables | given)
    assert out.endswith(" queued\n")
    assert "tracing.not_configured" in said
    assert next(iter(variables)) in said
    assert run_sql(database_url, "SELECT traceparent FROM job") == [(None,)]


@pytest.mark.slow
def test_the_command_prints_its_spans_on_standard_error(database_url: str, tmp_path: Path) -> None:
    out, said = enqueue(database_url, tmp_path, {"OTEL_TRACES_EXPORTER": "console"})
    assert out.endswith(" queued\n")
    assert out.count("\n") == 1
    assert '"name": "job-registry enqueue"' in said


CONSOLE = """
import os, uuid
from job_registry_api.tracing_settings import configured_tracing
{setup}
tracing = configured_tracing({{"OTEL_TRACES_EXPORTER": "console"}})
with tracing.sending({{uuid.uuid4(): "mail.send"}}):
    pass
tracing.close()
"""
OWN_PROVIDER = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
provider = TracerProvider()
exporter = ConsoleSpanExporter(formatter=lambda span: "theirs: " + span.name)
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
"""


def printed(program: str) -> str:
    environment = {name: value for name, value in os.environ.items() if "OTEL" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": CODE},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_spans_can_be_printed() -> None:
    span = json.loads(printed(CONSOLE.format(setup="")))
    assert span["name"] == "send mail.send"
    assert span["resource"]["attributes"]["service.name"] == "job-registry"


def test_a_provider_that_the_program_has_set_is_used_instead() -> None:
    assert printed(CONSOLE.format(setup=OWN_PROVIDER)) == "theirs: send mail.send"
