"""`thumbnail.create` and files of strangers: only four formats are read, nothing is decoded that
is too large, and no error shows more than a person needs.
"""

from __future__ import annotations

import io
import os
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from job_registry import Fail
from job_registry.asset_files import MAX_FILE_BYTES
from job_registry.catalog._picture_headers import Refused, first_frame
from tests.registry.test_thumbnails import thumbnails

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def put(assets: Path, content: bytes, name: str = "a/1.png") -> None:
    path = assets / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def refusal(assets: Path, content: bytes, *sizes: int) -> str:
    """The words with which a picture is refused."""
    put(assets, content)
    with pytest.raises(Fail) as failed:
        thumbnails(assets, *(sizes or (64,)))
    return str(failed.value)


@contextmanager
def memory_of_at_most(limit: int) -> Iterator[None]:
    """Fail if Python's objects take more memory at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(*before: bytes, width: int = 8, height: int = 8) -> bytes:
    """A grey PNG with chunks before its pixels. Its pixels are missing if it is not 8 x 8."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 72))
    start = b"\x89PNG\r\n\x1a\n" + header
    return start + b"".join(before) + pixels + chunk(b"IEND", b"")


def jpeg(width: int, height: int, *before: bytes, **options: object) -> bytes:
    """A JPEG with segments before the rest, whose frame header gives another size."""
    content = encoded(Image.new("RGB", (8, 8)), "JPEG", **options)
    at = max(content.find(b"\xff\xc0\x00"), content.find(b"\xff\xc2\x00")) + 5
    size = struct.pack(">HH", height, width)
    return content[:2] + b"".join(before) + content[2:at] + size + content[at + 4 :]


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def webp(width: int, height: int) -> bytes:
    """A WebP whose canvas has this size."""
    content = encoded(Image.new("RGBA", (8, 8)), "WEBP", exif=b"Exif\0\0II*\0", lossless=True)
    assert content[12:16] == b"VP8X"
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return content[:24] + canvas + content[30:]


def gif(width: int, height: int) -> bytes:
    """A GIF whose screen is small and whose frame has this size."""
    content = encoded(Image.new("L", (8, 8)), "GIF")
    at = content.index(b",\0\0\0\0\x08\0\x08\0")
    return content[: at + 5] + struct.pack("<HH", width, height) + content[at + 9 :]


def test_no_other_program_is_started_and_no_command_line_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript, mark = tmp_path / "bin/gs", tmp_path / "started"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f'#!/bin/sh\necho "$@" >> {mark}\nexit 1\n')
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    for start in (b"", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(eps)) + b"\0" * 20):
        assert refusal(tmp_path / "assets", start + eps) == (
            "a/1.png is not a picture in a known format: expected JPEG, PNG, WebP or GIF."
        )
    assert not mark.exists()


@pytest.mark.parametrize(
    "form", ["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "AVIF", "DDS", "EPS"]
)
def test_only_four_formats_are_read(tmp_path: Path, form: str) -> None:
    words = refusal(tmp_path, encoded(Image.new("RGB", (16, 16)), form))
    assert words.endswith("in a known format: expected JPEG, PNG, WebP or GIF.")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(width=10_000, height=10_000), "10,000 x 10,000 pixels, and the limit for PNG is 33,5"),
        (png(width=1, height=70_000), "1 x 70,000 pixels, and the limit is 65,535 for an edge."),
        (png(width=2**31 - 1, height=1), "2,147,483,647 x 1 pixels, and the limit is 65,535 for"),
        (gif(6_000, 6_000), "6,000 x 6,000 pixels, and the limit for GIF is 33,554,432 pixels."),
        (webp(4_000, 4_000), "4,000 x 4,000 pixels, and the limit for WebP is 13,421,772 pixels."),
        (webp(16_384, 16_384), "16,384 x 16,384 pixels, and the limit for WebP is 13,421,772"),
        (jpeg(9_000, 9_000), "9,000 x 9,000 pixels, and the limit for JPEG is 67,108,864 pixels."),
        (
            jpeg(6_000, 5_000, progressive=True),
            "6,000 x 5,000 pixels, and the limit for progressive JPEG is 26,843,545 pixels.",
        ),
    ],
    ids=["png", "tall", "wide", "gif", "webp", "huge webp", "jpeg", "progressive"],
)
def test_a_picture_is_refused_by_its_size_before_it_is_decoded(
    tmp_path: Path, content: bytes, words: str
) -> None:
    with memory_of_at_most(4_000_000):
        refused = refusal(tmp_path, content)
    assert refused.startswith("a/1.png is too large: it has ")
    assert words in refused


