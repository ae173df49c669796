"""One program per GraphQL client, each set up as docs/clients.md shows: all must get the same.

A program enqueues by both mutations, reads, pages, follows a job over a restart of the server,
after which its first token is not valid any more, cancels it, and provokes errors. It prints
`restart the server` once it follows the job, and a report at its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import jwt
import pytest

from job_registry import JobRegistry, JobType, Payload
from job_registry.catalog.payout import payout_execute
from job_registry.catalog.thumbnail import thumbnail_create
from job_registry_api.graphql.scalars import SCALARS
from job_registry_api.graphql.schema import SDL_FILE, sdl
from tests.docs.pages import REACT, WORKERS, blocks
from tests.http_client import serving
from tests.node_packages import build_project, copy_project, skip_without_packages
from tests.postgresql_server import free_port
from tests.test_own_jobs import ADA, BOB, SECRET

HERE: Final = Path(__file__).parent

WITHOUT_SUBSCRIPTIONS: Final = {"fetch", "graphql_request"}
PROGRAMS: Final = sorted(
    path.stem for path in HERE.glob("programs/*.ts") if path.stem not in ("scenario", "iterating")
)

UV: Final = str(Path(sys.executable).with_name("uv"))

PYTHON_PROGRAMS: Final = {
    "gql": "gql[httpx,websockets]==4.4.0",
    "ariadne_codegen": "ariadne-codegen[subscriptions]==0.19.0",
}
"""The clients in Python, each with its package. Both need graphql-core, in different versions."""

REPORT: Final[dict[str, Any]] = {
    "read": {
        "type": "payout.execute",
        "status": "QUEUED",
        "priority": 80,
        "payload": {"batchId": "b-2", "escrowId": "e-1"},
        "createdBy": "ada",
        "createdAt": True,
    },
    "the job of another": "job_not_found",
    "pages": [
        {"jobs": [0, 1], "next": True, "previous": False, "total": 3},
        {"jobs": [2], "next": False, "previous": True, "total": 3},
        {"jobs": [1, 2], "next": False, "previous": True, "total": 3},
        {"jobs": [0], "next": True, "previous": False, "total": 3},
    ],
    "violations": [
        "/assetId pattern_mismatch",
        "/sizes/1 out_of_range",
        "/versionNumber required",
    ],
    "a wrong type": [
        "Variable '$job' has invalid value at .payoutExecute.batchId:"
        " String cannot represent a non string value: 1"
    ],
    "beside a failed field": {
        "data": {"job": "Job", "jobs": None},
        "errors": [[["jobs"], "validation_error"]],
    },
    "events": ["job.current QUEUED", "job.current QUEUED", "job.cancelled CANCELLED"],
    "cancelled twice": "job_state_conflict",
    "read again": "CANCELLED",
}

NEXT_SECRET: Final = "the secret of the server after its restart"

AUTHENTICATION: Final = {
    "auth_issuer": "https://i.example",
    "auth_audience": "jobs",
}

pytestmark = [
    pytest.mark.slow,
    # One process for all: the programs are built once, for one port.
    pytest.mark.xdist_group("clients"),
]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, port: int) -> Path:
    """The programs in TypeScript, generated, type-checked and bundled, as a frontend is built."""
    skip_without_packages()
    folder = tmp_path_factory.mktemp("clients")
    source = folder / "src"
    shutil.copytree(HERE / "programs", source / "programs")
    for name in ("login.ts", "operations.graphql", "refused.ts"):
        shutil.copy(HERE / name, source)
    for name in ("package.json", "tsconfig.json", "vite.config.ts"):
        shutil.copy(HERE / name, folder)
    shutil.copy(SDL_FILE, folder)
    for name, text in _setups(port).items():
        if name == "codegen.yml":
            # Introspection would need a token.
            text = text.replace(f"http://127.0.0.1:{port}/graphql", SDL_FILE.name)
        (source if name.endswith(".ts") else folder).joinpath(name).write_text(text, "utf-8")
    build_project(folder, ["relay-compiler"], ["graphql-codegen"], ["tsc"], ["vite", "build"])
    return folder / "dist"


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_client_in_typescript_does_all_that_it_can(
    name: str, built: Path, port: int, sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    report = await _run(["node", str(built / f"{name}.js")], port, tmp_path)
    assert report == REPORT | ({"events": []} if name in WITHOUT_SUBSCRIPTIONS else {})


async def test_introspection_of_a_server_generates_the_same_types_as_its_schema_file(
    built: Path, port: int, sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    (tmp_path / "src").mkdir()
    shutil.copy(HERE / "operations.graphql", tmp_path / "src")
    (tmp_path / "codegen.yml").write_text(_setups(port)["codegen.yml"], "utf-8")
    async with serving(f"sqlite:///{tmp_path / 'jobs.db'}", "--no-worker", "--port", str(port)):
        await asyncio.to_thread(build_project, tmp_path, ["graphql-codegen"])
    for name in ("graphql.ts", "possibleTypes.ts"):
        from_server = (tmp_path / "src" / "gen" / name).read_text("utf-8")
        assert from_server == (built.parent / "src" / "gen" / name).read_text("utf-8")


class Everything(Payload):
    """One field per scalar of the schema."""

    moment: datetime
    day: date
    time_of_day: time
    length: timedelta
    amount: Decimal
    id: UUID
    count: int
    anything: object = None


@pytest.mark.parametrize("configuration", ["docs/clients.md", REACT, WORKERS / "typescript"])
def test_types_are_generated_from_a_schema_with_every_scalar(
    configuration: str | Path, tmp_path: Path
) -> None:
    skip_without_packages()
    everything = JobType(name="demo.everything", payload=Everything)
    schema = sdl(JobRegistry([everything, thumbnail_create, payout_execute]))
    assert all(f"scalar {scalar.name}" in schema for scalar in SCALARS.values())
    (tmp_path / SDL_FILE.name).write_text(schema, "utf-8")
    if isinstance(configuration, Path):
        copy_project(configuration, tmp_path)
    else:
        (tmp_path / "src").mkdir()
        shutil.copy(HERE / "operations.graphql", tmp_path / "src")
        text = _setups(8000)["codegen.yml"].replace("http://127.0.0.1:8000/graphql", SDL_FILE.name)
        (tmp_path / "codegen.yml").write_text(text, "utf-8")
    build_project(tmp_path, ["graphql-codegen"], SCHEMA=SDL_FILE.name)


@pytest.mark.parametrize("name", PYTHON_PROGRAMS)
async def test_a_client_in_python_does_all_that_it_can(
    name: str, port: int, sqlite_template: Path, tmp_path: Path
) -> None:
    with_package = (UV, "run", "--no-project", "--isolated", "--with", PYTHON_PROGRAMS[name])
    if fault := await _fault_of(*with_package, "python", "-c", "", folder=tmp_path):
        pytest.skip(f"{PYTHON_PROGRAMS[name]} cannot be installed: {fault[-300:]}")
    shutil.copytree(HERE / "python", tmp_path, dirs_exist_ok=True)
    shutil.copy(HERE / "operations.graphql", tmp_path)
    shutil.copy(SDL_FILE, tmp_path)
    for file, text in _setups(port).items():
        if file.endswith((".py", ".toml")):
            (tmp_path / file).write_text(text, "utf-8")
    if name == "ariadne_codegen":
        assert await _fault_of(*with_package, "ariadne-codegen", folder=tmp_path) is None
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    command = [*with_package, "python", f"with_{name}.py"]
    assert await _run(command, port, tmp_path) == REPORT


async def _fault_of(*command: str, folder: Path) -> str | None:
    """Run a command, and return its standard error if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(200):
        _, said = await process.communicate()
    return said.decode() if process.returncode else None


