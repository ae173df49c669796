"""Uploads of pictures for `thumbnail.create`: `POST /assets/{assetId}/{versionNumber}`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

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

_ASSET_ID: Final[TypeAdapter[str]] = TypeAdapter(AssetId)
_VERSION: Final[TypeAdapter[int]] = TypeAdapter(VersionNumber)

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
    """Raised when the storage of the assets fails. The reason is in the log."""

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

    async def store(
        self, asset_id: str, version_number: str, media_type: str, content: AsyncIterator[bytes]
    ) -> Uploaded:
        """Store a picture, whole or not at all.

        Raises:
            AssetInvalid: the place or the content is not valid.
            AssetExists: the version has another picture.
            BodyTooLarge: the content is too large. The rest of it is not read.
            AssetsUnavailable: the storage failed.
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
            # In threads, because a disk or a bucket may be slow.
            incoming = await asyncio.to_thread(files.begin)
            try:
                size = await self._receive(incoming.file, content, signatures, media_type)
                kept = await asyncio.to_thread(files.keep, incoming, extension)
            finally:
                await asyncio.to_thread(files.discard, incoming)
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
            await asyncio.to_thread(file.write, chunk)
        if not start.startswith(signatures):
            raise AssetInvalid(f"The content is not of the type {media_type}.")
        return size


_START: Final = 8
"""How many bytes the longest signature has."""
