"""Draws invoices, which takes a processor and not only time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_A4 = (1240, 1754)  # Pixels, at 150 per inch.


def draw_page(title: str, text: str) -> Image.Image:
    """Draw one page."""
    page = Image.new("RGB", _A4, "white")
    draw = ImageDraw.Draw(page)
    draw.text((120, 120), title, "black", ImageFont.load_default(36))
    draw.text((120, 240), text, "black", ImageFont.load_default(60))
    return page


def write_pdf(path: Path, pages: Sequence[Image.Image]) -> None:
    """Write the pages. Readers see the whole file or none, also if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    pages[0].save(unfinished, "PDF", save_all=True, append_images=pages[1:])
    unfinished.replace(path)
