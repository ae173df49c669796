"""Authentication, scopes and rate limits.

JWT bearer tokens (RFC 7519, RFC 6750), their access scopes, and rates of requests. HTTP, REST and
WebSockets all use `Authenticator`, which returns the `Caller` of a request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Literal, Protocol, get_args
from urllib.parse import urlsplit

import jwt
import structlog
from limits import RateLimitItem
from limits import parse as parse_rate
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from pydantic import JsonValue
from starlette.types import Scope

from job_registry import CodedError, text_fault
from job_registry.errors import shortened
from job_registry_api.http_messages import header
from job_registry_api.settings import Settings, SettingsInvalid

log = structlog.get_logger("job_registry.auth")

AccessScope = Literal["jobs:enqueue", "jobs:read", "jobs:work", "jobs:admin"]
ACCESS_SCOPES: Final[tuple[AccessScope, ...]] = get_args(AccessScope)
ADMIN: Final = "jobs:admin"
"""The scope that includes the others."""

JOB_TYPES_CLAIM: Final = "jobs:types"
MAX_KNOWN_TOKENS: Final = 1_000
MAX_TOKEN_LENGTH: Final = 8_192


class Unauthenticated(CodedError):
    """Raised when a request has no token, or one that is not valid.

    `challenge` is the value of the WWW-Authenticate header (RFC 6750, section 3).
    """

    code = "unauthenticated"

    def __init__(self, reason: str | None) -> None:
        self.challenge = 'Bearer realm="jobs"'
        if reason is not None:
            self.challenge += f', error="invalid_token", error_description="{reason}"'
        super().__init__(reason or "A bearer token is needed: Authorization: Bearer <token>.")


class Forbidden(CodedError):
    """Raised when a token does not allow a request. The message names the scope that does."""

    code = "forbidden"


class TooManyRequests(CodedError):
    """Raised when a caller exceeds a rate limit. `retry_after` is in whole seconds, at least 1."""

    code = "rate_limited"

    def __init__(self, limit: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"At most {limit} are allowed; try again in {retry_after} s.")

    def details(self) -> dict[str, JsonValue]:
        """Return when to try again."""
        return {"retryAfterSeconds": self.retry_after}


class AuthenticationUnavailable(CodedError):
    """Raised when the keys to check a token cannot be fetched."""

    code = "authentication_unavailable"

    def __init__(self) -> None:
        super().__init__("The keys to check the token cannot be fetched; try again.")


STATUSES: Final[Mapping[type[CodedError], int]] = {
    Unauthenticated: 401,
    Forbidden: 403,
    TooManyRequests: 429,
    AuthenticationUnavailable: 503,
}
"""The HTTP status of each error of `Authenticator`."""

REFUSALS: Final = tuple(STATUSES)


def headers_of(error: Exception) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers of the HTTP response to an error of `Authenticator`."""
    match error:
        case Unauthenticated():
            return ((b"www-authenticate", error.challenge.encode()),)
        case TooManyRequests():
            return ((b"retry-after", str(error.retry_after).encode()),)
        case AuthenticationUnavailable():
            return ((b"retry-after", b"5"),)
    return ()


class KeysInvalid(Exception):
    """Raised when a JSON Web Key Set has no usable key."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request, and what it may do.

    `subject` becomes `createdBy`. `job_types` are the job types that the caller is limited to; None
    means all. `expires_at` is when the token expires, in seconds of Unix time.
    """

    subject: str | None
    access_scopes: frozenset[str]
    job_types: frozenset[str] | None = None
    expires_at: float | None = None

    def need(self, *access_scopes: AccessScope) -> None:
        """Check that the caller has one of these access scopes.

        Raises:
            Forbidden: the caller has none of them.
        """
        if not self.has(*access_scopes):
            raise Forbidden(f"This needs the scope {' or '.join(access_scopes)}.")

    def has(self, *access_scopes: AccessScope) -> bool:
        """Return whether the caller has one of these access scopes."""
        return not self.access_scopes.isdisjoint(access_scopes) or ADMIN in self.access_scopes

    def need_types(self, job_types: Iterable[str]) -> None:
        """Check that the caller may use each of these job types.

        Raises:
            Forbidden: the token is limited to other types.
        """
        for job_type in job_types:
            if not self.may_see(job_type):
                raise Forbidden(f"This token does not allow jobs of type {shortened(job_type)}.")

    def may_see(self, job_type: str) -> bool:
        """Return whether the caller may see jobs of this type."""
        return self.job_types is None or job_type in self.job_types


