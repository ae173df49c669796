"""Who may do what: bearer tokens, scopes, job types, and rates, at every door."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import strawberry
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from graphql import GraphQLObjectType
from limits import parse as parse_rate
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from job_registry import JobRegistry
from job_registry_api.app import create_app
from job_registry_api.auth import (
    ACCESS_SCOPES,
    Authenticator,
    Forbidden,
    TokenVerifier,
    TooManyRequests,
)
from job_registry_api.graphql.access_scopes import check_access_scope
from job_registry_api.graphql.schema import build_schema, executable
from job_registry_api.rates import MAX_CALLERS, Rates
from job_registry_api.settings import SettingsInvalid, load_settings
from job_registry_api.signing_keys import FixedKeys, SharedSecret
from tests.http_client import Visit, serving

SECRET = "a secret of more than thirty-two bytes"
ISSUER = "https://issuer.example"
CLAIMS = {"auth_issuer": ISSUER, "auth_audience": "jobs"}
AUTH = {"auth_hs256_secret": SECRET} | CLAIMS
PING = {"type": "test.ping", "payload": {}}
ENQUEUE = """mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) { __typename
    ... on EnqueueJobSuccess { job { id createdBy } } } }"""


def claims(*scopes: str, **changed: Any) -> dict[str, Any]:
    whole = {
        "iss": ISSUER,
        "aud": "jobs",
        "sub": "ada",
        "exp": int(time.time()) + 60,
        "scope": " ".join(scopes),
    } | changed
    return {name: value for name, value in whole.items() if value is not None}


def token(*scopes: str, **changed: Any) -> str:
    return jwt.encode(claims(*scopes, **changed), SECRET, "HS256")


def bearer(*scopes: str, **changed: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {token(*scopes, **changed)}"}


async def graphql(
    client: httpx.AsyncClient, query: str, headers: dict[str, str], **variables: Any
) -> httpx.Response:
    content = {"query": query, "variables": variables}
    return await client.post("/graphql", json=content, headers=headers)


def codes(response: httpx.Response) -> list[str]:
    return [error["extensions"]["code"] for error in response.json().get("errors", ())]


# Tokens


async def test_the_subject_of_a_token_is_who_created_a_job(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        answer = await graphql(client, ENQUEUE, bearer("jobs:enqueue"), input=PING)
        rest = await client.post("/jobs", json=PING, headers=bearer("jobs:enqueue", sub="bob"))
        stored = await client.get(rest.headers["location"], headers=bearer("jobs:read"))
    assert answer.json()["data"]["enqueueJob"]["job"]["createdBy"] == "ada"
    assert stored.json()["createdBy"] == "bob"


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("POST", "/graphql", {}),
        ("GET", "/graphql?query={__typename}", {}),
        ("POST", "/graphql", {"accept": "text/event-stream"}),
        ("POST", "/jobs", {}),
        ("GET", "/jobs/01a20ce6-477e-756b-b37b-d94e9b09c1e9", {}),
    ],
)
async def test_without_a_token_every_interface_requires_one(
    visit: Visit, method: str, path: str, headers: dict[str, str]
) -> None:
    body = {"query": "{ __typename }"} if method == "POST" else None
    async with visit(**AUTH) as client:
        response = await client.request(method, path, json=body, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer realm="jobs"'
    content = response.json()
    error = content["error"] if "error" in content else content["errors"][0]["extensions"]
    assert error["code"] == "unauthenticated"


async def test_a_valid_token_by_another_scheme_is_refused(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        for scheme, status in (("Basic", 401), ("Token", 401), ("bearer", 404)):
            headers = {"authorization": f"{scheme} {token('jobs:read')}"}
            assert (await client.get("/jobs/a", headers=headers)).status_code == status, scheme


async def test_health_and_the_page_need_no_token(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        page = await client.get("/graphql", headers={"accept": "text/html"})
    assert page.status_code == 200


def none_algorithm(**changed: Any) -> str:
    no_key: Any = None
    return jwt.encode(claims("jobs:read", **changed), no_key, "none")


@pytest.mark.cases(10)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: token(exp=int(time.time()) - 60), "The token has expired."),
        (lambda: token(nbf=int(time.time()) + 60), "The token is not valid yet."),
        (lambda: token(iss="https://other.example"), "The token is from another issuer."),
        (lambda: token(aud="others"), "The token is for another audience."),
        (lambda: token(exp=None), "The token lacks the claim exp."),
        (lambda: token(sub=None), "The token lacks the claim sub."),
        (lambda: token(iss=None), "The token lacks the claim iss."),
        (lambda: token(aud=None), "The token lacks the claim aud."),
        (lambda: token(sub=""), "The claim sub is not 1 to 255 characters of text."),
        (lambda: token(sub="x" * 256), "The claim sub is not 1 to 255 characters of text."),
        (lambda: token(sub=7), "The token is not valid."),
        (lambda: token(exp="soon"), "The claim exp is not a time in seconds since 1970."),
        (lambda: token(**{"jobs:types": "x"}), "The claim jobs:types is not a list of names."),
        (lambda: token(**{"jobs:types": [1]}), "The claim jobs:types is not a list of names."),
        (none_algorithm, "The token is signed with another algorithm than its key's."),
        (
            lambda: jwt.encode(claims(), SECRET * 2, "HS512"),
            "The token is signed with another algorithm than its key's.",
        ),
        (lambda: jwt.encode(claims(), SECRET * 2, "HS256"), "The token's signature is wrong."),
        (lambda: token()[:-8] + "AAAAAAAA", "The token's signature is wrong."),
        (lambda: "a.b.c", "The token is not a JSON Web Token."),
        (lambda: "x" * 9_000, "The token is too long."),
    ],
)  # fmt: skip
async def test_a_token_that_is_not_valid_is_refused_with_the_reason(
    visit: Visit, make: Callable[[], str], reason: str
) -> None:
    given = make()
    async with visit(**AUTH) as client:
        headers = {"authorization": f"Bearer {given}"}
        response = await graphql(client, "{ __typename }", headers)
    assert response.status_code == 401
    assert (
        f'error="invalid_token", error_description="{reason}"'
        in (response.headers["www-authenticate"])
    )
    assert response.json()["errors"][0]["message"] == reason
    assert given not in response.text


async def test_clocks_may_differ_by_the_leeway(visit: Visit) -> None:
    late = bearer("jobs:read", exp=int(time.time()) - 5)
    async with visit(**AUTH) as client:
        assert (await graphql(client, "{ __typename }", late)).status_code == 200
    async with visit(**AUTH, auth_leeway_seconds="1") as client:
        assert (await graphql(client, "{ __typename }", late)).status_code == 401


async def test_a_caller_is_known_until_the_token_has_expired_and_the_leeway_has_passed() -> None:
    keys = FixedKeys(SharedSecret(SECRET.encode()))
    verifier = TokenVerifier(keys, issuer=ISSUER, audience="jobs", leeway_seconds=7)
    expires = int(time.time()) + 60
    for _ in range(2):
        caller = await verifier.verify(f"Bearer {token(exp=expires)}")
        assert (caller.subject, caller.expires_at) == ("ada", expires + 7)


async def test_a_token_that_was_valid_is_refused_once_it_has_expired(visit: Visit) -> None:
    async with visit(**AUTH, auth_leeway_seconds="0") as client:
        headers = bearer("jobs:read", exp=time.time() + 1.2)
        assert (await graphql(client, "{ __typename }", headers)).status_code == 200
        await asyncio.sleep(1.3)
        assert (await graphql(client, "{ __typename }", headers)).status_code == 401


# Key sets

PRIVATE_KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def public_keys(**more: dict[str, Any]) -> dict[str, Any]:
    """A key set with a key for each algorithm, named for it, and some that are no use."""
    keys = [
        json.loads(jwt.get_algorithm_by_name(name).to_jwk(key.public_key())) | {"kid": name}
        for name, key in PRIVATE_KEYS.items()
    ]
    unusable = [
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA", "kid": "HS256"},
        {"kty": "oct", "k": "c2VjcmV0", "alg": "none"},
        keys[0] | {"kid": "encryption", "use": "enc"},
        keys[0] | {"kid": "RS512", "alg": "RS512"},
    ]
    return {"keys": keys + unusable}


@pytest.fixture
def key_file(tmp_path: Path) -> dict[str, str]:
    """The settings for a file with the public keys."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(public_keys()))
    return {"auth_jwks": str(path)} | CLAIMS


