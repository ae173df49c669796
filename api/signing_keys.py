"""The keys that tokens are checked with: a shared secret, or a JSON Web Key Set (RFC 7517)."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import h11
import jwt
import structlog

from job_registry import CodedError
from job_registry.errors import shortened
from job_registry_api.fetching import fetch

log = structlog.get_logger("job_registry.auth")

MIN_RSA_BITS: Final = 2_048
"""NIST SP 800-131A, and RFC 7518, section 3.3."""

REFRESH_SECONDS: Final = 150.0
"""How often a set at a URL is fetched: a key that was removed is refused after this time."""

RETRY_SECONDS: Final = 5.0
"""The pause between fetches after one that failed."""

UNKNOWN_ID_SECONDS: Final = 30.0
"""The pause between fetches for key ids that the set lacks: anyone can invent ids."""

KEEP_SECONDS: Final = 3_600.0
"""How long the keys of the last good fetch are used while fetches fail."""

FETCH_SECONDS: Final = 5.0
MAX_SET_BYTES: Final = 262_144


class KeysInvalid(Exception):
    """Raised when a JSON Web Key Set cannot be used."""


class AuthenticationUnavailable(CodedError):
    """Raised when the keys to check a token cannot be fetched."""

    code = "authentication_unavailable"

    def __init__(self) -> None:
        super().__init__("The keys to check the token cannot be fetched; try again.")


class Key(NamedTuple):
    """A key, and the only algorithm it is used with. The token does not choose it (RFC 8725)."""

    id: object
    algorithm: str
    material: Any


class Keys(Protocol):
    """The keys at one moment. When they change, there is another object."""

    def find(self, key_id: object) -> Key | None:
        """Return the key with this id; without an id, the only key."""


class KeySource(Protocol):
    """Where keys come from."""

    async def current(self) -> Keys:
        """Return the keys. Waits only if none are known.

        Raises:
            AuthenticationUnavailable: the keys cannot be fetched.
        """

    async def newest(self) -> Keys:
        """Return the keys for a token whose key id the current ones lack. May wait for a fetch.

        Raises:
            AuthenticationUnavailable: newer keys could not be fetched.
        """


@dataclass(frozen=True, slots=True, eq=False)
class SharedSecret:
    """HS256 with a secret that is shared with the issuer of the tokens."""

    secret: bytes

    def find(self, key_id: object) -> Key:
        """Return the secret. Its id does not matter."""
        return Key(None, "HS256", self.secret)


@dataclass(frozen=True, slots=True, eq=False)
class KeySet:
    """The public keys of a JSON Web Key Set."""

    keys: tuple[Key, ...]

    def find(self, key_id: object) -> Key | None:
        """Return the key with this id; without an id, the only key."""
        found = [key for key in self.keys if key_id is None or key.id == key_id]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class FixedKeys:
    """Keys that do not change while the process runs: a secret, or a key set in a file."""

    keys: Keys

    async def current(self) -> Keys:
        return self.keys

    async def newest(self) -> Keys:
        return self.keys


class KeyUrl:
    """A key set at a URL, fetched every 150 seconds from its first use on.

    Known keys are used without waiting for a fetch. Only a token whose key id is unknown waits:
    for the fetch that runs, or for a new one, at most every 30 seconds. While fetches fail, the
    keys of the last good one are used for an hour.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._tls = ssl.create_default_context() if url.startswith("https://") else None
        self._body = b""
        self._keys: KeySet | None = None
        self._good_at = self._begun_at = -math.inf
        self._failed = False
        self._fetching: asyncio.Task[None] | None = None
        self._next: asyncio.TimerHandle | None = None

    async def current(self) -> Keys:
        """Return the keys of the last good fetch. Waits only if there are none."""
        if self._usable is None:
            await self._wait_for_fetch(pause=RETRY_SECONDS)
        if self._usable is None:
            raise AuthenticationUnavailable
        return self._usable

    async def newest(self) -> Keys:
        """Return the keys of a fetch of the last 30 seconds."""
        await self._wait_for_fetch(pause=UNKNOWN_ID_SECONDS)
        if self._failed or self._usable is None:
            raise AuthenticationUnavailable
        return self._usable

    @property
    def _usable(self) -> KeySet | None:
        return self._keys if time.monotonic() - self._good_at < KEEP_SECONDS else None

    async def _wait_for_fetch(self, *, pause: float) -> None:
        """Wait for the running fetch, or for a new one if the last began `pause` seconds ago."""
        if self._fetching is None and time.monotonic() - self._begun_at < pause:
            return
        # A request that is cancelled leaves the fetch to the others who wait for it.
        await asyncio.shield(self._begin())

    def _begin(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._begun_at = time.monotonic()
            self._fetching = asyncio.create_task(self._fetch(), name="signing keys")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            body = await _document(self._url, self._tls)
            if body != self._body or self._keys is None:
                keys = KeySet(tuple(await asyncio.to_thread(lambda: [*_usable_keys(body)])))
                self._keys, self._body = keys, body
            self._good_at, self._failed = time.monotonic(), False
        except (OSError, ValueError, KeysInvalid, h11.ProtocolError) as error:
            self._failed = True
            log.warning("keys.unavailable", reason=str(error)[:200] or type(error).__name__)
        finally:
            self._fetching = None
            if self._next is not None:
                self._next.cancel()
            pause = RETRY_SECONDS if self._failed else REFRESH_SECONDS
            self._next = asyncio.get_running_loop().call_later(pause, self._begin)


def read_keys(source: str) -> KeySource:
    """Return the keys at a URL or in a file.

    Raises:
        KeysInvalid: the file cannot be read, or has no usable key, or an RSA key that is too short.
    """
    if source.startswith(("http://", "https://")):
        return KeyUrl(source)
    try:
        body = Path(source).read_bytes()
    except OSError as error:
        raise KeysInvalid(f"the file cannot be read: {error.strerror}") from None
    keys = KeySet(tuple(_usable_keys(body, refuse_short=True)))
    if not keys.keys:
        raise KeysInvalid("it has no RSA, P-256 or Ed25519 key for signatures")
    return FixedKeys(keys)


def _usable_keys(body: bytes, *, refuse_short: bool = False) -> Iterator[Key]:
    """Yield the keys of a set that check signatures. Others are ignored (RFC 7517, section 5).

    Raises:
        KeysInvalid: the text is not a key set, or, with `refuse_short`, an RSA key is too short.
    """
    try:
        entries = json.loads(body)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise KeysInvalid("it is not a JSON Web Key Set")
    for entry in entries:
        try:
            key = jwt.PyJWK.from_dict(entry)
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError, KeyError):
            continue
        except NotImplementedError:  # A key for the algorithm "none".
            continue
        name = key.algorithm_name if key.public_key_use in (None, "sig") else None
        # Symmetric keys in a public set are ignored.
        if name not in ("RS256", "ES256", "EdDSA"):
            continue
        if name == "RS256" and key.key.key_size < MIN_RSA_BITS:
            named = f"the RSA key {shortened(key.key_id)} has {key.key.key_size:,} bits"
            if refuse_short:
                raise KeysInvalid(f"{named}; expected {MIN_RSA_BITS:,} or more")
            log.warning("keys.too_short", key=str(key.key_id)[:100], bits=key.key.key_size)
            continue
        # Some sets have private keys, which PyJWT cannot check a signature of RSA with.
        is_private = hasattr(key.key, "public_key")
        yield Key(key.key_id, name, key.key.public_key() if is_private else key.key)


async def _document(url: str, tls: ssl.SSLContext | None) -> bytes:
    """Return what a URL serves, within bounds of time and size. Redirects are not followed.

    Raises:
        OSError: the server cannot be reached, or takes too long.
        h11.ProtocolError: the answer is not HTTP.
        ValueError: the answer has another status than 200, or is too large.
    """
    answer = await fetch(url, tls, seconds=FETCH_SECONDS, max_bytes=MAX_SET_BYTES)
    if answer.status != 200:
        raise ValueError(f"expected the HTTP status 200; got {answer.status}")
    return answer.body
