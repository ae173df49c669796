"""Settings: read from JOBS_ variables, and every fault told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    assert "got '99999'" in faults["JOBS_PORT"]
    assert "lovelace" not in str(wrong.value)
    assert "loopback" in faults["JOBS_HOST"]


@pytest.mark.parametrize(
    "url",
    ["sqlite:///x.db", "sqlite:////tmp/x.db", "postgresql://u:p@h/d", "postgres://h/d",
     "postgresql+asyncpg://u@/d?host=/tmp"],
)  # fmt: skip
def test_common_spellings_of_a_database_url_are_taken(url: str) -> None:
    assert load_settings({"JOBS_DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("url", ["", "jobs.db", "sqlite://", "sqlite:///:memory:", "mysql://h/d"])
def test_other_database_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingsInvalid, match="JOBS_DATABASE_URL"):
        load_settings({"JOBS_DATABASE_URL": url})


def test_the_readme_has_the_table_of_settings_as_it_is() -> None:
    text = README.read_text("utf-8")
    table = text.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert table == settings_table()
