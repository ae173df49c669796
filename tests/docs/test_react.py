"""The example page in React: built, and driven in a browser with a token of `jobs:own`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from PIL import Image
from playwright.async_api import FilePayload, expect

from job_registry import EnqueueRequest
from job_registry.discovery import load_registry
from job_registry_api import JobQueue
from job_registry_api.graphql.schema import SDL_FILE
from tests import ROOT
from tests.docs.pages import REACT
from tests.http_client import serving
from tests.node_packages import build_project, copy_project, skip_without_packages
from tests.postgresql_server import free_port
from tests.test_own_jobs import ADA, BOB, SECRET, bearer
from tests.web.browser import browsing, needs_browser

SCREENSHOT: Final = ROOT / "build" / "react.png"
WORKER: Final = bearer("worker", "jobs:work")

THUMBNAIL: Final = {"assetId": "cat", "versionNumber": 1}

LEASE = """mutation { leaseJobs(input: {jobTypes: ["thumbnail.create"], workerId: "w"}) {
  ... on LeaseJobsSuccess { leases { leaseToken } } } }"""
HEARTBEAT = """mutation ($token: String!, $progress: JSON) {
  heartbeatJob(leaseToken: $token, progress: $progress) {
    ... on HeartbeatJobSuccess { cancelRequested } } }"""
RELEASE = "mutation ($token: String!) { releaseJob(leaseToken: $token) { __typename } }"


def test_the_packages_are_those_that_the_tests_have() -> None:
    frontend = json.loads((ROOT / "tests/frontend/package.json").read_text())["devDependencies"]
    example = json.loads((REACT / "package.json").read_text())
    assert (example["dependencies"] | example["devDependencies"]).items() <= frontend.items()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, generated from the committed schema, checked and built."""
    skip_without_packages()
    folder = tmp_path_factory.mktemp("react")
    copy_project(REACT, folder)
    build_project(folder, ["npm", "run", "build"], SCHEMA=str(SDL_FILE))
    return folder


