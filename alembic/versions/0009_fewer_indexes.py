"""Drop the index of a type's jobs: that of type and status lists them, a status at a time.

Every insert, claim and end of a job writes an entry of each index. And without statistics,
PostgreSQL chose this one to read a page of a hundred types, which then took 8 s instead of 26 ms at
half a million queued and as many finished jobs.

While processes of the release before run, they sort the jobs of a type to list them.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

additive = True


def upgrade() -> None:
    op.drop_index("job_by_type", "job")


def downgrade() -> None:
    op.create_index("job_by_type", "job", ["type", "id"])
