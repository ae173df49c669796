"""The exceptions that prevent the compilation of an operation, or end a compiled execution."""

from __future__ import annotations


class NotCompiled(Exception):
    """Raised while an operation is compiled: it has a part that only graphql-core executes."""


class Odd(Exception):
    """Raised while a compiled operation is executed: a value is unexpected, and graphql-core
    executes the operation instead."""
