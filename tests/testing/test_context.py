"""`job_context`: calling a handler directly, and seeing what it did."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import pytest

from job_registry import Cancel, Fail, JobContext
from job_registry.testing import FollowUp, job_context
from job_registry_api import InputInvalid
from tests.testing.kit_jobs import (
    Count,
    Do,
    MailSend,
    count_on,
    do_async,
    run_async,
    send,
    wait_in_thread,
)


async def test_a_handler_is_called_directly() -> None:
    job: JobContext = job_context()
    assert await send(job, MailSend(to="ada")) == {"sent": "ada"}


async def test_exceptions_reach_the_test() -> None:
    with pytest.raises(Fail, match="never"):
        await run_async(job_context(), Do(what="fail"))


async def test_it_records_progress_as_json() -> None:
    job = job_context()
    await run_async(job, Do(what="progress"))
    job.progress(cast(Any, Count(number=2)))
    assert job.progress_reports == [{"done": 1}, {"number": 2}]


async def test_it_records_the_jobs_that_the_handler_enqueues() -> None:
    job = job_context()
    await count_on(job, Count(number=1))
    job.enqueue(MailSend(to="ada"), priority=90)
    assert job.enqueued == [FollowUp(Count(number=2)), FollowUp(MailSend(to="ada"), priority=90)]


def test_it_refuses_what_a_worker_would_refuse() -> None:
    job = job_context()
    with pytest.raises(InputInvalid, match="/priority"):
        job.enqueue(MailSend(to="ada"), priority=101)
    with pytest.raises(TypeError, match="expected an instance of a Payload"):
        job.enqueue(cast(Any, {"to": "ada"}))
    with pytest.raises(TypeError, match="the progress cannot be stored: /: Expected a finite"):
        job.progress(float("nan"))
    with pytest.raises(TypeError, match="the progress cannot be stored: /a/1: Expected a JSON"):
        job.progress(cast(Any, {"a": [0, object()]}))
    assert (job.enqueued, job.progress_reports) == ([], [])


def test_it_can_be_cancelled() -> None:
    job = job_context()
    assert not job.cancel_requested
    job.request_cancel()
    with pytest.raises(Cancel):
        wait_in_thread(job, Do(what="ask"))


async def test_it_has_what_a_test_gives_it() -> None:
    job = job_context(
        do_async, attempt=2, state={"resource": "mine"}, created_by="eve", timeout_seconds=5
    )
    assert (job.type, job.attempt, job.max_attempts, job.created_by) == ("do.async", 2, 3, "eve")
    assert 4 < job.seconds_left <= 5
    assert await run_async(job, Do(what="resource")) == "mine"
    assert job_context(attempt=99).max_attempts == 99


def test_its_folder_for_assets_is_deleted_with_it(tmp_path: Path) -> None:
    job = job_context()
    folder = Path(job.assets)
    (folder / "picture.png").write_bytes(b"")
    del job
    gc.collect()
    assert not folder.exists()
    assert job_context(assets=tmp_path).assets == str(tmp_path)
    assert job_context(assets="memory://pictures").assets == "memory://pictures"


def test_a_resource_that_no_lifespan_yields_is_a_sentence() -> None:
    job = job_context(state={"http": 1})
    assert job.state.http == 1
    with pytest.raises(AttributeError, match="job.state has no mailer: no lifespan of this worker"):
        _ = job.state.mailer
