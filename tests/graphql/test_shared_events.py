"""Many subscribers: an event is executed once for all that get the same, and nobody gets more."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import httpx
import jwt
import pytest
from pydantic_core import from_json
from websockets.client import ClientProtocol
from websockets.frames import Frame
from websockets.protocol import State
from websockets.uri import parse_uri

from job_registry import EnqueueRequest
from job_registry_api import turns as turns_module
from job_registry_api.auth import JOB_TYPES_CLAIM
from job_registry_api.graphql import context, shared_events
from job_registry_api.graphql.shared_events import Answer, Answers
from job_registry_api.queue import events, recent_events
from job_registry_api.queue.enqueueing import Enqueued
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import Store
from job_registry_api.turns import Turns
from tests.http_client import Visit, application_of, queue_of
from tests.test_own_jobs import AUTH, NOWHERE, SECRET

PING, PONG = EnqueueRequest("test.ping", {}), EnqueueRequest("test.pong", {})
JOBS = "subscription ($types: [String!]) { jobEvents(jobTypes: $types) { name job { id } } }"
IDS = "subscription { jobEvents { jobId } }"
ONE = "subscription ($id: ID) { jobEvents(jobId: $id) { name status } }"


class Stream:
    """The server-sent events of one subscriber: an HTTP client without buffers."""

    def __init__(self) -> None:
        self.text = ""
        self.has_ended = False
        self.hang_up = asyncio.Event()

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The id and the data of each `next` event so far."""
        found = []
        for event in self.text.split("\n\n"):
            fields = dict(line.split(":", 1) for line in event.splitlines() if ":" in line)
            if fields.get("event") == " next":
                found.append((fields.get("id", "none").strip(), json.loads(fields["data"])))
        return found

    @property
    def data(self) -> list[Any]:
        """What each event has of the subscription's field."""
        return [content["data"]["jobEvents"] for _, content in self.events]

    @property
    def codes(self) -> list[str]:
        """The codes of all errors."""
        contents = [content for _, content in self.events]
        return [e["extensions"]["code"] for each in contents for e in each.get("errors", ())]

    async def until(self, count: int) -> None:
        """Wait for this many events, and then for one that is too many."""
        async with asyncio.timeout(20):
            while self.text.count("event: next") < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert len(self.events) == count


