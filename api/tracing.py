"""Spans of OpenTelemetry: requests, operations over WebSockets, enqueues, and attempts of jobs.

The only module that imports OpenTelemetry, which is an optional requirement. So it is imported only
where tracing is configured. Names follow the semantic conventions for HTTP, GraphQL and messaging,
and no span has a payload, a result, or the message of an exception.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TextIO
from uuid import UUID

import structlog
from opentelemetry import context, trace
from opentelemetry.trace import Span, SpanContext, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from job_registry import CodedError
from job_registry.errors import shortened_text
from job_registry_api import logs

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider

SERVICE_NAME: Final = "job-registry"
"""The name of the service, unless a variable names it."""

CLOSE_SECONDS: Final = 1.0
"""How long the end of a process waits for the last spans to be sent. A collector may not answer,
and the SDK would wait for up to half a minute."""

SYSTEM: Final = "job_registry"

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})

Headers = Sequence[tuple[bytes, bytes]]

log = structlog.get_logger("job_registry.tracing")


class OpenSpan:
    """A span that has not ended."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        """The span as W3C Trace Context writes it; None if it has no identity."""
        return _traceparent_of(self._span.get_span_context())

    def answered(self, status: int) -> None:
        """Record the status of an HTTP answer."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.failed(str(status))

    def executes(self, operation_type: str) -> None:
        """Record that a GraphQL operation is a query, a mutation or a subscription."""
        self._span.update_name(operation_type)
        self._span.set_attribute("graphql.operation.type", operation_type)

    def sent(self, job_id: UUID) -> None:
        """Record the id of the job that was stored, or found by its idempotency key."""
        self._span.set_attribute("messaging.message.id", str(job_id))

    def ended_as(self, outcome: str, error_type: str | None = None) -> None:
        """Record the outcome of an attempt, and the code of its error. The last one counts."""
        self._span.set_attribute("job_registry.outcome", outcome)
        if error_type is not None:
            self.failed(error_type)

    def failed(self, error_type: str) -> None:
        """Mark the span as failed."""
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """End the span. A second call does nothing."""
        if self._span.is_recording():
            self._span.end()


class AttemptSpan(OpenSpan):
    """The span of an attempt. The rest of the task in which it was created belongs to it."""

    def __init__(self, span: Span, job_id: str) -> None:
        super().__init__(span)
        self._job_id = job_id
        # Not detached: the context ends with its task.
        context.attach(trace.set_span_in_context(span))
        _spans_of_jobs[job_id] = span.get_span_context()

    def forget(self) -> None:
        """End the span, and let no more log lines of the job name it."""
        self.end()
        _forget({self._job_id: self._span.get_span_context()})


