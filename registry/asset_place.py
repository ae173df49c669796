"""Where the assets are: a folder, or an fsspec URL such as `s3://bucket/assets`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def is_url(assets: str) -> bool:
    """Return whether the assets are at a URL, and not in a folder."""
    return "://" in assets


def anchored(assets: str) -> str:
    """Return the same place as an absolute path: a handler may change the folder of its process.

    As with fsspec, a path may begin with `~`.
    """
    if is_url(assets):
        return assets
    folder = Path(assets)
    with suppress(RuntimeError):  # There is no such user.
        folder = folder.expanduser()
    return str(folder.absolute())
