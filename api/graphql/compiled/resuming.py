"""Continues a direct call of a resolver through the layers that the call left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from strawberry import Info
from strawberry.extensions import FieldExtension

from job_registry_api.graphql.compiled.outputs import Call


class Resumed:
    """A direct call whose outcome is used, and the `arguments` of the layers that use it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.arguments: dict[str, Any] | None = None


_resumed: Final[ContextVar[Resumed | None]] = ContextVar("resumed", default=None)


@contextmanager
def resuming(call: Call) -> Iterator[Resumed]:
    """Let the field that is resolved in this context use the outcome of a direct call."""
    resumed = Resumed(call)
    token = _resumed.set(resumed)
    try:
        yield resumed
    finally:
        _resumed.reset(token)


class Resumable(FieldExtension):
    """The outermost extension of fields whose resolvers are called directly.

    Its `resolve` and `resolve_async` call `call_before` first, and do nothing else if there was a
    call. An extension that only checks overrides `check`, which direct calls use instead of them.
    """

    def check(self, source: Any, info: Info[Any, Any]) -> None:
        """Check whether the field may be resolved; raise an error otherwise.

        A field that has not begun to be resolved may be checked again.
        """

    def call_before(self) -> Resumed | None:
        """Return the direct call whose outcome the field must use; None if there was none."""
        return _resumed.get()

    def outcome_of(self, before: Resumed, arguments: Mapping[str, Any]) -> Any:
        """Return, or raise, what the resolver has returned or raised in a direct call."""
        before.arguments = dict(arguments)
        if before.call.error is not None:
            raise before.call.error
        return before.call.value
