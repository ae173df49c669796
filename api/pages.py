"""The pages for browsers, built by Vite from `api/web/`: GraphiQL and its assets."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DIST: Final = Path(__file__).parent / "web" / "dist"
"""Where `make install` builds the pages if Node is installed. The wheel contains them."""

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

_MISSING: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Job Registry: GraphQL</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto }
  pre { background: #f4f4f6; padding: 1rem; overflow: auto; border-radius: .4rem }
</style>
<h1>Job Registry</h1>
<p>GraphiQL is not built: install Node 20.19 or newer and run <code>make install</code>.</p>
<p>The API works without it. Send it a query as JSON:</p>
<pre>curl http://localhost:8000/graphql --json '{"query":
  "{ jobTypes { name description policy { maxAttempts timeoutSeconds concurrencyLimit } } }"}'</pre>
<p><code>job-registry schema</code> prints the whole schema, with its documentation.</p>
</html>
"""


def graphiql(dist: Path = DIST) -> ASGIApp:
    """Return the page of GET /graphql: GraphiQL, or how to build it."""
    index = dist / "index.html"
    text = index.read_text() if index.is_file() else _MISSING
    return Response(text, media_type="text/html", headers=_PAGE_HEADERS)


def root() -> ASGIApp:
    """Return the redirect from / to GraphiQL, relative, so that it works below any prefix."""
    return RedirectResponse("graphql")


def assets(dist: Path = DIST) -> list[BaseRoute]:
    """Return the routes of the page's assets; none if the page is not built."""
    folder = dist / ASSETS
    if not folder.is_dir():
        return []
    return [Mount(f"/{ASSETS}", _Immutable(directory=folder))]


class _Immutable(StaticFiles):
    """Files whose names change with their content."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_lasting(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (200, 206, 304):
                message["headers"] += [
                    (b"cache-control", b"public, max-age=31536000, immutable"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await super().__call__(scope, receive, send_lasting)