def test_a_thumbnail_is_bounded_as_well(tmp_path: Path) -> None:
    assert refusal(tmp_path, jpeg(8_000, 8_000), 128, 8_000) == (
        "a/1.png is too large for a thumbnail of 8,000 pixels: that would have 8,000 x 8,000"
        " pixels, and the limit is 12,582,912. Enqueue the job with smaller sizes."
    )


def test_a_large_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    put(tmp_path, b"")
    os.truncate(tmp_path / "a/1.png", 1 << 40)
    with pytest.raises(Fail) as failed:
        thumbnails(tmp_path, 64)
    assert str(failed.value) == (
        "a/1.png is too large: it has 1,099,511,627,776 bytes, and the limit is 33,554,432 bytes."
    )


def test_a_photo_of_fifty_million_pixels_is_rendered(tmp_path: Path) -> None:
    """Its file is made of one block again and again, each with a restart marker."""
    one = encoded(Image.new("RGB", (8, 8), "teal"), "JPEG", subsampling=0, restart_marker_blocks=1)
    scan = one.index(b"\xff\xda")
    begin = scan + 2 + struct.unpack_from(">H", one, scan + 2)[0]
    block = one[begin:-2]
    eight = b"".join(block + bytes((0xFF, 0xD0 + number)) for number in range(8))
    content = one[:begin] + eight * (8_192 * 6_144 // 512)
    at = content.index(b"\xff\xc0\x00") + 5
    put(tmp_path, content[:at] + struct.pack(">HH", 6_144, 8_192) + content[at + 4 : -1] + b"\xd9")
    begun = time.process_time()
    (only,) = thumbnails(tmp_path, 512)
    assert (only.width, only.height) == (512, 384)
    with Image.open(tmp_path / only.path) as image:
        teal = Image.new("RGB", image.size, "teal")
        assert difference(image.convert("RGB"), teal, (500, 380)) < 12
    assert time.process_time() - begun < 10


def test_the_longest_edge_may_be_that_of_a_gif(tmp_path: Path) -> None:
    put(tmp_path, encoded(Image.new("L", (65_535, 1)), "PNG"))
    (only,) = thumbnails(tmp_path, 128)
    assert (only.width, only.height) == (128, 1)


def repeated_gif(frames: int) -> bytes:
    content = encoded(Image.new("RGB", (64, 64), "red"), "GIF")
    at = content.index(b",\0\0\0\0")
    return content[:at] + content[at:-1] * frames + b";"


def repeated_webp(frames: int) -> bytes:
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    content = encoded(images[0], "WEBP", save_all=True, append_images=images[1:], lossless=True)
    at = content.index(b"ANMF")
    size = 8 + struct.unpack_from("<I", content, at + 4)[0]
    body = content[8:at] + content[at : at + size] * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def repeated_png(frames: int) -> bytes:
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    content = encoded(images[0], "PNG", save_all=True, append_images=images[1:])
    end = content.index(b"IEND") - 4
    more = content[content.rindex(b"fcTL") - 4 : end]
    return content[:end] + more * frames + content[end:]


@pytest.mark.parametrize("make", [repeated_gif, repeated_webp, repeated_png])
def test_of_an_animation_only_the_first_frame_is_read(
    tmp_path: Path, make: Callable[[int], bytes]
) -> None:
    put(tmp_path, make(10_000))
    begun = time.process_time()
    (only,) = thumbnails(tmp_path, 32)
    assert time.process_time() - begun < 1
    with Image.open(tmp_path / only.path) as image:
        assert value_of(image.convert("RGB").getchannel("R"), (5, 5)) > 240
        assert getattr(image, "n_frames", 1) == 1


def test_profiles_and_text_that_unpack_to_gigabytes_are_left_out(tmp_path: Path) -> None:
    bomb = zlib.compress(b"\0" * 50_000_000)
    put(tmp_path, png(chunk(b"iCCP", b"p\0\0" + bomb), *[chunk(b"zTXt", b"k\0\0" + bomb)] * 80))
    with memory_of_at_most(20_000_000):
        thumbnails(tmp_path, 8)


def test_exif_whose_values_overlap_is_not_unpacked(tmp_path: Path) -> None:
    """Each of 5,000 tags claims the same 60,000 bytes."""
    tags = b"".join(struct.pack("<HHII", tag, 7, 60_000, 100) for tag in range(1, 5_000))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 4_999) + tags
    put(tmp_path, jpeg(8, 8, segment(0xE1, exif + b"\0" * (65_000 - len(exif)))))
    with memory_of_at_most(5_000_000):
        thumbnails(tmp_path, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (jpeg(8, 8, segment(0xE5, b"") * 60_000), "a/1.png has more than 50,000 segments."),
        (jpeg(8, 8, b"\xff\x01" * 60_000), "a/1.png has more than 50,000 segments."),
        (png(chunk(b"tEXt", b"") * 60_000), "a/1.png has more than 50,000 chunks."),
        (
            jpeg(8, 8, progressive=True).replace(
                b"\xff\xda\x00\x0c",
                b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00" * 101 + b"\xff\xda\x00\x0c",
                1,
            ),
            "a/1.png has more than 100 scans.",
        ),
        (
            encoded(Image.new("L", (8, 8)), "GIF").replace(
                b",\0\0\0\0", b"!\xfe" + (b"\xff" + b"x" * 255) * 9_000 + b"\0,\0\0\0\0", 1
            ),
            "a/1.png has no frame in its first 1,048,576 bytes.",
        ),
        (
            encoded(Image.new("L", (8, 8)), "GIF").replace(
                b",\0\0\0\0", b"!\xfe\0" * 400_000 + b",\0\0\0\0", 1
            ),
            "a/1.png has no frame in its first 1,048,576 bytes.",
        ),
    ],
    ids=["segments", "markers", "chunks", "scans", "comment", "comments"],
)
def test_many_small_parts_are_refused_within_a_moment(
    tmp_path: Path, content: bytes, words: str
) -> None:
    begun = time.process_time()
    assert refusal(tmp_path, content) == words
    assert time.process_time() - begun < 0.5


