"""What answers do not tell: names that a caller does not know, and content to caches."""

from __future__ import annotations

import json

import httpx
import pytest
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.http_client import Visit, application_of

CLOSE = {"type": "thumbnail.creat", "payload": {}}
TYPED = {"type": "thumbnail.create", "payload": {"assetIdd": "a", "versionNumber": 1}}
DOCUMENTS = [
    "{ jobTypess { name } }",
    '{ jobType(jobTyp: "a") { __typename } }',
    '{ jobType(jobType: "thumbnail.creat") { ... on JobTypeNotFound { message suggestions } } }',
    '{ jobPolicy(jobType: "thumbnail.creat") { ... on JobTypeNotFound { message suggestions } } }',
    '{ validateJob(input: {type: "thumbnail.creat", payload: {}}) {'
    " ... on JobTypeNotFound { message suggestions } } }",
    'mutation { enqueueJob(input: {type: "thumbnail.create", payload: {assetIdd: "a"}}) {'
    " ... on PayloadInvalid { violations { message } } } }",
    'mutation { enqueueJobs(inputs: [{type: "thumbnail.creat", payload: {}}]) {'
    " ... on JobTypeNotFound { message suggestions } } }",
    "mutation { enqueue(job: {thumbnailCreat: {}}) { __typename } }",
    'mutation { enqueue(job: {thumbnailCreate: {assetIdd: "a"}}) { __typename } }',
    'mutation { leaseJobs(input: {jobTypes: ["thumbnail.creat"], workerId: "w"}) {'
    " ... on InputInvalid { violations { message } } } }",
    'subscription { jobEvents(jobTypes: ["thumbnail.creat"]) { name } }',
    "{ jobs(filter: {statuses: [QUEUE]}) { nodes { id } } }",
]
VARIABLES = "mutation ($job: TypedJobInput!) { enqueue(job: $job) { __typename } }"


@pytest.mark.parametrize("suggests", [True, False])
async def test_no_error_suggests_a_name_once_suggestions_are_off(
    visit: Visit, suggests: bool
) -> None:
    answers = []
    async with visit(suggestions=str(suggests).lower()) as client:
        for document in DOCUMENTS:
            answers.append(await ask(client, document))
        jobs: list[dict[str, object]] = [
            {"thumbnailCreat": {}},
            {"thumbnailCreate": {"assetIdd": "a"}},
        ]
        for job in jobs:
            answers.append(await ask(client, VARIABLES, {"job": job}))
        for body in (CLOSE, TYPED, {"typ": "a", "payload": {}}):
            answers.append((await client.post("/jobs", json=body)).text)
    for answer in answers:
        # The field of the answer is there in any case.
        suggested = "Did you mean" in answer or '"suggestions":["' in answer
        assert suggested == suggests, answer
        assert "internal_error" not in answer


async def ask(client: httpx.AsyncClient, document: str, variables: object = None) -> str:
    headers = {"accept": "text/event-stream"} if document.startswith("subscription") else {}
    body = {"query": document, "variables": variables}
    return (await client.post("/graphql", json=body, headers=headers)).text


@pytest.mark.parametrize("origins", ["", "https://app.example.com"])
async def test_no_answer_is_for_a_cache_and_none_is_guessed_at(visit: Visit, origins: str) -> None:
    settings = {"cors_origins": origins} if origins else {}
    job = {"type": "test.ping", "payload": {}}
    async with visit(**settings) as client:
        made = await client.post("/jobs", json=job)
        answers = [
            made,
            await client.get(made.headers["location"]),
            await client.post("/jobs", content="{"),
            await client.get("/jobs/no"),
            await client.delete("/jobs/no"),
            await client.post("/graphql", json={"query": "{ __typename }"}),
            await client.get("/graphql?query={__typename}"),
            await client.get("/graphql?query={__typename}", headers={"host": "evil.example"}),
            await client.post("/graphql", json={"query": "{"}),
            await client.put("/graphql"),
            await client.post(
                "/graphql",
                json={"query": "{ __typename }"},
                headers={"accept": "text/event-stream"},
            ),
            await client.get("/graphql", headers={"accept": "image/png"}),
            await client.get("/nowhere"),
            await client.get("/healthz"),
            await client.get("/readyz"),
            await client.get("/metrics"),
            await client.post("/healthz"),
            await client.get("/healthz", headers={"origin": "https://app.example.com"}),
            await client.options(
                "/graphql",
                headers={
                    "origin": "https://app.example.com",
                    "access-control-request-method": "POST",
                },
            ),
        ]
        page = await client.get("/graphql", headers={"accept": "text/html"})
    for answer in answers:
        assert answer.headers.get_list("cache-control") == ["no-store"], answer.url
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], answer.url
        names = {name.strip().lower() for name in answer.headers["vary"].split(",")}
        assert names >= ({"accept", "origin"} if origins else {"accept"}), answer.url
    assert page.headers.get_list("cache-control") == ["no-cache"]
    assert "accept" in page.headers["vary"].lower()
    assert json.loads(answers[5].text) == {"data": {"__typename": "Query"}}


async def fails(_request: Request) -> Response:
    raise RuntimeError("A secret of an endpoint.")


async def fails_halfway(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    raise RuntimeError("A secret of an endpoint.")


@pytest.mark.parametrize("origins", ["", "https://app.example.com"])
async def test_an_unexpected_exception_of_an_endpoint_is_answered_with_its_id_alone(
    visit: Visit, origins: str
) -> None:
    async with visit(cors_origins=origins, production="true") as client:
        application_of(client).routes.append(Route("/fails", fails))
        with structlog.testing.capture_logs() as lines:
            answer = await client.get("/fails")
    assert answer.status_code == 500
    error = answer.json()["error"]
    error_id = error["details"][0]["errorId"]
    assert error == {
        "code": "internal_error",
        "message": f"Something went wrong here. It is logged as {error_id}.",
        "details": [{"errorId": error_id}],
    }
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "Accept" in answer.headers["vary"]
    assert [line["error_id"] for line in lines if line["event"] == "unexpected"] == [error_id]


async def test_an_answer_that_fails_halfway_is_not_ended_as_if_it_were_whole(visit: Visit) -> None:
    class FailsHalfway:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await fails_halfway(scope, receive, send)

    async with visit() as client:
        application_of(client).routes.append(Route("/fails", FailsHalfway()))
        with pytest.raises(RuntimeError):
            await client.get("/fails")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_a_method_that_a_health_path_does_not_take_is_refused_as_everywhere(
    visit: Visit, path: str
) -> None:
    async with visit() as client:
        answer = await client.post(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json()["error"] == {
        "code": "method_not_allowed",
        "message": "This path accepts only GET and HEAD.",
        "details": [],
    }
