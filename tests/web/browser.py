"""A real browser that may reach this machine only."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
from playwright.async_api import Page, async_playwright

BROWSER: Final = shutil.which("chromium")

needs_browser: Final = pytest.mark.skipif(
    BROWSER is None, reason="there is no browser: install Debian's package chromium"
)


@asynccontextmanager
async def browsing(address: str, *, loses_connections: bool = False) -> AsyncIterator[Page]:
    """A page whose browser cannot reach, and does not even try to reach, another host.

    It has no console errors and no uncaught exceptions. If it `loses_connections` on purpose,
    messages about them are ignored.
    """
    faults: list[str] = []
    elsewhere: list[str] = []

    def note(fault: str) -> None:
        if not (loses_connections and re.search("net::ERR_|Socket", fault)):
            faults.append(fault)

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=BROWSER,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        page = await browser.new_page(viewport={"width": 1400, "height": 900})
        page.on(
            "console",
            lambda said: note(said.text) if said.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: note(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((f"http://{address}/", "data:", "blob:"))
                else elsewhere.append(request.url)
            ),
        )
        page.set_default_timeout(15_000)
        yield page
        await browser.close()
    assert faults == [], faults
    assert elsewhere == []
