"""The GraphQL door: its schema, its errors, its pages, and its manners over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from graphql import GraphQLEnumType, GraphQLInputObjectType, GraphQLObjectType, build_schema

from job_registry.discovery import load_registry
from job_registry_api.graphql.schema import SDL_FILE, sdl
from job_registry_api.queue.errors import QueueUnavailable
from tests.http_client import Execute, queue_of

JSON = {"content-type": "application/json"}
PING = {"type": "test.ping", "payload": {"text": "hi"}}


BUILT_IN_TYPES = load_registry(["job_registry.catalog"])


def test_the_committed_schema_is_the_one_that_is_served() -> None:
    again = "run: job-registry schema > api/graphql/schema.graphql"
    assert SDL_FILE.read_text("utf-8") == sdl(BUILT_IN_TYPES), again


def test_everything_in_the_schema_is_described_for_its_reader() -> None:
    missing = []
    for graphql_type in build_schema(sdl(BUILT_IN_TYPES)).type_map.values():
        if graphql_type.name.startswith("__") or graphql_type.name in _BUILT_IN:
            continue
        if not graphql_type.description:
            missing.append(graphql_type.name)
        parts: dict[str, Any] = {}
        if isinstance(graphql_type, GraphQLEnumType):
            parts = dict(graphql_type.values)
        elif isinstance(graphql_type, GraphQLObjectType | GraphQLInputObjectType):
            parts = dict(graphql_type.fields)
        for name, part in parts.items():
            if not part.description:
                missing.append(f"{graphql_type.name}.{name}")
            missing += [
                f"{graphql_type.name}.{name}({argument})"
                for argument, definition in getattr(part, "args", {}).items()
                if not definition.description
            ]
    assert missing == []


_BUILT_IN = {"String", "Int", "Float", "Boolean", "ID"}


async def test_job_types_tell_all_about_themselves(execute: Execute) -> None:
    data = await execute(
        """{ jobTypes { name description hasHandler fingerprint payloadSchema examplePayload
             policy { type maxAttempts timeoutSeconds concurrencyLimit
                      backoff { baseSeconds capSeconds } }
             counts { queued running succeeded failed cancelled } } }"""
    )
    by_name = {each["name"]: each for each in data["jobTypes"]}
    assert list(by_name) == sorted(by_name)
    thumbnail, payout = by_name["thumbnail.create"], by_name["payout.execute"]
    assert thumbnail["policy"] == {
        "type": "thumbnail.create",
        "maxAttempts": 3,
        "timeoutSeconds": 300,
        "concurrencyLimit": None,
        "backoff": {"baseSeconds": 2, "capSeconds": 3600},
    }
    assert payout["policy"]["concurrencyLimit"] == 5
    assert (thumbnail["hasHandler"], payout["hasHandler"]) == (True, False)
    assert thumbnail["payloadSchema"]["required"] == ["assetId", "versionNumber"]
    assert thumbnail["counts"] == dict.fromkeys(thumbnail["counts"], 0)


async def test_policies_and_types_are_found_by_name_or_not(execute: Execute) -> None:
    data = await execute(
        """{ a: jobPolicy(jobType: "payout.execute") { ... on JobPolicy { maxAttempts } }
             b: jobPolicy(jobType: "payout.exe") { ... on JobTypeNotFound { code suggestions } }
             c: jobType(jobType: "nope") { __typename }
             d: jobType(jobType: "test.ping") { ... on JobType { name } } }"""
    )
    assert data == {
        "a": {"maxAttempts": 10},
        "b": {"code": "job_type_not_found", "suggestions": ["payout.execute"]},
        "c": {"__typename": "JobTypeNotFound"},
        "d": {"name": "test.ping"},
    }


ENQUEUE_MANY = """
mutation ($inputs: [EnqueueJobInput!]!, $atomic: Boolean) {
  enqueueJobs(inputs: $inputs, atomic: $atomic) {
    __typename ... on EnqueueJobSuccess { job { id payload } }
    ... on InputInvalid { violations { code } } } }"""


async def test_a_bulk_answers_in_order_and_atomic_stores_all_or_none(execute: Execute) -> None:
    inputs = [PING, {"type": "nope", "payload": {}}, {**PING, "priority": 999}, PING]
    data = await execute(ENQUEUE_MANY, inputs=inputs)
    kinds = [result["__typename"] for result in data["enqueueJobs"]]
    expected = ["EnqueueJobSuccess", "JobTypeNotFound", "InputInvalid", "EnqueueJobSuccess"]
    assert kinds == expected

    data = await execute(ENQUEUE_MANY, inputs=inputs, atomic=True)
    assert data["enqueueJobs"][0]["violations"] == [{"code": "not_stored"}]
    jobs = await execute("{ jobs { nodes { id } } }")
    assert len(jobs["jobs"]["nodes"]) == 2


async def test_a_bulk_of_more_than_a_thousand_is_an_error_of_the_request(
    http: httpx.AsyncClient,
) -> None:
    variables = {"inputs": [PING] * 1_001}
    response = await http.post("/graphql", json={"query": ENQUEUE_MANY, "variables": variables})
    (error,) = response.json()["errors"]
    assert error["extensions"]["code"] == "budget_exceeded"


async def test_every_job_is_on_exactly_one_page(execute: Execute) -> None:
    await execute(ENQUEUE_MANY, inputs=[PING] * 5 + [{"type": "test.pong", "payload": {}}] * 2)
    query = """query ($after: String, $filter: JobFilter) {
        jobs(first: 2, after: $after, filter: $filter) {
          edges { cursor node { id } } pageInfo { hasNextPage hasPreviousPage endCursor } } }"""
    seen: list[str] = []
    after = None
    while True:
        page = (await execute(query, after=after, filter={"types": ["test.ping"]}))["jobs"]
        assert page["pageInfo"]["hasPreviousPage"] is (after is not None)
        seen += [edge["node"]["id"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    assert len(set(seen)) == len(seen) == 5
    assert seen == sorted(seen, reverse=True)
    none = await execute(query, filter={"statuses": ["FAILED"]})
    assert none["jobs"]["edges"] == []


@pytest.mark.parametrize("arguments", ['after: "junk"', "first: 0", "first: 201", 'after: "é"'])
async def test_a_wrong_page_is_a_clear_error(http: httpx.AsyncClient, arguments: str) -> None:
    response = await http.post(
        "/graphql", json={"query": f"{{ jobs({arguments}) {{ nodes {{ id }} }} }}"}
    )
    (error,) = response.json()["errors"]
    assert error["extensions"]["code"] == "validation_error"


async def test_the_attempts_of_a_page_are_read_at_once(
    http: httpx.AsyncClient, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(ENQUEUE_MANY, inputs=[PING] * 10)
    queue = queue_of(http)
    asked: list[int] = []
    attempts = queue.latest_attempts

    async def noting(job_ids: list[Any], max_bytes: int) -> Any:
        asked.append(len(job_ids))
        return await attempts(job_ids, max_bytes)

    monkeypatch.setattr(queue, "latest_attempts", noting)
    await execute("{ jobs { nodes { attempts { attempt } } } }")
    assert asked == [10]


async def test_a_dry_run_says_the_same_and_writes_nothing(execute: Execute) -> None:
    query = """query ($input: EnqueueJobInput!) { validateJob(input: $input) {
        __typename ... on JobValid { maxAttempts timeoutSeconds nextRunAt duplicateOf { id } }
        ... on PayloadInvalid { violations { path } } } }"""
    valid = (await execute(query, input=PING))["validateJob"]
    assert (valid["maxAttempts"], valid["timeoutSeconds"], valid["duplicateOf"]) == (3, 60, None)
    bad = (await execute(query, input={**PING, "payload": {"text": 1}}))["validateJob"]
    assert bad == {"__typename": "PayloadInvalid", "violations": [{"path": "/text"}]}
    assert (await execute("{ jobs { nodes { id } } }"))["jobs"]["nodes"] == []


async def test_a_remote_worker_needs_nothing_but_graphql(execute: Execute) -> None:
    payout = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
    await execute(ENQUEUE_MANY, inputs=[payout] * 3)
    lease = """mutation {
        leaseJobs(input: {jobTypes: ["payout.execute"], workerId: "w", limit: 3}) {
          ... on LeaseJobsSuccess { leases { leaseToken expiresAt deadlineAt job { id } } } } }"""
    tokens = [each["leaseToken"] for each in (await execute(lease))["leaseJobs"]["leases"]]
    assert len(tokens) == 3
    job = "{ __typename ... on JobChanged { job { status attempt result error { code } } } }"
    beat = await execute(
        """mutation ($t: String!) { heartbeatJob(leaseToken: $t, progress: {half: true}) {
             ... on HeartbeatJobSuccess { cancelRequested secondsLeft job { progress } } } }""",
        t=tokens[0],
    )
    assert beat["heartbeatJob"]["job"]["progress"] == {"half": True}
    done = await execute(
        f"""mutation ($t: String!) {{ completeJob(leaseToken: $t, result: [1]) {job} }}""",
        t=tokens[0],
    )
    assert done["completeJob"]["job"]["status"] == "SUCCEEDED"
    failed = await execute(
        f"""mutation ($t: String!) {{
             failJob(leaseToken: $t, error: {{message: "no", code: "bank_closed"}},
                     retryAfterSeconds: 9) {job} }}""",
        t=tokens[1],
    )
    assert failed["failJob"]["job"]["error"] == {"code": "bank_closed"}
    snoozed = await execute(
        f"mutation ($t: String!) {{ snoozeJob(leaseToken: $t, seconds: 5) {job} }}", t=tokens[2]
    )
    assert snoozed["snoozeJob"]["job"]["attempt"] == 0
    lost = await execute(
        f"mutation ($t: String!) {{ releaseJob(leaseToken: $t) {job} }}", t=tokens[2]
    )
    assert lost["releaseJob"] == {"__typename": "LeaseLost"}


async def test_jobs_are_cancelled_and_retried(execute: Execute) -> None:
    data = await execute(ENQUEUE_MANY, inputs=[PING])
    job_id = data["enqueueJobs"][0]["job"]["id"]
    change = """mutation ($id: ID!) {{ {0}(id: $id) {{ __typename
        ... on JobChanged {{ job {{ status }} }} ... on JobStateConflict {{ status }} }} }}"""
    assert (await execute(change.format("retryJob"), id=job_id))["retryJob"]["status"] == "QUEUED"
    cancelled = await execute(change.format("cancelJob"), id=job_id)
    assert cancelled["cancelJob"]["job"]["status"] == "CANCELLED"
    again = await execute(change.format("cancelJob"), id=job_id)
    assert again["cancelJob"] == {"__typename": "JobStateConflict", "status": "CANCELLED"}
    nope = await execute(change.format("cancelJob"), id="nope")
    assert nope["cancelJob"]["__typename"] == "JobNotFound"


def break_queue(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, error: Exception, *names: str
) -> None:
    """Make these operations of the queue raise the error."""

    async def broken(*_arguments: object, **_options: object) -> None:
        raise error

    for name in names:
        monkeypatch.setattr(queue_of(http), name, broken)


async def test_an_unforeseen_fault_is_reported_by_its_id_alone(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_queue(http, monkeypatch, RuntimeError("secret of the house"), "get", "enqueue")
    query = '{ job(id: "x") { __typename } }'
    graphql = await http.post("/graphql", json={"query": query})
    rest = await http.post("/jobs", json=PING)
    assert graphql.json()["errors"][0]["extensions"]["code"] == "internal_error"
    assert (rest.status_code, rest.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in graphql.text + rest.text


async def test_a_database_that_is_away_is_said_so(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = QueueUnavailable("connection refused at 10.0.0.7")
    break_queue(http, monkeypatch, error, "enqueue", "ping")
    mutation = 'mutation { enqueueJob(input: {type: "test.ping", payload: {}}) { __typename } }'
    graphql = await http.post("/graphql", json={"query": mutation})
    rest = await http.post("/jobs", json=PING)
    ready = await http.get("/readyz")
    assert graphql.json()["errors"][0]["extensions"]["code"] == "queue_unavailable"
    assert (rest.status_code, rest.json()["error"]["code"]) == (503, "queue_unavailable")
    assert ready.status_code == 503
    assert "10.0.0.7" not in graphql.text + rest.text + ready.text
    assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"nope", 400),
        (b"[]", 400),
        (b'{"query": 1}', 400),
        (b'{"query": "{ jobTypes { name } }", "variables": []}', 400),
        (b'{"query": "{ jobTypes { name } }", "operationName": 1}', 400),
        (b'{"query": "{", "x": NaN}', 400),
        (b'{"query": "{ jobTypes { name } }"}', 200),
        (b'{"query": "' + b"{a" * 5_000 + b'"}', 200),
        (b'{"query": "{ jobTypes { nope } }"}', 200),
        (b"[" * 100_000, 400),
        (b" " * 3_000_001, 413),
    ],
)
async def test_a_malformed_request_is_answered_with_its_status(
    http: httpx.AsyncClient, body: bytes, status: int
) -> None:
    response = await http.post("/graphql", content=body, headers=JSON)
    assert response.status_code == status
    assert response.headers["content-type"].startswith("application/json")


async def test_the_media_type_of_graphql_reports_faults_of_documents_by_status(
    http: httpx.AsyncClient,
) -> None:
    accept = {"accept": "application/graphql-response+json"}
    for query in ("{", "{ nope }", "query A { jobTypes { name } } query B { jobTypes { name } }"):
        response = await http.post("/graphql", json={"query": query}, headers=accept)
        assert response.status_code == 400
        assert "data" not in response.json()
        assert response.headers["content-type"].startswith("application/graphql-response+json")
    variables = {"query": "query ($n: Int!) { jobs(first: $n) { nodes { id } } }"}
    assert (await http.post("/graphql", json=variables, headers=accept)).status_code == 400
    json_only = {"accept": "application/json"}
    assert (await http.post("/graphql", json=variables, headers=json_only)).status_code == 200
    assert (
        await http.post("/graphql", json={}, headers={"accept": "image/png"})
    ).status_code == 406


async def test_queries_go_by_get_and_mutations_do_not(http: httpx.AsyncClient) -> None:
    query = "query ($n: Int) { jobs(first: $n) { nodes { id } } }"
    good = await http.get("/graphql", params={"query": query, "variables": '{"n": 1}'})
    assert good.json() == {"data": {"jobs": {"nodes": []}}}
    mutation = 'mutation { cancelJob(id: "x") { __typename } }'
    refused = await http.get("/graphql", params={"query": mutation})
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert (
        await http.get("/graphql", params={"query": query, "variables": "{"})
    ).status_code == 400
    assert (await http.put("/graphql", json={})).status_code == 405
    head = await http.head("/graphql", params={"query": query})
    assert (head.status_code, head.content) == (200, b"")
    endless = {"query": "subscription { jobEvents { name } }"}
    head = await http.head("/graphql", params=endless, headers={"accept": "text/event-stream"})
    assert (head.status_code, head.headers["allow"]) == (405, "GET, POST")
    assert (await http.post("/graphql", content=b"query={x}")).status_code == 415


@pytest.mark.parametrize(
    ("request_options", "status", "code"),
    [
        ({"content": b"nope", "headers": JSON}, 400, "not_json"),
        ({"content": b"{}"}, 415, "unsupported_media_type"),
        ({"content": b" " * 3_000_001, "headers": JSON}, 413, "too_large"),
        ({"json": []}, 422, "validation_error"),
        ({"json": {}}, 422, "validation_error"),
        ({"json": {**PING, "color": "red"}}, 422, "validation_error"),
        ({"json": {**PING, "scheduleAt": "2030-01-01T00:00:00"}}, 422, "validation_error"),
        ({"json": {**PING, "priority": "5"}}, 422, "validation_error"),
    ],
)
async def test_rest_answers_what_is_wrong_with_its_status(
    http: httpx.AsyncClient, request_options: dict[str, Any], status: int, code: str
) -> None:
    response = await http.post("/jobs", **request_options)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"].keys() == {"code", "message", "details"}


async def test_rest_counts_the_faults(http: httpx.AsyncClient) -> None:
    one = await http.post("/jobs", json={**PING, "color": "red"})
    assert one.json()["error"]["message"] == "The request has 1 fault."
    two = await http.post("/jobs", json={**PING, "color": "red", "size": 2})
    assert two.json()["error"]["message"] == "The request has 2 faults."


async def test_rest_has_no_such_job_and_no_such_method(http: httpx.AsyncClient) -> None:
    missing = await http.get("/jobs/nope")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "job_not_found")
    assert missing.json()["error"]["message"] == 'There is no job "nope".'
    assert (await http.put("/jobs")).status_code == 405
    assert (await http.delete("/jobs/nope")).headers["allow"] == "GET, HEAD"
