"""Documents that clients name instead of sending them: by their hash, or by their id in a manifest.

A request names a document in one of three ways:

- `extensions.persistedQuery`, with `version` 1 and `sha256Hash`, as in Apollo's protocol of
  automatic persisted queries (https://www.apollographql.com/docs/apollo-server/performance/apq).
- `documentId`, as in the appendix of GraphQL over HTTP.
- `doc_id`, as in Relay's documentation.

The hash may have `sha256:` in front, as GraphQL Code Generator writes it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from graphql import GraphQLError

from job_registry.errors import shortened
from job_registry_api.graphql.request_errors import BAD_REQUEST, coded

MAX_KEPT_BYTES: Final = 8_000_000
"""The most memory that the texts of automatic persisted queries take. The oldest are dropped."""

MAX_MANIFEST_BYTES: Final = 33_554_432
MAX_ID_LENGTH: Final = 255

_SHA256: Final = "sha256:"
_MEMBERS: Final = ("documentId", "doc_id")


class ManifestInvalid(ValueError):
    """Raised when a file is not a manifest of documents, with a sentence for the operator."""


class Named(NamedTuple):
    """The document of a request: its text, and the hash to keep it under, if any."""

    text: str
    keep_as: str | None = None


class PersistedDocuments:
    """The documents that requests may name.

    If `automatic`, a client registers a document by sending the text with its hash, and names the
    hash from then on. With `trusted`, documents by their ids, only those are executed.
    """

    def __init__(self, *, automatic: bool = True, trusted: Mapping[str, str] | None = None) -> None:
        self._automatic = automatic
        self._trusted = trusted
        self._trusted_texts = frozenset((trusted or {}).values())
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0

    def find(self, request: Mapping[str, Any]) -> Named:
        """Return the document of a request: the members `query`, `extensions` and so on.

        Raises:
            GraphQLError: the document that the request names is not there, its hash is not that of
                its text, or it is not trusted.
        """
        text = request.get("query") or None
        name, is_hash = _name_of(request)
        if self._trusted is not None:
            return Named(self._trusted_text(text, name))
        if name is not None and not self._automatic:
            raise coded("PERSISTED_QUERY_NOT_SUPPORTED", "PersistedQueryNotSupported")
        if text is None:
            assert name is not None  # `request_faults` has refused a request with neither.
            return Named(self._kept_text(name))
        if name is None or not is_hash:
            return Named(text)
        if hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() != name:
            message = "The sha256Hash of persistedQuery is not the SHA-256 of the query."
            raise coded("persisted_query_mismatch", message)
        return Named(text, keep_as=None if name in self._kept else name)

    def keep(self, named: Named) -> None:
        """Keep a document that has been found valid, so that requests may name it."""
        if named.keep_as is None or named.keep_as in self._kept:
            return
        self._kept[named.keep_as] = named.text
        self._bytes += _size_of(named.text)
        while self._bytes > MAX_KEPT_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= _size_of(dropped)

    def _kept_text(self, name: str) -> str:
        kept = self._kept.get(name)
        if kept is None:
            raise _not_found()
        self._kept.move_to_end(name)
        return kept

    def _trusted_text(self, text: str | None, name: str | None) -> str:
        assert self._trusted is not None
        if text is not None and text in self._trusted_texts:
            return text
        if text is None and name is not None:
            found = self._trusted.get(name)
            if found is None:
                raise _not_found()
            return found
        raise coded(
            "document_not_trusted",
            "This server executes only the documents of its manifest. Send the id of one.",
        )


def names_document(request: Mapping[str, Any]) -> bool:
    extensions = request.get("extensions")
    return any(request.get(member) is not None for member in _MEMBERS) or (
        isinstance(extensions, dict) and extensions.get("persistedQuery") is not None
    )


def read_manifest(path: Path) -> dict[str, str]:
    """Return the documents of a manifest by their ids, which for SHA-256 are without `sha256:`.

    A manifest is a JSON object of ids and documents, as GraphQL Code Generator
    (`persistedDocuments`) and Relay (`persistConfig`) write it, or Apollo's, with `format` and
    `operations`.

    Raises:
        ManifestInvalid: the file cannot be read, or it is not a manifest.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestInvalid(f"the file has more than {MAX_MANIFEST_BYTES:,} bytes")
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ManifestInvalid(f"the file cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ManifestInvalid("the file is not JSON") from None
    if isinstance(content, dict) and content.get("format") == "apollo-persisted-query-manifest":
        operations = content.get("operations")
        listed = [
            (operation.get("id"), operation.get("body"))
            for operation in (operations if isinstance(operations, list) else ())
            if isinstance(operation, dict)
        ]
        if any(not isinstance(name, str) for name, _ in listed):
            raise ManifestInvalid("an operation of the manifest has no text as an id")
        content = dict(listed)
    if not isinstance(content, dict) or not content:
        raise ManifestInvalid("expected a JSON object of ids and GraphQL documents")
    for name, text in content.items():
        if not isinstance(text, str) or not text.strip():
            raise ManifestInvalid(
                f"expected a GraphQL document for each id; {shortened(name)} has {shortened(text)}"
            )
    return {name.removeprefix(_SHA256): text for name, text in content.items()}


def _name_of(request: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the name of a request's document, None for none, and whether it is a hash.

    Raises:
        GraphQLError: it is not a name.
    """
    extensions = request.get("extensions") or {}
    persisted = extensions.get("persistedQuery")
    if persisted is not None:
        if not isinstance(persisted, dict) or persisted.get("version") != 1:
            raise coded(BAD_REQUEST, "persistedQuery has to be an object with version 1.")
        name = persisted.get("sha256Hash")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_LENGTH:
            raise coded(BAD_REQUEST, "The sha256Hash of persistedQuery has to be a string.")
        return name.removeprefix(_SHA256), True
    for member in _MEMBERS:
        name = request.get(member)
        if name is None:
            continue
        if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_LENGTH:
            message = f"{member} has to be a string of 1 to {MAX_ID_LENGTH} characters."
            raise coded(BAD_REQUEST, message)
        return name.removeprefix(_SHA256), False
    return None, False


def _not_found() -> GraphQLError:
    """Return the error after which a client sends the text too. Clients look for these words."""
    return coded("PERSISTED_QUERY_NOT_FOUND", "PersistedQueryNotFound")


def _size_of(text: str) -> int:
    return sys.getsizeof(text) + 200
