"""The image and the compose file, as far as they can be checked without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from job_registry_api.cli.command import app
from job_registry_api.settings import load_settings
from tests import ROOT

HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}")
# In a URL, each of the signs in this password would have to be escaped.
GIVEN = {"POSTGRES_PASSWORD": "se/c@r?e%41t", "JOBS_AUTH_HS256_SECRET": "s" * 32}


def instructions() -> list[str]:
    """The instructions of the Dockerfile, a line each."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def compose() -> dict[str, Any]:
    """The compose file, with the variables that its first lines export."""
    text = VARIABLE.sub(
        lambda found: GIVEN.get(found[1], found[2] or ""), (ROOT / "compose.yaml").read_text()
    )
    content: dict[str, Any] = yaml.safe_load(text)
    return content


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no wheel for this machine")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    assert HADOLINT is not None
    found = subprocess.run([HADOLINT, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_everything_that_the_image_copies_is_in_its_context() -> None:
    sources = [
        source
        for line in instructions()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    kept = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert len(sources) > 5
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == each or source.startswith(f"{each}/") for each in kept), source


def test_the_image_can_export_traces() -> None:
    locks = [line.split()[-1] for line in instructions() if "--require-hashes" in line]
    assert locks
    for lock in locks:
        text = (ROOT / lock).read_text("utf-8")
        assert "opentelemetry-sdk==" in text
        assert "opentelemetry-exporter-otlp-proto-http==" in text


@pytest.mark.slow
def test_the_steps_of_the_image_give_a_command_that_runs(tmp_path: Path) -> None:
    build, site = tmp_path / "build", tmp_path / "site"
    build.mkdir()
    for line in instructions():
        match line.split():
            case ["COPY", *sources, _] if sources[0] in ("alembic", "registry", "api"):
                shutil.copytree(
                    ROOT / sources[0],
                    build / sources[0],
                    ignore=shutil.ignore_patterns("node_modules", "dist", "__pycache__"),
                )
            case ["COPY", "pyproject.toml", *others, _]:
                for name in ("pyproject.toml", *others):
                    shutil.copy(ROOT / name, build)
    # In place of the stage that builds it.
    (build / "api/web/dist").mkdir()
    (build / "api/web/dist/index.html").write_text("GraphiQL")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JOBS_", "PYTHON"))}
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--no-index", "--no-build-isolation", "--target", site, build,
        ],
        env=clean,
        cwd=tmp_path,
        check=True,
    )  # fmt: skip
    assert (site / "job_registry_api/web/dist/index.html").is_file()
    types = subprocess.run(
        [sys.executable, "-m", "job_registry_api.cli", "types"],
        env=clean | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "thumbnail.create" in types.stdout


def test_the_services_of_the_compose_file_have_valid_settings_and_commands() -> None:
    services = compose()["services"]
    for name in ("migrate", "server", "worker"):
        service = services[name]
        settings = load_settings(service["environment"])
        assert settings.database_url == "postgresql://jobs@database/jobs"
        assert service["environment"]["PGPASSWORD"] == GIVEN["POSTGRES_PASSWORD"]
        assert settings.production
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace == settings.shutdown_seconds + 15
        # Without one, nothing removes the processes that handlers leave behind.
        assert service["init"] is True
        command, *options = service["command"]
        known = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in options:
            if option.startswith("--"):
                assert option in known, f"{name}: {option}"


def test_the_health_check_asks_where_serve_and_the_workers_answer() -> None:
    assert "8000" in health_check()
    worker = compose()["services"]["worker"]["command"]
    assert worker == ["worker", "--health-port", "8000"]
    assert load_settings({}).port == 8000


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_fails_unless_the_container_is_ready(status: int, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = subprocess.Popen(
            [sys.executable, "-c", health_check()],
            # Docker sets the last two, if its user has configured a proxy.
            env=os.environ
            | {"JOBS_PORT": str(port)}
            | {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
            stderr=subprocess.PIPE,
        )
        server.settimeout(10)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(4096).startswith(b"GET /readyz HTTP/1.1\r\n")
            connection.sendall(b"HTTP/1.1 %d -\r\ncontent-length: 0\r\n\r\n" % status)
            check.communicate(timeout=10)
    assert check.returncode == code


def health_check() -> str:
    """The program that the image runs to check its health."""
    (line,) = (line for line in instructions() if line.startswith("HEALTHCHECK"))
    command: list[str] = json.loads(line.partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]
    return command[2]
