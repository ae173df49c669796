"""Claims on PostgreSQL read the jobs of a type in their order, whatever the statistics say.

Two indexes have the queued jobs of a type, and one of them in the order of claims. Where the
statistics are those of an idle queue, or there are none yet, the planner expects one job, and then
the smaller index costs less, although its jobs have to be sorted: each claim read and sorted the
whole queue, until the next ANALYZE. Without sorts, only the index in order is left, as for the
functions of 0010. No definition changes, so processes of earlier releases profit as well.
"""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

additive = True

IN_ORDER: Final = (
    "job_claim(jsonb, integer, text, double precision, text, boolean, double precision, text,"
    " text)",
    "job_waiting(jsonb, integer)",
    "job_fail_parked(double precision, integer, text, boolean)",
)
"""The functions that read the first jobs of an index in its order."""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for function in IN_ORDER:
            op.execute(f"ALTER FUNCTION {function} SET enable_sort = off")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for function in IN_ORDER:
            op.execute(f"ALTER FUNCTION {function} RESET enable_sort")
