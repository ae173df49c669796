"""What holds for every page: each example has a marker, names are right, links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from job_registry import CodedError, JobPolicy, PayloadInvalid
from job_registry_api.cli.command import app
from job_registry_api.graphql.schema import SDL_FILE
from job_registry_api.queue.events import STATUS_AFTER
from job_registry_api.queue.store import TIMED_OUT
from job_registry_api.settings import Settings
from job_registry_api.worker.attempt import AFTER_CRASH
from job_registry_api.worker.follow_ups import REFUSED
from job_registry_api.worker.outcomes import MEMORY_LIMIT_EXCEEDED
from tests import ROOT
from tests.docs.pages import MARKERS, PAGES, REACT, SHOP, WORKERS, Block, blocks, blocks_of

every_page = pytest.mark.parametrize(
    "page",
    [*PAGES, SHOP / "README.md", REACT / "README.md", *WORKERS.glob("*/README.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)


@every_page
def test_every_block_has_a_marker_or_answers_the_block_before_it(page: Path) -> None:
    fences = len(re.findall(r"^ *```", page.read_text("utf-8"), re.M))
    found = blocks_of(page)
    assert fences == 2 * (len(found) + sum(block.answer is not None for block in found))
    for block in found:
        assert block.kind is not None, f"{block}: this {block.language} block has no marker"
        assert block.language in MARKERS[block.kind].split(), f"{block}: {block.kind}"


def test_a_block_without_a_marker_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- graphql -->\n```graphql\n{a}\n```\n\n```json\n1\n```\n\n```json\n2\n```\n"
        "Text.\n\n```console\n$ true\n```\n"
    )
    answered, second, untested = blocks_of(page)
    assert (answered.kind, answered.answer) == ("graphql", "1\n")
    assert (second.kind, untested.kind) == (None, None)


@every_page
def test_every_marker_stands_right_before_a_block(page: Path) -> None:
    text = page.read_text("utf-8")
    names = "|".join(MARKERS)
    assert len(re.findall(rf"<!-- (?:{names})\b", text)) == len(blocks_of(page))


@every_page
def test_every_setting_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"\bJOBS_[A-Z_0-9]*[A-Z0-9]\b", page.read_text("utf-8")))
    settings = {f"JOBS_{name.upper()}" for name in Settings.model_fields}
    # A group of settings, and the example of one that does not exist.
    assert named - settings <= {"JOBS_AUTH", "JOBS_LEASE_SECS"}


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            assert heading in {_anchor(each) for each in headings}, target


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


@every_page
def test_no_page_calls_the_command_by_its_former_name(page: Path) -> None:
    shown = "\n".join(block.text for block in blocks_of(page) if block.language == "console")
    assert not re.search(r"(bin/|\$ )jobs ", shown)
    names = "serve|worker|migrate|types|policy|validate|enqueue|lock|check|schema"
    assert not re.search(f"`jobs ({names})", page.read_text())


@pytest.mark.parametrize("block", blocks("entry point"), ids=str)
def test_an_entry_point_as_shown_names_a_module_of_the_page(block: Block) -> None:
    entries = tomllib.loads(block.text)["project"]["entry-points"]
    modules = {each.argument for each in blocks("module", block.page)}
    assert entries.keys() == {"job_registry.catalog"}
    assert {f"{name}.py" for name in entries["job_registry.catalog"].values()} <= modules


@pytest.mark.parametrize("block", blocks("workflow"), ids=str)
def test_a_workflow_as_shown_runs_commands_with_options_that_exist(block: Block) -> None:
    ((job),) = yaml.safe_load(block.text)["jobs"].values()
    runs = [step["run"].split() for step in job["steps"] if "run" in step]
    commands = [words[1:] for words in runs if words[0] == "job-registry"]
    assert commands
    for name, *options in commands:
        shown = CliRunner().invoke(app, [name, "--help"]).output
        assert set(options) <= set(re.findall(r"--[a-z]+", shown)), block
    assert {name for name in job["env"] if name.startswith("JOBS_")} <= {"JOBS_CATALOG"}


def test_the_guides_name_every_code_of_an_error() -> None:
    clients = (ROOT / "docs" / "clients.md").read_text("utf-8")
    waiting, codes = [CodedError], set[str]()
    while waiting:
        waiting += (found := waiting.pop().__subclasses__())
        codes |= {each.code for each in found if hasattr(each, "code")}
    assert [code for code in sorted(codes) if f"`{code}`" not in clients] == []
    # What a worker reports.
    job_types = (ROOT / "docs" / "job-types.md").read_text("utf-8")
    source = (ROOT / "api" / "worker" / "outcomes.py").read_text("utf-8")
    of_attempts = {*re.findall(r'FailAttempt\(\s*"(\w+)"', source), *AFTER_CRASH, REFUSED}
    of_attempts |= {MEMORY_LIMIT_EXCEEDED, TIMED_OUT.code, PayloadInvalid.code}
    assert [code for code in sorted(of_attempts) if f"`{code}`" not in job_types] == []


def test_the_guides_name_every_policy_field_mutation_and_event() -> None:
    job_types = (ROOT / "docs" / "job-types.md").read_text("utf-8")
    missing = [each.name for each in fields(JobPolicy) if f"| `{each.name}` |" not in job_types]
    clients = (ROOT / "docs" / "clients.md").read_text("utf-8")
    security = (ROOT / "docs" / "security.md").read_text("utf-8")
    (mutation,) = re.findall(r"^type Mutation \{(.*?)^\}", SDL_FILE.read_text("utf-8"), re.M | re.S)
    for name in re.findall(r"^  (\w+)\(", mutation, re.M):
        missing += [name for page in (clients, security) if f"`{name}`" not in page]
    missing += [
        name for name in STATUS_AFTER.keys() - {"job.settled"} if f"`{name}`" not in clients
    ]
    assert missing == []
