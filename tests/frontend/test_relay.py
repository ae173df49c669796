"""Relay, https://relay.dev: its compiler takes the schema, its runtime reads pages both ways."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.frontend.test_frontend import node, project, pytestmark, url  # noqa: F401


@pytest.mark.slow
async def test_relay_reads_pages_in_both_directions_and_refetches_a_job(
    project: Path,  # noqa: F811
    url: str,  # noqa: F811
) -> None:
    compiled = node(project, "relay-compiler", "relay/relay.config.json")
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    async with httpx.AsyncClient() as client:
        for n in range(5):
            payout = {"type": "payout.execute", "payload": {"batchId": f"b{n}", "escrowId": "e"}}
            enqueued = await client.post(url.replace("/graphql", "/jobs"), json=payout)
            assert enqueued.status_code == 201
    ran = node(project, "relay/main.js", url)
    assert ran.returncode == 0, ran.stderr
    total = [5, False]
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [
        {"keys": ["b4", "b3"], "total": total, "next": True, "previous": False},
        {"keys": ["b4", "b3", "b2", "b1"], "total": total, "next": True, "previous": False},
        {"keys": ["b4", "b3", "b2", "b1", "b0"], "total": total, "next": False, "previous": False},
        {"refetched": True},
        {"keys": ["b1", "b0"], "total": total, "next": False, "previous": True},
        {"keys": ["b3", "b2", "b1", "b0"], "total": total, "next": False, "previous": True},
    ]
