"""Checks the types of all Python examples and of the example program: `python -m tests.docs`.

They are checked in one run of mypy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import CODE, ROOT
from tests.docs.pages import SHOP, write_modules


def main() -> int:
    """Returns mypy's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_modules(Path(folder))
        files += [*SHOP.glob("shop/*.py"), *SHOP.glob("tests/*.py")]
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
        return subprocess.run(
            [*command, *map(str, files)],
            cwd=ROOT,
            env={**os.environ, "MYPYPATH": os.pathsep.join([CODE.split(os.pathsep)[0], str(SHOP)])},
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
