"""What goes in: literals and variables mean the same, and no value breaks the door."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job_registry import JobRegistry
from job_registry_api.auth import ANYONE
from job_registry_api.graphql.context import Context
from job_registry_api.graphql.schema import build_schema
from tests.http_client import Execute, queue_of

NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


def literal(value: Any) -> str:
    """The value as a GraphQL literal, whose object fields are names without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return json.dumps(value)


VALIDATE = """{ __typename
    ... on JobValid { maxAttempts priority }
    ... on PayloadInvalid { message violations { path code message } } }"""
VIOLATIONS = "{ ... on PayloadInvalid { violations { path code } } }"


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(payload=JSON_VALUES.filter(lambda value: value is not None), known=st.booleans())
async def test_a_payload_means_the_same_as_a_literal_and_as_a_variable(
    execute: Execute, payload: Any, known: bool
) -> None:
    if known:
        payload = {"assetId": "a", "versionNumber": payload}
    job = '{type: "thumbnail.create", payload: %s}'
    as_literal = await execute(
        f"{{ validateJob(input: {job % literal(payload)}) {VALIDATE} }}",
    )
    as_variable = await execute(
        f"query ($payload: JSON!) {{ validateJob(input: {job % '$payload'}) {VALIDATE} }}",
        payload=payload,
    )
    assert as_literal == as_variable


@pytest.mark.parametrize(
    ("payload", "path", "code"),
    [
        ('{assetId: "a", versionNumber: 9223372036854775808}', "/versionNumber", None),
        ('{assetId: "a", versionNumber: 1e400}', "/versionNumber", "not_finite"),
        ('{assetId: "a", versionNumber: 1.5}', "/versionNumber", "wrong_type"),
        ('{assetId: "a\\u0000", versionNumber: 1}', "/assetId", "invalid_text"),
        ("{assetId: " + "[" * 100 + "]" * 100 + "}", None, "too_deep"),
    ],
)
async def test_a_bad_literal_is_a_violation_of_the_payload(
    execute: Execute, payload: str, path: str | None, code: str | None
) -> None:
    job = f'{{type: "thumbnail.create", payload: {payload}}}'
    data = await execute(f"mutation {{ enqueueJob(input: {job}) {VIOLATIONS} }}")
    first = data["enqueueJob"]["violations"][0]
    assert path is None or first["path"] == path
    assert code is None or first["code"] == code


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("{assetId: " + "[" * 900 + "]" * 900 + "}", "nested too deep"),
        ("{a: " * 450 + "1" + "}" * 450, "nested too deep"),
        ("[" + "1 " * 2_001 + "]", "more than 2,000 tokens"),
        ('{assetId: "\\ud800"}', "Invalid Unicode escape sequence"),
        ("{assetId: $undefined}", "not defined"),
    ],
)
async def test_a_literal_that_cannot_be_read_is_an_error_of_the_document(
    http: httpx.AsyncClient, payload: str, message: str
) -> None:
    job = f'{{type: "thumbnail.create", payload: {payload}}}'
    query = f"mutation {{ enqueueJob(input: {job}) {VIOLATIONS} }}"
    response = await http.post("/graphql", json={"query": query})
    (error,) = response.json()["errors"]
    assert message in error["message"]


@pytest.mark.parametrize(
    "payload", ["NaN", "Infinity", '{"a": "\\ud800"}', "[" * 10_000 + "]" * 10_000]
)
async def test_a_body_that_is_no_json_is_400(http: httpx.AsyncClient, payload: str) -> None:
    headers = {"content-type": "application/json"}
    body = f'{{"type": "thumbnail.create", "payload": {payload}}}'
    rest = await http.post("/jobs", content=body, headers=headers)
    query = json.dumps(
        f"query ($input: EnqueueJobInput!) {{ validateJob(input: $input) {VALIDATE} }}"
    )
    graphql = await http.post(
        "/graphql",
        content=f'{{"query": {query}, "variables": {{"input": {body}}}}}',
        headers=headers,
    )
    assert (rest.status_code, rest.json()["error"]["code"]) == (400, "not_json")
    assert graphql.status_code == 400
    assert graphql.json()["errors"][0]["message"].startswith("The body is not valid JSON")


@pytest.mark.parametrize(
    "time",
    ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "0500-01-01T00:00:00Z"],
)
async def test_a_time_outside_the_calendar_is_refused_where_it_stands(
    http: httpx.AsyncClient, execute: Execute, time: str
) -> None:
    job = {"type": "test.ping", "payload": {}, "scheduleAt": time}
    data = await execute(
        """query ($input: EnqueueJobInput!) { validateJob(input: $input) {
             ... on InputInvalid { violations { path code } } } }""",
        input=job,
    )
    assert data["validateJob"]["violations"] == [{"path": "/scheduleAt", "code": "out_of_range"}]
    rest = await http.post("/jobs", json=job)
    assert (rest.status_code, rest.json()["error"]["details"][0]["path"]) == (422, "/scheduleAt")


