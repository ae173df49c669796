"""Jobs, their attempts, and counts that triggers maintain.

The tables are written out and not taken from the models, so that this migration does not change
when the models do.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")

QUEUED = sa.text("status = 'queued'")
RUNNING = sa.text("status = 'running'")


def upgrade() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("payload", JSON, nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("timeout_seconds", sa.Integer, nullable=False),
        sa.Column("backoff_base_seconds", sa.Double, nullable=False),
        sa.Column("backoff_cap_seconds", sa.Double, nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("created_by", sa.Text),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("next_run_at", TIME),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME),
        sa.Column("lease_token", sa.Text),
        sa.Column("lease_expires_at", TIME),
        sa.Column("deadline_at", TIME),
        sa.Column("cancel_requested_at", TIME),
        sa.Column("worker_id", sa.Text),
        sa.Column("progress", JSON),
        sa.Column("result", JSON),
        sa.Column("error", JSON),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')",
            name="job_status",
        ),
        sa.CheckConstraint("priority BETWEEN 0 AND 100", name="job_priority"),
        sa.CheckConstraint("attempt BETWEEN 0 AND max_attempts", name="job_attempt_bound"),
        sa.CheckConstraint(
            "(status = 'queued') = (next_run_at IS NOT NULL)", name="job_queued_has_next_run"
        ),
        sa.CheckConstraint(
            "status <> 'running' OR (lease_token IS NOT NULL AND lease_expires_at IS NOT NULL"
            " AND deadline_at IS NOT NULL)",
            name="job_running_has_lease",
        ),
        sa.CheckConstraint(
            "(status IN ('queued', 'running')) = (finished_at IS NULL)",
            name="job_finished_has_time",
        ),
    )
    op.create_index(
        "job_claim",
        "job",
        ["type", sa.text("priority DESC"), "next_run_at", "id"],
        sqlite_where=QUEUED,
        postgresql_where=QUEUED,
    )
    op.create_index("job_running", "job", ["type"], sqlite_where=RUNNING, postgresql_where=RUNNING)
    op.create_index(
        "job_lease_expiry",
        "job",
        ["lease_expires_at"],
        sqlite_where=RUNNING,
        postgresql_where=RUNNING,
    )
    has_key = sa.text("idempotency_key IS NOT NULL")
    op.create_index(
        "job_idempotency_key",
        "job",
        ["type", "idempotency_key"],
        unique=True,
        sqlite_where=has_key,
        postgresql_where=has_key,
    )
    op.create_index("job_by_status", "job", ["status", "id"])
    op.create_index("job_by_type", "job", ["type", "id"])
    finished = sa.text("finished_at IS NOT NULL")
    op.create_index(
        "job_finished",
        "job",
        ["status", "finished_at"],
        sqlite_where=finished,
        postgresql_where=finished,
    )
    op.create_table(
        "job_attempt",
        sa.Column("id", SERIAL, primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.Uuid, sa.ForeignKey("job.id", ondelete="CASCADE"), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("worker_id", sa.Text, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("finished_at", TIME),
        sa.Column("outcome", sa.Text),
        sa.Column("error", JSON),
        sa.CheckConstraint(
            "outcome IS NULL OR outcome IN ('succeeded', 'failed', 'timed_out', 'lost',"
            " 'released', 'snoozed', 'cancelled')",
            name="job_attempt_outcome",
        ),
        sa.CheckConstraint(
            "(outcome IS NULL) = (finished_at IS NULL)", name="job_attempt_finished_has_outcome"
        ),
    )
    op.create_index("job_attempt_of_job", "job_attempt", ["job_id", "id"])
    unfinished = sa.text("finished_at IS NULL")
    op.create_index(
        "job_attempt_open",
        "job_attempt",
        ["job_id"],
        unique=True,
        sqlite_where=unfinished,
        postgresql_where=unfinished,
    )
    op.create_table(
        "job_type_state",
        sa.Column("type", sa.Text, primary_key=True),
        sa.Column("worker_seen_at", TIME),
    )
    op.create_table(
        "job_count",
        sa.Column("id", SERIAL, primary_key=True, autoincrement=True),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("jobs", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "job_event_batch",
        sa.Column("id", SERIAL, primary_key=True, autoincrement=True),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sqlite_autoincrement=True,
    )
    if op.get_bind().dialect.name == "sqlite":
        _count_on_sqlite()
    else:
        _count_on_postgresql()


def downgrade() -> None:
    # SQLite drops the triggers together with the table.
    op.drop_table("job_event_batch")
    op.drop_table("job_count")
    op.drop_table("job_type_state")
    op.drop_table("job_attempt")
    op.drop_table("job")
    if op.get_bind().dialect.name == "postgresql":
        for function in ("job_count_inserted", "job_count_updated", "job_count_deleted"):
            op.execute(f"DROP FUNCTION {function}()")


def _count_on_sqlite() -> None:
    """Keep one counter per type and status: SQLite has one writer at a time."""
    add = """
        INSERT INTO job_count (type, status, jobs)
        SELECT {row}.type, {row}.status, 0 WHERE NOT EXISTS (
            SELECT 1 FROM job_count WHERE type = {row}.type AND status = {row}.status);
        UPDATE job_count SET jobs = jobs + {change}
        WHERE type = {row}.type AND status = {row}.status;"""
    more, less = add.format(row="NEW", change=1), add.format(row="OLD", change=-1)
    op.execute(f"CREATE TRIGGER job_count_inserted AFTER INSERT ON job BEGIN {more} END")
    op.execute(f"CREATE TRIGGER job_count_deleted AFTER DELETE ON job BEGIN {less} END")
    op.execute(
        "CREATE TRIGGER job_count_updated AFTER UPDATE OF status ON job"
        f" WHEN OLD.status <> NEW.status BEGIN {less} {more} END"
    )


def _count_on_postgresql() -> None:
    """Append a row per statement, type and status: a counter would make commits wait."""
    for name, when, change in (
        (
            "inserted",
            "AFTER INSERT ON job REFERENCING NEW TABLE AS changed",
            "SELECT type, status, count(*) FROM changed GROUP BY type, status",
        ),
        (
            "deleted",
            "AFTER DELETE ON job REFERENCING OLD TABLE AS changed",
            "SELECT type, status, -count(*) FROM changed GROUP BY type, status",
        ),
        (
            "updated",
            "AFTER UPDATE ON job REFERENCING OLD TABLE AS before NEW TABLE AS changed",
            """
            SELECT type, status, sum(jobs) FROM (
                SELECT type, status, 1 AS jobs FROM changed
                UNION ALL SELECT type, status, -1 FROM before
            ) AS moved GROUP BY type, status HAVING sum(jobs) <> 0""",
        ),
    ):
        op.execute(f"""
            CREATE FUNCTION job_count_{name}() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO job_count (type, status, jobs) {change};
                RETURN NULL;
            END $$""")
        op.execute(
            f"CREATE TRIGGER job_count_{name} {when}"
            f" FOR EACH STATEMENT EXECUTE FUNCTION job_count_{name}()"
        )
