"""Checks the types of all Python examples: `python -m tests.docs`.

The examples of the pages are checked in one run of mypy, and each example program in another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import CODE, ROOT
from tests.docs.pages import SHOP, WORKERS, write_modules


def main() -> int:
    """Return mypy's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        code = _check(write_modules(Path(folder)))
    # By themselves: some of their modules have the names of examples.
    code = code or _check([*SHOP.glob("shop/*.py"), *SHOP.glob("tests/*.py")], str(SHOP))
    return code or _check([*WORKERS.glob("python/*.py")], str(WORKERS / "python"))


def _check(files: Sequence[Path], *path: str) -> int:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    return subprocess.run(
        [*command, *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": os.pathsep.join([CODE.split(os.pathsep)[0], *path])},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
