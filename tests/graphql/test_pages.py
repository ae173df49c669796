"""Pages of jobs as Relay's specification has them, their total, and `node`."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from job_registry import EnqueueRequest
from job_registry_api import JobFilter
from job_registry_api.queue import filters as queue_filters
from job_registry_api.queue import reading
from job_registry_api.queue.reading import JobTotal
from tests.http_client import Execute, Visit, queue_of
from tests.test_own_jobs import ADA, AUTH, BOB, NOWHERE, ask, bearer, enqueue

PING = EnqueueRequest("test.ping", {})
PAGE = """query ($filter: JobFilter, $first: Int, $after: String, $last: Int, $before: String) {
  jobs(filter: $filter, first: $first, after: $after, last: $last, before: $before) {
    nodes { id } edges { cursor }
    pageInfo { hasNextPage hasPreviousPage startCursor endCursor stoppedEarly } } }"""
TOTAL = "query ($filter: JobFilter) { jobs(filter: $filter) { totalCount totalCountIsEstimate } }"


async def enqueued(http: httpx.AsyncClient, jobs: int, *, by: str | None = None) -> list[str]:
    """The ids of so many new jobs, newest first."""
    queue = queue_of(http)
    return [str((await queue.enqueue(PING, created_by=by)).job.id) for _ in range(jobs)][::-1]


def ids(page: dict[str, Any]) -> list[str]:
    return [node["id"] for node in page["nodes"]]


def sides(page: dict[str, Any]) -> tuple[bool, bool]:
    return page["pageInfo"]["hasPreviousPage"], page["pageInfo"]["hasNextPage"]


async def test_an_empty_list_of_types_or_statuses_lists_no_jobs(
    http: httpx.AsyncClient, execute: Execute
) -> None:
    await enqueued(http, 2)
    filters: list[Any] = [{"types": []}, {"statuses": []}, {"types": [], "statuses": ["QUEUED"]}]
    for wanted in filters:
        page = (await execute(PAGE, filter=wanted))["jobs"]
        assert (ids(page), sides(page)) == ([], (False, False))
        last = (await execute(PAGE, filter=wanted, last=1))["jobs"]
        assert (ids(last), sides(last)) == ([], (False, False))


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"types": ["test.ping", "test.pong"]},
        {"statuses": ["QUEUED", "FAILED"]},
        {"createdBy": "ada"},
        {"createdAfter": "2020-01-01T00:00:00Z", "types": ["test.ping"]},
    ],
)
async def test_the_pages_from_the_end_hold_every_job_once(
    http: httpx.AsyncClient, execute: Execute, wanted: dict[str, Any]
) -> None:
    every = await enqueued(http, 5, by="ada")
    seen: list[str] = []
    before = None
    while True:
        page = (await execute(PAGE, filter=wanted, last=2, before=before))["jobs"]
        assert sides(page) == (len(seen) < 4, before is not None)
        seen = [*ids(page), *seen]
        before = page["pageInfo"]["startCursor"]
        if not page["pageInfo"]["hasPreviousPage"]:
            break
    assert seen == every


async def test_a_page_may_be_between_two_cursors(http: httpx.AsyncClient, execute: Execute) -> None:
    every = await enqueued(http, 5)
    cursors = [edge["cursor"] for edge in (await execute(PAGE))["jobs"]["edges"]]
    for filters in ({}, {"types": ["test.ping", "test.pong"]}):
        between = {"after": cursors[0], "before": cursors[4], "filter": filters}
        assert ids((await execute(PAGE, **between))["jobs"]) == every[1:4]
        page = (await execute(PAGE, **between, first=2))["jobs"]
        assert (ids(page), sides(page)) == (every[1:3], (True, True))
        page = (await execute(PAGE, **between, last=2))["jobs"]
        assert (ids(page), sides(page)) == (every[2:4], (True, True))


async def test_a_page_says_what_is_before_it_now(http: httpx.AsyncClient, execute: Execute) -> None:
    newest, second, oldest = await enqueued(http, 3)
    queued = {"filter": {"statuses": ["QUEUED"]}}
    cursors = [edge["cursor"] for edge in (await execute(PAGE, **queued))["jobs"]["edges"]]
    behind = queued | {"first": 5, "after": cursors[1]}
    page = (await execute(PAGE, **behind))["jobs"]
    assert (ids(page), sides(page)) == ([oldest], (True, False))
    # The jobs up to the cursor have left the list.
    for job_id in (newest, second):
        await queue_of(http).cancel(job_id)
    page = (await execute(PAGE, **behind))["jobs"]
    assert (ids(page), sides(page)) == ([oldest], (False, False))
    before = queued | {"last": 5, "before": cursors[1]}
    page = (await execute(PAGE, **before))["jobs"]
    assert (ids(page), sides(page)) == ([], (False, True))


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ("first: 1, last: 1", "/last"),
        ("last: 0", "/last"),
        ("last: 201", "/last"),
        ('last: 2, before: "junk"', "/before"),
    ],
)
async def test_a_page_that_cannot_be_is_refused_with_the_argument(
    http: httpx.AsyncClient, arguments: str, path: str
) -> None:
    document = f"{{ jobs({arguments}) {{ nodes {{ id }} }} }}"
    (error,) = (await http.post("/graphql", json={"query": document})).json()["errors"]
    assert error["extensions"]["code"] == "validation_error"
    assert [each["path"] for each in error["extensions"]["violations"]] == [path]


async def test_a_page_from_the_end_keeps_the_jobs_at_the_cursor_if_it_stops_early(
    visit: Visit,
) -> None:
    # A job counts as 10 fields and those that are selected.
    async with visit(max_answer_fields="1000") as client:
        await queue_of(client).enqueue_many([PING] * 100)
        every = [str(job.id) for job in (await queue_of(client).list(first=100)).jobs]
        sent = {"query": PAGE, "variables": {"last": 90}}
        page = (await client.post("/graphql", json=sent)).json()["data"]["jobs"]
    assert page["pageInfo"]["stoppedEarly"] is True
    assert 40 < len(ids(page)) < 90
    assert ids(page) == every[-len(ids(page)) :]
    assert sides(page) == (True, False)


# The total


async def test_the_total_of_types_and_statuses_is_exact(
    http: httpx.AsyncClient, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "EXACT_TOTAL", 2)
    job_id, *_ = await enqueued(http, 5)
    await queue_of(http).cancel(job_id)
    for wanted, total in (
        ({}, 5),
        ({"statuses": ["QUEUED"]}, 4),
        ({"types": ["test.pong"]}, 0),
        ({"types": []}, 0),
        ({"statuses": []}, 0),
        ({"types": None, "statuses": None}, 5),
        ({"types": ["test.ping", "unknown"], "statuses": ["CANCELLED", "FAILED"]}, 1),
    ):
        found = (await execute(TOTAL, filter=wanted))["jobs"]
        assert found == {"totalCount": total, "totalCountIsEstimate": False}


async def test_the_total_of_another_filter_is_exact_up_to_a_bound(
    http: httpx.AsyncClient, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enqueued(http, 3, by="ada")
    await enqueued(http, 20, by="bob")
    (job_id,) = await enqueued(http, 1, by="ada")
    await queue_of(http).cancel(job_id)
    day = {"finishedAfter": "2020-01-01T00:00:00Z"}
    exact: list[tuple[dict[str, Any], int]] = [
        ({"createdBy": "ada"}, 4),
        ({"createdBy": "ada", "statuses": ["QUEUED"]}, 3),
        ({"createdBy": "eve"}, 0),
        (day, 1),
        (day | {"types": ["test.pong"]}, 0),
        (day | {"statuses": ["QUEUED"]}, 0),
        ({"search": job_id}, 1),
        ({"errorCode": "none"}, 0),
        ({"idempotencyKey": "none"}, 0),
        ({"createdAfter": "2020-01-01T00:00:00Z", "types": ["test.ping"]}, 24),
    ]
    for wanted, total in exact:
        found = (await execute(TOTAL, filter=wanted))["jobs"]
        assert found == {"totalCount": total, "totalCountIsEstimate": False}, wanted
    monkeypatch.setattr(reading, "EXACT_TOTAL", 10)
    found = (await execute(TOTAL, filter={"createdBy": "ada"}))["jobs"]
    assert found == {"totalCount": 4, "totalCountIsEstimate": False}
    for wanted in ({"createdBy": "bob"}, {"createdAfter": "2020-01-01T00:00:00Z"}):
        found = (await execute(TOTAL, filter=wanted))["jobs"]
        assert found["totalCountIsEstimate"] is True
        # Not less than what was read, and not more than there are.
        assert 11 <= found["totalCount"] <= 24, wanted


async def test_the_total_is_counted_only_where_it_is_selected(
    http: httpx.AsyncClient, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[JobFilter] = []

    async def count(wanted: JobFilter, **_: object) -> JobTotal:
        counted.append(wanted)
        return JobTotal(7, True)

    monkeypatch.setattr(queue_of(http), "count", count)
    await execute(PAGE)
    await execute("{ jobs { totalCount @skip(if: true) nodes { id } } }")
    assert counted == []
    document = "{ jobs { totalCount again: totalCount totalCountIsEstimate } }"
    found = await execute(document)
    assert found["jobs"] == {"totalCount": 7, "again": 7, "totalCountIsEstimate": True}
    assert len(counted) == 1


async def test_totals_are_charged_and_a_refused_one_leaves_the_page(visit: Visit) -> None:
    async with visit(max_answer_fields="2500") as client:
        (job_id,) = await enqueued(client, 1)
        fields = " ".join(f"p{n}: jobs {{ totalCount nodes {{ id }} }}" for n in range(4))
        answer = (await client.post("/graphql", json={"query": f"{{ {fields} }}"})).json()
    pages = list(answer["data"].values())
    assert [page["totalCount"] for page in pages].count(None) == 2
    assert all(page["nodes"] == [{"id": job_id}] for page in pages)
    assert {error["extensions"]["code"] for error in answer["errors"]} == {"budget_exceeded"}


# Who may see what

NODE = "query ($id: ID!) { node(id: $id) { __typename id ... on Job { createdBy } } }"


async def test_node_finds_a_job_that_the_caller_may_see_and_nothing_else(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        theirs = await enqueue(client, ADA)
        job = {"__typename": "Job", "id": theirs, "createdBy": "ada"}
        assert (await ask(client, ADA, NODE, id=theirs))["node"] == job
        reader = bearer("bob", "jobs:read")
        assert (await ask(client, reader, NODE, id=theirs))["node"] == job
        for job_id in (theirs, NOWHERE, "junk", ""):
            assert (await ask(client, BOB, NODE, id=job_id))["node"] is None, job_id
        sent = {"query": NODE, "variables": {"id": theirs}}
        worker = bearer("bob", "jobs:work")
        answer = (await client.post("/graphql", json=sent, headers=worker)).json()
    assert [each["extensions"]["code"] for each in answer["errors"]] == ["forbidden"]


async def test_the_total_of_ones_own_jobs_does_not_count_those_of_others(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        for _ in range(3):
            await enqueue(client, ADA)
        await enqueue(client, BOB)
        for wanted, total in (({}, 1), ({"createdBy": "ada"}, 0), ({"statuses": ["QUEUED"]}, 1)):
            found = (await ask(client, BOB, TOTAL, filter=wanted))["jobs"]
            assert found == {"totalCount": total, "totalCountIsEstimate": False}
        page = (await ask(client, BOB, PAGE, last=5))["jobs"]
        assert (len(ids(page)), sides(page)) == (1, (False, False))


async def test_an_estimate_of_ones_own_jobs_tells_nothing_of_those_of_others(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "EXACT_TOTAL", 3)
    async with visit(**AUTH) as client:
        # A job long before the others makes the estimate larger than the number of all jobs.
        await enqueue(client, ADA)
        await asyncio.sleep(0.2)
        await queue_of(client).enqueue_many([PING] * 2, created_by="ada")
        await queue_of(client).enqueue_many([PING] * 2, created_by="ada")
        found = []
        for _ in range(2):
            found.append((await ask(client, ADA, TOTAL))["jobs"])
            await enqueue(client, BOB)
    assert found[0]["totalCountIsEstimate"]
    assert found[1] == found[0]


async def test_a_search_that_stops_early_says_where_to_read_on(
    http: httpx.AsyncClient, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given more jobs that ended at other times than are searched for a page, I expect pages
    without jobs, and a cursor that leads past them."""
    jobs = await enqueued(http, 8)
    queue = queue_of(http)
    for job_id in (jobs[7], *jobs[:7]):
        ended = await queue.cancel(job_id)
        if job_id == jobs[7]:
            await asyncio.sleep(0.01)
            before = (ended.finished_at or ended.created_at) + timedelta(milliseconds=5)
    monkeypatch.setattr(queue_filters, "WIDE_RANGE", 0)
    monkeypatch.setattr(queue_filters, "WALKED_JOBS", 3)
    found: list[list[str]] = []
    after = None
    while True:
        wanted = {"finishedBefore": before.isoformat()}
        page = (await execute(PAGE, filter=wanted, first=5, after=after))["jobs"]
        found.append(ids(page))
        assert page["pageInfo"]["stoppedEarly"] == page["pageInfo"]["hasNextPage"]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    assert found == [[], [], [jobs[7]]]
    rest, path = [], f"/jobs?finishedBefore={quote(before.isoformat())}"
    while path:
        answer = await http.get(path)
        rest.append([job["jobId"] for job in answer.json()["jobs"]])
        path = answer.links.get("next", {}).get("url", "")
    assert rest == found
