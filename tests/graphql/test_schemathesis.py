"""Random documents that the schema allows, as schemathesis makes them, against a live server.

This is the short form. The long one: `TEST_DOCUMENTS=1000 make test`.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import schemathesis
from graphql import parse_value
from hypothesis import strategies as st
from schemathesis.graphql import nodes

from tests.graphql.test_inputs import literal
from tests.http_client import serving
from tests.random_requests import send_for_each_operation

DOCUMENTS = int(os.environ.get("TEST_DOCUMENTS", "8"))
"""How many for each field of Query and Mutation."""

NAMES = st.from_regex(r"[a-zA-Z][a-zA-Z0-9]{0,5}", fullmatch=True)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
TIMES = st.datetimes(timezones=st.just(None) | st.timezones()).map(str) | st.text(max_size=8)


async def test_no_document_breaks_the_server_or_makes_it_tell_its_insides(
    database_url: str,
) -> None:
    schemathesis.graphql.scalar("JSON", ANY_JSON.map(literal).map(parse_value))
    schemathesis.graphql.scalar("DateTime", TIMES.map(nodes.String))
    # Each document is also executed by graphql-core. A difference is an internal error.
    async with serving(database_url, "--no-worker", module="tests.verified") as (address, _):
        tried = await asyncio.to_thread(send_documents, f"http://{address}/graphql")
    assert len(tried) > 15


def send_documents(url: str) -> list[str]:
    """Sends random documents for each field, and checks the answers; gives the fields."""

    def check(case: Any) -> None:
        response = case.call()
        assert response.status_code < 500, case.body
        answer = response.json()
        assert answer.keys() <= {"data", "errors"}
        for error in answer.get("errors", ()):
            assert error.get("extensions", {}).get("code") != "internal_error", case.body
            assert not any(
                leak in str(error) for leak in ("Traceback", "sqlalchemy", "asyncpg", ".py")
            ), error

    return send_for_each_operation(schemathesis.graphql.from_url(url), DOCUMENTS, check)
