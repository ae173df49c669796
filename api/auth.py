"""Who calls, what they may do, and how often.

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
from starlette.types import Scope

from job_registry import text_fault
from job_registry.errors import shortened
from job_registry_api.http_messages import header
from job_registry_api.settings import Settings, SettingsInvalid

log = structlog.get_logger("jobs.auth")

AccessScope = Literal["jobs:enqueue", "jobs:read", "jobs:work", "jobs:admin"]
ACCESS_SCOPES: Final[tuple[AccessScope, ...]] = get_args(AccessScope)
ADMIN: Final = "jobs:admin"
"""Implies the others."""

JOB_TYPES_CLAIM: Final = "jobs:types"
MAX_KNOWN_TOKENS: Final = 1_000
MAX_TOKEN_LENGTH: Final = 8_192


class Unauthenticated(Exception):
    """Raised when the caller is not known: there is no token, or it is not valid.

    `challenge` is the value of the WWW-Authenticate header (RFC 6750, section 3).
    """

    def __init__(self, reason: str | None) -> None:
        self.challenge = 'Bearer realm="jobs"'
        if reason is not None:
            self.challenge += f', error="invalid_token", error_description="{reason}"'
        super().__init__(reason or "A bearer token is needed: Authorization: Bearer <token>.")


class Forbidden(Exception):
    """Raised when a caller's token does not allow the request; says what would."""


class TooManyRequests(Exception):
    """Raised when a caller exceeds its rate; `retry_after` is in whole seconds, at least 1."""

    def __init__(self, limit: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"At most {limit} are taken; try again in {retry_after} s.")


class AuthenticationUnavailable(Exception):
    """Raised when the keys to check a token with cannot be fetched."""

    def __init__(self) -> None:
        super().__init__("The keys that tokens are checked with cannot be fetched; try again.")


class KeysInvalid(Exception):
    """Raised when a JSON Web Key Set holds no key that tokens could be checked with."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what they may do.

    `subject` becomes `createdBy`. `job_types` are those the caller is limited to; None is no
    limit. `expires_at` is when that ends, in seconds of Unix time.
    """

    subject: str | None
    access_scopes: frozenset[str]
    job_types: frozenset[str] | None = None
    expires_at: float | None = None

    def need(self, *access_scopes: AccessScope) -> None:
        """Return when the caller has one of these access scopes.

        Raises:
            Forbidden: it has none of them.
        """
        if ADMIN not in self.access_scopes and self.access_scopes.isdisjoint(access_scopes):
            raise Forbidden(f"This needs the scope {' or '.join(access_scopes)}.")

    def need_types(self, job_types: Iterable[str]) -> None:
        """Return when the caller may name each of these job types.

        Raises:
            Forbidden: its token is limited to others.
        """
        for job_type in job_types:
            if not self.may_see(job_type):
                raise Forbidden(f"This token is not for jobs of type {shortened(job_type)}.")

    def may_see(self, job_type: str) -> bool:
        """Whether jobs of this type exist for the caller."""
        return self.job_types is None or job_type in self.job_types


ANYONE: Final = Caller(subject=None, access_scopes=frozenset(ACCESS_SCOPES))
"""The caller where no authentication is configured, and only this machine is served."""


class Keys(Protocol):
    """Where the key that a token is checked with comes from."""

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """The key and its algorithm for a token with this header.

        Raises:
            Unauthenticated: no key is known that could have signed it.
            AuthenticationUnavailable: the keys cannot be fetched.
        """


