"""The process in which handlers with `run_in="process"` run, one at a time.

The worker sends frames of JSON over a socket: `start` once, `run` for each job, `cancel`, and
`leave`. The process answers `ready` or `failed` once, and `begun`, `progress`, `logged`,
`follow_up` and `ended` per job, and `limited` if its type has a memory limit.
When the socket closes, the process kills its process group, which includes all processes that the
handlers have started. The watchdog of the worker does so too, because no thread notices that the
socket is closed while a handler holds the interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
from pydantic import JsonValue
from pydantic_core import from_json, to_json
from uuid_utils.compat import uuid7

from job_registry import DefinitionError, JobContext, JobType, Payload, WorkerExtension
from job_registry.context import State
from job_registry.discovery import import_from
from job_registry.job_type import is_async
from job_registry.payload import document_of
from job_registry_api.logs import configure_logs, log_unexpected, use_standard_logging
from job_registry_api.shutdown import default_signals_in_forks
from job_registry_api.worker.extensions import WorkerStartError, lifespans
from job_registry_api.worker.job_log import JobLog, Sender
from job_registry_api.worker.memory_limit import MemoryLimit
from job_registry_api.worker.outcomes import (
    End,
    MemoryExceeded,
    NotStarted,
    Raised,
    end_as_json,
    end_of,
)
from job_registry_api.worker.progress import Progress
from job_registry_api.worker.running import HandlerCall, tasks_of_handlers_contained

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

HEADER: Final = struct.Struct("!I")
"""The header of each frame: the number of bytes that follow."""

CUT_OFF: Final = 74
"""The exit code of a process that cannot report to its worker: EX_IOERR of sysexits.h."""

SPANS_SECONDS: Final = 0.5
"""How long the last spans may take to be sent. The worker kills the process after a second."""

ENDED: Final = "the handler of this job has ended, so it cannot enqueue a job"

_STANDARD_ERROR: Final = 2

_MOST_DESCRIPTORS: Final = 4096
"""Above this, descriptors are not looked for one by one. New ones get the lowest free numbers."""


def frame(message: dict[str, Any]) -> bytes:
    body = to_json(message)
    return HEADER.pack(len(body)) + body


def main(descriptor: int) -> None:
    """Run jobs for the worker at the other end of this socket until it sends `leave`."""
    link = _Link(socket.socket(fileno=descriptor))
    link.socket.set_inheritable(False)
    os.register_at_fork(after_in_child=lambda: _replace(descriptor))
    default_signals_in_forks()
    start = link.receive()
    if start is None:
        return
    if isinstance(sys.stdout, TextIOWrapper):
        # As in the worker: see `Output`.
        sys.stdout.reconfigure(errors="backslashreplace")
    if start["logs"] is not None:
        configure_logs(*start["logs"])
    else:
        use_standard_logging()
    tracing = _tracing() if start["traced"] else None
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_serve(link, start, tracing))
    except WorkerStartError as error:
        log_unexpected("handler process", error)
        link.send({"failed": str(error)})
    except DefinitionError as error:
        link.send({"failed": f"The handler's process cannot load its job types: {error}"})
    finally:
        if tracing is not None:
            tracing.close(SPANS_SECONDS)


def _tracing() -> Tracing:
    """Return tracing by the variables of OpenTelemetry, or by what the lifespans set up.

    A worker that was handed its tracing may have variables that are not for this process.
    """
    from job_registry_api.settings import SettingsInvalid
    from job_registry_api.tracing import Tracing
    from job_registry_api.tracing_settings import configured_tracing

    try:
        return configured_tracing(os.environ) or Tracing()
    except SettingsInvalid as invalid:
        structlog.get_logger("job_registry.worker").warning(
            "tracing.not_configured", reason=str(invalid)
        )
        return Tracing()


def _replace(descriptor: int) -> None:
    """Replace the socket in a forked child, so that it closes when the parent ends.

    Replaced, not closed, because the objects that use the socket are copied too.
    """
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def job_type_at(address: str, name: str, handler_module: str | None) -> JobType[Any]:
    """Import the job type of this name from an address, and its handler from `handler_module`.

    Raises:
        DefinitionError: the job type is not there, or has no handler.
    """
    if handler_module is not None:
        # A handler may be in another module than its job type.
        import_from(f"{handler_module}:__name__")
    found = import_from(address)
    candidates = found if isinstance(found, list | tuple) else [found]
    for each in candidates:
        if isinstance(each, JobType) and each.name == name:
            if each.run is None:
                raise DefinitionError(f"{address}: {name} has no handler once this is imported")
            return each
    raise DefinitionError(f"{address}: this is not the job type {name}")


def address_of_class(payload: type[Payload]) -> str:
    """Return the name by which a worker and its processes know a class of payloads."""
    return f"{payload.__module__}:{payload.__qualname__}"


class _Link:
    """The socket to the worker. One thread reads it, any thread may write to it."""

    def __init__(self, to_worker: socket.socket) -> None:
        # It is non-blocking if the program of the worker has called `socket.setdefaulttimeout`.
        to_worker.setblocking(True)
        self.socket = to_worker
        self._reader = to_worker.makefile("rb")
        self._lock = threading.Lock()

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None once the worker has ended."""
        try:
            header = self._reader.read(HEADER.size)
            if len(header) < HEADER.size:
                return None
            body = self._reader.read(HEADER.unpack(header)[0])
        except OSError:
            return None
        return cast(dict[str, Any], from_json(body))

    def send(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(frame(message))


class _Descriptors:
    """The file descriptors that this process works with: its socket, and those of its event loop.

    A handler can close them, for example when it closes all descriptors that it did not open. That
    raises no error: the event loop then waits without end, and what is sent is lost, or written to
    a file of the handler with the same descriptor.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._identities = {
            descriptor: identity
            for descriptor in _numbers_of_open()
            if descriptor > _STANDARD_ERROR and (identity := _identity(descriptor)) is not None
        }

    def checked_after(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Return the handler, after which the process ends if one of them is no longer open."""
        if is_async(handler):

            @functools.wraps(handler)
            async def checked(*arguments: Any) -> Any:
                try:
                    return await handler(*arguments)
                finally:
                    self._check()
        else:

            @functools.wraps(handler)
            def checked(*arguments: Any) -> Any:
                try:
                    return handler(*arguments)
                finally:
                    self._check()

        return checked

    def _check(self) -> None:
        # A forked child that continues as the handler has no link, and reports nothing.
        if os.getpid() == self._process and any(
            _identity(descriptor) != identity for descriptor, identity in self._identities.items()
        ):
            os._exit(CUT_OFF)


def _numbers_of_open() -> Iterable[int]:
    """Return the numbers of the open file descriptors, and of others on a system without /proc."""
    try:
        return [int(path.name) for path in Path("/dev/fd").iterdir()]
    except OSError:
        return range(_MOST_DESCRIPTORS)


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Return what a file descriptor refers to; None if it is closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Current:
    """The running job, for the thread that receives its cancellation."""

    def __init__(self) -> None:
        self.number = 0
        self.cancelled = threading.Event()
        self.request_stop: Callable[[], None] | None = None


async def _serve(link: _Link, start: dict[str, Any], tracing: Tracing | None) -> None:
    loop = asyncio.get_running_loop()
    jobs: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    current = _Current()
    arguments = (link, loop, jobs, current)
    threading.Thread(target=_listen, args=arguments, name="worker-link", daemon=True).start()
    descriptors = _Descriptors()
    extensions: list[WorkerExtension] = [import_from(each) for each in start["extensions"]]
    middleware = [each for extension in extensions for each in extension.middleware]
    async with lifespans(extensions) as state:
        memory = MemoryLimit()
        link.send({"ready": True})
        with tasks_of_handlers_contained():
            while (run := await jobs.get()) is not None:
                end = await _run(
                    link, descriptors, run, current, start, middleware, state, memory, tracing
                )
                link.send(
                    {
                        "ended": run["number"],
                        "left_over": memory.left_over,
                        "end": end_as_json(end),
                    }
                )


async def _run(
    link: _Link,
    descriptors: _Descriptors,
    run: dict[str, Any],
    current: _Current,
    start: dict[str, Any],
    middleware: list[Any],
    state: State,
    memory: MemoryLimit,
    tracing: Tracing | None,
) -> End:
    job = run["job"]
    log = structlog.get_logger("job_registry.handler").bind(
        job_id=job["id"], type=job["type"], attempt=job["attempt"]
    )
    try:
        with memory.importing():
            job_type = job_type_at(run["address"], job["type"], run["handler_module"])
        payload = job_type.read(to_json(run["payload"]))
    except Exception as error:
        return NotStarted(f"The handler's process cannot load it: {error}")

    def pass_on(text: bytes) -> None:
        link.send({"progress": run["number"], "text": text.decode()})

    lines = Sender(lambda line: link.send({"logged": run["number"], "line": line.decode()}))
    follow_ups = _FollowUps(link, run["number"], tracing)
    progress = Progress(pass_on, lambda: log, max_bytes=start["max_bytes"])
    deadline = time.monotonic() + run["seconds_left"]
    began = deadline - job["timeout_seconds"]
    context = JobContext(
        **job,
        assets=start["assets"],
        state=state,
        log=JobLog(lambda: log, lines, began),
        _report=progress.report,
        _enqueue=follow_ups.enqueue,
        _cancelled=current.cancelled.is_set,
        _deadline=deadline,
    )
    handler, limit_mb = job_type.run, job_type.memory_limit_mb
    assert handler is not None  # Checked by job_type_at.
    if limit_mb is not None and memory.idle is not None:
        handler = memory.around(handler, limit_mb)
        link.send({"limited": run["number"], "near": memory.near})
    belonging = contextlib.nullcontext() if tracing is None else tracing.within(run["traceparent"])
    with belonging:
        call = HandlerCall(
            descriptors.checked_after(handler),
            context,
            payload,
            # In a thread, as in a worker: a plain function may run an event loop itself.
            in_thread=not is_async(job_type.run),
            middleware=middleware,
            max_bytes=start["max_bytes"],
        )
    current.request_stop = call.request_stop
    if current.cancelled.is_set():
        call.request_stop()
    await asyncio.wait({call.ended})
    follow_ups.end()
    lines.flush()
    current.request_stop = None
    memory.lift()
    end = end_of(call.ended)
    if limit_mb is not None and isinstance(end, Raised) and end.kind == "error":
        return MemoryExceeded(limit_mb, end.traceback) if end.out_of_memory else end
    return end


class _FollowUps:
    """Sends the jobs that a handler enqueues to the worker, until the handler has ended."""

    def __init__(self, link: _Link, number: int, tracing: Tracing | None) -> None:
        self._link = link
        self._number = number
        self._tracing = tracing
        self._lock = threading.Lock()
        self._has_ended = False

    def enqueue(self, payload: Payload, **options: Any) -> str:
        if (at := options["schedule_at"]) is not None:
            options["schedule_at"] = at.isoformat()
        job_id = str(uuid7())
        sent = {
            "id": job_id,
            "class": address_of_class(type(payload)),
            "payload": document_of(payload),
            "options": options,
            "traceparent": None if self._tracing is None else self._tracing.current(),
        }
        # Before the message that the handler has ended, or not at all.
        with self._lock:
            if self._has_ended:
                raise RuntimeError(ENDED)
            self._link.send({"follow_up": self._number, "job": sent})
        return job_id

    def end(self) -> None:
        with self._lock:
            self._has_ended = True


def _listen(
    link: _Link,
    loop: asyncio.AbstractEventLoop,
    jobs: asyncio.Queue[dict[str, Any] | None],
    current: _Current,
) -> None:
    """Receive the messages of the worker, even while a handler occupies the main thread."""
    try:
        while (message := link.receive()) is not None:
            if "run" in message:
                current.number = message["run"]["number"]
                current.cancelled.clear()
                link.send({"begun": current.number})
                loop.call_soon_threadsafe(jobs.put_nowait, message["run"])
            elif message.get("cancel") == current.number:
                current.cancelled.set()
                loop.call_soon_threadsafe(_request_stop, current, current.number)
            elif "leave" in message:
                loop.call_soon_threadsafe(jobs.put_nowait, None)
    finally:
        # Also when a handler has used up its memory: a process that does not listen is of no use.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _request_stop(current: _Current, number: JsonValue) -> None:
    if current.number == number and current.request_stop is not None:
        current.request_stop()
