"""Arguments of wrong Python types: each is an error that names the argument."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from job_registry import EnqueueRequest
from job_registry_api.queue.errors import InputInvalid
from job_registry_api.queue.filters import JobFilter
from job_registry_api.queue.models import JobRecord, JobStatus
from job_registry_api.queue.queue import JobQueue

pytestmark = pytest.mark.any_database

Call = Callable[[Any], Awaitable[object]]

ID: Any = uuid.uuid4()


def filtered(**values: Any) -> JobFilter:
    return JobFilter(**values)


@pytest.mark.cases(12)
@pytest.mark.parametrize(
    ("call", "path", "message"),
    [
        (lambda q: q.get(7), "/jobId", "Expected the id of a job, as text or a uuid.UUID; got 7."),
        (lambda q: q.get(None), "/jobId", "got null."),
        (lambda q: q.result(b"x"), "/jobId", "got a value of the type bytes."),
        (lambda q: q.cancel(7), "/jobId", "got 7."),
        (lambda q: q.retry(JobRecord), "/jobId", "got JobRecord."),
        (lambda q: q.wait(7, seconds=1), "/jobId", "got 7."),
        (lambda q: q.logs(7), "/jobId", "got 7."),
        (lambda q: q.result(ID, timeout="5"), "/timeout", 'Expected a number of seconds; got "5".'),
        (lambda q: q.result(ID, timeout=True), "/timeout", "got true."),
        (lambda q: q.wait(ID, seconds="5"), "/timeoutSeconds", "from 0 to 30; got "),
        (lambda q: q.attempts([ID, "x"]), "/jobIds/1", "Expected the id of a job as a uuid.UUID;"),
        (lambda q: q.attempts(str(ID)), "/jobIds", "Expected a list of ids of jobs; got "),
        (lambda q: q.attempts(ID), "/jobIds", "Expected a list of ids of jobs; got "),
        (lambda q: q.get_many([7]), "/jobIds/0", "Expected the id of a job as a uuid.UUID; got 7."),
        (lambda q: q.list(first="5"), "/first", 'Expected a whole number from 1 to 200; got "5".'),
        (lambda q: q.list(first=True), "/first", "got true."),
        (lambda q: q.list(last=1.5), "/last", "got 1.5."),
        (lambda q: q.list({"types": ["a"]}), "/filter", "Expected a JobFilter; got "),
        (lambda q: q.count(["a"]), "/filter", "Expected a JobFilter; got "),
        (lambda q: q.list(None), "/filter", "Expected a JobFilter; got null."),
        (
            lambda q: q.list(filtered(types="test.ping")),
            "/filter/types",
            'Expected a tuple of names of job types; got "test.ping".',
        ),
        (lambda q: q.list(filtered(types=7)), "/filter/types", "got 7."),
        (lambda q: q.list(filtered(types=("a", 7))), "/filter/types/1", "got 7."),
        (
            lambda q: q.list(filtered(statuses="queued")),
            "/filter/statuses",
            'Expected a tuple of statuses; got "queued".',
        ),
        (
            lambda q: q.count(filtered(statuses=("queued", "done"))),
            "/filter/statuses/1",
            "Expected one of queued, running, succeeded, failed, cancelled; got ",
        ),
        (lambda q: q.list(owner="ada"), "/owner", 'Expected an Owner; got "ada".'),
        (lambda q: q.count(owner="ada"), "/owner", 'Expected an Owner; got "ada".'),
        (lambda q: q.get(ID, owner="ada"), "/owner", 'Expected an Owner; got "ada".'),
        (lambda q: q.cancel(ID, owner="ada"), "/owner", 'Expected an Owner; got "ada".'),
        (lambda q: q.unpark("test.ping"), "/jobTypes", "Expected a list of names of job types;"),
        (lambda q: q.unpark([7]), "/jobTypes/0", "Expected the name of a job type; got 7."),
        (lambda q: q.enqueue_many(7), "/jobs", "Expected a list of payloads and requests; got 7."),
        (lambda q: q.enqueue(EnqueueRequest(ID, {})), "/type", "Expected the name of a job type;"),
        (lambda q: q.snooze("0" * 64, "5"), "/seconds", 'got "5".'),
        (lambda q: q.complete(7), "/leaseToken", "Expected the token of a lease; got 7."),
        (lambda q: q.lease("test.ping", "w"), "/jobTypes", "Expected a list of names of job"),
        (lambda q: q.lease(["test.ping"], 7), "/workerId", "Expected a string of 1 to 255"),
        (lambda q: q.lease(["test.ping"], "w", limit="1"), "/limit", 'got "1".'),
        (lambda q: q.lease(["test.ping"], "w", wait_seconds="1"), "/waitSeconds", 'got "1".'),
    ],
)
async def test_an_argument_of_a_wrong_type_is_named(
    queue: JobQueue, call: Call, path: str, message: str
) -> None:
    with pytest.raises(InputInvalid) as refused:
        await call(queue)
    (fault,) = refused.value.violations
    assert fault.path == path
    assert message in fault.message


async def test_text_and_status_are_both_taken(queue: JobQueue) -> None:
    job = (await queue.enqueue(EnqueueRequest("test.ping", {}))).job
    texts: Any = ["queued"]
    for statuses in ((JobStatus.QUEUED,), texts):
        page = await queue.list(JobFilter(types=("test.ping",), statuses=statuses))
        assert [each.id for each in page.jobs] == [job.id]
    text: Any = str(job.id)
    assert await queue.logs(text) == []
