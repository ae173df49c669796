"""Count the running jobs of a type by the ends of their leases.

On PostgreSQL, a transaction that is open for long keeps the index entries of all jobs that have run
since its begin. Each claim of a type with a concurrency limit read those of the type, under the
type's lock: 30,000 of them take 20 ms. The ends of their leases are in the index now, so that the
count passes over those of the last minute only.

While processes of the release before run, they count in this way too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

additive = True

RUNNING: Final = "status = 'running'"

# Built after the migration's transaction: see 0004. Until then a count reads more.
concurrent_indexes: Final = {
    "job_lease_by_type": f"job (type, lease_expires_at) WHERE {RUNNING}",
}


def upgrade() -> None:
    op.drop_index("job_running", "job")
    if op.get_bind().dialect.name == "postgresql":
        op.execute(sa.DDL(_text("0013_running_in_range.sql")))
        return
    running = sa.text(RUNNING)
    op.create_index("job_lease_by_type", "job", ["type", "lease_expires_at"], sqlite_where=running)


def downgrade() -> None:
    op.execute("DROP INDEX IF EXISTS job_lease_by_type")
    running = sa.text(RUNNING)
    op.create_index("job_running", "job", ["type"], sqlite_where=running, postgresql_where=running)
    if op.get_bind().dialect.name == "postgresql":
        (count,) = re.findall(
            r"^CREATE (FUNCTION job_running\(.*?^END \$\$;)",
            _text("0002_claims.sql"),
            flags=re.MULTILINE | re.DOTALL,
        )
        op.execute(sa.DDL(f"CREATE OR REPLACE {count}"))


def _text(file: str) -> str:
    return Path(__file__).with_name(file).read_text("utf-8").replace("%", "%%")
