"""The registry's acceptance table, through GraphQL and REST alike."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

GOOD = {"assetId": "id", "versionNumber": 1}

ENQUEUE = """
mutation ($input: EnqueueJobInput!) {
  enqueueJob(input: $input) {
    __typename
    ... on EnqueueJobSuccess { deduplicated job { id type status maxAttempts nextRunAt } }
    ... on Error { code message }
    ... on JobTypeNotFound { jobType suggestions }
    ... on PayloadInvalid { jobType violations { path code message } }
    ... on InputInvalid { violations { path code } }
    ... on IdempotencyConflict { existingJob { id } differingPaths }
  }
}"""


async def by_graphql(http: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    response = await http.post("/graphql", json={"query": ENQUEUE, "variables": {"input": job}})
    result: dict[str, Any] = response.json()["data"]["enqueueJob"]
    return result


async def stored_max_attempts(http: httpx.AsyncClient, job_id: str) -> int:
    return int((await http.get(f"/jobs/{job_id}")).json()["maxAttempts"])


async def test_a_good_job_is_queued(http: httpx.AsyncClient) -> None:
    result = await by_graphql(http, {"type": "thumbnail.create", "payload": GOOD})
    assert (result["__typename"], result["deduplicated"]) == ("EnqueueJobSuccess", False)
    assert result["job"]["status"] == "QUEUED"
    assert result["job"]["nextRunAt"].endswith("Z")

    response = await http.post("/jobs", json={"type": "thumbnail.create", "payload": GOOD})
    content = response.json()
    assert response.status_code == 201
    assert content.keys() == {"jobId", "status", "type", "nextRunAt"}
    assert (content["status"], content["type"]) == ("queued", "thumbnail.create")
    assert response.headers["location"] == f"/jobs/{content['jobId']}"
    assert (await http.get(response.headers["location"])).json()["payload"] == GOOD


async def test_a_payload_without_a_required_field_is_refused(http: httpx.AsyncClient) -> None:
    job = {"type": "thumbnail.create", "payload": {"versionNumber": 1}}
    result = await by_graphql(http, job)
    assert (result["__typename"], result["code"]) == ("PayloadInvalid", "payload_invalid")
    assert [violation["path"] for violation in result["violations"]] == ["/assetId"]

    response = await http.post("/jobs", json=job)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "payload_invalid"
    assert [detail["path"] for detail in response.json()["error"]["details"]] == ["/assetId"]


async def test_an_unknown_type_is_refused(http: httpx.AsyncClient) -> None:
    result = await by_graphql(http, {"type": "unknown.job", "payload": {}})
    assert (result["__typename"], result["code"]) == ("JobTypeNotFound", "job_type_not_found")
    near = await by_graphql(http, {"type": "thumbnail.craete", "payload": {}})
    assert near["suggestions"] == ["thumbnail.create"]

    response = await http.post("/jobs", json={"type": "unknown.job", "payload": {}})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "job_type_not_found"


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"type": "thumbnail.create", "payload": GOOD, "maxAttempts": 10}, 10),
        ({"type": "thumbnail.create", "payload": GOOD}, 3),
        ({"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}, 10),
    ],
)
async def test_max_attempts_come_from_the_call_or_the_policy(
    http: httpx.AsyncClient, job: dict[str, Any], expected: int
) -> None:
    result = await by_graphql(http, job)
    assert result["job"]["maxAttempts"] == expected
    assert await stored_max_attempts(http, result["job"]["id"]) == expected
    response = await http.post("/jobs", json=job)
    assert await stored_max_attempts(http, response.json()["jobId"]) == expected


async def test_values_out_of_their_range_are_refused_together(http: httpx.AsyncClient) -> None:
    job = {"type": "thumbnail.create", "payload": GOOD, "maxAttempts": 0, "priority": 101}
    result = await by_graphql(http, job)
    assert (result["__typename"], result["code"]) == ("InputInvalid", "validation_error")
    assert {v["path"] for v in result["violations"]} == {"/maxAttempts", "/priority"}

    response = await http.post("/jobs", json=job)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "validation_error"
    assert {d["path"] for d in response.json()["error"]["details"]} == {"/maxAttempts", "/priority"}


async def test_an_idempotency_key_is_safe_to_repeat_and_conflicts_otherwise(
    http: httpx.AsyncClient,
) -> None:
    job = {"type": "thumbnail.create", "payload": GOOD, "idempotencyKey": "k"}
    first = await by_graphql(http, job)
    again = await http.post("/jobs", json=job)
    assert (again.status_code, again.json()["jobId"]) == (200, first["job"]["id"])
    assert (await by_graphql(http, job))["deduplicated"] is True

    other = {**job, "payload": {**GOOD, "versionNumber": 2}}
    conflict = await by_graphql(http, other)
    assert conflict["__typename"] == "IdempotencyConflict"
    assert conflict["existingJob"]["id"] == first["job"]["id"]
    assert conflict["differingPaths"] == ["/versionNumber"]
    response = await http.post("/jobs", json=other)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("payload", "path", "code"),
    [
        ('{"assetId": "a", "versionNumber": 9223372036854775808}', "/versionNumber", None),
        ('{"assetId": "a\\u0000", "versionNumber": 1}', "/assetId", "invalid_text"),
        ('{"assetId": "a", "versionNumber": 1, "sizes": [1e999]}', "/sizes/0", "not_finite"),
        ('{"assetId": "a", "versionNumber": "1"}', "/versionNumber", "wrong_type"),
        ('{"assetId": "a", "versionNumber": true}', "/versionNumber", "wrong_type"),
        ('{"assetId": "a", "versionNumber": 1, "extra": 1}', "/extra", "unknown_field"),
        ("[]", "", "wrong_type"),
        ('"text"', "", "wrong_type"),
        ("null", "", None),
        ('{"assetId": ' + "[" * 100 + "]" * 100 + "}", None, "too_deep"),
        ('{"assetId": "' + "x" * 300_000 + '", "versionNumber": 1}', "", "too_large"),
    ],
)
async def test_a_bad_payload_is_a_clear_error(
    http: httpx.AsyncClient, payload: str, path: str | None, code: str | None
) -> None:
    headers = {"content-type": "application/json"}
    body = f'{{"type": "thumbnail.create", "payload": {payload}}}'
    rest = await http.post("/jobs", content=body, headers=headers)
    assert rest.status_code == 422, rest.text
    body = f'{{"query": {_quoted(ENQUEUE)}, "variables": {{"input": {body}}}}}'
    content = (await http.post("/graphql", content=body, headers=headers)).json()
    if payload == "null":
        # The schema itself says `payload: JSON!`, and GraphQL answers before any resolver.
        assert ".payload" in content["errors"][0]["message"]
        return
    graphql = content["data"]["enqueueJob"]
    assert graphql["__typename"] == "PayloadInvalid"
    for violations in (graphql["violations"], rest.json()["error"]["details"]):
        if path is not None:
            assert violations[0]["path"] == path
        if code is not None:
            assert violations[0]["code"] == code


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
