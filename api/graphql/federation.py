"""The schema as a subgraph of Apollo Federation: `_service`, and `_entities` for jobs by their ids.

Strawberry's federation schema resolves each representation separately and has no access scopes, so
these two fields are ordinary ones here.
"""

# Without `from __future__ import annotations`: annotations name a union and a scalar.

import uuid
from typing import Annotated, Any, Final, NewType

import strawberry
from strawberry.types.scalar import ScalarDefinition

from job_registry import Violation
from job_registry.errors import shortened
from job_registry_api.auth import ACCESS_SCOPES
from job_registry_api.budget import BudgetExceeded
from job_registry_api.graphql.access_scopes import Requires
from job_registry_api.graphql.answer_limits import selected
from job_registry_api.graphql.context import Context, context_of
from job_registry_api.graphql.queries import FIELDS_PER_JOB, Query
from job_registry_api.graphql.types import Job
from job_registry_api.queue.errors import InputInvalid, JobNotFound
from job_registry_api.queue.requests import parse_job_id

SUBGRAPH: Final = """\
extend schema @link(url: "https://specs.apollo.dev/federation/v2.3", import: ["@key"])

extend type Job @key(fields: "id")
"""
"""The directives that make the schema a subgraph: other subgraphs refer to a job by its id."""

Representation = NewType("Representation", object)

SCALARS: Final[dict[object, ScalarDefinition]] = {
    Representation: strawberry.scalar(
        name="_Any",
        description="A job as a router refers to it: `__typename` and `id`.",
        serialize=lambda value: value,
        parse_value=lambda value: value,
    )
}

Entity = Annotated[
    Job,
    strawberry.union("_Entity", description="The types that other subgraphs refer to."),
]


@strawberry.type(name="_Service", description="This subgraph.")
class Service:
    sdl: str = strawberry.field(description="The schema of the subgraph, for composition.")


def federated_query(subgraph_sdl: str) -> type[Query]:
    """Return `Query` with the fields for a router. `subgraph_sdl` is the schema for it."""

    @strawberry.type(
        name="Query",
        description="Queries: job types, policies, jobs, and a dry run of `enqueueJob`.",
    )
    class FederatedQuery(Query):
        @strawberry.field(
            name="_service",
            extensions=[Requires(*ACCESS_SCOPES)],
            description="This subgraph, for a router.",
        )
        async def service(self) -> Service | None:
            return Service(sdl=subgraph_sdl)

        @strawberry.field(
            name="_entities",
            extensions=[Requires("jobs:own", "jobs:read")],
            description="The jobs that a router refers to, in their order. Null where there is no"
            " such job, or the caller may not see it.",
        )
        async def entities(
            self,
            info: strawberry.Info[Context, None],
            representations: Annotated[
                list[Representation],
                strawberry.argument(
                    description="The jobs, up to 1,000 unless the server is configured otherwise."
                ),
            ],
        ) -> list[Entity | None] | None:
            context = context_of(info)
            caller, budget = context.caller, context.budget
            most = budget.limits.bulk_size
            if len(representations) > most:
                message = "The request refers to too many jobs. Send several requests."
                raise BudgetExceeded(message, most, "JOBS_MAX_BULK_SIZE")
            wanted = _ids_of(representations)
            async with budget.reading:
                budget.check_reading()
                budget.charge_fields(len(wanted) * (FIELDS_PER_JOB + selected(info).fields))
                found = await context.queue.get_many(
                    [job_id for job_id in wanted if job_id is not None],
                    owner=caller.owner_unless("jobs:read"),
                    max_bytes=budget.reading_left,
                )
                budget.charge_reading(found.weight)
                if found.stopped_early:
                    budget.check_reading()
            jobs = {job.id: job for job in found.jobs if caller.may_see(job.type)}
            return [Job(jobs[each]) if each in jobs else None for each in wanted]

    return FederatedQuery


def _ids_of(representations: list[Representation]) -> list[uuid.UUID | None]:
    """Return the ids of jobs; None for an id that no job can have.

    Raises:
        InputInvalid: a representation is not that of a job.
    """
    faults: list[Violation] = []
    ids: list[uuid.UUID | None] = []
    for index, each in enumerate(representations):
        given: Any = each if isinstance(each, dict) else {}
        path = f"/representations/{index}"
        if given.get("__typename") != "Job":
            got = shortened(given.get("__typename"))
            message = f'Expected an object with the __typename "Job"; got {got}.'
            faults.append(Violation(path, "wrong_type", message))
        elif not isinstance(given.get("id"), str):
            message = "Expected the id of a job, a string."
            faults.append(Violation(f"{path}/id", "wrong_type", message))
        else:
            ids.append(_id_of(given["id"]))
    if faults:
        raise InputInvalid(tuple(faults[:10]))
    return ids


def _id_of(text: str) -> uuid.UUID | None:
    try:
        return parse_job_id(text)
    except JobNotFound:
        return None
