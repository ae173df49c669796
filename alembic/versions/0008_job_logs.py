"""Log lines of handlers, kept with their attempt.

The function is in `0008_job_logs.sql`.
"""

from __future__ import annotations

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
        function = Path(__file__).with_name("0008_job_logs.sql").read_text("utf-8")
        op.execute(sa.DDL(function.replace("%", "%%")))


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION job_store_logs")
    op.drop_column("job_attempt", "logs")
