"""Authentication, scopes and rate limits.

JWT bearer tokens (RFC 7519, RFC 6750), their access scopes, and rates of requests. HTTP, REST and
WebSockets all use `Authenticator`, which returns the `Caller` of a request.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, IPv6Network, ip_address
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

import jwt
from pydantic import JsonValue
from starlette.types import Scope

from job_registry import CodedError, JobRegistry
from job_registry.errors import shortened
from job_registry.job_type import is_type_name
from job_registry.json_values import text_fault
from job_registry_api.http_messages import cached_if_short, header
from job_registry_api.queue.enqueueing import OthersJobs
from job_registry_api.queue.models import Owner
from job_registry_api.rates import Exceeded, Rates
from job_registry_api.settings import Settings, SettingsInvalid
from job_registry_api.signing_keys import (
    AuthenticationUnavailable,
    FixedKeys,
    Keys,
    KeysInvalid,
    KeySource,
    SharedSecret,
    read_keys,
)

if TYPE_CHECKING:
    from limits import RateLimitItem

AccessScope = Literal["jobs:enqueue", "jobs:own", "jobs:read", "jobs:work", "jobs:admin"]
ACCESS_SCOPES: Final[tuple[AccessScope, ...]] = get_args(AccessScope)
ADMIN: Final = "jobs:admin"
"""The scope that includes the others."""

JOB_TYPES_CLAIM: Final = "jobs:types"
MAX_JOB_TYPES: Final = 100
"""The most names in the claim. A page of jobs reads no more types than that."""

MAX_TOKEN_LENGTH: Final = 8_192

KNOWN_SECONDS: Final = 300.0
"""How long a token is not checked again, unless its keys change or it expires."""

MAX_KNOWN_TOKENS: Final = 1_000
MAX_KNOWN_LENGTH: Final = 1_000_000
"""The bounds of the cache of tokens: their number, and their length together."""

LATEST_TIME: Final = 253_402_300_799
"""The end of the year 9999."""


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

    def as_reader(self) -> Caller:
        """Return only what the answers to queries depend on.

        Callers whose readers are equal get the same answers. Whose jobs they are makes no
        difference to a caller that may read all of them.
        """
        subject = None if self.has("jobs:read") else self.subject
        return replace(self, subject=subject, expires_at=None)

    def need_types(self, job_types: Iterable[str]) -> None:
        """Check that the caller may use each of these job types.

        Raises:
            Forbidden: the token is limited to other types.
        """
        for job_type in job_types:
            if not self.may_see(job_type):
                raise Forbidden(f"This token does not allow jobs of type {shortened(job_type)}.")

    def types_to_list(
        self, wanted: Sequence[str] | None, registry: JobRegistry
    ) -> tuple[str, ...] | None:
        """Return the types to list jobs of, if these are wanted. None means all.

        Raises:
            Forbidden: the token is limited to other types.
        """
        if wanted is not None:
            self.need_types(wanted)
            return tuple(wanted)
        if self.job_types is None:
            return None
        return tuple(sorted({registry.current_name(name) for name in self.job_types}))

    @property
    def others_jobs(self) -> OthersJobs:
        """What the caller learns of the job of another that has its idempotency key."""
        if self.has("jobs:read", "jobs:work"):
            return "described"
        return "hidden" if self.has("jobs:own") else "returned"

    def owner_unless(self, *access_scopes: AccessScope) -> Owner | None:
        """Return the restriction to the caller's own jobs; None with one of these scopes."""
        return None if self.has(*access_scopes) else Owner(self.subject)

    def owns(self, created_by: str | None) -> bool:
        """Return whether the caller may see a job of this creator because it is its own."""
        return self.has("jobs:own") and created_by is not None and created_by == self.subject

    def may_see(self, job_type: str) -> bool:
        """Return whether the caller may see jobs of this type."""
        return self.job_types is None or job_type in self.job_types


ANYONE: Final = Caller(subject=None, access_scopes=frozenset(ACCESS_SCOPES))
"""The caller of every request without authentication, when only this machine is served."""


class _Known(NamedTuple):
    """A token that was valid, by the keys that it was checked with."""

    caller: Caller
    keys: Keys
    length: int
    checked_at: float