@pytest.mark.parametrize(
    ("given_time", "runs_at"),
    [
        ("2030-01-31T12:00:00Z", "2030-01-31T12:00:00Z"),
        ("2030-01-31T12:00:00+05:30", "2030-01-31T06:30:00Z"),
        ("2030-01-31T12:00:00.5-08:00", "2030-01-31T20:00:00.500000Z"),
        ("2030-01-31t12:00:00.1234567891z", "2030-01-31T12:00:00.123456Z"),
    ],
)
async def test_a_time_is_taken_with_any_offset_and_given_in_utc(
    execute: Execute, given_time: str, runs_at: str
) -> None:
    data = await execute(
        """mutation ($at: DateTime!) { enqueueJob(input:
             {type: "test.ping", payload: {}, scheduleAt: $at}) {
               ... on EnqueueJobSuccess { job { id nextRunAt } } } }""",
        at=given_time,
    )
    job = data["enqueueJob"]["job"]
    assert job["nextRunAt"] == runs_at
    stored = await execute(
        "query ($id: ID!) { job(id: $id) { ... on Job { nextRunAt } } }", id=job["id"]
    )
    assert stored["job"]["nextRunAt"] == runs_at


@pytest.mark.parametrize(
    "job",
    [
        {"type": "test.ping"},
        {"payload": {}},
        {"type": "test.ping", "payload": {}, "priority": "high"},
        {"type": "test.ping", "payload": {}, "priority": 2**31},
        {"type": "test.ping", "payload": {}, "scheduleAt": "tomorrow"},
        {"type": "test.ping", "payload": {}, "scheduleAt": "2030"},
        {"type": "test.ping", "payload": {}, "color": "red"},
    ],
)
async def test_an_input_that_the_schema_refuses_is_named_by_its_field(
    http: httpx.AsyncClient, job: dict[str, Any]
) -> None:
    query = f"mutation ($input: EnqueueJobInput!) {{ enqueueJob(input: $input) {VIOLATIONS} }}"
    response = await http.post("/graphql", json={"query": query, "variables": {"input": job}})
    (error,) = response.json()["errors"]
    (field,) = {"type", "payload"} - job.keys() or job.keys() - {"type", "payload"}
    assert field in error["message"]
    assert "data" not in response.json()


NO_TIMES = ["2030", "1893456000", "2030-01-31", "2030-01-31 12:00:00Z", "2030-01-31T12:00Z"]
NO_TIMES += [
    "20300131T120000Z",
    "2030-W05-4T12:00:00Z",
    "2030-01-31T12:00:60Z",
    "2030-01-31T24:00:00Z",
    "2030-01-31T12:00:00+01:60",
    "2030-01-31T12:00:00+24:00",
]


@pytest.mark.parametrize("text", NO_TIMES)
async def test_what_is_no_time_in_rfc_3339_is_refused_at_every_door(
    http: httpx.AsyncClient, text: str
) -> None:
    job = {"type": "test.ping", "payload": {}, "scheduleAt": text}
    query = f"mutation ($input: EnqueueJobInput!) {{ enqueueJob(input: $input) {VIOLATIONS} }}"
    answer = await http.post("/graphql", json={"query": query, "variables": {"input": job}})
    assert "scheduleAt" in answer.json()["errors"][0]["message"]
    rest = await http.post("/jobs", json=job)
    assert rest.status_code == 422
    assert rest.json()["error"]["details"][0]["path"] == "/scheduleAt"


async def test_a_whole_number_with_a_point_is_an_integer_at_every_door(
    http: httpx.AsyncClient, execute: Execute
) -> None:
    payload = {"assetId": "a", "versionNumber": 1.0}
    job = {"type": "thumbnail.create", "payload": payload, "priority": 60.0, "maxAttempts": 2.0}
    query = f"query ($input: EnqueueJobInput!) {{ validateJob(input: $input) {VALIDATE} }}"
    valid = {"__typename": "JobValid", "maxAttempts": 2, "priority": 60}
    assert (await execute(query, input=job))["validateJob"] == valid
    literal = '{type: "thumbnail.create", payload: {assetId: "a", versionNumber: 1.0}}'
    answer = await execute(f"{{ validateJob(input: {literal}) {{ __typename }} }}")
    assert answer["validateJob"]["__typename"] == "JobValid"
    assert (await http.post("/jobs", json=job)).status_code == 201
    typed = "mutation ($job: TypedJobInput!) { enqueue(job: $job) { __typename } }"
    answer = await execute(typed, job={"thumbnailCreate": payload})
    assert answer["enqueue"]["__typename"] == "EnqueueJobSuccess"


