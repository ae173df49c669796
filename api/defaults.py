"""Default values, shared by the settings and what they configure. It imports nothing."""

from __future__ import annotations

from typing import Final

ASSETS: Final = "assets"
CORS_HEADERS: Final = (
    "authorization",
    "content-type",
    "accept",
    "last-event-id",
    # Apollo Client, and graphql-request with Apollo's conventions
    "apollo-require-preflight",
    "apollographql-client-name",
    "apollographql-client-version",
    "x-apollo-operation-id",
    "x-apollo-operation-name",
    "x-apollo-operation-type",
    # urql, Relay and other clients
    "graphql-preflight",
    "x-requested-with",
    # Traces: W3C Trace Context and Baggage, B3, Sentry
    "traceparent",
    "tracestate",
    "baggage",
    "b3",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-spanid",
    "x-b3-traceid",
    "sentry-trace",
    "x-request-id",
)
"""What clients of GraphQL and OpenTelemetry send from a browser beside the simple headers."""

KEEP_FAILED_DAYS: Final = 90.0
KEEP_LOG_LINES: Final = 100
KEEP_SUCCEEDED_DAYS: Final = 7.0
LEASE_SECONDS: Final = 30.0
LOCK_FILE: Final = "registry.lock.json"
MAX_BULK_SIZE: Final = 1_000
MAX_PAGE_SIZE: Final = 200
PARKED_DAYS: Final = 7.0
POOL_SIZE: Final = 10
SCHEMA: Final = "job_registry"
SHUTDOWN_SECONDS: Final = 20.0
TIMEOUT_SECONDS: Final = 10.0
WORKER_CONCURRENCY: Final = 8