def signed(algorithm: str, key_id: str | None, key: Any = None, **changed: Any) -> dict[str, str]:
    header = {} if key_id is None else {"kid": key_id}
    key = key or PRIVATE_KEYS[algorithm]
    given = jwt.encode(claims("jobs:read", **changed), key, algorithm, headers=header)
    return {"authorization": f"Bearer {given}"}


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_tokens_are_checked_with_public_keys(
    visit: Visit, key_file: dict[str, str], algorithm: str
) -> None:
    async with visit(**key_file) as client:
        response = await graphql(client, "{ jobTypes { name } }", signed(algorithm, algorithm))
        forged = signed(algorithm, algorithm)["authorization"][:-8] + "AAAAAAAA"
        refused = await graphql(client, "{ __typename }", {"authorization": forged})
    assert response.json()["data"]["jobTypes"]
    assert refused.status_code == 401


async def test_keys_are_not_confused(visit: Visit, key_file: dict[str, str]) -> None:
    public = PRIVATE_KEYS["RS256"].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    header = {"alg": "HS256", "typ": "JWT", "kid": "RS256"}
    signing = b".".join(
        jwt.utils.base64url_encode(json.dumps(part).encode())
        for part in (header, claims("jobs:admin"))
    )
    # PyJWT itself refuses to sign with a public key.
    signature = jwt.get_algorithm_by_name("HS256").sign(signing, pem)
    confused = (signing + b"." + jwt.utils.base64url_encode(signature)).decode()
    secret = "secret-secret-secret-secret-secret"
    attempts = [
        {"authorization": f"Bearer {confused}"},
        signed("HS256", "HS256", secret),
        signed("ES256", "RS256"),
        signed("RS512", "RS512", PRIVATE_KEYS["RS256"]),
        signed("RS256", "encryption"),
        signed("RS256", "unknown"),
        signed("RS256", None),  # Which of several keys, nobody says.
        {"authorization": f"Bearer {none_algorithm()}"},
    ]
    async with visit(**key_file) as client:
        for headers in attempts:
            assert (await graphql(client, "{ __typename }", headers)).status_code == 401


