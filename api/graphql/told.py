"""Errors of a request as clients see them."""

from __future__ import annotations

from typing import Any

from graphql import GraphQLError

from api.logs import log_unexpected
from api.queue.errors import EventsMissed, InputInvalid, QueueUnavailable


def told(error: GraphQLError) -> dict[str, Any]:
    """An error as clients see it: what nobody foresaw is logged, and only its id is told."""
    original = error.original_error
    extensions: dict[str, Any]
    match original:
        case None:
            return dict(error.formatted)
        case GraphQLError():
            return dict(error.formatted)
        case EventsMissed():
            message, extensions = str(original), {"code": "events_missed"}
        case QueueUnavailable():
            message, extensions = str(original), {"code": "queue_unavailable"}
        case InputInvalid():
            message = "; ".join(f"{v.path}: {v.message}" for v in original.violations)
            extensions = {
                "code": "validation_error",
                "violations": [
                    {"path": v.path, "code": v.code, "message": v.message}
                    for v in original.violations
                ],
            }
        case _:
            error_id = log_unexpected("graphql", original)
            message = f"Something went wrong here. It is logged as {error_id}."
            extensions = {"code": "internal_error", "errorId": error_id}
    return {**error.formatted, "message": message, "extensions": extensions}
