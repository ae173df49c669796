"""The mutator of SQL finds what it says, in .sql files and in the strings of Python files."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import CODE, ROOT
from tests.mutants import lines
from tests.mutants.__main__ import sample
from tests.mutants.faults import python_mutants, replaced, sql_mutants
from tests.mutants.lines import Lines
from tests.mutants.stages import AREAS, stages_of, stages_of_line

CLAIM = """\
-- Take a job WHERE nobody <= somebody: a comment is no fault's place.
UPDATE job SET progress = NULL, attempt = attempt + 1
WHERE attempt <= 9 AND id = (
    SELECT id FROM job WHERE status = 'queued' AND next_run_at <= now()
    ORDER BY priority DESC LIMIT 1 FOR UPDATE SKIP LOCKED
)
"""


def faults_of(path: str, text: str) -> dict[str, str]:
    return {mutant.fault: mutant.make() or "" for mutant in sql_mutants(Path(path), text)}


def test_locks_conditions_comparisons_and_bounds_are_mutated_one_at_a_time() -> None:
    faults = faults_of("claim.sql", CLAIM)
    assert "FOR UPDATE\n" in faults["SKIP LOCKED dropped: SKIP LOCKED"]
    assert "FOR UPDATE" not in faults["lock dropped: FOR UPDATE SKIP LOCKED"]
    assert "'queued'\n" in faults["condition dropped: AND next_run_at <= now()"]
    assert "WHERE true AND" in faults["condition dropped: status = 'queued'"]
    assert "next_run_at > now()" in faults["comparison turned: <="]
    # The time of `now()` is left alone: no test can stop the clock at a microsecond.
    assert "attempt < 9" in faults["boundary moved: <="]
    assert "priority ASC" in faults["order turned: DESC"]
    assert "SET attempt" in faults["assignment dropped: progress = NULL,"]
    assert "attempt - 1" in faults["sign turned: + 1"]
    # Each differs from the original in one place, and leaves the comment alone.
    comment = CLAIM.splitlines()[0]
    assert all(text.startswith(comment) and text != CLAIM for text in faults.values())
    assert len(set(faults.values())) == len(faults)


def test_in_python_only_strings_that_hold_sql_are_mutated() -> None:
    source = (
        '"""SELECT is a word of docstrings too: a AND b = c."""\n'
        "lock = 'FOR UPDATE'\n"
        "if 1 <= 2: pass\n"
        'get = f"SELECT {columns} FROM job WHERE id = :id AND token = :token"\n'
    )
    faults = faults_of("store.py", source)
    assert set(faults) == {
        "condition dropped: AND token = :token", "condition dropped: id = :id",
    }  # fmt: skip
    lines = {mutant.line for mutant in sql_mutants(Path("store.py"), source)}
    assert lines == {4}


def test_a_fault_has_the_same_key_until_its_file_changes() -> None:
    def keys(text: str) -> set[str]:
        return {mutant.key for mutant in sql_mutants(Path("claim.sql"), text)}

    assert keys(CLAIM) == keys(CLAIM)
    assert not keys(CLAIM) & keys(CLAIM + "-- changed\n")


def test_python_gets_the_faults_of_cosmic_ray() -> None:
    source = "def room(limit, running):\n    return limit - running if limit > 0 else 1\n"
    mutated = {mutant.make() for mutant in python_mutants(Path("room.py"), source)}
    assert source.replace("limit - running", "limit + running") in mutated
    assert source.replace("limit > 0", "limit >= 0") in mutated
    assert source not in mutated


def test_statements_without_which_the_file_is_valid_are_dropped_in_their_place() -> None:
    source = (
        "count: int = 0\n"
        "def run(self, é):\n"
        '    """Run."""\n'
        "    if é: é = 1; self.ended.append(\n"
        "        é)\n"
        "    elif self.ended: return 1\n"
        "    for each in self.ended:\n"
        "        self.last = each\n"
        "        raise ValueError\n"
        "    log.info('it ran')\n"
        "    return 2\n"
    )
    dropped = {
        mutant.fault.removeprefix("statement dropped: "): (mutant.line, mutant.make())
        for mutant in python_mutants(Path("run.py"), source)
        if mutant.fault.startswith("statement dropped")
    }
    assert {fault: line for fault, (line, _) in dropped.items()} == {
        "self.ended.append( é)": 4,
        "return 1": 6,
        "self.last = each": 8,
        "raise ValueError": 9,
    }
    expected = source.replace("self.ended.append(\n        é)", "pass\n")
    assert dropped["self.ended.append( é)"] == (4, expected)
    for _, mutated in dropped.values():
        ast.parse(mutated or "")


def test_log_lines_and_what_only_the_type_checker_reads_get_no_faults() -> None:
    source = """\
