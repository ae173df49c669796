"""Log lines of handlers, kept with their attempt.

On PostgreSQL, `job_succeed` stores them with the report. The functions are in `0008_job_logs.sql`.
"""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

additive = True


def upgrade() -> None:
    # As text: it is stored and returned, and no statement looks into it.
    op.add_column("job_attempt", sa.Column("logs", sa.Text))
    if op.get_bind().dialect.name == "postgresql":
        for function in _functions("0008_job_logs.sql"):
            op.execute(sa.DDL(function))


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION job_store_logs")
        op.execute("DROP FUNCTION job_succeed")
        for function in _functions("0007_quick_leases.sql"):
            if function.startswith("CREATE FUNCTION job_succeed("):
                op.execute(sa.DDL(function))
    op.drop_column("job_attempt", "logs")


def _functions(file: str) -> list[str]:
    text = Path(__file__).with_name(file).read_text("utf-8").replace("%", "%%")
    return re.split(r"^(?=CREATE (?:OR REPLACE )?FUNCTION )", text, flags=re.MULTILINE)[1:]
