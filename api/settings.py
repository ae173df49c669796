"""Every setting, read once at the edge from `JOBS_*` variables; the rest of the code has values."""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import limits
from annotated_types import Ge, Le
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from job_registry_api import postgresql_url

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
        description="The most database connections per process. PostgreSQL has to allow the sum"
        " over all processes, and one more for each; with too few, calls wait for each other.",
    )
    database_timeout_seconds: float = Field(
        default=10.0,
        ge=1.0,
        le=300.0,
        description="How long a call waits for the database: for a connection, a lock and the"
        " answer together. Then it fails as `queue_unavailable`, and its connection is dropped.",
    )
    database_pooler: Literal["session", "transaction"] = Field(
        default="session",
        description="`transaction` when the URL leads through PgBouncer in transaction mode:"
        " nothing then outlives a transaction. `session` everywhere else.",
    )
    database_listen_url: str | None = Field(
        default=None,
        repr=False,  # It may hold a password.
        description="A URL that leads past PgBouncer, for notifications (LISTEN). Without it,"
        " behind a `transaction` pooler, other processes' events are polled for twice a second.",
    )
    database_schema: str = Field(
        default="job_registry",
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="The PostgreSQL schema of the tables, which `migrate` makes. Deployments that"
        " share a database each need one of their own.",
    )
    catalog: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("job_registry.catalog",),
        description="Modules and packages with job types, separated by commas:"
        " `job_registry.catalog,myapp.jobs`.",
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
        " JSON. Store what is larger in the assets, and put its name in the payload.",
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
        description="How long a lease lasts without a heartbeat. With a shorter one, a dead worker"
        " is noticed sooner; with one that is too short, a slow network looks like a dead worker,"
        " and jobs run twice.",
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
        description="How many jobs a worker process runs at once. Raise it for I/O-bound handlers."
        " CPU-bound handlers gain nothing and may time out.",
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
    max_page_size: int = Field(
        default=200,
        ge=50,
        le=1_000,
        description="The most jobs per page of `jobs`.",
    )
    max_bulk_size: int = Field(
        default=1_000,
        ge=1,
        le=10_000,
        description="The most jobs that one `enqueueJobs` stores.",
    )
    max_query_tokens: int = Field(
        default=2_000,
        ge=100,
        le=100_000,
        description="The most tokens per GraphQL document: names, numbers, strings and punctuation."
        " Values in variables do not count.",
    )
    max_query_depth: int = Field(
        default=15,
        ge=5,
        le=100,
        description="The most levels of fields per GraphQL operation, those of its fragments"
        " included. GraphiQL's introspection has 15.",
    )
    max_query_aliases: int = Field(
        default=30,
        ge=0,
        le=10_000,
        description="The most fields per GraphQL operation that have an alias or are repeated in"
        " the same place.",
    )
    max_query_directives: int = Field(
        default=30,
        ge=0,
        le=10_000,
        description="The most directives per GraphQL operation.",
    )
    rate_limit: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="How many requests a caller may send, `600/minute` or several such separated by"
        " commas: each subject of a token, or each address where there is none. Each process"
        " counts by itself. Not limited unless given.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins whose pages may call from a browser, separated by commas:"
        " `https://app.example.com`. Pages of other origins cannot.",
    )
    production: bool = Field(
        default=False,
        description="`true` switches the four settings below off, unless they are set themselves.",
    )
    introspection: bool = Field(
        default=None,
        validate_default=True,
        description="Whether clients can introspect the GraphQL schema, as GraphiQL and code"
        " generators do. `job-registry schema` prints it in any case.",
    )
    suggestions: bool = Field(
        default=None,
        validate_default=True,
        description="Whether the errors of a GraphQL document suggest names: `Did you mean ...?`.",
    )
    graphiql: bool = Field(
        default=None,
        validate_default=True,
        description="Whether GET /graphql shows GraphiQL to a browser.",
    )
    get_queries: bool = Field(
        default=None,
        validate_default=True,
        description="Whether GET accepts GraphQL queries. It never accepts mutations.",
    )
    auth_hs256_secret: str | None = Field(
        default=None,
        repr=False,
        description="The secret that bearer tokens are signed with by HS256, 32 bytes or more.",
    )
    auth_jwks: str | None = Field(
        default=None,
        validate_default=True,
        description="The public keys that bearer tokens are signed with by RS256, ES256 or EdDSA:"
        " an `https://` URL of a JSON Web Key Set, or a file with one, which is read at the start.",
    )
    auth_issuer: str | None = Field(
        default=None,
        validate_default=True,
        description="The `iss` that tokens must have. Required with a secret or keys.",
    )
    auth_audience: str | None = Field(
        default=None,
        validate_default=True,
        description="The `aud` that tokens must have. Required with a secret or keys.",
    )
    auth_leeway_seconds: float = Field(
        default=10.0,
        ge=0.0,
        le=300.0,
        description="How far the clock of the tokens' issuer may differ from this machine's.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address that `job-registry serve` listens on. Without authentication,"
        " loopback only.",
    )
    port: int = Field(
        default=8000,
        ge=0,
        le=65_535,
        description="Port that `job-registry serve` listens on. 0 picks a free port.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="The lowest level to log: `debug`, `info` (one line per event of a job),"
        " `warning` or `error`.",
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
        names = _items(value)
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"{name!r} is not a module name")
        if not names:
            raise ValueError("it names no module")
        return names

    @field_validator("database_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        if value.startswith(_SQLITE):
            file = value.partition(":///")[2]
            if not file or file.endswith(":memory:"):
                raise ValueError("a database in memory is gone with its connection; name a file")
            if "?" in file or file.startswith("file:"):
                raise ValueError("expected sqlite:///FILE, a path without options")
        elif not value.startswith(postgresql_url.SCHEMES):
            raise ValueError("expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
        else:
            postgresql_url.parse(value)
        return value

    @field_validator("database_pooler")
    @classmethod
    def _check_pooler(cls, value: str, info: ValidationInfo) -> str:
        url = info.data.get("database_url", "")
        if value == "transaction" and url.startswith(_SQLITE):
            raise ValueError("it is for PostgreSQL, and JOBS_DATABASE_URL names SQLite")
        if (
            value == "transaction"
            and url
            and "options" in postgresql_url.parse(url).server_settings
        ):
            raise ValueError(
                "PgBouncer refuses the option `options` of JOBS_DATABASE_URL (or PGOPTIONS);"
                " use ALTER ROLE ... SET instead"
            )
        return value

    @field_validator("database_schema")
    @classmethod
    def _check_schema(cls, value: str) -> str:
        if value.startswith("pg_"):
            raise ValueError("PostgreSQL keeps names that begin with pg_ to itself")
        return value

    @field_validator("database_listen_url")
    @classmethod
    def _check_listen_url(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            if info.data.get("database_url", "").startswith(_SQLITE):
                raise ValueError("it is for PostgreSQL, and JOBS_DATABASE_URL names SQLite")
            postgresql_url.parse(value)
        return value

    @field_validator("rate_limit", mode="before")
    @classmethod
    def _check_rates(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        rates = _items(value)
        for rate in rates:
            try:
                amount = limits.parse(rate).amount
            except ValueError:
                amount = 0
            if amount < 1:
                raise ValueError("expected a rate such as 600/minute or 20/second")
        return rates

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _check_origins(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        origins = _items(value)
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    "expected origins as browsers send them, https://app.example.com, in lower"
                    " case, without a path"
                )
        return origins

    @field_validator("introspection", "suggestions", "graphiql", "get_queries", mode="before")
    @classmethod
    def _unless_in_production(cls, value: object, info: ValidationInfo) -> object:
        return not info.data.get("production", False) if value is None else value

    @field_validator("auth_hs256_secret")
    @classmethod
    def _check_secret(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) < 32:
            # RFC 7518, section 3.2.
            raise ValueError("expected 32 bytes or more, such as `openssl rand -base64 32` gives")
        return value

    @field_validator("auth_jwks")
    @classmethod
    def _check_jwks(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return value
        if info.data.get("auth_hs256_secret") is not None:
            raise ValueError("JOBS_AUTH_HS256_SECRET is set too; tokens are checked with one")
        if re.match(r"[a-z]+://", value):
            host = urlsplit(value).hostname or ""
            if not value.startswith("https://") and not (
                value.startswith("http://") and _is_loopback(host)
            ):
                raise ValueError("expected a file, or a URL with https:// (http:// for loopback)")
            return value
        try:
            keys = json.loads(Path(value).read_text("utf-8"))["keys"]
        except OSError as error:
            raise ValueError(f"the file cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError):
            keys = None
        if not isinstance(keys, list):
            raise ValueError("the file is not a JSON Web Key Set")
        return value

    @field_validator("auth_issuer", "auth_audience")
    @classmethod
    def _check_claims(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value == "":
            raise ValueError("expected a text that is not empty")
        for name in ("auth_hs256_secret", "auth_jwks"):
            if value is None and info.data.get(name) is not None:
                raise ValueError(f"it is needed with {PREFIX}{name.upper()}")
        return value

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str, info: ValidationInfo) -> str:
        # What is wrong with a key is said where it stands.
        authenticated = any(
            name not in info.data or info.data[name] is not None
            for name in ("auth_hs256_secret", "auth_jwks")
        )
        if not _is_loopback(value) and not authenticated:
            raise ValueError(
                "without authentication only loopback (127.0.0.1, ::1, localhost) is served,"
                " because anyone who reaches the port may use the queue; set"
                " JOBS_AUTH_HS256_SECRET or JOBS_AUTH_JWKS, with JOBS_AUTH_ISSUER and"
                " JOBS_AUTH_AUDIENCE"
            )
        if not _is_loopback(value) and not _is_address(value):
            raise ValueError("expected an address, such as 0.0.0.0 or ::, or localhost")
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
            # Without the prefix, which would make every setting look alike.
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f" Did you mean {PREFIX}{near[0].upper()}?" if near else ""
            faults.append(f"{variable}: there is no such setting.{hint}")
    try:
        settings = _Given(**values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0])
            came = f"got {_shown(name, values[name])!r}" if name in values else "not set"
            faults.append(f"{PREFIX}{name.upper()}: {came}; {_expected(name, detail)}")
    if faults:
        raise SettingsInvalid(faults)
    return settings


def settings_table() -> str:
    """The settings as a Markdown table, as it stands in the README."""
    lines = ["| variable | default | range | meaning |", "| --- | --- | --- | --- |"]
    defaults = _Given()
    for name, field in Settings.model_fields.items():
        match default := getattr(defaults, name):
            case tuple():
                default = ",".join(default)
            case bool():
                default = str(default).lower()
            case float():
                default = f"{default:g}"
        shown = f"`{default}`" if default not in (None, "") else ""
        lines.append(
            f"| `{PREFIX}{name.upper()}` | {shown} | {_range(field)} | {field.description} |"
        )
    return "\n".join(lines)


class _Given(Settings):
    """Settings of the values that are handed in, so that only `load_settings` reads variables."""

    @classmethod
    def settings_customise_sources(cls, *_sources: Any, **named: Any) -> tuple[Any, ...]:
        """Takes the values of the call and nothing else."""
        return (named["init_settings"],)


_SQLITE: Final = ("sqlite:///", "sqlite+aiosqlite:///")

_URLS: Final = ("database_url", "database_listen_url")

_ORIGIN: Final = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")


def _expected(name: str, detail: ErrorDetails) -> str:
    """What a setting wants, from the fault Pydantic found in what came."""
    match detail["type"]:
        case "value_error":
            return str(detail["ctx"]["error"])
        case "literal_error":
            return f"expected {detail['ctx']['expected']}"
        case "string_too_short":
            return "expected a text that is not empty"
        case "bool_parsing" | "bool_type":
            return "expected true or false"
    field = Settings.model_fields[name]
    return f"expected a {'whole ' if field.annotation is int else ''}number from {_range(field)}"


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{each.ge if isinstance(each, Ge) else each.le:,.0f}"
        for each in field.metadata
        if isinstance(each, Ge | Le)
    ]
    return " to ".join(bounds)


def _items(value: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _shown(name: str, value: str) -> str:
    """What came, fit for a log: of a database's URL the scheme only. In one that is written wrong
    nobody can say which part is the password."""
    if name == "auth_hs256_secret" or (name == "auth_jwks" and "@" in value):
        return "..."
    if name in _URLS and not value.startswith(_SQLITE) and re.search("[:=@]", value):
        scheme = re.match(r"[a-z+]+://", value)
        return f"{scheme[0] if scheme else ''}..."
    return value[:200]
