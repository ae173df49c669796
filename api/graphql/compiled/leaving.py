"""The exceptions by which an operation is not compiled, or leaves the compiled way."""

from __future__ import annotations


class NotCompiled(Exception):
    """Raised while an operation is compiled: it has something that only graphql-core executes."""


class Odd(Exception):
    """Raised while a compiled operation is executed: only graphql-core knows what comes of this."""
