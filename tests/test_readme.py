"""The README is short, and `make run` prints its first request. tests/docs runs its examples."""

from __future__ import annotations

import json
import re

from job_registry_api.first_minute import what_to_try
from tests import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_make_run_prints_the_request_of_the_readme() -> None:
    (shown,) = re.findall(r"-d '(\{.*?\})'\n", README, re.DOTALL)
    (printed,) = re.findall(r"-d '(.*)'", what_to_try("127.0.0.1", 8000, "assets"))
    assert json.loads(printed) == json.loads(shown)


def test_every_guide_is_in_the_table_of_the_readme() -> None:
    guides = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert guides <= set(re.findall(r"\]\((docs/[^)]+)\)", README))
