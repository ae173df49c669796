"""The span that enqueued a job, so that its attempts belong to the same trace.

A column without a default: no row is written. `job_insert` of 0005, which `0012_traceparent.sql`
replaces, stores what the processes of the previous release do not send as null.
"""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

additive = True


def upgrade() -> None:
    op.add_column("job", sa.Column("traceparent", sa.Text))
    if op.get_bind().dialect.name == "postgresql":
        op.execute(sa.DDL(_job_insert("0012_traceparent.sql")))


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(sa.DDL(_job_insert("0005_quick_writes.sql")))
    op.drop_column("job", "traceparent")


def _job_insert(file: str) -> str:
    text = Path(__file__).with_name(file).read_text("utf-8").replace("%", "%%")
    functions = re.split(r"^(?=CREATE (?:OR REPLACE )?FUNCTION )", text, flags=re.MULTILINE)
    (found,) = [
        each for each in functions if each.startswith("CREATE OR REPLACE FUNCTION job_insert(")
    ]
    return found