class Tracing:
    """Creates the spans of a queue, its doors and its workers.

    A program hands it in, and all spans go to its own provider:

        queue = JobQueue.from_url(url, [mail_send], tracing=Tracing())

    `provider` defaults to the global one of OpenTelemetry.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        provider = trace.get_tracer_provider() if provider is None else provider
        self._tracer = provider.get_tracer("job_registry")
        logs.show_trace_ids(_ids_of)

    @contextmanager
    def serving(
        self, method: str, route: str, path: str, scheme: str, headers: Headers
    ) -> Iterator[OpenSpan]:
        """Trace a request as a part of the trace that its `traceparent` header names, if it names
        one."""
        named = method if method in _METHODS else "_OTHER"
        span = self._tracer.start_span(
            f"{'HTTP' if named == '_OTHER' else named} {route}",
            # Not the span of another request, whose task may have accepted the connection.
            _context_of_headers(headers) or context.Context(),
            SpanKind.SERVER,
            {
                "http.request.method": named,
                "http.route": route,
                "url.path": path,
                "url.scheme": scheme,
            },
        )
        with self._current(span):
            yield OpenSpan(span)

    @contextmanager
    def operating(
        self, path: str, named: Sequence[Mapping[str, Any]], handshake: Headers
    ) -> Iterator[OpenSpan]:
        """Trace a GraphQL operation that came over a WebSocket.

        It is a part of the trace that a `traceparent` names: that of the first JSON object in
        `named` that has a valid one, or else that of the handshake's headers. A host that traces
        the connection has read the handshake, so its span comes instead.
        """
        parent = next(filter(None, map(_context_in, named)), None)
        if parent is None and not self.is_traced_by_host():
            parent = _context_of_headers(handshake) or context.Context()
        span = self._tracer.start_span(
            "GraphQL Operation",
            parent,
            SpanKind.SERVER,
            {"network.protocol.name": "websocket", "url.path": path},
        )
        # The client ends a subscription, or hangs up: that cancels it.
        with self._current(span, expected=(asyncio.CancelledError,)):
            yield OpenSpan(span)

    @contextmanager
    def running(self, command: str, environment: Mapping[str, str]) -> Iterator[None]:
        """Trace a command, as a part of the trace that `TRACEPARENT` names, if it names one."""
        parent = _context_of(environment.get("TRACEPARENT"))
        span = self._tracer.start_span(command, parent, SpanKind.INTERNAL)
        with self._current(span):
            yield

    @contextmanager
    def sending(self, jobs: Mapping[UUID, str], *, is_batch: bool = False) -> Iterator[OpenSpan]:
        """Trace an enqueue of these jobs: their types by their ids."""
        types = set(jobs.values())
        name = types.pop() if len(types) == 1 else None
        attributes: dict[str, Any] = _operation("send", name)
        if is_batch:
            attributes["messaging.batch.message_count"] = len(jobs)
        span = self._tracer.start_span(
            f"send {name}" if name else "send", None, SpanKind.PRODUCER, attributes
        )
        ids = dict.fromkeys(map(str, jobs), span.get_span_context())
        _spans_of_jobs.update(ids)
        try:
            with self._current(span):
                yield OpenSpan(span)
        finally:
            _forget(ids)

    @contextmanager
    def named_in_lines(self, traceparents: Mapping[str, str | None]) -> Iterator[None]:
        """Let log lines of these jobs name the spans that enqueued them, by the ids of the jobs."""
        spans = {
            job_id: trace.get_current_span(found).get_span_context()
            for job_id, traceparent in traceparents.items()
            if job_id not in _spans_of_jobs and (found := _context_of(traceparent)) is not None
        }
        _spans_of_jobs.update(spans)
        try:
            yield
        finally:
            _forget(spans)

    def created(self, job_id: UUID, job_type: str, parent: str | None = None) -> str | None:
        """Trace that a handler enqueues a job, which is stored once its own job has succeeded.

        `parent` is the span that it runs in, unless that is the current one. Return the span.
        """
        span = self._tracer.start_span(
            f"create {job_type}",
            _context_of(parent),
            SpanKind.PRODUCER,
            {**_operation("create", job_type), "messaging.message.id": str(job_id)},
        )
        span.end()
        return _traceparent_of(span.get_span_context())

    def processing(
        self, job_id: str, job_type: str, *, attempt: int, worker_id: str | None, parent: str | None
    ) -> AttemptSpan:
        """Begin the span of an attempt. It is the current one of this task from now on.

        `parent` is the span that enqueued the job.
        """
        worker = {"messaging.client.id": worker_id or ""}
        kind = SpanKind.CONSUMER
        span = self._of_attempt("process", kind, job_id, job_type, attempt, parent, worker)
        return AttemptSpan(span, job_id)

    def recovered(
        self, job_id: str, job_type: str, *, attempt: int, outcome: str, parent: str | None
    ) -> None:
        """Trace that an attempt has ended because its lease expired: its worker has probably died,
        and the span of the attempt with it.

        `parent` is the span that enqueued the job.
        """
        span = self._of_attempt("settle", SpanKind.INTERNAL, job_id, job_type, attempt, parent)
        OpenSpan(span).ended_as(outcome, None if outcome == "cancelled" else outcome)
        span.end()

    def _of_attempt(
        self,
        operation: str,
        kind: SpanKind,
        job_id: str,
        job_type: str,
        attempt: int,
        parent: str | None,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Span:
        """Begin a span with the attributes of every span of an attempt, and `more`."""
        return self._tracer.start_span(
            f"{operation} {job_type}",
            _context_of(parent) or context.Context(),
            kind,
            {
                **_operation(operation, job_type),
                "messaging.message.id": job_id,
                "job_registry.attempt": attempt,
                **more,
            },
        )

    @contextmanager
    def within(self, traceparent: str | None) -> Iterator[None]:
        """Let what happens in this context belong to a span of another process."""
        token = context.attach(_context_of(traceparent) or context.get_current())
        try:
            yield
        finally:
            context.detach(token)

    def current(self) -> str | None:
        """Return the current span as W3C Trace Context writes it; None if there is none."""
        return _traceparent_of(trace.get_current_span().get_span_context())

    def is_traced_by_host(self) -> bool:
        """Return whether a host has begun a span for this request.

        One of ours is that of the request before: a server may start the task of a request in the
        context of the last one on the connection.
        """
        is_ours = context.get_value(_OURS) is not None
        return not is_ours and trace.get_current_span().get_span_context().is_valid

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Do nothing: a program's own provider is closed by the program."""

    @contextmanager
    def _current(
        self, span: Span, *, expected: tuple[type[BaseException], ...] = ()
    ) -> Iterator[None]:
        """Let a span be the current one, and end it. It records the type of an exception that is
        not expected."""
        token = context.attach(context.set_value(_OURS, True, trace.set_span_in_context(span)))
        try:
            yield
        except expected:
            raise
        except BaseException as error:
            OpenSpan(span).failed(_type_of(error))
            raise
        finally:
            context.detach(token)
            span.end()


