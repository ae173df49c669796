"""The job types of a running server, read over its GraphQL API."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic_core import to_json

from job_registry.errors import shortened, shortened_text
from job_registry.json_values import NotJson, parse_json
from job_registry.lock import Lock, ReleasedType
from job_registry.payload_schema import demands_of
from job_registry_api.fetching import Answer, fetch

SERVER_SECONDS: Final = 10.0
"""How long the whole exchange with the server may take."""

MAX_ANSWER_BYTES: Final = 32 * 1024 * 1024

_QUERY: Final = """{ jobTypes {
  name hasHandler fingerprint payloadSchema counts { running }%s
  policy { maxAttempts timeoutSeconds concurrencyLimit backoff { baseSeconds capSeconds }%s } } }"""

QUERIES: Final = (_QUERY % (" formerNames", " onMismatch"), _QUERY % ("", ""))
"""The query for a server of this version, and for one without parking and former names."""


class ServerFailed(Exception):
    """Raised when the job types of a server cannot be read. Its message is for people."""


@dataclass(frozen=True, slots=True)
class ServerTypes:
    """The job types of a server, without its GraphQL schema, and how many jobs of each run now."""

    lock: Lock
    running: Mapping[str, int]


def read_server(url: str, token: str | None) -> ServerTypes:
    """Return the job types of the server at a URL. Without a path, it is that of `/graphql`.

    Raises:
        ServerFailed: the URL is wrong, or the server does not answer in time or as expected.
    """
    if "@" in url:
        raise ServerFailed("Expected a URL without a user and a password. Use --token.")
    if not _is_http_url(url):
        raise ServerFailed(f"Expected a URL such as https://jobs.example.com; got {url}.")
    parts = urlsplit(url)
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ServerFailed("The token has characters that a header cannot have.")
    if parts.path in ("", "/"):
        url = parts._replace(path="/graphql").geturl()
    try:
        return asyncio.run(_job_types(url, token))
    except ServerFailed as failed:
        raise ServerFailed(f"{parts.hostname}: {failed}") from None


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # Of the host or of the port.
        return False
    return is_whole and url.isascii() and url.isprintable() and " " not in url


async def _job_types(url: str, token: str | None) -> ServerTypes:
    answer: Any = None
    for query in QUERIES:
        answer = await _answer(url, token, query)
        data = answer.get("data")
        listed = data.get("jobTypes") if isinstance(data, dict) else None
        if isinstance(listed, list):
            try:
                released = {each["name"]: _released(each) for each in listed}
                running = {each["name"]: int(each["counts"]["running"]) for each in listed}
            except (KeyError, TypeError, ValueError):
                raise ServerFailed("Its job types do not have the expected form.") from None
            return ServerTypes(Lock(released), running)
    raise ServerFailed(f"It did not return its job types. {_message(answer)}")


async def _answer(url: str, token: str | None, query: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        tls = ssl.create_default_context() if url.startswith("https:") else None
        answer = await fetch(
            url, tls, seconds=SERVER_SECONDS, max_bytes=MAX_ANSWER_BYTES, headers=headers,
            posted=to_json({"query": query}),
        )  # fmt: skip
    except Exception as error:
        raise ServerFailed(_reason(error)) from error
    return _document(answer)


def _document(answer: Answer) -> dict[str, Any]:
    try:
        document = parse_json(answer.body, "The answer")
    except NotJson:
        document = None
    if not isinstance(document, dict):
        raise ServerFailed(
            f"Expected an answer in JSON from a GraphQL API; got the HTTP status {answer.status}"
            f" and {shortened(answer.body[:60].decode(errors='replace'))}."
        )
    return document


def _message(answer: dict[str, Any]) -> str:
    """Return the message of the first error in an answer."""
    match answer.get("errors"):
        case [{"message": str(message)}, *_]:
            return shortened_text(message)
    return "Its answer has no error message."


def _reason(error: Exception) -> str:
    match error:
        case TimeoutError():
            return f"No answer within {SERVER_SECONDS:g} seconds."
        case ssl.SSLError():
            return f"The TLS connection failed: {error.reason or error}."
        case OSError():
            return f"The server cannot be reached: {error.strerror or error}."
    return f"The answer cannot be read: {error}."


def _released(listed: dict[str, Any]) -> ReleasedType:
    return ReleasedType(
        fingerprint=listed["fingerprint"],
        has_handler=listed["hasHandler"],
        payload_schema=demands_of(listed["payloadSchema"]),
        policy=listed["policy"],
        former_names=listed.get("formerNames", []),
    )