@dataclass(frozen=True)
class Store:
    def __repr__(self) -> str:
        return "empty" if self.size == 0 else "full"

    @abstractmethod
    def take(self, *, jobs: int = 1, all: bool = False) -> None:
        log.info("taken", some=jobs > 0)
        self._log.info("taken", some=jobs > 0)
        for one, other in zip(self.all, jobs, strict=True):
            pass
        for one, other in zip(self.all, jobs, strict=False):
            pass
        self.size -= jobs
"""
    faults = {
        (mutant.line, mutant.fault.partition(" ")[0])
        for mutant in python_mutants(Path("store.py"), source)
    }
    # What is left: the decorator of the class as a whole, the defaults, the loops, and the end.
    assert faults == {
        (1, "RemoveDecorator"), (7, "NumberReplacer"), (7, "FalseWithTrue"),
        (10, "ZeroIterationForLoop"), (12, "ZeroIterationForLoop"), (12, "FalseWithTrue"),
        (14, "statement"),
    }  # fmt: skip


def test_the_tests_about_a_file_run_first_and_no_test_runs_twice() -> None:
    for area in AREAS:
        for prefix, about in area.about:
            first, *others = stages_of(area, Path(prefix))
            assert first.tests == about
            for test in about:
                assert (ROOT / test).exists()
                again = [stage for stage in others if stage.has(test)]
                # On the database of which the first stage ran none.
                assert [stage.options[-2:] for stage in again if "--slow" not in stage.options] in (
                    [],
                    [("-k", "postgresql")],
                )


def test_every_file_with_tests_of_its_own_is_there() -> None:
    for area in AREAS:
        for prefix, _ in area.about:
            assert list(ROOT.glob(f"{prefix}*")), prefix


def test_a_fault_in_the_sql_of_one_database_runs_no_tests_of_the_other() -> None:
    queue = AREAS[0]
    for path, options in (
        ("api/queue/statements/sqlite.sql", ("-k", "not postgresql")),
        ("alembic/versions/0002_claims.sql", ("-k", "not sqlite")),
        ("api/queue/store.py", ()),
    ):
        for stage in stages_of(queue, Path(path)):
            assert stage.options[-2:] == options or not options


def test_a_sample_is_drawn_again_and_a_larger_one_contains_it() -> None:
    mutants = list(sql_mutants(Path("claim.sql"), CLAIM))
    small, large = sample(mutants, 3, seed=1), sample(mutants, 6, seed=1)
    assert small == sample(mutants, 3, seed=1) == large[:3]
    assert small != sample(mutants, 3, seed=2)


def test_functions_that_a_later_migration_replaces_get_no_faults() -> None:
    text = (
        "CREATE FUNCTION one() RETURNS void AS $$ DELETE FROM job WHERE a <= 1 $$;\n"
        "CREATE FUNCTION two() RETURNS void AS $$ DELETE FROM job WHERE b <= 1 $$;\n"
    )
    left_out = replaced("CREATE OR REPLACE FUNCTION one() RETURNS void AS $$ $$;")
    assert left_out == {"one"}
    assert {mutant.line for mutant in sql_mutants(Path("0001.sql"), text, left_out)} == {2}
    assert {mutant.line for mutant in sql_mutants(Path("0001.sql"), text)} == {1, 2}


def test_triggers_that_a_later_migration_makes_again_get_no_faults() -> None:
    former = (
        "one = 'CREATE TRIGGER one AFTER UPDATE ON job WHEN OLD.a <> NEW.a BEGIN SELECT 1; END'\n"
        "two = 'CREATE TRIGGER two AFTER UPDATE ON job WHEN OLD.a <> NEW.a BEGIN SELECT 1; END'\n"
    )
    left_out = replaced("UPDATED = 'CREATE TRIGGER one AFTER UPDATE ON job'\n")
    assert {mutant.line for mutant in sql_mutants(Path("0001.py"), former, left_out)} == {2}
    assert {mutant.line for mutant in sql_mutants(Path("0001.py"), former)} == {1, 2}


def test_what_the_database_does_anyway_is_no_fault() -> None:
    faults = faults_of(
        "claim.sql",
        """\
