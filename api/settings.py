"""All settings, read once from `JOBS_*` variables. The rest of the code gets values."""

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

from annotated_types import Ge, Le
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from job_registry.errors import shortened
from job_registry_api import defaults, postgresql_url
from job_registry_api.budget import RequestLimits

_REQUEST: Final = RequestLimits()

PREFIX: Final = "JOBS_"


class SettingsInvalid(Exception):
    """Raised when variables are wrong, or options of a command that override them.

    `faults` has one sentence per variable or option: its name, its value, and what was expected. No
    sentence contains the password of a database URL.
    """

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


class Settings(BaseSettings):
    """The settings. Each is read from a variable: `JOBS_` and the name of the field in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    database_url: str = Field(
        default="sqlite:///jobs.db",
        repr=False,  # It may hold a password.
        description="The database: `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/NAME`"
        " for more than one machine.",
    )
    database_pool_size: int = Field(
        default=defaults.POOL_SIZE,
        ge=2,
        le=200,
        description="The most database connections per process, beside the one that listens for"
        " notifications. PostgreSQL must allow the sum over all processes. If it is too low,"
        " requests wait for each other.",
    )
    database_timeout_seconds: float = Field(
        default=defaults.TIMEOUT_SECONDS,
        ge=1.0,
        le=300.0,
        description="How long an operation waits for the database: for a connection, a lock and"
        " the answer together. After that it fails as `queue_unavailable`.",
    )
    database_pooler: Literal["session", "transaction"] = Field(
        default="session",
        description="`transaction` if the URL leads through PgBouncer, in its mode `transaction` or"
        " `session`. `session` otherwise.",
    )
    database_listen_url: str | None = Field(
        default=None,
        repr=False,  # It may hold a password.
        description="A URL that bypasses PgBouncer, for notifications (LISTEN). Without it, behind"
        " a `transaction` pooler, the events of other processes are polled twice per second.",
    )
    database_schema: str = Field(
        default=defaults.SCHEMA,
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="The PostgreSQL schema of the tables, which `migrate` creates. Deployments that"
        " share a database each need their own schema.",
    )
    catalog: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("job_registry.catalog",),
        description="Modules and packages with job types, separated by commas:"
        " `job_registry.catalog,myapp.jobs`.",
    )
    assets: str = Field(
        default=defaults.ASSETS,
        min_length=1,
        description="Where jobs read and write files: a folder, or the fsspec URL of a bucket,"
        " such as `s3://bucket/assets`, `gs://bucket/assets` or `az://container/assets`.",
    )
    max_upload_bytes: int = Field(
        default=33_554_432,
        ge=0,
        le=1_073_741_824,
        description="The largest picture that `POST /assets/{assetId}/{versionNumber}` takes into"
        " the assets, in bytes. 0 switches uploads off. `thumbnail.create` reads up to 33,554,432.",
    )
    max_payload_bytes: int = Field(
        default=262_144,
        ge=1_024,
        le=67_108_864,
        description="The largest payload, result or progress report, in bytes of compact JSON."
        " Store larger data in the assets, and put its name into the payload.",
    )
    max_body_bytes: int = Field(
        default=_REQUEST.body_bytes,
        ge=1_024,
        le=1_073_741_824,
        description="The largest request, in bytes. A bulk enqueue has to fit.",
    )
    max_request_values: int = Field(
        default=_REQUEST.values,
        ge=1_000,
        le=10_000_000,
        description="The most JSON values per request: numbers, strings, objects and so on. A value"
        " in memory takes up to 250 bytes. Arguments that share a variable count each for itself.",
    )
    max_answer_bytes: int = Field(
        default=_REQUEST.answer_bytes,
        ge=65_536,
        le=1_073_741_824,
        description="The most bytes of payloads, results and other large values per answer. A page"
        " of `jobs` stops early before it exceeds them; its cursor leads to the next page.",
    )
    max_answer_fields: int = Field(
        default=_REQUEST.answer_fields,
        ge=1_000,
        le=10_000_000,
        description="The most fields of objects per GraphQL answer: the jobs of a page times the"
        " fields that are selected of each, and ten for the job itself. A page of `jobs` stops"
        " early before it exceeds them.",
    )
    lease_seconds: float = Field(
        default=defaults.LEASE_SECONDS,
        ge=1.0,
        le=3_600.0,
        description="How long a lease lasts without a heartbeat. With a shorter lease, a dead"
        " worker is noticed sooner. If it is too short, a slow network looks like a dead worker,"
        " and jobs run twice.",
    )
    shutdown_seconds: float = Field(
        default=defaults.SHUTDOWN_SECONDS,
        ge=0.0,
        le=3_600.0,
        description="How long running jobs may run on after SIGTERM before they are released. The"
        " process manager must wait 15 seconds longer before it sends SIGKILL.",
    )
    worker_concurrency: int = Field(
        default=defaults.WORKER_CONCURRENCY,
        ge=1,
        le=1_000,
        description="How many jobs a worker runs at once. Raise it for I/O-bound handlers."
        " CPU-bound handlers gain nothing and may time out.",
    )
    keep_succeeded_days: float = Field(
        default=defaults.KEEP_SUCCEEDED_DAYS,
        ge=0.0,
        le=36_500.0,
        description="Days until a succeeded job is deleted. Its idempotency key is then free.",
    )
    keep_failed_days: float = Field(
        default=defaults.KEEP_FAILED_DAYS,
        ge=0.0,
        le=36_500.0,
        description="Days until a failed or cancelled job is deleted, with its attempts.",
    )
    keep_log_lines: int = Field(
        default=defaults.KEEP_LOG_LINES,
        ge=0,
        le=1_000,
        description="How many log lines of an attempt are kept with its job, the last ones. 0 keeps"
        " none.",
    )
    parked_days: float = Field(
        default=defaults.PARKED_DAYS,
        ge=0.0,
        le=36_500.0,
        description="Days until a job that no worker can read fails as `payload_invalid`, counted"
        " from the last time a worker refused it.",
    )
    max_page_size: int = Field(
        default=defaults.MAX_PAGE_SIZE,
        ge=50,
        le=1_000,
        description="The most jobs per page of `jobs`.",
    )
    max_bulk_size: int = Field(
        default=defaults.MAX_BULK_SIZE,
        ge=1,
        le=10_000,
        description="The most jobs per `enqueueJobs`.",
    )
    max_query_tokens: int = Field(
        default=2_000,
        ge=100,
        le=100_000,
        description="The most tokens per GraphQL document: names, numbers, strings and punctuation."
        " It may have 25 characters per token. Values in variables do not count.",
    )
    max_query_depth: int = Field(
        default=15,
        ge=5,
        le=100,
        description="The most levels of fields per GraphQL operation, including its fragments."
        " GraphiQL's introspection has 15.",
    )
    max_query_aliases: int = Field(
        default=30,
        ge=0,
        le=10_000,
        description="The most fields per GraphQL operation that have an alias or occur again in the"
        " same place.",
    )
    max_query_directives: int = Field(
        default=30,
        ge=0,
        le=10_000,
        description="The most directives per GraphQL operation.",
    )
    rate_limit: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="The most requests per subject of a token, or per address without tokens:"
        " `600/minute`, or several limits separated by commas. Each process counts separately."
        " Not limited by default.",
    )
    max_connections: int = Field(
        default=1_000,
        ge=16,
        le=100_000,
        description="The most connections per process, WebSockets included. Above it, a new"
        " connection ends the oldest one that waits for a request; if none waits, only `/healthz`,"
        " `/readyz` and `/metrics` are served.",
    )
    header_timeout_seconds: float = Field(
        default=10.0,
        ge=1.0,
        le=300.0,
        description="How long a client may take to send the headers of a request.",
    )
    body_timeout_seconds: float = Field(
        default=60.0,
        ge=1.0,
        le=3_600.0,
        description="How long a client may take to send the body of a request, or one WebSocket"
        " message.",
    )
    idle_timeout_seconds: float = Field(
        default=75.0,
        ge=1.0,
        le=3_600.0,
        description="How long a connection may wait for its next request. A proxy in front must"
        " close its idle connections sooner.",
    )
    unread_timeout_seconds: float = Field(
        default=30.0,
        ge=1.0,
        le=3_600.0,
        description="How long a client may leave an answer unread. It has to read 256 KB within"
        " this time, or all that is left.",
    )
    max_websocket_operations: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="The most operations that one WebSocket runs at once, subscriptions included.",
    )
    root_path: str = Field(
        default="",
        description="The path under which a proxy publishes the server, such as `/queue`, whether"
        " it strips it from requests or not.",
    )
    proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Addresses or networks of the proxies in front, separated by commas. Only from"
        " these are `X-Forwarded-For` and `X-Forwarded-Proto` taken as the client's address and"
        " scheme.",
    )
    compress_bytes: int | None = Field(
        default=None,
        ge=500,
        le=1_073_741_824,
        description="Answers of this size and more are compressed with Brotli or gzip for clients"
        " that take it. Not compressed by default: a proxy usually does it.",
    )
    federation: bool = Field(
        default=False,
        description="Whether the GraphQL schema is served as a subgraph of Apollo Federation:"
        " `_entities` returns jobs by their ids, and `_service` returns the schema to every caller"
        " with a scope, even if introspection is off.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins whose pages may send requests from a browser, separated by commas:"
        " `https://app.example.com`.",
    )
    cors_headers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=defaults.CORS_HEADERS,
        description="Request headers that pages of these origins may send.",
    )
    production: bool = Field(
        default=False,
        description="`true` changes the default of the four settings below to `false`.",
    )
    introspection: bool = Field(
        default=None,
        validate_default=True,
        description="Whether clients can introspect the GraphQL schema, as GraphiQL and code"
        " generators do, and get `/openapi.json`. `job-registry schema` prints both in any case.",
    )
    suggestions: bool = Field(
        default=None,
        validate_default=True,
        description="Whether errors suggest names of fields, job types and values:"
        " `Did you mean ...?`.",
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
    persisted_queries: bool = Field(
        default=True,
        description="Whether clients may register documents by their hash, and send the hash from"
        " then on (automatic persisted queries). Each process keeps 8 MB of them.",
    )
    trusted_documents: str | None = Field(
        default=None,
        description="A file with the only documents that clients may execute:"
        " a manifest of GraphQL Code Generator, Relay or Apollo. It is read at the start.",
    )
    auth_hs256_secret: str | None = Field(
        default=None,
        repr=False,
        description="The secret of bearer tokens signed with HS256, 32 bytes or more.",
    )
    auth_jwks: str | None = Field(
        default=None,
        validate_default=True,
        description="The public keys of bearer tokens signed with RS256, ES256 or EdDSA: the"
        " `https://` URL of a JSON Web Key Set, or a file with one, which is read at the start.",
    )
    auth_issuer: str | None = Field(
        default=None,
        validate_default=True,
        description="The required `iss` of tokens. Must be set with a secret or keys.",
    )
    auth_audience: str | None = Field(
        default=None,
        validate_default=True,
        description="The required `aud` of tokens. Must be set with a secret or keys.",
    )
    auth_leeway_seconds: float = Field(
        default=10.0,
        ge=0.0,
        le=300.0,
        description="How far the clock of the issuer of tokens may differ from this machine's.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address that `job-registry serve` listens on. Without authentication, only"
        " loopback is allowed.",
    )
    port: int = Field(
        default=8000,
        ge=0,
        le=65_535,
        description="Port that `job-registry serve` listens on. 0 picks a free port.",
    )
    serve_processes: int = Field(
        default=1,
        ge=1,
        le=128,
        description="How many processes `job-registry serve` serves from, on one port. With more"
        " than 1, the worker runs in one more process. The other settings are per process.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="The lowest level to log: `debug`, `info` (one line per event of a job),"
        " `warning` or `error`.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="`json`, one object per line; `console`, for people; `auto`, which is `console`"
        " on a terminal and `json` elsewhere.",
    )

    @field_validator("catalog", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        names = _items(value)
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"expected module names separated by commas; {name} is not one")
        if not names:
            raise ValueError("expected at least one module")
        return names

    @field_validator("database_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        check_database_url(value)
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
            raise ValueError(
                "expected a name that does not start with pg_, which PostgreSQL reserves"
            )
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
        # Imported only where there is a limit: each command reads the settings at its start.
        from limits import parse_many

        rates = _items(value)
        for rate in rates:
            try:
                parsed = parse_many(rate)
            except ValueError:
                parsed = []
            if len(parsed) > 1:
                raise ValueError("expected rates such as 600/minute, separated by commas")
            if not parsed or parsed[0].amount < 1:
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
        return tuple(map(_without_default_port, origins))

    @field_validator("cors_headers", mode="before")
    @classmethod
    def _check_header_names(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        names = tuple(name.lower() for name in _items(value))
        for name in names:
            if not _HEADER.fullmatch(name):
                raise ValueError(
                    f"expected names of headers separated by commas; {shortened(name)} is not one"
                )
        return names

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, value: str) -> str:
        if value and not _PREFIX.fullmatch(value):
            raise ValueError("expected a path such as /queue, without a slash at its end")
        return value

    @field_validator("proxies", mode="before")
    @classmethod
    def _check_proxies(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        proxies = _items(value)
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise ValueError(
                    "expected addresses or networks, such as 10.0.0.0/8, separated by commas;"
                    f" {shortened(proxy)} is not one"
                ) from None
        return proxies

    @field_validator("introspection", "suggestions", "graphiql", "get_queries", mode="before")
    @classmethod
    def _unless_in_production(cls, value: object, info: ValidationInfo) -> object:
        return not info.data.get("production", False) if value is None else value

    @field_validator("auth_hs256_secret")
    @classmethod
    def _check_secret(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) < 32:
            # RFC 7518, section 3.2.
            raise ValueError(
                "expected 32 bytes or more, for example from `openssl rand -base64 32`"
            )
        return value

    @field_validator("auth_jwks")
    @classmethod
    def _check_jwks(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return value
        if info.data.get("auth_hs256_secret") is not None:
            raise ValueError("JOBS_AUTH_HS256_SECRET is set too; set one of the two")
        if re.match(r"[A-Za-z]+://", value):
            if not _is_url_of_keys(value):
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
        # A faulty key has its own message.
        authenticated = any(
            name not in info.data or info.data[name] is not None
            for name in ("auth_hs256_secret", "auth_jwks")
        )
        if not _is_loopback(value) and not authenticated:
            raise ValueError(
                "without authentication only loopback (127.0.0.1, ::1, localhost) is allowed,"
                " because anyone who reaches the port may use the queue; set"
                " JOBS_AUTH_HS256_SECRET or JOBS_AUTH_JWKS, with JOBS_AUTH_ISSUER and"
                " JOBS_AUTH_AUDIENCE"
            )
        if not _is_loopback(value) and not _is_address(value):
            raise ValueError("expected an address, such as 0.0.0.0 or ::, or localhost")
        return value


def load_settings(
    environment: Mapping[str, str] | None = None, *, options: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings from the environment, by default that of the process.

    `options` has the options of a command that settings were given by, which errors then name.

    Raises:
        SettingsInvalid: a `JOBS_` variable is wrong or unknown. It names all of them.
    """
    options = options or {}
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
            # Without the prefix, which would make all names similar.
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f" Did you mean {PREFIX}{near[0].upper()}?" if near else ""
            faults.append(f"{variable}: there is no such setting.{hint}")
    try:
        settings = _Given(**values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0])
            came = (
                f"got {shortened(_shown(name, values[name]), 202)}" if name in values else "not set"
            )
            source = options.get(name, f"{PREFIX}{name.upper()}")
            faults.append(f"{source}: {came}; {_expected(name, detail)}")
    if faults:
        raise SettingsInvalid(faults)
    return settings


