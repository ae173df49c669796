"""Runs the migrations on the connection that `job_registry_api.queue.migrations` opens.

The scripts read the dialect of that connection and nothing else of Job Registry, so that a script
does not change when the code does.
"""

from __future__ import annotations

from alembic import context

from job_registry_api.queue.models import METADATA

given = context.config.attributes
connection = given["connection"]
context.configure(
    connection=connection,
    target_metadata=METADATA,
    version_table=given["version_table"],
    # Records the oldest revision whose code can use the result.
    on_version_apply=given["on_version_apply"],
)
with context.begin_transaction():
    context.run_migrations()
