"""Checks the types of all Python examples, in one run of mypy: `python -m tests.docs`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import CODE, ROOT
from tests.docs.pages import write_modules


def main() -> int:
    """Returns mypy's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_modules(Path(folder))
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
        return subprocess.run(
            [*command, *map(str, files)],
            cwd=ROOT,
            env={**os.environ, "MYPYPATH": CODE.split(os.pathsep)[0]},
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