async def test_a_time_without_an_offset_is_a_violation_where_an_offset_is_needed(
    execute: Execute,
) -> None:
    job = {"type": "test.ping", "payload": {}, "scheduleAt": "2030-01-01T00:00:00"}
    data = await execute(
        """mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) {
             ... on InputInvalid { violations { path code } } } }""",
        input=job,
    )
    fault = {"path": "/scheduleAt", "code": "time_zone_missing"}
    assert data["enqueueJob"]["violations"] == [fault]


DOCUMENTS = [
    (
        """query ($filter: JobFilter, $first: Int = 3) {
             jobs(filter: $filter, first: $first) {
               nodes { id type status payload priority nextRunAt createdAt error { code }
                       attempts { attempt outcome } policy { maxAttempts backoff { capSeconds } }
                       waitingReason { __typename ... on ScheduledFor { nextRunAt } } }
               pageInfo { hasNextPage endCursor } } }""",
        {"filter": {"types": ["test.ping", "test.pong"], "statuses": ["QUEUED", "RUNNING"]}},
    ),
    ("{ jobs(filter: {types: null, statuses: [QUEUED]}, after: null) { nodes { id } } }", {}),
    (
        """query ($a: EnqueueJobInput!, $b: EnqueueJobInput!) {
             a: validateJob(input: $a) { __typename ... on JobValid { maxAttempts nextRunAt } }
             b: validateJob(input: $b) { __typename ... on Error { code message }
               ... on InputInvalid { violations { path code message } } } }""",
        {
            "a": {
                "type": "test.ping",
                "payload": {"text": "x"},
                "maxAttempts": 7,
                "scheduleAt": "2030-01-31T12:00:00+02:00",
                "idempotencyKey": None,
            },
            "b": {"type": "test.ping", "payload": {"text": 1}, "priority": 101, "maxAttempts": 0},
        },
    ),
    (
        """{ jobTypes { name payloadSchema counts { queued } policy { type } }
             no: jobType(jobType: "no") { __typename ... on Error { code } } }""",
        {},
    ),
    (
        """mutation ($t: String!) {
             heartbeatJob(leaseToken: $t, progress: {a: [1, null]}) { __typename
               ... on Error { code message } }
             failJob(leaseToken: $t, error: {message: "m", details: [1]}, retryAfterSeconds: 1) {
               __typename ... on LeaseLost { code } }
             leaseJobs(input: {jobTypes: ["no"], workerId: ""}) {
               ... on InputInvalid { violations { path code } } } }""",
        {"t": "0" * 64},
    ),
]


@pytest.mark.parametrize(("query", "variables"), DOCUMENTS)
async def test_a_document_is_executed_as_strawberry_executes_it(
    http: httpx.AsyncClient,
    execute: Execute,
    registry: JobRegistry,
    query: str,
    variables: dict[str, Any],
) -> None:
    later = datetime(2031, 1, 1, tzinfo=UTC).isoformat()
    await execute(
        "mutation ($inputs: [EnqueueJobInput!]!) { enqueueJobs(inputs: $inputs) { __typename } }",
        inputs=[
            {"type": "test.ping", "payload": {}, "priority": number, "scheduleAt": later}
            for number in range(5)
        ],
    )
    queue = queue_of(http)
    expected = await build_schema(registry).execute(
        query, variable_values=variables, context_value=Context(queue, ANYONE)
    )
    assert expected.errors is None
    assert await execute(query, **variables) == expected.data


@pytest.mark.parametrize(
    ("declared", "used", "value", "quoted"),
    [
        ("$value: ID!", "job(id: $value)", True, "true"),
        ("$value: ID!", "job(id: $value)", None, "null"),
        ("$value: ID!", "job(id: $value)", {"None": [None, False]}, "{'None': [null, false]}"),
        ("$value: JobFilter", "jobs(filter: $value)", {"statuses": [None]}, "null"),
        ("$value: JobFilter", "jobs(filter: $value)", {"types": ["True", False]}, "false"),
        ("$value: Int", "jobs(first: $value)", "it's None", '"it\'s None"'),
        ("", 'awaitJob(id: "x", timeoutSeconds: null)', None, "null"),
        ("", "jobs(first: None)", None, "None"),
    ],
)
async def test_no_message_speaks_of_python(
    http: httpx.AsyncClient, declared: str, used: str, value: Any, quoted: str
) -> None:
    query = f"query {f'({declared})' if declared else ''} {{ {used} {{ __typename }} }}"
    answer = await http.post("/graphql", json={"query": query, "variables": {"value": value}})
    (error,) = answer.json()["errors"]
    assert quoted in error["message"]
    rest = error["message"].replace(quoted, "")
    assert not any(word in rest for word in ("None", "True", "False"))
