"""Jobs whose stored payload a worker cannot read: they are parked, and others take them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from job_registry import EnqueueRequest, JobPolicy, JobRegistry, JobType, Payload
from job_registry_api.queue.claiming import Lease
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobError, JobStatus
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import PayloadMismatch
from tests.conftest import advance

REFUSED = JobError(
    "payload_invalid",
    "The stored payload does not match the current schema of the job type.",
    [{"path": "/text", "code": "unknown_field", "message": "There is no field."}],
)


class Old(Payload):
    text: str


class New(Payload):
    words: list[str]


class Newest(Payload):
    pages: list[str]


def of(payload: type[Payload], **options: Any) -> JobRegistry:
    """The job types of a deploy: `note` has this payload, and `other` never changes."""
    other = JobType(name="other", payload=Old)
    return JobRegistry([JobType(name="note", payload=payload, **options), other])


class Deploys:
    """Opens queues on one database, as the processes of several deploys do."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url = url
        self._stack = stack

    async def __call__(self, registry: JobRegistry) -> JobQueue:
        database = open_database(self._url)
        self._stack.push_async_callback(database.close)
        return JobQueue(registry, database)


@pytest.fixture
async def deploys(database_url: str) -> AsyncIterator[Deploys]:
    async with AsyncExitStack() as stack:
        yield Deploys(database_url, stack)


async def lease(queue: JobQueue, *types: str, limit: int = 100, **options: Any) -> list[Lease]:
    return await queue.lease(types or ["note"], "w", limit=limit, **options)


async def park(queue: JobQueue, limit: int = 100, error: JobError = REFUSED) -> int:
    """Lease what is due, and park it, as a worker does that cannot read it."""
    leases = await lease(queue, limit=limit)
    for each in leases:
        fingerprint = queue.registry["note"].fingerprint
        await queue.park(each.token, fingerprint, error)
    return len(leases)


async def note(queue: JobQueue, text: str = "hello", **options: Any) -> str:
    return str((await queue.enqueue(EnqueueRequest("note", {"text": text}, **options))).job.id)


