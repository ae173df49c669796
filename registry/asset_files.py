"""The files of a version of an asset: a picture in, thumbnails out, in a folder or a bucket."""

from __future__ import annotations

import contextlib
import os
import posixpath
import random
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import fsspec

from job_registry import Fail
from job_registry.errors import shortened
from job_registry.presigning import PresignedPut, presign

MAX_FILE_BYTES: Final = 33_554_432
"""The largest picture file in bytes, because the file is read into memory: twice the size of a
photo of 50 million pixels."""

ABANDONED_SECONDS: Final = 3_600.0
"""The age after which a partly written file counts as abandoned: nothing writes for so long."""

MOST_TRIES: Final = 10
"""How often a picture is stored again that gave way to another one, which gave way too."""

PAUSE_SECONDS: Final = 0.1
"""The longest pause before that. It is random, so that one of several is first."""

UPLOADS: Final = ".uploads"
"""The folder in a bucket for what clients write with presigned URLs. No asset has this id."""


class Incoming(NamedTuple):
    """A file that is being received, its path, and whether that is beside the picture's."""

    file: BinaryIO
    path: Path
    is_beside: bool


class AssetFiles:
    """`{assetId}/{versionNumber}.*` below the assets, and `{assetId}/{versionNumber}/` beside it.

    `assets` is a folder or an fsspec URL, such as `s3://bucket/assets`.
    """

    def __init__(self, assets: str, asset_id: str, version_number: int) -> None:
        self._files, root = fsspec.core.url_to_fs(assets)
        self._root = root.rstrip("/")
        self._name = f"{asset_id}/{version_number}"
        self._local = isinstance(self._files, fsspec.get_filesystem_class("file"))

    def read(self) -> tuple[bytes, str]:
        """Return the content of the picture, and its name for error messages.

        Raises:
            Fail: it is missing, there are several, or it is too large. Another attempt would not
                help.
            OSError: the storage failed. Another attempt may succeed.
        """
        path = self._source()
        shown = _shown(f"{self._name}{posixpath.splitext(path)[1]}")
        size = self._files.size(path)  # None if the storage does not know it.
        if size is None or size <= MAX_FILE_BYTES:
            with self._files.open(path, "rb") as file:
                content: bytes = file.read(MAX_FILE_BYTES + 1 if size is None else size)
            if len(content) <= MAX_FILE_BYTES:
                return content, shown
        has = "" if size is None else f"it has {size:,} bytes, and "
        raise Fail(f"{shown} is too large: {has}the limit is {MAX_FILE_BYTES:,} bytes.")

    def write(self, name: str, content: bytes) -> str:
        """Write a thumbnail, whole or not at all, and return its path below the assets."""
        path = f"{self._name}/{name}"
        target = f"{self._root}/{path}"
        if self._local:
            file, partial = self._begin_partial(target)
            try:
                with file:
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

    def begin(self) -> Incoming:
        """Open a file for a picture that is being received. `keep` or `discard` ends it."""
        if self._local:
            return Incoming(*self._begin_partial(f"{self._root}/{self._name}"), True)
        return _temporary()

    def _begin_partial(self, target: str) -> tuple[BinaryIO, Path]:
        """Create a file beside `target`, to be moved there once it is whole, and return its path.

        Only the owner may read it, whatever the umask, because pictures may be private.
        """
        folder = Path(target).parent
        self._stay_inside(str(folder))
        _make_private_folder(folder)
        _remove_abandoned(folder)
        partial = Path(f"{target}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        private = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        return os.fdopen(private, "w+b"), partial

    def presign(self, upload_id: str, size: int, seconds: int) -> PresignedPut | None:
        """Return a request with which a client can write a file of this size to the bucket.

        The file is not the picture yet: see `receive`. Return None if the storage has no requests
        that write.

        Raises:
            CannotPresign: the credentials of the bucket cannot sign.
        """
        return presign(self._files, self._uploaded(upload_id), size, seconds)

    def uploaded_size(self, upload_id: str) -> int | None:
        """Return how many bytes a client wrote with a presigned URL. None: there is no file."""
        try:
            return int(self._files.info(self._uploaded(upload_id), refresh=True)["size"])
        except FileNotFoundError:
            return None

    def receive(self, upload_id: str) -> Incoming:
        """Copy a file that a client wrote with a presigned URL. `keep` or `discard` ends the copy.

        Whatever the client writes to the URL from now on does not change the copy.
        """
        incoming = _temporary()
        try:
            self._files.get_file(self._uploaded(upload_id), str(incoming.path))
        except BaseException:
            self.discard(incoming)
            raise
        return incoming

    def remove_uploaded(self, upload_id: str) -> None:
        """Remove a file that a client wrote with a presigned URL."""
        self._files.rm_file(self._uploaded(upload_id))

    def _uploaded(self, upload_id: str) -> str:
        return f"{self._root}/{UPLOADS}/{self._name}/{upload_id}"

    def discard(self, incoming: Incoming) -> None:
        """Close and remove a file that was received."""
        with contextlib.suppress(OSError):  # What is still to be written may not fit on the disk.
            incoming.file.close()
        incoming.path.unlink(missing_ok=True)

    def keep(self, incoming: Incoming, extension: str) -> bool:
        """Make a received file the picture of this version. Return False if it has another one.

        Return True for the same content again: a client that got no answer may send it again. The
        received file is removed in any case.

        Raises:
            OSError: the storage failed. Nothing is kept.
        """
        try:
            for _ in range(MOST_TRIES):
                if self._keep(incoming, extension):
                    return True
                if self._sources():
                    return False
                # Uploads of several formats at once have found and removed one another's.
                time.sleep(random.uniform(0, PAUSE_SECONDS))
            raise OSError(f"several uploads of {self._name} at once prevented one another")
        finally:
            self.discard(incoming)

    def _keep(self, incoming: Incoming, extension: str) -> bool:
        target = f"{self._root}/{self._name}.{extension}"
        incoming.file.flush()
        if sources := self._sources():
            return sources == [target] and self._is_same(incoming.file, target)
        if not incoming.is_beside:
            # An object store shows an object once its upload is complete. To write it through an
            # open file would complete it on an error too: closing sends what is there.
            try:
                self._files.put_file(str(incoming.path), target, mode="create")
            except FileExistsError:
                return self._is_same(incoming.file, target)
            return self._is_only(target)
        os.fsync(incoming.file.fileno())
        try:
            # Unlike a rename, a link replaces nothing that another upload has kept meanwhile.
            os.link(incoming.path, target)
        except FileExistsError:
            return self._is_same(incoming.file, target)
        return self._is_only(target)

    def _is_only(self, target: str) -> bool:
        """Return whether the version has no other picture than this one. If it has, remove this.

        Another upload may have kept a picture of another format at the same time.
        """
        if set(self._sources()) <= {target}:
            return True
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(target)
        return False

    def _is_same(self, file: BinaryIO, path: str) -> bool:
        """Return whether a file has the same content. It has not if it was removed meanwhile: by an
        upload that found another one."""
        file.seek(0)
        with contextlib.suppress(FileNotFoundError), self._files.open(path, "rb") as other:
            while True:
                piece = file.read(1 << 20)
                if piece != other.read(len(piece) or 1):
                    return False
                if not piece:
                    return True
        return False

    def _sources(self) -> list[str]:
        """Return the files that are the picture of this version."""
        folder, version = posixpath.split(f"{self._root}/{self._name}")
        # Another process may have stored a picture. Not every file system knows `refresh`.
        self._files.invalidate_cache(folder)
        try:
            names = self._files.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return sorted(
            str(path)
            for path in names
            if posixpath.basename(path).startswith(f"{version}.")
            and not path.endswith(".partial")
            and self._files.isfile(path)
        )

    def _source(self) -> str:
        sources = self._sources()
        if not sources:
            raise Fail(f"There is no picture {self._name}.* in the assets.")
        if len(sources) > 1:
            found = ", ".join(_shown(posixpath.basename(path)) for path in sources[:5])
            raise Fail(f"There is more than one picture {self._name}.*: {found}.")
        if self._local:
            self._stay_inside(sources[0])
        return sources[0]

    def _stay_inside(self, path: str) -> None:
        """Check that a path is inside the assets. Symbolic links may not point outside.

        Raises:
            Fail: it is outside.
        """
        real, root = os.path.realpath(path), os.path.realpath(self._root)
        if os.path.commonpath([real, root]) != root:
            raise Fail(f"{self._name} is a link to a place outside the assets.")


def _temporary() -> Incoming:
    file, path = tempfile.mkstemp()
    return Incoming(os.fdopen(file, "w+b"), Path(path), False)


def _remove_abandoned(folder: Path) -> None:
    """Remove the files of processes that were killed while they wrote."""
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(OSError):
            if partial.lstat().st_mtime < time.time() - ABANDONED_SECONDS:
                partial.unlink()


def _shown(name: str) -> str:
    """Return a name in a form that is safe in a sentence: it may come from anyone."""
    return shortened(name, 100).strip('"')


def _make_private_folder(folder: Path) -> None:
    """Create a folder, and those above it that are missing, for their owner only."""
    if not folder.is_dir():
        _make_private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