class SharedSecret:
    """HS256 with a secret that the issuer of the tokens has as well."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """The secret, whatever the header says: the algorithm is ours to say (RFC 8725, 3.1)."""
        return self._secret, "HS256"


class KeyFile:
    """Public keys of a JSON Web Key Set (RFC 7517) in a file, read once.

    Raises:
        KeysInvalid: the text is not a key set, or holds no usable key.
    """

    def __init__(self, text: str) -> None:
        try:
            keys = jwt.PyJWKSet.from_dict(json.loads(text)).keys
        except (ValueError, AttributeError, TypeError, jwt.PyJWTError) as error:
            raise KeysInvalid(f"it is not a JSON Web Key Set: {shortened(str(error))}") from None
        self._keys = [key for key in keys if _algorithm(key) is not None]
        if not self._keys:
            raise KeysInvalid("it holds no RSA, P-256 or Ed25519 key for signatures")

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """The key that the token names; the only one, where it names none."""
        return _chosen(self._keys, header.get("kid"))


class KeyUrl:
    """Public keys of a JSON Web Key Set behind a URL, kept for five minutes.

    An unknown key id fetches them anew, at most every 30 seconds: an issuer may have new keys, and
    a stranger may invent ids. While they cannot be fetched it is tried every 5 seconds.
    """

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, timeout=5)
        self._one_at_a_time = asyncio.Lock()
        self._try_at = 0.0

    async def find(self, header: Mapping[str, Any]) -> tuple[Any, str]:
        """The key that the token names; the only one, where it names none."""
        key_id = header.get("kid")
        async with self._one_at_a_time:
            if time.monotonic() < self._try_at:
                raise AuthenticationUnavailable
            try:
                # It waits for the network.
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

    `issuer` and `audience` are what `iss` and `aud` have to be; `leeway_seconds` is how far clocks
    may differ.
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
        """Return the caller of an Authorization header, "" where there is none.

        Raises:
            Unauthenticated: there is no token, or it is not valid.
            AuthenticationUnavailable: it cannot be checked now.
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
        # A signature is checked once: an elliptic one takes longer than storing a job's row.
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
            # The algorithm is the key's, never the token's: `none`, and an HMAC made with a
            # public key, are refused here (RFC 8725, sections 2.1 and 3.1).
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
    """Authenticates every request, where that is configured, and counts it for the rate limits.

    `rate_limits` bound the requests of each subject, and of each address that has none. `origins`
    are those whose pages may call. A request is an ASGI connection scope.
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

        `authorization` is used instead of the request's own header.

        Raises:
            Unauthenticated: there is no valid token. The request counts for its address.
            AuthenticationUnavailable: the token cannot be checked now.
            Forbidden: there is no authentication, and a page of another site may be calling.
            TooManyRequests: it is one too many.
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
            TooManyRequests: it is one too many.
        """
        if caller.expires_at is not None and time.time() >= caller.expires_at:
            raise Unauthenticated("The token has expired.")
        self._count(request, caller)

    async def _caller(self, request: Scope, authorization: str) -> Caller:
        if self._verifier is not None:
            return await self._verifier.verify(authorization)
        # A page whose name resolves to this machine's address is, for a browser, of the same site
        # as this server (DNS rebinding). Names that anyone can register have a dot.
        host = _host(header(request, b"host").decode("latin-1"))
        if "." in host and host not in self._hosts and not _is_address(host):
            raise Forbidden(
                f"Without authentication only this machine is served, and not as {host[:100]!r}."
                " List its origin in JOBS_CORS_ORIGINS if that is you."
            )
        return ANYONE

    def _count(self, request: Scope, caller: Caller | None) -> None:
        if self._limiter is None:
            return
        subject = caller.subject if caller else None
        client = request.get("client")  # It may be a proxy.
        who = ("address", client[0] if client else "") if subject is None else ("subject", subject)
        for limit in self._rate_limits:
            if not self._limiter.hit(limit, *who):
                reset, _ = self._limiter.get_window_stats(limit, *who)
                raise TooManyRequests(_rate(limit), max(1, round(reset - time.time())))


def create_authenticator(settings: Settings) -> Authenticator:
    """Create the authenticator that the settings describe.

    Raises:
        SettingsInvalid: the keys that tokens are checked with cannot be used.
    """
    return Authenticator(
        _token_verifier(settings),
        [parse_rate(rate) for rate in settings.rate_limit],
        settings.cors_origins,
    )


def read_keys(source: str) -> Keys:
    """The keys of a JWKS URL or file.

    Raises:
        KeysInvalid: the file cannot be read, or holds no usable key.
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
            fault = f"JOBS_AUTH_JWKS: got {settings.auth_jwks!r}; {invalid}"
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
    """The host of a Host header without its port; all of it where it is malformed."""
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
    """The one algorithm that a public key signs with here; None for keys that are not for us.

    Symmetric keys have no place among public ones.
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
    """Why a token is not valid, as a sentence for its bearer. PyJWT's own may quote the token."""
    match error:
        case jwt.ExpiredSignatureError():
            return "The token has expired."
        case jwt.ImmatureSignatureError():
            return "The token is not valid yet."
        case jwt.InvalidAudienceError():
            return "The token is for another audience."
        case jwt.InvalidIssuerError():
            return "The token is of another issuer."
        case jwt.InvalidAlgorithmError():
            return "The token is signed with another algorithm than its key's."
        case jwt.MissingRequiredClaimError():
            return f"The token lacks the claim {error.claim}."
        case jwt.InvalidSignatureError():
            return "The token's signature is wrong."
    return "The token is not valid."


def _access_scopes(claims: Mapping[str, Any]) -> frozenset[str]:
    """Return those of `scope` (RFC 8693, a string) or `scp` (a list, as some issuers write it)."""
    given = claims.get("scope", claims.get("scp", ""))
    names = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    return frozenset(name for name in names if name in ACCESS_SCOPES)


def _job_types(claims: Mapping[str, Any]) -> frozenset[str] | None:
    given = claims.get(JOB_TYPES_CLAIM)
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        # A limit that cannot be read is no reason to have none.
        raise Unauthenticated(f"The claim {JOB_TYPES_CLAIM} is not a list of names.")
    return frozenset(given)


def _rate(limit: RateLimitItem) -> str:
    unit = limit.GRANULARITY.name
    every = f"a {unit}" if limit.multiples == 1 else f"in {limit.multiples} {unit}s"
    return f"{limit.amount} requests {every}"
