"""The subgraph that `job-registry schema --federation` prints, composed by Apollo's own package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from job_registry_api.cli.command import app
from tests.frontend.test_frontend import node, project, pytestmark  # noqa: F401


@pytest.mark.slow
def test_the_subgraph_composes_with_another_that_refers_to_jobs(
    project: Path,  # noqa: F811
) -> None:
    printed = CliRunner().invoke(app, ["schema", "--federation"])
    assert printed.exit_code == 0, printed.output
    (project / "gen" / "subgraph.graphql").write_text(printed.stdout)
    composed = node(project, "compose.mjs", "gen/subgraph.graphql")
    assert composed.returncode == 0, composed.stderr
    assert json.loads(composed.stdout) == {"errors": [], "hints": [], "joined": True}
