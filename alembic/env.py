"""Runs the migrations on the connection that `api.queue.migrations` hands over."""

from __future__ import annotations

from alembic import context
from sqlmodel import SQLModel

import api.queue.models  # noqa: F401  (its tables are what autogenerate compares with)

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    # Other tables of the user's database may have migrations of their own.
    version_table="job_registry_version",
)
with context.begin_transaction():
    context.run_migrations()
