"""GraphiQL in a real browser that may reach this machine only, and how the page is served."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from graphql import build_schema, parse, validate
from playwright.async_api import Page, expect
from starlette.applications import Starlette
from starlette.routing import Mount

from job_registry_api import create_app, load_settings, pages
from job_registry_api.graphql.schema import SDL_FILE
from tests.http_client import Visit, serving
from tests.test_auth import AUTH, bearer, token
from tests.web.browser import browsing, needs_browser

ROOT = Path(__file__).parents[2]
TABS = ROOT / "api" / "web" / "src" / "tabs"
SCREENSHOT = ROOT / "build" / "graphiql.png"

needs_page = pytest.mark.skipif(
    not (pages.DIST / "index.html").is_file(),
    reason="GraphiQL is not built: install Node 20.19 or newer and run `make install`",
)


@pytest.fixture
async def address(
    request: pytest.FixtureRequest, sqlite_template: Path, tmp_path: Path
) -> AsyncIterator[str]:
    """The server's address; with a parameter, the server mounts the application under it."""
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    prefix = getattr(request, "param", None)
    if prefix is None:
        async with serving(url, "--no-worker") as (address, _):
            yield address
        return
    jobs = create_app(load_settings({"JOBS_DATABASE_URL": url}))
    server = uvicorn.Server(
        uvicorn.Config(Starlette(routes=[Mount(prefix, jobs)]), port=0, log_config=None)
    )
    async with jobs.running():
        running = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"{host}:{port}"
        server.should_exit = True
        await running


@pytest.fixture
async def page(address: str) -> AsyncIterator[Page]:
    async with browsing(address) as page:
        yield page


async def open_tab(page: Page, name: str) -> None:
    await page.get_by_role("button", name=name, exact=True).click()
    # GraphiQL gets the operation of the tab from its worker.
    await asyncio.sleep(1)


async def run(page: Page) -> None:
    await page.get_by_role("button", name="Execute query").click()


def response(page: Page) -> Any:
    return page.locator(".result-window")


@needs_page
@needs_browser
async def test_graphiql_runs_its_ready_tabs_completes_documents_and_sends_the_token(
    page: Page, address: str
) -> None:
    loading = await page.goto(f"http://{address}/graphql")
    assert loading is not None
    assert "unsafe-eval" not in loading.headers["content-security-policy"]
    await expect(page).to_have_title("Job Registry")
    for name in ("Enqueue", "Policies", "Follow"):
        await expect(page.get_by_role("button", name=name, exact=True)).to_be_visible()
    await expect(page.locator(".graphiql-query-editor .view-line").first).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollHeight - innerHeight") == 0

    # The policies.
    await open_tab(page, "Policies")
    await run(page)
    await expect(response(page)).to_contain_text('"maxAttempts": 3')

    # Following jobs, while one is enqueued elsewhere.
    await open_tab(page, "Follow")
    async with page.expect_websocket():
        await run(page)
    await asyncio.sleep(0.5)
    job = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
    async with httpx.AsyncClient() as client:
        await client.post(f"http://{address}/jobs", json=job)
    await expect(response(page)).to_contain_text('"name": "job.created"')
    await page.get_by_role("button", name="Stop query").click()

    # The token goes with what is sent from now on.
    await page.get_by_label("Bearer token").fill("a.b.c")
    async with page.expect_request("**/graphql") as introspection:
        await page.get_by_role("button", name="Use").click()
    request = await introspection.value
    assert (await request.all_headers())["authorization"] == "Bearer a.b.c"

    # Enqueueing, as the page is for; and what came of it.
    await open_tab(page, "Enqueue")
    async with page.expect_request("**/graphql") as enqueueing:
        await run(page)
    assert (await (await enqueueing.value).all_headers())["authorization"] == "Bearer a.b.c"
    await expect(response(page)).to_contain_text('"status": "QUEUED"')

    # The documentation, and completion.
    await page.get_by_role("button", name="Show Documentation Explorer").click()
    await expect(page.locator(".graphiql-doc-explorer")).to_contain_text("mutation: Mutation")
    await page.get_by_role("link", name="Mutation").first.click()
    await expect(page.locator(".graphiql-doc-explorer")).to_contain_text("enqueueJobs")
    SCREENSHOT.parent.mkdir(exist_ok=True)
    await page.screenshot(path=SCREENSHOT)
    await page.get_by_role("button", name="New tab").click()
    await page.locator(".graphiql-query-editor .view-lines").click()
    await page.keyboard.press("Control+A")
    await page.keyboard.type("{ jobTy")
    await page.keyboard.press("Control+Space")
    await expect(page.locator(".suggest-widget")).to_contain_text("jobTypes")