def test_a_picture_may_have_a_hundred_scans() -> None:
    progressive = jpeg(8, 8, progressive=True)
    first, empty = b"\xff\xda\x00\x0c", b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00"
    more = 100 - progressive.count(b"\xff\xda")
    first_frame(progressive.replace(first, empty * more + first, 1))
    with pytest.raises(Refused, match="more than 100 scans"):
        first_frame(progressive.replace(first, empty * (more + 1) + first, 1))


def test_fill_bytes_before_a_marker_cost_nothing(tmp_path: Path) -> None:
    content = jpeg(8, 8)
    for number in (1, 8_000_000):
        put(tmp_path, content[:-2] + b"\xff" * number + b"\xff\xd9")
        begun = time.process_time()
        assert len(thumbnails(tmp_path, 8)) == 1
        assert time.process_time() - begun < 1


def difference(one: Image.Image, other: Image.Image, at: tuple[int, int]) -> int:
    """How much a pixel differs, over three bands."""
    bands = zip(one.split(), other.split(), strict=True)
    return sum(abs(value_of(a, at) - value_of(b, at)) for a, b in bands)


def value_of(band: Image.Image, at: tuple[int, int]) -> int:
    value = band.getpixel(at)
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_picture_is_turned_as_its_exif_says(
    tmp_path: Path, form: str, orientation: int, order: str
) -> None:
    image = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    image.paste("red", (0, 0, 16, 16))
    head = b"II*\0" if order == "<" else b"MM\0*"
    exif = head + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    put(tmp_path, encoded(image, form, exif=b"Exif\0\0" + exif, quality=95, lossless=True))
    with Image.open(tmp_path / "a/1.png") as original:
        expected = ImageOps.exif_transpose(original).convert("RGB")
    (only,) = thumbnails(tmp_path, 64)
    with Image.open(tmp_path / only.path) as drawn:
        assert drawn.size == expected.size
        for corner in ((4, 4), (expected.width - 5, expected.height - 5)):
            assert difference(drawn.convert("RGB"), expected, corner) < 60