@asynccontextmanager
async def following(
    client: httpx.AsyncClient,
    query: str = IDS,
    headers: dict[str, str] | None = None,
    **variables: Any,
) -> AsyncIterator[Stream]:
    """Subscribe until the block is left."""
    application, stream = application_of(client), Stream()
    body = json.dumps({"query": query, "variables": variables}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await stream.hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        stream.text += message.get("body", b"").decode()
        stream.has_ended = message["type"] == "http.response.body" and not message.get("more_body")

    given = {"content-type": "application/json", "accept": "text/event-stream"} | (headers or {})
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/graphql",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    before = queue_of(client).events.subscribers
    serving = asyncio.create_task(application(scope, receive, send))
    try:
        async with asyncio.timeout(10):
            while queue_of(client).events.subscribers == before and "event:" not in stream.text:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        yield stream
    finally:
        stream.hang_up.set()
        await serving


def bearer(subject: str, scope: str, **claims: Any) -> dict[str, str]:
    claims |= {"iss": "https://i.example", "aud": "jobs", "sub": subject, "scope": scope}
    token = jwt.encode({"exp": int(time.time()) + 600, **claims}, SECRET, "HS256")
    return {"authorization": f"Bearer {token}"}


# Once for all


async def test_an_event_is_executed_once_for_all_subscribers_of_an_operation(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    get = JobQueue.get

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        return await get(*arguments, **options)

    monkeypatch.setattr(JobQueue, "get", counted)
    async with visit() as client, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(following(client, JOBS)) for _ in range(10)]
        # Another operation, and other variables, are executed for themselves.
        other = await stack.enter_async_context(following(client, JOBS.replace("name ", "")))
        types = await stack.enter_async_context(following(client, JOBS, types=["test.ping"]))
        job = (await queue_of(client).enqueue(PING)).job
        for stream in (*streams, other, types):
            await stream.until(1)
    assert reads == 3
    assert [each.data for each in (*streams, types)] == [
        [{"name": "job.created", "job": {"id": str(job.id)}}]
    ] * 11
    assert other.data == [{"job": {"id": str(job.id)}}]
    assert len({stream.text for stream in streams}) == 1


async def test_callers_with_other_rights_share_nothing(visit: Visit) -> None:
    async with visit(**AUTH) as client, AsyncExitStack() as stack:
        query = "subscription { jobEvents { type job { createdBy payload } } }"
        rights = {
            "ada": bearer("ada", "jobs:own"),
            "bob": bearer("bob", "jobs:own"),
            "carol": bearer("carol", "jobs:read"),
            "dora": bearer("dora", "jobs:read"),
            "limited": bearer("eve", "jobs:read", **{JOB_TYPES_CLAIM: ["test.pong"]}),
            "limited own": bearer("ada", "jobs:own", **{JOB_TYPES_CLAIM: ["test.pong"]}),
        }
        streams = {
            name: await stack.enter_async_context(following(client, query, headers))
            for name, headers in rights.items()
        }
        queue = queue_of(client)
        for request, subject in ((PING, "ada"), (PING, "bob"), (PONG, "ada"), (PONG, "bob")):
            await queue.enqueue(request, created_by=subject)
        for name in ("carol", "dora"):
            await streams[name].until(4)
        for name in ("ada", "bob", "limited"):
            await streams[name].until(2)
        await streams["limited own"].until(1)
        seen = {
            name: {(each["type"], each["job"]["createdBy"]) for each in stream.data}
            for name, stream in streams.items()
        }
    everything = {(t, c) for t in ("test.ping", "test.pong") for c in ("ada", "bob")}
    assert seen == {
        "ada": {each for each in everything if each[1] == "ada"},
        "bob": {each for each in everything if each[1] == "bob"},
        "carol": everything,
        "dora": everything,
        "limited": {each for each in everything if each[0] == "test.pong"},
        "limited own": {("test.pong", "ada")},
    }


async def test_a_subscription_ends_with_its_own_token_and_leaves_the_others(visit: Visit) -> None:
    async with visit(auth_leeway_seconds="0", **AUTH) as client, AsyncExitStack() as stack:
        short = bearer("ada", "jobs:read", exp=int(time.time()) + 2)
        expiring = await stack.enter_async_context(following(client, IDS, short))
        staying = await stack.enter_async_context(
            following(client, IDS, bearer("bob", "jobs:read"))
        )
        await queue_of(client).enqueue(PING)
        await staying.until(1)
        async with asyncio.timeout(10):
            while not expiring.has_ended:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await queue_of(client).enqueue(PING)
        await staying.until(2)
    assert "complete" not in expiring.text
    assert expiring.codes == []
    assert expiring.text.count("jobId") == 1


# Bursts


async def ids_of(queue: JobQueue, requests: list[EnqueueRequest]) -> list[str]:
    """The ids of new jobs."""
    answers = await queue.enqueue_many(requests)
    return [str(each.job.id) for each in answers if isinstance(each, Enqueued)]


async def test_events_of_a_burst_are_not_held_back_until_all_of_them_are_read(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event with a job reads it. With a slow database, a whole batch took seconds."""
    get = JobQueue.get

    async def slow_get(*arguments: Any, **named: Any) -> Any:
        await asyncio.sleep(0.02)
        return await get(*arguments, **named)

    monkeypatch.setattr(JobQueue, "get", slow_get)
    async with (
        visit() as client,
        following(client, "subscription { jobEvents { job { id } } }") as stream,
    ):
        await queue_of(client).enqueue_many([PING] * 200)
        async with asyncio.timeout(2):
            while not stream.events:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_the_jobs_of_a_burst_are_read_together(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was a statement of its own: with 20 ms per answer, 300 jobs took six seconds."""
    statements = 0
    for name in ("get", "list_many", "get_many"):
        read = getattr(Store, name)

        async def slow_read(*arguments: Any, read: Any = read) -> Any:
            nonlocal statements
            statements += 1
            await asyncio.sleep(0.02)
            return await read(*arguments)

        monkeypatch.setattr(Store, name, slow_read)
    async with visit() as client, following(client, JOBS) as stream:
        stored = await ids_of(queue_of(client), [PING] * 300)
        await queue_of(client).cancel(stored[0])
        began, before = time.monotonic(), statements
        await stream.until(301)
        assert time.monotonic() - began < 2
        assert statements - before < 30
    assert [each["job"]["id"] for each in stream.data] == [*stored, stored[0]]


async def test_the_jobs_of_a_burst_are_read_as_far_as_they_are_small_together(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "JOBS_BYTES", 100_000)
    large = EnqueueRequest("test.ping", {"text": "x" * 30_000})
    async with (
        visit() as client,
        following(client, "subscription { jobEvents { job { id payload } } }") as stream,
    ):
        stored = await ids_of(queue_of(client), [PING, large] * 10)
        await stream.until(20)
    assert [each["job"]["id"] for each in stream.data] == stored
    assert [len(str(each["job"]["payload"])) > 30_000 for each in stream.data] == [False, True] * 10


@pytest.mark.parametrize(("characters", "most_statements"), [(10, 10), (40_000, 190)])
async def test_the_jobs_of_events_in_any_order_are_read_once(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, characters: int, most_statements: int
) -> None:
    """While jobs are enqueued, those of before end, and perhaps in another order."""
    monkeypatch.setattr(context, "JOBS_BYTES", 100_000)
    read: list[int] = []
    for name in ("get", "list_many"):
        method = getattr(Store, name)

        async def counted(store: Store, ids: Any, *others: Any, method: Any = method) -> Any:
            read.append(len(ids) if isinstance(ids, list) else 1)
            return await method(store, ids, *others)

        monkeypatch.setattr(Store, name, counted)
    async with visit() as client:
        queue = queue_of(client)
        text = EnqueueRequest("test.ping", {"text": "x" * characters})
        stored = [UUID(each) for each in await ids_of(queue, [text] * 120)]
        first, others = stored[:60], stored[60:]
        ids = first + [each for pair in zip(others, first[::-1], strict=True) for each in pair]
        jobs = context.JobsOfEvents(
            queue, [events.JobEvent("job.created", each, "test.ping", 0) for each in ids]
        )
        read.clear()
        assert [(await jobs.get(str(each), None)).id for each in ids] == ids
    assert len(read) < most_statements
    assert sum(read) < 2 * len(ids)


async def test_the_jobs_of_a_burst_that_are_deleted_meanwhile_are_null(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with visit() as client, following(client, JOBS) as stream:
        page = JobQueue.get_many

        async def without_the_second(queue: JobQueue, ids: Any, **options: Any) -> Any:
            ids = list(ids)
            return await page(queue, ids[:1] + ids[2:], **options)

        monkeypatch.setattr(JobQueue, "get_many", without_the_second)
        await queue_of(client).enqueue_many([PING] * 3)
        await stream.until(3)
    assert [each["job"] is None for each in stream.data] == [False, True, False]


async def test_a_bulk_drops_no_subscriber(visit: Visit) -> None:
    async with visit() as client, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(following(client)) for _ in range(2)]
        for _ in range(2):
            await queue_of(client).enqueue_many([PING] * 600)
        for stream in streams:
            await stream.until(1_200)
    assert len({each["jobId"] for each in streams[0].data}) == 1_200


async def test_results_that_are_not_kept_are_executed_again(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_events, "MAX_KEPT_BYTES", 1_000)
    monkeypatch.setattr(shared_events, "BATCH_BYTES", 1_000)
    async with visit() as client, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(following(client)) for _ in range(3)]
        await queue_of(client).enqueue_many([PING] * 200)
        for stream in streams:
            await stream.until(200)
        assert len({stream.text for stream in streams}) == 1


async def test_subscribers_that_leave_leave_nothing_behind(visit: Visit) -> None:
    async with visit() as client:
        await queue_of(client).enqueue(PING)
        before = len(asyncio.all_tasks())
        for _ in range(3):
            async with AsyncExitStack() as stack:
                for number in range(20):
                    types = ["test.ping", "test.pong"][: number % 3] or None
                    await stack.enter_async_context(following(client, JOBS, types=types))
                await queue_of(client).enqueue(PING)
        assert queue_of(client).events.subscribers == 0
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_few_groups_of_subscribers_execute_an_event_at_once(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = most = 0
    get = JobQueue.get

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        await asyncio.sleep(0.01)
        reading -= 1
        return await get(*arguments, **options)

    monkeypatch.setattr(JobQueue, "get", counted)
    async with visit() as client, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(following(client, JOBS, unused=number))
            for number in range(20)
        ]
        await queue_of(client).enqueue(PING)
        for stream in streams:
            await stream.until(1)
    assert 1 < most <= shared_events.MAX_GROUPS_AT_ONCE


async def test_many_tasks_take_turns_and_others_run_in_between() -> None:
    turns, running = Turns(), 0
    longest = 0

    async def busy() -> None:
        nonlocal running
        await turns.take()
        running += 1
        time.sleep(0.001)  # noqa: ASYNC251

    async def other() -> None:
        nonlocal running, longest
        while True:
            longest, running = max(longest, running), 0
            await asyncio.sleep(0)

    watching = asyncio.create_task(other())
    tasks = [asyncio.create_task(busy()) for _ in range(100)]
    tasks[50].cancel()
    await asyncio.wait(tasks)
    watching.cancel()
    assert longest <= 8
    # Whoever comes later is not kept waiting.
    async with asyncio.timeout(5):
        await turns.take()


async def test_a_task_that_comes_back_during_a_round_waits_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns_module, "MAX_REST_SECONDS", 0.2)
    monkeypatch.setattr(turns_module, "REST", 1_000)
    turns, served = Turns(), list[int]()

    async def follow(number: int) -> None:
        for _ in range(3):
            await turns.take()
            served.append(number)
            time.sleep(0.001)  # noqa: ASYNC251
            await asyncio.sleep(0)

    begun = time.monotonic()
    await asyncio.gather(*map(follow, range(30)))
    rounds = [sorted(served[at : at + 30]) for at in range(0, 90, 30)]
    assert rounds == [[*range(30)]] * 3
    assert time.monotonic() - begun > 0.4


