"""JSON that PostgreSQL, SQLite and JavaScript all store without a change.

RFC 8259, less what one of them would change or refuse: numbers that are not finite, integers past
64 bits, NUL and lone surrogates in text, and nesting beyond any use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from pydantic import JsonValue
from pydantic_core import PydanticSerializationError, from_json, to_json

from job_registry.errors import CodedError, Violation, shortened

MAX_DEPTH: Final = 64
MAX_VIOLATIONS: Final = 100
MAX_POINTER: Final = 2_000

_MAX_INT: Final = 2**63 - 1
_MIN_INT: Final = -(2**63)
# NUL cannot be stored in PostgreSQL's text and JSONB; a lone surrogate is not Unicode text.
_BAD_TEXT: Final = re.compile("[\x00\ud800-\udfff]")


class NotJson(CodedError, ValueError):
    """Raised when text is not valid JSON; says where."""

    code = "not_json"


def parse_json(text: str | bytes, what: str = "This") -> JsonValue:
    """Parse JSON text. If an object has a key twice, the last value counts.

    `what` begins the message of the error.

    Raises:
        NotJson: it is not valid JSON, holds NaN or Infinity, or is nested too deep to be read.
    """
    try:
        value: JsonValue = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise NotJson(f"{what} is not valid JSON: {_json_fault(str(error))}") from None
    return value


def _json_fault(message: str) -> str:
    """Return the parser's message in plain words, with the line and the column."""
    fault, _, place = message.rpartition(" at line ")
    line, _, column = place.partition(" column ")
    words = next((w for start, w in _JSON_FAULTS if fault.startswith(start)), None)
    return f"{words or 'unexpected character'} at line {line}, column {column}"


_JSON_FAULTS: Final = (
    ("EOF", "the text ends too early"),
    ("trailing characters", "more text after the end of the value"),
    ("trailing comma", "unexpected comma"),
    ("key must be a string", "expected a name in double quotes"),
    ("control character", "unescaped control character in a string"),
    ("invalid escape", "invalid escape in a string"),
    ("unexpected end of hex", "invalid escape in a string"),
    ("lone leading surrogate", "invalid escape in a string"),
    ("invalid unicode", "text that is not UTF-8"),
    ("invalid number", "invalid number"),
    ("number out of range", "number out of range"),
    ("recursion limit", "too many nested arrays and objects"),
)
"""How the parser's messages begin, and what they mean."""


def count_values(text: bytes, enough: int) -> int:
    """Return how many values a JSON text has, or a bound of that, without parsing it.

    The number is exact if it is more than `enough`; a smaller one may count punctuation in strings.
    An empty array or object counts as two, as it does in memory.
    """
    count = _count_starts(text)
    if count <= enough:
        return count
    # Without escapes, quotes alternate: a string begins, and ends.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_STARTS)
    # A string is a value, or the name of one.
    strings = bare.count(b'"') // 2
    if strings // 2 > enough:
        return strings // 2
    return _count_starts(b"".join(bare.split(b'"')[::2]))


def _count_starts(text: bytes) -> int:
    """Return how many values start in a text: each but the first follows one of three signs."""
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


_NO_STARTS: Final = bytes(set(range(256)) - set(b',[{"'))


def pointer(path: str, token: str | int) -> str:
    """Return the JSON Pointer (RFC 6901) one step below `path`."""
    if isinstance(token, int):
        return f"{path}/{token}"
    if "~" in token or "/" in token:
        token = token.replace("~", "~0").replace("/", "~1")
    return f"{path}/{token}"


def names_in(pointer: str) -> list[str]:
    """Return the keys and indexes of a JSON Pointer (RFC 6901)."""
    return [token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:]]


def pointer_of(path: Iterable[str | int]) -> str:
    """Return the JSON Pointer (RFC 6901) of these keys and indexes, up to 2,000 characters.

    A longer one ends at the last parent that fits, so that it still points into the document.
    """
    found = ""
    for token in path:
        if isinstance(token, str) and len(token) > MAX_POINTER:
            break
        longer = pointer(found, token)
        if len(longer) > MAX_POINTER:
            break
        found = longer
    return found


def text_fault(text: str) -> str | None:
    """Return why this text cannot be stored, as a sentence. None if it can be stored."""
    found = _BAD_TEXT.search(text)
    if found is None:
        return None
    character = ord(found.group())
    what = "NUL" if character == 0 else f"the lone surrogate U+{character:04X}"
    return f"Expected Unicode text without NUL; got {what} at character {found.start()}."


