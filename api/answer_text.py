"""The JSON text of answers. A large one is made in pieces, between which other tasks run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Final

from pydantic_core import to_json

PIECE_BYTES: Final = 262_144
"""How much text is made at once: it takes a few milliseconds."""

_LEVELS: Final = 6
"""How deep an answer is divided: down to the entries of a value of a job in `nodes`."""

_ENTRIES: Final = 1_000
"""The most entries of an object or array that is divided. Each takes a microsecond more."""


async def json_in_pieces(content: Any) -> bytes:
    """Return the JSON text of an answer that may be large.

    8 MB of small objects take 100 ms. A thread would not help: Pydantic's serializer does not
    release the interpreter lock.
    """
    parts: list[bytes] = []
    size = 0
    for part in _pieces(content, _LEVELS):
        parts.append(part)
        size += len(part)
        if size > PIECE_BYTES:
            size = 0
            await asyncio.sleep(0)
    return b"".join(parts)


def _pieces(value: Any, levels: int) -> Iterator[bytes]:
    is_divided = levels > 0 and isinstance(value, dict | list) and 0 < len(value) <= _ENTRIES
    if is_divided and isinstance(value, dict):
        separator = b"{"
        for name, each in value.items():
            yield separator + to_json(name) + b":"
            yield from _pieces(each, levels - 1)
            separator = b","
        yield b"}"
    elif is_divided:
        separator = b"["
        for each in value:
            yield separator
            yield from _pieces(each, levels - 1)
            separator = b","
        yield b"]"
    else:
        yield to_json(value)