async def test_a_turn_that_is_not_finished_goes_on_in_the_same_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns_module, "MAX_REST_SECONDS", 30)
    monkeypatch.setattr(turns_module, "REST", 1e6)
    turns = Turns()

    async def follow() -> None:
        await turns.take()
        await asyncio.sleep(0)
        await turns.take(again=True)

    async with asyncio.timeout(5):
        await asyncio.gather(*(follow() for _ in range(30)))


async def test_a_task_alone_hardly_waits() -> None:
    turns = Turns()
    begun = time.monotonic()
    for _ in range(10):
        await turns.take()
    assert time.monotonic() - begun < 0.2


# Frames


@pytest.mark.parametrize("size", [0, 10, 125, 126, 60_000, 65_536, 200_000])
def test_results_are_frames_that_share_all_but_the_ids(size: int) -> None:
    texts = (b'{"data":"' + b"x" * size + b'"}', b'{"data":1}')
    answers = Answers(tuple(map(Answer, texts)))
    for operation_id in (b'"1"', b'"2"', b'"' + b"i" * 255 + b'"', b'"3"'):
        client = ClientProtocol(parse_uri("ws://127.0.0.1"), state=State.OPEN, max_size=None)
        client.receive_data(answers.as_frames(operation_id))
        received = [
            bytes(frame.data) for frame in client.events_received() if isinstance(frame, Frame)
        ]
        assert received == answers.as_messages(operation_id)
        assert [from_json(each)["payload"] for each in received] == [*map(from_json, texts)]
        assert {from_json(each)["id"] for each in received} == {from_json(operation_id)}


