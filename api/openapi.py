"""The OpenAPI description of REST, made from the registry: each job type has its own schema.

https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Final

from pydantic import TypeAdapter

from job_registry import JobType
from job_registry.catalog.thumbnail import AssetId
from job_registry_api.queue.job_logs import LogLevel
from job_registry_api.queue.models import AttemptOutcome, JobStatus
from job_registry_api.queue.reading import PAGE_SIZE
from job_registry_api.uploads import FORMATS

JSON: Final = "application/json"
Schema = dict[str, Any]


def describe(
    job_types: Iterable[JobType[Any]],
    prefix: str,
    *,
    uploads: bool,
    max_page_size: int,
    max_bulk_size: int,
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document for these job types, as JSON in Python.

    `prefix` is the path that the application is served under. With `uploads` it takes pictures.
    The sizes are the most jobs of a page and of a bulk request.
    """
    schemas: dict[str, Schema] = {}
    requests: dict[str, str] = {}
    for job_type in job_types:
        # Names of job types begin with a small letter, and the other names with a capital.
        payload, request = f"{job_type.name}.payload", f"{job_type.name}.request"
        schemas |= _payload_schemas(job_type.payload_schema, payload)
        schemas[request] = _request_of(job_type, payload)
        requests[job_type.name] = request
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Job Registry",
            "version": version("job-registry"),
            "description": "Enqueue, read and change jobs. GraphQL, at /graphql, can do more.",
        },
        "servers": [{"url": prefix or "/"}],
        "security": [{}, {"bearer": []}],
        "paths": {**_paths(max_page_size, max_bulk_size), **(_UPLOAD if uploads else {})},
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            },
            "schemas": {
                **_SCHEMAS,
                "EnqueueRequest": _any_of(requests),
                "BulkRequest": _bulk_request(max_bulk_size),
                **schemas,
            },
        },
    }


def _request_of(job_type: JobType[Any], payload: str) -> Schema:
    """Return the schema of the request to enqueue a job of this type."""
    properties: dict[str, Schema] = {
        "type": {"type": "string", "const": job_type.name},
        "payload": _ref(payload),
        **_OPTIONS,
    }
    request = _object(properties, required=("type", "payload"))
    return {**request, "description": job_type.description} if job_type.description else request


def _payload_schemas(schema: Mapping[str, Any], name: str) -> dict[str, Schema]:
    """Return the schema of a payload and of each model inside it, by their names in the document.

    Generators of clients do not look for schemas inside a schema, and some name a class by its
    title, which models of several job types share. No job type has a `-` in its name.
    """
    models = {name: {key: value for key, value in schema.items() if key != "$defs"}}
    models |= {f"{name}-{key}": model for key, model in schema.get("$defs", {}).items()}
    return {
        key: {word: value for word, value in _moved(model, name).items() if word != "title"}
        for key, model in models.items()
    }


def _moved(schema: Mapping[str, Any], name: str) -> Schema:
    """Return the schema of a payload with its references adjusted to its place in the document."""
    moved = {
        key: _moved_value(key, value, name) for key, value in schema.items() if key != "$schema"
    }
    discriminator = moved.get("discriminator")
    if isinstance(discriminator, dict) and isinstance(discriminator.get("mapping"), dict):
        mapping = {
            key: _moved_value("$ref", value, name)
            for key, value in discriminator["mapping"].items()
        }
        moved["discriminator"] = {**discriminator, "mapping": mapping}
    return moved


def _moved_value(key: str, value: Any, name: str) -> Any:
    if key in ("default", "examples", "const", "enum"):
        return value  # Values of the payload, which may look like schemas.
    if key in ("properties", "patternProperties", "$defs") and isinstance(value, Mapping):
        return {field: _moved_value("", each, name) for field, each in value.items()}
    if isinstance(value, Mapping):
        return _moved(value, name)
    if isinstance(value, list):
        return [_moved_value("", item, name) for item in value]
    if key == "$ref" and isinstance(value, str):
        if value.startswith("#/$defs/"):
            return f"#/components/schemas/{name}-{value.removeprefix('#/$defs/')}"
        return f"#/components/schemas/{name}{value[1:]}"
    return value


def _any_of(requests: Mapping[str, str]) -> Schema:
    if not requests:
        return {"not": {}, "description": "This server has no job types."}
    return {
        "oneOf": [_ref(name) for name in requests.values()],
        "discriminator": {
            "propertyName": "type",
            "mapping": {
                job_type: f"#/components/schemas/{name}" for job_type, name in requests.items()
            },
        },
    }