SELECT id INTO first FROM job WHERE a = 1 ORDER BY id LIMIT 1;
SELECT id INTO one FROM job WHERE id = (SELECT id FROM job LIMIT 1);
SELECT count(*) FROM (SELECT 1 FROM job WHERE (a, b) < (1, 2) ORDER BY time LIMIT 5) AS first
ORDER BY first;
SELECT array_agg(each.value ORDER BY each.place), array_agg(each.value ORDER BY each.value)
FROM unnest(ids) WITH ORDINALITY AS each (value, place);
SELECT late AND deadline_at <= clock_timestamp() AND other_at <= made_at;
SELECT deadline_at <= strftime('%Y-%m-%d %H:%M:%f', 'now', :shift) || '000';
""",
    )
    counts = Counter(fault.partition(":")[0] for fault in faults)
    # The LIMIT of the subquery and of the counted rows, the orders by `id`, `first` and
    # `each.value`, and the boundary of `other_at`.
    assert (counts["bound dropped"], counts["order dropped"], counts["boundary moved"]) == (2, 3, 1)


def test_a_condition_at_the_end_of_a_named_statement_is_dropped() -> None:
    text = "UPDATE job SET a = 1 WHERE id = 1 AND b IS NULL\n\n-- name: next\nSELECT 1\n"
    assert "condition dropped: AND b IS NULL" in faults_of("claim.sql", text)


def test_a_line_has_the_tests_that_execute_it_the_quickest_first(tmp_path: Path) -> None:
    for folder, worker, tests in (("0", "gw0", {"a": 3.0, "b": 1.0}), ("1", "alone", {"c": 2.0})):
        (tmp_path / folder).mkdir()
        # Line 12 is executed by no test, but on import.
        executed = {"api/x.py": {"7": list(range(len(tests))), "12": []}}
        text = json.dumps({"seconds": tests, "lines": executed})
        (tmp_path / folder / f"{worker}.json").write_text(text)
    recorded = Lines.of_folders(tmp_path)
    assert recorded.of(Path("api/x.py"), 7) == ["b", "c", "a"]
    # A later line of the same statement.
    assert recorded.of(Path("api/x.py"), 9) == ["b", "c", "a"]
    assert recorded.of(Path("api/x.py"), 6) == recorded.of(Path("api/y.py"), 7) == []
    assert recorded.of(Path("api/x.py"), 12) == recorded.of(Path("api/x.py"), 14) == []
    assert recorded.of(Path("api/x.py"), 5, is_decorator=True) == ["b", "c", "a"]


def test_a_fault_runs_the_tests_of_its_line_or_those_of_its_file() -> None:
    area, path = AREAS[1], Path("api/queue/upkeep.py")
    tests = {f"tests/queue/test_x.py::{n}": 15.0 for n in range(4)}
    recorded = Lines({str(path): {7: frozenset(tests)}}, tests)
    quick, rest = stages_of_line(area, path, 7, recorded)
    assert (len(quick.tests), quick.is_quick, len(rest.tests)) == (2, True, 2)
    assert all(quick.has(test) for test in quick.tests)
    about = "tests/queue/test_upkeep.py::slow"
    with_it = Lines({str(path): {7: frozenset({*tests, about})}}, {**tests, about: 30.0})
    assert stages_of_line(area, path, 7, with_it)[0].tests[0] == about
    assert stages_of_line(area, path, 3, recorded) == stages_of(area, path)


@pytest.mark.slow
def test_the_plugin_records_the_lines_of_a_test(tmp_path: Path) -> None:
    test = "tests/registry/test_errors.py"
    folder = tmp_path / "run"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutants.lines", test],
        env={**os.environ, lines.FOLDER: str(folder), "PYTHONPATH": CODE},
        cwd=ROOT, check=True, timeout=60, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    recorded = Lines.of_folders(tmp_path)
    found = {each for tests in recorded.tests["registry/errors.py"].values() for each in tests}
    assert found
    assert {each.partition("::")[0] for each in found} == {test}