# Continuing


async def test_a_client_continues_after_the_last_event_it_has(visit: Visit) -> None:
    async with visit() as client:
        queue = queue_of(client)
        async with following(client) as first:
            await queue.enqueue_many([PING] * 3)
            await first.until(3)
        ids = [event_id for event_id, _ in first.events]
        assert len(set(ids)) == 3
        await queue.enqueue(PONG)
        async with following(client, IDS, {"last-event-id": ids[2]}) as again:
            await again.until(1)
            await queue.enqueue(PONG)
            await again.until(2)
        async with following(client, IDS, {"last-event-id": ids[0]}) as earlier:
            await earlier.until(4)
    assert earlier.events == first.events[1:] + again.events
    assert len({each["jobId"] for each in (*first.data, *again.data)}) == 5


async def test_a_client_continues_in_another_process(
    visit: Visit, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have read events for longer than their clocks may differ.
    monkeypatch.setattr(recent_events, "MAX_CLOCK_SKEW", -60.0)
    async with visit() as one, visit() as other:
        async with following(one) as first:
            await queue_of(one).enqueue_many([PING] * 3)
            await first.until(3)
        await queue_of(one).enqueue(PONG)
        monkeypatch.setattr(recent_events, "MAX_CLOCK_SKEW", 5.0)
        last = {"last-event-id": first.events[1][0]}
        if database_url.startswith("postgresql"):
            # It began to read events too short a time ago to know that none is missing.
            async with following(other, IDS, last) as refused:
                await refused.until(1)
            assert refused.codes == ["events_missed"]
        monkeypatch.setattr(queue_of(other).events._recent, "_complete_since", 0.0)
        async with following(other, IDS, last) as again:
            await again.until(2)
    assert again.data[0] == first.data[2]


async def test_a_client_continues_after_a_restart_where_the_database_keeps_events_in_order(
    visit: Visit, database_url: str
) -> None:
    async with visit() as old:
        async with following(old) as first:
            await queue_of(old).enqueue_many([PING] * 3)
            await first.until(3)
        await queue_of(old).enqueue(PONG)
    last = {"last-event-id": first.events[1][0]}
    async with visit() as new:
        await queue_of(new).enqueue(PING)
        async with following(new, IDS, last) as again:
            if database_url.startswith("postgresql"):
                await again.until(1)
                assert again.codes == ["events_missed"]
                return
            await again.until(3)
            await queue_of(new).enqueue(PONG)
            await again.until(4)
        async with following(new, IDS, {"last-event-id": again.events[0][0]}) as later:
            await later.until(3)
    assert again.data[0] == first.data[2]
    assert len({each["jobId"] for each in again.data}) == 4
    assert later.data == again.data[1:]


async def test_no_more_events_of_the_time_before_a_restart_are_read_than_are_kept(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    async with visit() as old:
        for _ in range(6):
            await queue_of(old).enqueue_many([PING] * 3)
    read = 0

    def counted(text: str | bytes) -> events.Message:
        nonlocal read
        read += 1
        return decode(text)

    decode = events.decode
    monkeypatch.setattr(events, "MAX_KEPT_EVENTS", 4)
    monkeypatch.setattr(events, "decode", counted)
    async with visit() as new:
        await queue_of(new).events.recall("unknown")
    # PostgreSQL does not keep them in order.
    assert read == (0 if database_url.startswith("postgresql") else 2)


@pytest.mark.parametrize(
    "unknown",
    [
        "1",
        "0123456789ab/1/2/3/4",
        f"0123456789ab/{'9' * 400}/{NOWHERE}/job.created/0",
        "é/é",
        "x" * 5_000,
    ],
)
async def test_a_client_that_cannot_continue_is_told_so_once(visit: Visit, unknown: str) -> None:
    async with visit() as client:
        await queue_of(client).enqueue(PING)
        async with following(client, IDS, {"last-event-id": unknown}) as stream:
            await stream.until(1)
    assert stream.codes == ["events_missed"]
    # The empty id resets that of a browser, which then connects without one.
    assert stream.events[0][0] == ""
    assert stream.text.endswith("event: complete\ndata:\n\n")


async def test_whoever_continues_to_follow_one_job_gets_its_changes_and_not_its_state(
    visit: Visit,
) -> None:
    async with visit() as client:
        queue = queue_of(client)
        job = (await queue.enqueue(PING)).job
        async with following(client, ONE, id=str(job.id)) as first:
            (lease,) = await queue.lease(["test.ping"], "w")
            await first.until(2)
        # The state has no id: whoever reconnects after it alone begins with the state again.
        assert [each[0] == "none" for each in first.events] == [True, False]
        await queue.enqueue_many([PING] * 100)
        await queue.complete(lease.token)
        last = {"last-event-id": first.events[1][0]}
        async with following(client, ONE, last, id=str(job.id)) as again:
            await again.until(1)
    assert [each["name"] for each in (*first.data, *again.data)] == [
        "job.current",
        "job.started",
        "job.succeeded",
    ]


@pytest.mark.parametrize("unknown", ["1", f"0123456789ab/1/{NOWHERE}/job.created/0"])
async def test_whoever_cannot_continue_to_follow_one_job_begins_with_its_state(
    visit: Visit, unknown: str
) -> None:
    async with visit() as client:
        queue = queue_of(client)
        job = (await queue.enqueue(PING)).job
        last = {"last-event-id": unknown}
        async with following(client, ONE, last, id=str(job.id)) as again:
            await again.until(1)
            await queue.cancel(job.id)
            await again.until(2)
    assert [each["name"] for each in again.data] == ["job.current", "job.cancelled"]


async def test_whoever_continues_sees_no_more_than_before(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        queue = queue_of(client)
        ada = bearer("ada", "jobs:own")
        async with following(client, IDS, ada) as first:
            await queue.enqueue(PING, created_by="ada")
            await first.until(1)
        last = {"last-event-id": first.events[0][0]}
        await queue.enqueue(PING, created_by="bob")
        job = (await queue.enqueue(PING, created_by="ada")).job
        async with following(client, IDS, ada | last) as own:
            await own.until(1)
    assert own.data == [{"jobId": str(job.id)}]


async def test_an_id_tells_nothing_of_the_events_of_others(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with visit(**AUTH) as client:
        queue = queue_of(client)
        job = (await queue.enqueue(PING, created_by="ada")).job
        now = int(time.time())
        monkeypatch.setattr(queue.events._recent, "_complete_since", 0.0)
        happened = f"0123456789ab/{now}/{job.id.hex}/job.created/0"
        invented = f"0123456789ab/{now}/{job.id.hex}/job.succeeded/1"
        bob = bearer("bob", "jobs:own")
        pongs = bearer("eve", "jobs:read", **{JOB_TYPES_CLAIM: ["test.pong"]})
        reader = bearer("r", "jobs:read")
        found = []
        for event_id in (happened, invented):
            last = {"last-event-id": event_id}
            for headers, query, variables in (
                (bob, IDS, {}),
                (bob, ONE, {"id": str(job.id)}),
                (pongs, IDS, {}),
                (pongs, ONE, {"id": str(job.id)}),
                (reader, JOBS, {"types": ["test.pong"]}),
            ):
                async with following(client, query, headers | last, **variables) as stream:
                    await stream.until(1)
                found.append(stream.codes)
        async with following(client, IDS, reader | {"last-event-id": happened}) as good:
            await queue.enqueue(PONG)
            await good.until(1)
    assert found[:5] == found[5:]
    assert [codes[0] for codes in found[:2]] == ["events_missed", "job_not_found"]
    assert good.codes == []
