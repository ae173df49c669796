"""Reads the variables of OpenTelemetry that configure tracing, without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, TextIO
from urllib.parse import urlsplit

from job_registry.errors import shortened
from job_registry_api.settings import SettingsInvalid

if TYPE_CHECKING:
    from job_registry_api.tracing import Tracing

EXPORTERS: Final = "OTEL_TRACES_EXPORTER"
ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

EXTRA: Final = "job-registry[otel]"


def configured_tracing(
    environment: Mapping[str, str], *, console: TextIO | None = None
) -> Tracing | None:
    """Return the tracing that these variables configure; None if they configure none.

    The exporter `console` prints on `console`, which defaults to standard output.

    Raises:
        SettingsInvalid: a variable is wrong, or the packages for tracing are not installed.
    """
    exporters = traces_exporters(environment)
    if not exporters:
        return None
    because = next(each for each in (EXPORTERS, *ENDPOINTS) if environment.get(each))
    try:
        from job_registry_api.tracing import ExportedTracing

        return ExportedTracing(exporters, console=console)
    except ImportError:
        message = f"{because}: tracing needs packages that are not installed: {EXTRA}"
        raise SettingsInvalid([message]) from None
    except ValueError as error:
        raise SettingsInvalid([f"OTEL_*: the SDK of OpenTelemetry refuses them: {error}"]) from None


def traces_exporters(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the exporters that these variables configure: `otlp`, `console`.

    Raises:
        SettingsInvalid: a variable is wrong.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    is_given = any(environment.get(name) for name in ENDPOINTS)
    named = environment.get(EXPORTERS) or ("otlp" if is_given else "none")
    names = [name.strip() for name in named.split(",")]
    exporters = list(dict.fromkeys(name for name in names if name != "none"))
    faults = []
    if unknown := [name for name in exporters if name not in ("otlp", "console")]:
        faults.append(f"{EXPORTERS}: got {shortened(unknown[0])}; expected otlp, console or none")
    if "otlp" in exporters:
        faults += _faults_of_otlp(environment)
    if faults:
        raise SettingsInvalid(faults)
    return exporters


def _faults_of_otlp(environment: Mapping[str, str]) -> list[str]:
    faults = []
    # The one for traces comes before the one for everything.
    protocol = next((name for name in PROTOCOLS if environment.get(name)), None)
    if protocol and (got := environment[protocol].strip()) != "http/protobuf":
        faults.append(f"{protocol}: got {shortened(got)}; spans are sent by http/protobuf alone")
    endpoint = next((name for name in ENDPOINTS if environment.get(name)), None)
    if endpoint and not _is_url(environment[endpoint]):
        # Its value may have a password.
        faults.append(f"{endpoint}: expected a URL, such as http://localhost:4318")
    return faults


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