ANYONE: Final = Caller(subject=None, access_scopes=frozenset(ACCESS_SCOPES))
"""The caller of every request without authentication, when only this machine is served."""


class Keys(Protocol):
    """A source of keys to check tokens."""

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """Return the key and its algorithm for a token with this header.

        Raises:
            Unauthenticated: no known key fits.
            AuthenticationUnavailable: the keys cannot be fetched.
        """


class SharedSecret:
    """HS256 with a secret that is shared with the issuer of the tokens."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """Return the secret and HS256. The token does not choose the algorithm (RFC 8725, 3.1)."""
        return self._secret, "HS256"


class KeyFile:
    """The public keys of a JSON Web Key Set (RFC 7517) in a file, read once.

    Raises:
        KeysInvalid: the text is not a key set, or has no usable key.
    """

    def __init__(self, text: str) -> None:
        try:
            keys = jwt.PyJWKSet.from_dict(json.loads(text)).keys
        except (ValueError, AttributeError, TypeError, jwt.PyJWTError) as error:
            raise KeysInvalid(f"it is not a JSON Web Key Set: {shortened(str(error))}") from None
        self._keys = [key for key in keys if _algorithm(key) is not None]
        if not self._keys:
            raise KeysInvalid("it has no RSA, P-256 or Ed25519 key for signatures")

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """Return the key that the token names; without a name, the only key."""
        return _chosen(self._keys, header.get("kid"))


class KeyUrl:
    """The public keys of a JSON Web Key Set at a URL, cached for five minutes.

    An unknown key id fetches the set again, at most every 30 seconds: the issuer may have new keys,
    and a stranger may invent ids. During an outage the fetch is repeated every 5 seconds.
    """

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, timeout=5)
        self._one_at_a_time = asyncio.Lock()
        self._try_at = 0.0

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """Return the key that the token names; without a name, the only key."""
        key_id = header.get("kid")
        async with self._one_at_a_time:
            if time.monotonic() < self._try_at:
                raise AuthenticationUnavailable
            try:
                # In a thread, because the client blocks.
                if isinstance(key_id, str):
                    keys = [await asyncio.to_thread(self._client.get_signing_key, key_id)]
                else:
                    keys = (await asyncio.to_thread(self._client.get_jwk_set)).keys
            except (jwt.PyJWKClientConnectionError, ValueError) as error:
                self._try_at = time.monotonic() + 5
                log.warning("keys.unavailable", reason=str(error)[:200])
                raise AuthenticationUnavailable from None
            except (jwt.PyJWTError, TypeError):
                raise Unauthenticated("The token is signed with an unknown key.") from None
        return _chosen(keys, key_id)


class TokenVerifier:
    """Verifies bearer tokens.

    `issuer` and `audience` are the required `iss` and `aud`. `leeway_seconds` is how far clocks may
    differ.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        issuer: str,
        audience: str,
        leeway_seconds: float,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway_seconds
        self._known: OrderedDict[str, Caller] = OrderedDict()

    async def verify(self, authorization: str) -> Caller:
        """Return the caller of an Authorization header; "" is a missing header.

        Raises:
            Unauthenticated: the token is missing or not valid.
            AuthenticationUnavailable: the token cannot be checked now.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated(None)
        if len(token) > MAX_TOKEN_LENGTH:
            raise Unauthenticated("The token is too long.")
        known = self._known.get(token)
        if known is not None and known.expires_at is not None and time.time() < known.expires_at:
            self._known.move_to_end(token)
            return known
        caller = await self._checked(token)
        # Cached, because checking an elliptic curve signature takes longer than storing a job.
        self._known[token] = caller
        if len(self._known) > MAX_KNOWN_TOKENS:
            self._known.popitem(last=False)
        return caller

    async def _checked(self, token: str) -> Caller:
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError):
            raise Unauthenticated("The token is not a JSON Web Token.") from None
        key, algorithm = await self._keys.find(header)
        try:
            # The algorithm comes from the key, never from the token. This refuses `none`, and an
            # HMAC made with a public key (RFC 8725, sections 2.1 and 3.1).
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=self._issuer,
                audience=self._audience,
                leeway=self._leeway,
                options={"require": ["exp", "sub", "iss", "aud"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            raise Unauthenticated(_reason(error)) from None
        subject = claims["sub"]
        if not 1 <= len(subject) <= 255 or text_fault(subject):
            raise Unauthenticated("The claim sub is not 1 to 255 characters of text.")
        return Caller(
            subject=subject,
            access_scopes=_access_scopes(claims),
            job_types=_job_types(claims),
            expires_at=float(claims["exp"]) + self._leeway,
        )


class Authenticator:
    """Authenticates every request, then counts it for the rate limits.

    `rate_limits` bound the requests per subject, or per address without a subject. Pages of
    `origins` may send requests. A request is an ASGI connection scope.
    """

    def __init__(
        self,
        verifier: TokenVerifier | None,
        rate_limits: Sequence[RateLimitItem] = (),
        origins: Sequence[str] = (),
    ) -> None:
        self._verifier = verifier
        self._rate_limits = rate_limits
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage()) if rate_limits else None
        self._hosts = frozenset(urlsplit(origin).hostname for origin in origins)

    async def authenticate(self, request: Scope, authorization: str | None = None) -> Caller:
        """Return the caller of a request, and count it.

        `authorization` replaces the header of the request.

        Raises:
            Unauthenticated: the token is missing or not valid. The request counts for its address.
            AuthenticationUnavailable: the token cannot be checked now.
            Forbidden: without authentication, the request may come from a page of another site.
            TooManyRequests: the request exceeds a rate limit.
        """
        if authorization is None:
            authorization = header(request, b"authorization").decode("latin-1")
        try:
            caller = await self._caller(request, authorization)
        except Unauthenticated:
            self._count(request, None)
            raise
        self._count(request, caller)
        return caller

    def check_again(self, request: Scope, caller: Caller) -> None:
        """Count a further request on a connection whose caller is known.

        Raises:
            Unauthenticated: the caller's token has expired.
            TooManyRequests: the request exceeds a rate limit.
        """
        if caller.expires_at is not None and time.time() >= caller.expires_at:
            raise Unauthenticated("The token has expired.")
        self._count(request, caller)

    async def _caller(self, request: Scope, authorization: str) -> Caller:
        if self._verifier is not None:
            return await self._verifier.verify(authorization)
        # DNS rebinding: a page whose host name resolves to this machine is same-origin with this
        # server for a browser. Names that anyone can register contain a dot.
        host = _host(header(request, b"host").decode("latin-1"))
        if "." in host and host not in self._hosts and not _is_address(host):
            raise Forbidden(
                "Without authentication, expected a host that is this machine, such as localhost;"
                f" got {host[:100]}. If it is yours, add its origin to JOBS_CORS_ORIGINS."
            )
        return ANYONE

    def _count(self, request: Scope, caller: Caller | None) -> None:
        if self._limiter is None:
            return
        subject = caller.subject if caller else None
        client = request.get("client")  # This may be a proxy.
        who = ("address", client[0] if client else "") if subject is None else ("subject", subject)
        for limit in self._rate_limits:
            if not self._limiter.hit(limit, *who):
                reset, _ = self._limiter.get_window_stats(limit, *who)
                raise TooManyRequests(_rate(limit), max(1, round(reset - time.time())))


def create_authenticator(settings: Settings) -> Authenticator:
    """Create the authenticator that the settings describe.

    Raises:
        SettingsInvalid: the keys for the tokens cannot be used.
    """
    return Authenticator(
        _token_verifier(settings),
        [parse_rate(rate) for rate in settings.rate_limit],
        settings.cors_origins,
    )


def read_keys(source: str) -> Keys:
    """Return the keys of a JWKS URL or file.

    Raises:
        KeysInvalid: the file cannot be read, or has no usable key.
    """
    if source.startswith(("http://", "https://")):
        return KeyUrl(source)
    try:
        return KeyFile(Path(source).read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise KeysInvalid(f"the file cannot be read: {reason}") from None


def _token_verifier(settings: Settings) -> TokenVerifier | None:
    keys: Keys
    if settings.auth_hs256_secret is not None:
        keys = SharedSecret(settings.auth_hs256_secret)
    elif settings.auth_jwks is not None:
        try:
            keys = read_keys(settings.auth_jwks)
        except KeysInvalid as invalid:
            fault = f"JOBS_AUTH_JWKS: got {shortened(settings.auth_jwks, 202)}; {invalid}"
            raise SettingsInvalid([fault]) from None
    else:
        return None
    assert settings.auth_issuer is not None
    assert settings.auth_audience is not None
    return TokenVerifier(
        keys,
        issuer=settings.auth_issuer,
        audience=settings.auth_audience,
        leeway_seconds=settings.auth_leeway_seconds,
    )


def _host(header: str) -> str:
    """Return the host of a Host header without its port; a malformed header as it is."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return header


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _algorithm(key: jwt.PyJWK) -> str | None:
    """Return the algorithm of a public key; None for keys that are not used for tokens.

    Symmetric keys in a public set are ignored.
    """
    name = key.algorithm_name if key.public_key_use in (None, "sig") else None
    return name if name in ("RS256", "ES256", "EdDSA") else None


