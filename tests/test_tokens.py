"""Tokens against their keys: what a stranger, a clock and an outage of the issuer cannot do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from job_registry import JobRegistry
from job_registry_api import auth, signing_keys
from job_registry_api.app import create_app
from job_registry_api.auth import TokenVerifier
from job_registry_api.graphql import subscriptions
from job_registry_api.settings import SettingsInvalid, load_settings
from job_registry_api.signing_keys import FixedKeys, SharedSecret
from tests.http_client import Visit, application_of
from tests.test_auth import AUTH, CLAIMS, ISSUER, SECRET, bearer, claims, graphql, token

KEYS: dict[str, Any] = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("old", "new")}


def public(*names: str) -> bytes:
    keys = [
        json.loads(jwt.get_algorithm_by_name("ES256").to_jwk(KEYS[name].public_key()))
        | {"kid": name}
        for name in names
    ]
    return json.dumps({"keys": keys}).encode()


def signed(name: str, **changed: Any) -> dict[str, str]:
    given = jwt.encode(claims("jobs:read", **changed), KEYS[name], "ES256", headers={"kid": name})
    return {"authorization": f"Bearer {given}"}


def unsigned(key_id: str) -> dict[str, str]:
    """A token that anyone can make."""
    parts = ({"alg": "ES256", "kid": key_id}, claims("jobs:admin"))
    text = ".".join(
        jwt.utils.base64url_encode(json.dumps(part).encode()).decode() for part in parts
    )
    return {"authorization": f"Bearer {text}.AAAA"}


async def status(client: httpx.AsyncClient, headers: dict[str, str]) -> int:
    return (await graphql(client, "{ __typename }", headers)).status_code


class Issuer:
    """Serves a key set. `answer` is what it sends, and `hang` keeps it from sending anything."""

    def __init__(self) -> None:
        self.url = ""
        self.body = public("old")
        self.head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
        self.drip_seconds = 0.0
        self.fetches = 0
        self.at_once = self.most_at_once = 0
        self.free = asyncio.Event()
        self.free.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.fetches += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await self.free.wait()
            for byte in self.head + self.body if self.drip_seconds else ():
                writer.write(bytes([byte]))
                await asyncio.sleep(self.drip_seconds)
            if not self.drip_seconds:
                writer.write(self.head + self.body)
            await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            self.at_once -= 1
            writer.close()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    server = await asyncio.start_server(issuer.answer, "127.0.0.1", 0)
    issuer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
    yield issuer
    issuer.free.set()
    server.close()


@pytest.fixture
def visit_with(issuer: Issuer, visit: Visit) -> Visit:
    """Opens a client of an application that takes its keys from the issuer."""

    @asynccontextmanager
    async def opened(**settings: str) -> AsyncIterator[httpx.AsyncClient]:
        async with visit(auth_jwks=issuer.url, **CLAIMS, **settings) as client:
            yield client

    return opened


# The keys at a URL


async def test_a_token_is_refused_once_its_key_is_removed(
    issuer: Issuer, visit_with: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing_keys, "REFRESH_SECONDS", 0.2)
    async with visit_with() as client:
        headers = signed("old", exp=int(time.time()) + 1_000_000)
        assert await status(client, headers) == 200
        issuer.body = public("new")
        async with asyncio.timeout(5):
            while await status(client, headers) == 200:
                await asyncio.sleep(0.02)
        assert await status(client, headers) == 401
        assert await status(client, signed("new")) == 200


async def test_a_subscription_ends_once_the_key_of_its_token_is_removed(
    issuer: Issuer, visit_with: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing_keys, "REFRESH_SECONDS", 0.2)
    monkeypatch.setattr(subscriptions, "VERIFIED_SECONDS", 0.1)
    async with visit_with() as client:
        headers = signed("old") | {"accept": "text/event-stream"}
        document = {"query": "subscription { jobEvents { name } }"}
        subscribed = asyncio.create_task(client.post("/graphql", json=document, headers=headers))
        await asyncio.sleep(1)
        assert not subscribed.done()
        issuer.body = public("new")
        async with asyncio.timeout(5):
            answer = await subscribed
    assert answer.text == ""


async def test_an_open_websocket_starts_no_operation_once_the_key_of_its_token_is_removed(
    issuer: Issuer, visit_with: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing_keys, "REFRESH_SECONDS", 0.2)
    async with visit_with() as client, asyncio.timeout(10):
        to_server: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        to_client: asyncio.Queue[Any] = asyncio.Queue()

        async def answer(message: dict[str, Any]) -> dict[str, Any]:
            to_server.put_nowait({"type": "websocket.receive", "text": json.dumps(message)})
            while (sent := await to_client.get())["type"] == "websocket.accept":
                pass
            answered: dict[str, Any] = json.loads(sent["text"]) if "text" in sent else sent
            return answered

        async def type_name(operation_id: str) -> str:
            query = {"query": "{ __typename }"}
            subscribe = {"type": "subscribe", "id": operation_id, "payload": query}
            answered = await answer(subscribe)
            if answered["type"] == "next":
                await to_client.get()  # It is complete.
            return json.dumps(answered)

        scope = {
            "type": "websocket",
            "path": "/graphql",
            "headers": [(b"host", b"localhost")],
            "query_string": b"",
            "subprotocols": ["graphql-transport-ws"],
        }
        to_server.put_nowait({"type": "websocket.connect"})
        serving = asyncio.create_task(application_of(client)(scope, to_server.get, to_client.put))
        payload = {"Authorization": signed("old")["authorization"]}
        init = {"type": "connection_init", "payload": payload}
        assert (await answer(init))["type"] == "connection_ack"
        assert '"Query"' in await type_name("1")
        issuer.body = public("new")
        while '"Query"' in (answered := await type_name("2")):
            await asyncio.sleep(0.05)
        closed = json.loads(answered)
        assert (closed["type"], closed["code"]) == ("websocket.close", 4403)
        await serving


async def test_a_token_that_was_valid_is_checked_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = 0
    decode = jwt.decode

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal checked
        checked += 1
        return decode(*arguments, **options)

    monkeypatch.setattr(jwt, "decode", counted)
    verifier = secret_verifier()
    given = f"Bearer {token('jobs:read')}"
    await verifier.verify(given)
    await verifier.verify(given)
    assert checked == 1
    monkeypatch.setattr(auth, "KNOWN_SECONDS", 0.0)
    await verifier.verify(given)
    assert checked == 2


async def test_the_token_that_was_used_longest_ago_is_forgotten_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verifier = secret_verifier()
    first, second, third = (f"Bearer {token(sub=name)}" for name in ("ada", "bob", "cyd"))
    monkeypatch.setattr(auth, "MAX_KNOWN_TOKENS", 2)
    for given in (first, second, first, third):
        await verifier.verify(given)
    assert [verifier.knows(given) for given in (first, second, third)] == [True, False, True]
    # A token that is checked again takes no more room than before.
    monkeypatch.setattr(auth, "KNOWN_SECONDS", 0.0)
    monkeypatch.setattr(auth, "MAX_KNOWN_LENGTH", len(first + third))
    for _ in range(3):
        await verifier.verify(third)
    assert verifier.knows(first)


async def test_an_unknown_key_id_delays_nobody_else(
    issuer: Issuer, visit_with: Visit, let_30_seconds_pass: Callable[[], None]
) -> None:
    async with visit_with() as client:
        assert await status(client, signed("old")) == 200
        issuer.free.clear()
        let_30_seconds_pass()
        stranger = asyncio.create_task(status(client, unsigned("invented")))
        while issuer.at_once == 0:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(1):
            assert await status(client, signed("old")) == 200
            assert await status(client, signed("old", sub="bob")) == 200
        assert not stranger.done()
        issuer.free.set()
        assert await stranger == 401


async def test_an_unknown_key_id_shuts_nobody_out_while_the_keys_cannot_be_fetched(
    issuer: Issuer, visit_with: Visit, let_30_seconds_pass: Callable[[], None]
) -> None:
    async with visit_with() as client:
        assert await status(client, signed("old")) == 200
        issuer.head = b"HTTP/1.1 500 Internal Server Error\r\n\r\n"
        let_30_seconds_pass()
        assert await status(client, unsigned("invented")) == 503
        assert await status(client, signed("old")) == 200
        assert await status(client, signed("old", sub="bob")) == 200


async def test_unknown_key_ids_share_one_fetch_and_then_cause_no_more(
    issuer: Issuer,
    visit_with: Visit,
    let_30_seconds_pass: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with visit_with() as client:
        assert await status(client, signed("old")) == 200
        let_30_seconds_pass()
        issuer.free.clear()
        strangers = [
            asyncio.create_task(status(client, unsigned(f"invented {n}"))) for n in range(20)
        ]
        await asyncio.sleep(0.2)
        monkeypatch.setattr(signing_keys, "UNKNOWN_ID_SECONDS", 30.0)
        issuer.free.set()
        assert await asyncio.gather(*strangers) == [401] * 20
        for n in range(20):
            assert await status(client, unsigned(f"more {n}")) == 401
    assert issuer.fetches == 2
    assert issuer.most_at_once == 1


async def test_a_new_key_is_fetched_when_a_token_names_it(
    issuer: Issuer, visit_with: Visit, let_30_seconds_pass: Callable[[], None]
) -> None:
    async with visit_with() as client:
        assert await status(client, signed("old")) == 200
        issuer.body = public("old", "new")
        assert await status(client, signed("new")) == 401  # The last fetch is too recent.
        let_30_seconds_pass()
        assert await status(client, signed("new")) == 200
        assert await status(client, signed("old")) == 200


async def test_a_request_that_is_cancelled_leaves_the_fetch_to_the_others(
    issuer: Issuer, visit_with: Visit
) -> None:
    issuer.free.clear()
    async with visit_with() as client:
        first, second = (asyncio.create_task(status(client, signed("old"))) for _ in range(2))
        await asyncio.sleep(0.2)
        first.cancel()
        issuer.free.set()
        assert await second == 200
    assert issuer.fetches == 1


async def test_keys_are_used_for_a_bounded_time_while_fetches_fail(
    issuer: Issuer, visit_with: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing_keys, "KEEP_SECONDS", 0.3)
    async with visit_with() as client:
        assert await status(client, signed("old")) == 200
        issuer.head = b"HTTP/1.1 404 Not Found\r\n\r\n"
        await asyncio.sleep(0.4)
        assert await status(client, signed("old")) == 503


BAD_ANSWERS: dict[str, Callable[[Issuer], None]] = {
    "huge": lambda issuer: vars(issuer).update(body=b" " * 300_000 + public("old")),
    "no JSON": lambda issuer: vars(issuer).update(body=b"<html>"),
    "nested": lambda issuer: vars(issuer).update(body=b"[" * 200_000),
    "no keys": lambda issuer: vars(issuer).update(body=b'{"keys": 1}'),
    "no HTTP": lambda issuer: vars(issuer).update(head=b"220 smtp\r\n\r\n"),
    "cut short": lambda issuer: vars(issuer).update(
        head=b"HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n"
    ),
    "redirect": lambda issuer: vars(issuer).update(
        head=b"HTTP/1.1 302 Found\r\nlocation: /keys\r\n\r\n"
    ),
    "endless header": lambda issuer: vars(issuer).update(
        head=b"HTTP/1.1 200 OK\r\nx: " + b"x" * 100_000
    ),
    "slow": lambda issuer: vars(issuer).update(drip_seconds=0.05),
}


@pytest.mark.cases(3)
@pytest.mark.parametrize("kind", BAD_ANSWERS)
async def test_an_answer_that_is_no_key_set_is_an_outage(
    issuer: Issuer, visit_with: Visit, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing_keys, "FETCH_SECONDS", 1.0)
    BAD_ANSWERS[kind](issuer)
    async with visit_with() as client:
        async with asyncio.timeout(3):
            assert await status(client, signed("old")) == 503
    assert issuer.fetches == 1


@pytest.mark.cases(3)
@pytest.mark.parametrize("kind", BAD_ANSWERS)
async def test_known_keys_outlast_an_answer_that_is_no_key_set(
    issuer: Issuer,
    visit_with: Visit,
    let_30_seconds_pass: Callable[[], None],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signing_keys, "FETCH_SECONDS", 1.0)
    async with visit_with() as client:
        assert await status(client, signed("old")) == 200
        BAD_ANSWERS[kind](issuer)
        let_30_seconds_pass()
        assert await status(client, unsigned("invented")) == 503
        assert await status(client, signed("old")) == 200


async def test_an_issuer_that_withdraws_its_keys_is_obeyed(
    issuer: Issuer, visit_with: Visit, let_30_seconds_pass: Callable[[], None]
) -> None:
    async with visit_with() as client:
        assert await status(client, signed("old")) == 200
        issuer.body = b'{"keys": []}'
        let_30_seconds_pass()
        assert await status(client, unsigned("invented")) == 401
        assert await status(client, signed("old")) == 401


@pytest.fixture
def let_30_seconds_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Ends the pause between two fetches for unknown ids."""
    return lambda: monkeypatch.setattr(signing_keys, "UNKNOWN_ID_SECONDS", 0.0)


