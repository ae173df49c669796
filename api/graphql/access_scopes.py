"""The access scopes of fields: declared with each field, checked before it resolves.

A field of a guarded type has `Requires` among its extensions, or `OPEN` as its metadata.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import strawberry
from strawberry.types.field import StrawberryField

from job_registry_api.auth import AccessScope, Caller
from job_registry_api.graphql.compiled import Resumable
from job_registry_api.graphql.context import Context, context_of, enter_context

_OPEN: Final = "open"
OPEN: Final = {_OPEN: True}
"""The metadata of a field that is open to every caller who can reach its object."""

GUARDED: Final = ("Query", "Mutation", "Subscription", "Job")
"""The types whose fields declare their access scopes."""


class Requires(Resumable):
    """Requires one of these access scopes of the caller, and says so in the field's description."""

    def __init__(self, *access_scopes: AccessScope) -> None:
        self.access_scopes = access_scopes
        self._sentence = f"Needs the scope {' or '.join(f'`{each}`' for each in access_scopes)}."

    def apply(self, field: StrawberryField) -> None:
        """Complete the description. Strawberry calls this for each schema it builds."""
        description = field.description or ""
        if not description.endswith(self._sentence):
            field.description = f"{description} {self._sentence}".strip()

    def check(self, source: Any, info: strawberry.Info[Any, Any]) -> None:
        """Check the access scopes of the caller.

        Raises:
            Forbidden: the caller has none of them.
        """
        self._check(context_of(info).caller, source)

    def resolve(
        self,
        next_: Callable[..., Any],
        source: object,
        info: strawberry.Info[Context, None],
        **arguments: object,
    ) -> Any:
        """Resolve the field for a caller who may.

        Raises:
            Forbidden: the caller has none of the access scopes.
        """
        before = self.call_before()
        if before is not None:
            return self.outcome_of(before, arguments)
        self.check(source, info)
        return next_(source, info, **arguments)

    async def resolve_async(
        self,
        next_: Callable[..., Awaitable[Any]],
        source: object,
        info: strawberry.Info[Context, None],
        **arguments: object,
    ) -> Any:
        """Resolve the field for a caller who may. All root fields are resolved like this.

        Raises:
            Forbidden: the caller has none of the access scopes.
            Unauthenticated: the host of the schema gives the caller no access.
        """
        before = self.call_before()
        if before is not None:
            return self.outcome_of(before, arguments)
        context = info.context
        if not isinstance(context, Context):
            context = await enter_context(info)
        self._check(context.caller, source)
        return await next_(source, info, **arguments)

    def _check(self, caller: Caller, source: Any) -> None:
        caller.need(*self.access_scopes)


class RequiresOrOwns(Requires):
    """Requires one of these access scopes, or that the job is the caller's own."""

    def __init__(self, *access_scopes: AccessScope) -> None:
        super().__init__(*access_scopes)
        named = ", ".join(f"`{each}`" for each in access_scopes)
        self._sentence = f"Needs the scope {named}, or `jobs:own` for the caller's own jobs."

    def _check(self, caller: Caller, source: Any) -> None:
        if not caller.owns(source.record.created_by):
            super()._check(caller, source)


def access_scopes_of(
    schema: strawberry.Schema, type_name: str, name: str
) -> tuple[AccessScope, ...]:
    """Return the access scopes that a field requires, any one of them."""
    field = schema.get_field_for_type(name, type_name)
    assert field is not None
    return tuple(
        access_scope
        for extension in field.extensions
        if isinstance(extension, Requires)
        for access_scope in extension.access_scopes
    )


def check_access_scope(type_name: str, field: StrawberryField) -> None:
    """Check that a field of a guarded type declares who may read it.

    The fields of the root types are never open. `Job` is reached with several access scopes, not
    all of which may read all of it. Every other object is reached through one of these.

    Raises:
        LookupError: the field declares nothing.
    """
    if type_name not in GUARDED:
        return
    requires = any(isinstance(extension, Requires) for extension in field.extensions)
    is_open = type_name == "Job" and field.metadata.get(_OPEN)
    if not (requires or is_open):
        raise LookupError(f"{type_name}.{field.python_name} does not declare its access scope")
