"""Which jobs each filter finds. What that costs is in `test_filter_cost.py`."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from job_registry import EnqueueRequest, Violation
from job_registry_api import JobFilter, JobQueue
from job_registry_api.queue import filters
from job_registry_api.queue.errors import InputInvalid
from job_registry_api.queue.models import JobError, JobRecord, JobStatus, Owner
from job_registry_api.queue.reading import JobTotal

PING = EnqueueRequest("test.ping", {})
PONG = EnqueueRequest("test.pong", {})


async def found(queue: JobQueue, **fields: Any) -> list[uuid.UUID]:
    return [job.id for job in (await queue.list(JobFilter(**fields))).jobs]


async def failed(queue: JobQueue, code: str, message: str, *, by: str | None = None) -> JobRecord:
    await queue.enqueue(EnqueueRequest("test.pong", {}, max_attempts=1), created_by=by)
    (lease,) = await queue.lease(["test.pong"], "w")
    return await queue.fail(lease.token, JobError(code, message))


async def test_jobs_are_found_by_who_enqueued_them(queue: JobQueue) -> None:
    ada = [(await queue.enqueue(request, created_by="ada")).job.id for request in (PING, PONG)]
    await queue.enqueue(PING, created_by="bob")
    await queue.enqueue(PING)
    assert await found(queue, created_by="ada") == ada[::-1]
    assert await found(queue, created_by="ada", types=("test.ping",)) == ada[:1]
    assert await found(queue, created_by="ada", statuses=(JobStatus.FAILED,)) == []
    assert await found(queue, created_by="eve") == []


@pytest.mark.any_database
async def test_an_empty_tuple_finds_no_jobs(queue: JobQueue) -> None:
    job = (await queue.enqueue(PING)).job.id
    assert await found(queue, types=None, statuses=None) == [job]
    for empty in ({"types": ()}, {"statuses": ()}, {"types": (), "created_by": "ada"}):
        assert await found(queue, **empty) == []
        assert await queue.count(JobFilter(**cast(Any, empty))) == JobTotal(0, False)


async def test_jobs_are_found_by_the_time_of_their_creation(queue: JobQueue) -> None:
    jobs = []
    for _ in range(3):
        jobs.append((await queue.enqueue(PING)).job)
        await asyncio.sleep(0.01)
    ids = [job.id for job in jobs]
    # From a time on, that time included; before a time, that time excluded.
    assert await found(queue, created_after=jobs[1].created_at) == [ids[2], ids[1]]
    assert await found(queue, created_before=jobs[1].created_at) == [ids[0]]
    window = {"created_after": jobs[1].created_at, "created_before": jobs[2].created_at}
    assert await found(queue, **window) == [ids[1]]
    types = ("test.ping", "test.pong")
    assert await found(queue, **window, types=types, statuses=(JobStatus.QUEUED,)) == [ids[1]]
    assert await found(queue, created_before=datetime(1970, 1, 2, tzinfo=UTC)) == []


async def test_jobs_are_found_by_the_time_of_their_end(queue: JobQueue) -> None:
    early = await failed(queue, "e", "It broke.")
    waiting = (await queue.enqueue(PING)).job
    late = await queue.cancel((await queue.enqueue(PING)).job.id)
    assert early.finished_at is not None
    assert late.finished_at is not None
    assert early.finished_at < late.finished_at
    long_ago = early.finished_at - timedelta(days=1)
    assert await found(queue, finished_after=long_ago) == [late.id, early.id]
    assert await found(queue, finished_after=late.finished_at) == [late.id]
    assert await found(queue, finished_before=late.finished_at) == [early.id]
    assert await found(queue, finished_after=long_ago, statuses=(JobStatus.FAILED,)) == [early.id]
    assert await found(queue, finished_after=long_ago, statuses=(JobStatus.QUEUED,)) == []
    assert await found(queue, finished_after=long_ago, types=("test.ping",)) == [late.id]
    assert waiting.id not in await found(queue, finished_before=late.finished_at)


async def test_jobs_are_found_by_their_key_in_every_type(queue: JobQueue) -> None:
    one = (await queue.enqueue(PING._replace(idempotency_key="k"))).job.id
    two = (await queue.enqueue(PONG._replace(idempotency_key="k"))).job.id
    await queue.enqueue(PING._replace(idempotency_key="other"))
    assert await found(queue, idempotency_key="k") == [two, one]
    assert await found(queue, idempotency_key="k", types=("test.ping",)) == [one]
    assert await found(queue, idempotency_key="none") == []
    by_ada = await queue.enqueue(PONG._replace(idempotency_key="a"), created_by="ada")
    await queue.enqueue(PONG, created_by="ada")
    assert await found(queue, idempotency_key="a", created_by="ada") == [by_ada.job.id]
    assert await found(queue, idempotency_key="k", created_by="ada") == []


async def test_what_a_filter_finds_is_counted(queue: JobQueue) -> None:
    job = await failed(queue, "bank_closed", "The bank is closed.", by="ada")
    for _ in range(2):
        await queue.enqueue(PING, created_by="ada")
    for fields, jobs in (
        ({"created_by": "ada"}, 3),
        ({"created_by": "ada", "types": ("test.ping",)}, 2),
        ({"created_after": job.created_at}, 3),
        ({"finished_after": job.finished_at}, 1),
        ({"finished_before": job.finished_at}, 0),
        ({"error_code": "bank_closed"}, 1),
        ({"search": "bank"}, 1),
        ({"idempotency_key": "k"}, 0),
        ({"types": ("test.ping",)}, 2),
    ):
        wanted: Any = fields
        assert await queue.count(JobFilter(**wanted)) == JobTotal(jobs, False), fields


async def test_jobs_are_found_by_the_code_of_their_latest_error(queue: JobQueue) -> None:
    job = await failed(queue, "bank_closed", "The bank is closed.")
    await queue.enqueue(EnqueueRequest("test.pong", {}))
    (lease,) = await queue.lease(["test.pong"], "w")
    retrying = await queue.fail(lease.token, JobError("bank_closed", "Closed."))
    assert retrying.status is JobStatus.QUEUED
    assert await found(queue, error_code="bank_closed") == [retrying.id, job.id]
    assert await found(queue, error_code="bank_closed", statuses=(JobStatus.FAILED,)) == [job.id]
    assert await found(queue, error_code="bank") == []


async def test_a_search_finds_an_id_a_key_or_words_of_an_error(queue: JobQueue) -> None:
    job = await failed(queue, "bank_closed", "The bank at 100% of the_street is closed.", by="ada")
    other = await failed(queue, "bank_closed", "The bank burnt down.", by="bob")
    keyed = (await queue.enqueue(PING._replace(idempotency_key="invoice 7"))).job
    id_as_key = (await queue.enqueue(PING._replace(idempotency_key=str(job.id)))).job
    for text in (str(other.id), other.id.hex):
        assert await found(queue, search=text) == [other.id], text
    assert await found(queue, search=str(job.id)) == [id_as_key.id, job.id]
    assert await found(queue, search="invoice 7") == [keyed.id]
    assert await found(queue, search="CLOSED street") == [job.id]
    assert await found(queue, search="bank_closed") == [other.id, job.id]
    assert await found(queue, search="burnt bank") == [other.id]
    # No wildcards.
    assert await found(queue, search="100%") == [job.id]
    assert await found(queue, search="10%closed") == []
    assert await found(queue, search="the_bank") == []
    shouted = await failed(queue, "path", r"No such path: C:\bank!", by="carl")
    assert await found(queue, search=r"c:\bank") == [shouted.id]
    assert await found(queue, search="bank!") == [shouted.id]
    await queue.enqueue(PING, created_by="ada")
    assert await found(queue, search="bank", created_by="ada") == [job.id]
    page = await queue.list(JobFilter(search="bank"), owner=Owner("bob"))
    assert [each.id for each in page.jobs] == [other.id]


async def test_pages_of_a_filter_hold_every_job_once(queue: JobQueue) -> None:
    ids = [(await queue.enqueue(PING, created_by="ada")).job.id for _ in range(5)]
    for wanted in (
        JobFilter(created_by="ada"),
        JobFilter(created_after=datetime(2020, 1, 1, tzinfo=UTC)),
    ):
        seen: list[uuid.UUID] = []
        after = None
        while True:
            page = await queue.list(wanted, first=2, after=after)
            seen += [job.id for job in page.jobs]
            if not page.has_next_page:
                break
            after = page.jobs[-1].id
        assert seen == ids[::-1]


async def pages(queue: JobQueue, wanted: JobFilter, *, last: bool) -> tuple[list[uuid.UUID], int]:
    """The jobs of all pages, newest first, and how many pages there are."""
    seen: list[uuid.UUID] = []
    place = None
    for count in range(1, 200):
        if last:
            page = await queue.list(wanted, last=2, before=place)
            more, seen = page.has_previous_page, [job.id for job in page.jobs] + seen
        else:
            page = await queue.list(wanted, first=2, after=place)
            more, seen = page.has_next_page, seen + [job.id for job in page.jobs]
        if not more:
            return seen, count
        assert page.stopped_early == (page.stopped_at is not None)
        place = page.stopped_at or page.jobs[0 if last else -1].id
    raise AssertionError("There is no last page.")


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_pages_of_a_wide_range_of_ends_hold_every_job_once(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """Given jobs that ended in another order than they came in, and more of them than are searched
    for a page, I expect that pages stop early and continue where they stopped."""
    jobs = [(await queue.enqueue(PONG if n % 5 == 0 else PING)).job.id for n in range(24)]
    early = [await queue.cancel(job_id) for job_id in jobs[3:9]]
    for _ in range(4):
        await failed(queue, "e", "It broke.")
    late = [await queue.cancel(job_id) for job_id in (jobs[20], *jobs[10:14], jobs[2])]
    since = late[0].finished_at
    assert since is not None
    ended = [job.id for job in (*early, *late)]
    ended += [job.id for job in (await queue.list(JobFilter(statuses=(JobStatus.FAILED,)))).jobs]
    counts = []
    for wanted in (
        JobFilter(finished_after=since),
        JobFilter(finished_before=since),
        JobFilter(finished_after=early[1].finished_at, finished_before=late[3].finished_at),
        JobFilter(("test.pong",), finished_after=early[0].finished_at),
        JobFilter(("test.pong", "test.ping"), finished_before=since),
        JobFilter(statuses=(JobStatus.CANCELLED,), finished_after=since),
        JobFilter(finished_after=since, created_before=late[2].created_at),
    ):
        sorted_ones, whole = await pages(queue, wanted, last=last)
        assert set(sorted_ones) <= set(ended)
        with monkeypatch.context() as patch:
            patch.setattr(filters, "WIDE_RANGE", 0)
            assert await pages(queue, wanted, last=last) == (sorted_ones, whole)
            patch.setattr(filters, "WALKED_JOBS", 3)
            found, count = await pages(queue, wanted, last=last)
            assert found == sorted_ones, wanted
            counts.append(count - whole)
    assert min(counts) >= 0
    assert max(counts) > 0


@pytest.mark.parametrize("wide", [False, True])
async def test_a_status_or_type_that_is_named_twice_counts_once(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    jobs = [(await queue.enqueue(PING)).job.id for _ in range(3)]
    ended = [await queue.cancel(job_id) for job_id in jobs]
    if wide:
        monkeypatch.setattr(filters, "WIDE_RANGE", 0)
    for wanted in (
        JobFilter(statuses=(JobStatus.CANCELLED,) * 2, finished_after=ended[0].finished_at),
        JobFilter(types=("test.ping",) * 2, finished_after=ended[0].finished_at),
        JobFilter(types=("test.ping",) * 2, statuses=(JobStatus.CANCELLED,) * 2),
    ):
        assert (await pages(queue, wanted, last=False))[0] == jobs[::-1]
        assert await queue.count(wanted) == JobTotal(3, False)


@pytest.mark.any_database
async def test_a_value_that_no_job_can_have_is_refused_with_its_path(queue: JobQueue) -> None:
    wrong = JobFilter(
        created_by="", search=" ", error_code="a\0b", created_after=datetime(2030, 1, 1)
    )
    with pytest.raises(InputInvalid) as refused:
        await queue.list(wrong)
    assert [(fault.path, fault.code) for fault in refused.value.violations] == [
        ("/filter/createdBy", "out_of_range"),
        ("/filter/errorCode", "invalid_text"),
        ("/filter/search", "out_of_range"),
        ("/filter/createdAfter", "time_zone_missing"),
    ]


@pytest.mark.any_database
async def test_a_value_of_another_type_is_refused_with_its_path(queue: JobQueue) -> None:
    wrong: list[dict[str, Any]] = [
        {"created_by": 7, "error_code": b"declined"},
        {"created_by": b"ada", "search": []},
        {"created_after": "2030-01-31T12:00:00Z", "finished_before": 7},
    ]
    faults: list[Violation] = []
    for fields in wrong:
        for read in (queue.list, queue.count):
            with pytest.raises(InputInvalid) as refused:
                await read(JobFilter(**fields))
        faults += refused.value.violations
    wrong = [{"after": "x"}, {"before": b"0" * 16}, {"after": 7, "before": str(uuid.uuid4())}]
    for ends in wrong:
        with pytest.raises(InputInvalid) as refused:
            await queue.list(**ends)
        faults += refused.value.violations
    assert {fault.code for fault in faults} == {"wrong_type"}
    assert [fault.path for fault in faults] == [
        "/filter/createdBy", "/filter/errorCode", "/filter/createdBy", "/filter/search",
        "/filter/createdAfter", "/filter/finishedBefore", "/after", "/before", "/after", "/before",
    ]  # fmt: skip
    assert faults[-2].message == "Expected the id of a job as a uuid.UUID; got 7."