def _setups(port: int) -> dict[str, str]:
    """The setups that the page shows, for a server at this port."""
    return {
        str(block.argument): block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        for block in blocks("client")
    }


async def _run(command: Sequence[str], port: int, folder: Path) -> Any:
    """Run a program beside a server that restarts when the program says so; return its report."""
    token_file = folder / "token"
    token_file.write_text(_token(SECRET), "ascii")
    url = f"sqlite:///{folder / 'jobs.db'}"
    options = ("--no-worker", "--port", str(port))
    async with serving(url, *options, **AUTHENTICATION, auth_hs256_secret=SECRET):
        process = await asyncio.create_subprocess_exec(
            *command,
            await _job_of_another(port),
            cwd=folder,
            env={**os.environ, "TOKEN_FILE": str(token_file)},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            line = await _line(process)
        except BaseException:
            process.kill()
            raise
    try:
        token_file.write_text(_token(NEXT_SECRET), "ascii")
        async with serving(url, *options, **AUTHENTICATION, auth_hs256_secret=NEXT_SECRET):
            if line == "restart the server":
                line = await _line(process)
            async with asyncio.timeout(30):
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return json.loads(line)


def _token(secret: str) -> str:
    token = ADA["authorization"].removeprefix("Bearer ")
    claims = jwt.decode(token, SECRET, ["HS256"], audience=AUTHENTICATION["auth_audience"])
    return jwt.encode(claims, secret, "HS256")


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(120):
        return (await process.stdout.readline()).decode().strip()


async def _job_of_another(port: int) -> str:
    job = {"type": "payout.execute", "payload": {"batchId": "b-0", "escrowId": "e-1"}}
    async with httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{port}/jobs", json=job, headers=BOB)
    return str(response.json()["jobId"])
