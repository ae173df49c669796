"""The short form of benchmarks/hostile.py: drawn requests keep within the bounds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Final

import httpx
import pytest
import pytest_asyncio

from tests.hostile import REQUESTS, SocketMessages, draw_requests, plain_documents
from tests.hostile_requests import hostile_server, measure
from tests.measured_server import MeasuredServer

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("generated")]

REQUESTS_PER_KIND = 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MeasuredServer]:
    """A server with the default limits, on SQLite."""
    async with hostile_server(tmp_path_factory.mktemp("hostile")) as server:
        yield server


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_drawn_request_is_answered_within_the_bounds(
    server: MeasuredServer, kind: str
) -> None:
    for request in draw_requests(kind, REQUESTS_PER_KIND):
        # Room for a busy machine: five times the silence that is promised.
        outcome = await measure(server, request, cpu_seconds=0.5, silence_seconds=5.0)
        assert not outcome.faults, request


LONG_DOCUMENTS: Final = {
    "a comment": "#§{}",
    "a name": "{{ a§{} }}",
    "a string": '{{ job(id: "§{}") {{ id }} }}',
    "a number": "{{ jobs(first: §{}) {{ nodes {{ id }} }} }}",
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("length", [49_900, 190_000])
@pytest.mark.parametrize("kind", LONG_DOCUMENTS)
async def test_each_long_document_on_a_websocket_costs_little(
    server: MeasuredServer, kind: str, length: int
) -> None:
    document, fill = LONG_DOCUMENTS[kind], "1" if kind == "a number" else "x"
    messages = tuple(
        json.dumps(
            {
                "type": "subscribe",
                "id": str(number),
                "payload": {
                    "query": document.replace("§", f"{1_000 + number}").format(fill * length)
                },
            }
        )
        for number in range(44)
    )
    request = SocketMessages("websocket, after", f"44 × {kind}", messages, True, len(messages))
    outcome = await measure(server, request, cpu_seconds=0.5, silence_seconds=5.0)
    assert not outcome.faults


async def test_the_operations_that_are_made_hostile_are_executed(server: MeasuredServer) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        for document in plain_documents():
            if not document.startswith("subscription"):
                response = await client.post("/graphql", json={"query": document})
                assert "errors" not in response.json(), document
