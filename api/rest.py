"""REST: the same queue with HTTP's own status codes. `/openapi.json` describes it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from pydantic import JsonValue
from pydantic.alias_generators import to_snake
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from job_registry import CodedError, EnqueueRequest, JobTypeNotFound, PayloadInvalid, Violation
from job_registry.errors import FaultBudget, shortened
from job_registry.json_values import NotJson, pointer_of
from job_registry.wire_text import parse_date_time
from job_registry_api import auth, openapi
from job_registry_api.answer_text import json_in_pieces
from job_registry_api.auth import Authenticator, Caller
from job_registry_api.budget import BudgetExceeded, RequestLimits, parse_request_json
from job_registry_api.http_messages import (
    JSON_TYPE,
    BodyTooLarge,
    ClientGone,
    MethodNotAllowed,
    UnsupportedMediaType,
    body_of,
    check_media,
    check_not_compressed,
    error_content,
    header,
    prefix_of,
    query_parameters,
    read_body,
    respond,
    respond_json,
    respond_unexpected,
)
from job_registry_api.job_json import json_of_attempts, json_of_job, json_of_line, json_of_time
from job_registry_api.queue.changing import Changing
from job_registry_api.queue.enqueueing import Enqueued, ExistingValues, Refusal
from job_registry_api.queue.errors import (
    IdempotencyConflict,
    IdempotencyKeyTaken,
    InputInvalid,
    JobNotFound,
    JobStateConflict,
    QueueUnavailable,
)
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.job_logs import LOG_WEIGHT, lines_of
from job_registry_api.queue.models import JobRecord, JobStatus, Owner
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.reading import PAGE_SIZE
from job_registry_api.queue.requests import read_request
from job_registry_api.uploads import (
    FORMATS,
    AssetExists,
    AssetInvalid,
    AssetsUnavailable,
    PresignedUrlsMissing,
    Uploaded,
    UploadNotFound,
    Uploads,
)

_STATUSES: Final[Mapping[type[CodedError], int]] = {
    **auth.STATUSES,
    NotJson: 400,
    JobTypeNotFound: 404,
    JobNotFound: 404,
    UploadNotFound: 404,
    MethodNotAllowed: 405,
    IdempotencyConflict: 409,
    IdempotencyKeyTaken: 409,
    JobStateConflict: 409,
    AssetExists: 409,
    PresignedUrlsMissing: 409,
    BodyTooLarge: 413,
    BudgetExceeded: 413,
    UnsupportedMediaType: 415,
    PayloadInvalid: 422,
    InputInvalid: 422,
    AssetInvalid: 422,
    QueueUnavailable: 503,
    AssetsUnavailable: 503,
}

_STATUS_NAMES: Final = frozenset(status.value for status in JobStatus)

MAX_PARAMETERS: Final = 200
"""The most parameters of a query string."""

_PARAMETERS: Final = (
    "one of type, status, first, after, createdBy, createdAfter, createdBefore, finishedAfter,"
    " finishedBefore, idempotencyKey, errorCode, search"
)


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that has been admitted."""

    scope: Scope
    receive: Receive
    queue: JobQueue
    caller: Caller
    limits: RequestLimits
    uploads: Uploads | None

    @property
    def job_id(self) -> str:
        return str(self.scope["path_params"]["id"])

    def fault_budget(self) -> FaultBudget:
        """Return how many faults the answer may list, and the job types that they may suggest."""
        return self.queue.registry.fault_budget(FaultBudget(job_types=self.caller.job_types))

    async def json(self) -> JsonValue:
        """Return the JSON in the body.

        Raises:
            UnsupportedMediaType: the body is not declared as JSON.
            BodyTooLarge: it is too large.
            BudgetExceeded: it has too many values.
            NotJson: it is not JSON.
        """
        check_media(self.scope)
        body = await read_body(self.scope, self.receive, self.limits.body_bytes)
        return parse_request_json(body, self.limits)[0]

    async def visible_job(self, owner: Owner | None) -> JobRecord:
        """Return the job in the path. With `owner`, only one that this subject enqueued.

        Raises:
            JobNotFound: there is none that the caller may see.
        """
        job = await self.queue.get(self.job_id, owner=owner)
        if not self.caller.may_see(job.type):
            raise JobNotFound(self.job_id)
        return job


