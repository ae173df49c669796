"""Random combinations of the fields of a filter find what plain Python finds: on pages of any size,
read forwards and backwards, from any place, for any owner, also where a search stops early."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_registry import JobRegistry, JobType, Payload
from job_registry_api.queue import filters, store
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import FINAL, JobStatus, Owner
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import JobTotal
from tests.queue.race_jobs import queues
from tests.queue.test_filter_cost import Stored, fill

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
MAIL: Final = ("mail.send", "mail.deliver")
TYPES: Final = (*MAIL, "page.print", "page.scan")
CREATORS: Final = ("ada", "bob", None)
CODES: Final = ("broken", "bank_closed", "%_", None)
KEYS: Final = ("k", "a key", None, None)
JOBS: Final = 120


class Nothing(Payload):
    """No fields."""


REGISTRY: Final = JobRegistry(
    [
        JobType(name="mail.send", payload=Nothing, former_names=["mail.deliver"]),
        JobType(name="page.print", payload=Nothing),
    ]
)
"""The other jobs have a former name of a type, or a type that is not registered any more."""


def made(jobs: int, seed: int) -> list[Stored]:
    """Return random jobs, oldest first. Many are of one moment, and the clock of the process that
    enqueued them differs from that of the database."""
    chance = random.Random(seed)
    keys: set[tuple[str, str | None]] = set()
    result = []
    second = 0.0
    for n in range(jobs):
        second += chance.choice((0, 0, 0.0005, 1, 1000))
        enqueued = START + timedelta(seconds=second)
        created = enqueued + timedelta(seconds=chance.choice((0, 0, 0, 200, -200)))
        status = chance.choice([JobStatus.QUEUED, *FINAL])
        name, key = chance.choice(TYPES), chance.choice(KEYS)
        key = None if (name, key) in keys else key
        keys.add((name, key))
        has_error = status is JobStatus.FAILED or chance.random() < 0.2
        result.append(
            Stored(
                uuid.UUID(int=(int(enqueued.timestamp() * 1000) << 80) + (7 << 76) + n),
                name,
                status,
                chance.choice(CREATORS),
                key,
                chance.choice(CODES) or "other" if has_error else None,
                created,
                created + timedelta(seconds=chance.choice((0, 0.0005, 300, 30_000)))
                if status in FINAL
                else None,
            )
        )
    return result


STORED: Final = made(JOBS, seed=1)


class Asked(NamedTuple):
    """A list of jobs, and how it is read."""

    wanted: JobFilter
    owner: Owner | None
    size: int
    from_end: bool
    after: uuid.UUID | None
    before: uuid.UUID | None
    limits: dict[str, int]

    def expected(self, jobs: list[Stored]) -> list[uuid.UUID]:
        """Return the ids of all jobs of the list, newest first."""
        types = self.wanted.types
        if types is not None and set(types) & set(MAIL):
            types = (*types, *MAIL)
        wanted = replace(self.wanted, types=types)
        text = self.wanted.search
        hits = None if text is None else self._hits(jobs, text)
        return [
            each.id
            for each in reversed(jobs)
            if each.matches(wanted, self.owner) and (hits is None or each.id in hits)
        ]

    def _hits(self, jobs: list[Stored], text: str) -> set[uuid.UUID]:
        creator = self.owner.subject if self.owner is not None else self.wanted.created_by
        read = [
            each
            for each in reversed(jobs)
            if (each.status == "failed" if creator is None else each.created_by == creator)
        ][: self.limits["SEARCHED_JOBS"]]
        by_words = {
            each.id
            for each in read
            if each.status == "failed"
            and all(word in f"{each.code} it broke." for word in text.lower().split())
        }
        return by_words | {
            each.id for each in jobs if text in (each.key, str(each.id), each.id.hex)
        }


def asked(jobs: list[Stored]) -> st.SearchStrategy[Asked]:
    ids = st.sampled_from([each.id for each in jobs])
    near = st.sampled_from([timedelta(microseconds=n) for n in (-1, 0, 1)])
    far = st.sampled_from([timedelta(seconds=n) for n in (-3_600, 3_600, 86_400)])
    at = st.sampled_from([each.created_at for each in jobs])
    ended_at = st.sampled_from([each.finished_at for each in jobs if each.finished_at is not None])
    time = st.builds(datetime.__add__, st.one_of(at, ended_at), st.one_of(near, far))
    words = st.sampled_from(["broke", "BANK it", "k", "a key", "%", "_", "it_broke", "nothing"])
    fields: dict[str, st.SearchStrategy[Any]] = {
        "types": st.lists(st.sampled_from([*TYPES, "no.such"]), max_size=3).map(tuple),
        "statuses": st.lists(st.sampled_from(JobStatus), max_size=3).map(tuple),
        "created_by": st.sampled_from(["ada", "bob", "eve"]),
        "created_after": time,
        "created_before": time,
        "finished_after": time,
        "finished_before": time,
        "idempotency_key": st.sampled_from(["k", "a key", "none"]),
        "error_code": st.sampled_from(["broken", "bank_closed", "%_", "none"]),
        "search": st.one_of(words, ids.map(str), ids.map(lambda job_id: job_id.hex)),
    }
    given_fields = st.lists(
        st.sampled_from([*fields]), min_size=1, max_size=4, unique=True
    ).flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))
    ends = st.sampled_from([filters.FIRST_ID, filters.LAST_ID])
    place = st.one_of(st.none(), ids, ends, st.uuids())
    limits: dict[str, st.SearchStrategy[int]] = {
        "WIDE_RANGE": st.sampled_from([0, 10, 5_000]),
        "WALKED_JOBS": st.sampled_from([1, 5, 30, 10_000]),
        "RARE_JOBS": st.sampled_from([0, 10, 5_000]),
        "SEARCHED_JOBS": st.sampled_from([1, 30, 10_000]),
    }
    return st.builds(
        Asked,
        given_fields.map(lambda values: JobFilter(**values)),
        st.sampled_from([None, None, Owner("ada"), Owner("bob"), Owner("eve"), Owner(None)]),
        st.sampled_from([1, 4, 20, 100]),
        st.booleans(),
        place,
        place,
        st.fixed_dictionaries(limits),
    )


async def read(queue: JobQueue, each: Asked) -> list[uuid.UUID]:
    """Return the ids of the jobs of all pages, newest first."""
    seen: list[uuid.UUID] = []
    after, before = each.after, each.before
    for _ in range(3 * JOBS):
        size: Any = {"last" if each.from_end else "first": each.size}
        page = await queue.list(each.wanted, after=after, before=before, owner=each.owner, **size)
        ids = [job.id for job in page.jobs]
        seen = ids + seen if each.from_end else seen + ids
        more = page.has_previous_page if each.from_end else page.has_next_page
        assert page.stopped_early == (page.stopped_at is not None)
        if not more:
            return seen
        assert page.stopped_early or len(ids) == each.size
        if each.from_end:
            before = page.stopped_at or ids[0]
        else:
            after = page.stopped_at or ids[-1]
    raise AssertionError("There is no last page.")


@pytest.fixture
async def stored_queue(database_url: str) -> AsyncIterator[JobQueue]:
    fill(database_url, STORED)
    async with queues(database_url, 1, REGISTRY) as (queue,):
        yield queue


@pytest.mark.parametrize("examples", [20, pytest.param(3_000, marks=pytest.mark.slow)])
async def test_pages_and_totals_of_random_filters_are_those_that_plain_python_finds(
    stored_queue: JobQueue, examples: int
) -> None:
    loop = asyncio.get_running_loop()

    @settings(max_examples=examples, deadline=None)
    @given(each=asked(STORED))
    def check(each: Asked) -> None:
        asyncio.run_coroutine_threadsafe(checked(stored_queue, each), loop).result()

    await asyncio.to_thread(check)


async def checked(queue: JobQueue, each: Asked) -> None:
    found = each.expected(STORED)
    after, before = each.after or filters.LAST_ID, each.before or filters.FIRST_ID
    with pytest.MonkeyPatch.context() as patch:
        for name, number in each.limits.items():
            patch.setattr(store if name == "RARE_JOBS" else filters, name, number)
        assert await read(queue, each) == [job_id for job_id in found if before < job_id < after]
        total = await queue.count(each.wanted, owner=each.owner)
        assert total == JobTotal(len(found), False)
