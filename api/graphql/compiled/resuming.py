"""Continues a direct call of a resolver through the layers that the call left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import isawaitable
from typing import Any, Final

from strawberry.extensions import FieldExtension

from job_registry_api.graphql.compiled.outputs import Call

_resumed: Final[ContextVar[Call | None]] = ContextVar("resumed_call", default=None)


@contextmanager
def resuming(call: Call) -> Iterator[None]:
    """Let the field that is resolved in this context use the outcome of a direct call."""
    token = _resumed.set(call)
    try:
        yield
    finally:
        _resumed.reset(token)


class Resumable(FieldExtension):
    """The outermost extension of async fields whose resolvers are called directly.

    Its `resolve_async` calls `call_before` first, and does nothing else if there was a call.
    """

    def call_before(self) -> Call | None:
        """Return the direct call whose outcome the field must use; None if there was none."""
        return _resumed.get()

    async def outcome_of(self, call: Call, arguments: Mapping[str, Any]) -> Any:
        """Return, or raise, what the resolver has returned or raised in a direct call."""
        call.converted_again = dict(arguments)
        if call.error is not None:
            raise call.error
        return await call.value if isawaitable(call.value) else call.value
