"""What strangers are kept from: documents that ask for too much, forged requests, and secrets."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from job_registry_api.graphql.execution import Executor
from job_registry_api.logs import configure_logs
from tests.http_client import Visit, application_of, queue_of, serving


async def ask(client: httpx.AsyncClient, query: str, **headers: str) -> httpx.Response:
    return await client.post("/graphql", json={"query": query}, headers=headers)


def messages(response: httpx.Response) -> list[str]:
    return [error["message"] for error in response.json().get("errors", ())]


# Documents

FRAGMENTS = "fragment A on Query { ...B } fragment B on Query { %s }"


@pytest.mark.parametrize(
    ("setting", "fits", "one_more", "message"),
    [
        (
            {"max_query_depth": "5"},
            "{ jobs { edges { node { policy { type } } } } }",
            "{ jobs { edges { node { policy { backoff { capSeconds } } } } } }",
            "more than 5 levels of fields",
        ),
        (
            {"max_query_depth": "5"},
            "{ ...A } fragment A on Query { jobs { nodes { ...J } } }"
            " fragment J on Job { policy { backoff { capSeconds } } }",
            "{ ...A } fragment A on Query { jobs { edges { node { ...J } } } }"
            " fragment J on Job { ... on Job { policy { backoff { capSeconds } } } }",
            "more than 5 levels of fields",
        ),
        (
            {"max_query_aliases": "3"},
            "{ a: __typename b: __typename c: __typename }",
            "{ a: __typename b: __typename c: __typename d: __typename }",
            "more than 3 aliases and repeated fields",
        ),
        (
            {"max_query_aliases": "3"},
            "{ __typename __typename __typename __typename }",
            "{ __typename __typename __typename __typename __typename }",
            "more than 3 aliases and repeated fields",
        ),
        (
            {"max_query_aliases": "3"},
            "{ ...A } " + FRAGMENTS % "a: __typename b: __typename c: __typename",
            "{ ...A ...A } " + FRAGMENTS % "a: __typename b: __typename",
            "more than 3 aliases and repeated fields",
        ),
        (
            {"max_query_directives": "3"},
            "query @skip(if: false) { __typename @skip(if: false) @include(if: true) }"
            .replace("query @skip(if: false)", "query"),
            "{ ... @skip(if: false) { a: __typename @skip(if: false) @include(if: true)"
            " b: __typename @skip(if: false) } }",
            "more than 3 directives",
        ),
        (
            {"max_query_tokens": "100"},
            "{ jobs(filter: {types: [" + '"a" ' * 81 + "]}) { nodes { id } } }",
            "{ jobs(filter: {types: [" + '"a" ' * 82 + "]}) { nodes { id } } }",
            "more than 100 tokens",
        ),
    ],
)  # fmt: skip
async def test_a_document_may_ask_for_so_much_and_no_more(
    visit: Visit, setting: dict[str, str], fits: str, one_more: str, message: str
) -> None:
    async with visit(**setting) as client:
        taken, refused = await ask(client, fits), await ask(client, one_more)
        strict = await ask(client, one_more, accept="application/graphql-response+json")
    assert "data" in taken.json(), taken.text
    (error,) = refused.json()["errors"]
    ((name, limit),) = setting.items()
    assert message in error["message"]
    assert error["extensions"] == {
        "code": "document_too_complex", "limit": int(limit), "setting": f"JOBS_{name.upper()}",
    }  # fmt: skip
    assert f"JOBS_{name.upper()} sets this limit." in error["message"]
    assert "data" not in refused.json()
    assert strict.status_code == 400


async def test_a_document_may_have_25_characters_per_token_that_it_may_have(visit: Visit) -> None:
    async with visit(max_query_tokens="100") as client:
        taken = await ask(client, "{ __typename } #".ljust(2_500, "x"))
        refused = await ask(client, "{ __typename } #".ljust(2_501, "x"))
    assert taken.json() == {"data": {"__typename": "Query"}}
    (error,) = refused.json()["errors"]
    assert error["message"] == (
        "The document has more than 2,500 characters, 25 per token of JOBS_MAX_QUERY_TOKENS."
        " Send long values in variables."
    )
    assert error["extensions"] == {"code": "document_too_complex"}


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"query": "{ jobs {"}, "graphql_parse_failed"),
        ({"query": '{ jobs(after: "open) }'}, "graphql_parse_failed"),
        ({"query": "{ nothing }"}, "graphql_validation_failed"),
        ({"query": "{ jobs(first: true) { nodes { id } } }"}, "graphql_validation_failed"),
        ({"query": "query ($id: ID!) { job(id: $id) { __typename } }"}, "bad_user_input"),
        (
            {
                "query": "query ($first: Int) { jobs(first: $first) { totalCount } }",
                "variables": {"first": "1"},
            },
            "bad_user_input",
        ),
        (
            {"query": "query A { __typename } query B { __typename }"},
            "operation_resolution_failure",
        ),
        ({"query": "{ __typename }", "operationName": "B"}, "operation_resolution_failure"),
        ({"query": "subscription { jobEvents { name } }"}, "not_acceptable"),
        ({"query": 1}, "bad_request"),
        ({"query": "{ __typename }", "variables": []}, "bad_request"),
        ([], "bad_request"),
    ],
)
async def test_a_request_that_does_not_fit_the_schema_has_the_code_of_its_fault(
    visit: Visit, request_: Any, code: str
) -> None:
    async with visit() as client:
        answer = await client.post("/graphql", json=request_)
    assert {error["extensions"]["code"] for error in answer.json()["errors"]} == {code}


async def test_an_http_request_that_is_not_of_graphql_has_the_code_of_its_fault(
    visit: Visit,
) -> None:
    json_type = {"content-type": "application/json"}
    async with visit(max_body_bytes="1024") as client:
        answers = [
            await client.post("/graphql", content=b"{", headers=json_type),
            await client.post("/graphql", content=b"{}", headers={"content-type": "text/plain"}),
            await client.post("/graphql", content=b" " * 1_025, headers=json_type),
            await client.post("/graphql", json={}, headers={"accept": "image/png"}),
            await client.put("/graphql", json={}),
        ]
    assert [
        (each.status_code, each.json()["errors"][0]["extensions"]["code"]) for each in answers
    ] == [
        (400, "not_json"),
        (415, "unsupported_media_type"),
        (413, "too_large"),
        (406, "not_acceptable"),
        (405, "method_not_allowed"),
    ]


async def test_fragments_that_double_each_other_are_reported_at_once(visit: Visit) -> None:
    doubling = " ".join(
        f"fragment F{number} on Query {{ ...F{number - 1} ...F{number - 1} }}"
        for number in range(1, 100)
    )
    document = f"{{ ...F99 }} fragment F0 on Query {{ a: __typename }} {doubling}"
    cycle = "{ ...A } fragment A on Query { ...B } fragment B on Query { ...A }"
    async with visit() as client, asyncio.timeout(5):
        doubled, cycled = await ask(client, document), await ask(client, cycle)
    assert "more than 30 aliases" in messages(doubled)[0]
    assert "within itself" in messages(cycled)[0]


async def test_fragments_that_double_each_other_without_an_alias_are_read_once(
    visit: Visit,
) -> None:
    doubling = " ".join(
        f"fragment F{number} on Query {{ ... {{ ...F{number - 1} }} ... {{ ...F{number - 1} }} }}"
        for number in range(1, 60)
    )
    document = f"{{ ...F59 }} fragment F0 on Query {{ jobTypes {{ name }} }} {doubling}"
    async with visit() as client, asyncio.timeout(5):
        for _ in range(3):  # Compiled as well.
            answer = (await ask(client, document)).json()
            assert answer["data"]["jobTypes"][0]["name"] == "payout.execute"


async def test_the_limits_hold_on_every_way_in(database_url: str) -> None:
    document = "subscription { a: jobEvents { name } }"
    said = (
        "The document has more than 0 aliases and repeated fields. JOBS_MAX_QUERY_ALIASES sets this"
        " limit."
    )
    async with (
        serving(database_url, "--no-worker", max_query_aliases="0") as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
        connect(
            f"ws://{address}/graphql",
            subprotocols=[Subprotocol("graphql-transport-ws")],
        ) as socket,
    ):
        events = await ask(client, document, accept="text/event-stream")
        got = await client.get("/graphql", params={"query": "{ a: __typename }"})
        await socket.send(json.dumps({"type": "connection_init"}))
        await socket.recv()
        subscribe = {"id": "1", "type": "subscribe", "payload": {"query": document}}
        await socket.send(json.dumps(subscribe))
        refused = json.loads(await socket.recv())
        # The connection lives on, also through what is no document and no request.
        for payload in ({"query": "{"}, {"query": 7}, {"query": "{ no }", "variables": {}}):
            await socket.send(json.dumps(subscribe | {"payload": payload}))
            assert json.loads(await socket.recv())["type"] == "error", payload
        await socket.send(json.dumps(subscribe | {"payload": {"query": "{ __typename }"}}))
        answered = json.loads(await socket.recv())
    assert messages(events) == messages(got) == [said]
    assert (refused["type"], refused["payload"][0]["message"]) == ("error", said)
    assert answered["payload"]["data"] == {"__typename": "Query"}


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("variables={", "variables is not valid JSON: the text ends too early at line 1, column 1"),
        ("extensions=@", "extensions is not valid JSON: unexpected character at line 1, column 1"),
        ("&".join(["a=1"] * 20), "Expected a percent-encoded query string of up to 20 parameters."),
    ],
)
async def test_a_wrong_query_string_is_an_error_that_says_what_is_wrong(
    http: httpx.AsyncClient, parameters: str, said: str
) -> None:
    response = await http.get(f"/graphql?query={{__typename}}&{parameters}")
    assert (response.status_code, messages(response)) == (400, [said])


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{", 4400),
        ("[]", 4400),
        ("null", 4400),
        ("[" * 100_000, 4400),
        (b"\x00", 4400),
        ('{"type": []}', 4400),
        ('{"type": "' + "x" * 500 + '"}', 4400),
        ('{"type": "subscribe", "id": "1"}', 4400),
        ('{"type": "subscribe", "id": "1", "payload": []}', 4400),
        ('{"type": "subscribe", "id": {}, "payload": {"query": "{ __typename }"}}', 4400),
        ('{"type": "connection_init"}', 4429),
    ],
)
async def test_a_message_that_is_none_of_the_protocols_ends_the_connection_and_is_no_fault_of_ours(
    visit: Visit, message: str | bytes, code: int
) -> None:
    log = io.TextIOWrapper(io.BytesIO(), "utf-8")
    configure_logs("debug", "json", log)
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    received: list[dict[str, Any]] = []
    text = {"text": message} if isinstance(message, str) else {"bytes": message}
    for each in ({"text": '{"type": "connection_init"}'}, text):
        said.put_nowait({"type": "websocket.receive", **each})

    async def receive() -> dict[str, Any]:
        if not received:
            return {"type": "websocket.connect"}
        return await said.get()

    async def send(answer: MutableMapping[str, Any]) -> None:
        received.append(dict(answer))

    scope = {
        "type": "websocket",
        "path": "/graphql",
        "headers": [(b"host", b"127.0.0.1")],
        "query_string": b"",
        "subprotocols": ["graphql-transport-ws"],
    }
    async with visit() as client, asyncio.timeout(5):
        await application_of(client)(scope, receive, send)
    assert [each["type"] for each in received] == [
        "websocket.accept",
        "websocket.send",
        "websocket.close",
    ]
    assert received[-1]["code"] == code
    assert len(received[-1]["reason"].encode()) <= 123
    assert b"error" not in log.buffer.getvalue()


async def test_one_fault_in_many_places_is_one_error(visit: Visit) -> None:
    async with visit() as client:
        response = await ask(client, "{ no } query B { no }")
    (error,) = [each for each in response.json()["errors"] if "field 'no'" in each["message"]]
    assert error["locations"] == [{"line": 1, "column": 3}, {"line": 1, "column": 18}]


async def test_pages_and_bulks_are_as_large_as_the_settings_say(visit: Visit) -> None:
    job = '{type: "test.ping", payload: {}}'
    bulk = "mutation { enqueueJobs(inputs: [%s]) { __typename } }"
    async with visit(max_page_size="50", max_bulk_size="2") as client:
        page = await ask(client, "{ jobs(first: 50) { nodes { id } } }")
        too_long = await ask(client, "{ jobs(first: 51) { nodes { id } } }")
        stored = await ask(client, bulk % (job * 2))
        too_many = await ask(client, bulk % (job * 3))
    assert "errors" not in page.json()
    assert "errors" not in stored.json()
    assert "Expected a whole number from 1 to 50; got 51." in messages(too_long)[0]
    assert "The request enqueues 3 jobs." in messages(too_many)[0]


# What is switched off

INTROSPECTION = "{ __schema { queryType { name } } }"
MISSPELT = "{ jobTypess { name } }"


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        ({}, True),
        ({"production": "true"}, False),
        (
            {
                "production": "true",
                "introspection": "true",
                "suggestions": "yes",
                "graphiql": "1",
                "get_queries": "on",
            },
            True,
        ),
        (
            {
                "introspection": "false",
                "suggestions": "no",
                "graphiql": "0",
                "get_queries": "off",
            },
            False,
        ),
    ],
)
async def test_four_things_are_switched_off_together_or_one_by_one(
    visit: Visit, settings: dict[str, str], on: bool
) -> None:
    async with visit(**settings) as client:
        introspected = await ask(client, INTROSPECTION)
        misspelt = await ask(client, MISSPELT)
        page = await client.get("/graphql", headers={"accept": "text/html"})
        got = await client.get("/graphql", params={"query": "{ __typename }"})
    assert ("data" in introspected.json()) == on
    assert ("Did you mean" in messages(misspelt)[0]) == on
    assert page.headers["content-type"].startswith("text/html") == on
    assert got.status_code == (200 if on else 405)


ALIASES = "query cop { " + " ".join(f"alias{number}: __typename" for number in range(101)) + " }"
CIRCULAR = (
    "query cop { __schema { types { " + "fields { type { " * 5 + "name " + "} } " * 5 + "} } }"
)


@pytest.mark.cases(5)
@pytest.mark.parametrize(
    "query",
    [
        ALIASES,
        "query cop { __typename " + "@aa" * 500 + " }",
        "query cop { __typename " + "@aa" * 10 + " }",
        "query cop { __schema { ...A } } fragment A on __Schema { __typename ...B }"
        " fragment B on __Schema { ...A }",
        "query cop { " + "__typename " * 500 + "}",
        CIRCULAR,
        INTROSPECTION,
        "query cop { __schema { directive } }",
        "query cop { systemUpdate }",
        "query cop { __typename @tracing }",
        "query cop { __typenameee }",
        "queryy cop { __typename }",
        "query cop { __typename ",
        "@",
    ],
)
async def test_in_production_what_graphql_cop_tries_comes_to_nothing(
    visit: Visit, query: str
) -> None:
    """What https://github.com/dolevf/graphql-cop sends in a body of JSON, and what it looks for."""
    async with visit(production="true") as client, asyncio.timeout(5):
        response = await ask(client, query)
        batch = await client.post("/graphql", json=[{"query": "query cop { __typename }"}] * 10)
        got = await client.get("/graphql", params={"query": query})
        mutated = await client.get("/graphql", params={"query": "mutation cop { __typename }"})
        posted = await client.post("/graphql", data={"query": "query cop { __typename }"})
        in_address = await client.post("/graphql", params={"query": "query cop { __typename }"})
        pages = [
            await client.get(path, headers={"accept": "text/html"})
            for path in ("/graphql", "/graphiql", "/playground", "/console", "/")
        ]
    content = response.json()
    assert content.keys() == {"errors"}
    assert len(content["errors"]) < 10  # One for each directive is what it looks for.
    assert "Did you mean" not in response.text
    assert {"exception", "stacktrace", "debug", "tracing"}.isdisjoint(
        content["errors"][0].get("extensions", {})
    )
    assert isinstance(batch.json(), dict)
    assert [each.status_code for each in (batch, got, mutated, posted)] == [400, 405, 405, 415]
    assert in_address.status_code == 415
    assert not any("data" in each.text for each in (batch, got, mutated, posted))
    assert not any("graphiql" in page.text.lower() for page in pages)


