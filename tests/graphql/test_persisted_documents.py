"""Documents that requests name by a hash or an id: automatic persisted queries, and manifests."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from job_registry_api.graphql import persisted_documents
from job_registry_api.graphql.persisted_documents import (
    ManifestInvalid,
    PersistedDocuments,
    read_manifest,
)
from job_registry_api.settings import SettingsInvalid
from tests.http_client import Visit, serving
from tests.test_auth import AUTH, bearer

QUERY = "query Policy($type: String!) { jobPolicy(jobType: $type) { __typename } }"
OTHER = "{ jobTypes { name } }"
VARIABLES = {"type": "payout.execute"}
FOUND = {"data": {"jobPolicy": {"__typename": "JobPolicy"}}}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def by_hash(text: str) -> dict[str, Any]:
    return {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": sha256(text)}}}


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (await client.post("/graphql", json=body)).json()
    return answer


def codes(answer: dict[str, Any]) -> list[str | None]:
    return [error.get("extensions", {}).get("code") for error in answer["errors"]]


async def test_a_client_registers_a_document_and_sends_its_hash_from_then_on(visit: Visit) -> None:
    async with visit() as client:
        first = await ask(client, variables=VARIABLES, **by_hash(QUERY))
        second = await ask(client, query=QUERY, variables=VARIABLES, **by_hash(QUERY))
        third = await ask(client, variables=VARIABLES, **by_hash(QUERY))
        url = {
            "variables": json.dumps(VARIABLES),
            "extensions": json.dumps(by_hash(QUERY)["extensions"]),
        }
        got = (await client.get("/graphql", params=url)).json()
    # As Apollo Client and urql expect it: they look for the message or for the code.
    assert first["errors"][0]["message"] == "PersistedQueryNotFound"
    assert codes(first) == ["PERSISTED_QUERY_NOT_FOUND"]
    assert second == third == got == FOUND


async def test_a_hash_of_another_text_is_refused_and_not_kept(visit: Visit) -> None:
    async with visit() as client:
        wrong = await ask(client, query=OTHER, variables=VARIABLES, **by_hash(QUERY))
        after = await ask(client, variables=VARIABLES, **by_hash(QUERY))
    assert codes(wrong) == ["persisted_query_mismatch"]
    assert codes(after) == ["PERSISTED_QUERY_NOT_FOUND"]


async def test_a_document_that_is_not_valid_is_not_kept(visit: Visit) -> None:
    bad = "{ nothingOfThisName }"
    async with visit() as client:
        await ask(client, query=bad, **by_hash(bad))
        assert codes(await ask(client, **by_hash(bad))) == ["PERSISTED_QUERY_NOT_FOUND"]


async def test_a_caller_who_is_not_admitted_registers_nothing(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        refused = await client.post("/graphql", json={"query": QUERY, **by_hash(QUERY)})
        assert refused.status_code == 401
        reader = bearer(scope="jobs:read")
        body = {"variables": VARIABLES, **by_hash(QUERY)}
        answer = (await client.post("/graphql", json=body, headers=reader)).json()
    assert codes(answer) == ["PERSISTED_QUERY_NOT_FOUND"]


async def test_scopes_hold_for_a_document_that_another_caller_registered(visit: Visit) -> None:
    cancel = 'mutation { cancelJob(id: "x") { __typename } }'
    async with visit(**AUTH) as client:
        admin = bearer(scope="jobs:admin")
        await client.post("/graphql", json={"query": cancel, **by_hash(cancel)}, headers=admin)
        reader = bearer(scope="jobs:read")
        answer = (await client.post("/graphql", json=by_hash(cancel), headers=reader)).json()
    assert codes(answer) == ["forbidden"]


async def test_persisted_queries_can_be_switched_off(visit: Visit) -> None:
    async with visit(persisted_queries="false") as client:
        for body in (by_hash(QUERY), {"query": QUERY, **by_hash(QUERY)}):
            answer = await ask(client, variables=VARIABLES, **body)
            assert answer["errors"][0]["message"] == "PersistedQueryNotSupported"
            assert codes(answer) == ["PERSISTED_QUERY_NOT_SUPPORTED"]
        assert await ask(client, query=QUERY, variables=VARIABLES) == FOUND


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "query has to be a string"),
        ({"extensions": {}}, "query has to be a string"),
        ({"query": " ", "documentId": "x"}, "query has to be a string"),
        ({"documentId": 7}, "documentId has to be a string"),
        ({"documentId": ""}, "documentId has to be a string"),
        ({"doc_id": "x" * 300}, "doc_id has to be a string of 1 to 255"),
        ({"extensions": {"persistedQuery": {"version": 2}}}, "version 1"),
        ({"extensions": {"persistedQuery": [1]}}, "version 1"),
        ({"extensions": {"persistedQuery": {"version": 1}}}, "sha256Hash"),
        ({"extensions": 1, "query": OTHER}, "extensions has to be an object"),
    ],
)
async def test_a_name_that_is_none_is_an_error_that_says_so(
    visit: Visit, body: dict[str, Any], message: str
) -> None:
    async with visit() as client:
        answer = await ask(client, **body)
    assert message in answer["errors"][0]["message"]


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persisted_documents, "MAX_KEPT_BYTES", 10_000)
    documents = PersistedDocuments()
    texts = [f"{{ a{number}: __typename }}".ljust(1_000) for number in range(20)]
    for text in texts:
        documents.keep(documents.find({"query": text, **by_hash(text)}))
    for text in texts[-5:]:
        assert documents.find(by_hash(text)).text == text
    with pytest.raises(Exception, match="PersistedQueryNotFound"):
        documents.find(by_hash(texts[0]))


MANIFESTS = {
    "codegen": {sha256(QUERY): QUERY},
    "Relay": {hashlib.md5(QUERY.encode()).hexdigest(): QUERY},
    "with a prefix": {f"sha256:{sha256(QUERY)}": QUERY},
    "Apollo": {
        "format": "apollo-persisted-query-manifest",
        "version": 1,
        "operations": [
            {"id": sha256(QUERY), "name": "Policy", "type": "query", "body": QUERY},
        ],
    },
}


@pytest.mark.parametrize("format_name", MANIFESTS)
async def test_with_a_manifest_only_its_documents_are_executed(
    visit: Visit, tmp_path: Path, format_name: str
) -> None:
    manifest = tmp_path / "documents.json"
    manifest.write_text(json.dumps(MANIFESTS[format_name]))
    key = next(iter(read_manifest(manifest)))
    async with visit(trusted_documents=str(manifest)) as client:
        named: list[dict[str, Any]] = [
            {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": key}}},
            # As Apollo Client sends the `__meta__.hash` of GraphQL Code Generator.
            {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": f"sha256:{key}"}}},
            {"documentId": key},
            {"documentId": f"sha256:{key}"},
            {"doc_id": key},
            # The client of graphql-ws sends nothing without a string as its query.
            {"query": "", "documentId": key},
            {"query": QUERY},
        ]
        for body in named:
            assert await ask(client, variables=VARIABLES, **body) == FOUND, body
        for body in ({"query": OTHER}, {"query": OTHER, **by_hash(OTHER)}, {"query": QUERY + " "}):
            assert codes(await ask(client, **body)) == ["document_not_trusted"], body
        # What is not in the manifest cannot be registered either.
        assert codes(await ask(client, **by_hash(OTHER))) == ["PERSISTED_QUERY_NOT_FOUND"]


async def test_documents_are_named_over_websockets_too(database_url: str, tmp_path: Path) -> None:
    subscription = "subscription { jobEvents { name } }"
    manifest = tmp_path / "documents.json"
    manifest.write_text(json.dumps({"events": subscription, "policy": QUERY}))
    async with (
        serving(database_url, "--no-worker", trusted_documents=str(manifest)) as (address, _),
        connect(
            f"ws://{address}/graphql", subprotocols=[Subprotocol("graphql-transport-ws")]
        ) as socket,
        asyncio.timeout(10),
    ):
        await socket.send('{"type": "connection_init"}')
        await socket.recv()
        asked = {"query": "", "documentId": "policy", "variables": VARIABLES}
        await socket.send(json.dumps({"type": "subscribe", "id": "1", "payload": asked}))
        assert json.loads(await socket.recv())["payload"] == FOUND
        await socket.recv()
        refused = {"query": OTHER}
        await socket.send(json.dumps({"type": "subscribe", "id": "2", "payload": refused}))
        answer = json.loads(await socket.recv())
    assert (answer["type"], codes({"errors": answer["payload"]})) == (
        "error",
        ["document_not_trusted"],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "a JSON object of ids"),
        ("{}", "a JSON object of ids"),
        ('{"a": 1}', 'a GraphQL document for each id; "a" has 1'),
        ('{"a": " "}', "a GraphQL document for each id"),
        ('{"format": "apollo-persisted-query-manifest"}', "a JSON object of ids"),
        ('{"format": "apollo-persisted-query-manifest", "operations": [{"id": "a"}]}', "for each"),
        ('{"format": "apollo-persisted-query-manifest", "operations": [{"id": []}]}', "an id"),
    ],
)
async def test_a_file_that_is_no_manifest_stops_the_start(
    visit: Visit, tmp_path: Path, content: str, message: str
) -> None:
    manifest = tmp_path / "documents.json"
    manifest.write_text(content)
    with pytest.raises(ManifestInvalid, match=message):
        read_manifest(manifest)
    with pytest.raises(SettingsInvalid, match="JOBS_TRUSTED_DOCUMENTS"):
        async with visit(trusted_documents=str(manifest)):
            pass


async def test_a_manifest_that_is_not_there_stops_the_start(visit: Visit, tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="No such file"):
        async with visit(trusted_documents=str(tmp_path / "none.json")):
            pass
