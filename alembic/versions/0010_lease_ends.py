"""Claims on PostgreSQL find ended leases by their times, whatever the statistics say.

`job_claim` of 0007 asks `job_recoverable`, which is in `0010_lease_ends.sql`, instead of a query
whose plan depends on the statistics. What it does is as it was, so that processes of the previous
release go on working.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

additive = True

BEFORE: Final = """
    IF EXISTS (
        SELECT 1 FROM job WHERE job.status = 'running' AND job.lease_expires_at <= now
          AND job.lease_expires_at >=
              coalesce(now - make_interval(secs => look_back), '-infinity')
    ) OR EXISTS (
        SELECT 1 FROM job WHERE job.status = 'running'
          AND job.lease_expires_at > now + make_interval(secs => lease + 1)
    ) THEN
"""
AFTER: Final = """
    IF job_recoverable(now, look_back, lease) THEN
"""

SORTED: Final = (
    "job_recover(text, boolean, integer, double precision, double precision, text, text)",
    "job_next_due(jsonb)",
)
"""The other functions that read leases in the order of their ends."""


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute(sa.DDL(_text("0010_lease_ends.sql")))
    claim = _claim()
    if BEFORE not in claim:
        raise ValueError("job_claim of 0007 has changed")
    op.execute(sa.DDL(claim.replace(BEFORE, AFTER)))
    for function in SORTED:
        op.execute(f"ALTER FUNCTION {function} SET enable_sort = off")


def downgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for function in SORTED:
        op.execute(f"ALTER FUNCTION {function} RESET enable_sort")
    op.execute(sa.DDL(_claim()))
    op.execute("DROP FUNCTION job_recoverable")


def _claim() -> str:
    functions = re.split(
        r"^(?=CREATE (?:OR REPLACE )?FUNCTION )", _text("0007_quick_leases.sql"), flags=re.MULTILINE
    )
    (claim,) = [
        each for each in functions if each.startswith("CREATE OR REPLACE FUNCTION job_claim(")
    ]
    return claim


def _text(file: str) -> str:
    return Path(__file__).with_name(file).read_text("utf-8").replace("%", "%%")
