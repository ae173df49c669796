"""The jobs that a handler enqueues with `job.enqueue`, kept until its attempt succeeds."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from job_registry import CodedError, DefinitionError, EnqueueRequest, Payload, Violation
from job_registry_api.queue.errors import InputInvalid
from job_registry_api.queue.queue import JobQueue
from job_registry_api.queue.store import NewJob
from job_registry_api.worker.child import ENDED, address_of_class

REFUSED: Final = "follow_up_refused"
"""The error code of a job whose handler enqueued a job that cannot be stored."""


class FollowUps:
    """The jobs that the handler of one attempt has enqueued, in order.

    `refusal` says why a job of a handler in a process was refused. Its handler does not get the
    error, because the process does not know the job types.
    """

    def __init__(self, queue: JobQueue, created_by: str | None) -> None:
        self._queue = queue
        self._created_by = created_by
        self.jobs: list[NewJob] = []
        self.refusal: str | None = None
        self._has_ended = False
        # A thread of the handler may still run: its job is stored or refused, and never lost.
        self._lock = threading.Lock()

    def end(self) -> None:
        """Refuse further jobs, because the handler has ended."""
        with self._lock:
            self._has_ended = True

    def add(self, payload: Payload, **options: Any) -> str:
        """Check a job, keep it, and return its id. Called in the thread of the handler.
        See `JobContext.enqueue`.

        Raises:
            CodedError: the job is refused.
            RuntimeError: the handler has ended.
        """
        with self._lock:
            if self._has_ended:
                raise RuntimeError(ENDED)
            return str(self._add(self._queue.request(payload, **options)).id)

    def add_from_process(self, message: Mapping[str, Any]) -> None:
        """Keep a job that a handler in a process has enqueued, or the reason of its refusal."""
        options = dict(message["options"])
        if options["schedule_at"] is not None:
            options["schedule_at"] = datetime.fromisoformat(options["schedule_at"])
        try:
            name = options.pop("job_type") or self._type_of(message["class"])
            request = EnqueueRequest(name, message["payload"], **options)
            self._add(request, uuid.UUID(message["id"]), message.get("traceparent"))
        except (CodedError, DefinitionError) as refused:
            self.refusal = self.refusal or str(refused)

    def _add(
        self, request: EnqueueRequest, job_id: uuid.UUID | None = None, parent: str | None = None
    ) -> NewJob:
        most = self._queue.max_bulk_size
        if len(self.jobs) >= most:
            message = f"A handler can enqueue at most {most} jobs."
            raise InputInvalid((Violation("", "too_long", message),))
        new = self._queue.admit(request, self._created_by)
        if job_id is not None:
            new = new._replace(id=job_id)
        if (tracing := self._queue.tracing) is not None:
            new = new._replace(traceparent=tracing.created(new.id, new.type, parent))
        self.jobs.append(new)
        return self.jobs[-1]

    def _type_of(self, address: str) -> str:
        registry = self._queue.registry
        for job_type in registry.values():
            for payload in (job_type.payload, *job_type.accepts):
                if address_of_class(payload) == address:
                    return registry.type_of(payload)
        raise DefinitionError(
            f"no job type of this registry has the payload {address}; add its job type to the"
            " registry"
        )