async def test_the_only_key_needs_no_name(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text(json.dumps({"keys": public_keys()["keys"][:1]}))
    async with visit(auth_jwks=str(path), **CLAIMS) as client:
        assert (await graphql(client, "{ __typename }", signed("RS256", None))).status_code == 200


class Keys(BaseHTTPRequestHandler):
    """Serves a key set, except at /broken, where it counts the requests."""

    broken_requests = 0

    def do_GET(self) -> None:
        if self.path == "/broken":
            Keys.broken_requests += 1
            self.send_error(500)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(public_keys()).encode())

    def log_message(self, *_args: Any) -> None: ...


@pytest.fixture
def key_server() -> Iterator[str]:
    """The URL of a key set."""
    server = HTTPServer(("127.0.0.1", 0), Keys)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/keys"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_keys_are_fetched_from_a_url(visit: Visit, key_server: str) -> None:
    async with visit(auth_jwks=key_server, **CLAIMS) as client:
        assert (
            await graphql(client, "{ __typename }", signed("ES256", "ES256"))
        ).status_code == 200
        assert (await graphql(client, "{ __typename }", signed("ES256", "new"))).status_code == 401


async def test_keys_that_cannot_be_fetched_are_not_fetched_again_for_each_token(
    visit: Visit, key_server: str
) -> None:
    before = Keys.broken_requests
    async with visit(auth_jwks=key_server.replace("/keys", "/broken"), **CLAIMS) as client:
        for _ in range(3):
            response = await graphql(client, "{ __typename }", signed("ES256", "ES256"))
            assert response.status_code == 503
    assert Keys.broken_requests == before + 1


async def test_while_the_keys_cannot_be_fetched_the_answer_is_503(visit: Visit) -> None:
    async with visit(auth_jwks="http://127.0.0.1:1/keys", **CLAIMS) as client:
        response = await graphql(client, "{ __typename }", signed("ES256", "ES256"))
        rest = await client.post("/jobs", json=PING, headers=signed("ES256", "ES256"))
        scraped = await client.get("/metrics", headers=signed("ES256", "ES256"))
    assert (response.status_code, codes(response)) == (503, ["authentication_unavailable"])
    for answer in (rest, scraped):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "127.0.0.1" not in response.text + rest.text + scraped.text


