"""The mutation `enqueue`, whose input has a field for each job type of a registry."""

# Without `from __future__ import annotations`: the annotation of `job` names an argument.

from typing import Annotated

import strawberry

from job_registry_api.graphql.access_scopes import Requires
from job_registry_api.graphql.context import Context, context_of
from job_registry_api.graphql.inputs import EnqueueOptions
from job_registry_api.graphql.mutations import (
    MUTATIONS,
    EnqueueJobResult,
    Mutation,
    stored,
)
from job_registry_api.graphql.typed_input import TypedJob


def mutation_with_enqueue(typed_job_input: type[TypedJob]) -> type[Mutation]:
    """Return the mutations with `enqueue` among them, for this `TypedJobInput`."""

    @strawberry.type(name="Mutation", description=MUTATIONS)
    class MutationWithEnqueue(Mutation):
        @strawberry.mutation(
            extensions=[Requires("jobs:enqueue", "jobs:own")],
            description="Store a job, as `enqueueJob` does, through an input with a field for each"
            " job type. The compiler of a client that is generated from this schema checks the"
            " payload.",
        )
        async def enqueue(
            self,
            info: strawberry.Info[Context, None],
            job: Annotated[
                TypedJob,
                strawberry.argument(
                    description="The job type and its payload.", graphql_type=typed_job_input
                ),
            ],
            options: Annotated[
                EnqueueOptions | None,
                strawberry.argument(description="How the job is stored and run."),
            ] = None,
        ) -> EnqueueJobResult | None:
            caller = context_of(info).caller
            job_type, payload = job.sent_job()
            caller.need_types([job_type])
            request = (options or EnqueueOptions()).request_for(job_type, payload)
            return await stored(info, request)

    return MutationWithEnqueue
