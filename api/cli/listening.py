"""The socket that `serve` and the health of `worker` listen on."""

from __future__ import annotations

import socket
from errno import EADDRINUSE

from job_registry_api.cli.output import REFUSED, fail


def listen(host: str, port: int, chosen_by: str) -> socket.socket:
    """Return a socket that listens on an address. End the command if the address is taken.

    `chosen_by` names the options that choose the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        advice = f" Choose another port with {chosen_by}." if error.errno == EADDRINUSE else ""
        fail(REFUSED, f"Cannot listen on {host}:{port}: {error.strerror}.{advice}")
    return bound


def address_of(bound: socket.socket) -> str:
    """Return the address of a socket in the form of a URL."""
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
