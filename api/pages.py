"""The pages for browsers, built by Vite from `api/web/`: GraphiQL and its assets.

They are looked for with each request until they are there: `make run` builds them while it serves.
"""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import Final

from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DIST: Final = Path(__file__).parent / "web" / "dist"
"""Where `make install` builds the pages if Node is installed. The wheel contains them."""

BUILDING: Final = DIST.parent / "building"
"""This file exists while the pages are being built. In a checkout their sources are beside it."""

BUILD_SECONDS: Final = 600.0
"""An older `BUILDING` was left behind by a build that was killed."""

ASSETS: Final = "graphql/assets"
"""Relative to the page, so that it works below any prefix of a proxy. File names have hashes."""

# The page loads nothing from other hosts and runs no inline script. Monaco, the editor, adds style
# elements.
_PAGE_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self' 'unsafe-inline'",
            "font-src 'self' data:",
            "img-src 'self' data:",
            "connect-src 'self'",
            "worker-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_WITHOUT_GRAPHIQL: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
{reload}<title>Job Registry: GraphQL</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto }}
  pre {{ background: #f4f4f6; padding: 1rem; overflow: auto; border-radius: .4rem }}
</style>
<h1>Job Registry</h1>
<p>{state}</p>
<p>The API works without it. Send it a query as JSON:</p>
<pre>curl {url} --json '{{"query":
  "{{ jobTypes {{ name description policy {{ maxAttempts timeoutSeconds }} }} }}"}}'</pre>
<p><code>job-registry schema</code> prints the whole schema, with its documentation.</p>
</html>
"""

_BUILDING: Final = "GraphiQL is being built. This page reloads until it is there."
_NOT_BUILT: Final = (
    "GraphiQL is not built: install Node 20.19 or newer and run <code>make install</code>."
)
_LEFT_OUT: Final = (
    "This installation has no GraphiQL: its wheel was built with"
    " <code>JOB_REGISTRY_WITHOUT_GRAPHIQL=1</code>. Install a wheel that was built without it,"
    " after <code>make install</code> in a checkout with Node 20.19 or newer."
)
_RELOAD: Final = '<meta http-equiv="refresh" content="2">\n'


def graphiql(dist: Path = DIST, building: Path = BUILDING) -> ASGIApp:
    """Return the page of GET /graphql: GraphiQL, or when or how it is built."""
    index = dist / "index.html"
    built: Response | None = None

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal built
        if built is None and index.is_file():
            built = Response(index.read_text(), media_type="text/html", headers=_PAGE_HEADERS)
        response = built or _without_graphiql(Request(scope).url, building)
        await response(scope, receive, send)

    return page


def _without_graphiql(url: URL, building: Path) -> Response:
    is_being_built = _is_recent(building)
    is_checkout = (building.parent / "package.json").is_file()
    text = _WITHOUT_GRAPHIQL.format(
        reload=_RELOAD if is_being_built else "",
        state=_BUILDING if is_being_built else _NOT_BUILT if is_checkout else _LEFT_OUT,
        url=escape(str(url.replace(query=""))),
    )
    return Response(text, media_type="text/html", headers=_PAGE_HEADERS)


def _is_recent(building: Path) -> bool:
    try:
        return time.time() - building.stat().st_mtime < BUILD_SECONDS
    except OSError:
        return False


def root() -> ASGIApp:
    """Return the redirect from / to GraphiQL, relative, so that it works below any prefix."""
    return RedirectResponse("graphql")


def assets(dist: Path = DIST) -> list[BaseRoute]:
    """Return the routes of the page's assets."""
    return [Mount(f"/{ASSETS}", _Immutable(directory=dist / ASSETS, check_dir=False))]


class _Immutable(StaticFiles):
    """Files whose names change with their content."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_built():
            raise HTTPException(404)

        async def send_lasting(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (200, 206, 304):
                message["headers"] += [
                    (b"cache-control", b"public, max-age=31536000, immutable"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await super().__call__(scope, receive, send_lasting)

    def _is_built(self) -> bool:
        return Path(str(self.directory)).is_dir()
