"""Which scopes a field needs: said where the field is written, and part of its description."""

from __future__ import annotations

from typing import Any, Final

import strawberry
from strawberry.types.field import StrawberryField

from job_registry_api.auth import AccessScope

SCOPES: Final = "scopes"
"""The key of a field's metadata; its value is a tuple of scopes, one of which is needed."""

GUARDED: Final = frozenset({"Query", "Mutation", "Subscription", "Job"})
"""The types each of whose fields says what it needs. The first three are where a document begins;
a `Job` is reached with several scopes, and not all of them may read all of it. Every other object
is reached through one of these."""


def needs(*scopes: AccessScope, description: str) -> Any:
    """A field of a guarded type that needs one of these scopes."""
    return strawberry.field(description=_told(description, scopes), metadata={SCOPES: scopes})


def subscription(*scopes: AccessScope, description: str) -> Any:
    """A field of `Subscription` that needs one of these scopes."""
    return strawberry.subscription(
        description=_told(description, scopes), metadata={SCOPES: scopes}
    )


def open_to_all(description: str) -> Any:
    """A field of a guarded type that whoever has the object may read."""
    return strawberry.field(description=description, metadata={SCOPES: ()})


def scopes_of(type_name: str, field: StrawberryField) -> tuple[AccessScope, ...]:
    """The scopes of which a field needs one; none where whoever has the object may read it.

    Raises:
        LookupError: the type is guarded, and the field does not say.
    """
    if type_name not in GUARDED:
        return ()
    scopes = field.metadata.get(SCOPES)
    if scopes is None or (not scopes and type_name != "Job"):
        raise LookupError(f"{type_name}.{field.python_name} does not say which scope it needs")
    return tuple(scopes)


def _told(description: str, scopes: tuple[AccessScope, ...]) -> str:
    return f"{description} Needs the scope {' or '.join(f'`{scope}`' for scope in scopes)}."
