"""Cancelling jobs, and queueing finished jobs again."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from job_registry import JobRegistry
from job_registry.errors import FaultBudget
from job_registry_api.queue.errors import InputInvalid, JobNotFound, JobStateConflict
from job_registry_api.queue.events import Events, JobEvent
from job_registry_api.queue.filters import check_owner
from job_registry_api.queue.models import JobRecord, JobStatus, Owner
from job_registry_api.queue.opening import Opening
from job_registry_api.queue.requests import parse_job_id, unknown_types
from job_registry_api.queue.store import Ended, Store

UNPARK_BATCH: Final = 500
"""Jobs per transaction. On SQLite, leases wait for it."""

CHANGE_TRIES: Final = 3
"""How often a change is tried on a job that others change between the statement and the look at why
it changed nothing."""

_ENDED: Final = (JobStatus.FAILED, JobStatus.CANCELLED)
_NOT_ENDED: Final = (JobStatus.QUEUED, JobStatus.RUNNING)


class Changing(Opening):
    """The part of `JobQueue` that changes jobs on request."""

    registry: JobRegistry
    events: Events
    _store: Store

    async def cancel(self, job_id: str | uuid.UUID, *, owner: Owner | None = None) -> JobRecord:
        """Cancel a queued job at once. Request that the worker of a running job stops.

        With `owner`, only a job that this subject enqueued: others are not found.

        Raises:
            JobNotFound: no job has this id, or another subject enqueued it.
            JobStateConflict: the job has ended.
        """
        return await self._change(job_id, owner, self._store.cancel, "cancelled", _NOT_ENDED)

    async def retry(self, job_id: str | uuid.UUID, *, owner: Owner | None = None) -> JobRecord:
        """Queue a failed or cancelled job again, to run now, with at least one attempt left.

        With `owner`, only a job that this subject enqueued: others are not found.

        Raises:
            JobNotFound: no job has this id, or another subject enqueued it.
            JobStateConflict: the job is neither failed nor cancelled.
        """
        return await self._change(job_id, owner, self._store.retry, "retried", _ENDED)

    async def unpark(
        self, job_types: Sequence[str] | None = None, *, budget: FaultBudget | None = None
    ) -> int:
        """Make the parked jobs of these types due for every worker, and return how many there were.

        None means all types, also those that are not registered. What refused the jobs is
        forgotten. They are changed in batches; if it raises, some may have been changed.
        Suggestions of names are charged to the `budget` of the caller's request.

        Raises:
            InputInvalid: a type is not registered.
        """
        self.check_open()
        if job_types is None:
            stored = [name for name, of in (await self._store.counts()).items() if of.parked]
        else:
            if faults := unknown_types(self.registry, job_types, budget):
                raise InputInvalid(tuple(faults))
            found = dict.fromkeys(self.registry.get_type(name) for name in job_types)
            stored = [name for each in found for name in (each.name, *each.former_names)]
        unparked = 0
        # Jobs that a worker parks again in the meantime are left out: this would never end.
        parked_until = await self._store.last_parked_at()
        while stored and parked_until is not None:
            jobs = await self._store.unpark(stored, parked_until=parked_until, jobs=UNPARK_BATCH)
            self.events.publish([JobEvent.of("job.unparked", job) for job in jobs])
            unparked += len(jobs)
            if not jobs:
                break
        return unparked

    async def _change(
        self,
        job_id: str | uuid.UUID,
        owner: Owner | None,
        change: Callable[[uuid.UUID, Owner | None], Awaitable[Ended | None]],
        operation: str,
        changeable: Sequence[JobStatus],
    ) -> JobRecord:
        self.check_open()
        check_owner(owner)
        wanted = parse_job_id(job_id)
        tries = 0
        while (changed := await change(wanted, owner)) is None:
            tries += 1
            found = await self._store.get(wanted, owner)
            if found is None:
                raise JobNotFound(str(job_id))
            if found.status not in changeable or tries == CHANGE_TRIES:
                raise JobStateConflict(str(job_id), found.status, operation)
        self.events.publish([JobEvent.of_change(changed)])
        job = changed.job or await self._store.get(wanted)
        if job is None:  # It was deleted in the meantime.
            raise JobNotFound(str(job_id))
        return job