@pytest.mark.slow
@needs_page
@needs_browser
async def test_graphiql_shows_the_same_tab_with_its_variables_after_a_reload(
    page: Page, address: str
) -> None:
    tabs = page.locator(".graphiql-tab")
    query = page.locator(".graphiql-query-editor .view-lines")
    variables = page.locator(".graphiql-editor-tool .view-lines").first
    await page.goto(f"http://{address}/graphql")
    await expect(query).to_contain_text("enqueueJob")
    await page.reload()
    await expect(query).to_contain_text("enqueueJob")
    await expect(variables).to_contain_text("versionNumber")
    await expect(tabs).to_have_count(3)
    await open_tab(page, "Policies")
    await page.reload()
    await expect(query).to_contain_text("jobPolicy")
    await expect(variables).to_contain_text("jobType")
    await expect(tabs).to_have_count(3)


@pytest.mark.slow
@needs_page
@needs_browser
async def test_a_narrow_page_has_room_for_the_tabs_and_the_token(page: Page, address: str) -> None:
    await page.set_viewport_size({"width": 600, "height": 800})
    await page.goto(f"http://{address}/graphql")
    for name in ("Enqueue", "Policies", "Follow", "Use"):
        button = page.get_by_role("button", name=name, exact=True)
        await expect(button).to_be_in_viewport(ratio=1)
    await expect(page.get_by_label("Bearer token")).to_be_in_viewport(ratio=1)


