"""The README stays true: what it shows runs."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from job_registry.discovery import load_registry
from job_registry_api.first_minute import what_to_try
from tests.http_client import Visit

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
    registry = load_registry(["job_registry.catalog", "myjobs"])
    job_type = registry["mail.send"]
    payload = registry.validate("mail.send", {"to": "ada@example.com"})
    assert job_type.run is not None
    assert await job_type.run(None, payload) == {"sent": "ada@example.com"}  # type: ignore[misc,arg-type]


def test_the_commands_of_a_job_type_of_ones_own_run_in_a_shell(tmp_path: Path) -> None:
    (code,) = examples(r"myjobs\.py", "python")
    (tmp_path / "myjobs.py").write_text(code, "utf-8")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (console,) = examples("own type", "console")
    *commands, serve = [line.removeprefix("$ ") for line in console.splitlines()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JOBS_", "PYTHON"))}

    script = "\n".join(["set -e -o pipefail", *commands])
    shell = ["bash", "-c", script]
    ran = subprocess.run(
        shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "mail.send" in ran.stdout
    assert "queued" in ran.stdout

    server = subprocess.Popen(
        ["bash", "-c", f"{commands[0]}; exec {serve}"],
        cwd=tmp_path,
        env={**environment, "JOBS_PORT": "0", "JOBS_LOG_LEVEL": "error"},
    )
    try:
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            with closing(sqlite3.connect(tmp_path / "jobs.db")) as database:
                ((result,),) = database.execute("SELECT result FROM job").fetchall()
            if result is not None:
                break
            time.sleep(0.05)
        assert json.loads(result) == {"sent": "ada@example.com"}
    finally:
        server.terminate()
        server.wait(20)


async def test_what_is_refused_is_answered_as_shown(http: httpx.AsyncClient) -> None:
    body = json.loads(re.findall(r"-d '(\{.*?\})'\n", README, re.DOTALL)[0])
    del body["variables"]["input"]["payload"]["versionNumber"]
    body["query"] = body["query"].replace(
        "... on Error { message }", "... on PayloadInvalid { violations { path code message } }"
    )
    answer = (await http.post("/graphql", json=body)).json()
    (shown,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert answer["data"]["enqueueJob"] == json.loads(shown)


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


async def test_the_token_that_is_made_as_shown_is_taken(visit: Visit, tmp_path: Path) -> None:
    (console,) = examples("token", "console")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    *commands, serve = re.split(r"^\$ ", console, flags=re.M)[1:]
    assert serve.endswith("serve --host 0.0.0.0\n")
    script = "".join(["set -e -o pipefail\n", *commands, 'echo "$JOBS_AUTH_HS256_SECRET" "$TOKEN"'])
    shell = ["bash", "-c", script]
    ran = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=True)
    secret, token = ran.stdout.split()
    settings = {"auth_hs256_secret": secret, "auth_issuer": "me", "auth_audience": "jobs"}
    async with visit(**settings, host="0.0.0.0") as client:
        headers = {"authorization": f"Bearer {token}"}
        answer = await client.post("/graphql", json={"query": QUERY}, headers=headers)
    assert answer.json()["data"]["jobPolicy"] == {"maxAttempts": 10}


QUERY = '{ jobPolicy(jobType: "payout.execute") { ... on JobPolicy { maxAttempts } } }'
