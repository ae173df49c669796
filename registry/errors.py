"""What the registry refuses, and what a handler raises to end its attempt.

An exception that clients see is a `CodedError`. GraphQL, REST and the CLI add only their status.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from pydantic import JsonValue

MAX_DELAY_SECONDS: Final = 31_536_000
"""Longest delay of an attempt: a year."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a value: its path, its code, and a sentence for people.

    `path` is a JSON Pointer (RFC 6901), "" for the whole. `code` is stable, `message` is not.
    """

    path: str
    code: str
    message: str

    def as_json(self) -> dict[str, JsonValue]:
        """Return the violation as a JSON object."""
        return {"path": self.path, "code": self.code, "message": self.message}

    def sentence(self, whole: str = "") -> str:
        """Return the message after its path. `whole` is the name of the whole value, if it has one,
        for a fault of it."""
        place = self.path or whole
        return f"{place}: {self.message}" if place else self.message


class CodedError(Exception):
    """Base of the exceptions that clients see.

    `code` is snake_case and stable. `str(error)` is the whole sentence, for logs and terminals.
    """

    code: ClassVar[str]

    def details(self) -> dict[str, JsonValue]:
        """Return what a program needs besides the code: a JSON object with camelCase keys."""
        return {}

    @property
    def summary(self) -> str:
        """The sentence for clients that also receive `details()`."""
        return str(self)


class DefinitionError(Exception):
    """Raised when a job type, a policy or a registry is not valid. The process does not start."""


class JobTypeNotFound(CodedError):
    """Raised when no job type has this name. `suggestions` are similar names, the best first."""

    code = "job_type_not_found"

    def __init__(self, job_type: str, suggestions: tuple[str, ...] = ()) -> None:
        self.job_type = job_type
        self.suggestions = suggestions
        hint = f" Did you mean {' or '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"There is no job type {shortened(job_type)}.{hint}")

    def details(self) -> dict[str, JsonValue]:
        """Return the name, up to 200 characters of it, and the suggestions."""
        return {"jobType": str(self.job_type)[:200], "suggestions": list(self.suggestions)}


class PayloadInvalid(CodedError):
    """Raised when a payload does not fit its job type. `violations` are all its faults."""

    code = "payload_invalid"

    def __init__(self, job_type: str, violations: Sequence[Violation]) -> None:
        self.job_type = job_type
        self.violations = tuple(violations)
        super().__init__(job_type, self.violations)

    def __str__(self) -> str:
        # Made when it is read: a bulk of faulty payloads answers with the violations alone.
        faults = " ".join(each.sentence("payload") for each in self.violations)
        return f"The payload of {self.job_type} is invalid: {faults}"

    def details(self) -> dict[str, JsonValue]:
        """Return the job type and the violations."""
        return {"jobType": self.job_type, "violations": [v.as_json() for v in self.violations]}

    @property
    def summary(self) -> str:
        """How many faults there are."""
        return counted_faults("The payload", len(self.violations))


class Retry(Exception):
    """Raised by a handler to fail this attempt. `after` seconds replace the backoff.

    Raises:
        ValueError: `after` is not 0 to 31,536,000.
    """

    def __init__(self, message: str = "", *, after: float | None = None) -> None:
        if after is not None:
            _check_delay("Retry: after", after)
        self.after = after
        super().__init__(message or "The handler requested a retry.")


class Fail(Exception):
    """Raised by a handler to fail the job without another attempt."""


class Cancel(Exception):
    """Raised by a handler to cancel the job.

    Also raised by a handler that stops because of `job.cancel_requested`. If the reason is that
    the worker stops, the job runs again.
    """


class Snooze(Exception):
    """Raised by a handler to run the job again in `seconds`. This attempt does not count.

    Raises:
        ValueError: `seconds` is not 0 to 31,536,000.
    """

    def __init__(self, seconds: float) -> None:
        _check_delay("Snooze: seconds", seconds)
        self.seconds = seconds
        super().__init__(f"The handler requested to run again in {seconds} seconds.")


def counted_faults(what: str, faults: int) -> str:
    """Return the sentence that goes with a list of faults."""
    return f"{what} has {faults:,} fault{'s' if faults != 1 else ''}."


def _check_delay(name: str, seconds: float) -> None:
    if not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_DELAY_SECONDS:
        raise ValueError(
            f"{name} is {shortened(seconds)}, expected 0 to {MAX_DELAY_SECONDS:,} seconds"
        )


def near(name: str, names: Iterable[str], *, count: int = 1) -> tuple[str, ...]:
    """Return the names that are similar to a name that does not exist, the best first."""
    by_letters = {each.casefold(): each for each in names}
    found = difflib.get_close_matches(name[:100].casefold(), by_letters, n=count, cutoff=0.6)
    return tuple(by_letters[each] for each in found)


@dataclass(slots=True)
class FaultBudget:
    """How many more faults of one request may be listed.

    A request may hold thousands of payloads, each with thousands of faults. To find a fault's
    place and to write its sentence takes far longer than to notice it, so only the first faults of
    a request are listed, and only the first of these suggest a name.
    """

    faults: int = 1_000
    characters: int = 1_000_000
    comparisons: int = 500
    """Names that faulty names are compared with. A comparison takes 0.03 to 0.2 milliseconds."""
    job_types: Container[str] | None = None
    """The job types that the caller may see: only these are suggested. None means all."""

    @property
    def is_spent(self) -> bool:
        """Whether no more faults are listed."""
        return self.faults <= 0 or self.characters <= 0

    def listed(
        self, what: str, violations: Sequence[Violation], *, examined: int = 0
    ) -> tuple[Violation, ...]:
        """Return the violations and charge them. Once it is spent, return one that counts them.

        `examined` is how many faults were read to find these.
        """
        if not violations:
            return ()
        if self.is_spent:
            return (self.unlisted(what, len(violations)),)
        self.faults -= max(len(violations), examined // 4)
        self.characters -= sum(len(each.path) + len(each.message) for each in violations)
        return tuple(violations)

    def unlisted(self, what: str, faults: int) -> Violation:
        """Return the violation for faults that are not listed."""
        message = (
            f"{counted_faults(what, faults)} They are not listed, because the whole request has too"
            " many."
        )
        return Violation("", "more", message)

    def near(self, name: str, names: Collection[str], *, count: int = 1) -> tuple[str, ...]:
        """Return similar names as `near` does, or none once the comparisons are spent."""
        if self.comparisons <= 0:
            return ()
        self.comparisons -= len(names)
        return near(name, names, count=count)

    def near_types(self, name: str, names: Collection[str]) -> tuple[str, ...]:
        """Return up to three of these job types that are similar, and that the caller may see."""
        visible = [each for each in names if self.job_types is None or each in self.job_types]
        return self.near(name, visible, count=3)

    def suggestion(self, name: str, names: Collection[str]) -> str:
        """Return " Did you mean x?" for the most similar name, or an empty string."""
        return "".join(f" Did you mean {found}?" for found in self.near(name, names))


def shortened(value: object, limit: int = 80) -> str:
    """Return a value as JSON text, for a sentence: `"abc"`, 10, true. Longer text ends with …

    Characters that a terminal could act on are escaped. What is not JSON is named by its kind.
    """
    text = ""
    for piece in _json_pieces(value, limit):
        text += piece
        if len(text) > limit:
            return text[: limit - 1] + "…"
    return text


def _json_pieces(value: object, limit: int) -> Iterator[str]:
    """Yield a value's JSON text in pieces, so that no more of it is made than is used."""
    match value:
        case None | bool():
            yield {None: "null", True: "true", False: "false"}[value]
        case str():
            yield f'"{_printable(value[:limit])}"'
        case int() if value.bit_length() > 1_000:
            yield f"an integer of {value.bit_length():,} bits"
        case int() | float():
            yield json.dumps(value)
        case list():
            yield "["
            for index, item in enumerate(value):
                yield ", " if index else ""
                yield from _json_pieces(item, limit)
            yield "]"
        case dict():
            yield "{"
            for index, (key, item) in enumerate(value.items()):
                yield ", " if index else ""
                yield from _json_pieces(key, limit)
                yield ": "
                yield from _json_pieces(item, limit)
            yield "}"
        case _:
            name = getattr(value, "__qualname__", None)
            yield name if isinstance(name, str) else f"a value of the type {type(value).__name__}"


def _printable(text: str) -> str:
    if text.isprintable() and '"' not in text and "\\" not in text:
        return text
    # A terminal may act on characters that JSON itself lets through.
    return "".join(c if c.isprintable() and c not in '"\\' else json.dumps(c)[1:-1] for c in text)


def escaped(text: str) -> str:
    """Escape what a terminal could act on, line breaks among it: `\\u001b` for an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def alternatives(words: Iterable[str]) -> str:
    """Return words as in `a, b or c`."""
    *first, last = list(words) or ["nothing"]
    return f"{', '.join(first)} or {last}" if first else last


def shortened_text(text: str, limit: int = 300) -> str:
    """Truncate a sentence."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
