"""Reads the headers of a picture, and reduces the file to its first frame, without decoding it.

The files are untrusted. Libraries read much that a thumbnail does not need: later frames, profiles,
text, previews. A small file can make them allocate memory or compute without bound there, so only
the parts that hold the pixels of the first frame are passed on.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAX_PARTS: Final = 50_000
"""Chunks or segments of a file. A 32 MB PNG in chunks of 1 KB has 32,000. More cost seconds."""

MAX_SCANS: Final = 100
"""Scans of a progressive JPEG. Encoders write about ten. Each decodes the whole picture again."""

MAX_GIF_HEADER_BYTES: Final = 1_048_576
"""Bytes of a GIF before its first frame: comments and profiles, read in pieces of 255 bytes."""


class Refused(Exception):
    """Raised when a file is refused. The message continues a sentence about the file."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The first frame of a picture, still encoded, and what its headers say.

    `format` is Pillow's name. `kind` is for people. `orientation` is that of EXIF, 1 to 8.
    `bytes_per_pixel` is the memory that decoding takes at its peak.
    """

    format: str
    kind: str
    width: int
    height: int
    bytes_per_pixel: int
    orientation: int
    content: bytes


def first_frame(content: bytes) -> Picture:
    """Return the first frame of a picture.

    Raises:
        Refused: the format is not one of the four, or the headers are broken.
    """
    try:
        if content.startswith(b"\xff\xd8\xff"):
            return _jpeg(content)
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(content)
        if content.startswith((b"GIF87a", b"GIF89a")):
            return _gif(content)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return _webp(content)
    except (struct.error, IndexError):
        raise Refused("is broken or truncated: its headers cannot be read.") from None
    raise Refused("is not a picture in a known format: expected JPEG, PNG, WebP or GIF.")


def _jpeg(content: bytes) -> Picture:
    kept = [b"\xff\xd8"]
    at, scans, segments, orientation = 2, 0, 0, 1
    size: tuple[int, int] | None = None
    components, several_scans = 0, False
    once: set[int] = set()
    while (found := _MARKER.search(content, at)) is not None:
        marker, start = found[1][0], found.start()
        if scans:
            kept.append(_pixels(content[at:start]))
        at = found.end()
        segments += 1
        if segments > MAX_PARTS:
            raise Refused(f"has more than {MAX_PARTS:,} segments.")
        if marker == _EOI:
            kept.append(b"\xff\xd9")
            break
        if marker in _WITHOUT_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", content, at)
        end = at + length
        if length < 2 or end > len(content):
            raise Refused("is broken or truncated: its headers cannot be read.")
        if marker in _FRAMES:
            if size is not None:
                raise Refused("is broken: it has two frame headers.")
            height, width, components = struct.unpack_from(">HHB", content, at + 3)
            size = width, height
            several_scans = marker in _PROGRESSIVE
        elif marker == _SOS:
            scans += 1
            if scans > MAX_SCANS:
                raise Refused(f"has more than {MAX_SCANS} scans.")
            several_scans = several_scans or content[at + 2] < components
        elif marker == _APP1 and content[at + 2 : at + 8] == b"Exif\0\0":
            orientation = _orientation(content[at + 8 : end])
        if marker in _TABLES or (marker in _COLOURS and marker not in once):
            once.add(marker)
            kept.append(content[start:end])
        at = end
    else:
        # Without an end marker the decoder finds out whether data is missing.
        kept.append(_pixels(content[at:]) if scans else b"")
    if size is None:
        raise Refused("is broken or truncated: it has no frame header.")
    # A decoder keeps the coefficients of the whole picture from scan to scan: two bytes each.
    return Picture(
        "JPEG",
        "progressive JPEG" if several_scans else "JPEG",
        *size,
        bytes_per_pixel=4 + 2 * components if several_scans else 4,
        orientation=orientation,
        content=b"".join(kept),
    )


def _pixels(data: bytes) -> bytes:
    """Return the data of a scan without fill bytes, on which a decoder waits for more data."""
    return _FILL.sub(b"\xff", data).removesuffix(b"\xff")


_FILL: Final = re.compile(rb"\xff{2,}")
_MARKER: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_WITHOUT_LENGTH: Final = (0x01, 0xD8)
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = (0xC2, 0xC6, 0xCA, 0xCE)
_TABLES: Final = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _SOS}
_COLOURS: Final = (0xE0, 0xEE)
"""JFIF and Adobe: they say how the components become colours."""


def _png(content: bytes) -> Picture:
    kept = [content[:8]]
    width = height = 0
    orientation = 1
    once: set[bytes] = set()
    for name, start, end in _chunks(content, 8, ">I4s", header=8, trailer=4):
        if name == b"IHDR" and not once:
            width, height = struct.unpack_from(">II", content, start + 8)
        elif name == b"eXIf":
            orientation = _orientation(content[start + 8 : end - 4])
        if name == b"IDAT" or (name in _PNG_ONCE and name not in once):
            once.add(name)
            kept.append(content[start:end])
        if name == b"IEND":
            break
    # RGB with a transparent colour becomes RGBA, and RGBA is multiplied by its alpha: two copies.
    return Picture("PNG", "PNG", width, height, 8, orientation, b"".join(kept))


_PNG_ONCE: Final = (b"IHDR", b"PLTE", b"tRNS", b"IEND")


def _gif(content: bytes) -> Picture:
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept = content[:at]
    control = b""
    while content[at] != _GIF_IMAGE:
        if content[at] != _GIF_EXTENSION:
            raise Refused("is broken or truncated: it has no frame.")
        start, at = at, at + 2
        while content[at] and at <= MAX_GIF_HEADER_BYTES:
            at += content[at] + 1
        at += 1
        if at > MAX_GIF_HEADER_BYTES:
            raise Refused(f"has no frame in its first {MAX_GIF_HEADER_BYTES:,} bytes.")
        if content[start + 1] == _GIF_CONTROL:
            control = content[start:at]
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", content, at + 1)
    return Picture(
        "GIF",
        "GIF",
        max(width, left + frame_width),
        max(height, top + frame_height),
        bytes_per_pixel=8,  # As for PNG.
        orientation=1,
        content=kept + control + content[at:],
    )


_GIF_IMAGE, _GIF_EXTENSION, _GIF_CONTROL = 0x2C, 0x21, 0xF9


def _webp(content: bytes) -> Picture:
    kept: dict[bytes, bytes] = {}
    orientation = 1
    width = height = 0
    for name, start, end in _chunks(content, 12, "<4sI", header=8, trailer=0):
        if not kept:
            width, height = _webp_size(name, content)
        if name == b"EXIF":
            orientation = _orientation(content[start + 8 : end].removeprefix(b"Exif\0\0"))
        if name in _WEBP_ONCE and name not in kept:
            kept[name] = content[start:end]
    body = b"WEBP" + b"".join(kept.values())
    return Picture(
        "WEBP",
        "WebP",
        width,
        height,
        # The library has two canvases and the picture of a frame, Pillow a copy and its image.
        bytes_per_pixel=20,
        orientation=orientation,
        content=b"RIFF" + struct.pack("<I", len(body)) + body,
    )


_WEBP_ONCE: Final = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")


def _webp_size(first: bytes, content: bytes) -> tuple[int, int]:
    match first:
        case b"VP8X":
            wide, narrow, high, low = struct.unpack_from("<HBHB", content, 24)
            return (wide | narrow << 16) + 1, (high | low << 16) + 1
        case b"VP8 " if content[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", content, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L" if content[20] == 0x2F:
            (bits,) = struct.unpack_from("<I", content, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise Refused("is broken or truncated: its headers cannot be read.")


def _chunks(
    content: bytes, at: int, form: str, *, header: int, trailer: int
) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, the start and the end of each chunk of a PNG or a WebP."""
    for number in range(len(content)):
        if at + header > len(content):
            return
        if number == MAX_PARTS:
            raise Refused(f"has more than {MAX_PARTS:,} chunks.")
        first, second = struct.unpack_from(form, content, at)
        name, length = (first, second) if isinstance(first, bytes) else (second, first)
        # A chunk of a WebP has an even length. The last one may lack its padding.
        end = at + header + length + trailer + (length % 2 if not trailer else 0)
        yield name, at, min(end, len(content))
        at = end


def _orientation(exif: bytes) -> int:
    """Return the orientation that EXIF gives: 1 to 8. 1, upright, where it gives none."""
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for at in range(start + 2, start + 2 + 12 * min(entries, _MAX_TAGS), 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, at)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


_MAX_TAGS: Final = 1_000
_ORIENTATION: Final = 0x0112
_SHORT: Final = 3
