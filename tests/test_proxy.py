"""The proxy that other tests fail the network with does what they rely on."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.proxy import Proxy


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1_000):
            self.request.sendall(data)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with Proxy(f"postgresql://u:p@127.0.0.1:{server.server_address[1]}/d?x=1") as proxy:
            yield proxy
        server.shutdown()


async def echoed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, word: bytes) -> bytes:
    writer.write(word)
    return await asyncio.wait_for(reader.read(1_000), 0.3)


async def test_it_passes_stalls_and_resumes(proxy: Proxy) -> None:
    assert proxy.url == f"postgresql://u:p@127.0.0.1:{proxy.port}/d?x=1"
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await echoed(reader, writer, b"one") == b"one"
    proxy.stall()
    with pytest.raises(TimeoutError):
        await echoed(reader, writer, b"two")
    proxy.resume()
    assert await asyncio.wait_for(reader.read(1_000), 5) == b"two"
    writer.close()


async def test_a_black_hole_drops_old_connections_for_good_and_reports_nothing(
    proxy: Proxy,
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await echoed(reader, writer, b"one") == b"one"
    proxy.black_hole()
    other = await asyncio.open_connection("127.0.0.1", proxy.port)
    for connection in ((reader, writer), other):
        with pytest.raises(TimeoutError):
            await echoed(*connection, b"two")
    proxy.resume()
    with pytest.raises(TimeoutError):
        await echoed(reader, writer, b"three")
    third = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await echoed(*third, b"four") == b"four"
    assert proxy.connections == 3
    for each in (writer, other[1], third[1]):
        each.close()


async def test_a_cut_resets_connections(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await echoed(reader, writer, b"one") == b"one"
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1_000), 5)
    writer.close()
    proxy.resume()
    again = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await echoed(*again, b"two") == b"two"
    again[1].close()
