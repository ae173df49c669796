"""Presigned requests, with which a client writes a file to a bucket itself.

Each is made by the client of S3, Google Cloud Storage or Azure that the file system uses. It is
imported only for such a file system.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple


class PresignedPut(NamedTuple):
    """A PUT request that writes one file: its URL, and the headers that it must have."""

    url: str
    headers: Mapping[str, str]


class CannotPresign(Exception):
    """Raised when the credentials of the bucket cannot sign."""


def presign(files: Any, path: str, size: int, seconds: int) -> PresignedPut | None:
    """Return a request that writes a file of this size to a path, and is valid for so many seconds.

    Return None if the file system has none.

    Raises:
        CannotPresign: the credentials cannot sign.
    """
    for protocol, presign_with in (("s3", _s3), ("gs", _google), ("az", _azure)):
        if protocol in files.protocol:
            return presign_with(files, path, size, seconds)
    return None


def _s3(files: Any, path: str, size: int, seconds: int) -> PresignedPut:
    if files.anon:
        raise CannotPresign("Anonymous access to S3 cannot sign. Configure credentials.")
    # In some regions the default is version 2 of signatures, which does not include the size.
    config = {**files.config_kwargs, "signature_version": "s3v4"}
    options = {**files.storage_options, "config_kwargs": config}
    url = type(files)(**options).sign(path, seconds, client_method="put_object", ContentLength=size)
    return PresignedPut(url, {})


def _google(files: Any, path: str, size: int, seconds: int) -> PresignedPut:
    from google.auth.credentials import Signing

    if not isinstance(files.credentials.credentials, Signing):
        raise CannotPresign(
            "The credentials of Google Cloud cannot sign. Use the key of a service account, or"
            " impersonate one."
        )
    headers = {
        "x-goog-content-length-range": f"{size},{size}",
        "x-goog-if-generation-match": "0",  # Only if it does not exist.
    }
    url = files.sign(path, seconds, version="v4", method="PUT", headers=dict(headers))
    return PresignedPut(url, headers)


def _azure(files: Any, path: str, size: int, seconds: int) -> PresignedPut:
    """Return the request. A signature of Azure cannot bound the size."""
    from azure.storage.blob import BlobSasPermissions, generate_blob_sas

    service = files.service_client
    key = getattr(service.credential, "account_key", None)
    if key is None:
        raise CannotPresign(
            "The credentials of Azure cannot sign. Use the key of the storage account."
        )
    container, _, name = path.partition("/")
    signature = generate_blob_sas(
        service.credential.account_name,
        container,
        name,
        account_key=key,
        permission=BlobSasPermissions(create=True),  # It cannot replace, read or delete.
        expiry=datetime.now(UTC) + timedelta(seconds=seconds),
    )
    url = service.get_blob_client(container, name).url
    return PresignedPut(f"{url}?{signature}", {"x-ms-blob-type": "BlockBlob"})
