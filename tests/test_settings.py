"""Settings: read from JOBS_ variables, and every fault told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.queue.database import async_url
from api.settings import SettingsInvalid, load_settings, settings_table

README = Path(__file__).parent.parent / "README.md"


def test_defaults_serve_loopback_on_an_embedded_database() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.database_url == "sqlite:///jobs.db"
    assert settings.catalog == ("registry.catalog",)
    assert settings.max_payload_bytes == 262_144


def test_variables_are_read_and_others_left_alone() -> None:
    settings = load_settings(
        {"JOBS_CATALOG": "registry.catalog, my.jobs", "JOBS_PORT": "0", "PATH": "/bin"}
    )
    assert settings.catalog == ("registry.catalog", "my.jobs")
    assert settings.port == 0


def test_every_fault_is_told_at_once_and_names_its_variable() -> None:
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
    assert faults["JOBS_PORT"].endswith("got '99999'; expected a whole number from 0 to 65,535")
    assert faults["JOBS_LEASE_SECONDS"].endswith("got 'soon'; expected a number from 1 to 3,600")
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


@pytest.mark.parametrize(
    "url",
    ["sqlite:///x.db", "sqlite:////tmp/x.db", "sqlite+aiosqlite:///x.db",
     "postgresql://u:p@h/d", "postgres://h/d", "postgresql://u:a:b%40c@h:5432/d",
     "postgresql://u@[::1]:5432/d", "postgresql:///d", "postgresql+asyncpg://u@/d?host=/tmp"],
)  # fmt: skip
def test_common_spellings_of_a_database_url_are_taken_and_understood(url: str) -> None:
    assert load_settings({"JOBS_DATABASE_URL": url}).database_url == url
    assert async_url(url).database in ("x.db", "/tmp/x.db", "d")


@pytest.mark.parametrize(
    "url",
    ["", "jobs.db", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///x.db?timeout=5",
     "sqlite:///file:x.db", "mysql://h/d", "postgresql://", "postgresql://h:abc/d",
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
     "postgresql://h:port/d?password=lovelace"],
)  # fmt: skip
def test_a_password_is_never_told(url: str) -> None:
    with pytest.raises(SettingsInvalid) as wrong:
        load_settings({"JOBS_DATABASE_URL": url})
    assert "lovelace" not in str(wrong.value)


def test_settings_are_printed_without_the_password() -> None:
    settings = load_settings({"JOBS_DATABASE_URL": "postgresql://ada:lovelace@h/d"})
    assert "lovelace" not in repr(settings)


def test_the_readme_has_the_table_of_settings_as_it_is() -> None:
    text = README.read_text("utf-8")
    table = text.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert table == settings_table()
