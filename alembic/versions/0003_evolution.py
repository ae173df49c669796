"""Parked jobs, and the versions of job types that workers have.

The table `job` is unchanged, so that processes of the previous release continue to work.
PostgreSQL's functions are in `0003_evolution.sql`.
"""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

additive = True

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)

PARKED = sa.text("parked_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "job_parked",
        sa.Column("job_id", sa.Uuid, sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("due_at", TIME, nullable=False),
        sa.Column("parked_at", TIME),
        sa.Column("refused_by", sa.Text, nullable=False),
        sa.Column("error", JSON),
    )
    op.create_index(
        "job_parked_claim",
        "job_parked",
        ["type", "refused_by", sa.text("priority DESC"), "due_at", "job_id"],
        sqlite_where=PARKED,
        postgresql_where=PARKED,
    )
    op.create_index(
        "job_parked_since",
        "job_parked",
        ["parked_at"],
        sqlite_where=PARKED,
        postgresql_where=PARKED,
    )
    op.create_table(
        "job_type_version",
        sa.Column("type", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, primary_key=True),
        sa.Column("worker_seen_at", TIME, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        for function in _functions("0003_evolution.sql"):
            op.execute(sa.DDL(function.replace("%", "%%")))
        op.execute("""
            CREATE TRIGGER job_leave_parked AFTER UPDATE OF next_run_at ON job FOR EACH ROW
            WHEN (OLD.next_run_at = '9999-01-01 00:00:00+00'
                AND NEW.next_run_at IS DISTINCT FROM OLD.next_run_at)
            EXECUTE FUNCTION job_leave_parked()""")
    else:
        op.execute("""
            CREATE TRIGGER job_leave_parked AFTER UPDATE OF next_run_at ON job
            WHEN OLD.next_run_at = '9999-01-01 00:00:00.000000'
                AND NEW.next_run_at IS NOT OLD.next_run_at
            BEGIN UPDATE job_parked SET parked_at = NULL WHERE job_id = NEW.id; END""")


def downgrade() -> None:
    # The previous release does not know parked jobs, so they become due again.
    op.execute("""
        UPDATE job SET next_run_at =
            (SELECT due_at FROM job_parked WHERE job_parked.job_id = job.id)
        WHERE status = 'queued' AND id IN (
            SELECT job_id FROM job_parked WHERE parked_at IS NOT NULL)""")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER job_leave_parked ON job")
        for function in reversed(_functions("0003_evolution.sql")):
            if function.startswith("CREATE FUNCTION "):
                op.execute(f"DROP FUNCTION {_name(function)}")
        for function in _functions("0002_claims.sql"):
            if _name(function) == "job_claim":
                again = function.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1)
                op.execute(sa.DDL(again.replace("%", "%%")))
    else:
        op.execute("DROP TRIGGER job_leave_parked")
    op.drop_table("job_type_version")
    op.drop_table("job_parked")


def _functions(file: str) -> list[str]:
    text = Path(__file__).with_name(file).read_text("utf-8")
    return re.split(r"^(?=CREATE (?:OR REPLACE )?FUNCTION )", text, flags=re.MULTILINE)[1:]


def _name(function: str) -> str:
    return function.partition("FUNCTION ")[2].partition("(")[0]
