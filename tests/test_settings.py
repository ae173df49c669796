"""Settings: read from JOBS_ variables, and every fault told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from job_registry.errors import shortened
from job_registry_api.settings import SettingsInvalid, load_settings, settings_table

PAGE = Path(__file__).parent.parent / "docs/settings.md"


def test_defaults_serve_loopback_on_an_embedded_database() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.database_url == "sqlite:///jobs.db"
    assert settings.catalog == ("job_registry.catalog",)
    assert settings.max_payload_bytes == 262_144


def test_variables_are_read_and_others_left_alone() -> None:
    settings = load_settings(
        {"JOBS_CATALOG": "job_registry.catalog, my.jobs", "JOBS_PORT": "0", "PATH": "/bin"}
    )
    assert settings.catalog == ("job_registry.catalog", "my.jobs")
    assert settings.port == 0


def test_a_setting_that_resembles_no_other_suggests_none() -> None:
    with pytest.raises(SettingsInvalid) as wrong:
        load_settings({"JOBS_FOO": "1"})
    assert "JOBS_FOO: there is no such setting." in str(wrong.value)
    assert "Did you mean" not in str(wrong.value)


def test_every_fault_is_reported_at_once_and_names_its_variable() -> None:
    with pytest.raises(SettingsInvalid) as wrong:
        load_settings(
            {
                "JOBS_PROT": "1",
                "JOBS_PORT": "99999",
                "JOBS_DATABASE_URL": "mysql://ada:lovelace@host/x",
                "JOBS_HOST": "0.0.0.0",
                "JOBS_CATALOG": "a b",
                "JOBS_LEASE_SECONDS": "soon",
            }
        )
    faults = {fault.partition(":")[0]: fault for fault in wrong.value.faults}
    assert faults.keys() == {
        "JOBS_PROT",
        "JOBS_PORT",
        "JOBS_DATABASE_URL",
        "JOBS_HOST",
        "JOBS_CATALOG",
        "JOBS_LEASE_SECONDS",
    }
    assert "Did you mean JOBS_PORT?" in faults["JOBS_PROT"]
    assert faults["JOBS_PORT"].endswith('got "99999"; expected a whole number from 0 to 65,535')
    assert faults["JOBS_LEASE_SECONDS"].endswith('got "soon"; expected a number from 1 to 3,600')
    assert "loopback" in faults["JOBS_HOST"]


@pytest.mark.parametrize(
    ("variable", "wrong"),
    [
        ("JOBS_WORKER_CONCURRENCY", "1.5"),
        ("JOBS_WORKER_CONCURRENCY", "0"),
        ("JOBS_KEEP_FAILED_DAYS", "-1"),
        ("JOBS_LEASE_SECONDS", "nan"),
        ("JOBS_LEASE_SECONDS", ""),
        ("JOBS_LOG_LEVEL", "loud"),
        ("JOBS_ASSETS", ""),
        ("JOBS_CATALOG", ","),
        ("JOBS_DATABASE_TIMEOUT_SECONDS", "0.5"),
        ("JOBS_DATABASE_TIMEOUT_SECONDS", "301"),
        ("JOBS_DATABASE_POOLER", "pgbouncer"),
        ("JOBS_DATABASE_LISTEN_URL", "sqlite:///jobs.db"),
        ("JOBS_DATABASE_LISTEN_URL", "postgresql://h/d"),  # the database itself is SQLite
        ("JOBS_DATABASE_URL", "postgresql://h/d?channel_binding=require"),
        ("JOBS_HOST", "127.999.0.1"),
        ("JOBS_HOST", "db.internal"),
        ("JOBS_port", "80"),
    ],
)
def test_a_wrong_value_is_refused_by_its_variable_alone(variable: str, wrong: str) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        load_settings({variable: wrong})
    assert [fault.partition(":")[0] for fault in refused.value.faults] == [variable]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_served_under_all_its_names(host: str) -> None:
    assert load_settings({"JOBS_HOST": host}).host == host


SECRET = "lovelace-lovelace-lovelace-lovelace"
AUTH = {
    "JOBS_AUTH_HS256_SECRET": SECRET,
    "JOBS_AUTH_ISSUER": "https://issuer.example",
    "JOBS_AUTH_AUDIENCE": "jobs",
}


def refused(**environment: str) -> dict[str, str]:
    """The faults of an environment, by variable."""
    with pytest.raises(SettingsInvalid) as wrong:
        load_settings(environment)
    return {fault.partition(":")[0]: fault for fault in wrong.value.faults}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "2001:db8::1"])
def test_other_addresses_are_served_with_authentication_only(host: str) -> None:
    faults = refused(JOBS_HOST=host)
    assert faults.keys() == {"JOBS_HOST"}
    assert (
        "without authentication only loopback (127.0.0.1, ::1, localhost) is allowed"
        in (faults["JOBS_HOST"])
    )
    assert "because anyone who reaches the port may use the queue" in faults["JOBS_HOST"]
    assert load_settings(AUTH | {"JOBS_HOST": host}).host == host


def test_all_that_authentication_lacks_is_reported_at_once(tmp_path: Path) -> None:
    faults = refused(
        JOBS_AUTH_HS256_SECRET="short", JOBS_AUTH_JWKS=str(tmp_path / "none"), JOBS_HOST="0.0.0.0"
    )
    assert "expected 32 bytes or more" in faults["JOBS_AUTH_HS256_SECRET"]
    assert "short" not in faults["JOBS_AUTH_HS256_SECRET"]
    assert "JOBS_AUTH_HS256_SECRET" not in faults["JOBS_AUTH_JWKS"]
    assert "the file cannot be read: No such file" in faults["JOBS_AUTH_JWKS"]
    assert "JOBS_HOST" not in faults
    faults = refused(JOBS_AUTH_HS256_SECRET=SECRET)
    assert faults == {
        name: f"{name}: not set; it is needed with JOBS_AUTH_HS256_SECRET"
        for name in ("JOBS_AUTH_ISSUER", "JOBS_AUTH_AUDIENCE")
    }


@pytest.mark.parametrize(
    ("variable", "came", "expected"),
    [
        ("JOBS_AUTH_JWKS", "http://issuer.example/keys", "a URL with https://"),
        ("JOBS_AUTH_JWKS", "ftp://issuer.example/keys", "a URL with https://"),
        ("JOBS_AUTH_JWKS", "HTTPS://issuer.example/keys", "a URL with https://"),
        ("JOBS_AUTH_JWKS", "https:///keys", "a URL with https://"),
        ("JOBS_AUTH_JWKS", "https://[issuer/keys", "a URL with https://"),
        ("JOBS_AUTH_JWKS", "https://issuer.example:99999/keys", "a URL with https://"),
        ("JOBS_AUTH_JWKS", "https://issuer example/keys", "a URL with https://"),
        ("JOBS_AUTH_JWKS", "https://issuer.example/keys", "JOBS_AUTH_HS256_SECRET is set too"),
        ("JOBS_AUTH_ISSUER", "", "a text that is not empty"),
        ("JOBS_AUTH_LEEWAY_SECONDS", "301", "a number from 0 to 300"),
        ("JOBS_DATABASE_SCHEMA", "Jobs", "lower-case letters, digits and underscores"),
        ("JOBS_DATABASE_SCHEMA", "pg_jobs", "a name that does not start with pg_"),
        ("JOBS_PRODUCTION", "perhaps", "true or false"),
        ("JOBS_INTROSPECTION", "2", "true or false"),
        ("JOBS_RATE_LIMIT", "many", "a rate such as 600/minute"),
        ("JOBS_RATE_LIMIT", "600/minute,0/hour", "a rate such as 600/minute"),
        ("JOBS_RATE_LIMIT", "600/minute;20/second", "separated by commas"),
        ("JOBS_RATE_LIMIT", "600/minute | 20/second", "separated by commas"),
        ("JOBS_CORS_ORIGINS", "*", "origins as browsers send them"),
        ("JOBS_CORS_ORIGINS", "https://app.example.com/", "origins as browsers send them"),
        ("JOBS_CORS_ORIGINS", "app.example.com", "origins as browsers send them"),
        ("JOBS_MAX_QUERY_DEPTH", "4", "a whole number from 5 to 100"),
        ("JOBS_MAX_PAGE_SIZE", "49", "a whole number from 50 to 1,000"),
    ],
)
def test_a_wrong_guard_says_what_came_and_what_is_expected(
    variable: str, came: str, expected: str
) -> None:
    environment = AUTH | {variable: came}
    if "https" in expected:
        del environment["JOBS_AUTH_HS256_SECRET"]
    faults = refused(**environment)
    assert faults.keys() == {variable}
    assert f"got {shortened(came)}" in faults[variable]
    assert expected in faults[variable]


def test_secrets_are_not_printed_with_the_settings() -> None:
    settings = load_settings(AUTH)
    assert settings.auth_hs256_secret == SECRET
    assert SECRET not in repr(settings)


def test_lists_are_separated_by_commas() -> None:
    settings = load_settings(
        {
            "JOBS_RATE_LIMIT": "20/second, 600/minute",
            "JOBS_CORS_ORIGINS": "https://a.example,http://[::1]:3000",
        }
    )
    assert settings.rate_limit == ("20/second", "600/minute")
    assert settings.cors_origins == ("https://a.example", "http://[::1]:3000")


def test_an_origin_may_have_its_default_port_which_browsers_leave_out() -> None:
    given = "https://a.example:443,http://a.example:80,https://a.example:80,http://[::1]:443"
    origins = load_settings({"JOBS_CORS_ORIGINS": given}).cors_origins
    assert origins == (
        "https://a.example",
        "http://a.example",
        "https://a.example:80",
        "http://[::1]:443",
    )


@pytest.mark.parametrize(
    "url",
    ["sqlite:///x.db", "sqlite:////tmp/x.db", "sqlite+aiosqlite:///x.db",
     "postgresql://u:p@h/d", "postgres://h/d", "postgresql://u:a:b%40c@h:5432/d",
     "postgresql://", "postgresql://u@a:5432,b:5433/d?gssencmode=prefer",
     "postgresql://u@[::1]:5432/d", "postgresql:///d", "postgresql+asyncpg://u@/d?host=/tmp"],
)  # fmt: skip
def test_common_spellings_of_a_database_url_are_taken_and_understood(url: str) -> None:
    assert load_settings({"JOBS_DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize(
    "url",
    ["", "jobs.db", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///x.db?timeout=5",
     "sqlite:///file:x.db", "mysql://h/d", "postgresql://h:abc/d",
     "postgresql://h:0/d", "postgresql://h:65536/d", "postgres+asyncpg://h/d"],
)  # fmt: skip
def test_other_database_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingsInvalid, match="JOBS_DATABASE_URL"):
        load_settings({"JOBS_DATABASE_URL": url})


@pytest.mark.parametrize(
    "url",
    ["mysql://ada:lovelace@h/d", "postgresql://ada:1815@lovelace@h/d", "host=h password=lovelace",
     "postgresql://ada:lovelace/1815@h/d", "postgresql://ada:lovelace#@h/d", "ada:lovelace@h/d",
     "postgresql://ada:lovelace?@h/d", "postgresql://ada:lovelace", "sqlite://ada:lovelace@h",
     "postgresql://h:port/d?password=lovelace", "postgresql://ada:love@h/d?sslmode=lovelace",
     "postgresql://ada:lovelace@h/d?no_such_option=1"],
)  # fmt: skip
def test_a_password_is_never_shown(url: str) -> None:
    with pytest.raises(SettingsInvalid) as wrong:
        load_settings({"JOBS_DATABASE_URL": url})
    assert "lovelace" not in str(wrong.value)
    with pytest.raises(SettingsInvalid) as wrong:
        load_settings({"JOBS_DATABASE_URL": "postgresql://", "JOBS_DATABASE_LISTEN_URL": url})
    assert "lovelace" not in str(wrong.value)


def test_a_pooler_is_for_postgresql_and_takes_no_options() -> None:
    assert refused(JOBS_DATABASE_POOLER="transaction").keys() == {"JOBS_DATABASE_POOLER"}
    url = "postgresql://h/d?options=-c%20jit%3Don"
    faults = refused(JOBS_DATABASE_POOLER="transaction", JOBS_DATABASE_URL=url)
    assert "`options`" in faults["JOBS_DATABASE_POOLER"]
    settings = load_settings(
        {
            "JOBS_DATABASE_URL": "postgresql://pool/d",
            "JOBS_DATABASE_POOLER": "transaction",
            "JOBS_DATABASE_LISTEN_URL": "postgresql://ada:lovelace@direct/d",
            "JOBS_DATABASE_TIMEOUT_SECONDS": "5",
        }
    )
    assert (settings.database_pooler, settings.database_timeout_seconds) == ("transaction", 5.0)
    assert "lovelace" not in repr(settings)


def test_settings_are_printed_without_the_password() -> None:
    settings = load_settings({"JOBS_DATABASE_URL": "postgresql://ada:lovelace@h/d"})
    assert "lovelace" not in repr(settings)


def test_the_guide_has_the_table_of_settings_as_it_is() -> None:
    text = PAGE.read_text("utf-8")
    table = text.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    code = "from job_registry_api.settings import settings_table; print(settings_table())"
    assert table == settings_table(), f"print the table with: .venv/bin/python -c '{code}'"
