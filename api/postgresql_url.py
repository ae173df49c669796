"""Reads a PostgreSQL URL as libpq does, for a driver that supports fewer options.

Each option is supported, ignored if that is harmless, or refused by name.
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode

SCHEMES: Final = ("postgresql://", "postgres://", "postgresql+asyncpg://")


class UrlInvalid(ValueError):
    """Raised when a URL cannot be used. The message quotes nothing of the URL but option names."""


@dataclass(frozen=True, slots=True)
class PostgresqlUrl:
    """Where a database is and how to connect to it.

    `dsn` has the parts that asyncpg reads: user, password, database, TLS, `service`, `passfile`.
    Without `hosts`, asyncpg finds the server by the service or in the default places.
    """

    dsn: str = field(repr=False)
    hosts: tuple[tuple[str, int | None], ...] = field(default=(), repr=False)
    shuffle_hosts: bool = False
    session: str = "any"
    """`target_session_attrs`. Without it, one of several hosts has to be `read-write`: on a standby
    the queue can do nothing. libpq's default is `any`."""
    connect_seconds: float | None = None
    keepalives: bool = True
    keepalive_idle_seconds: int | None = None
    keepalive_interval_seconds: int | None = None
    keepalive_count: int | None = None
    tcp_user_timeout_ms: int | None = None
    server_settings: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the session, for example `application_name` and `options`."""
    service_file: str | None = None

    def sets(self, name: str) -> bool:
        """Return whether the `options` of the URL set the server setting `name`."""
        options = self.server_settings.get("options", "")
        return re.search(rf"(-c\s*|--){re.escape(name)}\s*=", options) is not None


def parse(url: str, environment: Mapping[str, str] | None = None) -> PostgresqlUrl:
    """Read a URL. Missing parts come from the PG* variables of `environment`.

    Raises:
        UrlInvalid: the URL is malformed, or an option is unknown or not supported.
    """
    environment = os.environ if environment is None else environment
    if not url.startswith(SCHEMES):
        raise UrlInvalid("expected postgresql://USER:PASSWORD@HOST/NAME")
    parts = _URL.fullmatch(url)
    if parts is None:
        raise UrlInvalid(
            "expected postgresql://USER:PASSWORD@HOST/NAME, where a user, password or name"
            " writes : / ? # @ as %3A %2F %3F %23 %40"
        )
    query = parts["options"] or ""
    given = dict(parse_qsl(query, keep_blank_values=True))
    options = _from_environment(given, environment) | given
    for alias, (name, values) in _ALIASES.items():
        if alias in options:
            value = options.pop(alias)
            options.setdefault(name, values.get(value, value))
    # Before the options: if a password contains a ?, the text before it is not a port.
    hosts = _hosts(parts["hosts"], options)
    for name, value in options.items():
        check = _OPTIONS.get(name)
        if check is None:
            raise UrlInvalid(_unknown(name, query))
        if fault := check(value):
            raise UrlInvalid(f"option {name}: {fault}")
    whole = {name: int(options[name]) for name in _NUMBERS if options.get(name)}
    settings = {
        name: options[name] for name in ("application_name", "options") if options.get(name)
    }
    if options.get("fallback_application_name"):
        settings.setdefault("application_name", options["fallback_application_name"])
    passed = {name: value for name, value in options.items() if name in _PASSED and value}
    database = options.get("database") or options.get("dbname")
    name = f"/{quote(database, safe='')}" if database else parts["name"]
    connect_seconds = whole.get("connect_timeout", 0)
    several = len(hosts) > 1 or (not hosts and "," in environment.get("PGHOST", ""))
    return PostgresqlUrl(
        dsn=f"postgresql://{parts['credentials'] or ''}{name or ''}"
        + (f"?{urlencode(passed)}" if passed else ""),
        hosts=hosts,
        shuffle_hosts=options.get("load_balance_hosts") == "random",
        session=options.get("target_session_attrs") or ("read-write" if several else "any"),
        # As libpq: at least two seconds, and no limit for zero or less.
        connect_seconds=max(2.0, connect_seconds) if connect_seconds > 0 else None,
        keepalives=options.get("keepalives") != "0",
        keepalive_idle_seconds=whole.get("keepalives_idle") or None,
        keepalive_interval_seconds=whole.get("keepalives_interval") or None,
        keepalive_count=whole.get("keepalives_count") or None,
        tcp_user_timeout_ms=whole.get("tcp_user_timeout") or None,
        server_settings=settings,
        service_file=options.get("servicefile") or None,
    )


# RFC 3986: a delimiter inside a part is percent-encoded. For other texts, drivers disagree on where
# the password ends.
_URL: Final = re.compile(
    r"[a-z+]+://(?P<credentials>[^:/?#@]*(?::[^/?#@]*)?@)?"
    r"(?P<hosts>[^/?#@]*)(?P<name>/[^?#@/]*)?(?:\?(?P<options>[^#]*))?"
)

_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\]]*)(?::(?P<port>[^:]*))?")

_Check = Callable[[str], str | None]
"""Return the fault of an option's value, or None."""