@pytest.mark.parametrize("text", ["no keys", "[]", "{}", '{"keys": {}}'])
def test_a_file_that_is_no_key_set_is_a_wrong_setting(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(SettingsInvalid, match="JOBS_AUTH_JWKS: got .*not a JSON Web Key Set"):
        load_settings(
            {"JOBS_AUTH_JWKS": str(path), "JOBS_AUTH_ISSUER": ISSUER, "JOBS_AUTH_AUDIENCE": "jobs"}
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"keys": []}', "has no RSA, P-256 or Ed25519 key"),
        ('{"keys": [1]}', "has no RSA, P-256 or Ed25519 key"),
        ('{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "has no RSA, P-256 or Ed25519 key"),
    ],
)
def test_a_key_set_without_a_usable_key_stops_the_start(
    registry: JobRegistry, tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    settings = load_settings(
        {"JOBS_AUTH_JWKS": str(path), "JOBS_AUTH_ISSUER": ISSUER, "JOBS_AUTH_AUDIENCE": "jobs"}
    )
    with pytest.raises(SettingsInvalid, match=f"JOBS_AUTH_JWKS: got .*{reason}"):
        create_app(settings, registry)


# Scopes

NEEDED = {
    "{ jobTypes { name } }": {"jobs:own", "jobs:read"},
    '{ jobType(jobType: "test.ping") { __typename } }': {"jobs:own", "jobs:read"},
    '{ jobPolicy(jobType: "test.ping") { __typename } }': {"jobs:own", "jobs:read"},
    '{ validateJob(input: {type: "test.ping", payload: {}}) { __typename } }': {
        "jobs:own",
        "jobs:read",
        "jobs:enqueue",
    },
    "{ unregisteredTypes { name } }": {"jobs:read"},
    '{ job(id: "a") { __typename } }': {"jobs:own", "jobs:read"},
    '{ awaitJob(id: "a") { __typename } }': {"jobs:own", "jobs:read"},
    '{ node(id: "a") { __typename } }': {"jobs:own", "jobs:read"},
    "{ jobs { nodes { id } } }": {"jobs:own", "jobs:read"},
    'mutation { enqueueJob(input: {type: "test.ping", payload: {}}) { __typename } }': {
        "jobs:own",
        "jobs:enqueue",
    },
    "mutation { enqueueJobs(inputs: []) { __typename } }": {"jobs:own", "jobs:enqueue"},
    "mutation { enqueue(job: {testPing: {}}) { __typename } }": {"jobs:own", "jobs:enqueue"},
    'mutation { cancelJob(id: "a") { __typename } }': {"jobs:own"},
    'mutation { retryJob(id: "a") { __typename } }': {"jobs:own"},
    'mutation { unparkJobs(jobTypes: ["test.ping"]) { __typename } }': set(),
    'mutation { leaseJobs(input: {jobTypes: ["test.pong"], workerId: "w"}) { __typename } }': {
        "jobs:work"
    },
    'mutation { stopWaiting(workerId: "w") { __typename } }': {"jobs:work"},
    'mutation { heartbeatJob(leaseToken: "t") { __typename } }': {"jobs:work"},
    'mutation { completeJob(leaseToken: "t") { __typename } }': {"jobs:work"},
    'mutation { failJob(leaseToken: "t", error: {message: "m"}) { __typename } }': {"jobs:work"},
    'mutation { releaseJob(leaseToken: "t") { __typename } }': {"jobs:work"},
    'mutation { snoozeJob(leaseToken: "t", seconds: 1) { __typename } }': {"jobs:work"},
    'subscription { jobEvents(jobTypes: ["no"]) { name } }': {"jobs:own", "jobs:read"},
}


def test_every_field_where_a_document_begins_is_in_the_table(registry: JobRegistry) -> None:
    schema = executable(build_schema(registry))
    roots = [schema.query_type, schema.mutation_type, schema.subscription_type]
    fields = {name for root in roots if root for name in root.fields}
    assert fields == {document.split("{ ")[1].split("(")[0].split(" ")[0] for document in NEEDED}


@pytest.mark.cases(8)
@pytest.mark.parametrize("document", NEEDED)
async def test_a_field_is_forbidden_without_one_of_its_scopes(visit: Visit, document: str) -> None:
    accept = "text/event-stream" if document.startswith("subscription") else "application/json"
    async with visit(**AUTH) as client:
        for scope in [*ACCESS_SCOPES, "", "jobs:all"]:
            response = await graphql(client, document, bearer(scope) | {"accept": accept})
            admitted = scope in NEEDED[document] | {"jobs:admin"}
            assert ('"forbidden"' in response.text) == (not admitted), response.text
            assert ("needs the scope" in response.text) == (not admitted)


def test_a_field_must_declare_its_access_scope(registry: JobRegistry) -> None:
    silent = strawberry.field(description="Declares no access scope.")
    silent.python_name = "silent"
    for type_name in ("Query", "Mutation", "Subscription", "Job"):
        with pytest.raises(LookupError, match=rf"{type_name}\.silent does not declare its access"):
            check_access_scope(type_name, silent)
    for graphql_type in executable(build_schema(registry)).type_map.values():
        if graphql_type.name in ("Query", "Mutation", "Subscription"):
            assert isinstance(graphql_type, GraphQLObjectType)
            for field in graphql_type.fields.values():
                assert "Needs the scope `jobs:" in str(field.description)


@pytest.mark.parametrize("scope", ["jobs:read", "jobs:work", ""])
async def test_rest_answers_403_without_the_scope(visit: Visit, scope: str) -> None:
    async with visit(**AUTH) as client:
        enqueued = await client.post("/jobs", json=PING, headers=bearer(scope))
        read = await client.get("/jobs/a", headers=bearer("jobs:enqueue"))
    for response, needed in ((enqueued, "jobs:enqueue"), (read, "jobs:read")):
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "forbidden"
        assert needed in response.json()["error"]["message"]


async def test_a_caller_ends_only_its_own_waits_for_leases_unless_it_is_an_admin(
    visit: Visit,
) -> None:
    lease = """mutation { leaseJobs(input: {
        jobTypes: ["test.pong"], workerId: "w", waitSeconds: 20}) {
        ... on LeaseJobsSuccess { leases { leaseToken } } } }"""
    stop = 'mutation { stopWaiting(workerId: "w") { __typename } }'
    async with visit(**AUTH) as client:
        for scope, subject, ends in (
            ("jobs:work", "bob", False), ("jobs:work", "ada", True), ("jobs:admin", "bob", True),
        ):  # fmt: skip
            waiting = asyncio.create_task(graphql(client, lease, bearer("jobs:work")))
            await asyncio.sleep(0.1)
            answer = await graphql(client, stop, bearer(scope, sub=subject))
            assert answer.json()["data"]["stopWaiting"]["__typename"] == "StopWaitingSuccess"
            done, _ = await asyncio.wait([waiting], timeout=5 if ends else 0.2)
            assert bool(done) == ends
            if not ends:
                await graphql(client, stop, bearer("jobs:admin"))
            assert (await waiting).json()["data"]["leaseJobs"]["leases"] == []


async def test_one_who_only_enqueues_does_not_see_what_others_jobs_hold(visit: Visit) -> None:
    keyed = """mutation ($input: EnqueueJobInput!) { enqueueJob(input: $input) { __typename
        ... on EnqueueJobSuccess { deduplicated job { payload createdBy } }
        ... on InputInvalid { violations { path code } }
        ... on IdempotencyConflict { differingPaths existingJob { payload createdBy } } } }"""
    dry = """query ($input: EnqueueJobInput!) { validateJob(input: $input) { __typename
        ... on JobValid { duplicateOf { createdBy } } } }"""
    bulk = """mutation ($input: EnqueueJobInput!) { enqueueJobs(inputs: [$input]) { __typename
        ... on EnqueueJobSuccess { job { createdBy } } } }"""
    first = PING | {"idempotencyKey": "k", "payload": {"text": "mine"}}
    second = PING | {"idempotencyKey": "k", "payload": {"text": "yours"}}
    async with visit(**AUTH) as client:
        own = await graphql(client, keyed, bearer("jobs:enqueue"), input=first)
        mine = await graphql(client, keyed, bearer("jobs:enqueue"), input=second)
        other = bearer("jobs:enqueue", sub="bob")
        answered = await graphql(client, keyed, other, input=second)
        same = await graphql(client, keyed, other, input=first)
        reading = bearer("jobs:enqueue", "jobs:read", sub="bob")
        read = await graphql(client, keyed, reading, input=second)
        rest = await client.post("/jobs", json=second, headers=other)
        unsaid = [
            await graphql(client, document, other, input=given)
            for document in (dry, bulk)
            for given in (first, second)
        ]
        for field in ("result", "progress", "error { code }", "attempts { attempt }", "workerId"):
            document = ENQUEUE.replace("createdBy", field)
            refused = await graphql(client, document, other, input=PING)
            assert codes(refused) == ["forbidden"], field
    stored = {"payload": {"text": "mine"}, "createdBy": "ada"}
    assert own.json()["data"]["enqueueJob"]["job"] == stored
    for response in (mine, read):
        assert response.json()["data"]["enqueueJob"] == {
            "__typename": "IdempotencyConflict",
            "differingPaths": ["/text"],
            "existingJob": stored,
        }
    assert answered.json()["data"]["enqueueJob"] == {
        "__typename": "InputInvalid",
        "violations": [{"path": "/idempotencyKey", "code": "idempotency_conflict"}],
    }
    assert same.json()["data"]["enqueueJob"] == {
        "__typename": "EnqueueJobSuccess",
        "deduplicated": True,
        "job": stored | {"createdBy": None},
    }
    assert (rest.status_code, rest.json()["error"]) == (
        409,
        {
            "code": "idempotency_conflict",
            "message": "This idempotency key belongs to another job of this type.",
            "details": [],
        },
    )
    assert not any("ada" in each.text or "differing" in each.text for each in unsaid)
    assert ["InputInvalid" in each.text for each in unsaid] == [False, True, False, True]


# Job types

ALL = ("jobs:enqueue", "jobs:read", "jobs:work", "jobs:admin")


async def test_a_caller_may_be_limited_to_some_job_types(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        ids = {}
        for name in ("test.ping", "test.pong"):
            made = await client.post("/jobs", json=PING | {"type": name}, headers=bearer(*ALL))
            ids[name] = made.json()["jobId"]
        limited = bearer(*ALL, **{"jobs:types": ["test.ping"]})

        async def ask(document: str) -> httpx.Response:
            return await graphql(client, document, limited)

        for document in (
            'mutation { enqueueJob(input: {type: "test.pong", payload: {}}) { __typename } }',
            'mutation { enqueueJobs(inputs: [{type: "test.ping", payload: {}},'
            ' {type: "test.pong", payload: {}}]) { __typename } }',
            'mutation { leaseJobs(input: {jobTypes: ["test.ping", "test.pong"],'
            ' workerId: "w"}) { __typename } }',
            '{ validateJob(input: {type: "test.pong", payload: {}}) { __typename } }',
            '{ jobPolicy(jobType: "test.pong") { __typename } }',
            '{ jobType(jobType: "test.pong") { __typename } }',
            '{ jobs(filter: {types: ["test.pong"]}) { nodes { id } } }',
        ):
            assert codes(await ask(document)) == ["forbidden"], document
        for document in ("{ it: job", "mutation { it: cancelJob", "mutation { it: retryJob"):
            answer = await ask(f'{document}(id: "{ids["test.pong"]}") {{ __typename }} }}')
            assert answer.json()["data"]["it"]["__typename"] == "JobNotFound", document
        jobs = await ask("{ jobs { nodes { id } } jobTypes { name } }")
        enqueued = await ask("mutation { enqueue(job: {testPing: {}}) { __typename } }")
        leased = await ask(
            'mutation { leaseJobs(input: {jobTypes: ["test.ping"], workerId: "w", limit: 9}) {'
            " ... on LeaseJobsSuccess { leases { job { type } } } } }"
        )
        rest = await client.post("/jobs", json=PING | {"type": "test.pong"}, headers=limited)
        read = await client.get(f"/jobs/{ids['test.pong']}", headers=limited)
        nothing = bearer(*ALL, **{"jobs:types": []})
        none = await graphql(client, "{ jobs { nodes { id } } jobTypes { name } }", nothing)
    assert jobs.json()["data"] == {
        "jobs": {"nodes": [{"id": ids["test.ping"]}]},
        "jobTypes": [{"name": "test.ping"}],
    }
    assert enqueued.json()["data"]["enqueue"]["__typename"] == "EnqueueJobSuccess"
    leases = leased.json()["data"]["leaseJobs"]["leases"]
    assert [lease["job"]["type"] for lease in leases] == ["test.ping"] * 2
    assert (rest.status_code, rest.json()["error"]["code"]) == (403, "forbidden")
    assert (read.status_code, read.json()["error"]["code"]) == (404, "job_not_found")
    assert none.json()["data"] == {"jobs": {"nodes": []}, "jobTypes": []}


async def test_a_limited_caller_is_suggested_only_its_own_job_types(visit: Visit) -> None:
    unknown = "test.pon"  # The server does not have this type; it has `test.pong`.
    job = f'{{type: "{unknown}", payload: {{}}}}'
    missing = "... on JobTypeNotFound { message suggestions }"
    faulty = "... on InputInvalid { violations { message } }"
    async with visit(**AUTH) as client:
        limited = bearer(*ALL, **{"jobs:types": [unknown, "test.ping"]})
        answers = [
            await graphql(client, document, limited)
            for document in (
                f'{{ jobType(jobType: "{unknown}") {{ {missing} }} }}',
                f'{{ jobPolicy(jobType: "{unknown}") {{ {missing} }} }}',
                f"{{ validateJob(input: {job}) {{ {missing} }} }}",
                f"mutation {{ enqueueJob(input: {job}) {{ {missing} }} }}",
                f"mutation {{ enqueueJobs(inputs: [{job}]) {{ {missing} }} }}",
                f'mutation {{ unparkJobs(jobTypes: ["{unknown}"]) {{ {faulty} }} }}',
                f'mutation {{ leaseJobs(input: {{jobTypes: ["{unknown}"], workerId: "w"}})'
                f" {{ {faulty} }} }}",
            )
        ]
        following = f'subscription {{ jobEvents(jobTypes: ["{unknown}"]) {{ name }} }}'
        events = limited | {"accept": "text/event-stream"}
        answers.append(await graphql(client, following, events))
        given = {"type": unknown, "payload": {}}
        answers.append(await client.post("/jobs", json=given, headers=limited))
        answers.append(await client.post("/jobs/bulk", json={"jobs": [given]}, headers=limited))
        answers.append(await client.post("/jobs", json=given | {"priority": -1}, headers=limited))
    for answer in answers:
        assert "test.ping" in answer.text, answer.request.content
        assert "test.pong" not in answer.text, answer.request.content


# Subscriptions

EVENTS = "subscription { jobEvents { name type } }"


async def test_a_websocket_is_authenticated_by_its_first_message_or_its_header(
    database_url: str,
) -> None:
    async with serving(database_url, "--no-worker", **AUTH) as (address, _):

        async def opened(payload: dict[str, Any], **headers: str) -> dict[str, Any] | int:
            """The answer to `connection_init`, or the code with which the connection closes."""
            async with connect(
                f"ws://{address}/graphql",
                subprotocols=[Subprotocol("graphql-transport-ws")],
                additional_headers=headers,
            ) as socket:
                await socket.send(json.dumps({"type": "connection_init", "payload": payload}))
                try:
                    answer: dict[str, Any] = json.loads(await socket.recv())
                except ConnectionClosed as closed:
                    return closed.rcvd.code if closed.rcvd else 0
                return answer

        ack = {"type": "connection_ack"}
        assert await opened({"Authorization": f"Bearer {token('jobs:read')}"}) == ack
        assert await opened({}, **bearer("jobs:read")) == ack
        assert await opened({}) == 4403
        assert await opened({"Authorization": f"Bearer {token(exp=1)}"}) == 4403
        assert await opened({"Authorization": 7}) == 4403


@asynccontextmanager
async def subscribing(
    address: str,
) -> AsyncIterator[tuple[ClientConnection, Callable[..., Awaitable[None]]]]:
    """A WebSocket for GraphQL, and a function that sends a message of these fields on it."""
    subprotocol = Subprotocol("graphql-transport-ws")
    async with connect(f"ws://{address}/graphql", subprotocols=[subprotocol]) as socket:

        async def send(**message: Any) -> None:
            await socket.send(json.dumps(message))

        yield socket, send


async def until_closed(socket: ClientConnection) -> tuple[list[Any], int, str]:
    """The messages until the server closes the connection, and with which code and reason."""
    received = []
    try:
        while True:
            received.append(json.loads(await socket.recv()))
    except ConnectionClosed as closed:
        return received, closed.rcvd.code if closed.rcvd else 0, socket.close_reason or ""


async def test_a_websocket_is_closed_once_its_token_has_expired(database_url: str) -> None:
    """An error would end the subscriptions of clients of graphql-ws; after 4403 they connect with
    the token of the moment, and subscribe again."""
    async with (
        serving(database_url, "--no-worker", **AUTH, auth_leeway_seconds="0") as (address, _),
        subscribing(address) as (socket, send),
        asyncio.timeout(20),
    ):
        short = bearer("jobs:read", exp=time.time() + 1.5)
        await send(type="connection_init", payload=short)
        for operation_id in ("1", "2"):
            await send(type="subscribe", id=operation_id, payload={"query": EVENTS})
        received, code, reason = await until_closed(socket)
    assert received == [{"type": "connection_ack"}]
    assert (code, reason) == (4403, "The token has expired.")


@pytest.mark.slow
async def test_an_operation_after_the_token_has_expired_closes_the_websocket_once_others_ended(
    database_url: str,
) -> None:
    async with (
        serving(database_url, "--no-worker", **AUTH, auth_leeway_seconds="0") as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
        subscribing(address) as (socket, send),
        asyncio.timeout(20),
    ):
        job = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
        stored = await client.post("/jobs", json=job, headers=bearer("jobs:enqueue"))
        wait = "query ($id: ID!) { awaitJob(id: $id, timeoutSeconds: 3) { __typename } }"
        variables = {"id": stored.json()["jobId"]}
        short = bearer("jobs:read", exp=time.time() + 2)
        await send(type="connection_init", payload=short)
        await send(type="subscribe", id="1", payload={"query": wait, "variables": variables})
        await asyncio.sleep(2.2)
        await send(type="subscribe", id="2", payload={"query": "{ __typename }"})
        received, code, reason = await until_closed(socket)
    data = {"awaitJob": {"__typename": "Job"}}
    assert received == [
        {"type": "connection_ack"},
        {"type": "next", "id": "1", "payload": {"data": data}},
        {"type": "complete", "id": "1"},
    ]
    assert (code, reason) == (4403, "The token has expired.")


async def test_a_subscription_has_only_events_of_the_callers_job_types_and_ends_with_its_token(
    database_url: str,
) -> None:
    async with (
        serving(database_url, "--no-worker", **AUTH, auth_leeway_seconds="0") as (address, _),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
        asyncio.timeout(20),
    ):
        ends = {"exp": time.time() + 3, "jobs:types": ["test.ping", "payout.execute"]}
        headers = bearer("jobs:read", **ends) | {"accept": "text/event-stream"}
        messages = []
        async with client.stream(
            "POST", "/graphql", json={"query": EVENTS}, headers=headers
        ) as events:
            lines = events.aiter_lines()
            await asyncio.sleep(0.3)
            for job in (
                {"type": "thumbnail.create", "payload": {"assetId": "a", "versionNumber": 1}},
                {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}},
            ):
                await client.post("/jobs", json=job, headers=bearer("jobs:enqueue"))
            async for line in lines:
                messages.append(line)
    answered = [json.loads(line[6:]) for line in messages if line.startswith("data: ")]
    assert answered[0] == {"data": {"jobEvents": {"name": "job.created", "type": "payout.execute"}}}
    assert len(answered) == 1
    # It has not failed: its client connects again, with the token of the moment.
    assert "event: complete" not in messages


# Rates


async def test_a_caller_is_slowed_down_and_the_others_are_not(visit: Visit) -> None:
    async with visit(**AUTH, rate_limit="3/minute,100/hour") as client:
        ada, bob = bearer("jobs:read"), bearer("jobs:read", sub="bob")
        statuses = [
            (await graphql(client, "{ __typename }", headers)).status_code
            for headers in (ada, ada, bob, ada, ada)
        ]
        refused = await graphql(client, "{ __typename }", ada)
        rest = await client.get("/jobs/a", headers=ada)
        strangers = [(await graphql(client, "{ __typename }", {})).status_code for _ in range(5)]
        health = await client.get("/healthz")
    assert statuses == [200, 200, 200, 200, 429]
    assert codes(refused) == ["rate_limited"]
    assert refused.json()["errors"][0]["message"].startswith("At most 3 requests per minute")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (rest.status_code, rest.json()["error"]["code"]) == (429, "rate_limited")
    assert strangers == [401, 401, 401, 429, 429]
    assert health.status_code == 200


async def test_without_authentication_the_rate_is_that_of_an_address(visit: Visit) -> None:
    async with visit(rate_limit="2/minute") as client:
        statuses = [(await graphql(client, "{ __typename }", {})).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


async def test_a_stranger_who_has_used_up_its_limit_costs_no_verification(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    decode = jwt.decode

    def counted(*arguments: Any, **options: Any) -> Any:
        verified.append(1)
        return decode(*arguments, **options)

    async with visit(**AUTH, rate_limit="5/minute") as client:
        known = bearer("jobs:read")
        assert (await graphql(client, "{ __typename }", known)).status_code == 200
        monkeypatch.setattr(jwt, "decode", counted)
        statuses = [
            (await graphql(client, "{ __typename }", bearer(sub=f"s{n}", aud="x"))).status_code
            for n in range(20)
        ]
        # The token is known: a stranger behind the same proxy does not shut it out.
        assert (await graphql(client, "{ __typename }", known)).status_code == 200
    assert statuses == [401] * 5 + [429] * 15
    assert len(verified) <= 5


async def test_websockets_that_are_not_acknowledged_count_for_their_address(
    database_url: str,
) -> None:
    async with serving(database_url, "--no-worker", **AUTH, rate_limit="5/minute") as (address, _):

        async def opened(first: str) -> int:
            """The status of the handshake of a connection that sends this and is closed."""
            try:
                async with connect(
                    f"ws://{address}/graphql",
                    subprotocols=[Subprotocol("graphql-transport-ws")],
                ) as socket:
                    await socket.send(first)
                    await socket.wait_closed()
            except InvalidStatus as refused:
                return refused.response.status_code
            return 101

        for first in ("nonsense", '{"type": "connection_init"}', '{"type": "subscribe"}') * 2:
            last = await opened(first)
        assert last == 429 or await opened("nonsense") == 429


def test_the_memory_of_rates_does_not_grow_with_callers() -> None:
    rates = Rates([parse_rate("2/day")])
    for number in range(3 * MAX_CALLERS):
        rates.count(f"address {number}")
    tracemalloc.start()
    try:
        for number in range(MAX_CALLERS):
            rates.count(f"address x{number}")
        assert tracemalloc.get_traced_memory()[0] < 1_000 * MAX_CALLERS
    finally:
        tracemalloc.stop()


def test_a_caller_may_go_on_as_the_window_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr("job_registry_api.rates.time.monotonic", lambda: now)
    rates = Rates([parse_rate("10/second"), parse_rate("100/hour")])
    assert [rates.count("a") for _ in range(10)] == [None] * 10
    exceeded = rates.count("a")
    assert exceeded is not None
    assert 0 < exceeded.seconds <= 1
    assert rates.count("b") is None
    now = 1_001.5
    assert [rates.count("a") is None for _ in range(6)] == [True] * 5 + [False]
    now = 1_004.0
    for second in range(1_000):
        now = 1_004.0 + second
        rates.count("a")
    exceeded = rates.count("a")
    assert exceeded is not None
    assert exceeded.limit.amount == 100


def test_the_addresses_of_one_ipv6_network_are_counted_together() -> None:
    async def status(client: str, authenticator: Authenticator) -> str:
        scope = {"type": "http", "headers": [(b"host", b"localhost")], "client": (client, 1)}
        try:
            await authenticator.authenticate(scope)
        except TooManyRequests:
            return "refused"
        except Forbidden:  # Without authentication they are counted, and not served.
            return "counted"
        return "served"

    authenticator = Authenticator(None, [parse_rate("1/hour")])
    for client, expected in (
        ("2001:db8::1", "counted"),
        ("2001:db8::ffff:1", "refused"),
        ("2001:db8:0:1::1", "counted"),
        ("192.0.2.1", "counted"),
        ("192.0.2.2", "counted"),
        ("::ffff:192.0.2.1", "refused"),
    ):
        assert asyncio.run(status(client, authenticator)) == expected, client
