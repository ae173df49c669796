import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import ariadne_client
import jobs_client
from jobs_client.exceptions import GraphQLClientGraphQLMultiError
from pydantic import BaseModel, ValidationError
from scenario import Answer, run_scenario

INPUTS = {
    "input": jobs_client.EnqueueJobInput,
    "job": jobs_client.TypedJobInput,
    "options": jobs_client.EnqueueOptions,
}


class Client:
    async def execute(self, operation: str, **variables: Any) -> Answer:
        method = re.sub(r"(?<=[a-z])([A-Z])", r"_\1", operation).lower()
        given = {name: _given(name, value) for name, value in variables.items()}
        try:
            return Answer(_json(await getattr(ariadne_client.client, method)(**given)))
        except GraphQLClientGraphQLMultiError as error:
            return Answer(error.data, [_error(each) for each in error.errors])

    async def follow(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        async for data in ariadne_client.follow(job_id):
            yield _json(data)


def _given(name: str, value: Any) -> Any:
    if name not in INPUTS:
        return value
    try:
        return INPUTS[name].model_validate(value)
    except ValidationError:
        # The generated model refuses the value, but the server is what is tested.
        return INPUTS[name].model_construct(None, **value)


def _json(model: BaseModel) -> Any:
    return json.loads(model.model_dump_json(by_alias=True))


def _error(error: Any) -> dict[str, Any]:
    return {"message": error.message, "path": error.path, "extensions": error.extensions}


asyncio.run(run_scenario(Client()))
