"""Checks the progress that a handler reports, and passes it on as JSON text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from job_registry.json_values import json_document


class Progress:
    """The progress of one attempt. `pass_on` receives valid JSON text, in any thread.

    `make_logger` is called for a value that cannot be stored.
    """

    _warned = False

    def __init__(
        self, pass_on: Callable[[bytes], None], make_logger: Callable[[], Any], *, max_bytes: int
    ) -> None:
        self._pass_on = pass_on
        self._make_logger = make_logger
        self._max_bytes = max_bytes

    def report(self, value: JsonValue) -> None:
        """Pass on a copy of a value. Never raises.

        The first value of an attempt that cannot be stored is logged as a warning.
        """
        try:
            text, faults = json_document(
                to_jsonable_python(value, by_alias=True), max_bytes=self._max_bytes
            )
            reason = ", ".join(sorted({fault.code for fault in faults}))
        except Exception as error:
            text, reason = b"", type(error).__name__
        if not reason:
            self._pass_on(text)
        elif not self._warned:
            self._warned = True
            self._make_logger().warning("job.progress_refused", reason=reason)
