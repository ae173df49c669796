"""The login of the tests: the token is in the environment."""

import os


def token() -> str:
    return os.environ["TOKEN"]