# Short keys


def short_and_good() -> str:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    entry = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(short.public_key()))
    KEYS["short"] = short
    return json.dumps({"keys": [entry | {"kid": "short"}, *json.loads(public("old"))["keys"]]})


def test_a_file_with_a_short_rsa_key_stops_the_start(registry: JobRegistry, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(short_and_good())
    settings = load_settings(
        {"JOBS_AUTH_JWKS": str(path), "JOBS_AUTH_ISSUER": ISSUER, "JOBS_AUTH_AUDIENCE": "jobs"}
    )
    expected = 'the RSA key "short" has 1,024 bits; expected 2,048 or more'
    with pytest.raises(SettingsInvalid, match=expected):
        create_app(settings, registry)


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
async def test_a_short_rsa_key_at_a_url_is_refused_and_the_others_are_used(
    issuer: Issuer, visit_with: Visit
) -> None:
    issuer.body = short_and_good().encode()
    forged = jwt.encode(claims("jobs:read"), KEYS["short"], "RS256", headers={"kid": "short"})
    async with visit_with() as client:
        assert await status(client, {"authorization": f"Bearer {forged}"}) == 401
        assert await status(client, signed("old")) == 200


# The cache of tokens


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
async def test_a_file_with_a_private_key_checks_tokens_by_its_public_key(
    visit: Visit, tmp_path: Path, algorithm: str
) -> None:
    key: Any = rsa.generate_private_key(65537, 2_048) if algorithm == "RS256" else KEYS["old"]
    file = tmp_path / "keys.json"
    private = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key))
    file.write_text(json.dumps({"keys": [private]}))
    good = jwt.encode(claims("jobs:read"), key, algorithm)
    async with visit(auth_jwks=str(file), **CLAIMS) as client:
        assert await status(client, {"authorization": f"Bearer {good}"}) == 200
        assert await status(client, {"authorization": f"Bearer {good[:-9]}AAAAAAAAA"}) == 401