def _anything(_value: str) -> None:
    return None


def _whole_number(value: str) -> str | None:
    return None if re.fullmatch(r"-?[0-9]{1,9}", value) or not value else "expected a whole number"


def _one_of(*values: str) -> _Check:
    expected = ", ".join(values)
    return lambda value: None if value in values or not value else f"expected one of {expected}"


def _without_effect(*values: str) -> _Check:
    """Accept only the values that describe what happens anyway."""
    expected = " or ".join(values)

    def check(value: str) -> str | None:
        if value in values or not value:
            return None
        return f"expected {expected}; other values are not supported by this driver"

    return check


def _refused(value: str) -> str | None:
    return "it is not supported by this driver" if value else None


_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_TLS: Final = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")

_OPTIONS: Final[Mapping[str, _Check]] = {
    # The server and the user.
    "host": _anything,
    "hostaddr": _anything,
    "port": _anything,
    "dbname": _anything,
    "database": _anything,
    "user": _anything,
    "password": _anything,
    "passfile": _anything,
    "service": _anything,
    "servicefile": _anything,
    "target_session_attrs": _one_of(
        "any", "primary", "standby", "prefer-standby", "read-write", "read-only"
    ),
    "load_balance_hosts": _one_of("disable", "random"),
    # Timeouts.
    "connect_timeout": _whole_number,
    "keepalives": _one_of("0", "1"),
    "keepalives_idle": _whole_number,
    "keepalives_interval": _whole_number,
    "keepalives_count": _whole_number,
    "tcp_user_timeout": _whole_number,
    # The session.
    "application_name": _anything,
    "fallback_application_name": _anything,
    "options": _anything,
    "client_encoding": _without_effect("utf8", "UTF8", "auto"),
    "replication": _without_effect("false", "off", "no", "0"),
    "min_protocol_version": _without_effect("3.0"),
    "max_protocol_version": _without_effect("3.0", "latest"),
    # Security: an unsupported option must not be ignored.
    "sslmode": _one_of(*_SSL_MODES),
    "sslcert": _anything,
    "sslkey": _anything,
    "sslpassword": _anything,
    "sslrootcert": _anything,
    "sslcrl": _anything,
    "sslcrldir": _refused,
    "sslcertmode": _without_effect("allow"),
    "sslnegotiation": _one_of("postgres", "direct"),
    "sslcompression": _without_effect("0"),
    "sslsni": _without_effect("1"),
    "sslkeylogfile": _refused,
    "ssl_min_protocol_version": _one_of(*_TLS),
    "ssl_max_protocol_version": _one_of(*_TLS),
    "channel_binding": _without_effect("disable", "prefer"),
    "gssencmode": _without_effect("disable", "prefer"),
    "gssdelegation": _without_effect("0"),
    "krbsrvname": _anything,
    "gsslib": _one_of("gssapi", "sspi"),
    "require_auth": _refused,
    "requirepeer": _refused,
    "scram_client_key": _refused,
    "scram_server_key": _refused,
}

_NUMBERS: Final = (
    "connect_timeout",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)

