"""Claims, reports and renewals as single statements; places of timed-out attempts.

PostgreSQL's functions are in `0002_claims.sql`.
"""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Claims of the previous release take other locks. Run together, they exceed concurrency limits.
additive = False

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    # How long the lease lasts without a heartbeat, and until when its worker counts as alive.
    # Unlike `lease_expires_at`, `held_until` is not bounded by the attempt's deadline.
    op.add_column("job", sa.Column("lease_seconds", sa.Double))
    op.add_column("job", sa.Column("held_until", TIME))
    # How many attempts ended unspent, and how many in a row were given back within seconds.
    op.add_column("job", sa.Column("returns", sa.Integer, nullable=False, server_default="0"))
    op.add_column("job", sa.Column("quick_returns", sa.Integer, nullable=False, server_default="0"))
    # Until when a timed-out attempt, whose handler may still run, keeps its place in the type's
    # concurrency limit, and the token of its lease.
    op.add_column("job_attempt", sa.Column("held_until", TIME))
    op.add_column("job_attempt", sa.Column("lease_token", sa.Text))
    held = sa.text("held_until IS NOT NULL AND finished_at IS NOT NULL")
    op.create_index(
        "job_attempt_held",
        "job_attempt",
        ["held_until"],
        sqlite_where=held,
        postgresql_where=held,
    )
    op.create_index("job_by_type_and_status", "job", ["type", "status", "id"])
    if op.get_bind().dialect.name == "postgresql":
        for function in _functions():
            op.execute(sa.DDL(function.replace("%", "%%")))
        # The triggers run in statements of clients, which may have another search path.
        for what in ("inserted", "updated", "deleted"):
            op.execute(f"ALTER FUNCTION job_count_{what}() SET search_path FROM CURRENT")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for function in reversed(_functions()):
            name = function.removeprefix("CREATE FUNCTION ").partition("(")[0]
            op.execute(f"DROP FUNCTION {name}")
    op.drop_index("job_by_type_and_status", "job")
    op.drop_index("job_attempt_held", "job_attempt")
    for table, columns in (
        ("job_attempt", ("lease_token", "held_until")),
        ("job", ("quick_returns", "returns", "held_until", "lease_seconds")),
    ):
        for column in columns:
            op.drop_column(table, column)


def _functions() -> list[str]:
    text = Path(__file__).with_suffix(".sql").read_text("utf-8")
    return re.split(r"^(?=CREATE FUNCTION )", text, flags=re.MULTILINE)[1:]
