"""docs/operating.md names every metric, and every section ends with what goes wrong.

tests/docs runs its commands.
"""

from __future__ import annotations

import re

import pytest

from job_registry_api.metrics import Metrics
from tests import ROOT

GUIDE = (ROOT / "docs/operating.md").read_text("utf-8")


def test_every_metric_is_in_the_table_and_none_else() -> None:
    text = Metrics(["a"]).text().decode()
    served = {
        name + ("_total" if kind == "counter" and not name.endswith("_total") else "")
        for name, kind in re.findall(r"^# TYPE (job_registry_\w+) (counter|gauge)$", text, re.M)
    }
    served = {name for name in served if not name.endswith("_created")}
    assert set(re.findall(r"^\| `(job_registry_\w+)` \|", GUIDE, re.M)) == served


@pytest.mark.parametrize("section", re.findall(r"^## (.*)$", GUIDE, re.M))
def test_every_section_ends_with_what_goes_wrong(section: str) -> None:
    text = GUIDE.split(f"\n## {section}\n")[1].split("\n## ")[0].rstrip()
    last_table = text.rpartition("\n\n")[2]
    assert last_table.startswith("| what goes wrong | how it looks |")
    assert len(last_table.splitlines()) > 2