def _chosen(keys: Sequence[jwt.PyJWK], key_id: object) -> tuple[Any, str]:
    usable = [(key, name) for key in keys if (name := _algorithm(key)) is not None]
    if key_id is not None:
        usable = [(key, name) for key, name in usable if key.key_id == key_id]
    if len(usable) != 1:
        raise Unauthenticated("The token is signed with an unknown key.")
    key, name = usable[0]
    return key.key, name


def _reason(error: Exception) -> str:
    """Describe why a token is not valid. PyJWT's own messages may quote the token."""
    match error:
        case jwt.ExpiredSignatureError():
            return "The token has expired."
        case jwt.ImmatureSignatureError():
            return "The token is not valid yet."
        case jwt.InvalidAudienceError():
            return "The token is for another audience."
        case jwt.InvalidIssuerError():
            return "The token is from another issuer."
        case jwt.InvalidAlgorithmError():
            return "The token is signed with another algorithm than its key's."
        case jwt.MissingRequiredClaimError():
            return f"The token lacks the claim {error.claim}."
        case jwt.InvalidSignatureError():
            return "The token's signature is wrong."
    return "The token is not valid."


def _access_scopes(claims: Mapping[str, Any]) -> frozenset[str]:
    """Return the scopes of `scope` (RFC 8693, a string) or `scp` (a list, from some issuers)."""
    given = claims.get("scope", claims.get("scp", ""))
    names = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    return frozenset(name for name in names if name in ACCESS_SCOPES)


def _job_types(claims: Mapping[str, Any]) -> frozenset[str] | None:
    given = claims.get(JOB_TYPES_CLAIM)
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        # Refuse the token: ignoring the claim would remove a limit.
        raise Unauthenticated(f"The claim {JOB_TYPES_CLAIM} is not a list of names.")
    return frozenset(given)


def _rate(limit: RateLimitItem) -> str:
    unit = limit.GRANULARITY.name
    every = f"per {unit}" if limit.multiples == 1 else f"per {limit.multiples} {unit}s"
    return f"{limit.amount} requests {every}"
