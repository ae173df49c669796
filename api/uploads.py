"""Uploads of pictures for `thumbnail.create`: `POST /assets/{assetId}/{versionNumber}`.

A client sends the picture to the server, or to the bucket with a presigned URL. In both cases the
server checks it, and it becomes the picture of its version whole or not at all.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

import structlog
from pydantic import JsonValue, TypeAdapter

from job_registry import CodedError, Fail
from job_registry.catalog.thumbnail import AssetId, VersionNumber
from job_registry.presigning import CannotPresign, PresignedPut
from job_registry_api.http_messages import BodyTooLarge

if TYPE_CHECKING:
    from job_registry.asset_files import AssetFiles

FORMATS: Final[Mapping[str, tuple[str, re.Pattern[bytes]]]] = {
    "image/jpeg": ("jpg", re.compile(rb"\xff\xd8\xff")),
    "image/png": ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    "image/webp": ("webp", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    "image/gif": ("gif", re.compile(rb"GIF8[79]a")),
}
"""The accepted Content-Types: the extension of the file, and how its content begins."""

STORAGE_SECONDS: Final = 60.0
"""How long one step of the storage may take, such as to send a picture to a bucket."""

STORAGE_THREADS: Final = 8
"""How many steps of the storage run at once, in threads of their own: if it hangs, only they do."""

PRESIGNED_SECONDS: Final = 900
"""How long a presigned URL is valid."""

_UPLOAD_ID: Final = re.compile("[0-9a-f]{32}")

_NUMBER: Final = re.compile("[1-9][0-9]{0,9}")

_ASSET_ID: Final[TypeAdapter[str]] = TypeAdapter(AssetId)
_VERSION: Final[TypeAdapter[int]] = TypeAdapter(VersionNumber)

T = TypeVar("T")

log = structlog.get_logger("job_registry.uploads")


class AssetInvalid(CodedError):
    """Raised when the content does not match its Content-Type, or its place is not valid."""

    code = "asset_invalid"


class AssetExists(CodedError):
    """Raised when this version of the asset has another picture. Versions never change."""

    code = "asset_exists"

    def __init__(self, asset_id: str, version_number: int) -> None:
        self.place: dict[str, JsonValue] = {"assetId": asset_id, "versionNumber": version_number}
        super().__init__(
            f"Version {version_number} of the asset {asset_id} has another picture."
            " Upload this one as a new version."
        )

    def details(self) -> dict[str, JsonValue]:
        """Return the place of the picture."""
        return self.place


class UploadNotFound(CodedError):
    """Raised when nothing was written to a presigned URL, or what was written was finished."""

    code = "upload_not_found"

    def __init__(self) -> None:
        super().__init__(
            "Nothing was written to the URL of this uploadId, or it was finished before."
        )


class PresignedUrlsMissing(CodedError):
    """Raised when there are no presigned URLs: for a folder, or if the credentials cannot sign."""

    code = "presigned_urls_missing"

    def __init__(self, asset_id: str, version_number: int) -> None:
        super().__init__(
            "This server has no presigned URLs for its assets. Send the picture to"
            f" POST /assets/{asset_id}/{version_number} instead."
        )


class AssetsUnavailable(CodedError):
    """Raised when the storage of the assets fails or takes too long. The log has the reason."""

    code = "assets_unavailable"

    def __init__(self) -> None:
        super().__init__("The storage of the assets is not available. Send the request again.")


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A picture that is stored: its place, and its size in bytes."""

    asset_id: str
    version_number: int
    size: int


