"""Decodes one untrusted picture within limits, and draws its thumbnails."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from job_registry import Fail
from job_registry.catalog._picture_headers import Picture, Refused, first_frame

MAX_DECODED_BYTES: Final = 268_435_456
"""Memory for decoding one picture. With what Pillow needs besides, it fits the memory limit of
`thumbnail.create`. It is 67 million pixels of JPEG, 26 of progressive JPEG, 33 of PNG and GIF, and
13 of WebP: photos of a phone with 50 million pixels, and screens of 7,680 x 4,320."""

MAX_EDGE: Final = 65_535
"""Pixels of an edge, as in JPEG and GIF. Pillow has a pointer for each row of a picture."""

MAX_THUMBNAIL_PIXELS: Final = 4_096 * 3_072
"""Pixels of one thumbnail. The encoder of WebP takes up to 32 bytes for each."""

READERS: Final[Mapping[str, Callable[[io.BytesIO], Image.Image]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
"""Pillow's readers of the four formats. `Image.open` would try all that it has, and the one of EPS
runs Ghostscript.
"""


@dataclass(frozen=True, slots=True)
class Source:
    """A decoded picture, upright, in RGB or RGBA. `size` is that of the file; `image` is smaller
    if no thumbnail needs as many pixels.
    """

    image: Image.Image
    size: tuple[int, int]

    def draw(self, longest_edge: int) -> tuple[bytes, int, int]:
        """Return a thumbnail as WebP, its width and its height. It is never enlarged."""
        size = fitted(self.size, longest_edge)
        image = _resized(self.image, size)
        encoded = io.BytesIO()
        image.save(encoded, format="WEBP", quality=85, method=4)
        return encoded.getvalue(), *size


def decode(content: bytes, shown: str, *, longest_edge: int) -> Source:
    """Decode a picture for thumbnails of up to `longest_edge`. Errors call it `shown`.

    Raises:
        Fail: it is not a picture, or broken, or larger than a limit. Another attempt changes
            nothing.
    """
    try:
        picture = first_frame(content)
        del content
        _check_size(picture, longest_edge)
    except Refused as refused:
        raise Fail(f"{shown} {refused}") from None
    target = fitted((picture.width, picture.height), longest_edge)
    try:
        # Each step frees the picture before it.
        image = _decoded(picture, target)
        image = _for_resizing(image)
        image = _resized(image, target)
    except MemoryError:
        raise
    # Decoding happens in memory, so the cause of any error is the file. The messages of the
    # libraries are for programmers.
    except Exception:
        raise Fail(
            f"{shown} is broken or truncated: it cannot be decoded as {picture.kind}."
        ) from None
    image = _finished(image)
    size = picture.width, picture.height
    if picture.orientation in _TURNS:
        image = image.transpose(_TURNS[picture.orientation])
    return Source(image, size[::-1] if picture.orientation >= _FIRST_ON_ITS_SIDE else size)


def fitted(size: tuple[int, int], longest_edge: int) -> tuple[int, int]:
    """Return the size of a thumbnail. Each edge has a pixel at least."""
    scale = min(1.0, longest_edge / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _check_size(picture: Picture, longest_edge: int) -> None:
    width, height = picture.width, picture.height
    has = f"it has {width:,} x {height:,} pixels"
    if not width or not height:
        raise Refused(f"is broken: {has}.")
    if max(width, height) > MAX_EDGE:
        raise Refused(f"is too large: {has}, and the limit is {MAX_EDGE:,} for an edge.")
    limit = MAX_DECODED_BYTES // picture.bytes_per_pixel
    if width * height > limit:
        raise Refused(f"is too large: {has}, and the limit for {picture.kind} is {limit:,} pixels.")
    width, height = fitted((width, height), longest_edge)
    if width * height > MAX_THUMBNAIL_PIXELS:
        raise Refused(
            f"is too large for a thumbnail of {longest_edge:,} pixels: that would have"
            f" {width:,} x {height:,} pixels, and the limit is {MAX_THUMBNAIL_PIXELS:,}. Enqueue"
            " the job with smaller sizes."
        )


def _decoded(picture: Picture, target: tuple[int, int]) -> Image.Image:
    # Pillow warns of what it tolerates.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = READERS[picture.format](io.BytesIO(picture.content))
        if image.size != (picture.width, picture.height):
            raise ValueError("Pillow reads another size than the headers give")
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            # The decoder can leave out pixels by a factor of 2, 4 or 8.
            image.draft(None, target)
        image.load()
    return image


def _for_resizing(image: Image.Image) -> Image.Image:
    """Return the picture in a mode that can be resized without another copy."""
    if image.mode.startswith("I"):
        return image.convert("F")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        # The colour of transparent pixels must not mix with that of others.
        return image.convert("RGBa")
    return image.convert("L" if image.mode == "1" else "RGB") if image.mode in "1P" else image


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _finished(image: Image.Image) -> Image.Image:
    """Return the picture in RGB or RGBA, which WebP takes; 16 bits per channel become 8."""
    if image.mode == "F":
        image = image.point(lambda level: level / 257).convert("L")
    return image.convert("RGBA" if image.mode == "RGBa" else "RGB")


_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn a picture upright, by the orientation of EXIF."""

_FIRST_ON_ITS_SIDE: Final = 5
