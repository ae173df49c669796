"""REST: `POST /jobs` and `GET /jobs/{id}`, the same queue with HTTP's own status codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

from pydantic.alias_generators import to_camel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from job_registry import CodedError, JobTypeNotFound, PayloadInvalid
from job_registry.json_values import NotJson
from job_registry_api import auth
from job_registry_api.auth import Authenticator
from job_registry_api.budget import BudgetExceeded, RequestLimits, parse_request_json
from job_registry_api.http_messages import (
    BodyTooLarge,
    ClientGone,
    MethodNotAllowed,
    UnsupportedMediaType,
    error_content,
    header,
    is_json,
    prefix_of,
    read_body,
    respond_json,
    respond_unexpected,
)
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    IdempotencyKeyTaken,
    InputInvalid,
    JobNotFound,
    QueueUnavailable,
)
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.requests import parse_request

_STATUSES: Final[Mapping[type[CodedError], int]] = {
    **auth.STATUSES,
    NotJson: 400,
    JobTypeNotFound: 404,
    JobNotFound: 404,
    MethodNotAllowed: 405,
    IdempotencyConflict: 409,
    IdempotencyKeyTaken: 409,
    BodyTooLarge: 413,
    BudgetExceeded: 413,
    UnsupportedMediaType: 415,
    PayloadInvalid: 422,
    InputInvalid: 422,
    QueueUnavailable: 503,
}


class EnqueueView:
    """`POST /jobs` with the fields of `EnqueueJobInput`.

    201 with the new job's place in `Location`; 200 when its idempotency key gave back a job that
    was there already. Errors are `{"error": {"code", "message", "details"}}`. Needs the scope
    `jobs:enqueue` or `jobs:own`.
    """

    def __init__(self, authenticator: Authenticator, limits: RequestLimits) -> None:
        self._authenticator = authenticator
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request."""
        queue: JobQueue = scope["app"].state.queue
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed("POST")
            caller = await self._authenticator.authenticate(scope)
            caller.need("jobs:enqueue", "jobs:own")
            budget = queue.registry.fault_budget()
            request = parse_request(await self._read(scope, receive), budget=budget)
            caller.need_types([request.type])
            enqueued = await queue.enqueue(
                request,
                created_by=caller.subject,
                others=caller.others_jobs,
                budget=budget,
            )
        except ClientGone:
            return
        except Exception as error:
            await _respond_error(send, error)
            return
        job = enqueued.job
        content = {
            "jobId": str(job.id),
            "status": job.status.value,
            "type": job.type,
            "nextRunAt": _time(job.next_run_at),
        }
        location = (b"location", f"{prefix_of(scope)}/jobs/{job.id}".encode())
        status = 200 if enqueued.deduplicated else 201
        await respond_json(send, status, content, headers=(location,))

    async def _read(self, scope: Scope, receive: Receive) -> Any:
        if not is_json(header(scope, b"content-type")):
            raise UnsupportedMediaType
        body = await read_body(scope, receive, self._limits.body_bytes)
        value, _ = parse_request_json(body, self._limits)
        return value


class JobView:
    """`GET /jobs/{id}`. Needs the scope `jobs:read`, or `jobs:own` for the caller's own jobs.

    Of attempts that are too large together, the latest are in the answer, and `allAttempts` is
    false.
    """

    def __init__(self, authenticator: Authenticator, limits: RequestLimits) -> None:
        self._authenticator = authenticator
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request."""
        queue: JobQueue = scope["app"].state.queue
        try:
            if scope["method"] not in ("GET", "HEAD"):
                raise MethodNotAllowed("GET", "HEAD")
            caller = await self._authenticator.authenticate(scope)
            caller.need("jobs:own", "jobs:read")
            owner = caller.owner_unless("jobs:read")
            job = await queue.get(scope["path_params"]["id"], owner=owner)
            if not caller.may_see(job.type):
                raise JobNotFound(scope["path_params"]["id"])
            attempts, is_all = await queue.latest_attempts([job.id], self._limits.answer_bytes)
        except Exception as error:
            await _respond_error(send, error)
            return
        content = _as_json(job._asdict())
        content["jobId"] = content.pop("id")
        content["attempts"] = [
            {name: value for name, value in _as_json(asdict(attempt)).items() if name != "jobId"}
            for attempt in attempts[job.id]
        ]
        content["allAttempts"] = is_all
        await respond_json(send, 200, content)


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a record's fields as REST has them: in camelCase, times in UTC."""
    return {
        to_camel(name): _time(value) if isinstance(value, datetime) else value
        for name, value in fields.items()
    }


async def answer_not_found(request: Request, _error: Exception) -> Response:
    """Answer a request for a path that nothing is served at."""
    prefix = prefix_of(request.scope)
    message = (
        f"Nothing is served at this path. GraphQL is at {prefix}/graphql and REST at {prefix}/jobs."
    )
    return JSONResponse(error_content("not_found", message), 404)


async def _respond_error(send: Send, error: Exception) -> None:
    """Answer with an exception's status, code, message and details."""
    if not isinstance(error, CodedError) or type(error) not in _STATUSES:
        await respond_unexpected(send, "rest", error)
        return
    content = error_content(error.code, error.summary, _listed(error.details()))
    await respond_json(send, _STATUSES[type(error)], content, headers=_headers(error))


def _listed(details: dict[str, Any]) -> list[Any]:
    """Return details as REST has them: a list with one object per fault or suggestion."""
    match details:
        case {"violations": violations}:
            return list(violations)
        case {"suggestions": names}:
            return [{"suggestion": name} for name in names]
        case {"existingJobId": job_id, "differingPaths": paths}:
            return [{"jobId": job_id}, *({"path": path, "code": "differs"} for path in paths)]
    return [details] if details else []


def _headers(error: Exception) -> tuple[tuple[bytes, bytes], ...]:
    match error:
        case MethodNotAllowed():
            return ((b"allow", ", ".join(error.allowed).encode()),)
        case QueueUnavailable():
            return ((b"retry-after", b"1"),)
    return auth.headers_of(error)


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")