def check_database_url(url: str) -> None:
    """Check that a URL names a SQLite file or a PostgreSQL database.

    Raises:
        ValueError: it does not. The message does not contain the URL, which may have a password.
    """
    if url.startswith(_SQLITE):
        file = url.partition(":///")[2]
        if not file or file.endswith(":memory:"):
            raise ValueError("expected a file; a database in memory ends with its connection")
        if "?" in file or file.startswith("file:"):
            raise ValueError("expected sqlite:///FILE, a path without options")
    elif not url.startswith(postgresql_url.SCHEMES):
        raise ValueError("expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
    else:
        postgresql_url.parse(url)


def check_database(url: str, *, pooler: str, schema: str, listen_url: str | None) -> None:
    """Check the arguments that name a database, by the rules of the settings.

    Raises:
        ValueError: one is wrong. The message does not contain a URL, which may have a password.
    """
    given: dict[str, Any] = {
        "database_url": url,
        "database_pooler": pooler,
        "database_schema": schema,
        "database_listen_url": listen_url,
    }
    try:
        _Given(**given)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = str(detail["loc"][0])
        expected = _expected(name, detail).replace(f"{PREFIX}DATABASE_URL", "the URL")
        if name == "database_url":
            raise ValueError(f"the URL of the database is wrong: {expected}") from None
        shown = shortened(_shown(name, str(given[name])), 202)
        argument = name.removeprefix("database_")
        raise ValueError(f"{argument}: got {shown}; {expected}") from None


def settings_table() -> str:
    """Return the settings as the Markdown table of docs/settings.md."""
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
    """Settings from arguments only, so that only `load_settings` reads variables."""

    @classmethod
    def settings_customise_sources(cls, *_sources: Any, **named: Any) -> tuple[Any, ...]:
        """Use only the arguments."""
        return (named["init_settings"],)


_SQLITE: Final = ("sqlite:///", "sqlite+aiosqlite:///")

_URLS: Final = ("database_url", "database_listen_url")

_HEADER: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}")
_PREFIX: Final = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_ORIGIN: Final = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")