@dataclass(frozen=True, slots=True)
class Presigned:
    """A request to write a picture with, the id to finish with, and until when it is valid."""

    upload_id: str
    put: PresignedPut
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Uploads:
    """Where pictures are stored, a folder or an fsspec URL, and how large one may be."""

    assets: str
    max_bytes: int
    storage_seconds: float = STORAGE_SECONDS
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(STORAGE_THREADS, "uploads"), init=False
    )

    async def store(
        self, asset_id: str, version_number: str, media_type: str, content: AsyncIterator[bytes]
    ) -> Uploaded:
        """Store a picture, whole or not at all.

        Raises:
            AssetInvalid: the place or the content is not valid.
            AssetExists: the version has another picture.
            BodyTooLarge: the content is too large. The rest of it is not read.
            AssetsUnavailable: the storage failed, or took too long.
        """
        place = _place_of(asset_id, version_number)
        extension, signature = FORMATS[media_type]
        with _faults_of_storage():
            files = await self._files_of(place)
            incoming = await self._in_thread(files.begin, files.discard)
            try:
                size = await self._receive(incoming.file, content, signature, media_type)
            except BaseException:
                await self._in_thread(partial(files.discard, incoming))
                raise
            kept = await self._in_thread(partial(files.keep, incoming, extension))
        return _stored(place, size, kept)

    async def presign(self, asset_id: str, version_number: str, size: int) -> Presigned:
        """Return a request with which a client writes a picture of this size to the bucket itself.

        `finish` stores it.

        Raises:
            AssetInvalid: the place is not valid.
            BodyTooLarge: the picture is too large.
            PresignedUrlsMissing: the storage has none, or its credentials cannot sign.
            AssetsUnavailable: the storage failed, or took too long.
        """
        place = _place_of(asset_id, version_number)
        if size > self.max_bytes:
            raise BodyTooLarge(self.max_bytes)
        upload_id = secrets.token_hex(16)
        expires_at = datetime.now(UTC) + timedelta(seconds=PRESIGNED_SECONDS)
        with _faults_of_storage():
            files = await self._files_of(place)
            try:
                put = await self._in_thread(
                    partial(files.presign, upload_id, size, PRESIGNED_SECONDS)
                )
            except CannotPresign as error:
                log.warning("upload.cannot_presign", reason=str(error))
                put = None
        if put is None:
            raise PresignedUrlsMissing(*place)
        return Presigned(upload_id, put, expires_at)

    async def finish(self, asset_id: str, version_number: str, upload_id: str) -> Uploaded:
        """Store a picture that a client has written with a presigned URL, as `store` does.

        What the client wrote is removed, unless the storage fails.

        Raises:
            AssetInvalid: the place or the content is not valid.
            UploadNotFound: nothing was written, or it was finished before.
            AssetExists: the version has another picture.
            BodyTooLarge: the picture is too large.
            AssetsUnavailable: the storage failed, or took too long. It may be called again.
        """
        place = _place_of(asset_id, version_number)
        if not _UPLOAD_ID.fullmatch(upload_id):
            raise UploadNotFound
        with _faults_of_storage():
            files = await self._files_of(place)
            size, kept = await self._in_thread(partial(_finish, files, upload_id, self.max_bytes))
        return _stored(place, size, kept)

    async def _files_of(self, place: tuple[str, int]) -> AssetFiles:
        # A bucket's client takes seconds to import, and may look for credentials on the network.
        return await self._in_thread(partial(_files_of, self.assets, place))

    async def _receive(
        self,
        file: BinaryIO,
        content: AsyncIterator[bytes],
        signature: re.Pattern[bytes],
        media_type: str,
    ) -> int:
        """Write the content into a file, and return its size."""
        size, start = 0, b""
        async for chunk in content:
            size += len(chunk)
            if size > self.max_bytes:
                raise BodyTooLarge(self.max_bytes)
            if len(start) < _START:
                start += chunk[:_START]
                if len(start) >= _START and not signature.match(start):
                    break
            await self._in_thread(partial(file.write, chunk))
        if not signature.match(start):
            raise AssetInvalid(f"The content is not of the type {media_type}.")
        return size

    async def _in_thread(
        self, step: Callable[[], T], undo: Callable[[T], object] = lambda _: None
    ) -> T:
        """Run a step of the storage in a thread.

        One for which nobody waits any more goes on, and then `undo` is called with its result.

        Raises:
            OSError: it failed or took too long.
        """
        running = asyncio.get_running_loop().run_in_executor(self._threads, step)
        try:
            await asyncio.wait([running], timeout=self.storage_seconds)
            if not running.done():
                raise TimeoutError(f"It took longer than {self.storage_seconds:g} seconds.")
        except BaseException:
            running.add_done_callback(lambda late: late.exception() or undo(late.result()))
            raise
        try:
            return running.result()
        except (CannotPresign, CodedError, Fail, OSError):
            raise
        except Exception as error:  # The client of a bucket has errors of its own.
            raise OSError(f"{type(error).__name__}: {error}") from error


def _files_of(assets: str, place: tuple[str, int]) -> AssetFiles:
    # Imported here, so that the start of a server does not load it.
    from job_registry.asset_files import AssetFiles

    return AssetFiles(assets, *place)


def _place_of(asset_id: str, version_number: str) -> tuple[str, int]:
    try:
        # One version has one path: Python reads 1, 01, +1 and others as the same number.
        if not _NUMBER.fullmatch(version_number):
            raise ValueError
        return (
            _ASSET_ID.validate_python(asset_id, strict=True),
            _VERSION.validate_python(int(version_number), strict=True),
        )
    except ValueError:
        raise AssetInvalid(
            "Expected /assets/{assetId}/{versionNumber}, such as /assets/cat/1: an assetId of"
            " letters, digits, _, - and ., which does not start with a ., and a whole number"
            " from 1."
        ) from None


@contextmanager
def _faults_of_storage() -> Iterator[None]:
    try:
        yield
    except Fail as refused:
        raise AssetInvalid(str(refused)) from None
    except OSError as error:
        log.warning("upload.failed", reason=str(error))
        raise AssetsUnavailable from None


def _finish(files: AssetFiles, upload_id: str, max_bytes: int) -> tuple[int, bool]:
    """Keep a picture that a client has written with a presigned URL.

    Return its size, and whether it was kept: see `AssetFiles.keep`.
    """
    size = files.uploaded_size(upload_id)
    if size is None:
        raise UploadNotFound
    try:
        if size > max_bytes:
            raise BodyTooLarge(max_bytes)
        try:
            incoming = files.receive(upload_id)
        except FileNotFoundError:
            raise UploadNotFound from None  # Another request has finished it meanwhile.
        try:
            size = incoming.path.stat().st_size
            if size > max_bytes:  # It was replaced meanwhile.
                raise BodyTooLarge(max_bytes)
            kept = files.keep(incoming, _extension_of(incoming.file.read(_START)))
        finally:
            files.discard(incoming)
    except OSError:
        raise  # It can be finished once the storage works again.
    except BaseException:
        _remove(files, upload_id)
        raise
    _remove(files, upload_id)
    return size, kept


def _remove(files: AssetFiles, upload_id: str) -> None:
    try:
        files.remove_uploaded(upload_id)
    except Exception as error:
        log.warning("upload.not_removed", reason=str(error))


def _extension_of(start: bytes) -> str:
    for extension, signature in FORMATS.values():
        if signature.match(start):
            return extension
    raise AssetInvalid(f"The content is not of one of the types {', '.join(FORMATS)}.")


def _stored(place: tuple[str, int], size: int, kept: bool) -> Uploaded:
    if not kept:
        raise AssetExists(*place)
    asset_id, version_number = place
    log.info("asset.uploaded", asset_id=asset_id, version_number=version_number, bytes=size)
    return Uploaded(asset_id, version_number, size)


_START: Final = 12
"""How many bytes the longest signature has."""