def secret_verifier() -> TokenVerifier:
    keys = FixedKeys(SharedSecret(SECRET.encode()))
    return TokenVerifier(keys, issuer=ISSUER, audience="jobs", leeway_seconds=0.0)


@pytest.mark.slow
async def test_the_cache_of_tokens_is_bounded_by_their_number_and_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tracemalloc

    verifier = secret_verifier()
    types = [f"type{n}.{'x' * 40}" for n in range(90)]
    tokens = [
        jwt.encode(claims(sub=f"ada {n}", **{"jobs:types": types}), SECRET, "HS256")
        for n in range(1_000)
    ]
    tracemalloc.start()
    for given in tokens:
        await verifier.verify(f"Bearer {given}")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, tokens)) > 5_000_000
    assert held < 10_000_000


# Claims

NO_TIME = [
    *(1e300, -1, -1e300, 1e15, float("nan"), float("inf"), 10**400),
    *("60", "9" * 20, True, [], {}),
]


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
async def test_a_time_of_a_token_is_a_number_of_seconds(visit: Visit, name: str) -> None:
    async with visit(**AUTH) as client:
        for value in [*NO_TIME, *([None] if name != "exp" else [])]:
            response = await graphql(client, "{ __typename }", with_claims({name: value}))
            assert response.status_code == 401, value
            message = response.json()["errors"][0]["message"]
            assert message in (
                f"The claim {name} is not a time in seconds since 1970.",
                "The token is not valid.",  # An integer of more digits than Python reads.
            ), value
        soon = time.time() + 30.5
        assert await status(client, with_claims({"exp": soon, "nbf": soon - 60, "iat": 0})) == 200


