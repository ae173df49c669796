"""Runs handlers in this process: as a task on the event loop, or in a thread.

Every handler ends as an `End`, which is data: no exception, frame or reference to the attempt
outlives the handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import structlog

from job_registry import CallNext, JobContext
from job_registry_api.logs import log_unexpected, stack_of
from job_registry_api.worker.extensions import around
from job_registry_api.worker.outcomes import End, Returned, chain_of, raised
from job_registry_api.worker.results import is_small, result_of

_in_handler: contextvars.ContextVar[bool] = contextvars.ContextVar("in_handler", default=False)


class HandlerCall:
    """One call of a handler with its middleware. `ended` is its task, whose result is the `End`.

    With `in_thread` the handler runs in a thread, otherwise on the event loop. If it returns an
    awaitable, that is awaited on the loop.
    """

    can_be_killed = False

    def __init__(
        self,
        function: Callable[..., Any],
        job: JobContext,
        payload: Any,
        *,
        in_thread: bool,
        middleware: Sequence[Any] = (),
        max_bytes: int,
    ) -> None:
        self._threads: set[asyncio.Future[None]] = set()
        self._thread_name = f"job {job.id}"
        self._returned = False
        handler = self._in_a_thread if in_thread else self._on_the_loop
        call = around(middleware, job, lambda: handler(function, job, payload))
        self.ended: asyncio.Task[End] = asyncio.get_running_loop().create_task(
            self._run(call, job, max_bytes), name=f"handler of job {job.id}"
        )

    def request_stop(self) -> None:
        """Cancel an async handler. One in a thread sees `job.cancel_requested`."""
        if not self._threads and not self._returned:
            self.ended.cancel()

    def kill(self) -> None:
        """Do nothing: a handler in this process cannot be killed."""

    def stack(self) -> list[str]:
        """Return where a handler in a thread is at this moment, the innermost call last."""
        named = (each for each in threading.enumerate() if each.name == self._thread_name)
        return stack_of(next(named, None))

    async def _run(self, call: CallNext, job: JobContext, max_bytes: int) -> End:
        _in_handler.set(True)
        structlog.contextvars.bind_contextvars(job_id=job.id, type=job.type, attempt=job.attempt)
        end = await self._end_of(call, max_bytes)
        while self._threads:
            # The middleware did not wait for the handler. The attempt ends with the handler.
            await asyncio.wait(self._threads)
        return end

    async def _end_of(self, call: CallNext, max_bytes: int) -> End:
        process = os.getpid()
        try:
            try:
                result = await call()
            finally:
                _end_fork_of(process)  # Of middleware.
            self._returned = True
        except BaseException as error:
            end = raised(error)
            _forget(error)
            return end
        if result is None:
            return Returned(None)
        if is_small_enough(result):
            return result_of(result, max_bytes=max_bytes)
        converted: End = await in_thread(lambda: result_of(result, max_bytes=max_bytes))
        return converted

    async def _on_the_loop(self, function: Callable[..., Any], *arguments: Any) -> Any:
        process = os.getpid()
        try:
            try:
                answer = function(*arguments)
                return await answer if inspect.isawaitable(answer) else answer
            finally:
                _end_fork_of(process)
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            raise RuntimeError(f"the handler raised {type(error).__name__}") from error

    async def _in_a_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        thread: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._threads.add(thread)
        thread.add_done_callback(self._threads.discard)
        answer = await in_thread(
            lambda: function(*arguments), thread, thread_name=self._thread_name
        )
        if inspect.isawaitable(answer):
            return await self._on_the_loop(lambda: answer)
        return answer


def is_small_enough(result: object) -> bool:
    """Return whether a result may be converted on the event loop."""
    try:
        return is_small(result)
    except Exception:
        return False  # It has an iterator. To find its place takes longer.


async def in_thread(
    function: Callable[[], Any],
    ended: asyncio.Future[None] | None = None,
    *,
    thread_name: str = "job",
) -> Any:
    """Run a plain function in a thread of its own, with the context variables of this task.

    `ended` is set once the function has ended, even if this call was cancelled before. Only then
    the thread is used again. There is no limit: a thread cannot be stopped, and an abandoned one
    would keep the place of others.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()
    process = os.getpid()

    def call() -> Any:
        try:
            return function()
        finally:
            _end_fork_of(process)
            _close_old_connections_of_django()

    def deliver(result: Any, error: BaseException | None) -> None:
        thread.name = _NO_JOB
        _idle.append(thread)
        with contextlib.suppress(RuntimeError):  # The loop is closed: no caller waits.
            loop.call_soon_threadsafe(_settle, future, result, error)
            if ended is not None:
                loop.call_soon_threadsafe(_settle, ended, None, None)

    def run() -> None:
        thread.name = thread_name
        try:
            result = context.run(call)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, StopIteration):
                deliver(None, RuntimeError("the handler raised StopIteration"))
            else:
                deliver(None, error)
        except BaseException as error:
            exited = RuntimeError(f"the handler raised {type(error).__name__}")
            exited.__cause__ = error
            deliver(None, exited)
        else:
            deliver(result, None)

    try:
        thread = _idle_thread()
    except BaseException:
        if ended is not None:
            ended.set_result(None)
        raise
    thread.run_next(run)
    return await future


