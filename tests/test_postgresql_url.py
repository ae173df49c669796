"""PostgreSQL URLs as libpq reads them: honoured, harmless, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_registry_api.postgresql_url import UrlInvalid, parse
from job_registry_api.queue.postgresql_database import PostgreSQLDatabase
from tests.conftest import run_sql

HOST = "postgresql://u:p@h/d"


def with_option(url: str, option: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{option}"


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("connect_timeout=5", "connect_seconds", 5.0),
        ("connect_timeout=1", "connect_seconds", 2.0),
        ("connect_timeout=0", "connect_seconds", None),
        ("keepalives=0", "keepalives", False),
        ("keepalives=1", "keepalives", True),
        ("keepalives_idle=7", "keepalive_idle_seconds", 7),
        ("keepalives_interval=8", "keepalive_interval_seconds", 8),
        ("keepalives_count=9", "keepalive_count", 9),
        ("tcp_user_timeout=1500", "tcp_user_timeout_ms", 1500),
        ("load_balance_hosts=random", "shuffle_hosts", True),
        ("target_session_attrs=read-write", "session", "read-write"),
        ("application_name=app", "server_settings", {"application_name": "app"}),
        ("fallback_application_name=app", "server_settings", {"application_name": "app"}),
        ("options=-c%20jit%3Don", "server_settings", {"options": "-c jit=on"}),
        ("servicefile=/etc/pg", "service_file", "/etc/pg"),
        ("sslmode=require", "dsn", "postgresql://u:p@/d?sslmode=require"),
        ("ssl=true", "dsn", "postgresql://u:p@/d?sslmode=require"),
        ("ssl=verify-full", "dsn", "postgresql://u:p@/d?sslmode=verify-full"),
        ("requiressl=1", "dsn", "postgresql://u:p@/d?sslmode=require"),
        ("sslcert=c&sslkey=k", "dsn", "postgresql://u:p@/d?sslcert=c&sslkey=k"),
        ("sslrootcert=r&sslcrl=l", "dsn", "postgresql://u:p@/d?sslrootcert=r&sslcrl=l"),
        ("sslnegotiation=direct", "dsn", "postgresql://u:p@/d?sslnegotiation=direct"),
        ("ssl_min_protocol_version=TLSv1.3", "dsn",
         "postgresql://u:p@/d?ssl_min_protocol_version=TLSv1.3"),
        ("passfile=/p", "dsn", "postgresql://u:p@/d?passfile=%2Fp"),
        ("service=main", "dsn", "postgresql://u:p@/d?service=main"),
        ("dbname=other", "dsn", "postgresql://u:p@/other"),
    ],
)  # fmt: skip
def test_an_option_of_libpq_is_honoured(option: str, field: str, value: Any) -> None:
    assert getattr(parse(with_option(HOST, option), {}), field) == value


@pytest.mark.parametrize(
    ("url", "environment", "session"),
    [
        ("postgresql://a/d", {}, "any"),
        ("postgresql://a,b/d", {}, "read-write"),
        ("postgresql:///d?host=a,b", {}, "read-write"),
        ("postgresql:///d", {"PGHOST": "a,b"}, "read-write"),
        ("postgresql://c/d", {"PGHOST": "a,b"}, "any"),
        ("postgresql://a,b/d?target_session_attrs=any", {}, "any"),
        ("postgresql://a,b/d", {"PGTARGETSESSIONATTRS": "any"}, "any"),
    ],
)
def test_one_of_several_hosts_has_to_take_writes_unless_it_is_said_otherwise(
    url: str, environment: dict[str, str], session: str
) -> None:
    assert parse(url, environment).session == session


@pytest.mark.parametrize(
    "option",
    ["channel_binding=prefer", "channel_binding=disable", "gssencmode=disable",
     "gssencmode=prefer", "sslcompression=0", "sslsni=1", "sslcertmode=allow", "gssdelegation=0",
     "client_encoding=UTF8", "replication=false", "load_balance_hosts=disable",
     "max_protocol_version=latest", "requiressl=0"],
)  # fmt: skip
def test_an_option_for_what_happens_anyway_has_no_effect(option: str) -> None:
    plain, parsed = parse(HOST, {}), parse(with_option(HOST, option), {})
    assert (parsed.hosts, parsed.server_settings) == (plain.hosts, plain.server_settings)


@pytest.mark.parametrize(
    "option",
    ["channel_binding=require", "gssencmode=require", "require_auth=scram-sha-256",
     "requirepeer=postgres", "sslcertmode=require", "sslcrldir=/crl", "sslsni=0",
     "gssdelegation=1", "replication=database", "client_encoding=latin1", "sslmode=sometimes",
     "target_session_attrs=best", "connect_timeout=soon", "keepalives=2", "no_such_option=1",
     "statement_timeout=5000", "prepared_statement_cache_size=0", "sslnegotiation=never",
     "ssl_min_protocol_version=SSLv3"],
)  # fmt: skip
def test_an_option_that_cannot_be_honoured_is_refused_by_its_name(option: str) -> None:
    with pytest.raises(UrlInvalid) as refused:
        parse(with_option(HOST, option), {})
    assert option.partition("=")[0] in str(refused.value)


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://", ()),
        ("postgresql:///d", ()),
        ("postgresql://u@/d", ()),
        ("postgresql://h/d", (("h", None),)),
        ("postgresql://u@a:5432,b:5433/db", (("a", 5432), ("b", 5433))),
        ("postgresql://a,b:5433", (("a", None), ("b", 5433))),
        ("postgresql://u@[::1]:5432,h/d", (("::1", 5432), ("h", None))),
        ("postgresql://%2Frun%2Fpostgresql/d", (("/run/postgresql", None),)),
        ("postgresql:///d?host=/run/postgresql", (("/run/postgresql", None),)),
        ("postgresql:///d?host=/run/postgresql&port=5433", (("/run/postgresql", 5433),)),
        ("postgresql:///d?host=a,b&port=1", (("a", 1), ("b", 1))),
        ("postgresql:///d?host=a,b&port=1,2", (("a", 1), ("b", 2))),
        ("postgresql://h/d?hostaddr=10.0.0.1", (("10.0.0.1", None),)),
        ("postgres://h/d", (("h", None),)),
        ("postgresql+asyncpg://h/d", (("h", None),)),
    ],
)
def test_hosts_are_those_libpq_would_try(
    url: str, hosts: tuple[tuple[str, int | None], ...]
) -> None:
    assert parse(url, {}).hosts == hosts


@pytest.mark.parametrize(
    "url",
    ["postgresql://h:0/d", "postgresql://h:65536/d", "postgresql://h:x/d", "postgresql://a:1:2/d",
     "postgresql:///d?host=a,b,c&port=1,2", "postgresql://h/d#f", "postgresql://h/a/b",
     "mysql://h/d", "postgresql://u:p@x@h/d"],
)  # fmt: skip
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(UrlInvalid):
        parse(url, {})


@pytest.mark.parametrize(
    ("variable", "value", "field", "parsed"),
    [
        ("PGAPPNAME", "app", "server_settings", {"application_name": "app"}),
        ("PGOPTIONS", "-c jit=on", "server_settings", {"options": "-c jit=on"}),
        ("PGCONNECT_TIMEOUT", "7", "connect_seconds", 7.0),
        ("PGTARGETSESSIONATTRS", "primary", "session", "primary"),
        ("PGHOSTADDR", "10.0.0.1", "hosts", (("10.0.0.1", None),)),
    ],
)
def test_variables_of_libpq_fill_in_what_a_url_leaves_out(
    variable: str, value: str, field: str, parsed: Any
) -> None:
    assert getattr(parse("postgresql://", {variable: value}), field) == parsed


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PGCHANNELBINDING", "require"), ("PGGSSENCMODE", "require"), ("PGREQUIREAUTH", "none")],
)
def test_a_variable_that_cannot_be_honoured_is_refused(variable: str, value: str) -> None:
    with pytest.raises(UrlInvalid):
        parse(HOST, {variable: value})
    assert parse(with_option(HOST, "channel_binding=prefer"), {"PGCHANNELBINDING": "require"})


SECRET = "lovelace"


@given(
    st.text("abc:/?#@%=,[] ", max_size=12),
    st.text("abc:/?#@%=,[] ", max_size=12),
    st.sampled_from(
        ["postgresql://ada:{}@h/d", "postgresql://ada:{}", "postgresql://h/d?password={}"]
    ),
)
def test_no_refusal_shows_a_password(before: str, after: str, template: str) -> None:
    try:
        shown = repr(parse(template.format(before + SECRET + after), {}))
    except UrlInvalid as refused:
        shown = str(refused)
    assert SECRET not in shown


@given(
    user=st.text(min_size=1, max_size=20).filter(lambda t: "\x00" not in t),
    password=st.text(min_size=1, max_size=20).filter(lambda t: "\x00" not in t),
    name=st.text(min_size=1, max_size=20).filter(lambda t: "\x00" not in t),
)
def test_any_user_password_and_name_can_be_written_percent_encoded(
    user: str, password: str, name: str
) -> None:
    from urllib.parse import quote, unquote, urlsplit

    def coded(value: str) -> str:
        return quote(value.encode("utf-8", "surrogatepass"), safe="")

    url = f"postgresql://{coded(user)}:{coded(password)}@a:1,b:2/{coded(name)}"
    parsed = parse(url, {})
    credentials, _, rest = urlsplit(parsed.dsn).netloc.rpartition("@")
    assert credentials == f"{coded(user)}:{coded(password)}"
    assert (rest, urlsplit(parsed.dsn).path) == ("", "/" + coded(name))
    assert unquote(parsed.dsn)
    assert parsed.hosts == (("a", 1), ("b", 2))


@pytest.mark.parametrize(
    "option",
    ["connect_timeout=5", "keepalives=1&keepalives_idle=30", "channel_binding=prefer",
     "gssencmode=disable", "application_name=jobs", "target_session_attrs=read-write",
     "sslmode=disable", "tcp_user_timeout=4000", "load_balance_hosts=random",
     "options=-c%20work_mem%3D5MB", "target_session_attrs=prefer-standby"],
)  # fmt: skip
def test_a_server_is_reached_with_the_options_of_libpq(postgresql_url: str, option: str) -> None:
    assert run_sql(with_option(postgresql_url, option), "SELECT 1")[0][0] == 1


def test_settings_in_options_take_precedence_over_ours(postgresql_url: str) -> None:
    import asyncio

    async def shown(url: str) -> list[str]:
        database = PostgreSQLDatabase(url)
        try:
            rows = await database.execute_at_once(
                "SELECT current_setting('jit'), current_setting('application_name'),"
                " current_setting('transaction_isolation')",
                {},
            )
            return list(rows[0])
        finally:
            await database.close()

    url = with_option(
        postgresql_url,
        "application_name=mine&options=-c%20jit%3Don%20-c%20default_transaction_isolation"
        "%3Dserializable",
    )
    assert asyncio.run(shown(url)) == ["on", "mine", "read committed"]


def test_a_list_of_hosts_reaches_the_one_that_answers(postgresql_url: str) -> None:
    from urllib.parse import parse_qs, urlsplit

    parts = urlsplit(postgresql_url)
    folder = parse_qs(parts.query)["host"][0]
    url = (
        f"postgresql://{parts.netloc}{parts.path}?host=/nowhere,{folder}&port={parts.port or 5432}"
    )
    assert run_sql(url, "SELECT 1")[0][0] == 1


def test_a_bare_url_takes_everything_from_the_variables(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.parse import parse_qs, urlsplit

    parts = urlsplit(postgresql_url)
    monkeypatch.setenv("PGHOST", parse_qs(parts.query)["host"][0])
    monkeypatch.setenv("PGUSER", parts.username or "")
    monkeypatch.setenv("PGDATABASE", parts.path[1:])
    assert run_sql("postgresql://", "SELECT current_database()")[0][0] == parts.path[1:]