# Requests of foreign pages


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
        "text/plain; application/json",
        "",
    ],
)
async def test_a_form_of_a_foreign_page_changes_nothing(visit: Visit, content_type: str) -> None:
    mutation = 'mutation { enqueueJob(input: {type: "test.ping", payload: {}}) { __typename } }'
    headers = {"content-type": content_type, "origin": "https://evil.example"}
    async with visit() as client:
        for path, body in (
            ("/graphql", {"query": mutation}),
            ("/jobs", {"type": "test.ping", "payload": {}}),
        ):
            for accept in ("*/*", "text/event-stream"):
                given = headers | {"accept": accept}
                refused = await client.post(path, content=json.dumps(body), headers=given)
                assert refused.status_code == 415, refused.text
        for accept in ("*/*", "text/event-stream"):
            got = await client.get(
                "/graphql", params={"query": mutation}, headers={"accept": accept}
            )
            assert got.status_code == 405
        jobs = await ask(client, "{ jobs { nodes { id } } }")
    assert jobs.json()["data"]["jobs"]["nodes"] == []


async def test_only_the_pages_of_listed_origins_may_call(database_url: str, visit: Visit) -> None:
    async def preflight(client: httpx.AsyncClient, origin: str) -> httpx.Response:
        return await client.options(
            "/graphql",
            headers={
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "content-type,authorization",
            },
        )

    ours, evil = "https://app.example.com", "https://evil.example"
    async with visit(cors_origins=ours) as client:
        admitted, refused = await preflight(client, ours), await preflight(client, evil)
        answer = await ask(client, "{ __typename }", origin=ours)
    async with visit() as client:
        closed = await preflight(client, ours)
    assert admitted.headers["access-control-allow-origin"] == ours
    assert answer.headers["access-control-allow-origin"] == ours
    assert "link" in answer.headers["access-control-expose-headers"].split(", ")
    for response in (refused, closed):
        assert "access-control-allow-origin" not in response.headers
    async with serving(database_url, "--no-worker", cors_origins=ours) as (address, _):
        malformed = ("http://[", "null", address)
        for origin, opens in (
            (ours, True),
            (evil, False),
            (f"http://{address}", True),
            *((each, False) for each in malformed),
        ):
            try:
                async with connect(
                    f"ws://{address}/graphql",
                    origin=Origin(origin),
                    subprotocols=[Subprotocol("graphql-transport-ws")],
                ):
                    opened = True
            except InvalidStatus as closed_door:
                opened = closed_door.response.status_code != 403
            assert opened == opens, origin


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("192.0.2.1:8000", True),  # No name leads to it.
        ("jobs", False),
        ("wpad", False),
        ("localhost.evil", False),
        ("", True),  # No browser omits it.
        (":8000", False),
        ("a@localhost.", False),
        ("app.example.com", True),  # Its origin is listed.
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("[evil.example]", False),
    ],
)
async def test_a_name_that_was_made_to_lead_here_is_not_served(
    visit: Visit, host: str, served: bool
) -> None:
    async with visit(cors_origins="https://app.example.com") as client:
        got = await client.get(
            "/graphql", params={"query": "{ __typename }"}, headers={"host": host}
        )
        posted = await ask(client, "{ __typename }", host=host)
        rest = await client.get("/jobs/a", headers={"host": host})
    statuses = (got.status_code, posted.status_code, rest.status_code)
    assert statuses == ((200, 200, 404) if served else (403, 403, 403))
    assert served or posted.json()["errors"][0]["extensions"] == {"code": "forbidden"}


