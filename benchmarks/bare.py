"""The yardstick: a Starlette route that reads JSON and answers JSON, served as the product is."""

from __future__ import annotations

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def echo(request: Request) -> JSONResponse:
    content = await request.json()
    return JSONResponse({"data": {"id": "01a20b59-007a-7389-bb53-785ecafc486c", "of": content}})


async def alive(_request: Request) -> JSONResponse:
    return JSONResponse({})


app = Starlette(routes=[Route("/bare", echo, methods=["POST"]), Route("/healthz", alive)])

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="critical")
