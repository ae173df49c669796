"""Every argument of the schema, and of REST, with values that no database and no parser likes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLSchema,
    is_required_argument,
    is_required_input_field,
)

from job_registry import JobRegistry
from job_registry_api.graphql.schema import build_schema, executable
from tests.http_client import Visit

DIGITS = "9" * 5_000
HUGE = {"a number of": "5,000 digits"}
"""Stands for a JSON number that Python does not read."""

TEXTS = ["", "\x00", "a\x00b", "\ud800", "a\udfff", DIGITS, "9" * 20, "-1", "1e400", "x" * 1_000,
         "\x1b[31m", "\u202e", "NaN", "../..", "%00", "0" * 32, "f" * 64,
         "9999-12-31T23:59:59-14:00",
         "0001-01-01T00:00:00+14:00", f"2030-01-01T00:00:00.{DIGITS}Z",
         "P" + DIGITS + "D"]  # fmt: skip
NUMBERS = [0, -1, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 1e308, -1e308,
           0.5, HUGE, True]  # fmt: skip
ANY = [*TEXTS, *NUMBERS, None, [], {}, [[]], {"\x00": 1}, {"\ud800": 1}, {DIGITS: [HUGE]},
       ["\ud800"], {"a": {"b": "\x00"}}]  # fmt: skip


def variants(of: GraphQLInputType, depth: int = 0) -> Iterator[Any]:
    """Values of a type, and not quite of it: each has one thing that is odd."""
    match of:
        case GraphQLNonNull(of_type=inner):
            yield from variants(inner, depth)
        case GraphQLList(of_type=inner):
            yield from ([], None, [None])
            for value in variants(inner, depth + 1):
                yield [value]
        case GraphQLInputObjectType() if of.is_one_of:
            for name, field in of.fields.items():
                for value in variants(field.type, depth + 1):
                    yield {name: value}
        case GraphQLInputObjectType():
            for name, field in of.fields.items():
                for value in variants(field.type, depth + 1):
                    yield plain(of) | {name: value}
        case _:
            yield from ANY


def plain(of: GraphQLInputType) -> Any:
    """The plainest value of a type."""
    match of:
        case GraphQLNonNull(of_type=inner):
            return plain(inner)
        case GraphQLList():
            return []
        case GraphQLInputObjectType() if of.is_one_of:
            return {"testPing": {}}
        case GraphQLInputObjectType():
            return {
                name: plain(field.type)
                for name, field in of.fields.items()
                if is_required_input_field(field)
            }
        case GraphQLEnumType():
            return next(iter(of.values))
    return {"Int": 1, "Float": 1.0, "Boolean": True, "JSON": {}}.get(
        getattr(of, "name", ""), "test.ping"
    )


def as_json(value: object) -> str:
    """The text of a value, lone surrogates escaped, and `HUGE` as a number."""
    return json.dumps(value).replace(json.dumps(HUGE), DIGITS)


def as_literal(value: object) -> str:
    """The text of a value in a document."""
    match value:
        case {"a number of": _}:
            return DIGITS
        case list():
            return f"[{', '.join(map(as_literal, value))}]"
        case dict():
            # Names in documents have no odd characters.
            fields = {name: each for name, each in value.items() if re.fullmatch("[A-Za-z]+", name)}
            return (
                f"{{{', '.join(f'{name}: {as_literal(each)}' for name, each in fields.items())}}}"
            )
    return json.dumps(value)


def requests(schema: GraphQLSchema) -> Iterator[tuple[str, str, str]]:
    """The place of each odd argument, a document, and the variables."""
    roots = (schema.query_type, schema.mutation_type, schema.subscription_type)
    for kind, root in zip(("query", "mutation", "subscription"), roots, strict=True):
        assert root is not None
        for name, field in root.fields.items():
            if name.startswith("_"):
                continue
            needed = {
                each: plain(argument.type)
                for each, argument in field.args.items()
                if is_required_argument(argument)
            }
            for each, argument in field.args.items():
                for value in variants(argument.type):
                    given = needed | {each: value}
                    types = ", ".join(f"${a}: {field.args[a].type}" for a in given)
                    passed = ", ".join(f"{a}: ${a}" for a in given)
                    document = f"{kind} ({types}) {{ {name}({passed}) {{ __typename }} }}"
                    yield f"{name}({each})", document, as_json(given)
                    written = ", ".join(f"{a}: {as_literal(v)}" for a, v in given.items())
                    yield (
                        f"{name}({each})",
                        f"{kind} {{ {name}({written}) {{ __typename }} }}",
                        "{}",
                    )


@pytest.mark.slow
async def test_no_argument_is_an_error_of_the_server(visit: Visit, registry: JobRegistry) -> None:
    schema = executable(build_schema(registry))
    broken = []
    count = 0
    async with visit() as client:
        for place, document, variables in requests(schema):
            count += 1
            answer = await ask(client, document, variables)
            if "internal_error" in answer or not answer:
                broken.append((place, document[:120], variables[:80], answer[:300]))
    assert count > 1_000
    assert not broken, "\n".join(map(str, [len(broken), *broken[:40]]))


async def ask(client: httpx.AsyncClient, document: str, variables: str) -> str:
    body = f'{{"query": {json.dumps(document)}, "variables": {variables}}}'
    headers = {"content-type": "application/json"}
    if not document.startswith("subscription"):
        return (await client.post("/graphql", content=body, headers=headers)).text
    headers["accept"] = "text/event-stream"
    try:
        async with asyncio.timeout(0.2):
            return (await client.post("/graphql", content=body, headers=headers)).text
    except TimeoutError:
        return "it follows"


async def test_no_field_of_rest_is_an_error_of_the_server(visit: Visit) -> None:
    headers = {"content-type": "application/json"}
    fields = ("type", "payload", "priority", "scheduleAt", "maxAttempts", "idempotencyKey")
    broken = []
    async with visit() as client:
        for name in [*fields, "unknown", "\x00", "\ud800", DIGITS]:
            for value in ANY:
                job = {"type": "test.ping", "payload": {}} | {name: value}
                response = await client.post("/jobs", content=as_json(job), headers=headers)
                if response.status_code >= 500:
                    broken.append((name, as_json(value)[:80], response.text))
        for value in ANY:
            response = await client.post("/jobs", content=as_json(value), headers=headers)
            if response.status_code >= 500:
                broken.append(("", as_json(value)[:80], response.text))
        for path in ("%00", "%ED%A0%80", "%FF", DIGITS, "a%00b", "%2e%2e", "0" * 32):
            response = await client.get(f"/jobs/{path}")
            if response.status_code != 404:
                broken.append((path, "", response.text))
        for query in ("%ED%A0%80", "%FF", "%00", "{__typename}&variables=" + DIGITS,
                      "{__typename}&operationName=%ED%A0%80", "{a(b:" + DIGITS + ")}",
                      '{__typename}&variables={"a":' + DIGITS + "}"):  # fmt: skip
            response = await client.get(f"/graphql?query={query}")
            if response.status_code >= 500:
                broken.append((query, "", response.text))
    assert not broken, "\n".join(map(str, [len(broken), *broken[:40]]))
