"""The tests' own: the token is given."""

import os


def token() -> str:
    return os.environ["TOKEN"]
