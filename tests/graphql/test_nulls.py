"""What the error of one field leaves of the answer: the other fields, and ids of stored jobs."""

from __future__ import annotations

from graphql import GraphQLInterfaceType, GraphQLNonNull, GraphQLObjectType, build_schema

from job_registry_api.graphql.schema import SDL_FILE
from tests.http_client import Visit

PAYOUT = {"type": "payout.execute", "payload": {"batchId": "b-1", "escrowId": "e-1"}}
OF_TYPE = """name description fingerprint hasHandler
  counts { queued running succeeded failed cancelled }
  policy { type maxAttempts timeoutSeconds concurrencyLimit backoff { baseSeconds capSeconds } }"""
TYPES = " ".join(f"t{n}: jobTypes {{ {OF_TYPE} }}" for n in range(20))


async def test_a_mutation_that_fails_does_not_hide_the_job_that_another_stored(
    visit: Visit,
) -> None:
    document = """mutation ($one: EnqueueJobInput!, $many: [EnqueueJobInput!]!) {
      one: enqueueJob(input: $one) { ... on EnqueueJobSuccess { job { id } } }
      many: enqueueJobs(inputs: $many) { ... on EnqueueJobSuccess { job { id type status priority
        attempt maxAttempts timeoutSeconds createdAt nextRunAt } } } }"""
    async with visit(max_answer_fields="1000") as client:
        variables = {"one": PAYOUT, "many": [PAYOUT] * 200}
        sent = {"query": document, "variables": variables}
        answer = (await client.post("/graphql", json=sent)).json()
        job_id = answer["data"]["one"]["job"]["id"]
        assert (await client.get(f"/jobs/{job_id}")).status_code == 200
    assert answer["data"]["many"] is None
    assert [(error["path"], error["extensions"]["code"]) for error in answer["errors"]] == [
        (["many"], "budget_exceeded")
    ]


async def test_a_query_that_fails_does_not_hide_the_others(visit: Visit) -> None:
    async with visit(max_answer_fields="1000") as client:
        sent = {"query": '{ jobPolicy(jobType: "payout.execute") { __typename } ' + TYPES + " }"}
        answer = (await client.post("/graphql", json=sent)).json()
    assert answer["data"]["jobPolicy"] == {"__typename": "JobPolicy"}
    assert answer["data"]["t0"] is not None
    assert answer["data"]["t19"] is None
    assert {error["extensions"]["code"] for error in answer["errors"]} == {"budget_exceeded"}


def test_every_root_field_is_nullable_and_so_is_what_is_read_from_the_database_for_it() -> None:
    """The rule of `docs/clients.md`, in the schema that clients get."""
    schema = build_schema(SDL_FILE.read_text("utf-8"))
    fields = {
        f"{name}.{field}": definition.type
        for name, kind in schema.type_map.items()
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType) and name[:2] != "__"
        for field, definition in kind.fields.items()
    }
    roots = [name for name in fields if name.startswith(("Query.", "Mutation."))]
    read = ["Job.attempts", "Job.waitingReason", "JobType.counts", "JobEvent.job"]
    assert [n for n in [*roots, *read] if isinstance(fields[n], GraphQLNonNull)] == []
    assert str(fields["Mutation.enqueueJobs"]) == "[EnqueueJobResult]"