def _bulk_request(max_bulk_size: int) -> Schema:
    return _object(
        {
            "jobs": {**_list_of(_ref("EnqueueRequest")), "maxItems": max_bulk_size},
            "atomic": {
                "type": "boolean",
                "default": False,
                "description": "Store all jobs or none.",
            },
        },
        required=("jobs",),
    )


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Mapping[str, Schema], *, required: Iterable[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _one_of(*numbers: int) -> Schema:
    return {"type": "integer", "enum": list(numbers)}


def _list_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


_TEXT: Final[Schema] = {"type": "string"}
_NUMBER: Final[Schema] = {"type": "integer"}
_TRUTH: Final[Schema] = {"type": "boolean"}
_TIME: Final[Schema] = {"type": "string", "format": "date-time"}
_ID: Final[Schema] = {"type": "string", "format": "uuid"}

_OPTIONS: Final[dict[str, Schema]] = {
    "priority": {
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": 100,
        "description": "Among due jobs, the higher priority runs first. Defaults to 50.",
    },
    "scheduleAt": {
        "type": ["string", "null"],
        "format": "date-time",
        "description": "The earliest time of the first run. Defaults to now.",
    },
    "maxAttempts": {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": 1_000,
        "description": "How often the job runs at most. Defaults to the policy of the job type.",
    },
    "idempotencyKey": {
        "type": ["string", "null"],
        "minLength": 1,
        "maxLength": 255,
        "description": "A second request with the same key and payload returns the first job.",
    },
}

_FILTERS: Final[tuple[tuple[str, Schema, str], ...]] = (
    ("createdBy", _TEXT, "Jobs that this caller enqueued."),
    ("createdAfter", _TIME, "Jobs that were stored at this time or later."),
    ("createdBefore", _TIME, "Jobs that were stored before this time."),
    ("finishedAfter", _TIME, "Jobs that ended at this time or later."),
    ("finishedBefore", _TIME, "Jobs that ended before this time."),
    ("idempotencyKey", _TEXT, "Jobs with this idempotency key."),
    ("errorCode", _TEXT, "Jobs whose latest attempt failed with this code."),
    ("search", _TEXT, "A job's id, its idempotency key, or words of the error of a failed job."),
)

_SUMMARY: Final[Schema] = _object(
    {
        "jobId": _ID,
        "status": {"type": "string", "enum": [status.value for status in JobStatus]},
        "type": _TEXT,
        "nextRunAt": _or_null(_TIME),
    }
)
_JOB: Final[dict[str, Schema]] = {
    "jobId": _ID,
    "type": _TEXT,
    "fingerprint": _TEXT,
    "status": {"type": "string", "enum": [status.value for status in JobStatus]},
    "payload": {},
    "priority": _NUMBER,
    "attempt": _NUMBER,
    "maxAttempts": _NUMBER,
    "timeoutSeconds": _NUMBER,
    "createdAt": _TIME,
    "idempotencyKey": _or_null(_TEXT),
    "createdBy": _or_null(_TEXT),
    "nextRunAt": _or_null(_TIME),
    "startedAt": _or_null(_TIME),
    "finishedAt": _or_null(_TIME),
    "cancelRequestedAt": _or_null(_TIME),
    "workerId": _or_null(_TEXT),
    "progress": {},
    "result": {},
    "error": {"anyOf": [_ref("JobError"), {"type": "null"}]},
}
_ERROR: Final[dict[str, Schema]] = {
    "code": {"type": "string", "description": "A stable name for programs."},
    "message": {"type": "string", "description": "A sentence for people, which may change."},
    "details": {
        **_list_of(_ref("ErrorDetail")),
        "description": "One object per fault: its `path`, a JSON Pointer, `code` and `message`.",
    },
}
_ANY_OBJECT: Final[Schema] = {"type": "object", "additionalProperties": True}
"""With the keyword, because for generators an object without properties has none."""
_SCHEMAS: Final[dict[str, Schema]] = {
    "Job": _object(_JOB),
    "JobWithAttempts": _object(
        {
            **_JOB,
            "attempts": _list_of(_ref("JobAttempt")),
            "allAttempts": {
                "type": "boolean",
                "description": "Whether `attempts` has all attempts. If false, it has the latest.",
            },
        }
    ),
    "JobAttempt": _object(
        {
            "attempt": _NUMBER,
            "workerId": _TEXT,
            "startedAt": _TIME,
            "finishedAt": _or_null(_TIME),
            "outcome": {
                "type": ["string", "null"],
                "enum": [*(outcome.value for outcome in AttemptOutcome), None],
            },
            "error": {"anyOf": [_ref("JobError"), {"type": "null"}]},
            "stillRunning": _TRUTH,
        }
    ),
    "JobLogs": _object(
        {
            "lines": _list_of(
                _object(
                    {
                        "attempt": _NUMBER,
                        "loggedAt": _TIME,
                        "level": {"type": "string", "enum": [level.value for level in LogLevel]},
                        "message": _TEXT,
                        "data": _ANY_OBJECT,
                    }
                )
            ),
            "allLines": {
                "type": "boolean",
                "description": "Whether `lines` has the lines of all attempts. If false, it has"
                " those of the latest.",
            },
        }
    ),
    "JobError": _object({"code": _TEXT, "message": _TEXT, "details": {}}),
    "JobSummary": _SUMMARY,
    "JobPage": _object(
        {
            "jobs": _list_of(_ref("Job")),
            "pageInfo": _object(
                {
                    "hasNextPage": _TRUTH,
                    "stoppedEarly": {
                        "type": "boolean",
                        "description": "Whether the page has fewer jobs than `first` although more"
                        " follow, because it would have been too large or too many jobs would have"
                        " been searched. It may have no jobs then.",
                    },
                    "endCursor": {
                        **_or_null(_TEXT),
                        "description": "Pass it as `after` to get the next page.",
                    },
                }
            ),
        }
    ),
    "BulkResult": {
        "oneOf": [
            _object({"status": _one_of(200, 201), "job": _ref("JobSummary")}),
            _object({"status": _one_of(404, 409, 422), "error": _ref("ErrorContent")}),
        ]
    },
    "BulkResults": _object({"results": _list_of(_ref("BulkResult"))}),
    "Nothing": {"type": "object", "maxProperties": 0},
    "Error": _object({"error": _ref("ErrorContent")}),
    "ErrorContent": _object(_ERROR),
    "ErrorDetail": {
        **_ANY_OBJECT,
        "properties": {
            "path": {"type": "string", "description": "The place of a fault: a JSON Pointer."},
            "code": {"type": "string", "description": "A stable name of the fault."},
            "message": {"type": "string", "description": "A sentence for people."},
            "suggestion": {"type": "string", "description": "A similar job type."},
        },
    },
}

_REFUSALS: Final = {
    "400": "The body is not JSON.",
    "401": "The request has no valid token.",
    "403": "The token lacks the scope, or excludes the job type.",
    "404": "The job, the job type or the upload does not exist.",
    "409": "The status of the job, its idempotency key, an existing picture or the storage does not"
    " allow it.",
    "413": "The request is too large.",
    "415": "The Content-Type is not one that the request takes, or the body is compressed.",
    "422": "The input is not valid. `details` has the faults.",
    "429": "There are too many requests. Wait for the seconds in `Retry-After`.",
    "500": "An unexpected error, which is logged under the `errorId`.",
    "503": "The database or another service is not available. Send the request again.",
}
_ALWAYS: Final = ("401", "403", "429", "500", "503")
_WITH_BODY: Final = ("400", "413", "415", "422")


def _answers(good: Mapping[str, tuple[str, Schema]], *refused: str) -> dict[str, Any]:
    """Return the answers of an operation: successes by status, and refusals."""
    described = {status: (_REFUSALS[status], _ref("Error")) for status in (*refused, *_ALWAYS)}
    return {
        status: {"description": text, "content": {JSON: {"schema": schema}}}
        for status, (text, schema) in sorted({**good, **described}.items())
    }


def _body(name: str) -> dict[str, Any]:
    return _body_of(_ref(name))


def _body_of(schema: Schema) -> dict[str, Any]:
    return {"required": True, "content": {JSON: {"schema": schema}}}


def _parameter(name: str, schema: Schema, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "schema": schema,
        "description": description,
        **({"style": "form", "explode": True} if schema["type"] == "array" else {}),
    }


def _paths(max_page_size: int, max_bulk_size: int) -> dict[str, Any]:
    job_id = {"name": "id", "in": "path", "required": True, "schema": _TEXT}
    stored = {
        "201": ("The job is stored on disk. `Location` has its path.", _ref("JobSummary")),
        "200": ("An earlier request with this idempotency key stored it.", _ref("JobSummary")),
    }
    changed = {"200": ("The job after the change.", _ref("Job"))}
    page = {"200": ("The page. `Link` has the URL of the next one.", _ref("JobPage"))}
    return {
        "/jobs": {
            "get": {
                "operationId": "listJobs",
                "summary": "A page of jobs, newest first. Needs jobs:read or jobs:own.",
                "parameters": [
                    _parameter("type", _list_of(_TEXT), "Job types. Defaults to all."),
                    _parameter(
                        "status",
                        _list_of({"type": "string", "enum": [each.value for each in JobStatus]}),
                        "Statuses. Defaults to all.",
                    ),
                    *(_parameter(name, schema, text) for name, schema, text in _FILTERS),
                    _parameter(
                        "first",
                        {
                            "type": "integer",
                            "minimum": 1,
                            "maximum": max_page_size,
                            "default": PAGE_SIZE,
                        },
                        "The number of jobs on the page.",
                    ),
                    _parameter("after", _TEXT, "The `endCursor` of the previous page."),
                ],
                "responses": _answers(page, "422"),
            },
            "post": {
                "operationId": "enqueueJob",
                "summary": "Store one job. Needs jobs:enqueue or jobs:own.",
                "requestBody": _body("EnqueueRequest"),
                "responses": _answers(stored, "404", "409", *_WITH_BODY),
            },
        },
        "/jobs/bulk": {
            "post": {
                "operationId": "enqueueJobs",
                "summary": f"Store up to {max_bulk_size:,} jobs. Needs jobs:enqueue or jobs:own.",
                "requestBody": _body("BulkRequest"),
                "responses": _answers(
                    {
                        "200": (
                            "A result for each job, in order, with the status that it would have"
                            " had alone.",
                            _ref("BulkResults"),
                        )
                    },
                    *_WITH_BODY,
                ),
            }
        },
        "/jobs/{id}": {
            "get": {
                "operationId": "getJob",
                "summary": "One job, with its attempts. Needs jobs:read or jobs:own.",
                "parameters": [job_id],
                "responses": _answers({"200": ("The job.", _ref("JobWithAttempts"))}, "404"),
            }
        },
        "/jobs/{id}/logs": {
            "get": {
                "operationId": "getJobLogs",
                "summary": "What the handler of a job logged. Needs jobs:read.",
                "parameters": [job_id],
                "responses": _answers({"200": ("The lines.", _ref("JobLogs"))}, "404"),
            }
        },
        "/jobs/{id}/cancel": {
            "post": {
                "operationId": "cancelJob",
                "summary": "Cancel a job. The worker of a running job is requested to stop."
                " Needs jobs:admin or jobs:own.",
                "parameters": [job_id],
                "requestBody": _body("Nothing"),
                "responses": _answers(changed, "404", "409", *_WITH_BODY),
            }
        },
        "/jobs/{id}/retry": {
            "post": {
                "operationId": "retryJob",
                "summary": "Queue a failed or cancelled job again. Needs jobs:admin or jobs:own.",
                "parameters": [job_id],
                "requestBody": _body("Nothing"),
                "responses": _answers(changed, "404", "409", *_WITH_BODY),
            }
        },
    }


_PLACE: Final[list[dict[str, Any]]] = [
    {
        "name": "assetId",
        "in": "path",
        "required": True,
        "schema": TypeAdapter(AssetId).json_schema(),
    },
    {
        "name": "versionNumber",
        "in": "path",
        "required": True,
        "schema": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
    },
]
_STORED: Final = _answers(
    {
        "201": (
            "The picture is stored.",
            _object({"assetId": _TEXT, "versionNumber": _NUMBER, "bytes": _NUMBER}),
        )
    },
    "404",
    "409",
    "413",
    "415",
    "422",
)
_UPLOAD: Final[dict[str, Any]] = {
    "/assets/{assetId}/{versionNumber}": {
        "post": {
            "operationId": "uploadAsset",
            "summary": "Store the picture of one version of an asset."
            " Needs jobs:enqueue or jobs:own.",
            "parameters": _PLACE,
            "requestBody": {
                "required": True,
                "content": {media_type: {} for media_type in FORMATS},
            },
            "responses": _STORED,
        }
    },
    "/assets/{assetId}/{versionNumber}/presign": {
        "post": {
            "operationId": "presignAsset",
            "summary": "Get a request to send a picture to the bucket directly, of exactly as many"
            " bytes. Then finish the upload. Needs jobs:enqueue or jobs:own.",
            "parameters": _PLACE,
            "requestBody": _body_of(_object({"bytes": {"type": "integer", "minimum": 1}})),
            "responses": _answers(
                {
                    "201": (
                        "The request, and the id to finish the upload with.",
                        _object(
                            {
                                "uploadId": _TEXT,
                                "method": {"type": "string", "const": "PUT"},
                                "url": _TEXT,
                                "headers": {"type": "object", "additionalProperties": _TEXT},
                                "expiresAt": _TIME,
                            }
                        ),
                    )
                },
                "404",
                "409",
                *_WITH_BODY,
            ),
        }
    },
    "/assets/{assetId}/{versionNumber}/finish": {
        "post": {
            "operationId": "finishAsset",
            "summary": "Store a picture that was sent to a presigned URL."
            " Needs jobs:enqueue or jobs:own.",
            "parameters": _PLACE,
            "requestBody": _body_of(_object({"uploadId": _TEXT})),
            "responses": {**_STORED, **_answers({}, "400")},
        }
    },
}