async def test_a_token_from_the_future_is_not_valid_yet(visit: Visit) -> None:
    async with visit(**AUTH) as client:
        for name in ("nbf", "iat"):
            response = await graphql(
                client, "{ __typename }", bearer("jobs:read", **{name: time.time() + 60})
            )
            assert response.json()["errors"][0]["message"] == "The token is not valid yet."


@pytest.mark.cases(5)
@pytest.mark.parametrize(
    "types",
    [None, "test.ping", 7, True, {"test.ping": True}, [None], ["test.ping", 1], [["test.ping"]],
     ["*"], ["test.*"], [""], ["test.ping "], ["test.\u0000ping"], ["\ud800"], ["a" * 101],
     [f"type{n}" for n in range(101)]],
)  # fmt: skip
async def test_a_limit_to_job_types_that_is_not_understood_admits_nobody(
    visit: Visit, types: object
) -> None:
    async with visit(**AUTH) as client:
        response = await graphql(client, "{ __typename }", with_claims({"jobs:types": types}))
    assert response.status_code == 401
    assert "The claim jobs:types " in response.json()["errors"][0]["message"]


async def test_a_limit_to_job_types_may_name_none_unknown_ones_and_a_hundred(visit: Visit) -> None:
    query = "{ jobTypes { name } jobs { nodes { id } } }"
    seen = []
    async with visit(**AUTH) as client:
        for types in ([], ["no.such"], ["test.ping", *(f"type{n}" for n in range(99))]):
            response = await graphql(
                client, query, with_claims({"jobs:types": types, "scope": "jobs:read"})
            )
            seen.append([each["name"] for each in response.json()["data"]["jobTypes"]])
    assert seen == [[], [], ["test.ping"]]


