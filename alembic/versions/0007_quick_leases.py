"""Quicker claims, and reports of success by a function of their own, on PostgreSQL.

What they do is as it was, so that processes of the previous release go on working. The functions
are in `0007_quick_leases.sql`.
"""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

additive = True


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for function in _functions("0007_quick_leases.sql"):
            op.execute(sa.DDL(function.replace("%", "%%")))


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION job_succeed")
        op.execute("DROP FUNCTION job_forget_attempts")
        for function in _functions("0003_evolution.sql"):
            if _name(function) == "job_claim":
                op.execute(sa.DDL(function.replace("%", "%%")))


def _functions(file: str) -> list[str]:
    text = Path(__file__).with_name(file).read_text("utf-8")
    return re.split(r"^(?=CREATE (?:OR REPLACE )?FUNCTION )", text, flags=re.MULTILINE)[1:]


def _name(function: str) -> str:
    return function.partition("FUNCTION ")[2].partition("(")[0]
