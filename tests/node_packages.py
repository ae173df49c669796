"""Projects in TypeScript, built in a folder of their own with the packages of `tests/frontend`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests import ROOT

PACKAGES: Final = ROOT / "tests" / "frontend" / "node_modules"
"""The packages of the examples, in the same versions."""


def skip_without_packages() -> None:
    """Skip the test if Node or its packages are not there."""
    if shutil.which("node") is None or not (PACKAGES / ".bin").is_dir():
        pytest.skip("Node's packages are not there: `make test` fetches them")


def copy_project(source: Path, folder: Path) -> None:
    """Copy an example without what was built of it."""
    ignored = shutil.ignore_patterns("node_modules", "gen", "build", "dist")
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=ignored)


def build_project(folder: Path, *commands: list[str], **environment: str) -> None:
    """Run the commands that build the project in a folder, with the packages there."""
    (folder / "node_modules").symlink_to(PACKAGES)
    for command in commands:
        ran = subprocess.run(
            command,
            cwd=folder,
            env={
                **os.environ,
                **environment,
                "PATH": f"{PACKAGES / '.bin'}{os.pathsep}{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
