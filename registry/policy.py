"""`JobPolicy` and `Backoff`: what the queue enforces for the jobs of a type.

A field is one line with its default and its range, and a sentence below it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from pydantic.alias_generators import to_camel

from job_registry.errors import DefinitionError, shortened

OnMismatch = Literal["park", "fail"]
"""What happens to a queued job whose stored payload cannot be read."""


def _ranged(default: float | None, low: int, high: int) -> Any:
    """Declare a number from `low` to `high`: a whole number if the default is, or if it is None."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a job waits after a failed attempt: `base * 2^(n-1)` seconds, up to the cap.

    Half of the wait is random, so that jobs that failed together do not return together.

    Raises:
        DefinitionError: a value is out of its range, or the cap is below the base.
    """

    base_seconds: float = _ranged(2.0, 0, 86_400)
    """Wait after the first attempt: 0 seconds to a day."""

    cap_seconds: float = _ranged(3_600.0, 0, 31 * 86_400)
    """Longest wait: 0 seconds to 31 days."""

    def __post_init__(self) -> None:
        faults = _range_faults(self)
        if not faults and self.cap_seconds < self.base_seconds:
            faults = [f"cap_seconds {self.cap_seconds} is below base_seconds {self.base_seconds}"]
        if faults:
            raise DefinitionError(f"Backoff: {'; '.join(faults)}")


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """What the queue enforces for the jobs of a type.

    Raises:
        DefinitionError: a value is out of its range. The message names every fault.
    """

    max_attempts: int = _ranged(3, 1, 1_000)
    """Highest number of runs, including the first: 1 to 1,000."""

    timeout_seconds: int = _ranged(300, 1, 604_800)
    """Longest duration of one attempt: 1 second to a week."""

    concurrency_limit: int | None = _ranged(None, 1, 100_000)
    """Highest number of jobs that run at once, over all workers on all machines: 1 to 100,000.
    None is no limit."""

    backoff: Backoff = field(default_factory=Backoff)
    """Wait between attempts."""

    on_mismatch: OnMismatch = "park"
    """What happens to a queued job whose stored payload the current job type cannot read. "park"
    keeps it queued for a process that can read it, such as one of the next deploy. "fail" fails it
    at once, as `payload_invalid`."""

    def __post_init__(self) -> None:
        faults = _range_faults(self)
        if not isinstance(self.backoff, Backoff):
            faults.append(f"backoff is {shortened(self.backoff)}, expected a Backoff")
        if self.on_mismatch not in get_args(OnMismatch):
            faults.append(f"on_mismatch is {shortened(self.on_mismatch)}, expected park or fail")
        if faults:
            raise DefinitionError(f"JobPolicy: {'; '.join(faults)}")

    def as_json(self) -> dict[str, Any]:
        """Return every field, with the names and the enum values that GraphQL has."""
        return _in_camel_case({**asdict(self), "on_mismatch": self.on_mismatch.upper()})


def _in_camel_case(values: dict[str, Any]) -> dict[str, Any]:
    return {
        to_camel(name): _in_camel_case(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }


def _range_faults(policy: JobPolicy | Backoff) -> list[str]:
    faults = []
    for each in fields(policy):
        value = getattr(policy, each.name)
        if "range" not in each.metadata or (value is None and each.default is None):
            continue
        low, high = each.metadata["range"]
        fractions = isinstance(each.default, float)
        kinds = (int, float) if fractions else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            expected = f"a{'' if fractions else ' whole'} number from {low:,} to {high:,}"
            faults.append(f"{each.name} is {shortened(value)}, expected {expected}")
    return faults