class _Thread(threading.Thread):
    """A thread that runs one function after another.

    Libraries keep connections, sessions and clients per thread. In a new thread for each job they
    would be made anew, and those that are in a reference cycle would stay open until the garbage
    collector runs: soon a database has no connection left, or a pool. So there are as many as
    handlers run at once. A daemon does not keep the process alive.
    """

    def __init__(self) -> None:
        super().__init__(name=_NO_JOB, daemon=True)
        self._function: Callable[[], None] | None = None
        self._has_function = threading.Lock()
        self._has_function.acquire()

    def run_next(self, function: Callable[[], None]) -> None:
        """Run a function, which does not raise."""
        self._function = function
        self._has_function.release()

    def run(self) -> None:
        while True:
            # Libraries raise timeouts from other threads, and too late they find none of their own.
            with contextlib.suppress(BaseException):
                self._has_function.acquire()
            function, self._function = self._function, None
            if function is not None:
                function()
            del function  # It refers to the handler and its payload.


_NO_JOB: Final = "no job"
"""The name of a thread that waits for a function."""

_idle: Final[deque[_Thread]] = deque()
"""The threads that wait for a function."""

# A fork has only the thread that has forked.
os.register_at_fork(after_in_child=_idle.clear)


def _idle_thread() -> _Thread:
    """Return a thread that waits for a function, a new one if there is none."""
    with contextlib.suppress(IndexError):
        while not (thread := _idle.pop()).is_alive():
            pass  # Such a timeout has ended it.
        return thread
    thread = _Thread()
    thread.start()
    return thread


def _close_old_connections_of_django() -> None:
    """Close the connections of Django's ORM in this thread that are too old, or have failed.

    Django does so when a request ends, but not when a job ends. Otherwise every later handler would
    fail in a thread whose connection was once lost.
    """
    # A module that another thread imports at this moment does not have them yet.
    settings = getattr(sys.modules.get("django.conf"), "settings", None)
    close = getattr(sys.modules.get("django.db"), "close_old_connections", None)
    if settings is None or close is None or not settings.configured:
        return
    try:
        close()
    except Exception as error:
        log_unexpected("worker", error)


def _end_fork_of(process: int) -> None:
    """End this process if it is a fork of `process`, as Python ends: with the code of `sys.exit`,
    or with its text on standard error and 1.

    Otherwise it would go on as a copy of the worker, with the connections of the worker.
    """
    if os.getpid() == process:
        return
    error = sys.exception()
    code = 0 if error is None else 1
    try:
        match error:
            case SystemExit(code=int() | None as given):
                code = given or 0
            case SystemExit():
                sys.stderr.write(f"{error.code}\n")
            case BaseException():
                traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)  # It takes no number beyond those of C.


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _forget(error: BaseException) -> None:
    """Drop the tracebacks of an exception, and of the exceptions that caused it.

    Their frames form reference cycles through the job, its task and the handler's variables, and
    cycles wait for the garbage collector, which runs rarely (see `job_registry_api.cli`).
    """
    for each in chain_of(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            # A coroutine may have caught this exception earlier, and go on: clearing its frame
            # would end it.
            if not frame.f_code.co_flags & _CAN_GO_ON:
                with contextlib.suppress(RuntimeError):  # It is executing.
                    frame.clear()
        each.__traceback__ = None


_CAN_GO_ON: Final = (
    inspect.CO_COROUTINE
    | inspect.CO_GENERATOR
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
)


@contextmanager
def tasks_of_handlers_contained() -> Iterator[None]:
    """Let `sys.exit` in a task that a handler started end only that task.

    asyncio stops the loop, and with it the process, if a task raises SystemExit or
    KeyboardInterrupt.
    """
    loop = asyncio.get_running_loop()
    former = loop.get_task_factory()

    def factory(
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        **options: Any,
    ) -> Any:
        if _in_handler.get() and inspect.iscoroutine(work):
            work = _Contained(work)
        if former is not None:
            return former(loop, work, **options)
        return asyncio.Task(work, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(former)


class _Contained(Coroutine[Any, Any, Any]):
    """A coroutine that raises RuntimeError instead of SystemExit and KeyboardInterrupt.

    It has the attributes of the coroutine in it, such as `cr_running`: anyio reads the state of its
    tasks from them, and asyncio their names and stacks.
    """

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def send(self, value: Any) -> Any:
        with _no_exit():
            return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        with _no_exit():
            return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        with _no_exit():
            return (yield from self._work.__await__())


@contextmanager
def _no_exit() -> Iterator[None]:
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"a task of the handler raised {type(error).__name__}") from error