@asynccontextmanager
async def page_server(folder: Path, server: str) -> AsyncIterator[str]:
    """The host and port of the built page, which passes requests on to a server."""
    address = f"127.0.0.1:{(port := free_port())}"
    process = await asyncio.create_subprocess_exec(
        *("node_modules/.bin/vite", "preview", "--host", "127.0.0.1"),
        *("--port", str(port), "--strictPort"),
        cwd=folder,
        env={**os.environ, "SERVER": f"http://{server}"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            while str(port) not in (await process.stdout.readline()).decode():
                assert process.returncode is None
        yield address
    finally:
        process.terminate()
        await process.wait()


@needs_browser
@pytest.mark.slow
async def test_a_user_sees_faults_at_their_fields_and_follows_and_cancels_own_jobs(
    built: Path, sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    settings = {
        "auth_hs256_secret": SECRET,
        "auth_issuer": "https://i.example",
        "auth_audience": "jobs",
        "assets": str(tmp_path / "assets"),
    }
    async with (
        serving(f"sqlite:///{tmp_path / 'jobs.db'}", "--no-worker", **settings) as (server, _),
        httpx.AsyncClient(base_url=f"http://{server}", timeout=30) as client,
        page_server(built, server) as address,
        browsing(address) as page,
    ):
        # The job of another user is not shown.
        job = {"type": "thumbnail.create", "payload": {"assetId": "bobs", "versionNumber": 1}}
        assert (await client.post("/jobs", json=job, headers=BOB)).status_code == 201
        token = ADA["authorization"].removeprefix("Bearer ")
        await page.add_init_script(f"localStorage.setItem('token', {json.dumps(token)})")
        await page.goto(f"http://{address}/")

        picture = FilePayload(name="cat.png", mimeType="image/png", buffer=_png())
        button = page.get_by_role("button", name="Create thumbnails")
        rows = page.locator("tbody tr")
        await page.get_by_label("Picture").set_input_files(picture)
        await page.get_by_label("Sizes").fill("128, 0")
        await button.click()
        of_sizes = page.locator("label", has_text="Sizes").get_by_role("alert")
        await expect(of_sizes).to_have_text("Expected a value of at least 1; got 0.")
        await page.get_by_label("Sizes").fill("128, 64")
        await page.get_by_label("Priority").fill("200")
        await button.click()
        of_priority = page.locator("label", has_text="Priority").get_by_role("alert")
        await expect(of_priority).to_contain_text("200")
        await expect(of_sizes).to_have_count(0)
        await expect(rows).to_have_count(0)

        await page.get_by_label("Priority").fill("80")
        await button.click()
        await expect(rows).to_have_count(1)
        await expect(rows).to_contain_text("queued")
        await expect(page.get_by_role("alert")).to_have_count(0)
        assert [each.name for each in (tmp_path / "assets").glob("*/1.png")] == ["1.png"]

        # A worker leases it before the other user's, whose priority is lower.
        (lease,) = (await _ask(client, LEASE))["leaseJobs"]["leases"]
        running = {"token": lease["leaseToken"], "progress": {"rendered": 1, "of": 2}}
        await _ask(client, HEARTBEAT, **running)
        await expect(rows).to_contain_text("running")
        await expect(rows.locator("progress")).to_have_attribute("value", "1")
        SCREENSHOT.parent.mkdir(exist_ok=True)
        await page.screenshot(path=SCREENSHOT)
        cancel = page.get_by_role("button", name="Cancel")
        await cancel.click()
        await expect(cancel).to_be_disabled()
        # The button is disabled before the server has answered.
        async with asyncio.timeout(10):
            while not (await _ask(client, HEARTBEAT, **running))["heartbeatJob"]["cancelRequested"]:
                await asyncio.sleep(0.05)
        await _ask(client, RELEASE, token=lease["leaseToken"])
        await expect(rows).to_contain_text("cancelled")
        await expect(cancel).to_have_count(0)

        await button.click()
        await expect(rows).to_have_count(2)
        await cancel.click()
        await expect(page.locator('tr[data-status="CANCELLED"]')).to_have_count(2)


@needs_browser
@pytest.mark.slow
async def test_the_page_keeps_its_jobs_over_a_restart_and_reads_them_again(
    built: Path, sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    server = f"127.0.0.1:{free_port()}"
    listening = ("--no-worker", "--port", server.rpartition(":")[2])
    registry = load_registry(("job_registry.catalog",))

    async def enqueue() -> None:
        async with JobQueue.from_url(url, registry) as queue:
            await queue.enqueue(EnqueueRequest("thumbnail.create", THUMBNAIL))

    await enqueue()
    async with AsyncExitStack() as stack:
        async with serving(url, *listening):
            address = await stack.enter_async_context(page_server(built, server))
            page = await stack.enter_async_context(browsing(address, loses_connections=True))
            await page.goto(f"http://{address}/")
            rows, alert = page.locator("tbody tr"), page.get_by_role("alert")
            await expect(rows).to_have_count(1)
        await enqueue()
        # The page connects again, but cannot read the jobs yet.
        await page.route("**/graphql", lambda route: route.abort())
        async with serving(url, *listening):
            await expect(alert).to_have_count(1, timeout=60_000)
            await expect(rows).to_have_count(1)
            await page.unroute("**/graphql")
            await enqueue()
            await expect(rows).to_have_count(3)
            await expect(alert).to_have_count(0)


async def _ask(client: httpx.AsyncClient, document: str, **variables: Any) -> Any:
    content = {"query": document, "variables": variables}
    answer = (await client.post("/graphql", json=content, headers=WORKER)).json()
    assert "errors" not in answer, answer
    return answer["data"]


def _png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (32, 32), "navy").save(file, "PNG")
    return file.getvalue()
