"""The files of `thumbnail.create`: one picture in, thumbnails out, in a folder or a bucket."""

from __future__ import annotations

import io
import os
import posixpath
import warnings
from pathlib import Path

import fsspec
from PIL import Image, ImageOps, UnidentifiedImageError

from job_registry import Fail


class ThumbnailFiles:
    """`{assetId}/{versionNumber}.*` below the assets, and `{assetId}/{versionNumber}/` beside it.

    `assets` is a folder or an fsspec URL, `s3://bucket/assets` for one.
    """

    def __init__(self, assets: str, asset_id: str, version_number: int) -> None:
        self._files, root = fsspec.core.url_to_fs(assets)
        self._root = root.rstrip("/")
        self._name = f"{asset_id}/{version_number}"
        self._local = isinstance(self._files, fsspec.get_filesystem_class("file"))

    def open_picture(self, *, max_pixels: int) -> Image.Image:
        """The picture, decoded, upright, in a mode that WebP takes.

        Raises:
            Fail: it is missing, or there are several, or it is broken, or too large: nothing that
                another attempt would change.
            OSError: the storage failed; that may pass.
        """
        path = self._source()
        with self._files.open(path, "rb") as file:
            content = file.read()
        shown = f"{self._name}{posixpath.splitext(path)[1]}"
        try:
            # Pillow only warns of a bomb up to twice its limit; the size is checked below.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(io.BytesIO(content))
                if picture.width * picture.height > max_pixels:
                    raise Fail(
                        f"{shown} is too large: {picture.width} x {picture.height} is more than"
                        f" {max_pixels:,} pixels."
                    )
                upright = ImageOps.exif_transpose(picture)
                upright.load()
        except UnidentifiedImageError:
            raise Fail(f"{shown} is not a picture in a known format.") from None
        except Image.DecompressionBombError as error:
            raise Fail(f"{shown} is too large: {error}") from None
        # Decoding happens in memory, so whatever goes wrong in it is the file's fault.
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:
            raise Fail(f"{shown} is broken: {error}") from None
        return _for_webp(upright)

    def write(self, name: str, content: bytes) -> str:
        """Writes a thumbnail, whole or not at all, and gives its path below the assets."""
        path = f"{self._name}/{name}"
        target = f"{self._root}/{path}"
        if self._local:
            self._stay_inside(posixpath.dirname(target))
            self._files.makedirs(posixpath.dirname(target), exist_ok=True)
            partial = Path(f"{target}.{os.getpid()}.{os.urandom(4).hex()}.partial")
            try:
                with partial.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        else:
            # An object store shows an object once its upload is complete.
            self._files.pipe_file(target, content)
        return path

    def _source(self) -> str:
        folder, version = posixpath.split(f"{self._root}/{self._name}")
        try:
            names = self._files.ls(folder, detail=False)
        except FileNotFoundError:
            names = []
        sources = sorted(
            path
            for path in names
            if posixpath.basename(path).startswith(f"{version}.")
            and not path.endswith(".partial")
            and self._files.isfile(path)
        )
        if not sources:
            raise Fail(f"There is no picture {self._name}.* in the assets.")
        if len(sources) > 1:
            found = ", ".join(posixpath.basename(path) for path in sources[:5])
            raise Fail(f"There is more than one picture {self._name}.*: {found}.")
        if self._local:
            self._stay_inside(sources[0])
        return str(sources[0])

    def _stay_inside(self, path: str) -> None:
        """A symbolic link may stand in the assets; it may not lead out of them."""
        real, root = os.path.realpath(path), os.path.realpath(self._root)
        if os.path.commonpath([real, root]) != root:
            raise Fail(f"{self._name} leads out of the assets.")


def _for_webp(picture: Image.Image) -> Image.Image:
    """The picture as RGB, or RGBA where it has transparency; 16 bits a channel become 8."""
    if picture.mode.startswith("I"):
        # Pillow clips where it should scale: 65,535 is white.
        picture = picture.convert("F").point(lambda level: level / 257).convert("L")
    transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    return picture.convert("RGBA" if transparent else "RGB")