@pytest.mark.slow
@needs_page
@needs_browser
async def test_a_subscription_whose_token_expires_says_so_at_once_and_runs_with_the_next_one(
    sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    no_leeway = {"auth_leeway_seconds": "0"}
    async with (
        serving(url, "--no-worker", **AUTH, **no_leeway) as (address, _),
        browsing(address, loses_connections=True) as page,
    ):
        brief = token("jobs:read", exp=int(time.time()) + 8)
        await page.add_init_script(f"sessionStorage['job-registry.token'] ??= '{brief}'")
        await page.goto(f"http://{address}/graphql")
        await expect(page.locator(".graphiql-query-editor .view-line").first).to_be_visible()
        await open_tab(page, "Follow")
        await run(page)
        await expect(response(page)).to_contain_text("The token has expired.", timeout=12_000)
        await page.get_by_label("Bearer token").fill(token("jobs:own"))
        await page.get_by_role("button", name="Use").click()
        await run(page)
        await asyncio.sleep(0.5)
        async with httpx.AsyncClient(headers=bearer("jobs:own")) as client:
            job = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
            await client.post(f"http://{address}/jobs", json=job)
        await expect(response(page)).to_contain_text('"name": "job.created"')


@pytest.mark.slow
@needs_page
@needs_browser
@pytest.mark.parametrize("address", ["/internal/queue"], indirect=True)
async def test_graphiql_loads_and_runs_below_the_prefix_of_a_host(page: Page, address: str) -> None:
    await page.goto(f"http://{address}/internal/queue/")
    await expect(page).to_have_url(f"http://{address}/internal/queue/graphql")
    await expect(page).to_have_title("Job Registry")
    await open_tab(page, "Policies")
    await run(page)
    await expect(response(page)).to_contain_text('"maxAttempts": 3')
    await open_tab(page, "Follow")
    async with page.expect_websocket() as opened:
        await run(page)
    assert (await opened.value).url == f"ws://{address}/internal/queue/graphql"
    await asyncio.sleep(0.5)
    job = {"type": "payout.execute", "payload": {"batchId": "b", "escrowId": "e"}}
    async with httpx.AsyncClient() as client:
        await client.post(f"http://{address}/internal/queue/jobs", json=job)
    await expect(response(page)).to_contain_text('"name": "job.created"')


@pytest.mark.parametrize("name", ["enqueue", "policies", "follow"])
def test_the_ready_documents_are_valid(name: str) -> None:
    schema = build_schema(SDL_FILE.read_text("utf-8"))
    assert validate(schema, parse((TABS / f"{name}.graphql").read_text("utf-8"))) == []


async def test_the_page_admits_no_foreign_script_and_no_frame(visit: Visit) -> None:
    async with visit() as client:
        page = await client.get("/graphql", headers={"accept": "text/html"})
    assert page.status_code == 200
    policy = dict(
        part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["worker-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-cache"


async def test_without_a_build_the_page_says_what_is_missing_until_it_is_built(
    visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = tmp_path / "building"
    monkeypatch.setattr(pages.graphiql, "__defaults__", (tmp_path, building))
    monkeypatch.setattr(pages.assets, "__defaults__", (tmp_path,))
    async with visit() as client:

        async def page() -> str:
            return (await client.get("/graphql", headers={"accept": "text/html"})).text

        # An installed wheel has no sources of the page.
        assert "Install a wheel that was built without it" in await page()
        (tmp_path / "package.json").touch()
        assert "install Node 20.19 or newer and run <code>make install</code>" in await page()
        assert "curl http://localhost/graphql" in await page()
        assert "refresh" not in await page()
        answer = await client.post("/graphql", json={"query": "{ __typename }"})
        assert answer.json() == {"data": {"__typename": "Query"}}

        building.touch()
        assert "This page reloads until it is there." in await page()
        assert '<meta http-equiv="refresh"' in await page()

        # A build that was killed leaves the mark behind.
        os.utime(building, (0, 0))
        assert "install Node" in await page()

        assert (await client.get(f"/{pages.ASSETS}/index-1.js")).status_code == 404
        (tmp_path / pages.ASSETS).mkdir(parents=True)
        (tmp_path / pages.ASSETS / "index-1.js").write_text("1")
        (tmp_path / "index.html").write_text("GraphiQL")
        assert await page() == "GraphiQL"
        script = await client.get(f"/{pages.ASSETS}/index-1.js")
        assert (script.status_code, script.text) == (200, "1")
        assert "immutable" in script.headers["cache-control"]


async def test_the_root_leads_to_graphiql_and_unknown_paths_are_answered_as_json(
    visit: Visit,
) -> None:
    async with visit() as client:
        root = await client.get("/", follow_redirects=False)
        assert (root.status_code, root.headers["location"]) == (307, "graphql")
        unknown = await client.get("/graphiql")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "not_found"
        assert "GraphQL is at /graphql" in unknown.json()["error"]["message"]
    async with visit(graphiql="false") as client:
        assert (await client.get("/")).status_code == 404


async def test_without_graphiql_a_browser_is_treated_as_any_client(visit: Visit) -> None:
    async with visit(graphiql="false") as client:
        page = await client.get("/graphql", headers={"accept": "text/html,*/*"})
    assert page.status_code == 400
    assert page.headers["content-type"].startswith("application/json")


@needs_page
async def test_what_the_page_loads_is_kept_for_good_by_its_name(visit: Visit) -> None:
    script = next((pages.DIST / pages.ASSETS).glob("index-*.js")).name
    async with visit() as client:
        page = await client.get("/graphql", headers={"accept": "text/html"})
        loaded = await client.get(f"/graphql/assets/{script}")
        missing = await client.get("/graphql/assets/index-0.js")
        assert "GraphQL is at /graphql and REST at /jobs" in missing.json()["error"]["message"]
    assert f'src="./graphql/assets/{script}"' in page.text
    assert loaded.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert missing.status_code == 404
    assert missing.headers["cache-control"] == "no-store"
