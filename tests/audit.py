"""Looks up what the project depends on in the databases of known vulnerabilities: `make audit`.

    .venv/bin/python -m tests.audit

Python's packages by pip-audit, Node's by `npm audit`. Exits with 1 if one is vulnerable. Where a
database cannot be reached, it says so: nothing is known then.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
LOCKS: Final = ("requirements.txt", "requirements-dev.txt", "requirements-otel.txt")
NODE_FOLDERS: Final = ("api/web", "tests/frontend")
SECONDS: Final = 300


def vulnerable_python_packages(lock: str) -> list[str] | None:
    """Return the vulnerable packages of a lock, or None if no database can be reached."""
    options = ("--require-hashes", "--disable-pip", "--progress-spinner", "off", "--timeout", "10")
    uv = str(Path(sys.executable).parent / "uv")
    command = (uv, "tool", "run", "pip-audit", "-r", lock, *options, "--format", "json")
    packages = (_output(command, ROOT) or {}).get("dependencies", [])
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return None
    return [
        f"{package['name']} {package['version']}: {', '.join(v['id'] for v in package['vulns'])}"
        for package in audited
        if package["vulns"]
    ]


def vulnerable_node_packages(folder: str) -> list[str] | None:
    """Return the vulnerable packages of a folder, or None if no database can be reached."""
    found = _output(("npm", "audit", "--package-lock-only", "--json"), ROOT / folder)
    if found is None or "vulnerabilities" not in found:
        return None
    return [f"{name}: {each['severity']}" for name, each in found["vulnerabilities"].items()]


def _output(command: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """Return the JSON that a command prints, or None if it cannot be run."""
    if shutil.which(command[0]) is None:
        return None
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
        content: dict[str, Any] = json.loads(ran.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None
    return content


def main() -> None:
    vulnerable = False
    results = [(lock, vulnerable_python_packages(lock)) for lock in LOCKS]
    results += [(folder, vulnerable_node_packages(folder)) for folder in NODE_FOLDERS]
    for name, packages in results:
        if packages is None:
            print(f"{name}: not audited. The database of vulnerabilities cannot be reached.")
        elif not packages:
            print(f"{name}: no known vulnerabilities.")
        else:
            vulnerable = True
            print(f"{name}: {len(packages)} vulnerable packages.", *packages, sep="\n  ")
    sys.exit(vulnerable)


if __name__ == "__main__":
    main()
