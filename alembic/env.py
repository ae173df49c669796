"""Runs the migrations on the connection that `job_registry_api.queue.migrations` opens."""

from __future__ import annotations

from alembic import context

from job_registry_api.queue.models import METADATA

given = context.config.attributes
connection = given["connection"]
context.configure(
    connection=connection,
    target_metadata=METADATA,
    render_as_batch=connection.dialect.name == "sqlite",
    version_table=given["version_table"],
    # Records the oldest revision whose code can use the result.
    on_version_apply=given["on_version_apply"],
)
with context.begin_transaction():
    context.run_migrations()
