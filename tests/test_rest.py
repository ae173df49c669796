"""REST: pages, bulks, changes and OpenAPI. `graphql/test_acceptance.py` has single jobs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import uuid
from functools import partial
from typing import Annotated, Any, Literal

import httpx
import pytest
import schemathesis
from jsonschema import Draft202012Validator
from pydantic import Field
from schemathesis import checks

from job_registry import JobType, Payload
from job_registry_api.openapi import describe
from tests.http_client import Visit, queue_of, serving
from tests.random_requests import send_for_each_operation
from tests.test_auth import AUTH, bearer

CASES = int(os.environ.get("TEST_REQUESTS", "10"))
"""How many requests for each operation of the description."""

PAYOUT = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
THUMBNAIL = {"type": "thumbnail.create", "payload": {"assetId": "a", "versionNumber": 1}}


async def enqueued(client: httpx.AsyncClient, body: dict[str, Any] = PAYOUT) -> str:
    answer = await client.post("/jobs", json=body)
    return str(answer.json()["jobId"])


def faults(answer: httpx.Response) -> list[tuple[str, str]]:
    assert answer.status_code == 422, answer.text
    return [(each["path"], each["code"]) for each in answer.json()["error"]["details"]]


# Pages


async def test_pages_lead_from_one_to_the_next(http: httpx.AsyncClient) -> None:
    ids = [await enqueued(http) for _ in range(5)]
    seen: list[str] = []
    url: str | None = "/jobs?first=2"
    while url is not None:
        page = await http.get(url)
        content = page.json()
        seen += [job["jobId"] for job in content["jobs"]]
        next_url = page.links.get("next", {}).get("url")
        assert (next_url is not None) == content["pageInfo"]["hasNextPage"]
        url = next_url
    assert seen == ids[::-1]


async def test_pages_are_filtered_by_types_and_statuses(http: httpx.AsyncClient) -> None:
    payout, thumbnail = await enqueued(http), await enqueued(http, THUMBNAIL)
    cancelled = await enqueued(http)
    await http.post(f"/jobs/{cancelled}/cancel", json={})

    async def listed(query: str) -> list[str]:
        return [job["jobId"] for job in (await http.get(f"/jobs?{query}")).json()["jobs"]]

    assert await listed("type=thumbnail.create") == [thumbnail]
    assert await listed("status=cancelled") == [cancelled]
    assert await listed("status=queued&status=cancelled&type=payout.execute") == [
        cancelled,
        payout,
    ]
    assert await listed("type=no.such") == []


async def test_pages_are_filtered_by_all_that_graphql_filters_by(http: httpx.AsyncClient) -> None:
    keyed = await enqueued(http, {**PAYOUT, "idempotencyKey": "k-1"})
    other = await enqueued(http)

    async def listed(**query: str) -> list[str]:
        return [job["jobId"] for job in (await http.get("/jobs", params=query)).json()["jobs"]]

    assert await listed(idempotencyKey="k-1") == [keyed]
    assert await listed(search=other) == [other]
    assert await listed(createdAfter="2020-01-01t00:00:00z") == [other, keyed]
    assert await listed(createdBefore="2020-01-01T00:00:00Z") == []
    assert await listed(finishedAfter="2020-01-01T00:00:00Z") == []
    assert await listed(errorCode="timed_out") == []
    assert await listed(createdBy="nobody") == []
    for name in ("createdAfter", "createdBefore", "finishedAfter", "finishedBefore"):
        assert faults(await http.get(f"/jobs?{name}=2030")) == [(f"/{name}", "invalid_format")]


async def test_a_page_has_no_next_one_at_the_end(http: httpx.AsyncClient) -> None:
    page = await http.get("/jobs")
    assert page.json() == {
        "jobs": [],
        "pageInfo": {"hasNextPage": False, "stoppedEarly": False, "endCursor": None},
    }
    assert "link" not in page.headers


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("status=done", [("/status", "invalid_value")]),
        ("first=x", [("/first", "wrong_type")]),
        ("first=0", [("/first", "out_of_range")]),
        ("first=9999", [("/first", "out_of_range")]),
        ("first=%D9%A1", [("/first", "wrong_type")]),
        ("after=x", [("/after", "invalid_format")]),
        ("statuses=queued&first=-1", [("/statuses", "unknown_field"), ("/first", "wrong_type")]),
        ("&".join(["type=a"] * 201), [("", "invalid_format")]),
        ("&".join(f"type=t{number}" for number in range(101)), [("/type", "too_long")]),
        ("search=", [("/search", "out_of_range")]),
        ("createdAfter=1969-12-31T00:00:00Z", [("/createdAfter", "out_of_range")]),
        ("createdBy=ada&createdBy=bob", [("/createdBy", "repeated")]),
        ("first=1&status=queued&status=failed&first=2", [("/first", "repeated")]),
    ],
)
async def test_wrong_parameters_are_told_together(
    http: httpx.AsyncClient, query: str, expected: list[tuple[str, str]]
) -> None:
    assert faults(await http.get(f"/jobs?{query}")) == expected


async def test_a_page_stops_before_it_is_too_large(visit: Visit) -> None:
    large = {"type": "test.ping", "payload": {"text": "x" * 30_000}}
    async with visit(max_answer_bytes="65536") as client:
        for _ in range(4):
            await enqueued(client, large)
        page = (await client.get("/jobs")).json()
    assert len(page["jobs"]) == 2
    assert page["pageInfo"]["stoppedEarly"] is True
    assert page["pageInfo"]["hasNextPage"] is True


# Bulks


async def test_a_job_is_refused_for_all_its_faults_at_once(http: httpx.AsyncClient) -> None:
    wrong = {**PAYOUT, "payload": {"batchId": 7}, "priority": "high", "maxAttempts": 0, "prio": 1}
    answer = await http.post("/jobs", json=wrong)
    assert answer.status_code == 422
    assert faults(answer) == [
        ("/prio", "unknown_field"),
        ("/priority", "wrong_type"),
        ("/maxAttempts", "out_of_range"),
        ("/payload/batchId", "wrong_type"),
        ("/payload/escrowId", "required"),
    ]
    # If the type is unknown, or is not a string, the payload cannot be checked.
    unknown = await http.post("/jobs", json={**wrong, "type": "no.such"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "job_type_not_found")
    no_name = await http.post("/jobs", json={**wrong, "type": 7, "maxAttempts": 1})
    assert [path for path, _ in faults(no_name)] == ["/prio", "/type", "/priority"]
    assert (await http.get("/jobs")).json()["jobs"] == []


async def test_a_bulk_has_a_result_for_each_job(http: httpx.AsyncClient) -> None:
    keyed = {**PAYOUT, "idempotencyKey": "k"}
    jobs = [PAYOUT, {**PAYOUT, "payload": {}}, {**PAYOUT, "type": "no.such"}, keyed, keyed]
    answer = await http.post("/jobs/bulk", json={"jobs": jobs})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [each["status"] for each in results] == [201, 422, 404, 201, 200]
    assert results[3]["job"] == results[4]["job"]
    assert [each["path"] for each in results[1]["error"]["details"]] == ["/batchId", "/escrowId"]
    assert results[2]["error"]["code"] == "job_type_not_found"


async def test_an_atomic_bulk_is_stored_whole_or_not_at_all(http: httpx.AsyncClient) -> None:
    jobs = [PAYOUT, {**PAYOUT, "payload": {}}]
    answer = await http.post("/jobs/bulk", json={"jobs": jobs, "atomic": True})
    assert [each["status"] for each in answer.json()["results"]] == [422, 422]
    assert (await http.get("/jobs")).json()["jobs"] == []


async def test_a_job_in_a_bulk_is_refused_for_what_it_would_be_refused_for_alone(
    http: httpx.AsyncClient,
) -> None:
    jobs: list[Any] = [
        PAYOUT,
        {**PAYOUT, "payload": {"batchId": 7}, "priority": "high", "maxAttempts": 0},
        {"type": 7, "prio": 1},
        {**PAYOUT, "payload": {}},
        8,
        {**PAYOUT, "scheduleAt": "soon", "type": "no.such"},
    ]
    answer = await http.post("/jobs/bulk", json={"jobs": jobs})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [each["status"] for each in results] == [201, 422, 422, 422, 422, 404]
    for job, result in zip(jobs[1:], results[1:], strict=True):
        alone = await http.post("/jobs", json=job)
        assert (result["status"], result["error"]) == (alone.status_code, alone.json()["error"])
    assert [each["path"] for each in results[1]["error"]["details"]] == [
        "/priority",
        "/maxAttempts",
        "/payload/batchId",
        "/payload/escrowId",
    ]
    stored = (await http.get("/jobs")).json()["jobs"]
    assert [job["jobId"] for job in stored] == [results[0]["job"]["jobId"]]


async def test_a_field_of_a_wrong_type_leaves_nothing_stored_of_an_atomic_bulk(
    http: httpx.AsyncClient,
) -> None:
    jobs = [PAYOUT, {**PAYOUT, "priority": "high"}, {**PAYOUT, "payload": {}}]
    answer = await http.post("/jobs/bulk", json={"jobs": jobs, "atomic": True})
    results = answer.json()["results"]
    assert [each["status"] for each in results] == [422, 422, 422]
    assert [each["error"]["details"][0]["code"] for each in results] == [
        "not_stored",
        "wrong_type",
        "required",
    ]
    assert (await http.get("/jobs")).json()["jobs"] == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([], [("", "wrong_type")]),
        ({}, [("/jobs", "wrong_type")]),
        (
            {"jobs": 1, "atomic": 1, "more": 2},
            [("/more", "unknown_field"), ("/jobs", "wrong_type"), ("/atomic", "wrong_type")],
        ),
        ({"jobs": PAYOUT}, [("/jobs", "wrong_type")]),
        (
            {"jobs": [], "atomic": 1, "more": 2},
            [("/more", "unknown_field"), ("/atomic", "wrong_type")],
        ),
    ],
)
async def test_a_bulk_that_is_none_stores_nothing(
    http: httpx.AsyncClient, body: Any, expected: list[tuple[str, str]]
) -> None:
    assert faults(await http.post("/jobs/bulk", json=body)) == expected
    assert (await http.get("/jobs")).json()["jobs"] == []


async def test_a_bulk_has_a_limit_that_is_named(visit: Visit) -> None:
    async with visit(max_bulk_size="2") as client:
        answer = await client.post("/jobs/bulk", json={"jobs": [PAYOUT] * 3})
    assert answer.status_code == 413
    assert answer.json()["error"]["details"] == [{"limit": 2, "setting": "JOBS_MAX_BULK_SIZE"}]


async def test_the_faults_of_a_bulk_are_bounded(http: httpx.AsyncClient) -> None:
    jobs = [{f"name{number}": number for number in range(50)}] * 1_000
    results = (await http.post("/jobs/bulk", json={"jobs": jobs})).json()["results"]
    assert {each["status"] for each in results} == {422}
    listed = [fault["code"] for each in results for fault in each["error"]["details"]]
    assert listed.count("unknown_field") <= 1_100
    assert len(listed) <= 3_000


# Changes


async def test_a_job_is_cancelled_and_queued_again(http: httpx.AsyncClient) -> None:
    job_id = await enqueued(http)
    cancelled = await http.post(f"/jobs/{job_id}/cancel", json={})
    again = await http.post(f"/jobs/{job_id}/cancel", json={})
    retried = await http.post(f"/jobs/{job_id}/retry", json={})
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_state_conflict")
    assert again.json()["error"]["details"] == [{"jobId": job_id, "status": "cancelled"}]
    assert (retried.status_code, retried.json()["status"]) == (200, "queued")
    assert (await http.get(f"/jobs/{job_id}")).json()["status"] == "queued"


@pytest.mark.parametrize("change", ["cancel", "retry"])
async def test_a_change_names_a_job_that_is_there_and_says_nothing_else(
    http: httpx.AsyncClient, change: str
) -> None:
    job_id = await enqueued(http)
    for unknown in (str(uuid.uuid4()), "x"):
        answer = await http.post(f"/jobs/{unknown}/{change}", json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
    assert faults(await http.post(f"/jobs/{job_id}/{change}", json={"a": 1})) == [
        ("", "wrong_type")
    ]
    # A form on a foreign page can send this without asking.
    form = {"content-type": "text/plain"}
    answer = await http.post(f"/jobs/{job_id}/{change}", content="{}", headers=form)
    assert answer.status_code == 415
    assert (await http.get(f"/jobs/{job_id}")).json()["status"] == "queued"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/jobs", "GET, POST, HEAD"),
        ("GET", "/jobs/bulk", "POST"),
        ("POST", "/jobs/x", "GET, HEAD"),
        ("GET", "/jobs/x/cancel", "POST"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
async def test_other_methods_are_405(
    http: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    # GET does not take `bulk` for the id of a job.
    answer = await http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    listed = " and ".join(allowed.rsplit(", ", 1))
    assert answer.json()["error"]["message"] == f"This path accepts only {listed}."


# Scopes


async def test_each_operation_needs_its_scope(visit: Visit) -> None:
    operations: dict[tuple[str, str], str] = {
        ("GET", "/jobs"): "jobs:read",
        ("POST", "/jobs/bulk"): "jobs:enqueue",
        ("POST", f"/jobs/{uuid.uuid4()}/cancel"): "jobs:admin",
        ("POST", f"/jobs/{uuid.uuid4()}/retry"): "jobs:admin",
        ("GET", "/openapi.json"): "jobs:read",
    }
    async with visit(**AUTH) as client:
        for (method, path), scope in operations.items():
            body: Any = {"jobs": []} if path.endswith("bulk") else {}
            sent = partial(client.request, method, path, json=body if method == "POST" else None)
            refused = await sent(headers=bearer(scope="jobs:work"))
            allowed = await sent(headers=bearer(scope=scope))
            nobody = await sent()
            assert refused.status_code == 403, path
            assert allowed.status_code in (200, 404), path
            assert nobody.status_code == 401, path


async def test_a_token_of_some_types_sees_and_changes_jobs_of_these_only(visit: Visit) -> None:
    only = bearer(scope="jobs:admin", **{"jobs:types": ["thumbnail.create"]})
    async with visit(**AUTH) as client:
        everything = bearer(scope="jobs:admin")
        payout = (await client.post("/jobs", json=PAYOUT, headers=everything)).json()["jobId"]
        mine = (await client.post("/jobs", json=THUMBNAIL, headers=only)).json()["jobId"]
        page = (await client.get("/jobs", headers=only)).json()
        named = await client.get("/jobs?type=payout.execute", headers=only)
        bulk = await client.post("/jobs/bulk", json={"jobs": [PAYOUT]}, headers=only)
        changed = await client.post(f"/jobs/{payout}/cancel", json={}, headers=only)
        described = (await client.get("/openapi.json", headers=only)).json()
        untouched = (await client.get(f"/jobs/{payout}", headers=everything)).json()
    assert [job["jobId"] for job in page["jobs"]] == [mine]
    assert (named.status_code, bulk.status_code, changed.status_code) == (403, 403, 404)
    assert untouched["status"] == "queued"
    assert "thumbnail.create.request" in described["components"]["schemas"]
    assert "payout" not in str(described)


# OpenAPI


async def test_it_is_not_described_where_introspection_is_off(visit: Visit) -> None:
    async with visit(production="true") as client:
        assert (await client.get("/openapi.json")).status_code == 404


async def test_the_description_has_the_sizes_of_the_settings(visit: Visit) -> None:
    async with visit(max_page_size="77", max_bulk_size="1234") as client:
        described = (await client.get("/openapi.json")).json()
    page = described["paths"]["/jobs"]["get"]["parameters"]
    (first,) = [each["schema"] for each in page if each["name"] == "first"]
    assert (first["maximum"], first["default"]) == (77, 50)
    assert (
        described["components"]["schemas"]["BulkRequest"]["properties"]["jobs"]["maxItems"] == 1234
    )
    assert "1,234 jobs" in described["paths"]["/jobs/bulk"]["post"]["summary"]


async def test_every_job_type_has_its_own_schema(http: httpx.AsyncClient) -> None:
    described = (await http.get("/openapi.json")).json()
    schemas = described["components"]["schemas"]
    assert described["openapi"].startswith("3.1")
    for name in queue_of(http).registry:
        assert schemas[f"{name}.request"]["properties"]["type"]["const"] == name
        assert f"{name}.payload" in schemas
    assert len(schemas["EnqueueRequest"]["oneOf"]) == len(queue_of(http).registry)


class Card(Payload):
    kind: Literal["card"]
    number: str


class Bank(Payload):
    kind: Literal["bank"]
    default: Tree | None = None


class Tree(Payload):
    children: tuple[Tree, ...] = ()
    note: Literal["#", "#/$defs/Tree"] = "#"


class Pay(Payload):
    method: Annotated[Card | Bank, Field(discriminator="kind")]
    tree: Tree


def test_references_of_a_payload_hold_in_the_description() -> None:
    pay = JobType(
        name="pay",
        payload=Pay,
        example={"method": {"kind": "card", "number": "1"}, "tree": {}},
    )
    described = describe([pay], "", uploads=False, max_page_size=200, max_bulk_size=1_000)
    validator = Draft202012Validator(
        {"$ref": "#/components/schemas/EnqueueRequest", "components": described["components"]}
    )
    good = {"method": {"kind": "bank", "default": {}}, "tree": {"children": [{"note": "#"}]}}
    bad = {"method": {"kind": "bank", "default": {}}, "tree": {"children": [{"note": "##"}]}}
    assert validator.is_valid({"type": "pay", "payload": good})
    assert not validator.is_valid({"type": "pay", "payload": bad})
    schemas = described["components"]["schemas"]
    method = schemas["pay.payload"]["properties"]["method"]
    assert method["discriminator"]["mapping"]["card"] == "#/components/schemas/pay.payload-Card"
    assert schemas["pay.payload-Tree"]["properties"]["note"]["enum"] == ["#", "#/$defs/Tree"]


def test_every_schema_of_the_description_is_one_that_generators_of_clients_find() -> None:
    """They do not follow references into a schema: openapi-typescript makes `$defs` a field of the
    payload, and openapi-python-client drops the request. It also takes a title for a class."""
    walk = JobType(name="walk", payload=Tree)
    pay = JobType(
        name="pay", payload=Pay, example={"method": {"kind": "card", "number": "1"}, "tree": {}}
    )
    described = describe([pay, walk], "", uploads=True, max_page_size=200, max_bulk_size=1_000)
    text = json.dumps(described)
    schemas = described["components"]["schemas"]
    assert '"$defs"' not in text
    assert not any("title" in schema for schema in schemas.values())
    references = set(re.findall(r'"\$ref": "([^"]*)"', text))
    assert references == {f"#/components/schemas/{name}" for name in schemas}


def test_the_description_says_which_ids_an_asset_may_have() -> None:
    described = describe([], "", uploads=True, max_page_size=200, max_bulk_size=1_000)
    for path in [path for path in described["paths"] if path.startswith("/assets/")]:
        asset_id = described["paths"][path]["post"]["parameters"][0]["schema"]
        validator = Draft202012Validator(asset_id)
        assert [each for each in ("cat-1", ".cat", "") if validator.is_valid(each)] == ["cat-1"]


async def test_the_server_does_as_its_description_says(database_url: str) -> None:
    """Random requests, right and wrong, as schemathesis makes them; long: `TEST_REQUESTS=1000`."""
    async with serving(database_url, "--no-worker") as (address, _):
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            job_id = await enqueued(client)
        tried = await asyncio.to_thread(send_requests, f"http://{address}/openapi.json", job_id)
    assert len(tried) == 10


def send_requests(url: str, job_id: str) -> list[str]:
    """Sends random requests for each operation, and checks the answers; gives the operations."""

    def check(case: Any) -> None:
        places = case.path_parameters or {}
        if len(places.get("id", "")) % 2:
            places["id"] = job_id
        case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ]
        )

    return send_for_each_operation(schemathesis.openapi.from_url(url), CASES, check)
