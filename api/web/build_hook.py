"""Stops the build of a wheel that would lack GraphiQL, which Node builds before hatchling runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WITHOUT: Final = "JOB_REGISTRY_WITHOUT_GRAPHIQL"


class RequireGraphiQL(BuildHookInterface[Any]):
    """Hatchling finds this class by its base."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Check that the page is built, or is left out on purpose.

        Raises:
            RuntimeError: the page is not built.
        """
        page = Path(self.root) / "api" / "web" / "dist" / "index.html"
        if version != "editable" and not page.is_file() and not os.environ.get(WITHOUT):
            raise RuntimeError(
                "GraphiQL is not built, so the wheel would lack it. Run `make install` with Node"
                f" 20.19 or newer, or set {WITHOUT}=1 to build a wheel without GraphiQL."
            )
