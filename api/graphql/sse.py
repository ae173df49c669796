"""Results of operations as server-sent events: the "distinct connections mode" of GraphQL over SSE.

https://github.com/enisdenjo/graphql-sse/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

from starlette.types import Receive, Send

from job_registry_api.answer_text import json_in_pieces
from job_registry_api.http_messages import wait_for_disconnect

EVENT_STREAM: Final = b"text/event-stream"
KEEP_ALIVE_SECONDS: Final = 15.0
"""How long a stream sends nothing. Proxies end connections without data after a while."""


async def send_events(
    receive: Receive, send: Send, contents: AsyncGenerator[dict[str, Any]], ended: asyncio.Event
) -> None:
    """Send each content as an event, until they end or the client hangs up.

    Once the server stops, which sets `ended`, a subscription ends without `complete`: it has not
    failed, and its client connects again.
    """
    headers = [
        (b"content-type", EVENT_STREAM + b"; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    gone = asyncio.ensure_future(wait_for_disconnect(receive))
    following: asyncio.Future[dict[str, Any]] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(contents))
            await asyncio.wait(
                (following, gone),
                timeout=KEEP_ALIVE_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if gone.done():
                return
            if not following.done():
                await _send_text(send, b":\n\n")
                continue
            try:
                content = following.result()
            except StopAsyncIteration:
                break
            following = None
            if "data" not in content and ended.is_set():
                await send({"type": "http.response.body", "body": b""})
                return
            await _send_text(send, b"event: next\ndata: " + await json_in_pieces(content) + b"\n\n")
        await _send_text(send, b"event: complete\ndata:\n\n")
        await send({"type": "http.response.body", "body": b""})
    finally:
        gone.cancel()
        if following is not None:
            following.cancel()
            await asyncio.wait([following])
        await contents.aclose()


async def _send_text(send: Send, text: bytes) -> None:
    await send({"type": "http.response.body", "body": text, "more_body": True})
