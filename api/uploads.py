"""Uploads of pictures for `thumbnail.create`: `POST /assets/{assetId}/{versionNumber}`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, Final, TypeVar

import structlog
from pydantic import JsonValue, TypeAdapter, ValidationError

from job_registry import CodedError, Fail
from job_registry.catalog.thumbnail import AssetId, VersionNumber
from job_registry_api.http_messages import BodyTooLarge

FORMATS: Final[Mapping[str, tuple[str, tuple[bytes, ...]]]] = {
    "image/jpeg": ("jpg", (b"\xff\xd8\xff",)),
    "image/png": ("png", (b"\x89PNG\r\n\x1a\n",)),
    "image/webp": ("webp", (b"RIFF",)),
    "image/gif": ("gif", (b"GIF87a", b"GIF89a")),
}
"""The accepted Content-Types: the extension of the file, and how its content begins."""

STORAGE_SECONDS: Final = 60.0
"""How long one step of the storage may take, such as to send a picture to a bucket."""

STORAGE_THREADS: Final = 8
"""How many steps of the storage run at once, in threads of their own: if it hangs, only they do."""

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
        extension, signatures = FORMATS[media_type]
        try:
            asset = _ASSET_ID.validate_python(asset_id, strict=True)
            version = _VERSION.validate_strings(version_number, strict=True)
        except ValidationError:
            raise AssetInvalid(
                "Expected /assets/{assetId}/{versionNumber}, such as /assets/cat/1: an assetId of"
                " letters, digits, _, - and ., which does not start with a ., and a whole number"
                " from 1."
            ) from None
        # Imported here, so that the start of a server does not load it.
        from job_registry.asset_files import AssetFiles

        try:
            files = AssetFiles(self.assets, asset, version)
            incoming = await self._in_thread(files.begin, files.discard)
            try:
                size = await self._receive(incoming.file, content, signatures, media_type)
            except BaseException:
                await self._in_thread(partial(files.discard, incoming))
                raise
            kept = await self._in_thread(partial(files.keep, incoming, extension))
        except Fail as refused:
            raise AssetInvalid(str(refused)) from None
        except OSError as error:
            log.warning("upload.failed", reason=str(error))
            raise AssetsUnavailable from None
        if not kept:
            raise AssetExists(asset, version)
        log.info("asset.uploaded", asset_id=asset, version_number=version, bytes=size)
        return Uploaded(asset, version, size)

    async def _receive(
        self,
        file: BinaryIO,
        content: AsyncIterator[bytes],
        signatures: tuple[bytes, ...],
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
                if len(start) >= _START and not start.startswith(signatures):
                    break
            await self._in_thread(partial(file.write, chunk))
        if not start.startswith(signatures):
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
        return running.result()


_START: Final = 8
"""How many bytes the longest signature has."""
