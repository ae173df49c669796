"""The example program: its own tests, its page in a browser, restarts, and the wheel under it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from shlex import quote as shell_word
from typing import Any

import httpx
import pytest
from playwright.async_api import expect

from job_registry_api import pages
from job_registry_api.queue import migrations
from tests import ROOT
from tests.conftest import run_sql
from tests.docs.pages import SHOP, blocks_of
from tests.docs.shell import commands
from tests.forks import Command
from tests.http_client import served
from tests.test_packaging import WITHOUT_GRAPHIQL, python
from tests.web.browser import browsing, needs_browser

SCREENSHOT = ROOT / "build" / "shop.png"
README = SHOP / "README.md"
SERVED = ("--factory", "shop.app:create_shop", "--port", "0")
PATIENCE = 30_000.0
"""Milliseconds for a job to end. A process of a handler takes seconds to start."""

SUBSCRIPTION = """subscription ($id: ID!) {
  jobEvents(jobId: $id) { name job { status attempt result error { message } } } }"""


def order(**changes: Any) -> dict[str, Any]:
    lines = [{"article": "tea", "quantity": 2}, {"article": "pot", "quantity": 1}]
    return {"orderId": str(uuid.uuid4()), "email": "ada@example.com", "lines": lines} | changes


@pytest.fixture
def environment(database_url: str, tmp_path: Path) -> dict[str, str]:
    """The variables of the program, which runs in a folder of its own."""
    if database_url.startswith("postgresql"):
        name = database_url.partition("?")[0].rpartition("/")[2]
        # As in a database that is not made for our tests.
        run_sql(database_url, f'ALTER DATABASE {name} SET search_path = "$user", public')
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOBS_")}
    return clean | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(SHOP)]),
        "DATABASE_URL": database_url,
        "JOBS_DATABASE_URL": database_url,
        "JOBS_CATALOG": "shop.jobs",
        "JOBS_ASSETS": str(tmp_path / "assets"),
    }


def shop(environment: dict[str, str]) -> Command:
    """The program, which uvicorn serves in a process of its own."""
    return Command(SERVED, module="uvicorn", environment=environment)


async def until(client: httpx.AsyncClient, order_id: str, status: str) -> None:
    """Wait until the order has this status, and its invoice is written."""
    async with asyncio.timeout(60):
        while (await client.get(f"/orders/{order_id}")).json()["status"] != status:
            await asyncio.sleep(0.05)
        while (await client.get(f"/invoices/{order_id}.pdf")).status_code != 200:
            await asyncio.sleep(0.05)


async def follow(client: httpx.AsyncClient, job_id: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a job, up to the one that it ended with."""
    body = {"query": SUBSCRIPTION, "variables": {"id": job_id}}
    headers = {"accept": "text/event-stream"}
    async with (
        asyncio.timeout(60),
        client.stream("POST", "/queue/graphql", json=body, headers=headers) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))["data"]["jobEvents"]
                yield event
                # The first event has the job as it is, which may have ended already.
                if event["job"]["status"] in ("SUCCEEDED", "FAILED", "CANCELLED"):
                    return


@pytest.mark.slow
def test_its_own_tests_pass() -> None:
    plugins = ["-p", "pytest_asyncio.plugin", "-p", "job_registry_api.pytest_plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *plugins],
        cwd=SHOP,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            # The plugin of a checkout may not be installed.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed in", done.stdout), done.stdout


@pytest.mark.slow
async def test_an_order_is_followed_to_its_end_after_a_restart(
    environment: dict[str, str],
) -> None:
    placed = order(email="busy@example.com")
    async with served(shop(environment | {"SHOP_WORKER": "no"})) as client:
        stored = (await client.post("/orders", json=placed)).json()
        assert stored["order"]["status"] == "placed"
        events = follow(client, stored["job"])
        assert (await anext(events))["name"] == "job.current"
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.2)
        assert not following.done()
        following.cancel()
    async with served(shop(environment)) as client:
        again = await client.post("/orders", json=placed)
        assert (again.status_code, again.json()["job"]) == (200, stored["job"])
        last = None
        async for event in follow(client, stored["job"]):
            last = event
        assert last is not None
        assert last["job"] == {
            "status": "SUCCEEDED",
            "attempt": 2,
            "result": {"mailed": "busy@example.com"},
            "error": None,
        }
        await until(client, placed["orderId"], "settled")
        invoice = await client.get(f"/invoices/{placed['orderId']}.pdf")
        assert invoice.content.startswith(b"%PDF")


@pytest.mark.slow
async def test_orders_at_the_same_time_are_each_stored_once(environment: dict[str, str]) -> None:
    orders = [order() for _ in range(10)]
    async with served(shop(environment | {"SHOP_WORKER": "no"})) as client:
        answers = await asyncio.gather(
            *(client.post("/orders", json=each) for each in orders for _ in range(3))
        )
        query = {"query": "{ jobs(first: 200) { nodes { id } } }"}
        jobs = (await client.post("/queue/graphql", json=query)).json()["data"]["jobs"]["nodes"]
    assert sorted(answer.status_code for answer in answers) == [200] * 20 + [201] * 10
    assert {answer.json()["job"] for answer in answers} == {job["id"] for job in jobs}
    assert len(jobs) == 10


@pytest.mark.slow
async def test_a_worker_of_its_own_works_the_orders(environment: dict[str, str]) -> None:
    async with served(shop(environment | {"SHOP_WORKER": "no"})) as client:
        worker = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "job_registry_api.cli", "worker"], env=environment
        )
        try:
            placed = order()
            await client.post("/orders", json=placed)
            await until(client, placed["orderId"], "settled")
        finally:
            worker.terminate()
            assert await asyncio.to_thread(worker.wait, 30) == 0


