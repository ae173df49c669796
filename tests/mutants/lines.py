"""Which tests execute which line of the core: a plugin of pytest, and what it recorded.

    pytest -p tests.mutants.lines

A fault in a line can be noticed only by a test that executes it, or by one that starts the product
as a process, which is not recorded.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

FOLDER: Final = "RECORDED_LINES"
"""The environment variable with the folder for what is recorded."""

NEAR: Final = 12
"""How many lines a statement may have: Python executes some of them."""


class _Recorder:
    """Records the lines and the seconds of each test."""

    def __init__(self, root: Path) -> None:
        from coverage import Coverage

        self._root = root
        self._seconds: dict[str, float] = defaultdict(float)
        self._coverage = Coverage(
            data_file=None,
            config_file=False,
            source=[str(root / "api"), str(root / "registry")],
            # SQLAlchemy runs in greenlets, SQLite and handlers in threads.
            concurrency=["greenlet", "thread"],
        )
        self._coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        yield
        self._coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        numbers = {test: number for number, test in enumerate(self._seconds)}
        lines: dict[str, dict[int, list[int]]] = {}
        for path in data.measured_files():
            lines[str(Path(path).relative_to(self._root))] = {
                line: [numbers[test] for test in tests if test in numbers]
                for line, tests in data.contexts_by_lineno(path).items()
            }
        found = {"seconds": self._seconds, "lines": lines}
        worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        (Path(os.environ[FOLDER]) / f"{worker}.json").write_text(json.dumps(found), "utf-8")


def pytest_configure(config: pytest.Config) -> None:
    # With several processes, the first one runs no tests.
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        config.pluginmanager.register(_Recorder(config.rootpath))


@dataclass(frozen=True)
class Lines:
    """The tests of each line, by file, and the seconds of each test."""

    tests: Mapping[str, Mapping[int, frozenset[str]]]
    seconds: Mapping[str, float]

    @classmethod
    def of_folders(cls, folder: Path) -> Lines:
        """Return what the processes of some runs have recorded, each run in a folder."""
        tests: dict[str, dict[int, frozenset[str]]] = defaultdict(dict)
        seconds: dict[str, float] = {}
        for each in sorted(folder.glob("*/*.json")):
            found: Any = json.loads(each.read_text("utf-8"))
            names = list(found["seconds"])
            seconds |= found["seconds"]
            for path, lines in found["lines"].items():
                for line, numbers in lines.items():
                    known = tests[path].get(int(line), frozenset())
                    tests[path][int(line)] = known | {names[number] for number in numbers}
        return cls(tests, seconds)

    def of(self, path: Path, line: int, *, is_decorator: bool = False) -> list[str]:
        """Return the tests that execute a line, the quickest first.

        Of a line that is not recorded, they are those of the nearest line before it: it belongs to
        the same statement. A decorator belongs to the function after it. A line that runs when the
        module is imported, such as a constant or a default, has no tests.
        """
        lines = self.tests.get(str(path), {})
        after, before = range(line, line + NEAR), range(line, max(0, line - NEAR), -1)
        for near in after if is_decorator else before:
            if near in lines and (lines[near] or not is_decorator):
                return sorted(lines[near], key=lambda test: self.seconds[test])
        return []
