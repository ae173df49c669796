"""An HTTP request to another server, within bounds. Redirects are not followed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import h11

_ACCEPTED: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}


class Answer(NamedTuple):
    """The answer of a server."""

    status: int
    body: bytes


async def fetch(
    url: str,
    tls: ssl.SSLContext | None,
    *,
    seconds: float,
    max_bytes: int,
    headers: Mapping[str, str] = {},
    posted: bytes | None = None,
) -> Answer:
    """Return what a URL answers to a GET, or to a POST of `posted`.

    `tls` is needed for an `https://` URL. `seconds` bounds the whole exchange, and `max_bytes` the
    body of the answer.

    Raises:
        OSError: the server cannot be reached, or takes too long.
        h11.ProtocolError: the answer is not HTTP.
        ValueError: the answer is too large.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _exchange(url, tls, max_bytes, headers, posted)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None


async def _exchange(
    url: str,
    tls: ssl.SSLContext | None,
    max_bytes: int,
    headers: Mapping[str, str],
    posted: bytes | None,
) -> Answer:
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    sent = {"Host": parts.netloc.rpartition("@")[2], **_ACCEPTED, "Connection": "close", **headers}
    if posted is not None:
        sent["Content-Length"] = str(len(posted))
    method = "GET" if posted is None else "POST"
    connection = h11.Connection(h11.CLIENT)
    request = b"".join(
        connection.send(event) or b""
        for event in (
            h11.Request(method=method, target=target, headers=[*sent.items()]),
            h11.Data(posted or b""),
            h11.EndOfMessage(),
        )
    )
    body = bytearray()
    status = 0
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if tls else 80), ssl=tls
    )
    try:
        writer.write(request)
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65_536))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > max_bytes:
                    raise ValueError(f"expected at most {max_bytes:,} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, bytes(body))
    finally:
        # Not awaited: the other side may never answer the end of TLS.
        writer.close()