# Secrets

SECRET = "4929-1234-5678-9012"


async def test_an_unexpected_error_is_reported_by_an_id_and_logged_without_what_it_quotes(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.TextIOWrapper(io.BytesIO(), "utf-8")
    configure_logs("debug", "json", log)

    async def broken(*_args: Any, **_named: Any) -> None:
        try:
            int(SECRET)
        except ValueError as error:
            raise RuntimeError(f"INSERT INTO job VALUES ('{SECRET}') in /srv/jobs.py") from error

    headers = {"authorization": f"Bearer {SECRET}"}
    job = {"type": "test.ping", "payload": {"text": SECRET}, "idempotencyKey": SECRET}
    mutation = "mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) { __typename } }"
    async with visit(log_level="debug") as client:
        queue = queue_of(client)
        monkeypatch.setattr(queue, "enqueue", broken)
        content = {"query": mutation, "variables": {"input": job}}
        answer = await client.post("/graphql", json=content, headers=headers)
        rest = await client.post("/jobs", json=job, headers=headers)
    (error,) = answer.json()["errors"]
    assert error["extensions"]["code"] == "internal_error"
    ids = [error["extensions"]["errorId"], rest.json()["error"]["details"][0]["errorId"]]
    assert rest.status_code == 500
    for told in (answer.text, rest.text):
        assert not any(leak in told for leak in ("INSERT", "Traceback", ".py", SECRET, "Runtime"))
    log.seek(0)
    lines = log.buffer.getvalue().decode()
    assert SECRET not in lines
    logged = [json.loads(line) for line in lines.splitlines() if "unexpected" in line]
    assert [line["error_id"] for line in logged] == ids
    for line in logged:
        assert "RuntimeError" in line["exception"]
        assert "caused by" in line["exception"]
        assert "test_guards.py" in line["exception"]


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_an_error_outside_of_every_field_is_reported_by_its_id_as_well(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, accept: str
) -> None:
    async def broken(*_args: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Executor, "execute", broken)
    async with visit() as client:
        response = await ask(client, "{ __typename }", accept=accept)
    assert response.status_code == (500 if accept == "application/json" else 200)
    assert '"internal_error"' in response.text
    assert SECRET not in response.text


async def test_what_a_handlers_exception_says_is_kept_with_the_job_and_not_logged(
    visit: Visit,
) -> None:
    log = io.TextIOWrapper(io.BytesIO(), "utf-8")
    configure_logs("debug", "json", log)
    job = {"type": "test.ping", "payload": {"text": SECRET}}
    async with visit() as client:
        await client.post("/jobs", json=job)
        refused = job | {"payload": {"text": 7, SECRET: SECRET}}
        assert (await client.post("/jobs", json=refused)).status_code == 422
        broken = await client.post("/graphql", json={"query": "{ " + SECRET})
        assert messages(broken)
    assert SECRET not in log.buffer.getvalue().decode()
