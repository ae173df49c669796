"""Results of operations as server-sent events: the "distinct connections mode" of GraphQL over SSE.

https://github.com/enisdenjo/graphql-sse/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from starlette.types import Receive, Send

from job_registry_api.graphql.request_errors import token_fault
from job_registry_api.graphql.shared_events import Answers
from job_registry_api.http_messages import wait_for_disconnect

EVENT_STREAM: Final = b"text/event-stream"
KEEP_ALIVE_SECONDS: Final = 15.0
"""How long a stream sends nothing. Proxies end connections without data after a while."""


async def send_events(
    receive: Receive, send: Send, results: AsyncGenerator[Answers], ended: asyncio.Event
) -> None:
    """Send each result as an event, until they end or the client hangs up.

    Once the server stops, which sets `ended`, or the token is not valid any more, a subscription
    ends without `complete`: it has not failed, and its client connects again, with the token that
    it has then.
    """
    headers = [
        (b"content-type", EVENT_STREAM + b"; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    sending = asyncio.ensure_future(_send_all(send, results, ended))
    gone = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        while not (sending.done() or gone.done()):
            done, _ = await asyncio.wait(
                (sending, gone),
                timeout=KEEP_ALIVE_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                await _send_text(send, b":\n\n")
        if sending.done():
            sending.result()
    finally:
        gone.cancel()
        sending.cancel()
        await asyncio.wait((sending,))
        await results.aclose()


async def _send_all(send: Send, results: AsyncGenerator[Answers], ended: asyncio.Event) -> None:
    async for answers in results:
        errors = answers.each[-1].errors
        if errors is not None and (ended.is_set() or token_fault(errors) is not None):
            break
        await _send_text(send, answers.as_events)
    else:
        await _send_text(send, b"event: complete\ndata:\n\n")
    await send({"type": "http.response.body", "body": b""})


async def _send_text(send: Send, text: bytes) -> None:
    await send({"type": "http.response.body", "body": text, "more_body": True})