class TokenVerifier:
    """Verifies bearer tokens.

    `issuer` and `audience` are the required `iss` and `aud`. `leeway_seconds` is how far clocks may
    differ.
    """

    def __init__(
        self,
        keys: KeySource,
        *,
        issuer: str,
        audience: str,
        leeway_seconds: float,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway_seconds
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._known_length = 0

    def knows(self, authorization: str) -> bool:
        """Return whether a token has been verified before, and is still remembered."""
        token = authorization.partition(" ")[2].strip()
        return len(token) <= MAX_TOKEN_LENGTH and _digest(token) in self._known

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
        if not token.isascii():
            raise Unauthenticated("The token is not a JSON Web Token.")
        keys = await self._keys.current()
        digest = _digest(token)
        known = self._known.get(digest)
        if known is not None and _is_in_force(known, keys):
            self._known.move_to_end(digest)
            return known.caller
        caller, keys = await self._checked(token, keys)
        # Cached, because checking an elliptic curve signature takes longer than storing a job.
        self._remember(digest, _Known(caller, keys, len(token), time.monotonic()))
        return caller

    def _remember(self, digest: bytes, known: _Known) -> None:
        if (replaced := self._known.pop(digest, None)) is not None:
            self._known_length -= replaced.length
        self._known[digest] = known
        self._known_length += known.length
        while len(self._known) > MAX_KNOWN_TOKENS or self._known_length > MAX_KNOWN_LENGTH:
            _, oldest = self._known.popitem(last=False)
            self._known_length -= oldest.length

    async def _checked(self, token: str, keys: Keys) -> tuple[Caller, Keys]:
        """Return the caller of a token, and the keys that it was checked with."""
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise Unauthenticated("The token is not a JSON Web Token.") from None
        key_id = header.get("kid")
        key = keys.find(key_id)
        if key is None and key_id is not None:
            keys = await self._keys.newest()
            key = keys.find(key_id)
        if key is None:
            raise Unauthenticated("The token is signed with an unknown key.")
        try:
            # The algorithm comes from the key, never from the token. This refuses `none`, and an
            # HMAC made with a public key (RFC 8725, sections 2.1 and 3.1). The times are checked
            # below: PyJWT takes "60" and 1e300 for a time.
            claims = jwt.decode(
                token,
                key.material,
                algorithms=[key.algorithm],
                issuer=self._issuer,
                audience=self._audience,
                options={
                    "require": ["exp", "sub", "iss", "aud"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Unauthenticated(_reason(error)) from None
        subject = claims["sub"]
        if not 1 <= len(subject) <= 255 or text_fault(subject):
            raise Unauthenticated("The claim sub is not 1 to 255 characters of text.")
        caller = Caller(
            subject=subject,
            access_scopes=_access_scopes(claims),
            job_types=_job_types(claims),
            expires_at=self._expiry(claims),
        )
        return caller, keys

    def _expiry(self, claims: Mapping[str, Any]) -> float:
        """Return when a token expires, after checking its times."""
        for name in ("exp", "nbf", "iat"):
            if name in claims and not _is_time(claims[name]):
                raise Unauthenticated(f"The claim {name} is not a time in seconds since 1970.")
        now = time.time()
        expires_at = float(claims["exp"]) + self._leeway
        if expires_at <= now:
            raise Unauthenticated("The token has expired.")
        if max(claims.get("nbf", 0), claims.get("iat", 0)) > now + self._leeway:
            raise Unauthenticated("The token is not valid yet.")
        return expires_at


class Authenticator:
    """Authenticates every request, and counts it for the rate limits.

    A token for a type that was renamed is for the type by each of its names.

    `rate_limits` bound the requests per subject, or per address without a subject. Once an address
    has used up its limit by requests without a valid token, tokens that are not known yet are not
    even verified. Pages of `origins` may send requests. A request is an ASGI connection scope.
    """

    def __init__(
        self,
        verifier: TokenVerifier | None,
        rate_limits: Sequence[RateLimitItem] = (),
        origins: Sequence[str] = (),
        renamed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._verifier = verifier
        self._renamed = renamed
        self._rates = Rates(rate_limits)
        self._hosts = frozenset(urlsplit(origin).hostname for origin in origins)

    async def authenticate(self, request: Scope, authorization: str | None = None) -> Caller:
        """Return the caller of a request, and count it.

        `authorization` replaces the header of the request.

        Raises:
            Unauthenticated: the token is missing or not valid. The request counts for its address.
            AuthenticationUnavailable: the token cannot be checked now. It counts as well.
            Forbidden: without authentication, the request comes from another machine, or may come
                from a page of another site.
            TooManyRequests: the request exceeds a rate limit.
        """
        if self._verifier is None:
            self._count(_address(request))
            _check_is_local(request)
            self._check_host(request)
            return ANYONE
        authorization = _authorization(request, authorization)
        if not self._verifier.knows(authorization):
            self.check_stranger(request)
        try:
            caller = await self._verifier.verify(authorization)
        except (Unauthenticated, AuthenticationUnavailable):
            self._count(_address(request))
            raise
        self._count(_name_of(caller, request))
        return self._with_current_names(caller)

    async def authenticate_again(self, request: Scope, authorization: str | None = None) -> None:
        """Authenticate a further request on a connection that has been admitted, and count it.

        Raises:
            Unauthenticated: the token has expired, or its key has been removed.
            AuthenticationUnavailable: the token cannot be checked now.
            TooManyRequests: the request exceeds a rate limit.
        """
        self._count(_name_of(await self.verify_again(request, authorization), request))

    async def verify_again(self, request: Scope, authorization: str | None = None) -> Caller:
        """Return the caller of a request that has been admitted, if its token is still valid.

        Raises:
            Unauthenticated: the token has expired, or its key has been removed.
            AuthenticationUnavailable: the token cannot be checked now.
        """
        if self._verifier is None:
            return ANYONE
        caller = await self._verifier.verify(_authorization(request, authorization))
        return self._with_current_names(caller)

    def _with_current_names(self, caller: Caller) -> Caller:
        """Return the caller, whose job types have all the names that each has and had."""
        if caller.job_types is None or not self._renamed:
            return caller
        current = {self._renamed.get(name, name) for name in caller.job_types}
        former = {older for older, name in self._renamed.items() if name in current}
        return replace(caller, job_types=frozenset(current | former))

    def check_stranger(self, request: Scope) -> None:
        """Check that the address of a request may still send one, and count nothing.

        Raises:
            TooManyRequests: its requests without a valid token have used up a rate limit.
        """
        _refuse_if(self._rates.exceeded(_address(request)))

    def count_stranger(self, request: Scope) -> None:
        """Count a request that has ended before its caller was known."""
        self._rates.count(_address(request))

    def _check_host(self, request: Scope) -> None:
        # DNS rebinding: a page whose host name resolves to this machine is same-origin with this
        # server for a browser. No name leads to a page of an address, and every machine itself
        # resolves localhost (RFC 6761, section 6.3). Every browser sends the header.
        given = header(request, b"host").decode("latin-1")
        host = _host(given)
        if given and not (host == "localhost" or host in self._hosts or _is_address(host)):
            raise Forbidden(
                "Without authentication, expected a host that is this machine, such as localhost;"
                f" got {shortened(host)}. If it is yours, add its origin to JOBS_CORS_ORIGINS."
            )

    def _count(self, name: str) -> None:
        _refuse_if(self._rates.count(name))


def create_authenticator(
    settings: Settings, renamed: Mapping[str, str] = MappingProxyType({})
) -> Authenticator:
    """Create the authenticator that the settings describe. `renamed` is that of the registry.

    Raises:
        SettingsInvalid: the keys for the tokens cannot be used.
    """
    return Authenticator(
        _token_verifier(settings), _rate_limits(settings), settings.cors_origins, renamed
    )


def _rate_limits(settings: Settings) -> list[RateLimitItem]:
    if not settings.rate_limit:
        return []
    # Imported only where there is a limit, as in the settings.
    from limits import parse

    return [parse(rate) for rate in settings.rate_limit]


def _token_verifier(settings: Settings) -> TokenVerifier | None:
    keys: KeySource
    if settings.auth_hs256_secret is not None:
        keys = FixedKeys(SharedSecret(settings.auth_hs256_secret.encode()))
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


def _digest(token: str) -> bytes:
    """Return the key of a token in the cache: the cache holds no tokens, and keys of one length."""
    return hashlib.sha256(token.encode()).digest()


def _authorization(request: Scope, given: str | None) -> str:
    """Return what was given instead of the header of a request, or the header."""
    return header(request, b"authorization").decode("latin-1") if given is None else given


def _name_of(caller: Caller, request: Scope) -> str:
    """Return whose requests a request is counted with."""
    return _address(request) if caller.subject is None else f"subject {caller.subject}"


def _address(request: Scope) -> str:
    """Return the address of a request, which may be a proxy's; of IPv6 the network.

    A host with IPv6 has as many addresses as it likes within its network of 64 bits.
    """
    client = request.get("client")
    return _name_of_address(client[0] if client else "")


@cached_if_short
def _name_of_address(text: str) -> str:
    try:
        address = ip_address(text)
    except ValueError:
        return f"address {text}"
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return f"address {IPv6Network((int(address) >> 64 << 64, 64))}"
        address = address.ipv4_mapped
    return f"address {address}"


def _check_is_local(request: Scope) -> None:
    # `job-registry serve` listens on loopback only; a host application may listen everywhere.
    client = request.get("client")
    if _is_elsewhere(client[0] if client else ""):
        raise Forbidden(
            "Without authentication, only this machine may use the queue. To open it to others, set"
            " JOBS_AUTH_HS256_SECRET or JOBS_AUTH_JWKS."
        )


@cached_if_short
def _is_elsewhere(host: str) -> bool:
    """Return whether a host is the address of another machine."""
    return _is_address(host) and not is_loopback(host)


def is_loopback(host: str) -> bool:
    """Return whether a host is an address of this machine that only it can reach.

    A server that listens on :: sees one of IPv4 as a part of IPv6 (RFC 4291, section 2.5.5.2).
    """
    if not _is_address(host):
        return False
    address = ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (address if mapped is None else mapped).is_loopback


def _refuse_if(exceeded: Exceeded | None) -> None:
    if exceeded is not None:
        raise TooManyRequests(_rate(exceeded.limit), max(1, round(exceeded.seconds)))


@cached_if_short
def _host(header: str) -> str:
    """Return the host of a Host header without its port; a malformed header as it is."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return header


@cached_if_short
def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_in_force(known: _Known, keys: Keys) -> bool:
    """Return whether a token needs no new check: neither its time nor its keys have changed."""
    expires_at = known.caller.expires_at
    return (
        known.keys is keys
        and time.monotonic() - known.checked_at < KNOWN_SECONDS
        and (expires_at is None or time.time() < expires_at)
    )


def _is_time(value: object) -> bool:
    """Return whether a claim is a NumericDate (RFC 7519, section 2) that a calendar has."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LATEST_TIME
    )


def _reason(error: Exception) -> str:
    """Describe why a token is not valid. PyJWT's own messages may quote the token."""
    match error:
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
    """Return the scopes of `scope` (RFC 8693), or of `scp`, as some issuers name it.

    Each is a string of names separated by spaces, or a list of names. Unknown names are ignored.
    """
    name = "scope" if "scope" in claims else "scp"
    given = claims.get(name, "")
    names = given.split() if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise Unauthenticated(f"The claim {name} is not a string or a list of scopes.")
    return frozenset(each for each in names if each in ACCESS_SCOPES)


def _job_types(claims: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the job types that the token is limited to; None without the claim.

    A claim that is not understood, null among them, refuses the token: to ignore it would remove
    a limit. Names of types that this server does not have are allowed, and match nothing.
    """
    if JOB_TYPES_CLAIM not in claims:
        return None
    given = claims[JOB_TYPES_CLAIM]
    if not isinstance(given, list) or not all(
        isinstance(name, str) and is_type_name(name) for name in given
    ):
        raise Unauthenticated(f"The claim {JOB_TYPES_CLAIM} is not a list of names.")
    if len(given) > MAX_JOB_TYPES:
        raise Unauthenticated(f"The claim {JOB_TYPES_CLAIM} has more than {MAX_JOB_TYPES} names.")
    return frozenset(given)


def _rate(limit: RateLimitItem) -> str:
    unit = limit.GRANULARITY.name
    every = f"per {unit}" if limit.multiples == 1 else f"per {limit.multiples} {unit}s"
    return f"{limit.amount} requests {every}"
