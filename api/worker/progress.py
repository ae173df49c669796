"""Takes a handler's progress: checks it where it is given, and passes its JSON text on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from job_registry import json_document


class Progress:
    """The progress of one attempt. `pass_on` takes JSON text that can be stored, in any thread."""

    def __init__(self, pass_on: Callable[[bytes], None], log: Any, *, max_bytes: int) -> None:
        self._pass_on = pass_on
        self._log = log
        self._max_bytes = max_bytes
        self._warned = False

    def report(self, value: JsonValue) -> None:
        """Pass a value on, as it is now: the handler may change it later. Raises nothing.

        The first value of an attempt that cannot be stored is a warning in the log.
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
            self._log.warning("job.progress_refused", reason=reason)
