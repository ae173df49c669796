"""What is read of a picture before it is decoded: its size, its memory, and how it is turned."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from job_registry.catalog._picture_headers import Refused, first_frame

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
ORIENTATION, SHORT, LONG = 0x0112, 3, 4


def gradient(mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode)


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    (image or gradient()).save(content, form, **options)
    return content.getvalue()


def exif(
    orientation: int,
    *,
    order: str = "<",
    kind: int = SHORT,
    tag: int = ORIENTATION,
    before: int = 0,
) -> bytes:
    """Return EXIF with this orientation, after so many other tags."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    others = struct.pack(f"{order}HHIHH", 0x0100, SHORT, 1, 7, 0) * before
    entry = struct.pack(f"{order}HHIHH", tag, kind, 1, orientation, 0)
    return head + struct.pack(f"{order}IH", 8, before + 1) + others + entry + b"\0\0\0\0"


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_is_decoded_as_before(form: str) -> None:
    content = encoded(form)
    picture = first_frame(content)
    assert (picture.width, picture.height, picture.orientation) == (20, 10, 1)
    one, other = (Image.open(io.BytesIO(each)) for each in (content, picture.content))
    assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("form", "options", "kind", "bytes_per_pixel"),
    [
        ("JPEG", {}, "JPEG", 4),
        ("JPEG", {"progressive": True}, "progressive JPEG", 10),
        ("PNG", {}, "PNG", 8),
        ("WEBP", {"lossless": True}, "WebP", 20),
        ("WEBP", {}, "WebP", 20),
        ("WEBP", {"exif": b"Exif"}, "WebP", 20),
        ("GIF", {}, "GIF", 8),
    ],
)
def test_the_memory_of_a_picture_depends_on_its_format(
    form: str, options: dict[str, Any], kind: str, bytes_per_pixel: int
) -> None:
    picture = first_frame(encoded(form, gradient(size=(300, 2)), **options))
    assert (picture.width, picture.height) == (300, 2)
    assert (picture.kind, picture.bytes_per_pixel) == (kind, bytes_per_pixel)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_that_of_the_exif(form: str, order: str, orientation: int) -> None:
    content = encoded(form, exif=b"Exif\0\0" + exif(orientation, order=order))
    assert first_frame(content).orientation == orientation


@pytest.mark.parametrize(
    ("content", "orientation"),
    [
        (exif(6, before=5), 6),
        (exif(0), 1),
        (exif(9), 1),
        (exif(6, kind=LONG), 1),
        (exif(6, tag=0x0113), 1),
        (exif(6)[:12], 1),
        (b"XX" + exif(6)[2:], 1),
        (b"", 1),
    ],
)
def test_exif_without_a_valid_orientation_means_upright(content: bytes, orientation: int) -> None:
    assert first_frame(encoded("JPEG", exif=b"Exif\0\0" + content)).orientation == orientation


def test_a_jpeg_without_its_end_marker_is_left_to_the_decoder() -> None:
    whole = encoded("JPEG")
    assert whole.endswith(b"\xff\xd9")
    assert first_frame(whole[:-2]).content == first_frame(whole).content[:-2]
    start_of_scan = whole.index(b"\xff\xda")
    headers = first_frame(whole[:start_of_scan])
    assert first_frame(whole).content.startswith(headers.content)


@pytest.mark.parametrize("form", ["JPEG", "GIF"])
def test_a_picture_whose_headers_are_truncated_is_refused(form: str) -> None:
    with pytest.raises(Refused):
        first_frame(encoded(form)[:15])


def inserted(content: bytes, at: int, more: bytes) -> bytes:
    return content[:at] + more + content[at:]


@pytest.mark.parametrize(
    "more",
    [b"\xff\x01", b"\xff\xe2\0\x02", b"\xff\xe2\0\x05abc", b"\xff\xfe\0\x0aExif\0\0xx"],
    ids=["without a length", "empty", "other data", "a comment"],
)
def test_parts_of_a_jpeg_that_are_not_decoded_are_left_out(more: bytes) -> None:
    content = encoded("JPEG")
    plain = first_frame(content)
    assert first_frame(inserted(content, 2, more)) == plain
    assert first_frame(content + more + b"after the end") == plain
    start, end = 2, 4 + int.from_bytes(content[4:6], "big")
    # The colours are described once.
    assert first_frame(inserted(content, end, content[start:end])) == plain


@pytest.mark.parametrize("segment", [b"\xff\xe2\0\x01", b"\xff\xe2\xff\xff"])
def test_a_jpeg_with_a_segment_of_an_impossible_length_is_refused(segment: bytes) -> None:
    with pytest.raises(Refused, match="headers cannot be read"):
        first_frame(inserted(encoded("JPEG"), 2, segment))


def png_chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def test_parts_of_a_png_that_are_not_decoded_are_left_out() -> None:
    content = encoded("PNG", gradient("P"))
    plain = first_frame(content)
    after_header = 8 + 25
    header = content[8:after_header]
    palette = content[content.index(b"PLTE") - 4 :][: 12 + 768]
    larger = png_chunk(b"IHDR", struct.pack(">II", 9_000, 9_000) + header[16:21])
    for more in (png_chunk(b"tEXt", b"a\0b"), larger):
        assert first_frame(inserted(content, after_header, more)) == plain
    assert first_frame(inserted(content, content.index(b"IDAT") - 4, palette)) == plain
    assert first_frame(content + png_chunk(b"IDAT", b"x")) == plain


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_a_gif_keeps_its_colours_and_not_its_comments(mode: str) -> None:
    image = gradient(mode)
    if mode == "RGBA":
        image.putpixel((0, 0), (0, 0, 0, 0))
    plain, commented = encoded("GIF", image), encoded("GIF", image, comment=b"x" * 600)
    assert len(commented) > len(plain) + 600
    picture = first_frame(commented)
    assert len(picture.content) < len(plain) + 100
    one, other = (
        Image.open(io.BytesIO(each)).convert("RGBA").tobytes() for each in (plain, picture.content)
    )
    assert one == other
    at = plain.index(b",\0\0\0\0")
    with pytest.raises(Refused, match="it has no frame"):
        first_frame(inserted(plain, at, b"?"))


def test_two_frame_headers_are_refused() -> None:
    content = encoded("JPEG")
    at = content.index(b"\xff\xc0")
    frame = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")]
    with pytest.raises(Refused, match="two frame headers"):
        first_frame(content.replace(frame, frame * 2))
    with pytest.raises(Refused, match="no frame header"):
        first_frame(content.replace(frame, b""))


def test_a_gif_frame_may_be_larger_than_its_screen() -> None:
    content = bytearray(encoded("GIF"))
    at = content.index(b",\0\0\0\0")
    content[at + 1 : at + 5] = struct.pack("<HH", 3, 4)
    picture = first_frame(bytes(content))
    assert (picture.width, picture.height) == (23, 14)
    del content[at:]
    with pytest.raises(Refused):
        first_frame(bytes(content) + b";")


@pytest.mark.parametrize("content", [b"", b"%PDF-1.7", b"RIFF\0\0\0\0WAVE", b"<svg/>", b"BM" * 40])
def test_other_formats_are_refused(content: bytes) -> None:
    with pytest.raises(Refused, match="expected JPEG, PNG, WebP or GIF"):
        first_frame(content)
