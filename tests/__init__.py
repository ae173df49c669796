"""Tests as the specification, in the order of the tree they are about."""

import os
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CODE: Final = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
"""PYTHONPATH of a process that runs this checkout's code, whatever is installed."""