class ExportedTracing(Tracing):
    """Tracing of a command: its provider, which becomes the global one, exports all spans.

    `exporters` are names: `otlp`, or `console`, which prints on `console`. If the program around
    the command has set a provider of its own, such as that of `opentelemetry-instrument`, this one
    is used instead.

    Raises:
        ImportError: the SDK or an exporter is not installed.
        ValueError: a variable of the SDK is wrong.
    """

    def __init__(self, exporters: Sequence[str], *, console: TextIO | None = None) -> None:
        self._provider = _sdk_provider(exporters, sys.stdout if console is None else console)
        super().__init__(self._provider)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send the last spans, for so many seconds at most. Further spans are dropped."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(seconds)
        if closing.is_alive():
            log.warning("tracing.spans_lost", reason="the last spans were not sent in time")


def _sdk_provider(exporters: Sequence[str], console: TextIO) -> SdkTracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Exporter(SpanExporter):
        """Logs the first failure of an outage, and its end. The SDK would log each failure."""

        def __init__(self, exporter: SpanExporter, name: str) -> None:
            self._exporter = exporter
            self._name = name
            self._is_failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            _last_words.text = ""
            try:
                result, reason = self._exporter.export(spans), _last_words.text
            except Exception as error:
                result, reason = SpanExportResult.FAILURE, type(error).__name__
            has_failed = result is not SpanExportResult.SUCCESS
            if has_failed and not self._is_failing:
                reason = shortened_text(reason, 200)
                log.warning("tracing.export_failed", exporter=self._name, reason=reason)
            elif self._is_failing and not has_failed:
                log.info("tracing.export_recovered", exporter=self._name)
            self._is_failing = has_failed
            return result

        def shutdown(self) -> None:
            self._exporter.shutdown()

    before = trace.get_tracer_provider()
    if isinstance(before, SdkTracerProvider):
        return before
    resource = Resource.create()
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    # Not at the exit of the interpreter, which would wait for the SDK's own timeout.
    provider = SdkTracerProvider(resource=resource, shutdown_on_exit=False)
    for name in exporters:
        provider.add_span_processor(BatchSpanProcessor(Exporter(_EXPORTERS[name](console), name)))
    _keep_quiet()
    trace.set_tracer_provider(provider)
    return provider


def _otlp(_console: TextIO) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _console(console: TextIO) -> Any:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    return ConsoleSpanExporter(out=console)


_EXPORTERS: Final[Mapping[str, Callable[[TextIO], Any]]] = {"otlp": _otlp, "console": _console}


class _LastWords(logging.Handler):
    """Keeps what an exporter has logged last: the reason of a failure, which it does not return."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


_last_words: Final = _LastWords()


def _keep_quiet() -> None:
    """Log no failures of the SDK and its exporters: `tracing.export_failed` stands for them."""
    exporters = logging.getLogger("opentelemetry.exporter")
    exporters.propagate = False
    exporters.addHandler(_last_words)
    # It says for each span that the queue is full.
    logging.getLogger("opentelemetry.sdk").setLevel(logging.ERROR)


_OURS: Final = context.create_key("job_registry")
"""Marks the contexts of our spans."""

_propagator: Final = TraceContextTextMapPropagator()

_spans_of_jobs: Final[dict[str, SpanContext]] = {}
"""The spans of the jobs that are being enqueued or run in this process, by the ids of the jobs.

Log lines of jobs are written where their calls share a statement, outside their contexts.
"""


def _forget(spans: Mapping[str, SpanContext]) -> None:
    """Forget spans of jobs. A worker in the process may have begun the next span of a job."""
    for job_id, span in spans.items():
        if _spans_of_jobs.get(job_id) is span:
            del _spans_of_jobs[job_id]


def _ids_of(job_id: object) -> Mapping[str, str]:
    """Return the ids that a log line shows: of the span of its job, or of the current span."""
    span = _spans_of_jobs.get(job_id) if isinstance(job_id, str) else None
    if span is None:
        span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return {}
    return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}


def _traceparent_of(span: SpanContext) -> str | None:
    if not span.is_valid:
        return None
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}"


def _context_of(traceparent: str | None) -> Context | None:
    """Return a context with this span of another process; None if it is not a valid one."""
    if traceparent is None:
        return None
    found = _propagator.extract({"traceparent": traceparent}, context.Context())
    return found if trace.get_current_span(found).get_span_context().is_valid else None


def _context_of_headers(headers: Headers) -> Context | None:
    """Return the context that a `traceparent` header names; None if there is not exactly one."""
    values = [value for name, value in headers if name == b"traceparent"]
    return _context_of(values[0].decode("latin-1")) if len(values) == 1 else None


def _context_in(named: Mapping[str, Any]) -> Context | None:
    """Return the context that the `traceparent` of a JSON object names."""
    traceparent = named.get("traceparent")
    return _context_of(traceparent) if isinstance(traceparent, str) else None


def _operation(name: str, job_type: str | None) -> dict[str, Any]:
    """Return the attributes of an operation, whose name is also its type."""
    attributes = {
        "messaging.system": SYSTEM,
        "messaging.operation.name": name,
        "messaging.operation.type": name,
    }
    if job_type is not None:
        attributes["messaging.destination.name"] = job_type
    return attributes


def _type_of(error: BaseException) -> str:
    """Return the code of an error, or the name of its class."""
    if isinstance(error, CodedError):
        return error.code
    return f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
