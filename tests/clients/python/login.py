"""The login of the tests: the token of the moment is in a file."""

import os
from pathlib import Path


def token() -> str:
    return Path(os.environ["TOKEN_FILE"]).read_text("ascii")