@pytest.mark.cases(6)
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"scope": "jobs:read"}, 200),
        ({"scope": ["jobs:read", "openid"]}, 200),
        ({"scp": ["jobs:read"]}, 200),
        ({"scp": "openid jobs:read"}, 200),
        ({"scope": "", "scp": "jobs:read"}, 403),
        ({"scope": []}, 403),
        ({}, 403),
        ({"scope": None}, 401),
        ({"scope": None, "scp": "jobs:read"}, 401),
        ({"scope": 7}, 401),
        ({"scope": True}, 401),
        ({"scope": {"jobs:read": True}}, 401),
        ({"scope": ["jobs:read", None]}, 401),
        ({"scope": [["jobs:read"]]}, 401),
    ],
)
async def test_scopes_are_a_string_or_a_list_of_strings(
    visit: Visit, changed: dict[str, Any], expected: int
) -> None:
    async with visit(**AUTH) as client:
        response = await client.get("/jobs/a", headers=with_claims(changed, without=("scope",)))
    assert response.status_code == (404 if expected == 200 else expected)


# Tokens that are not tokens


@pytest.mark.parametrize(
    "text",
    [
        "e" * 8_193,
        ".".join([jwt.utils.base64url_encode(b"[" * 6_000).decode(), "e30", "AAAA"]),
        ".".join([jwt.utils.base64url_encode(b'{"alg":' * 800).decode(), "e30", "AAAA"]),
        ".".join([jwt.utils.base64url_encode(b'{"alg":"HS256","kid":7}').decode(), "e30", "AA"]),
        ".".join([jwt.utils.base64url_encode(b'{"alg":[1]}').decode(), "e30", "AA"]),
        ".".join([jwt.utils.base64url_encode(b"7" * 5_000).decode(), "e30", "AA"]),
        "\u00e9.e30.AA",
        "." * 8_000,
        "....",
    ],
)
async def test_what_is_no_token_is_refused_and_is_no_error_of_the_server(
    visit: Visit, text: str
) -> None:
    async with visit(**AUTH) as client:
        headers = [(b"authorization", f"Bearer {text}".encode("latin-1"))]
        response = await client.get("/jobs/a", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "unauthenticated"


async def test_a_token_with_extensions_that_are_not_understood_is_refused(visit: Visit) -> None:
    """RFC 7515, section 4.1.11."""
    given = jwt.encode(claims("jobs:read"), SECRET, "HS256", headers={"crit": ["x"], "x": 1})
    async with visit(**AUTH) as client:
        assert await status(client, {"authorization": f"Bearer {given}"}) == 401


def with_claims(changed: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, str]:
    """A token of these claims, as text: PyJWT itself refuses to make some of them."""
    whole = {k: v for k, v in claims().items() if k not in without} | changed
    text = jwt.api_jws.encode(json.dumps(whole).encode(), SECRET, "HS256")
    return {"authorization": f"Bearer {text}"}


async def test_a_token_may_have_8192_characters_and_not_one_more(visit: Visit) -> None:
    of_length: dict[int, str] = {}
    for size in range(5_900, 6_100):
        # The end of each part in base64 skips one length in four.
        for kid in ("k", "kk", "kkk"):
            padded = claims("jobs:read", padding="x" * size)
            given = jwt.encode(padded, SECRET, "HS256", headers={"kid": kid})
            of_length.setdefault(len(given), given)
    async with visit(**AUTH) as client:
        for length, expected in ((8_191, 200), (8_192, 200), (8_193, 401)):
            assert (
                await status(client, {"authorization": f"Bearer {of_length[length]}"}) == expected
            )