def _expected(name: str, detail: ErrorDetails) -> str:
    """Describe what a setting expects, from the fault that Pydantic found."""
    match detail["type"]:
        case "value_error":
            return str(detail["ctx"]["error"])
        case "literal_error":
            return f"expected {detail['ctx']['expected']}".replace("'", '"')
        case "string_too_short":
            return "expected a text that is not empty"
        case "string_pattern_mismatch":
            return (
                "expected 1 to 63 lower-case letters, digits and underscores, the first not a digit"
            )
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


def _without_default_port(origin: str) -> str:
    """Return an origin as browsers send it (RFC 6454, section 6.2)."""
    return origin.removesuffix(":443" if origin.startswith("https://") else ":80")


def _items(value: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _is_url_of_keys(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, is_whole = parts.hostname or "", bool(parts.hostname) and parts.port != 0
    except ValueError:  # Of the host or of the port.
        return False
    is_safe = text.startswith("https://") or (text.startswith("http://") and _is_loopback(host))
    return is_whole and is_safe and text.isascii() and text.isprintable() and " " not in text


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _shown(name: str, value: str) -> str:
    """Return a value without secrets. Of a database URL only the scheme is shown, because in a
    malformed URL any part may be the password."""
    if name == "auth_hs256_secret" or (name == "auth_jwks" and "@" in value):
        return "..."
    if name in _URLS and not value.startswith(_SQLITE) and re.search("[:=@]", value):
        scheme = re.match(r"[a-z+]+://", value)
        return f"{scheme[0] if scheme else ''}..."
    return value[:200]