_PASSED: Final = frozenset(
    {
        "user", "password", "passfile", "service", "sslmode", "sslcert", "sslkey", "sslpassword",
        "sslrootcert", "sslcrl", "sslnegotiation", "ssl_min_protocol_version",
        "ssl_max_protocol_version", "krbsrvname", "gsslib",
    }
)  # fmt: skip
"""Options that asyncpg reads from its DSN as libpq does."""

_ALIASES: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    # libpq accepts ssl=true from JDBC URLs; users of asyncpg write ssl=require.
    "ssl": ("sslmode", {"true": "require"}),
    "requiressl": ("sslmode", {"1": "require", "0": "prefer"}),
}

_VARIABLES: Final[Mapping[str, str]] = {
    "PGHOSTADDR": "hostaddr",
    "PGREQUIREAUTH": "require_auth",
    "PGCHANNELBINDING": "channel_binding",
    "PGAPPNAME": "application_name",
    "PGOPTIONS": "options",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGCLIENTENCODING": "client_encoding",
    "PGTARGETSESSIONATTRS": "target_session_attrs",
    "PGLOADBALANCEHOSTS": "load_balance_hosts",
    "PGGSSENCMODE": "gssencmode",
    "PGGSSDELEGATION": "gssdelegation",
    "PGREQUIREPEER": "requirepeer",
    "PGSSLCERTMODE": "sslcertmode",
    "PGSSLCRLDIR": "sslcrldir",
    "PGSSLSNI": "sslsni",
    "PGSSLMINPROTOCOLVERSION": "ssl_min_protocol_version",
    "PGSSLMAXPROTOCOLVERSION": "ssl_max_protocol_version",
}
"""The variables of libpq that asyncpg does not read. It reads PGHOST, PGUSER, PGPASSWORD,
PGDATABASE, PGPASSFILE, PGSERVICE, PGSSLMODE and those for certificates."""


def _from_environment(given: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    return {
        option: environment[variable]
        for variable, option in _VARIABLES.items()
        if environment.get(variable) and not (option == "hostaddr" and "host" in given)
    }


def _unknown(name: str, query: str) -> str:
    # A raw @ means that this is part of a password with a ?, which must not be shown.
    if "@" in query or f"{name}=" not in query or not re.fullmatch(r"[a-z_]{2,40}", name):
        return "expected options as NAME=VALUE after the ?, and %3F for a ? in a password"
    return (
        f"there is no option {name}; a setting of the server is written as"
        f" options=-c%20{name}%3DVALUE"
    )


def _hosts(authority: str, options: Mapping[str, str]) -> tuple[tuple[str, int | None], ...]:
    """Return the hosts and ports. Those in the options win over those before the path."""
    listed: list[tuple[str, str | None]] = []
    if authority:
        for each in authority.split(","):
            parts = _HOST.fullmatch(each)
            if parts is None:
                raise UrlInvalid("expected HOST:PORT, several of them separated by commas")
            if parts["port"] == "":
                raise UrlInvalid(_PORT)
            listed.append((unquote(parts["host"].strip("[]")), parts["port"]))
    if addresses := options.get("hostaddr"):
        if options.get("sslmode") == "verify-full":
            raise UrlInvalid("option hostaddr: it cannot be used with sslmode=verify-full")
        listed = [(host, None) for host in addresses.split(",")]
    elif named := options.get("host"):
        listed = [(host, None) for host in named.split(",")]
    if ports := options.get("port"):
        each_port = ports.split(",")
        if not listed:
            listed = [("localhost", None)] if len(each_port) == 1 else []
        if len(each_port) not in (1, len(listed)):
            raise UrlInvalid("option port: expected one port, or one for each host")
        each_port *= len(listed) if len(each_port) == 1 else 1
        listed = [(host, port) for (host, _), port in zip(listed, each_port, strict=True)]
    if len(listed) == 1 and not listed[0][0] and not listed[0][1]:
        listed = []
    return tuple((host or "localhost", _port(port)) for host, port in listed)


_PORT: Final = "expected a port from 1 to 65,535 after HOST:"


def _port(text: str | None) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65_536:
        raise UrlInvalid(_PORT)
    return int(text)
