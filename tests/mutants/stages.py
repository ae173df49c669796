"""The areas of the core, and the tests that are to notice their faults, the nearest first."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

from tests.mutants.lines import Lines

NOT_FOR_MUTANTS: Final = (
    # Slow, with servers of their own, and about costs, which no fault of these changes.
    "--ignore=tests/queue/test_plan_cost.py",
    "--ignore=tests/queue/test_postgresql_with_llvm.py",
)


@dataclass(frozen=True)
class Stage:
    """Tests that run together: files and folders, without those that ran before."""

    tests: tuple[str, ...]
    without: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    is_quick: bool = False

    @property
    def arguments(self) -> list[str]:
        """The arguments of pytest."""
        tests = [each for each in self.tests if not _within(each, self.without)]
        return [*tests, *(f"--ignore={path}" for path in self.without), *self.options]

    def again(self, tests: list[str]) -> list[str]:
        """The arguments of pytest that run some of the tests by themselves."""
        return [*tests, *(each for each in self.options if each == "--slow")]

    def has(self, test: str) -> bool:
        """Return whether a test, or a file of tests, belongs to this stage."""
        path = test.partition("::")[0]
        is_in = test in self.tests or _within(path, self.tests)
        return is_in and not _within(path, self.without)


@dataclass(frozen=True)
class Area:
    """Files, and the tests that are to notice their faults.

    `about` has the tests about a file or folder, `quick` those that run next. A fault that these do
    not notice runs all `tests`, and then the slow ones of `slow`.
    """

    name: str
    paths: tuple[str, ...]
    tests: tuple[str, ...]
    quick: tuple[str, ...] = ()
    about: tuple[tuple[str, tuple[str, ...]], ...] = ()
    slow: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    sql: bool = False

    @property
    def all(self) -> list[Stage]:
        """All tests of the area, and the slow ones."""
        stages = [Stage(self.tests, options=self.options)]
        if self.slow:
            stages.append(Stage(self.slow, options=SLOW))
        return stages


QUICK_SECONDS: Final = 40.0
"""How long the quick tests of a line may take without a fault."""


def stages_of_line(
    area: Area, path: Path, line: int, recorded: Lines, *, is_decorator: bool = False
) -> list[Stage]:
    """Return the stages for a fault in a line: the tests that execute it.

    Those about the file go first, and of these and of the others the quickest. If no test is
    recorded, the stages are those for the file.
    """
    tests = recorded.of(path, line, is_decorator=is_decorator)
    if not tests:
        return stages_of(area, path)
    about = _about(area, path)
    tests.sort(key=lambda test: not _within(test.partition("::")[0], about))
    spent = list(accumulate(recorded.seconds[test] for test in tests))
    quick = max(1, bisect(spent, QUICK_SECONDS))
    stages = [Stage(tuple(tests[:quick]), is_quick=True)]
    if tests[quick:]:
        stages.append(Stage(tuple(tests[quick:])))
    if area.slow:
        stages.append(Stage(area.slow, options=SLOW))
    return stages


def stages_of(area: Area, path: Path) -> list[Stage]:
    """Return the stages for a fault in the file."""
    one_database = _one_database(path)
    first = _about(area, path)
    second = tuple(each for each in area.quick if not _within(each, first))
    # The quick ones on one database, which is enough for what most files do.
    quickly = one_database or ("-k", "not postgresql")
    stages = [Stage(first, (), quickly, is_quick=True)]
    if second:
        stages.append(Stage(second, first, quickly, is_quick=True))
    if not one_database:
        stages.append(Stage((*first, *second), options=("-k", "postgresql")))
    stages.append(Stage(area.tests, (*first, *second), (*area.options, *one_database)))
    if area.slow:
        stages.append(Stage(area.slow, options=SLOW))
    return stages


def _about(area: Area, path: Path) -> tuple[str, ...]:
    """Return the tests about a file."""
    return next((tests for prefix, tests in area.about if str(path).startswith(prefix)), area.quick)


TWO_AT_ONCE: Final = ("-n", "2")
SLOW: Final = ("--slow", "-m", "slow")


def _one_database(path: Path) -> tuple[str, ...]:
    """Leave out the tests of a database that never reads the file."""
    if path.stem == "sqlite":
        return ("-k", "not postgresql")
    if path.stem == "postgresql" or (path.suffix == ".sql" and "alembic" in path.parts):
        return ("-k", "not sqlite")
    return ()


def _within(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def _queue(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/queue/test_{name}.py" for name in names)


QUEUE_TESTS: Final = (
    "tests/queue",
    "tests/cli/test_migrate.py",
    "tests/test_health.py",
    "tests/test_metrics.py",
    "tests/graphql/test_graphql.py",
    "tests/graphql/test_subscriptions.py",
)
QUICK_QUEUE_TESTS: Final = _queue(
    "order",
    "ends",
    "small_faults",
    "life_of_a_job",
    "overrunning_attempts",
    "clocks",
    "queue_heads",
    "upkeep",
)
ABOUT_QUEUE: Final = (
    ("api/queue/caller_transactions.py", _queue("caller_transactions")),
    (
        "alembic/versions/0002_claims.sql",
        (*QUICK_QUEUE_TESTS, *_queue("claim_plan", "claiming", "locks")),
    ),
    (
        "api/queue/statements",
        (
            *QUICK_QUEUE_TESTS,
            *_queue("claim_plan", "claiming", "enqueue", "parking", "replaying"),
            "tests/test_own_jobs.py",
            "tests/test_logs_of_jobs.py",
        ),
    ),
    ("api/queue/claiming.py", (*_queue("claiming"), "tests/test_metrics.py")),
    ("api/queue/database.py", _queue("database", "sqlite_file")),
    ("api/queue/enqueueing.py", _queue("enqueue")),
    ("api/queue/event", _queue("events")),
    ("api/queue/group_commit.py", _queue("group_commit", "small_faults", "enqueue")),
    ("api/queue/migrations.py", _queue("migrations")),
    ("api/queue/readiness.py", ("tests/test_health.py",)),
    ("api/queue/requests.py", _queue("enqueue")),
    ("api/queue/upkeep.py", _queue("upkeep")),
    ("api/queue/filters.py", _queue("filters")),
    ("api/queue/reading.py", _queue("filters", "small_faults")),
    ("api/queue/replaying.py", _queue("replaying")),
    ("api/queue/changing.py", _queue("parking", "life_of_a_job")),
    ("api/queue/p", (*_queue("database"), "tests/test_outages.py")),
    ("api/queue/sqlite_database.py", _queue("database", "sqlite_file")),
    ("api/queue/queue.py", _queue("programs", "small_faults")),
    ("alembic/versions/0001_jobs.py", _queue("migrations", "small_faults")),
    (
        "alembic/versions/0003_evolution",
        (*_queue("parking", "migrations", "locks", "claiming"), *QUICK_QUEUE_TESTS),
    ),
    ("alembic/versions/0005", (*QUICK_QUEUE_TESTS, *_queue("enqueue", "locks", "claim_plan"))),
    ("alembic/versions/0006", _queue("migrations")),
    (
        "alembic/versions/0008",
        (*QUICK_QUEUE_TESTS, "tests/worker/test_job_logs.py", "tests/test_logs_of_jobs.py"),
    ),
    (
        "alembic/versions/0007",
        (*QUICK_QUEUE_TESTS, *_queue("parking", "leasing_with_reports", "locks", "claiming")),
    ),
    ("alembic/versions/0004", _queue("filters", "migrations")),
)
AREAS: Final = (
    Area(
        "SQL of the queue",
        (
            "api/queue/**/*.sql",
            "api/queue/**/*.py",
            "alembic/versions/*.sql",
            "alembic/versions/*.py",
        ),
        QUEUE_TESTS,
        QUICK_QUEUE_TESTS,
        ABOUT_QUEUE,
        options=TWO_AT_ONCE,
        sql=True,
    ),
    Area(
        "queue",
        ("api/queue/**/*.py",),
        QUEUE_TESTS,
        QUICK_QUEUE_TESTS,
        ABOUT_QUEUE,
        options=TWO_AT_ONCE,
    ),
    Area(
        "worker",
        ("api/worker/**/*.py",),
        ("tests/worker", "tests/test_health.py"),
        ("tests/worker/test_worker.py", "tests/worker/test_leases.py"),
        (
            ("api/worker/outcomes.py", ("tests/worker/test_outcomes.py",)),
            ("api/worker/extensions.py", ("tests/worker/test_extensions.py",)),
            (
                "api/worker/lease_keeper.py",
                ("tests/worker/test_lease_keeper.py", "tests/worker/test_leases.py"),
            ),
            (
                "api/worker/processes.py",
                ("tests/worker/test_process_pool.py", "tests/worker/test_in_processes.py"),
            ),
            (
                "api/worker/child.py",
                ("tests/worker/test_child.py", "tests/worker/test_in_processes.py"),
            ),
            (
                "api/worker/watchdog.py",
                ("tests/worker/test_watchdog.py", "tests/worker/test_stopped_workers.py"),
            ),
            ("api/worker/results.py", ("tests/worker/test_results.py",)),
            ("api/worker/memory_limit.py", ("tests/worker/test_memory_limit.py",)),
            ("api/worker/follow_ups.py", ("tests/worker/test_follow_ups.py",)),
            ("api/worker/progress.py", ("tests/worker/test_results.py",)),
        ),
        slow=(
            "tests/worker/test_shutdown.py",
            "tests/worker/test_in_processes.py",
            "tests/worker/test_memory_limit.py",
        ),
    ),
    Area(
        "auth",
        ("api/auth.py",),
        (
            "tests/test_auth.py",
            "tests/test_tokens.py",
            "tests/test_own_jobs.py",
            "tests/graphql/test_guards.py",
            "tests/graphql/test_parked_jobs.py",
            "tests/graphql/test_websocket.py",
        ),
        ("tests/test_auth.py", "tests/test_tokens.py"),
    ),
    Area(
        "registry",
        ("registry/**/*.py",),
        (
            "tests/registry",
            "tests/queue/test_enqueue.py",
            "tests/graphql/test_inputs.py",
            "tests/graphql/test_typed.py",
            "tests/worker/test_worker.py",
            "tests/worker/test_extensions.py",
            "tests/cli",
            "tests/test_uploads.py",
        ),
        ("tests/registry",),
        (
            (
                "registry/violations.py",
                ("tests/registry/test_violations.py", "tests/registry/test_payloads.py"),
            ),
            ("registry/compatibility.py", ("tests/registry/test_compatibility.py",)),
            ("registry/evolution.py", ("tests/registry/test_evolution.py",)),
            ("registry/upgrades.py", ("tests/registry/test_evolution.py",)),
            ("registry/lock.py", ("tests/cli/test_lock.py",)),
            ("registry/wire_text.py", ("tests/registry/test_wire_text.py",)),
            (
                "registry/asset_files.py",
                ("tests/registry/test_thumbnails.py", "tests/test_uploads.py"),
            ),
            (
                "registry/payload_schema.py",
                ("tests/registry/test_payload_schema.py", "tests/registry/test_payloads.py"),
            ),
            ("registry/payload", ("tests/registry/test_payloads.py",)),
            (
                "registry/json_values.py",
                ("tests/registry/test_json_values.py", "tests/registry/test_payloads.py"),
            ),
            ("registry/discovery.py", ("tests/registry/test_discovery.py",)),
            ("registry/errors.py", ("tests/registry/test_errors.py",)),
            (
                "registry/catalog/_picture_headers.py",
                (
                    "tests/registry/test_picture_headers.py",
                    "tests/registry/test_hostile_pictures.py",
                ),
            ),
            (
                "registry/catalog",
                ("tests/registry/test_thumbnails.py", "tests/registry/test_hostile_pictures.py"),
            ),
            ("registry/extension.py", ("tests/worker/test_extensions.py",)),
            ("registry/context.py", ("tests/worker/test_worker.py",)),
        ),
    ),
)