class _Answer(NamedTuple):
    status: int
    content: Any
    headers: tuple[tuple[bytes, bytes], ...] = ()
    may_be_large: bool = False


_Answering = Callable[[_Request], Awaitable[_Answer]]


def routes(
    authenticator: Authenticator,
    limits: RequestLimits,
    *,
    uploads: Uploads | None = None,
    described: bool = True,
) -> list[Route]:
    """Return the routes of REST. With `uploads` it takes pictures. If `described`, /openapi.json is
    one of them."""
    served: dict[str, dict[str, _Answering]] = {
        "/jobs": {"GET": list_jobs, "POST": enqueue},
        "/jobs/bulk": {"POST": enqueue_many},
        "/jobs/{id}": {"GET": show},
        "/jobs/{id}/logs": {"GET": show_logs},
        "/jobs/{id}/cancel": {"POST": cancel},
        "/jobs/{id}/retry": {"POST": retry},
        **({"/openapi.json": {"GET": describe}} if described else {}),
    }
    if uploads:
        place = "/assets/{asset_id}/{version_number}"
        served |= {
            place: {"POST": upload},
            f"{place}/presign": {"POST": presign_upload},
            f"{place}/finish": {"POST": finish_upload},
        }
    return [
        Route(path, _Endpoint(methods, authenticator, limits, uploads))
        for path, methods in served.items()
    ]


class _Endpoint:
    """Answers the requests of one path, each method by its function. HEAD is answered as GET."""

    def __init__(
        self,
        methods: Mapping[str, _Answering],
        authenticator: Authenticator,
        limits: RequestLimits,
        uploads: Uploads | None,
    ) -> None:
        self._methods = dict(methods)
        if "GET" in methods:
            self._methods["HEAD"] = methods["GET"]
        self._authenticator = authenticator
        self._limits = limits
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answering = self._methods.get(scope["method"])
            if answering is None:
                raise MethodNotAllowed(*self._methods)
            caller = await self._authenticator.authenticate(scope)
            queue: JobQueue = scope["app"].state.queue
            answer = await answering(
                _Request(scope, receive, queue, caller, self._limits, self._uploads)
            )
        except ClientGone:
            return
        except Exception as error:
            await _respond_error(send, error)
            return
        if not answer.may_be_large:
            await respond_json(send, answer.status, answer.content, headers=answer.headers)
            return
        body = await json_in_pieces(answer.content)
        await respond(send, answer.status, body, content_type=JSON_TYPE, headers=answer.headers)


async def enqueue(request: _Request) -> _Answer:
    """`POST /jobs` with the fields of `EnqueueJobInput`. Needs `jobs:enqueue` or `jobs:own`.

    201 with the path of the new job in `Location`; 200 if the idempotency key belongs to an
    existing job, which is returned. Errors are `{"error": {"code", "message", "details"}}`.
    """
    caller, queue = request.caller, request.queue
    caller.need("jobs:enqueue", "jobs:own")
    budget = request.fault_budget()
    given, faults = read_request(await request.json(), budget)
    if given is None:
        raise InputInvalid(faults)
    caller.need_types([given.type])
    if faults:
        # Refuses it for the faults of its payload too.
        queue.admit(given, caller.subject, budget, found=faults)
    enqueued = await queue.enqueue(
        given, created_by=caller.subject, others=caller.others_jobs, budget=budget
    )
    place = f"{prefix_of(request.scope)}/jobs/{enqueued.job.id}"
    return _Answer(_created(enqueued), _summary(enqueued.job), ((b"location", place.encode()),))


