"""`SyncQueue`, the operations of a `JobQueue` for code without an event loop."""

from __future__ import annotations

import asyncio
import builtins
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

from pydantic import JsonValue
from sqlalchemy.orm import Session, scoped_session

from job_registry import EnqueueRequest, Payload
from job_registry.enqueue_request import EnqueueOptions
from job_registry_api.queue.enqueueing import Enqueued, Refusal
from job_registry_api.queue.errors import QueueUnavailable
from job_registry_api.queue.events import running_loop
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.job_logs import LogLine
from job_registry_api.queue.models import JobRecord
from job_registry_api.queue.reading import JobPage, JobTotal

if TYPE_CHECKING:
    from job_registry_api.queue.queue import JobQueue

T = TypeVar("T")

Results = list[Enqueued | Refusal]

_NO_THREAD: Final = (
    "queue.sync needs a thread for its event loop, and gevent or eventlet has replaced threads;"
    " pass a session to enqueue, or use workers with threads"
)

CLOSE_SECONDS: Final = 5.0
"""How long `close` waits for calls of other threads."""


class SyncQueue:
    """The operations of a queue, each of which blocks until it is done. Thread-safe.

    If the queue is open, they run on its event loop, so call them from another thread. Otherwise
    the first call opens the queue in a new thread, until `close`. A queue that was closed is opened
    again only in a `with`. With a `session`, the job is written by the calling thread, on the
    connection of that session.

    Each operation raises what the operation of `JobQueue` with the same name raises.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: set[Future[Any]] = set()
        """The calls in progress."""
        self._closing = False
        self._is_entered = False

    def request(
        self, job: Payload | EnqueueRequest, **options: Unpack[EnqueueOptions]
    ) -> EnqueueRequest:
        """Return the request to enqueue a payload."""
        return self._queue.request(job, **options)

    def enqueue(
        self,
        job: Payload | EnqueueRequest,
        *,
        created_by: str | None = None,
        session: Session | scoped_session[Any] | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Enqueued:
        """Store a job. With `session`, as part of its transaction."""
        request = self._queue.request_of("enqueue", job, options)
        if session is not None:
            return self._queue.enqueue_within(_sync(session), request, created_by=created_by)
        return self._run(lambda: self._queue.enqueue(request, created_by=created_by))

    def enqueue_many(
        self,
        jobs: Sequence[Payload | EnqueueRequest],
        *,
        atomic: bool = False,
        created_by: str | None = None,
        session: Session | scoped_session[Any] | None = None,
    ) -> Results:
        """Store jobs. With `session`, as part of its transaction."""
        if session is not None:
            return self._queue.enqueue_many_within(
                _sync(session), jobs, atomic=atomic, created_by=created_by
            )
        return self._run(
            lambda: self._queue.enqueue_many(jobs, atomic=atomic, created_by=created_by)
        )

    def get(self, job_id: str | uuid.UUID) -> JobRecord:
        """Return a job."""
        return self._run(lambda: self._queue.get(job_id))

    def logs(self, job_id: str | uuid.UUID) -> builtins.list[LogLine]:
        """Return the log lines that are kept of a job, oldest first."""
        return self._run(lambda: self._queue.logs(job_id))

    def list(
        self,
        job_filter: JobFilter = JobFilter(),
        *,
        first: int | None = None,
        after: uuid.UUID | None = None,
        last: int | None = None,
        before: uuid.UUID | None = None,
    ) -> JobPage:
        """Return a page of jobs, newest first."""
        return self._run(
            lambda: self._queue.list(job_filter, first=first, after=after, last=last, before=before)
        )

    def count(self, job_filter: JobFilter = JobFilter()) -> JobTotal:
        """Return how many jobs the list has."""
        return self._run(lambda: self._queue.count(job_filter))

    def result(self, job_id: str | uuid.UUID, *, timeout: float | None = None) -> JsonValue:
        """Wait until the job has ended, and return its result."""
        return self._run(lambda: self._queue.result(job_id, timeout=timeout))

    def cancel(self, job_id: str | uuid.UUID) -> JobRecord:
        """Cancel a job, or request that its worker stops."""
        return self._run(lambda: self._queue.cancel(job_id))

    def retry(self, job_id: str | uuid.UUID) -> JobRecord:
        """Queue a failed or cancelled job again."""
        return self._run(lambda: self._queue.retry(job_id))

    def unpark(self, job_types: Sequence[str] | None = None) -> int:
        """Make parked jobs due for every worker. See `JobQueue.unpark`."""
        return self._run(lambda: self._queue.unpark(job_types))

    def close(self) -> None:
        """Close the queue, if an operation here has opened it."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            self._closing = thread is not None
            self._is_entered = False
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            self._closing = False

    def __enter__(self) -> Self:
        self._is_entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        # Another thread may have had the lock when this process was forked.
        self._queue.check_process()
        with self._lock:
            loop = self._event_loop()
            if running_loop() is loop:
                raise RuntimeError(
                    "queue.sync would block the event loop of the queue; use `await queue...` here"
                )
            future = asyncio.run_coroutine_threadsafe(operation(), loop)
            self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        try:
            return future.result()
        except CancelledError as error:
            raise QueueUnavailable("the queue was closed") from error
        except BaseException:
            future.cancel()  # Ctrl-C, for example.
            raise

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._closing:
            raise QueueUnavailable("the queue was closed")
        if self._loop is None:
            if self._queue.loop is not None:
                return self._queue.loop
            # Threads that call while a program ends would open it again, and nobody would close it.
            if self._queue.was_opened and not self._is_entered:
                raise RuntimeError("the queue was closed")
            self._loop = self._open_in_thread()
        return self._loop

    async def _close(self) -> None:
        """Close the queue once the calls of other threads have ended."""
        self._queue.end_waits()
        calls = [asyncio.wrap_future(call) for call in set(self._calls)]
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*calls, return_exceptions=True)
        await self._queue.close()

    def _open_in_thread(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        failures: list[BaseException] = []
        is_open = threading.Event()
        caller = threading.get_native_id()

        def run() -> None:
            if threading.get_native_id() == caller:
                loop.close()
                failures.append(RuntimeError(_NO_THREAD))
                is_open.set()
                return
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                try:
                    runner.run(self._queue.open())
                except BaseException as error:
                    failures.append(error)
                    return
                finally:
                    is_open.set()
                loop.run_forever()
                runner.run(self._close())

        # A daemon: a program that ends need not close the queue. What was answered is on disk.
        self._thread = threading.Thread(target=run, name="job-queue", daemon=True)
        self._thread.start()
        try:
            is_open.wait()
        except BaseException:  # Ctrl-C, for example.
            self._thread = None
            with suppress(RuntimeError):  # The loop is closed already.
                loop.call_soon_threadsafe(loop.stop)
            raise
        if failures:
            self._thread.join()
            self._thread = None
            raise failures[0]
        return loop


def _sync(session: Session | scoped_session[Any]) -> Session:
    if isinstance(session, scoped_session):  # Such as `db.session` of Flask-SQLAlchemy.
        session = session()
    if not isinstance(session, Session):
        raise TypeError(
            f"session: expected a Session of SQLAlchemy; got {type(session).__name__}."
            " An AsyncSession is for `await queue.enqueue`"
        )
    return session
