"""Parked jobs and versions of types, as clients of GraphQL, REST and the CLI see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from job_registry import EnqueueRequest, JobRegistry, JobType, Payload
from job_registry_api.queue.databases import open_database
from job_registry_api.queue.models import JobError
from job_registry_api.queue.queue import JobQueue
from tests.cli.test_cli import Shell
from tests.conftest import Ping
from tests.test_auth import AUTH, bearer

FAULT: dict[str, JsonValue] = {
    "path": "/text",
    "code": "unknown_field",
    "message": "There is no field.",
}
REFUSED = JobError("payload_invalid", "It does not fit.", [FAULT])


class PingV1(Payload):
    words: list[str]


@pytest.fixture
def registry() -> JobRegistry:
    """`test.ping`, which was `test.pong` and still accepts its older form; and one more."""
    ping = JobType(name="test.ping", payload=Ping, accepts=[PingV1], former_names=["test.pong"])
    ping.upgrade(PingV1)(lambda older: Ping(text=" ".join(older.words)))
    return JobRegistry([ping, JobType(name="test.other", payload=Ping)])


async def graphql(
    http: httpx.AsyncClient, query: str, headers: dict[str, str] | None = None, **variables: Any
) -> Any:
    body = {"query": query, "variables": variables}
    content = (await http.post("/graphql", json=body, headers=headers)).json()
    assert "errors" not in content, content
    (result,) = content["data"].values()
    return result


async def park(url: str, registry: JobRegistry, fingerprint: str = "f" * 64) -> str:
    database = open_database(url)
    queue = JobQueue(registry, database)
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
    (lease,) = await queue.lease(["test.ping"], "w")
    await queue.park(lease.token, fingerprint, REFUSED)
    await database.close()
    return str(job.id)


async def test_a_parked_job_says_what_is_wrong_with_its_payload(
    http: httpx.AsyncClient, database_url: str, registry: JobRegistry
) -> None:
    job_id = await park(database_url, registry)
    job = await graphql(
        http,
        """query ($id: ID!) { job(id: $id) { ... on Job {
            status attempt nextRunAt attempts { outcome error { code } }
            waitingReason { __typename ... on PayloadMismatch {
                fingerprint violations { path code message } } } } } }""",
        id=job_id,
    )
    assert job == {
        "status": "QUEUED",
        "attempt": 0,
        "nextRunAt": None,
        "attempts": [{"outcome": "RELEASED", "error": {"code": "payload_invalid"}}],
        "waitingReason": {
            "__typename": "PayloadMismatch",
            "fingerprint": "f" * 64,
            "violations": [FAULT],
        },
    }
    assert (await http.get(f"/jobs/{job_id}")).json()["nextRunAt"] is None


async def test_a_type_shows_its_versions_and_parked_jobs(
    http: httpx.AsyncClient, database_url: str, registry: JobRegistry
) -> None:
    await park(database_url, registry)
    ping = registry["test.ping"]
    found = await graphql(
        http,
        """{ jobType(jobType: "test.pong") { ... on JobType {
            name formerNames readableFingerprints fingerprint counts { queued parked }
            policy { onMismatch }
            versions { fingerprint queued running parked refused lastWorkerAt } } } }""",
    )
    assert (found["name"], found["formerNames"]) == ("test.ping", ["test.pong"])
    assert found["readableFingerprints"] == list(ping.readable_fingerprints)
    assert found["counts"] == {"queued": 1, "parked": 1}
    assert found["policy"] == {"onMismatch": "PARK"}
    versions = {each.pop("fingerprint"): each for each in found["versions"]}
    assert versions[ping.payload_fingerprint]["parked"] == 1
    assert versions["f" * 64]["refused"] == 1
    assert versions[ping.fingerprint]["lastWorkerAt"] is not None


UNPARK = """mutation ($types: [String!]) { unparkJobs(jobTypes: $types) {
    __typename ... on UnparkJobsSuccess { unparked } ... on InputInvalid { violations { path } }
} }"""


async def test_an_administrator_unparks_jobs(
    visit: Any, database_url: str, registry: JobRegistry
) -> None:
    await park(database_url, registry)
    async with visit(**AUTH) as http:
        admin = bearer("jobs:admin")
        wrong = await graphql(http, UNPARK, admin, types=["nope"])
        assert wrong["violations"] == [{"path": "/jobTypes/0"}]
        limited = bearer("jobs:admin", **{"jobs:types": ["test.other"]})
        assert (await graphql(http, UNPARK, limited))["unparked"] == 0
        assert (await graphql(http, UNPARK, admin, types=["test.pong"]))["unparked"] == 1
        body = {"query": UNPARK}
        refused = await http.post("/graphql", json=body, headers=bearer("jobs:work"))
        assert refused.json()["errors"][0]["extensions"]["code"] == "forbidden"


async def test_a_token_for_a_former_name_is_for_the_type(
    visit: Any, database_url: str, registry: JobRegistry
) -> None:
    async with visit(**AUTH) as http:
        limited = bearer("jobs:enqueue", "jobs:read", **{"jobs:types": ["test.pong"]})
        for name in ("test.pong", "test.ping"):
            job: dict[str, Any] = {"type": name, "payload": {}}
            assert (await http.post("/jobs", json=job, headers=limited)).status_code == 201
        other = {"type": "test.other", "payload": {}}
        assert (await http.post("/jobs", json=other, headers=limited)).status_code == 403
        jobs = await graphql(http, "{ jobs { nodes { type } } }", limited)
        assert jobs["nodes"] == [{"type": "test.ping"}] * 2


LEASE = """mutation ($fingerprints: [TypeFingerprintInput!]) { leaseJobs(input: {
    jobTypes: ["test.ping"], workerId: "w", limit: 10, fingerprints: $fingerprints}) {
    __typename ... on LeaseJobsSuccess { leases { job { payload } } }
    ... on InputInvalid { violations { path code } } } }"""


async def test_a_remote_worker_names_what_it_can_read(
    http: httpx.AsyncClient, registry: JobRegistry
) -> None:
    for payload in ({"text": "a"}, {"words": ["b"]}):
        job: dict[str, Any] = {"type": "test.ping", "payload": payload}
        assert (await http.post("/jobs", json=job)).status_code == 201
    today, older = registry["test.ping"].readable_fingerprints

    async def leased(*fingerprints: str) -> Any:
        named = [{"type": "test.ping", "fingerprint": each} for each in fingerprints]
        result = await graphql(http, LEASE, fingerprints=named)
        return [each["job"]["payload"] for each in result["leases"]]

    assert await leased("0" * 64) == []
    assert await leased("0" * 64, older) == [{"words": ["b"]}]
    assert await leased(today, older) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("named", "code"),
    [
        ({"type": "test.ping", "fingerprint": "x"}, "invalid_format"),
        ({"type": "test.other", "fingerprint": "0" * 64}, "job_type_not_found"),
    ],
)
async def test_a_wrong_fingerprint_is_named(
    http: httpx.AsyncClient, named: dict[str, str], code: str
) -> None:
    result = await graphql(http, LEASE, fingerprints=[named])
    assert result["violations"] == [{"path": "/fingerprints", "code": code}]


async def test_an_invented_fingerprint_is_not_recorded(
    http: httpx.AsyncClient, registry: JobRegistry
) -> None:
    known = registry["test.ping"].readable_fingerprints[0]
    named = [{"type": "test.ping", "fingerprint": each} for each in (known, "0" * 64)]
    await graphql(http, LEASE, fingerprints=named)
    query = '{ jobType(jobType: "test.ping") { ... on JobType { versions { fingerprint } } } }'
    versions = (await graphql(http, query))["versions"]
    assert [each["fingerprint"] for each in versions] == [known]


async def test_types_that_the_server_does_not_know_are_listed_to_who_may_see_them(
    visit: Any, database_url: str
) -> None:
    database = open_database(database_url)
    others = JobRegistry([JobType(name=name, payload=Ping) for name in ("gone", "lost")])
    for name in others:
        await JobQueue(others, database).enqueue(EnqueueRequest(name, {}))
    await database.close()
    query = "{ unregisteredTypes { name counts { queued } } }"
    async with visit(**AUTH) as http:
        found = await http.post("/graphql", json={"query": query}, headers=bearer("jobs:read"))
        assert found.json()["data"]["unregisteredTypes"] == [
            {"name": "gone", "counts": {"queued": 1}},
            {"name": "lost", "counts": {"queued": 1}},
        ]
        limited = bearer("jobs:read", **{"jobs:types": ["lost"]})
        found = await http.post("/graphql", json={"query": query}, headers=limited)
        assert [each["name"] for each in found.json()["data"]["unregisteredTypes"]] == ["lost"]


async def test_the_command_line_shows_versions_and_unparks(
    database_url: str, tmp_path: Path, registry: JobRegistry
) -> None:
    await park(database_url, registry)
    (tmp_path / "pings.py").write_text(
        "from job_registry import JobType, Payload\n\n\n"
        "class Ping(Payload):\n    text: str = 'hello'\n\n\n"
        "ping = JobType(name='test.ping', payload=Ping, former_names=['test.pong'])\n"
    )
    jobs = Shell(tmp_path)
    settings = {"JOBS_CATALOG": "pings", "JOBS_DATABASE_URL": database_url}
    shown = jobs("versions", **settings)
    assert shown.returncode == 0, shown.stderr
    assert "test.ping  ffffffffffff" in shown.stdout
    found = json.loads(jobs("versions", "test.pong", "--json", **settings).stdout)
    assert found["types"][0]["name"] == "test.ping"
    assert {each["refused"] for each in found["types"][0]["versions"]} == {0, 1}
    assert jobs("unpark", "nope", **settings).returncode == 1
    assert jobs("unpark", "test.pong", **settings).stdout == "1 unparked\n"
    assert json.loads(jobs("unpark", "--json", **settings).stdout) == {"unparked": 0}


async def test_the_typed_input_takes_the_older_form_too(http: httpx.AsyncClient) -> None:
    document = """mutation { enqueue(job: {testPing: %s}) {
        __typename ... on EnqueueJobSuccess { job { payload } }
        ... on PayloadInvalid { violations { path } } } }"""
    for form, stored in (('{text: "a"}', {"text": "a"}), ('{words: ["b"]}', {"words": ["b"]})):
        result = await graphql(http, document % form)
        assert result == {"__typename": "EnqueueJobSuccess", "job": {"payload": stored}}
    both = await graphql(http, document % '{text: "a", words: ["b"]}')
    assert both["violations"] == [{"path": "/words"}]
