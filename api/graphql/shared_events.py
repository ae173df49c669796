"""The results of subscriptions, executed once for all subscribers that get the same results.

Two subscribers get the same results if they sent the same operation and variables, and if their
callers have the same access.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import isawaitable
from typing import Any, Final, NamedTuple

from graphql import Executor as OperationExecutor
from graphql import execute_subscription_event
from pydantic_core import to_json

from job_registry_api.answer_text import json_in_pieces
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.request_errors import format_result
from job_registry_api.graphql.subscriptions import FollowedJobs, JobEvent
from job_registry_api.http_messages import text_frame_head
from job_registry_api.queue import events
from job_registry_api.turns import SLICE_SECONDS, Turns

BATCH_EVENTS: Final = 256
"""The most events of a batch. Batches end at multiples of it, so that subscribers that began at
different events soon share batches."""

BATCH_BYTES: Final = 262_144
"""A batch ends with the result that makes it larger than this, in bytes of memory."""

BATCH_SECONDS: Final = 0.2
"""A batch ends with the result that is made later than this. With a slow database, from which jobs
are read, subscribers would otherwise wait for seconds for a whole batch."""

MAX_KEPT_BYTES: Final = 33_554_432
"""The most bytes of results that are kept for other subscribers, in one process. For a subscriber
that is behind these results, the operation is executed again."""

MAX_GROUPS_AT_ONCE: Final = 8
"""How many groups execute a batch at once. An event with thousands of subscribers, each with
different variables, would otherwise keep other requests waiting for seconds."""

_OVERHEAD: Final = 500
"""About how many bytes a result, or a batch, takes in addition to its text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The JSON text of one result.

    `errors` are set if the result has no data: nothing was executed, or the events have ended.
    """

    text: bytes
    event_id: str | None = None
    errors: Sequence[dict[str, Any]] | None = None


class Answers:
    """Results that are sent together. Several subscribers may share one object."""

    def __init__(self, each: tuple[Answer, ...]) -> None:
        self.each: Final = each
        self._pieces: tuple[bytes, ...] = ()
        self._pieces_for = -1

    @cached_property
    def as_events(self) -> bytes:
        """The results as server-sent events, made once for all subscribers."""
        return b"".join(map(_as_event, self.each))

    def as_messages(self, operation_id: bytes) -> list[bytes]:
        """Return the results as messages of graphql-transport-ws.

        `operation_id` is the id that the client gave its operation, as JSON.
        """
        begin = _BEFORE_ID + operation_id + _AFTER_ID
        return [begin + each.text + b"}" for each in self.each]

    def as_frames(self, operation_id: bytes) -> bytes:
        """Return the same messages as frames.

        Everything between the ids is made once for all subscribers with an id of this length, which
        is most of them: clients give consecutive numbers or UUIDs.
        """
        # Of one length alone: clients with ids of every length could fill the memory.
        if len(operation_id) != self._pieces_for:
            self._pieces_for = len(operation_id)
            self._pieces = tuple(self._between_ids(len(operation_id)))
        return operation_id.join(self._pieces)

    def _between_ids(self, id_length: int) -> Iterator[bytes]:
        rest = b""
        for each in self.each:
            length = len(_BEFORE_ID) + id_length + len(_AFTER_ID) + len(each.text) + 1
            yield rest + text_frame_head(length) + _BEFORE_ID
            rest = _AFTER_ID + each.text + b"}"
        yield rest


_BEFORE_ID: Final = b'{"type":"next","id":'
_AFTER_ID: Final = b',"payload":'


async def answers_of(content: dict[str, Any]) -> Answers:
    """Return `Answers` with one formatted result."""
    errors = None if "data" in content else content["errors"]
    return Answers((Answer(await json_in_pieces(content), errors=errors),))


class _Batch(NamedTuple):
    """The events of a group after one number and up to another, and their results."""

    events: tuple[events.JobEvent, ...]
    answers: Answers
    end: int
    size: int


class SharedEvents:
    """The groups of subscribers that share results, of one application."""

    def __init__(self) -> None:
        self._groups: dict[object, _Group] = {}
        self._kept: OrderedDict[tuple[_Group, int], int] = OrderedDict()
        """The size of each batch that is kept, the oldest first."""
        self._kept_bytes = 0
        self._turns = Turns()
        self.executing: Final = asyncio.Semaphore(MAX_GROUPS_AT_ONCE)
        """Held by a group while it makes a batch."""

    async def answers(
        self,
        operation: object,
        build: Callable[[Context], OperationExecutor[Any]],
        followed: FollowedJobs,
        after: str | None,
    ) -> AsyncGenerator[Answers]:
        """Yield the results of a subscription, beginning after the event with the id `after`.

        Equal values of `operation` stand for the same document and variables. `build` builds the
        executor of the operation for a context.

        Raises:
            EventsMissed: events were missed.
            JobNotFound: the caller follows one job that does not exist, or that it may not see.
            Unauthenticated: the caller's token has expired or is otherwise invalid.
        """
        if after is not None:
            # Before the id is looked up: the look-up would reveal events of another caller's job.
            await followed.current()
            await followed.context.queue.events.recall(after)
            if followed.job_id is not None and not await followed.can_continue(after):
                after = None  # The state of the job has what was missed.
        with (
            followed.subscribed(after) as subscription,
            self._joined(operation, build, followed) as group,
        ):
            if after is not None:
                await followed.check_seen(subscription.position)
            elif (current := await followed.current()) is not None:
                yield await answers_of(await group.execute(current))
            while True:
                await followed.wait(subscription)
                await self._turns.take()
                batch = group.batches.get(subscription.position)
                if batch is None:
                    batch = await group.batch_after(subscription.position)
                    # Other subscribers may have waited for the same batch.
                    await self._turns.take(again=True)
                subscription.position = batch.end
                answers = batch.answers
                if subscription.skips:
                    skipped = [subscription.is_skipped(event) for event in batch.events]
                    if any(skipped):
                        kept = zip(answers.each, skipped, strict=True)
                        answers = Answers(
                            tuple(each for each, is_skipped in kept if not is_skipped)
                        )
                if answers.each:
                    yield answers

    def keep(self, group: _Group, after: int, batch: _Batch) -> None:
        """Keep a batch for the other subscribers of its group."""
        group.batches[after] = batch
        self._kept[group, after] = batch.size
        self._kept_bytes += batch.size
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._forget(*next(iter(self._kept)))

    @contextmanager
    def _joined(
        self,
        operation: object,
        build: Callable[[Context], OperationExecutor[Any]],
        followed: FollowedJobs,
    ) -> Iterator[_Group]:
        """Return the group of the subscribers that get the same results."""
        # A shared execution depends only on those properties of the caller that are in the key.
        caller = followed.context.caller.as_reader()
        key = (operation, caller)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(self, build, followed.shared_by(caller))
        group.members += 1
        try:
            yield group
        finally:
            group.members -= 1
            if not group.members:
                del self._groups[key]
                group.end()
                for after in tuple(group.batches):
                    self._forget(group, after)

    def _forget(self, group: _Group, after: int) -> None:
        del group.batches[after]
        self._kept_bytes -= self._kept.pop((group, after))


class _Group:
    """Subscribers that get the same results."""

    def __init__(
        self,
        shared: SharedEvents,
        build: Callable[[Context], OperationExecutor[Any]],
        followed: FollowedJobs,
    ) -> None:
        self.members = 0
        self.batches: dict[int, _Batch] = {}
        """The batches that are kept, by the number that they begin after."""
        self._shared = shared
        self._followed = followed
        self._operation = build(followed.context)
        self._executing = asyncio.Lock()
        self._made: dict[int, asyncio.Task[_Batch]] = {}

    async def batch_after(self, after: int) -> _Batch:
        """Make a batch, or wait for the one that is being made.

        Raises:
            EventsMissed: the next events cannot be read any more.
        """
        making = self._made.get(after)
        if making is None:
            making = self._made[after] = asyncio.create_task(self._make_in_turn(after))
            making.add_done_callback(partial(self._is_made, after))
        # The subscriber that started it may leave.
        return await asyncio.shield(making)

    async def execute(self, event: JobEvent) -> dict[str, Any]:
        """Return the formatted result of one event."""
        async with self._executing:
            self._followed.context.forget()
            result = execute_subscription_event(self._operation.build_per_event_executor(event))
            return format_result(await result if isawaitable(result) else result)

    def end(self) -> None:
        """Cancel the batches that are being made: no subscriber is left."""
        for making in self._made.values():
            making.cancel()

    async def _make_in_turn(self, after: int) -> _Batch:
        async with self._shared.executing:
            return await self._make(after)

    async def _make(self, after: int) -> _Batch:
        found, end = self._followed.read(after, BATCH_EVENTS - after % BATCH_EVENTS)
        found = await self._followed.visible(found)
        jobs = self._followed.jobs_of(found)
        answers: list[Answer] = []
        size = 0
        begun = time.monotonic()
        ends_at = begun + BATCH_SECONDS
        for each in found:
            content = await self.execute(JobEvent.of(each.item, jobs))
            is_large = self._followed.context.budget.is_large
            text = await json_in_pieces(content) if is_large else to_json(content)
            answers.append(Answer(text, self._followed.id_of(each)))
            # Its text is also kept as a server-sent event and as a frame of WebSockets.
            size += 3 * len(text) + _OVERHEAD
            now = time.monotonic()
            if size > BATCH_BYTES or now > ends_at:
                end = each.number
                break
            if now - begun > SLICE_SECONDS:
                await asyncio.sleep(0)
                begun = time.monotonic()
        executed = tuple(each.item for each in found[: len(answers)])
        batch = _Batch(executed, Answers(tuple(answers)), end, size + _OVERHEAD)
        if self.members > 1:
            self._shared.keep(self, after, batch)
        return batch

    def _is_made(self, after: int, making: asyncio.Task[_Batch]) -> None:
        del self._made[after]
        if not making.cancelled():
            making.exception()  # Those that wait for the batch get it; there may be none.


def _as_event(answer: Answer) -> bytes:
    if answer.errors is not None:
        # An empty id: otherwise a browser would try to continue after its last event again.
        name = b"id:\n"
    elif answer.event_id is not None:
        name = b"id: " + answer.event_id.encode() + b"\n"
    else:
        name = b""
    return b"event: next\n" + name + b"data: " + answer.text + b"\n\n"
