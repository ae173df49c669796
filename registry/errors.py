"""What the registry refuses, and what a handler raises to say how its attempt ends.

Data in fields; each door makes its own words of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_DELAY_SECONDS: Final = 31_536_000
"""How far ahead an attempt may be put off: a year."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a value: where, which, and a sentence about what was expected and what came.

    `path` is a JSON Pointer (RFC 6901), "" for the whole. `code` is stable, `message` is not.
    """

    path: str
    code: str
    message: str


class DefinitionError(Exception):
    """Raised when a job type, a policy or a registry is defined wrongly. It stops the start."""


class JobTypeNotFound(Exception):
    """Raised when no job type has this name. `suggestions` are the nearest names, best first."""

    def __init__(self, job_type: str, suggestions: tuple[str, ...] = ()) -> None:
        self.job_type = job_type
        self.suggestions = suggestions
        hint = f" Did you mean {' or '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"There is no job type {shortened(job_type)}.{hint}")


class PayloadInvalid(Exception):
    """Raised when a payload is not what its job type asks for; `violations` are all its faults."""

    def __init__(self, job_type: str, violations: Sequence[Violation]) -> None:
        self.job_type = job_type
        self.violations = tuple(violations)
        faults = "; ".join(f"{v.path or 'payload'}: {v.message}" for v in self.violations)
        super().__init__(f"The payload of {job_type} is invalid: {faults}")


class Retry(Exception):
    """Raised by a handler: this attempt failed, try again; `after` seconds replace the backoff.

    Raises:
        ValueError: `after` is not 0 to 31,536,000.
    """

    def __init__(self, message: str = "", *, after: float | None = None) -> None:
        if after is not None:
            _check_delay("Retry: after", after)
        self.after = after
        super().__init__(message or "The handler asked to be tried again.")


class Fail(Exception):
    """Raised by a handler: the job failed for good, and another attempt would not help."""


class Cancel(Exception):
    """Raised by a handler: the job is to be cancelled.

    Also for a handler that stops because of `job.cancel_requested`. If that was because its worker
    stops, and not because the job was cancelled, the job runs again.
    """


class Snooze(Exception):
    """Raised by a handler: run the job again in `seconds`; this attempt does not count.

    Raises:
        ValueError: `seconds` is not 0 to 31,536,000.
    """

    def __init__(self, seconds: float) -> None:
        _check_delay("Snooze: seconds", seconds)
        self.seconds = seconds
        super().__init__(f"The handler asked to run again in {seconds} seconds.")


def _check_delay(name: str, seconds: float) -> None:
    if not 0 <= seconds <= MAX_DELAY_SECONDS:
        raise ValueError(f"{name} is {seconds}, expected 0 to {MAX_DELAY_SECONDS:,}")


def shortened(value: object, limit: int = 80) -> str:
    """A value as a sentence can hold it: its repr, cut in the middle of nowhere if need be."""
    if isinstance(value, str | bytes | list | dict) and len(value) > limit * 4:
        value = value[: limit * 4] if isinstance(value, str | bytes) else type(value).__name__
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shortened_text(text: str, limit: int = 300) -> str:
    """A sentence, bounded."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
