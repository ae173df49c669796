"""The `errors` of a response: known exceptions by their code, unexpected ones only by an id."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from graphql import ExecutionResult, GraphQLError
from pydantic import JsonValue

from job_registry import CodedError
from job_registry.errors import shortened_text
from job_registry_api.auth import Unauthenticated
from job_registry_api.logs import log_unexpected

MAX_ERRORS: Final = 20
"""The most errors that a response lists."""

MAX_MESSAGE: Final = 1_000

# The codes of requests that do not fit GraphQL or the schema: Apollo's names, in lower case.
PARSE_FAILED: Final = "graphql_parse_failed"
VALIDATION_FAILED: Final = "graphql_validation_failed"
BAD_USER_INPUT: Final = "bad_user_input"
BAD_REQUEST: Final = "bad_request"
OPERATION_RESOLUTION_FAILURE: Final = "operation_resolution_failure"


def coded(code: str, message: str, **details: JsonValue) -> GraphQLError:
    """Return an error with a code and details."""
    return GraphQLError(message, extensions={"code": code, **details})


def message_of(error: GraphQLError) -> str:
    """Return the message of an error of GraphQL's own, bounded and without words of Python."""
    message = shortened_text(error.message, MAX_MESSAGE)
    if message.startswith("Variable '$"):
        # It ends with a value of the variable, as Python writes it.
        return _QUOTED_OR_WORD.sub(lambda found: _JSON_WORDS.get(found[0], found[0]), message)
    # A value from the document is quoted as it stands there.
    return message.replace("not to be None", "not to be null")


_QUOTED_OR_WORD: Final = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?<![\w.$])(?:None|True|False)\b"""
)
_JSON_WORDS: Final = {"None": "null", "True": "true", "False": "false"}


def format_result(result: ExecutionResult) -> dict[str, Any]:
    """Format a result for a response. It has no `data`, not even null, if nothing was executed."""
    if not result.errors:
        return {"data": result.data}
    errors = [format_error(error) for error in result.errors[:MAX_ERRORS]]
    if len(result.errors) > MAX_ERRORS:
        more = len(result.errors) - MAX_ERRORS
        errors.append({"message": f"{more:,} more errors are not listed."})
    if result.data is None and all(error.path is None for error in result.errors):
        return {"errors": errors}
    return {"errors": errors, "data": result.data}


def format_exception(exception: Exception) -> dict[str, Any]:
    """Format an exception that no field raised."""
    return format_error(GraphQLError("", original_error=exception))


def format_error(error: GraphQLError) -> dict[str, Any]:
    """Format an error for a response.

    An unexpected exception is logged, and the client gets the id of that log line: the message of
    an exception may quote a payload, a path or a statement.
    """
    original = error.original_error
    extensions: dict[str, Any]
    match original:
        case None | GraphQLError():
            # GraphQL's own, of a variable or an argument: the document itself is valid. It quotes
            # names and values of the request.
            message = message_of(error)
            extensions = {"code": BAD_USER_INPUT, **(error.extensions or {})}
        case CodedError():
            message, extensions = str(original), {"code": original.code, **original.details()}
        case _:
            error_id = log_unexpected("graphql", original)
            message = f"Something went wrong here. It is logged as {error_id}."
            extensions = {"code": "internal_error", "errorId": error_id}
    return {**error.formatted, "message": message, "extensions": extensions}


def token_fault(errors: Iterable[dict[str, Any]]) -> str | None:
    """Return why the caller's token is not valid any more, if the formatted errors say so."""
    for error in errors:
        if error.get("extensions", {}).get("code") == Unauthenticated.code:
            return str(error["message"])
    return None
