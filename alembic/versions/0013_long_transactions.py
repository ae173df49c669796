"""Claims on PostgreSQL read little of what has run during a long transaction.

While a transaction is open, PostgreSQL keeps the index entries of all jobs that have run since its
begin. Claims then start where the last one took its jobs, and still read these entries:

- To find which priority has a due job, by a join whose plan depends on the statistics. With those
  of an idle queue, or none, it read all entries of a type. It reads one per priority now.
- To count the running jobs of a type with a concurrency limit, under the type's lock. The ends of
  their leases are in the index now, so that the count reads those of the last minute only.

What the functions return is as it was, so processes of earlier releases profit as well.
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

REPLACED: Final = ("CREATE FUNCTION job_next_level(", "CREATE FUNCTION job_running(")
"""The functions of `0013_long_transactions.sql`. Their former versions are those of 0002."""


def upgrade() -> None:
    op.drop_index("job_running", "job")
    if op.get_bind().dialect.name == "postgresql":
        for function in _functions("0013_long_transactions.sql"):
            op.execute(sa.DDL(function))
        return
    running = sa.text(RUNNING)
    op.create_index("job_lease_by_type", "job", ["type", "lease_expires_at"], sqlite_where=running)


def downgrade() -> None:
    op.execute("DROP INDEX IF EXISTS job_lease_by_type")
    running = sa.text(RUNNING)
    op.create_index("job_running", "job", ["type"], sqlite_where=running, postgresql_where=running)
    if op.get_bind().dialect.name != "postgresql":
        return
    for function in _functions("0002_claims.sql"):
        if function.startswith(REPLACED):
            op.execute(sa.DDL(function.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")))


def _functions(file: str) -> list[str]:
    """Return the statements that create functions in a file."""
    text = Path(__file__).with_name(file).read_text("utf-8").replace("%", "%%")
    return re.split(r"^(?=CREATE (?:OR REPLACE )?FUNCTION )", text, flags=re.MULTILINE)[1:]
