"""What a frontend does with the schema: lint it, generate a client, compile and run that.

And the audit suite of GraphQL over HTTP, https://github.com/graphql/graphql-http. All of it is
Node's; `make test` fetches the packages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from job_registry_api.graphql.schema import SDL_FILE
from tests.http_client import serving

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(
        shutil.which("node") is None, reason="Node is not there: install 20.19 or newer"
    ),
    pytest.mark.skipif(
        not (HERE / "node_modules" / ".bin").is_dir(),
        reason="Node's packages are not there: `make test` fetches them with Node 20.19 or newer",
    ),
    # One process for all: the client is generated once.
    pytest.mark.xdist_group("frontend"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frontend of this test run's own: its sources, its packages and the committed schema."""
    folder = tmp_path_factory.mktemp("frontend")
    shutil.copytree(
        HERE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules", "gen")
    )
    (folder / "node_modules").symlink_to(HERE / "node_modules")
    (folder / "gen").mkdir()
    shutil.copy(SDL_FILE, folder / "gen")
    return folder


def node(project: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a package's program in the project, or a script of ours."""
    command = [str(project / "node_modules" / ".bin" / program)]
    if program.endswith((".js", ".mjs")):
        command = ["node", program]
    return subprocess.run(
        [*command, *arguments], cwd=project, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def client(project: Path) -> str:
    """The client, generated and compiled by `tsc --strict`."""
    generated = node(project, "graphql-codegen", "--config", "codegen.yml")
    assert generated.returncode == 0, generated.stdout + generated.stderr
    compiled = node(project, "tsc", "-p", "tsconfig.json", "--pretty", "false")
    assert compiled.returncode == 0, compiled.stdout
    return "gen/js/client/main.js"


@pytest.fixture
async def url(sqlite_template: Path, tmp_path: Path) -> AsyncIterator[str]:
    """The endpoint of a server of the test's own, that runs no jobs."""
    shutil.copy(sqlite_template, tmp_path / "jobs.db")
    async with serving(f"sqlite:///{tmp_path / 'jobs.db'}", "--no-worker") as (address, _):
        yield f"http://{address}/graphql"


@pytest.mark.slow
def test_the_schema_passes_the_recommended_lint(project: Path) -> None:
    linted = node(project, "eslint", "--max-warnings", "0", f"gen/{SDL_FILE.name}")
    assert linted.returncode == 0, linted.stdout + linted.stderr


async def test_a_generated_client_gets_everything_as_its_types_say(
    project: Path, client: str, url: str
) -> None:
    ran = node(project, client, url)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "policies": ["10 60 s", "payout.execute"],
        "enqueued": [
            'stored {"assetId":"generic","versionNumber":1}',
            'found {"assetId":"generic","versionNumber":1}',
            "conflict at /assetId",
            "no thumbnail.crate, perhaps thumbnail.create",
            "payload /assetId required,/versionNumber wrong_type",
            "input /priority out_of_range",
            'stored {"assetId":"typed","versionNumber":2}',
            "payload /assetId pattern_mismatch,/sizes too_short,/versionNumber out_of_range",
        ],
        "queued": 2,
        "followed": ["now CANCELLED", "already CANCELLED", "job.cancelled CANCELLED true"],
    }


@pytest.mark.usefixtures("client")
def test_a_client_that_forgets_an_answer_or_gets_a_payload_wrong_does_not_compile(
    project: Path,
) -> None:
    compiled = node(project, "tsc", "-p", "tsconfig.refused.json", "--pretty", "false")
    faults = [line.split(":")[0].split("(")[0] for line in compiled.stdout.splitlines()]
    assert faults == ["refused/missing_member.ts", "refused/wrong_payload.ts"], compiled.stdout
    assert '__typename: "JobStateConflict"' in compiled.stdout
    assert "'string' is not assignable to type 'number'" in compiled.stdout


async def test_every_audit_of_graphql_over_http_is_passed_the_optional_ones_too(
    project: Path, url: str
) -> None:
    audited = node(project, "audit.mjs", url)
    assert audited.returncode == 0, audited.stderr
    results = [json.loads(line) for line in audited.stdout.splitlines()]
    assert len(results) > 50
    assert [result for result in results if result["status"] != "ok"] == []
