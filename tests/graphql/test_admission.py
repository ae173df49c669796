"""What a caller may not use, it learns nothing about: neither names nor fields nor faults."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import pytest
from graphql import get_introspection_query

from job_registry import JobRegistry, JobType, Payload
from tests.http_client import Visit
from tests.test_auth import AUTH, bearer

SECRET = re.compile("[Pp]ayout|batchId|escrowId|isRetry|[Ss]ecret")
ALL = ("jobs:enqueue", "jobs:read", "jobs:work", "jobs:admin")
IN_AN_HOUR = int(time.time()) + 3_600  # The tests may have begun minutes ago.
LIMITED = bearer(*ALL, **{"jobs:types": ["test.ping"]}, exp=IN_AN_HOUR)
NO_TYPES = bearer(*ALL, **{"jobs:types": []}, exp=IN_AN_HOUR)
NO_SCOPE = bearer(exp=IN_AN_HOUR)


class SecretPlan(Payload):
    """A payload that others must not hear of."""

    secret_code: str


@pytest.fixture
def registry(registry: JobRegistry) -> JobRegistry:
    secret = JobType(name="secret.plan", payload=SecretPlan)
    return JobRegistry([*registry.values(), secret])


async def ask(
    client: httpx.AsyncClient, headers: dict[str, str], query: str, **variables: object
) -> Any:
    body = {"query": query, "variables": variables}
    return (await client.post("/graphql", json=body, headers=headers)).json()


QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    (get_introspection_query(input_value_deprecation=True), {}),
    ('{ __type(name: "TypedJobInput") { inputFields { name } } }', {}),
    ('{ __type(name: "SecretPlanInput") { inputFields { name } } }', {}),
    ('{ __type(name: "Mutation") { fields { name args { type { ofType { name } } } } } }', {}),
    ("mutation { enqueue(job: {secretPlam: {}}) { __typename } }", {}),
    ("mutation { enqueue(job: {secretPlan: {}}) { __typename } }", {}),
    ("mutation { enqueue(job: {secretPlan: {secretCod: 1}}) { __typename } }", {}),
    ("mutation { enqueue(job: 1) { __typename } }", {}),
    ("mutation ($j: TypedJobInput!) { enqueue(job: $j) { __typename } }", {"j": {"secretPla": 1}}),
    ("mutation ($j: TypedJobInput!) { enqueue(job: $j) { __typename } }", {"j": {"x": {}}}),
    ("mutation ($j: SecretPlanInpu!) { enqueue(job: $j) { __typename } }", {}),
    (
        'mutation { enqueueJob(input: {type: "x", payload: {}}) { ... on SecretPlanInput { a } } }',
        {},
    ),
    ("{ jobTypes { name payloadSchema examplePayload } }", {}),
    ('{ jobType(jobType: "secret.pla") { __typename ... on Error { message } } }', {}),
    ('{ jobPolicy(jobType: "secret.pla") { __typename ... on Error { message } } }', {}),
    (
        'mutation { enqueueJob(input: {type: "secret.pla", payload: {}}) { __typename'
        " ... on Error { message } ... on JobTypeNotFound { suggestions } } }",
        {},
    ),
]


@pytest.mark.cases(2)
@pytest.mark.parametrize("headers", [LIMITED, NO_TYPES, NO_SCOPE], ids=["some", "none", "no scope"])
@pytest.mark.parametrize("production", ["false", "true"])
async def test_no_answer_mentions_a_type_that_the_caller_may_not_see(
    visit: Visit, headers: dict[str, str], production: str
) -> None:
    async with visit(production=production, **AUTH) as client:
        for query, variables in QUESTIONS:
            answer = json.dumps(await ask(client, headers, query, **variables))
            mentioned = SECRET.search(
                re.sub(r"secret\.pla\b|[Ss]ecretPl\w*|secretCod\b", "", answer)
            )
            sent = set(re.findall(r"[Ss]ecret\w*", query + json.dumps(variables)))
            assert mentioned is None, (query, answer)
            assert set(re.findall(r"[Ss]ecret\w*", answer)) <= sent, (query, answer)


async def test_a_hidden_type_and_one_that_does_not_exist_are_answered_alike(visit: Visit) -> None:
    hidden = ("secretPlan", "secret.plan", "SecretPlanInput")
    unknown = ("zecretPlan", "zecret.plan", "ZecretPlanInput")
    questions = (
        "mutation { enqueue(job: {%s: {}}) { __typename } }",
        'mutation { enqueueJob(input: {type: "%s", payload: {}}) { __typename } }',
        '{ validateJob(input: {type: "%s", payload: {}}) { __typename } }',
        '{ jobType(jobType: "%s") { __typename } }',
        '{ jobs(filter: {types: ["%s"]}) { totalCount: __typename } }',
        'mutation { leaseJobs(input: {jobTypes: ["%s"], workerId: "w"}) { __typename } }',
        '{ __type(name: "%s") { name } }',
        "mutation ($j: %s) { enqueue(job: $j) { __typename } }",
    )
    async with visit(**AUTH) as client:
        for question in questions:
            for one, other in zip(hidden, unknown, strict=True):
                first = json.dumps(await ask(client, LIMITED, question % one))
                second = json.dumps(await ask(client, LIMITED, question % other))
                assert first.replace(one, "X") == second.replace(other, "X"), question


async def test_a_caller_sees_and_uses_the_types_it_is_limited_to(visit: Visit) -> None:
    fields = '{ __type(name: "TypedJobInput") { inputFields { name } } }'
    enqueue = "mutation { enqueue(job: {testPing: {}}) { __typename } }"
    async with visit(**AUTH) as client:
        for _ in range(2):
            seen = await ask(client, LIMITED, fields)
            assert seen["data"]["__type"]["inputFields"] == [{"name": "testPing"}]
            enqueued = await ask(client, LIMITED, enqueue)
            assert enqueued == {"data": {"enqueue": {"__typename": "EnqueueJobSuccess"}}}
            everything = await ask(client, bearer("jobs:read"), fields)
            assert {"name": "secretPlan"} in everything["data"]["__type"]["inputFields"]
        mistyped = await ask(client, LIMITED, enqueue.replace("testPing", "testPin"))
        assert "Did you mean 'testPing'" in json.dumps(mistyped).replace('\\"', "'")


async def test_a_document_that_another_caller_has_sent_is_checked_for_this_one(
    visit: Visit,
) -> None:
    document = 'mutation { enqueue(job: {secretPlan: {secretCode: "x"}}) { __typename } }'
    async with visit(**AUTH) as client:
        assert "errors" not in await ask(client, bearer(*ALL), document)
        assert "errors" in await ask(client, LIMITED, document)
        assert "errors" not in await ask(client, bearer(*ALL), document)


async def test_a_token_without_scopes_is_answered_before_its_document_is_read(
    visit: Visit,
) -> None:
    async with visit(**AUTH) as client:
        for document in ("{", "{ __typename }", "{ nothing }", get_introspection_query()):
            answer = await ask(client, NO_SCOPE, document)
            assert [each["extensions"]["code"] for each in answer["errors"]] == ["forbidden"]
            assert "data" not in answer


ENQUEUE = "mutation ($i: EnqueueJobInput!) { it: enqueueJob(input: $i) { __typename } }"


async def test_a_scope_is_checked_before_variables_are_coerced(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        for variables in ({}, {"i": 1}, {"i": {"typ": "x"}}, {"i": {"type": 1, "payload": {}}}):
            answer = await ask(client, bearer("jobs:read"), ENQUEUE, **variables)
            (error,) = answer["errors"]
            assert (error["path"], error["extensions"]) == (["it"], {"code": "forbidden"})
            assert error["message"] == "This needs the scope jobs:enqueue or jobs:own."


async def test_an_operation_with_a_field_that_is_forbidden_does_nothing(visit: Visit) -> None:
    both = (
        "mutation ($yes: Boolean = true) { ...F ... @include(if: $yes) { no: cancelJob(id: 1) {"
        ' __typename } } } fragment F on Mutation { enqueueJob(input: {type: "test.ping",'
        " payload: {}}) { __typename } }"
    )
    async with visit(**AUTH) as client:
        answer = await ask(client, bearer("jobs:enqueue"), both)
        assert [error["path"] for error in answer["errors"]] == [["no"]]
        jobs = await ask(client, bearer("jobs:read"), "{ jobs { nodes { id } } }")
        assert jobs["data"]["jobs"]["nodes"] == []
        # What is left out is not needed.
        answer = await ask(client, bearer("jobs:enqueue"), both, yes=False)
        assert answer["data"]["enqueueJob"] == {"__typename": "EnqueueJobSuccess"}


async def test_a_lease_of_another_type_is_lost(visit: Visit) -> None:
    job = {"type": "secret.plan", "payload": {"secretCode": "x"}}
    lease = (
        'mutation { leaseJobs(input: {jobTypes: ["secret.plan"], workerId: "w"}) {'
        " ... on LeaseJobsSuccess { leases { leaseToken } } } }"
    )
    big = "x" * 300_000
    async with visit(**AUTH) as client:
        await client.post("/jobs", json=job, headers=bearer("jobs:enqueue"))
        leased = await ask(client, bearer("jobs:work"), lease)
        token = leased["data"]["leaseJobs"]["leases"][0]["leaseToken"]
        for field in (
            "heartbeatJob(leaseToken: $t)",
            "heartbeatJob(leaseToken: $t, progress: $p)",
            "completeJob(leaseToken: $t)",
            "completeJob(leaseToken: $t, result: $p)",
            'failJob(leaseToken: $t, error: {code: "c", message: "m"})',
            "releaseJob(leaseToken: $t)",
            "snoozeJob(leaseToken: $t, seconds: 1)",
            "snoozeJob(leaseToken: $t, seconds: -1)",
        ):
            declared = "$t: String!, $p: JSON" if "$p" in field else "$t: String!"
            document = f"mutation ({declared}) {{ it: {field} {{ __typename }} }}"
            work = bearer("jobs:work", **{"jobs:types": ["test.ping"]})
            assert await ask(client, work, document, t=token, p=big) == {
                "data": {"it": {"__typename": "LeaseLost"}}
            }, field
        mine = bearer("jobs:work", **{"jobs:types": ["secret.plan"]})
        document = "mutation ($t: String!) { it: completeJob(leaseToken: $t) { __typename } }"
        done = await ask(client, mine, document, t=token)
        assert done == {"data": {"it": {"__typename": "JobChanged"}}}
