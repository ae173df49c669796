"""Compression of large answers, with Brotli or gzip."""

from __future__ import annotations

import asyncio
import os
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENCODINGS: Final = ("br", "gzip")
"""The encodings, the preferred one first: if the client prefers none of them, it is taken."""

THREAD_BYTES: Final = 65_536
"""Answers of this size and more are compressed in a thread: it takes a millisecond or more."""

_COMPRESSIBLE: Final = re.compile(r"text/(?!event-stream)|application/(.+\+)?(json|javascript)\b")
"""Event streams are not, because an event would wait for the next one in the compressor."""

Compress = Callable[[bytes, bool], bytes]
"""Takes the next part of an answer, and whether it is the last. Returns compressed bytes."""


class Compression:
    """Middleware that compresses answers of `min_bytes` and more, as Accept-Encoding allows."""

    def __init__(self, app: ASGIApp, *, min_bytes: int) -> None:
        self._app = app
        self._min_bytes = min_bytes
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, "compression")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = None
        if scope["type"] == "http":
            encoding = preferred_encoding(
                ",".join(Headers(scope=scope).getlist("accept-encoding")).lower()
            )
        if encoding is None:
            await self._app(scope, receive, send)
            return

        start: Message | None = None
        compress: Compress | None = None
        in_thread = False

        async def send_compressed(message: Message) -> None:
            nonlocal start, compress, in_thread
            if message["type"] == "http.response.start" and _is_compressible(message):
                start = message  # It depends on the size of the answer.
                return
            if message["type"] == "http.response.body":
                body, more = message.get("body", b""), message.get("more_body", False)
                if start is not None:
                    headers = MutableHeaders(scope=start)
                    size = int(headers.get("content-length", 0)) if more else len(body)
                    if size >= self._min_bytes:
                        compress, in_thread = _compressor(encoding), size >= THREAD_BYTES
                if compress is not None:
                    body = await self._compressed(compress, body, more, in_thread)
                    message = {**message, "body": body}
                if start is not None:
                    if compress is not None:
                        _describe(headers, encoding, None if more else len(body))
                    await send(start)
                    start = None
            await send(message)

        await self._app(scope, receive, send_compressed)

    async def _compressed(
        self, compress: Compress, body: bytes, more: bool, in_thread: bool
    ) -> bytes:
        if not in_thread:
            return compress(body, not more)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, compress, body, not more)


def preferred_encoding(accepted: str) -> str | None:
    """Return the encoding that a client prefers by its Accept-Encoding, in lower case.

    Return None if it takes neither, or prefers the answer as it is (RFC 9110, section 12.5.3).
    """
    weights: dict[str, float] = {}
    for entry in accepted.split(","):
        name, _, weight = entry.partition(";")
        weights[name.strip().replace("x-gzip", "gzip")] = _weight(weight)
    others = weights.get("*", 0.0)
    best = max(ENCODINGS, key=lambda each: weights.get(each, others))
    weight_of_best = weights.get(best, others)
    return best if weight_of_best > 0 and weight_of_best >= weights.get("identity", 0.0) else None


def _weight(parameter: str) -> float:
    """Return the weight in a parameter such as `q=0.5`: 1 without one, 0 if it is not valid."""
    name, _, value = parameter.replace(" ", "").partition("=")
    if not name:
        return 1.0
    return float(value) if name == "q" and re.fullmatch(r"[01](\.\d{0,3})?", value) else 0.0


def _is_compressible(start: Message) -> bool:
    headers = Headers(scope=start)
    return (
        start["status"] != 206
        and "content-encoding" not in headers
        and _COMPRESSIBLE.match(headers.get("content-type", "")) is not None
    )


def _describe(headers: MutableHeaders, encoding: str, size: int | None) -> None:
    """Set the headers of a compressed answer, of a size that may not be known yet."""
    headers["content-encoding"] = encoding
    if size is None:
        del headers["content-length"]
    else:
        headers["content-length"] = str(size)
    etag = headers.get("etag", "")
    if etag.startswith('"'):
        # A strong one names the very bytes of an answer.
        headers["etag"] = f"W/{etag}"


def _compressor(encoding: str) -> Compress:
    if encoding == "gzip":
        gzip = zlib.compressobj(5, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        return lambda body, is_last: gzip.compress(body) + (gzip.flush() if is_last else b"")
    # Imported here, because compression is off by default.
    import brotli

    # Quality 4 costs about as much CPU time as gzip at 5. The window of 512 KB, 2^19, bounds the
    # memory of each answer.
    br = brotli.Compressor(quality=4, lgwin=19)
    return lambda body, is_last: br.process(body) + (br.finish() if is_last else b"")
