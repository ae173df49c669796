"""Every setting, read once at the edge from `JOBS_*` variables; the rest of the code has values."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge, Le
from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX: Final = "JOBS_"


class SettingsInvalid(Exception):
    """Raised when variables are wrong.

    `faults` has a sentence for each: the variable, what came, and what is expected. A password in
    the URL of a database is in none of them.
    """

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class Settings(BaseSettings):
    """The settings, each a variable `JOBS_` with the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    database_url: str = Field(
        default="sqlite:///jobs.db",
        repr=False,  # It may hold a password.
        description="Where jobs are kept: `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/NAME`"
        " for more than one machine.",
    )
    database_pool_size: int = Field(
        default=10,
        ge=2,
        le=200,
        description="Database connections a process holds at most. PostgreSQL has to allow the sum"
        " over all processes, and one more for each; with too few, calls wait for each other.",
    )
    catalog: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("registry.catalog",),
        description="Modules and packages with job types, separated by commas:"
        " `registry.catalog,myapp.jobs`.",
    )
    assets: str = Field(
        default="assets",
        min_length=1,
        description="Where jobs find and leave files: a folder, or an fsspec URL such as"
        " `s3://bucket/assets`.",
    )
    max_payload_bytes: int = Field(
        default=262_144,
        ge=1_024,
        le=67_108_864,
        description="How large a payload, a result or a progress report may be, in bytes of compact"
        " JSON. What is larger belongs into the assets, and its name into the payload.",
    )
    max_body_bytes: int = Field(
        default=8_388_608,
        ge=1_024,
        le=1_073_741_824,
        description="How large a request may be, in bytes. A bulk enqueue has to fit.",
    )
    lease_seconds: float = Field(
        default=30.0,
        ge=1.0,
        le=3_600.0,
        description="How long a lease lasts without a heartbeat. Shorter notices a dead worker"
        " sooner; too short takes a slow network for one, and runs its job twice.",
    )
    shutdown_seconds: float = Field(
        default=20.0,
        ge=0.0,
        le=3_600.0,
        description="How long running jobs may go on after SIGTERM before they are handed back."
        " Keep it below what the process manager grants.",
    )
    worker_concurrency: int = Field(
        default=8,
        ge=1,
        le=1_000,
        description="How many jobs a worker process runs at once. Raise it for handlers that"
        " wait for others; those that compute then only take turns, and may time out.",
    )
    keep_succeeded_days: float = Field(
        default=7.0,
        ge=0.0,
        le=36_500.0,
        description="Days until a succeeded job is deleted. Its idempotency key is free from then"
        " on.",
    )
    keep_failed_days: float = Field(
        default=90.0,
        ge=0.0,
        le=36_500.0,
        description="Days until a failed or cancelled job is deleted, with its attempts' errors.",
    )
    host: str = Field(
        default="127.0.0.1", description="The address `jobs serve` listens on; loopback only."
    )
    port: int = Field(
        default=8000, ge=0, le=65_535, description="The port of it; 0 takes a free one."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="The least important log lines to write: `debug`, `info` (an event of a job is"
        " one line), `warning` or `error`.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="`json`, a line an event; `console`, for people; `auto` is `console` on a"
        " terminal and `json` elsewhere.",
    )

    @field_validator("catalog", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"{name!r} is no module name")
        if not names:
            raise ValueError("it names no module")
        return tuple(names)

    @field_validator("database_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        if value.startswith(_SQLITE):
            file = value.partition(":///")[2]
            if not file or file.endswith(":memory:"):
                raise ValueError("a database in memory is gone with its connection; name a file")
            if "?" in file or file.startswith("file:"):
                raise ValueError("expected sqlite:///FILE, a path without options")
        elif not value.startswith(_POSTGRESQL):
            raise ValueError("expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
        elif not (parts := _POSTGRESQL_URL.fullmatch(value)):
            raise ValueError(
                "expected postgresql://USER:PASSWORD@HOST/NAME, where a user, password or name"
                " writes : / ? # @ as %3A %2F %3F %23 %40"
            )
        elif not any(parts.groups()):
            raise ValueError("expected postgresql://USER:PASSWORD@HOST/NAME, and it names nothing")
        elif parts["port"] and not (
            re.fullmatch(r":[0-9]{1,5}", parts["port"]) and 0 < int(parts["port"][1:]) < 65_536
        ):
            raise ValueError("expected a port from 1 to 65,535 after HOST:")
        return value

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        try:
            loopback = value == "localhost" or ipaddress.ip_address(value).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError(
                "only loopback (127.0.0.1, ::1, localhost) is served, because anyone who reaches"
                " the port may use the queue; put a proxy that authenticates in front"
            )
        return value


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of the process's environment, or of the one given.

    Raises:
        SettingsInvalid: with every wrong or unknown `JOBS_` variable.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    faults: list[str] = []
    for variable, value in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in Settings.model_fields and variable == variable.upper():
            values[name] = value
        else:
            known = [PREFIX + field.upper() for field in Settings.model_fields]
            near = difflib.get_close_matches(variable.upper(), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            faults.append(f"{variable}: there is no such setting.{hint}")
    try:
        settings = _Given(**values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0])
            came, expected = _shown(name, values[name]), _expected(name, detail)
            faults.append(f"{PREFIX}{name.upper()}: got {came!r}; {expected}")
    if faults:
        raise SettingsInvalid(faults)
    return settings


def settings_table() -> str:
    """The settings as a Markdown table, as it stands in the README."""
    lines = ["| variable | default | range | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        match default:
            case tuple():
                default = ",".join(default)
            case float():
                default = f"{default:g}"
        lines.append(
            f"| `{PREFIX}{name.upper()}` | `{default}` | {_range(field)} | {field.description} |"
        )
    return "\n".join(lines)


class _Given(Settings):
    """Settings of the values that are handed in, so that only `load_settings` reads variables."""

    @classmethod
    def settings_customise_sources(cls, *_sources: Any, **named: Any) -> tuple[Any, ...]:
        """Takes the values of the call and nothing else."""
        return (named["init_settings"],)


_SQLITE: Final = ("sqlite:///", "sqlite+aiosqlite:///")
_POSTGRESQL: Final = ("postgresql://", "postgres://", "postgresql+asyncpg://")

# RFC 3986: what would end a part of the URL is percent-encoded inside of it. Drivers disagree on
# where the password of any other text ends.
_POSTGRESQL_URL: Final = re.compile(
    r"[a-z+]+://(?:[^:/?#@]*(?::[^/?#@]*)?@)?"
    r"(?P<host>\[[^/?#@]*\]|[^:/?#@]*)(?P<port>:[^/?#@]*)?"
    r"(?P<name>/[^?#@]*)?(?P<options>\?[^#]*)?"
)


def _expected(name: str, detail: ErrorDetails) -> str:
    """What a setting wants, from the fault Pydantic found in what came."""
    match detail["type"]:
        case "value_error":
            return str(detail["ctx"]["error"])
        case "literal_error":
            return f"expected {detail['ctx']['expected']}"
        case "string_too_short":
            return "expected a text that is not empty"
    field = Settings.model_fields[name]
    return f"expected a {'whole ' if field.annotation is int else ''}number from {_range(field)}"


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{each.ge if isinstance(each, Ge) else each.le:,.0f}"
        for each in field.metadata
        if isinstance(each, Ge | Le)
    ]
    return " to ".join(bounds)


def _shown(name: str, value: str) -> str:
    """What came, fit for a log: of a database's URL the scheme only. In one that is written wrong
    nobody can say which part is the password."""
    if name == "database_url" and not value.startswith(_SQLITE) and re.search("[:=@]", value):
        scheme = re.match(r"[a-z+]+://", value)
        return f"{scheme[0] if scheme else ''}..."
    return value[:200]
