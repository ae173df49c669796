import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gql_client
from gql import GraphQLRequest
from gql.client import AsyncClientSession
from gql.transport.exceptions import TransportQueryError
from scenario import Answer, run_scenario

OPERATIONS = Path("operations.graphql").read_text("utf-8")


class Client:
    def __init__(self, session: AsyncClientSession) -> None:
        self._session = session

    async def execute(self, operation: str, **variables: Any) -> Answer:
        try:
            return Answer(await self._session.execute(_request(operation, variables)))
        except TransportQueryError as error:
            return Answer(error.data, error.errors or ())

    async def follow(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        async for data in gql_client.follow(_request("Follow", {"id": job_id})):
            yield data


def _request(operation: str, variables: dict[str, Any]) -> GraphQLRequest:
    return GraphQLRequest(OPERATIONS, variable_values=variables, operation_name=operation)


async def main() -> None:
    async with gql_client.client as session:
        await run_scenario(Client(session))


asyncio.run(main())
