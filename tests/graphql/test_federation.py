"""The schema as a subgraph of Apollo Federation: what a router reads, and what it may not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from graphql import build_schema, parse

from job_registry_api.graphql.schema import sdl, subgraph_sdl
from tests.http_client import Visit
from tests.test_own_jobs import ADA, AUTH, BOB, NOWHERE, ask, bearer, enqueue

ENTITIES = """query ($of: [_Any!]!) {
  _entities(representations: $of) { __typename ... on Job { id type payload createdBy } } }"""
READER = bearer("eve", "jobs:read")


@pytest.fixture
async def router(visit: Visit) -> AsyncIterator[httpx.AsyncClient]:
    async with visit(**AUTH, federation="true") as client:
        yield client


def of(*job_ids: object) -> list[dict[str, Any]]:
    return [{"__typename": "Job", "id": job_id} for job_id in job_ids]


async def test_a_router_gets_jobs_in_its_order_and_null_for_what_is_not_there(
    router: httpx.AsyncClient,
) -> None:
    one, two = await enqueue(router, ADA), await enqueue(router, BOB)
    wanted = of(two, NOWHERE, one, "junk", two)
    found = (await ask(router, READER, ENTITIES, of=wanted))["_entities"]
    assert [each and each["id"] for each in found] == [two, None, one, None, two]
    assert found[2] == {
        "__typename": "Job",
        "id": one,
        "type": "test.ping",
        "payload": {"text": "mine"},
        "createdBy": "ada",
    }
    assert (await ask(router, READER, ENTITIES, of=[]))["_entities"] == []


async def test_a_job_that_the_caller_may_not_see_is_null(router: httpx.AsyncClient) -> None:
    theirs, own = await enqueue(router, ADA), await enqueue(router, BOB)
    found = (await ask(router, BOB, ENTITIES, of=of(theirs, own)))["_entities"]
    assert [each and each["id"] for each in found] == [None, own]


async def test_a_caller_without_the_scope_is_refused(router: httpx.AsyncClient) -> None:
    sent = {"query": ENTITIES, "variables": {"of": []}}
    worker = bearer("eve", "jobs:work")
    (error,) = (await router.post("/graphql", json=sent, headers=worker)).json()["errors"]
    assert error["extensions"]["code"] == "forbidden"


@pytest.mark.parametrize(
    ("representations", "code", "path"),
    [
        (of(NOWHERE) * 1_001, "budget_exceeded", None),
        (
            [{"__typename": "JobType", "name": "test.ping"}],
            "validation_error",
            "/representations/0",
        ),
        (["Job"], "validation_error", "/representations/0"),
        ([*of(NOWHERE), {"__typename": "Job"}], "validation_error", "/representations/1/id"),
        (of(7), "validation_error", "/representations/0/id"),
    ],
)
async def test_what_is_no_job_and_what_is_too_much_is_refused(
    router: httpx.AsyncClient, representations: list[Any], code: str, path: str | None
) -> None:
    sent = {"query": ENTITIES, "variables": {"of": representations}}
    answer = (await router.post("/graphql", json=sent, headers=READER)).json()
    (error,) = answer["errors"]
    assert error["extensions"]["code"] == code
    violations = error["extensions"].get("violations", [{"path": None}])
    assert [each["path"] for each in violations] == [path]


async def test_the_fields_of_entities_are_charged_to_the_answer(visit: Visit) -> None:
    async with visit(**AUTH, federation="true", max_answer_fields="1000") as router:
        job_id = await enqueue(router, ADA)
        sent = {"query": ENTITIES, "variables": {"of": of(job_id) * 900}}
        (error,) = (await router.post("/graphql", json=sent, headers=READER)).json()["errors"]
    assert error["extensions"]["setting"] == "JOBS_MAX_ANSWER_FIELDS"


async def test_the_server_serves_the_subgraph_that_the_command_prints(
    router: httpx.AsyncClient, registry: Any
) -> None:
    worker = bearer("eve", "jobs:work")
    text = (await ask(router, worker, "{ _service { sdl } }"))["_service"]["sdl"]
    assert text == subgraph_sdl(registry)
    assert 'extend type Job @key(fields: "id")' in text
    parse(text)


async def test_the_fields_of_a_subgraph_are_served_by_the_setting_alone(
    visit: Visit, registry: Any
) -> None:
    assert "_entities" not in sdl(registry)
    assert "_Any" not in build_schema(sdl(registry)).type_map
    async with visit(**AUTH) as client:
        sent = {"query": "{ _service { sdl } }"}
        answer = (await client.post("/graphql", json=sent, headers=READER)).json()
    assert "_service" in answer["errors"][0]["message"]
