"""What one request may cost. Its costs are charged to its `Budget`, which all its parts share.

The bytes of a request are counted where it is read, its values before they are parsed, its
arguments before they are coerced, its faults as they are found, and its answer as it is made.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, NamedTuple

from pydantic import JsonValue

from job_registry import CodedError
from job_registry.errors import FaultBudget
from job_registry.json_values import count_values, parse_json
from job_registry_api.defaults import MAX_BULK_SIZE

TYPED_VALUES_PER_JOB: Final = 20
MIN_TYPED_VALUES: Final = 20_000

LARGE_BYTES: Final = 100_000
LARGE_FIELDS: Final = 5_000
"""An answer with more bytes of large values, or more fields of listed objects, is large."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of one request. Each has a setting, whose description explains it."""

    body_bytes: int = 8_388_608
    values: int = 200_000
    bulk_size: int = MAX_BULK_SIZE
    answer_bytes: int = 8_388_608
    answer_fields: int = 20_000

    @property
    def typed_values(self) -> int:
        """The most values of arguments that have a type in the GraphQL schema.

        GraphQL checks each for itself, in Python, and takes thirty times as long as for JSON.
        """
        return max(MIN_TYPED_VALUES, TYPED_VALUES_PER_JOB * self.bulk_size)


DEFAULT_LIMITS: Final = RequestLimits()


class BudgetExceeded(CodedError):
    """Raised when a request needs more than a limit allows. `setting` is the one that sets it."""

    code = "budget_exceeded"

    def __init__(self, message: str, limit: int, setting: str) -> None:
        self.limit = limit
        self.setting = setting
        super().__init__(f"{message} The limit is {limit:,}; {setting} sets it.")

    def details(self) -> dict[str, JsonValue]:
        """Return the limit and the name of its setting."""
        return {"limit": self.limit, "setting": self.setting}


def too_many_values(limits: RequestLimits) -> BudgetExceeded:
    """Return the error for a request with too many JSON values."""
    message = "The request has too many JSON values. Send fewer jobs, or smaller payloads, at once."
    return BudgetExceeded(message, limits.values, "JOBS_MAX_REQUEST_VALUES")


class RequestSize(NamedTuple):
    """How large a request is: its bytes, and a bound of how many JSON values it has."""

    bytes: int
    values: int


def parse_request_json(
    text: bytes, limits: RequestLimits, what: str = "The body"
) -> tuple[JsonValue, RequestSize]:
    """Parse the JSON text of a request. Return it and its size. `what` begins the error.

    Raises:
        BudgetExceeded: it has too many values. It is not parsed then: 8 MB of `{}` fill 170 MB.
        NotJson: it is not valid JSON.
    """
    values = count_values(text, limits.values)
    if values > limits.values:
        raise too_many_values(limits)
    return parse_json(text, what), RequestSize(len(text), values)


@dataclass(slots=True)
class Budget:
    """What is left for one request. Each event of a subscription counts as a request."""

    limits: RequestLimits = DEFAULT_LIMITS
    _faults: FaultBudget | None = None
    _reading: asyncio.Lock | None = None
    _fields: int = 0
    _bytes: int = 0
    _read: int = 0

    # Both are made when they are used first, because every request has a budget.
    @property
    def faults(self) -> FaultBudget:
        """How many more faults may be listed."""
        if self._faults is None:
            self._faults = FaultBudget()
        return self._faults

    @property
    def reading(self) -> asyncio.Lock:
        """Held while jobs are read, so that each read knows what those before it took."""
        if self._reading is None:
            self._reading = asyncio.Lock()
        return self._reading

    @property
    def fields_left(self) -> int:
        """How many fields the answer may still have."""
        return max(0, self.limits.answer_fields - self._fields)

    @property
    def bytes_left(self) -> int:
        """How many bytes of large values the answer may still have."""
        return max(0, self.limits.answer_bytes - self._bytes)

    @property
    def is_large(self) -> bool:
        """Whether the answer is so large that its text takes milliseconds."""
        return self._bytes > LARGE_BYTES or self._fields > LARGE_FIELDS

    @property
    def reading_left(self) -> int:
        """How many bytes of jobs the request may still read."""
        return max(0, self.limits.answer_bytes - self._read)

    def charge_reading(self, weight: int) -> None:
        """Charge jobs that were read."""
        self._read += weight

    def check_reading(self) -> None:
        """Check that more jobs may be read.

        Raises:
            BudgetExceeded: the jobs that were read are large enough for an answer.
        """
        if self.reading_left == 0:
            raise self._too_large()

    def charge_fields(self, fields: int) -> None:
        """Charge fields that the answer will have.

        Raises:
            BudgetExceeded: they are more than are left.
        """
        if fields > self.fields_left:
            message = "The answer would have too many fields. Request fewer objects or fields."
            raise BudgetExceeded(message, self.limits.answer_fields, "JOBS_MAX_ANSWER_FIELDS")
        self._fields += fields

    def check_bytes(self, size: int) -> None:
        """Check that the answer may still have so many bytes.

        Raises:
            BudgetExceeded: they are more than are left.
        """
        if size > self.bytes_left:
            raise self._too_large()

    def charge_bytes(self, size: int) -> None:
        """Charge a value of the answer.

        Raises:
            BudgetExceeded: it is larger than what is left.
        """
        self.check_bytes(size)
        self._bytes += size

    def _too_large(self) -> BudgetExceeded:
        message = "The answer would be too large. Request fewer objects or fields."
        return BudgetExceeded(message, self.limits.answer_bytes, "JOBS_MAX_ANSWER_BYTES")
