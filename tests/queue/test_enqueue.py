"""Enqueueing: policies applied, keys honoured, commits shared, all or none."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue
from sqlalchemy.engine import make_url

from job_registry import (
    EnqueueRequest,
    JobRegistry,
    JobType,
    JobTypeNotFound,
    Payload,
    PayloadInvalid,
)
from job_registry.errors import FaultBudget
from job_registry_api.defaults import MAX_PAGE_SIZE
from job_registry_api.queue.enqueueing import Enqueued, ExistingValues
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    InputInvalid,
    JobNotFound,
    QueueUnavailable,
)
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.requests import (
    EARLIEST,
    LATEST,
    differing_paths,
    read_request,
)
from job_registry_api.queue.store import NewJob, Stored
from tests.conftest import run_sql

THUMBNAIL = {"assetId": "id", "versionNumber": 1}


class Anything(Payload):
    """Any JSON."""

    value: JsonValue


def ping(text: str = "hello", **options: Any) -> EnqueueRequest:
    return EnqueueRequest("test.ping", {"text": text}, **options)


async def test_an_enqueued_job_is_stored_with_the_limits_of_its_policy(queue: JobQueue) -> None:
    enqueued = await queue.enqueue(EnqueueRequest("thumbnail.create", THUMBNAIL))

    job = await queue.get(enqueued.job.id)
    assert job == enqueued.job
    assert job.status is JobStatus.QUEUED
    assert (job.attempt, job.max_attempts, job.timeout_seconds, job.priority) == (0, 3, 300, 50)
    assert job.payload == THUMBNAIL
    assert job.id.version == 7
    assert job.fingerprint == queue.registry["thumbnail.create"].fingerprint


async def test_the_calls_max_attempts_override_the_policys(queue: JobQueue) -> None:
    job = (await queue.enqueue(ping(max_attempts=10))).job
    assert (await queue.get(job.id)).max_attempts == 10


@pytest.mark.cases(3)
@pytest.mark.parametrize("hours", [-23, -16, 16, 19, 23])
async def test_a_time_may_have_any_offset(queue: JobQueue, hours: int) -> None:
    later = datetime(2055, 5, 9, 5, tzinfo=timezone(timedelta(hours=hours, minutes=9)))
    one = await queue.enqueue(ping(schedule_at=later))
    keyed = await queue.enqueue(ping(schedule_at=later, idempotency_key="k"))
    many = await queue.enqueue_many([ping(schedule_at=later)] * 2)
    for enqueued in (one, keyed, *many):
        assert isinstance(enqueued, Enqueued)
        assert (await queue.get(enqueued.job.id)).next_run_at == later
        assert enqueued.job.next_run_at == later


async def test_schedule_at_delays_the_first_run(queue: JobQueue) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    job = (await queue.enqueue(ping(schedule_at=later))).job

    stored = await queue.get(job.id)
    assert stored.next_run_at is not None
    assert abs(stored.next_run_at - later) < timedelta(milliseconds=1)
    assert await queue.lease(["test.ping"], "w") == []


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"priority": 101}, "/priority"),
        ({"priority": -1}, "/priority"),
        ({"max_attempts": 0}, "/maxAttempts"),
        ({"max_attempts": 1001}, "/maxAttempts"),
        ({"idempotency_key": ""}, "/idempotencyKey"),
        ({"idempotency_key": "x" * 256}, "/idempotencyKey"),
        ({"idempotency_key": "a\0b"}, "/idempotencyKey"),
        ({"schedule_at": datetime(2030, 1, 1)}, "/scheduleAt"),
        ({"schedule_at": EARLIEST - timedelta(microseconds=1)}, "/scheduleAt"),
        ({"schedule_at": LATEST}, "/scheduleAt"),
    ],
)
async def test_a_value_out_of_its_range_is_refused_and_nothing_is_stored(
    queue: JobQueue, options: dict[str, Any], path: str
) -> None:
    with pytest.raises(InputInvalid) as refused:
        await queue.enqueue(ping(**options))
    assert [violation.path for violation in refused.value.violations] == [path]
    assert (await queue.list()).jobs == []


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "options",
    [
        {"priority": 0},
        {"priority": 100},
        {"max_attempts": 1},
        {"max_attempts": 1_000},
        {"idempotency_key": "x"},
        {"idempotency_key": "x" * 255},
        {"schedule_at": EARLIEST},
        {"schedule_at": LATEST - timedelta(microseconds=1)},
    ],
)
async def test_the_ends_of_each_range_are_accepted(
    queue: JobQueue, options: dict[str, Any]
) -> None:
    job = await queue.get((await queue.enqueue(ping(**options))).job.id)
    for name, value in options.items():
        assert getattr(job, "next_run_at" if name == "schedule_at" else name) == value


async def test_faults_of_the_input_and_of_the_payload_are_reported_together(
    queue: JobQueue,
) -> None:
    with pytest.raises(InputInvalid) as refused:
        await queue.enqueue(EnqueueRequest("thumbnail.create", {}, priority=101, max_attempts=0))
    assert {violation.path for violation in refused.value.violations} == {
        "/priority",
        "/maxAttempts",
        "/payload/assetId",
        "/payload/versionNumber",
    }


async def test_an_unknown_type_and_an_invalid_payload_are_refused(queue: JobQueue) -> None:
    with pytest.raises(JobTypeNotFound):
        await queue.enqueue(EnqueueRequest("unknown.job", {}))
    with pytest.raises(PayloadInvalid) as refused:
        await queue.enqueue(EnqueueRequest("thumbnail.create", {"versionNumber": 1}))
    assert [v.path for v in refused.value.violations] == ["/assetId"]


async def test_a_job_that_is_given_back_has_its_result(queue: JobQueue) -> None:
    keyed = ping(idempotency_key="k")
    await queue.enqueue(keyed)
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.complete(lease.token, {"done": True})
    assert (await queue.enqueue(keyed)).job.result == {"done": True}
    (given,) = await queue.enqueue_many([keyed])
    assert isinstance(given, Enqueued)
    assert (given.deduplicated, given.job.result) == (True, {"done": True})


async def test_the_values_of_existing_jobs_are_checked_before_any_job_is_stored(
    queue: JobQueue,
) -> None:
    def refuse(size: int) -> None:
        raise ValueError(f"{size > 1_000}")

    keyed = ping(idempotency_key="k")
    await queue.enqueue(keyed)
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.complete(lease.token, "x" * 5_000)
    with pytest.raises(ValueError, match="True"):
        await queue.enqueue_many([ping(), keyed], values=ExistingValues(check=refuse))
    assert (await queue.count()).jobs == 1


async def test_the_same_key_and_payload_give_back_the_first_job(queue: JobQueue) -> None:
    first = await queue.enqueue(ping(idempotency_key="k"))
    again = await queue.enqueue(ping(idempotency_key="k"))
    other_type = await queue.enqueue(
        EnqueueRequest("test.pong", {"text": "hello"}, idempotency_key="k")
    )

    assert (again.deduplicated, again.job.id) == (True, first.job.id)
    assert not other_type.deduplicated


async def test_the_same_key_with_another_payload_is_a_conflict_that_says_where(
    queue: JobQueue,
) -> None:
    first = await queue.enqueue(ping("one", idempotency_key="k"))
    with pytest.raises(IdempotencyConflict) as refused:
        await queue.enqueue(ping("two", idempotency_key="k"))
    assert refused.value.existing_job.id == first.job.id
    assert refused.value.differing_paths == ("/text",)


async def test_equal_payloads_with_different_texts_are_the_same(
    database_url: str,
) -> None:
    one: dict[str, Any] = {"value": {"a": 1, "b": [1.0, 1e18, "x" * 5_000]}}
    other: dict[str, Any] = {"value": {"b": [1, 1_000_000_000_000_000_000, "x" * 5_000], "a": 1.0}}
    anything = JobType(name="test.anything", payload=Anything, example={"value": 1})
    async with JobQueue.from_url(database_url, JobRegistry([anything])) as queue:
        requests = [
            EnqueueRequest("test.anything", payload, idempotency_key="k")
            for payload in (one, other, {"value": {**other["value"], "a": True}})
        ]
        first = await queue.enqueue(requests[0])
        assert (await queue.enqueue(requests[1])).job.id == first.job.id
        for atomic in (False, True):
            (same,) = await queue.enqueue_many([requests[1]], atomic=atomic)
            assert isinstance(same, Enqueued)
            assert (same.deduplicated, same.job.id) == (True, first.job.id)
            assert same.job.payload == one
            (differs,) = await queue.enqueue_many([requests[2]], atomic=atomic)
            assert isinstance(differs, IdempotencyConflict)
            assert differs.differing_paths == ("/value/a",)
            assert differs.existing_job == await queue.get(first.job.id)


async def test_a_bulk_compares_payloads_up_to_a_size(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job_registry_api.queue.enqueueing.COMPARED_BYTES", 10_000)
    keys = [f"k{n}" for n in range(60)]
    for key in keys:
        await queue.enqueue(ping("a" * 5_000 if key == "k1" else "a", idempotency_key=key))
    results: Any = await queue.enqueue_many([ping("b", idempotency_key=key) for key in keys])
    assert [conflict.differing_paths for conflict in results] == [("/text",)] * 60

    monkeypatch.setattr("job_registry_api.queue.enqueueing.COMPARED_BYTES", 0)
    results = await queue.enqueue_many([ping("b", idempotency_key=key) for key in keys])
    assert [conflict.differing_paths for conflict in results] == [("",)] * 60
    assert results[1].existing_job.payload == {"text": "a" * 5_000}


async def test_a_bulk_stores_a_job_whose_key_was_freed_while_it_ran(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await queue.enqueue(ping("one", idempotency_key="k"))
    insert = queue._insert_bulk

    async def insert_and_delete(*arguments: Any, **options: Any) -> Any:
        stored = await insert(*arguments, **options)
        await asyncio.to_thread(
            run_sql, database_url, "DELETE FROM job WHERE idempotency_key = 'k'"
        )
        return stored

    monkeypatch.setattr(queue, "_insert_bulk", insert_and_delete)
    (result,) = await queue.enqueue_many([ping("two", idempotency_key="k")])
    assert isinstance(result, Enqueued)
    assert result.job.id != first.job.id
    assert (await queue.get(result.job.id)).payload == {"text": "two"}


async def test_a_bulk_is_answered_though_a_job_whose_key_was_freed_cannot_be_stored(
    queue: JobQueue, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await queue.enqueue(ping("one", idempotency_key="k"))
    insert = queue._insert_bulk

    async def away(_new: NewJob) -> Stored:
        raise QueueUnavailable("it is away for a moment")

    async def insert_and_delete(*arguments: Any, **options: Any) -> Any:
        stored = await insert(*arguments, **options)
        delete = "DELETE FROM job WHERE idempotency_key = 'k'"
        await asyncio.to_thread(run_sql, database_url, delete)
        monkeypatch.setattr(queue, "_insert_one", away)
        return stored

    monkeypatch.setattr(queue, "_insert_bulk", insert_and_delete)
    again, new = await queue.enqueue_many([ping("one", idempotency_key="k"), ping("new")])
    assert isinstance(again, Enqueued)
    assert (again.job.id, again.deduplicated) == (first.job.id, True)
    assert isinstance(new, Enqueued)
    assert (await queue.get(new.job.id)).payload == {"text": "new"}


async def test_a_stored_job_is_answered_though_the_holder_of_another_key_cannot_be_read(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await queue.enqueue(ping(idempotency_key="held"))
    holders = queue._store.holders

    async def away(_jobs: Sequence[NewJob]) -> dict[uuid.UUID, Stored]:
        monkeypatch.setattr(queue._store, "holders", holders)
        raise QueueUnavailable("it is away for a moment")

    monkeypatch.setattr(queue._store, "holders", away)
    # Both are in one group.
    again, new = await asyncio.gather(
        queue.enqueue(ping(idempotency_key="held")), queue.enqueue(ping(idempotency_key="free"))
    )
    assert (again.job.id, again.deduplicated) == (first.job.id, True)
    assert not new.deduplicated


async def test_a_key_holds_whatever_became_of_its_job(queue: JobQueue) -> None:
    first = await queue.enqueue(ping(idempotency_key="k"))
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.complete(lease.token)

    again = await queue.enqueue(ping(idempotency_key="k"))
    assert (again.job.id, again.job.status) == (first.job.id, JobStatus.SUCCEEDED)


async def test_a_key_belongs_to_its_type(queue: JobQueue) -> None:
    requests = [
        EnqueueRequest(name, {}, idempotency_key="k") for name in ("test.pong", "test.ping")
    ]
    first = [await queue.enqueue(request) for request in requests]
    for request, enqueued in zip(requests, first, strict=True):
        for again in (await queue.enqueue(request), *await queue.enqueue_many([request])):
            assert not isinstance(again, Exception)
            assert (again.job.id, again.deduplicated) == (enqueued.job.id, True)
        duplicate = await queue.validate(request)
        assert duplicate.duplicate_of is not None
        assert duplicate.duplicate_of.id == enqueued.job.id


async def test_fifty_concurrent_callers_with_one_key_make_one_job(queue: JobQueue) -> None:
    results = await asyncio.gather(*(queue.enqueue(ping(idempotency_key="k")) for _ in range(50)))
    assert len({result.job.id for result in results}) == 1
    assert sum(not result.deduplicated for result in results) == 1


async def test_concurrent_enqueues_share_commits(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a store that notes the size of each insert
    sizes: list[int] = []
    insert = queue._store.insert_unkeyed

    async def noting(jobs: Sequence[NewJob], sender: str) -> list[Stored]:
        sizes.append(len(jobs))
        return await insert(jobs, sender)

    monkeypatch.setattr(queue._store, "insert_unkeyed", noting)

    # When a hundred callers come at once
    await asyncio.gather(*(queue.enqueue(ping(str(n))) for n in range(100)))

    # I expect all of them stored, in few inserts: what came during one went with the next
    assert sum(sizes) == 100
    assert len(sizes) <= 3
    assert len((await queue.list(first=200)).jobs) == 100


async def test_one_callers_bad_row_never_fails_anothers(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a row that passes every check of ours and that the database refuses all the same
    monkeypatch.setattr("job_registry_api.queue.enqueueing.input_faults", lambda request: iter(()))

    results = await asyncio.gather(
        *(queue.enqueue(ping(str(n), priority=7 if n == 3 else None)) for n in range(5)),
        queue.enqueue(ping("bad", priority=1_000)),
        return_exceptions=True,
    )

    assert [isinstance(result, Enqueued) for result in results] == [True] * 5 + [False]
    assert len((await queue.list()).jobs) == 5


async def test_an_enqueue_is_visible_to_others_once_it_is_answered(
    queue: JobQueue, database_url: str
) -> None:
    job = (await queue.enqueue(ping())).job
    rows = await asyncio.to_thread(run_sql, database_url, "SELECT id FROM job")
    assert str(rows[0][0]).replace("-", "") == job.id.hex


async def test_a_bulk_answers_each_in_order(queue: JobQueue) -> None:
    results = await queue.enqueue_many(
        [ping("a"), EnqueueRequest("nope", {}), ping("b", priority=999), ping("c")]
    )
    kinds = [type(result).__name__ for result in results]
    assert kinds == ["Enqueued", "JobTypeNotFound", "InputInvalid", "Enqueued"]
    jobs = (await queue.list()).jobs
    assert [job.payload for job in jobs] == [{"text": "c"}, {"text": "a"}]


async def test_each_job_of_a_bulk_is_stored_with_what_it_has(queue: JobQueue) -> None:
    later = datetime(2030, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    jobs = [
        ping(
            f'"{n}", {{NULL}} \\',
            priority=n % 3,
            max_attempts=1 + n % 4,
            schedule_at=later if n % 2 else None,
        )
        for n in range(24)
    ]
    results = await queue.enqueue_many(jobs, created_by="ada, {x}")
    for job, result in zip(jobs, results, strict=True):
        assert isinstance(result, Enqueued)
        stored = await queue.get(result.job.id)
        assert stored == result.job
        assert (stored.payload, stored.priority, stored.max_attempts, stored.created_by) == (
            job.payload,
            job.priority,
            job.max_attempts,
            "ada, {x}",
        )
        assert stored.next_run_at == (job.schedule_at or stored.created_at)
        assert result.job.next_run_at is not None
        assert result.job.next_run_at.utcoffset() == timedelta()


async def test_jobs_are_stored_where_arrays_have_no_nulls(
    fresh_postgresql_url: str, registry: JobRegistry
) -> None:
    name = make_url(fresh_postgresql_url).database
    setting = f"ALTER DATABASE {name} SET array_nulls = off"
    await asyncio.to_thread(run_sql, fresh_postgresql_url, setting)
    later = datetime(2030, 1, 1, tzinfo=UTC)
    async with JobQueue.from_url(fresh_postgresql_url, registry) as queue:
        stored = await queue.enqueue(ping("now"))
        assert stored.job.next_run_at == stored.job.created_at
        assert (await queue.enqueue(ping("later", schedule_at=later))).job.next_run_at == later


async def test_an_atomic_bulk_stores_all_or_none(queue: JobQueue) -> None:
    good = await queue.enqueue_many([ping("a"), ping("b")], atomic=True)
    assert all(isinstance(result, Enqueued) for result in good)

    refused = await queue.enqueue_many([ping("c"), EnqueueRequest("nope", {})], atomic=True)
    assert [type(result).__name__ for result in refused] == ["InputInvalid", "JobTypeNotFound"]
    assert isinstance(refused[0], InputInvalid)
    assert refused[0].violations[0].code == "not_stored"
    reason = "Not stored: the call is atomic, and the job at index 1 was refused."
    assert (refused[0].violations[0].message, str(refused[0])) == (reason, reason)
    assert len((await queue.list()).jobs) == 2


async def test_an_atomic_bulk_is_undone_by_a_conflicting_key(queue: JobQueue) -> None:
    await queue.enqueue(ping("one", idempotency_key="k"))
    results = await queue.enqueue_many([ping("x"), ping("two", idempotency_key="k")], atomic=True)
    assert [type(result).__name__ for result in results] == ["InputInvalid", "IdempotencyConflict"]
    assert len((await queue.list()).jobs) == 1


async def test_one_bulk_with_a_key_twice_stores_it_once(queue: JobQueue) -> None:
    results = await queue.enqueue_many(
        [ping(idempotency_key="k"), ping(idempotency_key="k"), ping("z", idempotency_key="k")]
    )
    assert [getattr(result, "deduplicated", None) for result in results] == [False, True, None]


async def test_a_thousand_jobs_go_in_one_call_and_no_more(queue: JobQueue) -> None:
    results = await queue.enqueue_many([ping(str(n)) for n in range(1_000)])
    assert sum(isinstance(result, Enqueued) for result in results) == 1_000
    assert (await queue.counts())["test.ping"].queued == 1_000
    with pytest.raises(InputInvalid):
        await queue.enqueue_many([ping()] * 1_001)


async def test_a_dry_run_says_what_enqueue_would_and_writes_nothing(queue: JobQueue) -> None:
    valid = await queue.validate(ping(max_attempts=7))
    assert (valid.max_attempts, valid.timeout_seconds, valid.duplicate_of) == (7, 60, None)
    assert (await queue.list()).jobs == []

    past = ping(schedule_at=datetime(2020, 1, 1, tzinfo=UTC))
    next_run_at = (await queue.validate(past)).next_run_at
    assert next_run_at == (await queue.enqueue(past)).job.next_run_at

    first = await queue.enqueue(ping(idempotency_key="k"))
    duplicate = await queue.validate(ping(idempotency_key="k"))
    assert duplicate.duplicate_of == first.job
    with pytest.raises(IdempotencyConflict):
        await queue.validate(ping("other", idempotency_key="k"))


async def test_pages_hold_every_job_once_newest_first(queue: JobQueue) -> None:
    await queue.enqueue_many([ping(str(n)) for n in range(7)])
    await queue.enqueue(EnqueueRequest("test.pong", {}))

    seen, after = [], None
    while True:
        page = await queue.list(JobFilter(types=("test.ping",)), first=3, after=after)
        seen += [job.payload for job in page.jobs]
        after = page.jobs[-1].id
        if not page.has_next_page:
            break
    assert seen == [{"text": str(n)} for n in reversed(range(7))]
    both = JobFilter(types=("test.ping", "test.pong"), statuses=(JobStatus.QUEUED,))
    assert len((await queue.list(both)).jobs) == 8
    for first in (0, 201):
        with pytest.raises(InputInvalid):
            await queue.list(first=first)


async def test_a_page_has_one_job_to_the_most_that_is_allowed(queue: JobQueue) -> None:
    await queue.enqueue_many([ping()] * 3)
    for first in (0, MAX_PAGE_SIZE + 1):
        with pytest.raises(InputInvalid):
            await queue.list(first=first)
    page = await queue.list(first=1)
    assert (len(page.jobs), page.has_next_page) == (1, True)
    page = await queue.list(first=3)
    assert (len(page.jobs), page.has_next_page) == (3, False)
    assert len((await queue.list(first=MAX_PAGE_SIZE)).jobs) == 3


async def test_pages_of_several_types_and_statuses_hold_every_job_once(queue: JobQueue) -> None:
    for n in range(9):
        name, payload = ("test.pong", {}) if n % 3 == 0 else ("test.ping", {"text": str(n)})
        await queue.enqueue(EnqueueRequest(name, payload))
    leased = await queue.lease(["test.ping"], "w", limit=2)
    every = [job.id for job in (await queue.list()).jobs]
    running = {lease.job.id for lease in leased}
    for statuses, wanted in (
        (None, every),
        ((JobStatus.RUNNING,), [job_id for job_id in every if job_id in running]),
        (
            (JobStatus.QUEUED, JobStatus.FAILED),
            [job_id for job_id in every if job_id not in running],
        ),
        ((JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.QUEUED), every),
    ):
        found, after = [], None
        names = ("test.ping", "test.pong", "test.ping", "a.nother")
        while True:
            page = await queue.list(JobFilter(names, statuses), first=4, after=after)
            found += [job.id for job in page.jobs]
            if not page.has_next_page:
                break
            after = found[-1]
        assert found == wanted


async def test_a_short_page_of_several_types_has_the_newest_of_each(queue: JobQueue) -> None:
    jobs = [
        (await queue.enqueue(EnqueueRequest(name, {}))).job.id
        for name in ("test.ping", "test.ping", "test.ping", "test.pong", "test.pong", "test.pong")
    ]
    for types in (("test.ping", "test.pong"), ("test.pong", "test.limited")):
        page = await queue.list(JobFilter(types=types), first=2)
        assert [job.id for job in page.jobs] == [jobs[5], jobs[4]]
    page = await queue.list(JobFilter(types=("test.ping", "test.limited")), first=1)
    assert [job.id for job in page.jobs] == [jobs[2]]


async def test_a_page_of_every_type_and_status_is_cheap(queue: JobQueue) -> None:
    names = tuple(f"test.n{number}" for number in range(100))
    await queue.list(JobFilter(names, tuple(JobStatus)))
    start = time.process_time()
    for _ in range(5):
        await queue.list(JobFilter(names, tuple(JobStatus)))
    assert time.process_time() - start < 0.5


async def test_a_bulk_of_faults_does_not_hold_up_others(queue: JobQueue) -> None:
    faulty = EnqueueRequest("test.ping", {f"tex{number}": 1 for number in range(50)})
    bulk = asyncio.create_task(queue.enqueue_many([faulty] * 600))
    longest, turn = 0.0, time.perf_counter()
    while not bulk.done():
        await asyncio.sleep(0)
        longest, turn = max(longest, time.perf_counter() - turn), time.perf_counter()
    assert all(isinstance(result, PayloadInvalid) for result in await bulk)
    assert longest < 0.6


@pytest.mark.parametrize("job_id", ["", "nope", "01a20b59-007a-7389-bb53-785ecafc486c"])
async def test_an_id_that_is_none_is_not_found(queue: JobQueue, job_id: str) -> None:
    with pytest.raises(JobNotFound):
        await queue.get(job_id)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(progress=JSON_VALUES.filter(lambda value: value is not None))
async def test_json_comes_back_as_it_went_in(queue: JobQueue, progress: Any) -> None:
    job = (await queue.enqueue(ping())).job
    lease = next(
        lease
        for lease in await queue.lease(["test.ping"], "w", limit=100)
        if lease.job.id == job.id
    )
    await queue.complete(lease.token, progress)
    assert differing_paths((await queue.get(job.id)).result, progress) == ()


def test_requests_as_json_are_refused_with_every_fault() -> None:
    request, faults = read_request(
        {"payload": {}, "priority": "5", "maxAttempts": True, "scheduleAt": "soon", "x": 1},
        FaultBudget(),
    )
    assert request is None
    assert {(v.path, v.code) for v in faults} == {
        ("/type", "required"),
        ("/priority", "wrong_type"),
        ("/maxAttempts", "wrong_type"),
        ("/scheduleAt", "invalid_format"),
        ("/x", "unknown_field"),
    }
    request, faults = read_request([1], FaultBudget())
    assert (request, [(v.path, v.code) for v in faults]) == (None, [("", "wrong_type")])


@pytest.mark.parametrize(
    ("one", "other", "paths"),
    [
        ({"a": 1}, {"a": 1.0}, ()),
        ({"a": 1}, {"a": True}, ("/a",)),
        ({"a": [1, 2]}, {"a": [1, 3]}, ("/a/1",)),
        ({"a": [1, 2]}, {"a": [1]}, ("/a",)),
        ({"a/b": 1, "~": 2}, {"~": 3}, ("/a~1b", "/~0")),
        ({"a": None}, {}, ("/a",)),
        ([], {}, ("",)),
        ([1], {"a": 1}, ("",)),
        ({"a": {}}, {"a": []}, ("/a",)),
    ],
)
def test_differing_paths_are_json_pointers(one: Any, other: Any, paths: tuple[str, ...]) -> None:
    assert differing_paths(one, other) == paths


def test_of_many_differing_paths_the_first_100_are_told_and_none_is_long() -> None:
    long = "x" * 3_000
    one: JsonValue = {long: {str(number): number for number in range(1_000)}}
    other: JsonValue = {long: {str(number): -1 - number for number in range(1_000)}}
    assert differing_paths(one, other) == ("",) * 100


@pytest.mark.parametrize("key", [None, "key"])
async def test_when_the_commit_fails_each_caller_gets_the_error_and_nothing_is_stored(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    # Given a database that goes away before the commit
    async def away(*_arguments: object) -> None:
        raise ConnectionResetError("the database went away before the commit")

    def lost(*_arguments: object) -> None:
        raise sqlite3.OperationalError("the database went away before the commit")

    with monkeypatch.context() as broken:
        broken.setattr("asyncpg.Connection.fetch", away)
        broken.setattr("job_registry_api.queue.sqlite._Transaction.announce", lost)
        jobs = [ping(idempotency_key=key and f"{key} {n}") for n in range(10)]
        results = await asyncio.gather(*map(queue.enqueue, jobs), return_exceptions=True)
    assert [type(result) for result in results] == [QueueUnavailable] * 10

    assert (await queue.list()).jobs == []
    assert (await queue.enqueue(ping())).job.status is JobStatus.QUEUED


async def test_an_atomic_bulk_with_one_key_for_two_payloads_names_no_job_that_was_not_stored(
    queue: JobQueue,
) -> None:
    bulk = [ping("one", idempotency_key="k"), ping("two", idempotency_key="k"), ping("three")]
    results = await queue.enqueue_many(bulk, atomic=True)
    assert (await queue.list()).jobs == []
    first, second, third = results
    assert isinstance(second, InputInvalid)
    (violation,) = second.violations
    assert (violation.path, violation.code) == ("/idempotencyKey", "duplicate_key")
    assert "index 0" in violation.message
    for other in (first, third):
        assert isinstance(other, InputInvalid)
        assert other.violations[0].code == "not_stored"


async def test_an_atomic_bulk_with_one_key_and_payload_twice_stores_it_once(
    queue: JobQueue,
) -> None:
    results = await queue.enqueue_many([ping("one", idempotency_key="k")] * 2, atomic=True)
    assert [getattr(result, "deduplicated", None) for result in results] == [False, True]
    assert len((await queue.list()).jobs) == 1


@pytest.mark.any_database
async def test_an_option_of_another_type_is_refused(queue: JobQueue) -> None:
    wrong: list[dict[str, Any]] = [
        {"priority": True, "max_attempts": True},
        {"priority": 1.5, "max_attempts": "5"},
        {"schedule_at": "2030-01-31T12:00:00Z", "idempotency_key": 7},
        {"schedule_at": timedelta(hours=1), "idempotency_key": b"key"},
    ]
    said: list[str] = []
    for options in wrong:
        with pytest.raises(InputInvalid) as caught:
            await queue.enqueue(ping(**options))
        assert {each.code for each in caught.value.violations} == {"wrong_type"}
        said += [f"{each.path}: {each.message}" for each in caught.value.violations]
    assert said == [
        "/priority: Expected a whole number from 0 to 100; got true.",
        "/maxAttempts: Expected a whole number from 1 to 1,000; got true.",
        "/priority: Expected a whole number from 0 to 100; got 1.5.",
        '/maxAttempts: Expected a whole number from 1 to 1,000; got "5".',
        '/scheduleAt: Expected a datetime with an offset from UTC; got "2030-01-31T12:00:00Z".',
        "/idempotencyKey: Expected a string of 1 to 255 characters; got 7.",
        "/scheduleAt: Expected a datetime with an offset from UTC; got a value of the type"
        " timedelta.",
        "/idempotencyKey: Expected a string of 1 to 255 characters; got a value of the type bytes.",
    ]


@pytest.mark.any_database
@pytest.mark.parametrize(
    ("creator", "code"),
    [
        (7, "wrong_type"),
        (b"ada", "wrong_type"),
        ("a\0", "invalid_text"),
        ("a" * 256, "out_of_range"),
    ],
)
async def test_a_creator_that_is_not_a_short_text_is_refused(
    queue: JobQueue, creator: Any, code: str
) -> None:
    with pytest.raises(InputInvalid) as caught:
        await queue.enqueue(ping(), created_by=creator)
    (in_bulk,) = await queue.enqueue_many([ping()], created_by=creator)
    assert isinstance(in_bulk, InputInvalid)
    for refused in (caught.value, in_bulk):
        assert [(each.path, each.code) for each in refused.violations] == [("/createdBy", code)]
    assert (await queue.count()).jobs == 0
