"""Where the assets are: a folder, or an fsspec URL such as `s3://bucket/assets`."""

from __future__ import annotations

from pathlib import Path


def is_url(assets: str) -> bool:
    """Return whether the assets are at a URL, and not in a folder."""
    return "://" in assets


def anchored(assets: str) -> str:
    """Return the same place as an absolute path: a handler may change the folder of its process."""
    return assets if is_url(assets) else str(Path(assets).absolute())