async def enqueue_many(request: _Request) -> _Answer:
    """`POST /jobs/bulk` with `jobs`, up to 1,000, and `atomic`. Needs `jobs:enqueue` or `jobs:own`.

    200 with `results` in the order of the jobs. Each has the `status` that `POST /jobs` would have
    had, and a `job` or an `error`. With `atomic`, all jobs are stored or none.
    """
    caller, queue = request.caller, request.queue
    caller.need("jobs:enqueue", "jobs:own")
    budget = request.fault_budget()
    jobs, atomic = _bulk_of(await request.json(), request.limits.bulk_size)
    read = [read_request(job, budget) for job in jobs]
    caller.need_types(given.type for given, _ in read if given is not None)
    results = await queue.enqueue_many(
        await _requests_of(queue, read, caller.subject, budget),
        atomic=atomic,
        created_by=caller.subject,
        others=caller.others_jobs,
        budget=budget,
        values=ExistingValues(payload=False, others=False),
    )
    return _Answer(200, {"results": [_result(each) for each in results]})


async def list_jobs(request: _Request) -> _Answer:
    """`GET /jobs`: a page of jobs, newest first. Needs `jobs:read` or `jobs:own`.

    The parameters are `type` and `status`, each as often as needed, the other fields of `JobFilter`
    once, `first` (50), and `after`, the `endCursor` of the previous page. `Link` has the URL of the
    next page (RFC 8288).
    """
    caller = request.caller
    caller.need("jobs:own", "jobs:read")
    wanted = _wanted_page(request.scope["query_string"])
    types = caller.types_to_list(wanted.filter.types, request.queue.registry)
    try:
        page = await request.queue.list(
            replace(wanted.filter, types=types),
            first=wanted.first,
            after=wanted.after,
            owner=caller.owner_unless("jobs:read"),
            max_bytes=request.limits.answer_bytes,
        )
    except InputInvalid as invalid:
        raise _of_parameters(invalid) from None
    last = page.stopped_at or (page.jobs[-1].id if page.jobs else None)
    cursor = None if last is None else str(last)
    content = {
        "jobs": [json_of_job(job) for job in page.jobs],
        "pageInfo": {
            "hasNextPage": page.has_next_page,
            "stoppedEarly": page.stopped_early,
            "endCursor": cursor,
        },
    }
    if not page.has_next_page or cursor is None:
        return _Answer(200, content, may_be_large=True)
    query = urlencode([*wanted.others, ("after", cursor)])
    link = f'<{prefix_of(request.scope)}/jobs?{query}>; rel="next"'
    return _Answer(200, content, ((b"link", link.encode()),), may_be_large=True)


async def show(request: _Request) -> _Answer:
    """`GET /jobs/{id}`. Needs `jobs:read` or `jobs:own`.

    If the attempts are too large together, the answer has the latest ones, and `allAttempts` is
    false.
    """
    request.caller.need("jobs:own", "jobs:read")
    job = await request.visible_job(request.caller.owner_unless("jobs:read"))
    attempts, is_all = await request.queue.latest_attempts([job.id], request.limits.answer_bytes)
    content = json_of_job(job)
    content["attempts"] = json_of_attempts(attempts[job.id])
    content["allAttempts"] = is_all
    return _Answer(200, content, may_be_large=True)


