"""A typed client of the mutations that a worker sends.

Each answer is a dictionary. `kind` says which member of the union it is, and type checkers narrow
the union when it is compared. The classes have the names and fields of the GraphQL schema.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import httpx


class Job(TypedDict):
    id: str
    type: str
    attempt: int
    payload: Any


class JobLease(TypedDict):
    leaseToken: str
    leaseSeconds: float
    secondsToExpiry: float
    secondsLeft: float
    job: Job


class Violation(TypedDict):
    path: str
    message: str


class LeaseJobsSuccess(TypedDict):
    kind: Literal["LeaseJobsSuccess"]
    leases: list[JobLease]
    waitedSeconds: float


class HeartbeatJobSuccess(TypedDict):
    kind: Literal["HeartbeatJobSuccess"]
    secondsToExpiry: float
    cancelRequested: bool


class JobChanged(TypedDict):
    kind: Literal["JobChanged"]


class StopWaitingSuccess(TypedDict):
    kind: Literal["StopWaitingSuccess"]


class LeaseLost(TypedDict):
    kind: Literal["LeaseLost"]


class InputInvalid(TypedDict):
    kind: Literal["InputInvalid"]
    violations: list[Violation]


LeaseJobsResult = LeaseJobsSuccess | InputInvalid
StopWaitingResult = StopWaitingSuccess | InputInvalid
HeartbeatJobResult = HeartbeatJobSuccess | LeaseLost | InputInvalid
EndResult = JobChanged | LeaseLost | InputInvalid
"""The result of `completeJob`, `failJob`, `releaseJob` and `snoozeJob`."""

INVALID = "fragment Invalid on InputInvalid { violations { path message } }"

LEASE = """
mutation ($input: LeaseJobsInput!) {
  answer: leaseJobs(input: $input) {
    kind: __typename
    ... Invalid
    ... on LeaseJobsSuccess {
      waitedSeconds
      leases {
        leaseToken leaseSeconds secondsToExpiry secondsLeft
        job { id type attempt payload }
      }
    }
  }
}
"""
STOP_WAITING = """
mutation ($workerId: String!) {
  answer: stopWaiting(workerId: $workerId) { kind: __typename ... Invalid }
}
"""
HEARTBEAT = """
mutation ($token: String!, $progress: JSON) {
  answer: heartbeatJob(leaseToken: $token, progress: $progress) {
    kind: __typename
    ... Invalid
    ... on HeartbeatJobSuccess { secondsToExpiry cancelRequested }
  }
}
"""
COMPLETE = """
mutation ($token: String!, $result: JSON) {
  answer: completeJob(leaseToken: $token, result: $result) { kind: __typename ... Invalid }
}
"""
FAIL = """
mutation ($token: String!, $error: JobErrorInput!, $retryable: Boolean!, $after: Int) {
  answer: failJob(
    leaseToken: $token, error: $error, retryable: $retryable, retryAfterSeconds: $after
  ) { kind: __typename ... Invalid }
}
"""
RELEASE = """
mutation ($token: String!) {
  answer: releaseJob(leaseToken: $token) { kind: __typename }
}
"""
SNOOZE = """
mutation ($token: String!, $seconds: Int!) {
  answer: snoozeJob(leaseToken: $token, seconds: $seconds) { kind: __typename ... Invalid }
}
"""

TRANSIENT = {"queue_unavailable", "rate_limited", "internal_error"}


class Unreachable(Exception):
    """Raised when there was no answer, or one that a later request may not get. Try again."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Refused(Exception):
    """Raised when the server will not execute the request: the token, or the document."""


class Client:
    """Sends mutations. Raises `Unreachable` or `Refused`. `seconds` bounds each request."""

    def __init__(self, url: str, token: str | None) -> None:
        headers = {"accept": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(headers=headers, limits=limits)
        self._url = url

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def lease(self, types: list[str], worker: str, limit: int, wait: int) -> LeaseJobsResult:
        given = {"jobTypes": types, "workerId": worker, "limit": limit, "waitSeconds": wait}
        answer: LeaseJobsResult = await self._send(LEASE, wait + 10, input=given)
        return answer

    async def stop_waiting(self, worker: str) -> StopWaitingResult:
        answer: StopWaitingResult = await self._send(STOP_WAITING, 1, workerId=worker)
        return answer

    async def heartbeat(self, token: str, progress: Any, seconds: float) -> HeartbeatJobResult:
        answer: HeartbeatJobResult = await self._send(
            HEARTBEAT, seconds, token=token, progress=progress
        )
        return answer

    async def end(self, document: str, token: str, **variables: Any) -> EndResult:
        """Send one of COMPLETE, FAIL, RELEASE and SNOOZE."""
        answer: EndResult = await self._send(document, 10, token=token, **variables)
        return answer

    async def _send(self, document: str, timeout: float, /, **variables: Any) -> Any:
        query = document if document == RELEASE else document + INVALID
        body = {"query": query, "variables": variables}
        try:
            response = await self._http.post(self._url, json=body, timeout=timeout)
        except httpx.TransportError as error:
            raise Unreachable(f"no answer: {error!r}") from error
        retry_after = response.headers.get("retry-after", "")
        wait = float(retry_after) if retry_after.isdigit() else 0.0
        try:
            content = response.json()
        except ValueError:
            # Not from the server: a proxy answers while the server restarts.
            raise Unreachable(f"HTTP status {response.status_code}", wait) from None
        if errors := content.get("errors"):
            code = errors[0].get("extensions", {}).get("code")
            if code in TRANSIENT or response.status_code >= 500 or response.status_code == 429:
                raise Unreachable(errors[0]["message"], wait)
            raise Refused(errors[0]["message"])
        if "data" not in content:
            raise Unreachable(f"HTTP status {response.status_code}", wait)
        return content["data"]["answer"]
