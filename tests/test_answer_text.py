"""The JSON text of large answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_registry_api.answer_text import PIECE_BYTES, json_in_pieces
from job_registry_api.http_messages import respond

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_the_pieces_of_an_answer_are_its_json(value: Any) -> None:
    assert json.loads(asyncio.run(json_in_pieces(value))) == value


@pytest.mark.parametrize("entries", [0, 1_000, 1_001])
async def test_wide_values_are_whole(entries: int) -> None:
    value = {"a": [0] * entries, "b": {str(n): [] for n in range(entries)}}
    assert json.loads(await json_in_pieces(value)) == value


@pytest.mark.parametrize(
    "content",
    [
        {"data": {"jobs": {"nodes": [{"payload": [{"a": 0}] * 28_000}] * 30}}},
        {"data": {"jobs": {"nodes": [{f"p{n}": [{"a": 0}] * 28_000 for n in range(30)}]}}},
        {"data": {"jobs": {"edges": [{"node": {"payload": [{"a": 0}] * 28_000}}] * 30}}},
        {"data": {f"a{n}": {"job": {"payload": [{"a": 0}] * 28_000}} for n in range(30)}},
    ],
    ids=["jobs", "aliases of a value", "edges", "aliases of a field"],
)
async def test_other_tasks_take_their_turn_between_the_pieces_of_a_large_answer(
    content: Any,
) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    text = await json_in_pieces(content)
    task.cancel()
    assert len(text) > 6_000_000
    assert turns > 10


async def test_a_large_answer_is_sent_in_pieces() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    body = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"end"
    await respond(send, 200, body, content_type=b"application/json")
    start, *parts = sent
    assert (b"content-length", str(len(body)).encode()) in start["headers"]
    assert b"".join(part["body"] for part in parts) == body
    assert [part.get("more_body", False) for part in parts] == [True, True, True, False]
