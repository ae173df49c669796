"""The socket that `serve` and the health of `worker` listen on."""

from __future__ import annotations

import socket
import sys
from errno import EADDRINUSE

from job_registry_api.cli.output import REFUSED, fail


def listen(host: str, port: int, chosen_by: str) -> socket.socket:
    """Return a socket that listens on an address. End the command if the address is taken.

    `chosen_by` names the options that choose the port.
    """
    return _listen(host, port, chosen_by, shared=False)


def listen_together(host: str, port: int, count: int, chosen_by: str) -> list[socket.socket]:
    """Return a socket for each of `count` processes, all of the same address.

    The first one listens. The others get connections once their processes listen, when they have
    started: a connection before that would wait for a process that cannot accept it yet.

    On Linux the kernel distributes connections evenly over the sockets. If all processes accept
    from one socket, one process may get nearly all connections of a client (measured: 31 of 32).
    """
    alone = listen(host, port, chosen_by)
    if sys.platform != "linux":
        return [alone] * count
    # It has shown that the address is free: another group of sockets would let these join.
    port = alone.getsockname()[1]
    alone.close()
    return [_listen(host, port, chosen_by, shared=True, now=each == 0) for each in range(count)]


def inherited(descriptor: int) -> socket.socket:
    """Return the socket that another process opened for this one."""
    listening = socket.socket(fileno=descriptor)
    listening.set_inheritable(False)  # Processes of handlers must not hold it open.
    return listening


def _listen(
    host: str, port: int, chosen_by: str, *, shared: bool, now: bool = True
) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
        if now:
            bound.listen(2048)
    except OSError as error:
        bound.close()
        advice = f" Choose another port with {chosen_by}." if error.errno == EADDRINUSE else ""
        fail(REFUSED, f"Cannot listen on {host}:{port}: {error.strerror}.{advice}")
    return bound


def address_of(bound: socket.socket) -> str:
    """Return the address of a socket in the form of a URL."""
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
