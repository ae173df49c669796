"""A TCP proxy in front of PostgreSQL whose network fails on command.

It runs on a thread and an event loop of its own, so synchronous tests, asynchronous tests and
benchmarks use it alike, and a test that blocks its loop does not stall the network:

    with Proxy(database_url) as proxy:
        database = open_database(proxy.url)
        proxy.black_hole()
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Final, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pytest

Mode = Literal["pass", "stall", "black_hole", "cut"]

_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with a time of zero: closing the socket sends RST."""


class Proxy:
    """A proxy in front of the server that a PostgreSQL URL names. `url` leads through it.

    It begins by passing everything. `connections` counts those it has accepted.
    """

    def __init__(self, url: str) -> None:
        self._target = _target(url)
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._started = threading.Event()
        self._mode: Mode = "pass"
        self._answer_seconds = 0.0
        self._open: set[_Connection] = set()
        self.connections = 0
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._started.wait(5)
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        """The URL of the database, by way of this proxy."""
        parts = urlsplit(self._url)
        options = [(k, v) for k, v in parse_qsl(parts.query) if k not in ("host", "port")]
        credentials = parts.netloc.rpartition("@")[0]
        place = f"{credentials}@127.0.0.1:{self.port}" if credentials else f"127.0.0.1:{self.port}"
        return urlunsplit(parts._replace(netloc=place, query=urlencode(options)))

    @property
    def open_connections(self) -> int:
        """How many connections clients hold at this moment, dead ones included."""
        return len(self._open)

    def resume(self) -> None:
        """Pass everything again. Connections in a black hole stay in it; new ones work."""
        self._set("pass")

    def stall(self) -> None:
        """Hold all bytes back until `resume`; then they arrive, late and in order."""
        self._set("stall")

    def slow_down(self, seconds: float) -> None:
        """From now on, deliver each answer that much later."""
        self._answer_seconds = seconds

    def black_hole(self) -> None:
        """Swallow all bytes of every connection for good, as a firewall that lost its state.

        No FIN and no RST: neither side learns of it. New connections are accepted and swallowed.
        """
        self._set("black_hole")

    def cut(self) -> None:
        """Reset every connection (RST), and every new one as soon as it is made."""
        self._set("cut")

    def _set(self, mode: Mode) -> None:
        def apply() -> None:
            self._mode = mode
            for connection in list(self._open):
                connection.apply(mode)

        self._call(apply)

    def _call(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(function)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(5)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._end.wait()
        server.close()
        while self._open:
            for connection in list(self._open):
                connection.apply("cut")
            await asyncio.sleep(0.01)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(reader, writer, lambda: self._answer_seconds)
        self._open.add(connection)
        try:
            connection.apply(self._mode)
            with suppress(OSError):
                await connection.run(self._target)
        finally:
            self._open.discard(connection)


class _Connection:
    """One client's connection and its other half, to the server."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer_seconds: Callable[[], float],
    ) -> None:
        self._client = reader, writer
        self._answer_seconds = answer_seconds
        self._writers = [writer]
        self._flowing = asyncio.Event()
        self._swallowed = False
        self._reset = False

    def apply(self, mode: Mode) -> None:
        if mode == "black_hole":
            self._swallowed = True
        if mode == "stall":
            self._flowing.clear()
        else:
            self._flowing.set()
        if mode == "cut":
            self._reset = True
            for writer in self._writers:
                _cut(writer)

    async def run(self, target: tuple[str, int] | str) -> None:
        if self._reset:
            return
        reader, writer = await (
            asyncio.open_unix_connection(target)
            if isinstance(target, str)
            else asyncio.open_connection(*target)
        )
        self._writers.append(writer)
        try:
            if self._reset:
                _cut(writer)
            await asyncio.gather(
                self._pump(self._client[0], writer), self._pump(reader, self._client[1])
            )
        finally:
            for each in self._writers:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if reader is not self._client[0] and (seconds := self._answer_seconds()):
                    await asyncio.sleep(seconds)
                await self._flowing.wait()
                if not self._swallowed:
                    writer.write(data)
                    await writer.drain()
        if not self._swallowed:
            # The end of one half ends the other: PostgreSQL has no half-closed connections.
            await self._flowing.wait()
            with suppress(OSError):
                await writer.drain()
            writer.close()


def _cut(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with suppress(OSError):  # A Unix socket has no RST; it is just closed.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _target(url: str) -> tuple[str, int] | str:
    """Where the server of this URL listens: host and port, or the path of a Unix socket."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    host = parts.hostname or options.get("host") or "127.0.0.1"
    port = parts.port or int(options.get("port", 5432))
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)


@pytest.fixture
def proxied(fresh_postgresql_url: str) -> Iterator[Proxy]:
    """A proxy in front of a fresh, migrated PostgreSQL database."""
    with Proxy(fresh_postgresql_url) as proxy:
        yield proxy