def json_document(value: object, *, max_bytes: int) -> tuple[bytes, list[Violation]]:
    """Return the compact JSON text of a value, in UTF-8, and the faults of the value.

    If there are violations, the text is that of a copy in which each faulty value is replaced by a
    valid one of the same kind, so that the rest can be checked too. It is empty if the value is too
    large, too deep, or has too many faults.
    """
    if _has_only_sound_types(value, 0):
        try:
            text = to_json(value)
        except (PydanticSerializationError, ValueError, UnicodeEncodeError):
            text = b""  # A lone surrogate.
        if text and _ESCAPED_NUL not in text:
            return (text, []) if len(text) <= max_bytes else _refused(text, max_bytes)
    faults = _Faults()
    clean = _cleaned(value, faults, max_bytes)
    if faults.fatal is not None:
        return b"", [faults.fatal]
    text = to_json(clean)
    if len(text) > max_bytes:
        return _refused(text, max_bytes)
    return text, faults.violations


_ESCAPED_NUL: Final = b"\\u0000"
"""NUL in JSON text. The same characters after a backslash are not NUL, but rare."""


def _refused(text: bytes, max_bytes: int) -> tuple[bytes, list[Violation]]:
    return b"", [_too_large(len(text), max_bytes)]


def _has_only_sound_types(value: Any, depth: int) -> bool:
    """Return whether a value can only have faults in its texts, without building anything."""
    kind = type(value)
    if kind is str:
        return True
    if kind is int:
        return bool(_MIN_INT <= value <= _MAX_INT)
    if kind is bool or value is None:
        return True
    if kind is float:
        return math.isfinite(value)
    if depth >= MAX_DEPTH:
        return False
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                return False
            if type(item) is not str and not _has_only_sound_types(item, depth + 1):
                return False
        return True
    if kind is list:
        return all(_has_only_sound_types(item, depth + 1) for item in value)
    return False


class _Path(NamedTuple):
    """A place in a document, linked to its parent: its text is only built for a fault."""

    parent: _Path | None
    token: str | int

    def pointer(self) -> str:
        """Return the JSON Pointer of this place."""
        tokens: list[str | int] = []
        at = self
        while at.parent is not None:
            tokens.append(at.token)
            at = at.parent
        return pointer_of(reversed(tokens))


class _Faults:
    """Violations up to a bound. `fatal` is one that makes all others irrelevant."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.fatal: Violation | None = None

    def add(self, path: _Path, code: str, message: str) -> None:
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(Violation(path.pointer(), code, message))


def _cleaned(value: object, faults: _Faults, max_bytes: int) -> Any:
    """Return a copy of a value without faults. Iterative, so that depth cannot overflow it."""
    root: list[Any] = [None]
    size = 0
    # What is still to be copied: the value, its path, its depth, and where the copy goes.
    waiting: list[tuple[Any, _Path, int, Any, Any]] = [(value, _Path(None, ""), 0, root, 0)]
    while waiting:
        item, path, depth, target, place = waiting.pop()
        size += 2 + (len(item) if isinstance(item, str) else 0)
        if size > max_bytes * 2:
            faults.fatal = _too_large(None, max_bytes)
            return None
        if type(item) in (dict, list):
            if depth >= MAX_DEPTH:
                faults.fatal = Violation(
                    path.pointer(),
                    "too_deep",
                    f"Expected at most {MAX_DEPTH} levels of nesting; got more.",
                )
                return None
            if type(item) is list:
                copy_list: list[Any] = [None] * len(item)
                target[place] = copy_list
                for index in range(len(item) - 1, -1, -1):
                    waiting.append((item[index], _Path(path, index), depth + 1, copy_list, index))
            else:
                copy: dict[str, Any] = {}
                target[place] = copy
                below = []
                for key, inner in item.items():
                    if type(key) is not str:
                        message = f"Expected text as the name of a field; got {shortened(key)}."
                        faults.add(path, "not_json", message)
                    elif fault := text_fault(key):
                        faults.add(path, "invalid_text", f"The name of a field: {fault}")
                    else:
                        size += len(key)
                        copy[key] = None
                        below.append((inner, _Path(path, key), depth + 1, copy, key))
                waiting.extend(reversed(below))
        else:
            target[place] = _clean_scalar(item, path, faults)
    return root[0]


def _clean_scalar(value: object, path: _Path, faults: _Faults) -> Any:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        fault = text_fault(value)
        if fault is None:
            return value
        faults.add(path, "invalid_text", fault)
        return "x"
    if type(value) is int:
        if _MIN_INT <= value <= _MAX_INT:
            return value
        message = f"Expected an integer of 64 bits; got {shortened(value)}."
        faults.add(path, "integer_too_large", message)
        return 1
    if type(value) is float:
        if math.isfinite(value):
            return value
        faults.add(path, "not_finite", f"Expected a finite number; got {shortened(value)}.")
        return 1.0
    faults.add(
        path,
        "not_json",
        "Expected a JSON value (object, array, string, number, boolean or null);"
        f" got a {type(value).__name__}, which JSON does not have.",
    )
    return None


def _too_large(size: int | None, max_bytes: int) -> Violation:
    came = "more" if size is None else f"{size:,}"
    return Violation("", "too_large", f"Expected at most {max_bytes:,} bytes of JSON; got {came}.")