async def test_a_parked_job_is_queued_its_attempt_unspent_and_says_why(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    job_id = await note(old)
    assert await park(new) == 1
    job = await old.get(job_id)
    assert (job.status, job.attempt, job.error, job.is_parked) == (JobStatus.QUEUED, 0, None, True)
    reason = await old.waiting_reason(job)
    assert isinstance(reason, PayloadMismatch)
    assert reason.fingerprint == new.registry["note"].fingerprint
    assert [each.path for each in reason.violations] == ["/text"]
    (attempt,) = (await old.attempts([job.id]))[job.id]
    assert attempt.outcome == "released"
    assert attempt.error == REFUSED
    counts = (await old.counts())["note"]
    assert (counts.queued, counts.running, counts.parked) == (1, 0, 1)


async def test_the_worker_that_parked_a_job_is_not_asked_again(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    await note(old)
    assert await park(new) == 1
    assert await lease(new) == []
    assert await lease(await deploys(of(New))) == []


async def test_a_worker_with_another_fingerprint_takes_it_at_once(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    job_id = await note(old)
    await park(new)
    (taken,) = await lease(old)
    assert (str(taken.job.id), taken.job.attempt) == (job_id, 1)
    done = await old.complete(taken.token)
    assert done.status is JobStatus.SUCCEEDED
    counts = (await old.counts())["note"]
    assert (counts.succeeded, counts.parked) == (1, 0)


async def test_a_job_that_both_fleets_refuse_is_asked_of_each_once(deploys: Deploys) -> None:
    old, new, newest = [await deploys(of(each)) for each in (Old, New, Newest)]
    await note(old)
    assert [await park(new), await park(newest)] == [1, 1]
    for queue in (new, newest, new, newest):
        assert await lease(queue) == []
    assert len(await lease(old)) == 1


async def test_an_upgrade_brings_parked_jobs_back(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    job_id = await note(old, "so it is")
    await park(new)
    better = JobType(name="note", payload=New)
    better.upgrade(Old)(lambda older: New(words=older.text.split()))
    queue = await deploys(JobRegistry([better]))
    (taken,) = await lease(queue)
    assert str(taken.job.id) == job_id


async def test_parked_jobs_hide_no_others(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    for _ in range(5):
        await note(old, priority=90)
    await park(new)
    await new.enqueue(EnqueueRequest("note", {"words": []}))
    await new.enqueue(EnqueueRequest("other", {"text": ""}))
    assert {each.job.type for each in await lease(new, "note", "other")} == {"note", "other"}


async def test_parked_jobs_are_leased_by_priority_and_age_in_turns_with_others(
    deploys: Deploys,
) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    parked = [await note(old, f"{n}", priority=50 + 10 * (n % 2)) for n in range(4)]
    await park(new)
    due = [await note(old, "due", priority=60) for _ in range(2)]
    first = await lease(old, limit=2)
    assert {str(each.job.id) for each in first} == {parked[1], due[0]}
    rest = await lease(old, limit=10)
    ids = [str(each.job.id) for each in rest]
    assert {*ids[:2]} == {parked[3], due[1]}
    assert ids[2:] == [parked[0], parked[2]]


async def test_a_worker_with_one_free_slot_takes_an_older_parked_job_first(
    deploys: Deploys,
) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    job_id = await note(old)
    await park(new)
    for _ in range(3):
        await note(old, "due")
    (first,) = await lease(old, limit=1)
    (second,) = await lease(old, limit=1)
    assert str(first.job.id) == job_id
    assert second.job.payload == {"text": "due"}


async def test_parked_jobs_keep_to_the_concurrency_limit(deploys: Deploys) -> None:
    limited = JobPolicy(concurrency_limit=2)
    old, new = await deploys(of(Old, policy=limited)), await deploys(of(New, policy=limited))
    for _ in range(5):
        await note(old)
    assert [await park(new) for _ in range(3)] == [2, 2, 1]
    await note(old)
    assert len(await lease(old)) == 2
    assert await lease(old) == []


async def test_a_parked_job_can_be_cancelled_and_then_retried(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    job_id = await note(old)
    await park(new)
    cancelled = await old.cancel(job_id)
    assert cancelled.status is JobStatus.CANCELLED
    assert (await old.counts())["note"].parked == 0
    assert await lease(old) == []
    retried = await old.retry(job_id)
    assert not retried.is_parked
    assert len(await lease(new)) == 1


async def test_a_job_whose_cancellation_was_requested_is_not_parked(deploys: Deploys) -> None:
    new = await deploys(of(New))
    job_id = await note(await deploys(of(Old)))
    (leased,) = await lease(new)
    await new.cancel(job_id)
    ended = await new.park(leased.token, "f", REFUSED)
    assert ended.status is JobStatus.CANCELLED


async def test_unparking_asks_every_worker_again(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    for _ in range(3):
        await note(old)
    await park(new)
    assert await new.unpark(["other"]) == 0
    assert await new.unpark(["note"]) == 3
    leases = await lease(new)
    assert len(leases) == 3
    assert await new.unpark() == 0
    # Who had refused them is forgotten.
    for each in leases:
        await new.park(each.token, "0" * 64, REFUSED)
    assert [each.fingerprint for each in await new.versions("note") if each.refused] == ["0" * 64]


async def test_unparking_ends_although_a_worker_parks_the_jobs_again(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    for _ in range(3):
        await note(old)
    await park(new)

    store = new._store
    unpark = store.unpark

    async def unpark_and_park(*args: Any, **options: Any) -> Any:
        jobs = await unpark(*args, **options)
        await park(new)
        return jobs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "unpark", unpark_and_park)
        async with asyncio.timeout(5):
            assert await new.unpark(["note"]) == 3


async def test_a_job_that_was_parked_for_too_long_fails(
    deploys: Deploys, database_url: str
) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    job_id = await note(old)
    await park(new)
    assert await old.fail_parked(parked_days=7, jobs=10) == 0
    await advance(database_url, 8 * 86_400)
    assert await old.fail_parked(parked_days=7, jobs=10) == 1
    job = await old.get(job_id)
    assert (job.status, job.attempt, job.error) == (JobStatus.FAILED, 0, REFUSED)
    assert await old.fail_parked(parked_days=7, jobs=10) == 0
    await old.retry(job_id)
    assert len(await lease(old)) == 1


async def test_a_refusal_by_another_version_starts_the_days_of_a_parked_job_anew(
    deploys: Deploys, database_url: str
) -> None:
    old, new, newest = await deploys(of(Old)), await deploys(of(New)), await deploys(of(Newest))
    job_id = await note(old)
    await park(new)
    await advance(database_url, 6 * 86_400)
    later = replace(REFUSED, message="The newest version does not read it either.")
    await park(newest, error=later)
    assert await lease(new) == []  # The same version does not get it again.
    await advance(database_url, 6 * 86_400)
    assert await old.fail_parked(parked_days=7, jobs=10) == 0
    await advance(database_url, 2 * 86_400)
    assert await old.fail_parked(parked_days=7, jobs=10) == 1
    assert (await old.get(job_id)).error == later


async def test_the_last_sixteen_refusals_are_remembered(deploys: Deploys) -> None:
    queue = await deploys(of(Old))
    await note(queue)
    fingerprints = [f"{n:064x}" for n in range(20)]
    for fingerprint in [*fingerprints, fingerprints[-1]]:  # One refuses it twice.
        (leased,) = await lease(queue)
        await queue.park(leased.token, fingerprint, REFUSED)
    (version, *_) = [each for each in await queue.versions("note") if each.refused]
    assert len([each for each in await queue.versions("note") if each.refused]) == 16
    assert version.fingerprint == fingerprints[4]


async def test_a_remote_worker_leases_only_what_it_can_read(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    job_id = await note(old)
    await new.enqueue(EnqueueRequest("note", {"words": []}))
    reads = old.registry["note"].fingerprint
    (taken,) = await lease(new, readable={"note": [reads, "0" * 64]})
    assert str(taken.job.id) == job_id
    assert await lease(new, readable={"note": [reads]}) == []
    assert len(await lease(new, readable={})) == 1


async def test_a_remote_worker_leases_a_parked_job_that_it_can_read(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    await note(old)
    await park(new)
    assert await lease(new, readable={}) == []
    assert await lease(new, readable={"note": ["0" * 64]}) == []
    assert len(await lease(new, readable={"note": [old.registry["note"].fingerprint]})) == 1


async def test_the_versions_of_a_type_are_counted(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    for _ in range(3):
        await note(old)
    await park(new, limit=2)
    await new.enqueue(EnqueueRequest("note", {"words": []}))
    await lease(new, "note", "other", limit=1)
    # A worker elsewhere that reads none of the versions of this process is none of them.
    assert await lease(old, readable={"note": ["0" * 64]}) == []
    versions = {each.fingerprint: each for each in await old.versions("note")}
    # `other`, of which a worker was seen too, has the fingerprint of the old `note`.
    assert old.registry["other"].fingerprint == old.registry["note"].fingerprint
    before = versions[old.registry["note"].fingerprint]
    after = versions[new.registry["note"].fingerprint]
    assert (before.queued, before.running, before.parked) == (0, 1, 2)
    assert (after.queued, after.running, after.refused) == (1, 0, 2)
    assert before.worker_seen_at is None
    assert after.worker_seen_at is not None


async def test_a_job_that_is_no_longer_parked_is_not_counted_as_parked(deploys: Deploys) -> None:
    old, new = await deploys(of(Old)), await deploys(of(New))
    for _ in range(3):
        await note(old)
    await park(new)
    await lease(old, limit=1)
    assert await new.unpark(["note"]) == 2
    versions = {each.fingerprint: each for each in await old.versions("note")}
    before = versions[old.registry["note"].fingerprint]
    assert (before.queued, before.running, before.parked) == (2, 1, 0)
    assert versions[new.registry["note"].fingerprint].refused == 0


async def test_types_that_are_not_registered_are_counted(deploys: Deploys) -> None:
    old = await deploys(of(Old))
    await note(old)
    other = await deploys(JobRegistry([JobType(name="other", payload=Old)]))
    assert list(await other.unregistered_types()) == ["note"]
    assert (await other.unregistered_types())["note"].queued == 1
