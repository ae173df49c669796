"""Each public name is importable and stands in the table of its package, and no other does."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from tests.docs.pages import PAGES


def documented(package: str) -> list[str] | None:
    """The names in the table below the heading of a package. None if no page has the heading."""
    heading = f"\n## Names in `{package}`\n"
    for page in PAGES:
        _, found, section = page.read_text("utf-8").partition(heading)
        if found:
            return re.findall(r"^\| `(\w+)` \|", section.partition("\n## ")[0], re.MULTILINE)
    return None


@pytest.mark.parametrize("package", ["job_registry", "job_registry_api"])
def test_every_public_name_is_documented_and_no_other(package: str) -> None:
    module = import_module(package)
    names = documented(package)
    if names is None and package == "job_registry_api":
        pytest.skip("no page has the heading: Names in `job_registry_api`")
    assert names == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
