"""The README stays true: what it shows runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from api.first_minute import what_to_try
from registry.discovery import load_registry

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def examples(name: str, language: str) -> list[str]:
    found = re.findall(rf"<!-- example: {name} -->\n```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return list(found)


async def test_a_job_type_of_ones_own_takes_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = examples(r"myjobs\.py", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "myjobs.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry(["registry.catalog", "myjobs"])
    job_type = registry["mail.send"]
    payload = registry.validate("mail.send", {"to": "ada@example.com"})
    assert job_type.run is not None
    assert await job_type.run(None, payload) == {"sent": "ada@example.com"}  # type: ignore[misc,arg-type]


async def test_the_graphql_examples_run(http: httpx.AsyncClient) -> None:
    for query in examples("graphql", "graphql"):
        response = await http.post("/graphql", json={"query": query})
        assert "errors" not in response.json(), response.text
        assert "Success" in response.text or "nodes" in response.text


async def test_the_commands_of_the_first_minute_run(http: httpx.AsyncClient) -> None:
    bodies = re.findall(r"-d '(\{.*?\})'\n", README, re.DOTALL)
    assert len(bodies) == 2
    graphql, rest = map(json.loads, bodies)
    answer = (await http.post("/graphql", json=graphql)).json()
    assert answer["data"]["enqueueJob"]["__typename"] == "EnqueueJobSuccess"
    assert (await http.post("/jobs", json=rest)).status_code == 201

    # What `make run` prints is the same request.
    printed = re.findall(r"-d '(.*)'", what_to_try("127.0.0.1", 8000, "assets"))
    assert json.loads(printed[0]) == graphql