@needs_browser
@pytest.mark.slow
async def test_the_page_places_an_order_and_shows_its_jobs_until_they_end(
    environment: dict[str, str],
) -> None:
    async with served(shop(environment)) as client:
        address = client.base_url.netloc.decode()
        async with browsing(address) as page:
            await page.goto(f"http://{address}/")
            await expect(page.get_by_text("Connected.")).to_be_visible()
            await page.get_by_label("Email").fill("busy@example.com")
            await page.get_by_label("Article").select_option("pot")
            await page.get_by_role("button", name="Order").click()
            await expect(page.get_by_text("Thank you.")).to_be_visible()
            done = page.locator('tr[data-status="SUCCEEDED"]')
            confirmed = done.filter(has_text="order.confirm")
            await expect(confirmed).to_contain_text("2 of 5", timeout=PATIENCE)
            await expect(confirmed).to_contain_text('{"mailed":"busy@example.com"}')
            await expect(done.filter(has_text="payout.settle")).to_contain_text("receipt")
            invoiced = done.filter(has_text="order.invoice")
            await expect(invoiced).to_contain_text("page 1 of 1", timeout=PATIENCE)
            href = await invoiced.get_by_role("link", name="invoice").get_attribute("href")
            assert href is not None
            assert (await client.get(href)).content.startswith(b"%PDF")

            await page.get_by_label("Email").fill("ada@nowhere.invalid")
            await page.get_by_role("button", name="Order").click()
            await expect(page.locator('tr[data-status="FAILED"]')).to_contain_text(
                "There is no mailbox ada@nowhere.invalid.", timeout=PATIENCE
            )
            SCREENSHOT.parent.mkdir(exist_ok=True)
            await page.screenshot(path=SCREENSHOT)

            # What was ordered before is there after a reload.
            await page.reload()
            await expect(done).to_have_count(3)


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
async def test_the_commands_of_its_readme_run_with_the_wheel_outside_the_checkout(
    tmp_path: Path, fresh_postgresql_url: str
) -> None:
    without = {} if (pages.DIST / "index.html").is_file() else {WITHOUT_GRAPHIQL: "1"}
    python(ROOT, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), **without)
    (wheel,) = tmp_path.glob("*.whl")  # noqa: ASYNC240
    folder = tmp_path / "shop"
    shutil.copytree(SHOP, folder, ignore=shutil.ignore_patterns(".venv", "__pycache__", "*.db*"))
    await asyncio.to_thread(_as_new, fresh_postgresql_url)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JOBS_", "PYTHON"))}
    environment = clean | {
        "DATABASE_URL": f"sqlite:///{tmp_path}/shop.db",
        "JOBS_ASSETS": str(tmp_path / "assets"),
    }
    orders: list[str] = []
    async with AsyncExitStack() as stack:
        client: httpx.AsyncClient | None = None
        for command, _ in (each for block in blocks_of(README) for each in commands(block)):
            command = command.replace("-e ../../..", str(wheel))
            command = command.replace(
                "postgresql://shop:secret@db.internal/shop", shell_word(fresh_postgresql_url)
            )
            match command.rsplit("/", 1)[-1].split():
                case ["uvicorn", "--factory", "shop.app:create_shop"]:
                    given = {"SHOP_WORKER": "no"} if command.startswith("SHOP_WORKER=no") else {}
                    process = subprocess.Popen(  # noqa: ASYNC220
                        [folder / ".venv/bin/uvicorn", *SERVED],
                        env=environment | given,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                    client = await stack.enter_async_context(served(process))
                    if not given:
                        orders.append(await settled(client))
                case ["job-registry", "worker"]:
                    assert client is not None
                    worker = subprocess.Popen(  # noqa: ASYNC220
                        [folder / ".venv/bin/job-registry", "worker"], env=environment, cwd=folder
                    )
                    try:
                        orders.append(await settled(client))
                    finally:
                        worker.terminate()
                        assert await asyncio.to_thread(worker.wait, 30) == 0
                case _:
                    done = await asyncio.to_thread(_run, command, folder, environment)
                    if " install " in command and done.returncode:
                        pytest.skip(f"the packages cannot be installed: {done.stderr[-300:]}")
                    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                    if command.startswith("export "):
                        pairs = [each.partition("=") for each in done.stdout.split("\0") if each]
                        environment = {name: value for name, _, value in pairs}
                    if command.endswith("pytest"):
                        assert re.search(r"\d+ passed in", done.stdout), done.stdout
    assert len(orders) == 2
    code = "import job_registry, shop; print(job_registry.__file__, shop.__file__)"
    found = await asyncio.to_thread(
        _run, f".venv/bin/python -c {shell_word(code)}", folder, environment
    )
    assert found.stdout.count(str(folder)) == 2, found.stdout


async def settled(client: httpx.AsyncClient) -> str:
    """Place an order, wait for its end, and return its id."""
    placed = order()
    assert (await client.post("/orders", json=placed)).status_code == 201
    await until(client, placed["orderId"], "settled")
    return str(placed["orderId"])


def _run(
    command: str, folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell. One that exports variables prints all of them."""
    script = f"{command} && env -0" if command.startswith("export ") else command
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _as_new(url: str) -> None:
    """Make a database as it is before `job-registry migrate`."""
    migrations.downgrade(url)
    name = url.partition("?")[0].rpartition("/")[2]
    run_sql(url, f'ALTER DATABASE {name} SET search_path = "$user", public')
