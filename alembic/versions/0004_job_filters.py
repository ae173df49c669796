"""Indexes for the jobs of one creator, and for the codes of errors."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

additive = True

# On PostgreSQL these are built after the migration's transaction, without a lock on the table. A
# lock would stop every enqueue while an index is built. Without these indexes, filters are slow.
concurrent_indexes: Final = {
    "job_by_creator": "job (created_by, id) WHERE created_by IS NOT NULL",
    "job_by_error_code": "job ((error ->> 'code'), id) WHERE error IS NOT NULL",
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        return
    named = sa.text("created_by IS NOT NULL")
    op.create_index("job_by_creator", "job", ["created_by", "id"], sqlite_where=named)
    failed = sa.text("error IS NOT NULL")
    code = sa.text("json_extract(error, '$.code')")
    op.create_index("job_by_error_code", "job", [code, "id"], sqlite_where=failed)


def downgrade() -> None:
    for name in concurrent_indexes:
        op.execute(f"DROP INDEX IF EXISTS {name}")
