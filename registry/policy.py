"""`JobPolicy` and `Backoff`: what the queue enforces for the jobs of a type."""

from __future__ import annotations

from dataclasses import dataclass, field

from job_registry.errors import DefinitionError, shortened


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a job waits after a failed attempt: `base * 2^(n-1)` seconds, at most the cap.

    With half jitter: a random share of the second half is left out, so that jobs that failed
    together do not come back together. `base_seconds` is 0 to 86,400, `cap_seconds` 0 to 31
    days and not below the base.
    """

    base_seconds: float = 2.0
    cap_seconds: float = 3_600.0

    def __post_init__(self) -> None:
        faults = [
            *_range_fault("base_seconds", self.base_seconds, 0, 86_400, (int, float)),
            *_range_fault("cap_seconds", self.cap_seconds, 0, 31 * 86_400, (int, float)),
        ]
        if not faults and self.cap_seconds < self.base_seconds:
            faults = [f"cap_seconds {self.cap_seconds} is below base_seconds {self.base_seconds}"]
        if faults:
            raise DefinitionError(f"Backoff: {'; '.join(faults)}")


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """What the queue enforces for jobs of a type.

    `max_attempts`, 1 to 1000: how often a job runs at most, the first run included.
    `timeout_seconds`, 1 to 604,800: how long one attempt may take.
    `concurrency_limit`, 1 to 100,000 or None: how many jobs of the type run at once, over all
    workers on all machines. None is no limit.
    """

    max_attempts: int = 3
    timeout_seconds: int = 300
    concurrency_limit: int | None = None
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        faults = [
            *_range_fault("max_attempts", self.max_attempts, 1, 1_000, (int,)),
            *_range_fault("timeout_seconds", self.timeout_seconds, 1, 604_800, (int,)),
        ]
        if self.concurrency_limit is not None:
            faults += _range_fault("concurrency_limit", self.concurrency_limit, 1, 100_000, (int,))
        if not isinstance(self.backoff, Backoff):
            faults.append(f"backoff is {shortened(self.backoff)}, expected a Backoff")
        if faults:
            raise DefinitionError(f"JobPolicy: {'; '.join(faults)}")


def _range_fault(
    name: str, value: object, low: float, high: float, kinds: tuple[type, ...]
) -> list[str]:
    expected = "a whole number" if kinds == (int,) else "a number"
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:  # type: ignore[operator]
        return [f"{name} is {shortened(value)}, expected {expected} from {low:,} to {high:,}"]
    return []