def test_transparent_pixels_do_not_lend_their_colour(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 33, 64))
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        put(tmp_path, encoded(image, form, **options))
        (only,) = thumbnails(tmp_path, 32)
        with Image.open(tmp_path / only.path) as drawn:
            for x in range(32):
                _, green, _, alpha = drawn.convert("RGBA").split()
                assert value_of(green, (x, 16)) < 60 or value_of(alpha, (x, 16)) < 10


@pytest.mark.parametrize("form", FORMATS)
def test_no_broken_file_gives_more_than_a_sentence(tmp_path: Path, form: str) -> None:
    """Cut anywhere, or with any bytes changed: either a thumbnail, or a sentence about the file."""
    noise = Image.effect_noise((40, 30), 80).convert("P" if form == "GIF" else "RGB")
    options = {"transparency": 3} if form == "GIF" else {}
    content = encoded(noise, form, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0", **options)
    chance = random.Random(form)
    refusals = set()
    for number in range(250):
        broken = bytearray(
            content[: chance.randrange(len(content))] if number % 3 == 0 else content
        )
        for _ in range(chance.choice((0, 1, 3, 10))):
            if broken:
                at = chance.randrange(min(len(broken), chance.choice((60, len(content)))))
                broken[at] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        put(tmp_path, bytes(broken))
        try:
            thumbnails(tmp_path, 16)
        except Fail as fail:
            refusals.add(str(fail))
    assert any("broken or truncated" in words for words in refusals)
    for words in refusals:
        assert words.startswith("a/1.png ")
        assert words.endswith(".")
        for leak in (str(tmp_path), "PIL", "0x", "<", "Error", "codec", "buffer", "struct"):
            assert leak not in words
    assert sorted(path.name for path in (tmp_path / "a/1").iterdir()) == ["16.webp"]


def test_the_name_of_a_file_does_not_reach_a_terminal_as_it_is(tmp_path: Path) -> None:
    put(tmp_path, b"", "a/1.\x1b[31m" + "x" * 200)
    with pytest.raises(Fail) as failed:
        thumbnails(tmp_path, 8)
    assert str(failed.value).isprintable()
    assert len(str(failed.value)) < 250


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    put(tmp_path, png())
    put(tmp_path, b"half", "a/1/8.webp.77.abc.partial")
    put(tmp_path, b"half", "a/1/8.webp.78.abc.partial")
    an_hour_ago = time.time() - 3_700
    os.utime(tmp_path / "a/1/8.webp.77.abc.partial", (an_hour_ago, an_hour_ago))
    thumbnails(tmp_path, 8)
    names = sorted(path.name for path in (tmp_path / "a/1").iterdir())
    assert names == ["8.webp", "8.webp.78.abc.partial"]


def test_a_file_may_have_as_many_bytes_as_the_limit(tmp_path: Path) -> None:
    content = png()
    put(tmp_path, content + b"\0" * (MAX_FILE_BYTES - len(content)))
    assert len(thumbnails(tmp_path, 8)) == 1
