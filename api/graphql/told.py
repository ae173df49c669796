"""Errors of a request as clients see them."""

from __future__ import annotations

from typing import Any

from graphql import ExecutionResult, GraphQLError

from job_registry import CodedError
from job_registry_api.logs import log_unexpected


def told(error: GraphQLError) -> dict[str, Any]:
    """An error as clients see it: what nobody foresaw is logged, and only its id is told."""
    original = error.original_error
    extensions: dict[str, Any]
    match original:
        case None | GraphQLError():
            return dict(error.formatted)
        case CodedError():
            message, extensions = str(original), {"code": original.code, **original.details()}
        case _:
            error_id = log_unexpected("graphql", original)
            message = f"Something went wrong here. It is logged as {error_id}."
            extensions = {"code": "internal_error", "errorId": error_id}
    return {**error.formatted, "message": message, "extensions": extensions}


def told_of(error: Exception) -> dict[str, Any]:
    """An exception that no field raised, as clients see it."""
    return told(GraphQLError("", original_error=error))


def told_result(result: ExecutionResult) -> dict[str, Any]:
    """A result as clients see it. Without data, not even null, where nothing was executed."""
    if not result.errors:
        return {"data": result.data}
    errors = [told(error) for error in result.errors]
    if result.data is None and all(error.path is None for error in result.errors):
        return {"errors": errors}
    return {"errors": errors, "data": result.data}
