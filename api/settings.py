"""Every setting, read once at the edge from `JOBS_*` variables; the rest of the code has values."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX: Final = "JOBS_"


class SettingsInvalid(Exception):
    """Raised when variables are wrong. `faults` has a sentence for each, naming the variable."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class Settings(BaseSettings):
    """The settings, each a variable `JOBS_` with the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    database_url: str = Field(
        default="sqlite:///jobs.db",
        description="Where jobs are kept: `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/NAME`"
        " for more than one machine.",
    )
    database_pool_size: int = Field(
        default=10,
        ge=2,
        le=200,
        description="Database connections a process holds at most, 2 to 200. PostgreSQL has to"
        " allow the sum over all processes, and one more for each.",
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
        description="How large a payload, a result or a progress report may be, as compact JSON in"
        " bytes, 1,024 to 67,108,864.",
    )
    max_body_bytes: int = Field(
        default=8_388_608,
        ge=1_024,
        le=1_073_741_824,
        description="How large a request may be, in bytes, 1,024 to 1,073,741,824. A bulk enqueue"
        " has to fit.",
    )
    lease_seconds: float = Field(
        default=30.0,
        ge=1.0,
        le=3_600.0,
        description="How long a lease lasts without a heartbeat, 1 to 3,600. Shorter notices a"
        " dead worker sooner; too short takes a slow network for one.",
    )
    shutdown_seconds: float = Field(
        default=20.0,
        ge=0.0,
        le=3_600.0,
        description="How long running jobs may go on after SIGTERM, 0 to 3,600, before they are"
        " handed back. Keep it below what the process manager grants.",
    )
    worker_concurrency: int = Field(
        default=8,
        ge=1,
        le=1_000,
        description="How many jobs a worker process runs at once, 1 to 1,000.",
    )
    keep_succeeded_days: float = Field(
        default=7.0,
        ge=0.0,
        le=36_500.0,
        description="Days until a succeeded job is deleted, 0 to 36,500. Its idempotency key is"
        " free from then on.",
    )
    keep_failed_days: float = Field(
        default=90.0,
        ge=0.0,
        le=36_500.0,
        description="Days until a failed or cancelled job is deleted, 0 to 36,500.",
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
        if not re.match(r"(sqlite(\+aiosqlite)?:///.|postgres(ql)?(\+asyncpg)?://.)", value):
            raise ValueError("expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
        if value.endswith(":memory:"):
            raise ValueError("a database in memory is gone with its connection; name a file")
        return value

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        if value not in ("localhost", "::1") and not re.fullmatch(r"127(\.\d{1,3}){3}", value):
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
            came = _without_password(str(values.get(name, "")))
            expected = (
                detail["msg"]
                .replace("Input should be", "expected a value")
                .removeprefix("Value error, ")
            )
            faults.append(f"{PREFIX}{name.upper()}: got {came!r}; {expected}")
    if faults:
        raise SettingsInvalid(faults)
    return settings


def settings_table() -> str:
    """The settings as a Markdown table, as it stands in the README."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = ",".join(field.default) if name == "catalog" else field.default
        lines.append(f"| `{PREFIX}{name.upper()}` | `{default}` | {field.description} |")
    return "\n".join(lines)


class _Given(Settings):
    """Settings of the values that are handed in, so that only `load_settings` reads variables."""

    @classmethod
    def settings_customise_sources(cls, *_sources: Any, **named: Any) -> tuple[Any, ...]:
        """Takes the values of the call and nothing else."""
        return (named["init_settings"],)


def _without_password(value: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", value)[:200]