async def show_logs(request: _Request) -> _Answer:
    """`GET /jobs/{id}/logs`. Needs `jobs:read`.

    If the lines are too large together, the answer has those of the latest attempts, and `allLines`
    is false.
    """
    request.caller.need("jobs:read")
    job = await request.visible_job(None)
    most = request.limits.answer_bytes
    attempts, has_all_attempts = await request.queue.latest_attempts([job.id], most)
    ids = [attempt.id for attempt in attempts[job.id]]
    texts, has_all_lines = await request.queue.log_texts(ids, most // LOG_WEIGHT)
    lines = [
        json_of_line(line, attempt)
        for attempt in attempts[job.id]
        for line in lines_of(texts.get(attempt.id, ""))
    ]
    content: dict[str, Any] = {"lines": lines, "allLines": has_all_attempts and has_all_lines}
    return _Answer(200, content, may_be_large=True)


async def cancel(request: _Request) -> _Answer:
    """`POST /jobs/{id}/cancel` with an empty object. Needs `jobs:admin` or `jobs:own`.

    200 with the job: cancelled if it was queued; if it was running, its worker is requested to
    stop. 409 if it has ended.
    """
    return await _change(request, Changing.cancel)


async def retry(request: _Request) -> _Answer:
    """`POST /jobs/{id}/retry` with an empty object. Needs `jobs:admin` or `jobs:own`.

    200 with the job, which is queued again. 409 if it has neither failed nor been cancelled.
    """
    return await _change(request, Changing.retry)


async def upload(request: _Request) -> _Answer:
    """`POST /assets/{assetId}/{versionNumber}` with a picture. Needs `jobs:enqueue` or `jobs:own`.

    201 with the place of the picture, which is what the payload of `thumbnail.create` needs. 201
    also for the same picture again. 409 if the version has another one.
    """
    request.caller.need("jobs:enqueue", "jobs:own")
    assert request.uploads is not None
    media_type = header(request.scope, b"content-type").decode("latin-1")
    media_type = media_type.partition(";")[0].strip().lower()
    if media_type not in FORMATS:
        raise UnsupportedMediaType(
            "The body must be the picture itself, not a form, and the Content-Type one of"
            f" {', '.join(FORMATS)}."
        )
    check_not_compressed(request.scope)
    declared = header(request.scope, b"content-length")
    if declared.isdigit() and int(declared) > request.uploads.max_bytes:
        raise BodyTooLarge(request.uploads.max_bytes)
    place = request.scope["path_params"]
    stored = await request.uploads.store(
        place["asset_id"], place["version_number"], media_type, body_of(request.receive)
    )
    return _Answer(201, _place(stored))


async def presign_upload(request: _Request) -> _Answer:
    """`POST /assets/{assetId}/{versionNumber}/presign` with the `bytes` of a picture.

    201 with the `method`, `url` and `headers` of a request to the bucket: the client sends the
    picture with it, then finishes with the `uploadId`. 409 if there are no presigned URLs. Needs
    `jobs:enqueue` or `jobs:own`.
    """
    request.caller.need("jobs:enqueue", "jobs:own")
    assert request.uploads is not None
    size = _only_field("bytes", await request.json())
    if isinstance(size, float) and size.is_integer():
        size = int(size)
    if type(size) is not int or size < 1:
        message = f"Expected a whole number from 1; got {shortened(size)}."
        raise InputInvalid((Violation("/bytes", "wrong_type", message),))
    place = request.scope["path_params"]
    presigned = await request.uploads.presign(place["asset_id"], place["version_number"], size)
    content = {
        "uploadId": presigned.upload_id,
        "method": "PUT",
        "url": presigned.put.url,
        "headers": dict(presigned.put.headers),
        "expiresAt": json_of_time(presigned.expires_at),
    }
    return _Answer(201, content)


async def finish_upload(request: _Request) -> _Answer:
    """`POST /assets/{assetId}/{versionNumber}/finish` with the `uploadId` of a presigned URL.

    Answers as `upload`. 404 if nothing was written to the URL. Needs `jobs:enqueue` or `jobs:own`.
    """
    request.caller.need("jobs:enqueue", "jobs:own")
    assert request.uploads is not None
    upload_id = _only_field("uploadId", await request.json())
    if not isinstance(upload_id, str):
        message = f"Expected the uploadId of a presigned URL; got {shortened(upload_id)}."
        raise InputInvalid((Violation("/uploadId", "wrong_type", message),))
    place = request.scope["path_params"]
    stored = await request.uploads.finish(place["asset_id"], place["version_number"], upload_id)
    return _Answer(201, _place(stored))


def _only_field(name: str, given: JsonValue) -> JsonValue:
    if isinstance(given, dict) and list(given) == [name]:
        return given[name]
    message = f"Expected an object with the field {name} alone; got {shortened(given)}."
    raise InputInvalid((Violation("", "wrong_type", message),))


def _place(stored: Uploaded) -> dict[str, Any]:
    return {
        "assetId": stored.asset_id,
        "versionNumber": stored.version_number,
        "bytes": stored.size,
    }


async def describe(request: _Request) -> _Answer:
    """`GET /openapi.json`: REST for the job types that the caller may see.

    Needs the scope `jobs:enqueue`, `jobs:own` or `jobs:read`.
    """
    caller = request.caller
    caller.need("jobs:enqueue", "jobs:own", "jobs:read")
    visible = [each for name, each in request.queue.registry.items() if caller.may_see(name)]
    described = openapi.describe(
        visible,
        prefix_of(request.scope),
        uploads=request.uploads is not None,
        max_page_size=request.queue.max_page_size,
        max_bulk_size=request.queue.max_bulk_size,
    )
    return _Answer(200, described)


async def _change(request: _Request, change: Callable[..., Awaitable[JobRecord]]) -> _Answer:
    request.caller.need("jobs:own", "jobs:admin")
    # JSON is required even for an empty object: a browser then sends a preflight request (CORS)
    # before a request from a page of another site.
    given = await request.json()
    if given != {}:
        message = f"Expected an empty object; got {shortened(given)}."
        raise InputInvalid((Violation("", "wrong_type", message),))
    owner = request.caller.owner_unless("jobs:admin")
    if request.caller.job_types is not None:
        await request.visible_job(owner)
    return _Answer(200, json_of_job(await change(request.queue, request.job_id, owner=owner)))


@dataclass(frozen=True, slots=True)
class _WantedPage:
    filter: JobFilter
    first: int
    after: uuid.UUID | None
    others: list[tuple[str, str]]
    """The parameters as they were given, without `after`."""


def _wanted_page(query_string: bytes) -> _WantedPage:
    """Return the page that a query string describes.

    Raises:
        InputInvalid: a parameter is unknown or wrong; it lists every fault.
    """
    faults: list[Violation] = []
    try:
        given = query_parameters(query_string, MAX_PARAMETERS)
    except ValueError as error:
        raise InputInvalid((Violation("", "invalid_format", str(error)),)) from None
    types: list[str] = []
    statuses: list[JobStatus] = []
    once: dict[str, Any] = {}
    first, after = PAGE_SIZE, None
    seen: set[str] = set()
    for name, value in given:
        if name in seen and name not in ("type", "status"):
            message = "Expected this parameter once. Only type and status may be repeated."
            faults.append(Violation(pointer_of([name]), "repeated", message))
            continue
        seen.add(name)
        match name:
            case "createdBy" | "idempotencyKey" | "errorCode" | "search":
                once[to_snake(name)] = value
            case "createdAfter" | "createdBefore" | "finishedAfter" | "finishedBefore":
                try:
                    once[to_snake(name)] = parse_date_time(value)
                except ValueError:
                    message = (
                        "Expected a date and time with an offset from UTC, such as"
                        f" 2030-01-31T12:00:00Z; got {shortened(value)}."
                    )
                    faults.append(Violation(f"/{name}", "invalid_format", message))
            case "type":
                types.append(value)
            case "status" if value in _STATUS_NAMES:
                statuses.append(JobStatus(value))
            case "status":
                message = f"Expected one of {', '.join(JobStatus)}; got {shortened(value)}."
                faults.append(Violation("/status", "invalid_value", message))
            case "first" if value.isascii() and value.isdigit() and len(value) < 10:
                first = int(value)
            case "first":
                message = f"Expected a whole number; got {shortened(value)}."
                faults.append(Violation("/first", "wrong_type", message))
            case "after":
                try:
                    after = uuid.UUID(value)
                except ValueError:
                    message = f"Expected the endCursor of another page; got {shortened(value)}."
                    faults.append(Violation("/after", "invalid_format", message))
            case _:
                message = f"There is no parameter {shortened(name)}. Expected {_PARAMETERS}."
                faults.append(Violation(pointer_of([name]), "unknown_field", message))
    if faults:
        raise InputInvalid(tuple(faults))
    others = [(name, value) for name, value in given if name != "after"]
    job_filter = JobFilter(types=tuple(types) or None, statuses=tuple(statuses) or None, **once)
    return _WantedPage(job_filter, first, after, others)


def _of_parameters(invalid: InputInvalid) -> InputInvalid:
    """Return the faults of a filter under the names of the parameters that it was made from."""
    renamed = {"/filter/types": "/type"}
    return InputInvalid(
        tuple(
            replace(fault, path=renamed.get(fault.path, fault.path.removeprefix("/filter")))
            for fault in invalid.violations
        )
    )


def _bulk_of(value: JsonValue, most: int) -> tuple[list[JsonValue], bool]:
    """Return the jobs of a bulk, and whether it is atomic.

    Raises:
        InputInvalid: it is not an object with `jobs`; lists every fault outside them.
        BudgetExceeded: it has too many jobs.
    """
    if not isinstance(value, dict):
        message = f'Expected an object such as {{"jobs": [...]}}; got {shortened(value)}.'
        raise InputInvalid((Violation("", "wrong_type", message),))
    faults = [
        Violation(pointer_of([name]), "unknown_field", f"There is no field {shortened(name)}.")
        for name in islice((name for name in value if name not in ("jobs", "atomic")), 100)
    ]
    jobs = value.get("jobs")
    if not isinstance(jobs, list):
        given = shortened(jobs) if "jobs" in value else "none"
        faults.append(Violation("/jobs", "wrong_type", f"Expected a list of jobs; got {given}."))
        jobs = []
    atomic = value.get("atomic", False)
    if not isinstance(atomic, bool):
        message = f"Expected true or false; got {shortened(atomic)}."
        faults.append(Violation("/atomic", "wrong_type", message))
    if faults:
        raise InputInvalid(tuple(faults))
    if len(jobs) > most:
        message = "The request has too many jobs."
        raise BudgetExceeded(message, most, "JOBS_MAX_BULK_SIZE")
    return jobs, bool(atomic)


async def _requests_of(
    queue: JobQueue,
    read: Sequence[tuple[EnqueueRequest | None, Sequence[Violation]]],
    created_by: str | None,
    budget: FaultBudget,
) -> list[EnqueueRequest | Refusal]:
    """Return the request of each job of a bulk; in place of a faulty one, why it is refused."""
    requests: list[EnqueueRequest | Refusal] = []
    for given, faults in read:
        if given is None:
            requests.append(InputInvalid(tuple(faults)))
        elif not faults:
            requests.append(given)
        else:
            try:
                queue.admit(given, created_by, budget, found=faults)
            except (JobTypeNotFound, InputInvalid) as refusal:
                requests.append(refusal)
            # Listing faults takes milliseconds. A bulk of them would block the event loop.
            await asyncio.sleep(0)
    return requests


def _created(enqueued: Enqueued) -> int:
    return 200 if enqueued.deduplicated else 201


def _summary(job: JobRecord) -> dict[str, Any]:
    """Return what the answer to an enqueue says of a job."""
    return {
        "jobId": str(job.id),
        "status": job.status.value,
        "type": job.type,
        "nextRunAt": json_of_time(job.next_run_at),
    }


def _result(result: Enqueued | Refusal) -> dict[str, Any]:
    if isinstance(result, Enqueued):
        return {"status": _created(result), "job": _summary(result.job)}
    content = error_content(result.code, result.summary, _listed(result.details()))
    return {"status": _STATUSES[type(result)], **content}


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
        case UnsupportedMediaType():
            return error.headers
        case QueueUnavailable() | AssetsUnavailable():
            return ((b"retry-after", b"1"),)
    return auth.headers_of(error)
