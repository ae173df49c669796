"""REST: `POST /jobs` and `GET /jobs/{id}`, the same queue with HTTP's own status codes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic_core import from_json
from starlette.types import Receive, Scope, Send

from job_registry import JobTypeNotFound, PayloadInvalid, Violation
from job_registry_api.auth import (
    AuthenticationUnavailable,
    Authenticator,
    Forbidden,
    TooManyRequests,
    Unauthenticated,
)
from job_registry_api.http_messages import (
    BodyTooLarge,
    ClientGone,
    header,
    is_json,
    read_body,
    respond_json,
)
from job_registry_api.logs import log_unexpected
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    InputInvalid,
    JobNotFound,
    QueueUnavailable,
)
from job_registry_api.queue.models import JobRecord
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.requests import parse_request


class RequestRefused(Exception):
    """Raised when a request is refused before it reaches the queue, with its HTTP status."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        super().__init__(message)


class EnqueueView:
    """`POST /jobs` with the fields of `EnqueueJobInput`.

    201 with the new job's place in `Location`; 200 when its idempotency key gave back a job that
    was there already. Errors are `{"error": {"code", "message", "details"}}`. Needs the scope
    `jobs:enqueue`.
    """

    def __init__(self, authenticator: Authenticator, *, max_body_bytes: int) -> None:
        self._authenticator = authenticator
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request."""
        queue: JobQueue = scope["app"].state.queue
        try:
            if scope["method"] != "POST":
                raise RequestRefused(405, "method_not_allowed", "Jobs are enqueued with POST.")
            caller = await self._authenticator.authenticate(scope)
            caller.need("jobs:enqueue")
            request = parse_request(await self._read(scope, receive))
            caller.need_types([request.type])
            enqueued = await queue.enqueue(request, created_by=caller.subject)
        except ClientGone:
            return
        except Exception as error:
            await _respond_error(send, error, allow=b"POST")
            return
        job = enqueued.job
        content = {
            "jobId": str(job.id),
            "status": job.status.value,
            "type": job.type,
            "nextRunAt": _time(job.next_run_at),
        }
        location = (b"location", f"/jobs/{job.id}".encode())
        status = 200 if enqueued.deduplicated else 201
        await respond_json(send, status, content, headers=(location,))

    async def _read(self, scope: Scope, receive: Receive) -> Any:
        if not is_json(header(scope, b"content-type")):
            message = "The Content-Type has to be application/json."
            raise RequestRefused(415, "unsupported_media_type", message)
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
        except BodyTooLarge:
            message = f"A request is at most {self._max_body_bytes:,} bytes long."
            raise RequestRefused(413, "too_large", message) from None
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise RequestRefused(
                400, "not_json", f"The body is not valid JSON: {str(error)[:200]}"
            ) from None


class JobView:
    """`GET /jobs/{id}`. Needs the scope `jobs:read`."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request."""
        queue: JobQueue = scope["app"].state.queue
        try:
            if scope["method"] not in ("GET", "HEAD"):
                raise RequestRefused(405, "method_not_allowed", "A job is read with GET.")
            caller = await self._authenticator.authenticate(scope)
            caller.need("jobs:read")
            job = await queue.get(scope["path_params"]["id"])
            if not caller.may_see(job.type):
                raise JobNotFound(scope["path_params"]["id"])
            attempts = (await queue.attempts([job.id]))[job.id]
        except Exception as error:
            await _respond_error(send, error, allow=b"GET, HEAD")
            return
        content = _job(job) | {
            "attempts": [
                {
                    "attempt": attempt.attempt,
                    "workerId": attempt.worker_id,
                    "startedAt": _time(attempt.started_at),
                    "finishedAt": _time(attempt.finished_at),
                    "outcome": attempt.outcome,
                    "error": attempt.error,
                }
                for attempt in attempts
            ]
        }
        await respond_json(send, 200, content)


def _job(job: JobRecord) -> dict[str, Any]:
    return {
        "jobId": str(job.id),
        "type": job.type,
        "status": job.status.value,
        "payload": job.payload,
        "priority": job.priority,
        "attempt": job.attempt,
        "maxAttempts": job.max_attempts,
        "timeoutSeconds": job.timeout_seconds,
        "idempotencyKey": job.idempotency_key,
        "createdBy": job.created_by,
        "createdAt": _time(job.created_at),
        "nextRunAt": _time(job.next_run_at),
        "startedAt": _time(job.started_at),
        "finishedAt": _time(job.finished_at),
        "progress": job.progress,
        "result": job.result,
        "error": job.error,
    }


def _counted(what: str, faults: int) -> str:
    return f"{what} has {faults} fault{'s' if faults != 1 else ''}; see details."


async def _respond_error(send: Send, error: Exception, *, allow: bytes) -> None:
    """The one place that makes HTTP answers of exceptions."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    details: list[Any] = []
    match error:
        case JobTypeNotFound():
            status, code, message = 404, "job_type_not_found", str(error)
            details = [{"suggestion": name} for name in error.suggestions]
        case PayloadInvalid():
            status, code = 422, "payload_invalid"
            message = _counted("The payload", len(error.violations))
            details = _details(error.violations)
        case InputInvalid():
            status, code = 422, "validation_error"
            message = _counted("The request", len(error.violations))
            details = _details(error.violations)
        case IdempotencyConflict():
            status, code = 409, "idempotency_conflict"
            message = "This idempotency key belongs to a job with another payload."
            details = [{"jobId": str(error.existing_job.id)}] + [
                {"path": path, "code": "differs"} for path in error.differing_paths
            ]
        case JobNotFound():
            status, code, message = 404, "job_not_found", str(error)
        case RequestRefused():
            status, code, message = error.status, error.code, str(error)
            headers = ((b"allow", allow),) if status == 405 else ()
        case Unauthenticated():
            status, code, message = 401, "unauthenticated", str(error)
            headers = ((b"www-authenticate", error.challenge.encode()),)
        case Forbidden():
            status, code, message = 403, "forbidden", str(error)
        case TooManyRequests():
            status, code, message = 429, "rate_limited", str(error)
            headers = ((b"retry-after", str(error.retry_after).encode()),)
        case AuthenticationUnavailable():
            status, code, message = 503, "authentication_unavailable", str(error)
            headers = ((b"retry-after", b"5"),)
        case QueueUnavailable():
            status, code, message = 503, "queue_unavailable", str(error)
            headers = ((b"retry-after", b"1"),)
        case _:
            error_id = log_unexpected("rest", error)
            status, code = 500, "internal_error"
            message = f"Something went wrong here. It is logged as {error_id}."
            details = [{"errorId": error_id}]
    content = {"error": {"code": code, "message": message, "details": details}}
    await respond_json(send, status, content, headers=headers)


def _details(violations: tuple[Violation, ...]) -> list[Any]:
    return [{"path": v.path, "code": v.code, "message": v.message} for v in violations]


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")
